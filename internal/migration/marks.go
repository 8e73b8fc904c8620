package migration

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/google/uuid"

	"drafter/migrate"
)

// marks are the notes of a VM's status, made one after the other. They are safe for concurrent use.
type marks struct {
	mu   sync.Mutex    // guards the following
	last chan struct{} // closed when the last one has been made
	err  error
}

func newMarks() *marks {
	m := &marks{last: make(chan struct{})}
	close(m.last)
	return m
}

// make notes a phase, after the notes before it, in a goroutine of wg. It returns a channel that is
// closed when that is done. A note that fails does not keep the target from what it needs; see
// failed.
func (m *marks) make(ctx context.Context, wg *sync.WaitGroup, vm SourceVM, phase migrate.Phase, id uuid.UUID) <-chan struct{} {
	done := make(chan struct{})
	m.mu.Lock()
	previous := m.last
	m.last = done
	m.mu.Unlock()
	wg.Go(func() {
		defer close(done)
		<-previous
		err := vm.Mark(ctx, phase, id)
		m.mu.Lock()
		defer m.mu.Unlock()
		switch {
		case err != nil:
			m.err = errors.Join(m.err, fmt.Errorf("note that the VM is %q: %w", phase, err))
		case phase == migrate.Moved:
			m.err = nil // what it could not store here is of no use any more
		}
	})
	return done
}

// made waits for the last mark.
func (m *marks) made() {
	m.mu.Lock()
	last := m.last
	m.mu.Unlock()
	<-last
}

// failed is the error of the notes so far.
func (m *marks) failed() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

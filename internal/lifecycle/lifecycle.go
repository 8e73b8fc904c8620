// Package lifecycle keeps a component to its order: it is started once, used while it runs, and
// closed. A call out of order is refused before it touches anything.
package lifecycle

import (
	"sync"

	"drafter/internal/kind"
)

// Life is what a component has been through. Its zero value is that of a new one. Its methods are
// safe for concurrent use.
type Life struct {
	mu              sync.Mutex
	started, closed bool
}

// Start is for the first call, which may fail: it is not tried again.
func (l *Life) Start() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return kind.ErrClosed
	case l.started:
		return kind.ErrStarted
	}
	l.started = true
	return nil
}

// Running refuses what is for a component between its start and its end.
func (l *Life) Running() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return kind.ErrClosed
	case !l.started:
		return kind.ErrNotStarted
	}
	return nil
}

// Close is the end. It is idempotent.
func (l *Life) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
}

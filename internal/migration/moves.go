package migration

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"drafter/migrate"
)

// Moves are the migrations of a VM, or of devices, in one process: the one that has brought it, if
// any, and those that may take it away. The zero value has none. Its methods are safe for
// concurrent use.
type Moves struct {
	mu      sync.Mutex
	arrival *Target
	source  *Source
}

// Arrive notes the migration that has brought it. Close closes that.
func (m *Moves) Arrive(t *Target) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.arrival = t
}

// Arrival is the migration that has brought it; nil if none has.
func (m *Moves) Arrival() *Target {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.arrival
}

// Offer returns its source, which is made once, and from which a migration can begin again if its last
// offer was revoked. Close closes it.
func (m *Moves) Offer(source func() (*Source, error)) (_ *Source, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.source == nil {
		m.source, err = source()
		return m.source, err
	}
	m.source.renew()
	return m.source, nil
}

// Source is what Offer has made; nil before.
func (m *Moves) Source() *Source {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.source
}

// Arrived is closed when everything has arrived, or never will. It is nil if no migration has
// brought it.
func (m *Moves) Arrived() <-chan struct{} {
	if t := m.Arrival(); t != nil {
		return t.Done()
	}
	return nil
}

// ArrivalError waits until Arrived is closed, and returns why not everything has arrived.
func (m *Moves) ArrivalError() error {
	if t := m.Arrival(); t != nil {
		return t.Wait()
	}
	return nil
}

// Stats are the statistics of the latest migration from here or to here. ok is false when there was
// none.
func (m *Moves) Stats() (stats migrate.Stats, ok bool) {
	source, arrival := m.Source(), m.Arrival()
	if source != nil {
		if s := source.Stats(); len(s.Devices) > 0 {
			return s, true
		}
	}
	if arrival != nil {
		return arrival.Stats(), true
	}
	return stats, false
}

// Close ends all migrations, and tells whether it has moved away.
func (m *Moves) Close() (moved bool, err error) {
	source, arrival := m.Source(), m.Arrival()
	if source != nil {
		err = source.Close()
		moved = source.Phase() == migrate.Moved
	}
	if arrival != nil {
		err = errors.Join(err, arrival.Close())
	}
	return moved, err
}

// Accept serves connections until stop is called, which waits for the last of them. It calls
// complain with the failure of a connection or a migration, unless what it was about has moved.
func (s *Source) Accept(ctx context.Context, accept migrate.Accept, complain func(stream io.ReadWriteCloser, err error)) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() {
		migrate.AcceptAll(ctx, s.config.Logger, accept, func(ctx context.Context, stream io.ReadWriteCloser) {
			if err := s.Handle(ctx, stream); err != nil && s.Phase() != migrate.Moved && ctx.Err() == nil {
				complain(stream, err)
			}
		})
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// Withdraw is [Source.Revoke] at the source's end. If a target owns the VM, Withdraw waits until
// the target has all that it needs of this source, as [Source.Relinquish] does. It calls waiting
// before.
func (s *Source) Withdraw(patience time.Duration, waiting func()) error {
	err := s.Revoke(errors.New("the source was ended"))
	if errors.Is(err, migrate.ErrHandedOver) {
		waiting()
		err = s.Relinquish(patience)
	}
	return err
}

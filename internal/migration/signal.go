package migration

import (
	"sync"

	"drafter/migrate"
)

// signal is something that happens once.
type signal struct {
	once sync.Once
	c    chan struct{}
}

func newSignal() *signal { return &signal{c: make(chan struct{})} }

// fire fires the signal. It is idempotent.
func (s *signal) fire() { s.once.Do(func() { close(s.c) }) }

// fired is closed once the signal has fired.
func (s *signal) fired() <-chan struct{} { return s.c }

// has tells whether it has happened.
func (s *signal) has() bool {
	select {
	case <-s.c:
		return true
	default:
		return false
	}
}

// standing is the phase of a migration, which others follow. It is safe for concurrent use.
type standing struct {
	mu      sync.Mutex // guards the following
	phase   migrate.Phase
	changed chan struct{}
}

func newStanding() *standing {
	return &standing{phase: migrate.Preflight, changed: make(chan struct{})}
}

// Phase is where the migration stands.
func (s *standing) Phase() migrate.Phase {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.phase
}

// enter comes to a phase.
func (s *standing) enter(p migrate.Phase) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.phase = p
	close(s.changed)
	s.changed = make(chan struct{})
}

// follow returns the phase, and a channel that is closed when the phase changes.
func (s *standing) follow() (migrate.Phase, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.phase, s.changed
}

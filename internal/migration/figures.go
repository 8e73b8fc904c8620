package migration

import (
	"sync"
	"time"

	"drafter/migrate"
)

// figures are what one side of a migration measures for all devices together. They are safe for
// concurrent use.
type figures struct {
	mu        sync.Mutex
	began     time.Time
	preflight time.Duration // 0 until its end
	total     time.Duration // 0 until its end
	paused    time.Time
	downtime  time.Duration
	cycle     int
}

// update changes the figures.
func (f *figures) update(change func(f *figures)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// pausedAt is when the VM was paused.
func (f *figures) pausedAt() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.paused
}

// cycles is the number of the last cycle.
func (f *figures) cycles() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cycle
}

// pause is how long the VM was paused.
func (f *figures) pause() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.downtime
}

// stats returns all statistics but those of devices.
func (f *figures) stats(phase migrate.Phase, wire int64) migrate.Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := migrate.Stats{Phase: phase, Cycle: f.cycle, Preflight: f.preflight, Total: f.total, Paused: f.downtime, Wire: wire}
	if s.Total == 0 {
		s.Total = time.Since(f.began)
	}
	return s
}

// report calls back with statistics ten times a second, and once more when it is stopped.
func report(stats func() migrate.Stats, to func(migrate.Stats)) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				to(stats())
				return
			case <-tick.C:
				to(stats())
			}
		}
	})
	return func() {
		close(done)
		wg.Wait()
	}
}

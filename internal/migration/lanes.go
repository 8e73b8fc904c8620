package migration

import (
	"errors"
	"sync"
	"time"
)

// lanes are the connections of one side of a migration: the main one, and the demand lane for pages
// that somebody waits for. They are safe for concurrent use.
type lanes struct {
	mu       sync.Mutex // guards the following
	main     *link      // nil before the first
	demand   *link      // nil if there is none
	attached chan struct{}
	retired  int64     // bytes of links that were replaced
	parted   time.Time // when the last main link has ended
}

func newLanes() *lanes { return &lanes{attached: make(chan struct{})} }

// get returns the links; nil for one that is not there.
func (n *lanes) get() (main, demand *link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.main, n.demand
}

// follow returns the main link, and a channel that is closed when it is replaced.
func (n *lanes) follow() (main *link, replaced <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.main, n.attached
}

// urgent is the link for pages that somebody waits for.
func (n *lanes) urgent() *link {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.demand.alive() {
		return n.demand
	}
	return n.main
}

// setMain replaces the main link.
func (n *lanes) setMain(l *link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.retire(n.main)
	n.main = l
	close(n.attached)
	n.attached = make(chan struct{})
}

// setDemand replaces the other one.
func (n *lanes) setDemand(l *link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.retire(n.demand)
	n.demand = l
}

// joinDemand sets the demand lane, and replaces an earlier one.
func (n *lanes) joinDemand(l *link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.demand = l
}

// restart replaces both links by a new main one, unless the demand link has come since.
func (n *lanes) restart(main, demand *link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.count(n.main)
	n.count(demand)
	n.main = main
	if n.demand == demand {
		n.demand = nil
	}
}

// retire ends a link that is replaced, with mu held.
func (n *lanes) retire(l *link) {
	if l != nil {
		l.cancel(errReconnected)
		n.count(l)
	}
}

// count keeps the bytes of a link that is replaced, with mu held.
func (n *lanes) count(l *link) {
	if l != nil {
		n.retired += l.Sent() + l.Received()
	}
}

var errReconnected = errors.New("the target has reconnected")

// cancel ends the links.
func (n *lanes) cancel(cause error) {
	main, demand := n.get()
	for _, l := range []*link{main, demand} {
		if l != nil {
			l.cancel(cause)
		}
	}
}

// close ends the links, and waits for that.
func (n *lanes) close(cause error) {
	main, demand := n.get()
	for _, l := range []*link{main, demand} {
		if l != nil {
			l.close(cause)
		}
	}
}

// part notes that a main link has ended.
func (n *lanes) part() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.parted = time.Now()
}

// away tells for how long no link has been there; 0 while one is.
func (n *lanes) away() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.main.alive() || n.demand.alive() {
		return 0
	}
	return time.Since(n.parted)
}

// connected tells whether a link is there.
func (n *lanes) connected() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.main.alive() || n.demand.alive()
}

// bytes is the number of bytes on all links, also those that have ended.
func (n *lanes) bytes() int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	sum := n.retired
	for _, l := range []*link{n.main, n.demand} {
		if l != nil {
			sum += l.Sent() + l.Received()
		}
	}
	return sum
}

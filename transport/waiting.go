package transport

import (
	"net"
	"net/netip"
	"slices"
	"sync"
)

// Host identifies the host of a connection, for limits: an IPv4 address, or the 64-bit network of
// an IPv6 address, which one host has for itself. It is empty for a connection within this host,
// which has millions of loopback addresses.
func Host(stream any) string {
	c, ok := stream.(interface{ RemoteAddr() net.Addr })
	if !ok {
		return ""
	}
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return ""
	}
	ip := a.AddrPort().Addr().Unmap()
	if ip.IsLoopback() {
		return ""
	}
	if ip.Is4() {
		return ip.String()
	}
	return netip.PrefixFrom(ip.WithZone(""), 64).Masked().String()
}

// Peer is the address of a connection's peer, for a log.
func Peer(stream any) string {
	c, ok := stream.(net.Conn)
	if !ok {
		return "a stream"
	}
	if a := c.RemoteAddr().String(); a != "" && a != "@" {
		return a
	}
	return c.LocalAddr().String() // clients of UNIX sockets have no name
}

// Waiting bounds the connections whose peers have not yet proved who they are or what they want.
// Nobody can keep others out: with too many, one more ends the one that has waited longest, of the
// host that has most. The zero value is ready. It is safe for concurrent use.
type Waiting struct {
	Most int // 256 if 0

	mu  sync.Mutex
	all []*Place // oldest first
}

const mostWaiting = 256

// Place is the place of one connection. Leave it when it is no longer needed.
type Place struct {
	of    *Waiting
	host  string
	evict func()
}

// Enter gives a connection of a host a place. If the place is needed for another connection, evict
// is called, once. It must not block.
func (w *Waiting) Enter(host string, evict func()) *Place {
	p := &Place{w, host, evict}
	w.mu.Lock()
	most := w.Most
	if most == 0 {
		most = mostWaiting
	}
	w.all = append(w.all, p)
	var crowded *Place
	if len(w.all) > most {
		crowded = w.crowded()
		w.remove(crowded)
	}
	w.mu.Unlock()
	if crowded != nil {
		crowded.evict()
	}
	return p
}

// crowded returns the oldest place of the host that has most. mu is held.
func (w *Waiting) crowded() *Place {
	count := map[string]int{}
	for _, p := range w.all {
		count[p.host]++
	}
	oldest := w.all[0]
	for _, p := range w.all {
		if count[p.host] > count[oldest.host] {
			oldest = p
		}
	}
	return oldest
}

func (w *Waiting) remove(p *Place) {
	if i := slices.Index(w.all, p); i >= 0 {
		w.all = slices.Delete(w.all, i, i+1)
	}
}

// Leave gives the place back. It is idempotent.
func (p *Place) Leave() {
	p.of.mu.Lock()
	defer p.of.mu.Unlock()
	p.of.remove(p)
}

// Shares divides a number of places between hosts. A host that has none gets one, unless there are
// very many hosts. It is safe for concurrent use.
type Shares struct {
	mu    sync.Mutex
	free  int
	taken map[string]int
}

// NewShares returns so many places.
func NewShares(places int) *Shares { return &Shares{free: places, taken: map[string]int{}} }

// atLeast is how many places a host gets while any are free: a peer has two connections.
const atLeast = 2

// Take takes a place for a host; give it back with Return. It returns false if no place is free, or
// if the host has two places already and no fewer than are free for others.
func (s *Shares) Take(host string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.free == 0 || s.taken[host] >= max(atLeast, s.free) {
		return false
	}
	s.free--
	s.taken[host]++
	return true
}

// Return gives back a place of a host.
func (s *Shares) Return(host string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free++
	if s.taken[host]--; s.taken[host] == 0 {
		delete(s.taken, host)
	}
}

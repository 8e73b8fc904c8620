package network

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// The kernel translates addresses, not protocols: IPv4 stays IPv4. And what comes back for the IPv6
// loopback address it takes from no other interface, as RFC 4291, 2.5.3, has it. A relay forwards
// these as any proxy does, in the forwarder's process, connection by connection. The guest sees the
// host as its client.

// relay accepts TCP connections and passes on what is sent over them.
type relay struct {
	listener net.Listener
	to       string
	log      *slog.Logger
	slots    chan struct{} // one for each connection at a time
	wait     sync.WaitGroup
	mu       sync.Mutex // guards what follows
	open     map[*net.TCPConn]bool
	closed   bool
}

const (
	mostRelayed  = 1000             // connections at a time, which have two descriptors each
	relayTimeout = 10 * time.Second // to connect with the guest
)

// startRelay listens at an address of the host.
func startRelay(external, to string, log *slog.Logger) (*relay, error) {
	l, err := net.Listen("tcp", external)
	if err != nil {
		return nil, err
	}
	r := &relay{listener: l, to: to, log: log, slots: make(chan struct{}, mostRelayed), open: map[*net.TCPConn]bool{}}
	r.wait.Go(r.serve)
	return r, nil
}

func (r *relay) serve() {
	for {
		r.slots <- struct{}{}
		c, err := r.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no descriptor is free, say
			r.log.Warn("A forward cannot take a connection", "address", r.listener.Addr().String(), "error", err)
			time.Sleep(100 * time.Millisecond)
			<-r.slots
			continue
		}
		r.wait.Go(func() {
			r.pass(c.(*net.TCPConn))
			<-r.slots
		})
	}
}

// pass connects a client with the guest until either ends.
func (r *relay) pass(client *net.TCPConn) {
	if !r.note(client) {
		return
	}
	defer r.end(client)
	c, err := net.DialTimeout("tcp", r.to, relayTimeout)
	if err != nil {
		reset := client.SetLinger(0) // refused, as far as one can after accepting
		r.log.Debug("The guest behind a forward does not answer", "to", r.to, "error", errors.Join(err, reset))
		return
	}
	guest := c.(*net.TCPConn)
	if !r.note(guest) {
		return
	}
	defer r.end(guest)
	var back sync.WaitGroup
	back.Go(func() { forwardStream(client, guest) })
	forwardStream(guest, client)
	back.Wait()
}

// forwardStream copies until the stream ends, and ends the other one alike: in order, or by RST.
func forwardStream(to, from *net.TCPConn) {
	_, err := io.Copy(to, from)
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		for _, c := range []*net.TCPConn{to, from} {
			_ = c.SetLinger(0) // it may be closed already
			_ = c.Close()
		}
	}
}

// note notes an open connection, unless the relay is closed.
func (r *relay) note(c *net.TCPConn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		_ = c.Close() // it was not used
		return false
	}
	r.open[c] = true
	return true
}

func (r *relay) end(c *net.TCPConn) {
	_ = c.Close() // both streams have ended
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open, c)
}

// Close ends the relay and resets its connections.
func (r *relay) Close() error {
	err := r.listener.Close()
	r.mu.Lock()
	r.closed = true
	for c := range r.open {
		_ = c.SetLinger(0) // it may be closed already
		_ = c.Close()
	}
	r.mu.Unlock()
	select {
	case <-r.slots: // for who waits for one
	default:
	}
	r.wait.Wait()
	if err != nil {
		return fmt.Errorf("end relay: %w", err)
	}
	return nil
}

package vmmtest

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"syscall"

	"drafter/internal/wire"
)

// End is one of the two ends of a [Link].
type End string

// The ends.
const (
	AtSource End = "source"
	AtTarget End = "target"
)

// Fate is what becomes of a message, and of the link with it.
type Fate int

// The fates.
const (
	Arrives Fate = iota
	Lost         // all connections break before it
	Last         // all connections break once it has arrived
)

// Link connects targets with a source, and breaks where a test says. Its methods are safe for
// concurrent use.
type Link struct {
	// At, if not nil, is asked about each message before it is sent, by its sender, who waits. It is
	// set before the link is used.
	At func(from End, message wire.Type) Fate

	ForGood bool // whether a link that has broken stays so

	coming chan net.Conn
	down   chan struct{} // closed when the link has broken for good

	mu    sync.Mutex // guards the following
	conns []net.Conn
	gone  bool
}

// NewLink returns a link that works.
func NewLink() *Link { return &Link{coming: make(chan net.Conn), down: make(chan struct{})} }

// Dial is a [migrate.Dial] for targets. Where the link is down, nobody listens.
func (l *Link) Dial(ctx context.Context) (io.ReadWriteCloser, error) {
	l.mu.Lock()
	if l.gone {
		l.mu.Unlock()
		return nil, syscall.ECONNREFUSED
	}
	here, there := net.Pipe()
	l.conns = append(l.conns, here, there)
	l.mu.Unlock()
	select {
	case l.coming <- there:
		return &end{here, l, AtTarget}, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Accept is a [migrate.Accept] for the source.
func (l *Link) Accept(ctx context.Context) (io.ReadWriteCloser, error) {
	select {
	case c := <-l.coming:
		return &end{c, l, AtSource}, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Break ends all connections. With forGood, there are no others.
func (l *Link) Break(forGood bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		_ = c.Close() // a pipe's never fails
	}
	l.conns = nil
	if forGood && !l.gone {
		l.gone = true
		close(l.down)
	}
}

// Down is closed when the link has broken for good.
func (l *Link) Down() <-chan struct{} { return l.down }

// end is a connection at one end.
type end struct {
	net.Conn
	link *Link
	at   End
}

// Write sends whole messages, as a [wire.Conn] writes them.
func (e *end) Write(b []byte) (int, error) {
	fate := Arrives
	if e.link.At != nil {
		for rest := b; len(rest) > 0; {
			if f := e.link.At(e.at, wire.Type(rest[4])); fate != Lost && f != Arrives {
				fate = f
			}
			rest = rest[16+binary.LittleEndian.Uint32(rest):]
		}
	}
	if fate == Lost {
		e.link.Break(e.link.ForGood)
	}
	n, err := e.Conn.Write(b)
	if fate == Last {
		e.link.Break(e.link.ForGood)
	}
	return n, err
}

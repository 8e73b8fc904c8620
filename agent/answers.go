package agent

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync"
)

// answers is a connection with a guest that lets only answers to our calls through: one for each
// call, and of a stream as many as it likes until it ends. A guest that sends anything else ends the
// connection. Otherwise ttrpc would log a line for each such message, as fast as a guest can send.
type answers struct {
	net.Conn

	in, out frames // of a Read and a Write; there is one of each at a time

	mu      sync.Mutex
	awaited map[uint32]byte // calls that have no answer yet or are streams, by the flags of their requests
	broken  error           // what ended it; ttrpc only says that it is closed
}

// The part of ttrpc's protocol (PROTOCOL.md of containerd/ttrpc) that answers needs: a header of
// length and stream, 4 bytes each and big-endian, a type and flags; then as many bytes as the
// length says.
const (
	headerLen    = 10
	typeRequest  = 1
	typeResponse = 2
	typeData     = 3
	flagClosed   = 1       // nothing follows from who sends it
	maxMessage   = 4 << 20 // bytes
	maxData      = maxPiece + 4<<10
)

func newAnswers(conn net.Conn) *answers { return &answers{Conn: conn, awaited: map[uint32]byte{}} }

func (a *answers) Write(p []byte) (int, error) {
	// Before it is sent, because the answer may be there before Write returns.
	err := a.out.follow(p, func(kind, flags byte, stream, _ uint32) error {
		if kind == typeRequest {
			a.mu.Lock()
			a.awaited[stream] = flags
			a.mu.Unlock()
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return a.Conn.Write(p)
}

func (a *answers) Read(p []byte) (int, error) {
	n, err := a.Conn.Read(p)
	a.mu.Lock()
	defer a.mu.Unlock()
	broken := a.in.follow(p[:n], func(kind, flags byte, stream, length uint32) error {
		request, awaited := a.awaited[stream]
		switch {
		case awaited && kind == typeResponse && length <= maxMessage:
			delete(a.awaited, stream)
		case awaited && kind == typeData && request != 0 && length <= maxData:
			if flags&flagClosed != 0 {
				delete(a.awaited, stream)
			}
		default:
			return fmt.Errorf("the guest sent what nobody asked for: message type %d of %d bytes for call %d", kind, length, stream)
		}
		return nil
	})
	if broken != nil {
		a.broken = broken
		return 0, broken
	}
	return n, err
}

// refuse ends the connection with a guest that broke the rules of a call.
func (a *answers) refuse(err error) {
	a.mu.Lock()
	if a.broken == nil {
		a.broken = fmt.Errorf("the guest sent what nobody asked for: %w", err)
	}
	a.mu.Unlock()
	a.Close()
}

// reason returns the error that err follows from, or err.
func (a *answers) reason(err error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil && a.broken != nil {
		return a.broken
	}
	return err
}

// frames finds the headers in a stream of ttrpc's messages, however it is cut into pieces.
type frames struct {
	header [headerLen]byte
	have   int    // bytes of the header
	rest   uint32 // bytes of the message
}

func (f *frames) follow(p []byte, found func(kind, flags byte, stream, length uint32) error) error {
	for len(p) > 0 {
		if f.rest > 0 {
			n := min(uint64(f.rest), uint64(len(p)))
			f.rest -= uint32(n)
			p = p[n:]
			continue
		}
		n := copy(f.header[f.have:], p)
		f.have += n
		p = p[n:]
		if f.have < headerLen {
			return nil
		}
		f.have, f.rest = 0, binary.BigEndian.Uint32(f.header[:])
		if err := found(f.header[8], f.header[9], binary.BigEndian.Uint32(f.header[4:]), f.rest); err != nil {
			return err
		}
	}
	return nil
}

package agent

import (
	"errors"
	"io"
	"sync"
)

// The conversation with a guest is one stream of bytes. No session may fill it up while its reader
// does not read, because the calls around a suspend have to get through. So each side sends of each
// of a session's streams only what the other has room for. The room is counted in bytes, where a
// message counts overhead more than it holds, which bounds the number of messages, too: it is below
// what ttrpc queues of a stream.
const (
	window   = 64 << 10
	overhead = 2 << 10
	maxPiece = 16 << 10 // bytes in a message
)

// maxSessions bounds the sessions of a conversation.
const maxSessions = 64

func cost(p []byte) int { return len(p) + overhead }

// allowance is what may still be sent.
type allowance struct {
	mu    sync.Mutex
	freed sync.Cond
	spent int
	err   error // nothing more is sent
}

func newAllowance() *allowance {
	a := &allowance{}
	a.freed.L = &a.mu
	return a
}

// await returns how many bytes the next message may hold, once it may hold any.
func (a *allowance) await() (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.err == nil && window-a.spent <= overhead {
		a.freed.Wait()
	}
	return min(window-a.spent-overhead, maxPiece), a.err
}

func (a *allowance) spend(p []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.spent += cost(p)
}

var errUnsent = errors.New("the other side has read more than was sent")

// taken notes what the other side has read.
func (a *allowance) taken(n uint32) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n == 0 || int64(n) > int64(a.spent) {
		return errUnsent
	}
	a.spent -= int(n)
	a.freed.Broadcast()
	return nil
}

func (a *allowance) end(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = err
	}
	a.freed.Broadcast()
}

// inbox holds what has arrived and was not read yet.
type inbox struct {
	take func(n uint32) // tells the other side how much was read

	mu      sync.Mutex
	arrived sync.Cond
	pieces  [][]byte
	at      int   // in the first piece
	unread  int   // what the other side has sent and was not told to be read, as cost counts
	read    int   // of it, what was read
	err     error // follows the pieces
}

func newInbox(take func(n uint32)) *inbox {
	b := &inbox{take: take}
	b.arrived.L = &b.mu
	return b
}

var errNoRoom = errors.New("the other side has sent more than there is room for")

// put adds a piece. Past the end it only counts: the other side may not have heard of it.
func (b *inbox) put(p []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(p) > maxPiece || b.unread+cost(p) > window {
		return errNoRoom
	}
	b.unread += cost(p)
	if b.err == nil {
		b.pieces = append(b.pieces, p)
		b.arrived.Broadcast()
	}
	return nil
}

// end makes reads return err behind what has arrived.
func (b *inbox) end(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.err = err
	}
	b.arrived.Broadcast()
}

// drop makes reads return err at once.
func (b *inbox) drop(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pieces, b.at, b.err = nil, 0, err
	b.arrived.Broadcast()
}

// Read implements [io.Reader].
func (b *inbox) Read(p []byte) (int, error) {
	n, read, err := b.next(p)
	if read > 0 {
		b.take(uint32(read))
	}
	return n, err
}

func (b *inbox) next(p []byte) (n, read int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.pieces) == 0 && b.err == nil {
		b.arrived.Wait()
	}
	if len(b.pieces) == 0 {
		return 0, 0, b.err
	}
	n = copy(p, b.pieces[0][b.at:])
	if b.at += n; b.at == len(b.pieces[0]) {
		b.read += cost(b.pieces[0])
		b.pieces, b.at = b.pieces[1:], 0
	}
	// Not each piece, because a message costs time, too.
	if b.read >= window/4 && b.err == nil {
		read, b.read = b.read, 0
		b.unread -= read
	}
	return n, read, nil
}

var _ io.Reader = (*inbox)(nil)

// Package wire holds the frames of the migration protocol: how they are encoded, decoded and
// bounded. docs/protocol.md describes them byte by byte. Package migration decides what is sent
// when.
package wire

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"

	"drafter/internal/block"
)

// Version is the version of the protocol. Both sides must speak the same.
const Version = 2

// Type says what a frame is.
type Type uint8

// The types of frames, and who sends them.
const (
	TypeHello     Type = 1  // target: opens every connection
	TypeManifest  Type = 2  // source: what there is to migrate
	TypeAccept    Type = 3  // target: it can be done; which bases are there
	TypeExtent    Type = 4  // source: pages of a device
	TypeWant      Type = 5  // target: pages that somebody waits for
	TypeCycle     Type = 6  // source: a cycle begins, with so much to send
	TypeReady     Type = 7  // target: the VMM waits; source: it goes on after a resume
	TypeAuthority Type = 8  // source: the VM is the target's; what has not been sent
	TypeAck       Type = 9  // target: the VM runs here, or never will
	TypeResume    Type = 10 // target, after a lost connection: where it stands
	TypeComplete  Type = 11 // target: all has arrived and is durable
	TypeReleased  Type = 12 // source: it has taken note that the VM is no longer its
	TypeProgress  Type = 13 // target: all from before a cycle is stored
	TypePing      Type = 14 // both: the connection lives
	TypeError     Type = 15 // both: why the migration or the connection ends
	TypeSnapshot  Type = 16 // source: all of a copy has been sent; the VM goes on there
	TypeContents  Type = 17 // registry, or target: content ids of a device's blocks
	// source, on a forward lane: an operation of a user of a device that has moved away
	TypeOperation Type = 18
	TypeResult    Type = 19 // target, on a forward lane: what became of it
	TypePrepare   Type = 20 // source: the handoff is near; target: it is ready for that
	TypeState     Type = 21 // source: so much of the VM's state has been sent, and all else
	TypeHanded    Type = 22 // source: pages that the target has in the file that came with the manifest
)

func (t Type) String() string {
	names := [...]string{1: "hello", "manifest", "accept", "extent", "want", "cycle", "ready", "authority", "ack", "resume", "complete", "released", "progress", "ping", "error", "snapshot", "contents", "operation", "result", "prepare", "state", "handed"}
	if int(t) < len(names) && names[t] != "" {
		return names[t]
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// Limits of payloads, in bytes.
const (
	MaxExtent = 1 << 20 // of data in one extent
	maxList   = 8 << 20 // of page sets in one message

	MaxContents = 32 << 10 // content ids in one message, not bytes

	// What a side expects may be bounded further, see [Conn.Bound].
	MaxHello   = 256
	MaxWant    = 4096           // of all that a target sends once it has a package's manifest
	MaxPayload = maxList + 4096 // of all

	extentHeader    = 12
	operationHeader = 21
)

// maxPayload is the largest payload of a type, in bytes. It is checked before anything is
// allocated.
func maxPayload(t Type) int {
	switch t {
	case TypeHello:
		return MaxHello
	case TypeManifest:
		return 2 << 20
	case TypeAccept:
		return 4096
	case TypeExtent:
		return extentHeader + MaxExtent
	case TypeOperation, TypeResult:
		return operationHeader + MaxExtent
	case TypeContents:
		return 12 + MaxContents*len(block.ID{})
	case TypeAuthority, TypeResume, TypeHanded:
		return MaxPayload
	case TypeError, TypeAck:
		return 4096
	case TypeWant, TypeCycle, TypeProgress, TypeReady, TypeComplete, TypeReleased, TypePing, TypeSnapshot, TypePrepare, TypeState:
		return 64
	}
	return -1
}

// The header of a frame; numbers are little-endian.
//
//	offset  size  field
//	0       4     length of the payload
//	4       1     type
//	5       1     encoding of an extent's data, else 0
//	6       2     index of the device in the manifest, else 0
//	8       8     XXH3-64 of the payload, seeded with bytes 0 to 7
const headerSize = 16

// ErrProtocol says that the other side does not follow the protocol, or that the connection damaged
// a frame.
var ErrProtocol = errors.New("protocol violation")

func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

// Frame is one message as received. Payload is valid until the next Read.
type Frame struct {
	Type     Type
	Encoding Encoding
	Device   uint16
	Payload  []byte
}

// Conn sends and receives frames over a byte stream. Any number of goroutines may send, one may
// receive.
type Conn struct {
	stream io.ReadWriteCloser
	reader *bufio.Reader
	files  *fileReader // below reader, if a file may come; else nil
	send   priorityLock
	batch  []byte           // frames that are to be sent, guarded by send
	header [headerSize]byte // of Read
	buffer []byte           // of Read, reused
	bound  int              // of payloads, in bytes

	// since when Read has waited for data, in nanoseconds since 1970; 0: it does not
	waiting  atomic.Int64
	heard    atomic.Bool  // Read has been called
	writing  atomic.Int64 // since when what is sent has waited to be taken; 0: nothing does
	in, out  atomic.Int64 // bytes
	closed   sync.Once
	closeErr error
}

// NewConn frames stream, which it owns from here on.
func NewConn(stream io.ReadWriteCloser) *Conn {
	return &Conn{stream: stream, reader: bufio.NewReaderSize(stream, 32<<10), bound: MaxPayload}
}

// Bound bounds the payloads of frames that are received from here on, in bytes, so that a stranger
// can use no more memory. Call it from the goroutine that calls Read.
func (c *Conn) Bound(bytes int) { c.bound = bytes }

// Close closes the stream, which ends every Read and send. It is idempotent.
func (c *Conn) Close() error {
	c.closed.Do(func() {
		c.closeErr = c.stream.Close()
		if f := c.TakeFile(); f != nil {
			c.closeErr = errors.Join(c.closeErr, f.Close())
		}
	})
	return c.closeErr
}

// Silence is how long Read has been waiting without receiving anything. Before the first Read it is
// how long a frame has been waiting to be sent. Later a waiting frame does not count, because the
// other side may be slow and alive.
func (c *Conn) Silence() time.Duration {
	since := c.waiting.Load()
	if since == 0 && !c.heard.Load() {
		since = c.writing.Load()
	}
	if since == 0 {
		return 0
	}
	return time.Since(time.Unix(0, since))
}

// Sent is the number of bytes that were sent.
func (c *Conn) Sent() int64 { return c.out.Load() }

// Received is the number of bytes that were received.
func (c *Conn) Received() int64 { return c.in.Load() }

// sealFrame fills in the header of a frame whose payload follows it.
func sealFrame(b []byte, t Type, encoding Encoding, device uint16) {
	payload := b[headerSize:]
	binary.LittleEndian.PutUint32(b, uint32(len(payload)))
	b[4], b[5] = byte(t), byte(encoding)
	binary.LittleEndian.PutUint16(b[6:], device)
	binary.LittleEndian.PutUint64(b[8:], xxh3.HashSeed(payload, binary.LittleEndian.Uint64(b)))
}

// Urgency says when a frame is sent.
type Urgency int

// When a frame is sent.
const (
	Later  Urgency = iota // with the next frame, or at the next Flush: small frames go together
	Soon                  // now
	Urgent                // now, before those that wait
)

// What goes together, in bytes.
const (
	maxBatch   = 64 << 10
	maxBatched = 16 << 10 // a larger frame is not worth the copy
)

// write sends a sealed frame.
func (c *Conn) write(b []byte, when Urgency) error {
	if when == Urgent {
		c.send.lockUrgent()
		defer c.send.unlockUrgent()
	} else {
		c.send.lock()
		defer c.send.unlock()
	}
	if when == Later && len(b) <= maxBatched {
		if len(c.batch)+len(b) > maxBatch {
			if err := c.flush(); err != nil {
				return err
			}
		}
		c.batch = append(c.batch, b...)
		return nil
	}
	if err := c.flush(); err != nil {
		return err
	}
	if err := c.writeOut(b); err != nil {
		return fmt.Errorf("send %s: %w", Type(b[4]), err)
	}
	return nil
}

// Flush sends what was to be sent later.
func (c *Conn) Flush() error {
	c.send.lock()
	defer c.send.unlock()
	return c.flush()
}

func (c *Conn) flush() error {
	if len(c.batch) == 0 {
		return nil
	}
	b := c.batch
	c.batch = c.batch[:0]
	if err := c.writeOut(b); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

func (c *Conn) writeOut(b []byte) error {
	c.writing.Store(time.Now().UnixNano())
	defer c.writing.Store(0)
	n, err := c.stream.Write(b)
	c.out.Add(int64(n))
	return err
}

// Read receives the next frame.
func (c *Conn) Read() (f Frame, err error) {
	c.waiting.Store(time.Now().UnixNano())
	defer c.waiting.Store(0)
	c.heard.Store(true)
	h := c.header[:]
	if _, err := io.ReadFull(c.reader, h); err != nil {
		return f, fmt.Errorf("receive: %w", err)
	}
	f = Frame{Type: Type(h[4]), Encoding: Encoding(h[5]), Device: binary.LittleEndian.Uint16(h[6:])}
	length, most := int64(binary.LittleEndian.Uint32(h)), maxPayload(f.Type)
	if most < 0 {
		return f, violation("%s is unknown", f.Type)
	}
	if most = min(most, c.bound); length > int64(most) {
		return f, violation("a frame %s of %d bytes, of which %d are allowed", f.Type, length, most)
	}
	if err := c.readPayload(int(length)); err != nil {
		return f, fmt.Errorf("receive %s: %w", f.Type, err)
	}
	f.Payload = c.buffer[:length]
	if got, want := xxh3.HashSeed(f.Payload, binary.LittleEndian.Uint64(h)), binary.LittleEndian.Uint64(h[8:]); got != want {
		return f, violation("a frame %s was damaged on its way: its checksum is %016x instead of %016x", f.Type, got, want)
	}
	c.in.Add(headerSize + length)
	return f, nil
}

// readPayload reads into the buffer, which grows only as data arrive.
func (c *Conn) readPayload(length int) error {
	const step = extentHeader + MaxExtent
	for done := 0; done < length; {
		n := min(step, length-done)
		if len(c.buffer) < done+n {
			c.buffer = append(c.buffer, make([]byte, done+n-len(c.buffer))...)
		}
		m, err := io.ReadFull(c.reader, c.buffer[done:done+n])
		done += m
		if m > 0 {
			c.waiting.Store(time.Now().UnixNano())
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	if len(c.buffer) > 2*step && length <= step {
		c.buffer = c.buffer[:step:step] // a large message is rare
	}
	return nil
}

// priorityLock is a lock whose urgent holders wait for at most one other.
type priorityLock struct{ background, next, held sync.Mutex }

func (l *priorityLock) lock() {
	l.background.Lock()
	l.lockUrgent()
}

func (l *priorityLock) unlock() {
	l.unlockUrgent()
	l.background.Unlock()
}

func (l *priorityLock) lockUrgent() {
	l.next.Lock()
	l.held.Lock()
	l.next.Unlock()
}

func (l *priorityLock) unlockUrgent() { l.held.Unlock() }

// pagesOf is the number of pages of bytes.
func pagesOf(bytes int64) int64 { return (bytes + block.PageSize - 1) / block.PageSize }

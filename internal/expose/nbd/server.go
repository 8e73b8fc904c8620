// Package nbd exposes devices by the NBD protocol: to any client over a UNIX socket or TCP, and as
// /dev/nbdN where the kernel has a client of its own. The protocol is the one of
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: fixed newstyle negotiation,
// simple and structured replies, the metadata context base:allocation.
package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"

	"drafter/internal/block"
)

// Export is a device under a name. The first export of a server is also the one with the empty
// name.
type Export struct {
	Name     string
	Device   block.Device
	ReadOnly bool
}

const (
	maxName   = 4096     // bytes; the limit of the protocol for strings
	maxOption = 64 << 10 // bytes of an option's data
	// bytes of a request's data; clients assume this where nothing else was said
	maxRequest = 32 << 20
	// maxInFlight bounds the data of all requests that a connection has under way.
	maxInFlight = 64 << 20
	// negotiationTimeout bounds how long a stranger may hold a connection.
	negotiationTimeout = 10 * time.Second
)

// Serve answers clients of l until ctx ends, which also ends their connections. It closes l.
func Serve(ctx context.Context, l net.Listener, exports []Export) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	var connections sync.WaitGroup
	defer connections.Wait()
	defer stop()
	defer cancel()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept NBD client: %w", err)
		}
		// What a client does wrong is its own affair: it sees its connection end.
		connections.Go(func() { _ = ServeConn(ctx, conn, exports) })
	}
}

// ServeConn answers one client until it disconnects or ctx ends. It closes conn.
func ServeConn(ctx context.Context, conn net.Conn, exports []Export) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	c := &connection{conn: conn, r: bufio.NewReaderSize(conn, 64<<10), exports: exports}
	conn.SetDeadline(time.Now().Add(negotiationTimeout))
	export, err := c.negotiate()
	if err != nil || export == nil {
		return err
	}
	conn.SetDeadline(time.Time{})
	return serveExport(ctx, c, export)
}

// serveExport answers requests on a connection whose negotiation is over.
func serveExport(ctx context.Context, c *connection, export *Export) error {
	t := &transmission{connection: c, export: export, inFlight: semaphore.NewWeighted(maxInFlight)}
	err := t.serve(ctx)
	t.requests.Wait()
	return err
}

type connection struct {
	conn       net.Conn
	r          *bufio.Reader
	exports    []Export
	noZeroes   bool
	structured bool
	allocation bool // the client asked for base:allocation

	write sync.Mutex // one reply at a time
}

// Transmission.
const (
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagFUA    = 1 << 0
	cmdFlagDF     = 1 << 2
	cmdFlagReqOne = 1 << 3

	chunkDone        = 1
	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 | 1

	stateHole = 1 << 0
	stateZero = 1 << 1
)

type transmission struct {
	*connection
	export   *Export
	inFlight *semaphore.Weighted
	requests sync.WaitGroup
	buffers  sync.Pool // of *[]byte of up to pooledBuffer
}

// pooledBuffer is the size of the buffers that are kept, in bytes.
const pooledBuffer = 1 << 20

type request struct {
	flags, kind uint16
	handle      uint64
	offset      uint64
	length      uint32
}

func (t *transmission) serve(ctx context.Context) error {
	var header [28]byte
	for {
		if _, err := io.ReadFull(t.r, header[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if binary.BigEndian.Uint32(header[:]) != magicRequest {
			return errors.New("NBD request has no magic number")
		}
		r := &request{
			flags: binary.BigEndian.Uint16(header[4:]), kind: binary.BigEndian.Uint16(header[6:]), handle: binary.BigEndian.Uint64(header[8:]),
			offset: binary.BigEndian.Uint64(header[16:]), length: binary.BigEndian.Uint32(header[24:]),
		}
		if r.kind == cmdDisconnect {
			return nil
		}
		if err := t.start(ctx, r); err != nil {
			return err
		}
	}
}

// start reads the data of a request, and handles the rest of it in a goroutine.
func (t *transmission) start(ctx context.Context, r *request) error {
	var weight int64 = 4096 // a request without data takes something as well
	carries := r.kind == cmdWrite || r.kind == cmdRead
	if carries {
		if r.length > maxRequest {
			if r.kind == cmdWrite {
				// Its data cannot be skipped in good faith.
				return fmt.Errorf("NBD write of %d bytes", r.length)
			}
			return t.fail(r, syscall.EOVERFLOW, "request is too long")
		}
		weight += int64(r.length)
	}
	if err := t.inFlight.Acquire(ctx, weight); err != nil {
		return context.Cause(ctx)
	}
	var buffer *[]byte
	if carries {
		buffer = t.buffer(int(r.length))
		if r.kind == cmdWrite {
			if _, err := io.ReadFull(t.r, (*buffer)[:r.length]); err != nil {
				t.inFlight.Release(weight)
				return err
			}
		}
	}
	t.requests.Go(func() {
		defer t.inFlight.Release(weight)
		var data []byte
		if buffer != nil {
			data = (*buffer)[:r.length]
			defer t.recycle(buffer)
		}
		if err := t.handle(r, data); err != nil {
			t.conn.Close() // the reply is incomplete: the connection is useless, and serve ends
		}
	})
	return nil
}

func (t *transmission) buffer(n int) *[]byte {
	if b, ok := t.buffers.Get().(*[]byte); ok && cap(*b) >= n {
		*b = (*b)[:cap(*b)]
		return b
	}
	b := make([]byte, max(n, min(pooledBuffer, n*2)))
	return &b
}

func (t *transmission) recycle(b *[]byte) {
	if cap(*b) <= pooledBuffer {
		t.buffers.Put(b)
	}
}

// handle executes a request. It returns an error only when the reply could not be written.
func (t *transmission) handle(r *request, data []byte) error {
	d := t.export.Device
	if r.kind == cmdFlush {
		return t.finish(r, d.Sync())
	}
	if size := uint64(d.Size()); r.offset > size || uint64(r.length) > size-r.offset {
		code := syscall.EINVAL
		if r.kind == cmdWrite || r.kind == cmdWriteZeroes {
			code = syscall.ENOSPC
		}
		return t.fail(r, code, "request leaves the device")
	}
	off, length := int64(r.offset), int64(r.length)
	changes := r.kind == cmdWrite || r.kind == cmdTrim || r.kind == cmdWriteZeroes
	if changes && t.export.ReadOnly {
		return t.fail(r, syscall.EPERM, "export is read-only")
	}
	var err error
	switch r.kind {
	case cmdRead:
		return t.read(r, data)
	case cmdWrite:
		_, err = d.WriteAt(data, off)
	case cmdTrim:
		err = block.Trim(d, off, length)
	case cmdWriteZeroes:
		// Zeros are zeros: NO_HOLE asks for space to be kept, which no overlay can promise.
		err = block.Trim(d, off, length)
	case cmdBlockStatus:
		return t.blockStatus(r)
	default:
		return t.fail(r, syscall.EINVAL, "command is unknown")
	}
	if err == nil && r.flags&cmdFlagFUA != 0 {
		err = d.Sync()
	}
	return t.finish(r, err)
}

// finish replies to a request that yields no data.
func (t *transmission) finish(r *request, err error) error {
	if err != nil {
		code := syscall.EIO
		if errors.Is(err, syscall.ENOSPC) {
			code = syscall.ENOSPC
		} else if errors.Is(err, block.ErrReadOnly) {
			code = syscall.EPERM
		}
		return t.fail(r, code, err.Error())
	}
	if t.structured {
		return t.chunk(r, chunkDone, chunkNone, nil, nil)
	}
	return t.simple(r, 0, nil)
}

func (t *transmission) fail(r *request, code syscall.Errno, why string) error {
	if !t.structured {
		return t.simple(r, code, nil)
	}
	why = why[:min(len(why), maxName)]
	head := binary.BigEndian.AppendUint32(nil, uint32(code))
	head = binary.BigEndian.AppendUint16(head, uint16(len(why)))
	return t.chunk(r, chunkDone, chunkError, append(head, why...), nil)
}

func (t *transmission) simple(r *request, code syscall.Errno, data []byte) error {
	head := make([]byte, 0, 16)
	head = binary.BigEndian.AppendUint32(head, magicSimple)
	head = binary.BigEndian.AppendUint32(head, uint32(code))
	head = binary.BigEndian.AppendUint64(head, r.handle)
	return t.send(head, data)
}

func (t *transmission) chunk(r *request, flags, kind uint16, head, data []byte) error {
	b := make([]byte, 0, 32)
	b = binary.BigEndian.AppendUint32(b, magicStructured)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, r.handle)
	b = binary.BigEndian.AppendUint32(b, uint32(len(head)+len(data)))
	return t.send(append(b, head...), data)
}

func (t *transmission) send(head, data []byte) error {
	t.write.Lock()
	defer t.write.Unlock()
	buffers := net.Buffers{head, data}
	_, err := buffers.WriteTo(t.conn)
	return err
}

// read replies with data and, in structured replies, holes.
func (t *transmission) read(r *request, data []byte) error {
	d, off, end := t.export.Device, int64(r.offset), int64(r.offset)+int64(r.length)
	if !t.structured || r.flags&cmdFlagDF != 0 || r.length == 0 {
		if _, err := d.ReadAt(data, off); err != nil {
			return t.finish(r, err)
		}
		if !t.structured {
			return t.simple(r, 0, data)
		}
		return t.chunk(r, chunkDone, chunkOffsetData, binary.BigEndian.AppendUint64(nil, r.offset), data)
	}
	for off < end {
		start, next, err := block.NextData(d, off)
		if err != nil {
			return t.finish(r, err)
		}
		start, next = min(start, end), min(next, end)
		if start > off {
			head := binary.BigEndian.AppendUint64(nil, uint64(off))
			head = binary.BigEndian.AppendUint32(head, uint32(start-off))
			if err := t.chunk(r, done(start == end), chunkOffsetHole, head, nil); err != nil {
				return err
			}
		}
		if next > start {
			part := data[start-int64(r.offset) : next-int64(r.offset)]
			if _, err := d.ReadAt(part, start); err != nil {
				return t.finish(r, err)
			}
			if err := t.chunk(r, done(next == end), chunkOffsetData, binary.BigEndian.AppendUint64(nil, uint64(start)), part); err != nil {
				return err
			}
		}
		off = max(start, next)
	}
	return nil
}

func done(last bool) uint16 {
	if last {
		return chunkDone
	}
	return 0
}

// maxExtents bounds the reply to a block status request; the client asks again for the rest.
const maxExtents = 4096

func (t *transmission) blockStatus(r *request) error {
	if !t.structured || !t.allocation || r.length == 0 {
		return t.fail(r, syscall.EINVAL, "base:allocation was not negotiated")
	}
	off, end := int64(r.offset), int64(r.offset)+int64(r.length)
	most := maxExtents
	if r.flags&cmdFlagReqOne != 0 {
		most = 1
	}
	extents := binary.BigEndian.AppendUint32(nil, allocationID)
	add := func(length int64, flags uint32) {
		if length > 0 && most > 0 {
			extents = binary.BigEndian.AppendUint32(extents, uint32(length))
			extents = binary.BigEndian.AppendUint32(extents, flags)
			most--
		}
	}
	for off < end && most > 0 {
		start, next, err := block.NextData(t.export.Device, off)
		if err != nil {
			return t.finish(r, err)
		}
		start, next = min(start, end), min(next, end)
		add(start-off, stateHole|stateZero)
		add(next-start, 0)
		off = max(start, next)
	}
	return t.chunk(r, chunkDone, chunkBlockStatus, extents, nil)
}

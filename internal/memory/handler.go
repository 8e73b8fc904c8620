package memory

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/block"
)

// Config says what to serve.
type Config struct {
	Device  *Device // of whose top missing pages come, and which is told of written ones
	Track   Tracking
	Private bool // the process maps what the device is stored in: nothing is missing
}

// Backing is how a VMM has its memory; see [Device].
type Backing string

// The backings. BackingAuto is private where that is possible.
const (
	BackingAuto    Backing = "auto"
	BackingPrivate Backing = "private"
	BackingShared  Backing = "shared"
)

// Check refuses values that users cannot choose. "" stands for BackingAuto.
func (b Backing) Check() error {
	switch b {
	case "", BackingAuto, BackingPrivate, BackingShared:
		return nil
	}
	return fmt.Errorf("backing %q of memory is unknown; choose auto, private or shared", b)
}

// Tracking is how written pages become known.
type Tracking string

// The ways. A kernel that lacks a way refuses it, but TrackAuto takes what there is, and may take
// TrackNone.
const (
	TrackAuto Tracking = "auto"
	// The kernel notes writes, and is asked for them (PAGEMAP_SCAN with UFFD_FEATURE_WP_ASYNC, since
	// Linux 6.7). It takes a userfaultfd that this package prepares.
	TrackScan Tracking = "scan"
	// The first write to a page is a fault, which the handler answers.
	TrackFaults Tracking = "faults"
	TrackNone   Tracking = "none" // somebody else knows
)

// Check refuses values that users cannot choose. "" stands for TrackAuto.
func (t Tracking) Check() error {
	switch t {
	case "", TrackAuto, TrackScan, TrackFaults:
		return nil
	}
	return fmt.Errorf("way %q to know written pages is unknown; choose auto, scan or faults", t)
}

// Handler serves one process' memory. Its methods are safe for concurrent use.
//
// A page has one of these states: missing, present and write-protected, present and written. A
// missing page is filled write-protected from the device, unless the fault is a write. With
// [TrackFaults], the first write to a protected page marks it dirty and lifts the protection. With
// [TrackScan], the kernel lifts it. [Handler.Collect] takes the marks, protects the pages again, and
// tells the device. Marking and lifting are one step, and so are taking and protecting, under the
// lock of the page's stripe. Nobody does I/O under such a lock.
type Handler struct {
	device   *Device
	fd       descriptor
	stop     int // an eventfd that ends the readers
	pid      int
	regions  []region
	unit     int64 // size of a page
	whole    bool  // no page is missing
	tracking Tracking

	// Held for reading while pages are filled, for writing while events are read and removals
	// noted. So a fill sees every removal before it.
	events   sync.RWMutex
	removals atomic.Uint64 // events that were noted
	held     bool          // nothing is filled that nobody waits for

	present *block.Bitmap // pages that have been filled; the device's if that is shared
	dirty   *block.Bitmap // pages written since they were last collected, with TrackFaults
	removed *block.Bitmap // pages that read as zeros, whatever the device holds

	collecting sync.Mutex // held by a Collect
	scan       *scan      // with TrackScan

	touched struct {
		sync.Mutex
		pages []uint32 // the first that faulted, in order
	}

	ctx     context.Context
	cancel  context.CancelFunc
	workers sync.WaitGroup
	failure sync.Once
	failed  chan struct{} // closed when memory could not be served
	err     error         // why, once failed is closed
	closing atomic.Bool
	closed  sync.Once

	zeros   buffer
	buffers chan buffer // see take

	faults, writes atomic.Int64
}

const (
	batch = 16 // events read at once
	// A fault often follows soon. The reader then sees it without a wake-up, as KVM does with
	// halt_poll_ns.
	spin = 50 * time.Microsecond

	around     = 64 << 10 // bytes brought along with a page
	maxNear    = 64       // pages whose neighbours wait to be filled
	fillSize   = 256 << 10
	maxTouched = 8192
)

// Serve reads the handshake of a Firecracker, whose process id is pid, from conn, and serves its
// memory until Close. Written pages are known by faults, or not at all.
func Serve(conn *net.UnixConn, pid int, c Config) (*Handler, error) {
	fd, regions, err := receive(conn)
	if err != nil {
		return nil, err
	}
	h := &Handler{device: c.Device, fd: fd, pid: pid, regions: regions, tracking: c.Track}
	missing := func(r region) error {
		if h.tracking == TrackNone {
			return nil // Firecracker has registered it
		}
		if err := fd.register(r.Base, r.Size, registerMissing|registerWP); err != nil {
			// an old kernel, or memory that cannot be protected: for the first region or for all
			h.tracking = TrackNone
		} else {
			h.tracking = TrackFaults
		}
		return nil
	}
	if err := h.begin(missing); err != nil {
		return nil, err
	}
	return h, nil
}

// ServeMapping serves the memory of process pid, which has mapped it as m says, by a userfaultfd of
// that process, until Close. The userfaultfd is new, and the handler's from then on. m is a mapping
// of the device's file or, with Private, a private one of what it is stored in.
func ServeMapping(userfaultfd *os.File, pid int, m Mapping, c Config) (*Handler, error) {
	fd, err := take(userfaultfd)
	if err != nil {
		return nil, err
	}
	h := &Handler{device: c.Device, fd: fd, pid: pid, regions: []region{{Base: m.Start, Size: m.Size, PageSize: m.PageSize}}}
	if h.tracking, err = fd.prepare(c.Track); err != nil {
		return nil, errors.Join(err, unix.Close(int(fd)))
	}
	h.whole = c.Private || c.Device.blank
	err = h.begin(func(r region) error {
		mode := uint64(registerMissing | registerWP)
		if h.whole {
			mode = registerWP
		}
		if err := fd.register(r.Base, r.Size, mode); err != nil {
			return fmt.Errorf("register memory: %w", err)
		}
		if err := fd.writeProtect(r.Base, r.Size, true); err != nil {
			return fmt.Errorf("protect memory: %w", err)
		}
		return nil
	})
	if err == nil && c.Private {
		if err = h.copyIn(); err != nil {
			err = errors.Join(err, h.Close())
		}
	}
	if err != nil {
		return nil, err
	}
	return h, nil
}

// begin begins to serve, once each region is registered. On an error everything is freed.
func (h *Handler) begin(register func(region) error) (err error) {
	h.stop, h.unit, h.failed, h.buffers = -1, int64(h.regions[0].PageSize), make(chan struct{}), make(chan buffer, 16)
	defer func() {
		if err != nil {
			err = errors.Join(err, h.free())
		}
	}()
	size := int64(0)
	for _, r := range h.regions {
		size = max(size, int64(r.Offset+r.Size))
	}
	if size > h.device.Size() {
		return fmt.Errorf("serve memory: the VM has %d bytes, the memory device %d", size, h.device.Size())
	}
	pages := size / h.unit
	h.present, h.dirty, h.removed = block.NewBitmap(pages), block.NewBitmap(pages), block.NewBitmap(pages)
	switch {
	case h.device.file.Load() != nil:
		h.present = h.device.present
	case h.whole:
		h.present.SetRange(0, pages)
	}
	if h.zeros, err = newBuffer(h.unit); err != nil {
		return err
	}
	if h.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return fmt.Errorf("make eventfd: %w", err)
	}
	for _, r := range h.regions {
		if err := register(r); err != nil {
			return err
		}
	}
	if h.tracking == TrackScan {
		if h.scan, err = newScan(h.pid); err != nil {
			return err
		}
	}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.workers.Go(h.watch)
	h.device.guest.Store(h)
	return nil
}

// Tracking is how written pages become known; [TrackNone] if Collect does not work.
func (h *Handler) Tracking() Tracking { return h.tracking }

// tracked tells whether pages are protected when they are filled.
func (h *Handler) tracked() bool { return h.tracking != TrackNone }

// Enter notes that the process may use its memory from now on.
func (h *Handler) Enter() { h.device.enter() }

// Fill begins to fill pages before they are touched: first those listed, by number, in this order,
// and then, with all, all others. The process may use its memory.
func (h *Handler) Fill(first []uint32, all bool) {
	if all || len(first) > 0 {
		h.workers.Go(func() { h.fill(first, all) })
	}
}

// Failed is closed when a page could not be served: the thread that waits for it waits for ever.
// Err then says why.
func (h *Handler) Failed() <-chan struct{} { return h.failed }

// Err is why Failed is closed.
func (h *Handler) Err() error {
	select {
	case <-h.failed:
		return h.err
	default:
		return nil
	}
}

// Faults is the number of faults on missing pages, and of first writes to protected ones.
func (h *Handler) Faults() (missing, writes int64) { return h.faults.Load(), h.writes.Load() }

// Touched returns the pages that were missed first, in order.
func (h *Handler) Touched() []uint32 {
	h.touched.Lock()
	defer h.touched.Unlock()
	return append([]uint32(nil), h.touched.pages...)
}

// Close ends the serving. The process must have ended, or its threads wait for ever. Goroutines
// that wait for the device must have been released.
func (h *Handler) Close() (err error) {
	h.closed.Do(func() {
		h.closing.Store(true)
		h.cancel()
		var one [8]byte
		binary.NativeEndian.PutUint64(one[:], 1)
		if _, werr := unix.Write(h.stop, one[:]); werr != nil {
			err = fmt.Errorf("stop serving memory: %w", werr)
			return
		}
		h.workers.Wait()
		h.collecting.Lock() // a Collect that has begun ends
		defer h.collecting.Unlock()
		h.device.guest.CompareAndSwap(h, nil)
		err = h.free()
	})
	return err
}

func (h *Handler) free() error {
	errs := []error{unix.Close(int(h.fd))}
	if h.scan != nil {
		errs = append(errs, h.scan.close())
	}
	if h.stop >= 0 {
		errs = append(errs, unix.Close(h.stop))
	}
	if h.zeros != nil {
		errs = append(errs, h.zeros.free())
	}
	for {
		select {
		case b := <-h.buffers:
			errs = append(errs, b.free())
		default:
			return errors.Join(errs...)
		}
	}
}

func (h *Handler) fail(err error) {
	if h.closing.Load() || gone(err) {
		return
	}
	h.failure.Do(func() {
		h.err = fmt.Errorf("serve memory: %w", err)
		close(h.failed)
	})
}

// fault is one thread that waits for a page.
type fault struct {
	page  int64
	write bool // it writes
	wp    bool // the page is there, but protected
}

// pages are those from first, and before end.
type pages struct{ first, end int64 }

// watch waits for events and serves them. Without events it fills the neighbours of the pages that
// were missed, the last page's first, page by page.
func (h *Handler) watch() {
	b, err := newBuffer(max(h.unit, around))
	if err != nil {
		h.fail(err)
		return
	}
	defer func() { _ = b.free() }() // a mapping of ours
	var near []pages
	idle := func() bool {
		if len(near) == 0 {
			return false
		}
		last := &near[len(near)-1]
		ok := h.bringAll(pages{last.first, last.first + 1}, b, false)
		if last.first++; !ok || last.first >= last.end {
			near = near[:len(near)-1]
		}
		return true
	}
	var messages [batch * messageSize]byte
	for {
		n, err := h.next(messages[:], idle)
		if err != nil {
			h.fail(err)
			return
		}
		if n == 0 {
			return
		}
		for m := messages[:n]; len(m) >= messageSize; m = m[messageSize:] {
			if m[0] != eventPageFault {
				continue
			}
			flags, address := binary.NativeEndian.Uint64(m[8:]), binary.NativeEndian.Uint64(m[16:])
			off, ok := h.offset(address)
			if !ok {
				h.fail(fmt.Errorf("a fault at %#x is in no region", address))
				return
			}
			page := off / h.unit
			if h.answer(fault{page, flags&faultWrite != 0, flags&faultWP != 0}, b) && len(near) < maxNear {
				near = append(near, h.around(page))
			}
		}
	}
}

// next reads events, and notes removals. It returns 0 at the end. Without events it calls idle,
// until idle says that there is nothing to do.
func (h *Handler) next(messages []byte, idle func() bool) (int, error) {
	for begin := time.Now(); ; {
		timeout := 0
		if time.Since(begin) > spin {
			timeout = -1
		}
		polled := []unix.PollFd{{Fd: int32(h.fd), Events: unix.POLLIN}, {Fd: int32(h.stop), Events: unix.POLLIN}}
		ready, err := unix.Poll(polled, timeout)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && ready == 0:
			if idle() {
				begin = time.Now()
			}
			continue
		case err != nil:
			return 0, fmt.Errorf("wait for faults: %w", err)
		case polled[1].Revents != 0:
			return 0, nil
		case polled[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0:
			return 0, nil // the process has ended
		}
		h.events.Lock()
		n, err := unix.Read(int(h.fd), messages)
		for m := messages[:max(n, 0)]; len(m) >= messageSize; m = m[messageSize:] {
			if m[0] == eventRemove {
				h.remove(binary.NativeEndian.Uint64(m[8:]), binary.NativeEndian.Uint64(m[16:]))
			}
		}
		h.events.Unlock()
		switch {
		case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("read faults: %w", err)
		case n > 0:
			return n, nil
		}
	}
}

// remove notes that a balloon has given pages back: they read as zeros from now on.
func (h *Handler) remove(start, end uint64) {
	h.removals.Add(1)
	for _, r := range h.regions {
		from, to := max(start, r.Base), min(end, r.Base+r.Size)
		for first := from; first < to; {
			off := int64(first - r.Base + r.Offset)
			next := min(to, first+uint64(stripeSize-off%stripeSize))
			s := h.device.stripe(off)
			s.Lock()
			p, q := off/h.unit, (off+int64(next-first)+h.unit-1)/h.unit
			h.removed.SetRange(p, q)
			h.present.ClearRange(p, q)
			h.dirty.SetRange(p, q)
			s.Unlock()
			first = next
		}
	}
}

// offset translates an address of the process into one of the device.
func (h *Handler) offset(address uint64) (int64, bool) {
	for _, r := range h.regions {
		if address >= r.Base && address < r.Base+r.Size {
			return int64(address - r.Base + r.Offset), true
		}
	}
	return 0, false
}

// address translates an offset of the device, and tells how many bytes of the region follow.
func (h *Handler) address(off int64) (address uint64, follow int64, ok bool) {
	for _, r := range h.regions {
		if uint64(off) >= r.Offset && uint64(off) < r.Offset+r.Size {
			return r.Base + uint64(off) - r.Offset, int64(r.Offset + r.Size - uint64(off)), true
		}
	}
	return 0, 0, false
}

// answer answers a fault. If the page is at hand it does so at once, else without delaying the next
// fault. It tells whether it has filled a page.
func (h *Handler) answer(f fault, b buffer) bool {
	if f.wp {
		h.written(f.page)
		return false
	}
	h.faults.Add(1)
	h.touch(f.page)
	if h.bring(f, b, false) {
		return true
	}
	h.workers.Go(func() {
		own, err := h.take()
		if err != nil {
			h.fail(err)
			return
		}
		defer h.give(own)
		for pause := time.Microsecond; !h.bring(f, own, true); pause = min(2*pause, time.Millisecond) {
			select {
			case <-h.ctx.Done():
				return
			case <-time.After(pause):
			}
		}
		h.bringAll(h.around(f.page), own, true)
	})
	return false
}

// written notes the first write to a page and lets it go on.
func (h *Handler) written(page int64) {
	h.writes.Add(1)
	off := page * h.unit
	address, _, _ := h.address(off)
	s := h.device.stripe(off)
	s.Lock()
	h.dirty.Set(page)
	err := h.fd.writeProtect(address, uint64(h.unit), false)
	s.Unlock()
	switch {
	case errors.Is(err, unix.EAGAIN):
		// The layout changes. The event that says so has yet to be read, by another reader or by
		// this one.
		h.workers.Go(func() {
			select {
			case <-h.ctx.Done():
			case <-time.After(10 * time.Microsecond):
				h.written(page)
			}
		})
	case err != nil:
		h.fail(fmt.Errorf("lift protection of page %d: %w", page, err))
	}
}

// load reads from the device. It returns false if it must not wait and would have to.
func (h *Handler) load(p []byte, off int64, wait bool) (bool, error) {
	if !wait {
		return block.ReadNow(h.device.top, p, off), nil
	}
	_, err := h.device.top.ReadAt(p, off)
	return true, err
}

// bring fills a page that somebody waits for. It returns false if the caller has to try again: when
// it may wait, or when other events have been read.
func (h *Handler) bring(f fault, b buffer, wait bool) bool {
	off := f.page * h.unit
	// The page may have been removed since it was read. Its content is then old, even if the device
	// holds its zeros by now, and the page is no longer marked.
	removals, removed := h.removals.Load(), h.removed.Has(f.page)
	if !removed {
		if ok, err := h.load(b[:h.unit], off, wait); err != nil {
			h.fail(fmt.Errorf("page at %d: %w", off, err))
			return true
		} else if !ok {
			return false
		}
	}
	address, _, _ := h.address(off)
	h.events.RLock() // before the stripe, like the reader that notes a removal
	defer h.events.RUnlock()
	if h.removals.Load() != removals {
		return false
	}
	s := h.device.stripe(off)
	s.Lock()
	defer s.Unlock()
	var mode uint64
	marked := false
	switch {
	case h.tracking == TrackFaults && f.write:
		marked = h.dirty.Set(f.page) // before it can be written
	case f.write: // known by a scan, or to somebody else
	case h.tracked():
		mode = copyWP
	}
	var err error
	switch {
	case !removed:
		_, err = h.fd.copy(address, b.pointer(0), uint64(h.unit), mode)
	case !h.tracked() && h.unit < hugePage:
		err = h.fd.zero(address, uint64(h.unit))
	default: // the shared page of zeros cannot be protected, and there is no huge one
		_, err = h.fd.copy(address, h.zeros.pointer(0), uint64(h.unit), mode)
	}
	if marked && err != nil { // whoever fills the page protects or marks it
		h.dirty.ClearRange(f.page, f.page+1)
	}
	switch {
	case err == nil:
		h.present.Set(f.page)
	case errors.Is(err, unix.EEXIST):
		h.present.Set(f.page)
		err = h.fd.wake(address, uint64(h.unit))
	case errors.Is(err, unix.EAGAIN):
		return false
	}
	if err != nil {
		h.fail(fmt.Errorf("fill page at %d: %w", off, err))
	}
	return true
}

// around returns the pages to fill along with one.
func (h *Handler) around(page int64) pages {
	n := max(1, around/h.unit)
	first := page / n * n
	return pages{first, min(first+n, h.present.Len())}
}

// bringAll fills the pages that are still missing. It returns false when that cannot go on now.
func (h *Handler) bringAll(all pages, b buffer, wait bool) bool {
	for p := all.first; p < all.end; {
		q := p
		for q < all.end && !h.present.Has(q) && !h.removed.Has(q) {
			q++
		}
		if q > p && !h.bringMore(p, q, b, wait) {
			return false
		}
		p = q + 1
	}
	return true
}

// bringMore fills pages of one region that nobody is known to wait for. It returns false when that
// cannot go on now.
func (h *Handler) bringMore(p, q int64, b buffer, wait bool) bool {
	off, length := p*h.unit, (q-p)*h.unit
	address, follow, ok := h.address(off)
	length = min(length, follow)
	if !ok || !block.Local(h.device.top, off, length) {
		return false
	}
	removals := h.removals.Load() // as in bring
	if h.removed.Next(p) < q {
		return false
	}
	if ok, err := h.load(b[:length], off, wait); err != nil || !ok {
		return false // who needs it finds out why
	}
	var mode uint64
	if h.tracked() {
		mode = copyWP
	}
	h.events.RLock()
	defer h.events.RUnlock()
	if h.held || h.removals.Load() != removals {
		return false
	}
	for at := int64(0); at < length; {
		page := p + at/h.unit
		if h.present.Has(page) {
			at += h.unit
			continue
		}
		end := at + h.unit
		for end < length && !h.present.Has(p+end/h.unit) {
			end += h.unit
		}
		n, err := h.fd.copy(address+uint64(at), b.pointer(at), uint64(end-at), mode)
		h.present.SetRange(page, page+n/h.unit)
		at += n
		switch {
		case errors.Is(err, unix.EEXIST):
			at += h.unit
		case err != nil && !errors.Is(err, unix.EAGAIN):
			h.fail(fmt.Errorf("fill page at %d: %w", off+at, err))
			return false
		case err != nil && n == 0:
			return false
		}
	}
	return true
}

// take returns a buffer for a page that is waited for, and its neighbours.
func (h *Handler) take() (buffer, error) {
	select {
	case b := <-h.buffers:
		return b, nil
	default:
		return newBuffer(max(h.unit, around))
	}
}

func (h *Handler) give(b buffer) {
	select {
	case h.buffers <- b:
	default:
		_ = b.free() // a mapping of ours
	}
}

func (h *Handler) touch(page int64) {
	h.touched.Lock()
	defer h.touched.Unlock()
	if len(h.touched.pages) < maxTouched {
		h.touched.pages = append(h.touched.pages, uint32(page))
	}
}

// fill fills pages before they are touched: first those that are known to be needed, then all.
// Pages that another host still has to send are left until they are here.
func (h *Handler) fill(list []uint32, all bool) {
	b, err := newBuffer(max(h.unit, fillSize))
	if err != nil {
		h.fail(err)
		return
	}
	defer func() { _ = b.free() }() // a mapping of ours
	for i := 0; i < len(list) && h.ctx.Err() == nil; {
		p := int64(list[i])
		q := p + 1
		for i++; i < len(list) && int64(list[i]) == q && (q-p)*h.unit < fillSize; i++ {
			q++
		}
		if q <= h.present.Len() {
			h.bringMore(p, q, b, true)
		}
	}
	for all && !h.pass(b) {
		select {
		case <-h.ctx.Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// pass fills pages that are at hand, and tells whether those were all.
func (h *Handler) pass(b buffer) (all bool) {
	all = true
	step := max(1, fillSize/h.unit)
	for p := int64(0); p < h.present.Len() && h.ctx.Err() == nil; {
		start, _, err := block.NextData(h.device.top, p*h.unit)
		if err != nil {
			return true // who needs it finds out
		}
		p = max(p, start/h.unit)
		if p >= h.present.Len() {
			break
		}
		if h.present.Has(p) || h.removed.Has(p) {
			p++
			continue
		}
		q := p + 1
		for q < min(p+step, h.present.Len()) && !h.present.Has(q) && !h.removed.Has(q) {
			q++
		}
		if !h.bringMore(p, q, b, true) {
			all = false
		}
		p = q
	}
	return all
}

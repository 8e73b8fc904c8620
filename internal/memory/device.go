// Package memory holds the memory of VMs. It serves the memory of a process that runs a VM, by
// userfaultfd(2), and knows which pages the process has written.
//
// A [Device] is the memory as the engine sees it. Below it is what is stored; pages that differ
// from that are in the guest, and nowhere else. So a running VM costs no writes, and one that is
// sent is read where it is. A [Handler] serves one process, and tells its Device of written pages.
package memory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/sparse"
)

// Device is a VM's memory. Its pages are those that are stored, until a VMM has it. From then on
// pages that were written since are the guest's: they are read from there, and [Device.Store]
// writes them to what is stored. It is safe for concurrent use.
//
// A VMM has the memory in one of two ways. With a shared backing, the device has a file in memory
// (memfd_create(2)) that both map; what is written to the device goes there, and pages may still be
// to come. With a private backing, the VMM maps the file that the memory is stored in privately: it
// shares clean pages with all others who do, and costs what it writes.
type Device struct {
	stored block.Device
	top    block.Device // with the layers above; the device itself if there are none
	note   func(off, length int64)

	// Pages that the guest has, and that are not stored. A page is in unsaved or storing until it is
	// stored; whoever looks for it looks there in this order.
	unsaved, storing *block.Bitmap
	stowed           *block.Bitmap // pages that were stored while the guest has them

	base   *block.File          // where memory is stored, but for pages in differ; nil if it is not known
	differ func() *block.Bitmap // nil for none

	file    atomic.Pointer[os.File] // nil for one that is not shared
	blank   bool                    // the guest's memory began as zeros
	present *block.Bitmap           // pages that are in the file
	stripes [64]sync.Mutex

	adopted atomic.Bool   // the file is still another process'
	number  atomic.Uint64 // of the migration that the file was offered to; 0: it is not

	guest   atomic.Pointer[Handler] // nil while no process is served
	entered atomic.Bool             // the guest may have written what is in the file
	turn    sync.Mutex              // of Store
	noRoom  bool                    // what the last Store found; guarded by turn
}

// stripeSize is the bytes that share a lock.
const stripeSize = 2 << 20

// New returns the memory that is stored in a device, and owns it.
func New(stored block.Device) *Device {
	n := block.Pages(stored)
	d := &Device{stored: stored, unsaved: block.NewBitmap(n), storing: block.NewBitmap(n), stowed: block.NewBitmap(n), present: block.NewBitmap(n)}
	d.top, d.note = d, func(int64, int64) {}
	return d
}

// Under says what lies above the device: missing pages are read through it, and it is told of pages
// that the guest has written. It is called before the device is used.
func (d *Device) Under(top *block.Tracker) { d.top, d.note = top, top.Note }

// Over says that memory is stored in a file, but for the pages of differ, which may be nil. The file
// changes only by this device. It is called before the device is used.
func (d *Device) Over(base *block.File, differ func() *block.Bitmap) { d.base, d.differ = base, differ }

// maxCopied bounds, in bytes, what is copied into a private mapping at its start. With more, pages
// that are missed are copied when they are.
const maxCopied = 64 << 20

// Mappable tells whether a VMM can map the memory privately: it is wholly stored here, most of it in
// one file, of a file system that is not itself in memory.
func (d *Device) Mappable() bool {
	if d.base == nil || d.base.InMemory() || d.file.Load() != nil || d.blank {
		return false
	}
	return d.differ == nil || d.differ().Count()*block.PageSize <= maxCopied
}

// Base opens the file to map privately, for reading. It is the caller's.
func (d *Device) Base() (*os.File, error) { return d.base.Reopen() }

// BaseName is the path of the file to map privately.
func (d *Device) BaseName() string { return d.base.Name() }

// Top is the device with the layers above it.
func (d *Device) Top() block.Device { return d.top }

// Size implements [block.Device].
func (d *Device) Size() int64 { return d.stored.Size() }

// Share gives the device a file for its VMM to map. Nothing is done if it has one.
func (d *Device) Share() error {
	if d.file.Load() != nil {
		return nil
	}
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("drafter-memory", flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("drafter-memory", flags)
	}
	if err != nil {
		return fmt.Errorf("make memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memory")
	if err = f.Truncate(d.fileSize()); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("make memory of %d bytes: %w", d.Size(), err), f.Close())
	}
	d.file.Store(f)
	return nil
}

// File returns another descriptor of a shared device's file, which is the caller's.
func (d *Device) File() (*os.File, error) {
	f := d.file.Load()
	if f == nil {
		return nil, fmt.Errorf("share memory: %w", errForgotten)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("share memory: %w", err)
	}
	return os.NewFile(uintptr(fd), "memory"), nil
}

// Copy writes the data of a sparse file, which is as large, to the shared device, whose guest does
// not run yet.
func (d *Device) Copy(f *os.File) error {
	extents, err := sparse.Extents(f, d.Size())
	if err != nil {
		return fmt.Errorf("copy memory: %w", err)
	}
	for _, e := range extents {
		if _, err := io.Copy(io.NewOffsetWriter(d.file.Load(), e.Offset), io.NewSectionReader(f, e.Offset, e.Length)); err != nil {
			return fmt.Errorf("copy memory: %w", err)
		}
		first, end := e.Offset/block.PageSize, (e.Offset+e.Length+block.PageSize-1)/block.PageSize
		d.present.SetRange(first, end)
		d.unsaved.SetRange(first, end)
	}
	return nil
}

// Blank makes the guest's memory zeros, whatever is stored, as before a boot.
func (d *Device) Blank() {
	d.blank = true
	d.unsaved.SetRange(0, d.unsaved.Len())
	d.present.SetRange(0, d.present.Len())
}

// Forget gives up what only the guest had. Its VMM has ended. Pages that still arrive for a device
// that was shared are refused.
func (d *Device) Forget() error {
	d.unsaved.Take()
	d.stowed.Take()
	d.lockStripes() // whoever places a page has done so
	f := d.file.Swap(nil)
	d.unlockStripes()
	if f == nil {
		return nil
	}
	d.present.Take()
	d.unsaved.Take()
	d.blank = false
	d.entered.Store(false)
	d.adopted.Store(false)
	d.number.Store(0)
	return f.Close()
}

// Unsaved returns a copy of the set of pages that differ from what is stored.
func (d *Device) Unsaved() *block.Bitmap {
	pages := d.unsaved.Clone()
	pages.Add(d.storing)
	return pages
}

// Written notes that the guest has, or may have, written a range.
func (d *Device) Written(off, length int64) {
	d.unsaved.SetRange(off/block.PageSize, (off+length+block.PageSize-1)/block.PageSize)
	d.note(off, length)
}

// run returns how many of the bytes at off, up to length, are all in the guest, or all stored.
func (d *Device) run(off, length int64) (guest bool, n int64) {
	first, end := off/block.PageSize, (off+length+block.PageSize-1)/block.PageSize
	in := func(page int64) bool { return d.unsaved.Has(page) || d.storing.Has(page) }
	guest = in(first)
	page := first + 1
	for page < end && in(page) == guest {
		page++
	}
	return guest, min(page*block.PageSize-off, length)
}

// ReadAt implements [block.Device].
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > d.Size()-int64(len(p)) {
		return d.stored.ReadAt(p, off) // which refuses it
	}
	for done := 0; done < len(p); {
		at := off + int64(done)
		guest, n := d.run(at, int64(len(p)-done))
		part := p[done : done+int(n)]
		var err error
		if guest {
			err = d.readGuest(part, at)
		} else {
			_, err = d.stored.ReadAt(part, at)
		}
		if err != nil {
			return done, err
		}
		if !guest && !d.isStored(at, n) { // no more
			continue
		}
		done += int(n)
	}
	return len(p), nil
}

// isStored tells whether nothing of a range is only in the guest.
func (d *Device) isStored(off, length int64) bool {
	guest, n := d.run(off, length)
	return !guest && n == length
}

// readGuest reads what the guest has.
func (d *Device) readGuest(p []byte, off int64) error {
	if f := d.file.Load(); f != nil {
		if _, err := f.ReadAt(p, off); err != nil {
			return fmt.Errorf("read memory at %d: %w", off, err)
		}
		return nil
	}
	h := d.guest.Load()
	if h == nil {
		return fmt.Errorf("read memory at %d: %w", off, errForgotten)
	}
	return h.read(p, off)
}

// ReadNow implements [block.NowReader].
func (d *Device) ReadNow(p []byte, off int64) bool {
	for len(p) > 0 {
		guest, n := d.run(off, int64(len(p)))
		switch {
		case guest && (d.file.Load() == nil || d.readGuest(p[:n], off) != nil):
			return false
		case !guest && (!block.ReadNow(d.stored, p[:n], off) || !d.isStored(off, n)):
			return false
		}
		p, off = p[n:], off+n
	}
	return true
}

// Local implements [block.Localizer].
func (d *Device) Local(off, length int64) bool {
	for length > 0 {
		guest, n := d.run(off, length)
		if !guest && !block.Local(d.stored, off, n) {
			return false
		}
		off, length = off+n, length-n
	}
	return true
}

// NextData implements [block.Mapper].
func (d *Device) NextData(off int64) (start, end int64, err error) {
	start, end, err = block.NextData(d.stored, off)
	if err != nil {
		return 0, 0, err
	}
	pages := d.Unsaved()
	first := pages.Next(off / block.PageSize)
	if first >= pages.Len() || first*block.PageSize > start {
		return start, end, nil
	}
	_, next := pages.Run(first, pages.Len())
	return max(off, first*block.PageSize), min(next*block.PageSize, d.Size()), nil
}

// errForgotten says that what only a guest had is gone.
var errForgotten = errors.New("the VMM that had it has ended")

// eachStripe calls f for the parts of a range that lie in one stripe each, with the stripe's lock held
// and the device's file.
func (d *Device) eachStripe(off, length int64, f func(file *os.File, off, end int64) error) error {
	for end := off + length; off < end; {
		next := min((off/stripeSize+1)*stripeSize, end)
		s := d.stripe(off)
		s.Lock()
		err := errForgotten
		if file := d.file.Load(); file != nil {
			err = f(file, off, next)
		}
		s.Unlock()
		if err != nil {
			return err
		}
		off = next
	}
	return nil
}

func (d *Device) stripe(off int64) *sync.Mutex {
	return &d.stripes[off/stripeSize%int64(len(d.stripes))]
}

// WriteAt implements [block.Device]. Of a device that is shared it takes whole pages, which the
// guest cannot have used: it does not run yet, or waits for them.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	if d.file.Load() == nil {
		return d.stored.WriteAt(p, off)
	}
	if d.adopted.Load() {
		d.replaced(off, int64(len(p)))
		return d.stored.WriteAt(p, off)
	}
	if err := d.checkPages(off, int64(len(p))); err != nil {
		return 0, err
	}
	err := d.eachStripe(off, int64(len(p)), func(file *os.File, from, end int64) error {
		return d.put(file, p[from-off:end-off], from)
	})
	if err != nil {
		return 0, fmt.Errorf("place %d bytes of memory at %d: %w", len(p), off, err)
	}
	return len(p), nil
}

// checkPages refuses what is not whole pages of the device.
func (d *Device) checkPages(off, length int64) error {
	if off < 0 || length < 0 || off > d.Size()-length || off%block.PageSize != 0 || length%block.PageSize != 0 {
		return fmt.Errorf("%d bytes of memory at %d: %w", length, off, block.ErrRange)
	}
	return nil
}

// replaced notes that pages have other content than that of the adopted file.
func (d *Device) replaced(off, length int64) {
	first, end := off/block.PageSize, (off+length+block.PageSize-1)/block.PageSize
	d.unsaved.ClearRange(first, end)
	d.present.ClearRange(first, end)
}

// put places pages of one stripe, whose lock is held. A process that waits for one is woken.
func (d *Device) put(file *os.File, p []byte, off int64) error {
	h := d.guest.Load()
	for len(p) > 0 {
		first := off / block.PageSize
		has, next := d.present.Run(first, first+int64(len(p))/block.PageSize)
		n := (next - first) * block.PageSize
		switch {
		case has && d.entered.Load():
			return errors.New("the guest has it already")
		case has || h == nil:
			if _, err := file.WriteAt(p[:n], off); err != nil {
				return err
			}
		default:
			if err := h.place(p[:n], off); err != nil {
				return err
			}
		}
		d.present.SetRange(first, next)
		d.unsaved.SetRange(first, next)
		p, off = p[n:], off+n
	}
	return nil
}

// Trim implements [block.Trimmer], under the conditions of WriteAt. Pages that are not in the file
// yet are holes of it.
func (d *Device) Trim(off, length int64) error {
	if d.file.Load() == nil {
		return block.Trim(d.stored, off, length)
	}
	if d.adopted.Load() {
		d.replaced(off, length)
		return block.Trim(d.stored, off, length)
	}
	if err := d.checkPages(off, length); err != nil {
		return err
	}
	return d.eachStripe(off, length, func(file *os.File, from, end int64) error {
		for from < end {
			first := from / block.PageSize
			has, next := d.present.Run(first, (end+block.PageSize-1)/block.PageSize)
			n := min(next*block.PageSize, end) - from
			if has {
				if err := d.put(file, make([]byte, n), from); err != nil {
					return err
				}
			}
			d.unsaved.SetRange(first, next)
			from += n
		}
		return nil
	})
}

// Evict makes pages missing in a shared device, from first on and before end, so that the guest waits
// for them. They have the content that is stored then. The guest does not run yet.
func (d *Device) Evict(first, end int64) error {
	if d.file.Load() == nil {
		return nil
	}
	if d.adopted.Load() { // what is missing is not in the file
		d.replaced(first*block.PageSize, (end-first)*block.PageSize)
		return nil
	}
	return d.eachStripe(first*block.PageSize, (end-first)*block.PageSize, func(file *os.File, off, stop int64) error {
		d.unsaved.ClearRange(off/block.PageSize, stop/block.PageSize)
		for page := d.present.Next(off / block.PageSize); page*block.PageSize < stop; page = d.present.Next(page) {
			_, next := d.present.Run(page, stop/block.PageSize)
			const punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
			if err := unix.Fallocate(int(file.Fd()), punch, page*block.PageSize, (next-page)*block.PageSize); err != nil {
				return fmt.Errorf("evict memory at %d: %w", page*block.PageSize, err)
			}
			d.present.ClearRange(page, next)
			page = next
		}
		return nil
	})
}

// Warm places pages of what is stored in a shared device before the guest needs them, until ctx
// ends. It passes over what has come from elsewhere.
func (d *Device) Warm(ctx context.Context) error {
	if d.file.Load() == nil || d.adopted.Load() {
		return nil
	}
	b := make([]byte, fillSize)
	for off := int64(0); off < d.Size() && ctx.Err() == nil && !d.entered.Load(); {
		start, end, err := block.NextData(d.stored, off)
		if err != nil {
			return fmt.Errorf("warm memory: %w", err)
		}
		start = start / block.PageSize * block.PageSize
		end = min(end, start+fillSize, (start/stripeSize+1)*stripeSize)
		if start >= end {
			return nil
		}
		end = min((end+block.PageSize-1)/block.PageSize*block.PageSize, d.Size())
		off = end
		if !block.Local(d.stored, start, end-start) {
			continue
		}
		p := b[:end-start]
		if _, err := d.stored.ReadAt(p, start); err != nil {
			return fmt.Errorf("warm memory: %w", err)
		}
		err = d.eachStripe(start, end-start, func(file *os.File, from, _ int64) error { return d.warm(file, p, from) })
		if err != nil {
			return fmt.Errorf("warm memory at %d: %w", start, err)
		}
	}
	return nil
}

// warm places those of the pages that have no other content. The stripe's lock is held.
func (d *Device) warm(file *os.File, p []byte, off int64) error {
	taken := func(page int64) bool { return d.present.Has(page) || d.unsaved.Has(page) }
	h := d.guest.Load()
	for first, end := off/block.PageSize, (off+int64(len(p)))/block.PageSize; first < end; {
		if d.entered.Load() {
			return nil
		}
		if taken(first) {
			first++
			continue
		}
		next := first + 1
		for next < end && !taken(next) {
			next++
		}
		part := p[first*block.PageSize-off : next*block.PageSize-off]
		var err error
		if h == nil {
			_, err = file.WriteAt(part, first*block.PageSize)
		} else {
			err = h.place(part, first*block.PageSize)
		}
		if err != nil {
			return err
		}
		d.present.SetRange(first, next)
		first = next
	}
	return nil
}

// enter notes that the guest may use its memory from now on.
func (d *Device) enter() {
	d.lockStripes() // whoever places a page has done so
	d.entered.Store(true)
	d.unlockStripes()
}

func (d *Device) lockStripes() {
	for i := range d.stripes {
		d.stripes[i].Lock()
	}
}

func (d *Device) unlockStripes() {
	for i := range d.stripes {
		d.stripes[i].Unlock()
	}
}

// storeSize is the bytes that are stored at once.
const storeSize = 256 << 10

// Store writes what only the guest has to what is stored, and tells how many bytes that were. The
// guest may write on: such a page is stored again by the next Store. After an error the rest, and
// what has failed, is unsaved as before.
func (d *Device) Store(ctx context.Context) (stored int64, err error) {
	d.turn.Lock()
	defer d.turn.Unlock()
	b := make([]byte, storeSize)
	for first := d.unsaved.Next(0); first < d.unsaved.Len(); first = d.unsaved.Next(first) {
		if ctx.Err() != nil {
			return stored, context.Cause(ctx)
		}
		_, end := d.unsaved.Run(first, min(d.unsaved.Len(), first+storeSize/block.PageSize))
		d.storing.SetRange(first, end)
		d.unsaved.ClearRange(first, end)
		off := first * block.PageSize
		p := b[:min(end*block.PageSize, d.Size())-off]
		err := d.readGuest(p, off)
		if err == nil {
			err = d.storePages(p, off)
		}
		if d.noRoom = block.NoRoom(err); err != nil {
			d.unsaved.SetRange(first, end)
		}
		d.stowed.SetRange(first, end)
		d.storing.ClearRange(first, end)
		if err != nil {
			return stored, fmt.Errorf("store memory: %w", err)
		}
		stored += int64(len(p))
		first = end
	}
	return stored, nil
}

// GiveBack frees the room of what was stored while the guest has its memory, if the last Store had
// not enough of it: only the guest has that again. Its disks can then have the room.
func (d *Device) GiveBack() error {
	d.turn.Lock()
	defer d.turn.Unlock()
	if !d.noRoom {
		return nil
	}
	for first := d.stowed.Next(0); first < d.stowed.Len(); first = d.stowed.Next(first) {
		_, end := d.stowed.Run(first, d.stowed.Len())
		d.unsaved.SetRange(first, end) // a reader that finds nothing stored sees it; see ReadAt
		off := first * block.PageSize
		if err := block.Trim(d.stored, off, min(end*block.PageSize, d.Size())-off); err != nil {
			return fmt.Errorf("give back room of memory: %w", err)
		}
		d.stowed.ClearRange(first, end)
	}
	d.noRoom = false
	return nil
}

// storePages writes pages. Those of zeros become holes. An error says how much is not stored.
func (d *Device) storePages(p []byte, off int64) error {
	zero := func(at int) bool { return block.IsZero(p[at:min(at+block.PageSize, len(p))]) }
	for at := 0; at < len(p); {
		z, end := zero(at), at+block.PageSize
		for end < len(p) && zero(end) == z {
			end += block.PageSize
		}
		end = min(end, len(p))
		var err error
		if z {
			err = block.Trim(d.stored, off+int64(at), int64(end-at))
		} else {
			_, err = d.stored.WriteAt(p[at:end], off+int64(at))
		}
		if err != nil {
			return d.unstored(err)
		}
		at = end
	}
	return nil
}

// unstored is the error of a write to what is stored.
func (d *Device) unstored(err error) error {
	path := "memory"
	var file *os.PathError
	if errors.As(err, &file) {
		path = file.Path
	}
	return &block.UnstoredError{Path: path, Missing: d.Unsaved().Count() * block.PageSize, Err: err}
}

// Sync implements [block.Device]: it stores everything.
func (d *Device) Sync() error {
	if _, err := d.Store(context.Background()); err != nil {
		return err
	}
	return d.stored.Sync()
}

// Close implements [block.Device].
func (d *Device) Close() error { return errors.Join(d.Forget(), d.stored.Close()) }

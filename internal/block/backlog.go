package block

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Backlog is a device in a file whose file system may be full, or fail. It notes the pages that
// there was no room for. Once [Backlog.Keep] was called it keeps what cannot be written in memory,
// where it is read from, instead of refusing it: Sync fails until all of it is stored.
//
// Guest memory needs that. It is a mapping of a file, and when its write-back fails, the kernel
// reports that once and forgets that the page was dirty; whoever reads the page later finds an
// older one. What is kept lies in a memfd, takes at most the size of the device, and can be swapped
// out.
//
// It is safe for concurrent use.
type Backlog struct {
	Device // a [Trimmer] and a [Mapper]
	path   string

	keeps   atomic.Bool
	refused *Bitmap      // pages whose last write failed for want of room, and that are not kept
	last    atomic.Int64 // when that was, in nanoseconds since 1970
	kept    *Bitmap      // pages that are in memory
	left    atomic.Int64 // size of kept
	// held while a page moves to or from memory; for reading, while one is used or written to the
	// device
	lock   sync.RWMutex
	memory *File // nil until it is needed
}

// NewBacklog returns a device that stores to d, the device in the file at path, and owns it.
func NewBacklog(d Device, path string) *Backlog {
	return &Backlog{Device: d, path: path, refused: NewBitmap(Pages(d)), kept: NewBitmap(Pages(d))}
}

// Keep makes the device keep what it cannot write from now on.
func (b *Backlog) Keep() { b.keeps.Store(true) }

// Path is the file that the device is in.
func (b *Backlog) Path() string { return b.path }

// refusalAge is how long a write that was refused counts as one that its writer tries again.
const refusalAge = time.Minute

// Missing is how many bytes are not stored: those that are kept, and those whose writer was told of
// late that there is no room.
func (b *Backlog) Missing() int64 {
	pages := b.left.Load()
	if time.Since(time.Unix(0, b.last.Load())) < refusalAge {
		pages += b.refused.Count()
	}
	return pages * PageSize
}

// pageRange is the pages that a range touches.
func pageRange(off, length int64) (first, end int64) {
	return off / PageSize, (off + length + PageSize - 1) / PageSize
}

// holds tells, with lock held, whether some of the pages are kept.
func (b *Backlog) holds(first, end int64) bool {
	return b.left.Load() > 0 && first < end && b.kept.Next(first) < end
}

// WriteAt implements [Device].
func (b *Backlog) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(b, off, int64(len(p))); err != nil || len(p) == 0 {
		return 0, err
	}
	first, end := pageRange(off, int64(len(p)))
	b.lock.RLock()
	if !b.holds(first, end) {
		n, err := b.Device.WriteAt(p, off)
		b.note(first, end, err)
		if err == nil || !b.keeps.Load() || errors.Is(err, ErrReadOnly) {
			b.lock.RUnlock()
			return n, err
		}
	}
	b.lock.RUnlock()
	b.lock.Lock()
	defer b.lock.Unlock()
	return b.keep(p, off)
}

// note notes whether pages were written that are not kept.
func (b *Backlog) note(first, end int64, err error) {
	if NoRoom(err) && !b.keeps.Load() {
		b.refused.SetRange(first, end)
		b.last.Store(time.Now().UnixNano())
	} else if err == nil {
		b.refused.ClearRange(first, end)
	}
}

// keep writes to memory, with lock held.
func (b *Backlog) keep(p []byte, off int64) (_ int, err error) {
	if b.memory == nil {
		if b.memory, err = createMemory(b.path, b.Size()); err != nil {
			return 0, err
		}
	}
	end := off + int64(len(p))
	first, last := pageRange(off, int64(len(p)))
	for _, page := range []int64{first, last - 1} { // of which p may be a part only
		at := page * PageSize
		whole := min(at+PageSize, b.Size())
		if b.kept.Has(page) || off <= at && end >= whole {
			continue
		}
		old := make([]byte, whole-at)
		if _, err := b.Device.ReadAt(old, at); err != nil {
			return 0, err
		}
		if _, err := b.memory.WriteAt(old, at); err != nil {
			return 0, fmt.Errorf("keep in memory: %w", err)
		}
	}
	if _, err := b.memory.WriteAt(p, off); err != nil {
		return 0, fmt.Errorf("keep in memory: %w", err)
	}
	for page := first; page < last; page++ {
		if b.kept.Set(page) {
			b.left.Add(1)
		}
	}
	return len(p), nil
}

// createMemory makes a device in memory; see memfd_create(2).
func createMemory(name string, size int64) (*File, error) {
	fd, err := unix.MemfdCreate("drafter", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, &os.PathError{Op: "make memory for", Path: name, Err: err}
	}
	f := &File{f: os.NewFile(uintptr(fd), name), size: size}
	return f, f.f.Truncate(size)
}

// Store writes what is kept to the device. It fails with an [UnstoredError] while that cannot be
// done.
func (b *Backlog) Store() error {
	var buffer []byte
	for b.left.Load() > 0 {
		if buffer == nil {
			buffer = make([]byte, 256*PageSize)
		}
		if err := b.storeRun(buffer); err != nil {
			return err
		}
	}
	return nil
}

// storeRun stores the first pages that are kept.
func (b *Backlog) storeRun(buffer []byte) error {
	b.lock.Lock()
	defer b.lock.Unlock()
	first := b.kept.Next(0)
	if first == b.kept.Len() {
		return nil
	}
	_, end := b.kept.Run(first, min(b.kept.Len(), first+int64(len(buffer))/PageSize))
	off := first * PageSize
	p := buffer[:min(end*PageSize, b.Size())-off]
	if _, err := b.memory.ReadAt(p, off); err != nil {
		return err
	}
	if _, err := b.Device.WriteAt(p, off); err != nil {
		return &UnstoredError{Path: b.path, Missing: b.left.Load() * PageSize, Err: err}
	}
	return b.drop(off, int64(len(p)))
}

// drop forgets, with lock held, the pages that lie within a range.
func (b *Backlog) drop(off, length int64) error {
	first, end := (off+PageSize-1)/PageSize, (off+length)/PageSize
	if off+length == b.Size() {
		end = b.kept.Len()
	}
	if first >= end {
		return nil
	}
	b.left.Add(-b.kept.ClearRange(first, end))
	return b.memory.Trim(first*PageSize, min(end*PageSize, b.Size())-first*PageSize)
}

// ReadAt implements [Device].
func (b *Backlog) ReadAt(p []byte, off int64) (int, error) {
	if err := checkRange(b, off, int64(len(p))); err != nil {
		return 0, err
	}
	for done := 0; done < len(p); {
		at := off + int64(done)
		n, err := b.readRun(p[done:], at)
		done += n
		if err != nil {
			return done, err
		}
	}
	return len(p), nil
}

// readRun reads what of p is all kept, or all not.
func (b *Backlog) readRun(p []byte, off int64) (int, error) {
	first, end := pageRange(off, int64(len(p)))
	b.lock.RLock()
	if !b.holds(first, end) {
		b.lock.RUnlock()
		return b.Device.ReadAt(p, off)
	}
	kept, next := b.kept.Run(first, end)
	p = p[:min(int64(len(p)), next*PageSize-off)]
	if !kept {
		b.lock.RUnlock()
		return b.Device.ReadAt(p, off)
	}
	defer b.lock.RUnlock()
	return b.memory.ReadAt(p, off)
}

// ReadNow implements [NowReader].
func (b *Backlog) ReadNow(p []byte, off int64) bool {
	b.lock.RLock()
	defer b.lock.RUnlock()
	first, end := pageRange(off, int64(len(p)))
	return !b.holds(first, end) && ReadNow(b.Device, p, off)
}

// Local implements [Localizer].
func (b *Backlog) Local(off, length int64) bool { return Local(b.Device, off, length) }

// Trim implements [Trimmer].
func (b *Backlog) Trim(off, length int64) error {
	if err := checkRange(b, off, length); err != nil || length == 0 {
		return err
	}
	first, end := pageRange(off, length)
	b.lock.Lock()
	defer b.lock.Unlock()
	if err := Trim(b.Device, off, length); err != nil {
		return err
	}
	// what was refused stays noted: an overlay trims what it could not write
	if !b.holds(first, end) {
		return nil
	}
	// Of pages that it touches in part, the rest stays.
	for page := b.kept.Next(first); page < end; page = b.kept.Next(page + 1) {
		from, to := max(off, page*PageSize), min(off+length, (page+1)*PageSize)
		if err := b.memory.Trim(from, to-from); err != nil {
			return err
		}
	}
	return b.drop(off, length)
}

// NextData implements [Mapper].
func (b *Backlog) NextData(off int64) (start, end int64, err error) {
	start, end, err = NextData(b.Device, off)
	if err != nil || off >= b.Size() || b.left.Load() == 0 {
		return start, end, err
	}
	if page := b.kept.Next(off / PageSize); page*PageSize < start {
		_, next := b.kept.Run(page, b.kept.Len())
		return max(off, page*PageSize), min(next*PageSize, b.Size()), nil
	}
	return start, end, nil
}

// Sync implements [Device]. It fails, and can be tried again, while not all is stored.
func (b *Backlog) Sync() error {
	if err := b.Store(); err != nil {
		return err
	}
	return b.Device.Sync()
}

// Close implements [Device]. What is kept is lost.
func (b *Backlog) Close() error {
	b.lock.Lock()
	defer b.lock.Unlock()
	if b.memory != nil {
		if err := b.memory.Close(); err != nil {
			return err
		}
	}
	return b.Device.Close()
}

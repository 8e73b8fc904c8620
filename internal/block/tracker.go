package block

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// PageSize is the unit in bytes in which changes are tracked and moved, whatever the block size of
// a device. It is the smallest unit that a guest maps, or that is written back.
const PageSize = 4096

// Tracker is a device that knows which of its pages were written, and when each block was written
// last. A page is marked after its write. So a reader that first clears the mark and then reads the
// page either sees the write, or finds the page marked again.
type Tracker struct {
	Device
	blockSize int64
	dirty     *Bitmap // of pages
	// time of the last write to each block, in milliseconds since start; 0: never
	last  []atomic.Uint32
	start time.Time

	watching sync.Mutex // held while watches is replaced
	watches  atomic.Pointer[[]*Watch]
}

// NewTracker tracks d: changes by pages, times by blocks of blockSize bytes; see [CheckBlockSize].
func NewTracker(d Device, blockSize int64) *Tracker {
	blocks := (d.Size() + blockSize - 1) / blockSize
	return &Tracker{Device: d, blockSize: blockSize, dirty: NewBitmap(Pages(d)), last: make([]atomic.Uint32, blocks), start: time.Now().Add(-time.Millisecond)}
}

// Pages is the number of pages of a device; the last one may be shorter.
func Pages(d Device) int64 { return (d.Size() + PageSize - 1) / PageSize }

// BlockSize is the size of a block in bytes.
func (t *Tracker) BlockSize() int64 { return t.blockSize }

// Blocks is the number of blocks; the last one may be shorter.
func (t *Tracker) Blocks() int64 { return int64(len(t.last)) }

// WriteAt implements [Device]. A failed write may have changed something, so it marks pages, too.
func (t *Tracker) WriteAt(p []byte, off int64) (int, error) {
	n, err := t.Device.WriteAt(p, off)
	t.mark(off, int64(len(p)))
	return n, err
}

// Trim implements [Trimmer].
func (t *Tracker) Trim(off, length int64) error {
	err := Trim(t.Device, off, length)
	t.mark(off, length)
	return err
}

// Local implements [Localizer].
func (t *Tracker) Local(off, length int64) bool { return Local(t.Device, off, length) }

// ReadNow implements [NowReader].
func (t *Tracker) ReadNow(p []byte, off int64) bool { return ReadNow(t.Device, p, off) }

// NextData implements [Mapper].
func (t *Tracker) NextData(off int64) (start, end int64, err error) { return NextData(t.Device, off) }

// Note marks a range that was written by another way than [Tracker.WriteAt]. The write has happened.
func (t *Tracker) Note(off, length int64) { t.mark(off, length) }

func (t *Tracker) mark(off, length int64) {
	if length <= 0 || off < 0 || off > t.Size()-length {
		return // the device has refused it
	}
	now := uint32(time.Since(t.start) / time.Millisecond)
	end := off + length
	for i := off / t.blockSize; i*t.blockSize < end; i++ {
		t.last[i].Store(now)
	}
	// The watches come first. Whoever takes the dirty pages and then those of a watch misses no
	// page that is not dirty again.
	if watches := t.watches.Load(); watches != nil {
		for _, w := range *watches {
			w.pages.SetRange(off/PageSize, (end+PageSize-1)/PageSize)
		}
	}
	t.dirty.SetRange(off/PageSize, (end+PageSize-1)/PageSize)
}

// Dirty is the number of pages written since they were last taken.
func (t *Tracker) Dirty() int64 { return t.dirty.Count() }

// Take returns the pages written since the last Take, and starts anew.
func (t *Tracker) Take() *Bitmap { return t.dirty.Take() }

// Return marks pages again that were taken but not dealt with.
func (t *Tracker) Return(pages *Bitmap) { t.dirty.Add(pages) }

// LastWrite is the time of the last write to a block, to the millisecond, or zero if there was
// none.
func (t *Tracker) LastWrite(block int64) time.Time {
	ms := t.last[block].Load()
	if ms == 0 {
		return time.Time{}
	}
	return t.start.Add(time.Duration(ms) * time.Millisecond)
}

// Watch is a set of the pages that were written since it began, beside the one that [Tracker.Take]
// takes from: so each of several users learns all that changed. It is safe for concurrent use.
type Watch struct {
	tracker *Tracker
	pages   *Bitmap
}

// Watch begins a set of its own. Close it.
func (t *Tracker) Watch() *Watch {
	w := &Watch{tracker: t, pages: NewBitmap(Pages(t))}
	t.replaceWatches(func(watches []*Watch) []*Watch { return append(watches, w) })
	return w
}

func (t *Tracker) replaceWatches(change func([]*Watch) []*Watch) {
	t.watching.Lock()
	defer t.watching.Unlock()
	var watches []*Watch
	if old := t.watches.Load(); old != nil {
		watches = slices.Clone(*old)
	}
	watches = change(watches)
	t.watches.Store(&watches)
}

// Take returns the pages written since the last Take, and starts anew.
func (w *Watch) Take() *Bitmap { return w.pages.Take() }

// Return marks pages again that were taken but not dealt with.
func (w *Watch) Return(pages *Bitmap) { w.pages.Add(pages) }

// Dirty is the number of pages written since they were last taken.
func (w *Watch) Dirty() int64 { return w.pages.Count() }

// Close ends the set.
func (w *Watch) Close() {
	w.tracker.replaceWatches(func(watches []*Watch) []*Watch {
		return slices.DeleteFunc(watches, func(other *Watch) bool { return other == w })
	})
}

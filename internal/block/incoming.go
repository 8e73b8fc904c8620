package block

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// ErrSealed says that a device was used whose content is still on its way.
var ErrSealed = errors.New("the device is still being received")

// ErrAbandoned says that the rest of a device will never arrive.
var ErrAbandoned = errors.New("the rest of the device will never arrive")

// Incoming is a device that is being received. It begins sealed: only [Incoming.Arrive] writes to
// it. [Incoming.Open] lets its user in and says which pages have not arrived. From then on an
// arriving page is dropped if the user has written it, and a user who needs a missing page waits
// for it.
//
// Its user's methods are those of [Device]. They are safe for concurrent use, also beside Arrive.
type Incoming struct {
	Device             // where the pages are kept
	guard  atomic.Bool // a read of the sealed device is a mistake, as a write is

	opened     atomic.Bool
	violations atomic.Int64 // uses while sealed
	missing    *Bitmap      // the pages that have not arrived; valid after Open
	left       atomic.Int64 // size of missing; 0 ends all waiting and locking for ever
	want       func(first, end int64)
	persist    func(missing *Bitmap) error
	regions    [64]incomingRegion

	complete  chan struct{} // closed when left is 0
	completed sync.Once
	abandoned chan struct{}
	abandon   sync.Once
	sync      sync.Mutex
}

// incomingRegion guards the pages of every 64th MiB. It is held while one of them is stored and
// taken out of missing.
type incomingRegion struct {
	sync.Mutex
	arrived chan struct{} // closed when a page of the region has arrived; nil when nobody waits
}

// NewIncoming receives into d. With guard set, a read while it is sealed is refused, as for memory,
// which nobody may cache before it is complete. Without guard a read returns what has arrived until
// then.
func NewIncoming(d Device, guard bool) *Incoming {
	in := &Incoming{Device: d, missing: NewBitmap(Pages(d)), complete: make(chan struct{}), abandoned: make(chan struct{})}
	in.guard.Store(guard)
	return in
}

// Unguard allows reads of the sealed device. What its user needs has arrived.
func (d *Incoming) Unguard() { d.guard.Store(false) }

// Violations counts the uses of the device while it was sealed. All of them were refused.
func (d *Incoming) Violations() int64 { return d.violations.Load() }

// Open lets the user in. missing is the set of pages that have not arrived; the device owns it from
// here on. want is called with pages that somebody waits for, and must not block. persist, which
// may be nil, is called by Sync with the pages that are missing in what it has made durable. Open
// is called once.
func (d *Incoming) Open(missing *Bitmap, want func(first, end int64), persist func(missing *Bitmap) error) {
	d.missing, d.want, d.persist = missing, want, persist
	d.left.Store(missing.Count())
	d.opened.Store(true)
	d.took(0)
}

// took notes that so many pages are no longer missing.
func (d *Incoming) took(pages int64) {
	if d.left.Add(-pages) == 0 {
		d.completed.Do(func() { close(d.complete) })
	}
}

// Complete is closed when the device has been opened and nothing is missing.
func (d *Incoming) Complete() <-chan struct{} { return d.complete }

// Missing is the number of pages that have not arrived.
func (d *Incoming) Missing() int64 { return d.left.Load() }

// MissingPages returns a copy of the set of pages that have not arrived.
func (d *Incoming) MissingPages() *Bitmap { return d.missing.Clone() }

// Abandon ends all waiting. From here on reads of missing pages fail with [ErrAbandoned].
func (d *Incoming) Abandon() { d.abandon.Do(func() { close(d.abandoned) }) }

func (d *Incoming) region(page int64) *incomingRegion {
	return &d.regions[page/(regionSize/PageSize)%int64(len(d.regions))]
}

// eachRegion calls f for the parts of the pages from first up to end that lie in one region each.
func eachRegion(first, end int64, f func(first, end int64) error) error {
	const pages = regionSize / PageSize
	for first < end {
		next := min((first/pages+1)*pages, end)
		if err := f(first, next); err != nil {
			return err
		}
		first = next
	}
	return nil
}

// Arrive stores received pages. off is a multiple of the page size, and so is the length of p,
// except at the device's end. It returns how many of the bytes were used.
func (d *Incoming) Arrive(p []byte, off int64) (used int64, err error) {
	return d.arrive(off, int64(len(p)), func(from, end int64) error {
		_, err := d.Device.WriteAt(p[from-off:end-off], from)
		return err
	})
}

// ArriveZeros is Arrive for zeros.
func (d *Incoming) ArriveZeros(off, length int64) (used int64, err error) {
	return d.arrive(off, length, func(from, end int64) error { return Trim(d.Device, from, end-from) })
}

// ArriveSame is Arrive for pages whose content is what the device underneath holds.
func (d *Incoming) ArriveSame(off, length int64) (used int64, err error) {
	return d.arrive(off, length, func(int64, int64) error { return nil })
}

func (d *Incoming) arrive(off, length int64, store func(from, end int64) error) (used int64, err error) {
	if err := checkRange(d, off, length); err != nil {
		return 0, err
	}
	if !d.opened.Load() {
		return length, store(off, off+length)
	}
	first, last := off/PageSize, (off+length+PageSize-1)/PageSize
	err = eachRegion(first, last, func(first, end int64) error {
		r := d.region(first)
		r.Lock()
		defer r.Unlock()
		for at := d.missing.Next(first); at < end; at = d.missing.Next(at) {
			_, next := d.missing.Run(at, end)
			from, to := at*PageSize, min(next*PageSize, d.Size())
			if err := store(from, to); err != nil {
				return err
			}
			used += to - from
			d.here(r, at, next)
			at = next
		}
		return nil
	})
	return used, err
}

// here notes, with r locked, that pages are there.
func (d *Incoming) here(r *incomingRegion, first, end int64) {
	d.took(d.missing.ClearRange(first, end))
	if r.arrived != nil {
		close(r.arrived)
		r.arrived = nil
	}
}

// await returns once none of the pages is missing.
func (d *Incoming) await(first, end int64) error {
	for d.left.Load() > 0 {
		at := d.missing.Next(first)
		if at >= end {
			return nil
		}
		_, next := d.missing.Run(at, end)
		r := d.region(at)
		r.Lock()
		if !d.missing.Has(at) {
			r.Unlock()
			continue
		}
		if r.arrived == nil {
			r.arrived = make(chan struct{})
		}
		arrived := r.arrived
		r.Unlock()
		d.want(at, next)
		select {
		case <-arrived:
		case <-d.abandoned:
			return ErrAbandoned
		}
	}
	return nil
}

func (d *Incoming) refuse(operation string, off int64) error {
	d.violations.Add(1)
	return fmt.Errorf("%s at %d: %w", operation, off, ErrSealed)
}

// ReadAt implements [Device].
func (d *Incoming) ReadAt(p []byte, off int64) (int, error) {
	if err := checkRange(d, off, int64(len(p))); err != nil {
		return 0, err
	}
	if !d.opened.Load() {
		if d.guard.Load() {
			return 0, d.refuse("read", off)
		}
		return d.Device.ReadAt(p, off)
	}
	if err := d.await(off/PageSize, (off+int64(len(p))+PageSize-1)/PageSize); err != nil {
		return 0, err
	}
	return d.Device.ReadAt(p, off)
}

// Local implements [Localizer].
func (d *Incoming) Local(off, length int64) bool {
	if d.opened.Load() && d.left.Load() > 0 && d.missing.Next(off/PageSize) < (off+length+PageSize-1)/PageSize {
		return false
	}
	return Local(d.Device, off, length)
}

// ReadNow implements [NowReader].
func (d *Incoming) ReadNow(p []byte, off int64) bool {
	return d.opened.Load() && d.Local(off, int64(len(p))) && ReadNow(d.Device, p, off)
}

// WriteAt implements [Device]. Whole pages need not have arrived.
func (d *Incoming) WriteAt(p []byte, off int64) (int, error) {
	err := d.write(off, int64(len(p)), func(from, end int64) error {
		_, err := d.Device.WriteAt(p[from-off:end-off], from)
		return err
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// Trim implements [Trimmer].
func (d *Incoming) Trim(off, length int64) error {
	return d.write(off, length, func(from, end int64) error { return Trim(d.Device, from, end-from) })
}

func (d *Incoming) write(off, length int64, store func(from, end int64) error) error {
	if err := checkRange(d, off, length); err != nil || length == 0 {
		return err
	}
	if !d.opened.Load() {
		return d.refuse("write", off)
	}
	end := off + length
	if d.left.Load() == 0 {
		return store(off, end)
	}
	first, last := off/PageSize, (end+PageSize-1)/PageSize // pages touched
	wholeFirst, wholeEnd := (off+PageSize-1)/PageSize, end/PageSize
	if end == d.Size() {
		wholeEnd = last
	}
	if first < wholeFirst {
		if err := d.await(first, first+1); err != nil {
			return err
		}
	}
	if wholeEnd < last && wholeEnd >= first {
		if err := d.await(last-1, last); err != nil {
			return err
		}
	}
	return eachRegion(first, last, func(first, last int64) error {
		r := d.region(first)
		r.Lock()
		defer r.Unlock()
		if err := store(max(off, first*PageSize), min(end, last*PageSize)); err != nil {
			return err
		}
		d.here(r, max(first, wholeFirst), min(last, wholeEnd))
		return nil
	})
}

// NextData implements [Mapper]. While pages are missing, all may be data.
func (d *Incoming) NextData(off int64) (start, end int64, err error) {
	if !d.opened.Load() || d.left.Load() > 0 {
		return min(off, d.Size()), d.Size(), nil
	}
	return NextData(d.Device, off)
}

// Sync implements [Device].
func (d *Incoming) Sync() error {
	if d.persist == nil {
		return d.Device.Sync()
	}
	d.sync.Lock()
	defer d.sync.Unlock()
	// The set may be too large after the sync. A page in it is then fetched twice, which is right:
	// no write to it was acknowledged as durable in between.
	missing := d.missing.Clone()
	if err := d.Device.Sync(); err != nil {
		return err
	}
	return d.persist(missing)
}

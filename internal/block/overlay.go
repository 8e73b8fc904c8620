package block

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// Overlay is a device that does not change its base. Blocks that are written live in the overlay
// file, at the same offset, and the state file says which blocks these are. A block whose bit is
// not set is a hole in the overlay file.
//
// A write within a block that the overlay holds goes straight to its place, as on a disk: after a
// power cut, each sector that was not synced has its old or its new content. The first write to a
// block copies the rest of the block from the base. The block's bit reaches the disk only after its
// data, so until then the block is the base's.
type Overlay struct {
	base      Device
	data      Device // the overlay file, as large as base; a [Trimmer] and [Mapper]
	state     *stateFile
	blockSize int64
	present   *Bitmap
	// blocks that are not the overlay's and may hold something in its file; see forget
	soiled  *Bitmap
	regions [256]sync.Mutex // held while a block of the region is copied up or trimmed
	buffers sync.Pool       // of *[]byte, blockSize long

	unclean atomic.Bool // whether a block may be soiled

	sync   sync.Mutex            // one commit at a time
	failed atomic.Pointer[error] // why one failed
}

// regionSize is the unit of locking, in bytes; a block that is larger is a region of its own.
const regionSize = 1 << 20

func newOverlay(base, data Device, state *stateFile) *Overlay {
	o := &Overlay{
		base: base, data: data, state: state, blockSize: state.header.blockSize, present: state.present, soiled: NewBitmap(state.present.Len()),
	}
	o.buffers.New = func() any {
		b := make([]byte, o.blockSize)
		return &b
	}
	return o
}

// Size implements [Device].
func (o *Overlay) Size() int64 { return o.base.Size() }

// Origin is the content id of the base that the device was made from, if that is not the base
// beneath; else zero.
func (o *Overlay) Origin() ID { return o.state.header.origin }

// BlockSize is the unit of copying, in bytes.
func (o *Overlay) BlockSize() int64 { return o.blockSize }

// Present is the set of blocks that the overlay holds. It is the overlay's own; do not change it.
func (o *Overlay) Present() *Bitmap { return o.present }

// Pages is the set of pages that the overlay holds.
func (o *Overlay) Pages() *Bitmap {
	pages := NewBitmap(Pages(o))
	n := o.blockSize / PageSize
	for b := range o.present.All() {
		pages.SetRange(b*n, min((b+1)*n, pages.Len()))
	}
	return pages
}

// ReadAt implements [Device].
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if err := checkRange(o, off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		has, n := o.run(at, int64(len(p)-done))
		layer := o.base
		if has {
			layer = o.data
		}
		m, err := layer.ReadAt(p[done:done+int(n)], at)
		done += m
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// run returns how many of the bytes at off, up to length, are in the same layer, and which.
func (o *Overlay) run(off, length int64) (has bool, n int64) {
	has, next := o.present.Run(off/o.blockSize, (off+length+o.blockSize-1)/o.blockSize)
	return has, min(next*o.blockSize-off, length)
}

// Local implements [Localizer].
func (o *Overlay) Local(off, length int64) bool {
	for length > 0 {
		has, n := o.run(off, length)
		if !has && !Local(o.base, off, n) {
			return false
		}
		off, length = off+n, length-n
	}
	return true
}

// ReadNow implements [NowReader].
func (o *Overlay) ReadNow(p []byte, off int64) bool {
	if checkRange(o, off, int64(len(p))) != nil {
		return false
	}
	for len(p) > 0 {
		has, n := o.run(off, int64(len(p)))
		layer := o.base
		if has {
			layer = o.data
		}
		if !ReadNow(layer, p[:n], off) {
			return false
		}
		p, off = p[n:], off+n
	}
	return true
}

// WriteAt implements [Device].
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(o, off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		n := min(o.regionEnd(at)-at, int64(len(p)-done))
		m, err := o.writeRegion(p[done:done+int(n)], at)
		done += m
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (o *Overlay) regionEnd(off int64) int64 {
	size := max(o.blockSize, regionSize)
	return min((off/size+1)*size, o.Size())
}

func (o *Overlay) region(off int64) *sync.Mutex {
	return &o.regions[off/max(o.blockSize, regionSize)%int64(len(o.regions))]
}

// writeRegion writes p, which lies in one region.
func (o *Overlay) writeRegion(p []byte, off int64) (int, error) {
	end := off + int64(len(p))
	if has, n := o.run(off, int64(len(p))); has && n == int64(len(p)) {
		return o.data.WriteAt(p, off)
	}
	lock := o.region(off)
	lock.Lock()
	defer lock.Unlock()
	first, last := off/o.blockSize, (end-1)/o.blockSize
	n, err := o.fill(p, off, first, last)
	if err != nil {
		// The blocks are not the overlay's yet, so what was written of them must go. Blocks that
		// the overlay held before have changed.
		o.forget(first, last+1)
		return n, err
	}
	o.own(first, last+1)
	return n, nil
}

// fill writes p and, around it, what its first and last block lack.
func (o *Overlay) fill(p []byte, off, first, last int64) (int, error) {
	if !o.present.Has(first) {
		if err := o.copyUp(first*o.blockSize, off); err != nil {
			return 0, err
		}
	}
	if end := off + int64(len(p)); !o.present.Has(last) {
		if err := o.copyUp(end, min((last+1)*o.blockSize, o.Size())); err != nil {
			return 0, err
		}
	}
	return o.data.WriteAt(p, off)
}

// own makes blocks the overlay's, whose data is in the overlay file.
func (o *Overlay) own(first, end int64) {
	o.soiled.ClearRange(first, end)
	o.present.SetRange(first, end)
	o.state.changed(first, end)
}

// forget makes holes of blocks that the overlay does not hold, after a failed write. If that fails,
// as on a file system without holes and without room for zeros, the block counts as soiled until it
// is the overlay's.
func (o *Overlay) forget(first, end int64) {
	for i := first; i < end; i++ {
		if o.present.Has(i) {
			continue
		}
		if err := Trim(o.data, i*o.blockSize, min(o.blockSize, o.Size()-i*o.blockSize)); err != nil {
			o.soiled.Set(i)
			o.unclean.Store(true)
		}
	}
}

// cleanse makes soiled blocks holes, where that can be done by now.
func (o *Overlay) cleanse() {
	if !o.unclean.Swap(false) {
		return
	}
	for i := o.soiled.Next(0); i < o.soiled.Len(); i = o.soiled.Next(i + 1) {
		lock := o.region(i * o.blockSize)
		lock.Lock()
		if o.soiled.Has(i) && !o.present.Has(i) {
			o.soiled.ClearRange(i, i+1)
			o.forget(i, i+1)
		}
		lock.Unlock()
	}
}

// copyUp copies part of one block from the base.
func (o *Overlay) copyUp(from, end int64) error {
	if from == end {
		return nil
	}
	buffer := o.buffers.Get().(*[]byte)
	defer o.buffers.Put(buffer)
	p := (*buffer)[:end-from]
	if _, err := o.base.ReadAt(p, from); err != nil {
		return fmt.Errorf("copy block from base: %w", err)
	}
	if IsZero(p) && !o.soiled.Has(from/o.blockSize) {
		return nil // a hole of the overlay is that as well
	}
	if _, err := o.data.WriteAt(p, from); err != nil {
		return fmt.Errorf("copy block to overlay: %w", err)
	}
	return nil
}

// Trim implements [Trimmer]. Whole blocks become holes of the overlay; the rest is written with
// zeros.
func (o *Overlay) Trim(off, length int64) error {
	if err := checkRange(o, off, length); err != nil {
		return err
	}
	end := off + length
	for off < end {
		next := min(o.regionEnd(off), end)
		if err := o.trimRegion(off, next); err != nil {
			return err
		}
		off = next
	}
	return nil
}

func (o *Overlay) trimRegion(off, end int64) error {
	first, last := (off+o.blockSize-1)/o.blockSize, end/o.blockSize
	if end == o.Size() {
		last = (end + o.blockSize - 1) / o.blockSize
	}
	if first >= last {
		return o.writeZeros(off, end)
	}
	whole, wholeEnd := first*o.blockSize, min(last*o.blockSize, o.Size())
	if err := errors.Join(o.writeZeros(off, whole), o.writeZeros(wholeEnd, end)); err != nil {
		return err
	}
	lock := o.region(off)
	lock.Lock()
	defer lock.Unlock()
	if err := Trim(o.data, whole, wholeEnd-whole); err != nil {
		return err
	}
	o.own(first, last)
	return nil
}

// writeZeros writes zeros to a part of a region.
func (o *Overlay) writeZeros(off, end int64) error {
	for off < end {
		n := min(end-off, int64(len(zeros)))
		if _, err := o.writeRegion(zeros[:n], off); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// NextData implements [Mapper].
func (o *Overlay) NextData(off int64) (start, end int64, err error) {
	for off < o.Size() {
		has, n := o.run(off, o.Size()-off)
		layer := o.base
		if has {
			layer = o.data
		}
		start, end, err := NextData(layer, off)
		if err != nil {
			return 0, 0, err
		}
		if start < off+n {
			return start, min(end, off+n), nil
		}
		off += n
	}
	return o.Size(), o.Size(), nil
}

// Sync implements [Device].
func (o *Overlay) Sync() error {
	o.sync.Lock()
	defer o.sync.Unlock()
	if err := o.failed.Load(); err != nil {
		return *err
	}
	o.cleanse()
	// Only blocks whose data is in the overlay file by now are committed, so the sync of the file
	// covers them.
	pages := o.state.take()
	err := o.data.Sync()
	if err == nil {
		err = o.state.commit(pages)
	}
	if NoRoom(err) {
		o.state.giveBack(pages) // what cannot be tried again fails again
	} else if err != nil {
		o.failed.Store(&err)
	}
	return err
}

// Backlog is what of the overlay waits for room.
func (o *Overlay) Backlog() *Backlog {
	b, _ := o.data.(*Backlog)
	return b
}

// Close implements [Device].
func (o *Overlay) Close() error {
	return errors.Join(o.data.Close(), o.state.close(), o.base.Close())
}

// Base is the device underneath. It is the overlay's own; read it, and nothing else.
func (o *Overlay) Base() Device { return o.base }

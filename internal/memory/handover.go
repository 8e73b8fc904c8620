package memory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
)

// Within a host, the file of a shared device changes hands instead of its content. Two processes
// have the file then: one that offers it, whose guest runs on, and one that adopts it.
//
// A word in the page behind the guest's memory says whose guest may run. It is the migration's
// number while that is open. One atomic step makes it the one process' or the other's, for ever: so
// both know the truth, whichever of them is killed, or held up for however long.

// claimed is the word once the process that adopts has claimed the guest; it is takenBack once the
// other one has taken it back.
func claimed(number uint64) uint64 { return ^number }

const takenBack = 0

// numberOf is the number of a migration. It is neither takenBack nor claimed of another one: the
// version of a random id is a part of it.
func numberOf(migration uuid.UUID) uint64 { return binary.LittleEndian.Uint64(migration[:]) }

// Offer lets another process adopt the memory, and returns its file, which the device keeps; nil if
// the device is not shared. An earlier offer is void. The guest is this process' until it is claimed.
func (d *Device) Offer(migration uuid.UUID) (*os.File, error) {
	f := d.file.Load()
	if f == nil || d.adopted.Load() {
		return nil, nil
	}
	err := d.word(func(word *uint64) {
		d.number.Store(numberOf(migration))
		atomic.StoreUint64(word, numberOf(migration))
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Offered tells whether another process may have claimed the guest, or may still do so.
func (d *Device) Offered() bool { return d.number.Load() != 0 }

// TakeBack ends an offer, unless the guest has been claimed.
func (d *Device) TakeBack() (ours bool, err error) {
	number := d.number.Load()
	if number == 0 {
		return false, errors.New("memory is not offered to anybody")
	}
	// No other value is this offer's: whoever has claimed the guest may have offered it to others, and
	// taken it back since.
	err = d.word(func(word *uint64) { ours = atomic.CompareAndSwapUint64(word, number, takenBack) })
	if ours {
		d.number.Store(0)
		d.hold(false)
	}
	return ours, err
}

// Retain ends the speculative filling of pages until the offer is taken back: the file may be
// another process' from now on. Threads of the VMM still get what they wait for.
func (d *Device) Retain() { d.hold(true) }

func (d *Device) hold(on bool) {
	if h := d.guest.Load(); h != nil {
		h.events.Lock() // whoever fills has done so
		h.held = on
		h.events.Unlock()
	}
}

// InFile returns the set of pages whose content is in a shared device's file.
func (d *Device) InFile() *block.Bitmap {
	pages := d.present.Clone()
	pages.Add(d.Unsaved())
	return pages
}

// Adopt makes a file that another process offers the device's own; the device owns it. Until
// [Device.Settle] the file is the other's, whose guest runs. What arrives until then is stored.
func (d *Device) Adopt(f *os.File) error {
	err := d.checkOffer(f)
	if err == nil && !d.file.CompareAndSwap(nil, f) {
		err = errors.New("the device has a file")
	}
	if err != nil {
		return errors.Join(fmt.Errorf("take over memory: %w", err), f.Close())
	}
	d.adopted.Store(true)
	return nil
}

// checkOffer refuses a file that could end its users: one that is too small, or may become so.
func (d *Device) checkOffer(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return fmt.Errorf("what came is no memory: %w", err)
	}
	if seals&unix.F_SEAL_SHRINK == 0 || info.Size() != d.fileSize() {
		return fmt.Errorf("what came has %d bytes instead of %d, or can change", info.Size(), d.fileSize())
	}
	return nil
}

// Take notes pages whose content is in the adopted file.
func (d *Device) Take(pages *block.Bitmap) error {
	if !d.adopted.Load() || pages.Len() != d.present.Len() {
		return errors.New("memory was not taken over")
	}
	for first := pages.Next(0); first < pages.Len(); first = pages.Next(first) {
		_, end := pages.Run(first, pages.Len())
		d.present.SetRange(first, end)
		d.Written(first*block.PageSize, (end-first)*block.PageSize)
		first = end
	}
	return nil
}

// Settle makes the adopted file the device's. The other process' guest is paused for good, unless
// it is taken back.
func (d *Device) Settle() { d.adopted.Store(false) }

// Claim is a guest that was claimed, and need not run yet. It outlives the device.
type Claim struct {
	file   *os.File
	at     int64
	number uint64
}

// Claim claims the guest of a migration whose memory was adopted. It fails if the other process has
// taken the guest back.
func (d *Device) Claim(migration uuid.UUID) (*Claim, error) {
	own, err := d.File()
	if err != nil {
		return nil, err
	}
	c := &Claim{file: own, at: d.wordOffset(), number: numberOf(migration)}
	ours := false
	err = onWord(c.file, c.at, func(word *uint64) {
		ours = atomic.CompareAndSwapUint64(word, c.number, claimed(c.number))
	})
	if err == nil && !ours {
		err = errors.New("its source has taken the VM back")
	}
	if err != nil {
		return nil, errors.Join(err, own.Close())
	}
	return c, nil
}

// Keep says that the guest runs, or may have run.
func (c *Claim) Keep() { _ = c.file.Close() } // one of several descriptors

// Release gives up a guest that has not run and never will: no process of this side has the memory
// any more.
func (c *Claim) Release() error {
	err := onWord(c.file, c.at, func(word *uint64) {
		atomic.CompareAndSwapUint64(word, claimed(c.number), c.number)
	})
	return errors.Join(err, c.file.Close())
}

// word gives f the word.
func (d *Device) word(f func(word *uint64)) error {
	file := d.file.Load()
	if file == nil {
		return fmt.Errorf("find out whose memory it is: %w", errForgotten)
	}
	return onWord(file, d.wordOffset(), f)
}

func onWord(file *os.File, at int64, f func(word *uint64)) error {
	page, err := unix.Mmap(int(file.Fd()), at, 8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("find out whose memory it is: %w", err)
	}
	f((*uint64)(unsafe.Pointer(&page[0])))
	if err := unix.Munmap(page); err != nil {
		return fmt.Errorf("find out whose memory it is: %w", err)
	}
	return nil
}

// wordOffset is where the word is in the file, in bytes.
func (d *Device) wordOffset() int64 {
	page := int64(os.Getpagesize())
	return (d.Size() + page - 1) / page * page
}

// fileSize is that of a shared device's file, in bytes.
func (d *Device) fileSize() int64 { return d.wordOffset() + int64(os.Getpagesize()) }

// Package block holds devices: fixed-size arrays of bytes that store what is written to them. A
// VM's device is a stack of them: a read-only base file, an [Overlay] with the changed blocks, and
// a [Tracker] that knows which pages changed lately.
package block

import (
	"errors"
	"fmt"
	"io"
)

// Device is a fixed-size array of bytes. Implementations are safe for concurrent use. Reads and
// writes that do not fit in [0, Size) fail with [ErrRange] and do nothing.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Size() int64
	// Sync returns once every completed WriteAt and Trim survives a power cut. Once it has failed
	// it fails for ever, because what was lost is unknown. If it failed for want of room (see
	// [NoRoom]), nothing was lost, and it may succeed later.
	Sync() error
	// Close frees the device without syncing it.
	Close() error
}

// Trimmer is a [Device] that can discard a range: the range reads as zeros afterwards, and takes no
// space where that is possible.
type Trimmer interface {
	Trim(off, length int64) error
}

// Mapper is a [Device] that knows where it has only zeros.
type Mapper interface {
	// NextData returns a range at or after off that may have other bytes than zeros. All bytes
	// between off and start are zeros. At the end of the data start and end are the device's size.
	NextData(off int64) (start, end int64, err error)
}

// Localizer is a [Device] of which a part may be elsewhere.
type Localizer interface {
	// Local tells whether a range of the device can be read without waiting for another host.
	Local(off, length int64) bool
}

// NowReader is a [Device] that can read without waiting.
type NowReader interface {
	// ReadNow reads like ReadAt, but only from this host's memory. It waits for no disk, no other
	// host and nobody else's I/O. If it returns false, p may hold anything.
	ReadNow(p []byte, off int64) bool
}

var (
	// ErrRange says that a request leaves the device.
	ErrRange = errors.New("out of the device's range")
	// ErrReadOnly says that a device cannot be written.
	ErrReadOnly = errors.New("device is read-only")
)

func checkRange(d Device, off, length int64) error {
	if off < 0 || length < 0 || off > d.Size()-length {
		return fmt.Errorf("%d bytes at %d of a device of %d: %w", length, off, d.Size(), ErrRange)
	}
	return nil
}

// Trim makes a range of d read as zeros.
func Trim(d Device, off, length int64) error {
	if t, ok := d.(Trimmer); ok {
		return t.Trim(off, length)
	}
	if err := checkRange(d, off, length); err != nil {
		return err
	}
	for length > 0 {
		n := min(length, int64(len(zeros)))
		if _, err := d.WriteAt(zeros[:n], off); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

var zeros = make([]byte, 1<<20)

// NextData is [Mapper.NextData] for any device. A device that is no Mapper has data everywhere.
func NextData(d Device, off int64) (start, end int64, err error) {
	if m, ok := d.(Mapper); ok {
		return m.NextData(off)
	}
	return min(off, d.Size()), d.Size(), nil
}

// Local is [Localizer.Local] for any device. A device that is no Localizer is local.
func Local(d Device, off, length int64) bool {
	if l, ok := d.(Localizer); ok {
		return l.Local(off, length)
	}
	return true
}

// ReadNow is [NowReader.ReadNow] for any device. It returns false for a device that is no
// NowReader.
func ReadNow(d Device, p []byte, off int64) bool {
	r, ok := d.(NowReader)
	return ok && r.ReadNow(p, off)
}

// CheckBlockSize refuses block sizes in bytes that are not a power of two from 4 KiB to 16 MiB.
func CheckBlockSize(size int64) error {
	if size < 4<<10 || size > 16<<20 || size&(size-1) != 0 {
		return fmt.Errorf("block size %d is not valid; choose a power of two from 4096 to 16777216, such as 65536", size)
	}
	return nil
}

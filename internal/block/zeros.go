package block

import (
	"context"
	"encoding/binary"

	"github.com/zeebo/blake3"
)

// zeroDevice is a base for devices that have none: it reads as zeros.
type zeroDevice struct{ size int64 }

// NewZeros returns a read-only device of zeros.
func NewZeros(size int64) Device { return zeroDevice{size} }

// ZerosID is the content id of a device of zeros. It takes a second for some TiB, so it ends with
// ctx.
func ZerosID(ctx context.Context, size int64) (id ID, err error) {
	h := blake3.New()
	// A hash's writer cannot fail.
	_, _ = h.Write(binary.LittleEndian.AppendUint64([]byte("drafter device"), uint64(size)))
	for left := (size + ContentBlockSize - 1) / ContentBlockSize * int64(len(id)); left > 0; {
		if ctx.Err() != nil {
			return id, context.Cause(ctx)
		}
		n := min(left, int64(len(zeros)))
		_, _ = h.Write(zeros[:n])
		left -= n
	}
	h.Sum(id[:0])
	return id, nil
}

func (d zeroDevice) Size() int64 { return d.size }

func (d zeroDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := checkRange(d, off, int64(len(p))); err != nil {
		return 0, err
	}
	clear(p)
	return len(p), nil
}

// ReadNow implements [NowReader].
func (d zeroDevice) ReadNow(p []byte, off int64) bool {
	_, err := d.ReadAt(p, off)
	return err == nil
}

func (d zeroDevice) WriteAt([]byte, int64) (int, error) { return 0, ErrReadOnly }

// NextData implements [Mapper].
func (d zeroDevice) NextData(int64) (start, end int64, err error) { return d.size, d.size, nil }

func (d zeroDevice) Sync() error  { return nil }
func (d zeroDevice) Close() error { return nil }

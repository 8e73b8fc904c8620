package block

import (
	"sync/atomic"
	"time"
)

// Backlog is a device in a file whose file system may be full. It notes the pages that there was no
// room for. It is safe for concurrent use.
type Backlog struct {
	Device // a [Trimmer] and a [Mapper]
	path   string

	refused *Bitmap      // pages whose last write failed for want of room
	last    atomic.Int64 // when that was, in nanoseconds since 1970
}

// NewBacklog returns a device that stores to d, the device in the file at path, and owns it.
func NewBacklog(d Device, path string) *Backlog {
	return &Backlog{Device: d, path: path, refused: NewBitmap(Pages(d))}
}

// Path is the file that the device is in.
func (b *Backlog) Path() string { return b.path }

// refusalAge is how long a write that was refused counts as one that its writer tries again.
const refusalAge = time.Minute

// Missing is how many bytes are not stored, of those whose writer was told of late that there is no
// room.
func (b *Backlog) Missing() int64 {
	if time.Since(time.Unix(0, b.last.Load())) > refusalAge {
		return 0
	}
	return b.refused.Count() * PageSize
}

// WriteAt implements [Device].
func (b *Backlog) WriteAt(p []byte, off int64) (int, error) {
	n, err := b.Device.WriteAt(p, off)
	first, end := off/PageSize, (off+int64(len(p))+PageSize-1)/PageSize // pages touched
	if NoRoom(err) {
		b.refused.SetRange(first, end)
		b.last.Store(time.Now().UnixNano())
	} else if err == nil {
		b.refused.ClearRange(first, end)
	}
	return n, err
}

// ReadNow implements [NowReader].
func (b *Backlog) ReadNow(p []byte, off int64) bool { return ReadNow(b.Device, p, off) }

// Local implements [Localizer].
func (b *Backlog) Local(off, length int64) bool { return Local(b.Device, off, length) }

// Trim implements [Trimmer]. What was refused stays noted: an overlay trims what it could not
// write.
func (b *Backlog) Trim(off, length int64) error { return Trim(b.Device, off, length) }

// NextData implements [Mapper].
func (b *Backlog) NextData(off int64) (start, end int64, err error) { return NextData(b.Device, off) }

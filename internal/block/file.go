package block

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/private"
)

// File is a device in a file, which may have holes, or in a block device.
type File struct {
	f        *os.File
	size     int64
	readOnly bool
	failed   atomic.Pointer[error] // why a Sync failed
}

// OpenFile opens an existing file as a device of its size. A link that a stranger made is not
// followed.
func OpenFile(path string, readOnly bool) (*File, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := private.Open(path, flags)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if info.IsDir() {
		return nil, errors.Join(fmt.Errorf("%s is a directory", path), f.Close())
	}
	size, err := f.Seek(0, io.SeekEnd) // also for block devices
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &File{f: f, size: size, readOnly: readOnly}, nil
}

// Lock keeps other processes from the file until it is closed: all of them, or those that lock it
// exclusively.
func (d *File) Lock(exclusive bool) error {
	if exclusive {
		return lockfile.Exclusive(d.f)
	}
	return lockfile.Shared(d.f)
}

// Reopen opens the same file again, for reading only. It is the caller's.
func (d *File) Reopen() (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", d.f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("open %s again: %w", d.f.Name(), err)
	}
	return f, nil
}

// InMemory tells whether the file lies on a file system that keeps it in memory (tmpfs). There even a
// page that is only read, of a hole, takes room: while there is none, a mapping of it ends its process
// (SIGBUS).
func (d *File) InMemory() bool {
	var fs unix.Statfs_t
	err := unix.Fstatfs(int(d.f.Fd()), &fs)
	return err == nil && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC)
}

// Size implements [Device].
func (d *File) Size() int64 { return d.size }

// Name is the file's path.
func (d *File) Name() string { return d.f.Name() }

// ReadAt implements [Device].
func (d *File) ReadAt(p []byte, off int64) (int, error) {
	if err := checkRange(d, off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := d.f.ReadAt(p, off)
	if n < len(p) && errors.Is(err, io.EOF) {
		err = fmt.Errorf("%s has been truncated to %d bytes or less: %w", d.f.Name(), off+int64(n), io.ErrUnexpectedEOF)
	}
	return n, err
}

// ReadNow implements [NowReader], from the page cache; see preadv2(2).
func (d *File) ReadNow(p []byte, off int64) bool {
	if checkRange(d, off, int64(len(p))) != nil {
		return false
	}
	n, err := unix.Preadv2(int(d.f.Fd()), [][]byte{p}, off, unix.RWF_NOWAIT)
	return err == nil && n == len(p)
}

// WriteAt implements [Device].
func (d *File) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(d, off, int64(len(p))); err != nil {
		return 0, err
	}
	if d.readOnly {
		return 0, ErrReadOnly
	}
	return d.f.WriteAt(p, off)
}

// Trim implements [Trimmer]: it punches a hole, or writes zeros where the file system has none.
func (d *File) Trim(off, length int64) error {
	if err := checkRange(d, off, length); err != nil || length == 0 {
		return err
	}
	if d.readOnly {
		return ErrReadOnly
	}
	err := unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return Trim(struct{ Device }{d}, off, length)
	}
	if err != nil {
		return &os.PathError{Op: "punch hole", Path: d.f.Name(), Err: err}
	}
	return nil
}

// NextData implements [Mapper].
func (d *File) NextData(off int64) (start, end int64, err error) {
	if off >= d.size {
		return d.size, d.size, nil
	}
	start, err = unix.Seek(int(d.f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return d.size, d.size, nil
	}
	if errors.Is(err, unix.EINVAL) { // a block device
		return off, d.size, nil
	}
	if err == nil {
		end, err = unix.Seek(int(d.f.Fd()), start, unix.SEEK_HOLE)
	}
	if err != nil {
		return 0, 0, &os.PathError{Op: "find data", Path: d.f.Name(), Err: err}
	}
	return min(start, d.size), min(end, d.size), nil
}

// Sync implements [Device]. The kernel reports a failed write-back once and then forgets the pages;
// so the failure is remembered here.
func (d *File) Sync() error {
	if err := d.failed.Load(); err != nil {
		return *err
	}
	if d.readOnly {
		return nil
	}
	if err := unix.Fdatasync(int(d.f.Fd())); err != nil {
		err = fmt.Errorf("%w; what was written to it since the last sync may be lost, so nothing more is taken for stored", &os.PathError{Op: "sync", Path: d.f.Name(), Err: err})
		d.failed.CompareAndSwap(nil, &err)
		return err
	}
	return nil
}

// Close implements [Device].
func (d *File) Close() error { return d.f.Close() }

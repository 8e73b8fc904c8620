package block

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// NoRoom tells whether an error says that a file system, or a quota, is full. Nothing is lost then:
// the operation can be done again once there is room.
func NoRoom(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// Room is what a file system has to offer.
type Room struct {
	FileSystem string // where it is mounted
	Free       int64  // bytes that this process may write, but for quotas
}

// RoomAt returns the room of the file system that path, which exists, is on.
func RoomAt(path string) (Room, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return Room{}, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return Room{}, fmt.Errorf("look for room at %s: %w", path, err)
	}
	r := Room{FileSystem: path, Free: int64(fs.Bavail) * fs.Bsize}
	if unix.Geteuid() == 0 {
		r.Free = int64(fs.Bfree) * fs.Bsize
	}
	var here, above unix.Stat_t
	if err := unix.Stat(path, &here); err != nil {
		return Room{}, fmt.Errorf("look for room at %s: %w", path, err)
	}
	for r.FileSystem != "/" {
		parent := filepath.Dir(r.FileSystem)
		if err := unix.Stat(parent, &above); err != nil {
			return Room{}, fmt.Errorf("look for room at %s: %w", path, err)
		}
		if above.Dev != here.Dev {
			break
		}
		r.FileSystem = parent
	}
	return r, nil
}

// Unstored tells whether a failed operation can be done again once the storage works. Nothing is
// lost then.
func Unstored(err error) bool {
	var unstored *UnstoredError
	return NoRoom(err) || errors.As(err, &unstored)
}

// UnstoredError says how much cannot be stored, and is where it was.
type UnstoredError struct {
	Path    string // file that it belongs to
	Missing int64  // bytes
	Err     error  // why it cannot be stored
}

// Error implements error.
func (e *UnstoredError) Error() string {
	if !NoRoom(e.Err) {
		return fmt.Sprintf("%s of %s cannot be stored: %v", humanize.IBytes(uint64(e.Missing)), e.Path, e.Err)
	}
	where := e.Path
	if r, err := RoomAt(e.Path); err == nil {
		where += fmt.Sprintf(" on %s (%s free)", r.FileSystem, humanize.IBytes(uint64(max(r.Free, 0))))
	}
	return fmt.Sprintf("%s of %s are not stored: %v; make room there", humanize.IBytes(uint64(e.Missing)), where, e.Err)
}

// Unwrap returns the cause.
func (e *UnstoredError) Unwrap() error { return e.Err }

// Reserve sets room aside for the first bytes of a file, so that later writes there need none. The
// file's content stays; reserved room reads as zeros and counts as a hole. If there is not enough
// room, nothing is set aside. On a file system that cannot set room aside, Reserve does nothing.
func Reserve(path string, length int64) error {
	f, err := OpenFile(path, false)
	if err != nil {
		return err
	}
	length = min(length, f.size)
	err = unix.Fallocate(int(f.f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, length)
	switch {
	case NoRoom(err):
		err = errors.Join(&UnstoredError{Path: path, Missing: length, Err: err}, f.release())
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENODEV):
		err = nil
	case err != nil:
		err = &os.PathError{Op: "set room aside in", Path: path, Err: err}
	}
	return errors.Join(err, f.Close())
}

// Release gives back what [Reserve] set aside in a file and nobody wrote.
func Release(path string) error {
	f, err := OpenFile(path, false)
	if err != nil {
		return err
	}
	return errors.Join(f.release(), f.Close())
}

func (d *File) release() error {
	for at := int64(0); at < d.size; {
		start, end, err := d.NextData(at)
		if err != nil {
			return err
		}
		if err := d.Trim(at, start-at); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// Package newfile makes files that are their owner's alone, and get their names only once they are
// complete and durable.
//
// A file has no name while it is written. So a killed writer leaves nothing, and others who may
// write to the directory find nothing to replace. A file or symbolic link that had the name is
// replaced, and never written to. A device, a FIFO, a socket, a directory and a link to one of them
// are refused.
package newfile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"drafter/internal/private"
)

// Mode is the mode of a new file, whatever the umask, because packages hold the memory of running
// systems.
const Mode = 0o600

// Write makes a file of what write writes.
func Write(path string, write func(*os.File) error) error {
	f, err := Create(path)
	if err != nil {
		return err
	}
	if err := write(f.File); err != nil {
		return errors.Join(err, f.Discard())
	}
	return f.Publish()
}

// WriteBytes makes a file that holds b.
func WriteBytes(path string, b []byte) error {
	return Write(path, func(f *os.File) error {
		_, err := f.Write(b)
		return err
	})
}

// Rename gives a file that has been synced another name, durably, and replaces the file with that
// name.
func Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(to))
}

// Remove removes a file, durably. It need not be there.
func Remove(path string) error {
	if err := os.Remove(path); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the names in a directory durable.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync directory %s: %w", path, err)
	}
	return nil
}

// File is an unfinished file. One goroutine uses it, and ends it by Publish or Discard.
type File struct {
	*os.File
	dir  *os.File
	path string
	temp string // the file's name in dir meanwhile, on a file system that has no files without one
}

// Create begins the file at path, in a directory that is made if need be.
func Create(path string) (_ *File, err error) {
	if err := CheckReplaced(path); err != nil {
		return nil, err
	}
	parent := filepath.Dir(path)
	if err := private.MkdirAll(parent); err != nil {
		return nil, err
	}
	dir, err := private.Open(parent, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	f := &File{dir: dir, path: path}
	if err := f.open(unix.O_TMPFILE); errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) {
		f.temp = f.hidden()
		err = f.open(unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW)
		if err != nil {
			return nil, errors.Join(err, dir.Close())
		}
	} else if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	if err := f.Chmod(Mode); err != nil {
		return nil, errors.Join(err, f.Discard())
	}
	return f, nil
}

// CheckReplaced refuses a path that names something else than a regular file, such as /dev/null: a
// new file does not replace it.
func CheckReplaced(path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// A link such as /dev/stdout is the host's, whatever it leads to now.
	link, _ := os.Readlink(path)
	if !info.Mode().IsRegular() || strings.HasPrefix(link, "/proc/") {
		return fmt.Errorf("%s is there and no regular file; name another output", path)
	}
	return nil
}

// hidden is a name that nobody can foresee.
func (f *File) hidden() string { return "." + filepath.Base(f.path) + "." + rand.Text() }

func (f *File) open(flags int) error {
	name := f.temp
	if name == "" {
		name = "."
	}
	fd, err := unix.Openat(int(f.dir.Fd()), name, unix.O_RDWR|unix.O_CLOEXEC|flags, Mode)
	if err != nil {
		return &os.PathError{Op: "create file for", Path: f.path, Err: err}
	}
	f.File = os.NewFile(uintptr(fd), f.path)
	return nil
}

// Link is a path to the file for other processes of the same user, until the file is closed.
func (f *File) Link() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()) }

// Publish gives the file its name, durably, and closes it.
func (f *File) Publish() error {
	if err := errors.Join(CheckReplaced(f.path), f.Sync()); err != nil {
		return errors.Join(err, f.Discard())
	}
	if f.temp == "" { // linkat(2) replaces nothing, so the file comes by a name of its own
		f.temp = f.hidden()
		if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), int(f.dir.Fd()), f.temp, unix.AT_SYMLINK_FOLLOW); err != nil {
			f.temp = ""
			return errors.Join(&os.PathError{Op: "link", Path: f.path, Err: err}, f.Discard())
		}
	}
	if err := unix.Renameat(int(f.dir.Fd()), f.temp, int(f.dir.Fd()), filepath.Base(f.path)); err != nil {
		return errors.Join(&os.PathError{Op: "rename to", Path: f.path, Err: err}, f.Discard())
	}
	f.temp = ""
	if err := f.dir.Sync(); err != nil {
		return errors.Join(fmt.Errorf("sync directory of %s: %w", f.path, err), f.Discard())
	}
	return f.Discard()
}

// Discard closes the file, and gives it up unless it was published.
func (f *File) Discard() error {
	var err error
	if f.temp != "" {
		if err = unix.Unlinkat(int(f.dir.Fd()), f.temp, 0); err != nil {
			err = &os.PathError{Op: "remove", Path: f.path, Err: err}
		}
		f.temp = ""
	}
	return errors.Join(err, f.Close(), f.dir.Close())
}

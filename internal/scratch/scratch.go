// Package scratch makes directories for unfinished work: closed to other users, and removed with
// their owner. If the owner was killed, the next owner that makes a directory of the same kind at
// the same place removes it.
package scratch

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/mark"
)

// lockName is the file that says whether a directory's owner lives, and that the directory is ours.
// It holds the directory's mark, with the directory's name as its id. A directory that was renamed,
// or is a copy, is left alone.
const lockName = ".drafter-scratch"

const markFormat = "drafter-scratch"

// Dir is a directory of our own.
type Dir struct {
	parent *os.Root
	root   *os.File // names the very directory, wherever others move it
	name   string
	lock   *os.File
}

// New makes a directory in parent, whose name begins with prefix and is otherwise random. Close
// removes it.
func New(parent, prefix string) (_ *Dir, err error) {
	d := &Dir{name: prefix + rand.Text()}
	if d.parent, err = os.OpenRoot(parent); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make directory in %s: %w", parent, err), d.parent.Close())
		}
	}()
	if err := sweep(d.parent, prefix); err != nil {
		return nil, err
	}
	if err := d.parent.Mkdir(d.name, 0o700); err != nil {
		return nil, err
	}
	if d.root, err = openOwn(d.parent, d.name); err != nil {
		return nil, err
	}
	if err := d.mark(); err != nil {
		return nil, errors.Join(err, d.root.Close(), d.parent.Remove(d.name))
	}
	return d, nil
}

// mark makes the lock, and once that is held, the mark in it.
func (d *Dir) mark() error {
	if err := d.root.Chmod(0o700); err != nil {
		return err
	}
	m, err := mark.Of(d.root, markFormat, d.name)
	if err != nil {
		return err
	}
	fd, err := unix.Openat(int(d.root.Fd()), lockName, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("create lock: %w", err)
	}
	d.lock = os.NewFile(uintptr(fd), lockName)
	if err = d.hold(); err == nil {
		err = m.Write(d.lock)
	}
	if err != nil {
		return errors.Join(err, d.lock.Close(), unix.Unlinkat(int(d.root.Fd()), lockName, 0))
	}
	return nil
}

// hold takes the lock. Whoever sweeps may have it for a moment.
func (d *Dir) hold() (err error) {
	for range 1000 {
		var held *lockfile.HeldError
		if err = lockfile.Exclusive(d.lock); !errors.As(err, &held) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return err
}

// Path is the path of a file in the directory, for processes of the same user. It stays valid until
// Close, even if others rename the directories above.
func (d *Dir) Path(name string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), d.root.Fd()), name)
}

// Name is the directory's own path. It is valid unless somebody moves a directory above.
func (d *Dir) Name() string { return filepath.Join(d.parent.Name(), d.name) }

// Move gives the entry called name its place beside the directory. It replaces an empty directory,
// and nothing else.
func (d *Dir) Move(name, to string) error {
	parent, err := d.parent.Open(".")
	if err != nil {
		return err
	}
	defer parent.Close()
	err = unix.Renameat2(int(d.root.Fd()), name, int(parent.Fd()), to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		if err = unix.Unlinkat(int(parent.Fd()), to, unix.AT_REMOVEDIR); err == nil {
			err = unix.Renameat2(int(d.root.Fd()), name, int(parent.Fd()), to, unix.RENAME_NOREPLACE)
		}
	}
	if err != nil {
		return fmt.Errorf("rename to %s: %w", filepath.Join(d.parent.Name(), to), err)
	}
	return parent.Sync()
}

// Close removes the directory and all in it.
func (d *Dir) Close() error {
	err := mark.Empty(d.root, lockName)
	if err == nil {
		err = d.parent.Remove(d.name)
	}
	return errors.Join(err, d.lock.Close(), d.root.Close(), d.parent.Close())
}

// Abandon gives the directory up as the end of the process would: it stays.
func (d *Dir) Abandon() error { return errors.Join(d.lock.Close(), d.root.Close(), d.parent.Close()) }

// errForeign says that a directory is not this user's alone.
var errForeign = errors.New("it is another one's directory")

// openOwn opens a directory, if it is this user's and closed to others.
func openOwn(parent *os.Root, name string) (*os.File, error) {
	f, err := parent.OpenFile(name, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, errForeign), f.Close())
	}
	return f, nil
}

// sweep removes the directories whose owners are gone, and leaves all others alone.
func sweep(parent *os.Root, prefix string) error {
	entries, err := fs.ReadDir(parent.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), prefix) || !e.IsDir() {
			continue
		}
		if err := sweepOne(parent, e.Name()); err != nil {
			return err
		}
	}
	return nil
}

func sweepOne(parent *os.Root, name string) (err error) {
	root, err := openOwn(parent, name)
	if errors.Is(err, errForeign) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	fd, err := unix.Openat(int(root.Fd()), lockName, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil // its owner is about to mark it, or it is none of ours
	}
	lock := os.NewFile(uintptr(fd), lockName)
	defer func() { err = errors.Join(err, lock.Close()) }()
	if lockfile.Exclusive(lock) != nil {
		return nil // its owner lives
	}
	if m, err := mark.Of(root, markFormat, name); err != nil || !m.In(lock) {
		return err // its owner is about to mark it, or it is none of ours
	}
	if err := mark.Empty(root, lockName); err != nil {
		return fmt.Errorf("remove what a killed process left in %s: %w", name, err)
	}
	if err := parent.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

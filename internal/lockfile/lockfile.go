// Package lockfile makes locks on files, each for one process at a time. A lock ends with its
// process, however that ends. It leaves no file behind when it is released.
package lockfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"drafter/internal/kind"
	"drafter/internal/private"
)

// Lock is a held lock.
type Lock struct{ file *os.File }

// HeldError says that another process holds a lock.
type HeldError struct {
	Holder string
	PID    int // of the holder; 0 when it has not written itself into the file
}

func (e *HeldError) Error() string { return "in use by " + e.Holder }

// Is tells that it is of the kind [kind.ErrInUse].
func (e *HeldError) Is(target error) bool { return target == kind.ErrInUse }

// Try takes the lock at path. The file need not exist; its directory must. Nobody else may be able
// to open the file, and so to lock it. Try returns a *HeldError when another process has the lock.
// The file says who holds it. A file with other content is no lock, and is refused.
func Try(path string) (*Lock, error) {
	for {
		f, err := private.CreateOrOpen(path)
		if err != nil {
			return nil, err
		}
		if err := Exclusive(f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		// The last holder may have removed the file between the open and the lock here. Others
		// would then lock another file.
		current, err := isCurrent(f, path)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if !current {
			if err := f.Close(); err != nil {
				return nil, err
			}
			continue
		}
		// Zeros are what a power cut may leave.
		if b, err := content(f); err != nil || len(bytes.Trim(b, "\x00")) > 0 && !bytes.HasPrefix(b, []byte(holder)) {
			return nil, errors.Join(fmt.Errorf("%s is no lock of this program's; move it away", path), err, f.Close())
		}
		return Adopt(f)
	}
}

// Holder returns who has the lock at path; nil if nobody has. It writes nothing. A holder that has
// just taken the lock may have no PID yet, or that of who has started it.
func Holder(path string) (*HeldError, error) {
	f, err := private.Open(path, unix.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var who *HeldError
	if err := Shared(f); errors.As(err, &who) {
		return who, nil
	} else if err != nil {
		return nil, err
	}
	return nil, nil
}

// Adopt makes a file that is locked this process' lock: a process that was started with it has the
// lock from its first instruction.
func Adopt(f *os.File) (*Lock, error) {
	who := fmt.Sprintf(holder+"%d (%s)\n", os.Getpid(), filepath.Base(os.Args[0]))
	_, err := f.WriteAt([]byte(who), 0)
	if err == nil {
		err = f.Truncate(int64(len(who)))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &Lock{f}, nil
}

// File is the locked file. A process that is started with it shares the lock.
func (l *Lock) File() *os.File { return l.file }

func isCurrent(f *os.File, path string) (bool, error) {
	ours, err := f.Stat()
	if err != nil {
		return false, err
	}
	now, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(ours, now), err
}

// Release removes the file and gives the lock back.
func (l *Lock) Release() error {
	err := os.Remove(l.file.Name())
	if errors.Is(err, os.ErrNotExist) {
		err = nil // its directory was removed with it
	}
	return errors.Join(err, l.file.Close())
}

// Abandon releases the lock as the end of the process would: the file stays.
func (l *Lock) Abandon() error { return l.file.Close() }

// Exclusive locks an open file for this process until it is closed. It returns a *HeldError when
// another process has it.
func Exclusive(f *os.File) error { return lock(f, unix.LOCK_EX) }

// Shared is like Exclusive, but any number of processes can hold it so.
func Shared(f *os.File) error { return lock(f, unix.LOCK_SH) }

func lock(f *os.File, how int) error {
	err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return held(f)
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

// held reads the holder from a lock file. Any other file names none.
func held(f *os.File) *HeldError {
	b, _ := content(f)
	e := &HeldError{Holder: "another process"}
	who := strings.TrimSpace(string(b))
	if _, err := fmt.Sscanf(who, holder+"%d ", &e.PID); err == nil {
		e.Holder = who
	}
	return e
}

// holder is how the content of a lock file begins.
const holder = "process "

// content reads the beginning of a lock file.
func content(f *os.File) ([]byte, error) { return io.ReadAll(io.NewSectionReader(f, 0, 256)) }

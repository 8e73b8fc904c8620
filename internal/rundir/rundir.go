// Package rundir holds a host's locks and records, in /run/drafter. A lock is held with flock(2),
// so it ends with its process. Only root can read there, because whoever can open a lock can hold
// it.
package rundir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/private"
)

// Path is the directory.
const Path = "/run/drafter"

// Lock takes the lock called name, which may lead through directories: those are made. It returns a
// *[lockfile.HeldError] when another process has it.
func Lock(name string) (*lockfile.Lock, error) {
	path := filepath.Join(Path, name+".lock")
	for {
		if err := private.MkdirAll(filepath.Dir(path)); errors.Is(err, os.ErrNotExist) {
			continue // another process has just removed a directory
		} else if err != nil {
			return nil, err
		}
		// an older release made it
		if err := os.Chmod(Path, 0o700); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		lock, err := tryBesideSweeps(path)
		if !errors.Is(err, os.ErrNotExist) {
			return lock, err
		}
	}
}

// tryBesideSweeps takes a lock while nobody sweeps its directory, because a sweep holds the locks
// that it removes.
func tryBesideSweeps(path string) (*lockfile.Lock, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_SH); err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	return lockfile.Try(path)
}

// Sweep removes the locks in a directory whose holders were killed, unless somebody takes one there
// at this moment.
func Sweep(dir string) error {
	d, err := os.Open(filepath.Join(Path, dir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	var held *lockfile.HeldError
	if err := lockfile.Exclusive(d); errors.As(err, &held) {
		return nil
	} else if err != nil {
		return err
	}
	paths, err := filepath.Glob(filepath.Join(Path, dir, "*.lock"))
	if err != nil {
		return err
	}
	for _, path := range paths {
		lock, err := lockfile.Try(path)
		if errors.As(err, &held) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := lock.Release(); err != nil {
			return err
		}
	}
	return nil
}

// Remove removes the directory if it is empty. It may still hold others' locks, or be used again at
// this moment: neither is an error.
func Remove() error {
	dirs := []string{}
	err := filepath.WalkDir(Path, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append([]string{path}, dirs...)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("remove %s: %w", Path, err)
	}
	for _, dir := range dirs {
		err := unix.Rmdir(dir)
		if err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove %s: %w", dir, err)
		}
	}
	return nil
}

// Package fileset makes several files appear together: whoever looks finds all of the old ones or all of the new ones, whenever the writer is killed.
package fileset

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/private"
)

// Set is a set of files in the making. It is used by one goroutine, and ended by Publish or Discard.
//
// Files that are all of one directory replace that directory as a whole, in one rename; what else is in it stays. Files of several directories are renamed
// one by one, the last one last, and replace nothing: then an interrupted writer leaves no complete set.
type Set struct {
	paths   map[string]string // where the files will be
	last    string
	dir     string // the common directory, or ""
	staging string // what becomes of it
	old     bool   // dir exists
	lock    *lockfile.Lock
}

// New begins a set of the files at paths, by any names. last is the name of the file that is worth nothing without the others. What a killed writer of the
// same set left behind is removed.
func New(paths map[string]string, last string) (_ *Set, err error) {
	s := &Set{paths: map[string]string{}, last: last}
	dirs := map[string]bool{}
	for name, path := range paths {
		if s.paths[name], err = filepath.Abs(path); err != nil {
			return nil, err
		}
		dirs[filepath.Dir(s.paths[name])] = true
	}
	if len(dirs) == 1 {
		for dir := range dirs {
			if err := s.stage(dir); err != nil {
				return nil, err
			}
		}
	}
	if s.dir == "" {
		err = s.checkScattered()
	}
	if err != nil {
		return nil, err // nothing was made
	}
	return s, nil
}

// stage makes the directory that will replace dir, if that can be replaced.
func (s *Set) stage(dir string) (err error) {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		s.old = true
		if err := private.MkdirAll(dir); err != nil { // it exists, and is nobody else's
			return err
		}
		for _, e := range entries {
			if !e.Type().IsRegular() {
				return nil
			}
		}
	}
	parent := filepath.Dir(dir)
	if parent == dir {
		return nil
	}
	if err := private.MkdirAll(parent); err != nil {
		return err
	}
	s.lock, err = lockfile.Try(filepath.Join(parent, "."+filepath.Base(dir)+".lock"))
	if err != nil {
		return fmt.Errorf("%s is %w", dir, err)
	}
	s.dir, s.staging = dir, filepath.Join(parent, "."+filepath.Base(dir)+".new")
	if err := os.RemoveAll(s.staging); err != nil {
		return errors.Join(err, s.lock.Release())
	}
	if err := errors.Join(s.checkUnused(), os.Mkdir(s.staging, 0o700)); err != nil {
		return errors.Join(err, s.lock.Release())
	}
	return nil
}

// checkUnused refuses to replace files that a process has locked, as a running instance has its base.
func (s *Set) checkUnused() error {
	for _, path := range s.paths {
		f, err := private.Open(path, unix.O_RDONLY)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		err = lockfile.Exclusive(f)
		if err != nil {
			err = fmt.Errorf("%s is %w; write to another place", path, err)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

func (s *Set) checkScattered() error {
	for _, path := range s.paths {
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s exists; files in several directories, or in one with subdirectories, cannot be replaced all at once: remove it, or write to a directory of their own", path)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := private.MkdirAll(filepath.Dir(path)); err != nil {
			return err
		}
		if err := os.Remove(partial(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func partial(path string) string { return path + ".partial" }

// Path is where the file of that name is to be written. It need not be.
func (s *Set) Path(name string) string {
	if s.dir != "" {
		return filepath.Join(s.staging, filepath.Base(s.paths[name]))
	}
	return partial(s.paths[name])
}

// Publish lets the files appear. They must have been synced and closed. On an error nothing has changed, unless it says so.
func (s *Set) Publish() error {
	if s.dir == "" {
		return s.publishScattered()
	}
	if err := s.publishDir(); err != nil {
		return errors.Join(fmt.Errorf("publish %s: %w", s.dir, err), s.Discard())
	}
	return s.lock.Release()
}

func (s *Set) publishDir() error {
	if s.old {
		if err := s.adopt(); err != nil {
			return err
		}
	}
	if err := syncDir(s.staging); err != nil {
		return err
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if s.old {
		flags = unix.RENAME_EXCHANGE
	}
	if err := unix.Renameat2(unix.AT_FDCWD, s.staging, unix.AT_FDCWD, s.dir, flags); err != nil {
		return &os.LinkError{Op: "rename", Old: s.staging, New: s.dir, Err: err}
	}
	if err := syncDir(filepath.Dir(s.dir)); err != nil {
		return fmt.Errorf("the files are there, but it is not known whether they survive a power cut: %w", err)
	}
	if s.old {
		return os.RemoveAll(s.staging) // what was there before
	}
	return nil
}

// adopt takes over what else is in the directory.
func (s *Set) adopt() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		from, to := filepath.Join(s.dir, e.Name()), filepath.Join(s.staging, e.Name())
		if err := os.Link(from, to); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

func (s *Set) publishScattered() (err error) {
	var done []string
	for _, last := range []bool{false, true} {
		for name, path := range s.paths {
			if err != nil || (name == s.last) != last {
				continue
			}
			if err = os.Rename(partial(path), path); err == nil {
				done = append(done, path)
				err = syncDir(filepath.Dir(path))
			}
		}
	}
	if err != nil {
		for _, path := range done {
			err = errors.Join(err, os.Remove(path))
		}
		return errors.Join(err, s.Discard())
	}
	return nil
}

// Discard gives the set up. What was there before stays.
func (s *Set) Discard() error {
	if s.dir != "" {
		return errors.Join(os.RemoveAll(s.staging), s.lock.Release())
	}
	var errs []error
	for _, path := range s.paths {
		if err := os.Remove(partial(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync directory %s: %w", strings.TrimSuffix(path, "/"), err)
	}
	return nil
}

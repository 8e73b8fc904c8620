// Package fileset makes several files appear together. Readers find all of the old files or all of
// the new ones, whenever the writer is killed.
package fileset

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/internal/scratch"
)

// Set is a set of unfinished files. One goroutine uses it, and ends it by Publish or Discard.
//
// If all files are of one directory, they replace that directory as a whole, in one rename; other
// files in it stay. Files of several directories are renamed one by one, the last one last, and
// replace nothing. An interrupted writer then leaves no complete set.
type Set struct {
	paths map[string]string // where the files will be
	last  string
	dir   string // the common directory, or ""
	old   bool   // dir exists
	lock  *lockfile.Lock
	// by directories: in the common one's parent, else in that of each file
	work map[string]*scratch.Dir
}

// staged is the name of what becomes the common directory.
const staged = "staged"

// New begins a set of the files at paths, whose keys are any names. last is the name of the file
// without which the others are worth nothing. New removes what a killed writer of the same set left
// behind.
func New(paths map[string]string, last string) (_ *Set, err error) {
	s := &Set{paths: map[string]string{}, last: last, work: map[string]*scratch.Dir{}}
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
		if err := s.scatter(); err != nil {
			return nil, errors.Join(err, s.closeWork())
		}
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
		if keeps, err := keepsItsPlace(dir); keeps || err != nil {
			return err
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
	s.dir = dir
	if err = s.checkUnused(); err == nil {
		err = s.makeWork(parent, "."+filepath.Base(dir)+".new-")
	}
	if err == nil {
		err = os.Mkdir(s.staging(), 0o700)
	}
	if err != nil {
		return errors.Join(err, s.closeWork(), s.lock.Release())
	}
	return nil
}

// keepsItsPlace tells whether a directory cannot be replaced by another one: something is mounted
// there, or it is the working directory of this process, or of the shell that called it.
func keepsItsPlace(dir string) (bool, error) {
	here, err := os.Stat(".")
	if err != nil {
		return false, err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return false, err
	}
	if os.SameFile(here, info) {
		return true, nil
	}
	return mountinfo.Mounted(dir)
}

func (s *Set) makeWork(dir, prefix string) (err error) {
	s.work[dir], err = scratch.New(dir, prefix)
	if err != nil {
		delete(s.work, dir)
	}
	return err
}

func (s *Set) closeWork() error {
	var errs []error
	for _, w := range s.work {
		errs = append(errs, w.Close())
	}
	return errors.Join(errs...)
}

// staging is what becomes the common directory.
func (s *Set) staging() string {
	return filepath.Join(s.work[filepath.Dir(s.dir)].Name(), staged)
}

// checkUnused refuses to replace files that a process has locked, as a running instance locks its
// base.
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

// scatter makes place for files of several directories.
func (s *Set) scatter() error {
	for _, path := range s.paths {
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s exists; files in several directories, or in one that has subdirectories, is mounted, or is the working directory, cannot be replaced all at once: remove it, or write to a directory of their own", path)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		dir := filepath.Dir(path)
		if err := private.MkdirAll(dir); err != nil {
			return err
		}
		if s.work[dir] != nil {
			continue
		}
		if err := s.makeWork(dir, ".drafter-partial-"); err != nil {
			return err
		}
	}
	return nil
}

// Path is where the file of that name is to be written. It need not be.
func (s *Set) Path(name string) string {
	if s.dir != "" {
		return filepath.Join(s.staging(), filepath.Base(s.paths[name]))
	}
	return filepath.Join(s.work[filepath.Dir(s.paths[name])].Name(), filepath.Base(s.paths[name]))
}

// Publish makes the files appear. They must have been synced and closed. On an error nothing has
// changed, unless the error says so.
func (s *Set) Publish() error {
	if s.dir == "" {
		return s.publishScattered()
	}
	if err := s.publishDir(); err != nil {
		err = fmt.Errorf("publish %s: %w", s.dir, err)
		return errors.Join(err, s.Discard())
	}
	return s.Discard()
}

func (s *Set) publishDir() error {
	if s.old {
		if err := s.adopt(); err != nil {
			return err
		}
	}
	if err := newfile.SyncDir(s.staging()); err != nil {
		return err
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if s.old {
		flags = unix.RENAME_EXCHANGE // what was there before goes with the work directory
	}
	if err := unix.Renameat2(unix.AT_FDCWD, s.staging(), unix.AT_FDCWD, s.dir, flags); err != nil {
		return &os.LinkError{Op: "rename", Old: s.staging(), New: s.dir, Err: err}
	}
	if err := newfile.SyncDir(filepath.Dir(s.dir)); err != nil {
		return fmt.Errorf("the files are there, but it is not known whether they survive a power cut: %w", err)
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
		from, to := filepath.Join(s.dir, e.Name()), filepath.Join(s.staging(), e.Name())
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
			if err = unix.Renameat2(unix.AT_FDCWD, s.Path(name), unix.AT_FDCWD, path, unix.RENAME_NOREPLACE); err == nil {
				done = append(done, path)
				err = newfile.SyncDir(filepath.Dir(path))
			} else {
				err = &os.LinkError{Op: "rename", Old: s.Path(name), New: path, Err: err}
			}
		}
	}
	if err != nil {
		for _, path := range done {
			err = errors.Join(err, os.Remove(path))
		}
	}
	return errors.Join(err, s.Discard())
}

// Discard gives the set up. What was there before stays.
func (s *Set) Discard() error {
	err := s.closeWork()
	if s.lock != nil {
		err = errors.Join(err, s.lock.Release())
	}
	return err
}

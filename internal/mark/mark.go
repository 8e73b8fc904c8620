// Package mark marks the directories that this program makes, and removes marked directories. A
// name, an owner and a mode prove nothing: a clean-up that relies on them removes other people's
// files.
package mark

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"drafter/internal/fusemount"
)

// Version is that of the format below.
const Version = 1

// Mark is the content of a file in a directory of ours, as JSON.
type Mark struct {
	Format  string `json:"format"`  // what the directory is for
	Version int    `json:"version"` // Version
	ID      string `json:"id"`      // random; also in a record, or in the directory's name
	Inode   uint64 `json:"inode"`   // of the directory: a copy of a marked directory is not ours
}

// Of returns the mark of an open directory.
func Of(dir *os.File, format, id string) (Mark, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return Mark{}, &os.PathError{Op: "stat", Path: dir.Name(), Err: err}
	}
	return Mark{Format: format, Version: Version, ID: id, Inode: st.Ino}, nil
}

// Write makes the mark the content of an empty file.
func (m Mark) Write(f *os.File) error {
	b, err := json.Marshal(m)
	if err == nil {
		_, err = f.Write(append(b, '\n'))
	}
	return err
}

// In tells whether a file holds just this mark.
func (m Mark) In(f *os.File) bool {
	const most = 1 << 10 // bytes
	var found Mark
	err := json.NewDecoder(io.NewSectionReader(f, 0, most)).Decode(&found)
	return err == nil && found == m
}

// Renew makes an empty directory at path, with only a mark in the file called name. The directory
// may be new or empty, or have that mark; then everything in it is removed. Any other directory is
// refused.
func Renew(path, name, format string) (err error) {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	m, err := Of(dir, format, path)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		f, err := os.OpenFile(filepath.Join(path, name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		ours := err == nil && m.In(f)
		if err == nil {
			f.Close()
		}
		if !ours {
			return fmt.Errorf("%s has files, and they would be removed; choose another directory, or empty it", path)
		}
		if err := Empty(dir, name); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(filepath.Join(path, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(m.Write(f), f.Close())
}

// Empty removes everything in an open directory, the file called last at the end, so that a killed
// process leaves the mark to the next. It removes nothing if something is mounted there, because
// its files are somebody else's.
func Empty(dir *os.File, last string) error {
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err != nil {
		return err
	}
	mounts, err := fusemount.AllBelow(path)
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("something is mounted on %s, and its files would be removed; unmount it", strings.Join(mounts, " and "))
	}
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err != nil {
		return err
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != last {
			if err := root.RemoveAll(e.Name()); err != nil {
				return err
			}
		}
	}
	if err := root.Remove(last); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

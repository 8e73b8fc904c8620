package blueprint

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// rootDir is a directory in which paths resolve as if it were the root: neither ".." nor an absolute symbolic link leads out of it
// (openat2(2), RESOLVE_IN_ROOT).
type rootDir struct{ *os.File }

func openRootDir(path string) (*rootDir, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &rootDir{f}, nil
}

func (r *rootDir) open(path string, flags int) (*os.File, error) {
	fd, err := unix.Openat2(int(r.Fd()), path, &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// mkdirAll makes a directory and its parents.
func (r *rootDir) mkdirAll(path string) error {
	path = filepath.Clean("/" + path)
	dir, err := r.open(path, unix.O_PATH|unix.O_DIRECTORY)
	if err == nil {
		return dir.Close()
	}
	if path == "/" || !errors.Is(err, unix.ENOENT) {
		return err
	}
	if err := r.mkdirAll(filepath.Dir(path)); err != nil {
		return err
	}
	parent, err := r.open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := unix.Mkdirat(int(parent.Fd()), filepath.Base(path), 0o755); err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	return nil
}

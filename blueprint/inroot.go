package blueprint

import (
	"errors"
	"fmt"
	"io"
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

// readFile reads at most limit bytes of a regular file. What is something else is not opened: a FIFO
// would hold up the open, and a device of the host's may act on it.
func (r *rootDir) readFile(path string, limit int64) ([]byte, error) {
	at, err := r.open(path, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	info, err := at.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", at.Fd()))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
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

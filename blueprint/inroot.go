package blueprint

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// rootDir is a directory in which paths resolve as if it were the root: neither ".." nor an
// absolute symbolic link leads out of it (openat2(2), RESOLVE_IN_ROOT).
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

// readFile reads at most limit bytes of a regular file. It opens nothing else: the open of a FIFO
// would wait, and that of a device of the host may have effects.
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

// mkdirAll makes a directory and its parents. For a dangling symbolic link it makes what the link
// leads to. If a file is in the way, the error is ENOTDIR.
func (r *rootDir) mkdirAll(path string) error { return r.mkdir(filepath.Clean("/"+path), maxLinks) }

// maxLinks bounds a chain of symbolic links, as in the kernel.
const maxLinks = 40

func (r *rootDir) mkdir(path string, links int) error {
	dir, err := r.open(path, unix.O_PATH|unix.O_DIRECTORY)
	if err == nil {
		return dir.Close()
	}
	if path == "/" || !errors.Is(err, unix.ENOENT) {
		return err
	}
	if err := r.mkdir(filepath.Dir(path), links); err != nil {
		return err
	}
	parent, err := r.open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer parent.Close()
	err = unix.Mkdirat(int(parent.Fd()), filepath.Base(path), 0o755)
	if errors.Is(err, unix.EEXIST) && links > 0 {
		target, err := r.follow(parent, filepath.Base(path))
		if err != nil {
			return fmt.Errorf("create %s: %w", path, err)
		}
		return r.mkdir(target, links-1)
	}
	if err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	return nil
}

// follow returns where a symbolic link in a directory leads, from the root.
func (r *rootDir) follow(dir *os.File, name string) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, b)
	if err != nil {
		return "", fmt.Errorf("read link: %w", err)
	}
	target := string(b[:n])
	if filepath.IsAbs(target) {
		return filepath.Clean(target), nil
	}
	real, err := r.real(dir)
	return filepath.Join(real, target), err
}

// real returns the path of an open file from the root, without symbolic links.
func (r *rootDir) real(f *os.File) (string, error) {
	path, err := os.Readlink(fmt.Sprint("/proc/self/fd/", f.Fd()))
	root, err2 := os.Readlink(fmt.Sprint("/proc/self/fd/", r.Fd()))
	return filepath.Clean("/" + strings.TrimPrefix(path, root)), errors.Join(err, err2)
}

// leadsTo tells whether a path leads to a regular file whose real name ends so.
func (r *rootDir) leadsTo(path, suffix string) (yes, isFile bool, err error) {
	f, err := r.open(path, unix.O_PATH)
	if err != nil {
		return false, false, nil // it may be there only when it runs
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return false, false, err
	}
	real, err := r.real(f)
	return strings.HasSuffix(real, suffix), true, err
}

// Package private makes files and directories for their owner alone, and opens files by paths that
// other users may have a hand in: modes are 0600 and 0700 whatever the umask, and a symbolic link
// is followed only if a trusted user made it. Where others could replace what is made, or have a
// path lead elsewhere, nothing is made and nothing is opened for writing: each directory of the
// path belongs to a trusted user, and others cannot write to it unless it is sticky, as /tmp.
//
// The trusted users are root, the user of this process, and the one who called it by sudo(8).
package private

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxLinks bounds the symbolic links in a path, as Linux does (path_resolution(7)).
const maxLinks = 40

// Trusted tells whether what a user makes may lead this process anywhere.
func Trusted(uid uint32) bool {
	if uid == 0 || uid == uint32(os.Geteuid()) {
		return true
	}
	caller, err := strconv.ParseUint(os.Getenv("SUDO_UID"), 10, 32)
	return err == nil && os.Geteuid() == 0 && uid == uint32(caller)
}

// Open opens an existing regular file, block device or directory, with flags of open(2).
func Open(path string, flags int) (*os.File, error) {
	how := followLast
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		how |= trustedPlace
	}
	return open(path, flags, how)
}

// ReadFile reads a regular file of at most so many bytes.
func ReadFile(path string, most int64) ([]byte, error) {
	f, err := Open(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s is longer than %d bytes", path, most)
	}
	return b, err
}

func open(path string, flags int, how walking) (*os.File, error) {
	dir, base, err := walk(path, how)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(dir)
	// A FIFO would hold up the open.
	fd, err := unix.Openat(dir, base, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == nil {
		err = check(fd)
	}
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	return file(fd, path, err)
}

// check refuses what is neither file, device nor directory.
func check(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK, unix.S_IFDIR:
		return nil
	}
	return errors.New("it is neither a file nor a block device")
}

// file wraps a descriptor, or closes it after an error.
func file(fd int, path string, err error) (*os.File, error) {
	if err != nil {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
		}
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Create makes a new file, open for reading and writing. It fails with [os.ErrExist] if there is
// one. Directories that are missing are made.
func Create(path string) (*os.File, error) {
	dir, base, err := walk(path, makeMissing|trustedPlace)
	if err != nil {
		return nil, &os.PathError{Op: "create", Path: path, Err: err}
	}
	defer unix.Close(dir)
	return create(dir, base, path)
}

func create(dir int, base, path string) (*os.File, error) {
	const flags = unix.O_RDWR | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(dir, base, flags, 0o600)
	if err == nil {
		err = unix.Fchmod(fd, 0o600)
	}
	return file(fd, path, err)
}

// CreateTemp makes a new file beside path, hidden and with a random name.
func CreateTemp(path string) (*os.File, error) {
	return Create(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+rand.Text()[:10]))
}

// CreateOrOpen opens the file at path for reading and writing, and makes it if there is none. A
// file that another user made or may write to, that has a second name, or that is a link, is
// refused.
func CreateOrOpen(path string) (*os.File, error) {
	for {
		f, err := Create(path)
		if !errors.Is(err, os.ErrExist) {
			return f, err
		}
		f, err = open(path, unix.O_RDWR, trustedPlace)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed just now
		}
		if err != nil {
			return nil, err
		}
		if err := CheckOwner(f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if err := f.Chmod(0o600); err != nil { // an older release made it
			return nil, errors.Join(err, f.Close())
		}
		return f, nil
	}
}

// MkdirAll makes a directory and those above it that are missing.
func MkdirAll(path string) error {
	dir, _, err := walk(path+"/.", makeMissing|trustedPlace)
	if err != nil {
		return &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	return unix.Close(dir)
}

// walking says how to walk a path.
type walking int

const (
	followLast   walking = 1 << iota // follow a link at the end, too
	makeMissing                      // make directories that are missing
	trustedPlace                     // refuse directories in which others could put something else
)

// walk opens the directory that the last name of a path is in (O_PATH of open(2)), and returns it
// with that name. It follows links that it may. The name of a directory is ".".
func walk(path string, how walking) (dir int, base string, err error) {
	directory := strings.HasSuffix(path, "/.")
	if path, err = filepath.Abs(path); err != nil {
		return -1, "", err
	}
	w := walker{names: strings.Split(path[1:], "/"), how: how}
	if directory {
		w.names = append(w.names, ".")
	}
	if w.dir, err = unix.Open("/", walkFlags, 0); err != nil {
		return -1, "", err
	}
	for there := false; !there && err == nil; {
		base, there, err = w.step()
	}
	if err != nil {
		unix.Close(w.dir) // nothing was written by it
		return -1, "", err
	}
	return w.dir, base, nil
}

// walkFlags open what a walk comes by.
const walkFlags = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC

// walker is on its way.
type walker struct {
	dir   int      // where it is
	names []string // what is left of the path
	links int      // followed
	how   walking
}

// step takes the next name of the path. At the end it is there, and base is the last name.
func (w *walker) step() (base string, there bool, err error) {
	if w.how&trustedPlace != 0 {
		if err := checkPlace(w.dir); err != nil {
			return "", false, err
		}
	}
	name, last := w.names[0], len(w.names) == 1
	switch {
	case name == "" || name == ".":
		w.names = w.names[1:]
		return ".", last, nil
	case last && w.how&followLast == 0:
		return name, true, nil
	}
	fd, err := unix.Openat(w.dir, name, walkFlags, 0)
	switch missing := errors.Is(err, unix.ENOENT); {
	case missing && last:
		return name, true, nil
	case missing && w.how&makeMissing != 0:
		fd, err = mkdir(w.dir, name)
	}
	if err != nil {
		return "", false, err
	}
	target, link, err := readlink(fd)
	if err != nil || link || last {
		unix.Close(fd) // nothing was written by it
	}
	switch {
	case err != nil:
		return "", false, err
	case link:
		return "", false, w.follow(target)
	case last:
		return name, true, nil
	}
	unix.Close(w.dir)
	w.dir, w.names = fd, w.names[1:]
	return "", false, nil
}

// follow goes on where a link points to.
func (w *walker) follow(target string) error {
	if w.links++; w.links > maxLinks {
		return unix.ELOOP
	}
	w.names = append(strings.Split(target, "/"), w.names[1:]...)
	if w.names[0] != "" {
		return nil
	}
	root, err := unix.Open("/", walkFlags, 0)
	if err != nil {
		return err
	}
	unix.Close(w.dir)
	w.dir = root
	return nil
}

// checkPlace refuses a directory in which others could replace what is there.
func checkPlace(dir int) error {
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return err
	}
	if !Trusted(st.Uid) {
		const text = "a directory on the way belongs to user %d, who could put something else there; choose a place where only root can write, or chown it"
		return placeError(fmt.Sprintf(text, st.Uid))
	}
	if st.Mode&unix.S_ISVTX == 0 && writable(st.Mode, st.Uid, st.Gid, fmt.Sprintf("/proc/self/fd/%d", dir)) {
		return placeError("others than its owner can write to a directory on the way, and put something else there; chmod go-w it")
	}
	return nil
}

// placeError says why nothing is made or written at a path. It is an [os.ErrPermission].
type placeError string

func (e placeError) Error() string { return string(e) }

// Is implements what [errors.Is] asks for.
func (placeError) Is(target error) bool { return target == os.ErrPermission }

// writable tells whether others than the owner, and those in the owner's private group, can write
// to what is at path.
func writable(mode, uid, gid uint32, path string) bool {
	return mode&0o002 != 0 || mode&0o020 != 0 && (gid != uid || hasList(path))
}

// hasList tells whether there is an access list (acl(5)). Its mask is what the mode says of the
// group, and it may let any user write.
func hasList(path string) bool {
	_, err := unix.Getxattr(path, "system.posix_acl_access", nil)
	return err == nil
}

// readlink returns where a link leads, if the descriptor is of one, and refuses one of a
// stranger's.
func readlink(fd int) (target string, link bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return "", false, nil
	}
	if !Trusted(st.Uid) {
		return "", true, fmt.Errorf("a symbolic link of user %d is in the way; it is not followed", st.Uid)
	}
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", b)
	if err == nil && (n == 0 || n == len(b)) {
		err = unix.ENAMETOOLONG
	}
	if err != nil {
		return "", true, err
	}
	return string(b[:n]), true, nil
}

// mkdir makes a directory and returns it as walk does.
func mkdir(dir int, name string) (int, error) {
	err := unix.Mkdirat(dir, name, 0o700)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, err
	}
	made := err == nil
	fd, err := unix.Openat(dir, name, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == nil && made {
		err = unix.Fchmod(fd, 0o700)
	}
	if err != nil {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
		}
		return -1, err
	}
	return fd, nil
}

// CheckDir refuses a directory in which users that are not trusted could make, replace or remove
// files, or whose place they could give to another one.
func CheckDir(path string) error {
	if err := CheckPlace(path, 0); err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err == nil && othersWrite(path, info) { // even if it is sticky
		err = fmt.Errorf("others than its owner can write to %s; chmod go-w it", path)
	}
	return err
}

// CheckPlace refuses a path at which somebody else can put other content: each of its directories
// and links, and what it leads to, must belong to a trusted user and be writable by its owner only.
// What it leads to may also belong to the user with the id owner. A directory of all users, such as
// /tmp, is in order if it is sticky. Where the path ends early, what is there of it is checked.
func CheckPlace(path string, owner int) error {
	if !filepath.IsAbs(path) {
		dir, err := os.Getwd()
		if err != nil {
			return err
		}
		path = dir + "/" + path // not filepath.Join: link/.. is not where the link is
	}
	rest, at := strings.Split(path, "/"), "/"
	for links := 0; len(rest) > 0; {
		at, rest = filepath.Join(at, rest[0]), rest[1:]
		info, err := os.Lstat(at)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := checkPlaceOwner(at, info, len(rest) == 0, owner); err != nil {
			return err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			continue
		}
		target, err := os.Readlink(at)
		if err != nil {
			return err
		}
		if links++; links > maxLinks {
			return fmt.Errorf("%s: %w", path, syscall.ELOOP)
		}
		if at = filepath.Dir(at); filepath.IsAbs(target) {
			at = "/"
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return nil
}

func checkPlaceOwner(path string, info fs.FileInfo, last bool, owner int) error {
	uid := info.Sys().(*syscall.Stat_t).Uid
	switch {
	case !Trusted(uid) && (!last || int(uid) != owner):
		return fmt.Errorf("user %d owns %s and could put something else there; choose a place where only root can write, or chown it", uid, path)
	case info.Mode()&fs.ModeSymlink != 0 || info.Mode().IsDir() && info.Mode()&fs.ModeSticky != 0 || !othersWrite(path, info):
		return nil
	}
	return fmt.Errorf("others than its owner can write to %s and put something else there; chmod go-w it", path)
}

// othersWrite tells whether others than the owner, and those in the owner's private group, can
// write. The group "disk" of a device is root's equal.
func othersWrite(path string, info fs.FileInfo) bool {
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode()&fs.ModeDevice != 0 {
		return info.Mode()&0o002 != 0
	}
	return writable(st.Mode, st.Uid, st.Gid, path)
}

// CheckOwner refuses an open file that a user made who is not trusted, that others may write to, or
// that has a second name.
func CheckOwner(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if !Trusted(st.Uid) || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink > 1 || st.Mode&0o022 != 0 {
		return fmt.Errorf("%s is not a file of this program's alone (it belongs to user %d, mode %04o, %d names); remove it", f.Name(), st.Uid, st.Mode&0o7777, st.Nlink)
	}
	return nil
}

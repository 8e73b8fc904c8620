package process

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Root is a root directory for one child: a read-only tmpfs with the files that are put into it.
type Root struct {
	At      string   // an existing directory, over which the child alone has the tmpfs
	Mounts  []Mount  // of files of the host; targets are paths in the new root
	Links   []Link   // symbolic links
	Devices []string // character devices of the host, which the child's user may read and write
}

// Link is a symbolic link.
type Link struct{ Path, Target string }

// namespaces of a child with a [Root], besides those of mounts and, as given by Config, the
// network.
const namespaces = unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

// change makes the root the calling thread's. The thread has a mount namespace of its own.
func (r *Root) change(uid, gid int) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make the VMM's root directory: %w", err)
		}
	}()
	// of the calling thread, which shares nothing with others (unshare(2), CLONE_FS)
	umask := unix.Umask(0)
	defer unix.Umask(umask)
	const flags = unix.MS_NOSUID | unix.MS_NOEXEC
	if err := unix.Mount("tmpfs", r.At, "tmpfs", flags, "mode=0755"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", r.At, err)
	}
	for _, m := range r.Mounts {
		if err := r.bind(m); err != nil {
			return err
		}
	}
	for _, l := range r.Links {
		if err := errors.Join(r.makeParent(l.Path), os.Symlink(l.Target, r.path(l.Path))); err != nil {
			return err
		}
	}
	for _, d := range r.Devices {
		if err := r.device(d, uid, gid); err != nil {
			return err
		}
	}
	if err := unix.Mount("", r.At, "", unix.MS_REMOUNT|flags|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("remount %s: %w", r.At, err)
	}
	if err := unix.Chdir(r.At); err != nil {
		return err
	}
	// The old root goes on top of the new one, and is unmounted there (pivot_root(2), Notes).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root directory: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root directory: %w", err)
	}
	return unix.Chdir("/")
}

func (r *Root) path(p string) string { return filepath.Join(r.At, p) }

func (r *Root) makeParent(p string) error { return os.MkdirAll(filepath.Dir(r.path(p)), 0o755) }

// bind makes a file or directory of the host appear in the root.
func (r *Root) bind(m Mount) error {
	info, err := os.Stat(m.Source)
	if err != nil {
		return err
	}
	target := r.path(m.Target)
	if err := r.makeParent(m.Target); err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(target, 0o755)
	} else {
		err = os.WriteFile(target, nil, 0o600)
	}
	if err != nil {
		return err
	}
	return bind(m, target)
}

func bind(m Mount, target string) error {
	if err := unix.Mount(m.Source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.Source, target, err)
	}
	if !m.ReadOnly {
		return nil
	}
	const flags = unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV
	if err := unix.Mount("", target, "", flags, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", target, err)
	}
	return nil
}

// device makes a device node that only the child's user may use.
func (r *Root) device(path string, uid, gid int) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if err := r.makeParent(path); err != nil {
		return err
	}
	target := r.path(path)
	if err := unix.Mknod(target, unix.S_IFCHR|0o600, int(st.Rdev)); err != nil {
		return &os.PathError{Op: "make device", Path: target, Err: err}
	}
	return os.Chown(target, uid, gid)
}

// renounce keeps the calling thread's children from getting privileges by programs that they
// execute.
func renounce() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("renounce privileges: %w", err)
	}
	return nil
}

// dropCapabilities leaves the calling thread's children without any, once they execute a program or
// have changed to another user.
func dropCapabilities() error {
	for c := uintptr(0); ; c++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // the kernel has no more
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for i := range data {
		data[i].Inheritable = 0 // and so ambient ones
	}
	if err := unix.Capset(&head, &data[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}

// attributes are those of a child with a root.
func (r *Root) attributes(a *syscall.SysProcAttr) {
	if r != nil {
		a.Cloneflags |= namespaces
	}
}

package firecracker

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"drafter/internal/process"
	"drafter/vmm"
)

// jail is the part of the host that Firecracker sees: the root of the VM's directory. Its devices
// are mounted there for Firecracker alone, in a mount namespace that ends with it, so that no mount
// outlives a kill.
type jail struct {
	root   string
	mounts []process.Mount
}

// Names in the jail.
const (
	jailKernel   = "kernel"
	jailInitrd   = "initrd"
	jailMemory   = "memory"
	jailSnapshot = "snapshot" // a tmpfs for what snapshots are made of
	jailLog      = "log"
	jailMetrics  = "metrics"
)

func diskFile(name string) string { return "disk-" + name }

// newJail prepares the jail's directory. The program has the name there that the jailer makes paths
// of.
func newJail(l *vmm.Launch, program string) (*jail, error) {
	j := &jail{root: l.Dir.Root()}
	binary := filepath.Join(filepath.Dir(j.root), vmm.VMMFirecracker)
	if err := j.place(program, binary, false); err != nil {
		return nil, err
	}
	files := map[string]string{}
	for _, d := range l.Disks {
		files[diskFile(d.Name)] = d.Path
	}
	if l.Boot != nil {
		files[jailMemory] = l.MemoryFile
	}
	for name, path := range files {
		if err := j.lend(l, path, name, true); err != nil {
			return nil, err
		}
	}
	if l.Boot != nil {
		if err := j.lend(l, l.Boot.Kernel, jailKernel, false); err != nil {
			return nil, err
		}
		if l.Boot.Initrd != "" {
			if err := j.lend(l, l.Boot.Initrd, jailInitrd, false); err != nil {
				return nil, err
			}
		}
	}
	snapshot := filepath.Join(j.root, jailSnapshot)
	if err := os.Mkdir(snapshot, 0o700); err != nil {
		return nil, fmt.Errorf("prepare jail: %w", err)
	}
	j.mounts = append(j.mounts, process.Mount{Target: snapshot, Options: fmt.Sprintf("mode=0700,uid=%d,gid=%d,size=100%%", l.UID, l.GID)})
	for _, name := range []string{jailLog, jailMetrics} {
		path := filepath.Join(j.root, name)
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return nil, fmt.Errorf("prepare jail: make %s: %w", path, err)
		}
		if err := os.Chown(path, l.UID, l.GID); err != nil {
			return nil, fmt.Errorf("prepare jail: %w", err)
		}
	}
	if err := os.Chown(j.root, l.UID, l.GID); err != nil {
		return nil, fmt.Errorf("give VM directory to user %d: %w", l.UID, err)
	}
	return j, nil
}

// place makes path appear at target for the process in the jail.
func (j *jail) place(path, target string, write bool) error {
	f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("prepare jail: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("prepare jail: %w", err)
	}
	j.mounts = append(j.mounts, process.Mount{Source: path, Target: target, ReadOnly: !write})
	return nil
}

// lend places a file that Firecracker's user may use meanwhile.
func (j *jail) lend(l *vmm.Launch, path, name string, write bool) error {
	return errors.Join(l.Dir.Lend(path, l.UID, l.GID, write), j.place(path, filepath.Join(j.root, name), write))
}

// arguments are the jailer's and, behind --, Firecracker's. See docs/jailer.md of Firecracker.
func (j *jail) arguments(l *vmm.Launch, level string) []string {
	return []string{
		"--id", l.Dir.ID,
		"--exec-file", filepath.Join(filepath.Dir(j.root), vmm.VMMFirecracker),
		"--uid", strconv.Itoa(l.UID), "--gid", strconv.Itoa(l.GID),
		"--chroot-base-dir", filepath.Dir(filepath.Dir(filepath.Dir(j.root))),
		"--", "--api-sock", "/" + apiSocket, "--log-path", "/" + jailLog, "--level", level,
	}
}

// openSnapshots opens the directory of snapshots in the jail of a process, which is mounted there
// alone.
func openSnapshots(pid int) (dir *os.File, err error) {
	return os.OpenFile(filepath.Join("/proc", strconv.Itoa(pid), "root", jailSnapshot), unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
}

// openSnapshot opens a regular file among the snapshots. Anything else that Firecracker may have
// put in its place, such as a link to a file of the host, is refused.
func openSnapshot(pid int, name string, flags uint64) (f *os.File, err error) {
	dir, err := openSnapshots(pid)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{
		Flags: flags | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC, Mode: createMode(flags),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f = os.NewFile(uintptr(fd), name)
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a file: %s", name, info.Mode())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// createMode is the mode of a file to make: openat2(2) refuses one where none is made.
func createMode(flags uint64) uint64 {
	if flags&unix.O_CREAT == 0 {
		return 0
	}
	return 0o600
}

// maxState bounds what is read of a state that Firecracker has saved, in bytes.
const maxState = vmm.StateSize

func readSnapshot(pid int, name string) ([]byte, error) {
	f, err := openSnapshot(pid, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxState))
}

func writeSnapshot(pid int, name string, b []byte, uid, gid int) error {
	f, err := openSnapshot(pid, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Chown(uid, gid), f.Close())
}

// removeSnapshot removes a file if it is there.
func removeSnapshot(pid int, name string) error {
	dir, err := openSnapshots(pid)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "remove", Path: name, Err: err}
	}
	return nil
}

// offerTap lets a user attach to a tap interface in the calling thread's network namespace. The
// previous user is not restored; the interface belongs to drafter nat.
func offerTap(name string, uid, gid int) (err error) {
	if name == "" || uid == 0 {
		return nil
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w; load the tun module", err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("interface name %q: %w", name, err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("attach to interface %s: %w", name, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, uid); err != nil {
		return fmt.Errorf("give interface %s to user %d: %w", name, uid, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETGROUP, gid); err != nil {
		return fmt.Errorf("give interface %s to group %d: %w", name, gid, err)
	}
	return nil
}

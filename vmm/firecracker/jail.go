package firecracker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"drafter/internal/process"
	"drafter/vmm"
)

// jail is what Firecracker sees of the host: the root of the VM's directory. Its devices are mounted there for Firecracker alone, in a mount namespace
// that ends with it, so that nothing of it outlives a kill.
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

// newJail prepares the jail's directory. The program has the name there that the jailer makes paths of.
func newJail(l *vmm.Launch, program string) (*jail, error) {
	j := &jail{root: l.Dir.Root()}
	binary := filepath.Join(filepath.Dir(j.root), vmm.VMMFirecracker)
	if err := j.place(program, binary); err != nil {
		return nil, err
	}
	files := map[string]string{}
	for _, d := range l.Disks {
		files[diskFile(d.Name)] = d.Path
	}
	if l.Boot != nil {
		files[jailMemory] = l.Memory
	}
	for _, path := range files {
		if err := usable(path, l.UID, l.GID, 6); err != nil {
			return nil, err
		}
	}
	if l.Boot != nil {
		files[jailKernel] = l.Boot.Kernel
		if l.Boot.Initrd != "" {
			files[jailInitrd] = l.Boot.Initrd
		}
	}
	for name, path := range files {
		if err := usable(path, l.UID, l.GID, 4); err != nil {
			return nil, err
		}
		if err := j.place(path, filepath.Join(j.root, name)); err != nil {
			return nil, err
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
func (j *jail) place(path, target string) error {
	f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("prepare jail: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("prepare jail: %w", err)
	}
	j.mounts = append(j.mounts, process.Mount{Source: path, Target: target})
	return nil
}

// usable says beforehand which file another user's Firecracker could not open; bits are 4 to read it, 6 to write it, too.
func usable(path string, uid, gid int, bits uint32) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("stat %s: %w", path, err)
	}
	if uid == 0 || st.Mode&bits == bits || int(st.Uid) == uid && st.Mode>>6&bits == bits || int(st.Gid) == gid && st.Mode>>3&bits == bits {
		return nil
	}
	return fmt.Errorf("%s cannot be used by --uid %d --gid %d; run 'chown %d:%d %s'", path, uid, gid, uid, gid, path)
}

// arguments are the jailer's, and behind -- Firecracker's. See docs/jailer.md of Firecracker.
func (j *jail) arguments(l *vmm.Launch, level string) []string {
	return []string{
		"--id", l.Dir.ID,
		"--exec-file", filepath.Join(filepath.Dir(j.root), vmm.VMMFirecracker),
		"--uid", strconv.Itoa(l.UID), "--gid", strconv.Itoa(l.GID),
		"--chroot-base-dir", filepath.Dir(filepath.Dir(filepath.Dir(j.root))),
		"--", "--api-sock", "/" + apiSocket, "--log-path", "/" + jailLog, "--level", level,
	}
}

// inside is the path of a file in the jail's own mounts, for this process.
func inside(pid int, name string) string {
	return filepath.Join("/proc", strconv.Itoa(pid), "root", jailSnapshot, name)
}

// offerTap lets a user attach to a tap interface in the calling thread's network namespace. What it was before is not known; it belongs to drafter nat.
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

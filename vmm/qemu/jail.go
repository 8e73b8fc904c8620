package qemu

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"drafter/internal/process"
	"drafter/vmm"
)

// Names in the root directory that QEMU sees.
const (
	jailKernel = "/kernel"
	jailInitrd = "/initrd"
)

func jailDisk(name string) string { return "/disk-" + name }

// jail makes QEMU's root directory: programs and libraries of the host, and the VM's own devices.
func (d Driver) jail(l *vmm.Launch, program, accel string) (*process.Root, error) {
	r := &process.Root{At: l.Dir.Root(), Devices: []string{"/dev/null", "/dev/urandom"}}
	if accel == vmm.AccelKVM {
		r.Devices = append(r.Devices, "/dev/kvm")
	}
	if err := addPrograms(r, program); err != nil {
		return nil, err
	}
	lend := func(path, target string, write bool) error {
		r.Mounts = append(r.Mounts, process.Mount{Source: path, Target: target, ReadOnly: !write})
		return l.Dir.Lend(path, l.UID, l.GID, write)
	}
	err := lend(l.Kernel, jailKernel, false)
	for _, disk := range l.Disks {
		err = errors.Join(err, lend(disk.Path, jailDisk(disk.Name), true))
	}
	if boot := cmp.Or(l.Boot, l.Reboot); boot != nil && boot.Initrd != "" {
		err = errors.Join(err, lend(boot.Initrd, jailInitrd, false))
	}
	if d.Dir != "" {
		r.Mounts = append(r.Mounts, process.Mount{Source: d.Dir, Target: d.Dir})
	}
	return r, err
}

// systemPaths are a host's directories of programs and libraries, and the files that these read at
// their start.
var systemPaths = []string{
	"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix", "/gnu", "/etc/ld.so.cache", "/etc/alternatives",
	"/sys/kernel/mm/transparent_hugepage", // what malloc reads before it uses huge pages
}

// addPrograms lets QEMU see itself and the libraries that it is linked with.
func addPrograms(r *process.Root, program string) error {
	known := false
	for _, path := range systemPaths {
		info, err := os.Lstat(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		known = known || strings.HasPrefix(program, path+"/")
		if info.Mode().Type() == os.ModeSymlink {
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			r.Links = append(r.Links, process.Link{Path: path, Target: target})
			continue
		}
		r.Mounts = append(r.Mounts, process.Mount{Source: path, Target: path, ReadOnly: true})
	}
	if known {
		return nil
	}
	// A QEMU of the user's: its firmware is in PREFIX/share, or beside it.
	dir := filepath.Dir(program)
	if filepath.Base(dir) == "bin" {
		dir = filepath.Dir(dir)
	}
	r.Mounts = append(r.Mounts, process.Mount{Source: dir, Target: dir, ReadOnly: true})
	return nil
}

// listenPort makes the socket at which this process reaches a port of the guest's. QEMU gets it
// listening, and cannot replace it.
func listenPort(l *vmm.Launch, port uint32) (*os.File, error) {
	path := l.Dir.Socket(portSocket(port))
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	listener.SetUnlinkOnClose(false) // the directory is removed with the VM
	f, err := listener.File()
	return f, errors.Join(err, os.Chmod(path, 0o600), listener.Close())
}

// Package guest holds what runs inside a VM: process 1 in the initramfs and in Drafter's OS, the
// agent, and liveness.
package guest

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ModuleList is the file in the initramfs that names the modules to load, one path per line,
// dependencies first.
const ModuleList = "/etc/drafter-modules"

const (
	newRoot           = "/root"
	rootDeviceTimeout = 30 * time.Second
)

// InInitramfs tells whether this process runs in an initramfs.
func InInitramfs() bool {
	_, err := os.Stat(ModuleList)
	return err == nil
}

// RunInitramfs loads modules, mounts the root file system named on the kernel command line and
// executes its init. It returns only on failure.
func RunInitramfs() error {
	if err := mountAll(earlyMounts); err != nil {
		return err
	}
	if err := openConsole(); err != nil {
		return err
	}
	cmdline, err := readCmdline()
	if err != nil {
		return err
	}
	if err := loadModules(ModuleList); err != nil {
		return err
	}
	if err := mountRoot(cmdline); err != nil {
		return err
	}
	return switchRoot(cmdline.get("init", "/sbin/init"))
}

// Halt reports why the guest cannot go on and stops it: a kernel whose init exits panics, which
// hides the reason.
func Halt(err error) {
	slog.Error("The guest cannot start", "error", err)
	unix.Sync()
	// A restart and not a power-off, because the host tells the two apart. It reports a restart as
	// a failure, at once or when it has happened again and again.
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		slog.Error("Restart failed", "error", err)
	}
	os.Exit(1)
}

func loadModules(list string) error {
	f, err := os.Open(list)
	if err != nil {
		return fmt.Errorf("read module list: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if err := loadModule(lines.Text()); err != nil {
			// If a driver fails, the program that needs its device reports that better.
			slog.Error("Module not loaded", "error", err)
		}
	}
	return lines.Err()
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("load module: %w", err)
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", filepath.Base(path), err)
	}
	return nil
}

func mountRoot(c cmdline) error {
	device := c.get("root", "/dev/vda")
	if !strings.HasPrefix(device, "/dev/") {
		return fmt.Errorf("root=%s is not supported: name a device, such as /dev/vda", device)
	}
	deadline := time.Now().Add(rootDeviceTimeout)
	for {
		_, err := os.Stat(device)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("root device %s did not appear within %s", device, rootDeviceTimeout)
		}
		// the kernel probes it; without udev there is nobody to tell
		time.Sleep(5 * time.Millisecond)
	}
	flags, data := mountOptions(c.get("rootflags", ""))
	if c.has("ro") {
		flags |= unix.MS_RDONLY
	}
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return err
	}
	kind := c.get("rootfstype", "ext4")
	if err := unix.Mount(device, newRoot, kind, flags, data); err != nil {
		return fmt.Errorf("mount root %s as %s: %w", device, kind, err)
	}
	return nil
}

// mountOptions splits options that are flags of mount(2) from those of the file system.
func mountOptions(options string) (flags uintptr, data string) {
	var rest []string
	for _, o := range strings.Split(options, ",") {
		switch o {
		case "", "rw":
		case "ro":
			flags |= unix.MS_RDONLY
		case "noatime":
			flags |= unix.MS_NOATIME
		default:
			rest = append(rest, o)
		}
	}
	return flags, strings.Join(rest, ",")
}

// switchRoot makes newRoot the root, frees the initramfs and executes init, as switch_root(8) does.
func switchRoot(init string) error {
	for _, m := range earlyMounts {
		target := filepath.Join(newRoot, m.target)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.target, target, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", m.target, err)
		}
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != strings.TrimPrefix(newRoot, "/") {
			if err := removeBelow("/" + e.Name()); err != nil {
				slog.Warn("Part of the initramfs stays in memory", "error", err)
			}
		}
	}
	if err := unix.Chdir(newRoot); err != nil {
		return fmt.Errorf("enter new root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move new root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	if err := unix.Exec(init, []string{init}, os.Environ()); err != nil {
		return fmt.Errorf("execute %s: %w", init, err)
	}
	return nil
}

// removeBelow removes a tree of the initramfs without crossing into mounted file systems.
func removeBelow(path string) error {
	var here, root unix.Stat_t
	if err := errors.Join(unix.Lstat(path, &here), unix.Lstat("/", &root)); err != nil {
		return err
	}
	if here.Dev != root.Dev {
		return nil
	}
	if here.Mode&unix.S_IFMT == unix.S_IFDIR {
		entries, err := os.ReadDir(path)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := removeBelow(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, unix.EBUSY) {
		return err
	}
	return nil
}

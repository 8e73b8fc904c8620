// Package fusemount ends FUSE mounts whose server is gone. Whoever has a file of such a mount open, or mapped, may hang in the kernel where no signal
// reaches it; only aborting the connection frees it.
package fusemount

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount is a mounted FUSE file system.
type Mount struct {
	Path  string
	Minor uint32 // of its anonymous device; also the number of its connection
}

// Below returns the FUSE mounts at dir and below it, the ones mounted last first.
func Below(dir string) ([]Mount, error) {
	var found []Mount
	err := below(dir, func(path, device, kind string) error {
		if kind != "fuse" && !strings.HasPrefix(kind, "fuse.") {
			return nil
		}
		_, minor, _ := strings.Cut(device, ":")
		n, err := strconv.ParseUint(minor, 10, 32)
		if err != nil {
			return fmt.Errorf("find mounts: device number %q", device)
		}
		found = append([]Mount{{path, uint32(n)}}, found...)
		return nil
	})
	return found, err
}

// AllBelow returns where anything is mounted at dir and below it.
func AllBelow(dir string) (paths []string, err error) {
	err = below(dir, func(path, _, _ string) error {
		paths = append(paths, path)
		return nil
	})
	return paths, err
}

// below calls use with mount point, device number and file system of each mount at dir and below it.
func below(dir string, use func(path, device, kind string) error) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("find mounts: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// proc_pid_mountinfo(5): id parent major:minor root mountpoint options … - type source options
		left, right, _ := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(left)
		if len(fields) < 5 {
			continue
		}
		path := unescape(fields[4])
		if path != dir && !strings.HasPrefix(path, dir+"/") {
			continue
		}
		kind, _, _ := strings.Cut(right, " ")
		if err := use(path, fields[2], kind); err != nil {
			return err
		}
	}
	return lines.Err()
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	for _, e := range []struct{ code, char string }{{`\040`, " "}, {`\011`, "\t"}, {`\012`, "\n"}, {`\134`, `\`}} {
		s = strings.ReplaceAll(s, e.code, e.char)
	}
	return s
}

// Abort ends the connection: every request that waits and every later one fails.
func (m Mount) Abort() error {
	const connections = "/sys/fs/fuse/connections"
	file := filepath.Join(strconv.FormatUint(uint64(m.Minor), 10), "abort")
	err := os.WriteFile(filepath.Join(connections, file), []byte("1"), 0)
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// The control file system is not mounted there on every host.
	dir, err := os.MkdirTemp("", "fusectl-")
	if err != nil {
		return err
	}
	if err := unix.Mount("fusectl", dir, "fusectl", 0, ""); err != nil {
		return errors.Join(fmt.Errorf("mount fusectl: %w", err), os.Remove(dir))
	}
	err = os.WriteFile(filepath.Join(dir, file), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		err = nil // the connection is gone already
	}
	return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH), os.Remove(dir))
}

// Detach takes the mount out of the tree, whoever still has files of it open.
func (m Mount) Detach() error {
	if err := unix.Unmount(m.Path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", m.Path, err)
	}
	return nil
}

// AbortBelow aborts all FUSE mounts at dir and below it, and detaches them.
func AbortBelow(dir string) error {
	mounts, err := Below(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mounts {
		if err := m.Abort(); err != nil {
			errs = append(errs, fmt.Errorf("abort FUSE connection of %s: %w", m.Path, err))
		}
		errs = append(errs, m.Detach())
	}
	return errors.Join(errs...)
}

// Package fusemount ends FUSE mounts whose server is gone. A process that has a file of such a
// mount open, or mapped, may hang in the kernel where no signal reaches it. Only aborting the
// connection frees it.
package fusemount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mount is a mounted FUSE file system.
type Mount struct {
	Path  string
	Minor uint32 // of its anonymous device; also the number of its connection
}

// Below returns the FUSE mounts at dir and below it, the ones mounted last first.
func Below(dir string) ([]Mount, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("find mounts: %w", err)
	}
	var found []Mount
	for _, m := range slices.Backward(mounts) {
		if m.FSType == "fuse" || strings.HasPrefix(m.FSType, "fuse.") {
			found = append(found, Mount{m.Mountpoint, uint32(m.Minor)}) // 20 bits
		}
	}
	return found, nil
}

// Of returns the mounts of the connection with that minor, wherever they are by now.
func Of(minor uint32) ([]Mount, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "fuse" && !strings.HasPrefix(m.FSType, "fuse.") || uint32(m.Minor) != minor, false
	})
	if err != nil {
		return nil, fmt.Errorf("find mounts: %w", err)
	}
	var found []Mount
	for _, m := range mounts {
		found = append(found, Mount{m.Mountpoint, minor})
	}
	return found, nil
}

// AllBelow returns where anything is mounted at dir and below it.
func AllBelow(dir string) (paths []string, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("find mounts: %w", err)
	}
	for _, m := range mounts {
		paths = append(paths, m.Mountpoint)
	}
	return paths, nil
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

// Detach removes the mount from the tree, even if files of it are still open.
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
	return AbortAll(mounts)
}

// AbortAll aborts mounts, and detaches them.
func AbortAll(mounts []Mount) error {
	var errs []error
	for _, m := range mounts {
		if err := m.Abort(); err != nil {
			errs = append(errs, fmt.Errorf("abort FUSE connection of %s: %w", m.Path, err))
		}
		errs = append(errs, m.Detach())
	}
	return errors.Join(errs...)
}

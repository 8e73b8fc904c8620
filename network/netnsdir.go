package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"drafter/internal/private"
	"drafter/internal/rundir"
)

// netnsDir is where named network namespaces are (ip-netns(8)).
const netnsDir = "/run/netns"

// sharedRecord says that Drafter made netnsDir a mount.
const sharedRecord = "netns-shared"

// shareNamespaces makes netnsDir a shared mount, as the first 'ip netns add' of a host does
// (netns_add of iproute2), and under its lock. If 'ip' did that later, our namespaces would be
// mounted a second time beneath the new mount, where nobody can remove them.
func shareNamespaces() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	return lockNamespaces(func() error {
		err := unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
		if !errors.Is(err, unix.EINVAL) { // EINVAL: it is no mount
			return pathError("share", err)
		}
		// Namespaces that somebody has made without a mount would then be mounted twice, which ours
		// are to be spared.
		if names, err := os.ReadDir(netnsDir); err != nil || len(names) > 0 {
			return err
		}
		if err := private.MkdirAll(rundir.Path); err != nil {
			return err
		}
		record, err := private.CreateOrOpen(filepath.Join(rundir.Path, sharedRecord))
		if err != nil {
			return err
		}
		if err := record.Close(); err != nil {
			return err
		}
		if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return pathError("mount", err)
		}
		return pathError("share", unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, ""))
	})
}

// unshareNamespaces unmounts what shareNamespaces mounted, once no namespace is left in it.
func unshareNamespaces() error {
	record := filepath.Join(rundir.Path, sharedRecord)
	if _, err := os.Stat(record); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return lockNamespaces(func() error {
		if names, err := os.ReadDir(netnsDir); err != nil || len(names) > 0 {
			return err
		}
		// Detached, because the lock is a file in it. EINVAL: it is no longer a mount.
		if err := unix.Unmount(netnsDir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return pathError("unmount", err)
		}
		if err := os.Remove(record); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	})
}

func lockNamespaces(use func() error) error {
	dir, err := os.Open(netnsDir)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return errors.Join(fmt.Errorf("lock %s: %w", netnsDir, err), dir.Close())
	}
	return errors.Join(use(), dir.Close())
}

func pathError(op string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: netnsDir, Err: err}
}

package process

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupParent is the group below which every VM gets its own.
const cgroupParent = "drafter"

// cgroupPath is the path of a VM's group in its hierarchy.
func cgroupPath(name string) string { return filepath.Join("/", cgroupParent, name) }

// checkCgroups refuses directories that are not those of a VM called name.
func checkCgroups(dirs []string, name string) error {
	for _, dir := range dirs {
		known := false
		for _, version := range []int{1, 2} {
			roots, err := cgroupRoots(version)
			if err != nil {
				continue // the host has none of that version
			}
			for _, root := range roots {
				known = known || dir == filepath.Join(root, cgroupPath(name))
			}
		}
		if !known {
			return fmt.Errorf("%s is not a cgroup of VM %s; remove what belongs to it by hand", dir, name)
		}
	}
	return nil
}

// v1Controllers are the version 1 hierarchies a VM is accounted in, where the host has them.
var v1Controllers = []string{"cpu", "cpuacct", "memory", "pids", "blkio"}

// createCgroup makes a group called name and returns its directories: one for version 2, one per hierarchy for version 1.
func createCgroup(version int, name string) ([]string, error) {
	var roots []string
	switch version {
	case 0:
		return nil, nil
	case 1, 2:
		var err error
		if roots, err = cgroupRoots(version); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("cgroup version %d does not exist; choose 1 or 2", version)
	}
	var dirs []string
	for _, root := range roots {
		dir := filepath.Join(root, cgroupPath(name))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, errors.Join(fmt.Errorf("create cgroup: %w", err), removeCgroup(dirs))
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

// cgroupRoots finds the mount points from proc_pid_mountinfo(5).
func cgroupRoots(version int) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	defer f.Close()
	var roots []string
	seen := map[string]bool{}
	scanner := bufio.NewScanner(f)
	for scanner.Scan() {
		before, after, _ := strings.Cut(scanner.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if len(left) < 5 || len(right) < 3 {
			continue
		}
		mount, kind, options := left[4], right[0], strings.Split(right[2], ",")
		if version == 2 && kind == "cgroup2" {
			return []string{mount}, nil
		}
		if version == 1 && kind == "cgroup" {
			for _, want := range v1Controllers {
				for _, o := range options {
					if o == want && !seen[mount] {
						seen[mount] = true
						roots = append(roots, mount)
					}
				}
			}
		}
	}
	if err := scanner.Err(); err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("cgroup version %d is not mounted on this host; pass --cgroup-version %d", version, 3-version)
	}
	return roots, nil
}

func joinCgroup(dirs []string, pid int) error {
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("put process %d into cgroup: %w", pid, err)
		}
	}
	return nil
}

// removeCgroup removes empty groups. A group stays busy for a moment after its last process was reaped, so it is tried for a second.
// The shared parent is removed with its last child.
func removeCgroup(dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		var err error
		for range 100 {
			if err = unix.Rmdir(dir); err == nil || errors.Is(err, unix.ENOENT) {
				err = nil
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
			continue
		}
		if err := unix.Rmdir(filepath.Dir(dir)); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", filepath.Dir(dir), err))
		}
	}
	return errors.Join(errs...)
}

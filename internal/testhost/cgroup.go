package testhost

import (
	"bytes"
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

// hierarchies are the mounted trees of cgroups.
func hierarchies() ([]*mountinfo.Info, error) {
	return mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "cgroup" && m.FSType != "cgroup2", false
	})
}

// makeCgroups makes a group in each hierarchy, beneath the one that this process is in.
func makeCgroups() (dirs []string, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, removeCgroups(dirs))
		}
	}()
	mounts, err := hierarchies()
	if err != nil {
		return nil, err
	}
	own, err := ownCgroups()
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		parent := m.Mountpoint
		for controllers, path := range own {
			if controllers == "" && m.FSType == "cgroup2" || controllers != "" && slices.Contains(strings.Split(m.VFSOptions, ","), controllers) {
				parent = filepath.Join(parent, path)
			}
		}
		dir, err := os.MkdirTemp(parent, "testhost-")
		if err != nil {
			return dirs, err
		}
		dirs = append(dirs, dir)
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // empty at first in version 1
			b, err := os.ReadFile(filepath.Join(parent, file))
			if err != nil || m.FSType == "cgroup2" {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, file), b, 0); err != nil {
				return dirs, err
			}
		}
	}
	return dirs, nil
}

// ownCgroups tells this process' group for each hierarchy, which the name of one of its
// controllers stands for, or "name=…" of one without; "" is version 2. See cgroups(7).
func ownCgroups() (map[string]string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	own := map[string]string{}
	for line := range bytes.Lines(b) {
		f := strings.SplitN(strings.TrimSpace(string(line)), ":", 3)
		if len(f) != 3 {
			return nil, fmt.Errorf("/proc/self/cgroup: %q", line)
		}
		controller, _, _ := strings.Cut(f[1], ",")
		own[controller] = f[2]
	}
	return own, nil
}

// removeCgroups removes groups with all groups beneath them. Nothing runs in them.
func removeCgroups(dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		var beneath []string
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				beneath = append(beneath, path)
			}
			return err
		})
		errs = append(errs, err)
		slices.Reverse(beneath)
		for _, d := range beneath {
			errs = append(errs, os.Remove(d))
		}
	}
	return errors.Join(errs...)
}

// mountCgroups shows the groups that this host has been given as all there are.
func mountCgroups() error {
	mounts, err := hierarchies()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		options := slices.DeleteFunc(strings.Split(m.VFSOptions, ","), func(o string) bool {
			return !strings.HasPrefix(o, "name=") && !slices.Contains(controllers, o)
		})
		if len(options) == 1 && strings.HasPrefix(options[0], "name=") {
			options = append(options, "none")
		}
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
		}
		if err := unix.Mount("cgroup", m.Mountpoint, m.FSType, 0, strings.Join(options, ",")); err != nil {
			return fmt.Errorf("mount %s: %w", m.Mountpoint, err)
		}
		if m.FSType != "cgroup2" {
			continue
		}
		// A group with processes in it can give no controllers to those beneath it.
		tests := filepath.Join(m.Mountpoint, "tests")
		if err := os.Mkdir(tests, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(tests, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			return err
		}
	}
	return nil
}

// controllers are those of version 1; see cgroups(7).
var controllers = []string{
	"cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "net_cls", "blkio", "perf_event", "net_prio", "hugetlb", "pids", "rdma", "misc",
}

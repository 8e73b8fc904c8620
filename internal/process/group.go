package process

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"drafter/internal/logging"
)

// Controllers returns the group (cgroup version 2) below which this program can make groups, and the
// controllers that those can have.
func Controllers() (dir string, controllers []string, err error) {
	hierarchies, err := findHierarchies(2)
	if err != nil {
		return "", nil, err
	}
	dir = groupBase(hierarchies[0].mount)
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return "", nil, fmt.Errorf("find controllers: %w", err)
	}
	return dir, strings.Fields(string(b)), nil
}

// groupBase is the group below which groups with limits can be made: the one that systemd has
// delegated, unless this process is in that one itself. A group with processes can give none below it
// a controller, and systemd before version 254 would not start the unit again in a group that does.
func groupBase(mount string) string {
	dir := delegated(mount)
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil || dir == mount {
		return mount
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if path, ok := strings.CutPrefix(line, "0::"); ok && filepath.Join(mount, path) == dir {
			return mount
		}
	}
	return dir
}

// Group is a cgroup (version 2) with limits for several processes, which may outlive this one. It is
// delegated: a VMM that one of the processes starts gets a group of its own below.
type Group struct {
	Path string
	name string
}

// The groups in a group. One with processes has no groups with limits below it.
const groupMembers = "members"

// groupMark is an attribute of a group that this program has made, with the group's name.
const groupMark = "user.drafter.group"

// Bandwidth is the most that a group may read from and write to a disk, in bytes per second; 0 for no
// limit.
type Bandwidth struct {
	Disk        string // its number, MAJOR:MINOR; see [DiskOf]
	Read, Write int64
}

func (b Bandwidth) bounds() []bound {
	text := b.Disk
	if b.Read > 0 {
		text += " rbps=" + strconv.FormatInt(b.Read, 10)
	}
	if b.Write > 0 {
		text += " wbps=" + strconv.FormatInt(b.Write, 10)
	}
	if text == b.Disk {
		return nil
	}
	return []bound{
		{
			"io",
			"disk bandwidth",
			"--disk-read-bps, --disk-write-bps",
			map[string]string{"io.max": text},
			false,
		},
	}
}

// DiskOf returns the number of the disk that a path is on. A partition's is that of its disk, which the
// kernel limits.
func DiskOf(path string) (string, error) { return diskOf(path, "/sys") }

func diskOf(path, sys string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("find the disk of %s: %w", path, err)
	}
	return diskNumber(sys, fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)), path)
}

func diskNumber(sys, number, path string) (string, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(sys, "dev/block", number))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf(
			"%s is on no disk of which the kernel could limit the bandwidth (its device is %s)",
			path,
			number,
		)
	}
	if err == nil {
		if _, perr := os.Stat(filepath.Join(dir, "partition")); perr == nil {
			dir = filepath.Dir(dir)
		}
		var b []byte
		if b, err = os.ReadFile(filepath.Join(dir, "dev")); err == nil {
			return strings.TrimSpace(string(b)), nil
		}
	}
	return "", fmt.Errorf("find the disk of %s: %w", path, err)
}

// GroupPath is where NewGroup makes a group called name.
func GroupPath(base, name string) string { return filepath.Join(base, cgroupPath(name)) }

// NewGroup makes the group [GroupPath] with limits. If one cannot be had, the error is an
// [*UnavailableError], and there is no group.
func NewGroup(
	base, name string,
	limits Limits,
	disk Bandwidth,
	log *slog.Logger,
) (_ *Group, err error) {
	g := &Group{GroupPath(base, name), name}
	if old, err := FindGroup(g.Path, name); err != nil {
		return nil, err
	} else if old != nil {
		if err := old.Remove(); err != nil { // of a program that was killed
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.Remove())
		}
	}()
	if err := makeGroup(g.Path); err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	for mark, value := range map[string]string{groupMark: name, "user.delegate": "1"} {
		if err := unix.Setxattr(g.Path, mark, []byte(value), 0); err != nil {
			return nil, fmt.Errorf("mark cgroup %s: %w", g.Path, err)
		}
	}
	c := &cgroup{version: 2, dirs: []string{g.Path}}
	if err := c.limit(base, append(limits.bounds(2), disk.bounds()...), logging.Or(log)); err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Join(g.Path, groupMembers), 0o755); err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	return g, nil
}

// FindGroup returns the group called name at a path; nil if there is none. What is not a group that
// NewGroup has made under that name is an error.
func FindGroup(path, name string) (*Group, error) {
	value := make([]byte, 256)
	n, err := unix.Getxattr(path, groupMark, value)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if errors.Is(err, unix.ENODATA) && filepath.Base(path) == name {
		// Whoever made it may have been killed before it was marked. Then nothing is in it.
		if _, perr := unix.Getxattr(filepath.Dir(path), parentMark, value); perr == nil &&
			unix.Rmdir(path) == nil {
			return nil, nil
		}
	}
	if err == nil && (string(value[:n]) != name || filepath.Base(path) != name) {
		err = errors.New("it is another VM's")
	}
	if err != nil {
		return nil, fmt.Errorf("cgroup %s is left alone: %w", path, err)
	}
	return &Group{path, name}, nil
}

// Entrance opens the group for processes that are to start in it (SysProcAttr.CgroupFD). Close it.
func (g *Group) Entrance() (*os.File, error) {
	f, err := os.Open(filepath.Join(g.Path, groupMembers))
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	return f, nil
}

// OutOfMemory tells whether the kernel has killed a process of the group for its limit of memory.
func (g *Group) OutOfMemory() bool {
	return (&cgroup{version: 2, dirs: []string{g.Path}}).killed() != nil
}

// Remove removes the group with those below it, and kills what is left there.
func (g *Group) Remove() error {
	var dirs []string
	err := filepath.WalkDir(g.Path, func(path string, d os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil // it has gone meanwhile
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("remove cgroup %s: %w", g.Path, err)
	}
	slices.Reverse(dirs) // those below first
	return removeCgroup(dirs)
}

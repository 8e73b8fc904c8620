package process

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// cgroupParent is the group below which every VM gets its own.
const cgroupParent = "drafter"

// parentMark is an attribute of a parent that this program has made, and so may remove.
const parentMark = "user.drafter"

// cgroupPath is the path of a VM's group below the group in which this program may make groups.
func cgroupPath(name string) string { return filepath.Join("/", cgroupParent, name) }

// Limits bound what a child uses of the host, its threads and children included.
type Limits struct {
	Memory int64   // bytes; 0 for no limit
	CPUs   float64 // of time, in CPUs; 0 for no limit
	// processes and threads; below 0 for no limit, 0 for DefaultPIDs where the host can limit them
	PIDs int
}

// DefaultPIDs is far more than a VMM needs, and far less than a host has (pid_max is at least
// 32768).
const DefaultPIDs = 1024

// bound is one limit of a group.
type bound struct {
	controller string
	what, flag string            // for messages
	files      map[string]string // what to write where, in order of their names
	optional   bool
}

// bounds returns the values to write for the limits. See cgroup-v2.rst of Linux, and its
// cgroup-v1/memory.rst and pids.rst and scheduler/sched-bwc.rst.
func (l Limits) bounds(version int) []bound {
	const period = 100_000 // microseconds, the kernel's default
	var list []bound
	if l.Memory > 0 {
		files := map[string]string{"memory.max": strconv.FormatInt(l.Memory, 10)}
		if version == 1 {
			files = map[string]string{"memory.limit_in_bytes": strconv.FormatInt(l.Memory, 10)}
		}
		list = append(list, bound{"memory", "memory", "--memory-max", files, false})
	}
	if l.CPUs > 0 {
		quota := strconv.Itoa(max(1000, int(l.CPUs*period))) // the kernel takes no less
		files := map[string]string{"cpu.max": fmt.Sprintf("%s %d", quota, period)}
		if version == 1 {
			files = map[string]string{"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": strconv.Itoa(period)}
		}
		list = append(list, bound{"cpu", "CPU time", "--cpus-max", files, false})
	}
	if l.PIDs >= 0 {
		most, optional := l.PIDs, l.PIDs == 0
		if optional {
			most = DefaultPIDs
		}
		list = append(list, bound{"pids", "processes", "--pids-max", map[string]string{"pids.max": strconv.Itoa(most)}, optional})
	}
	return list
}

// hierarchy is a mounted tree of groups.
type hierarchy struct {
	mount       string
	controllers []string // of version 1
}

// cgroup is a child's group: one directory in version 2, one in each hierarchy of version 1.
type cgroup struct {
	version int
	dirs    []string
}

// v1Controllers are the version 1 hierarchies that a VM is accounted in, where the host has them.
var v1Controllers = []string{"cpu", "cpuacct", "memory", "pids", "blkio"}

// v2Controllers are the controllers that account a VM in version 2, where the groups above have
// them.
var v2Controllers = []string{"cpu", "memory", "pids", "io"}

// createCgroup makes a group called name, with limits. log hears of those that cannot be had.
func createCgroup(version int, name string, limits Limits, log *slog.Logger) (_ *cgroup, err error) {
	g := &cgroup{version: version}
	var bases []string
	switch version {
	case 0:
		if l := (Limits{PIDs: limits.PIDs}); l != limits || limits.PIDs > 0 {
			return nil, errors.New("without a cgroup there are no limits")
		}
		return g, nil
	case 1, 2:
		hierarchies, err := findHierarchies(version)
		if err != nil {
			return nil, err
		}
		for _, h := range hierarchies {
			bases = append(bases, h.mount)
		}
	default:
		return nil, fmt.Errorf("cgroup version %d does not exist; choose 1 or 2", version)
	}
	if version == 2 {
		bases[0] = delegated(bases[0])
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeCgroup(g.dirs))
		}
	}()
	for _, base := range bases {
		dir := filepath.Join(base, cgroupPath(name))
		if err := makeGroup(dir); err != nil {
			return nil, fmt.Errorf("create cgroup: %w", err)
		}
		g.dirs = append(g.dirs, dir)
	}
	return g, g.limit(bases[0], limits.bounds(version), log)
}

// makeGroup makes a group, and the parent if there is none.
func makeGroup(dir string) error {
	parent := filepath.Dir(dir)
	for {
		err := os.Mkdir(parent, 0o755)
		if err == nil {
			err = unix.Setxattr(parent, parentMark, []byte{'1'}, 0)
		}
		// A kernel without attributes of groups (before 5.7) leaves the parent.
		if err != nil && !errors.Is(err, os.ErrExist) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		if err := os.Mkdir(dir, 0o755); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		// The last VM of another process has just gone, and the parent with it.
	}
}

// delegated is the group in which groups may be made: the one that systemd has given to this
// process' unit (Delegate= of systemd.resource-control(5)), or else the root.
func delegated(root string) string {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return root
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		path, ok := strings.CutPrefix(line, "0::")
		if !ok || strings.HasPrefix(path, "/..") { // outside of this process' cgroup namespace
			continue
		}
		for ; path != "/" && path != "."; path = filepath.Dir(path) {
			value := make([]byte, 8)
			dir := filepath.Join(root, path)
			if n, err := unix.Getxattr(dir, "user.delegate", value); err == nil && string(value[:n]) == "1" {
				return dir
			}
		}
	}
	return root
}

// limit sets the bounds of the group.
func (g *cgroup) limit(base string, bounds []bound, log *slog.Logger) error {
	failed := map[string]error{}
	if g.version == 2 {
		failed = enableControllers(base, g.dirs[0], bounds)
	}
	for _, b := range bounds {
		err := failed[b.controller]
		if err == nil {
			err = g.set(b)
		}
		if err != nil && b.optional {
			log.Info("There is no limit on a VMM's "+b.what+" here", "reason", err) //nolint:sloglint // one of those of bounds
		} else if err != nil {
			return &UnavailableError{b.flag, err}
		}
	}
	return nil
}

// UnavailableError says that a requested limit is not available on this host.
type UnavailableError struct {
	Flag string
	Err  error
}

func (e *UnavailableError) Error() string { return e.Flag + ": " + e.Err.Error() }

// Unwrap returns why.
func (e *UnavailableError) Unwrap() error { return e.Err }

// set writes one bound.
func (g *cgroup) set(b bound) error {
	for _, dir := range g.dirs {
		found := false
		for _, name := range slices.Sorted(maps.Keys(b.files)) {
			err := os.WriteFile(filepath.Join(dir, name), []byte(b.files[name]), 0)
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) && g.version == 1 {
				continue // another controller's hierarchy, where no file can be made
			}
			if err != nil {
				return err
			}
			found = true
		}
		if found {
			return nil
		}
	}
	return fmt.Errorf("this host has no controller %s in cgroup version %d; try --cgroup-version %d", b.controller, g.version, 3-g.version)
}

// enableControllers lets the group at dir have controllers, and returns why it cannot have some.
// The group's parent is ours. The group base is not, so only the controllers that the bounds need
// are enabled there.
func enableControllers(base, dir string, bounds []bound) map[string]error {
	failed := map[string]error{}
	parent := filepath.Dir(dir)
	for _, c := range v2Controllers {
		if slices.ContainsFunc(bounds, func(b bound) bool { return b.controller == c }) {
			failed[c] = enableController(base, c)
		}
		if failed[c] == nil && lists(filepath.Join(parent, "cgroup.controllers"), c) {
			failed[c] = enableController(parent, c)
		}
	}
	return failed
}

// enableController gives the groups below dir a controller.
func enableController(dir, controller string) error {
	if lists(filepath.Join(dir, "cgroup.subtree_control"), controller) {
		return nil
	}
	if !lists(filepath.Join(dir, "cgroup.controllers"), controller) {
		return fmt.Errorf("%s has no controller %s; where cgroup version 1 has it, pass --cgroup-version 1", dir, controller)
	}
	err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0)
	if errors.Is(err, unix.EBUSY) {
		// "No Internal Process Constraint" of cgroup-v2.rst.
		return fmt.Errorf("%s has processes of its own, so the groups below it cannot have the controller %s; move those into a group below (DelegateSubgroup= of a systemd unit)", dir, controller)
	}
	return err
}

// lists tells whether a file of words has one of them.
func lists(path, word string) bool {
	b, err := os.ReadFile(path)
	return err == nil && slices.Contains(strings.Fields(string(b)), word)
}

// findHierarchies finds the trees of a version that are mounted.
func findHierarchies(version int) ([]hierarchy, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	var found []hierarchy
	for _, m := range mounts {
		if version == 2 && m.FSType == "cgroup2" {
			return []hierarchy{{mount: m.Mountpoint}}, nil
		}
		options := strings.Split(m.VFSOptions, ",")
		wanted := slices.ContainsFunc(options, func(o string) bool { return slices.Contains(v1Controllers, o) })
		known := slices.ContainsFunc(found, func(h hierarchy) bool { return h.mount == m.Mountpoint })
		if version == 1 && m.FSType == "cgroup" && wanted && !known {
			found = append(found, hierarchy{m.Mountpoint, options})
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("cgroup version %d is not mounted on this host; pass --cgroup-version %d", version, 3-version)
	}
	return found, nil
}

// checkCgroups refuses directories that are not the groups of a VM called name.
func checkCgroups(dirs []string, name string) error {
	for _, dir := range dirs {
		known := false
		for _, version := range []int{1, 2} {
			hierarchies, err := findHierarchies(version)
			if err != nil {
				continue // the host has none of that version
			}
			for _, h := range hierarchies {
				below := filepath.Clean(dir) == dir && strings.HasPrefix(dir, h.mount+"/") && strings.HasSuffix(dir, cgroupPath(name))
				known = known || below
			}
		}
		if !known {
			return fmt.Errorf("%s is not a cgroup of VM %s; remove what belongs to it by hand", dir, name)
		}
	}
	return nil
}

// entrance is the way for a child into its group from the start, so that all its work is counted.
type entrance struct {
	group *os.File // of version 2; nil for none
	// the tasks files of version 1: of the group, and of where the calling thread was
	into, outOf []*os.File
}

// open opens the entrance. Afterwards the group need not be visible.
func (g *cgroup) open() (e *entrance, err error) {
	e = &entrance{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open cgroup: %w", err), e.close())
		}
	}()
	switch {
	case g.version == 2:
		e.group, err = os.Open(g.dirs[0])
		return e, err
	case len(g.dirs) == 0:
		return e, nil
	}
	hierarchies, err := findHierarchies(g.version)
	if err != nil {
		return nil, err
	}
	was, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		return nil, err
	}
	for i, h := range hierarchies {
		path, err := pathIn(h, string(was))
		if err != nil {
			return nil, err
		}
		for _, o := range []struct {
			to  *[]*os.File
			dir string
		}{{&e.into, g.dirs[i]}, {&e.outOf, filepath.Join(h.mount, path)}} {
			f, err := os.OpenFile(filepath.Join(o.dir, "tasks"), os.O_WRONLY, 0)
			if err != nil {
				return nil, err
			}
			*o.to = append(*o.to, f)
		}
	}
	return e, nil
}

// pathIn finds the group in a hierarchy of version 1 from proc_pid_cgroup(5).
func pathIn(h hierarchy, groups string) (string, error) {
	for line := range strings.SplitSeq(groups, "\n") {
		fields := strings.SplitN(line, ":", 3)
		if len(fields) < 3 {
			continue
		}
		for c := range strings.SplitSeq(fields[1], ",") {
			if slices.Contains(v1Controllers, c) && slices.Contains(h.controllers, c) {
				return fields[2], nil
			}
		}
	}
	return "", fmt.Errorf("this process has no group in %s", h.mount)
}

// enter moves the calling thread into the groups of version 1, where its children begin, until it
// leaves.
func (e *entrance) enter() error { return attach(e.into) }

func (e *entrance) leave() error { return attach(e.outOf) }

func attach(tasks []*os.File) error {
	for _, f := range tasks {
		if _, err := f.WriteString("0"); err != nil { // the writer itself
			return fmt.Errorf("change cgroup: %w", err)
		}
	}
	return nil
}

func (e *entrance) close() error {
	var errs []error
	for _, f := range slices.Concat(e.into, e.outOf, []*os.File{e.group}) {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// endMembers kills the processes of a group.
func endMembers(dir string) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return // the group is gone
	}
	for pid := range strings.FieldsSeq(string(b)) {
		// 0 is one of another process id namespace
		if n, err := strconv.Atoi(pid); err == nil && n > 0 {
			_ = unix.Kill(n, unix.SIGKILL) // it may have ended
		}
	}
}

// errOutOfMemory says why a child was killed.
var errOutOfMemory = errors.New("it needed more memory than its cgroup may have; raise --memory-max")

// killed tells whether the kernel has killed a process of the group for its limit of memory.
func (g *cgroup) killed() error {
	for _, dir := range g.dirs {
		for _, name := range []string{"memory.events", "memory.oom_control"} {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				continue // another version, or controller
			}
			_, after, found := strings.Cut("\n"+string(b), "\noom_kill ")
			if count, _, _ := strings.Cut(after, "\n"); found && count != "0" {
				return errOutOfMemory
			}
		}
	}
	return nil
}

// removeCgroup removes groups, and kills what the child has left there. A group stays busy for a
// moment after its last process was reaped, so this tries for a second. The shared parent is
// removed with its last child, if it was made for these.
func removeCgroup(dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		var err error
		for range 100 {
			if err = unix.Rmdir(dir); err == nil || errors.Is(err, unix.ENOENT) {
				err = nil
				break
			}
			endMembers(dir)
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
			continue
		}
		parent := filepath.Dir(dir)
		if _, err := unix.Getxattr(parent, parentMark, make([]byte, 1)); err != nil {
			continue // it is gone, or somebody else's
		}
		if err := unix.Rmdir(parent); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", parent, err))
		}
	}
	return errors.Join(errs...)
}

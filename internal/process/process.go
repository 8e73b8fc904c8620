// Package process runs a VMM as a child: without privileges, with a root directory and namespaces
// of its own, under another user, in its own cgroup, on one NUMA node, and never longer than its
// owner.
package process

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"drafter/internal/logging"
)

// Config says how a child runs.
type Config struct {
	Path string
	Args []string // without the program's name
	Dir  string
	Env  []string // all of the child's environment

	Netns         string // name of a network namespace, "" for the caller's
	UID, GID      int    // when both are 0 the child keeps the caller's
	NUMANode      int    // CPUs the child may use; node 0 is a no-op on hosts with one node
	CgroupVersion int    // 1 or 2; 0 for no cgroup
	CgroupName    string // unique per child
	Limits        Limits // of the cgroup

	// Files become the child's descriptors 3, 4, … in order. FilesIn, if set, is called inside
	// Netns and returns more, which Start closes.
	Files   []*os.File
	FilesIn func() ([]*os.File, error)

	Stdin, Stdout, Stderr *os.File // nil: /dev/null

	Logger *slog.Logger // nil: slog.Default()

	// Mounts, if there are any, are made for the child alone, in a mount namespace of its own.
	Mounts []Mount
	// Root, if not nil, is the whole file system that the child sees. The child then has namespaces
	// of its own, also of process ids, and no capability. Without Root a child of root's has all
	// capabilities. No child gets privileges from programs that it executes.
	Root *Root
	// Outlives says that the child changes its user itself, so that no signal of its owner's death
	// reaches it. The kernel kills it all the same, as part of a process id namespace whose first
	// process does get the signal.
	Outlives bool
}

// Mount is a bind mount, or a tmpfs when there is no source.
type Mount struct {
	Source, Target string // paths; the target exists
	Options        string // of a tmpfs (tmpfs(5))
	ReadOnly       bool   // also without devices and set-user-ID programs
}

// Process is a running child. It is killed when its owner dies, however that happens (prctl(2),
// PR_SET_PDEATHSIG).
type Process struct {
	cmd    *exec.Cmd
	guard  *exec.Cmd // nil unless Config.Outlives
	cgroup *cgroup
	start  string

	done chan struct{} // closed once the child is reaped and its cgroup removed
	err  error         // valid once done is closed
}

// Start runs the child. The caller waits for it with Wait.
func Start(c Config) (*Process, error) {
	g, err := createCgroup(c.CgroupVersion, c.CgroupName, c.Limits, logging.Or(c.Logger))
	if err != nil {
		return nil, err
	}
	p := &Process{cgroup: g, done: make(chan struct{})}
	started := make(chan error)
	go p.run(c, started)
	if err := <-started; err != nil {
		return nil, errors.Join(err, removeCgroup(g.dirs))
	}
	return p, nil
}

// run owns the child's whole life on one thread: the namespace and the CPU mask it sets are
// inherited by the child, and the death signal is tied to the thread that started it. The thread is
// never unlocked, so it ends with this goroutine and its settings with it.
func (p *Process) run(c Config, started chan<- error) {
	runtime.LockOSThread()
	if err := p.launch(c); err != nil {
		started <- err
		return
	}
	started <- nil
	err := p.wait()
	if why := p.cgroup.killed(); err != nil && why != nil {
		err = fmt.Errorf("%w: %w", err, why)
	}
	p.err = errors.Join(err, p.endGuard(), removeCgroup(p.cgroup.dirs))
	close(p.done)
}

// wait waits for the child's end. Until then nothing is asked with wait(2), which would get the
// stops of a child that this process traces, too; see package inject.
func (p *Process) wait() error {
	fd, err := unix.PidfdOpen(p.cmd.Process.Pid, 0)
	if err != nil {
		return errors.Join(fmt.Errorf("wait for process %d: %w", p.cmd.Process.Pid, err), p.cmd.Wait())
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
	}
	return errors.Join(err, unix.Close(fd), p.cmd.Wait())
}

func (p *Process) launch(c Config) error {
	if c.Netns != "" {
		if err := enterNetns(c.Netns); err != nil {
			return err
		}
	}
	if err := bindNUMANode(c.NUMANode); err != nil {
		return err
	}
	files := c.Files
	if c.FilesIn != nil {
		more, err := c.FilesIn()
		if err != nil {
			return err
		}
		defer func() {
			for _, f := range more {
				f.Close()
			}
		}()
		files = append(files[:len(files):len(files)], more...)
	}
	p.cmd = exec.Command(c.Path, c.Args...)
	p.cmd.Dir = c.Dir
	if p.cmd.Env = c.Env; c.Env == nil {
		p.cmd.Env = []string{}
	}
	roomy, err := withRoom(files)
	if err != nil {
		return err
	}
	defer roomy[len(roomy)-1].Close()
	p.cmd.ExtraFiles = roomy
	for _, std := range []struct {
		to   *io.Writer
		file *os.File
	}{{&p.cmd.Stdout, c.Stdout}, {&p.cmd.Stderr, c.Stderr}} {
		if std.file != nil { // a nil file in an interface is not nil
			*std.to = std.file
		}
	}
	if c.Stdin != nil {
		p.cmd.Stdin = c.Stdin
	}
	// The child gets its own process group: a Ctrl-C on the terminal is for this process, which
	// then suspends the VM.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	c.Root.attributes(p.cmd.SysProcAttr)
	if c.UID != 0 || c.GID != 0 {
		p.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(c.UID), Gid: uint32(c.GID)}
	}
	if err := p.startAlone(c); err != nil {
		return errors.Join(err, p.endGuard())
	}
	if p.start, err = startTime(p.cmd.Process.Pid); err == nil {
		err = offerToOOMKiller(p.cmd.Process.Pid)
	}
	if err != nil {
		return errors.Join(err, p.cmd.Process.Kill(), ignoreExit(p.cmd.Wait()), p.endGuard())
	}
	return nil
}

// room is how many descriptors the child can have open before the kernel enlarges its table of
// them.
const room = 512

// withRoom opens descriptor 511 for the child, so that the kernel allocates a large descriptor
// table at its start. Linux begins with a table for 64 descriptors. A process with threads that
// needs a larger one waits for a grace period of RCU (expand_fdtable of fs/file.c): 5 to 15 ms,
// during which a VM with a few devices would be paused, in its resume. The caller closes the file.
func withRoom(files []*os.File) ([]*os.File, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	const first = 3 // of os/exec's ExtraFiles
	roomy := make([]*os.File, room-first)
	copy(roomy, files)
	roomy[len(roomy)-1] = null
	return roomy, nil
}

func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

func enterNetns(name string) error {
	ns, err := netns.GetFromName(name)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("network namespace %q does not exist; start drafter nat, or create it with 'ip netns add %s'", name, name)
		}
		return fmt.Errorf("open network namespace %q: %w", name, err)
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("enter network namespace %q: %w", name, err)
	}
	return nil
}

// bindNUMANode restricts the calling thread to the CPUs of a node.
func bindNUMANode(node int) error {
	path := fmt.Sprintf("/sys/devices/system/node/node%d/cpulist", node)
	b, err := os.ReadFile(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) && node == 0 {
			return nil // a kernel without NUMA
		}
		return fmt.Errorf("NUMA node %d does not exist on this host; see 'lscpu'", node)
	}
	if node == 0 {
		if _, err := os.Stat("/sys/devices/system/node/node1"); errors.Is(err, os.ErrNotExist) {
			return nil // the only one: leave the caller's mask alone
		}
	}
	set, err := parseCPUList(strings.TrimSpace(string(b)))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("bind to NUMA node %d: %w", node, err)
	}
	return nil
}

// parseCPUList reads the kernel's list format, "0-3,8,10-11".
func parseCPUList(s string) (unix.CPUSet, error) {
	var set unix.CPUSet
	for _, r := range strings.Split(s, ",") {
		lo, hi, ranged := strings.Cut(r, "-")
		first, err := strconv.Atoi(lo)
		last := first
		if err == nil && ranged {
			last, err = strconv.Atoi(hi)
		}
		if err != nil || first > last {
			return set, fmt.Errorf("CPU list %q is malformed", s)
		}
		for cpu := first; cpu <= last; cpu++ {
			set.Set(cpu)
		}
	}
	return set, nil
}

// PID is the child's process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Identity returns what another process needs to find the child again. The executable is the one
// that it runs now.
func (p *Process) Identity() Identity {
	// A child that has just ended has none, and need not be found.
	exe, _ := executable(p.PID())
	return Identity{PID: p.PID(), StartTime: p.start, Executable: exe, Cgroups: p.cgroup.dirs}
}

// Done is closed when the child has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait blocks until the child has ended and tells how, as [exec.Cmd.Wait] does.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Signaled tells whether the error of Wait says that a signal has ended the child.
func Signaled(err error, signal syscall.Signal) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == signal
}

// Kill ends the child at once. Wait reaps it.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill process %d: %w", p.PID(), err)
	}
	return nil
}

// Identity identifies a process even after its id was used again.
type Identity struct {
	PID        int      `json:"pid"`
	StartTime  string   `json:"startTime"`  // in clock ticks since boot, from /proc/PID/stat
	Executable string   `json:"executable"` // device and inode of /proc/PID/exe
	Cgroups    []string `json:"cgroups"`
}

// Identify returns the identity of a running process that has no cgroup of its own.
func Identify(pid int) (Identity, error) {
	start, err := startTime(pid)
	if err != nil {
		return Identity{}, err
	}
	exe, err := executable(pid)
	return Identity{PID: pid, StartTime: start, Executable: exe}, err
}

// executable identifies the file that a process runs, wherever that is by now.
func executable(pid int) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &st); err != nil {
		return "", fmt.Errorf("identify process %d: %w", pid, err)
	}
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino), nil
}

// reclaimTimeout bounds how long a killed orphan may take to vanish. A VMM with a large memory
// needs a while to free it.
const reclaimTimeout = 30 * time.Second

// Reclaim kills the process if it still runs, waits until it is gone, and removes its cgroups,
// which are called name. A process that does not agree with all of the identity is another one, and
// is left alone.
func (id Identity) Reclaim(name string) error {
	if err := checkCgroups(id.Cgroups, name); err != nil {
		return err
	}
	if err := id.kill(); err != nil {
		return err
	}
	return removeCgroup(id.Cgroups)
}

// kill kills the process, if it still runs, and waits until it is gone.
func (id Identity) kill() error {
	fd, err := unix.PidfdOpen(id.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", id.PID, err)
	}
	defer unix.Close(fd)
	// The descriptor pins the process, so the checks below hold for it until the end.
	if !id.agrees() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", id.PID, err)
	}
	if err := waitPidfd(fd, reclaimTimeout); err != nil {
		return fmt.Errorf("wait for process %d to end: %w", id.PID, err)
	}
	return nil
}

// agrees tells whether the process with the identity's id is the one.
func (id Identity) agrees() bool {
	now, err := Identify(id.PID)
	if err != nil || now.StartTime != id.StartTime || now.Executable != id.Executable {
		return false
	}
	if len(id.Cgroups) == 0 {
		return true
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", id.PID))
	return err == nil && strings.Contains(string(b), cgroupPath(filepath.Base(id.Cgroups[0]))+"\n")
}

func waitPidfd(fd int, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("still there after %s", timeout)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			return nil
		}
	}
}

// Dying tells whether a process has been killed but hangs in the kernel: its first thread has
// ended, others have not. Until they do, it keeps its locks and files.
func Dying(pid int) bool {
	fields, err := statFields(pid)
	if err != nil {
		return false // it is gone
	}
	threads, err := strconv.Atoi(fields[17])
	return err == nil && fields[0] == "Z" && threads > 1
}

// startTime reads when a process was started.
func startTime(pid int) (string, error) {
	fields, err := statFields(pid)
	if err != nil {
		return "", fmt.Errorf("read start time: %w", err)
	}
	return fields[19], nil
}

// statFields reads /proc/PID/stat from field 3 on (proc_pid_stat(5)); the name in field 2 may hold
// spaces and parentheses.
func statFields(pid int) ([]string, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(fields) < 20 {
		return nil, fmt.Errorf("%s is malformed", path)
	}
	return fields, nil
}

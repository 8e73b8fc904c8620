// Package detached starts processes that outlive the one that starts them, and finds them again.
// Such a process holds a lock while it lives, so nobody needs to remember its number.
package detached

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
)

// Process is a process that holds a lock.
type Process struct {
	PID  int
	file *os.File // pidfd_open(2)
	done chan struct{}
	wait sync.WaitGroup

	status syscall.WaitStatus // of a child that has ended
}

// Find returns the process that holds the lock at path, or nil if none does. Close it. It never
// returns this process, which holds the lock as it starts one.
func Find(path string) (*Process, error) {
	for {
		held, err := lockfile.Holder(path)
		if held == nil || err != nil {
			return nil, err
		}
		if held.PID != 0 && held.PID != os.Getpid() {
			p, err := holder(held.PID, path)
			if p != nil || err != nil {
				return p, err
			}
		}
		// The holder has not written itself into the file yet, or another looks as we do.
		time.Sleep(time.Millisecond)
	}
}

// holder opens a process if it has the file at path open. The number may be another process' now.
func holder(pid int, path string) (*Process, error) {
	p, err := open(pid)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	holds, err := hasOpen(pid, path)
	if holds {
		return p, nil
	}
	return nil, errors.Join(err, p.Close())
}

// hasOpen tells whether a process has a file open.
func hasOpen(pid int, path string) (bool, error) {
	want, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	files, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil // the process has ended
	}
	for _, f := range files {
		if is, err := os.Stat(filepath.Join(dir, f.Name())); err == nil && os.SameFile(is, want) {
			return true, nil
		}
	}
	return false, err
}

func open(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	p := &Process{PID: pid, file: os.NewFile(uintptr(fd), fmt.Sprintf("process %d", pid)), done: make(chan struct{})}
	conn, err := p.file.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, p.file.Close())
	}
	p.wait.Go(func() {
		defer close(p.done)
		err := conn.Read(func(fd uintptr) bool { // returns early if the file is closed
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(poll, 0)
			return err == nil && n > 0
		})
		if err == nil {
			_, _ = syscall.Wait4(pid, &p.status, syscall.WNOHANG, nil) // others' children are theirs
		}
	})
	return p, nil
}

// Done is closed when the process has ended, or p was closed.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal. A process that has ended is no error.
func (p *Process) Signal(s syscall.Signal) error {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := conn.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), s, nil, 0) }); err != nil {
		select {
		case <-p.done: // it has ended, and who saw that has closed p
			return nil
		default:
			return err
		}
	}
	if serr != nil && !errors.Is(serr, unix.ESRCH) {
		return fmt.Errorf("send %s to process %d: %w", s, p.PID, serr)
	}
	return nil
}

// Close forgets the process, which goes on.
func (p *Process) Close() error {
	err := p.file.Close()
	p.wait.Wait()
	return err
}

// Command is what to start.
type Command struct {
	Lock    string // that the process holds, from its first instruction; see [Lock]
	Program string
	Args    []string
	Stdout  *os.File // nil discards
	Log     string   // path of the file for its stderr, which it rotates; "" discards
	Cgroup  *os.File // directory of a cgroup (version 2) to start in; nil for this process'
	// Patience is how long the process may take to end that is not to start after all. 0: 30 s
	Patience time.Duration
}

// ErrLeave is the cause of a context whose end leaves a process that starts alone.
var ErrLeave = errors.New("this program ends; what it has started goes on")

const defaultPatience = 30 * time.Second

// Start starts a process with a session of its own and returns it once it is ready, which it says as
// sd_notify(3) does. One that ends before is an error. When ctx ends, so does the process, unless the
// cause is [ErrLeave]. Close the process.
func Start(ctx context.Context, c Command) (_ *Process, err error) {
	// Should this process be killed now, there is either no other, or one that has the lock.
	lock, err := Take(c.Lock)
	if err != nil {
		return nil, err
	}
	release := lock.Release // unless another process has it
	defer func() { err = errors.Join(err, release()) }()
	path := c.Lock + ".notify"
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) { // of one that was killed
		return nil, err
	}
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	defer func() {
		if rerr := os.Remove(path); !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	ready := make(chan struct{})
	var listen sync.WaitGroup
	listen.Go(func() { awaitReady(socket, ready) })
	defer listen.Wait()
	defer socket.Close()
	cmd := exec.Command(c.Program, c.Args...)
	cmd.ExtraFiles = []*os.File{lock.File()}
	if c.Stdout != nil {
		cmd.Stdout = c.Stdout
	}
	cmd.Env = append(variables(), "NOTIFY_SOCKET="+path, lockVariable+"="+c.Lock)
	if c.Log != "" {
		log, journal, err := openLog(c.Log)
		if err != nil {
			return nil, err
		}
		defer log.Close()
		cmd.Stderr, cmd.Env = log, append(cmd.Env, logVariable+"="+c.Log)
		if journal != nil {
			cmd.ExtraFiles, cmd.Env = append(cmd.ExtraFiles, journal), append(cmd.Env, journalVariable+"="+journalNumber)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if c.Cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(c.Cgroup.Fd())
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	release = lock.Abandon
	p, err := open(cmd.Process.Pid)
	if err != nil { // it cannot have ended: nobody has waited for it
		return nil, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	if err := cmd.Process.Release(); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	select {
	case <-ready:
		return p, nil
	case <-p.Done():
		return nil, errors.Join(fmt.Errorf("%s %s: it has ended (%s)", filepath.Base(c.Program), c.Args[0], describe(p.status)), p.Close())
	case <-ctx.Done():
		err := context.Cause(ctx)
		if !errors.Is(err, ErrLeave) {
			err = errors.Join(err, p.End(cmp.Or(c.Patience, defaultPatience)))
		}
		return nil, errors.Join(err, p.Close())
	}
}

// Take takes a lock. Who only looks for its holder is not one, nor is what a process that was killed had
// forked, and which has not become another program yet. A lock that somebody has is refused with a
// [lockfile.HeldError].
func Take(path string) (*lockfile.Lock, error) {
	for {
		lock, err := lockfile.Try(path)
		var held *lockfile.HeldError
		if !errors.As(err, &held) {
			return lock, err
		}
		p, ferr := Find(path)
		if p != nil {
			ferr = p.Close()
		}
		if p != nil || ferr != nil {
			return nil, errors.Join(err, ferr)
		}
	}
}

// End lets the process end, kills it when it has not in time, and waits for that.
func (p *Process) End(within time.Duration) error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.Done():
		return nil
	case <-time.After(within):
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.Done()
	return nil
}

// lockVariable names the lock that a process was started with, as file 3.
const lockVariable = "DRAFTER_LOCK"

// Lock takes the lock at path for this process, which may have been started with it.
func Lock(path string) (*lockfile.Lock, error) {
	if os.Getenv(lockVariable) != path {
		return lockfile.Try(path)
	}
	unix.CloseOnExec(3)
	return lockfile.Adopt(os.NewFile(3, path))
}

// awaitReady closes ready when a process says that it is ready, and returns when the socket is closed.
func awaitReady(socket *net.UnixConn, ready chan struct{}) {
	b := make([]byte, 4096)
	for said := false; ; {
		n, err := socket.Read(b)
		if err != nil {
			return
		}
		if !said && slices.Contains(strings.Split(string(b[:n]), "\n"), daemon.SdNotifyReady) {
			said = true
			close(ready)
		}
	}
}

func describe(s syscall.WaitStatus) string {
	if s.Signaled() {
		return s.Signal().String()
	}
	return fmt.Sprintf("exit status %d", s.ExitStatus())
}

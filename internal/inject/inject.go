// Package inject makes system calls in the name of another process: with its memory, its
// descriptors and its rights. So guest memory is mapped and watched as suits this program, without
// a VMM that knows of it.
//
// The process is traced for that (ptrace(2)), and its main thread stands still for some hundred
// microseconds. Its code stays as it is: every process has a vDSO, which has the instruction that
// is needed (vdso(7)). A system call in which the thread was is restarted by the kernel.
package inject

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrEnded says that the process has ended meanwhile. It is not reaped.
var ErrEnded = errors.New("it has ended")

// Tracee is a process whose main thread is stopped. It is used in the call of Into that made it.
type Tracee struct {
	pid   int
	entry uint64 // address of an instruction that makes a system call
	saved registers
	mask  uint64 // signals that the thread had blocked
}

// Into stops the main thread of a process, calls do, and lets it go on. Nobody else may trace it,
// and nobody in this program be in wait(2) for it, which gets what its tracer waits for; the
// readiness of a pidfd tells its end. One of another user, or with rights that this one lacks,
// takes CAP_SYS_PTRACE.
func Into(pid int, do func(*Tracee) error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // a tracer is a thread; it ends with this goroutine, and all that it traced is free
		done <- into(pid, do)
	}()
	return <-done
}

func into(pid int, do func(*Tracee) error) error {
	t := &Tracee{pid: pid}
	entry, err := systemCall(pid)
	if err == nil {
		t.entry, err = entry, unix.PtraceSeize(pid)
	}
	if err != nil {
		return fmt.Errorf("trace process %d: %w%s", pid, err, forbidden(err))
	}
	if err = t.stop(); err == nil {
		err = errors.Join(do(t), t.restore())
	}
	if !errors.Is(err, ErrEnded) {
		err = errors.Join(err, unix.PtraceDetach(pid))
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	return nil
}

// forbidden says more of a process that may not be traced.
func forbidden(err error) string {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return ""
	}
	b, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope")
	if err == nil && strings.TrimSpace(string(b)) == "3" {
		return "; kernel.yama.ptrace_scope is 3, which forbids it until the next boot of this host"
	}
	return "; it takes CAP_SYS_PTRACE, and nobody else who traces it"
}

// PID is the process' id.
func (t *Tracee) PID() int { return t.pid }

// Call makes a system call with at most six arguments. An error is an [unix.Errno] where the call
// was made.
func (t *Tracee) Call(number uintptr, args ...uintptr) (uintptr, error) {
	var six [6]uint64
	for i, a := range args {
		six[i] = uint64(a)
	}
	r := t.saved
	r.call(t.entry, uint64(number), six)
	if err := r.set(t.pid); err != nil {
		return 0, fmt.Errorf("set registers: %w", err)
	}
	if err := unix.PtraceSingleStep(t.pid); err != nil {
		return 0, fmt.Errorf("step: %w", err)
	}
	status, err := t.wait()
	if err != nil {
		return 0, err
	}
	if status.StopSignal() != unix.SIGTRAP {
		return 0, fmt.Errorf("a system call was stopped by signal %v", status.StopSignal())
	}
	if err := r.get(t.pid); err != nil {
		return 0, fmt.Errorf("get registers: %w", err)
	}
	result := int64(r.result())
	if result < 0 && result > -4096 {
		return 0, unix.Errno(-result)
	}
	return uintptr(result), nil
}

// stop stops the thread and keeps signals from it.
func (t *Tracee) stop() error {
	if err := unix.PtraceInterrupt(t.pid); err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	for {
		status, err := t.wait()
		if err != nil {
			return err
		}
		if status>>16 == unix.PTRACE_EVENT_STOP {
			break
		}
		// A signal was first. It is delivered.
		if err := unix.PtraceCont(t.pid, int(status.StopSignal())); err != nil {
			return fmt.Errorf("stop: %w", err)
		}
	}
	if err := t.saved.get(t.pid); err != nil {
		return fmt.Errorf("get registers: %w", err)
	}
	if err := t.signalMask(unix.PTRACE_GETSIGMASK, &t.mask); err != nil {
		return err
	}
	all := ^uint64(1 << (unix.SIGTRAP - 1)) // which a step ends with
	return t.signalMask(unix.PTRACE_SETSIGMASK, &all)
}

// restore makes the thread what it was.
func (t *Tracee) restore() error {
	if err := t.saved.set(t.pid); err != nil {
		return t.orEnded(fmt.Errorf("set registers: %w", err))
	}
	return t.signalMask(unix.PTRACE_SETSIGMASK, &t.mask)
}

// signalMask gets or sets the signals that the thread has blocked.
func (t *Tracee) signalMask(request uintptr, mask *uint64) error {
	_, _, e := unix.Syscall6(unix.SYS_PTRACE, request, uintptr(t.pid), unsafe.Sizeof(*mask), uintptr(unsafe.Pointer(mask)), 0, 0)
	if e != 0 {
		return t.orEnded(fmt.Errorf("block signals: %w", e))
	}
	return nil
}

// orEnded is the reason of an error that a killed process leads to: it cannot be traced any more.
func (t *Tracee) orEnded(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return ErrEnded
	}
	return err
}

// wait waits until the thread is stopped. A process that has ended is left to whoever waits for it.
func (t *Tracee) wait() (unix.WaitStatus, error) {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, t.pid, &info, unix.WEXITED|unix.WSTOPPED|unix.WNOWAIT|unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.ECHILD) { // it was reaped
			return 0, ErrEnded
		}
		if err != nil {
			return 0, fmt.Errorf("wait: %w", err)
		}
		if info.Code != cldTrapped && info.Code != cldStopped {
			return 0, ErrEnded
		}
		var status unix.WaitStatus
		pid, err := unix.Wait4(t.pid, &status, unix.WALL|unix.WNOHANG, nil)
		if err == nil && pid == t.pid {
			return status, nil
		}
	}
}

// Codes of a SIGCHLD (siginfo.h).
const (
	cldTrapped = 4
	cldStopped = 5
)

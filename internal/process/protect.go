package process

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// offerToOOMKiller lets the kernel, when memory is short, choose a child before the processes of
// this program: killing the process that serves a VM's memory would not free the VM's.
func offerToOOMKiller(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("200"), 0)
}

var coreLimit sync.Mutex // held while this process' limit is another one

// withoutCore calls start while children are made that leave no core dumps, which would hold guest
// memory. A limit is inherited; to set one of a child of another user takes a capability that this
// thread may have given up.
func withoutCore(start func() error) error {
	coreLimit.Lock()
	defer coreLimit.Unlock()
	var before unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_CORE, nil, &before); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := setCoreLimit(0, before.Max); err != nil {
		return err
	}
	return errors.Join(start(), setCoreLimit(before.Cur, before.Max))
}

func setCoreLimit(soft, hard uint64) error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: soft, Max: hard}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	return nil
}

var protected atomic.Bool

// Protected tells whether [ProtectServer] was called.
func Protected() bool { return protected.Load() }

// ProtectServer prepares this process to serve a VM's memory, for as long as it runs: its pages
// stay in memory, it is not the first that the kernel kills when memory is short, and it leaves no
// core dump. A VMM that faults waits for this process, so this process must not wait for memory
// that only the VMM could give back.
func ProtectServer() error {
	protected.Store(true)
	var errs []error
	// On fault only: a Go process reserves much more than it ever touches.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		errs = append(errs, fmt.Errorf("lock memory: %w", err))
	}
	// proc_pid_oom_score_adj(5); -1000 would exempt it, which a leak of ours does not deserve. In a
	// container root may not lower it; then it must do that VMMs have a higher one.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0); err != nil && !errors.Is(err, os.ErrPermission) {
		errs = append(errs, fmt.Errorf("protect from the out-of-memory killer: %w", err))
	}
	coreLimit.Lock()
	defer coreLimit.Unlock()
	return errors.Join(append(errs, setCoreLimit(0, 0))...)
}

package process

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// offerToOOMKiller makes the kernel, when memory is short, choose a child before this program's
// processes: killing the process that serves a VM's memory would not free that memory.
func offerToOOMKiller(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("200"), 0)
}

// dumpNoCore keeps this process and its children from leaving core dumps, which would hold guest
// memory.
func dumpNoCore() error {
	var l unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_CORE, &l)
	if l.Cur = 0; err == nil {
		err = unix.Setrlimit(unix.RLIMIT_CORE, &l)
	}
	if err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	return nil
}

// ProtectServer prepares this process to serve a VM's memory: its pages stay in memory, and the
// kernel does not kill it first when memory is short. A VMM that faults waits for this process, so
// this process must not wait for memory that only the VMM could give back. The effect lasts as long
// as the process.
func ProtectServer() error {
	var errs []error
	// On fault only, because a Go process reserves much more than it ever touches.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		errs = append(errs, fmt.Errorf("lock memory: %w", err))
	}
	// proc_pid_oom_score_adj(5). -1000 would exempt this process even if it leaks. In a container
	// root may not lower it; then only the VMMs' higher score helps.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0); err != nil && !errors.Is(err, os.ErrPermission) {
		errs = append(errs, fmt.Errorf("protect from the out-of-memory killer: %w", err))
	}
	return errors.Join(errs...)
}

package guest

import (
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
)

// reaper waits for every child of process 1: those it started, whose callers learn how they ended,
// and the orphans the kernel hands it.
type reaper struct {
	mu      sync.Mutex // held while starting, so that no child is reaped before it is known
	waiting map[int]chan syscall.WaitStatus
}

// newReaper starts reaping, for ever.
func newReaper() *reaper {
	r := &reaper{waiting: map[int]chan syscall.WaitStatus{}}
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	go func() {
		for range children {
			r.reap()
		}
	}()
	return r
}

// start runs cmd. The channel yields its status once.
func (r *reaper) start(cmd *exec.Cmd) (<-chan syscall.WaitStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done := make(chan syscall.WaitStatus, 1)
	r.waiting[cmd.Process.Pid] = done
	return done, cmd.Process.Release()
}

func (r *reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil && !errors.Is(err, syscall.ECHILD) {
			slog.Error("Reaping failed", "error", err)
		}
		if pid <= 0 || err != nil {
			return
		}
		if done := r.waiting[pid]; done != nil {
			delete(r.waiting, pid)
			done <- status
		}
	}
}

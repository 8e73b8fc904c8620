package daemon

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"drafter/api"
)

// again is what starts a VM again by its restart policy. d.mu guards it.
type again struct {
	busy  bool          // somebody does, or waits for it
	pause time.Duration // before the last start
}

// A VM that ends again and again is started less and less often, as docker does it: after a pause that
// doubles each time until the VM has run for a while.
const (
	firstPause = 100 * time.Millisecond
	mostPause  = time.Minute
	longRun    = 10 * time.Second
)

func checkPolicy(r *api.Run) error {
	switch {
	case !slices.Contains([]string{"", api.No, api.Always, api.UnlessStopped}, r.Restart):
		return fmt.Errorf("the restart policy %q is none; choose no, always or unless-stopped", r.Restart)
	case r.Restart == "" || r.Restart == api.No:
		return nil
	case r.Remove:
		return errors.New("a VM that is removed at its end has no restart policy")
	case r.Stdin || r.TTY:
		return errors.New("a VM with stdin or a terminal ends with who uses it, and has no restart policy")
	}
	return nil
}

// wanted tells whether the policy wants a VM to be started that does not run: now, or as the daemon
// starts.
func wanted(r api.VM, daemonStarts bool) bool {
	switch r.State {
	case api.Stopped: // by a user, for the host's shutdown, or by whoever has told its process to end
		if !daemonStarts {
			return false
		}
	case api.Exited, api.Failed:
	default:
		return false
	}
	switch r.Restart {
	case api.Always:
		return daemonStarts || !r.UserStopped
	case api.UnlessStopped:
		return !r.UserStopped
	}
	return false
}

// restarts tells whether the policy is about to start the VM again.
func (v *vm) restarts() bool {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	return v.process == nil && !v.d.hostEnds && wanted(v.record, false)
}

// userStops notes that a user ends the VM. On a full disk only this daemon knows it.
func (v *vm) userStops() {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	if v.record.UserStopped || v.record.State == api.Removing {
		return
	}
	v.record.UserStopped = true
	if err := v.write(v.record); err != nil {
		v.d.log.Error("The next daemon may start a VM that a user has ended", "vm", v.record.Name, "error", err)
	}
}

// keepRunning starts a VM again whose process has ended, if its policy wants that.
func (v *vm) keepRunning(ended *process) {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	if !ended.ran.IsZero() && time.Since(ended.ran) >= longRun {
		v.again.pause = 0
	}
	if v.again.busy || v.d.hostEnds || !wanted(v.record, false) {
		return
	}
	v.again.busy = true
	v.d.work.Go(func() { v.startAgain(false) })
}

// startWithDaemon starts a VM that was not running when the daemon was started, if its policy wants
// that.
func (v *vm) startWithDaemon() {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	if v.process != nil || v.d.vms[v.record.ID] != v || !wanted(v.record, true) {
		return
	}
	v.again.busy = true
	v.d.work.Go(func() { v.startAgain(true) })
}

// startAgain starts the VM until it runs, or its policy does not want that any more.
func (v *vm) startAgain(daemonStarts bool) {
	for {
		if !daemonStarts {
			select {
			case <-time.After(v.nextPause()):
			case <-v.d.ctx.Done():
				return
			}
		}
		err := v.startOnce(daemonStarts)
		daemonStarts = false
		if v.d.ctx.Err() != nil {
			return
		}
		v.d.mu.Lock()
		r := v.record
		goOn := v.process == nil && v.d.vms[r.ID] == v && !v.d.hostEnds && wanted(r, false)
		v.again.busy = goOn
		v.d.mu.Unlock()
		if err != nil {
			v.d.log.Error("A VM is not started by its restart policy", "vm", r.Name, "again", goOn, "error", err)
		}
		if !goOn {
			return
		}
	}
}

func (v *vm) nextPause() time.Duration {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	v.again.pause = min(max(2*v.again.pause, firstPause), mostPause)
	return v.again.pause
}

// startOnce starts the VM if its policy still wants that once nobody else changes it. Few VMs start
// at a time with the daemon.
func (v *vm) startOnce(daemonStarts bool) error {
	ctx, cancel := context.WithCancelCause(v.d.ctx)
	defer cancel(nil)
	if daemonStarts {
		if err := v.d.starting.Acquire(ctx, 1); err != nil {
			return err
		}
		defer v.d.starting.Release(1)
	}
	if err := v.acquire(ctx, cancel); err != nil {
		return err
	}
	defer v.release()
	v.d.mu.Lock()
	still := v.process == nil && v.d.vms[v.record.ID] == v && !v.d.hostEnds && wanted(v.record, daemonStarts)
	v.d.mu.Unlock()
	if !still {
		return nil
	}
	return v.start(ctx)
}

// Shutdown suspends all VMs, for the host's shutdown. That is no user's doing: the next daemon starts
// those again that have a restart policy.
func (d *Daemon) Shutdown() api.Operation {
	return d.begin("shutdown", "", func(ctx context.Context, _ *operation) error {
		d.mu.Lock()
		d.hostEnds = true
		var all []*vm
		for _, v := range d.vms {
			if v.record.State != api.Creating { // else it does not run yet; the next daemon removes it
				all = append(all, v)
			}
		}
		d.mu.Unlock()
		var g errgroup.Group // one VM's failure is not the others'
		g.SetLimit(2 * runtime.NumCPU())
		errs := make([]error, len(all))
		for i, v := range all {
			g.Go(func() error {
				errs[i] = v.stopForHost(ctx)
				return nil
			})
		}
		return errors.Join(g.Wait(), errors.Join(errs...))
	})
}

var errHostEnds = errors.New("all VMs are suspended")

func (v *vm) stopForHost(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	v.d.mu.Lock()
	if v.record.State == api.Moving && v.cancel != nil { // else the host waits for all of the move
		v.cancel(errHostEnds)
	}
	v.d.mu.Unlock()
	if err := v.acquire(ctx, cancel); err != nil {
		return fmt.Errorf("suspend VM %s: %w", v.look().Name, err)
	}
	defer v.release()
	if v.owner() == nil {
		return nil
	}
	return v.stop(ctx, false)
}

package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"

	"drafter/api"
	"drafter/internal/control"
	"drafter/internal/detached"
	"drafter/internal/newfile"
	"drafter/internal/private"
)

// vm is a VM of this host.
type vm struct {
	d    *Daemon
	dir  string
	busy *semaphore.Weighted // of 1: the operation that changes it

	// guarded by d.mu
	record  api.VM
	process *process // that owns it; nil if none does
}

// process is a VM's process.
type process struct {
	*detached.Process

	noted chan struct{} // closed once it is noted how it has ended
}

// The files in a VM's directory.
const (
	recordFile   = "vm.json"
	controlDir   = "control"
	instanceDir  = "instance"
	forwardsLock = "ports.lock"
	consoleLog   = "console.log"
	processLog   = "process.log"
)

func (d *Daemon) newVM(dir string) *vm {
	return &vm{d: d, dir: d.dir("vms", dir), busy: semaphore.NewWeighted(1)}
}

func (v *vm) path(name string) string { return filepath.Join(v.dir, name) }

// read reads the record. A VM without one is no error.
func (v *vm) read() (there bool, err error) {
	b, err := private.ReadFile(v.path(recordFile), 1<<20)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &v.record)
	}
	if err != nil {
		return false, fmt.Errorf("read record of a VM: %s: %w", v.dir, err)
	}
	return true, nil
}

// change changes the record, durably, and tells of the new state.
func (v *vm) change(f func(*api.VM)) error {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	return v.changeLocked(f)
}

func (v *vm) changeLocked(f func(*api.VM)) error {
	after := v.record
	f(&after)
	b, err := json.Marshal(after)
	if err == nil {
		err = newfile.Write(v.path(recordFile), func(file *os.File) error {
			_, err := file.Write(b)
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("record VM %s: %w", after.Name, err)
	}
	before := v.record.State
	v.record = after
	if before != after.State {
		return v.d.events.add("vm."+after.State, &after)
	}
	return nil
}

// look returns the record.
func (v *vm) look() api.VM {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	return v.record
}

// recover finds the VM's process, if it lives, and else how it has ended.
func (v *vm) recover() error {
	process, err := detached.Find(control.LockFile(v.path(controlDir)))
	if err != nil {
		return err
	}
	record := v.look()
	if process == nil {
		if record.State == api.Stopped || record.State == api.Exited || record.State == api.Failed {
			return nil
		}
		return v.hasEnded(v.d.ctx)
	}
	v.own(process)
	// The last daemon may have been killed as it started or stopped the VM. It goes on.
	v.d.work.Go(func() {
		err := v.busy.Acquire(v.d.ctx, 1)
		if err == nil {
			defer v.busy.Release(1)
			if err = v.d.startNAT(v.d.ctx); err == nil {
				err = v.awaitRunning(v.d.ctx)
			}
		}
		if err != nil && v.d.ctx.Err() == nil {
			v.d.log.Error("A VM that the last daemon has started does not answer", "vm", record.Name, "error", err)
		}
	})
	return nil
}

// awaitRunning waits until the VM's process says that it runs, and publishes its ports.
func (v *vm) awaitRunning(ctx context.Context) error {
	c, err := control.Dial(ctx, v.path(controlDir))
	if err != nil {
		return err
	}
	defer c.Close()
	status := &control.StatusResponse{}
	for status.GetState() != control.Running {
		if status, err = c.Status(ctx, &control.StatusRequest{State: status.GetState()}); err != nil {
			return err
		}
		if status.GetState() == control.Ending {
			return nil // watch hears of the end
		}
	}
	if err := v.publish(ctx); err != nil {
		return err
	}
	v.d.mu.Lock()
	if v.process == nil { // it has ended meanwhile, and that is noted
		v.d.mu.Unlock()
		return errors.Join(errors.New("the VM has ended at once"), v.unpublish(ctx))
	}
	defer v.d.mu.Unlock()
	return v.changeLocked(func(r *api.VM) {
		r.State, r.Booted, r.PID, r.Error = api.Running, status.GetBooted(), int(status.GetPid()), ""
	})
}

// start starts the VM, whose busy is held.
func (v *vm) start(ctx context.Context) (err error) {
	if r := v.look(); r.State == api.Running {
		return fmt.Errorf("VM %s runs already: %w", r.Name, ErrConflict)
	}
	if err := v.d.startNAT(ctx); err != nil {
		return err
	}
	v.d.mu.Lock()
	ns, err := v.d.namespace()
	if err == nil {
		now := time.Now().UTC()
		err = v.changeLocked(func(r *api.VM) { r.State, r.Namespace, r.Error, r.Started = api.Starting, ns, "", &now })
	}
	v.d.mu.Unlock()
	if err != nil {
		return err
	}
	process, err := v.launch(ctx)
	if err != nil {
		return errors.Join(err, v.hasEnded(context.WithoutCancel(ctx)), v.change(func(r *api.VM) {
			if r.State == api.Failed {
				r.Error = err.Error()
			}
		}))
	}
	v.own(process)
	return v.awaitRunning(ctx)
}

// own makes a process the VM's, and watches it.
func (v *vm) own(p *detached.Process) {
	owner := &process{p, make(chan struct{})}
	v.d.mu.Lock()
	v.process = owner
	v.d.mu.Unlock()
	v.d.work.Go(func() { v.watch(owner) })
}

// launch starts the VM's process, and returns once the VM runs.
func (v *vm) launch(ctx context.Context) (_ *detached.Process, err error) {
	r := v.look()
	logs := [2]*os.File{}
	for i, name := range []string{consoleLog, processLog} {
		if logs[i], err = os.OpenFile(v.path(name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, newfile.Mode); err != nil {
			return nil, err
		}
		defer logs[i].Close()
	}
	if err := private.MkdirAll(v.path(controlDir)); err != nil {
		return nil, err
	}
	// It may be cut off before it has got so far itself.
	if err := control.Forget(v.path(controlDir)); err != nil {
		return nil, err
	}
	process, err := detached.Start(ctx, detached.Command{
		Lock: control.LockFile(v.path(controlDir)), Program: v.d.config.Program, Stdout: logs[0], Stderr: logs[1],
		Args: []string{
			"peer", "--raddr", "", "--laddr", "", "--netns", r.Namespace, "--chroot-base-dir", v.d.dir("vmm"),
			"--package", v.d.dir("packages", r.Package), "--instance", v.path(instanceDir), "--control", v.path(controlDir),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("start VM %s: %w: %s", r.Name, err, v.lastWords())
	}
	return process, nil
}

// lastWords is why the VM's process says that it has ended.
func (v *vm) lastWords() string {
	end, err := control.LastEnd(v.path(controlDir))
	switch {
	case err != nil:
		return err.Error()
	case end == nil:
		return "see " + v.path(processLog)
	}
	return end.Error
}

// watch waits until the VM's process has ended, or the daemon has.
func (v *vm) watch(p *process) {
	select {
	case <-v.d.ctx.Done():
		return
	case <-p.Done():
	}
	v.d.mu.Lock()
	v.process = nil
	v.d.mu.Unlock()
	err := errors.Join(p.Close(), v.hasEnded(v.d.ctx))
	close(p.noted)
	v.d.mu.Lock()
	remove, name := v.record.Remove && v.record.State != api.Removing, v.record.Name
	v.d.mu.Unlock()
	if remove && err == nil {
		if err = v.busy.Acquire(v.d.ctx, 1); err == nil {
			err = v.destroy(v.d.ctx)
			v.busy.Release(1)
		}
	}
	if err != nil && v.d.ctx.Err() == nil {
		v.d.log.Error("What a VM has left is not put in order", "vm", name, "error", err)
	}
}

// hasEnded notes how the VM has ended, and gives back what it had of the host.
func (v *vm) hasEnded(ctx context.Context) error {
	err := v.unpublish(ctx)
	end, eerr := control.LastEnd(v.path(controlDir))
	if end == nil {
		err = errors.Join(err, v.d.reclaim())
		end = &control.End{Outcome: control.Failed, Error: "its process was killed", At: time.Now().UTC()}
	}
	return errors.Join(err, eerr, v.change(func(r *api.VM) {
		switch {
		case r.State == api.Removing:
			return
		case end.Outcome == control.Suspended:
			r.State, r.Error = api.Stopped, ""
		case end.Outcome == control.PoweredOff:
			r.State, r.Error = api.Exited, ""
		default:
			r.State, r.Error = api.Failed, end.Error
		}
		r.Namespace, r.PID, r.Ended, r.ExitStatus = "", 0, &end.At, end.ExitStatus
	}))
}

// runs returns the VM's process.
func (v *vm) runs() (*process, error) {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	if v.process == nil {
		return nil, fmt.Errorf("VM %s does not run: %w", v.record.Name, ErrConflict)
	}
	return v.process, nil
}

// stop suspends the VM, whose busy is held.
func (v *vm) stop(ctx context.Context) error {
	process, err := v.runs()
	if err != nil {
		return err
	}
	if err := v.change(func(r *api.VM) { r.State = api.Stopping }); err != nil {
		return err
	}
	if err := process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if err := process.awaitEnd(ctx); err != nil {
		return err
	}
	if end, err := control.LastEnd(v.path(controlDir)); err != nil || end != nil && end.Error != "" {
		return errors.Join(err, fmt.Errorf("suspend VM %s: %s", v.look().Name, end.Error))
	}
	return nil
}

// kill ends the VM at once.
func (v *vm) kill(ctx context.Context) error {
	process, err := v.runs()
	if err != nil {
		return err
	}
	if err := process.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	return process.awaitEnd(ctx)
}

// awaitEnd waits until a process of the VM has ended and that is noted.
func (p *process) awaitEnd(ctx context.Context) error {
	select {
	case <-p.noted:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// destroy removes the VM, which may run, and all that is left of it.
func (v *vm) destroy(ctx context.Context) error {
	r := v.look() // zero for one without a record
	if r.ID != "" {
		if err := v.change(func(r *api.VM) { r.State = api.Removing }); err != nil {
			return err
		}
	}
	if p, err := v.runs(); err == nil {
		if err := errors.Join(p.Signal(syscall.SIGKILL), p.awaitEnd(ctx)); err != nil {
			return err
		}
	}
	process, err := detached.Find(control.LockFile(v.path(controlDir)))
	if err != nil {
		return err
	}
	if process != nil { // the last daemon's
		err := process.Signal(syscall.SIGKILL)
		if err == nil {
			select {
			case <-process.Done():
			case <-ctx.Done():
				err = context.Cause(ctx)
			}
		}
		if err := errors.Join(err, process.Close(), v.d.reclaim()); err != nil {
			return err
		}
	}
	if err := v.unpublish(ctx); err != nil {
		return err
	}
	// The record goes last, so that the next daemon goes on.
	entries, err := os.ReadDir(v.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != recordFile {
			if err := os.RemoveAll(v.path(e.Name())); err != nil {
				return err
			}
		}
	}
	v.d.mu.Lock()
	delete(v.d.vms, r.ID)
	v.d.mu.Unlock()
	if err := errors.Join(newfile.Remove(v.path(recordFile)), os.Remove(v.dir)); err != nil {
		return err
	}
	if r.ID == "" {
		return nil
	}
	return v.d.events.add("vm.removed", &r)
}

// forgetProcess lets the VM's process go on without the daemon.
func (v *vm) forgetProcess() error {
	if v.process == nil {
		return nil
	}
	return v.process.Close()
}

package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"drafter/api"
	"drafter/internal/control"
	"drafter/internal/newfile"
	"drafter/peer"
)

// hasEnded notes how the VM has ended, and gives back what it had of the host. It is noted here, too,
// if that cannot be made durable: the next daemon finds out by itself.
func (v *vm) hasEnded(ctx context.Context) error {
	end, err := control.LastEnd(v.seat().control())
	if end == nil {
		err = errors.Join(err, v.d.reclaim())
		end = &control.End{Outcome: control.Failed, Error: "its process was killed", At: time.Now().UTC()}
	}
	if end.Outcome == control.Moved && v.look().Host == "" { // within this host, where it has ended, too
		v.takeNext()
		return errors.Join(err, v.hasEnded(ctx))
	}
	if end.Outcome != control.Moved {
		err = errors.Join(err, v.unpublish(ctx))
	}
	short, gerr := leaveGroup(v.look().Cgroup)
	err = errors.Join(err, gerr)
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	owner := v.process
	v.process = nil
	r := v.record
	if owner != nil {
		defer func() { owner.last = r }()
	}
	if r.State == api.Removing {
		return err
	}
	r.Error = ""
	if gerr == nil {
		r.Cgroup = ""
	}
	switch end.Outcome {
	case control.Suspended:
		r.State = api.Stopped
	case control.PoweredOff:
		r.State = api.Exited
	case control.Moved:
		r.State, r.PID = api.Moved, 0
		v.becomeLocked(r)
		return errors.Join(err, v.write(r))
	default:
		if short {
			end.Error = outOfMemory(r) + ": " + end.Error
		}
		r.State, r.Error = api.Failed, bounded(end.Error)
	}
	r.Namespace, r.Anchor, r.Next, r.Host = "", "", "", ""
	r.PID, r.Ended, r.ExitStatus = 0, &end.At, end.ExitStatus
	v.becomeLocked(r)
	return errors.Join(err, v.write(r))
}

func bounded(text string) string { return text[:min(len(text), mostError)] }

// removeEnded removes a VM that was to be removed at its end, unless it was started again, or removed.
func (v *vm) removeEnded() error {
	if err := v.unsettled(); err != nil {
		return fmt.Errorf("VM %s is kept: %w", v.look().Name, err)
	}
	return v.removeIf(func(api.VM) bool { return true })
}

// unsettled returns nil unless an operator must settle whose a VM is that has ended.
func (v *vm) unsettled() error {
	devices, err := peer.PackageDevices(v.packageDir(v.look()), v.seat().instance())
	if errors.Is(err, os.ErrNotExist) { // nothing has come yet
		devices, err = v.seat().state(), nil
	}
	if err != nil {
		return err
	}
	return peer.Unsettled(devices)
}

// removeIf removes the VM once nobody changes it, if it does not run then and f says so.
func (v *vm) removeIf(f func(api.VM) bool) error {
	if err := v.acquire(v.d.ctx, nil); err != nil {
		return err
	}
	defer v.release()
	v.d.mu.Lock()
	ended := v.process == nil && v.d.vms[v.record.ID] == v && f(v.record)
	v.d.mu.Unlock()
	if !ended {
		return nil
	}
	return v.destroy(v.d.ctx)
}

// stop suspends the VM, which is acquired, for a user or for the host's shutdown.
func (v *vm) stop(ctx context.Context, user bool) error {
	p, err := v.runs()
	if err != nil {
		return err
	}
	if err := v.change(func(r *api.VM) { r.State, r.UserStopped = api.Stopping, user }); err != nil {
		return err
	}
	if err := errors.Join(p.Signal(syscall.SIGTERM), p.awaitEnd(ctx)); err != nil {
		return err
	}
	name := v.look().Name
	switch end, err := control.LastEnd(v.seat().control()); {
	case err != nil:
		return err
	case end == nil:
		return fmt.Errorf("suspend VM %s: its process was killed before it was; what its memory held is lost", name)
	case end.Error != "":
		return fmt.Errorf("suspend VM %s: %s", name, end.Error)
	}
	return nil
}

// kill waits for the end of a VM that was interrupted, and is acquired.
func (v *vm) kill(ctx context.Context) error {
	p := v.owner()
	if p == nil {
		return nil // that is noted
	}
	return errors.Join(p.Signal(syscall.SIGKILL), p.awaitEnd(ctx))
}

// end ends a VM that does not start as it should.
func (v *vm) end(ctx context.Context) error {
	p := v.owner()
	if p == nil {
		return nil // it has ended by itself
	}
	return errors.Join(p.End(endPatience), p.awaitEnd(ctx))
}

// endAtOnce kills the VM's processes, if there are any, also those of the last daemon.
func (v *vm) endAtOnce(ctx context.Context) (err error) {
	if p := v.owner(); p != nil {
		err = errors.Join(p.Signal(syscall.SIGKILL), p.awaitEnd(ctx))
	}
	for moves := range v.look().Moves + 2 {
		err = errors.Join(err, v.d.endSeat(ctx, v.seatAfter(moves)))
	}
	return err
}

// destroy removes the VM, which may run, and all that is left of it.
func (v *vm) destroy(ctx context.Context) error {
	r := v.look() // zero for one without a record
	if r.ID != "" {
		if err := v.isRemoved(); err != nil {
			return err
		}
	}
	if err := v.endAtOnce(ctx); err != nil {
		return err
	}
	if err := errors.Join(v.unpublish(ctx), v.endAnchors(r)); err != nil {
		return err
	}
	for moves := range r.Moves + 2 {
		if err := v.leaveSeat(moves); err != nil {
			return err
		}
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
	if err := errors.Join(newfile.Remove(v.path(recordFile)), os.Remove(v.dir)); err != nil {
		return err
	}
	v.d.mu.Lock()
	delete(v.d.vms, r.ID)
	v.d.mu.Unlock()
	if r.ID != "" {
		v.d.events.add(removedEvent, r)
	}
	return nil
}

// isRemoved notes that the VM is removed. On a full disk that is noted by the lack of a record.
func (v *vm) isRemoved() error {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	r := v.record
	r.State = api.Removing
	v.becomeLocked(r)
	if err := v.write(r); err != nil {
		return newfile.Remove(v.path(recordFile))
	}
	return nil
}

package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"drafter/api"
	"drafter/internal/detached"
)

// recover finds the VM's process, if it lives, and else how it has ended.
func (v *vm) recover() error {
	found, err := detached.Find(v.seat().lock())
	if err != nil {
		return err
	}
	r := v.look()
	if r.Moves > 0 { // it may have left that seat when the last daemon was killed
		v.clearOnceLeft(r.Moves - 1)
	}
	switch {
	case r.State == api.Moving && r.Next != "":
		return v.recoverUpgrade(found)
	case r.State == api.Moving && found != nil:
		v.own(found)
		v.resumeMove()
		return nil
	case r.State == api.Arriving && found == nil:
		return v.hasNotArrived(v.d.ctx)
	}
	if found == nil {
		return v.recoverEnded()
	}
	v.own(found)
	// The last daemon may have been killed as it started or stopped the VM. It goes on.
	v.d.work.Go(func() {
		ctx, cancel := context.WithCancelCause(v.d.ctx)
		defer cancel(nil)
		err := v.acquire(ctx, cancel)
		if err == nil {
			defer v.release()
			if err = v.d.startNAT(ctx); err == nil {
				err = v.awaitRunning(ctx)
			}
			if err == nil && v.look().State == api.Running { // it may have been giving a copy
				_, err = withdraw(ctx, v.seat())
			}
		}
		if err != nil && ctx.Err() == nil {
			v.d.log.Error("A VM that the last daemon has started does not answer", "vm", r.Name, "error", err)
		}
	})
	return nil
}

// recoverEnded finds out how the VM has ended, which no process has.
func (v *vm) recoverEnded() (err error) {
	r := v.look()
	ended := []string{api.Stopped, api.Exited, api.Failed, api.Moved}
	if !slices.Contains(ended, r.State) {
		err = v.hasEnded(v.d.ctx)
		r = v.look()
	}
	switch {
	case r.State == api.Moved:
		if perr := v.publish(v.d.ctx); !errors.Is(perr, errEnded) {
			err = errors.Join(err, perr)
		}
		v.keepMoved()
	case r.Remove:
		if uerr := v.unsettled(); uerr != nil {
			return errors.Join(err, fmt.Errorf("it is kept: %w", uerr))
		}
		err = errors.Join(err, v.destroy(v.d.ctx))
	}
	return err
}

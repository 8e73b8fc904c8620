package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"drafter/api"
	"drafter/internal/control"
	"drafter/internal/detached"
)

// offerSocket is where a VM's process gives the VM away to one of this host.
const offerSocket = "offer"

// Upgrade replaces the process that owns a VM by one of the program that is installed now. The VM
// hardly notices.
func (d *Daemon) Upgrade(name string) (api.Operation, error) {
	return d.actOn("upgrade", name, false, func(ctx context.Context, v *vm, o *operation) error {
		return v.upgrade(ctx, o)
	})
}

// upgrade gives the VM, which is acquired, to a process in the VM's next seat.
func (v *vm) upgrade(ctx context.Context, o *operation) error {
	old, err := v.runs()
	if err == nil {
		err = v.movable()
	}
	if err != nil {
		return err
	}
	from := v.seat()
	if err := v.isUpgrading(); err != nil {
		return err
	}
	r := v.look()
	to := v.seatAfter(r.Moves + 1)
	p, err := v.receiveHere(ctx, from, to, r)
	if v.d.ctx.Err() != nil { // it goes on, and the next daemon sees to it
		if p != nil {
			err = errors.Join(err, p.Close())
		}
		return errors.Join(err, detached.ErrLeave)
	}
	if p == nil {
		return errors.Join(err, v.stays(old, r.Moves+1))
	}
	if err := errors.Join(v.succeed(p, r.Next), v.publish(ctx)); err != nil { //nolint:contextcheck // see own
		return err
	}
	if err := old.awaitEnd(ctx); err != nil { // once its successor has all
		return err
	}
	o.moved(old)
	return v.clear(r.Moves)
}

// movable refuses a VM whose program is somebody's session, which a move cuts off.
func (v *vm) movable() error {
	if r := v.look(); r.Stdin || r.TTY {
		return fmt.Errorf("VM %s runs a program for who is attached to it, which this would end: %w", r.Name, ErrConflict)
	}
	return nil
}

// isUpgrading notes that the VM moves to its next seat, and to which namespace. It moves home if it
// has left a namespace by which its clients reach it.
func (v *vm) isUpgrading() (err error) {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	next := v.record.Anchor
	if next == "" {
		if next, err = v.d.namespace(); err != nil {
			return err
		}
	}
	return v.changeLocked(func(r *api.VM) { r.State, r.Host, r.Next = api.Moving, "", next })
}

// receiveHere lets the process in a seat give the VM to one in another seat.
func (v *vm) receiveHere(ctx context.Context, from, to seat, r api.VM) (*detached.Process, error) {
	if err := to.discard(); err != nil { // of an attempt that failed
		return nil, err
	}
	if err := to.follow(from); err != nil {
		return nil, err
	}
	address := "unix:" + filepath.Join(from.control(), offerSocket)
	if _, err := offer(ctx, from, &control.OfferRequest{Address: address}); err != nil {
		return nil, err
	}
	return v.launch(ctx, r.Moves+1, r.Next, "--raddr", address)
}

// succeed makes a process in the VM's next seat, and in a namespace, the VM's, in place of the one that
// has it, which may have been killed. It is so also if it cannot be noted durably: the next daemon finds out by itself.
func (v *vm) succeed(p *detached.Process, ns string) error {
	owner := &process{Process: p, seat: v.seatAfter(v.look().Moves + 1), noted: make(chan struct{}), leave: v.d.ctx.Done()}
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	if v.process != nil {
		v.process.successor = true
	}
	v.process = owner
	r := v.record
	if len(r.Ports) > 0 && r.Anchor == "" {
		r.Anchor = r.Namespace
	}
	if r.Anchor == ns {
		r.Anchor = ""
	}
	r.State, r.PID, r.Namespace, r.Next, r.Moves = api.Running, p.PID, ns, "", r.Moves+1
	r.Error = ""
	r.Cgroup = v.d.groupPath(r.ID, r.Moves)
	v.becomeLocked(r)
	v.d.work.Go(func() { v.watch(owner) })
	return v.write(r)
}

// stays takes an upgrade back that has failed, to the seat after so many moves. The VM may have moved all
// the same, and ended since.
func (v *vm) stays(old *process, next int) error {
	ctx := v.d.ctx // also for one that was cancelled
	moved, err := withdraw(ctx, v.seat())
	if err != nil {
		return err
	}
	if !moved {
		err := v.change(func(r *api.VM) {
			if r.State == api.Moving { // and it has not ended meanwhile
				r.State = api.Running
			}
			r.Next = ""
		})
		return errors.Join(err, v.clear(next))
	}
	v.takeNext()
	return errors.Join(old.awaitEnd(ctx), v.hasEnded(ctx), v.clear(next-1))
}

// takeNextIf makes the VM's next seat the one that it has, if the VM is there. No process of either
// lives.
func (v *vm) takeNextIf(from, to seat) error {
	moved, err := from.hasMoved()
	if moved || from.discardable() == nil && to.discardable() != nil {
		v.takeNext()
	}
	return err
}

// takeNext makes the VM's next seat the one that it has.
func (v *vm) takeNext() {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	if v.process != nil {
		v.process.successor = true
	}
	r := v.record
	r.Namespace, r.Next, r.Moves = r.Next, "", r.Moves+1
	r.Cgroup = v.d.groupPath(r.ID, r.Moves)
	v.becomeLocked(r)
}

// hasSuccessor tells whether a process that has ended gave the VM to another one of this host.
func (v *vm) hasSuccessor(p *process) bool {
	v.d.mu.Lock()
	gone, upgrades := p.successor, v.record.State == api.Moving && v.record.Next != ""
	v.d.mu.Unlock()
	if !gone && upgrades {
		gone = p.end != nil && p.end.Outcome == control.Moved
	}
	return gone
}

// recoverUpgrade finds out how an upgrade stands that the last daemon was killed in. found is the
// process in the old seat, if it lives.
func (v *vm) recoverUpgrade(found *detached.Process) error {
	r := v.look()
	from, to := v.seat(), v.seatAfter(r.Moves+1)
	next, err := detached.Find(to.lock())
	if err != nil {
		return err
	}
	if found != nil {
		v.own(found)
	}
	if next == nil && found == nil {
		return errors.Join(v.takeNextIf(from, to), v.hasEnded(v.d.ctx))
	}
	v.d.begin("upgrade", r.ID, func(ctx context.Context, o *operation) error {
		if err := v.acquire(ctx, o.cancel); err != nil {
			return err
		}
		defer v.release()
		if next == nil {
			return v.stays(v.owner(), v.look().Moves+1)
		}
		return v.resumeUpgrade(ctx, found, next, r)
	})
	return nil
}

// resumeUpgrade waits for the process in the VM's next seat.
func (v *vm) resumeUpgrade(ctx context.Context, found, next *detached.Process, r api.VM) error {
	from, to, ns := v.seatAfter(r.Moves), v.seatAfter(r.Moves+1), r.Next
	_, err := awaitState(ctx, &process{Process: next}, to)
	if v.d.ctx.Err() != nil {
		return errors.Join(detached.ErrLeave, next.Close())
	}
	if err != nil {
		err = errors.Join(err, next.End(endPatience), next.Close())
		if found == nil {
			return errors.Join(err, v.takeNextIf(from, to), v.hasEnded(ctx))
		}
		return errors.Join(err, v.stays(v.owner(), v.look().Moves+1))
	}
	if err := errors.Join(v.succeed(next, ns), v.publish(ctx)); err != nil { //nolint:contextcheck // see own
		return err
	}
	if found != nil {
		if err := waitFor(ctx, found.Done()); err != nil {
			return err
		}
	}
	return v.clear(r.Moves)
}

func waitFor(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// moved notes what a move has taken from a process, which has ended.
func (o *operation) moved(from *process) {
	if from == nil || from.end == nil {
		return // it is not known
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.state.Move = &api.Moves{
		Paused: from.end.Paused, Took: from.end.Took, Sent: from.end.Sent, Saved: from.end.Saved,
	}
}

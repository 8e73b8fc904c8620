package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"drafter/api"
	"drafter/client"
	"drafter/internal/control"
	"drafter/migrate"
	"drafter/network"
	"drafter/vmm"
)

// How often a move looks how far it is, and how long a host may be silent meanwhile. While the VM is
// on its way, it does not depend on the daemons.
const (
	movePause   = 500 * time.Millisecond
	hostSilence = 30 * time.Second
)

// Move moves a VM that runs to another host.
func (d *Daemon) Move(name, to string) (api.Operation, error) {
	n, err := d.Neighbour(to)
	if err != nil {
		return api.Operation{}, err
	}
	if d.config.Listen == "" {
		return api.Operation{}, errNotListening
	}
	return d.actOn("move", name, false, func(ctx context.Context, v *vm, o *operation) error {
		return v.move(ctx, o, n)
	})
}

// move lets another host fetch the VM, which is acquired.
func (v *vm) move(ctx context.Context, o *operation, n api.Neighbour) error {
	if _, err := v.runs(); err != nil {
		return fmt.Errorf("%w; start it first", err)
	}
	if err := v.movable(); err != nil {
		return err
	}
	c, err := v.d.dial(n)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Host(ctx); err != nil {
		return fmt.Errorf("reach host %s at %s: %w", n.Name, n.Address, err)
	}
	err = v.change(func(r *api.VM) { r.State, r.Host, r.Next = api.Moving, n.Name, "" })
	if err != nil {
		return err
	}
	if err := v.beFetched(ctx, c, n); err != nil {
		return v.notMoved(err)
	}
	return v.awaitMoved(ctx, o, c, n)
}

// beFetched offers the VM to a host, and asks that to fetch it.
func (v *vm) beFetched(ctx context.Context, c *client.Client, n api.Neighbour) error {
	s := v.seat()
	authority, err := s.authority(n)
	if err != nil {
		return err
	}
	local, err := localAddress(ctx, n.Address)
	if err != nil {
		return fmt.Errorf("reach host %s: %w", n.Name, err)
	}
	a := api.Arrival{VM: v.look()}
	if a.Env, err = control.ReadEnv(s.control()); err != nil {
		return err
	}
	a.Disk, _ = usage(s.instance())
	if a.Address, err = offer(ctx, s, &control.OfferRequest{
		Address: v.d.reachable(local), Certificate: v.d.certFile(), Key: v.d.keyFile(), Authority: authority,
	}); err != nil {
		return err
	}
	if _, err := c.Arrive(ctx, a); err != nil {
		return fmt.Errorf("host %s does not take VM %s: %w", n.Name, a.VM.Name, err)
	}
	return nil
}

// localAddress is the address of this host by which it reaches another one.
func localAddress(ctx context.Context, address string) (string, error) {
	conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	return conn.LocalAddr().String(), conn.Close()
}

// awaitMoved waits until the VM has moved, or stays.
func (v *vm) awaitMoved(ctx context.Context, o *operation, c *client.Client, n api.Neighbour) error {
	r, s, old := v.look(), v.seat(), v.owner()
	heard, sent := time.Now(), int64(0)
	for {
		answer, err := arrivalAt(ctx, c, r)
		var refused *client.Error
		switch {
		case v.d.ctx.Err() != nil: // it goes on, and the next daemon sees to it
			return context.Cause(ctx)
		case ctx.Err() != nil:
			return v.notMoved(context.Cause(ctx))
		case err == nil && answer.State == api.Done:
			// The VM is there; this ends once the other host has all of it.
			if err := old.awaitEnd(context.WithoutCancel(ctx)); err != nil {
				return err
			}
			o.moved(old)
			return nil
		case err == nil && answer.State != api.Working:
			return v.notMoved(fmt.Errorf("host %s: %s", n.Name, answer.Error))
		case errors.As(err, &refused):
			return v.notMoved(fmt.Errorf("host %s: %w", n.Name, err))
		case err == nil:
			heard = time.Now()
		case v.goesOn(ctx, s, &sent): // the daemon there is not needed for that
			heard = time.Now()
		case time.Since(heard) > hostSilence:
			return v.notMoved(fmt.Errorf("host %s does not answer: %w", n.Name, err))
		}
		if old != nil && closed(old.Done()) && v.look().State == api.Moved {
			o.moved(old)
			return nil
		}
		if err := v.showMove(ctx, o, s); err != nil && ctx.Err() == nil {
			select { // its process ends, or the other host is away
			case <-ctx.Done():
			case <-time.After(movePause):
			}
		}
	}
}

// arrivalAt asks another host how far an arrival is.
func arrivalAt(ctx context.Context, c *client.Client, r api.VM) (api.Operation, error) {
	ctx, cancel := context.WithTimeout(ctx, hostSilence/2)
	defer cancel()
	return c.Arrival(ctx, r.ID, r.Moves, movePause)
}

// goesOn tells whether a move goes on without an answer of the other host's daemon: more has been sent,
// or the VM was handed over.
func (v *vm) goesOn(ctx context.Context, s seat, sent *int64) bool {
	c, err := control.Dial(ctx, s.control())
	if err != nil {
		return false
	}
	defer c.Close()
	status, err := c.Status(ctx, &control.StatusRequest{})
	if err != nil {
		return false
	}
	switch migrate.Phase(status.GetPhase()) {
	case migrate.HandingOff, migrate.InDoubt, migrate.Serving:
		return true
	}
	more := status.GetSent() != *sent
	*sent = status.GetSent()
	return more
}

// showMove tells how far a move is.
func (v *vm) showMove(ctx context.Context, o *operation, s seat) error {
	c, err := control.Dial(ctx, s.control())
	if err != nil {
		return err
	}
	defer c.Close()
	status, err := c.Status(ctx, &control.StatusRequest{})
	if err == nil && status.GetTotal() > 0 {
		o.progress("Moving", status.GetSent(), status.GetTotal())
	}
	return err
}

// notMoved takes a move back that has failed, or was cancelled. If it is too late for that, the VM has
// moved, and that is no failure.
func (v *vm) notMoved(failed error) error {
	if v.d.ctx.Err() != nil {
		return failed
	}
	ctx := v.d.ctx // also for a move that was cancelled
	old := v.owner()
	moved, err := withdraw(ctx, v.seat())
	if err != nil {
		return errors.Join(failed, err)
	}
	if moved {
		return old.awaitEnd(ctx)
	}
	// Without its source, the other host gives up by itself.
	return errors.Join(failed, v.change(func(r *api.VM) {
		if r.State == api.Moving { // and it has not ended meanwhile
			r.State, r.Host = api.Running, ""
		}
	}))
}

// resumeMove goes on with a move that the last daemon has begun.
func (v *vm) resumeMove() {
	r := v.look()
	v.d.begin("move", r.ID, func(ctx context.Context, o *operation) error {
		if err := v.acquire(ctx, o.cancel); err != nil {
			return err
		}
		defer v.release()
		if err := errors.Join(v.d.startNAT(ctx), v.publish(ctx)); err != nil {
			v.d.log.Error("The ports of a VM that moves are not published", "vm", r.Name, "error", err)
		}
		n, err := v.d.Neighbour(r.Host)
		if err != nil {
			return v.notMoved(err)
		}
		c, err := v.d.dial(n)
		if err != nil {
			return v.notMoved(err)
		}
		defer c.Close()
		return v.awaitMoved(ctx, o, c, n)
	})
}

// keepMoved keeps what is left here of a VM that has moved, for as long as its clients reach it by this
// host, and then removes it.
func (v *vm) keepMoved() {
	s := v.seat()
	v.d.work.Go(func() {
		err := s.discard()
		for pause := time.Duration(0); err == nil; pause = 2 * time.Second {
			select {
			case <-time.After(pause):
			case <-v.d.ctx.Done():
				return
			}
			var anchored bool
			if v.look().State != api.Moved { // it has come back, or was removed
				return
			}
			if anchored, err = v.anchored(); err == nil && !anchored {
				err = v.removeIf(func(r api.VM) bool { return r.State == api.Moved })
				break
			}
		}
		if err != nil && v.d.ctx.Err() == nil {
			v.d.log.Error("What a VM that has moved has left stays", "vm", v.look().Name, "error", err)
		}
	})
}

// endAnchors ends the connections of a VM that has moved, and that go on by this host.
func (v *vm) endAnchors(r api.VM) error {
	if r.State != api.Moved && r.State != api.Removing {
		return nil
	}
	anchors, err := network.Anchors()
	for _, a := range anchors {
		if a.Netns == r.Namespace || a.Netns == r.Anchor {
			err = errors.Join(err, a.End())
		}
	}
	return err
}

// anchored tells whether clients reach the VM, which is elsewhere, by a namespace of this host.
func (v *vm) anchored() (bool, error) {
	anchors, err := network.Anchors()
	if err != nil {
		return false, err
	}
	r := v.look()
	for _, a := range anchors {
		if a.Netns == r.Namespace || a.Netns == r.Anchor {
			return true, nil
		}
	}
	return false, nil
}

// packageID tells a package from others with the same key: the machine's state, which it holds, is that
// of one moment.
func packageID(dir string) (string, error) {
	h := sha256.New()
	for _, name := range []string{vmm.Config, vmm.State} {
		f, err := os.Open(filepath.Join(dir, vmm.PackageFile(name)))
		if err != nil {
			return "", fmt.Errorf("identify package: %w", err)
		}
		_, err = io.Copy(h, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return "", fmt.Errorf("identify package: %w", err)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

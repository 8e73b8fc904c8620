package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"drafter/internal/control"
	"drafter/internal/detached"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/peer"
	"drafter/vmm"
)

// seat is a directory of a VM for one process that owns it. A VM that moves has another one after.
type seat string

func (s seat) control() string  { return filepath.Join(string(s), "control") }
func (s seat) instance() string { return filepath.Join(string(s), "instance") }
func (s seat) log() string      { return filepath.Join(string(s), "process.log") }
func (s seat) lock() string     { return control.LockFile(s.control()) }

// seat is the one that the VM has.
func (v *vm) seat() seat { return v.seatAfter(v.look().Moves) }

// seatAfter is the one that the VM has after so many moves.
func (v *vm) seatAfter(moves int) seat { return seat(v.path(strconv.Itoa(moves))) }

// lastWords is why the seat's process says that it has ended.
func (s seat) lastWords() string {
	end, err := control.LastEnd(s.control())
	switch {
	case err != nil:
		return err.Error()
	case end == nil:
		return "see " + s.log()
	}
	return end.Error
}

// follow copies what the next process of a VM must know of the last one: the environment of the
// VM's service, and what that has printed.
func (s seat) follow(last seat) error {
	if err := private.MkdirAll(s.control()); err != nil {
		return err
	}
	files := append(control.LogFiles(last.control()), control.EnvFile(last.control()))
	for _, path := range files {
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = newfile.WriteBytes(filepath.Join(s.control(), filepath.Base(path)), b)
		}
		if err != nil {
			return fmt.Errorf("copy what a VM's process has noted: %w", err)
		}
	}
	return nil
}

// state is the state device of the seat's instance. The package's files are not looked at.
func (s seat) state() []peer.Device {
	return peer.NewPackageDevices([]string{vmm.State}, filepath.Join(string(s), "none"), s.instance())
}

// discardable returns nil for a seat that has nothing of a VM.
func (s seat) discardable() error { return peer.Discardable(s.state()) }

// discard removes a seat that has nothing of a VM, since that is elsewhere. One that has is refused.
func (s seat) discard() error {
	if err := s.discardable(); err != nil {
		return err
	}
	return os.RemoveAll(string(s))
}

// clear removes the seat that the VM had, or was to have, after so many moves, with its group.
func (v *vm) clear(moves int) error {
	return errors.Join(v.leaveSeat(moves), v.seatAfter(moves).discard())
}

// clearOnceLeft is clear for a seat whose process may still send what the VM's lacks.
func (v *vm) clearOnceLeft(moves int) {
	v.d.work.Go(func() {
		p, err := detached.Find(v.seatAfter(moves).lock())
		if p != nil {
			err = errors.Join(waitFor(v.d.ctx, p.Done()), p.Close())
		}
		if err == nil {
			err = v.clear(moves)
		}
		if err != nil && v.d.ctx.Err() == nil {
			v.d.log.Error("What a VM has left behind as it moved stays", "vm", v.look().Name, "error", err)
		}
	})
}

// offer makes a seat's VM migratable, and returns where.
func offer(ctx context.Context, s seat, r *control.OfferRequest) (string, error) {
	c, err := control.Dial(ctx, s.control())
	if err != nil {
		return "", err
	}
	defer c.Close()
	answer, err := c.Offer(ctx, r)
	if err != nil {
		return "", fmt.Errorf("make the VM migratable: %w", err)
	}
	return answer.GetAddress(), nil
}

// withdraw ends that, and tells whether the VM has moved.
func withdraw(ctx context.Context, s seat) (moved bool, err error) {
	c, err := control.Dial(ctx, s.control())
	if err == nil {
		defer c.Close()
		var answer *control.WithdrawResponse
		if answer, err = c.Withdraw(ctx, &control.WithdrawRequest{}); err == nil {
			return answer.GetMoved(), nil
		}
	}
	p, ferr := detached.Find(s.lock())
	if ferr != nil {
		return false, errors.Join(err, ferr)
	}
	if p != nil { // it ends
		ctx, cancel := context.WithTimeout(ctx, endPatience)
		defer cancel()
		if werr := errors.Join(waitFor(ctx, p.Done()), p.Close()); werr != nil {
			return false, errors.Join(err, werr)
		}
	}
	return s.hasMoved()
}

// hasMoved tells whether the VM of a seat whose process has ended is elsewhere.
func (s seat) hasMoved() (bool, error) {
	end, err := control.LastEnd(s.control())
	return end != nil && end.Outcome == control.Moved, err
}

// endSeat kills the process that a seat has, if there is one.
func (d *Daemon) endSeat(ctx context.Context, s seat) error {
	p, err := detached.Find(s.lock())
	if p == nil || err != nil {
		return err
	}
	if err = p.Signal(syscall.SIGKILL); err == nil {
		select {
		case <-p.Done():
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	return errors.Join(err, p.Close(), d.reclaim())
}

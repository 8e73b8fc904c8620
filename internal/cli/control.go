package cli

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"drafter/agent"
	"drafter/internal/control"
	"drafter/peer"
)

// controlled is a VM's process, as 'drafter daemon' sees it. Without a control directory it does
// nothing.
type controlled struct {
	server  *control.Server           // nil without a directory
	vm      atomic.Pointer[peer.Peer] // once it runs
	outcome string                    // of a VM that ran

	dir     string
	suspend context.CancelFunc
	work    sync.WaitGroup // keeps what the VM's service prints, and starts one that is held
	endWork context.CancelFunc
	offers  chan offer    // asks the VM's owner to let a target have it, or no longer
	ended   chan struct{} // closed when nobody answers offers any more
	exited  *int          // status of the service
	logErr  error
	heldErr error
}

// control takes a control directory. The context ends when somebody asks for the VM's suspend.
func newControlled(ctx context.Context, dir string) (*controlled, context.Context, error) {
	if dir == "" {
		return &controlled{}, ctx, nil
	}
	ctx, suspend := context.WithCancel(ctx)
	c := &controlled{dir: dir, suspend: suspend, offers: make(chan offer), ended: make(chan struct{})}
	var err error
	if c.server, err = control.Serve(dir, suspend, c.guest); err != nil {
		suspend()
		return nil, ctx, err
	}
	return c, ctx, nil
}

// guest is the connection with the guest's agent, if there is one.
func (c *controlled) guest() *agent.Client {
	if vm := c.vm.Load(); vm != nil {
		return vm.Agent()
	}
	return nil
}

// running says that the VM runs, once its service does.
func (c *controlled) running(vm *peer.Peer) {
	if c.server == nil {
		notifyReady()
		return
	}
	c.vm.Store(vm)
	c.server.SetMover(c)
	if err := c.server.Measure(vm.Metrics()); err != nil {
		slog.Error("There are no metrics of the VM", "error", err)
	}
	why := ""
	if booted := vm.Booted(); booted != nil {
		why = booted.Error()
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.endWork = cancel
	c.work.Go(func() {
		if c.exited, c.logErr = control.Log(ctx, c.dir, c.guest, slog.Default()); c.logErr != nil {
			slog.Error("What the VM's service prints is not kept any more", "error", c.logErr)
		}
	})
	c.work.Go(func() {
		c.heldErr = control.Release(ctx, c.dir, c.guest, func() {
			c.server.Set(control.Running, why)
			notifyReady()
		})
		if c.heldErr != nil {
			c.suspend() // nobody could use it
		}
	})
}

// answerNoMore says that nobody runs the VM any more who could offer it.
func (c *controlled) answerNoMore() {
	if c.server != nil {
		close(c.ended)
	}
}

// ending says that the VM ends, and how if nothing fails.
func (c *controlled) ending(outcome string) {
	c.outcome = outcome
	if c.server != nil {
		c.server.Set(control.Ending, "")
	}
}

// close notes how the VM has ended.
func (c *controlled) close(err error) error {
	if c.server == nil {
		return nil
	}
	if c.endWork != nil {
		c.endWork()
		c.work.Wait()
	}
	err = errors.Join(err, c.heldErr)
	end := control.End{Outcome: cmp.Or(c.outcome, control.Failed), At: time.Now().UTC(), ExitStatus: c.exited}
	if stats, ok := c.Stats(); ok && c.outcome == control.Moved {
		_, saved, _ := stats.Bytes()
		end.Paused, end.Took, end.Sent, end.Saved = stats.Paused, stats.Total, stats.Wire, saved
	}
	if err != nil {
		end.Error = err.Error()
		if c.outcome != control.Moved {
			end.Outcome = control.Failed
		}
	}
	return errors.Join(c.heldErr, c.logErr, c.server.Close(end))
}

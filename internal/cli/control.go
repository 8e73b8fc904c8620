package cli

import (
	"cmp"
	"context"
	"time"

	"drafter/internal/control"
)

// controlled is a VM's process, as 'drafter daemon' sees it. Without a control directory it does
// nothing.
type controlled struct {
	server  *control.Server // nil without a directory
	outcome string          // of a VM that ran
}

// control takes a control directory. The context ends when somebody asks for the VM's suspend.
func newControlled(ctx context.Context, dir string) (*controlled, context.Context, error) {
	if dir == "" {
		return &controlled{}, ctx, nil
	}
	ctx, suspend := context.WithCancel(ctx)
	server, err := control.Serve(dir, suspend)
	if err != nil {
		suspend()
		return nil, ctx, err
	}
	return &controlled{server: server}, ctx, nil
}

// running says that the VM runs. booted is why it is not resumed; nil if it is.
func (c *controlled) running(booted error) {
	notifyReady()
	if c.server == nil {
		return
	}
	why := ""
	if booted != nil {
		why = booted.Error()
	}
	c.server.Set(control.Running, why)
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
	end := control.End{Outcome: cmp.Or(c.outcome, control.Failed), At: time.Now().UTC()}
	if err != nil {
		end.Error = err.Error()
		if c.outcome != control.Moved {
			end.Outcome = control.Failed
		}
	}
	return c.server.Close(end)
}

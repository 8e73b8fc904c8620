package daemon

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"syscall"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"drafter/agent"
	"drafter/api"
	"drafter/internal/control"
)

type (
	waitInput struct {
		VM   string `path:"vm" doc:"Name, ID, or the beginning of an ID"`
		Wait int64  `query:"wait" minimum:"0" maximum:"60000" doc:"Milliseconds to wait for its end"`
	}
	renameInput struct {
		VM   string `path:"vm" doc:"Name, ID, or the beginning of an ID"`
		Body api.Rename
	}
	restartInput struct {
		VM   string `path:"vm" doc:"Name, ID, or the beginning of an ID"`
		Time int64  `query:"time" minimum:"0" maximum:"3600" default:"30" doc:"Seconds that its guest has to shut down, before the VM is killed"`
	}
)

// describeLife registers what VMs do beside starting and stopping.
func describeLife(a huma.API, d *Daemon) {
	work(a, http.MethodPost, "/v1/host/shutdown", "shutdown",
		"Suspend all VMs, for the host's shutdown. VMs with a restart policy go on when the daemon has started again",
		func(*struct{}) (api.Operation, error) {
			return d.Shutdown(), nil
		})
	get(a, "/v1/vms/{vm}/wait", "wait", "Tell of a VM when it has ended, or after a time",
		func(ctx context.Context, in *waitInput) (api.VM, error) {
			return d.awaitEnd(ctx, in.VM, time.Duration(in.Wait)*time.Millisecond)
		})
	huma.Register(a, endpoint(http.MethodPost, "/v1/vms/{vm}/rename", "rename", "Give a VM another name"),
		func(_ context.Context, in *renameInput) (*body[api.VM], error) {
			vm, err := d.Rename(in.VM, in.Body.Name)
			return &body[api.VM]{vm}, problem(err)
		})
	work(a, http.MethodPost, "/v1/vms/{vm}/restart", "restart",
		"Shut a VM's guest down, and boot it again from its disks",
		func(in *restartInput) (api.Operation, error) {
			return d.Restart(in.VM, time.Duration(in.Time)*time.Second)
		})
}

// awaitEnd returns a VM as it was when it ended, or as it is when the time is over.
func (d *Daemon) awaitEnd(ctx context.Context, name string, wait time.Duration) (api.VM, error) {
	d.mu.Lock()
	v, err := d.find(name)
	d.mu.Unlock()
	if err != nil {
		return api.VM{}, err
	}
	timeout := time.After(wait)
	for {
		_, _, more := d.events.after(-1) // before the state is read
		d.mu.Lock()
		r, p := v.record, v.process
		d.mu.Unlock()
		var noted <-chan struct{}
		switch {
		case p != nil:
			more, noted = nil, p.noted
		case !slices.Contains([]string{api.Creating, api.Starting, api.Arriving}, r.State):
			return r, nil
		}
		select {
		case <-noted:
			if p.last.ID != "" { // else another process has the VM
				return p.last, nil
			}
		case <-more:
		case <-timeout:
			return r, nil
		case <-ctx.Done():
			return r, context.Cause(ctx)
		case <-d.ctx.Done():
			return r, errDaemonEnds
		}
	}
}

const renamedEvent = "vm.renamed"

// Rename gives a VM another name.
func (d *Daemon) Rename(name, to string) (api.VM, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, err := d.find(name)
	if err != nil {
		return api.VM{}, err
	}
	if v.record.State == api.Removing {
		return api.VM{}, fmt.Errorf("VM %s is removed: %w", name, ErrConflict)
	}
	if v.record.Name == to {
		return v.record, nil
	}
	if err := d.nameFree(to); err != nil {
		return api.VM{}, err
	}
	if err := v.changeLocked(func(r *api.VM) { r.Name = to }); err != nil {
		return api.VM{}, err
	}
	d.events.add(renamedEvent, v.record)
	return v.record, nil
}

// nameFree refuses a name that no VM can have, or one has, with d.mu held.
func (d *Daemon) nameFree(name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("the name %q must have 1 to 63 lower-case letters, digits and hyphens: %w", name, ErrInvalid)
	}
	if d.nameTaken(name) {
		return fmt.Errorf("the name %s is in use: %w; remove that VM ('drafter rm %s'), or choose another name", name, ErrConflict, name)
	}
	return nil
}

func (d *Daemon) nameTaken(name string) bool {
	for id, v := range d.vms {
		if v.record.Name == name || id == name {
			return true
		}
	}
	return false
}

// Restart shuts a VM's guest down, if it runs, and boots it from its disks. A guest that takes longer
// than patience is ended as by a power cut.
func (d *Daemon) Restart(name string, patience time.Duration) (api.Operation, error) {
	return d.act("restart", name, false, func(ctx context.Context, v *vm) error {
		if p := v.owner(); p != nil {
			if err := v.change(func(r *api.VM) { r.State = api.Stopping }); err != nil {
				return err
			}
			if err := v.shutDown(ctx, p, patience); err != nil {
				return err
			}
		}
		return v.start(ctx, "--boot")
	})
}

// shutDown has a VM's guest power itself off. One that does not do so in time is killed.
func (v *vm) shutDown(ctx context.Context, p *process, patience time.Duration) error {
	within, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := v.powerOff(within)
	if err == nil {
		select {
		case <-p.noted:
			return nil
		case <-within.Done():
			err = fmt.Errorf("not done after %s", patience)
		}
	}
	if ctx.Err() != nil { // the patience is not over
		return context.Cause(ctx)
	}
	v.d.log.Warn("A guest does not shut down; its VM is killed", "vm", v.look().Name, "error", err)
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	return p.awaitEnd(ctx)
}

// powerOff tells the guest's init to end its service and power off.
func (v *vm) powerOff(ctx context.Context) error {
	guest, err := control.Guest(ctx, v.seat().control())
	if err != nil {
		return err
	}
	defer guest.Close()
	defer context.AfterFunc(ctx, func() { guest.Close() })() // one that hangs answers nothing
	s, err := guest.Run(ctx, agent.Command{Args: []string{"poweroff"}, System: true})
	if err != nil {
		return err
	}
	if status, err := s.Wait(); err == nil && status != 0 {
		return fmt.Errorf("poweroff ended with status %d", status)
	}
	return nil // the guest may have ended before it could say more
}

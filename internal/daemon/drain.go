package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"sync"

	"drafter/api"
	"drafter/client"
	"drafter/internal/newfile"
	"drafter/internal/private"
)

// On a host that is drained no VM starts. It remembers which VMs it has given to which host, until they
// are back.

var errDrained = fmt.Errorf("this host is drained: %w; 'drafter undrain' ends that", ErrConflict)

func (d *Daemon) drainFile() string { return d.dir("host", "drained") }
func (d *Daemon) awayFile() string  { return d.dir("host", "away.json") }

func (d *Daemon) drained() bool { return exists(d.drainFile()) }

// Drain moves all VMs that run to other hosts, each to the one with the most memory free, and lets
// none start here.
func (d *Daemon) Drain(parallel int) (api.Operation, error) {
	all, err := d.Neighbours()
	if err != nil {
		return api.Operation{}, err
	}
	if len(all) == 0 {
		return api.Operation{}, fmt.Errorf("there is no other host: %w; add one with 'drafter host add'", ErrConflict)
	}
	d.drainMu.Lock()
	defer d.drainMu.Unlock()
	if !d.drained() {
		if err := newfile.WriteBytes(d.drainFile(), nil); err != nil {
			return api.Operation{}, fmt.Errorf("note that the host is drained: %w", err)
		}
	}
	return d.begin("drain", "", func(ctx context.Context, o *operation) error {
		var running []api.VM
		for _, vm := range d.VMs() {
			if vm.State == api.Running || vm.State == api.Starting {
				running = append(running, vm)
			}
		}
		return d.each(ctx, o, "Moving VMs", parallel, running, func(ctx context.Context, vm api.VM) error {
			return d.moveAway(ctx, vm, all)
		})
	}), nil
}

// each calls f for VMs, some of them at a time. A VM for which it fails does not keep the others.
func (d *Daemon) each(
	ctx context.Context, o *operation, step string, parallel int, vms []api.VM, f func(context.Context, api.VM) error,
) error {
	var mu sync.Mutex
	var errs []error
	done := int64(0)
	o.progress(step, 0, int64(len(vms)))
	var wait sync.WaitGroup
	places := make(chan struct{}, max(1, parallel))
	for _, vm := range vms {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
		wait.Go(func() {
			defer func() { <-places }()
			err := f(ctx, vm)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, fmt.Errorf("VM %s: %w", vm.Name, err))
				return
			}
			done++
			o.progress(step, done, int64(len(vms)))
		})
	}
	wait.Wait()
	return errors.Join(append(errs, context.Cause(ctx))...)
}

// moveAway moves a VM to the host that has the most memory free and takes it.
func (d *Daemon) moveAway(ctx context.Context, vm api.VM, all []api.Neighbour) error {
	type candidate struct {
		api.Neighbour
		free int64
	}
	var candidates []candidate
	var errs []error
	for _, n := range all {
		c, err := d.dial(n)
		if err == nil {
			var h api.Host
			h, err = c.Host(ctx)
			c.Close()
			if err == nil && !h.Drained {
				candidates = append(candidates, candidate{n, h.MemoryFree})
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("host %s: %w", n.Name, err))
		}
	}
	slices.SortStableFunc(candidates, func(a, b candidate) int { return int(min(max(b.free-a.free, -1), 1)) })
	for _, c := range candidates {
		o, err := d.Move(vm.ID, c.Name) //nolint:contextcheck // await cancels it
		if err == nil {
			err = d.await(ctx, o.ID)
		}
		if err == nil {
			return d.noteAway(vm.ID, c.Name)
		}
		if now, _ := d.VM(vm.ID); now.ID == "" || now.State == api.Moved {
			return nil // somebody else was faster
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	if len(errs) == 0 {
		errs = append(errs, errors.New("all other hosts are drained"))
	}
	return errors.Join(errs...)
}

// await waits for an operation, and cancels it when ctx ends.
func (d *Daemon) await(ctx context.Context, id string) error {
	d.mu.Lock()
	o := d.operations[id]
	d.mu.Unlock()
	select {
	case <-o.done:
	case <-ctx.Done():
		o.cancel(errCancelled)
		<-o.done
	}
	if s := o.look(); s.State != api.Done {
		return errors.New(s.Error)
	}
	return nil
}

// noteAway notes at which host a VM is that was moved away; "" for one that is not away any more.
func (d *Daemon) noteAway(id, host string) error {
	d.drainMu.Lock()
	defer d.drainMu.Unlock()
	away, err := d.away()
	if err != nil {
		return err
	}
	if delete(away, id); host != "" {
		away[id] = host
	}
	b, err := json.Marshal(away)
	if err == nil {
		err = newfile.WriteBytes(d.awayFile(), b)
	}
	if err != nil {
		return fmt.Errorf("note where a VM is: %w", err)
	}
	return nil
}

// away returns the hosts of VMs that were moved away, by the VMs' IDs.
func (d *Daemon) away() (map[string]string, error) {
	away := map[string]string{}
	b, err := private.ReadFile(d.awayFile(), 1<<20)
	if errors.Is(err, os.ErrNotExist) {
		return away, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &away)
	}
	if err != nil {
		return nil, fmt.Errorf("read where VMs are: %w", err)
	}
	return away, nil
}

// Undrain lets VMs start here again, and brings those back that the drain has moved away. One that
// cannot come back now does at the next Undrain.
func (d *Daemon) Undrain() (api.Operation, error) {
	d.drainMu.Lock()
	defer d.drainMu.Unlock()
	away, err := d.away()
	if err == nil && len(away) == 0 && !d.drained() {
		err = fmt.Errorf("this host is not drained: %w", ErrConflict)
	}
	if err == nil {
		err = newfile.Remove(d.drainFile())
	}
	if err != nil {
		return api.Operation{}, err
	}
	var vms []api.VM
	for id, host := range away {
		vms = append(vms, api.VM{ID: id, Name: id, Host: host})
	}
	return d.begin("undrain", "", func(ctx context.Context, o *operation) error {
		return d.each(ctx, o, "Bringing VMs back", 1, vms, d.bringBack)
	}), nil
}

// giveBack moves a VM to the host from which it has come, and which asks for it.
func (d *Daemon) giveBack(id string, to api.Neighbour) (api.Operation, error) {
	if vm, err := d.VM(id); err != nil || vm.ID != id || vm.From != to.Name {
		return api.Operation{}, fmt.Errorf("no VM %s is here that has come from host %s: %w", id, to.Name, ErrForbidden)
	}
	o, err := d.Move(id, to.Name)
	if err == nil {
		d.mu.Lock()
		d.operations[o.ID].isFor(to.Name)
		d.mu.Unlock()
	}
	return o, err
}

// bringBack lets another host move a VM to here.
func (d *Daemon) bringBack(ctx context.Context, vm api.VM) error {
	n, err := d.Neighbour(vm.Host)
	if err != nil {
		return err
	}
	c, err := d.dial(n)
	if err != nil {
		return err
	}
	defer c.Close()
	o, err := c.Return(ctx, vm.ID)
	var refused *client.Error
	if errors.As(err, &refused) && refused.Status == http.StatusForbidden { // it is not there any more
		return errors.Join(err, d.noteAway(vm.ID, ""))
	}
	if err != nil {
		return err
	}
	_, err = c.Await(ctx, o, nil)
	if ctx.Err() != nil {
		return errors.Join(context.Cause(ctx), c.Cancel(context.WithoutCancel(ctx), o.ID))
	}
	if err == nil {
		err = d.noteAway(vm.ID, "")
	}
	return err
}

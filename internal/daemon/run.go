package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"

	"drafter/api"
	"drafter/internal/control"
)

var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Run makes a VM of an image and starts it.
func (d *Daemon) Run(r api.Run) (api.Operation, error) {
	for i := range r.Ports {
		p := &r.Ports[i]
		p.Protocol = cmp.Or(p.Protocol, "tcp")
		if p.Address != "" && net.ParseIP(p.Address) == nil {
			return api.Operation{}, fmt.Errorf("port %d: %q is no address of this host: %w", p.Host, p.Address, ErrInvalid)
		}
	}
	for _, e := range r.Env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" || strings.ContainsRune(e, 0) {
			return api.Operation{}, fmt.Errorf("a variable of the environment is not of the form NAME=value: %w", ErrInvalid) // it may be a secret
		}
	}
	if r.Memory != 0 && r.Memory < 64<<20 {
		return api.Operation{}, fmt.Errorf("a VM needs 64 MiB of memory or more: %w", ErrInvalid)
	}
	v, err := d.create(r)
	if err != nil {
		return api.Operation{}, err
	}
	if err := v.busy.Acquire(d.ctx, 1); err != nil {
		return api.Operation{}, err
	}
	return d.begin("run", v.look().ID, func(ctx context.Context, o *operation) error {
		defer v.busy.Release(1)
		key, digest, err := d.template(ctx, r, o)
		if err == nil {
			err = v.change(func(r *api.VM) { r.Package, r.Digest = key, digest })
		}
		if err == nil && len(r.Env) > 0 {
			err = control.WriteEnv(v.path(controlDir), r.Env)
		}
		if err == nil {
			o.progress("Starting", 0, 1)
			err = v.start(ctx)
		}
		if err != nil {
			return errors.Join(err, v.destroy(context.WithoutCancel(ctx)))
		}
		o.progress("Starting", 1, 1)
		return nil
	}), nil
}

// create records a new VM.
func (d *Daemon) create(r api.Run) (*vm, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := r.Name
	taken := func(name string) bool {
		for id, v := range d.vms {
			if v.record.Name == name || id == name {
				return true
			}
		}
		return false
	}
	if name == "" {
		base := baseName(r.Image)
		name = base
		for i := 2; taken(name); i++ {
			name = fmt.Sprint(base, "-", i)
		}
	}
	switch {
	case !namePattern.MatchString(name):
		return nil, fmt.Errorf("the name %q must have 1 to 63 lower-case letters, digits and hyphens: %w", name, ErrInvalid)
	case taken(name):
		return nil, fmt.Errorf("the name %s is in use: %w; remove that VM ('drafter rm %s'), or choose another --name", name, ErrConflict, name)
	}
	if err := d.portsFree(r.Ports); err != nil {
		return nil, err
	}
	id := strings.ReplaceAll(uuid.NewString(), "-", "")[:12]
	v := d.newVM(id)
	if err := os.Mkdir(v.dir, 0o700); err != nil {
		return nil, fmt.Errorf("create VM: %w", err)
	}
	err := v.changeLocked(func(n *api.VM) {
		*n = api.VM{
			ID: id, Name: name, Image: r.Image, Command: r.Command, State: api.Creating, Ports: r.Ports, Memory: cmp.Or(r.Memory, 1<<30), CPUs: cmp.Or(r.CPUs, 1),
			Remove: r.Remove, Labels: r.Labels, Created: time.Now().UTC(),
		}
	})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(v.dir))
	}
	d.vms[id] = v
	return v, nil
}

// baseName is the last part of an image's reference, as far as a VM can have that name.
func baseName(ref string) string {
	_, name, ok := strings.Cut(ref, ":")
	if !ok {
		name = ref
	}
	name, _, _ = strings.Cut(path.Base(name), "@")
	name, _, _ = strings.Cut(name, ":")
	name = strings.Trim(regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(name), "-"), "-")
	if len(name) > 50 {
		name = strings.Trim(name[:50], "-")
	}
	return cmp.Or(name, "vm")
}

// portsFree refuses ports that another VM has published, with d.mu held.
func (d *Daemon) portsFree(ports []api.Port) error {
	for _, v := range d.vms {
		for _, a := range v.record.Ports {
			for _, b := range ports {
				if a.Host == b.Host && a.Protocol == b.Protocol && (a.Address == b.Address || a.Address == "" || b.Address == "") {
					return fmt.Errorf("port %d/%s is VM %s's: %w; choose another, or remove that VM", b.Host, b.Protocol, v.record.Name, ErrConflict)
				}
			}
		}
	}
	return nil
}

// act begins an operation that changes a VM.
func (d *Daemon) act(kind, name string, f func(context.Context, *vm) error) (api.Operation, error) {
	d.mu.Lock()
	v, err := d.find(name)
	d.mu.Unlock()
	if err != nil {
		return api.Operation{}, err
	}
	id := v.look().ID
	return d.begin(kind, id, func(ctx context.Context, _ *operation) error {
		if err := v.busy.Acquire(ctx, 1); err != nil { // after the one that changes it now
			return err
		}
		defer v.busy.Release(1)
		d.mu.Lock()
		there := d.vms[id] == v
		d.mu.Unlock()
		if !there {
			return fmt.Errorf("VM %s was removed: %w", name, ErrNotFound)
		}
		return f(ctx, v)
	}), nil
}

// Start starts a VM: it is resumed if it can be, else it boots from its disks.
func (d *Daemon) Start(name string) (api.Operation, error) {
	return d.act("start", name, func(ctx context.Context, v *vm) error { return v.start(ctx) })
}

// Stop suspends a VM.
func (d *Daemon) Stop(name string) (api.Operation, error) {
	return d.act("stop", name, func(ctx context.Context, v *vm) error { return v.stop(ctx) })
}

// Kill ends a VM as a power cut does. Its disks hold what its guest has synced.
func (d *Daemon) Kill(name string) (api.Operation, error) {
	return d.act("kill", name, func(ctx context.Context, v *vm) error { return v.kill(ctx) })
}

// Remove removes a VM and all that it has written. One that runs is refused without force.
func (d *Daemon) Remove(name string, force bool) (api.Operation, error) {
	return d.act("remove", name, func(ctx context.Context, v *vm) error {
		if _, err := v.runs(); err == nil && !force {
			return fmt.Errorf("VM %s runs: %w; stop it ('drafter stop %s'), or remove it with --force", name, ErrConflict, name)
		}
		return v.destroy(ctx)
	})
}

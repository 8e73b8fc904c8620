package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/google/uuid"

	"drafter/api"
	"drafter/internal/control"
	"drafter/network"
)

var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Run makes a VM of an image and starts it.
func (d *Daemon) Run(r api.Run) (api.Operation, error) {
	if err := checkRun(&r); err != nil {
		return api.Operation{}, err
	}
	if err := d.checkSize(&r); err != nil {
		return api.Operation{}, err
	}
	if _, err := d.Package(r.Image); errors.Is(err, ErrNotFound) {
		r.Image = imageReference(r.Image)
	}
	v, err := d.create(r)
	if err != nil {
		return api.Operation{}, err
	}
	return d.begin("run", v.look().ID, func(ctx context.Context, o *operation) error {
		defer v.release()
		v.d.mu.Lock()
		v.cancel = o.cancel
		v.d.mu.Unlock()
		err := d.run(ctx, v, r, o)
		if err != nil && d.ctx.Err() == nil { // else the next daemon sees to it
			err = errors.Join(err, v.destroy(context.WithoutCancel(ctx)))
		}
		return err
	}), nil
}

// checkRun refuses what can never be run, and fills in defaults.
func checkRun(r *api.Run) error {
	for i := range r.Ports {
		if err := checkPort(&r.Ports[i]); err != nil {
			return fmt.Errorf("port %d: %w: %w", r.Ports[i].Host, err, ErrInvalid)
		}
		if other := conflicting(r.Ports[:i], r.Ports[i]); other != nil {
			return fmt.Errorf("port %d/%s is published twice: %w", other.Host, other.Protocol, ErrInvalid)
		}
	}
	size := 0
	for _, e := range r.Env {
		size += len(e)
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" || strings.ContainsRune(e, 0) {
			return fmt.Errorf("a variable of the environment is not of the form NAME=value: %w", ErrInvalid) // it may be a secret
		}
	}
	if size > mostRecord {
		return fmt.Errorf("the environment has %d bytes; it may have %d: %w", size, mostRecord, ErrInvalid)
	}
	if err := checkProgram(r); err != nil {
		return fmt.Errorf("%w: %w", err, ErrInvalid)
	}
	if err := checkPolicy(r); err != nil {
		return fmt.Errorf("%w: %w", err, ErrInvalid)
	}
	if r.Memory != 0 && r.Memory < 64<<20 {
		return fmt.Errorf("a VM needs 64 MiB of memory or more: %w", ErrInvalid)
	}
	return nil
}

// checkPort refuses a port that no host can publish. An unspecified address stands for all of them.
func checkPort(p *api.Port) error {
	p.Protocol = cmp.Or(p.Protocol, "tcp")
	addr := netip.IPv4Unspecified()
	if p.Address != "" {
		var err error
		if addr, err = netip.ParseAddr(p.Address); err != nil {
			return fmt.Errorf("%q is no IP address", p.Address)
		}
		addr = addr.Unmap()
		if p.Address = addr.String(); addr.IsUnspecified() {
			p.Address = ""
		}
	}
	if p.Address == "" {
		addr = netip.AddrFrom4([4]byte{127, 0, 0, 1}) // one of them
	}
	return network.PortForward{
		InternalPort: strconv.Itoa(p.Guest), Protocol: p.Protocol, ExternalAddr: netip.AddrPortFrom(addr, uint16(p.Host)).String(),
	}.Check()
}

// conflicting returns the port among others that cannot be published beside p.
func conflicting(others []api.Port, p api.Port) *api.Port {
	for _, o := range others {
		if o.Host == p.Host && o.Protocol == p.Protocol && (o.Address == p.Address || o.Address == "" || p.Address == "") {
			return &o
		}
	}
	return nil
}

func (d *Daemon) run(ctx context.Context, v *vm, r api.Run, o *operation) error {
	p, done, err := d.usePackage(r.Image, true)
	named := !errors.Is(err, ErrNotFound)
	if !named {
		p, done, err = d.template(ctx, r, o)
	}
	if err != nil {
		return err
	}
	defer done() // its record says then that the VM needs it
	env := r.Env
	if named || p.Source != api.FromImage {
		if err := p.fits(r); err != nil {
			return err
		}
	}
	if p.Source == api.FromSnapshot {
		if env, err = control.ReadEnv(d.packageDir(p.Key)); err != nil {
			return err
		}
	}
	id, err := packageID(d.packageDir(p.Key))
	if err != nil {
		return err
	}
	if err := v.change(func(vm *api.VM) {
		vm.Package, vm.PackageID, vm.Digest = p.Key, id, p.Digest
		vm.Memory, vm.CPUs = cmp.Or(p.Memory, vm.Memory), cmp.Or(p.CPUs, vm.CPUs)
	}); err != nil {
		return err
	}
	if p.Held || len(env) > 0 {
		if err := control.WriteEnv(v.seat().control(), env); err != nil {
			return err
		}
	}
	o.progress("Starting", 0, 1)
	if err := v.start(ctx); err != nil {
		return err
	}
	o.progress("Starting", 1, 1)
	return nil
}

// fits refuses a run that wants another VM than the one in the package.
func (p *stored) fits(r api.Run) error {
	what := ""
	switch {
	case r.Memory != 0 && r.Memory != p.Memory:
		what = fmt.Sprintf("has a VM with %s of memory", humanize.IBytes(uint64(p.Memory)))
	case r.CPUs != 0 && r.CPUs != p.CPUs:
		what = fmt.Sprintf("has a VM with %d CPUs", p.CPUs)
	case len(r.Command) > 0:
		what = "has a service, which takes no other command"
	case len(r.Env) > 0 && (!p.Held || p.Source != api.FromImage):
		what = "has a service, which takes no other environment"
	case len(r.Entrypoint) > 0 || r.Dir != "" || r.User != "" || r.Stdin || r.TTY:
		what = "has a service, which has an entrypoint, a user, a directory and input of its own"
	case r.Platform != "":
		what = "has a VM, and no platform to choose"
	default:
		return nil
	}
	return fmt.Errorf("package %s %s: %w; leave that out, or run an image", cmp.Or(p.Name, p.Key[:shortKey]), what, ErrInvalid)
}

// create records a new VM, which it acquires.
func (d *Daemon) create(r api.Run) (*vm, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.drained() {
		return nil, errDrained
	}
	name := r.Name
	if name == "" {
		base := baseName(r.Image)
		name = base
		for i := 2; d.nameTaken(name); i++ {
			name = fmt.Sprint(base, "-", i)
		}
	}
	if err := d.nameFree(name); err != nil {
		return nil, err
	}
	if err := d.portsFree("", r.Ports); err != nil {
		return nil, err
	}
	id := strings.ReplaceAll(uuid.NewString(), "-", "")[:12]
	record := api.VM{
		ID: id, Name: name, Image: r.Image, Entrypoint: r.Entrypoint, Command: r.Command, Dir: r.Dir, User: r.User,
		Stdin: r.Stdin, TTY: r.TTY, Egress: r.Egress, State: api.Creating, Ports: r.Ports, Memory: cmp.Or(r.Memory, 1<<30),
		CPUs: cmp.Or(r.CPUs, 1), DiskRead: r.DiskRead, DiskWrite: r.DiskWrite, Remove: r.Remove, Restart: r.Restart,
		Labels: r.Labels, Created: time.Now().UTC(),
	}
	if b, err := json.Marshal(record); err != nil || len(b) > mostRecord {
		return nil, fmt.Errorf("what was asked for is too long: %d bytes in all, %d are possible: %w", len(b), mostRecord, ErrInvalid)
	}
	v := d.newVM(id)
	if err := os.Mkdir(v.dir, 0o700); err != nil {
		return nil, fmt.Errorf("create VM: %w", err)
	}
	v.busy.TryAcquire(1) // nobody else knows it yet
	if err := v.changeLocked(func(n *api.VM) { *n = record }); err != nil {
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

// portsFree refuses ports that a VM other than the one with id has published, with d.mu held.
func (d *Daemon) portsFree(id string, ports []api.Port) error {
	for other, v := range d.vms {
		if other == id {
			continue
		}
		for _, p := range ports {
			if conflicting(v.record.Ports, p) != nil {
				return fmt.Errorf("port %d/%s is VM %s's: %w; choose another, or remove that VM", p.Host, p.Protocol, v.record.Name, ErrConflict)
			}
		}
	}
	return nil
}

// act begins an operation that changes a VM, after the one that changes it now; at once ends that one,
// and the VM.
func (d *Daemon) act(kind, name string, atOnce bool, f func(context.Context, *vm) error) (api.Operation, error) {
	return d.actOn(kind, name, atOnce, func(ctx context.Context, v *vm, _ *operation) error { return f(ctx, v) })
}

// actOn is act for an operation that tells how far it is.
func (d *Daemon) actOn(
	kind, name string, atOnce bool, f func(context.Context, *vm, *operation) error,
) (api.Operation, error) {
	d.mu.Lock()
	v, err := d.find(name)
	d.mu.Unlock()
	if err != nil {
		return api.Operation{}, err
	}
	if kind == "kill" {
		r := v.look()
		if r.State == api.Moved {
			return api.Operation{}, fmt.Errorf("VM %s runs on host %s: %w", name, r.Host, ErrConflict)
		}
		if r.PID == 0 && r.Namespace == "" {
			return api.Operation{}, fmt.Errorf("VM %s does not run: %w", name, ErrConflict)
		}
	}
	id := v.look().ID
	return d.begin(kind, id, func(ctx context.Context, o *operation) error {
		if atOnce {
			v.userStops()
			if err := v.interrupt(); err != nil {
				return err
			}
		}
		if err := v.acquire(ctx, o.cancel); err != nil {
			return err
		}
		defer v.release()
		d.mu.Lock()
		there := d.vms[id] == v
		d.mu.Unlock()
		switch {
		case !there && atOnce: // with the operation that was ended
			return nil
		case !there:
			return fmt.Errorf("VM %s was removed: %w", name, ErrNotFound)
		}
		return f(ctx, v, o)
	}), nil
}

// Start starts a VM: it is resumed if it can be, else it boots from its disks.
func (d *Daemon) Start(name string) (api.Operation, error) {
	return d.act("start", name, false, func(ctx context.Context, v *vm) error { return v.start(ctx) })
}

// Stop suspends a VM.
func (d *Daemon) Stop(name string) (api.Operation, error) {
	return d.act("stop", name, false, func(ctx context.Context, v *vm) error {
		if v.restarts() { // it has ended, and was to start again
			return v.change(func(r *api.VM) { r.UserStopped = true })
		}
		return v.stop(ctx, true)
	})
}

// Kill ends a VM as a power cut does, whatever it is doing. Its disks hold what its guest has synced.
func (d *Daemon) Kill(name string) (api.Operation, error) {
	return d.act("kill", name, true, func(ctx context.Context, v *vm) error {
		v.userStops() // also if it was just started again
		return v.kill(ctx)
	})
}

// Remove removes a VM and all that it has written. One that runs is refused without force.
func (d *Daemon) Remove(name string, force bool) (api.Operation, error) {
	return d.act("remove", name, force, func(ctx context.Context, v *vm) error {
		if v.owner() != nil && !force {
			return fmt.Errorf("VM %s runs: %w; stop it ('drafter stop %s'), or remove it with --force", name, ErrConflict, name)
		}
		return v.destroy(ctx)
	})
}

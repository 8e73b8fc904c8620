package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"drafter/api"
	"drafter/internal/control"
	"drafter/internal/detached"
	"drafter/network"
)

// An arrival is a VM that runs at another host, and that this one fetches.

var hexPattern = regexp.MustCompile(`^[0-9a-f]*$`)

// Arrive fetches a VM that another host offers.
func (d *Daemon) Arrive(ctx context.Context, from api.Neighbour, a api.Arrival) (api.Operation, error) {
	r := a.VM
	if !idPattern.MatchString(r.ID) || !namePattern.MatchString(r.Name) ||
		!keyPattern.MatchString(r.Package) || !hexPattern.MatchString(r.PackageID) {
		return api.Operation{}, fmt.Errorf("the VM's ID, name or package is none: %w", ErrInvalid)
	}
	host, _, err := net.SplitHostPort(a.Address)
	if err != nil || strings.HasPrefix(host, "unix") {
		return api.Operation{}, fmt.Errorf("the address %q is not of the form HOST:PORT: %w", a.Address, ErrInvalid)
	}
	if err := network.CheckEgress(r.Egress); err != nil {
		return api.Operation{}, fmt.Errorf("egress: %w: %w", err, ErrInvalid)
	}
	if b, err := json.Marshal(r); err != nil || len(b) > mostRecord {
		return api.Operation{}, fmt.Errorf("the VM's record is too long: %w", ErrInvalid)
	}
	for i := range r.Ports {
		if err := checkPort(&r.Ports[i]); err != nil {
			return api.Operation{}, fmt.Errorf("port %d: %w: %w", r.Ports[i].Host, err, ErrInvalid)
		}
		if err := hasAddress(r.Ports[i].Address); err != nil {
			return api.Operation{}, fmt.Errorf("port %d: %w: %w", r.Ports[i].Host, err, ErrConflict)
		}
	}
	size := 0
	for _, e := range a.Env {
		size += len(e)
	}
	if size > mostRecord || r.Memory < 0 || r.Memory > mostSize || a.Disk < 0 || a.Disk > mostSize {
		return api.Operation{}, fmt.Errorf("the VM's environment, memory or disk has an impossible size: %w", ErrInvalid)
	}
	if err := d.hasRoom(r.Memory, a.Disk); err != nil {
		return api.Operation{}, err
	}
	r.Foreign = true
	p, done, err := d.usePackage(r.Package, false)
	switch {
	case err == nil:
		defer done() // its record says then that the VM needs it
		id, err := packageID(d.packageDir(p.Key))
		if err != nil {
			return api.Operation{}, err
		}
		r.Foreign = id != r.PackageID
	case !errors.Is(err, ErrNotFound):
		return api.Operation{}, err
	}
	v, err := d.admit(ctx, from, r)
	if err != nil {
		return api.Operation{}, err
	}
	return d.begin("arrive", r.ID, func(ctx context.Context, o *operation) error { //nolint:contextcheck // it goes on without its caller
		defer v.release()
		o.isFor(from.Name)
		o.arrives(v.look().Moves)
		v.d.mu.Lock()
		v.cancel = o.cancel
		v.d.mu.Unlock()
		err := v.arrive(ctx, from, a)
		if err != nil && d.ctx.Err() == nil { // else the next daemon sees to it
			err = errors.Join(err, v.hasNotArrived(context.WithoutCancel(ctx)))
		}
		return err
	}), nil
}

// mostSize bounds what a VM may need, in bytes.
const mostSize = 1 << 50

// hasAddress refuses an address that this host does not have; it has "".
func hasAddress(address string) error {
	if address == "" {
		return nil
	}
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		return fmt.Errorf("this host does not have its address %s", address)
	}
	return l.Close()
}

// hasRoom refuses a VM for which memory or disk do not suffice.
func (d *Daemon) hasRoom(memory, disk int64) error {
	available, err := memoryFree()
	if err != nil {
		return err
	}
	if available < memory {
		return fmt.Errorf("the VM has %s of memory, and %s is free: %w", humanize.IBytes(uint64(memory)),
			humanize.IBytes(uint64(available)), ErrConflict)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(d.config.Dir, &fs); err != nil {
		return fmt.Errorf("read how much of the disk is free: %w", err)
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < memory+disk { // a VM that is suspended has its memory there
		return fmt.Errorf("the VM may need %s of the disk, and %s is free: %w", humanize.IBytes(uint64(memory+disk)),
			humanize.IBytes(uint64(free)), ErrConflict)
	}
	return nil
}

// memoryFree is how many bytes of the host's memory new processes can have; see proc_meminfo(5).
func memoryFree() (int64, error) {
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		return 0, err
	}
	info, err := proc.Meminfo()
	if err == nil && info.MemAvailableBytes == nil {
		err = errors.New("the kernel does not say")
	}
	if err != nil {
		return 0, fmt.Errorf("read how much memory is free: %w", err)
	}
	return int64(*info.MemAvailableBytes), nil
}

// admit records a VM that arrives, and acquires it. One that has been here before may be removed at
// this moment.
func (d *Daemon) admit(ctx context.Context, from api.Neighbour, r api.VM) (*vm, error) {
	ctx, cancel := context.WithTimeout(ctx, admitPatience)
	defer cancel()
	for {
		d.mu.Lock()
		v := d.vms[r.ID]
		d.mu.Unlock()
		known := v != nil
		if !known {
			v = d.newVM(r.ID)
		}
		if err := v.acquire(ctx, nil); err != nil {
			return nil, fmt.Errorf("VM %s is here, and %s: %w", r.Name, v.look().State, ErrConflict)
		}
		d.mu.Lock()
		now := d.vms[r.ID]
		changed := known && now != v || !known && now != nil
		var err error
		if !changed {
			err = d.admitLocked(v, from, r)
		}
		d.mu.Unlock()
		switch {
		case err != nil:
			v.release()
			return nil, err
		case !changed:
			return v, nil
		}
		v.release()
	}
}

// admitPatience is how long a VM that arrives may wait for its removal from here.
const admitPatience = 10 * time.Second

func (d *Daemon) admitLocked(v *vm, from api.Neighbour, r api.VM) error {
	known := d.vms[r.ID] == v
	switch {
	case d.drained():
		return errDrained
	case known && v.record.State != api.Moved:
		return fmt.Errorf("VM %s is here, and %s: %w", r.Name, v.record.State, ErrConflict)
	}
	for id, other := range d.vms {
		if id != r.ID && (other.record.Name == r.Name || id == r.Name) {
			return fmt.Errorf("the name %s is in use here: %w; rename one of the VMs", r.Name, ErrConflict)
		}
	}
	if err := d.portsFree(r.ID, r.Ports); err != nil {
		return err
	}
	// It goes home where its clients reach it already.
	ns := cmp.Or(v.record.Anchor, v.record.Namespace)
	if ns == "" {
		var err error
		if ns, err = d.namespace(); err != nil {
			return err
		}
	}
	r.State, r.Host, r.Namespace, r.Anchor, r.Next, r.PID, r.Error = api.Arriving, from.Name, ns, "", "", 0, ""
	r.From = from.Name
	r.Moves = max(r.Moves, v.record.Moves) + 1
	r.Cgroup = d.groupPath(r.ID, r.Moves)
	if !known {
		if err := os.Mkdir(v.dir, 0o700); err != nil {
			return fmt.Errorf("create VM: %w", err)
		}
	}
	if err := v.changeLocked(func(n *api.VM) { *n = r }); err != nil {
		if !known {
			err = errors.Join(err, os.RemoveAll(v.dir))
		}
		return err
	}
	d.vms[r.ID] = v
	return nil
}

// arrive fetches the VM, which is acquired.
func (v *vm) arrive(ctx context.Context, from api.Neighbour, a api.Arrival) error {
	if err := v.d.startNAT(ctx); err != nil {
		return err
	}
	s := v.seat()
	authority, err := s.authority(from)
	if err != nil {
		return err
	}
	if a.Env != nil {
		if err := control.WriteEnv(s.control(), a.Env); err != nil {
			return err
		}
	}
	p, err := v.launch(ctx, v.look().Moves, v.look().Namespace, "--raddr", a.Address, "--tls-cert", v.d.certFile(),
		"--tls-key", v.d.keyFile(), "--tls-ca", authority, "--tls-name", hostName)
	if v.d.ctx.Err() != nil { // it goes on, and the next daemon finds it
		if p != nil {
			err = errors.Join(err, p.Close())
		}
		return errors.Join(err, detached.ErrLeave)
	}
	if err != nil {
		return err
	}
	v.own(p) //nolint:contextcheck // see own
	return v.awaitRunning(ctx)
}

// hasNotArrived removes what has come of a VM that stays at its source. A VM that has been here before
// is again one that has moved.
func (v *vm) hasNotArrived(ctx context.Context) error {
	if p := v.owner(); p != nil { // it runs here
		return nil
	}
	s := v.seat()
	if err := v.d.endSeat(ctx, s); err != nil {
		return err
	}
	if err := v.leaveSeat(v.look().Moves); err != nil {
		return err
	}
	if err := s.discard(); err != nil { // it has run here, or may have
		return errors.Join(err, v.hasEnded(ctx))
	}
	anchored, err := v.anchored()
	if err != nil {
		return err
	}
	if !anchored {
		return v.destroy(ctx)
	}
	if err := v.change(func(r *api.VM) { r.State, r.Cgroup = api.Moved, "" }); err != nil {
		return err
	}
	v.keepMoved()
	return nil
}

// removeArrival is hasNotArrived for a VM whose process was found, and has ended.
func (v *vm) removeArrival() error {
	if err := v.acquire(v.d.ctx, nil); err != nil {
		return err
	}
	defer v.release()
	if v.look().State != api.Arriving {
		return nil
	}
	return v.hasNotArrived(v.d.ctx)
}

// Arrival tells how far the arrival is of a VM that had moved so often before, once it has ended or after
// wait.
func (d *Daemon) Arrival(ctx context.Context, id string, moves int, wait time.Duration) (api.Operation, error) {
	d.mu.Lock()
	var last *operation
	for _, o := range d.operations {
		if o.isArrival(id, moves) && (last == nil || last.look().Began.Before(o.look().Began)) {
			last = o
		}
	}
	v := d.vms[id]
	d.mu.Unlock()
	if last != nil {
		return d.Operation(ctx, last.look().ID, wait)
	}
	if v == nil || v.look().Moves <= moves {
		return api.Operation{}, fmt.Errorf("VM %s has not arrived: %w", id, ErrNotFound)
	}
	o := api.Operation{Kind: "arrive", VM: id, State: api.Done} // begun by the last daemon
	if r := v.look(); r.State == api.Arriving {
		o.State = api.Working
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	} else if slices.Contains([]string{api.Moved, api.Removing, api.Failed}, r.State) {
		o.State, o.Error = api.Broken, "it has not arrived "+r.Error
	}
	return o, nil
}

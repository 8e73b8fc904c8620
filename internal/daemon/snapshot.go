package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"drafter/api"
	"drafter/internal/control"
	"drafter/internal/private"
	"drafter/migrate"
	"drafter/peer"
	"drafter/terminator"
	"drafter/transport"
	"drafter/vmm"
)

// copySocket is where a VM's process gives copies of it, in its control directory.
const copySocket = "copies"

// Snapshot makes a package of a VM, which goes on. It is the VM in one moment: memory, disks and all.
func (d *Daemon) Snapshot(name, as string) (api.Operation, error) {
	release, err := d.reserveName(as) // to be told at once
	if err != nil {
		return api.Operation{}, err
	}
	release()
	return d.actOn("snapshot", name, false, func(ctx context.Context, v *vm, o *operation) error {
		p, done, err := d.snapshot(ctx, v, as, o)
		if err != nil {
			return err
		}
		defer done()
		o.made(p.Key)
		return nil
	})
}

// snapshot makes a package of a VM, which is acquired.
func (d *Daemon) snapshot(ctx context.Context, v *vm, name string, o *operation) (*stored, func(), error) {
	r := v.look()
	p := api.Package{
		Key: newKey(), Name: name, Source: api.FromSnapshot, Reference: r.Image, Digest: r.Digest, Command: r.Command, VM: r.Name,
	}
	return d.makePackage(ctx, p, func(dir string) error {
		if err := v.copyTo(ctx, dir, o); err != nil {
			return err
		}
		env, err := control.ReadEnv(v.seat().control())
		if err == nil && env != nil { // a guest that boots again asks for it
			err = control.WriteEnv(dir, env)
		}
		return err
	})
}

// copyTo writes the VM, which is acquired, to a directory that is to be made, as a package.
func (v *vm) copyTo(ctx context.Context, dir string, o *operation) error {
	switch r := v.look(); r.State {
	case api.Running:
		return v.copyRunning(ctx, dir, o)
	case api.Stopped:
		return v.copyStopped(ctx, dir, o)
	default:
		return fmt.Errorf("VM %s is %s, and has no memory that could be kept: %w; start it first", r.Name, r.State, ErrConflict)
	}
}

// copyRunning lets the VM's process send a copy, for which the VM pauses for some milliseconds.
func (v *vm) copyRunning(ctx context.Context, dir string, o *operation) (err error) {
	if err := v.movable(); err != nil {
		return err
	}
	s := v.seat()
	address, err := offer(ctx, s, &control.OfferRequest{Address: "unix:" + filepath.Join(s.control(), copySocket)})
	if err != nil {
		return err
	}
	defer func() {
		_, werr := withdraw(context.WithoutCancel(ctx), s)
		err = errors.Join(err, werr)
	}()
	var trust transport.Trust
	dial, err := trust.Dialer("unix:" + address)
	if err != nil {
		return err
	}
	t, err := terminator.New(terminator.Config{Dir: dir, Copy: true, Logger: v.d.log, OnProgress: func(s migrate.Stats) {
		sent, saved, pending := s.Bytes()
		o.progress("Copying", sent+saved, sent+saved+pending)
	}})
	if err != nil {
		return err
	}
	stats, err := t.Run(ctx, dial)
	if err != nil {
		return fmt.Errorf("copy VM %s: %w", v.look().Name, err)
	}
	v.d.log.Info("Copied a VM, which goes on", "vm", v.look().Name, "took", stats.Total, "paused", stats.Paused)
	return nil
}

// copyStopped writes each device of a suspended VM, base and overlay together.
func (v *vm) copyStopped(ctx context.Context, dir string, o *operation) error {
	devices, err := peer.PackageDevices(v.packageDir(v.look()), v.seat().instance())
	if err == nil {
		err = private.MkdirAll(dir)
	}
	for _, device := range devices {
		if err == nil {
			show := func(done, total int64) { o.progress("Copying "+device.Name, done, total) }
			err = device.Export(ctx, filepath.Join(dir, vmm.PackageFile(device.Name)), show)
		}
	}
	if err != nil {
		return fmt.Errorf("copy VM %s: %w", v.look().Name, err)
	}
	return nil
}

package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"drafter/api"
	"drafter/internal/instance"
	"drafter/internal/private"
	"drafter/packager"
	"drafter/vmm"
)

// Pull looks an image up, and makes the package of it that a run would, or fetches the package if it is
// one.
func (d *Daemon) Pull(r api.Pull) (api.Operation, error) {
	run := api.Run{Image: imageReference(r.Image), Command: r.Command, Memory: r.Memory, CPUs: r.CPUs, Platform: r.Platform, Pull: "always"}
	if err := checkRun(&run); err != nil {
		return api.Operation{}, err
	}
	return d.begin("pull", "", func(ctx context.Context, o *operation) error {
		p, done, err := d.template(ctx, run, o)
		if err != nil {
			return err
		}
		defer done()
		o.made(p.Key)
		return nil
	}), nil
}

// Push stores a package in a registry, or a copy of a VM. Credentials are those of the daemon's user.
func (d *Daemon) Push(r api.Push) (api.Operation, error) {
	_, err := d.VM(r.Source)
	isVM := err == nil
	_, err = d.Package(r.Source)
	isPackage := err == nil
	switch {
	case isVM && isPackage:
		return api.Operation{}, fmt.Errorf("there are a VM and a package %s: %w; name it by its ID or key", r.Source, ErrConflict)
	case !isVM && !isPackage:
		return api.Operation{}, fmt.Errorf("there is neither a VM nor a package %q: %w; see 'drafter ps -a' and 'drafter package ls'", r.Source, ErrNotFound)
	}
	to := packager.Artifact{Reference: imageReference(r.Reference), Logger: d.log}
	if !strings.HasPrefix(to.Reference, registryScheme) {
		return api.Operation{}, fmt.Errorf("%q is not of the form docker://NAME[:TAG]: %w", r.Reference, ErrInvalid)
	}
	if isPackage {
		return d.begin("push", "", func(ctx context.Context, o *operation) error {
			p, done, err := d.usePackage(r.Source, false)
			if err != nil {
				return err
			}
			defer done()
			_, err = to.Push(ctx, d.packageDir(p.Key), o.progress)
			return err
		}), nil
	}
	return d.actOn("push", r.Source, false, func(ctx context.Context, v *vm, o *operation) (err error) {
		making, err := os.MkdirTemp(d.dir("packages"), unfinished)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(making)) }()
		dir := filepath.Join(making, "package")
		if err := v.copyTo(ctx, dir, o); err != nil {
			return err
		}
		_, err = to.Push(ctx, dir, o.progress)
		return err
	})
}

// archive sends a package as 'drafter packager' makes it, or makes one of such an archive.
func (d *Daemon) archive(w http.ResponseWriter, r *http.Request) {
	d.work.Add(1)
	defer d.work.Done()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(d.ctx, cancel)() //nolint:contextcheck // it ends with the daemon, too
	if r.Method == http.MethodGet {
		d.exportPackage(ctx, w, r.PathValue("package"))
		return
	}
	p, err := d.importPackage(ctx, r)
	if err != nil {
		refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	if err := json.NewEncoder(w).Encode(p); err != nil {
		d.log.Debug("Nobody hears of a package that was imported", "error", err)
	}
}

func (d *Daemon) exportPackage(ctx context.Context, w http.ResponseWriter, name string) {
	p, done, err := d.usePackage(name, false)
	if err != nil {
		refuse(w, err)
		return
	}
	defer done()
	w.Header().Set("Content-Type", "application/zstd")
	if err := packager.Write(ctx, w, d.packageDir(p.Key), nil); err != nil {
		d.log.Warn("An export of a package was cut off", "package", p.Key, "error", err)
		panic(http.ErrAbortHandler) // an answer that ends well would be taken for all of it
	}
}

func (d *Daemon) importPackage(ctx context.Context, r *http.Request) (api.Package, error) {
	p := api.Package{Key: newKey(), Name: r.URL.Query().Get("name"), Source: api.FromImport}
	added, done, err := d.makePackage(ctx, p, func(dir string) error {
		err := packager.Read(ctx, r.Body, dir, nil, nil)
		if err == nil {
			err = checkPackage(dir)
		}
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("%w: %w", err, ErrInvalid)
		}
		return err
	})
	if err != nil {
		return api.Package{}, err
	}
	defer done()
	return added.Package, nil
}

// checkPackage refuses a directory that holds no whole package.
func checkPackage(dir string) error {
	names, files, err := vmm.PackageFiles(dir)
	if err != nil {
		return err
	}
	paths := instance.Paths{}
	for _, name := range names {
		paths[name] = filepath.Join(dir, files[name])
	}
	if _, err := instance.Open(paths); err != nil {
		return err
	}
	state, err := private.Open(paths[vmm.State], os.O_RDONLY)
	if err != nil {
		return err
	}
	defer state.Close() // nothing was written
	if err := vmm.CheckResumable(state); err != nil {
		return fmt.Errorf("device %s: %w", vmm.State, err)
	}
	return nil
}

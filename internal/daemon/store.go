package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"drafter/api"
	"drafter/internal/guest"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/vmm"
)

// A package is a directory of the store. It gets its name there when it is complete, loses it before
// it is removed, and does not change in between. With its devices lie a record and, of a snapshot
// whose service was given an environment, that.

// stored is a package of the store.
type stored struct {
	api.Package     // without what is computed when it is shown
	uses        int // operations that need it; guarded by d.mu
}

const (
	packageRecord = "record.json"
	// unfinished begins the name of what is no package yet, or no more.
	unfinished = ".new-"
)

var keyPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

// shortKey is how many digits of a key at least stand for it.
const shortKey = 12

// openStore finds the packages that are there.
func (d *Daemon) openStore() error {
	entries, err := os.ReadDir(d.dir("packages"))
	if err != nil {
		return fmt.Errorf("find packages: %w", err)
	}
	for _, e := range entries {
		if !keyPattern.MatchString(e.Name()) || !e.IsDir() {
			d.log.Warn("Something among the packages is none, and is left alone", "path", d.dir("packages", e.Name()))
			continue
		}
		p, err := readPackage(d.dir("packages", e.Name()))
		if err != nil {
			d.log.Warn("A package cannot be read; VMs cannot start from it", "package", e.Name(), "error", err)
		}
		d.packages[e.Name()] = &stored{Package: p}
	}
	return nil
}

// readPackage reads what the package in a directory says of itself. One of an older daemon has no
// record.
func readPackage(dir string) (p api.Package, err error) {
	b, err := private.ReadFile(filepath.Join(dir, packageRecord), 4*mostRecord)
	if err == nil {
		err = json.Unmarshal(b, &p)
	}
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	p.Key = filepath.Base(dir)
	p.Size, p.Used = usage(dir)
	config, cerr := vmm.ReadPackageConfig(filepath.Join(dir, vmm.PackageFile(vmm.Config)))
	if cerr != nil {
		return p, errors.Join(err, cerr)
	}
	memory, _ := config.Device(vmm.Memory)
	p.Memory, p.CPUs, p.Hardware = memory.Size, config.CPUs, api.Hardware(config.Hardware)
	p.Held = slices.Contains(strings.Fields(config.BootArgs), guest.HoldArgument)
	if p.Created.IsZero() {
		p.Created = config.Created
	}
	return p, err
}

// usage is how many bytes a directory takes on the disk, and when it was used last: that is its time.
// What is removed meanwhile takes none.
func usage(dir string) (size int64, used time.Time) {
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // see above
		}
		if info, err := e.Info(); err == nil {
			size += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	if info, err := os.Stat(dir); err == nil {
		used = info.ModTime().UTC()
	}
	return size, used
}

// findPackage returns a package by its name, its key, or the beginning of its key, with d.mu held.
func (d *Daemon) findPackage(name string) (*stored, error) {
	var found []*stored
	for key, p := range d.packages {
		if p.Name == name && name != "" || key == name {
			return p, nil
		}
		if len(name) >= shortKey && strings.HasPrefix(key, name) {
			found = append(found, p)
		}
	}
	if len(found) == 1 {
		return found[0], nil
	}
	return nil, fmt.Errorf("package %q: %w; 'drafter package ls' lists all", name, ErrNotFound)
}

// usePackage is findPackage for one that stays until done is called. made says that a VM is made of it.
func (d *Daemon) usePackage(name string, made bool) (p *stored, done func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p, err = d.findPackage(name); err != nil {
		return nil, nil, err
	}
	if !exists(d.packageDir(p.Key)) {
		delete(d.packages, p.Key)
		return nil, nil, fmt.Errorf("package %q: its directory is gone: %w", name, ErrNotFound)
	}
	if made {
		p.Used = time.Now().UTC()
		if err := os.Chtimes(d.packageDir(p.Key), time.Time{}, p.Used); err != nil {
			return nil, nil, fmt.Errorf("package %q: note that it is used: %w", name, err)
		}
	}
	p.uses++
	return p, func() { d.mu.Lock(); p.uses--; d.mu.Unlock() }, nil
}

func (d *Daemon) packageDir(key string) string { return d.dir("packages", key) }

// newKey is the key of a package that nothing else determines.
func newKey() string { return strings.ReplaceAll(uuid.NewString(), "-", "") }

// makePackage adds a package, which stays until done is called. fill puts its devices in a directory
// that is to be made.
func (d *Daemon) makePackage(ctx context.Context, p api.Package, fill func(dir string) error) (_ *stored, done func(), err error) {
	release, err := d.reserveName(p.Name)
	if err != nil {
		return nil, nil, err
	}
	defer release()
	making, err := os.MkdirTemp(d.dir("packages"), unfinished)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(making)) }()
	dir := filepath.Join(making, "package")
	if err := fill(dir); err != nil {
		return nil, nil, err
	}
	p.Created = time.Now().UTC()
	b, err := json.Marshal(p)
	if err == nil {
		err = newfile.WriteBytes(filepath.Join(dir, packageRecord), b)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("record package: %w", err)
	}
	key := p.Key
	if p, err = readPackage(dir); err != nil {
		return nil, nil, err
	}
	p.Key, p.Used = key, p.Created
	if ctx.Err() != nil {
		return nil, nil, context.Cause(ctx)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := newfile.Rename(dir, d.packageDir(key)); err != nil {
		return nil, nil, err
	}
	added := &stored{Package: p, uses: 1}
	d.packages[key] = added
	return added, func() { d.mu.Lock(); added.uses--; d.mu.Unlock() }, nil
}

// reserveName refuses a name that is taken, and keeps it until release is called.
func (d *Daemon) reserveName(name string) (release func(), err error) {
	if name == "" {
		return func() {}, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	taken := d.names[name]
	for _, p := range d.packages {
		taken = taken || p.Name == name
	}
	switch {
	case !namePattern.MatchString(name):
		return nil, fmt.Errorf("the name %q must have 1 to 63 lower-case letters, digits and hyphens: %w", name, ErrInvalid)
	case taken:
		return nil, fmt.Errorf("there is a package %s: %w; remove it ('drafter package rm %s'), or choose another name", name, ErrConflict, name)
	}
	d.names[name] = true
	return func() { d.mu.Lock(); delete(d.names, name); d.mu.Unlock() }, nil
}

// shown is what is told of a package, with d.mu held.
func (d *Daemon) shown(p *stored) api.Package {
	shown := p.Package
	for _, v := range d.vms {
		if v.record.Package == p.Key {
			shown.VMs = append(shown.VMs, v.record.Name)
		}
	}
	slices.Sort(shown.VMs)
	return shown
}

// Packages returns all packages, the newest first.
func (d *Daemon) Packages() []api.Package {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := []api.Package{}
	for _, p := range d.packages {
		list = append(list, d.shown(p))
	}
	slices.SortFunc(list, func(a, b api.Package) int { return b.Created.Compare(a.Created) })
	return list
}

// Package returns a package by its name or key.
func (d *Daemon) Package(name string) (api.Package, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, err := d.findPackage(name)
	if err != nil {
		return api.Package{}, err
	}
	return d.shown(p), nil
}

// needed says who needs a package, with d.mu held; nil if nobody does.
func (d *Daemon) needed(p *stored) error {
	name := p.Name
	if name == "" {
		name = p.Key[:shortKey]
	}
	switch vms := d.shown(p).VMs; {
	case len(vms) > 0:
		return fmt.Errorf("VM %s runs from package %s: %w; remove that VM first ('drafter rm %s')", vms[0], name, ErrConflict, vms[0])
	case p.uses > 0:
		return fmt.Errorf("package %s is in use at this moment: %w; try again", name, ErrConflict)
	}
	return d.known()
}

// known is an error if it is not known what all VMs need, with d.mu held.
func (d *Daemon) known() error {
	if len(d.unread) == 0 {
		return nil
	}
	return fmt.Errorf("the record of a VM in %s cannot be read, so it is not known which package it needs: %w; mend it, or remove that directory, and start the daemon again", d.unread[0], ErrConflict)
}

// RemovePackage removes a package that nobody needs.
func (d *Daemon) RemovePackage(name string) error {
	d.mu.Lock()
	p, err := d.findPackage(name)
	if err == nil {
		err = d.needed(p)
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	return d.discard(p)
}

// discard removes a package, unless somebody has come to need it.
func (d *Daemon) discard(p *stored) error {
	gone := d.dir("packages", unfinished+newKey()) // as a full disk has no room for a directory
	d.mu.Lock()
	err := d.needed(p)
	if err == nil && d.packages[p.Key] == p {
		if err = newfile.Rename(d.packageDir(p.Key), gone); err == nil {
			delete(d.packages, p.Key)
		}
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(gone), newfile.SyncDir(d.dir("packages"))); err != nil {
		return fmt.Errorf("remove package %s: %w", p.Key, err)
	}
	return nil
}

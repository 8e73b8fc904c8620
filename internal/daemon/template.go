package daemon

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/semaphore"

	"drafter/api"
	"drafter/blueprint"
	"drafter/internal/guest"
	"drafter/internal/newfile"
	"drafter/snapshotter"
	"drafter/vmm"
)

// A template is a package that the first run of an image makes: the image has booted in it, and its
// service is ready. Every other run that would boot the same resumes it.

// templateKey is all that makes two runs boot the same.
type templateKey struct {
	Digest  string
	Command []string
	Memory  int64
	CPUs    int
	Held    bool // the service has not started: it gets an environment of its own
	program
	Blueprint string // of the OS
	Platform  string // of the image
	Hardware  vmm.Hardware
	Processor *vmm.Processor // of the host; nil where it is emulated, and so the same everywhere
}

func (k templateKey) String() string { return digestOf(k) }

// hardware is what a package made here would depend on. After an upgrade of the VMM, or on a host with
// another CPU, it is another one.
func hardware(ctx context.Context, driver vmm.Driver) (hw vmm.Hardware, p *vmm.Processor, err error) {
	disks := []vmm.Block{{Name: vmm.Disk}, {Name: imageDisk}}
	hw, err = vmm.Describe(ctx, driver, vmm.Launch{Devices: vmm.Devices{Disks: disks}})
	if err == nil && hw.Accel == vmm.AccelKVM {
		p, err = vmm.HostProcessor()
	}
	return hw, p, err
}

func digestOf(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // all of ours can be
	}
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:16])
}

// template returns the package for a run, which stays until done is called. It makes the package if
// need be.
func (d *Daemon) template(ctx context.Context, r api.Run, o *operation) (p *stored, done func(), err error) {
	d.building.RLock() // its blueprint stays
	defer d.building.RUnlock()
	t := template{d: d, o: o, host: vmm.Host{Drivers: d.config.Drivers, BaseDir: d.dir("vmm"), Logger: d.log}}
	if err := t.resolve(ctx, r); err != nil {
		return nil, nil, err
	}
	known := d.readImage(r.Image, r.Platform)
	if r.Pull != "always" {
		if known.Digest != "" {
			if p, done, err := d.usePackage(t.keyOf(known), true); !errors.Is(err, ErrNotFound) {
				d.touchImage(known)
				return p, done, err
			}
		}
		if r.Pull == "never" {
			return nil, nil, fmt.Errorf("there is no package of image %s for such a VM: %w; run it with --pull missing", r.Image, ErrNotFound)
		}
	}
	o.progress("Finding image", 0, 1)
	image, found, err := d.findImage(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	o.progress("Finding image", 1, 1)
	key := t.keyOf(found)
	unlock, err := d.making.lock(ctx, key) // nobody else makes the same one meanwhile
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	p, done, err = d.usePackage(key, true)
	if errors.Is(err, ErrNotFound) {
		made := api.Package{Key: key, Source: api.FromImage, Reference: r.Image, Digest: found.Digest, Platform: t.key.Platform, Command: r.Command}
		if found.Artifact {
			made.Source, made.Platform, made.Command = api.FromRegistry, "", nil
		}
		p, done, err = d.makePackage(ctx, made, func(dir string) error {
			if found.Artifact {
				return d.pullArtifact(ctx, found, dir, o)
			}
			return t.make(ctx, image, dir)
		})
	}
	if err != nil {
		return nil, nil, err
	}
	if err := d.writeImage(found); err != nil {
		done()
		return nil, nil, err
	}
	return p, done, nil
}

// template is a package to be made of an image.
type template struct {
	d         *Daemon
	o         *operation
	key       templateKey // but for the digest
	host      vmm.Host
	blueprint string // directory of the OS blueprint
}

// resolve finds out what the package for a run depends on beside the image.
func (t *template) resolve(ctx context.Context, r api.Run) (err error) {
	t.key = templateKey{
		Command: r.Command, Held: len(r.Env) > 0, Memory: cmp.Or(r.Memory, 1<<30), CPUs: cmp.Or(r.CPUs, 1),
		Platform: cmp.Or(r.Platform, "linux/"+runtime.GOARCH), program: programOf(r),
	}
	if t.blueprint, t.key.Blueprint, err = t.d.blueprint(ctx, t.o); err != nil {
		return err
	}
	driver, err := t.host.Drivers.Select(cmp.Or(t.d.config.VMM, vmm.VMMAuto), "")
	if err != nil {
		return err
	}
	t.key.Hardware, t.key.Processor, err = hardware(ctx, driver)
	return err
}

// keyOf is the key of the package of an image.
func (t *template) keyOf(image api.Image) string {
	if image.Artifact {
		return digestOf([]string{"artifact", image.Digest})
	}
	k := t.key
	k.Digest = image.Digest
	return k.String()
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// make boots the image and leaves the package in a directory.
func (t *template) make(ctx context.Context, image v1.Image, dir string) (err error) {
	d, k := t.d, t.key
	if image, err = k.configure(image); err != nil {
		return err
	}
	disk := filepath.Join(filepath.Dir(dir), "oci.ext4")
	if err := blueprint.BuildOCI(ctx, image, blueprint.Limits{}, blueprint.Ext4Config{Output: disk, Progress: t.o.progress, Logger: d.log}); err != nil {
		return err
	}
	if err := d.startNAT(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	t.host.Netns, err = d.namespace()
	if err == nil {
		d.borrowed[t.host.Netns] = true
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	defer func() {
		d.mu.Lock()
		delete(d.borrowed, t.host.Netns)
		d.mu.Unlock()
	}()
	bootArgs := vmm.DefaultBootArgs
	if k.Held {
		bootArgs += " " + guest.HoldArgument
	}
	if k.Interactive {
		bootArgs += " " + guest.InteractiveArgument
	}
	t.host.Egress = k.Egress // the image's program runs here, too
	devices, err := snapshotter.BlueprintDevices(t.blueprint, dir)
	if err != nil {
		return err
	}
	devices = slices.DeleteFunc(devices, func(d snapshotter.Device) bool { return d.Name == imageDisk })
	devices = append(devices, snapshotter.Device{Name: imageDisk, Input: disk, Output: filepath.Join(dir, "oci.ext4")})
	s, err := snapshotter.New(snapshotter.Config{
		Host: t.host, Devices: devices, Progress: t.o.progress,
		Spec: vmm.Spec{
			CPUs: k.CPUs, MemorySize: k.Memory, BootArgs: bootArgs, Interface: "tap0", MAC: "02:0e:d9:fd:68:3d",
			AgentPort: vmm.DefaultAgentPort, LivenessPort: vmm.DefaultLivenessPort,
		},
	})
	if err != nil {
		return err
	}
	t.o.progress("Booting", 0, 1)
	if _, err := s.Run(ctx); err != nil {
		return err
	}
	t.o.progress("Booting", 1, 1)
	return nil
}

// imageDisk is the device with the image.
const imageDisk = "oci"

// newBlueprint ends the name of a blueprint that is made.
const newBlueprint = ".new"

// sweepUnfinished removes what a killed daemon was making.
func (d *Daemon) sweepUnfinished() error {
	for _, store := range []struct{ dir, prefix, suffix string }{{"packages", unfinished, ""}, {"blueprints", "", newBlueprint}} {
		entries, err := os.ReadDir(d.dir(store.dir))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), store.prefix) && strings.HasSuffix(e.Name(), store.suffix) {
				if err := os.RemoveAll(d.dir(store.dir, e.Name())); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// blueprint returns the directory of the OS blueprint, and what tells it from others. It makes the
// blueprint if need be.
func (d *Daemon) blueprint(ctx context.Context, o *operation) (dir, key string, err error) {
	if d.config.Blueprint != "" {
		files := []string{}
		for _, name := range []string{"vmlinux", "initrd", "rootfs.ext4"} {
			info, err := os.Stat(filepath.Join(d.config.Blueprint, name))
			if err != nil {
				return "", "", fmt.Errorf("the daemon's OS blueprint: %w", err)
			}
			files = append(files, fmt.Sprint(name, info.Size(), info.ModTime().UnixNano()))
		}
		return d.config.Blueprint, digestOf(files), nil
	}
	program, err := os.Open(d.config.Guest)
	if err != nil {
		return "", "", fmt.Errorf("drafter-guest: %w", err)
	}
	defer program.Close()
	h := sha256.New()
	if _, err := io.Copy(h, program); err != nil {
		return "", "", fmt.Errorf("drafter-guest: %w", err)
	}
	key = digestOf([]string{hex.EncodeToString(h.Sum(nil)), blueprint.DefaultKernel, runtime.GOARCH})
	dir = d.dir("blueprints", key)
	unlock, err := d.making.lock(ctx, dir)
	if err != nil {
		return "", "", err
	}
	defer unlock()
	if exists(dir) {
		return dir, key, os.Chtimes(dir, time.Time{}, time.Now()) // when it was used last
	}
	making := dir + newBlueprint
	defer func() { err = errors.Join(err, os.RemoveAll(making)) }()
	err = blueprint.BuildOS(ctx, blueprint.OSConfig{Output: making, Guest: d.config.Guest, Kernel: blueprint.DefaultKernel, Progress: o.progress, Logger: d.log})
	if err == nil {
		err = newfile.Rename(making, dir)
	}
	return dir, key, err
}

// templateLocks lets one operation at a time make the same.
type templateLocks struct {
	mu    sync.Mutex
	locks map[string]*semaphore.Weighted
}

// lock returns once nobody else has a name's lock. Call what it returns.
func (l *templateLocks) lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	if l.locks == nil {
		l.locks = map[string]*semaphore.Weighted{}
	}
	if l.locks[name] == nil {
		l.locks[name] = semaphore.NewWeighted(1)
	}
	lock := l.locks[name]
	l.mu.Unlock()
	if err := lock.Acquire(ctx, 1); err != nil {
		return nil, context.Cause(ctx)
	}
	return func() { lock.Release(1) }, nil
}

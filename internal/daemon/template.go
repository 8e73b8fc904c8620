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

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/semaphore"

	"drafter/api"
	"drafter/blueprint"
	"drafter/internal/guest"
	"drafter/internal/newfile"
	"drafter/internal/private"
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
	VMM       string
}

func (k templateKey) String() string { return digestOf(k) }

func digestOf(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // all of ours can be
	}
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:16])
}

// template returns the package for a run, and its image's digest. It makes the package if need be.
func (d *Daemon) template(ctx context.Context, r api.Run, o *operation) (key, digest string, err error) {
	blueprintDir, blueprintKey, err := d.blueprint(ctx, o)
	if err != nil {
		return "", "", err
	}
	host := vmm.Host{Drivers: d.config.Drivers, BaseDir: d.dir("vmm"), Logger: d.log}
	driver, err := host.Drivers.Select(vmm.VMMAuto, "")
	if err != nil {
		return "", "", err
	}
	k := templateKey{program: programOf(r), Command: r.Command, Held: len(r.Env) > 0, Memory: cmp.Or(r.Memory, 1<<30), CPUs: cmp.Or(r.CPUs, 1), Blueprint: blueprintKey, VMM: driver.Name()}
	known := d.dir("images", digestOf([]string{r.Image, r.Platform})+".json")
	if r.Pull != "always" {
		k.Digest = d.readDigest(known)
		if k.Digest != "" && exists(d.dir("packages", k.String())) {
			return k.String(), k.Digest, nil
		}
		if r.Pull == "never" {
			return "", "", fmt.Errorf("there is no package of image %s for such a VM: %w; run it with --pull missing", r.Image, ErrNotFound)
		}
	}
	o.progress("Finding image", 0, 1)
	image, err := blueprint.OpenImage(ctx, blueprint.ImageConfig{Ref: r.Image, Platform: r.Platform, Logger: d.log})
	if err != nil {
		return "", "", err
	}
	hash, err := image.Digest()
	if err != nil {
		return "", "", fmt.Errorf("image %s: %w", r.Image, err)
	}
	o.progress("Finding image", 1, 1)
	k.Digest = hash.String()
	unlock, err := d.making.lock(ctx, k.String()) // nobody else makes the same one meanwhile
	if err != nil {
		return "", "", err
	}
	defer unlock()
	if !exists(d.dir("packages", k.String())) {
		if err := d.makeTemplate(ctx, image, k, host, blueprintDir, o); err != nil {
			return "", "", err
		}
	}
	err = newfile.WriteBytes(known, []byte(`{"digest":"`+k.Digest+`"}`))
	return k.String(), k.Digest, err
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// readDigest returns which image a reference was; "" if that is not known.
func (d *Daemon) readDigest(path string) string {
	b, err := private.ReadFile(path, 1<<16)
	var image struct{ Digest string }
	if err == nil {
		err = json.Unmarshal(b, &image)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.log.Warn("The record of an image cannot be read; it is looked up anew", "path", path, "error", err)
	}
	return image.Digest
}

// makeTemplate boots the image and keeps the package.
func (d *Daemon) makeTemplate(ctx context.Context, image v1.Image, k templateKey, host vmm.Host, blueprintDir string, o *operation) (err error) {
	if image, err = k.configure(image); err != nil {
		return err
	}
	making, err := os.MkdirTemp(d.dir("packages"), newPackage)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(making)) }()
	disk := filepath.Join(making, "oci.ext4")
	if err := blueprint.BuildOCI(ctx, image, blueprint.Limits{}, blueprint.Ext4Config{Output: disk, Progress: o.progress, Logger: d.log}); err != nil {
		return err
	}
	if err := d.startNAT(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	host.Netns, err = d.namespace()
	if err == nil {
		d.borrowed[host.Netns] = true
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	defer func() {
		d.mu.Lock()
		delete(d.borrowed, host.Netns)
		d.mu.Unlock()
	}()
	bootArgs := vmm.DefaultBootArgs
	if k.Held {
		bootArgs += " " + guest.HoldArgument
	}
	if k.Interactive {
		bootArgs += " " + guest.InteractiveArgument
	}
	host.Egress = k.Egress // the image's program runs here, too
	devices, err := snapshotter.BlueprintDevices(blueprintDir, filepath.Join(making, "package"))
	if err != nil {
		return err
	}
	devices = slices.DeleteFunc(devices, func(d snapshotter.Device) bool { return d.Name == imageDisk })
	devices = append(devices, snapshotter.Device{Name: imageDisk, Input: disk, Output: filepath.Join(making, "package", "oci.ext4")})
	s, err := snapshotter.New(snapshotter.Config{
		Host: host, Devices: devices, Progress: o.progress,
		Spec: vmm.Spec{
			CPUs: k.CPUs, MemorySize: k.Memory, BootArgs: bootArgs, Interface: "tap0", MAC: "02:0e:d9:fd:68:3d",
			AgentPort: vmm.DefaultAgentPort, LivenessPort: vmm.DefaultLivenessPort,
		},
	})
	if err != nil {
		return err
	}
	o.progress("Booting", 0, 1)
	if _, err := s.Run(ctx); err != nil {
		return err
	}
	o.progress("Booting", 1, 1)
	return newfile.Rename(filepath.Join(making, "package"), d.dir("packages", k.String()))
}

// imageDisk is the device with the image.
const imageDisk = "oci"

// newPackage begins the name of a package that is made.
const newPackage = ".new-"

// sweepPackages removes what a killed daemon was making.
func (d *Daemon) sweepPackages() error {
	entries, err := os.ReadDir(d.dir("packages"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), newPackage) {
			if err := os.RemoveAll(d.dir("packages", e.Name())); err != nil {
				return err
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
		return dir, key, nil
	}
	making := dir + ".new"
	if err := errors.Join(private.MkdirAll(d.dir("blueprints")), os.RemoveAll(making)); err != nil {
		return "", "", err
	}
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

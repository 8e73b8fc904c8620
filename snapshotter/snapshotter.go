// Package snapshotter makes a VM package: it boots a blueprint, waits until the guest is up,
// suspends it and stores its devices.
package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/internal/guest"
	"drafter/internal/instance"
	"drafter/internal/lifecycle"
	"drafter/internal/lockfile"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/internal/scratch"
	"drafter/internal/sparse"
	"drafter/network"
	"drafter/vmm"
)

// Device is one device of the package to make.
type Device struct {
	Name string `json:"name"`
	// path of the blueprint's file; empty for state, memory and config, which the snapshotter makes
	// itself
	Input  string `json:"input"`
	Output string `json:"output"` // path of the package's file
}

// Config says what to snapshot and how.
type Config struct {
	Host    vmm.Host
	Spec    vmm.Spec
	Devices []Device

	// Timeout bounds how long the guest may take to boot and to be ready, in all; 0: 1 min.
	Timeout time.Duration

	// ReadyPorts are the TCP ports that the guest's service opens before it is ready; "" for those
	// that its image exposes. Ports are separated by commas.
	ReadyPorts string

	// Progress is called with bytes while devices are copied. May be nil.
	Progress func(step string, done, total int64)
}

// BlueprintDevices lists the devices of a package to make in directory pkg, from the directory of a
// blueprint.
func BlueprintDevices(blueprint, pkg string) ([]Device, error) {
	var devices []Device
	for _, name := range []string{vmm.Kernel, vmm.Initrd, vmm.Disk, "oci", vmm.State, vmm.Memory, vmm.Config} {
		d := Device{Name: name, Output: filepath.Join(pkg, vmm.PackageFile(name))}
		switch name {
		case vmm.State, vmm.Memory, vmm.Config:
			devices = append(devices, d)
			continue
		case vmm.Initrd:
			d.Output = "" // a package keeps it behind its kernel
		}
		d.Input = filepath.Join(blueprint, vmm.PackageFile(name))
		if name == vmm.Initrd {
			d.Input = filepath.Join(blueprint, "initrd")
		}
		_, err := os.Stat(d.Input)
		switch {
		case err == nil:
			devices = append(devices, d)
		case !errors.Is(err, os.ErrNotExist) || name == vmm.Kernel || name == vmm.Disk:
			return nil, fmt.Errorf("device %s: input: %w", name, err)
		}
	}
	return devices, nil
}

// Result holds how long the parts took.
type Result struct {
	Boot    time.Duration // from the VMM's start to the agent's answer that the service is ready
	Suspend time.Duration // from before-suspend to the package being durable
}

// Snapshotter makes one package.
type Snapshotter struct {
	life    lifecycle.Life
	config  Config
	names   []string
	initrd  string             // path; "" for none
	section vmm.Section        // whose initramfs it is in the kernel device
	making  map[string]*making // by the directory of outputs
	paths   instance.Paths     // of the outputs while they are partial
}

// New checks a config. It touches nothing on the host.
func New(c Config) (*Snapshotter, error) {
	if err := c.Host.Complete(); err != nil {
		return nil, err
	}
	c.Timeout = cmp.Or(c.Timeout, time.Minute)
	spec := &c.Spec
	spec.CPUs, spec.MemorySize, spec.BootArgs = cmp.Or(spec.CPUs, 1), cmp.Or(spec.MemorySize, 1<<30), cmp.Or(spec.BootArgs, vmm.DefaultBootArgs)
	s := &Snapshotter{config: c, making: map[string]*making{}, paths: instance.Paths{}}
	for _, d := range c.Devices {
		s.names = append(s.names, d.Name)
	}
	if err := instance.CheckNames(s.names, vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory, vmm.Config); err != nil {
		return nil, err
	}
	if c.Spec.CPUs < 1 {
		return nil, fmt.Errorf("cpu count is %d; it must be at least 1", c.Spec.CPUs)
	}
	if c.Spec.MemorySize < 64<<20 {
		return nil, fmt.Errorf("memory size is %d MB; it must be at least 64", c.Spec.MemorySize>>20)
	}
	if c.Spec.AgentPort == c.Spec.LivenessPort && c.Spec.AgentPort != 0 {
		return nil, fmt.Errorf("agent and liveness share port %d; give them different ones", c.Spec.AgentPort)
	}
	if c.ReadyPorts != "" {
		if _, err := guest.NewReadiness(c.ReadyPorts); err != nil {
			return nil, fmt.Errorf("ready ports: %w", err)
		}
	}
	outputs := map[string]string{}
	for _, d := range c.Devices {
		if err := s.checkDevice(d, outputs); err != nil {
			return nil, err
		}
	}
	return s, s.findInitrd()
}

func (s *Snapshotter) checkDevice(d Device, outputs map[string]string) error {
	switch d.Name {
	case vmm.State, vmm.Memory, vmm.Config:
		if d.Input != "" {
			return fmt.Errorf("device %s has an input; the snapshotter makes it", d.Name)
		}
	case vmm.Initrd:
		if d.Output != "" {
			return errors.New("device initrd has an output; a package keeps it behind its kernel")
		}
		return nil
	default:
		if d.Input == "" {
			return fmt.Errorf("device %s has no input; name the blueprint's file", d.Name)
		}
		info, err := os.Stat(d.Input)
		if err != nil {
			return fmt.Errorf("device %s: input: %w", d.Name, err)
		}
		if info.IsDir() {
			return fmt.Errorf("device %s: input %s is a directory", d.Name, d.Input)
		}
		if d.Name == vmm.Kernel {
			if err := vmm.CheckKernel(d.Input); err != nil {
				return fmt.Errorf("device %s: input %w", d.Name, err)
			}
		}
	}
	if d.Output == "" {
		return fmt.Errorf("device %s has no output; name the package's file", d.Name)
	}
	abs, err := filepath.Abs(d.Output)
	if err != nil {
		return fmt.Errorf("device %s: %w", d.Name, err)
	}
	if other, ok := outputs[abs]; ok {
		return fmt.Errorf("devices %s and %s have the same output %s", other, d.Name, d.Output)
	}
	if in, err := filepath.Abs(d.Input); d.Input != "" && err == nil && in == abs {
		return fmt.Errorf("device %s: input and output are the same file %s; name another output", d.Name, d.Output)
	}
	outputs[abs] = d.Name
	if err := newfile.CheckReplaced(abs); err != nil {
		return fmt.Errorf("device %s: %w", d.Name, err)
	}
	return nil
}

// findInitrd uses the initrd beside the kernel, where blueprints have it, unless the device is
// given.
func (s *Snapshotter) findInitrd() error {
	for _, d := range s.config.Devices {
		if d.Name == vmm.Initrd {
			s.initrd = d.Input
		}
	}
	if s.initrd == "" {
		for _, d := range s.config.Devices {
			if d.Name == vmm.Kernel {
				beside := filepath.Join(filepath.Dir(d.Input), vmm.Initrd)
				if _, err := os.Stat(beside); err == nil {
					s.initrd = beside
				}
			}
		}
	}
	if s.initrd == "" {
		return nil
	}
	if _, err := os.Stat(s.initrd); err != nil {
		return fmt.Errorf("device initrd: input: %w", err)
	}
	var err error
	s.initrd, err = filepath.Abs(s.initrd)
	return err
}

// Run makes the package, once. Its files get their names only once it is complete. On an error, or when
// ctx ends, no file of it is left, and an older package is unchanged. One error is different: if a
// file cannot get its name at the very end, the older package has lost its state, so that nobody
// resumes a mix of both.
func (s *Snapshotter) Run(ctx context.Context) (_ Result, err error) {
	if err := s.life.Start(); err != nil {
		return Result{}, fmt.Errorf("snapshot: %w", err)
	}
	// Files that a killed snapshotter has lent to its VM are given back to their owners.
	if err := vmm.ReclaimAll(s.config.Host.BaseDir, s.config.Host.Logger); err != nil {
		return Result{}, err
	}
	claim, err := network.ClaimNamespace(s.config.Host.Netns)
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, claim.Close()) }()
	user, err := s.config.Host.ClaimUser()
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, user.Close()) }()
	defer func() { err = errors.Join(err, s.discard()) }()
	if err := s.prepare(ctx); err != nil {
		return Result{}, err
	}
	spec := s.config.Spec
	spec.Initrd = s.section
	if spec.BootArgs, err = s.bootArgs(); err != nil {
		return Result{}, err
	}
	if s.config.Host.Netns == "" {
		spec.Interface = ""
	}
	if err := s.paths.Reserve(); err != nil {
		return Result{}, err
	}
	start := time.Now()
	i, err := instance.Boot(ctx, s.config.Host, spec, uuid.NewString(), s.names, s.paths, s.config.Timeout)
	if err != nil {
		return Result{}, fmt.Errorf("boot: %w", err)
	}
	defer func() { err = errors.Join(err, i.Close()) }()
	if err := i.AwaitReady(ctx, max(s.config.Timeout-time.Since(start), time.Second)); err != nil {
		return Result{}, fmt.Errorf("boot: %w", err)
	}
	booted := time.Now()
	s.config.Host.Logger.Info("Booted VM", "took", booted.Sub(start).Round(time.Millisecond), "vmm", i.Config().Hardware.VMM,
		"machine", i.Config().Hardware.Machine, "accel", i.Config().Hardware.Accel)
	if _, err := i.Suspend(ctx, s.config.Timeout); err != nil {
		return Result{}, err
	}
	if err := i.Close(); err != nil {
		return Result{}, err
	}
	if err := s.paths.Release(); err != nil {
		return Result{}, err
	}
	for name, path := range s.paths {
		if name == vmm.Config {
			continue // it is written last
		}
		if err := block.VerifyFile(ctx, path); err != nil {
			return Result{}, fmt.Errorf("device %s: %w", name, err)
		}
	}
	if err := s.publish(i.Config()); err != nil {
		return Result{}, err
	}
	result := Result{Boot: booted.Sub(start), Suspend: time.Since(booted)}
	s.config.Host.Logger.Info("Stored package", "took", result.Suspend.Round(time.Millisecond), "config", s.output(vmm.Config))
	return result, nil
}

func (s *Snapshotter) output(name string) string {
	for _, d := range s.config.Devices {
		if d.Name == name {
			return d.Output
		}
	}
	return ""
}

// prepare makes the partial outputs: copies of the inputs, and empty files that the VM will fill.
func (s *Snapshotter) prepare(ctx context.Context) error {
	for _, d := range s.config.Devices {
		if d.Name == vmm.Initrd {
			continue
		}
		output, err := filepath.Abs(d.Output)
		if err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
		place, err := s.makeIn(filepath.Dir(output))
		if err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
		s.paths[d.Name] = filepath.Join(place, filepath.Base(output))
		partial, err := private.Create(s.paths[d.Name])
		if err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
		if err := errors.Join(s.fill(ctx, d, partial), partial.Close()); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	return nil
}

// making holds the unfinished files of one output directory, in a directory inside it.
type making struct {
	lock *os.File // keeps other snapshotters from the directory
	dir  *scratch.Dir
}

const scratchPrefix = ".drafter-snapshot-"

// makeIn returns where files are made that are to be in a directory.
func (s *Snapshotter) makeIn(dir string) (string, error) {
	if err := private.MkdirAll(dir); err != nil {
		return "", err
	}
	dir, err := filepath.EvalSymlinks(dir) // one directory may have two names
	if err != nil {
		return "", err
	}
	if m := s.making[dir]; m != nil {
		return m.dir.Name(), nil
	}
	lock, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	if err := lockfile.Exclusive(lock); err != nil {
		return "", errors.Join(fmt.Errorf("a package is being made in %s: %w", dir, err), lock.Close())
	}
	m := &making{lock: lock}
	if m.dir, err = scratch.New(dir, scratchPrefix); err != nil {
		return "", errors.Join(err, lock.Close())
	}
	s.making[dir] = m
	return m.dir.Name(), nil
}

func (s *Snapshotter) fill(ctx context.Context, d Device, partial *os.File) error {
	switch d.Name {
	case vmm.Memory, vmm.State:
		size := int64(vmm.StateSize)
		if d.Name == vmm.Memory {
			size = s.config.Spec.MemorySize
		}
		return partial.Truncate(size)
	case vmm.Config:
		return nil
	default:
		var progress func(done, total int64)
		if s.config.Progress != nil {
			progress = func(done, total int64) { s.config.Progress("Copying "+d.Name, done, total) }
		}
		if err := sparse.CopyFile(ctx, partial.Name(), d.Input, progress); err != nil || d.Name != vmm.Kernel {
			return err
		}
		return s.appendInitrd(partial)
	}
}

// appendInitrd puts the initramfs behind the kernel, so that the VM can boot wherever its kernel
// device is.
func (s *Snapshotter) appendInitrd(kernel *os.File) (err error) {
	end, err := kernel.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if s.initrd == "" {
		return nil
	}
	f, err := private.Open(s.initrd, os.O_RDONLY)
	if err != nil {
		return fmt.Errorf("device initrd: %w", err)
	}
	defer f.Close() // nothing was written
	s.section.Offset = (end + block.PageSize - 1) / block.PageSize * block.PageSize
	if s.section.Size, err = io.Copy(io.NewOffsetWriter(kernel, s.section.Offset), f); err != nil {
		return fmt.Errorf("append the initramfs: %w", err)
	}
	return kernel.Sync()
}

// bootArgs adds to the user's kernel arguments what the guest cannot know: its address, and ports
// other than the default.
func (s *Snapshotter) bootArgs() (string, error) {
	spec := s.config.Spec
	return guestArgs(spec.BootArgs, s.config.Host.Netns, spec.Interface, spec.AgentPort, spec.LivenessPort, s.config.ReadyPorts, s.config.Host.KeepClock)
}

// publish writes the config and gives every file its name. The state comes last: without it, or
// with another package's, nothing can be resumed.
func (s *Snapshotter) publish(config *vmm.PackageConfig) error {
	b, err := config.Encode()
	if err != nil {
		return err
	}
	f, err := private.Open(s.paths[vmm.Config], os.O_WRONLY)
	if err != nil {
		return fmt.Errorf("write config device: %w", err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write config device: %w", err)
	}
	if err := newfile.Remove(s.output(vmm.State)); err != nil {
		return fmt.Errorf("replace package: %w", err)
	}
	order := slices.Clone(s.names)
	slices.SortStableFunc(order, func(a, b string) int {
		switch vmm.State {
		case a:
			return 1
		case b:
			return -1
		}
		return 0
	})
	for _, name := range order {
		partial, ok := s.paths[name]
		if !ok {
			continue
		}
		if err := newfile.Rename(partial, s.output(name)); err != nil {
			return fmt.Errorf("publish device %s: %w", name, err)
		}
		delete(s.paths, name)
	}
	return nil
}

// discard removes what was not published.
func (s *Snapshotter) discard() error {
	var errs []error
	for _, m := range s.making {
		errs = append(errs, m.dir.Close(), m.lock.Close())
	}
	return errors.Join(errs...)
}

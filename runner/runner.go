// Package runner runs a VM from a package and writes it back when it ends, so that the next run
// continues where this one stopped.
package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"drafter/agent"
	"drafter/internal/instance"
	"drafter/internal/lifecycle"
	"drafter/internal/lockfile"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/internal/scratch"
	"drafter/internal/sparse"
	"drafter/network"
	"drafter/signature"
	"drafter/vmm"
)

// Device is one device of the package to run.
type Device struct {
	Name   string `json:"name"`
	Path   string `json:"path"`
	Shared bool   `json:"shared"` // others use the file at the same time: it is not locked
}

// Config says which package to run and how.
type Config struct {
	Host    vmm.Host
	Devices []Device

	ResumeTimeout time.Duration // bounds the answer of the agent after a resume; 0: 1 min
	// RescueTimeout bounds the answer of the agent before a suspend. After that the VM is suspended
	// without it. 0: 5 s; below 0: the agent is not waited for.
	RescueTimeout time.Duration

	Verifier *signature.Verifier // accepts packages; nil accepts all

	// MapPrivate runs on private copies: the package is not changed. The changed package is kept
	// only where outputs are named: memory and state under those names, the disks under their own
	// names beside the memory.
	MapPrivate   bool
	MemoryOutput string
	StateOutput  string
}

// Runner is one run of a package. One goroutine calls its methods; any may call Done.
type Runner struct {
	config   Config
	paths    instance.Paths // what the VMM opens
	origin   instance.Paths // the package
	pkg      *vmm.PackageConfig
	claim    *network.Claim
	user     *vmm.User
	locks    []*os.File
	private  map[string]*scratch.Dir // of the private copies, by the directory of each
	instance *instance.Instance
	life     lifecycle.Life
	reserved bool // room is set aside for the VM
}

// New checks a config and, unless it is to be verified first, the package. It touches nothing on
// the host.
func New(c Config) (*Runner, error) {
	if err := c.Host.Complete(); err != nil {
		return nil, err
	}
	c.ResumeTimeout, c.RescueTimeout = cmp.Or(c.ResumeTimeout, time.Minute), cmp.Or(c.RescueTimeout, 5*time.Second)
	r := &Runner{config: c, paths: instance.Paths{}, origin: instance.Paths{}}
	var names []string
	for _, d := range c.Devices {
		names = append(names, d.Name)
	}
	if err := instance.CheckNames(names, vmm.Config); err != nil {
		return nil, err
	}
	for _, d := range c.Devices {
		if d.Path == "" {
			return nil, fmt.Errorf("device %s has no path", d.Name)
		}
		abs, err := filepath.Abs(d.Path)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Name, err)
		}
		r.paths[d.Name], r.origin[d.Name] = abs, abs
	}
	if (c.MemoryOutput == "") != (c.StateOutput == "") {
		return nil, errors.New("a memory output without a state output, or the other way round, cannot be resumed; name both or none")
	}
	if c.MemoryOutput != "" {
		if err := r.checkOutputs(); err != nil {
			return nil, err
		}
	}
	if c.Verifier != nil {
		return r, nil // Resume opens the package once it is verified
	}
	var err error
	r.pkg, err = instance.Open(r.origin)
	return r, err
}

// Resume starts the VM. When it returns nil, the VM runs and its agent has answered. On an error
// nothing is left but what Close removes.
func (r *Runner) Resume(ctx context.Context) error {
	start := time.Now()
	if err := r.life.Start(); err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	// Files that a killed runner has lent to its VM are given back to their owners.
	err := vmm.ReclaimAll(r.config.Host.BaseDir, r.config.Host.Logger)
	if err != nil {
		return err
	}
	if r.claim, err = network.ClaimNamespace(r.config.Host.Netns); err != nil {
		return err
	}
	if r.user, err = r.config.Host.ClaimUser(); err != nil {
		return err
	}
	if err := r.lock(); err != nil {
		return err
	}
	if r.config.MapPrivate {
		if err := r.copyPrivate(ctx); err != nil {
			return fmt.Errorf("copy package: %w", err)
		}
	}
	if r.config.Verifier != nil {
		if err := r.verify(ctx); err != nil {
			return err
		}
	}
	r.reserved = true // also if only a part is
	if err := r.paths.Reserve(); err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	launched, err := instance.Launch(ctx, r.config.Host, r.pkg, r.paths)
	if err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	r.instance, err = launched.Run(ctx, start, r.config.ResumeTimeout)
	if err != nil && r.instance != nil {
		rescue, cancel := context.WithTimeout(context.WithoutCancel(ctx), instance.RescueSuspendTimeout)
		defer cancel()
		err = errors.Join(err, r.Suspend(rescue))
	}
	return err
}

// verify opens a signed package. It verifies what the VMM opens: the private copies, if there are
// any.
func (r *Runner) verify(ctx context.Context) error {
	statement, err := r.config.Verifier.Statement(nil, r.origin[vmm.Config])
	if err != nil {
		return err
	}
	if err := statement.CheckFiles(ctx, r.paths, r.config.Host.UID); err != nil {
		return err
	}
	if len(r.private) == 0 {
		r.config.Host.Logger.Warn("This run changes the package, whose signature will not fit any more; an instance of a peer leaves the package as it is")
	}
	r.pkg, err = instance.Open(r.paths)
	return err
}

// lock keeps other runs from the package's files. Many runs can make private copies at a time, but
// not while somebody writes.
func (r *Runner) lock() error {
	lock := lockfile.Exclusive
	if r.config.MapPrivate {
		lock = lockfile.Shared
	}
	for _, d := range r.config.Devices {
		if d.Shared {
			continue
		}
		f, err := private.Open(d.Path, os.O_RDONLY)
		if err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
		r.locks = append(r.locks, f)
		if err := lock(f); err != nil {
			return fmt.Errorf("device %s (%s) is %w; run a copy of the package, or pass --experimental-map-private to both", d.Name, d.Path, err)
		}
	}
	return nil
}

// copyPrivate replaces the devices by copies. A copy is made beside its output, if that is named,
// so that it can become the output. Otherwise it is made below the VMs' base directory.
func (r *Runner) copyPrivate(ctx context.Context) error {
	targets := map[string]string{}
	if r.config.MemoryOutput != "" {
		targets = r.outputs()
	} else {
		r.config.Host.Logger.Warn("Changes will be discarded at the end: no outputs are named")
	}
	for name, origin := range r.origin {
		parent := r.config.Host.BaseDir
		if target, ok := targets[name]; ok {
			parent = filepath.Dir(target)
		}
		dir, err := r.privateIn(parent)
		if err != nil {
			return err
		}
		r.paths[name] = filepath.Join(dir, name)
		if err := sparse.CopyFile(ctx, r.paths[name], origin, nil); err != nil {
			return err
		}
	}
	return nil
}

// privateIn returns the directory for copies inside a directory.
func (r *Runner) privateIn(parent string) (string, error) {
	parent, err := filepath.Abs(parent)
	if err != nil {
		return "", err
	}
	if err := private.MkdirAll(parent); err != nil {
		return "", err
	}
	if parent, err = filepath.EvalSymlinks(parent); err != nil { // one directory may have two names
		return "", err
	}
	if d := r.private[parent]; d != nil {
		return d.Name(), nil
	}
	d, err := scratch.New(parent, "drafter-private-")
	if err != nil {
		return "", err
	}
	if r.private == nil {
		r.private = map[string]*scratch.Dir{}
	}
	r.private[parent] = d
	return d.Name(), nil
}

// Done is closed when the VM has ended by itself; Wait then says how. It is nil before the VM runs.
func (r *Runner) Done() <-chan struct{} { return r.instance.Done() }

// Wait blocks until the VM ends by itself. It returns nil when the guest powered itself off.
func (r *Runner) Wait() error {
	if err := r.life.Running(); err != nil {
		return fmt.Errorf("wait: %w", err)
	}
	return r.instance.Wait()
}

// Agent is the connection with the guest's agent; nil before the VM runs, and after it was
// suspended.
func (r *Runner) Agent() *agent.Client { return r.instance.Agent() }

// Suspend stops the VM and writes it to the package, or to the outputs of a private run. Pass
// another context than the run's, which may have ended: a suspend is how a run ends well. Call
// Close afterwards.
func (r *Runner) Suspend(ctx context.Context) error {
	start := time.Now()
	if err := r.life.Running(); err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	saved, err := r.instance.Suspend(ctx, r.config.RescueTimeout)
	if !saved {
		return err
	}
	err = errors.Join(err, r.instance.Close(), r.release())
	if len(r.private) > 0 {
		if kerr := r.keepPrivate(); kerr != nil {
			return errors.Join(err, fmt.Errorf("store outputs: %w", kerr))
		}
	}
	r.config.Host.Logger.Info("Suspended VM", "took", time.Since(start).Round(time.Millisecond))
	return err
}

// release gives back the room that was set aside for the VM, which has ended.
func (r *Runner) release() error {
	if !r.reserved {
		return nil
	}
	r.reserved = false
	return r.paths.Release()
}

// outputs maps devices to the files that a private run leaves.
func (r *Runner) outputs() map[string]string {
	targets := map[string]string{}
	for name, origin := range r.origin {
		targets[name] = filepath.Join(filepath.Dir(r.config.MemoryOutput), filepath.Base(origin))
	}
	targets[vmm.Memory], targets[vmm.State] = r.config.MemoryOutput, r.config.StateOutput
	return targets
}

// checkOutputs refuses outputs that would overwrite the package or each other.
func (r *Runner) checkOutputs() error {
	taken := map[string]string{}
	for name, origin := range r.origin {
		taken[origin] = "the package's " + name
	}
	for name, target := range r.outputs() {
		abs, err := filepath.Abs(target)
		if err != nil {
			return err
		}
		if other, ok := taken[abs]; ok {
			return fmt.Errorf("output %s of device %s would overwrite %s; name one in another directory", target, name, other)
		}
		taken[abs] = "the output of " + name
		if err := newfile.CheckReplaced(abs); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
	}
	return nil
}

// keepPrivate turns the private copies into the outputs, the state last, because nothing can be
// resumed without it. After an error it can be tried again.
func (r *Runner) keepPrivate() error {
	if r.config.MemoryOutput == "" {
		return nil
	}
	targets := r.outputs()
	if r.paths[vmm.State] == targets[vmm.State] { // it was the last
		return newfile.SyncDir(filepath.Dir(targets[vmm.State]))
	}
	if err := newfile.Remove(targets[vmm.State]); err != nil {
		return err
	}
	for name, target := range targets {
		if name != vmm.State {
			if err := r.keep(name, target); err != nil {
				return err
			}
		}
	}
	return r.keep(vmm.State, targets[vmm.State])
}

// keep gives a private copy the name of its output, durably.
func (r *Runner) keep(name, target string) error {
	if r.paths[name] != target {
		if err := os.Rename(r.paths[name], target); err != nil {
			return err
		}
		r.paths[name] = target
	}
	return newfile.SyncDir(filepath.Dir(target))
}

// Close ends the VM without saving it, if it still runs, and removes what the run needed on the
// host.
func (r *Runner) Close() error {
	r.life.Close()
	var errs []error
	if r.instance != nil {
		errs = append(errs, r.instance.Close())
	}
	errs = append(errs, r.release())
	for _, d := range r.private {
		errs = append(errs, d.Close())
	}
	r.private = nil
	for _, f := range r.locks {
		errs = append(errs, f.Close())
	}
	r.locks = nil
	errs = append(errs, r.user.Close())
	r.user = nil
	if r.claim != nil {
		errs = append(errs, r.claim.Close())
		r.claim = nil
	}
	return errors.Join(errs...)
}

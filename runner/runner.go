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
	"drafter/internal/private"
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
}

// Runner is one run of a package. One goroutine calls its methods; any may call Done.
type Runner struct {
	config   Config
	paths    instance.Paths
	pkg      *vmm.PackageConfig
	claim    *network.Claim
	user     *vmm.User
	locks    []*os.File
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
	r := &Runner{config: c, paths: instance.Paths{}}
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
		r.paths[d.Name] = abs
	}
	if c.Verifier != nil {
		return r, nil // Resume opens the package once it is verified
	}
	var err error
	r.pkg, err = instance.Open(r.paths)
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

// verify opens a signed package.
func (r *Runner) verify(ctx context.Context) error {
	statement, err := r.config.Verifier.Statement(nil, r.paths[vmm.Config])
	if err != nil {
		return err
	}
	if err := statement.CheckFiles(ctx, r.paths, r.config.Host.UID); err != nil {
		return err
	}
	r.config.Host.Logger.Warn("This run changes the package, whose signature will not fit any more; an instance of a peer leaves the package as it is")
	r.pkg, err = instance.Open(r.paths)
	return err
}

// lock keeps others from the package's files.
func (r *Runner) lock() error {
	for _, d := range r.config.Devices {
		if d.Shared {
			continue
		}
		f, err := private.Open(d.Path, os.O_RDONLY)
		if err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
		r.locks = append(r.locks, f)
		if err := lockfile.Exclusive(f); err != nil {
			return fmt.Errorf("device %s (%s) is %w; run a copy of the package, or pass --experimental-map-private to both", d.Name, d.Path, err)
		}
	}
	return nil
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

// Suspend stops the VM and writes it to the package. Pass another context than the run's, which may
// have ended: a suspend is how a run ends well. Call Close afterwards.
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
	r.config.Host.Logger.Info("Suspended VM", "took", time.Since(start).Round(time.Millisecond), "paused", r.instance.SuspendPause().Round(10*time.Microsecond))
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

// Close ends the VM without saving it, if it still runs, and removes what the run needed on the
// host.
func (r *Runner) Close() error {
	r.life.Close()
	var errs []error
	if r.instance != nil {
		errs = append(errs, r.instance.Close())
	}
	errs = append(errs, r.release())
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

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"drafter/internal/block"
	"drafter/peer"
	"drafter/runner"
	"drafter/vmm"
)

// suspendable is a VM that runs.
type suspendable interface {
	Done() <-chan struct{}
	Wait() error
	Suspend(context.Context) error
}

// runUntilEnded waits until the VM ends by itself, or suspends it when ctx ends.
func runUntilEnded(ctx context.Context, vm suspendable) error {
	select {
	case <-vm.Done():
		if err := vm.Wait(); err != nil {
			return err
		}
		slog.Info("The guest powered itself off")
		return nil
	case <-ctx.Done():
		return suspend(ctx, vm)
	}
}

// suspend suspends a VM although ctx has ended.
func suspend(ctx context.Context, vm interface{ Suspend(context.Context) error }) error {
	slog.Info("Suspending VM")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), suspendTimeout)
	defer cancel()
	for began := time.Now(); ; time.Sleep(roomRetry) {
		err := vm.Suspend(ctx)
		late := time.Since(began) > roomPatience
		var what string
		switch {
		case errors.Is(err, peer.ErrNotStored) && late:
			return fmt.Errorf("the VM ends, and what it has changed is lost: %w", err)
		case errors.Is(err, peer.ErrNotStored):
			what = "The VM is suspended, but its outputs cannot be stored yet"
		case !errors.Is(err, vmm.ErrNotSuspended):
			return err
		case late || !vmm.Unstored(err):
			return fmt.Errorf("the VM ends without being suspended, and what it had in memory is lost; its disks are as after a power cut: %w", err)
		case block.NoRoom(err):
			what = "The VM cannot be suspended for want of room, and runs on; make room"
		default:
			what = "The VM cannot be suspended while its memory cannot be stored, and runs on"
		}
		slog.Error(what, "givingUpIn", (roomPatience - time.Since(began)).Round(time.Second), "error", err)
	}
}

// closeTimeout bounds the end of a VM that did not end by itself: a storage that hangs, or a VMM
// that was stopped, answers nobody.
const closeTimeout = 2 * time.Minute

// closeInTime closes what, within timeout. What it could not end ends with this process, and the
// next start removes what is left.
func closeInTime(what io.Closer, timeout time.Duration) error {
	closed := make(chan error, 1)
	go func() { closed <- what.Close() }()
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for began := time.Now(); ; {
		select {
		case err := <-closed:
			return err
		case <-tick.C:
			slog.Warn("Still waiting for all to end and to be stored", "for", time.Since(began).Round(time.Second))
		}
		if time.Since(began) > timeout {
			return fmt.Errorf("not all ended within %s, as its VMM or a storage does not answer; what was written to the disks since their last sync may be lost, and the next start removes what is left", timeout)
		}
	}
}

// A suspend that cannot be stored is tried again every roomRetry, for roomPatience: less than the
// 90 s that systemd gives a service to end.
const (
	roomRetry    = 2 * time.Second
	roomPatience = time.Minute
)

// suspendTimeout bounds a suspend as a whole: a large memory on a slow disk takes its time, but a
// hang must end.
const suspendTimeout = 10 * time.Minute

func newRunner() *cobra.Command {
	var (
		host    hostFlags
		devices string
		c       runner.Config
		private privateFlags
		verify  verifyFlags
	)
	cmd := &cobra.Command{
		Use:   "runner",
		Short: "Run a VM package on this host",
		Long: `Resumes a package and shows its console until it is ended (Ctrl-C, SIGTERM,
or SIGHUP as its terminal is closed). Then it suspends the VM into the package again, and the next
run goes on from there.

If this process is killed (SIGKILL) while the VM runs, or the guest powers itself off, the package's
memory no longer fits its state. The next run then boots the VM from its disks, which are as after a
power cut, and says so. A guest that reboots boots again.

With --verify-key, the package is read and checked first. A run changes the package, so its
signature fits the first run only; with --experimental-map-private it fits all runs.

With --experimental-map-private the package stays unchanged. What the VM changes is kept in a
temporary directory below --chroot-base-dir, and discarded at the end, also after SIGKILL. With both
outputs, the end (a suspend, or a guest that powers itself off) leaves a package there: memory and
state under these names, all else beside the memory.
` + exitCodeHelp,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if c.Devices, err = parseJSON[runner.Device]("devices", devices); err != nil {
				return err
			}
			if c.Verifier, err = verify.resolve(); err != nil {
				return err
			}
			var restore func()
			if c.Host, restore, err = host.resolve(cmd.OutOrStdout()); err != nil {
				return err
			}
			defer restore()
			c.ResumeTimeout, c.RescueTimeout = orAtOnce(host.resumeTimeout), orAtOnce(c.RescueTimeout)
			r, err := newRun(c, &private)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closeInTime(r, closeTimeout)) }()
			if err := r.Resume(cmd.Context()); err != nil {
				return err
			}
			return runUntilEnded(cmd.Context(), r)
		},
	}
	host.add(cmd)
	host.addMaxMemory(cmd)
	verify.add(cmd)
	f := cmd.Flags()
	f.StringVar(&devices, "devices", defaultJSON([]runner.Device{
		{Name: vmm.Kernel, Path: "out/package/vmlinux"},
		{Name: vmm.Disk, Path: "out/package/rootfs.ext4"},
		{Name: vmm.State, Path: "out/package/state.bin"},
		{Name: vmm.Memory, Path: "out/package/memory.bin"},
		{Name: vmm.Config, Path: "out/package/config.json"},
	}), "Devices configuration")
	f.DurationVar(&c.RescueTimeout, "rescue-timeout", 5*time.Second, "Maximum amount of time to wait for the guest's agent before a suspend, such as 30s (0: not at all)")
	private.add(cmd)
	return cmd
}

// run is a VM of a package on this host.
type run interface {
	suspendable
	io.Closer
	Resume(context.Context) error
}

// newRun returns a runner, or, for a package that is mapped privately, a peer that stays here.
func newRun(c runner.Config, private *privateFlags) (run, error) {
	if !private.on {
		return runner.New(c)
	}
	if err := peer.ProtectProcess(); err != nil {
		slog.Warn("This process serves guest memory and may be held up by the kernel", "error", err)
	}
	config := peer.Config{Host: c.Host, Verifier: c.Verifier, ResumeTimeout: c.ResumeTimeout, RescueTimeout: c.RescueTimeout}
	private.apply(&config)
	for _, d := range c.Devices {
		device := peer.DefaultDevice(d.Name)
		device.Base, device.Shared = d.Path, d.Shared
		config.Devices = append(config.Devices, device)
	}
	return peer.New(config)
}

// privateFlags map a package privately.
type privateFlags struct {
	on            bool
	memory, state string
}

func (p *privateFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&p.on, "experimental-map-private", false, "(Experimental) Map the package privately: it stays unchanged, and any number of VMs can run from it")
	f.StringVar(&p.memory, "experimental-map-private-memory-output", "", "(Experimental) Path to write the changed memory to at the end; disks go beside it (leave empty to discard changes; ignored without --experimental-map-private)")
	f.StringVar(&p.state, "experimental-map-private-state-output", "", "(Experimental) Path to write the changed state to at the end (leave empty to discard changes; ignored without --experimental-map-private)")
}

func (p *privateFlags) apply(c *peer.Config) {
	c.MapPrivate, c.MemoryOutput, c.StateOutput = p.on, p.memory, p.state
}

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
		if !errors.Is(err, vmm.ErrNotSuspended) {
			return err
		}
		if !vmm.Unstored(err) || time.Since(began) > roomPatience {
			return fmt.Errorf("the VM ends without being suspended, and what it had in memory is lost; its disks are as after a power cut: %w", err)
		}
		what := "The VM cannot be suspended while its memory cannot be stored, and runs on"
		if block.NoRoom(err) {
			what = "The VM cannot be suspended for want of room, and runs on; make room"
		}
		slog.Error(what, "givingUpIn", (roomPatience - time.Since(began)).Round(time.Second), "error", err)
	}
}

// closeTimeout bounds the end of a VM that did not end by itself: a storage that hangs, or a VMM
// that was stopped, answers nobody.
const closeTimeout = 2 * time.Minute

// closeInTime closes what runs, within timeout. What it could not end ends with this process, and
// what it leaves the next start removes.
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

// A suspend that cannot be stored is tried again so often, and for so long: less than the 90 s
// that systemd gives a service to end.
const (
	roomRetry    = 2 * time.Second
	roomPatience = time.Minute
)

// suspendTimeout bounds a suspend as a whole: a large memory on a slow disk takes its time, a hang
// must end.
const suspendTimeout = 10 * time.Minute

func newRunner() *cobra.Command {
	var (
		host    hostFlags
		devices string
		c       runner.Config
		verify  verifyFlags
	)
	cmd := &cobra.Command{
		Use:   "runner",
		Short: "Run a VM package on this host",
		Long: `Resumes a package and shows its console until it is ended (Ctrl-C, SIGTERM, or SIGHUP as its terminal is closed), then suspends the VM into the package again, so that the next run
continues there. If this process is killed (SIGKILL) while the VM runs, or the guest powers itself off, the package's memory no longer fits its state: the next run
boots the VM from its disks, which are as after a power cut, and says so. A guest that reboots boots again.

With --verify-key, the package is read and checked first. A run changes the package: its signature fits the first run, and with --experimental-map-private all of them.
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
			r, err := runner.New(c)
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
	f.DurationVar(&c.RescueTimeout, "rescue-timeout", 5*time.Second, "Maximum amount of time to wait for the guest's agent before a suspend")
	f.BoolVar(&c.MapPrivate, "experimental-map-private", false, "(Experimental) Run on private copies of the devices: the package stays unchanged")
	f.StringVar(&c.MemoryOutput, "experimental-map-private-memory-output", "", "(Experimental) Path to write the changed memory to; changed disks go beside it (leave empty to discard changes)")
	f.StringVar(&c.StateOutput, "experimental-map-private-state-output", "", "(Experimental) Path to write the changed state to (leave empty to discard changes)")
	return cmd
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"drafter/internal/expose"
	"drafter/migrate"
	"drafter/mounter"
	"drafter/peer"
	"drafter/vmm"
)

func newMounter() *cobra.Command {
	var (
		connection   transportFlags
		limits       limitFlags
		c            mounter.Config
		devices      string
		raddr, laddr string
		concurrency  int
	)
	cmd := &cobra.Command{
		Use:   "mounter",
		Short: "Expose devices without a VM, and move them live between processes and hosts",
		Long: `Exposes devices at paths, for any program, or for VMs: a peer's device whose
base is such a path, with "shared": true, moves independently of its VM.

The devices are files of this host, or received live from another mounter (--raddr). Another mounter
can take them over (--laddr). The users of a device at its path go on using it when it moves, after
a pause of some milliseconds: this process then forwards their operations to where the device is,
until it is ended. A device should have users at one of its paths at a time, or only readers,
because caches above the paths do not know of each other.

From a peer, a mounter receives the devices of its VM, which ends with that, as for 'drafter
terminator'.

Base, overlay and state file of a device are as for 'drafter peer'. If this process is killed, the
next start cleans up behind it; what was synced is there.
` + exitCodeHelp,
		Example: `  drafter mounter --raddr '' --laddr localhost:1337 --devices '[{"name":"data","base":"data.img","blockSize":65536,"makeMigratable":true}]'
  drafter mounter --raddr localhost:1337 --laddr '' --links out/mounts-1 --devices '[{"name":"data","base":"data-1.img","blockSize":65536,"makeMigratable":true}]'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			ctx := cmd.Context()
			if err := requireRoot(); err != nil {
				return err
			}
			if c.Devices, err = parseJSON[mounter.Device]("devices", devices); err != nil {
				return err
			}
			if raddr != "" && raddr == laddr {
				return &usageError{fmt.Errorf("--raddr and --laddr are both %s; pass --raddr '' to mount devices of this host, or --laddr '' (or another address) to receive them from there", raddr)}
			}
			if c.Limits, err = limits.resolve(); err != nil {
				return err
			}
			show := newMigrationLog(cmd.ErrOrStderr())
			defer show.close()
			c.OnPhase, c.OnProgress = show.deviceState, show.progress
			if err := vmm.CheckBaseDir(c.BaseDir); err != nil {
				return &usageError{err}
			}
			m, err := mounter.New(c)
			if err != nil {
				return &usageError{err}
			}
			defer func() { err = errors.Join(err, closeInTime(m, suspendTimeout)) }()
			var accept migrate.Accept
			if laddr != "" {
				listener, err := connection.listen(ctx, laddr)
				if err != nil {
					return err
				}
				defer listener.Close()
				accept = listener.Accept
			}
			if raddr == "" {
				err = m.Open(ctx)
			} else {
				var dial migrate.Dial
				if dial, err = connection.dial(raddr); err == nil {
					err = m.Receive(ctx, dial)
				}
			}
			if err != nil {
				return err
			}
			for _, d := range c.Devices {
				slog.Info("Exposed device", "device", d.Name, "path", m.Path(d.Name))
			}
			return runMounter(ctx, m, accept, laddr, show)
		},
	}
	connection.add(cmd)
	limits.add(cmd)
	var defaults []mounter.Device
	for _, name := range []string{vmm.State, vmm.Memory, vmm.Kernel, vmm.Disk, vmm.Config, "oci"} {
		p, file := peer.DefaultDevice(name), vmm.PackageFile(name)
		defaults = append(defaults, mounter.Device{
			Name: name, Base: "out/package/" + file, Overlay: "out/overlay/" + file, State: "out/state/" + file, BlockSize: p.BlockSize, Expiry: p.Expiry,
			MaxDirtyBlocks: p.MaxDirtyBlocks, MinCycles: p.MinCycles, MaxCycles: p.MaxCycles, CycleThrottle: p.CycleThrottle, MakeMigratable: p.MakeMigratable,
		})
	}
	f := cmd.Flags()
	f.StringVar(&devices, "devices", defaultJSON(defaults), "Devices configuration; expiry and cycleThrottle in nanoseconds")
	f.StringVar(&c.BaseDir, "chroot-base-dir", "out/vms", "Directory to expose the devices in")
	f.StringVar(&c.Links, "links", "out/mounts", "Directory for links to the devices, one by each device's name (leave empty for none)")
	f.StringVar(&c.Expose, "expose", expose.Auto, "How the devices are exposed: auto, fuse or nbd")
	f.StringVar(&raddr, "raddr", "localhost:1337", "Remote address to connect to: HOST:PORT or unix:PATH (leave empty to disable)")
	f.StringVar(&laddr, "laddr", "localhost:1337", "Local address to listen on: HOST:PORT or unix:PATH (leave empty to disable)")
	f.IntVar(&concurrency, "concurrency", 1024, "Number of concurrent workers in migrations (kept for compatibility, without effect)")
	return cmd
}

// runMounter serves devices until ctx ends.
func runMounter(ctx context.Context, m *mounter.Mounter, accept migrate.Accept, laddr string, show *migrationLog) error {
	served := make(chan error, 1)
	if accept != nil {
		slog.Info("Migratable", "address", laddr)
		go func() {
			served <- m.Serve(ctx, accept, func() {
				if s, ok := m.Stats(); ok {
					show.summarize(s)
				}
				slog.Info("Forwarding what is done with the devices here")
			})
		}()
	}
	arrived := m.Arrived()
	for {
		select {
		case <-arrived:
			arrived = nil
			if err := m.ArrivalError(); err != nil {
				slog.Error("The rest of the devices has not arrived; who needs it waits", "error", err)
			}
		case err := <-served:
			if ctx.Err() != nil || errors.Is(err, migrate.ErrInDoubt) {
				return err
			}
			slog.Error("The devices are not migratable any more", "error", err)
			served, accept = nil, nil
		case <-ctx.Done():
			if accept == nil {
				return nil
			}
			return <-orClosed(served)
		}
	}
}

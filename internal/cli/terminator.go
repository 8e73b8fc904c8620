package cli

import (
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"drafter/terminator"
	"drafter/vmm"
)

// backupFlags are what terminator and checkpoint have in common.
type backupFlags struct {
	connection transportFlags
	raddr      string
	devices    string
	output     string
	force      bool
	storage    storageFlags
	size       sizeFlag
}

func (b *backupFlags) add(cmd *cobra.Command) {
	b.connection.add(cmd)
	f := cmd.Flags()
	f.StringVar(&b.raddr, "raddr", "localhost:1337", "Remote address to connect to: HOST:PORT or unix:PATH")
	f.StringVar(&b.devices, "devices", defaultJSON([]terminator.Device{
		{Name: vmm.Kernel, Output: "out/package/vmlinux"},
		{Name: vmm.Disk, Output: "out/package/rootfs.ext4"},
		{Name: vmm.State, Output: "out/package/state.bin"},
		{Name: vmm.Memory, Output: "out/package/memory.bin"},
		{Name: vmm.Config, Output: "out/package/config.json"},
	}), "Devices configuration: which devices to write, and where to")
	f.StringVar(&b.output, "output", "", "Directory for all devices of the VM, or s3://BUCKET/PREFIX (instead of --devices)")
	f.BoolVar(&b.force, "force", false, forceHelp)
	b.storage.add(cmd)
	b.size.add(cmd)
}

const forceHelp = "Take the VM even if its guest's agent does not answer within the peer's --rescue-timeout; data that the guest has not flushed is as after a power cut"

// run takes a VM, or a copy of it.
func (b *backupFlags) run(cmd *cobra.Command, isCopy bool) error {
	c := terminator.Config{Dir: b.output, Copy: isCopy, Force: b.force}
	if b.output != "" && cmd.Flags().Changed("devices") {
		return &usageError{errors.New("--output and --devices both say what to write; give one of them")}
	}
	if strings.HasPrefix(b.output, storageScheme) {
		var err error
		if c.Place, err = b.storage.place("output", b.output); err != nil {
			return err
		}
		c.Dir = ""
	}
	if b.output == "" {
		var err error
		if c.Devices, err = parseJSON[terminator.Device]("devices", b.devices); err != nil {
			return err
		}
	}
	var err error
	if c.Limits.MaxSize, err = b.size.resolve(); err != nil {
		return err
	}
	show := newMigrationLog(cmd.ErrOrStderr())
	defer show.close()
	c.OnPhase, c.OnProgress = show.phase, show.progress
	dial, err := b.connection.dial(b.raddr)
	if err != nil {
		return err
	}
	t, err := terminator.New(c)
	if err != nil {
		return &usageError{err}
	}
	stats, err := t.Run(cmd.Context(), dial)
	if err != nil {
		return err
	}
	message := "Completed all device migrations, and wrote the VM; it does not run any more"
	if isCopy {
		message = "Wrote a copy of the VM, which goes on"
	}
	slog.Info(message, "took", stats.Total.Round(time.Millisecond), "paused", stats.Paused.Round(10*time.Microsecond), "bytes", stats.Wire)
	return nil
}

func newTerminator() *cobra.Command {
	var b backupFlags
	cmd := &cobra.Command{
		Use:   "terminator",
		Short: "Receive a VM from a peer, end it, and write it to files or an object storage",
		Long: `Receives a VM from a peer as another peer would, but does not run it. Writes
the VM's devices to plain files: a package that can be run, or only those devices that are listed.
The VM ends with that. 'drafter checkpoint' does the same for a VM that goes on.

The files appear once all of them are complete and durable. If they are all of one directory that
has no subdirectories, they replace its content at once; until then, and on any failure, it is
unchanged. If anything fails before the VM is handed over, it runs on at its peer. Afterwards the
peer keeps all of it until the files are complete. If this process is killed in between, 'drafter
peer settle --here' lets the VM go on there.
` + exitCodeHelp,
		Example: `  drafter terminator --raddr localhost:1337 --output out/backup`,
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return b.run(cmd, false) },
	}
	b.add(cmd)
	return cmd
}

func newCheckpoint() *cobra.Command {
	var b backupFlags
	cmd := &cobra.Command{
		Use:   "checkpoint",
		Short: "Back up a running VM to files or an object storage, without ending it",
		Long: `Asks a peer for a copy of its VM and writes it to plain files: a package that
can be run, or only those devices that are listed. The VM is copied while it runs, then paused as
for a handoff, and goes on while the rest is sent. The copy is the VM in the moment of that pause.
Its guest is told as for a suspend, so that it can flush its data.

The files appear once all of them are complete and durable. If they are all of one directory that
has no subdirectories, they replace its content at once; until then, and on any failure, it is
unchanged.

With --output s3://BUCKET/PREFIX, the copy is the latest backup there once it is complete. Only what
differs from the one before is uploaded. 'drafter peer --package s3://BUCKET/PREFIX' starts an
instance from it. The temporary files ($TMPDIR) take as much room as the VM.

A listener that lets others take a VM lets them copy it, too: see --insecure and the TLS flags of
'drafter peer'.
` + exitCodeHelp,
		Example: `  drafter checkpoint --raddr localhost:1337 --output out/backup
  drafter checkpoint --raddr localhost:1337 --output s3://backups/redis`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return b.run(cmd, true) },
	}
	b.add(cmd)
	return cmd
}

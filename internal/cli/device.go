package cli

import (
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"drafter/internal/block"
	"drafter/internal/progress"
	"drafter/mounter"
	"drafter/peer"
)

func newDevice() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "device",
		Short: "Look at the devices of an instance",
		Long:  "Works on the files of a device while no VM uses them.\n" + exitCodeHelp,
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newDeviceCheck(), newDeviceExport())
	return cmd
}

func overlayFlags(cmd *cobra.Command, p *block.OverlayPaths) {
	cmd.Flags().StringVar(&p.Base, "base", "out/package/rootfs.ext4", "The device's base, a file of the package")
	cmd.Flags().StringVar(&p.Overlay, "overlay", "out/overlay/rootfs.ext4", "The device's overlay")
	cmd.Flags().StringVar(&p.State, "state", "out/state/rootfs.ext4", "The device's state file")
}

func newDeviceCheck() *cobra.Command {
	var paths block.OverlayPaths
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Verify base, overlay and state file of a device",
		Long: `Verifies that base, overlay and state file are intact and belong together,
and says what is wrong. Nothing is changed.

Unsynced blocks of a killed writer are reported, although the next use discards them. So are a part
that never arrived in a migration, and a base that is not wholly pulled yet. A device that came by a
migration without its base is checked without it. For a device without an overlay, pass --overlay ''
--state ''.
` + exitCodeHelp,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			problems, err := peer.Device{Base: paths.Base, Overlay: paths.Overlay, State: paths.State}.Problems(cmd.Context())
			if err != nil {
				return err
			}
			mounted := mounter.Device{Base: paths.Base, State: paths.State}
			if err := mounted.CheckHere(); err != nil {
				problems = append(problems, fmt.Sprintf("as a mounter left it: %v", err))
			}
			if len(problems) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "The device is sound.")
				return nil
			}
			for _, p := range problems {
				fmt.Fprintln(cmd.OutOrStdout(), p)
			}
			return fmt.Errorf("device check found %d problems", len(problems))
		},
	}
	overlayFlags(cmd, &paths)
	return cmd
}

func newDeviceExport() *cobra.Command {
	var (
		paths  block.OverlayPaths
		output string
	)
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Write a device, base and overlay together, to a plain file",
		Long: `Writes what a VM would read from the device to a file of its own. So a disk
can be taken out of an instance that cannot be resumed, because its process was killed. 'drafter
snapshotter' makes a new package from it; its file system recovers as after a power cut.
` + exitCodeHelp,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			mounted := mounter.Device{Base: paths.Base, State: paths.State}
			if err := mounted.CheckHere(); err != nil {
				return fmt.Errorf("as a mounter left the device: %w", err)
			}
			d := peer.Device{Base: paths.Base, Overlay: paths.Overlay, State: paths.State}
			bars := progress.New(cmd.ErrOrStderr())
			defer bars.Close()
			if err := d.Export(cmd.Context(), output, func(done, total int64) { bars.Report("Exporting", done, total) }); err != nil {
				return err
			}
			slog.Info("Exported device", "output", output)
			return nil
		},
	}
	overlayFlags(cmd, &paths)
	cmd.Flags().StringVar(&output, "output", "out/exported.img", "File to write")
	return cmd
}

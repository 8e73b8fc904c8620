package cli

import (
	"errors"
	"log/slog"

	"github.com/spf13/cobra"

	"drafter/internal/progress"
	"drafter/packager"
	"drafter/vmm"
)

func newPackager() *cobra.Command {
	var (
		path, devices string
		extract       bool
		verify        verifyFlags
	)
	cmd := &cobra.Command{
		Use:   "packager",
		Short: "Store devices in a .tar.zst file, or extract them",
		Long: `Stores the devices of a package or blueprint in one .tar.zst file, which any
tar can read, or extracts them from one. Files get their names only once everything is complete. So
an archive that is truncated or damaged, or that --verify-key refuses, replaces nothing.

The signature of a package (see 'drafter sign'), package.sig beside its config device, is stored and
extracted with it.
` + exitCodeHelp,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := parseJSON[packager.Device]("devices", devices)
			if err != nil {
				return err
			}
			verifier, err := verify.resolve()
			if err != nil {
				return err
			}
			if verifier != nil && !extract {
				return &usageError{errors.New("--verify-key is for --extract; 'drafter sign' signs a package before it is stored")}
			}
			bars := progress.New(cmd.ErrOrStderr())
			defer bars.Close()
			if extract {
				err = packager.Extract(cmd.Context(), path, list, verifier, bars.Report)
			} else {
				err = packager.Create(cmd.Context(), path, list, bars.Report)
			}
			if err != nil {
				return err
			}
			slog.Info(map[bool]string{true: "Extracted package", false: "Created package"}[extract], "path", path, "devices", len(list))
			return nil
		},
	}
	verify.add(cmd)
	f := cmd.Flags()
	f.StringVar(&devices, "devices", defaultJSON([]packager.Device{
		{Name: vmm.Kernel, Path: "out/package/vmlinux"},
		{Name: vmm.Disk, Path: "out/package/rootfs.ext4"},
		{Name: vmm.State, Path: "out/package/state.bin"},
		{Name: vmm.Memory, Path: "out/package/memory.bin"},
		{Name: vmm.Config, Path: "out/package/config.json"},
	}), "Devices configuration")
	f.StringVar(&path, "package-path", "out/app.tar.zst", "Path of the package file")
	f.BoolVar(&extract, "extract", false, "Extract the devices from the package file, instead of storing them in it")
	return cmd
}

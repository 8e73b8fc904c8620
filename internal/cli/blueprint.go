package cli

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/dustin/go-humanize"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"drafter/blueprint"
	"drafter/internal/progress"
)

func newBlueprint() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "blueprint",
		Short: "Make what a VM boots from: an OS, and disks from OCI images",
		Long: `Makes blueprints. 'blueprint os' makes Drafter's own small OS from Debian
packages. 'blueprint oci' makes a disk that holds an OCI image as a runtime bundle, which that OS
starts.
` + exitCodeHelp,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newBlueprintOS(), newBlueprintOCI())
	return cmd
}

func newBlueprintOS() *cobra.Command {
	var (
		c    blueprint.OSConfig
		size string
	)
	cmd := &cobra.Command{
		Use:   "os",
		Short: "Make kernel, initramfs and root file system from Debian packages",
		Long: `Makes vmlinux, initrd and rootfs.ext4 from Debian packages, with apt and dpkg
of this host. The root file system holds an OCI runtime (crun), a shell with the usual tools
(busybox) and drafter-guest, which is its init and agent.
` + exitCodeHelp,
		Example: "  drafter blueprint os --output out/blueprint",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			var err error
			if c.Size, err = parseSize(size); err != nil {
				return err
			}
			if c.Guest, err = findGuest(c.Guest); err != nil {
				return err
			}
			bars := progress.New(cmd.ErrOrStderr())
			defer bars.Close()
			c.Progress = bars.Report
			if err := blueprint.BuildOS(cmd.Context(), c); err != nil {
				return err
			}
			slog.Info("Made OS blueprint", "output", c.Output)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Output, "output", "out/blueprint", "Directory to write vmlinux, initrd and rootfs.ext4 to")
	f.StringVar(&c.Guest, "guest-bin", "", "drafter-guest binary (default: beside this program, or on PATH)")
	f.StringVar(&c.Kernel, "kernel", blueprint.DefaultKernel, "Debian package of the kernel")
	f.StringSliceVar(&c.Packages, "package", nil, "Further Debian package for the root file system (repeatable)")
	f.StringVar(&size, "size", "", "Size of the root file system in bytes, such as 1GiB (default: its content and 256 MiB)")
	f.StringVar(&c.Cache, "cache", "", "Directory to keep downloaded packages in (default: none are kept)")
	return cmd
}

// findGuest finds drafter-guest.
func findGuest(path string) (string, error) {
	if path != "" {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("--guest-bin: %w", err)
		}
		return path, nil
	}
	if self, err := os.Executable(); err == nil {
		if real, err := filepath.EvalSymlinks(self); err == nil {
			self = real
		}
		beside := filepath.Join(filepath.Dir(self), "drafter-guest")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath("drafter-guest")
	if err != nil {
		return "", errors.New("drafter-guest is neither beside this program nor on PATH; build it with 'make build', or pass --guest-bin")
	}
	return path, nil
}

func parseSize(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	var n byteSize
	if err := n.Set(s); err != nil {
		return 0, &usageError{fmt.Errorf("--size: %w", err)}
	}
	return int64(n), nil
}

// byteSize is a flag's size in bytes.
type byteSize int64

// Set implements pflag.Value.
func (b *byteSize) Set(s string) error {
	n, err := humanize.ParseBytes(s)
	if err != nil || n == 0 || n > 1<<50 {
		return fmt.Errorf("%q is no size; write it as 1GiB", s)
	}
	*b = byteSize(n)
	return nil
}

// String implements pflag.Value.
func (b *byteSize) String() string { return strings.ReplaceAll(humanize.IBytes(uint64(*b)), " ", "") }

// Type implements pflag.Value.
func (b *byteSize) Type() string { return "size" }

// imageFlags choose an OCI image, and bound what it may become.
func imageFlags(cmd *cobra.Command, c *blueprint.ImageConfig, limits *blueprint.Limits, command *string) {
	limits.Bytes = 64 << 30
	cmd.Flags().Var((*byteSize)(&limits.Bytes), "max-unpacked", "Most bytes of all files of the image's layers together, such as 64GiB")
	cmd.Flags().Int64Var(&limits.Files, "max-files", 4_000_000, "Most files of the image's layers together, each counted with the directories of its name")
	cmd.Flags().StringVar(&c.Platform, "platform", "", "Platform of the image, such as linux/arm64 (default: this host's)")
	cmd.Flags().BoolVar(&c.PlainHTTP, "plain-http", false, "Talk to the registry without TLS; registries on loopback addresses need no flag")
	cmd.Flags().StringVar(command, "command", "", "Command to run in place of the image's entrypoint and command: a JSON array of strings, or a line for its shell")
}

// openImage opens the image that the flags of imageFlags choose.
func openImage(cmd *cobra.Command, c blueprint.ImageConfig, limits blueprint.Limits, command string) (v1.Image, error) {
	c.MaxArchive = limits.Bytes
	image, err := blueprint.OpenImage(cmd.Context(), c)
	if err != nil || command == "" {
		return image, err
	}
	if image, err = blueprint.WithCommand(image, command); err != nil {
		return nil, &usageError{fmt.Errorf("--command: %w", err)}
	}
	return image, nil
}

const referenceHelp = `
REF is docker://NAME[:TAG|@DIGEST] for any registry, with credentials from docker's config.json, or what
'docker save', 'podman save', skopeo, buildah and others write: oci:DIRECTORY[:NAME],
oci-archive:FILE[:NAME], docker-archive:FILE[:NAME] or dir:DIRECTORY. NAME chooses one of several images:
a tag, a whole name such as docker.io/library/redis:7, or @N for the N-th one, from 0. Archives, and
their layers, may be compressed (gzip, zstd, xz, bzip2).
`

// oneArg wants exactly one argument.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return &usageError{fmt.Errorf("give one %s; see '%s --help'", what, cmd.CommandPath())}
		}
		return nil
	}
}

func newBlueprintOCI() *cobra.Command {
	var (
		image   blueprint.ImageConfig
		limits  blueprint.Limits
		command string
		disk    blueprint.Ext4Config
		size    string
	)
	cmd := &cobra.Command{
		Use:   "oci REF",
		Short: "Make a disk from an OCI image",
		Long: `Makes an ext4 disk that holds an OCI image as a runtime bundle. The image's
config means what it means to Docker; --command changes the command. To change its environment or
mounts, use 'oci unpack', edit the bundle's config.json, and use 'oci pack'. The image is unpacked
in TMPDIR, which needs room for all of it.
` + referenceHelp + exitCodeHelp,
		Example: `  drafter blueprint oci docker://valkey/valkey:latest --output out/blueprint/oci.ext4`,
		Args:    oneArg("image reference"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			var err error
			if disk.Size, err = parseSize(size); err != nil {
				return err
			}
			image.Ref = args[0]
			img, err := openImage(cmd, image, limits, command)
			if err != nil {
				return err
			}
			bars := progress.New(cmd.ErrOrStderr())
			defer bars.Close()
			disk.Progress = bars.Report
			if err := blueprint.BuildOCI(cmd.Context(), img, limits, disk); err != nil {
				return err
			}
			slog.Info("Made OCI blueprint", "image", image.Ref, "output", disk.Output)
			return nil
		},
	}
	imageFlags(cmd, &image, &limits, &command)
	cmd.Flags().StringVar(&disk.Output, "output", "out/blueprint/oci.ext4", "File to write")
	cmd.Flags().StringVar(&size, "size", "", "Size of the disk in bytes, such as 4GiB (default: the image and 512 MiB)")
	cmd.AddCommand(newBlueprintOCIUnpack(), newBlueprintOCIPack())
	return cmd
}

func newBlueprintOCIUnpack() *cobra.Command {
	var (
		image   blueprint.ImageConfig
		limits  blueprint.Limits
		command string
		output  string
	)
	cmd := &cobra.Command{
		Use:     "unpack REF",
		Short:   "Unpack an OCI image into a runtime bundle",
		Long:    "Makes a directory with the image's files in rootfs/ and its config.json, to edit before 'oci pack'. Only root can enter it: there are setuid programs and\ndevices of a stranger's in it.\n" + referenceHelp + exitCodeHelp,
		Example: "  drafter blueprint oci unpack docker://valkey/valkey:latest --output out/oci-runtime-bundle",
		Args:    oneArg("image reference"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			image.Ref = args[0]
			img, err := openImage(cmd, image, limits, command)
			if err != nil {
				return err
			}
			bars := progress.New(cmd.ErrOrStderr())
			defer bars.Close()
			if err := blueprint.UnpackOCI(cmd.Context(), img, output, limits, bars.Report, slog.Default()); err != nil {
				return err
			}
			slog.Info("Unpacked image", "image", image.Ref, "output", output)
			return nil
		},
	}
	imageFlags(cmd, &image, &limits, &command)
	cmd.Flags().StringVar(&output, "output", "out/oci-runtime-bundle", "Directory to write the bundle to; it must be empty or not exist")
	return cmd
}

func newBlueprintOCIPack() *cobra.Command {
	var (
		disk blueprint.Ext4Config
		size string
	)
	cmd := &cobra.Command{
		Use:     "pack DIRECTORY",
		Short:   "Make a disk from a runtime bundle",
		Long:    "Makes an ext4 disk from an OCI runtime bundle, wherever it comes from.\n" + exitCodeHelp,
		Example: "  drafter blueprint oci pack out/oci-runtime-bundle --output out/blueprint/oci.ext4",
		Args:    oneArg("bundle directory"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			var err error
			if disk.Size, err = parseSize(size); err != nil {
				return err
			}
			bars := progress.New(cmd.ErrOrStderr())
			defer bars.Close()
			disk.Source, disk.Progress = args[0], bars.Report
			if err := blueprint.PackOCI(cmd.Context(), disk); err != nil {
				return err
			}
			slog.Info("Packed bundle", "output", disk.Output)
			return nil
		},
	}
	cmd.Flags().StringVar(&disk.Output, "output", "out/blueprint/oci.ext4", "File to write")
	cmd.Flags().StringVar(&size, "size", "", "Size of the disk in bytes, such as 4GiB (default: the bundle and 512 MiB)")
	return cmd
}

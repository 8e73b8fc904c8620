package cli

import (
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"drafter/internal/progress"
	"drafter/packager"
)

const artifactHelp = `
REF is NAME[:TAG], such as registry.example.com/vms/redis:1, with or without docker:// before it.
Credentials come from docker's config.json, where 'docker login' puts them.
`

func newPush() *cobra.Command {
	var pkg string
	var plainHTTP bool
	cmd := &cobra.Command{
		Use:   "push REF",
		Short: "Store a VM package in an OCI registry",
		Long: `Stores a package as an OCI artifact in any OCI registry. Layers that the
registry has already are not uploaded again. 'drafter pull' fetches it, and 'drafter peer --package
docker://REF' starts an instance of it at once, with the rest pulled behind the running VM.
` + artifactHelp + exitCodeHelp,
		Example: `  drafter push registry.example.com/vms/redis:1 --package out/package`,
		Args:    oneArg("reference"),
		RunE: func(cmd *cobra.Command, args []string) error {
			start := time.Now()
			show := progress.New(cmd.ErrOrStderr())
			digest, err := packager.Artifact{Reference: args[0], PlainHTTP: plainHTTP}.Push(cmd.Context(), pkg, show.Report)
			show.Close()
			if err != nil {
				return err
			}
			slog.Info("Pushed package", "reference", args[0], "digest", digest, "took", time.Since(start).Round(time.Millisecond))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&pkg, "package", "out/package", "Directory of the package")
	f.BoolVar(&plainHTTP, "plain-http", false, "Talk to the registry without TLS; registries on loopback addresses need no flag")
	return cmd
}

func newPull() *cobra.Command {
	var output string
	var verify verifyFlags
	var size sizeFlag
	var plainHTTP bool
	cmd := &cobra.Command{
		Use:   "pull REF",
		Short: "Fetch a VM package from an OCI registry",
		Long: `Fetches a package that 'drafter push' has stored. Every block is verified. A
pull that was interrupted goes on where it was. Files that are there already are kept if they are
the package's; other files there are an error. With --verify-key, nothing is fetched unless one of
the keys has signed it ('drafter sign').
` + artifactHelp + exitCodeHelp,
		Example: `  drafter pull registry.example.com/vms/redis:1 --output out/package`,
		Args:    oneArg("reference"),
		RunE: func(cmd *cobra.Command, args []string) error {
			start := time.Now()
			verifier, err := verify.resolve()
			if err != nil {
				return err
			}
			maxSize, err := size.resolve()
			if err != nil {
				return err
			}
			show := progress.New(cmd.ErrOrStderr())
			source := packager.Artifact{Reference: args[0], PlainHTTP: plainHTTP, MaxSize: maxSize}
			digest, err := source.Pull(cmd.Context(), output, verifier, show.Report)
			show.Close()
			if err != nil {
				return err
			}
			slog.Info("Pulled package", "output", output, "digest", digest, "took", time.Since(start).Round(time.Millisecond))
			return nil
		},
	}
	verify.add(cmd)
	size.add(cmd)
	f := cmd.Flags()
	f.StringVar(&output, "output", "out/package", "Directory to write the package to")
	f.BoolVar(&plainHTTP, "plain-http", false, "Talk to the registry without TLS; registries on loopback addresses need no flag")
	return cmd
}

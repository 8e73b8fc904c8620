package cli

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"drafter/api"
	"drafter/client"
	"drafter/internal/progress"
	"drafter/packager"
)

const artifactHelp = `
REF is NAME[:TAG], such as registry.example.com/vms/redis:1, with or without docker:// before it.
Credentials come from docker's config.json, where 'docker login' puts them.
`

func newPush() *cobra.Command {
	var e everyday
	var pkg string
	var plainHTTP bool
	cmd := &cobra.Command{
		Use:   "push [VM|PACKAGE] REF",
		Short: "Store a VM or a package in an OCI registry",
		Long: `Stores a package as an OCI artifact in any OCI registry. Layers that the
registry has already are not uploaded again. 'drafter run docker://REF' starts VMs from it, 'drafter
pull' fetches it, and 'drafter peer --package docker://REF' starts an instance of it at once, with the
rest pulled behind the running VM.

With a VM or a package, the daemon stores it: of a VM, a copy as 'drafter snapshot' makes it. With REF
alone, it is the package in the directory --package.
` + artifactHelp + `The daemon uses those of its own user, root.
` + exitCodeHelp,
		Example: `  drafter push cache docker://registry.example.com/vms/redis:1
  drafter push registry.example.com/vms/redis:1 --package out/package`,
		Args: cobra.RangeArgs(1, 2), ValidArgsFunction: first(e.complete(pushable)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 2 {
				return pushStored(cmd, &e, args[0], args[1])
			}
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
	return e.add(cmd)
}

// pushStored lets the daemon push.
func pushStored(cmd *cobra.Command, e *everyday, source, ref string) error {
	for _, flag := range []string{"package", "plain-http"} {
		if cmd.Flags().Changed(flag) {
			return &usageError{fmt.Errorf("--%s is for a package in a directory; leave %s out", flag, source)}
		}
	}
	c := client.New(e.socket)
	defer c.Close()
	o, err := c.Push(cmd.Context(), api.Push{Source: source, Reference: ref})
	if err == nil {
		_, err = awaitOrCancel(cmd, c, o)
	}
	return err
}

func newPull() *cobra.Command {
	var e everyday
	var output, memory string
	var verify verifyFlags
	var size sizeFlag
	var plainHTTP bool
	var r api.Pull
	cmd := &cobra.Command{
		Use:   "pull IMAGE|REF",
		Short: "Fetch an image or a VM package from an OCI registry",
		Long: `Looks an image up anew, and makes the package of it that 'drafter run' with the same memory and
CPUs starts from: so that run takes no time. A package that 'drafter push' has stored is fetched. The
key of the package is printed.

With --output, it fetches a package that 'drafter push' has stored to a directory, without the daemon.
Every block is verified. A pull that was interrupted goes on where it was. Files that are there already
are kept if they are the package's; other files there are an error. With --verify-key, nothing is
fetched unless one of the keys has signed it ('drafter sign').
` + artifactHelp + `The daemon uses those of its own user, root.
` + exitCodeHelp,
		Example: `  drafter pull docker://valkey/valkey
  drafter pull registry.example.com/vms/redis:1 --output out/package`,
		Args: oneArg("reference"), ValidArgsFunction: first(e.complete(imageNames)),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if output == "" {
				for _, flag := range []string{"verify-key", "signature", "max-size", "plain-http"} {
					if cmd.Flags().Changed(flag) {
						return &usageError{fmt.Errorf("--%s is for a package in a directory; name that with --output", flag)}
					}
				}
				if r.Memory, err = parseBytes("memory", memory); err != nil {
					return err
				}
				r.Image = args[0]
				return pullStored(cmd, &e, r)
			}
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
	f.StringVar(&output, "output", "", "Directory to write a package to, such as out/package (default: the daemon's own)")
	f.BoolVar(&plainHTTP, "plain-http", false, "Talk to the registry without TLS; registries on loopback addresses need no flag")
	f.StringVarP(&memory, "memory", "m", "", "Memory of the VM, such as 512MB (default 1GiB)")
	f.IntVar(&r.CPUs, "cpus", 0, "Number of virtual CPUs (default 1)")
	f.StringVar(&r.Platform, "platform", "", "Platform of the image, such as linux/arm64 (default: this host's)")
	return e.add(cmd)
}

// pullStored lets the daemon pull.
func pullStored(cmd *cobra.Command, e *everyday, r api.Pull) error {
	c := client.New(e.socket)
	defer c.Close()
	o, err := c.Pull(cmd.Context(), r)
	if err == nil {
		o, err = awaitOrCancel(cmd, c, o)
	}
	if err == nil {
		_, err = fmt.Fprintln(cmd.OutOrStdout(), o.Package)
	}
	return err
}

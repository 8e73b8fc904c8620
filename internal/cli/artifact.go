package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"drafter/artifact"
	"drafter/internal/block"
	"drafter/internal/progress"
	"drafter/signature"
	"drafter/vmm"
)

const artifactHelp = `
REF is NAME[:TAG], such as registry.example.com/vms/redis:1, with or without docker:// before it. Credentials come from docker's config.json, where 'docker login'
puts them.
`

func newPush() *cobra.Command {
	var pkg string
	var plainHTTP bool
	cmd := &cobra.Command{
		Use:   "push REF",
		Short: "Store a VM package in an OCI registry",
		Long: `Stores a package as an OCI artifact in any OCI registry. Layers that the registry has already are not uploaded again. 'drafter pull' brings it back, and
'drafter peer --package docker://REF' starts an instance of it at once, with the rest pulled behind the running VM.
` + artifactHelp + exitCodeHelp,
		Example: `  drafter push registry.example.com/vms/redis:1 --package out/package`,
		Args:    oneArg("reference"),
		RunE: func(cmd *cobra.Command, args []string) error {
			names, files, err := vmm.PackageFiles(pkg)
			if err != nil {
				return err
			}
			var devices []artifact.Device
			for _, name := range names {
				devices = append(devices, artifact.Device{Name: name, File: filepath.Join(pkg, files[name])})
			}
			start := time.Now()
			show := progress.New(cmd.ErrOrStderr())
			digest, err := artifact.Push(cmd.Context(), args[0], plainHTTP, devices, show.Report)
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
	f.BoolVar(&plainHTTP, "plain-http", false, "Talk to the registry without TLS")
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
		Long: `Fetches a package that 'drafter push' has stored. Every block is verified. A pull that was interrupted goes on where it was; files that are there already are
kept if they are the package's, and an error if not. With --verify-key, nothing is fetched unless one of the keys has signed it ('drafter sign').
` + artifactHelp + exitCodeHelp,
		Example: `  drafter pull registry.example.com/vms/redis:1 --output out/package`,
		Args:    oneArg("reference"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			start := time.Now()
			verifier, err := verify.resolve()
			if err != nil {
				return err
			}
			maxSize, err := size.resolve()
			if err != nil {
				return err
			}
			p, err := artifact.Open(cmd.Context(), args[0], plainHTTP, maxSize)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, p.Close()) }()
			contentsOf := block.FileContents
			if verifier != nil {
				if err := verifyArtifact(p, verifier); err != nil {
					return err
				}
				contentsOf = signature.HashFile
			}
			if err := signature.Keep(p.Signature(), filepath.Join(output, vmm.PackageFile(vmm.Config)), verifier != nil); err != nil {
				return err
			}
			show := progress.New(cmd.ErrOrStderr())
			defer show.Close()
			for _, name := range configLast(p.Names()) {
				if err := vmm.CheckDeviceName(name); err != nil {
					return err
				}
				remote, _ := p.Remote(name)
				path := filepath.Join(output, vmm.PackageFile(name))
				if err := fetchFile(cmd.Context(), path, remote, contentsOf, func(done, total int64) { show.Report("Pulling "+name, done, total) }); err != nil {
					return fmt.Errorf("device %s: %w", name, err)
				}
			}
			slog.Info("Pulled package", "output", output, "digest", p.Digest, "took", time.Since(start).Round(time.Millisecond))
			return nil
		},
	}
	verify.add(cmd)
	size.add(cmd)
	f := cmd.Flags()
	f.StringVar(&output, "output", "out/package", "Directory to write the package to")
	f.BoolVar(&plainHTTP, "plain-http", false, "Talk to the registry without TLS")
	return cmd
}

// configLast puts the config device last: without it, a directory is no package.
func configLast(names []string) []string {
	var list, last []string
	for _, name := range names {
		if name == vmm.Config {
			last = append(last, name)
		} else {
			list = append(list, name)
		}
	}
	return append(list, last...)
}

// fetchFile makes the file at path have a remote's content.
func fetchFile(ctx context.Context, path string, remote block.Remote, contentsOf func(context.Context, string) (*block.Contents, error), show func(done, total int64)) error {
	if _, err := os.Stat(path); err == nil {
		contents, err := contentsOf(ctx, path)
		if err != nil {
			return err
		}
		if contents.Device != remote.Contents.Device {
			return fmt.Errorf("%s exists, and is another one; choose another directory, or remove it", path)
		}
		show(contents.Size, contents.Size)
		return nil
	}
	d, err := block.OpenPulled(ctx, path, remote)
	if err != nil {
		return err
	}
	return errors.Join(d.Fill(ctx, show), d.Close())
}

package packager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"drafter/internal/artifact"
	"drafter/internal/block"
	"drafter/signature"
	"drafter/vmm"
)

// Artifact is a package in an OCI registry. Credentials are those of docker.
type Artifact struct {
	Reference string       // NAME[:TAG], with or without docker:// before it
	PlainHTTP bool         // whether to talk to the registry without TLS
	MaxSize   int64        // most bytes of all devices together; 0: 128 times this host's memory
	Logger    *slog.Logger // nil: slog.Default()
}

// Push stores the package in directory dir as the artifact, and returns its digest. It replaces an
// older artifact at once when all is there. Layers that the registry has already are not uploaded
// again.
func (a Artifact) Push(ctx context.Context, dir string, progress Progress) (digest string, err error) {
	names, files, err := vmm.PackageFiles(dir)
	if err != nil {
		return "", err
	}
	var devices []artifact.Device
	for _, name := range names {
		devices = append(devices, artifact.Device{Name: name, File: filepath.Join(dir, files[name])})
	}
	hash, err := artifact.Push(ctx, a.Reference, a.PlainHTTP, devices, artifact.Progress(progress), a.Logger)
	if err != nil {
		return "", err
	}
	return hash.String(), nil
}

// Pull makes directory dir hold the package, and returns its digest. Every block is verified. A
// pull that was interrupted goes on where it was. Files that are there already are kept if they are
// the package's; other files there are an error. With a verifier, which may be nil, nothing is
// pulled unless it accepts the package.
func (a Artifact) Pull(ctx context.Context, dir string, verifier *signature.Verifier, progress Progress) (digest string, err error) {
	p, err := artifact.Open(ctx, a.Reference, a.PlainHTTP, a.MaxSize, a.Logger)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	contentsOf := block.FileContents
	if verifier != nil {
		if err := verifyArtifact(p, verifier); err != nil {
			return "", err
		}
		contentsOf = block.HashFile
	}
	if err := signature.Keep(p.Signature(), filepath.Join(dir, vmm.PackageFile(vmm.Config)), verifier != nil); err != nil {
		return "", err
	}
	for _, name := range configLast(p.Names()) {
		if err := vmm.CheckDeviceName(name); err != nil {
			return "", err
		}
		remote, _ := p.Remote(name)
		show := func(done, total int64) { progress.report("Pulling "+name, done, total) }
		if err := pullFile(ctx, filepath.Join(dir, vmm.PackageFile(name)), remote, contentsOf, show); err != nil {
			return "", fmt.Errorf("device %s: %w", name, err)
		}
	}
	return p.Digest.String(), nil
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

// pullFile makes the file at path hold a remote's content.
func pullFile(
	ctx context.Context, path string, remote block.Remote,
	contentsOf func(context.Context, string) (*block.Contents, error), show func(done, total int64),
) error {
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

// Verify returns the digest of an artifact that the verifier accepts, and an error for any other.
// It reads the lists of content ids, by which every block is verified when it is pulled.
func (a Artifact) Verify(ctx context.Context, verifier *signature.Verifier) (digest string, err error) {
	p, err := artifact.Open(ctx, a.Reference, a.PlainHTTP, a.MaxSize, a.Logger)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	return p.Digest.String(), verifyArtifact(p, verifier)
}

// verifyArtifact checks the content ids that a package in a registry lists.
func verifyArtifact(p *artifact.Package, verifier *signature.Verifier) error {
	statement, err := verifier.Statement(p.Signature(), "")
	if err != nil {
		return err
	}
	for _, name := range p.Names() {
		remote, _ := p.Remote(name)
		if err := statement.Check(signed(name, remote.Contents)); err != nil {
			return err
		}
	}
	return statement.CheckNames(p.Names())
}

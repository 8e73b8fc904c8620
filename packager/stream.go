package packager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"drafter/internal/block"
	"drafter/internal/private"
	"drafter/signature"
	"drafter/vmm"
)

// Write writes the package in directory dir to w as an archive, with its signature if it has one; see
// [Create].
func Write(ctx context.Context, w io.Writer, dir string, progress Progress) error {
	names, files, err := vmm.PackageFiles(dir)
	if err != nil {
		return err
	}
	var devices []Device
	for _, name := range names {
		devices = append(devices, Device{Name: name, Path: filepath.Join(dir, files[name])})
	}
	signed, err := signature.Beside(filepath.Join(dir, files[vmm.Config]))
	if err == nil {
		err = write(ctx, w, signed, devices, progress)
	}
	if err != nil {
		return fmt.Errorf("write package %s: %w", dir, err)
	}
	return nil
}

// Read makes directory dir, and a package in it of the archive r, with all its devices and its
// signature if it has one. A verifier, which may be nil, must accept the package. The devices may have
// 128 times this host's memory together. On an error, remove dir: it may hold anything.
func Read(ctx context.Context, r io.Reader, dir string, verifier *signature.Verifier, progress Progress) error {
	err := private.MkdirAll(dir)
	if err != nil {
		return err
	}
	x := &extraction{
		outputs: &outputs{dir: dir}, seen: map[string]bool{}, progress: progress, verifier: verifier, contents: map[string]*block.Contents{},
	}
	if err = x.read(ctx, r); err == nil {
		err = x.verify()
	}
	config := filepath.Join(dir, vmm.PackageFile(vmm.Config))
	if err == nil && !x.seen[vmm.Config] {
		err = errors.New("it holds no device config, so it is no package")
	}
	if err == nil {
		err = signature.Keep(x.signature, config, true)
	}
	if err != nil {
		return fmt.Errorf("read package: %w", err)
	}
	return nil
}

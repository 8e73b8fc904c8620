package packager

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"drafter/internal/block"
	"drafter/internal/newfile"
	"drafter/signature"
	"drafter/vmm"
)

// Sign signs the package in directory dir. No VM may run from it. The signature is written to file,
// or with "" beside the config device, from where it goes into archives and registries.
func Sign(ctx context.Context, dir string, key *signature.PrivateKey, file string) error {
	names, files, err := vmm.PackageFiles(dir)
	if err != nil {
		return err
	}
	var devices []signature.Device
	for _, name := range names {
		d, err := describe(ctx, name, filepath.Join(dir, files[name]))
		if err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
		devices = append(devices, d)
	}
	envelope, err := signature.Sign(signature.NewStatement(devices), key)
	if err != nil {
		return err
	}
	if file == "" {
		file = filepath.Join(dir, signature.File)
	}
	if err := newfile.Write(file, func(f *os.File) error { _, err := f.Write(envelope); return err }); err != nil {
		return fmt.Errorf("write signature: %w", err)
	}
	return nil
}

// describe reads all of a device. Nobody may write to it meanwhile.
func describe(ctx context.Context, name, path string) (signature.Device, error) {
	f, err := block.OpenFile(path, true)
	if err != nil {
		return signature.Device{}, err
	}
	defer f.Close() // nothing was written
	if err := f.Lock(false); err != nil {
		return signature.Device{}, fmt.Errorf("%s is %w; sign a package that no VM runs from", f.Name(), err)
	}
	c, err := block.Hash(ctx, f)
	if err != nil {
		return signature.Device{}, err
	}
	return signed(name, c), nil
}

// signed is what a statement says of a device.
func signed(name string, c *block.Contents) signature.Device {
	return signature.Device{Name: name, Size: c.Size, Content: c.Device.String()}
}

// Verify refuses the package in directory dir if the verifier does not accept it. Everything is
// read.
func Verify(ctx context.Context, dir string, verifier *signature.Verifier) error {
	names, files, err := vmm.PackageFiles(dir)
	if err != nil {
		return err
	}
	paths := map[string]string{}
	for _, name := range names {
		paths[name] = filepath.Join(dir, files[name])
	}
	statement, err := verifier.Statement(nil, paths[vmm.Config])
	if err != nil {
		return err
	}
	return statement.CheckFiles(ctx, paths, 0)
}

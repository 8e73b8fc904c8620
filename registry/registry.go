// Package registry serves the devices of a package to any number of targets at once, read-only. A
// peer that connects starts an instance over them at once, and pulls the missing blocks behind the
// running VM.
package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"

	"drafter/internal/block"
	"drafter/internal/logging"
	"drafter/internal/migration"
	"drafter/migrate"
	"drafter/signature"
	"drafter/transport"
	"drafter/vmm"
)

// Device is one device to serve.
type Device struct {
	Name      string `json:"name"`
	Input     string `json:"input"`     // its file, which must not change while it is served
	BlockSize int64  `json:"blockSize"` // bytes; a hint for those who pull it
}

// PackageDevices lists the devices of a registry from the directory of a package.
func PackageDevices(dir string) ([]Device, error) {
	names, files, err := vmm.PackageFiles(dir)
	if err != nil {
		return nil, err
	}
	var devices []Device
	for _, name := range names {
		devices = append(devices, Device{Name: name, Input: filepath.Join(dir, files[name]), BlockSize: block.ContentBlockSize})
	}
	return devices, nil
}

// Config says what to serve.
type Config struct {
	Devices []Device
	// most that are served at once; 0: 1024. A target has two, and each takes some 2 MiB. A host
	// gets no more of them than are left for others
	Connections int
	Limits      migrate.Limits
	Logger      *slog.Logger // nil: slog.Default()
}

// Registry serves one package.
type Registry struct {
	config  Config
	files   []*block.File
	offered []migration.OfferedDevice
	offer   *migration.Offer
}

// Open opens the devices. It reads all of a device whose content ids are not known yet. Close the
// registry.
func Open(ctx context.Context, c Config) (_ *Registry, err error) {
	c.Connections = cmp.Or(c.Connections, 1024)
	if c.Connections < 0 {
		return nil, fmt.Errorf("%d connections at once are not enough to serve anybody", c.Connections)
	}
	if len(c.Devices) == 0 {
		return nil, errors.New("there are no devices to serve")
	}
	seen := map[string]bool{}
	for _, d := range c.Devices {
		if err := vmm.CheckDeviceName(d.Name); err != nil {
			return nil, err
		}
		if seen[d.Name] {
			return nil, fmt.Errorf("device %s is listed twice", d.Name)
		}
		seen[d.Name] = true
		if err := block.CheckBlockSize(d.BlockSize); err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	r := &Registry{config: c, files: make([]*block.File, len(c.Devices)), offered: make([]migration.OfferedDevice, len(c.Devices))}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	g, ctx := errgroup.WithContext(ctx)
	for i, d := range c.Devices {
		g.Go(func() (err error) {
			if r.files[i], err = block.OpenFile(d.Input, true); err != nil {
				return fmt.Errorf("device %s: %w", d.Name, err)
			}
			if err := r.files[i].Lock(false); err != nil {
				return fmt.Errorf("device %s: %s is %w; serve a package that no instance writes to", d.Name, d.Input, err)
			}
			contents, err := block.FileContents(ctx, d.Input)
			if err != nil {
				return fmt.Errorf("device %s: %w", d.Name, err)
			}
			r.offered[i] = migration.OfferedDevice{Name: d.Name, Device: r.files[i], BlockSize: d.BlockSize, Contents: contents}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if err := checkSizes(r.offered); err != nil {
		return nil, err
	}
	var signed []byte
	if i := slices.IndexFunc(c.Devices, func(d Device) bool { return d.Name == vmm.Config }); i >= 0 {
		if signed, err = signature.Beside(c.Devices[i].Input); err != nil {
			return nil, err
		}
	}
	r.offer, err = migration.NewOffer(r.offered, signed, c.Connections, c.Limits)
	return r, err
}

// checkSizes compares the devices with the config device, if that is one of them.
func checkSizes(offered []migration.OfferedDevice) error {
	sizes := map[string]int64{}
	var config block.Device
	for _, d := range offered {
		sizes[d.Name] = d.Device.Size()
		if d.Name == vmm.Config {
			config = d.Device
		}
	}
	if config == nil {
		return nil
	}
	listed, err := vmm.DecodeConfigDevice(config)
	if err != nil {
		return err
	}
	for _, d := range listed.Devices {
		if size, ok := sizes[d.Name]; ok && size < d.Size {
			return fmt.Errorf("device %s has %d bytes, but its package says %d; serve files of one package", d.Name, size, d.Size)
		}
	}
	return nil
}

// ServedDevice describes a device of the registry.
type ServedDevice struct {
	Name    string
	Size    int64  // bytes
	Content string // content id, in hex
}

// Devices are the devices that are served.
func (r *Registry) Devices() []ServedDevice {
	var devices []ServedDevice
	for _, d := range r.offered {
		devices = append(devices, ServedDevice{d.Name, d.Device.Size(), d.Contents.Device.String()})
	}
	return devices
}

// Serve serves targets until ctx ends. It is called once.
func (r *Registry) Serve(ctx context.Context, accept migrate.Accept) {
	complaints := logging.Limited{Logger: r.config.Logger}
	migrate.AcceptAll(ctx, r.config.Logger, accept, func(ctx context.Context, stream io.ReadWriteCloser) {
		if err := r.offer.Handle(ctx, stream); err != nil && ctx.Err() == nil {
			complaints.Warn("A connection with a target failed", "from", transport.Peer(stream), "error", err)
		}
	})
}

// Close frees the devices, once Serve has returned. It is idempotent.
func (r *Registry) Close() error {
	var errs []error
	if r.offer != nil {
		errs = append(errs, r.offer.Close())
	}
	for _, f := range r.files {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	r.files = nil
	return errors.Join(errs...)
}

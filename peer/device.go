package peer

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"drafter/internal/block"
	"drafter/internal/stack"
	"drafter/s3"
	"drafter/vmm"
)

// Device is one device of an instance.
type Device struct {
	Name    string `json:"name"`
	Base    string `json:"base"`    // file of the package; read-only where there is an overlay
	Overlay string `json:"overlay"` // file with the changed blocks; empty to write to the base
	State   string `json:"state"`   // file that says which blocks the overlay holds

	// bytes; the unit of tracking changes and, but for memory, of copying
	BlockSize int64 `json:"blockSize"`
	// how long a written block counts as hot; in nanoseconds in JSON
	Expiry time.Duration `json:"expiry"`
	// the handoff may begin with so many dirty blocks
	MaxDirtyBlocks int `json:"maxDirtyBlocks"`
	MinCycles      int `json:"minCycles"` // quiet cycles before the handoff
	// cycles after which the handoff begins in any case
	MaxCycles int `json:"maxCycles"`
	// pause between cycles; in nanoseconds in JSON
	CycleThrottle time.Duration `json:"cycleThrottle"`

	MakeMigratable bool `json:"makeMigratable"` // whether the device moves with the VM
	// others use the device at the same time: it is not locked, and does not move with the VM
	Shared     bool `json:"shared"`
	SharedBase bool `json:"sharedbase"` // the target of a move has the base too

	S3Sync        bool   `json:"s3sync"`
	S3AccessKey   string `json:"s3accesskey"`
	S3SecretKey   string `json:"s3secretkey"`
	S3Endpoint    string `json:"s3endpoint"`
	S3Secure      bool   `json:"s3secure"`
	S3Bucket      string `json:"s3bucket"`
	S3Concurrency int    `json:"s3concurrency"`
	// of the names of the instance's files, which each instance has for itself
	S3Prefix string `json:"s3prefix"`
}

// DefaultDevice returns a device with default settings and no paths.
func DefaultDevice(name string) Device {
	return Device{
		Name: name, BlockSize: 64 << 10, Expiry: time.Second, MaxDirtyBlocks: 200, MinCycles: 5, MaxCycles: 20,
		CycleThrottle: 500 * time.Millisecond, MakeMigratable: true,
	}
}

// PackageDevices lists the devices of an instance from two directories: the package's files, under
// the names that the README gives them, and the instance's overlays and state files. Directories of
// the instance that are missing are made. Without an instance directory the instance writes to the
// package.
func PackageDevices(pkg, instance string) ([]Device, error) {
	names, files, err := vmm.PackageFiles(pkg)
	if errors.Is(err, os.ErrNotExist) && instance != "" {
		if names := arrivedNames(pkg, instance); names != nil {
			return NewPackageDevices(names, pkg, instance), nil
		}
	}
	if err != nil {
		return nil, err
	}
	var devices []Device
	for _, name := range names {
		devices = append(devices, packageDevice(name, files[name], pkg, instance))
	}
	return devices, nil
}

// arrivedNames returns the names of the devices of an instance that a migration brought to a host
// without its package; nil for any other instance.
func arrivedNames(pkg, instance string) []string {
	d := packageDevice(vmm.Config, vmm.PackageFile(vmm.Config), pkg, instance)
	// The overlay holds all of it. It is read while a peer may run.
	_, size, found, err := block.OverlayBase(d.files().OverlayPaths())
	if err != nil || !found {
		return nil
	}
	f, err := block.OpenFile(d.Overlay, true)
	if err != nil {
		return nil
	}
	defer f.Close()                     // nothing was written
	b := make([]byte, min(size, 1<<20)) // no config is longer
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil
	}
	config, err := vmm.DecodePackageConfig(b)
	if err != nil {
		return nil
	}
	names := []string{vmm.Config}
	for _, listed := range config.Devices {
		names = append(names, listed.Name)
	}
	return names
}

// NewPackageDevices is [PackageDevices] for a package that is not there yet, with devices of these
// names.
func NewPackageDevices(names []string, pkg, instance string) []Device {
	var devices []Device
	for _, name := range names {
		devices = append(devices, packageDevice(name, vmm.PackageFile(name), pkg, instance))
	}
	return devices
}

func packageDevice(name, file, pkg, instance string) Device {
	d := DefaultDevice(name)
	d.Base = filepath.Join(pkg, file)
	if instance != "" {
		d.Overlay, d.State = filepath.Join(instance, "overlay", file), filepath.Join(instance, "state", file)
	}
	return d
}

// files are the device's.
func (d *Device) files() *stack.Files {
	f := &stack.Files{Base: d.Base, Overlay: d.Overlay, State: d.State, BlockSize: d.BlockSize, Shared: d.Shared}
	f.Remedy = "settle it there with 'drafter peer settle --here', and give up what is here with 'drafter peer settle --away'"
	// An overlay of memory has blocks of one page. A guest writes memory at random, and the first
	// write to a larger block would copy the rest of it from the base. A disk has larger blocks,
	// because a sync of it also syncs the state file when blocks are new; memory has no syncs.
	f.Memory = d.Name == vmm.Memory
	return f
}

// Export writes a device that no VM uses, base and overlay together, to a new file at path. It
// calls progress, which may be nil, with the number of bytes that are done.
func (d Device) Export(ctx context.Context, path string, progress func(done, total int64)) (err error) {
	device, err := d.files().Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, device.Close()) }()
	return block.Export(ctx, path, device, progress)
}

// Problems verifies a device that no VM uses. It returns what is wrong, one line of text for each
// problem, and an error only if it could not read the device. Nothing is changed.
func (d Device) Problems(ctx context.Context) ([]string, error) { return d.files().Problems(ctx) }

// moves tells whether the device moves with the VM.
func (d *Device) moves() bool { return d.MakeMigratable && !d.Shared }

// receive returns the device that stores the pages of a migration.
func (d *Device) receive(under block.Device) *block.Incoming {
	if d.Name == vmm.State {
		under = &heldHeader{Device: under}
	}
	return block.NewIncoming(under, d.Name == vmm.Memory)
}

// checkSettings refuses settings that cannot work.
func (d *Device) checkSettings() error {
	if err := d.files().CheckPaths(); err != nil {
		return err
	}
	if d.BlockSize != 0 || d.Overlay != "" {
		if err := block.CheckBlockSize(d.BlockSize); err != nil {
			return err
		}
	}
	if d.SharedBase && d.Overlay == "" {
		return errors.New("it shares its base and would write to it; name an overlay and a state file")
	}
	if d.S3Sync {
		if !d.moves() {
			return errors.New("s3sync needs makeMigratable on, and shared off")
		}
		return d.place().Check()
	}
	return nil
}

// place is where the device is backed up.
func (d *Device) place() s3.Place {
	return s3.Place{
		Endpoint: d.S3Endpoint, Secure: d.S3Secure, Bucket: d.S3Bucket, Prefix: d.S3Prefix, AccessKey: d.S3AccessKey, SecretKey: d.S3SecretKey,
		Concurrency: d.S3Concurrency,
	}
}

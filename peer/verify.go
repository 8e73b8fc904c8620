package peer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"drafter/internal/block"
	"drafter/internal/private"
	"drafter/internal/stack"
	"drafter/internal/wire"
	"drafter/signature"
	"drafter/vmm"
)

// verify reads the signed statement of the package, if only signed packages are accepted. The
// package may have come with its signature. The devices are known; their content is checked when
// they are opened.
func (p *Peer) verify(carried []byte) (err error) {
	if p.config.Verifier == nil {
		return nil
	}
	if p.statement, err = p.config.Verifier.Statement(carried, p.configBase()); err != nil {
		return err
	}
	return p.checkPlaces()
}

// checkPlaces refuses devices that are not those that were signed, or whose bases others can
// change.
func (p *Peer) checkPlaces() error {
	// Files that a killed process has lent to its VM are given back to their owners.
	if err := vmm.ReclaimAll(p.config.Host.BaseDir, p.log); err != nil {
		return err
	}
	var names []string
	for _, d := range p.config.Devices {
		names = append(names, d.Name)
		if err := private.CheckPlace(d.Base, 0); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	if !p.config.MapPrivate && slices.ContainsFunc(p.config.Devices, func(d Device) bool { return d.Overlay == "" }) {
		p.log.Warn("This run changes the package, whose signature will not fit any more; --instance leaves the package as it is")
	}
	return p.statement.CheckNames(names)
}

// configBase is the path of the config device's file in the package; "" while that is not known.
func (p *Peer) configBase() string {
	if i := slices.IndexFunc(p.config.Devices, func(d Device) bool { return d.Name == vmm.Config }); i >= 0 {
		return p.config.Devices[i].Base
	}
	return ""
}

// files are those of a device. Its base is verified if only signed packages are accepted.
func (p *Peer) files(d *Device) *stack.Files {
	f := d.files()
	f.Private = p.config.MapPrivate && p.origin == nil && p.syncer == nil // these know bases by their content
	if p.statement != nil {
		f.Check = func(c *block.Contents) error {
			return p.statement.Check(signature.Device{Name: d.Name, Size: c.Size, Content: c.Device.String()})
		}
	}
	return f
}

// decodeConfig decodes the content of the config device. The config never changes, so its signed
// content id also holds for a copy from an overlay or a source.
func (p *Peer) decodeConfig(b []byte) (*vmm.PackageConfig, error) {
	if p.statement != nil {
		c := block.HashBytes(b)
		if err := p.statement.Check(signature.Device{Name: vmm.Config, Size: c.Size, Content: c.Device.String()}); err != nil {
			return nil, err
		}
	}
	p.configDevice = b
	return vmm.DecodePackageConfig(b)
}

// carriedSignature is the part of the package's signature that a target gets; nil if it could use
// none.
func (p *Peer) carriedSignature() []byte {
	if p.signature != nil {
		return p.signature
	}
	b, err := signature.Beside(p.configBase())
	if err != nil {
		p.log.Warn("Targets do not get the package's signature", "error", err)
	}
	return b
}

// verify checks the VM's config from the source before anything in it is used. Nobody has signed
// what the VM has written since it was packaged.
func (a *arrival) verify(m wire.Manifest) (err error) {
	p := a.p
	p.signature = m.Signature
	if p.config.Verifier != nil {
		if p.statement, err = p.config.Verifier.Statement(m.Signature, p.configBase()); err != nil {
			return err
		}
	}
	if a.config, err = p.decodeConfig(slices.Clone(m.Config)); err != nil {
		return fmt.Errorf("the source's config device: %w", err)
	}
	return nil
}

// receiver returns the device that stores the pages of an arriving device.
func (a *arrival) receiver(d *Device) func(block.Device) *block.Incoming {
	if a.p.statement == nil || d.Name != vmm.Kernel {
		return d.receive
	}
	return func(under block.Device) *block.Incoming {
		a.kernel = &sealable{Device: under}
		return d.receive(a.kernel)
	}
}

// verifyKernel checks the kernel that has arrived before a VMM loads it, and keeps it, because it
// never changes.
func (a *arrival) verifyKernel(ctx context.Context) error {
	if a.p.statement == nil {
		return nil
	}
	if a.kernel != nil {
		a.kernel.seal()
	}
	c, err := block.Hash(ctx, a.p.devices.Get(vmm.Kernel))
	if err != nil {
		return fmt.Errorf("device %s: %w", vmm.Kernel, err)
	}
	return a.p.statement.Check(signature.Device{Name: vmm.Kernel, Size: c.Size, Content: c.Device.String()})
}

// sealable is a device that nobody can write to once it is sealed. Without the seal a source could
// send other content after the content that was verified.
type sealable struct {
	block.Device

	mu     sync.RWMutex // held to write
	sealed bool
}

// seal waits for the writes under way.
func (s *sealable) seal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sealed = true
}

// WriteAt implements [block.Device].
func (s *sealable) WriteAt(p []byte, off int64) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.sealed {
		return 0, errors.New("it was verified, and cannot change any more")
	}
	return s.Device.WriteAt(p, off)
}

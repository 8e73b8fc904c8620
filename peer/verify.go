package peer

import (
	"context"
	"fmt"
	"log/slog"
	"slices"

	"drafter/block"
	"drafter/signature"
	"drafter/stack"
	"drafter/vmm"
	"drafter/wire"
)

// verify finds out what was signed of the package, which may have come with a signature, if only signed ones are accepted. The devices are known; what they
// contain is checked when they are opened.
func (p *Peer) verify(carried []byte) (err error) {
	if p.config.Verifier == nil {
		return nil
	}
	if p.statement, err = p.config.Verifier.Statement(carried, p.configBase()); err != nil {
		return err
	}
	return p.checkPlaces()
}

// checkPlaces refuses devices that are not those that were signed, or whose bases others can change.
func (p *Peer) checkPlaces() error {
	var names []string
	for _, d := range p.config.Devices {
		names = append(names, d.Name)
		if err := signature.CheckPlace(d.Base, 0); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	if slices.ContainsFunc(p.config.Devices, func(d Device) bool { return d.Overlay == "" }) {
		slog.Warn("This run changes the package, whose signature will not fit any more; --instance leaves the package as it is")
	}
	return p.statement.CheckNames(names)
}

// configBase is the config device's file in the package; "" while that is not known.
func (p *Peer) configBase() string {
	if i := slices.IndexFunc(p.config.Devices, func(d Device) bool { return d.Name == vmm.Config }); i >= 0 {
		return p.config.Devices[i].Base
	}
	return ""
}

// files are those of a device, whose base is checked if only signed ones are accepted.
func (p *Peer) files(d *Device) *stack.Files {
	f := d.files()
	if p.statement != nil {
		f.Check = func(c *block.Contents) error { return p.statement.Check(d.Name, c) }
	}
	return f
}

// decodeConfig decodes the content of the config device. It never changes, so that what was signed of it also holds where an overlay or a source has it from.
func (p *Peer) decodeConfig(b []byte) (*vmm.PackageConfig, error) {
	if p.statement != nil {
		if err := p.statement.Check(vmm.Config, block.HashBytes(b)); err != nil {
			return nil, err
		}
	}
	p.configDevice = b
	return vmm.DecodePackageConfig(b)
}

// carriedSignature is what a target gets of the package's signature; nil if there is none that it could use.
func (p *Peer) carriedSignature() []byte {
	if p.signature != nil {
		return p.signature
	}
	b, err := signature.Beside(p.configBase())
	if err != nil {
		slog.Warn("Targets do not get the package's signature", "error", err)
	}
	return b
}

// verify checks the VM's config, which the source sends, before anything of it is looked at. What the VM has written since it was packaged nobody has signed.
func (a *arrival) verify(m wire.Manifest) (err error) {
	p := a.p
	p.signature = m.Signature
	if p.config.Verifier != nil {
		if p.statement, err = p.config.Verifier.Statement(m.Signature, p.configBase()); err != nil {
			return err
		}
	}
	a.config, err = p.decodeConfig(slices.Clone(m.Config))
	return err
}

// verifyKernel checks the kernel as it has arrived, before a VMM loads it: it never changes either.
func (a *arrival) verifyKernel(ctx context.Context) error {
	if a.p.statement == nil {
		return nil
	}
	c, err := block.Hash(ctx, a.p.devices[vmm.Kernel])
	if err != nil {
		return fmt.Errorf("device %s: %w", vmm.Kernel, err)
	}
	return a.p.statement.Check(vmm.Kernel, c)
}

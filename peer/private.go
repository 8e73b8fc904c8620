package peer

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"drafter/internal/block"
	"drafter/internal/kind"
	"drafter/internal/newfile"
	"drafter/vmm"
)

// A package that is mapped privately has an instance in a directory of its own, laid out as that of
// [PackageDevices], which is removed with its peer. Without outputs nothing of the VM is left then.
// With outputs, what is there at the end becomes a package, unless the VM has moved away.

// checkPrivate refuses devices and outputs that do not fit a private map.
func (p *Peer) checkPrivate() error {
	if !p.config.MapPrivate {
		return nil
	}
	taken := map[string]string{}
	for _, d := range p.config.Devices {
		if d.Overlay != "" {
			return fmt.Errorf("device %s: it has an overlay %s, and a private map has its own; name the base alone (--package without --instance), or leave --experimental-map-private out", d.Name, d.Overlay)
		}
		taken[realPath(d.Base)] = "the package's " + d.Name
	}
	for name, output := range p.outputs() {
		path := realPath(output)
		if other, ok := taken[path]; ok {
			return fmt.Errorf("output %s of device %s would overwrite %s; name one in another directory", output, name, other)
		}
		taken[path] = "the output of " + name
		if err := newfile.CheckReplaced(output); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
	}
	return nil
}

// realPath is where a file is, or will be, whatever links lead to its directory.
func realPath(path string) string {
	dir := filepath.Dir(path)
	if resolved, err := filepath.EvalSymlinks(dir); err == nil {
		dir = resolved
	}
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	return filepath.Join(dir, filepath.Base(path))
}

// outputs maps devices to the files that a private map leaves; nil if it leaves none.
func (p *Peer) outputs() map[string]string {
	if !p.config.MapPrivate || p.config.MemoryOutput == "" {
		return nil
	}
	outputs := map[string]string{}
	for _, d := range p.config.Devices {
		outputs[d.Name] = filepath.Join(filepath.Dir(p.config.MemoryOutput), filepath.Base(d.Base))
	}
	outputs[vmm.Memory], outputs[vmm.State] = p.config.MemoryOutput, p.config.StateOutput
	return outputs
}

// discards tells whether nothing of the VM is left here at its end.
func (p *Peer) discards() bool { return p.config.MapPrivate && p.config.MemoryOutput == "" }

// mapPrivately gives the devices overlays that are removed with the peer, also after kill -9.
func (p *Peer) mapPrivately(ctx context.Context) (err error) {
	if !p.config.MapPrivate {
		return nil
	}
	if p.private, err = vmm.CreateDir(p.config.Host.BaseDir, "private", p.log); err != nil {
		return err
	}
	for i := range p.config.Devices {
		d := &p.config.Devices[i]
		own := packageDevice(d.Name, vmm.PackageFile(d.Name), "", p.private.Path())
		d.Overlay, d.State = own.Overlay, own.State
		if d.BlockSize == 0 {
			d.BlockSize = own.BlockSize
		}
	}
	p.leave = func() error { return p.storeOutputs(context.WithoutCancel(ctx)) }
	p.log.Info("Mapped the package privately", "instance", p.private.Path())
	if p.discards() {
		p.log.Warn("Changes will be discarded at the end: no outputs are named")
	}
	return nil
}

// identify finds out which base each private overlay is over, so that a target that has the base
// gets changes only.
func (p *Peer) identify(ctx context.Context) error {
	if p.private == nil {
		return nil
	}
	for name, s := range p.devices.All() {
		if s.Base != (block.ID{}) || !p.device(name).moves() {
			continue
		}
		c, err := block.Hash(ctx, s.Overlay.Base())
		if err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
		s.Base = c.Device
	}
	return nil
}

// ErrNotStored says that a VM is suspended, but the outputs of its private map are not written. A
// suspend writes them when it is tried again.
var ErrNotStored = errors.New("the VM is suspended, and its outputs are not stored")

// storeOutputs writes the outputs that are not written yet, the state last: nothing can be resumed
// without it.
func (p *Peer) storeOutputs(ctx context.Context) error {
	outputs := p.outputs()
	if outputs == nil {
		return nil
	}
	if p.written == nil {
		p.written = map[string]bool{}
	}
	if err := p.writeOutputs(ctx, outputs); err != nil {
		return kind.Of(ErrNotStored, fmt.Errorf("store outputs: %w", err))
	}
	p.log.Info("Stored the VM", "memory", outputs[vmm.Memory], "state", outputs[vmm.State])
	return nil
}

func (p *Peer) writeOutputs(ctx context.Context, outputs map[string]string) error {
	if err := newfile.Remove(outputs[vmm.State]); err != nil {
		return err
	}
	for name, output := range outputs {
		if name == vmm.State || p.written[name] {
			continue
		}
		if err := block.Export(ctx, output, p.devices.Get(name), nil); err != nil {
			return err
		}
		p.written[name] = true
	}
	return block.Export(ctx, outputs[vmm.State], p.devices.Get(vmm.State), nil)
}

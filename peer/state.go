package peer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/vmm"
)

// heldHeader is a state device whose header on disk does not change until it is released, or the
// device is synced. What arrives of the header meanwhile is kept in memory. So the device says that
// the VM is arriving until it says that it runs.
type heldHeader struct {
	block.Device

	mu       sync.Mutex
	page     []byte // the first page, as its user sees it; nil while it is the same as the device's
	released bool   // nothing will be held any more
}

// ReadAt implements [block.Device].
func (h *heldHeader) ReadAt(p []byte, off int64) (int, error) {
	if off >= block.PageSize {
		return h.Device.ReadAt(p, off)
	}
	// first, because a page that is released meanwhile would be read neither here nor there
	h.mu.Lock()
	defer h.mu.Unlock()
	n, err := h.Device.ReadAt(p, off)
	if err == nil && h.page != nil {
		copy(p, h.page[off:])
	}
	return n, err
}

// WriteAt implements [block.Device].
func (h *heldHeader) WriteAt(p []byte, off int64) (int, error) {
	if off >= block.PageSize {
		return h.Device.WriteAt(p, off)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.released {
		return h.Device.WriteAt(p, off)
	}
	if h.page == nil {
		page := make([]byte, block.PageSize)
		if _, err := h.Device.ReadAt(page, 0); err != nil {
			return 0, err // and nothing is held: zeros would be released
		}
		h.page = page
	}
	n := copy(h.page[off:], p)
	if n < len(p) {
		m, err := h.Device.WriteAt(p[n:], off+int64(n))
		return n + m, err
	}
	return n, nil
}

// Sync implements [block.Device].
func (h *heldHeader) Sync() error {
	if err := h.release(); err != nil {
		return err
	}
	return h.Device.Sync()
}

// release writes the header that is held to the device. It then outlives this process, and a power
// failure once the device is synced.
func (h *heldHeader) release() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.page != nil {
		if _, err := h.Device.WriteAt(h.page, 0); err != nil {
			return err
		}
		h.page = nil
	}
	return nil
}

// releaseForGood is release, after which nothing is held. What is noted later, such as that the VM
// is leaving, outlives this process without a sync.
func (h *heldHeader) releaseForGood() error {
	err := h.release()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.released = err == nil
	return err
}

// expect notes durably that the VM may run here, beneath the header that is held.
func (h *heldHeader) expect(migration uuid.UUID) error {
	h.mu.Lock()
	err := vmm.MarkTakingOver(h.Device, migration)
	h.mu.Unlock()
	if err != nil {
		return err
	}
	return h.Device.Sync()
}

// makeRoom removes what an instance that has moved away, or did not wholly arrive, left in the
// files of devices. It refuses to touch any other instance.
func makeRoom(devices []Device) error {
	var state *Device
	for i := range devices {
		if devices[i].Name == vmm.State {
			state = &devices[i]
		}
	}
	if state.Overlay == "" {
		return nil // existing files are refused one by one
	}
	_, _, found, err := block.OverlayBase(state.files().OverlayPaths())
	if err != nil {
		return fmt.Errorf("device %s: %w", vmm.State, err)
	}
	if err := replaceable(state, devices); err != nil {
		return err
	}
	for i := range devices {
		d := &devices[i]
		if d.Overlay == "" || !d.moves() || d.Name == vmm.State {
			continue
		}
		if _, _, exists, err := block.OverlayBase(d.files().OverlayPaths()); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		} else if exists && !found {
			return fmt.Errorf("device %s: there is an overlay %s of an instance without state; choose another directory for the one that comes, or remove it", d.Name, d.Overlay)
		}
		err := block.RemoveOverlay(d.files().OverlayPaths())
		if err == nil {
			err = d.files().ForgetMissing()
		}
		if err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	if err := block.RemoveOverlay(state.files().OverlayPaths()); err != nil {
		return fmt.Errorf("device %s: %w", vmm.State, err)
	}
	return nil
}

// checkHere refuses an instance that may be elsewhere. It comes before all other checks of a start,
// and reads only the overlay of the state device.
func (p *Peer) checkHere(ctx context.Context) error {
	i := slices.IndexFunc(p.config.Devices, func(d Device) bool { return d.Name == vmm.State })
	d := &p.config.Devices[i]
	if d.Overlay == "" {
		return nil
	}
	status, refusal, boots, err := d.standing()
	switch {
	case err != nil:
		return fmt.Errorf("device %s: %w", vmm.State, err)
	case status.OfMigration():
		return fmt.Errorf("state device %s: %w", p.statePath(), refusal)
	case refusal == nil:
		return nil
	}
	if err := missing(p.config.Devices); err != nil {
		return err
	}
	if !boots {
		return fmt.Errorf("state device %s: %w", p.statePath(), refusal)
	}
	return p.forgetMemory(ctx)
}

// standing reads the overlay of a state device that is not in use. It returns the status there, why
// its VM cannot be resumed, and whether it boots instead. An overlay that was never used has no
// status.
func (d *Device) standing() (status vmm.Status, refusal error, boots bool, err error) {
	_, _, found, err := block.OverlayBase(d.files().OverlayPaths())
	if err != nil || !found {
		return 0, nil, false, err
	}
	s, err := d.files().OpenOverlay()
	if err != nil {
		return 0, nil, false, err
	}
	defer s.Close() // nothing was written
	if !s.Overlay.Present().Has(0) {
		return 0, nil, false, nil
	}
	if status, _, _, err = vmm.StateStatus(s); err != nil {
		return 0, nil, false, err
	}
	why, refused := vmm.CheckStart(s)
	return status, vmm.CheckResumable(s), why != nil && refused == nil, nil
}

// Discardable returns nil if an instance, which nobody runs, holds nothing of a VM: it was never used,
// its VM has moved away, or did not wholly arrive. Else the error says what it holds. The devices need
// not be more than the state.
func Discardable(devices []Device) error {
	i := slices.IndexFunc(devices, func(d Device) bool { return d.Name == vmm.State })
	if i < 0 || devices[i].Overlay == "" {
		return errors.New("the instance's state device has no overlay")
	}
	return replaceable(&devices[i], devices)
}

// Unsettled returns nil if no operator must settle whose a VM is before its instance, which nobody runs,
// is started or removed. The devices are all of the instance.
func Unsettled(devices []Device) error {
	i := slices.IndexFunc(devices, func(d Device) bool { return d.Name == vmm.State })
	if i < 0 || devices[i].Overlay == "" {
		return errors.New("the instance's state device has no overlay")
	}
	status, refusal, _, err := devices[i].standing()
	switch {
	case err != nil:
		return fmt.Errorf("device %s: %w", vmm.State, err)
	case status == vmm.Arriving || status == vmm.Moved:
		return nil
	case status.OfMigration():
		return refusal
	case status == vmm.Running:
		return missing(devices)
	}
	return nil
}

// replaceable refuses to overwrite an instance, unless it has moved away or did not wholly arrive.
// One that an operator must settle is refused, too.
func replaceable(state *Device, devices []Device) error {
	status, refusal, boots, err := state.standing()
	switch {
	case err != nil:
		return fmt.Errorf("device %s: %w", vmm.State, err)
	case status == 0 || status == vmm.Arriving || status == vmm.Moved:
		return nil
	case status == vmm.Running || status == vmm.PoweredOff:
		if err := missing(devices); err != nil || boots {
			refusal = err
		}
	case !status.OfMigration():
		refusal = nil
	}
	if refusal != nil {
		return fmt.Errorf("there is an instance at %s already: %w", state.State, refusal)
	}
	return fmt.Errorf("there is an instance at %s already, which has not moved away; choose another directory for the one that comes, or remove its files", state.State)
}

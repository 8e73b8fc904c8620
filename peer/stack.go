package peer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/google/uuid"

	"drafter/block"
	"drafter/vmm"
	"drafter/wire"
)

// stack is an open device: what its writes go through, down to its files.
type stack struct {
	*block.Tracker
	overlay  *block.Overlay  // nil when the device writes to its base
	base     block.ID        // content id of the overlay's base; zero when it is over zeros, or not there
	incoming *block.Incoming // nil unless a migration brought the device
	pulled   *block.Pulled   // nil unless the base is being pulled
	created  []func() error  // remove the files that were made for it
}

// Open opens a device that no VM uses, to read it. Close it.
func (d Device) Open(ctx context.Context) (block.Device, error) { return d.open(ctx) }

// open opens a device of this host.
func (d *Device) open(ctx context.Context) (*stack, error) {
	if err := d.checkMissing(); err != nil {
		return nil, err
	}
	if d.Overlay == "" {
		base, err := d.openBase(false)
		if err != nil {
			return nil, err
		}
		return &stack{Tracker: block.NewTracker(base, d.blockSize())}, nil
	}
	under, size, found, err := block.OverlayBase(d.overlayPaths())
	if err != nil {
		return nil, err
	}
	// An overlay over zeros came by a migration, without its base.
	baseless := found && under == block.ZerosID(size)
	if _, err := os.Stat(d.Base); baseless && errors.Is(err, os.ErrNotExist) {
		return d.overlayOver(block.NewZeros(size), under, block.ID{}, nil)
	}
	base, err := d.openBase(true)
	if err != nil {
		return nil, err
	}
	contents, err := block.FileContents(ctx, d.Base)
	if err != nil {
		return nil, errors.Join(err, base.Close())
	}
	if baseless && contents.Device != under {
		if err := base.Close(); err != nil {
			return nil, err
		}
		return d.overlayOver(block.NewZeros(size), under, block.ID{}, nil)
	}
	return d.overlayOver(base, contents.Device, contents.Device, nil)
}

func (d *Device) blockSize() int64 {
	if d.BlockSize == 0 {
		return block.ContentBlockSize
	}
	return d.BlockSize
}

func (d *Device) overlayPaths() block.OverlayPaths {
	return block.OverlayPaths{Base: d.Base, Overlay: d.Overlay, State: d.State}
}

func (d *Device) openBase(readOnly bool) (*block.File, error) {
	base, err := block.OpenFile(d.Base, readOnly)
	if errors.Is(err, os.ErrNotExist) && block.PartlyPulled(d.Base) {
		return nil, fmt.Errorf("its base %s was not wholly pulled yet; start once more with the --raddr or --package that it comes from", d.Base)
	}
	if err != nil {
		return nil, err
	}
	if !d.Shared {
		if err := base.Lock(!readOnly); err != nil {
			err = fmt.Errorf("%s is %w; give each instance its own overlay and state file", d.Base, err)
			return nil, errors.Join(err, base.Close())
		}
	}
	return base, nil
}

// overlayOver opens the overlay over base, whose content id is under. receive, if not nil, puts a device between the overlay and the tracker.
func (d *Device) overlayOver(base block.Device, under, id block.ID, receive func(block.Device) *block.Incoming) (*stack, error) {
	overlay, err := block.OpenOverlay(base, under, d.overlayPaths(), d.BlockSize)
	if err != nil {
		return nil, err
	}
	s := &stack{overlay: overlay, base: id}
	if receive == nil {
		s.Tracker = block.NewTracker(overlay, d.blockSize())
		return s, nil
	}
	s.incoming = receive(overlay)
	s.Tracker = block.NewTracker(s.incoming, d.blockSize())
	s.created = append(s.created, func() error { return block.RemoveOverlay(d.overlayPaths()) })
	return s, nil
}

// moves tells whether the device moves with the VM.
func (d *Device) moves() bool { return d.MakeMigratable && !d.Shared }

// receive opens a device for what a migration brings.
func (d *Device) receive(ctx context.Context, offered wire.Device) (*stack, wire.Held, error) {
	receive := func(under block.Device) *block.Incoming {
		if d.Name == vmm.State {
			under = &heldHeader{Device: under}
		}
		return block.NewIncoming(under, d.Name == vmm.Memory)
	}
	if d.Overlay == "" {
		base, err := block.CreateFile(d.Base, offered.Size)
		if errors.Is(err, os.ErrExist) {
			return nil, 0, fmt.Errorf("%s exists, and the VM would overwrite it; name an overlay and a state file, or another base", d.Base)
		}
		if err != nil {
			return nil, 0, err
		}
		if err := base.Lock(true); err != nil {
			return nil, 0, errors.Join(err, base.Close())
		}
		s := &stack{incoming: receive(base), created: []func() error{func() error { return os.Remove(d.Base) }}}
		s.Tracker = block.NewTracker(s.incoming, d.blockSize())
		return s, wire.HoldsNothing, nil
	}
	if _, err := os.Stat(d.Base); errors.Is(err, os.ErrNotExist) || offered.Base == (block.ID{}) {
		if offered.NeedsBase {
			return nil, 0, fmt.Errorf("its base %s is missing here, and the source sends changes only (sharedbase); copy the package to this host", d.Base)
		}
		s, err := d.overlayOver(block.NewZeros(offered.Size), block.ZerosID(offered.Size), block.ID{}, receive)
		return s, wire.HoldsNothing, err
	}
	base, err := d.openBase(true)
	if err != nil {
		return nil, 0, err
	}
	contents, err := block.FileContents(ctx, d.Base)
	if err != nil {
		return nil, 0, errors.Join(err, base.Close())
	}
	if contents.Device != offered.Base {
		err := fmt.Errorf("its base %s is not the one that the VM was made from; copy that package to this host, or name a base that does not exist to have all of it sent", d.Base)
		return nil, 0, errors.Join(err, base.Close())
	}
	s, err := d.overlayOver(base, contents.Device, contents.Device, receive)
	return s, wire.HoldsBase, err
}

// heldHeader is a state device whose header stays as it is until the device is synced: what arrives of it meanwhile, it keeps in memory. So the device says
// that the VM is arriving, until it says that it runs.
type heldHeader struct {
	block.Device

	mu   sync.Mutex
	page []byte // the first page, as its user sees it; nil while that is the device's
}

// ReadAt implements [block.Device].
func (h *heldHeader) ReadAt(p []byte, off int64) (int, error) {
	n, err := h.Device.ReadAt(p, off)
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil && h.page != nil && off < block.PageSize {
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
	if h.page == nil {
		h.page = make([]byte, block.PageSize)
		if _, err := h.Device.ReadAt(h.page, 0); err != nil {
			return 0, err
		}
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
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.page != nil {
		if _, err := h.Device.WriteAt(h.page, 0); err != nil {
			return err
		}
		h.page = nil
	}
	return h.Device.Sync()
}

// missingFile says, beside a device's files, that a migration has left a part of the device at its source.
func (d *Device) missingFile() string {
	if d.State != "" {
		return d.State + ".missing"
	}
	return d.Base + ".missing"
}

// noteMissing notes durably, before the VM runs, that a part of the device has not arrived.
func (d *Device) noteMissing(bytes int64) error {
	return block.Publish(d.missingFile(), func(f *os.File) error {
		_, err := fmt.Fprintf(f, "%d bytes\n", bytes)
		return err
	})
}

// forgetMissing takes the note back once all has arrived.
func (d *Device) forgetMissing() error {
	if err := os.Remove(d.missingFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// checkMissing refuses a device of which a part never arrived.
func (d *Device) checkMissing() error {
	b, err := os.ReadFile(d.missingFile())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("up to %s of it never arrived: the peer that received it was killed before the migration was complete; its source still has what it was at the handoff (settle it there with 'drafter peer settle --here')", strings.TrimSpace(string(b)))
}

// makeRoom removes what an instance that has moved away, or did not wholly arrive, left in the files of devices. It refuses to touch any other instance.
func makeRoom(devices []Device) error {
	var state *Device
	for i := range devices {
		if devices[i].Name == vmm.State {
			state = &devices[i]
		}
	}
	if state.Overlay == "" {
		return nil // files that exist are refused one by one
	}
	_, _, found, err := block.OverlayBase(state.overlayPaths())
	if err != nil {
		return fmt.Errorf("device %s: %w", vmm.State, err)
	}
	if found {
		status, _, err := stateStatus(state)
		if err != nil {
			return fmt.Errorf("device %s: %w", vmm.State, err)
		}
		if status != vmm.Arriving && status != vmm.Moved {
			return fmt.Errorf("there is an instance at %s already, which has not moved away; choose another directory for the one that comes, or remove its files", state.State)
		}
	}
	for i := range devices {
		d := &devices[i]
		if d.Overlay == "" || !d.moves() || d.Name == vmm.State {
			continue
		}
		if _, _, exists, err := block.OverlayBase(d.overlayPaths()); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		} else if exists && !found {
			return fmt.Errorf("device %s: there is an overlay %s of an instance without state; choose another directory for the one that comes, or remove it", d.Name, d.Overlay)
		}
		if err := errors.Join(block.RemoveOverlay(d.overlayPaths()), d.forgetMissing()); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	if err := block.RemoveOverlay(state.overlayPaths()); err != nil {
		return fmt.Errorf("device %s: %w", vmm.State, err)
	}
	return nil
}

// stateStatus reads the status of an instance that does not run. An overlay of the state device that holds nothing was never started.
func stateStatus(d *Device) (vmm.Status, uuid.UUID, error) {
	s, err := d.open(context.Background())
	if err != nil {
		return 0, uuid.UUID{}, err
	}
	defer s.Close() // nothing was written
	if s.overlay != nil && s.overlay.Present().Count() == 0 {
		return vmm.Moved, uuid.UUID{}, nil
	}
	status, migration, _, err := vmm.StateStatus(s)
	return status, migration, err
}

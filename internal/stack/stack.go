// Package stack puts a device together from its files: a base, an overlay with the changed blocks,
// pages that are still arriving, and the tracker of writes.
package stack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"drafter/internal/block"
	"drafter/internal/memory"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/internal/wire"
)

// Files are the files of one device.
type Files struct {
	Base      string // read-only where there is an overlay
	Overlay   string // empty to write to the base
	State     string // says which blocks the overlay holds
	BlockSize int64  // bytes; of the tracker, and of a new overlay. 0: that of the existing overlay
	Memory    bool   // it is guest memory; a new overlay has blocks of a page
	Shared    bool   // others use the base at the same time: it is not locked
	Private   bool   // the overlay is opened once only: it is not bound to the content of its base
	Remedy    string // remedy for a device that never wholly arrived, for messages

	// Check, if not nil, refuses a base by its contents. They are then computed afresh from the
	// open file, because those kept beside it may be a stranger's.
	Check func(*block.Contents) error
}

// CheckPaths refuses combinations of files that are no device.
func (f *Files) CheckPaths() error {
	if f.Base == "" {
		return errors.New("it has no base; name its file")
	}
	if (f.Overlay == "") != (f.State == "") {
		return errors.New("it has an overlay without a state file, or the other way round; name both, or none to write to the base")
	}
	return nil
}

// Distinct checks devices of which no two may have a name or a file in common.
type Distinct struct {
	names map[string]bool
	files map[string]string // to the device that has it
}

// Add refuses a device that has its name or a file in common with an earlier one.
func (d *Distinct) Add(name string, f *Files) error {
	if d.names == nil {
		d.names, d.files = map[string]bool{}, map[string]string{}
	}
	if d.names[name] {
		return fmt.Errorf("device %s is listed twice", name)
	}
	d.names[name] = true
	for _, file := range []string{f.Base, f.Overlay, f.State} {
		if other, ok := d.files[file]; ok && file != "" {
			return fmt.Errorf("devices %s and %s both use %s; each needs its own", other, name, file)
		}
		d.files[file] = name
	}
	return nil
}

// Stack is an open device, from its tracker down to its files.
type Stack struct {
	*block.Tracker
	Overlay *block.Overlay // nil when the device writes to its base
	// content id of the overlay's base; zero when it is over zeros, or not there
	Base block.ID
	// content id of the base that the device was made from, if that is not here; else zero
	Origin   block.ID
	Incoming *block.Incoming // nil unless a migration brought the device
	Pulled   *block.Pulled   // nil unless the base is being pulled
	Contents *block.Contents // of the base, if a migration came whose source lacks it; else nil
	Memory   *memory.Device  // nil unless it is guest memory
	Backlog  *block.Backlog  // writes that wait for room on the device's file system

	created []func() error // remove the files that were made for it
}

// Open opens a device of this host. Close it.
func (f *Files) Open(ctx context.Context) (*Stack, error) {
	if err := f.CheckMissing(); err != nil {
		return nil, err
	}
	if f.Overlay == "" {
		base, err := f.openBase(false)
		if err != nil {
			return nil, err
		}
		if f.Check != nil {
			if _, err := f.contents(ctx, base); err != nil {
				return nil, errors.Join(err, base.Close())
			}
		}
		s := &Stack{Backlog: block.NewBacklog(base, f.Base)}
		f.track(s, s.Backlog, nil)
		if f.Memory {
			s.Memory.Over(base, nil)
		}
		return s, nil
	}
	base, under, id, err := f.beneath(ctx)
	if err != nil {
		return nil, err
	}
	return f.overlayOver(base, under, id, block.ID{}, nil)
}

// beneath opens what lies beneath an overlay, which need not exist yet. under is the content id
// that the overlay is bound to, and id that of the base; zero without one.
func (f *Files) beneath(ctx context.Context) (base block.Device, under, id block.ID, err error) {
	under, size, baseless, err := f.baseless(ctx)
	if err != nil {
		return nil, under, id, err
	}
	if _, err := os.Stat(f.Base); baseless && errors.Is(err, os.ErrNotExist) {
		return block.NewZeros(size), under, id, nil
	}
	file, err := f.openBase(true)
	if err != nil {
		return nil, under, id, err
	}
	if f.Private && f.Check == nil {
		return file, under, id, nil
	}
	contents, err := f.contents(ctx, file)
	if err == nil && baseless && contents.Device != under {
		return block.NewZeros(size), under, id, file.Close()
	}
	if err != nil {
		return nil, under, id, errors.Join(err, file.Close())
	}
	return file, contents.Device, contents.Device, nil
}

// baseless tells whether there is an overlay over zeros, as that of a device that came by a
// migration without its base. under and size are those of the overlay.
func (f *Files) baseless(ctx context.Context) (under block.ID, size int64, baseless bool, err error) {
	under, size, found, err := block.OverlayBase(f.OverlayPaths())
	if err != nil || !found {
		return under, size, false, err
	}
	baseless, err = isZeros(ctx, under, size)
	return under, size, baseless, err
}

// OpenOverlay opens an overlay's own content, over zeros in place of its base, which need not be
// here.
func (f *Files) OpenOverlay() (*Stack, error) {
	under, size, found, err := block.OverlayBase(f.OverlayPaths())
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fmt.Errorf("overlay %s does not exist", f.Overlay)
	}
	return f.overlayOver(block.NewZeros(size), under, block.ID{}, block.ID{}, nil)
}

// Forget discards the content of an overlay that is not in use: its base shows again, or zeros
// where the device came without one. There need not be an overlay.
func (f *Files) Forget(ctx context.Context) error {
	if f.Overlay == "" {
		return nil
	}
	_, size, baseless, err := f.baseless(ctx)
	if err != nil {
		return err
	}
	if !baseless {
		return block.RemoveOverlay(f.OverlayPaths())
	}
	s, err := f.OpenOverlay()
	if err != nil {
		return err
	}
	return errors.Join(block.Trim(s, 0, size), s.Close())
}

// Problems verifies a device that is not in use, by the same rules as Open. It returns what is
// wrong, one line of text for each problem, and an error only if it could not read the device.
// Nothing is changed.
func (f *Files) Problems(ctx context.Context) (problems []string, err error) {
	if err := f.CheckMissing(); err != nil {
		problems = append(problems, err.Error())
	}
	if f.Overlay == "" {
		base, err := f.openBase(false)
		if err != nil {
			return append(problems, err.Error()), nil
		}
		return problems, base.Close()
	}
	base, under, _, err := f.beneath(ctx)
	if err != nil {
		problems = append(problems, err.Error())
		id, size, found, unread := block.OverlayBase(f.OverlayPaths())
		if unread != nil || !found || !block.PartlyPulled(f.Base) {
			return problems, nil //nolint:nilerr // what is wrong is what is looked for
		}
		// what there is of the base is verified when it is pulled
		base, under = block.NewZeros(size), id
	}
	more, err := block.Check(ctx, base, under, f.OverlayPaths())
	return append(problems, more...), err
}

// isZeros tells whether a content id is that of a device of zeros.
func isZeros(ctx context.Context, id block.ID, size int64) (bool, error) {
	zeros, err := block.ZerosID(ctx, size)
	return err == nil && id == zeros, err
}

// trackedBlockSize is the size in bytes of the blocks in which changes are tracked.
func (f *Files) trackedBlockSize() int64 {
	if f.BlockSize == 0 {
		return block.ContentBlockSize
	}
	return f.BlockSize
}

// OverlayPaths are the files of the overlay.
func (f *Files) OverlayPaths() block.OverlayPaths {
	return block.OverlayPaths{Base: f.Base, Overlay: f.Overlay, State: f.State}
}

func (f *Files) openBase(readOnly bool) (*block.File, error) {
	base, err := block.OpenFile(f.Base, readOnly)
	if errors.Is(err, os.ErrNotExist) && block.PartlyPulled(f.Base) {
		return nil, notPulled(f.Base)
	}
	if err != nil {
		return nil, err
	}
	if !f.Shared {
		if err := base.Lock(!readOnly); err != nil {
			remedy := "give each instance its own overlay and state file"
			if f.Private {
				remedy = "run a copy of the package, or pass --experimental-map-private to both"
			}
			err = fmt.Errorf("%s is %w; %s", f.Base, err, remedy)
			return nil, errors.Join(err, base.Close())
		}
	}
	return base, nil
}

func notPulled(base string) error {
	return fmt.Errorf("its base %s was not wholly pulled yet; start once more with the --raddr or --package that it comes from", base)
}

// contents returns the contents of the open base, once they are checked.
func (f *Files) contents(ctx context.Context, base *block.File) (*block.Contents, error) {
	if f.Check == nil {
		return block.FileContents(ctx, f.Base)
	}
	c, err := block.Hash(ctx, base)
	if err == nil {
		err = f.Check(c)
	}
	if err != nil {
		return nil, fmt.Errorf("base %s: %w", f.Base, err)
	}
	return c, nil
}

// overlayOver opens the overlay over base, whose content id is under. A new overlay records origin,
// the content id of a base that is not here. receive, if not nil, puts a device between the overlay
// and the tracker.
func (f *Files) overlayOver(base block.Device, under, id, origin block.ID, receive func(block.Device) *block.Incoming) (*Stack, error) {
	blockSize := f.BlockSize
	if f.Memory && blockSize != 0 { // with 0, none is made
		blockSize = block.PageSize
	}
	paths := f.OverlayPaths()
	paths.Origin = origin
	overlay, err := block.OpenOverlay(base, under, paths, blockSize)
	if err != nil {
		return nil, err
	}
	s := &Stack{Overlay: overlay, Base: id, Origin: overlay.Origin(), Backlog: overlay.Backlog()}
	f.track(s, overlay, receive)
	if file, ok := base.(*block.File); ok && f.Memory && receive == nil {
		s.Memory.Over(file, overlay.Pages)
	}
	if receive != nil {
		s.created = append(s.created, func() error { return block.RemoveOverlay(f.OverlayPaths()) })
	}
	return s, nil
}

// track puts the layers on what a device is stored in. receive, if not nil, makes the one that
// stores arriving pages.
func (f *Files) track(s *Stack, stored block.Device, receive func(block.Device) *block.Incoming) {
	top := stored
	if f.Memory {
		s.Memory = memory.New(stored)
		top = s.Memory
	}
	if receive != nil {
		s.Incoming = receive(top)
		top = s.Incoming
	}
	s.Tracker = block.NewTracker(top, f.trackedBlockSize())
	if f.Memory {
		s.Memory.Under(s.Tracker)
	}
}

// Receive opens a device for a migration to here. receive makes the device that stores arriving
// pages, over the device of the files. Receive returns what of the device is here already.
func (f *Files) Receive(ctx context.Context, offered wire.Device, receive func(under block.Device) *block.Incoming) (*Stack, wire.Held, error) {
	if f.Overlay == "" {
		base, err := block.CreateFile(f.Base, offered.Size)
		if errors.Is(err, os.ErrExist) {
			return nil, 0, fmt.Errorf("%s exists, and the VM would overwrite it; name an overlay and a state file, or another base", f.Base)
		}
		if err != nil {
			return nil, 0, err
		}
		if err := base.Lock(true); err != nil {
			return nil, 0, errors.Join(err, base.Close())
		}
		s := &Stack{Backlog: block.NewBacklog(base, f.Base), created: []func() error{func() error { return os.Remove(f.Base) }}}
		f.track(s, s.Backlog, receive)
		return s, wire.HoldsNothing, nil
	}
	if _, err := os.Stat(f.Base); errors.Is(err, os.ErrNotExist) || offered.Base == (block.ID{}) {
		if offered.NeedsBase {
			return nil, 0, fmt.Errorf("its base %s is missing here, and the source sends changes only (sharedbase); copy the package to this host", f.Base)
		}
		zeros, err := block.ZerosID(ctx, offered.Size)
		if err != nil {
			return nil, 0, err
		}
		s, err := f.overlayOver(block.NewZeros(offered.Size), zeros, block.ID{}, offered.Base, receive)
		return s, wire.HoldsNothing, err
	}
	base, err := f.openBase(true)
	if err != nil {
		return nil, 0, err
	}
	contents, err := f.contents(ctx, base)
	if err != nil {
		return nil, 0, errors.Join(err, base.Close())
	}
	if contents.Device != offered.Base {
		err := fmt.Errorf("its base %s is not the one that the VM was made from; copy that package to this host, or name a base that does not exist to have all of it sent", f.Base)
		return nil, 0, errors.Join(err, base.Close())
	}
	s, err := f.overlayOver(base, contents.Device, contents.Device, block.ID{}, receive)
	if err != nil {
		return nil, 0, err
	}
	if offered.Absent {
		s.Contents = contents
	}
	return s, wire.HoldsBase, nil
}

// own is the file without which nothing of the device is here.
func (f *Files) own() string { return cmp.Or(f.State, f.Base) }

// missingFile is a note beside a device's files that a migration has left a part of the device at
// its source.
func (f *Files) missingFile() string { return f.own() + ".missing" }

// NoteMissing notes durably, before the VM runs, that a part of the device has not arrived.
func (f *Files) NoteMissing(bytes int64) error {
	return newfile.Write(f.missingFile(), func(f *os.File) error {
		_, err := fmt.Fprintf(f, "%d bytes\n", bytes)
		return err
	})
}

// ForgetMissing removes the note once everything has arrived.
func (f *Files) ForgetMissing() error {
	if err := os.Remove(f.missingFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// maxNote bounds a note beside a device's files, in bytes.
const maxNote = 64

// CheckMissing refuses a device that never wholly arrived.
func (f *Files) CheckMissing() error {
	b, err := private.ReadFile(f.missingFile(), maxNote)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := os.Lstat(f.own()); errors.Is(err, os.ErrNotExist) {
		return nil // somebody has removed the device
	}
	if _, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(string(b)), " bytes"), 10, 64); err != nil {
		return fmt.Errorf("%s is no note of what has not arrived; look where it comes from", f.missingFile())
	}
	return fmt.Errorf("up to %s of it never arrived: the process that received it was killed before the migration was complete; its source still has what it was at the handoff (%s)", strings.TrimSpace(string(b)), f.Remedy)
}

// Remove removes the files that were made for a device.
func (s *Stack) Remove() error {
	var errs []error
	for _, f := range s.created {
		if err := f(); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// OpenOver is Open for a device whose base is pulled if it is not here.
func (f *Files) OpenOver(ctx context.Context, remote block.Remote) (*Stack, error) {
	if f.Overlay == "" {
		return nil, errors.New("its base is being pulled, so it cannot be written to; name an overlay and a state file")
	}
	if f.Check != nil {
		if err := f.Check(remote.Contents); err != nil {
			return nil, err
		}
	}
	under, size, found, err := block.OverlayBase(f.OverlayPaths())
	baseless := false
	if err == nil && found {
		baseless, err = isZeros(ctx, under, size)
	}
	if err != nil || baseless {
		return f.Open(ctx) // it came by a migration, without its base
	}
	if _, err := os.Stat(f.Base); err == nil {
		s, err := f.Open(ctx)
		if err == nil && s.Base != remote.Contents.Device {
			err = fmt.Errorf("its base %s is not what is offered; remove it to have that pulled, or name another base", f.Base)
			return nil, errors.Join(err, s.Close())
		}
		return s, err
	}
	if err := f.CheckMissing(); err != nil {
		return nil, err
	}
	base, err := block.OpenPulled(ctx, f.Base, remote)
	if err != nil {
		return nil, err
	}
	id := remote.Contents.Device
	s, err := f.overlayOver(base, id, id, block.ID{}, nil)
	if err != nil {
		return nil, err
	}
	s.Pulled = base
	return s, nil
}

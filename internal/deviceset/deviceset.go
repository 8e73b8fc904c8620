// Package deviceset holds devices that belong together, such as those of a peer or a mounter: they
// are opened, exposed, sent to the target of a migration, and closed.
package deviceset

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"

	"golang.org/x/sync/errgroup"

	"drafter/internal/block"
	"drafter/internal/expose"
	"drafter/internal/expose/fuse"
	"drafter/internal/expose/nbd"
	"drafter/internal/migration"
	"drafter/internal/stack"
	"drafter/vmm"
)

// Set is a set of devices, by their names. The zero value is an empty set. One goroutine calls
// Expose, Hide and Close; any may call the other methods.
type Set struct {
	mu     sync.Mutex // guards stacks
	stacks map[string]*stack.Stack

	dir      *vmm.Dir // of the paths; nil without them
	exposure expose.Exposure
}

// Named adds a device's name to an error about it. A nil error stays nil.
func Named(device string, err error) error {
	if err != nil {
		return fmt.Errorf("device %s: %w", device, err)
	}
	return nil
}

// Put adds an open device, which the set closes.
func (s *Set) Put(name string, d *stack.Stack) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stacks == nil {
		s.stacks = map[string]*stack.Stack{}
	}
	s.stacks[name] = d
}

// Get returns a device; nil if the set has none of that name.
func (s *Set) Get(name string) *stack.Stack {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stacks[name]
}

// All returns the devices that are in the set now.
func (s *Set) All() map[string]*stack.Stack {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.stacks)
}

// Open opens devices concurrently, because a base that is used for the first time has to be read.
// If one fails, those that were opened are in the set, too.
func (s *Set) Open(ctx context.Context, names []string, open func(ctx context.Context, name string) (*stack.Stack, error)) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, name := range names {
		g.Go(func() error {
			d, err := open(ctx, name)
			if d != nil {
				s.Put(name, d)
			}
			return Named(name, err)
		})
	}
	return g.Wait()
}

// Place is the directory, and the user, that devices are exposed for.
type Place struct {
	Base     string // parent of the directory; Expose cleans up what a killed owner left there
	Owner    string // what makes the directory: "peer", "mounter"
	Way      string // expose.FUSE or NBD
	UID, GID int    // who may use the paths

	Logger *slog.Logger // nil: slog.Default()
}

// Expose gives paths to the devices, in a directory that the next start cleans up if this process
// is killed.
func (s *Set) Expose(ctx context.Context, p Place, devices []expose.Device) (err error) {
	if s.dir, err = vmm.CreateDir(p.Base, p.Owner, p.Logger); err != nil {
		return err
	}
	if p.Way == expose.NBD {
		attached, err := nbd.Attach(ctx, s.dir.Devices(), devices)
		if err != nil {
			return err
		}
		s.exposure = attached
		return nil
	}
	mount, err := fuse.New(fuse.Config{Dir: s.dir.Devices(), UID: p.UID, GID: p.GID, Logger: p.Logger}, devices)
	if err != nil {
		return err // not assigned: a nil *Mount in an interface is not nil
	}
	s.exposure = mount
	return nil
}

// Path is where a device is exposed; "" if it is not.
func (s *Set) Path(name string) string {
	if s.exposure == nil || s.Get(name) == nil {
		return ""
	}
	return s.exposure.Path(name)
}

// Failed returns the first error that the users of a device's path got.
func (s *Set) Failed() error {
	if s.exposure == nil {
		return nil
	}
	return s.exposure.Failed()
}

// Hide removes the paths, which nobody may use any more. It is idempotent.
func (s *Set) Hide() error {
	var errs []error
	if s.exposure != nil {
		errs = append(errs, s.exposure.Close())
		s.exposure = nil
	}
	if s.dir != nil {
		errs = append(errs, s.dir.Close())
		s.dir = nil
	}
	return errors.Join(errs...)
}

// Close hides the devices, and closes them. With sync, what was written is durable then.
func (s *Set) Close(sync bool) error {
	errs := []error{s.Hide()}
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, d := range s.stacks {
		var err error
		if sync {
			err = d.Sync()
		}
		errs = append(errs, Named(name, errors.Join(err, d.Close())))
	}
	clear(s.stacks)
	return errors.Join(errs...)
}

// Source is a device as the source of a migration sends it. The caller adds its settings.
func (s *Set) Source(name string) migration.SourceDevice {
	d := s.Get(name)
	source := migration.SourceDevice{Name: name, Device: d.Tracker, Base: d.Base, Origin: d.Origin, Memory: d.Memory}
	if d.Base != (block.ID{}) {
		source.Overlay = d.Overlay
	}
	return source
}

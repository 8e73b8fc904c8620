// Package terminator receives a VM from a peer and writes it to plain files (a package that can be
// run, or only some of its devices), or to an object storage. The VM ends with that or, for a
// checkpoint, goes on at its peer.
package terminator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"

	"drafter/internal/backup"
	"drafter/internal/block"
	"drafter/internal/fileset"
	"drafter/internal/logging"
	"drafter/internal/migration"
	"drafter/internal/wire"
	"drafter/migrate"
	"drafter/s3"
	"drafter/vmm"
)

// Device is one device to write.
type Device struct {
	Name   string `json:"name"`
	Output string `json:"output"`
}

// Config says what to write. With several devices in one directory, the content of that directory
// is replaced at once when all of them are complete.
type Config struct {
	Devices []Device // of the VM's; others are not transferred
	// instead of Devices: writes all devices, under the usual names of a package's files
	Dir string
	// instead of both: writes all devices to an object storage, and replaces the backup there
	Place s3.Place
	Copy  bool // the VM goes on at its peer
	// take the VM even if its guest does not get ready to be paused; data that the guest has not
	// flushed is as after a power cut
	Force  bool
	Limits migrate.Limits
	Logger *slog.Logger // nil: slog.Default()

	// Called by the migration, which waits for them. They may be nil. OnPhase is called at every
	// change of phase, OnProgress at most ten times a second and at the end.
	OnPhase    func(migrate.Phase)
	OnProgress func(migrate.Stats)
}

// Terminator writes one VM. Use it once.
type Terminator struct {
	config Config
	paths  map[string]string
}

// New checks a config. It touches nothing on the host.
func New(c Config) (*Terminator, error) {
	c.Logger = logging.Or(c.Logger)
	t := &Terminator{config: c, paths: map[string]string{}}
	ways := 0
	for _, given := range []bool{len(c.Devices) > 0, c.Dir != "", c.Place != s3.Place{}} {
		if given {
			ways++
		}
	}
	if ways != 1 {
		return nil, errors.New("either devices, or a directory or an object storage for all of them must be given")
	}
	seen := map[string]string{}
	for _, d := range c.Devices {
		if err := vmm.CheckDeviceName(d.Name); err != nil {
			return nil, err
		}
		if d.Output == "" {
			return nil, fmt.Errorf("device %s has no output", d.Name)
		}
		if other, ok := seen[d.Output]; ok || t.paths[d.Name] != "" {
			return nil, fmt.Errorf("device %s or its output %s is listed twice (%s)", d.Name, d.Output, other)
		}
		seen[d.Output], t.paths[d.Name] = d.Name, d.Output
	}
	return t, nil
}

// Run takes the VM from the peer that dial connects with. When it returns nil the files are
// complete, durable and under their names. On an error they are as before. The VM then runs at its
// peer; if it had been handed over, an operator can settle that it does (see 'drafter peer
// settle'). The end of ctx gives up, but not once the VM has been handed over.
func (t *Terminator) Run(ctx context.Context, dial migrate.Dial) (stats migrate.Stats, err error) {
	s := &store{t: t, begun: time.Now()}
	if t.config.Place != (s3.Place{}) {
		place := t.config.Place
		place.MaxSize = t.config.Limits.MaxSize
		if s.writer, err = openWriter(ctx, place, t.config.Logger); err != nil {
			return stats, err
		}
		defer func() { err = errors.Join(err, s.writer.Close()) }()
	}
	target, err := migration.Receive(ctx, migration.TargetConfig{VM: s, Dial: dial, Limits: t.config.Limits, Copy: t.config.Copy, Force: t.config.Force, Logger: t.config.Logger, OnPhase: t.config.OnPhase, OnProgress: t.config.OnProgress})
	if err != nil {
		return migrate.Stats{}, fmt.Errorf("receive VM: %w", err)
	}
	err = target.Wait()
	stats = target.Stats()
	err = errors.Join(err, target.Close())
	if err == nil && !s.published {
		err = errors.New("the VM did not wholly arrive")
	}
	if err != nil {
		err = errors.Join(fmt.Errorf("receive VM: %w", err), s.Discard(ctx))
	}
	return stats, err
}

func openWriter(ctx context.Context, place s3.Place, log *slog.Logger) (*backup.Writer, error) {
	store, err := backup.Open(ctx, place)
	if err != nil {
		return nil, err
	}
	w, err := store.NewWriter(ctx, log)
	if err != nil {
		store.Close()
	}
	return w, err
}

// store writes a VM to files. It implements [migration.TargetVM].
type store struct {
	t         *Terminator
	begun     time.Time
	writer    *backup.Writer // nil unless the VM goes to an object storage, from unnamed files
	files     *fileset.Set   // nil unless it goes to files
	devices   map[string]*block.File
	id        string
	migration uuid.UUID
	published bool
}

// Accept implements [migration.TargetVM].
func (s *store) Accept(_ context.Context, m wire.Manifest, id uuid.UUID) ([]migration.TargetDevice, error) {
	paths := s.t.paths
	if dir := s.t.config.Dir; dir != "" {
		paths = map[string]string{}
		for _, d := range m.Devices {
			if err := vmm.CheckDeviceName(d.Name); err != nil {
				return nil, err
			}
			paths[d.Name] = filepath.Join(dir, vmm.PackageFile(d.Name))
		}
	}
	for name := range paths {
		if !slices.ContainsFunc(m.Devices, func(d wire.Device) bool { return d.Name == name }) {
			return nil, fmt.Errorf("device %s does not come with the VM; take it out of --devices, or turn makeMigratable on for it at the peer", name)
		}
	}
	config, err := vmm.DecodePackageConfig(m.Config)
	if err != nil {
		return nil, fmt.Errorf("the peer's config device: %w", err)
	}
	s.id, s.migration = config.ID, id
	if s.writer == nil {
		if s.files, err = fileset.New(paths, vmm.State); err != nil {
			return nil, err
		}
	}
	s.devices = map[string]*block.File{}
	var devices []migration.TargetDevice
	for _, d := range m.Devices {
		if s.writer == nil && paths[d.Name] == "" {
			devices = append(devices, migration.TargetDevice{Held: wire.Unwanted})
			continue
		}
		f, err := s.create(d)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Name, err)
		}
		s.devices[d.Name] = f
		devices = append(devices, migration.TargetDevice{Held: wire.HoldsNothing, Device: block.NewIncoming(f, false)})
	}
	return devices, nil
}

func (s *store) create(d wire.Device) (*block.File, error) {
	if s.writer != nil {
		return block.CreateUnnamed(os.TempDir(), d.Size)
	}
	return block.CreateFile(s.files.Path(d.Name), d.Size)
}

// Start implements [migration.TargetVM].
func (s *store) Start(context.Context) error { return nil }

// Expect implements [migration.TargetVM]. Until the copy has its name, nothing here says that the
// VM is here.
func (s *store) Expect(context.Context, uuid.UUID) error { return nil }

// Restore implements [migration.TargetVM]. A damaged state is refused while the VM can still go on
// at its peer.
func (s *store) Restore(_ context.Context, migration uuid.UUID) error {
	if d := s.devices[vmm.State]; d != nil {
		if _, err := vmm.ReadMigratedState(d, s.id, migration); err != nil {
			return fmt.Errorf("device %s: %w", vmm.State, err)
		}
	}
	return nil
}

// Resume implements [migration.TargetVM]. The VM is the terminator's, and does not run.
func (s *store) Resume(context.Context) error { return nil }

// Complete implements [migration.TargetVM].
func (s *store) Complete(ctx context.Context) error {
	if d := s.devices[vmm.State]; d != nil {
		if err := errors.Join(s.Restore(ctx, s.migration), vmm.MarkState(d, vmm.Suspended)); err != nil {
			return err
		}
	}
	if s.writer != nil {
		return s.upload(ctx)
	}
	for name, d := range s.devices {
		if err := errors.Join(d.SyncAndVerify(ctx), d.Close()); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
		delete(s.devices, name)
	}
	if err := s.files.Publish(); err != nil {
		return err
	}
	s.files, s.published = nil, true
	return nil
}

// upload makes the VM the latest backup.
func (s *store) upload(ctx context.Context) error {
	var list []backup.Device
	for _, name := range slices.Sorted(maps.Keys(s.devices)) {
		list = append(list, backup.Device{Name: name, Device: s.devices[name]})
	}
	if _, err := s.writer.Write(ctx, s.begun, list); err != nil {
		return err
	}
	s.writer.Collect(ctx)
	s.published = true
	return s.Discard(ctx) // the files have no names
}

// Discard implements [migration.TargetVM].
func (s *store) Discard(context.Context) error {
	var errs []error
	for name, d := range s.devices {
		errs = append(errs, d.Close())
		delete(s.devices, name)
	}
	if s.files != nil {
		errs = append(errs, s.files.Discard())
		s.files = nil
	}
	return errors.Join(errs...)
}

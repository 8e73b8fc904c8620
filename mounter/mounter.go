// Package mounter exposes devices without a VM, receives them live from another mounter or a peer,
// and hands them over. The users of a device at its path go on using it when it moves: a mounter
// forwards the operations at its paths to where the device is.
package mounter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/internal/deviceset"
	"drafter/internal/expose"
	"drafter/internal/lifecycle"
	"drafter/internal/logging"
	"drafter/internal/migration"
	"drafter/internal/private"
	"drafter/internal/stack"
	"drafter/internal/wire"
	"drafter/migrate"
	"drafter/transport"
	"drafter/vmm"
)

// Device is one device to mount.
type Device struct {
	Name    string `json:"name"`
	Base    string `json:"base"`    // its file; read-only where there is an overlay
	Overlay string `json:"overlay"` // file with the changed blocks; empty to write to the base
	State   string `json:"state"`   // file that says which blocks the overlay holds

	// bytes; the unit of copying and of tracking changes
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

	MakeMigratable bool `json:"makeMigratable"` // whether the device can move
}

func (d *Device) files() *stack.Files {
	f := &stack.Files{Base: d.Base, Overlay: d.Overlay, State: d.State, BlockSize: d.BlockSize}
	f.Remedy = "go on there, and remove the device's files here"
	return f
}

func (d *Device) checkSettings() error {
	if err := vmm.CheckDeviceName(d.Name); err != nil {
		return err
	}
	if err := d.files().CheckPaths(); err != nil {
		return err
	}
	return block.CheckBlockSize(d.BlockSize)
}

// Config says what to mount and how.
type Config struct {
	Devices []Device
	// directory for the exposure; Open and Receive clean up what a killed mounter left there
	BaseDir string
	// directory for a link to each device's path, by the device's name; empty for none
	Links  string
	Expose string // "auto", "fuse" or "nbd"; "" for auto
	Limits migrate.Limits
	Logger *slog.Logger // nil: slog.Default()

	// Called by a migration, which waits for them. They may be nil.
	OnPhase    func(migrate.Phase)
	OnProgress func(migrate.Stats)
}

// Mounter owns devices. Open or Receive is called once, then Serve; Close at the end. Path, Stats
// and Arrived may be called by any goroutine after Open or Receive.
type Mounter struct {
	config  Config
	life    lifecycle.Life
	devices deviceset.Set
	moves   migration.Moves
	links   []link
	gates   map[string]*block.Gate

	refusals, failures logging.Limited // of connections, and of migrations

	forwarding     sync.WaitGroup // operations of users at the source of the devices
	stopForwarding context.CancelFunc
}

// New checks a config. It touches nothing on the host.
func New(c Config) (*Mounter, error) {
	if len(c.Devices) == 0 {
		return nil, errors.New("there are no devices to mount")
	}
	var distinct stack.Distinct
	for i := range c.Devices {
		d := &c.Devices[i]
		if err := d.checkSettings(); err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Name, err)
		}
		if err := distinct.Add(d.Name, d.files()); err != nil {
			return nil, err
		}
	}
	way, err := expose.Choose(c.Expose)
	if err != nil {
		return nil, err
	}
	c.Expose, c.Logger = way, logging.Or(c.Logger)
	m := &Mounter{config: c, gates: map[string]*block.Gate{}, stopForwarding: func() {}}
	m.refusals.Logger, m.failures.Logger = c.Logger, c.Logger
	return m, nil
}

// Open mounts devices of this host.
func (m *Mounter) Open(ctx context.Context) error {
	if err := m.life.Start(); err != nil {
		return fmt.Errorf("open: %w", err)
	}
	var names []string
	for i := range m.config.Devices {
		d := &m.config.Devices[i]
		if err := d.CheckHere(); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
		names = append(names, d.Name)
	}
	err := m.devices.Open(ctx, names, func(ctx context.Context, name string) (*stack.Stack, error) {
		return m.device(name).files().Open(ctx)
	})
	if err != nil {
		return err
	}
	if err := m.expose(ctx); err != nil {
		return err
	}
	m.open()
	return nil
}

// open lets users in.
func (m *Mounter) open() {
	for name, s := range m.devices.All() {
		m.gates[name].Open(s)
	}
}

// expose gives paths to all devices. Their users wait until the devices are open.
func (m *Mounter) expose(ctx context.Context) error {
	if err := vmm.ReclaimAll(m.config.BaseDir, m.config.Logger); err != nil {
		return err
	}
	var devices []expose.Device
	for _, d := range m.config.Devices {
		m.gates[d.Name] = block.NewGate(m.devices.Get(d.Name).Size())
		devices = append(devices, expose.Device{Name: d.Name, Kind: expose.Disk, Device: m.gates[d.Name]})
	}
	if err := m.devices.Expose(ctx, deviceset.Place{Base: m.config.BaseDir, Owner: "mounter", Way: m.config.Expose, Logger: m.config.Logger}, devices); err != nil {
		return err
	}
	return m.link()
}

// link makes the links, and replaces those of an earlier mounter.
func (m *Mounter) link() error {
	if m.config.Links == "" {
		return nil
	}
	if err := private.MkdirAll(m.config.Links); err != nil {
		return err
	}
	for _, d := range m.config.Devices {
		target, err := filepath.Abs(m.Path(d.Name))
		if err != nil {
			return err
		}
		path := filepath.Join(m.config.Links, d.Name)
		info, err := os.Lstat(path)
		switch {
		case err == nil && info.Mode().Type() != os.ModeSymlink:
			return fmt.Errorf("%s is there, and is no link; choose another directory for links", path)
		case err == nil:
			if err := removeDeadLink(path, d.Name); err != nil {
				return err
			}
		}
		if err := os.Symlink(target, path); err != nil {
			return err
		}
		m.links = append(m.links, link{path, target})
	}
	return nil
}

// link is a symbolic link that was made.
type link struct{ path, target string }

// remove removes the link, unless it leads elsewhere by now.
func (l link) remove() error {
	// Another target, or none: the link is gone, or is somebody else's.
	if target, _ := os.Readlink(l.path); target == l.target {
		return os.Remove(l.path)
	}
	return nil
}

// deadLink matches where a mounter's link leads: into its directory below --chroot-base-dir.
var deadLink = regexp.MustCompile("/mounter/[0-9a-f]{16}/devices/([^/]+)$")

// removeDeadLink removes a link to a device that a killed mounter has made. Any other link is
// somebody else's, and stays.
func removeDeadLink(path, device string) error {
	target, err := os.Readlink(path)
	if err != nil {
		return err
	}
	m := deadLink.FindStringSubmatch(target)
	if _, err := os.Stat(target); m == nil || m[1] != device || !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s is there, and leads to %s; choose another directory for links, or remove it", path, target)
	}
	return os.Remove(path)
}

// Path is where a device is exposed, until Close; "" if it is not.
func (m *Mounter) Path(name string) string { return m.devices.Path(name) }

// Receive takes the devices from the mounter or peer that dial connects with. When it returns nil,
// they are open here, and their missing pages are fetched. On an error they are where they were,
// unless the error says otherwise. A VM of a peer ends with that.
func (m *Mounter) Receive(ctx context.Context, dial migrate.Dial) error {
	if err := m.life.Start(); err != nil {
		return fmt.Errorf("receive devices: %w", err)
	}
	a := &arrival{m: m}
	target, err := migration.Receive(ctx, migration.TargetConfig{VM: a, Dial: dial, Limits: m.config.Limits, OnPhase: m.config.OnPhase, OnProgress: m.config.OnProgress})
	if err != nil {
		return fmt.Errorf("receive devices: %w", err)
	}
	m.moves.Arrive(target)
	if target.Forwards() {
		var devices []block.Device
		for _, name := range a.order {
			devices = append(devices, m.gates[name])
		}
		fctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		m.stopForwarding = cancel
		m.forwarding.Go(func() { target.ServeForwards(fctx, devices) })
	}
	return nil
}

// Arrived is closed when received devices are complete, or never will be; ArrivalError then says
// which. It is nil when they were opened here.
func (m *Mounter) Arrived() <-chan struct{} { return m.moves.Arrived() }

// ArrivalError waits until Arrived.
func (m *Mounter) ArrivalError() error { return m.moves.ArrivalError() }

// Serve hands the migratable devices over to the mounter that asks for them. It returns when ctx
// has ended; until then it forwards the operations of their users here to where the devices are.
// moved, if not nil, is called once they have moved. An error means that they are here or, if it
// says so, that they are in doubt.
func (m *Mounter) Serve(ctx context.Context, accept migrate.Accept, moved func()) error {
	if err := m.life.Running(); err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	if arrived := m.Arrived(); arrived != nil {
		select {
		case <-arrived:
			if err := m.ArrivalError(); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
	source, err := m.moves.Offer(m.newSource)
	if err != nil {
		return err
	}
	defer source.Accept(ctx, accept, m.complain)()
	select {
	case <-source.Gone():
	case <-ctx.Done():
		err := source.Withdraw(targetPatience, func() {
			m.config.Logger.Info("The devices have moved to their target, which still needs what is here; waiting until it has all")
		})
		if err != nil || source.Phase() != migrate.Moved {
			return err
		}
	}
	if source.Phase() != migrate.Moved {
		return source.GoneError()
	}
	if moved != nil {
		moved()
	}
	<-ctx.Done()
	return nil
}

// targetPatience is how long a mounter that ends waits for a target that takes nothing from it. Only
// tests change it.
var targetPatience = 20 * time.Second

// Stats returns the figures of the latest migration from here or to here. ok is false when there
// was none.
func (m *Mounter) Stats() (stats migrate.Stats, ok bool) { return m.moves.Stats() }

// complain logs the failure of a connection or a migration.
func (m *Mounter) complain(stream io.ReadWriteCloser, err error) {
	complaints := &m.failures
	if errors.Is(err, migrate.ErrRefused) {
		complaints = &m.refusals
	}
	complaints.Warn("A connection or a migration of the devices failed", "state", m.moves.Source().Phase(), "from", transport.Peer(stream), "error", err)
}

func (m *Mounter) newSource() (*migration.Source, error) {
	d := &departure{m: m}
	c := migration.SourceConfig{VM: d, Limits: m.config.Limits, Forward: true, Logger: m.config.Logger, OnProgress: m.config.OnProgress}
	for i := range m.config.Devices {
		cd := &m.config.Devices[i]
		if !cd.MakeMigratable {
			continue
		}
		sd := m.devices.Source(cd.Name)
		sd.Expiry, sd.MaxDirtyBlocks, sd.MinCycles, sd.MaxCycles, sd.CycleThrottle = cd.Expiry, cd.MaxDirtyBlocks, cd.MinCycles, cd.MaxCycles, cd.CycleThrottle
		c.Devices = append(c.Devices, sd)
		d.names = append(d.names, cd.Name)
	}
	if len(c.Devices) == 0 {
		return nil, errors.New("no device is migratable; set makeMigratable for one, or listen nowhere")
	}
	c.OnPhase = func(s migrate.Phase) {
		if s == migrate.Serving || s == migrate.Moved {
			d.forward()
		}
		if m.config.OnPhase != nil {
			m.config.OnPhase(s)
		}
	}
	var err error
	d.source, err = migration.NewSource(c)
	return d.source, err
}

// Close removes the paths, and closes the devices. What was written is durable then.
func (m *Mounter) Close() error {
	m.life.Close()
	m.stopForwarding()
	m.forwarding.Wait()
	_, err := m.moves.Close()
	return errors.Join(err, m.closeDevices(true))
}

func (m *Mounter) closeDevices(sync bool) error {
	var errs []error
	for _, l := range m.links {
		errs = append(errs, l.remove())
	}
	m.links = nil
	for _, g := range m.gates {
		g.Open(closed{size: g.Size()}) // nobody waits any more
	}
	errs = append(errs, m.devices.Close(sync))
	return errors.Join(errs...)
}

// closed is the device behind a gate at the end.
type closed struct{ size int64 }

func (c closed) Size() int64                      { return c.size }
func (closed) ReadAt([]byte, int64) (int, error)  { return 0, os.ErrClosed }
func (closed) WriteAt([]byte, int64) (int, error) { return 0, os.ErrClosed }
func (closed) Sync() error                        { return os.ErrClosed }
func (closed) Close() error                       { return nil }

// departure is devices that may leave. It implements [migration.SourceVM]: a pause stops their
// users, at the gates.
type departure struct {
	m      *Mounter
	names  []string // in the order of the source's devices
	source *migration.Source
}

// WriteBack implements [migration.SourceVM].
func (d *departure) WriteBack(context.Context) error { return nil }

// Flush implements [migration.SourceVM]. A user's write is in the device when it is done.
func (d *departure) Flush(context.Context) error { return nil }

// Prepare implements [migration.SourceVM].
func (d *departure) Prepare(context.Context) error { return nil }

// Pause implements [migration.SourceVM].
func (d *departure) Pause(context.Context) (stopped time.Time, err error) {
	stopped = time.Now()
	for _, name := range d.names {
		d.m.gates[name].Shut()
	}
	return stopped, nil
}

// Leave implements [migration.SourceVM]. From here on the files say that the devices may have
// moved.
func (d *departure) Leave(_ context.Context, migration uuid.UUID) error {
	for _, name := range d.names {
		if err := d.m.device(name).setStatus(leaving, migration); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
	}
	return nil
}

// Save implements [migration.SourceVM].
func (d *departure) Save(context.Context, uuid.UUID, func(int64, bool)) error { return nil }

// Rescue implements [migration.SourceVM].
func (d *departure) Rescue(context.Context) error {
	for _, name := range d.names {
		if err := d.m.device(name).clearStatus(); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
		d.m.gates[name].Open(d.m.devices.Get(name))
	}
	return nil
}

// Rescued implements [migration.SourceVM].
func (d *departure) Rescued(context.Context) {}

// Mark implements [migration.SourceVM].
func (d *departure) Mark(_ context.Context, phase migrate.Phase, migration uuid.UUID) error {
	for _, name := range d.names {
		status := leaving
		if phase == migrate.Moved {
			status = gone
		} else if err := d.m.devices.Get(name).Sync(); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
		if err := d.m.device(name).setStatus(status, migration); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
	}
	return nil
}

// forward lets users go on, with the devices at their new place.
func (d *departure) forward() {
	for i, name := range d.names {
		d.m.gates[name].Open(d.source.Forwarded(i))
	}
}

func (m *Mounter) device(name string) *Device {
	i := slices.IndexFunc(m.config.Devices, func(d Device) bool { return d.Name == name })
	if i < 0 {
		return nil
	}
	return &m.config.Devices[i]
}

// arrival is devices that are arriving. It implements [migration.TargetVM].
type arrival struct {
	m         *Mounter
	order     []string // of the manifest
	migration uuid.UUID
	packageID string // of a peer's VM, or empty
}

// Accept implements [migration.TargetVM].
func (a *arrival) Accept(ctx context.Context, manifest wire.Manifest, id uuid.UUID) ([]migration.TargetDevice, error) {
	a.migration = id
	if len(manifest.Config) > 0 {
		config, err := vmm.DecodePackageConfig(manifest.Config)
		if err != nil {
			return nil, fmt.Errorf("the peer's config device: %w", err)
		}
		a.packageID = config.ID
	}
	offered := map[string]bool{}
	for _, d := range manifest.Devices {
		if a.m.device(d.Name) == nil {
			return nil, fmt.Errorf("device %s comes, but is not among the devices here; add it to --devices", d.Name)
		}
		offered[d.Name] = true
	}
	for i := range a.m.config.Devices {
		d := &a.m.config.Devices[i]
		if !offered[d.Name] {
			return nil, fmt.Errorf("device %s does not come; remove it from --devices, or turn makeMigratable on for it where it comes from", d.Name)
		}
		if err := d.makeRoom(); err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	var devices []migration.TargetDevice
	for _, offer := range manifest.Devices {
		d := a.m.device(offer.Name)
		var s *stack.Stack
		var held wire.Held
		// The second note stays until all is here and durable.
		err := errors.Join(d.setStatus(arriving, id), d.files().NoteMissing(offer.Size))
		if err == nil {
			s, held, err = d.files().Receive(ctx, offer, func(under block.Device) *block.Incoming { return block.NewIncoming(under, true) })
		}
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Name, errors.Join(err, d.files().ForgetMissing(), d.clearStatus()))
		}
		a.m.devices.Put(d.Name, s)
		a.order = append(a.order, d.Name)
		devices = append(devices, migration.TargetDevice{Held: held, Device: s.Incoming, Base: s.Contents})
	}
	return devices, a.m.expose(ctx)
}

// Start implements [migration.TargetVM].
func (a *arrival) Start(context.Context) error { return nil }

// Expect implements [migration.TargetVM].
func (a *arrival) Expect(context.Context, uuid.UUID) error { return nil }

// Restore implements [migration.TargetVM].
func (a *arrival) Restore(context.Context, uuid.UUID) error { return nil }

// Resume implements [migration.TargetVM].
func (a *arrival) Resume(context.Context) error {
	for _, name := range a.order {
		if err := a.m.device(name).clearStatus(); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
	}
	a.m.open()
	return nil
}

// Complete implements [migration.TargetVM]. The state of a peer's VM is like that of one that was
// suspended.
func (a *arrival) Complete(context.Context) error {
	if s := a.m.devices.Get(vmm.State); s != nil && a.packageID != "" {
		if _, err := vmm.ReadMigratedState(s, a.packageID, a.migration); err != nil {
			return fmt.Errorf("device %s: %w", vmm.State, err)
		}
		if err := vmm.MarkState(s, vmm.Suspended); err != nil {
			return fmt.Errorf("device %s: %w", vmm.State, err)
		}
	}
	for _, name := range a.order {
		err := a.m.devices.Get(name).Sync()
		if err == nil { // else it may lack something again, after a power cut
			err = a.m.device(name).files().ForgetMissing()
		}
		if err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
	}
	return nil
}

// Discard implements [migration.TargetVM]. The notes go last: as long as they are there, they say
// that the rest is of no use.
func (a *arrival) Discard(context.Context) error {
	stacks := a.m.devices.All()
	errs := []error{a.m.closeDevices(false)}
	for name, s := range stacks {
		d := a.m.device(name)
		err := s.Remove()
		if err == nil {
			err = errors.Join(d.files().ForgetMissing(), d.clearStatus())
		}
		errs = append(errs, deviceset.Named(name, err))
	}
	return errors.Join(errs...)
}

package peer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"drafter/internal/deviceset"
	"drafter/internal/instance"
	"drafter/internal/kind"
	"drafter/internal/migration"
	"drafter/internal/wire"
	"drafter/migrate"
	"drafter/network"
	"drafter/vmm"
)

// Receive asks the peer that dial connects with for its VM. When Receive returns nil, the VM runs
// here, and its missing pages are fetched; see [Peer.Arrived]. On an error the VM runs at its
// source, unless the error says otherwise, and nothing is left here but what Close removes. If dial
// connects with a registry, Receive starts an instance of its package; see [Peer.Pull].
func (p *Peer) Receive(ctx context.Context, dial migrate.Dial) error {
	start := time.Now()
	if err := p.life.Start(); err != nil {
		return fmt.Errorf("receive VM: %w", err)
	}
	if err := p.openStore(ctx); err != nil {
		return err
	}
	if err := p.occupy(); err != nil {
		return err
	}
	rctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a := &arrival{p: p, giveUp: cancel, restoring: make(chan struct{})}
	target, err := migration.Receive(rctx, migration.TargetConfig{VM: a, Dial: dial, Landing: p.landing, Limits: p.config.Limits, Force: p.config.Force, Logger: p.log, OnPhase: p.config.Hooks.OnPhase, OnProgress: p.config.Hooks.OnProgress})
	if errors.Is(err, migrate.ErrPackage) {
		pkg, err := migration.OpenPackage(ctx, dial, p.config.Limits)
		if err != nil {
			return fmt.Errorf("open the registry's package: %w", err)
		}
		return p.pull(ctx, start, pkg)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = kind.Of(ctx.Err(), err) // however it came to an end then
		}
		return fmt.Errorf("receive VM: %w", err)
	}
	p.moves.Arrive(target)
	p.settleArrival(target)
	stats := target.Stats()
	running := time.Since(start)
	firstMoments(ctx)
	if err := p.claim.Landed(); err != nil {
		p.log.Warn("The VM's anchor here is left behind", "error", err)
	}
	p.keepWhole(target)
	// The VM runs and serves its clients. An agent that does not answer is no reason to end it.
	if err := p.instance.AfterResume(ctx, p.config.ResumeTimeout); err != nil {
		p.log.Error("The VM runs, but its agent does not answer; its clock may be behind", "error", err)
	} else if hook := p.config.Hooks.OnAfterResume; hook != nil {
		if err := hook(ctx); err != nil {
			p.log.Error("After resume", "error", err)
		}
	}
	fetched := int64(0)
	for _, d := range stats.Devices {
		fetched += d.Backup
	}
	if fetched > 0 {
		sent, _, _ := stats.Bytes()
		p.log.Info("Got from S3 what had not changed since the last sync", "fromS3", humanize.IBytes(uint64(fetched)), "fromSource", humanize.IBytes(uint64(sent)))
	}
	p.log.Info("Resumed VM", "took", running.Round(time.Millisecond), "downtime", stats.Paused.Round(10*time.Microsecond), "agentAfter", time.Since(start).Round(time.Millisecond))
	return nil
}

// firstMoments delays the call of the guest's agent after a move. A guest is slow in its first
// moments, and its clients come first.
func firstMoments(ctx context.Context) {
	select {
	case <-time.After(150 * time.Millisecond):
	case <-ctx.Done():
	}
}

// Arrived is closed when a VM that came by a migration is complete, or never will be; ArrivalError
// then says which. It is nil for a VM that was started here.
func (p *Peer) Arrived() <-chan struct{} { return p.moves.Arrived() }

// ArrivalError waits until Arrived is closed, and returns why the VM is not complete; nil if it is.
func (p *Peer) ArrivalError() error { return p.moves.ArrivalError() }

// settleArrival lets an operator give the VM up, until all of it is here: its source then goes on
// with it.
func (p *Peer) settleArrival(target *migration.Target) {
	var s settling
	s.begin(p, func(o migrate.Outcome) error {
		if o == migrate.Here {
			_, _, left := arrivalBytes(p)
			return fmt.Errorf("%d bytes of the VM are still at its source, so it cannot go on without that; %s", left, p.withoutSource())
		}
		target.GiveUp()
		return nil
	}, func() {})
	p.settled.Go(func() {
		select {
		case <-target.Whole():
		case <-target.Done():
		}
		s.end()
	})
}

// GiveUp notes that the VM is elsewhere, once [Peer.ArrivalError] is a [migrate.ErrTakenBack]; any
// other VM it refuses to give up. Close then ends what runs here.
func (p *Peer) GiveUp() error {
	if err := p.life.Running(); err != nil {
		return fmt.Errorf("give up: %w", err)
	}
	select {
	case <-p.Arrived():
		if errors.Is(p.ArrivalError(), migrate.ErrTakenBack) {
			return p.instance.Mark(vmm.Moved)
		}
	default:
	}
	return errors.New("give up: the VM was not taken back, so it is here")
}

// awaitArrival waits until no page of a VM that came by a migration is missing here. It does not
// wait until the source knows.
func (p *Peer) awaitArrival(ctx context.Context) error {
	a := p.moves.Arrival()
	if a == nil {
		return nil
	}
	_, _, left := arrivalBytes(p)
	stalled := time.NewTimer(arrivalPatience)
	defer stalled.Stop()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-a.Whole():
			return a.Lost()
		case <-a.Done():
			return a.Lost()
		case <-tick.C:
			if _, _, now := arrivalBytes(p); now < left {
				left = now
				stalled.Reset(arrivalPatience)
			}
		case <-stalled.C:
			return fmt.Errorf("%d bytes of the VM are still at its source, and none came for %s; if it is gone for good, %s", left, arrivalPatience, p.withoutSource())
		case <-ctx.Done():
			return fmt.Errorf("%d bytes of the VM are still at its source: %w", left, context.Cause(ctx))
		}
	}
}

// keepWhole makes each device but memory durable, and fit to be opened again, as soon as no page of
// it is missing. If the source is lost before all of the memory came, the VM boots from these
// devices.
func (p *Peer) keepWhole(target *migration.Target) {
	for i := range p.config.Devices {
		d := &p.config.Devices[i]
		s := p.devices.Get(d.Name)
		if d.Name == vmm.Memory || s.Incoming == nil {
			continue
		}
		p.settled.Go(func() {
			select {
			case <-s.Incoming.Complete():
			case <-target.Done():
				return
			}
			if err := s.Sync(); err != nil {
				p.log.Warn("A device is here, but it cannot be made durable yet", "device", d.Name, "error", err)
				return // it is tried again when all is here
			}
			if err := d.files().ForgetMissing(); err != nil {
				p.log.Warn("A device is here, but that cannot be noted yet", "device", d.Name, "error", err)
			}
		})
	}
}

// withoutSource says what can become of a VM that is still arriving when its source is gone.
func (p *Peer) withoutSource() string {
	if missing(p.config.Devices) != nil {
		return "give it up here with 'drafter peer settle --away', and go on at its source from the handoff with --here"
	}
	return "end this peer, which keeps the disks but loses the memory, and boot from them after " +
		"'drafter peer settle --here', or go on at its source from the handoff with --here there and --away here"
}

// arrivalPatience is how long a suspend waits for a source from which nothing comes, and a source
// that is ended for a target that takes nothing more from it. Only tests change it.
var arrivalPatience = 20 * time.Second

func arrivalBytes(p *Peer) (sent, saved, pending int64) {
	stats := p.moves.Arrival().Stats()
	return stats.Bytes()
}

// landing is where connections of a VM go on that comes here: nil if they cannot.
func (p *Peer) landing(departure []byte, source net.Addr) []byte {
	if p.config.NoAnchor {
		return nil
	}
	var tunnel *network.TunnelEnd
	err := json.Unmarshal(departure, &tunnel)
	if tunnel != nil {
		end := tunnel.At(source)
		tunnel = &end
	}
	var l *network.Landing
	if err == nil {
		l, err = p.claim.Landing(tunnel)
	}
	var b []byte
	if l != nil && err == nil {
		b, err = json.Marshal(l)
	}
	if err != nil {
		p.log.Warn("Connections of the VM end as it comes here", "error", err)
		return nil
	}
	return b
}

// Stats returns the figures of the latest migration from here or to here. ok is false when there
// was none.
func (p *Peer) Stats() (stats migrate.Stats, ok bool) { return p.moves.Stats() }

// arrival is a VM that is arriving. It implements [migration.TargetVM], [migration.StateLoader]
// and [migration.MemoryTaker].
type arrival struct {
	p          *Peer
	config     *vmm.PackageConfig
	generation uuid.UUID
	launched   *instance.Launched
	header     *heldHeader // of the state device; nil if that does not come
	kernel     *sealable   // the kernel device; nil if that does not come, or need not be signed
	loads      bool        // the VMM loads its state as that arrives
	file       *os.File    // the source's memory, which is not taken yet; else nil
	running    bool

	// The VMM is watched while it waits for its VM. If it dies, the source need not pause the VM.
	giveUp    context.CancelCauseFunc
	restoring chan struct{} // closed when the watch ends
	once      sync.Once
	watch     sync.WaitGroup
}

// Accept implements [migration.TargetVM].
func (a *arrival) Accept(ctx context.Context, m wire.Manifest, id uuid.UUID) ([]migration.TargetDevice, error) {
	if a.p.config.MapPrivate {
		return nil, errors.New("a VM that comes from another peer cannot be mapped privately, as it would be lost with this process; leave --experimental-map-private out, and name its overlays (--instance)")
	}
	if err := a.verify(m); err != nil {
		return nil, fmt.Errorf("the source's config device: %w", err)
	}
	a.generation = m.Generation
	names := []string{vmm.Config}
	for _, d := range a.config.Devices {
		names = append(names, d.Name)
	}
	if err := a.p.derive(names); err != nil {
		return nil, err
	}
	if a.p.statement != nil {
		if err := a.p.checkPlaces(); err != nil {
			return nil, err
		}
	}
	if err := a.checkManifest(ctx, m); err != nil {
		return nil, err
	}
	if err := a.p.openStore(ctx); err != nil {
		return nil, err
	}
	if a.p.syncer != nil {
		a.p.syncer.inherits = true
	}
	if err := makeRoom(a.p.config.Devices); err != nil {
		return nil, err
	}
	held, err := a.open(ctx, m, id)
	if err != nil {
		return nil, err
	}
	devices, err := a.devices(ctx, m, held)
	if err != nil {
		return nil, err
	}
	if err := a.shareMemory(m, devices); err != nil {
		return nil, err
	}
	if err := a.p.expose(ctx, a.config); err != nil {
		return nil, err
	}
	return devices, nil
}

// checkManifest refuses what cannot run here. Nothing has been made yet.
func (a *arrival) checkManifest(ctx context.Context, m wire.Manifest) error {
	if err := instance.Preflight(ctx, a.p.config.Host, a.config); err != nil {
		return err
	}
	for _, d := range m.Devices {
		if d.Name != vmm.Memory {
			continue
		}
		if err := a.p.config.Host.CheckMemory(d.Size); err != nil {
			return err
		}
	}
	if len(m.Processor) > 0 {
		var source vmm.Processor
		if err := json.Unmarshal(m.Processor, &source); err != nil {
			return fmt.Errorf("the source's description of its CPU: %w", err)
		}
		here, err := vmm.HostProcessor()
		if err != nil {
			return err
		}
		if err := here.Check(&source); err != nil {
			return err
		}
	}
	sizes := map[string]int64{}
	for _, offered := range m.Devices {
		i := slices.IndexFunc(a.p.config.Devices, func(d Device) bool { return d.Name == offered.Name })
		if i < 0 {
			return fmt.Errorf("device %s of the VM is not among the devices here; add it to --devices", offered.Name)
		}
		if !a.p.config.Devices[i].moves() {
			return fmt.Errorf("device %s comes with the VM, but makeMigratable is off or shared is on for it here; set it as on the source", offered.Name)
		}
		sizes[offered.Name] = offered.Size
	}
	for i := range a.p.config.Devices {
		d := &a.p.config.Devices[i]
		if _, ok := sizes[d.Name]; ok {
			continue
		}
		if d.moves() {
			return fmt.Errorf("device %s does not come with the VM; remove it from --devices, or turn makeMigratable off if it is on this host", d.Name)
		}
		listed, _ := a.config.Device(d.Name)
		sizes[d.Name] = listed.Size // its file is checked when it is opened
	}
	return instance.CheckSizes(a.config, sizes, a.p.bases())
}

// open opens the devices, the state device first. From then on the state device says that the VM is
// arriving, and each other device has a note that pages may be missing, until all of it is here and
// durable.
func (a *arrival) open(ctx context.Context, m wire.Manifest, migration uuid.UUID) (map[string]wire.Held, error) {
	held := map[string]wire.Held{}
	offers := slices.Clone(m.Devices)
	slices.SortStableFunc(offers, func(x, y wire.Device) int {
		return boolInt(y.Name == vmm.State) - boolInt(x.Name == vmm.State)
	})
	for _, offered := range offers {
		d := a.p.device(offered.Name)
		s, h, err := a.p.files(d).Receive(ctx, offered, a.receiver(d))
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", offered.Name, err)
		}
		a.p.devices.Put(offered.Name, s)
		held[offered.Name] = h
		if err := d.provide(s); err != nil {
			return nil, fmt.Errorf("device %s: %w", offered.Name, err)
		}
		if offered.Name == vmm.State { // beneath what is sealed
			a.header, _ = s.Incoming.Device.(*heldHeader)
			if err := vmm.MarkArriving(s.Incoming.Device, migration); err != nil {
				return nil, fmt.Errorf("device %s: %w", offered.Name, err)
			}
		}
	}
	var notes errgroup.Group // together, so that a busy disk syncs them at once
	for _, offered := range m.Devices {
		if d := a.p.device(offered.Name); d.Name != vmm.State {
			notes.Go(func() error { return deviceset.Named(d.Name, d.files().NoteMissing(offered.Size)) })
		}
	}
	if err := notes.Wait(); err != nil {
		return nil, err
	}
	for i := range a.p.config.Devices {
		d := &a.p.config.Devices[i]
		if _, ok := held[d.Name]; ok {
			continue
		}
		s, err := a.p.files(d).Open(ctx)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Name, err)
		}
		a.p.devices.Put(d.Name, s)
		if listed, _ := a.config.Device(d.Name); s.Size() < listed.Size {
			return nil, fmt.Errorf("device %s has %d bytes here, the VM needs %d", d.Name, s.Size(), listed.Size)
		}
	}
	return held, nil
}

// shareMemory lets what arrives of memory go to where the VMM will have it. That is the source's own
// memory, if it has offered that. What a backup has of memory goes beneath what is shared.
func (a *arrival) shareMemory(m wire.Manifest, devices []migration.TargetDevice) error {
	host := &a.p.config.Host
	driver, err := host.Drivers.Select(host.VMM, a.config.Hardware.VMM)
	if err != nil || !host.SharesMemory(driver) {
		return errors.Join(err, a.refuseFile())
	}
	shared := a.p.devices.Get(vmm.Memory).Memory
	i := slices.IndexFunc(m.Devices, func(d wire.Device) bool { return d.Name == vmm.Memory && d.Open })
	// A VMM writes the generation to memory before the VM is its own. That must be the one there.
	if a.file == nil || i < 0 || devices[i].Held == wire.HoldsBackup || m.Generation == uuid.Nil {
		return errors.Join(shared.Share(), a.refuseFile())
	}
	f := a.file
	a.file = nil
	devices[i].Memory = shared
	return shared.Adopt(f)
}

// Offered implements [migration.MemoryTaker].
func (a *arrival) Offered(file *os.File) { a.file = file }

// refuseFile closes memory that was offered and is not taken.
func (a *arrival) refuseFile() error {
	f := a.file
	a.file = nil
	if f == nil {
		return nil
	}
	return f.Close()
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// devices returns the devices of the manifest, as a migration fills them.
func (a *arrival) devices(ctx context.Context, m wire.Manifest, held map[string]wire.Held) ([]migration.TargetDevice, error) {
	var devices []migration.TargetDevice
	for _, offered := range m.Devices {
		s := a.p.devices.Get(offered.Name)
		d := migration.TargetDevice{Held: held[offered.Name], Device: s.Incoming, First: offered.Name == vmm.Kernel, Base: s.Contents}
		backup, err := a.p.backup(ctx, a.p.device(offered.Name), offered, d.Held)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", offered.Name, err)
		}
		if backup != nil {
			d.Held, d.Backup = wire.HoldsBackup, backup
		}
		if s.Memory != nil {
			d.Warm, d.Evict = s.Memory.Warm, s.Memory.Evict
		}
		devices = append(devices, d)
	}
	return devices, nil
}

// Start implements [migration.TargetVM].
func (a *arrival) Start(ctx context.Context) error {
	if err := a.verifyKernel(ctx); err != nil {
		return err
	}
	var err error
	if a.launched, err = instance.LaunchMoved(ctx, a.p.config.Host, a.config, storage{a.p}, a.generation); err != nil {
		return err
	}
	err = a.launched.Receive(ctx)
	if a.loads = err == nil; err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	a.watch.Go(func() {
		select {
		case <-a.launched.Done():
			a.giveUp(fmt.Errorf("the VMM ended before the VM was there: %w", a.launched.Wait()))
		case <-a.restoring:
		}
	})
	return nil
}

func (a *arrival) endWatch() {
	a.once.Do(func() { close(a.restoring) })
	a.watch.Wait()
}

// Expect implements [migration.TargetVM]. Restore corrects its note without having to wait for a
// disk.
func (a *arrival) Expect(_ context.Context, migration uuid.UUID) error {
	if a.header == nil {
		return fmt.Errorf("device %s does not come with the VM; set makeMigratable on for it, here and on the source", vmm.State)
	}
	return deviceset.Named(vmm.State, a.header.expect(migration))
}

// Load implements [migration.StateLoader].
func (a *arrival) Load(ctx context.Context, end int64) error {
	if !a.loads {
		return nil
	}
	return a.launched.Load(ctx, end)
}

// Restore implements [migration.TargetVM].
func (a *arrival) Restore(ctx context.Context, migration uuid.UUID) error {
	a.endWatch()
	if err := a.launched.Restore(ctx, migration); err != nil {
		return err
	}
	return deviceset.Named(vmm.State, a.header.releaseForGood())
}

// Resume implements [migration.TargetVM].
func (a *arrival) Resume(ctx context.Context) error {
	i, err := a.launched.Go(ctx)
	// A VMM that was told, and has not answered, may do it yet.
	if err != nil && (a.launched.Ended() || ctx.Err() != nil) && !errors.Is(err, vmm.ErrNotRun) {
		err = fmt.Errorf("%w: %w", migrate.ErrMayHaveRun, err)
	}
	if err == nil || errors.Is(err, migrate.ErrMayHaveRun) {
		a.p.own(i)
		a.running = true
	}
	return err
}

// Complete implements [migration.TargetVM].
func (a *arrival) Complete(context.Context) error {
	for name, d := range a.p.devices.All() {
		if name == vmm.Memory || d.Incoming == nil {
			continue // without a suspend, memory does not outlive this process
		}
		if name == vmm.State {
			if err := vmm.NoteArrived(d); err != nil {
				return fmt.Errorf("device %s: %w", name, err)
			}
		}
		if err := d.Sync(); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
	}
	return a.p.forgetMissing()
}

// forgetMissing removes the devices' notes about missing pages, once all pages are here and
// durable.
func (p *Peer) forgetMissing() error {
	for i := range p.config.Devices {
		if d := &p.config.Devices[i]; d.moves() {
			if err := d.files().ForgetMissing(); err != nil {
				return fmt.Errorf("device %s: %w", d.Name, err)
			}
		}
	}
	return nil
}

// Discard implements [migration.TargetVM].
func (a *arrival) Discard(context.Context) error {
	a.endWatch()
	errs := []error{a.refuseFile()}
	if a.launched != nil {
		errs = append(errs, a.launched.Close())
	}
	stacks := a.p.devices.All()
	errs = append(errs, a.p.closeDevices(false))
	// The state device goes last: while it is there, it says that the rest is worthless.
	var left error
	for name, d := range stacks {
		if name == vmm.State {
			continue
		}
		err := d.Remove()
		if err == nil {
			err = a.p.device(name).files().ForgetMissing()
		}
		left = errors.Join(left, deviceset.Named(name, err))
	}
	if s := stacks[vmm.State]; s != nil && left == nil {
		left = deviceset.Named(vmm.State, s.Remove())
	}
	return errors.Join(append(errs, left)...)
}

package peer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"

	"drafter/internal/instance"
	"drafter/internal/migration"
	"drafter/internal/private"
	"drafter/migrate"
	"drafter/network"
	"drafter/transport"
	"drafter/vmm"
)

// Serve makes the VM migratable: a peer that connects gets it. accept returns the next connection,
// or an error once its context has ended. Serve returns true when the VM has moved. It returns
// false and nil when ctx has ended: the VM runs here as before, and is not migratable any more. If
// a target owns the VM by then, Serve first sends it all that it needs. With an error and false,
// the VM runs here or, if the error says so, is in doubt.
func (p *Peer) Serve(ctx context.Context, accept migrate.Accept) (moved bool, err error) {
	if err := p.life.Running(); err != nil {
		return false, fmt.Errorf("serve: %w", err)
	}
	if p.serving.Swap(true) {
		return false, fmt.Errorf("serve: the VM is migratable already: %w", vmm.ErrInUse)
	}
	defer p.serving.Store(false)
	source, err := p.migratable(ctx)
	if err != nil || source == nil {
		return false, err
	}
	defer source.Accept(ctx, accept, p.complain)()
	select {
	case <-source.Gone():
		return source.Phase() == migrate.Moved, source.GoneError()
	case <-ctx.Done():
	}
	err = source.Withdraw(arrivalPatience, func() {
		p.log.Info("The VM runs at its target, which still needs what is here; waiting until it has all")
	})
	switch {
	case p.discards() && (errors.Is(err, migrate.ErrInDoubt) || errors.Is(err, migrate.ErrHandedOver)):
		err = fmt.Errorf("%w; what is here is discarded, as the package is mapped privately and no outputs are named", err)
	case errors.Is(err, migrate.ErrInDoubt):
		err = leaveInDoubt()
	case errors.Is(err, migrate.ErrHandedOver) && p.handsMemory():
		err = fmt.Errorf("%w; its disks are kept here as they were at the handoff: if the VM is lost there, boot from them with 'drafter peer settle --here', else note it with 'drafter peer settle --away'", err)
	case errors.Is(err, migrate.ErrHandedOver):
		err = fmt.Errorf("%w; what was here at the handoff is kept: if the VM is lost there, go on from it with 'drafter peer settle --here', else note it with 'drafter peer settle --away'", err)
	}
	return source.Phase() == migrate.Moved, err
}

// migratable returns the source of the VM, once all of it is here; nil if ctx ends first.
func (p *Peer) migratable(ctx context.Context) (*migration.Source, error) {
	err := p.awaitArrival(ctx)
	if err == nil {
		err = p.identify(ctx)
	}
	if ctx.Err() != nil {
		return nil, nil //nolint:nilerr // there is nothing to serve, and the end is no failure
	} else if err != nil {
		return nil, err
	}
	return p.moves.Offer(p.newSource)
}

func leaveInDoubt() error {
	return fmt.Errorf("%w: it was handed over and the target has not answered; look whether it runs there, and then settle it here: drafter peer settle --here, or --away", migrate.ErrInDoubt)
}

// complain logs the failure of a connection or a migration.
func (p *Peer) complain(stream io.ReadWriteCloser, err error) {
	complaints := &p.failures
	if errors.Is(err, migrate.ErrRefused) {
		complaints = &p.refusals
	}
	complaints.Warn("A connection or a migration failed; the VM "+whereabouts(p.moves.Source().Phase()), "from", transport.Peer(stream), "error", err)
}

// whereabouts says where a VM is in a sentence.
func whereabouts(s migrate.Phase) string {
	switch s {
	case migrate.InDoubt, migrate.LeftInDoubt:
		return "is in doubt"
	case migrate.Serving, migrate.LeftServing, migrate.Moved:
		return "runs at its target"
	case migrate.Lost:
		return "is lost"
	}
	return "runs here"
}

// newSource makes the source of this VM.
func (p *Peer) newSource() (*migration.Source, error) {
	if p.instance == nil {
		return nil, instance.ErrNotStarted
	}
	config := p.instance.Config()
	c := migration.SourceConfig{VM: &departure{p: p}, Config: p.configDevice, Signature: p.carriedSignature(), Generation: p.instance.Generation(), Limits: p.config.Limits, Logger: p.log, OnProgress: p.config.Hooks.OnProgress}
	if p.syncer != nil {
		c.Backup = &p.syncer.baseline
	}
	var settling settling
	c.OnPhase = func(s migrate.Phase) {
		settling.follow(p, s)
		switch s {
		case migrate.Serving, migrate.Moved:
			p.vacate()
		case migrate.Kept, migrate.LeftInDoubt:
			p.stay()
		}
		if p.config.Hooks.OnPhase != nil {
			p.config.Hooks.OnPhase(s)
		}
	}
	if config.Hardware.Accel != vmm.AccelTCG {
		// An emulated CPU is the same on every host.
		processor, err := vmm.HostProcessor()
		if err != nil {
			return nil, err
		}
		if c.Processor, err = json.Marshal(processor); err != nil {
			return nil, fmt.Errorf("describe CPU: %w", err)
		}
	}
	if c.Limits.Prepare == 0 {
		c.Limits.Prepare = max(p.config.RescueTimeout, 1)
	}
	for i := range p.config.Devices {
		d := &p.config.Devices[i]
		if !d.moves() {
			continue
		}
		sd := p.devices.Source(d.Name)
		sd.NeedsBase, sd.First = d.SharedBase, d.Name == vmm.Kernel || d.Name == vmm.State
		sd.Expiry, sd.MaxDirtyBlocks, sd.MinCycles, sd.MaxCycles, sd.CycleThrottle = d.Expiry, d.MaxDirtyBlocks, d.MinCycles, d.MaxCycles, d.CycleThrottle
		c.Devices = append(c.Devices, sd)
	}
	return migration.NewSource(c)
}

// vacate resets the connections of the VM's clients here, because the VM runs elsewhere. It works
// while the target still fetches pages.
func (p *Peer) vacate() {
	if p.vacated.Swap(true) {
		return
	}
	p.vacating.Go(func() {
		if p.stay() {
			return // they go on at the target
		}
		if err := p.claim.Vacate(); err != nil {
			p.log.Warn("Clients of the VM that has left may wait for it here", "error", err)
		}
	})
}

// reoccupy takes vacate back.
func (p *Peer) reoccupy() error {
	if !p.vacated.Swap(false) {
		return nil
	}
	p.vacating.Wait()
	return p.claim.Occupy()
}

// stay ends the departure of the VM's connections, and tells whether they go on at the target.
func (p *Peer) stay() (gone bool) {
	p.departing.Wait()
	d := p.connections.Swap(nil)
	if d == nil {
		return false
	}
	gone = d.Switched()
	if err := d.Close(); err != nil {
		p.log.Warn("Links for connections of a VM that moves are left behind until its NAT looks", "error", err)
	}
	return gone
}

// departure is a VM that may leave. It implements [migration.SourceVM].
type departure struct{ p *Peer }

// WriteBack implements [migration.SourceVM].
func (d *departure) WriteBack(ctx context.Context) error { return d.p.instance.WriteBack(ctx) }

// Flush implements [migration.SourceVM].
func (d *departure) Flush(ctx context.Context) error { return d.p.instance.Flush(ctx) }

// Prepare implements [migration.SourceVM].
func (d *departure) Prepare(ctx context.Context) error {
	if hook := d.p.config.Hooks.OnBeforeSuspend; hook != nil {
		if err := hook(ctx); err != nil {
			return err
		}
	}
	if err := d.p.instance.Prepare(ctx); err != nil {
		return fmt.Errorf("%w: %w", migrate.ErrNotReady, err)
	}
	return nil
}

// Pause implements [migration.SourceVM]. What is sent to the VM from now on waits at the target.
func (d *departure) Pause(ctx context.Context) (stopped time.Time, err error) {
	if connections := d.p.connections.Load(); connections != nil {
		if err := connections.Switch(); err != nil {
			d.endConnections(err)
		}
		d.sayLost(connections)
	}
	return d.p.instance.PauseToSave(ctx)
}

// Leave implements [migration.SourceVM].
func (d *departure) Leave(_ context.Context, migration uuid.UUID) error {
	if d.p.syncer != nil {
		d.p.syncer.hold.set(true)
	}
	return d.p.instance.NoteLeaving(migration)
}

// Departure implements [migration.Lander].
func (d *departure) Departure() []byte {
	tunnel, err := d.p.claim.Tunnel()
	var b []byte
	if err == nil {
		b, err = json.Marshal(tunnel)
	}
	if err != nil {
		d.p.log.Warn("Connections of the VM end if it moves to another host", "error", err)
		return []byte("null")
	}
	return b
}

// Land implements [migration.Lander]. The links are made while devices are sent.
func (d *departure) Land(landing []byte, target net.Addr) {
	if d.p.config.NoAnchor {
		return
	}
	d.p.stay() // of an earlier migration
	linked := make(chan struct{})
	d.p.linked.Store(&linked)
	d.p.departing.Go(func() {
		defer close(linked)
		var l network.Landing
		err := json.Unmarshal(landing, &l)
		var connections *network.Departure
		if err == nil {
			connections, err = d.p.claim.Depart(d.p.instance.Generation(), l, target)
		}
		switch {
		case errors.Is(err, network.ErrNoAnchor):
			d.p.log.Info("Connections of the VM end when it moves", "reason", err)
			return
		case err != nil:
			d.p.log.Warn("Connections of the VM end when it moves", "error", err)
			return
		}
		d.sayLost(connections)
		d.p.connections.Store(connections)
	})
}

// AwaitLinks implements [migration.Lander].
func (d *departure) AwaitLinks(ctx context.Context) error {
	linked := d.p.linked.Load()
	if linked == nil {
		return nil
	}
	select {
	case <-*linked:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// sayLost tells of connections that end although the VM's others go on.
func (d *departure) sayLost(connections *network.Departure) {
	for _, why := range connections.Lost() {
		d.p.log.Warn("Some connections of the VM end when it moves", "error", why)
	}
}

// Save implements [migration.SourceVM]. Meanwhile the target's host is told of the VM's connections.
func (d *departure) Save(ctx context.Context, migration uuid.UUID, final func(end int64, early bool)) error {
	connections := d.p.connections.Load()
	if connections == nil {
		return d.p.instance.SaveLeaving(ctx, migration, final)
	}
	told := make(chan error, 1)
	go func() { told <- connections.Tell() }()
	err := d.p.instance.SaveLeaving(ctx, migration, final)
	if terr := <-told; terr != nil {
		d.endConnections(terr)
	}
	return err
}

// endConnections lets the VM move without its connections.
func (d *departure) endConnections(why error) {
	d.p.log.Warn("Connections of the VM end as it moves", "error", why)
	d.goBack()
}

// goBack leads the VM's connections to it where it is.
func (d *departure) goBack() {
	if connections := d.p.connections.Load(); connections != nil {
		if err := connections.Back(); err != nil {
			d.p.log.Warn("Connections of the VM, which goes on here, may be lost", "error", err)
		}
	}
}

// Rescue implements [migration.SourceVM].
func (d *departure) Rescue(ctx context.Context) error {
	d.goBack()
	if err := d.p.reoccupy(); err != nil {
		d.p.log.Warn("The VM goes on here, but without its network", "error", err)
	}
	if d.p.syncer != nil {
		d.p.syncer.hold.set(false)
	}
	return d.p.instance.Rescue(ctx)
}

// Rescued implements [migration.SourceVM].
func (d *departure) Rescued(ctx context.Context) {
	if err := d.p.instance.RescueAgent(ctx, d.p.config.RescueTimeout); err != nil {
		d.p.log.Warn("The VM goes on, but its agent does not answer", "error", err)
	}
}

// Mark implements [migration.SourceVM].
func (d *departure) Mark(_ context.Context, phase migrate.Phase, _ uuid.UUID) error {
	if phase == migrate.Moved {
		return d.p.instance.Mark(vmm.Moved)
	}
	if d.p.syncer != nil {
		d.p.syncer.hold.hand()
	}
	// An operator may decide to go on from what is here.
	gone := d.p.handsMemory()
	for name, s := range d.p.devices.All() {
		if gone && name == vmm.Memory {
			continue // it is the target's
		}
		if err := s.Sync(); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
	}
	if gone {
		return d.p.instance.LeaveMemory()
	}
	return d.p.instance.Mark(map[migrate.Phase]vmm.Status{migrate.InDoubt: vmm.InDoubt, migrate.Serving: vmm.HandedOver}[phase])
}

// settling waits for an operator's decision while one is possible. The command that brings it can
// reach this process only through a file.
type settling struct {
	stop chan struct{} // nil while nothing is waited for
	done chan struct{}
}

// begin passes decisions to decide, and calls look every 200 ms, until end.
func (s *settling) begin(p *Peer, decide func(migrate.Outcome) error, look func()) {
	s.stop, s.done = make(chan struct{}), make(chan struct{})
	stop, done := s.stop, s.done
	go func() {
		defer close(done)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			look()
			if err := p.readDecision(decide); err != nil {
				p.log.Error("Settle", "error", err)
			}
		}
	}()
}

func (s *settling) end() {
	if s.stop != nil {
		close(s.stop)
		<-s.done
		s.stop = nil
	}
}

// handsMemory tells whether the VM's memory is, or may be, another process'.
func (p *Peer) handsMemory() bool {
	s := p.devices.Get(vmm.Memory)
	return s != nil && s.Memory != nil && s.Memory.Offered()
}

// targetPatience is how long a target may be away before the log says so.
const targetPatience = 2 * time.Second

// follow accepts decisions while the VM is in doubt, or runs at a target that may be lost.
func (s *settling) follow(p *Peer, phase migrate.Phase) {
	s.end()
	missed := "The target does not answer: it is in doubt who owns the VM, which stays paused here; waiting for the target, or for 'drafter peer settle'"
	switch phase {
	case migrate.InDoubt:
		if p.handsMemory() {
			missed = "The target does not answer; the VM, whose memory has changed hands, stays paused here until it does, or is gone"
		}
	case migrate.Serving:
		missed = "The target, where the VM runs, is away and may lack a part of it; waiting for the target, or for 'drafter peer settle': --here if the VM is lost there, else --away"
		if p.handsMemory() {
			missed = "The target, where the VM runs with its memory, is away; waiting for the target, or for 'drafter peer settle --away'. If the VM is lost there, end this peer: then --here lets it boot from its disks"
		}
	default:
		return
	}
	source := p.moves.Source()
	began, said := time.Now(), false
	s.begin(p, source.Settle, func() {
		silent := time.Since(began) > targetPatience && (phase == migrate.InDoubt || source.Away() > targetPatience)
		if silent && !said {
			p.log.Warn(missed) //nolint:sloglint // one of those above
		}
		said = silent
	})
}

// decisionFile is the path at which an operator's decision is left for the process that owns an
// instance.
func decisionFile(devices []Device) string {
	for _, d := range devices {
		if d.Name != vmm.State {
			continue
		}
		if d.State != "" {
			return d.State + ".settle"
		}
		return d.Base + ".settle"
	}
	return ""
}

func (p *Peer) readDecision(decide func(migrate.Outcome) error) error {
	path := decisionFile(p.config.Devices)
	f, err := private.Open(path, os.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := private.CheckOwner(f); err != nil { // a stranger does not decide
		return err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxDecision))
	if err != nil {
		return err
	}
	text := strings.TrimSpace(string(b))
	switch outcome := migrate.Outcome(text); {
	case strings.HasPrefix(text, refusedPrefix): // which the command has not read yet
		return nil
	case outcome != migrate.Here && outcome != migrate.Away:
		return errors.Join(fmt.Errorf("%s holds %q instead of here or away", path, outcome), os.Remove(path))
	default:
		if err := decide(outcome); err != nil {
			return writeDecision(path, refusedPrefix+err.Error())
		}
		p.log.Info("An operator has settled who owns the VM", "outcome", outcome)
		return os.Remove(path)
	}
}

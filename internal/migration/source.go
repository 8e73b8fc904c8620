package migration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	xrate "golang.org/x/time/rate"

	"drafter/internal/block"
	"drafter/internal/logging"
	"drafter/internal/memory"
	"drafter/internal/wire"
	"drafter/migrate"
	"drafter/transport"
)

// SourceVM is what a source needs of its VM. The source makes one call at a time, but WriteBack is
// also called beside Save.
type SourceVM interface {
	// WriteBack flushes dirty memory to the memory device without pausing the guest, so that little
	// is left to Flush. Pages that are written meanwhile stay dirty. The target is still getting
	// ready, and the migration may fail.
	WriteBack(ctx context.Context) error
	// Flush makes every guest memory write up to now visible in the memory device.
	Flush(ctx context.Context) error
	// Prepare lets the guest get ready to be paused; the guest runs on. If it fails with
	// [migrate.ErrNotReady], a target may take the VM all the same.
	Prepare(ctx context.Context) error
	// Leave notes durably that the VM may soon run elsewhere. It is called before Pause; Rescue
	// takes the note back. It is not called for a copy.
	Leave(ctx context.Context, migration uuid.UUID) error
	// Pause pauses the guest before it returns, and tells when the guest stopped.
	Pause(ctx context.Context) (stopped time.Time, err error)
	// Save writes the paused VM's state to its device, as the state of a migration that has not
	// ended. It may itself write guest memory. It may call final, if not nil, meanwhile, with the
	// byte up to which the device has its final content: never all of the state. A VMM that loads
	// this reads nothing of memory if that is early, and else nothing that changes after a WriteBack
	// beside this call.
	Save(ctx context.Context, migration uuid.UUID, final func(end int64, early bool)) error
	// Rescue lets the guest go on after any of the above, done or failed.
	Rescue(ctx context.Context) error
	// Rescued tells the guest, after a Rescue, that it goes on. It has no error: the migration has
	// ended.
	Rescued(ctx context.Context)
	// Mark notes the VM's status durably in the devices: InDoubt, Serving (it runs at the target)
	// or Moved (the target has all of it). For the first two it first makes everything durable that
	// was written.
	Mark(ctx context.Context, phase migrate.Phase, migration uuid.UUID) error
}

// Lander is a [SourceVM] whose connections can go on at the target.
type Lander interface {
	// Departure is what the target must know to say where they can.
	Departure() []byte
	// Land makes ready for that, given what the target says of where the VM will be (see
	// [TargetConfig]), and its address if that is known. The migration goes on whether they can or not.
	Land(landing []byte, target net.Addr)
	// AwaitLinks waits until what Land began has ended. The guest is not told of the move before.
	AwaitLinks(ctx context.Context) error
}

// SourceDevice is a device to migrate.
type SourceDevice struct {
	Name    string
	Device  *block.Tracker // through which all writes go
	Overlay *block.Overlay // the overlay of Device; nil when it has no base
	Memory  *memory.Device // of Device, if that is guest memory
	Base    block.ID       // content id of the overlay's base; zero when there is none
	// without a base here: content id of the base that the device was made from; zero when that is
	// not known
	Origin    block.ID
	NeedsBase bool // the target must have the base; only changes are sent
	First     bool // the target needs it before its VMM can start

	// Settings of the device, as in the reference. The handoff begins when the rest fits the
	// downtime limit, or when each device has had MinCycles quiet cycles (at most MaxDirtyBlocks
	// dirty blocks) or MaxCycles cycles of any kind.
	Expiry         time.Duration
	MaxDirtyBlocks int
	MinCycles      int
	MaxCycles      int
	CycleThrottle  time.Duration
}

// SourceConfig says what to migrate.
type SourceConfig struct {
	VM        SourceVM
	Devices   []SourceDevice
	Config    []byte // of the VM, for the target's preflight
	Signature []byte // of the package, for targets that verify it; nil if there is none
	Processor []byte
	// Generation is the generation ID that the VM keeps when it moves. A copy does not get it.
	Generation uuid.UUID
	Limits     migrate.Limits
	// the devices have users here, who go on after the handoff; see Forwarded
	Forward bool
	Logger  *slog.Logger // nil: slog.Default()

	// Backup, if not nil, is the baseline of copies that are stored where targets may reach them.
	Backup *Baseline

	tuning tuning

	// OnPhase, if not nil, is called at every change of phase, OnProgress at most ten times a
	// second and at the end. The migration waits for both.
	OnPhase    func(migrate.Phase)
	OnProgress func(migrate.Stats)
}

// Source gives its VM to a target that asks for it.
type Source struct {
	config SourceConfig
	ctx    context.Context // of the current migration
	cancel context.CancelCauseFunc

	mu      sync.Mutex
	current *outgoing     // the last migration; nil before the first
	revoked bool          // no migration begins any more
	closed  bool          // nor is one found that goes on
	gone    chan struct{} // closed when the source no longer owns the VM
	goneErr error
	wg      sync.WaitGroup    // Handle
	waiting transport.Waiting // connections that do not belong to a migration yet

	forwarder *forwarder // nil unless the devices have users here
}

// helloTimeout bounds how long a connection may take to say what it is for.
const helloTimeout = 5 * time.Second

// NewSource returns a source for a running VM. Nothing happens until Handle is called.
func NewSource(c SourceConfig) (*Source, error) {
	var err error
	c.tuning, c.Logger = c.tuning.withDefaults(), logging.Or(c.Logger)
	if c.Limits, err = c.Limits.WithDefaults(); err != nil {
		return nil, err
	}
	if len(c.Devices) == 0 || len(c.Devices) > block.MaxDevices {
		return nil, fmt.Errorf("%d devices to migrate; there must be 1 to %d", len(c.Devices), block.MaxDevices)
	}
	if c.OnPhase == nil {
		c.OnPhase = func(migrate.Phase) {}
	}
	if c.OnProgress == nil {
		c.OnProgress = func(migrate.Stats) {}
	}
	s := &Source{config: c, gone: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	if c.Forward {
		s.forwarder = newForwarder()
	}
	return s, nil
}

// Handle serves one connection of a target until it ends, and owns it. Any number of connections
// can be served at once. A connection that does not belong to the one migration that may be under
// way is refused with [migrate.ErrRefused]. Connections that have not said what they are for are
// bounded, see [transport.Waiting]; those of the migration keep their places. The call for the
// first connection of a migration returns when the migration has ended, with nil if the VM has
// moved.
func (s *Source) Handle(ctx context.Context, stream io.ReadWriteCloser) error {
	return s.handle(ctx, stream, s.config.Limits.Silence, nil)
}

// handle is Handle, for a copy that may begin where another one ended.
func (s *Source) handle(ctx context.Context, stream io.ReadWriteCloser, silence time.Duration, baseline *Baseline) error {
	l := newLink(ctx, stream, silence)
	defer l.close(errors.New("the connection is not needed any more"))
	place := s.waiting.Enter(transport.Host(stream), func() { l.cancel(errCrowded) })
	defer place.Leave()
	hello, err := greet(l)
	if err != nil {
		l.refuse(codeOf(err), err)
		return fmt.Errorf("%w: %w", migrate.ErrRefused, err)
	}
	if hello.Resume || hello.Lane != wire.Main {
		o, err := s.find(hello.Migration)
		if err != nil {
			l.refuse(wire.CodeUnknown, err)
			return fmt.Errorf("%w: %w", migrate.ErrRefused, err)
		}
		defer s.wg.Done()
		place.Leave()
		if hello.Lane == wire.Forward {
			return s.attachForward(o, l)
		}
		return o.attach(l, hello)
	}
	o, err := s.begin(hello, l, baseline)
	if err != nil {
		l.refuse(wire.CodeBusy, err)
		return fmt.Errorf("%w: %w", migrate.ErrRefused, err)
	}
	defer s.wg.Done()
	place.Leave()
	err = o.run() //nolint:contextcheck // a migration outlives its first connection
	if o.Phase() != migrate.Kept {
		s.goneErr = err
		close(s.gone) // once: no migration begins after this one
	}
	return err
}

// Gone is closed when a migration has ended after which the VM no longer runs here; GoneError then
// says how.
func (s *Source) Gone() <-chan struct{} { return s.gone }

// GoneError waits for Gone and returns nil when the VM has moved and the target has all of it.
func (s *Source) GoneError() error {
	<-s.gone
	return s.goneErr
}

// greet reads what a connection is for.
func greet(l *link) (h wire.Hello, err error) {
	timeout := time.AfterFunc(helloTimeout, func() { l.cancel(fmt.Errorf("no hello within %s", helloTimeout)) })
	defer timeout.Stop()
	l.Bound(wire.MaxHello)
	f, err := l.Read()
	if err != nil {
		return h, l.lost(err)
	}
	if f.Type != wire.TypeHello {
		return h, fmt.Errorf("%w: %s instead of a hello", wire.ErrProtocol, f.Type)
	}
	l.Bound(wire.MaxPayload)
	m, err := wire.Decode(f, nil)
	if err != nil {
		return h, err
	}
	h = m.(wire.Hello)
	if h.Version != wire.Version {
		return h, &RemoteError{Code: wire.CodeIncompatible, Text: fmt.Sprintf("the target speaks version %d of the protocol, this source version %d; use the same release on both hosts", h.Version, wire.Version)}
	}
	return h, nil
}

// How long a target waits for a copy or a migration that is under way to end. A copy to an object
// storage or a local disk takes about a second. A migration whose target has just gone ends in
// well under a second: whoever tries again at once is not refused for it.
const (
	copyPatience = 10 * time.Second
	movePatience = 2 * time.Second
)

// begin makes a migration, or a copy, when none is under way. The caller marks wg done when it no
// longer uses the migration.
func (s *Source) begin(h wire.Hello, l *link, baseline *Baseline) (*outgoing, error) {
	arrived := time.Now()
	for {
		o, current, err := s.tryBegin(h, l, baseline)
		if current == nil {
			return o, err
		}
		patience, refusal := movePatience, errBusy
		if current.asks.copy {
			patience, refusal = copyPatience, errCopied
		}
		select {
		case <-current.ended.fired(): // its guest, too, has been told that it goes on
		case <-time.After(time.Until(arrived.Add(patience))):
			return nil, refusal
		case <-l.ctx.Done():
			return nil, context.Cause(l.ctx)
		}
	}
}

// tryBegin is begin, unless a copy or a migration is under way: then that is current.
func (s *Source) tryBegin(h wire.Hello, l *link, baseline *Baseline) (o, current *outgoing, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.revoked || s.closed {
		return nil, nil, errors.New("the VM cannot be migrated any more")
	}
	if s.current != nil {
		select {
		case <-s.current.ended.fired():
		default:
			return nil, s.current, nil
		}
		switch s.current.Phase() {
		case migrate.Kept:
		case migrate.Moved:
			return nil, nil, errors.New("the VM has moved away")
		default:
			return nil, nil, errBusy
		}
	}
	if o, err = newOutgoing(s, h, l); err != nil {
		return nil, nil, err
	}
	o.copying.baseline = baseline
	s.current = o
	s.wg.Add(1)
	return o, nil, nil
}

func (s *Source) find(id uuid.UUID) (*outgoing, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.current == nil || s.current.id != id {
		return nil, errors.New("there is no such migration here")
	}
	s.wg.Add(1)
	return s.current, nil
}

// Phase is the phase of the last migration; [migrate.Kept] when there was none.
func (s *Source) Phase() migrate.Phase {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == nil {
		return migrate.Kept
	}
	return s.current.Phase()
}

// Stats are those of the last migration.
func (s *Source) Stats() migrate.Stats {
	s.mu.Lock()
	o := s.current
	s.mu.Unlock()
	if o == nil {
		return migrate.Stats{Phase: migrate.Kept}
	}
	return o.Stats()
}

// Settle decides who owns a VM that was handed over and whose target is away: it is in doubt, or
// the target lacks a part of it. The decision is the operator's, who must know.
func (s *Source) Settle(outcome migrate.Outcome) error {
	s.mu.Lock()
	o := s.current
	s.mu.Unlock()
	if o == nil {
		return errNoDoubt
	}
	phase := o.Phase()
	switch {
	case phase != migrate.InDoubt && phase != migrate.Serving:
		return errNoDoubt
	case o.lanes.connected():
		return migrate.ErrConnected
	case outcome == migrate.Here && o.handed != nil:
		return errHanded
	}
	o.decideBy(outcome, phase)
	return nil
}

// decision is how a phase is to end.
type decision struct {
	outcome migrate.Outcome
	in      migrate.Phase // in another phase it is void: the target has answered meanwhile
}

func (o *outgoing) decideBy(outcome migrate.Outcome, in migrate.Phase) {
	select {
	case o.settled <- decision{outcome, in}:
	default: // another decision came first
	}
}

// Away is how long nothing has been heard of a target that the VM was handed over to; 0 while it is
// connected.
func (s *Source) Away() time.Duration {
	s.mu.Lock()
	o := s.current
	s.mu.Unlock()
	if o == nil {
		return 0
	}
	return o.lanes.away()
}

// Relinquish is called once Revoke has failed with [migrate.ErrHandedOver]. It waits until the
// target has all that it needs of this source, or an operator has settled that the VM goes on here;
// Phase then says which. If the target has taken nothing for patience, it fails.
func (s *Source) Relinquish(patience time.Duration) error {
	s.mu.Lock()
	o := s.current
	s.mu.Unlock()
	tick := time.NewTicker(patience / 100)
	defer tick.Stop()
	stats := o.Stats()
	sent, _, left := stats.Bytes()
	for since := time.Now(); ; {
		select {
		case <-o.ended.fired():
			if o.Phase() == migrate.Kept {
				return nil
			}
			return s.GoneError()
		case <-tick.C:
		}
		stats := o.Stats()
		if nowSent, _, nowLeft := stats.Bytes(); nowSent != sent || nowLeft != left {
			sent, left, since = nowSent, nowLeft, time.Now()
		}
		if time.Since(since) > patience {
			o.decideBy(undecided, migrate.Serving)
		}
	}
}

// renew takes a Revoke back.
func (s *Source) renew() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revoked = false
}

// revokeGrace is how long a write may delay telling the target that its migration is revoked.
const revokeGrace = 2 * time.Second

// Revoke ends the VM's being migratable. It cancels a migration that has not been handed over, and
// waits until the VM runs here as before. After a handoff it changes nothing and fails with
// [migrate.ErrHandedOver], or with [migrate.ErrInDoubt] if no answer has come within Limits.Silence
// of the pause.
func (s *Source) Revoke(cause error) error {
	s.mu.Lock()
	s.revoked = true
	o := s.current
	s.mu.Unlock()
	if o == nil {
		return nil
	}
	o.revoke(cause)
	select {
	case <-o.decided.fired():
	case <-time.After(revokeGrace):
		o.first.cancel(cause) // the target does not take what is being written to it
		<-o.decided.fired()
	}
	for {
		phase, changed := o.follow()
		switch phase {
		case migrate.Rescuing:
		case migrate.InDoubt:
			o.awaitDoubt(changed)
		case migrate.Kept:
			<-o.ended.fired()
			return nil
		case migrate.LeftInDoubt:
			<-o.ended.fired()
			return migrate.ErrInDoubt
		case migrate.Lost:
			<-o.ended.fired()
			return errors.New("the VM was lost")
		default:
			return migrate.ErrHandedOver
		}
		<-changed
	}
}

// awaitDoubt waits for the answer of a target that was just handed the VM. Without an answer it
// ends the migration.
func (o *outgoing) awaitDoubt(changed <-chan struct{}) {
	answer := time.Until(o.figures.pausedAt().Add(o.config.Limits.Silence))
	select {
	case <-changed:
		return
	case <-time.After(answer):
	}
	o.decideBy(undecided, migrate.InDoubt)
	<-changed
}

// Close ends everything that is under way, whatever that means for the VM, and waits for it. Phase
// says where that left the VM.
func (s *Source) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel(errors.New("the source is closing"))
	if s.forwarder != nil {
		s.forwarder.fail(block.ErrAbandoned)
	}
	s.wg.Wait()
	return nil
}

// sourceTable is the source's machine.
var sourceTable = map[migrate.Phase]row[*outgoing]{
	migrate.Preflight:  {does: (*outgoing).preflight, then: []migrate.Phase{migrate.PreCopying}, failing: migrate.Kept},
	migrate.PreCopying: {does: (*outgoing).preCopy, then: []migrate.Phase{migrate.Preparing}, failing: migrate.Kept},
	migrate.Preparing:  {does: (*outgoing).prepare, then: []migrate.Phase{migrate.HandingOff, migrate.Snapshotting}, failing: migrate.Rescuing},
	migrate.HandingOff: {does: (*outgoing).handOff, then: []migrate.Phase{migrate.InDoubt}, failing: migrate.Rescuing, within: func(l *migrate.Limits) time.Duration { return l.Handoff }},
	migrate.InDoubt:    {does: (*outgoing).settle, then: []migrate.Phase{migrate.Serving, migrate.Rescuing}, failing: migrate.LeftInDoubt},
	migrate.Serving:    {does: (*outgoing).serve, then: []migrate.Phase{migrate.Moved, migrate.Rescuing}, failing: migrate.LeftServing},
	migrate.Rescuing:   {does: (*outgoing).rescue, then: []migrate.Phase{migrate.Kept}, failing: migrate.Lost},

	migrate.Snapshotting: {does: (*outgoing).snapshot, then: []migrate.Phase{migrate.Delivering}, failing: migrate.Rescuing, within: func(l *migrate.Limits) time.Duration { return l.Handoff }},
	migrate.Delivering:   {does: (*outgoing).deliver, then: []migrate.Phase{migrate.Kept}, failing: migrate.Kept},

	migrate.Kept: {}, migrate.Moved: {}, migrate.Lost: {}, migrate.LeftInDoubt: {}, migrate.LeftServing: {},
}

// outgoing is one migration at its source.
type outgoing struct {
	*Source
	id    uuid.UUID
	asks  asks
	first *link // the connection it began with

	devices []*outgoingDevice
	sizes   []int64
	handed  *handed        // memory that changes hands as a file; nil if none does
	limiter *xrate.Limiter // nil for none
	sender  *sender        // of all but what is wanted
	sending sync.RWMutex   // held for writing while pending is replaced after the handoff
	copying copying

	*standing
	lanes   *lanes
	figures figures
	marks   *marks
	cycles  *cycles

	ctx      context.Context // until the authority is being sent, revoke ends it
	revoke   context.CancelCauseFunc
	decided  *signal // revoke has no effect any more
	ready    *signal // the target's VMM waits
	prepared *signal // the target is prepared for the handoff
	complete *signal // the target has all
	ended    *signal // run has ended

	acks    chan wire.Ack
	settled chan decision
	wants   chan wire.Want
	serving sync.Once
	wg      sync.WaitGroup // readers of links, the one who serves wants, and marks
}

// asks are the wishes of a target in its hello.
type asks struct {
	copy      bool // the VM stays here
	force     bool // the target takes it even if the guest does not get ready
	signature bool // the target takes the signature of the package
	contents  bool // and sends the contents of bases that it holds
	file      bool // and takes memory as an open file
}

// copying is what only a copy has.
type copying struct {
	baseline  *Baseline
	stash     []stashed
	delivered bool // the target has the whole copy
}

// outgoingDevice is a device on its way.
type outgoingDevice struct {
	SourceDevice
	index    int
	skip     bool          // the target does not want it
	holds    bool          // the target has the base
	absent   bool          // it has a base that this side lacks
	contents []block.ID    // of that, of its blocks
	backup   block.ID      // content id of what is stored of it; zero when nothing is
	changed  *block.Bitmap // pages that had changed since, at the offer
	stored   bool          // the target has that
	unknown  bool          // the target has an older copy
	whole    bool          // and gets whole blocks
	pending  *block.Bitmap // pages to send
	held     []uint64      // hash of each page as it was sent; 0: it was not
	quiet    int           // cycles
	sent     atomic.Int64
	saved    atomic.Int64
	postCopy atomic.Int64
	wanted   atomic.Int64
	wire     atomic.Int64
}

func newOutgoing(s *Source, h wire.Hello, l *link) (*outgoing, error) {
	sender, err := newSender()
	if err != nil {
		return nil, err
	}
	o := &outgoing{
		Source: s, id: h.Migration, first: l, sender: sender,
		asks: asks{
			copy: h.Copy, force: h.Features&wire.FeatureForce != 0,
			signature: h.Features&wire.FeatureSignature != 0, contents: h.Features&wire.FeatureContents != 0,
			file: h.Features&wire.FeatureFile != 0 && !h.Copy && l.Files(),
		},
		standing: newStanding(), lanes: newLanes(), figures: figures{began: time.Now()}, marks: newMarks(), cycles: newCycles(),
		decided: newSignal(), ready: newSignal(), prepared: newSignal(), complete: newSignal(), ended: newSignal(),
		acks: make(chan wire.Ack, 1), settled: make(chan decision, 1), wants: make(chan wire.Want, 64),
	}
	if o.asks.copy { // nothing is started there
		o.ready.fire()
	}
	o.ctx, o.revoke = context.WithCancelCause(s.ctx)
	if b := s.config.Limits.Bandwidth; b > 0 {
		o.limiter = xrate.NewLimiter(xrate.Limit(b), 2*wire.MaxExtent)
	}
	for i, d := range s.config.Devices {
		o.devices = append(o.devices, &outgoingDevice{SourceDevice: d, index: i, pending: block.NewBitmap(block.Pages(d.Device))})
		o.sizes = append(o.sizes, d.Device.Size())
	}
	return o, nil
}

// Phase is where the migration stands.
func (o *outgoing) Phase() migrate.Phase { return o.standing.Phase() }

// run runs the migration to its end.
func (o *outgoing) run() error {
	defer o.ended.fire()
	defer o.revoke(nil)
	stopProgress := report(o.Stats, o.config.OnProgress)
	// The context of the whole migration; what can still be revoked derives its own from o.ctx.
	ctx, cancel := context.WithCancelCause(o.Source.ctx)
	defer cancel(nil)
	phase, err := advance(ctx, o, sourceTable, migrate.Preflight, &o.config.Limits, func(phase migrate.Phase) {
		o.enter(phase)
		switch phase {
		case migrate.InDoubt, migrate.Serving, migrate.Kept, migrate.Moved, migrate.Lost, migrate.LeftInDoubt, migrate.LeftServing:
			o.decided.fire()
		}
		o.config.OnPhase(phase)
	})
	if err != nil {
		l, _ := o.lanes.get()
		cmp.Or(l, o.first).refuse(codeOf(err), err)
	}
	if phase == migrate.Kept {
		err = errors.Join(err, o.takeBack()) // of a migration that has ended before the handoff
	}
	o.figures.update(func(f *figures) { f.total = time.Since(f.began) })
	o.lanes.cancel(errEnded)
	cancel(errEnded)
	o.wg.Wait()
	o.sender.close()
	stopProgress()
	err = errors.Join(err, o.marks.failed())
	if err == nil && (phase == migrate.Moved || o.copying.delivered) {
		return nil
	}
	if err == nil {
		err = errors.New("the target did not take the VM")
	}
	return err
}

// Stats returns the statistics so far.
func (o *outgoing) Stats() migrate.Stats {
	s := o.figures.stats(o.Phase(), o.lanes.bytes())
	for _, d := range o.devices {
		s.Devices = append(s.Devices, migrate.DeviceStats{
			Name: d.Name, Size: d.Device.Size(), Sent: d.sent.Load(), Saved: d.saved.Load(), Pending: d.pending.Count() * block.PageSize,
			PostCopy: d.postCopy.Load(), Wanted: d.wanted.Load(), Wire: d.wire.Load(),
		})
	}
	return s
}

// revocable returns a context that ends with ctx, when the migration is revoked, or with its
// connection.
func (o *outgoing) revocable(ctx context.Context, l *link) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stopRevoked := context.AfterFunc(o.ctx, func() { cancel(context.Cause(o.ctx)) })
	stopLost := context.AfterFunc(l.ctx, func() { cancel(fmt.Errorf("connection lost: %w", context.Cause(l.ctx))) })
	return ctx, func() {
		stopRevoked()
		stopLost()
		cancel(nil)
	}
}

// preflight tells the target what the VM consists of, and waits for its answer. The VM is not
// touched.
func (o *outgoing) preflight(ctx context.Context) (migrate.Phase, error) {
	l := o.first
	ctx, cancel := o.revocable(ctx, l)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.cancel(context.Cause(ctx)) })
	defer stop()
	if err := o.offer(l); err != nil {
		return "", l.lost(err)
	}
	reply, err := o.reply(ctx, l)
	if err != nil {
		return "", err
	}
	accept, ok := reply.(wire.Accept)
	if !ok || len(accept.Held) != len(o.devices) {
		return "", fmt.Errorf("%w: no answer to the manifest", wire.ErrProtocol)
	}
	for i, d := range o.devices {
		held := accept.Held[i]
		if err := d.accepted(held &^ wire.TakesFile); err != nil {
			return "", fmt.Errorf("%w: device %s %w", wire.ErrProtocol, d.Name, err)
		}
		if err := o.takes(d, held&wire.TakesFile != 0); err != nil {
			return "", err
		}
	}
	if lander, ok := o.config.VM.(Lander); ok && len(accept.Landing) > 0 {
		lander.Land(accept.Landing, l.remote)
	}
	o.attachMain(l)
	o.figures.update(func(f *figures) { f.preflight = time.Since(f.began) })
	return migrate.PreCopying, nil
}

// offer sends the manifest, with the memory's file if that can change hands.
func (o *outgoing) offer(l *link) error {
	m := o.manifest()
	for i, d := range o.devices {
		if d.Memory == nil || !o.asks.file {
			continue
		}
		f, err := d.Memory.Offer(o.id)
		if err != nil {
			return err
		}
		if f != nil {
			o.handed = newHanded(d)
			m.Devices[i].Open = true
			return l.SendFile(m, f)
		}
	}
	return l.Send(m)
}

// manifest is what this side offers.
func (o *outgoing) manifest() wire.Manifest {
	m := wire.Manifest{Config: o.config.Config, Processor: o.config.Processor}
	if o.config.Forward {
		m.Features |= wire.FeatureForward
	}
	if o.asks.signature && o.config.Signature != nil {
		m.Features, m.Signature = m.Features|wire.FeatureSignature, o.config.Signature
	}
	if !o.asks.copy {
		m.Generation = o.config.Generation
		if lander, ok := o.config.VM.(Lander); ok {
			m.Features |= wire.FeatureLanding
			m.Departure = lander.Departure()
		}
	}
	for _, d := range o.devices {
		if !o.asks.copy {
			d.backup, d.changed = o.config.Backup.backup(d.Device)
		}
		offer := wire.Device{Name: d.Name, Size: d.Device.Size(), BlockSize: d.Device.BlockSize(), NeedsBase: d.NeedsBase, Base: d.Base, Backup: d.backup}
		if d.Base == (block.ID{}) && d.Origin != (block.ID{}) && o.asks.contents && !o.asks.copy {
			d.absent, offer.Base, offer.Absent = true, d.Origin, true
		}
		m.Devices = append(m.Devices, offer)
	}
	return m
}

// accepted notes what the target holds of a device.
func (d *outgoingDevice) accepted(held wire.Held) error {
	switch held {
	case wire.HoldsNothing:
		if d.NeedsBase {
			return errors.New("needs its base at the target")
		}
	case wire.HoldsBase:
		if d.absent {
			if c := block.NewContents(d.Device.Size(), d.contents); c.Check() != nil || c.Device != d.Origin {
				return errors.New("has contents at the target that are not those of its base")
			}
			break
		}
		if d.Base == (block.ID{}) || d.Overlay == nil {
			return errors.New("has no base")
		}
		d.holds = true
	case wire.HoldsBackup:
		if d.backup == (block.ID{}) {
			return errors.New("has no backup")
		}
		d.stored = true
	case wire.Unwanted:
		d.skip = true
	default:
		return errors.New("is held in an unknown way")
	}
	d.held = make([]uint64, block.Pages(d.Device))
	return nil
}

// reply waits for the target's answer to the manifest, and flushes the VM's memory meanwhile.
func (o *outgoing) reply(ctx context.Context, l *link) (any, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	written := make(chan error, 1)
	go func() { written <- o.config.VM.WriteBack(ctx) }()
	reply, err := o.receiveAnswer(l)
	cancel()
	if werr := <-written; err == nil && !errors.Is(werr, context.Canceled) {
		err = werr
	}
	return reply, err
}

// receiveAnswer receives the answer to the manifest, and the contents before it of bases that the
// target holds and this side lacks.
func (o *outgoing) receiveAnswer(l *link) (any, error) {
	for {
		m, err := l.receive(o.sizes)
		c, ok := m.(wire.Contents)
		if err != nil || !ok {
			return m, err
		}
		d := o.devices[c.Device]
		if !d.absent || c.First != int64(len(d.contents)) || len(c.Blocks) == 0 {
			return nil, fmt.Errorf("%w: contents of device %s that were not asked for", wire.ErrProtocol, d.Name)
		}
		d.contents = append(d.contents, c.Blocks...)
	}
}

// attachMain makes l the main connection and reads from it.
func (o *outgoing) attachMain(l *link) {
	o.lanes.setMain(l)
	o.wg.Go(func() {
		l.cancel(o.read(l))
		o.lanes.part()
	})
}

// attach serves a connection that joins the migration, until it ends.
func (o *outgoing) attach(l *link, hello wire.Hello) error {
	if hello.Lane == wire.Demand {
		o.lanes.setDemand(l)
		err := o.read(l)
		if o.complete.has() {
			return nil // nothing is wanted any more
		}
		return err
	}
	m, err := l.receive(o.sizes)
	if err != nil {
		return err
	}
	resume, ok := m.(wire.Resume)
	if !ok {
		err := fmt.Errorf("%w: no resume after a hello that announces one", wire.ErrProtocol)
		l.refuse(wire.CodeProtocol, err)
		return err
	}
	if code, err := o.reconcile(resume.Outcome == wire.Accepted); err != nil {
		l.refuse(code, err)
		return err
	}
	if resume.Outcome != wire.Accepted || o.Phase() == migrate.Moved {
		return l.Send(wire.TypeReleased)
	}
	o.replacePending(resume.Missing)
	o.attachMain(l)
	if err := l.Send(wire.TypeReady); err != nil {
		l.cancel(err)
	}
	<-l.ctx.Done()
	return nil
}

// reconcile compares the phase with that of a target that has reconnected. They contradict each
// other only after an operator's mistake.
func (o *outgoing) reconcile(accepted bool) (wire.Code, error) {
	switch phase := o.Phase(); phase {
	case migrate.HandingOff, migrate.InDoubt:
		// While handing off: a target that has accepted has got the authority, and its sending is
		// about to end here. A target that refuses has given up before the authority came, and
		// whatever is still sent is lost.
		o.ack(wire.Ack{Accepted: accepted, Reason: "the target did not take over before it lost the connection"})
	case migrate.Serving, migrate.LeftServing, migrate.Moved:
		if !accepted {
			return wire.CodeCancelled, errors.New("the VM was taken over before")
		}
	case migrate.Rescuing, migrate.Kept:
		if accepted {
			return wire.CodeTakenBack, errors.New("an operator has settled that the VM goes on at its source")
		}
	default:
		if accepted {
			return wire.CodeCancelled, fmt.Errorf("the source has ended (%s)", phase)
		}
	}
	return 0, nil
}

// replacePending makes exactly those pages pending that the target lacks. What was sent on its
// earlier connections may have been lost.
func (o *outgoing) replacePending(missing []*block.Bitmap) {
	o.lanes.cancel(errReconnected)
	o.sending.Lock()
	defer o.sending.Unlock()
	for i, d := range o.devices {
		d.pending.Take()
		if !d.skip {
			d.pending.Add(missing[i])
		}
	}
}

func (o *outgoing) ack(a wire.Ack) {
	select {
	case o.acks <- a:
	default: // there is an answer already
	}
}

// completing are the phases in which a target may have everything. A target may be quick: the
// authority has been sent, and this side has not yet noticed that the VM is in doubt.
var completing = []migrate.Phase{migrate.HandingOff, migrate.InDoubt, migrate.Serving, migrate.Delivering}

// read takes what the target sends until the link ends.
func (o *outgoing) read(l *link) error {
	for {
		m, err := l.receive(o.sizes)
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case wire.Ack:
			o.ack(m)
		case wire.Want:
			if phase := o.Phase(); phase == migrate.PreCopying || phase == migrate.Preparing {
				// The target is not ready yet, so this is sent, or missing, before the VM is there.
				if d := o.devices[m.Device]; !d.skip {
					d.pending.SetRange(m.First, m.Ends)
				}
				continue
			}
			select {
			case o.wants <- m:
			case <-l.ctx.Done():
				return context.Cause(l.ctx)
			}
		case wire.Progress:
			o.cycles.answer(m.Cycle)
		case wire.Type:
			switch {
			case m == wire.TypeReady:
				o.ready.fire()
				continue
			case m == wire.TypePrepare:
				o.prepared.fire()
				continue
			case m == wire.TypeComplete && contains(completing, o.Phase()):
				o.complete.fire()
				continue
			}
			return fmt.Errorf("%w: %s while %s", wire.ErrProtocol, m, o.Phase())
		default:
			return fmt.Errorf("%w: %T while %s", wire.ErrProtocol, m, o.Phase())
		}
	}
}

package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	xrate "golang.org/x/time/rate"

	"drafter/block"
	"drafter/wire"
)

// SourceVM is what a source asks of its VM. There is one call at a time.
type SourceVM interface {
	// Flush makes every guest memory write up to now visible in the memory device.
	Flush(ctx context.Context) error
	// Prepare lets the guest get ready to be paused; it runs on.
	Prepare(ctx context.Context) error
	// Pause returns when the guest does not run any more.
	Pause(ctx context.Context) error
	// Save writes the paused VM's state to its device, as that of a migration whose outcome is open. It may itself write guest memory.
	Save(ctx context.Context, migration uuid.UUID) error
	// Rescue lets the guest go on after any of the above, done or failed.
	Rescue(ctx context.Context) error
	// Rescued tells the guest, after a Rescue, that it goes on. It fails no migration.
	Rescued(ctx context.Context)
	// Mark notes durably in the devices where the VM stands: InDoubt, Serving (it runs at the target) or Moved (the target has all of it). With the
	// first two, all that was written is made durable before.
	Mark(ctx context.Context, state State, migration uuid.UUID) error
}

// SourceDevice is a device to migrate.
type SourceDevice struct {
	Name      string
	Device    *block.Tracker // through which all writes go
	Overlay   *block.Overlay // what Device keeps changes in; nil when it has no base
	Base      block.ID       // content id of the overlay's base; zero when there is none
	NeedsBase bool           // the target must have the base: only changes are sent
	First     bool           // the target needs it before its VMM can start

	// See the reference of the device's settings. The handoff begins when the rest fits the downtime limit, or when each device has had MinCycles quiet
	// cycles (at most MaxDirtyBlocks dirty blocks) or MaxCycles of any kind.
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
	Processor []byte
	Limits    Limits
	Forward   bool // the devices have users here, who go on after the handoff: see Forwarded

	// Backup, if not nil, is of copies that are stored where targets may get at them.
	Backup *Baseline

	// OnState, if not nil, is called at every change of state, OnProgress at most ten times a second and at the end. Both are called by the migration itself
	// and hold it up.
	OnState    func(State)
	OnProgress func(Stats)
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
	gone    chan struct{} // closed when the VM is the source's no more
	goneErr error
	wg      sync.WaitGroup // Handle

	forwarder *forwarder // nil unless the devices have users here
}

// helloTimeout bounds how long a connection may take to say what it wants.
const helloTimeout = 5 * time.Second

// NewSource returns a source for a running VM. Nothing happens until Handle is called.
func NewSource(c SourceConfig) (*Source, error) {
	var err error
	if c.Limits, err = c.Limits.complete(); err != nil {
		return nil, err
	}
	if len(c.Devices) == 0 || len(c.Devices) > 1000 {
		return nil, fmt.Errorf("%d devices to migrate; there must be 1 to 1000", len(c.Devices))
	}
	if c.OnState == nil {
		c.OnState = func(State) {}
	}
	if c.OnProgress == nil {
		c.OnProgress = func(Stats) {}
	}
	s := &Source{config: c, gone: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	if c.Forward {
		s.forwarder = newForwarder()
	}
	return s, nil
}

// Handle serves one connection of a target, which it owns, until it ends. Any number of connections can be served at once; what does not belong to the one
// migration that may be under way is refused. The first connection of a migration returns when the migration has ended: with a nil error when the
// VM has moved.
func (s *Source) Handle(ctx context.Context, stream io.ReadWriteCloser) error {
	return s.handle(ctx, stream, nil)
}

// handle is Handle, for a copy that may begin where another one ended.
func (s *Source) handle(ctx context.Context, stream io.ReadWriteCloser, baseline *Baseline) error {
	l := newLink(ctx, stream, s.config.Limits.Silence)
	defer l.close(errors.New("the connection is not needed any more"))
	hello, err := greet(l)
	if err != nil {
		l.refuse(codeOf(err), err)
		return fmt.Errorf("connection refused: %w", err)
	}
	if hello.Resume || hello.Lane != wire.Main {
		o, err := s.find(hello.Migration)
		if err != nil {
			l.refuse(wire.CodeUnknown, err)
			return fmt.Errorf("connection refused: %w", err)
		}
		defer s.wg.Done()
		if hello.Lane == wire.Forward {
			return s.attachForward(o, l)
		}
		return o.attach(l, hello)
	}
	o, err := s.begin(hello, l, baseline)
	if err != nil {
		l.refuse(wire.CodeBusy, err)
		return fmt.Errorf("connection refused: %w", err)
	}
	defer s.wg.Done()
	err = o.run()
	if o.State() != Kept {
		s.goneErr = err
		close(s.gone) // once: no migration begins after this one
	}
	return err
}

// Gone is closed when a migration has ended after which the VM does not run here any more; GoneError then tells how.
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
	f, err := l.Read()
	if err != nil {
		return h, l.lost(err)
	}
	if f.Type != wire.TypeHello {
		return h, fmt.Errorf("%w: %s instead of a hello", wire.ErrProtocol, f.Type)
	}
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

// copyPatience is how long a target waits for a copy that is being made: one to an object store or a local disk takes about a second.
const copyPatience = 10 * time.Second

// begin makes a migration, or a copy. Each begun or found one must be told to wg when it is done with.
func (s *Source) begin(h wire.Hello, l *link, baseline *Baseline) (*outgoing, error) {
	patience := time.NewTimer(copyPatience)
	defer patience.Stop()
	for {
		o, busy, err := s.tryBegin(h, l, baseline)
		if busy == nil {
			return o, err
		}
		select {
		case <-busy:
		case <-patience.C:
			return nil, errors.New("a copy of the VM is being made; try again when it is complete")
		case <-l.ctx.Done():
			return nil, context.Cause(l.ctx)
		}
	}
}

// tryBegin is begin, unless a copy is being made: then busy is closed when that has ended.
func (s *Source) tryBegin(h wire.Hello, l *link, baseline *Baseline) (o *outgoing, busy <-chan struct{}, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.revoked || s.closed {
		return nil, nil, errors.New("the VM cannot be migrated any more")
	}
	if s.current != nil {
		switch state := s.current.State(); {
		case state == Kept:
		case state == Moved:
			return nil, nil, errors.New("the VM has moved away")
		case s.current.copy:
			return nil, s.current.ended, nil
		default:
			return nil, nil, errBusy
		}
	}
	if o, err = newOutgoing(s, h, l); err != nil {
		return nil, nil, err
	}
	o.baseline = baseline
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

// State is where the last migration stands; Kept when there was none.
func (s *Source) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == nil {
		return Kept
	}
	return s.current.State()
}

// Stats are those of the last migration.
func (s *Source) Stats() Stats {
	s.mu.Lock()
	o := s.current
	s.mu.Unlock()
	if o == nil {
		return Stats{State: Kept}
	}
	return o.Stats()
}

// Settle decides who owns a VM that is in doubt. The decision is the operator's, who must know.
func (s *Source) Settle(o Outcome) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == nil || s.current.State() != InDoubt {
		return errors.New("nothing is in doubt")
	}
	select {
	case s.current.settled <- o:
	default: // settled already
	}
	return nil
}

// revokeGrace is how long a write may keep a migration that is revoked from telling the target so.
const revokeGrace = 2 * time.Second

// Revoke ends the VM's being migratable. A migration that has not been handed over is cancelled, and Revoke waits until the VM runs here as before. Else it
// fails with [ErrHandedOver] and changes nothing, or, when no answer comes for as long as a connection may be silent, with [ErrInDoubt].
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
	case <-o.decided:
	case <-time.After(revokeGrace):
		o.first.cancel(cause) // it does not take what is being written to it
		<-o.decided
	}
	for {
		state, changed := o.follow()
		switch state {
		case Rescuing:
		case InDoubt:
			o.awaitDoubt(changed)
		case Kept:
			<-o.ended
			return nil
		case LeftInDoubt:
			<-o.ended
			return ErrInDoubt
		case Lost:
			<-o.ended
			return errors.New("the VM was lost")
		default:
			return ErrHandedOver
		}
		<-changed
	}
}

// awaitDoubt waits for the answer of a target that was just handed the VM, and then ends the migration without it.
func (o *outgoing) awaitDoubt(changed <-chan struct{}) {
	o.mu.Lock()
	answer := time.Until(o.paused.Add(o.config.Limits.Silence))
	o.mu.Unlock()
	select {
	case <-changed:
		return
	case <-time.After(answer):
	}
	select {
	case o.settled <- undecided:
	default: // an operator was faster
	}
	<-changed
}

// Close ends what goes on, whatever that means for the VM, and waits for it. State tells where that left it.
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
var sourceTable = map[State]row[*outgoing]{
	Preflight:  {does: (*outgoing).preflight, then: []State{PreCopying}, failing: Kept},
	PreCopying: {does: (*outgoing).preCopy, then: []State{Preparing}, failing: Kept},
	Preparing:  {does: (*outgoing).prepare, then: []State{HandingOff, Snapshotting}, failing: Rescuing},
	HandingOff: {does: (*outgoing).handOff, then: []State{InDoubt}, failing: Rescuing, within: func(l *Limits) time.Duration { return l.Handoff }},
	InDoubt:    {does: (*outgoing).settle, then: []State{Serving, Rescuing}, failing: LeftInDoubt},
	Serving:    {does: (*outgoing).serve, then: []State{Moved}, failing: LeftServing},
	Rescuing:   {does: (*outgoing).rescue, then: []State{Kept}, failing: Lost},

	Snapshotting: {does: (*outgoing).snapshot, then: []State{Delivering}, failing: Rescuing, within: func(l *Limits) time.Duration { return l.Handoff }},
	Delivering:   {does: (*outgoing).deliver, then: []State{Kept}, failing: Kept},

	Kept: {}, Moved: {}, Lost: {}, LeftInDoubt: {}, LeftServing: {},
}

// outgoing is one migration at its source.
type outgoing struct {
	*Source
	id      uuid.UUID
	first   *link // the connection it began with
	devices []*outgoingDevice
	sizes   []int64
	limiter *xrate.Limiter // nil for none
	sender  *sender        // of all but what is wanted

	copy      bool // the VM stays here
	baseline  *Baseline
	stash     []stashed
	delivered bool // the target has the whole copy

	ctx      context.Context // until the authority is being sent, revoke ends it
	revoke   context.CancelCauseFunc
	state    atomic.Value  // State
	decided  chan struct{} // closed when revoke has no effect any more
	decide   sync.Once
	ended    chan struct{} // closed when run has ended
	ready    chan struct{} // closed when the target's VMM waits
	acks     chan wire.Ack
	settled  chan Outcome
	complete chan struct{} // closed when the target has all
	wants    chan wire.Want
	stored   chan struct{} // the target has answered a cycle
	once     struct{ ready, complete, serving sync.Once }
	wg       sync.WaitGroup // readers of links, the one who serves wants, and marks
	sending  sync.RWMutex   // held for writing while pending is replaced after the handoff

	mu       sync.Mutex // guards the following
	main     *link
	demand   *link
	attached chan struct{} // closed and replaced when a link was attached
	changed  chan struct{} // closed and replaced when the state has changed
	began    time.Time
	paused   time.Time
	downtime time.Duration
	took     time.Duration // set at the end
	cycle    int
	closed   int64         // bytes of links that are gone
	marked   chan struct{} // closed when the last mark has been made
	markErr  error

	announced struct {
		cycle    int
		at       time.Time
		answered int           // the last cycle that the target has answered
		quickest time.Duration // answer so far; 0: there was none
	}
}

// outgoingDevice is a device on its way.
type outgoingDevice struct {
	SourceDevice
	index    int
	skip     bool          // the target does not want it
	holds    bool          // the target has the base
	backup   block.ID      // of what is stored of it; zero when nothing is
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
}

func newOutgoing(s *Source, h wire.Hello, l *link) (*outgoing, error) {
	sender, err := newSender()
	if err != nil {
		return nil, err
	}
	o := &outgoing{
		Source: s, id: h.Migration, first: l, sender: sender, copy: h.Copy,
		decided: make(chan struct{}), ended: make(chan struct{}), ready: make(chan struct{}), acks: make(chan wire.Ack, 1), settled: make(chan Outcome, 1),
		complete: make(chan struct{}), marked: make(chan struct{}), wants: make(chan wire.Want, 64), stored: make(chan struct{}, 1), attached: make(chan struct{}), changed: make(chan struct{}), began: time.Now(),
	}
	o.state.Store(Preflight)
	close(o.marked)
	if o.copy { // nothing is started there
		o.once.ready.Do(func() { close(o.ready) })
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

// State is where the migration stands.
func (o *outgoing) State() State { return o.state.Load().(State) }

func (o *outgoing) enter(s State) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.state.Store(s)
	close(o.changed)
	o.changed = make(chan struct{})
}

// follow returns the state, and a channel that is closed when it is another one.
func (o *outgoing) follow() (State, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.State(), o.changed
}

// run runs the migration to its end.
func (o *outgoing) run() error {
	defer close(o.ended)
	defer o.revoke(nil)
	stopProgress := o.reportProgress()
	// The context of the whole; what can still be revoked derives its own from o.ctx.
	ctx, cancel := context.WithCancelCause(o.Source.ctx)
	defer cancel(nil)
	state, err := advance(ctx, o, sourceTable, Preflight, &o.config.Limits, func(state State) {
		o.enter(state)
		switch state {
		case InDoubt, Serving, Kept, Moved, Lost, LeftInDoubt, LeftServing:
			o.decide.Do(func() { close(o.decided) })
		}
		o.config.OnState(state)
	})
	if err != nil {
		o.mu.Lock()
		l := o.main
		o.mu.Unlock()
		if l == nil {
			l = o.first
		}
		l.refuse(codeOf(err), err)
	}
	o.mu.Lock()
	o.took = time.Since(o.began)
	links := []*link{o.main, o.demand}
	o.mu.Unlock()
	for _, l := range links {
		if l != nil {
			l.cancel(errEnded)
		}
	}
	cancel(errEnded)
	o.wg.Wait()
	o.sender.close()
	stopProgress()
	o.mu.Lock()
	err = errors.Join(err, o.markErr)
	o.mu.Unlock()
	if err == nil && (state == Moved || o.delivered) {
		return nil
	}
	if err == nil {
		err = errors.New("the target did not take the VM")
	}
	return err
}

func (o *outgoing) reportProgress() (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				o.config.OnProgress(o.Stats())
				return
			case <-tick.C:
				o.config.OnProgress(o.Stats())
			}
		}
	})
	return func() {
		close(done)
		wg.Wait()
	}
}

// Stats says what was done so far.
func (o *outgoing) Stats() Stats {
	o.mu.Lock()
	s := Stats{State: o.State(), Cycle: o.cycle, Total: o.took, Paused: o.downtime, Wire: o.closed}
	if s.Total == 0 {
		s.Total = time.Since(o.began)
	}
	for _, l := range []*link{o.main, o.demand} {
		if l != nil {
			s.Wire += l.Sent() + l.Received()
		}
	}
	o.mu.Unlock()
	for _, d := range o.devices {
		s.Devices = append(s.Devices, DeviceStats{
			Name: d.Name, Size: d.Device.Size(), Sent: d.sent.Load(), Saved: d.saved.Load(), Pending: d.pending.Count() * block.PageSize,
			PostCopy: d.postCopy.Load(), Wanted: d.wanted.Load(),
		})
	}
	return s
}

// revocable returns a context that ends with ctx, when the migration is revoked, or with its connection.
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

// preflight tells the target what there is, and waits for its answer. The VM is not touched.
func (o *outgoing) preflight(ctx context.Context) (State, error) {
	l := o.first
	ctx, cancel := o.revocable(ctx, l)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.cancel(context.Cause(ctx)) })
	defer stop()
	m := wire.Manifest{Config: o.config.Config, Processor: o.config.Processor}
	if o.config.Forward {
		m.Features |= wire.FeatureForward
	}
	for _, d := range o.devices {
		if !o.copy {
			d.backup = o.config.Backup.backup(d.Device)
		}
		m.Devices = append(m.Devices, wire.Device{Name: d.Name, Size: d.Device.Size(), BlockSize: d.Device.BlockSize(), NeedsBase: d.NeedsBase, Base: d.Base, Backup: d.backup})
	}
	if err := l.Send(m); err != nil {
		return "", l.lost(err)
	}
	reply, err := l.receive(o.sizes)
	if err != nil {
		return "", err
	}
	accept, ok := reply.(wire.Accept)
	if !ok || len(accept.Held) != len(o.devices) {
		return "", fmt.Errorf("%w: no answer to the manifest", wire.ErrProtocol)
	}
	for i, d := range o.devices {
		switch accept.Held[i] {
		case wire.HoldsNothing:
			if d.NeedsBase {
				return "", fmt.Errorf("%w: device %s needs its base at the target", wire.ErrProtocol, d.Name)
			}
		case wire.HoldsBase:
			if d.Base == (block.ID{}) || d.Overlay == nil {
				return "", fmt.Errorf("%w: device %s has no base", wire.ErrProtocol, d.Name)
			}
			d.holds = true
		case wire.HoldsBackup:
			if d.backup == (block.ID{}) {
				return "", fmt.Errorf("%w: device %s has no backup", wire.ErrProtocol, d.Name)
			}
			d.stored = true
		case wire.Unwanted:
			d.skip = true
		default:
			return "", fmt.Errorf("%w: device %s is held in an unknown way", wire.ErrProtocol, d.Name)
		}
		d.held = make([]uint64, block.Pages(d.Device))
	}
	o.attachMain(l)
	return PreCopying, nil
}

// attachMain makes l the main connection and reads from it.
func (o *outgoing) attachMain(l *link) {
	o.mu.Lock()
	o.retire(o.main)
	o.main = l
	close(o.attached)
	o.attached = make(chan struct{})
	o.mu.Unlock()
	o.wg.Go(func() { l.cancel(o.read(l)) })
}

// retire ends a link that is replaced, with mu held.
func (o *outgoing) retire(l *link) {
	if l == nil {
		return
	}
	l.cancel(errors.New("the target has reconnected"))
	o.closed += l.Sent() + l.Received()
}

// attach serves a connection that joins the migration, until it ends.
func (o *outgoing) attach(l *link, hello wire.Hello) error {
	if hello.Lane == wire.Demand {
		o.mu.Lock()
		o.retire(o.demand)
		o.demand = l
		o.mu.Unlock()
		return o.read(l)
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
	if err := o.reconcile(resume.Outcome == wire.Accepted); err != nil {
		l.refuse(wire.CodeCancelled, err)
		return err
	}
	if resume.Outcome != wire.Accepted || o.State() == Moved {
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

// reconcile takes note of where a target stands that has reconnected. A contradiction to where this side stands is an operator's mistake.
func (o *outgoing) reconcile(accepted bool) error {
	switch state := o.State(); state {
	case HandingOff, InDoubt:
		// While handing off: a target that has accepted has got the authority, whose sending is just about to end here. One that refuses has given up
		// before it came, and whatever is still sent goes nowhere.
		o.ack(wire.Ack{Accepted: accepted, Reason: "the target did not take over before it lost the connection"})
	case Serving, LeftServing, Moved:
		if !accepted {
			return errors.New("the VM was taken over before")
		}
	default:
		if accepted {
			return fmt.Errorf("the VM runs at its source (%s)", state)
		}
	}
	return nil
}

// replacePending makes exactly those pages pending which the target lacks. What was sent on the connections it had may have been lost.
func (o *outgoing) replacePending(missing []*block.Bitmap) {
	o.mu.Lock()
	for _, l := range []*link{o.main, o.demand} {
		if l != nil {
			l.cancel(errors.New("the target has reconnected"))
		}
	}
	o.mu.Unlock()
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
			if state := o.State(); state == PreCopying || state == Preparing {
				// It is not ready yet, so that this is sent, or missing, before the VM is there.
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
			o.answered(m.Cycle)
		case wire.Type:
			switch {
			case m == wire.TypeReady:
				o.once.ready.Do(func() { close(o.ready) })
				continue
			case m == wire.TypeComplete && (o.State() == InDoubt || o.State() == Serving || o.State() == Delivering):
				o.once.complete.Do(func() { close(o.complete) })
				continue
			}
			return fmt.Errorf("%w: %s while %s", wire.ErrProtocol, m, o.State())
		default:
			return fmt.Errorf("%w: %T while %s", wire.ErrProtocol, m, o.State())
		}
	}
}

// preCopy sends all, and then again and again what has changed meanwhile, until the rest is small enough.
func (o *outgoing) preCopy(ctx context.Context) (State, error) {
	ctx, cancel := o.revocable(ctx, o.first)
	defer cancel()
	var deadline time.Time
	if t := o.config.Limits.Timeout; t > 0 {
		deadline = o.began.Add(t)
	}
	if err := o.pendAll(); err != nil {
		return "", err
	}
	previous := int64(-1)
	for cycle := 1; ; cycle++ {
		left, err := o.nextCycle(ctx, cycle)
		if err != nil {
			return "", err
		}
		late := !deadline.IsZero() && time.Now().After(deadline)
		if late && o.config.Limits.AtTimeout == Cancel {
			return "", fmt.Errorf("the VM writes faster than the connection takes it: %d bytes are left after %s; allow more time, or post-copy", left, o.config.Limits.Timeout)
		}
		if cycle > 1 && (late || o.converged(cycle, left, previous)) {
			if o.isReady() {
				return Preparing, nil
			}
			if late {
				return o.awaitReady(ctx)
			}
		}
		if err := o.drain(ctx, o.first, deadline); err != nil {
			return "", o.first.lost(err)
		}
		shrinks := previous < 0 || left < previous*3/4
		if cycle > 1 && !shrinks || !o.isReady() && cycle > 1 {
			if err := o.pause(ctx); err != nil {
				return "", err
			}
		}
		previous = left
	}
}

// pendAll makes all that the target cannot have pending.
func (o *outgoing) pendAll() error {
	for _, d := range o.devices {
		if d.skip {
			continue
		}
		// In this order: what is written from here on is dirty.
		d.Device.Take()
		if pages := o.baseline.begin(d); pages != nil {
			d.unknown, d.whole = true, true
			d.pending.Add(wholeBlocks(d, pages))
			continue
		}
		if d.stored {
			pages := o.config.Backup.since(d.Device, d.backup)
			if pages == nil {
				return fmt.Errorf("device %s: the backup is being replaced; try again", d.Name)
			}
			d.unknown = true
			d.pending.Add(pages)
			continue
		}
		if d.holds {
			pages := d.Overlay.BlockSize() / block.PageSize
			for b := range d.Overlay.Present().All() {
				d.pending.SetRange(b*pages, min((b+1)*pages, d.pending.Len()))
			}
			continue
		}
		for off := int64(0); off < d.Device.Size(); {
			start, end, err := d.Device.NextData(off)
			if err != nil {
				return fmt.Errorf("device %s: %w", d.Name, err)
			}
			if start < end {
				d.pending.SetRange(start/block.PageSize, (end+block.PageSize-1)/block.PageSize)
			}
			off = max(end, off+1)
		}
	}
	return nil
}

// nextCycle makes pending what was written since the last one, and returns how much is pending.
func (o *outgoing) nextCycle(ctx context.Context, cycle int) (left int64, err error) {
	if err := o.config.VM.Flush(ctx); err != nil {
		return 0, err
	}
	o.take()
	for _, d := range o.devices {
		left += d.pending.Count() * block.PageSize
	}
	o.mu.Lock()
	o.cycle = cycle
	o.mu.Unlock()
	return left, o.announce(cycle, left)
}

// announce tells the target of a cycle. It answers when it has stored all from before.
func (o *outgoing) announce(cycle int, left int64) error {
	o.mu.Lock()
	o.announced.cycle, o.announced.at = cycle, time.Now()
	o.mu.Unlock()
	if err := o.first.Send(wire.Cycle{Number: cycle, Bytes: left}); err != nil {
		return o.first.lost(err)
	}
	return nil
}

// answered takes note of the target's answer to a cycle.
func (o *outgoing) answered(cycle int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	a := &o.announced
	if cycle != a.cycle || a.answered == cycle {
		return
	}
	a.answered = cycle
	if took := time.Since(a.at); a.quickest == 0 || took < a.quickest {
		a.quickest = took
	}
	select {
	case o.stored <- struct{}{}:
	default:
	}
}

// catchUp waits until the target has stored what it was sent, if it is near: it would do it while the VM is paused otherwise.
func (o *outgoing) catchUp(ctx context.Context) error {
	o.mu.Lock()
	quickest := o.announced.quickest
	o.mu.Unlock()
	if quickest == 0 || quickest > o.config.Limits.nearby {
		return nil
	}
	cycle := o.cycle + 1 // only this goroutine changes cycle
	if err := o.announce(cycle, 0); err != nil {
		return err
	}
	timeout := time.NewTimer(o.config.Limits.patience)
	defer timeout.Stop()
	for {
		select {
		case <-o.stored:
			o.mu.Lock()
			done := o.announced.answered == cycle
			o.mu.Unlock()
			if done {
				return nil
			}
		case <-timeout.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// take makes pending what was written.
func (o *outgoing) take() {
	for _, d := range o.devices {
		pages := d.Device.Take()
		if d.whole {
			pages = wholeBlocks(d, pages)
		}
		if !d.skip {
			d.pending.Add(pages)
		}
	}
}

// negligible is a rest in bytes that is not worth another cycle.
const negligible = 64 * block.PageSize

// converged tells whether another cycle would bring nothing, or should not be.
func (o *outgoing) converged(cycle int, left, previous int64) bool {
	if left <= negligible {
		return true
	}
	// Half of the limit is for what comes besides: saving and restoring the state.
	fits := float64(left) <= o.sender.compression.link.perSecond()*o.config.Limits.Downtime.Seconds()/2
	if fits && previous >= 0 && left >= previous*3/4 {
		return true
	}
	all := true
	for _, d := range o.devices {
		if d.dirtyBlocks() <= d.MaxDirtyBlocks {
			d.quiet++
		}
		all = all && (d.skip || d.quiet >= d.MinCycles || cycle > d.MaxCycles)
	}
	return all
}

// dirtyBlocks is the number of blocks that have pending pages.
func (d *outgoingDevice) dirtyBlocks() (n int) {
	pages := d.Device.BlockSize() / block.PageSize
	for p := d.pending.Next(0); p < d.pending.Len(); p = d.pending.Next((p/pages + 1) * pages) {
		n++
	}
	return n
}

func (o *outgoing) isReady() bool {
	select {
	case <-o.ready:
		return true
	default:
		return false
	}
}

func (o *outgoing) awaitReady(ctx context.Context) (State, error) {
	timeout := time.NewTimer(o.config.Limits.Handoff)
	defer timeout.Stop()
	if err := o.first.Send(wire.TypeReady); err != nil {
		return "", o.first.lost(err)
	}
	select {
	case <-o.ready:
		return Preparing, nil
	case <-timeout.C:
		return "", errors.New("the target's VMM does not get ready")
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// pause waits between cycles for the shortest of the devices' throttles, or until the target's VMM is ready.
func (o *outgoing) pause(ctx context.Context) error {
	var throttles []time.Duration
	for _, d := range o.devices {
		if !d.skip {
			throttles = append(throttles, d.CycleThrottle)
		}
	}
	if len(throttles) == 0 {
		throttles = []time.Duration{0}
	}
	timer := time.NewTimer(slices.Min(throttles))
	defer timer.Stop()
	ready := o.ready
	if o.isReady() {
		ready = nil
	}
	select {
	case <-timer.C:
	case <-ready:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// prepare lets the guest get ready and sends what that changed.
func (o *outgoing) prepare(ctx context.Context) (State, error) {
	ctx, cancel := o.revocable(ctx, o.first)
	defer cancel()
	pctx, pcancel := context.WithTimeoutCause(ctx, o.config.Limits.Prepare, fmt.Errorf("the guest did not get ready within %s", o.config.Limits.Prepare))
	err := o.config.VM.Prepare(pctx)
	pcancel()
	if err != nil {
		return "", err
	}
	if _, err := o.nextCycle(ctx, o.cycle+1); err != nil { // only this goroutine changes cycle
		return "", err
	}
	// What does not fit is left to post-copy; without it all is sent, before the pause as far as possible.
	var until time.Time
	if !o.config.Limits.NoPostCopy && !o.copy {
		until = time.Now().Add(o.config.Limits.Downtime)
	}
	if err := o.drain(ctx, o.first, until); err != nil {
		return "", o.first.lost(err)
	}
	if o.copy {
		return Snapshotting, nil
	}
	if err := o.catchUp(ctx); err != nil {
		return "", err
	}
	return HandingOff, nil
}

// handOff pauses the VM, sends what is left, and gives it away.
func (o *outgoing) handOff(ctx context.Context) (State, error) {
	l := o.first
	ctx, cancel := o.revocable(ctx, l)
	defer cancel()
	// A write that hangs ends with its link.
	stop := context.AfterFunc(ctx, func() { l.cancel(context.Cause(ctx)) })
	defer stop()
	paused, err := o.freeze(ctx)
	if err != nil {
		return "", err
	}
	var until time.Time
	if !o.config.Limits.NoPostCopy {
		until = paused.Add(o.config.Limits.Downtime / 2)
	}
	if err := o.drain(ctx, l, until); err != nil {
		return "", l.lost(err)
	}
	missing := make([]*block.Bitmap, len(o.devices))
	for i, d := range o.devices {
		missing[i] = d.pending.Clone()
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	select {
	case a := <-o.acks: // of a target that has reconnected meanwhile
		return "", errors.New(a.Reason)
	default:
	}
	// From the first byte of it on, the VM may be the target's, whatever this end is told.
	stop()
	if err := l.Send(wire.Authority{Paused: time.Since(paused), Missing: missing}); err != nil {
		l.cancel(err)
	}
	return InDoubt, nil
}

// freeze pauses the VM and makes all that the target lacks pending.
func (o *outgoing) freeze(ctx context.Context) (paused time.Time, err error) {
	paused = time.Now()
	o.mu.Lock()
	o.paused = paused
	o.mu.Unlock()
	vm := o.config.VM
	if err := vm.Pause(ctx); err != nil {
		return paused, err
	}
	if err := vm.Flush(ctx); err != nil {
		return paused, err
	}
	if err := vm.Save(ctx, o.id); err != nil {
		return paused, err
	}
	// The VMM may have written guest memory while it saved.
	if err := vm.Flush(ctx); err != nil {
		return paused, err
	}
	o.take()
	return paused, nil
}

// settle waits until it is known who owns the VM.
func (o *outgoing) settle(ctx context.Context) (State, error) {
	o.startServing(ctx)
	next, err := o.awaitAnswer(ctx)
	if err != nil {
		o.mark(InDoubt)
		return "", errors.Join(ErrInDoubt, err)
	}
	return next, nil
}

// mark notes where the VM stands, after the marks before, and returns a channel that is closed when that is done. A mark that cannot be made does not keep
// the target from what it needs; the migration ends with its error.
func (o *outgoing) mark(state State) <-chan struct{} {
	done := make(chan struct{})
	o.mu.Lock()
	previous := o.marked
	o.marked = done
	o.mu.Unlock()
	o.wg.Go(func() {
		defer close(done)
		<-previous
		if err := o.config.VM.Mark(context.Background(), state, o.id); err != nil {
			o.mu.Lock()
			o.markErr = errors.Join(o.markErr, fmt.Errorf("note that the VM is %q: %w", state, err))
			o.mu.Unlock()
		}
	})
	return done
}

// awaitAnswer waits for the target to take the VM or to refuse it, or for an operator. Most answers come sooner than what is in doubt could be noted.
func (o *outgoing) awaitAnswer(ctx context.Context) (State, error) {
	note := time.NewTimer(o.config.Limits.note)
	defer note.Stop()
	for {
		select {
		case a := <-o.acks:
			if !a.Accepted {
				o.refused(a.Reason)
				return Rescuing, nil
			}
			o.mu.Lock()
			o.downtime = time.Since(o.paused)
			o.mu.Unlock()
			return Serving, nil
		case outcome := <-o.settled:
			switch outcome {
			case undecided:
				return "", errors.New("the source was ended")
			case Here:
				o.refused("an operator decided so")
				return Rescuing, nil
			}
			return Serving, nil
		case <-note.C:
			o.mark(InDoubt)
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

func (o *outgoing) refused(reason string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.main != nil {
		o.main.cancel(errors.New("the target refused the VM: " + reason))
	}
}

// rescue lets the VM go on.
func (o *outgoing) rescue(ctx context.Context) (State, error) {
	o.mu.Lock()
	marked := o.marked
	o.mu.Unlock()
	<-marked
	ctx = context.WithoutCancel(ctx)
	if err := o.config.VM.Rescue(ctx); err != nil {
		return "", err
	}
	o.config.VM.Rescued(ctx)
	return Kept, nil
}

package migration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/internal/logging"
	"drafter/internal/memory"
	"drafter/internal/wire"
	"drafter/migrate"
)

// TargetVM is what a target needs of the VM that it receives. The target makes one call at a time,
// but pages arrive beside Start and Expect.
type TargetVM interface {
	// Accept checks the offer and opens devices for it, in the manifest's order. An error refuses
	// the VM, and is sent to the source. Discard undoes what Accept made.
	Accept(ctx context.Context, m wire.Manifest, migration uuid.UUID) ([]TargetDevice, error)
	// Start starts the VMM, which waits for Restore. The devices that it needs have arrived.
	Start(ctx context.Context) error
	// Expect notes durably that the VM may be taken over from now on. It is called before Restore,
	// and may take as long as a busy disk does.
	Expect(ctx context.Context, migration uuid.UUID) error
	// Restore loads the VM's state and notes that the VM runs here, so that this is known even if
	// this process is killed. The VM does not run yet.
	Restore(ctx context.Context, migration uuid.UUID) error
	// Resume lets the VM run. After an error the VM has not run, unless the error is a
	// [migrate.ErrMayHaveRun].
	Resume(ctx context.Context) error
	// Complete makes everything durable that has arrived. Nothing is missing any more.
	Complete(ctx context.Context) error
	// Discard gives up what Accept, Start, Expect and Restore made, and notes that the VM never ran
	// here.
	Discard(ctx context.Context) error
}

// StateLoader is a [TargetVM] that can load its state while its source makes it.
type StateLoader interface {
	// Load loads the state up to byte end of its device, after Expect and ahead of Restore. The rest
	// of the VM is here, but for what its source may still write when it saves. Load is called
	// beside what still arrives, any number of times or never.
	Load(ctx context.Context, end int64) error
}

// MemoryTaker is a [TargetVM] that can take memory as a file, from a source on this host.
type MemoryTaker interface {
	// Offered is called before Accept, with the file of the device that is Open, or nil. The VM owns
	// it, and may adopt it; see [memory.Device.Adopt].
	Offered(file *os.File)
}

// TargetDevice is where a device of the manifest arrives.
type TargetDevice struct {
	Held   wire.Held
	Device *block.Incoming // nil when it is [wire.Unwanted]
	First  bool            // the VMM needs it to start
	Backup *Backup         // where to get the content that is held; of [wire.HoldsBackup] only
	Base   *block.Contents // of a base that is held and that the source lacks; else nil

	// Warm, if not nil, brings what is held nearer to the VM, until ctx ends. It is called before
	// the handoff.
	Warm func(ctx context.Context) error
	// Memory, if not nil, has adopted the file that came with the offer.
	Memory *memory.Device
	// Evict, if not nil, makes pages missing that have not arrived, from first on and before end,
	// whatever is there of them. It is called at the handoff.
	Evict func(first, end int64) error

	// Persist, if not nil, notes durably which pages are missing; see [block.Incoming.Open].
	Persist func(missing *block.Bitmap) error
}

// TargetConfig says how to receive a VM.
type TargetConfig struct {
	VM     TargetVM
	Dial   migrate.Dial
	Limits migrate.Limits
	// receive a copy: the VM goes on at its source, and only Accept, Complete and Discard of VM are
	// called
	Copy bool
	// take the VM even if its guest does not get ready to be paused; data that the guest has not
	// flushed is as after a power cut
	Force bool
	// Landing tells where the VM's connections can go on here, in JSON; nil if they cannot. It is
	// given what [Lander] says, and the source's address if that is known. The source must know what
	// it says.
	Landing func(departure []byte, source net.Addr) []byte

	// As in [SourceConfig].
	Logger     *slog.Logger
	OnPhase    func(migrate.Phase)
	OnProgress func(migrate.Stats)
}

// Target is a VM that has arrived, or whose missing pages are arriving.
type Target struct {
	*standing
	config   TargetConfig
	id       uuid.UUID
	forwards bool // the source has users of the devices
	lanes    *lanes
	figures  figures
	wanting  *wanting

	devMu   sync.Mutex // guards devices until they are accepted
	devices []*incomingDevice
	sizes   []int64

	cancel   context.CancelCauseFunc
	commit   func() bool // the end of the caller's context ends nothing from then on; false: it has ended
	waits    *signal     // the VMM waits for the VM
	running  *signal     // the VM runs here
	whole    *signal     // nothing is missing here
	released *signal     // the source has taken note
	ended    *signal     // all is over; err is set
	err      error
	wg       sync.WaitGroup

	authority chan wire.Authority // from the reader; its devices are open
	snapshot  chan wire.Snapshot  // from the reader: all of a copy is there
	start     task                // of the VMM
	expect    task                // that the VM comes
	loading   *loading            // of its state, as it arrives
	restoring *restoring
	claimed   *memory.Claim // memory that has changed hands; nil if none has, or it is not claimed
	offered   bool          // Ready was sent, so an authority may be on its way
	refusal   error         // why the VM was not taken over
	taken     atomic.Bool   // an authority has been received
}

// wanting is what the source is to be told: pages that somebody waits for, and the answer to a
// cycle. It is safe for concurrent use.
type wanting struct {
	news chan struct{} // holds a token when there is something to say

	mu     sync.Mutex // guards the following
	queue  []wire.Want
	stored int // the last cycle that is to be answered; 0: none
}

func newWanting() *wanting { return &wanting{news: make(chan struct{}, 1)} }

// say changes what the source is to be told.
func (w *wanting) say(change func(w *wanting)) {
	w.mu.Lock()
	change(w)
	w.mu.Unlock()
	select {
	case w.news <- struct{}{}:
	default:
	}
}

// take returns what the source is to be told, once.
func (w *wanting) take() (queue []wire.Want, stored int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	queue, stored = w.queue, w.stored
	w.queue, w.stored = nil, 0
	return queue, stored
}

// task is something that is done once.
type task struct {
	once  sync.Once
	begun atomic.Bool
	done  chan struct{} // closed at its end
	err   error
}

// begin does it in a goroutine of wg, if that was not begun before.
func (k *task) begin(wg *sync.WaitGroup, do func() error) {
	k.once.Do(func() {
		k.begun.Store(true)
		wg.Go(func() {
			defer close(k.done)
			k.err = do()
		})
	})
}

// Receive asks a source for its VM. It returns nil when the VM runs here. Missing pages are fetched
// from then on; see [Target.Wait]. On an error the VM does not run here.
func Receive(ctx context.Context, c TargetConfig) (*Target, error) {
	var err error
	if c.Limits, err = c.Limits.WithDefaults(); err != nil {
		return nil, err
	}
	c.Logger = logging.Or(c.Logger)
	if c.OnPhase == nil {
		c.OnPhase = func(migrate.Phase) {}
	}
	if c.OnProgress == nil {
		c.OnProgress = func(migrate.Stats) {}
	}
	id, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("make migration id: %w", err)
	}
	t := &Target{
		standing: newStanding(), config: c, id: id, lanes: newLanes(), figures: figures{began: time.Now()}, wanting: newWanting(),
		waits: newSignal(), running: newSignal(), whole: newSignal(), released: newSignal(), ended: newSignal(),
		authority: make(chan wire.Authority, 1), snapshot: make(chan wire.Snapshot, 1), restoring: newRestoring(),
	}
	t.start.done, t.expect.done = make(chan struct{}), make(chan struct{})
	t.loading = newLoading()
	// The pages that arrive after the VM runs do not end with the caller's context.
	lifetime, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	t.cancel = cancel
	t.commit = context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
	go t.run(lifetime)
	select {
	case <-t.running.fired():
		return t, nil
	case <-t.ended.fired():
	}
	t.commit()
	if t.Phase() == migrate.Copied || t.running.has() {
		return t, nil
	}
	return nil, t.err
}

// targetTable is the target's machine.
var targetTable = map[migrate.Phase]row[*Target]{
	migrate.Preflight:   {does: (*Target).preflight, then: []migrate.Phase{migrate.Receiving}, failing: migrate.HandingBack},
	migrate.Receiving:   {does: (*Target).receive, then: []migrate.Phase{migrate.TakingOver, migrate.Storing}, failing: migrate.HandingBack},
	migrate.TakingOver:  {does: (*Target).takeOver, then: []migrate.Phase{migrate.Fetching}, failing: migrate.HandingBack, within: func(l *migrate.Limits) time.Duration { return l.Handoff }},
	migrate.HandingBack: {does: (*Target).handBack, then: []migrate.Phase{migrate.NotTaken}, failing: migrate.NotTaken},
	migrate.Fetching:    {does: (*Target).fetch, then: []migrate.Phase{migrate.Confirming}, failing: migrate.LeftFetching},
	migrate.Confirming:  {does: (*Target).confirm, then: []migrate.Phase{migrate.Moved}, failing: migrate.LeftFetching},

	migrate.Storing: {does: (*Target).storeCopy, then: []migrate.Phase{migrate.Copied}, failing: migrate.HandingBack},

	migrate.NotTaken: {}, migrate.Moved: {}, migrate.LeftFetching: {}, migrate.Copied: {},
}

func (t *Target) run(ctx context.Context) {
	defer t.ended.fire()
	stopProgress := report(t.Stats, t.config.OnProgress)
	_, err := advance(ctx, t, targetTable, migrate.Preflight, &t.config.Limits, func(s migrate.Phase) {
		t.enter(s)
		if s == migrate.Fetching {
			t.running.fire()
		}
		t.config.OnPhase(s)
	})
	t.figures.update(func(f *figures) { f.total = time.Since(f.began) })
	t.cancel(errEnded)
	t.lanes.close(errEnded)
	t.wg.Wait()
	stopProgress()
	t.err = err
}

// Stats returns the statistics so far.
func (t *Target) Stats() migrate.Stats {
	s := t.figures.stats(t.Phase(), t.lanes.bytes())
	t.devMu.Lock()
	devices := t.devices
	t.devMu.Unlock()
	for _, d := range devices {
		if d.Device == nil {
			continue
		}
		s.Devices = append(s.Devices, migrate.DeviceStats{
			Name: d.name, Size: d.Device.Size(), Sent: d.received.Load(), Saved: d.saved.Load(), Pending: d.Device.Missing() * block.PageSize,
			PostCopy: d.postCopy.Load(), Wanted: d.wanted.Load(), Backup: d.fetched.Load(),
		})
	}
	return s
}

// Done is closed when nothing is missing any more and the source knows, or when that will never be
// so.
func (t *Target) Done() <-chan struct{} { return t.ended.fired() }

// Whole is closed when nothing is missing here. From then on the source is not needed, whether it
// knows or not.
func (t *Target) Whole() <-chan struct{} { return t.whole.fired() }

// Lost returns why the VM cannot go on here: its source has taken it back, or has ended before
// everything was here. It is nil while neither is so, or known.
func (t *Target) Lost() error {
	if !t.ended.has() || t.whole.has() && !errors.Is(t.err, migrate.ErrTakenBack) {
		return nil
	}
	return t.err
}

// Wait waits until Done is closed, and returns why the VM is not complete; nil if it is.
func (t *Target) Wait() error {
	<-t.ended.fired()
	return t.err
}

// GiveUp ends the migration of a VM with missing pages, because an operator has settled that its
// source goes on with it. Wait returns [migrate.ErrTakenBack].
func (t *Target) GiveUp() {
	t.cancel(fmt.Errorf("%w, as an operator has settled here", migrate.ErrTakenBack))
}

// Close gives up what is still missing, and waits until everything has ended. If nothing is
// missing, a connected source is told first.
func (t *Target) Close() error {
	if t.whole.has() {
		l, _ := t.lanes.get()
		select {
		case <-t.ended.fired():
		case <-l.ctx.Done():
		case <-time.After(t.config.Limits.Silence):
		}
	}
	t.cancel(errors.New("the target is closing"))
	<-t.ended.fired()
	for _, d := range t.devices {
		if d.Device != nil {
			d.Device.Abandon()
		}
	}
	return nil
}

// connect dials and says hello.
func (t *Target) connect(ctx context.Context, lane wire.Lane, resume bool) (*link, error) {
	dctx, cancel := context.WithTimeoutCause(ctx, t.config.Limits.Silence, errors.New("no answer"))
	defer cancel()
	if t.config.Dial == nil {
		return nil, errors.New("connect: dial is nil")
	}
	stream, err := t.config.Dial(dctx)
	if err == nil && stream == nil {
		err = errors.New("dial gave no connection")
	}
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	l := newLink(ctx, stream, t.config.Limits.Silence)
	hello := wire.Hello{Version: wire.Version, Lane: lane, Resume: resume, Copy: t.config.Copy, Migration: t.id, Features: wire.FeatureSignature | wire.FeatureContents}
	if _, takes := t.config.VM.(MemoryTaker); takes && lane == wire.Main && !resume {
		hello.Features |= wire.FeatureFile
	}
	if t.config.Force {
		hello.Features |= wire.FeatureForce
	}
	if err := l.Send(hello); err != nil {
		err = l.lost(err)
		l.close(err)
		return nil, err
	}
	return l, nil
}

// landing says where the VM's connections can go on, if the source wants to know.
func (t *Target) landing(m wire.Manifest, l *link) []byte {
	if m.Features&wire.FeatureLanding == 0 || t.config.Landing == nil {
		return nil
	}
	return t.config.Landing(m.Departure, l.remote)
}

// preflight learns what the source offers, and whether it can run here.
func (t *Target) preflight(ctx context.Context) (migrate.Phase, error) {
	l, err := t.connect(ctx, wire.Main, false)
	if err != nil {
		return "", err
	}
	t.lanes.setMain(l)
	taker, takes := t.config.VM.(MemoryTaker)
	if takes = takes && l.Files(); takes {
		l.ExpectFile()
	}
	reply, err := l.receive(nil)
	if errors.Is(err, io.EOF) {
		return "", fmt.Errorf("the source closed the connection without a word, as one does that wants TLS, or has too many connections; its log says why: %w", err)
	}
	if err != nil {
		return "", fmt.Errorf("the source refuses: %w", err)
	}
	m, ok := reply.(wire.Manifest)
	if !ok || len(m.Devices) == 0 {
		return "", fmt.Errorf("%w: no manifest after a hello", wire.ErrProtocol)
	}
	if m.Features&wire.FeaturePackage != 0 {
		return "", migrate.ErrPackage
	}
	if err := block.CheckSizes(t.config.Limits.MaxSize, m.Sizes()...); err != nil {
		l.refuse(wire.CodeIncompatible, err)
		return "", err
	}
	t.forwards = m.Features&wire.FeatureForward != 0
	if takes {
		taker.Offered(l.TakeFile())
	}
	devices, err := t.config.VM.Accept(ctx, m, t.id)
	if err != nil {
		l.refuse(wire.CodeIncompatible, err)
		return "", err
	}
	accept := wire.Accept{Landing: t.landing(m, l)}
	var incoming []*incomingDevice
	for i, d := range devices {
		held := d.Held
		if d.Memory != nil {
			held |= wire.TakesFile
		}
		accept.Held = append(accept.Held, held)
		in := &incomingDevice{TargetDevice: d, name: m.Devices[i].Name, index: i}
		if d.Device != nil {
			in.asked = block.NewBitmap(block.Pages(d.Device))
		}
		incoming = append(incoming, in)
		t.sizes = append(t.sizes, m.Devices[i].Size)
	}
	t.devMu.Lock()
	t.devices = incoming
	t.devMu.Unlock()
	if err := t.beginBackups(); err != nil {
		l.refuse(wire.CodeInternal, err)
		return "", err
	}
	if !t.config.Copy {
		t.joinDemand(ctx)
	}
	t.restoring.ctx, t.restoring.cancel = context.WithCancelCause(ctx)
	t.startWhenPossible(ctx, 1)
	t.wg.Go(func() { l.cancel(t.read(ctx, l)) })
	t.wg.Go(func() { t.ask(ctx) })
	t.wg.Go(func() {
		if err := t.fetchBackups(ctx, l); err != nil {
			l.refuse(wire.CodeInternal, err)
			l.cancel(err)
		}
	})
	if err := t.headStart(ctx, l); err != nil {
		return "", err
	}
	for i, d := range devices {
		if d.Held == wire.HoldsBase && d.Base != nil {
			if err := sendContents(l, i, d.Base); err != nil {
				return "", l.lost(err)
			}
		}
	}
	if err := l.Send(accept); err != nil {
		return "", l.sendLost(err)
	}
	t.figures.update(func(f *figures) { f.preflight = time.Since(f.began) })
	return migrate.Receiving, nil
}

// headStart waits, for as long as the limits allow, until the VMM is there, if it has begun to
// start. Then the VM's writes meanwhile need not be sent again and again, and if the VMM cannot
// start, the VM has not been touched.
func (t *Target) headStart(ctx context.Context, l *link) error {
	if !t.start.begun.Load() || slices.ContainsFunc(t.devices, func(d *incomingDevice) bool { return d.left != nil }) {
		return nil
	}
	timeout := time.NewTimer(t.config.Limits.HeadStart)
	defer timeout.Stop()
	select {
	case <-t.waits.fired():
	case <-t.start.done:
		if err := t.start.err; err != nil {
			l.refuse(codeOf(err), fmt.Errorf("the target cannot start its VMM: %w", err))
			return err
		}
	case <-timeout.C:
	case <-l.ctx.Done():
		return fmt.Errorf("the VM stays at its source: %w", context.Cause(l.ctx))
	case <-ctx.Done():
		l.refuse(wire.CodeCancelled, errors.New("the target was ended"))
		return context.Cause(ctx)
	}
	return nil
}

// joinDemand opens the demand lane, if the transport gives a second connection.
func (t *Target) joinDemand(ctx context.Context) {
	l, err := t.connect(ctx, wire.Demand, false)
	if err != nil {
		return // then the main connection serves for it
	}
	t.lanes.joinDemand(l)
	t.wg.Go(func() { l.cancel(t.read(ctx, l)) })
}

// read takes what the source sends until the link ends.
func (t *Target) read(ctx context.Context, l *link) error {
	decoder, err := wire.NewDecoder()
	if err != nil {
		return err
	}
	defer decoder.Close()
	for {
		f, err := l.Read()
		if err != nil {
			return l.lost(err)
		}
		switch f.Type {
		case wire.TypePing:
			continue
		case wire.TypeExtent:
			e, err := decoder.Extent(f, t.sizes)
			if err != nil {
				return err
			}
			if err := t.store(l, e); err != nil {
				err = fmt.Errorf("device %s: %w", t.devices[e.Device].name, err)
				l.refuse(wire.CodeInternal, err)
				return err
			}
			continue
		}
		m, err := wire.Decode(f, t.sizes)
		if err == nil {
			err = t.heed(ctx, l, f.Type, m)
		}
		if err != nil {
			return err
		}
	}
}

// heed acts on a message of the source. An error ends the link.
func (t *Target) heed(ctx context.Context, l *link, kind wire.Type, message any) error {
	switch m := message.(type) {
	case wire.Cycle:
		t.figures.update(func(f *figures) { f.cycle = m.Number })
		t.wanting.say(func(w *wanting) { w.stored = m.Number })
		t.startWhenPossible(ctx, m.Number)
	case wire.State:
		if t.Phase() != migrate.Receiving || !t.started() || t.taken.Load() {
			return fmt.Errorf("%w: a state while %s", wire.ErrProtocol, t.Phase())
		}
		t.load(ctx, m.Final)
	case wire.Handed:
		d := t.devices[m.Device]
		if !t.receiving() || t.taken.Load() || d.Memory == nil {
			return fmt.Errorf("%w: pages handed over while %s", wire.ErrProtocol, t.Phase())
		}
		return d.Memory.Take(m.Pages)
	case wire.Authority:
		if t.Phase() != migrate.Receiving || !t.started() || !t.taken.CompareAndSwap(false, true) {
			return fmt.Errorf("%w: an authority while %s", wire.ErrProtocol, t.Phase())
		}
		if err := t.open(m); err != nil {
			return err
		}
		t.authority <- m // there is but one
	case wire.Snapshot:
		if !t.config.Copy || !t.receiving() || !t.taken.CompareAndSwap(false, true) {
			return fmt.Errorf("%w: a snapshot while %s", wire.ErrProtocol, t.Phase())
		}
		t.snapshot <- m // there is but one
	case wire.Error:
		return &RemoteError{Code: m.Code, Text: m.Text}
	case wire.Type:
		return t.heedWord(ctx, l, m)
	default:
		return fmt.Errorf("%w: %s while %s", wire.ErrProtocol, kind, t.Phase())
	}
	return nil
}

// receiving tells whether this side is receiving, or about to. The source may be quick, and this
// side may not have noticed yet.
func (t *Target) receiving() bool {
	phase := t.Phase()
	return phase == migrate.Preflight || phase == migrate.Receiving
}

// heedWord is heed for a message without content.
func (t *Target) heedWord(ctx context.Context, l *link, word wire.Type) error {
	phase := t.Phase()
	switch {
	case word == wire.TypeReady && t.taken.Load():
		t.wg.Go(func() { t.joinDemand(ctx) })
	case word == wire.TypePrepare && t.receiving() && t.started():
		t.beginExpect(ctx, l)
	case word == wire.TypeReady && t.receiving():
		t.restoring.hurried.Do(func() { close(t.restoring.hurry) })
	case word == wire.TypeReleased && (phase == migrate.Confirming || phase == migrate.Storing):
		t.released.fire()
	default:
		return fmt.Errorf("%w: %s while %s", wire.ErrProtocol, word, phase)
	}
	return nil
}

// started tells whether the VMM waits.
func (t *Target) started() bool {
	select {
	case <-t.start.done:
		return t.start.err == nil
	default:
		return false
	}
}

// startWhenPossible starts the VMM once the devices that it needs are there. If they are the
// base's, that is at once. Else it is when the first cycle is over and their backups are here.
func (t *Target) startWhenPossible(ctx context.Context, cycle int) {
	if t.config.Copy {
		return
	}
	for _, d := range t.devices {
		if d.First && (cycle < 2 && d.Held != wire.HoldsBase || d.left != nil && d.left.Count() > 0) {
			return
		}
	}
	t.start.begin(&t.wg, func() error {
		if err := t.config.VM.Start(ctx); err != nil {
			return err
		}
		t.waits.fire()
		if err := t.awaitBackups(ctx); err != nil {
			return err
		}
		return t.warm(ctx)
	})
}

// beginExpect notes, beside what still arrives, that the VM may be taken over. It tells the source
// when that is done.
func (t *Target) beginExpect(ctx context.Context, l *link) {
	t.expect.begin(&t.wg, func() error {
		if err := t.config.VM.Expect(ctx, t.id); err != nil {
			return err
		}
		if err := l.Send(wire.TypePrepare); err != nil {
			l.sendFailed(err)
		}
		return nil
	})
}

// want asks for pages once, without waiting.
func (t *Target) want(device int, first, end int64) {
	asked := t.devices[device].asked
	var queue []wire.Want
	for page := first; page < end; page++ {
		if !asked.Set(page) {
			continue
		}
		if n := len(queue); n > 0 && queue[n-1].Ends == page {
			queue[n-1].Ends++
			continue
		}
		queue = append(queue, wire.Want{Device: device, First: page, Ends: page + 1})
	}
	t.wanting.say(func(w *wanting) { w.queue = append(w.queue, queue...) })
}

// ask sends wants, and answers to cycles, because the reader must not wait for a send. What cannot
// be sent is asked for again once the next connection is there.
func (t *Target) ask(ctx context.Context) {
	for {
		select {
		case <-t.wanting.news:
		case <-ctx.Done():
			return
		}
		queue, stored := t.wanting.take() // before the link: a new one has a queue of its own
		l := t.lanes.urgent()
		if stored > 0 {
			if err := l.Send(wire.Progress{Cycle: stored}); err != nil {
				l.sendFailed(err)
			}
		}
		for _, w := range queue {
			if err := l.Send(w); err != nil {
				l.sendFailed(err)
				break
			}
		}
	}
}

// receive waits until the VM is handed over.
func (t *Target) receive(ctx context.Context) (migrate.Phase, error) {
	l, _ := t.lanes.get()
	started, expected := t.start.done, t.expect.done
	for {
		select {
		case <-started:
			if err := t.start.err; err != nil {
				l.refuse(codeOf(err), fmt.Errorf("the target cannot start its VMM: %w", err))
				return "", err
			}
			started = nil
			t.offered = true
			if err := l.Send(wire.TypeReady); err != nil {
				return "", l.sendLost(err)
			}
		case <-expected:
			if err := t.expect.err; err != nil {
				l.refuse(codeOf(err), fmt.Errorf("the target cannot take the VM over: %w", err))
				return "", err
			}
			expected = nil
		case a := <-t.authority:
			t.figures.update(func(f *figures) { f.downtime = a.Paused })
			return migrate.TakingOver, nil
		case s := <-t.snapshot:
			t.figures.update(func(f *figures) { f.downtime = s.Paused })
			return migrate.Storing, nil
		case <-l.ctx.Done():
			if len(t.snapshot) > 0 {
				continue // it came just before
			}
			return "", fmt.Errorf("the VM stays at its source: %w", context.Cause(l.ctx))
		case <-ctx.Done():
			l.refuse(wire.CodeCancelled, errors.New("the target was ended"))
			return "", context.Cause(ctx)
		}
	}
}

// storeCopy completes a copy and tells the source. The source need not get the message.
func (t *Target) storeCopy(ctx context.Context) (migrate.Phase, error) {
	l, _ := t.lanes.get()
	if err := t.config.VM.Complete(ctx); err != nil {
		l.refuse(codeOf(err), fmt.Errorf("the copy cannot be stored: %w", err))
		return "", err
	}
	if err := l.Send(wire.TypeComplete); err == nil {
		select {
		case <-t.released.fired():
		case <-l.ctx.Done():
		case <-ctx.Done():
		}
	}
	return migrate.Copied, nil
}

// takeOver lets the VM run here. Until then the VM can be handed back.
func (t *Target) takeOver(ctx context.Context) (migrate.Phase, error) {
	began := time.Now()
	l, _ := t.lanes.get()
	t.beginExpect(ctx, l) // if the source has not asked for it
	t.loading.end.fire()
	for _, k := range []*task{&t.expect, &t.loading.task} {
		if !k.begun.Load() {
			continue
		}
		select {
		case <-k.done:
			t.refusal = errors.Join(t.refusal, k.err)
		case <-ctx.Done():
			t.refusal = errors.Join(t.refusal, context.Cause(ctx))
		}
	}
	if t.refusal != nil {
		return "", t.refusal
	}
	if t.refusal = t.config.VM.Restore(ctx, t.id); t.refusal != nil {
		return "", t.refusal
	}
	if !t.commit() { // whoever ends this side from here on waits until the VM runs
		t.refusal = cmp.Or(context.Cause(ctx), errEnded)
		return "", t.refusal
	}
	if t.refusal = t.claim(); t.refusal != nil {
		return "", t.refusal
	}
	if err := t.config.VM.Resume(ctx); err != nil && !errors.Is(err, migrate.ErrMayHaveRun) {
		t.refusal = err
		return "", err
	}
	if t.claimed != nil {
		t.claimed.Keep()
	}
	t.figures.update(func(f *figures) { f.downtime += time.Since(began) })
	if serr := l.Send(wire.Ack{Accepted: true}); serr != nil {
		l.cancel(serr) // the source learns it on the next connection
	}
	return migrate.Fetching, nil // a VM that has died still has an owner, who will notice
}

// claim makes memory that has changed hands this side's, unless the source has taken it back.
func (t *Target) claim() (err error) {
	for _, d := range t.devices {
		if d.Memory != nil {
			t.claimed, err = d.Memory.Claim(t.id)
		}
	}
	return err
}

// handBack discards the VM, and tells the source that it will never run here.
func (t *Target) handBack(ctx context.Context) (migrate.Phase, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), t.config.Limits.Settle)
	defer cancel()
	t.restoring.end()
	t.loading.end.fire()
	for _, d := range t.devices {
		if d.Device != nil {
			d.Device.Abandon()
		}
	}
	for _, k := range []*task{&t.start, &t.expect, &t.loading.task} {
		if k.begun.Load() {
			<-k.done // its context has ended, or it is quick
		}
	}
	err := t.config.VM.Discard(ctx)
	if t.claimed != nil { // only now can nothing here run with it
		err = errors.Join(err, t.claimed.Release())
	}
	l, _ := t.lanes.get()
	if l == nil {
		return migrate.NotTaken, err
	}
	if t.offered && l.ctx.Err() == nil {
		reason := "the target gave up before the handoff"
		if t.refusal != nil {
			reason = t.refusal.Error()
		}
		// whether the source reads it is not known, so it is told again
		_ = l.Send(wire.Ack{Reason: reason})
	}
	l.linger(t.config.Limits.Reconnect)
	if t.offered {
		err = errors.Join(err, t.tellRefused(ctx))
	}
	return migrate.NotTaken, err
}

// tellRefused tells the source on a new connection that the VM did not run here, until it has taken
// note.
func (t *Target) tellRefused(ctx context.Context) error {
	var deserted time.Time // since when nobody listens there
	for {
		err := t.resume(ctx, wire.Refused, func(l *link) error {
			m, err := l.receive(t.sizes)
			var remote *RemoteError
			if errors.As(err, &remote) && remote.Code == wire.CodeUnknown {
				return nil // it runs at its source already, or the source is another process
			}
			if err == nil && m != wire.TypeReleased {
				err = fmt.Errorf("%w: %v after a resume", wire.ErrProtocol, m)
			}
			return err
		})
		if err == nil {
			return nil
		}
		if !nobodyListens(err) {
			deserted = time.Time{}
		} else if deserted.IsZero() {
			deserted = time.Now()
		}
		ended := !deserted.IsZero() && time.Since(deserted) > t.config.Limits.Silence
		select {
		case <-time.After(t.config.Limits.Reconnect):
		case <-ctx.Done():
			ended = true
		}
		if ended {
			return fmt.Errorf("the source could not be told that the VM did not run here (%w); if it waits, settle it there: drafter peer settle --here", err)
		}
	}
}

// nobodyListens tells whether a connection failed because no process has its address. The path of a
// UNIX socket is gone once its listener has ended well.
func nobodyListens(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT)
}

// resume makes a connection after one was lost, sends this side's phase, and lets use go on with
// it. The link is closed afterwards.
func (t *Target) resume(ctx context.Context, outcome wire.Outcome, use func(*link) error) error {
	l, err := t.connect(ctx, wire.Main, true)
	if err != nil {
		return err
	}
	var sending sync.WaitGroup
	defer sending.Wait()
	defer l.close(errors.New("the connection is not needed any more"))
	stop := context.AfterFunc(ctx, func() { l.cancel(context.Cause(ctx)) })
	defer stop()
	r := wire.Resume{Outcome: outcome}
	for i, d := range t.devices {
		missing := block.NewBitmap((t.sizes[i] + block.PageSize - 1) / block.PageSize)
		if d.Device != nil && outcome == wire.Accepted {
			missing = d.Device.MissingPages()
		}
		r.Missing = append(r.Missing, missing)
	}
	// A source that refuses does not read this, but says why. Nobody waits here until it is sent.
	sending.Go(func() { _ = l.Send(r) }) // of a connection that breaks, nothing can be read either
	return use(l)
}

// fetch gets the missing pages, over as many connections as it takes.
func (t *Target) fetch(ctx context.Context) (migrate.Phase, error) {
	for _, d := range t.devices {
		if d.Device == nil {
			continue
		}
		if err := t.whileConnected(ctx, d.Device.Complete()); err != nil {
			return "", fmt.Errorf("device %s: %d bytes are missing: %w", d.name, d.Device.Missing()*block.PageSize, err)
		}
	}
	t.whole.fire()
	return migrate.Confirming, nil
}

// whileConnected keeps a connection with the source until done is closed.
func (t *Target) whileConnected(ctx context.Context, done <-chan struct{}) error {
	for {
		select {
		case <-done: // whatever else has ended
			return nil
		default:
		}
		l, demand := t.lanes.get()
		var demandLost <-chan struct{}
		if demand != nil {
			demandLost = demand.ctx.Done()
		}
		select {
		case <-done:
			return nil
		case <-demandLost:
			// What was on its way on it is lost, and only a new main connection tells the source
			// so.
			l.cancel(errors.New("the connection for wanted pages was lost"))
		case <-l.ctx.Done():
			if err := t.comeBack(ctx, l, done); err != nil {
				return err
			}
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// comeBack tries once to replace a link that has ended, and waits a moment if that fails. An error
// says that no attempt will succeed.
func (t *Target) comeBack(ctx context.Context, lost *link, done <-chan struct{}) error {
	if err := disowned(context.Cause(lost.ctx)); err != nil {
		return err
	}
	err := t.reconnect(ctx)
	if err == nil {
		return nil
	}
	select {
	case <-time.After(t.config.Limits.Reconnect):
	case <-done:
	case <-ctx.Done():
	}
	return disowned(err)
}

// disowned returns why a source that has given this answer will never send the rest; nil if it may.
func disowned(answer error) error {
	var remote *RemoteError
	if !errors.As(answer, &remote) {
		return nil
	}
	switch remote.Code {
	case wire.CodeUnknown:
		return fmt.Errorf("the source has ended, and another process answers at its address: %w", remote)
	case wire.CodeTakenBack:
		return fmt.Errorf("%w: %w", migrate.ErrTakenBack, remote)
	}
	return nil
}

// reconnect makes a new main connection, and asks again for pages that somebody waits for.
func (t *Target) reconnect(ctx context.Context) error {
	l, err := t.connect(ctx, wire.Main, true)
	if err != nil {
		return err
	}
	r := wire.Resume{Outcome: wire.Accepted}
	for i, d := range t.devices {
		missing := block.NewBitmap((t.sizes[i] + block.PageSize - 1) / block.PageSize)
		if d.Device != nil {
			missing = d.Device.MissingPages()
		}
		r.Missing = append(r.Missing, missing)
	}
	main, demand := t.lanes.get()
	read := make(chan struct{})
	t.wg.Go(func() {
		defer close(read)
		l.cancel(t.read(ctx, l))
	})
	if err := l.Send(r); err != nil {
		<-read // a source that refuses does not read this, but says why
		err = l.lost(err)
		l.close(err)
		return err
	}
	t.lanes.restart(l, demand)
	t.wanting.say(func(w *wanting) {
		w.queue = nil
		for i, d := range t.devices {
			if d.Device == nil {
				continue
			}
			for page := range d.asked.All() {
				if r.Missing[i].Has(page) {
					w.queue = append(w.queue, wire.Want{Device: i, First: page, Ends: page + 1})
				}
			}
		}
	})
	for _, o := range []*link{main, demand} {
		if o != nil {
			o.close(errors.New("replaced"))
		}
	}
	return nil
}

// confirm makes the VM durable, and tells the source that it is not needed any more.
func (t *Target) confirm(ctx context.Context) (migrate.Phase, error) {
	if err := t.config.VM.Complete(ctx); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, t.config.Limits.Settle, errors.New("no answer"))
	defer cancel()
	for {
		l, _ := t.lanes.get()
		if err := l.Send(wire.TypeComplete); err != nil {
			l.cancel(err)
		}
		select {
		case <-t.released.fired():
			return migrate.Moved, nil
		default:
		}
		select {
		case <-t.released.fired():
			return migrate.Moved, nil
		case <-l.ctx.Done():
			if err := t.comeBack(ctx, l, nil); errors.Is(err, migrate.ErrTakenBack) {
				return "", err
			} else if err != nil {
				return migrate.Moved, nil // the source is gone, and nothing of it is needed
			}
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			// Nothing is missing, so nothing is wrong here. The source keeps what it has.
			return migrate.Moved, nil
		}
	}
}

var _ io.Closer = (*Target)(nil)

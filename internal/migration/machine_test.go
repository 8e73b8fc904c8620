package migration

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/memory"
	"drafter/internal/wire"
	"drafter/migrate"
)

// ram is a device in memory that can be full.
type ram struct {
	mu   sync.RWMutex
	data []byte
	full atomic.Bool
}

func newRAM(size int64) *ram { return &ram{data: make([]byte, size)} }

func (m *ram) Size() int64  { return int64(len(m.data)) }
func (m *ram) Sync() error  { return nil }
func (m *ram) Close() error { return nil }

func (m *ram) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.data[off:]), nil
}

// NextData implements [block.Mapper]. Pages that were never written make short runs of the others,
// between which a migration can be interrupted.
func (m *ram) NextData(off int64) (start, end int64, err error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	size := m.Size()
	hole := func(at int64) bool {
		return allZero(m.data[at:min(at/block.PageSize*block.PageSize+block.PageSize, size)])
	}
	next := func(at int64) int64 { return min((at/block.PageSize+1)*block.PageSize, size) }
	for start = off; start < size && hole(start); start = next(start) {
	}
	for end = start; end < size && !hole(end); end = next(end) {
	}
	return start, end, nil
}

func (m *ram) WriteAt(p []byte, off int64) (int, error) {
	if m.full.Load() {
		return 0, syscall.ENOSPC
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

// Sizes of the scripted machine's devices, in pages. The state's last page is short.
const (
	memoryPages = 200
	diskPages   = 40
)

var scriptedNames = []string{"state", "memory", "disk"}

func scriptedSize(name string) int64 {
	switch name {
	case "memory":
		return memoryPages * block.PageSize
	case "disk":
		return diskPages*block.PageSize - 100
	}
	return 3 * block.PageSize
}

// ledger is what the outside world knows: what the guest has acknowledged, and who runs.
type ledger struct {
	t       testing.TB
	mu      sync.Mutex
	version map[string][]uint64 // of every page; a socket between the sides orders nothing in the memory model
	running string              // which side the guest runs on
	leaving bool                // the source has noted that the guest may be at its target
}

func newLedger(t testing.TB) *ledger {
	return &ledger{t: t, running: "source", version: map[string][]uint64{"memory": make([]uint64, memoryPages), "disk": make([]uint64, diskPages)}}
}

// latest is the version that a page has been told to have.
func (l *ledger) latest(name string, page int64) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.version[name][page]
}

func (l *ledger) note(name string, page int64, version uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.version[name][page] = version
}

// scripted is a machine without a VMM: its guest writes pages that say what they must hold, and
// checks them.
type scripted struct {
	ledger  *ledger
	side    string
	rng     *rand.Rand
	devices map[string]block.Device // as the guest sees them

	mu      sync.Mutex // held by the guest while it does one step; a paused guest does not get it
	paused  bool
	stop    chan struct{}
	stopped sync.WaitGroup
	rate    time.Duration // between steps

	early   atomic.Bool                             // the part of its state that is loaded reads no memory
	dead    atomic.Bool                             // killed
	failing atomic.Pointer[func(call string) error] // called at the beginning of each call on the machine
}

// fault is the injected error of a call, if any.
func (g *scripted) fault(call string) error {
	if f := g.failing.Load(); f != nil {
		return (*f)(call)
	}
	return nil
}

// onCall does something at each call of a kind.
func (g *scripted) onCall(name string, do func() error) {
	f := func(call string) error {
		if call == name {
			return do()
		}
		return nil
	}
	g.failing.Store(&f)
}

func newScripted(l *ledger, side string, seed uint64, devices map[string]block.Device) *scripted {
	return &scripted{ledger: l, side: side, rng: rand.New(rand.NewPCG(seed, uint64(len(side)))), devices: devices, stop: make(chan struct{}), rate: 50 * time.Microsecond}
}

func encodePage(p []byte, name string, page int64, version uint64) {
	rng := version*0x9e3779b97f4a7c15 + uint64(page)
	for i := 0; i+8 <= len(p); i += 8 {
		rng = rng*6364136223846793005 + uint64(name[0])
		binary.LittleEndian.PutUint64(p[i:], rng)
	}
	if version%7 == 0 {
		clear(p) // pages become zeros, too
	}
	if len(p) >= 8 && version%7 != 0 {
		binary.LittleEndian.PutUint64(p, version)
	}
}

func pageLen(name string, page int64) int64 {
	return min(block.PageSize, scriptedSize(name)-page*block.PageSize)
}

// write writes a page and then tells the world.
func (g *scripted) write(name string, page int64) error {
	version := g.ledger.latest(name, page)
	if g.rng.IntN(4) > 0 { // else the content stays the same
		version++
	}
	p := make([]byte, pageLen(name, page))
	encodePage(p, name, page, version)
	_, err := g.devices[name].WriteAt(p, page*block.PageSize)
	if block.NoRoom(err) {
		return nil // the page is as before
	}
	if err != nil {
		return err
	}
	g.ledger.note(name, page, version)
	return nil
}

func (g *scripted) checkPage(name string, page int64) error {
	version := g.ledger.latest(name, page)
	want, got := make([]byte, pageLen(name, page)), make([]byte, pageLen(name, page))
	encodePage(want, name, page, version)
	if version == 0 {
		clear(want)
	}
	if _, err := g.devices[name].ReadAt(got, page*block.PageSize); err != nil {
		return err
	}
	if string(want) != string(got) {
		return fmt.Errorf("%s: page %d of %s is not version %d: it begins with %x instead of %x", g.side, page, name, version, got[:16], want[:16])
	}
	return nil
}

// run runs the guest until halt.
func (g *scripted) run() {
	g.stopped.Go(func() {
		for {
			select {
			case <-g.stop:
				return
			case <-time.After(g.rate):
			}
			g.mu.Lock()
			if !g.paused {
				if err := g.step(); err != nil && !errors.Is(err, block.ErrAbandoned) && !g.dead.Load() {
					g.ledger.t.Errorf("the guest at the %s: %v", g.side, err)
					g.mu.Unlock()
					return
				}
			}
			g.mu.Unlock()
		}
	})
}

func (g *scripted) step() error {
	g.ledger.mu.Lock()
	running := g.ledger.running
	g.ledger.mu.Unlock()
	if g.dead.Load() {
		return nil
	}
	if running != g.side {
		return fmt.Errorf("it runs, while it also runs at the %s", running)
	}
	name, pages := "memory", int64(memoryPages)
	if g.rng.IntN(4) == 0 {
		name, pages = "disk", diskPages
	}
	if err := g.write(name, g.rng.Int64N(pages)); err != nil {
		return err
	}
	return g.checkPage(name, g.rng.Int64N(pages))
}

// halt ends the guest's thread; what it holds stays.
func (g *scripted) halt() {
	close(g.stop)
	g.stopped.Wait()
}

// verify checks every page.
func (g *scripted) verify() error {
	for _, name := range []string{"memory", "disk"} {
		for page := range g.ledger.version[name] {
			if err := g.checkPage(name, int64(page)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (g *scripted) WriteBack(context.Context) error { return g.fault("write back") }

func (g *scripted) Flush(context.Context) error { return g.fault("flush") }

func (g *scripted) Prepare(ctx context.Context) error {
	if err := g.fault("prepare"); err != nil {
		return err
	}
	return ctx.Err()
}

func (g *scripted) Pause(context.Context) (time.Time, error) {
	if err := g.fault("pause"); err != nil {
		return time.Time{}, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.paused = true
	g.ledger.mu.Lock()
	g.ledger.running = ""
	g.ledger.mu.Unlock()
	return time.Now(), nil
}

// Save makes a state of three pages, which all begin with the migration's id. The first is a header.
func (g *scripted) Save(_ context.Context, id uuid.UUID, final func(end int64, early bool)) error {
	if err := g.fault("save"); err != nil {
		return err
	}
	for _, page := range []int64{1, 2, 0} {
		// A VMM touches memory when it saves, but nothing that a VMM reads.
		if err := g.write("memory", 0); err != nil {
			return err
		}
		if _, err := g.devices["state"].WriteAt(id[:], page*block.PageSize); err != nil {
			return err
		}
		if page == 1 && final != nil {
			g.early.Store(g.rng.IntN(2) == 0)
			final(2*block.PageSize, g.early.Load())
			if err := g.fault("saved a part"); err != nil {
				return err
			}
		}
	}
	return nil
}

func (g *scripted) Rescue(context.Context) error {
	if err := g.fault("rescue"); err != nil {
		return err
	}
	g.ledger.mu.Lock()
	g.ledger.leaving = false
	g.ledger.mu.Unlock()
	return g.resume()
}

func (g *scripted) Rescued(context.Context) {}

func (g *scripted) Leave(context.Context, uuid.UUID) error {
	if err := g.fault("leave"); err != nil {
		return err
	}
	g.ledger.mu.Lock()
	defer g.ledger.mu.Unlock()
	g.ledger.leaving = true
	return nil
}

func (g *scripted) resume() error {
	g.ledger.mu.Lock()
	running, leaving := g.ledger.running, g.ledger.leaving
	g.ledger.running = g.side
	g.ledger.mu.Unlock()
	if g.side == "target" && !leaving {
		g.ledger.t.Error("the guest is resumed at the target, and the source has not noted that it may be there")
	}
	if running != "" && running != g.side {
		g.ledger.t.Errorf("the guest is resumed at the %s while it runs at the %s", g.side, running)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.paused = false
	return nil
}

func (g *scripted) Mark(_ context.Context, s migrate.Phase, _ uuid.UUID) error {
	return g.fault("mark " + string(s))
}

// receiver is the target of a scripted machine.
type receiver struct {
	*scripted
	under    map[string]*ram
	incoming map[string]*block.Incoming
	backup   func(wire.Device) *Backup // where there is one
	bases    bool                      // its VMM needs nothing that has to arrive
	ran      atomic.Bool
	source   *scripted // whose state it loads; nil if that is not checked
	loaded   uuid.UUID // what a part of the state begins with; zero when none was loaded
	done     bool
	file     *os.File       // the source's memory, which was offered
	memory   *memory.Device // which has adopted that; nil if none has
}

// Offered implements [MemoryTaker].
func (r *receiver) Offered(file *os.File) { r.file = file }

// adopt takes the source's memory.
func (r *receiver) adopt(stored block.Device) (*memory.Device, error) {
	r.memory = memory.New(stored)
	file := r.file
	r.file = nil
	if err := r.memory.Adopt(file); err != nil {
		return nil, err
	}
	r.ledger.t.Cleanup(func() { // whatever became of it
		if err := r.memory.Close(); err != nil {
			r.ledger.t.Error(err)
		}
	})
	return r.memory, nil
}

func newReceiver(l *ledger, seed uint64) *receiver {
	r := &receiver{scripted: newScripted(l, "target", seed, map[string]block.Device{}), under: map[string]*ram{}, incoming: map[string]*block.Incoming{}}
	r.paused = true
	return r
}

func (r *receiver) Accept(_ context.Context, m wire.Manifest, _ uuid.UUID) ([]TargetDevice, error) {
	if err := r.fault("accept"); err != nil {
		return nil, err
	}
	var devices []TargetDevice
	for _, d := range m.Devices {
		r.under[d.Name] = newRAM(d.Size)
		var below block.Device = arriving{r.under[d.Name], r}
		var adopted *memory.Device
		if d.Open {
			var err error
			if adopted, err = r.adopt(below); err != nil {
				return nil, err
			}
			below = adopted
		}
		in := block.NewIncoming(below, d.Name == "memory")
		r.incoming[d.Name] = in
		tracker := block.NewTracker(in, 64<<10)
		td := TargetDevice{Held: wire.HoldsNothing, Device: in, First: d.Name == "state" && !r.bases, Memory: adopted}
		if r.backup != nil && d.Backup != (block.ID{}) {
			td.Held, td.Backup = wire.HoldsBackup, r.backup(d)
		}
		r.devices[d.Name] = tracker
		if d.Name == "memory" {
			// what a missing page had before is gone
			td.Evict = func(first, end int64) error {
				_, err := r.under[d.Name].WriteAt(make([]byte, bytesOf(in, first, end)), first*block.PageSize)
				return err
			}
			if adopted != nil {
				td.Evict = adopted.Evict
			}
		}
		devices = append(devices, td)
	}
	return devices, nil
}

// arriving is where pages are stored that arrive.
type arriving struct {
	*ram
	r *receiver
}

func (a arriving) WriteAt(p []byte, off int64) (int, error) {
	if err := a.r.fault("store"); err != nil {
		return 0, err
	}
	return a.ram.WriteAt(p, off)
}

func (r *receiver) Start(context.Context) error { return r.fault("start") }

func (r *receiver) Expect(context.Context, uuid.UUID) error { return r.fault("expect") }

// Load implements [StateLoader]. It checks that everything is here that a VMM reads when it loads its state.
func (r *receiver) Load(_ context.Context, end int64) error {
	if err := r.fault("load"); err != nil {
		return err
	}
	if end != 2*block.PageSize {
		r.ledger.t.Errorf("the state is loaded to byte %d", end)
	}
	if _, err := r.devices["state"].ReadAt(r.loaded[:], block.PageSize); err != nil {
		return err
	}
	if r.source == nil || r.source.early.Load() || r.memory != nil { // a VMM that has the memory itself needs nothing else
		return nil
	}
	r.source.mu.Lock()
	defer r.source.mu.Unlock()
	if !r.source.paused { // it has been rescued meanwhile
		return nil
	}
	for name, pages := range map[string]int64{"memory": memoryPages, "disk": diskPages} {
		for page := int64(1); page < pages; page++ {
			if err := r.checkPage(name, page); err != nil {
				r.ledger.t.Errorf("when the state is loaded: %v", err)
			}
		}
	}
	return nil
}

func (r *receiver) Restore(_ context.Context, id uuid.UUID) error {
	if err := r.fault("restore"); err != nil {
		return err
	}
	if r.loaded != (uuid.UUID{}) && r.loaded != id {
		r.ledger.t.Errorf("the state that was loaded is that of %s, not of %s", r.loaded, id)
	}
	for page := range int64(3) {
		var got uuid.UUID
		if _, err := r.devices["state"].ReadAt(got[:], page*block.PageSize); err != nil {
			return err
		}
		if got != id {
			r.ledger.t.Errorf("page %d of the state is that of %s, not of %s", page, got, id)
		}
	}
	return nil
}

func (r *receiver) Resume(context.Context) error {
	if err := r.fault("resume"); err != nil {
		return err
	}
	r.ran.Store(true)
	if err := r.resume(); err != nil {
		return err
	}
	r.run()
	return nil
}

func (r *receiver) Complete(context.Context) error {
	r.done = true
	return r.fault("complete")
}

func (r *receiver) Discard(context.Context) error {
	if r.ran.Load() {
		r.ledger.t.Error("a VM that ran is discarded")
	}
	return r.fault("discard")
}

// network connects targets with a source, and fails as it is told.
type network struct {
	ctx    context.Context
	source *Source
	wg     sync.WaitGroup
	count  atomic.Int64
	wrap   func(n int64, c io.ReadWriteCloser) io.ReadWriteCloser // of the target's end of connection n

	rate int64 // bytes per second that get through; 0: all
	unix bool  // the connections are UNIX sockets

	mu    sync.Mutex
	err   error // of the first connection
	dead  bool  // one of the hosts is gone
	conns []net.Conn
}

// kill takes a host away: nothing gets through any more.
func (n *network) kill() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dead = true
	for _, c := range n.conns {
		_ = c.Close()
	}
}

func (n *network) dial(context.Context) (io.ReadWriteCloser, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dead {
		return nil, errors.New("there is nobody")
	}
	ours, theirs := net.Pipe()
	if n.unix {
		var err error
		if ours, theirs, err = socketPair(); err != nil {
			return nil, err
		}
	}
	n.conns = append(n.conns, ours, theirs)
	i := n.count.Add(1) - 1
	s := n.source
	n.wg.Go(func() {
		err := s.Handle(n.ctx, theirs)
		if i == 0 {
			n.mu.Lock()
			n.err = err
			n.mu.Unlock()
		}
	})
	var c io.ReadWriteCloser = ours
	var files *withFiles
	if n.unix {
		files = &withFiles{conn: ours.(*net.UnixConn)}
		c = files
	}
	if n.rate > 0 {
		c = &slow{c, n.rate}
	}
	if n.wrap != nil {
		c = n.wrap(i, c)
	}
	if n.unix {
		c = &wrapped{c, files}
	}
	return c, nil
}

// socketPair returns the two ends of a UNIX socket.
func socketPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if ends[i], err = net.FileConn(f); err != nil {
			return nil, nil, err
		}
		if err := f.Close(); err != nil {
			return nil, nil, err
		}
	}
	return ends[0], ends[1], nil
}

// withFiles is a UNIX socket whose Read and Write take what goes along with the bytes from outside:
// so it can be wrapped.
type withFiles struct {
	conn    *net.UnixConn
	control []byte // what has come with the last Read
}

func (f *withFiles) Read(p []byte) (int, error) {
	oob := make([]byte, 64)
	n, oobn, _, _, err := f.conn.ReadMsgUnix(p, oob)
	f.control = oob[:oobn]
	return max(n, 0), err
}

func (f *withFiles) Write(p []byte) (int, error) { return f.conn.Write(p) }
func (f *withFiles) Close() error                { return f.conn.Close() }

// wrapped is a stream around a UNIX socket.
type wrapped struct {
	io.ReadWriteCloser
	files *withFiles
}

func (w *wrapped) ReadMsgUnix(b, oob []byte) (n, oobn, flags int, addr *net.UnixAddr, err error) {
	n, err = w.Read(b)
	oobn = copy(oob, w.files.control)
	w.files.control = nil
	return n, oobn, 0, nil, err
}

func (w *wrapped) WriteMsgUnix([]byte, []byte, *net.UnixAddr) (n, oobn int, err error) {
	return 0, 0, errors.New("a target sends no files")
}

// faulty is a connection that fails after so many bytes in either direction.
type faulty struct {
	io.ReadWriteCloser
	left  atomic.Int64
	fails func(c *faulty) error // what happens then
	once  sync.Once
	gone  chan struct{}
}

func newFaulty(c io.ReadWriteCloser, after int64, fails func(*faulty) error) *faulty {
	f := &faulty{ReadWriteCloser: c, fails: fails, gone: make(chan struct{})}
	f.left.Store(after)
	return f
}

func (f *faulty) Read(p []byte) (int, error) {
	n, err := f.ReadWriteCloser.Read(p)
	if err == nil && f.left.Add(-int64(n)) < 0 {
		return 0, f.fails(f)
	}
	return n, err
}

func (f *faulty) Write(p []byte) (int, error) {
	if f.left.Add(-int64(len(p))) < 0 {
		return 0, f.fails(f)
	}
	return f.ReadWriteCloser.Write(p)
}

func (f *faulty) Close() error {
	f.once.Do(func() { close(f.gone) })
	return f.ReadWriteCloser.Close()
}

// slow is a connection of so many bytes per second.
type slow struct {
	io.ReadWriteCloser
	rate int64
}

func (s *slow) Read(p []byte) (int, error) {
	n, err := s.ReadWriteCloser.Read(p[:min(len(p), 16<<10)])
	time.Sleep(time.Duration(n) * time.Second / time.Duration(s.rate))
	return n, err
}

// cut breaks the connection for both ends.
func cut(f *faulty) error {
	_ = f.Close()
	return errors.New("cut")
}

// freeze lets nothing through any more, without an error.
func freeze(f *faulty) error {
	<-f.gone
	return errors.New("frozen")
}

// bounds are limits with what only tests change.
type bounds struct {
	migrate.Limits
	tuning
	handover bool // both sides are on one host, and memory changes hands as a file
}

// quick are limits for tests.
func quick() bounds {
	return bounds{
		migrate.Limits{Silence: 250 * time.Millisecond, Reconnect: time.Millisecond, Settle: 5 * time.Second, Prepare: time.Second, Handoff: 2 * time.Second, Downtime: 50 * time.Millisecond},
		tuning{note: 2 * time.Millisecond, readAhead: memoryPages / 4},
		false,
	}
}

// pair is a source with a running guest, and a target to be.
type pair struct {
	ledger  *ledger
	guest   *scripted
	source  *Source
	target  *receiver
	network *network
	states  states
	what    string // for messages
	backup  Baseline
	shared  *memory.Device // that may change hands as a file; nil if there is none
	fetched atomic.Int64   // bytes from the backup
	killed  atomic.Value   // string: the side that was killed
}

// states collects the states that both sides went through.
type states struct {
	mu   sync.Mutex
	list []string
}

func (s *states) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.list, ", ")
}

func (s *states) add(side string) func(migrate.Phase) {
	return func(state migrate.Phase) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.list = append(s.list, side+" "+string(state))
	}
}

func newPair(t testing.TB, seed uint64, limits bounds, onState func(side string, s migrate.Phase)) *pair {
	t.Helper()
	p := &pair{ledger: newLedger(t)}
	devices := map[string]block.Device{}
	c := SourceConfig{Limits: limits.Limits, tuning: limits.tuning, OnPhase: func(s migrate.Phase) {
		p.states.add("source")(s)
		if onState != nil {
			onState("source", s)
		}
	}}
	for _, name := range scriptedNames {
		var device block.Device = newRAM(scriptedSize(name))
		if name == "memory" && limits.handover {
			p.shared = memory.New(device)
			device = p.shared
			t.Cleanup(func() {
				if err := p.shared.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		tracker := block.NewTracker(device, 64<<10)
		devices[name] = tracker
		sd := SourceDevice{Name: name, Device: tracker, First: name == "state", Expiry: time.Millisecond, MaxDirtyBlocks: 1, MinCycles: 3, MaxCycles: 6, CycleThrottle: time.Millisecond}
		if name == "memory" {
			sd.Memory = p.shared
		}
		c.Devices = append(c.Devices, sd)
	}
	p.guest = newScripted(p.ledger, "source", seed, devices)
	for name := range p.ledger.version {
		for page := range p.ledger.version[name] {
			if page%5 > 0 { // some were never written
				if err := p.guest.write(name, int64(page)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	c.VM, c.Backup = p.guest, &p.backup
	if p.shared != nil { // what was written until now is stored, and the rest will be in the file
		if err := p.shared.Share(); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if p.source, err = NewSource(c); err != nil {
		t.Fatal(err)
	}
	p.target = newReceiver(p.ledger, seed)
	p.target.source = p.guest
	p.network = &network{ctx: context.Background(), source: p.source, unix: limits.handover}
	p.guest.run()
	return p
}

// dead is the side that was killed, or "".
func (p *pair) dead() string {
	side, _ := p.killed.Load().(string)
	return side
}

func (p *pair) config(limits bounds, onState func(side string, s migrate.Phase)) TargetConfig {
	return TargetConfig{VM: p.target, Dial: p.network.dial, Limits: limits.Limits, OnPhase: func(s migrate.Phase) {
		p.states.add("target")(s)
		if onState != nil {
			onState("target", s)
		}
	}}
}

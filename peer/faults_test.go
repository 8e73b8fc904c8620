package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"drafter/internal/await"
	"drafter/internal/need"
	"drafter/internal/vmmtest"
	"drafter/migrate"
	"drafter/vmm"
)

var errBroken, errClosed = errors.New("broken"), errors.New("closed")

// host is one that an instance may run on.
type host struct {
	driver *vmmtest.Driver
	config Config
	peer   *Peer
}

// newHost makes a host for instances of the package in pkg.
func newHost(t *testing.T, pkg string) *host {
	t.Helper()
	h := &host{driver: &vmmtest.Driver{T: t}}
	devices := NewPackageDevices(packageNames, pkg, filepath.Join(t.TempDir(), "instance"))
	for i := range devices {
		devices[i].MinCycles, devices[i].MaxCycles, devices[i].CycleThrottle, devices[i].Expiry = 1, 1, time.Millisecond, time.Millisecond
	}
	h.config = Config{
		Host: vmmtest.Host(t, h.driver), Devices: devices, ResumeTimeout: time.Minute, RescueTimeout: time.Minute,
		Limits: migrate.Limits{Downtime: 1, Reconnect: time.Millisecond},
	}
	return h
}

// open makes the host's peer anew, which is closed at the end of the test.
func (h *host) open(t *testing.T) *Peer {
	t.Helper()
	p, err := New(h.config)
	if err != nil {
		t.Fatal(err)
	}
	h.peer = p
	t.Cleanup(func() { h.close(t) })
	return p
}

// close ends the peer as one that gives up, and looks at what is left on the host.
func (h *host) close(t *testing.T) {
	t.Helper()
	if err := h.peer.Close(); err != nil && !errors.Is(err, errBroken) {
		t.Errorf("close: %v", err)
	}
	if !h.driver.AllClosed() {
		t.Error("a VMM is left")
	}
	base := h.config.Host.BaseDir
	err := filepath.WalkDir(base, func(path string, e fs.DirEntry, err error) error {
		if err == nil && strings.Count(strings.TrimPrefix(path, base), "/") > 1 {
			t.Errorf("%s is left", path)
			return fs.SkipDir
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// machine is the latest of the host; nil if there was none.
func (h *host) machine() *vmmtest.Machine {
	machines := h.driver.Machines()
	if len(machines) == 0 {
		return nil
	}
	return machines[len(machines)-1]
}

// marks are what a guest writes to its disk: where, and what.
var marks = map[int64][]byte{0: bytes.Repeat([]byte("first "), 100), 9000: bytes.Repeat([]byte("second "), 2000), 40000: bytes.Repeat([]byte("third "), 50)}

// write is a guest that writes to its disk, and waits until that is stored.
func (h *host) write(off int64) error {
	f, err := os.OpenFile(h.machine().Launched.Disks[0].Path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(marks[off], off)
	return errors.Join(err, f.Sync(), f.Close())
}

// lacks says which of the marks the guest does not find on its disk.
func (h *host) lacks(written ...int64) error {
	b, err := os.ReadFile(h.machine().Launched.Disks[0].Path)
	for _, off := range written {
		if err == nil && !bytes.Equal(b[off:off+int64(len(marks[off]))], marks[off]) {
			err = fmt.Errorf("what was written at %d is lost", off)
		}
	}
	return err
}

// errNone says that there is no instance on a host, and nothing of one.
var errNone = errors.New("no instance")

// starts starts the instance in a process of its own, looks at its disk, and suspends it.
func (h *host) starts(t *testing.T, written ...int64) error {
	t.Helper()
	if _, err := os.Stat(h.peer.device(vmm.State).State); errors.Is(err, os.ErrNotExist) {
		left, err := filepath.Glob(filepath.Join(filepath.Dir(h.peer.statePath()), "../*/*"))
		if err != nil || len(left) > 0 {
			t.Errorf("of an instance without a state device, there is %v, %v", left, err)
		}
		return errNone
	}
	p := h.open(t)
	defer h.close(t)
	if err := p.Resume(t.Context()); err != nil {
		return err
	}
	if err := h.lacks(written...); err != nil {
		t.Errorf("of an instance that starts: %v", err)
	}
	if err := p.Suspend(t.Context()); err != nil {
		t.Errorf("suspend an instance that started: %v", err)
	}
	return nil
}

// move is a VM that runs at its source, and is to move.
type move struct {
	source, target *host
	link           *vmmtest.Link

	written []int64         // by the guest at its source
	ctx     context.Context // of the source's Serve
	end     context.CancelFunc
	reached <-chan struct{} // not nil: the target is closed in a phase in which it may be, once that is reached
	abrupt  chan struct{}   // closed when that begins
	served  chan struct{}   // closed when Serve has ended
	moved   bool            // what it returned
	err     error
	over    atomic.Bool // nothing fails any more
}

// newPackage makes the package of which moves are, and returns its directory.
func newPackage(t *testing.T) string {
	t.Helper()
	need.Root(t)
	need.FUSE(t)
	pkg := filepath.Join(t.TempDir(), "package")
	if err := os.Mkdir(pkg, 0o700); err != nil {
		t.Fatal(err)
	}
	vmmtest.WritePackage(t, pkg)
	return pkg
}

// newMove makes two hosts, of which the target has the package only if withBase is set.
func newMove(t *testing.T, pkg string, withBase bool) *move {
	t.Helper()
	m := &move{source: newHost(t, pkg), link: vmmtest.NewLink(), served: make(chan struct{})}
	if !withBase {
		pkg = filepath.Join(t.TempDir(), "nowhere")
	}
	m.target = newHost(t, pkg)
	m.source.config.Hooks.OnPhase = func(s migrate.Phase) {
		switch s {
		case migrate.PreCopying:
			m.write(t, 9000)
		case migrate.HandingOff: // so that something is left for post-copy
			m.write(t, 40000)
		}
	}
	return m
}

// hurry shortens what both sides wait for each other. What comes of a move then depends on time, on
// a busy machine; what must hold does not.
func (m *move) hurry() {
	for _, h := range []*host{m.source, m.target} {
		h.config.Limits.Silence, h.config.Limits.Settle, h.config.Limits.Handoff = time.Second, 300*time.Millisecond, time.Second
	}
}

// write is the guest that writes at its source.
func (m *move) write(t *testing.T, off int64) {
	if err := m.source.write(off); err != nil {
		t.Error(err)
	}
	m.written = append(m.written, off)
}

// begin starts the VM, and offers it.
func (m *move) begin(t *testing.T) {
	t.Helper()
	for h, other := range map[*host]*host{m.source: m.target, m.target: m.source} {
		at := h.driver.At
		h.driver.At = func(ctx context.Context, s vmmtest.Step, machine *vmmtest.Machine) error {
			if s == vmmtest.Resume && slices.ContainsFunc(other.driver.Machines(), (*vmmtest.Machine).Running) {
				t.Error("the VM would run twice")
			}
			if at != nil && !m.over.Load() {
				return at(ctx, s, machine)
			}
			return nil
		}
	}
	if err := m.source.open(t).Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.write(t, 0)
	m.ctx, m.end = context.WithCancel(t.Context())
	go func() {
		defer close(m.served)
		m.moved, m.err = m.source.peer.Serve(m.ctx, m.link.Accept)
	}()
	t.Cleanup(func() {
		m.end()
		<-m.served
	})
}

// receive asks for the VM, and suspends it once all of it is there.
func (m *move) receive(ctx context.Context, t *testing.T) error {
	t.Helper()
	p := m.target.open(t)
	if err := p.Receive(ctx, m.link.Dial); err != nil {
		return err
	}
	if n := m.target.machine().Count(); n < 3 { // resumed, saved, and resumed
		t.Errorf("the guest that arrived has been started %d times", n)
	}
	if m.abrupt != nil {
		<-m.reached
		close(m.abrupt)
		return errors.Join(errClosed, p.Close())
	}
	select {
	case <-p.Arrived():
	case <-m.link.Down():
	case <-m.served:
	}
	return p.Suspend(t.Context())
}

// settled looks, once both processes have ended, at where the VM can be started: at one host, or,
// once an operator has said so, at its source. A VM that had wholly arrived is at its target.
func (m *move) settled(t *testing.T, received error) {
	t.Helper()
	m.end()
	<-m.served
	m.target.close(t)
	m.source.close(t)
	m.over.Store(true)
	there, here := m.target.starts(t, m.written...), m.source.starts(t, m.written...)
	state := fmt.Sprintf("received: %v; served: %t, %v; starts there: %v; here: %v", received, m.moved, m.err, there, here)
	defer func() {
		if t.Failed() {
			t.Log(state)
		}
	}()
	switch {
	case there == nil && here == nil:
		t.Error("the VM can be started twice")
	case received == nil && there != nil:
		t.Errorf("it has arrived, but does not start there: %v", there)
	case received == nil || there == nil || here == nil:
	case !errors.Is(m.err, migrate.ErrInDoubt) && !errors.Is(m.err, migrate.ErrHandedOver):
		t.Errorf("it starts nowhere, and its source ended with %v", m.err)
	default:
		if err := Settle(t.Context(), m.source.config.Devices, migrate.Here); err != nil {
			t.Errorf("settle: %v", err)
		}
		if err := m.source.starts(t, m.written...); err != nil {
			t.Errorf("settled, it does not start: %v", err)
		}
		if err := m.target.starts(t); err == nil {
			t.Error("settled, it can be started twice")
		}
	}
}

// A VM moves, with all that it has written.
func TestMoves(t *testing.T) {
	pkg := newPackage(t)
	for _, withBase := range []bool{true, false} {
		for _, serves := range []bool{true, false} {
			t.Run(fmt.Sprintf("with base %t, serves memory %t", withBase, serves), func(t *testing.T) {
				m := newMove(t, pkg, withBase)
				m.source.driver.BootsFile, m.target.driver.BootsFile = serves, serves
				m.begin(t)
				err := m.receive(t.Context(), t)
				if err != nil {
					t.Error(err)
				}
				if <-m.served; !m.moved || m.err != nil {
					t.Errorf("served: %t, %v", m.moved, m.err)
				}
				m.settled(t, err)
			})
		}
	}
}

// A link breaks at each message: before it, or once it has arrived; once, or for good. The VM runs
// at one host at most, and can be started at one.
func TestLinkBreaks(t *testing.T) {
	pkg := newPackage(t)
	for _, b := range vmmtest.Breaks() {
		t.Run(b.String(), func(t *testing.T) {
			t.Parallel()
			m := newMove(t, pkg, true)
			m.hurry()
			m.link.BreakAt(b)
			m.begin(t)
			m.settled(t, m.receive(t.Context(), t))
		})
	}
}

// A VMM fails at a step, or ends there. The VM runs on at its source, if it still can, and moves at
// the next attempt.
func TestVMMFails(t *testing.T) {
	pkg := newPackage(t)
	for _, tt := range []struct {
		end   vmmtest.End
		at    vmmtest.Step
		ends  bool // the VMM does
		moves bool // the VM does, all the same, and ends there if its VMM does
	}{
		{end: vmmtest.AtSource, at: vmmtest.BeforeSuspend},
		{end: vmmtest.AtSource, at: vmmtest.BeforeSuspend, ends: true},
		{end: vmmtest.AtSource, at: vmmtest.Flush},
		{end: vmmtest.AtSource, at: vmmtest.Flush, ends: true},
		{end: vmmtest.AtSource, at: vmmtest.Pause},
		{end: vmmtest.AtSource, at: vmmtest.Pause, ends: true},
		{end: vmmtest.AtSource, at: vmmtest.Save},
		{end: vmmtest.AtSource, at: vmmtest.Save, ends: true},
		{end: vmmtest.AtTarget, at: vmmtest.Check},
		{end: vmmtest.AtTarget, at: vmmtest.Launch},
		{end: vmmtest.AtTarget, at: vmmtest.Restore},
		{end: vmmtest.AtTarget, at: vmmtest.Restore, ends: true},
		{end: vmmtest.AtTarget, at: vmmtest.Resume},
		{end: vmmtest.AtTarget, at: vmmtest.Resume, ends: true, moves: true}, // it may have run
		{end: vmmtest.AtTarget, at: vmmtest.GuestConn, moves: true},
		{end: vmmtest.AtTarget, at: vmmtest.AfterResume, moves: true},
		{end: vmmtest.AtTarget, at: vmmtest.AfterResume, ends: true, moves: true},
	} {
		t.Run(fmt.Sprintf("%s of the %s, ends %t", tt.at, tt.end, tt.ends), func(t *testing.T) {
			t.Parallel()
			m := newMove(t, pkg, true)
			if tt.end == vmmtest.AtSource && tt.ends { // then nobody is there whom the target could tell
				m.hurry()
			}
			driver := map[vmmtest.End]*vmmtest.Driver{vmmtest.AtSource: m.source.driver, vmmtest.AtTarget: m.target.driver}[tt.end]
			var moving, failed atomic.Bool
			driver.At = func(_ context.Context, s vmmtest.Step, machine *vmmtest.Machine) error {
				if s != tt.at || !moving.Load() || !failed.CompareAndSwap(false, true) {
					return nil
				}
				if tt.ends {
					machine.Exit(errBroken)
				}
				return errBroken
			}
			m.begin(t)
			moving.Store(true)
			err := m.receive(t.Context(), t)
			if !failed.Load() || (err == nil) != (tt.moves && !tt.ends) {
				t.Errorf("it fails: %t; received: %v", failed.Load(), err)
			}
			if !tt.moves {
				dies := tt.ends && tt.end == vmmtest.AtSource
				await.True(t, "the VM runs at its source, unless it died", func() bool { return m.source.machine().Running() != dies })
				if !dies {
					await.None(t, "the next attempt", func() string {
						m.target.close(t)
						if err = m.receive(t.Context(), t); err != nil {
							return err.Error()
						}
						return ""
					})
				}
			}
			m.settled(t, err)
		})
	}
}

// Each end is ended in each phase: its context ends, or it is closed. The VM runs at one host at
// most, and can be started at one.
func TestEndsInEachPhase(t *testing.T) {
	pkg := newPackage(t)
	for _, e := range vmmtest.Endings() {
		t.Run(e.String(), func(t *testing.T) {
			t.Parallel()
			m := newMove(t, pkg, true)
			m.hurry()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			h := map[vmmtest.End]*host{vmmtest.AtSource: m.source, vmmtest.AtTarget: m.target}[e.Of]
			ended := make(chan struct{})
			onPhase, reached := e.Hook(h.config.Hooks.OnPhase, func() {
				switch {
				case e.Closed && e.Of == vmmtest.AtTarget: // by receive
					<-m.abrupt
				case e.Closed: // it waits for the migration
					go func() {
						defer close(ended)
						m.source.close(t)
						m.link.Break(true)
					}()
				case e.Of == vmmtest.AtTarget:
					cancel()
				default:
					m.end()
				}
			})
			h.config.Hooks.OnPhase = onPhase
			if e.Closed && e.Of == vmmtest.AtTarget {
				m.reached, m.abrupt = reached, make(chan struct{})
			}
			m.begin(t)
			err := m.receive(ctx, t)
			select {
			case <-reached:
				if e.Closed && e.Of == vmmtest.AtSource {
					<-ended
				}
			default:
				t.Error("there was no such phase")
			}
			m.settled(t, err)
		})
	}
}

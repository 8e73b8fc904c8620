package mounter

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
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"drafter/internal/block"
	"drafter/internal/need"
	"drafter/internal/stack"
	"drafter/internal/vmmtest"
	"drafter/internal/wire"
	"drafter/migrate"
)

func TestMain(m *testing.M) {
	targetPatience = 300 * time.Millisecond
	goleak.VerifyTestMain(m)
}

const size = 256 << 10 // of each device, in bytes

// marks are what users write: where, and what.
var marks = map[int64][]byte{0: bytes.Repeat([]byte("first "), 100), 90000: bytes.Repeat([]byte("second "), 2000), 160000: bytes.Repeat([]byte("third "), 500), 200000: []byte("last")}

// host is one that devices may be on: "disk" has an overlay, "data" is its base.
type host struct {
	config  Config
	dir     string
	mounter *Mounter
}

func newHost(t *testing.T) *host {
	t.Helper()
	base, err := os.MkdirTemp("", "devices-") // short enough for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(base); err != nil {
			t.Error(err)
		}
	})
	h := &host{dir: t.TempDir()}
	device := Device{Name: "disk", BlockSize: block.PageSize, MaxCycles: 1, CycleThrottle: time.Millisecond, Expiry: time.Millisecond, MakeMigratable: true}
	data := device
	device.Base, device.Overlay, device.State = h.path("disk"), h.path("disk.overlay"), h.path("disk.state")
	data.Name, data.Base = "data", h.path("data")
	h.config = Config{
		BaseDir: base, Links: h.path("links"), Devices: []Device{device, data},
		Limits: migrate.Limits{Downtime: 1, Reconnect: time.Millisecond},
	}
	return h
}

func (h *host) path(name string) string { return filepath.Join(h.dir, name) }

// make makes the devices' bases.
func (h *host) make(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.WriteFile(h.path(name), bytes.Repeat([]byte(name), size/4), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// open makes the host's mounter anew, which is closed at the end of the test.
func (h *host) open(t *testing.T) *Mounter {
	t.Helper()
	m, err := New(h.config)
	if err != nil {
		t.Fatal(err)
	}
	h.mounter = m
	t.Cleanup(func() { h.close(t) })
	return m
}

// close ends the mounter, and looks at what is left on the host.
func (h *host) close(t *testing.T) {
	t.Helper()
	if err := h.mounter.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	h.clean(t)
}

func (h *host) clean(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(h.config.BaseDir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && strings.Count(strings.TrimPrefix(path, h.config.BaseDir), "/") > 1 {
			t.Errorf("%s is left", path)
			return fs.SkipDir
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if links, err := os.ReadDir(h.config.Links); err == nil && len(links) > 0 {
		t.Errorf("links are left: %v", links)
	}
}

// write is a user that writes to each device, and waits until that is stored.
func (h *host) write(off int64) error {
	for _, d := range h.config.Devices {
		f, err := os.OpenFile(h.mounter.Path(d.Name), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(marks[off], off)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// lacks says which of the marks a user does not find.
func (h *host) lacks(written ...int64) error {
	for _, d := range h.config.Devices {
		b, err := os.ReadFile(filepath.Join(h.config.Links, d.Name))
		if err != nil {
			return err
		}
		for _, off := range written {
			if !bytes.Equal(b[off:off+int64(len(marks[off]))], marks[off]) {
				return fmt.Errorf("what was written to %s at %d is lost", d.Name, off)
			}
		}
	}
	return nil
}

// opens opens the devices in a process of their own, and looks at what is in them.
func (h *host) opens(t *testing.T, written ...int64) error {
	t.Helper()
	m := h.open(t)
	defer h.close(t)
	if err := m.Open(t.Context()); err != nil {
		return err
	}
	if err := h.lacks(written...); err != nil {
		t.Errorf("of devices that can be opened: %v", err)
	}
	return nil
}

// move is devices that are used at their source, and are to move.
type move struct {
	source, target *host
	link           *vmmtest.Link

	written []int64
	reached <-chan struct{} // not nil: the target is closed in a phase in which it may be, once that is reached
	abrupt  chan struct{}   // closed when that begins
	end     context.CancelFunc
	served  chan struct{} // closed when Serve has ended
	err     error         // what it returned
	moved   atomic.Bool
}

func newMove(t *testing.T) *move {
	t.Helper()
	need.Root(t)
	need.FUSE(t)
	m := &move{source: newHost(t), target: newHost(t), link: vmmtest.NewLink(), served: make(chan struct{})}
	m.source.make(t, "disk", "data")
	m.target.make(t, "disk")
	m.source.config.OnPhase = func(s migrate.Phase) {
		switch s {
		case migrate.PreCopying:
			m.write(t, 90000)
		case migrate.HandingOff: // so that something is left for post-copy
			m.write(t, 160000)
		}
	}
	return m
}

// hurry shortens what both sides wait for each other. What comes of a move then depends on time, on
// a busy machine; what must hold does not.
func (m *move) hurry() {
	for _, h := range []*host{m.source, m.target} {
		h.config.Limits.Silence, h.config.Limits.Settle, h.config.Limits.Handoff = time.Second, 300*time.Millisecond, 2*time.Second
	}
}

// write is a user at the source.
func (m *move) write(t *testing.T, off int64) {
	if err := m.source.write(off); err != nil {
		t.Error(err)
	}
	m.written = append(m.written, off)
}

// begin opens the devices, and offers them.
func (m *move) begin(t *testing.T) {
	t.Helper()
	if err := m.source.open(t).Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.write(t, 0)
	m.offer(t)
}

func (m *move) offer(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	m.end = cancel
	go func() {
		defer close(m.served)
		m.err = m.source.mounter.Serve(ctx, m.link.Accept, func() { m.moved.Store(true) })
	}()
	t.Cleanup(func() {
		m.end()
		<-m.served
	})
}

// receive asks for the devices, and waits until all of them is there, or the source is gone.
func (m *move) receive(ctx context.Context, t *testing.T) error {
	t.Helper()
	target := m.target.open(t)
	if err := target.Receive(ctx, m.link.Dial); err != nil {
		return err
	}
	if m.abrupt != nil {
		<-m.reached
		close(m.abrupt)
		return errors.Join(os.ErrClosed, target.Close())
	}
	select {
	case <-target.Arrived():
		return target.ArrivalError()
	case <-m.link.Down():
		return errors.New("the link is down")
	}
}

// settled looks, once both processes have ended, at where the devices can be opened: at one host,
// or, once an operator has said so, at their source. Those that had wholly arrived are at their
// target.
func (m *move) settled(t *testing.T, received error) {
	t.Helper()
	m.end()
	<-m.served
	m.target.close(t)
	m.source.close(t)
	there, here := m.target.opens(t, m.written...), m.source.opens(t, m.written...)
	state := fmt.Sprintf("received: %v; served: %t, %v; opens there: %v; here: %v", received, m.moved.Load(), m.err, there, here)
	defer func() {
		if t.Failed() {
			t.Log(state)
		}
	}()
	switch {
	case there == nil && here == nil:
		t.Error("the devices can be opened twice")
	case received == nil && there != nil:
		t.Error("they have arrived, but cannot be opened there")
	case received == nil || there == nil || here == nil:
	case !errors.Is(m.err, migrate.ErrInDoubt) && !errors.Is(m.err, migrate.ErrHandedOver):
		t.Error("they can be opened nowhere, and their source does not say why")
	default:
		for i := range m.source.config.Devices {
			if err := os.Remove(m.source.config.Devices[i].statusFile()); err != nil {
				t.Errorf("settle: %v", err)
			}
		}
		if err := m.source.opens(t, m.written...); err != nil {
			t.Errorf("settled, they do not open: %v", err)
		}
	}
}

// Devices move, with all that was written, and their users at the source go on.
func TestMoves(t *testing.T) {
	m := newMove(t)
	m.begin(t)
	err := m.receive(t.Context(), t)
	if err != nil {
		t.Error(err)
	}
	m.write(t, 200000) // by a user at the source
	for _, h := range []*host{m.source, m.target} {
		if err := h.lacks(m.written...); err != nil {
			t.Error(err)
		}
	}
	m.settled(t, err)
	if !m.moved.Load() || m.err != nil {
		t.Errorf("moved: %t, %v", m.moved.Load(), m.err)
	}
}

// A link breaks at each message: before it, or once it has arrived; once, or for good. The devices
// can be opened at one host.
func TestLinkBreaks(t *testing.T) {
	for _, b := range vmmtest.Breaks() {
		t.Run(b.String(), func(t *testing.T) {
			t.Parallel()
			m := newMove(t)
			m.hurry()
			m.link.BreakAt(b)
			m.begin(t)
			m.settled(t, m.receive(t.Context(), t))
		})
	}
}

// Each end is ended in each phase: its context ends, or it is closed. The devices can be opened at
// one host.
func TestEndsInEachPhase(t *testing.T) {
	for _, e := range vmmtest.Endings() {
		t.Run(e.String(), func(t *testing.T) {
			t.Parallel()
			m := newMove(t)
			m.hurry()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			h := map[vmmtest.End]*host{vmmtest.AtSource: m.source, vmmtest.AtTarget: m.target}[e.Of]
			ended := make(chan struct{})
			onPhase, reached := e.Hook(h.config.OnPhase, func() {
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
			h.config.OnPhase = onPhase
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

// inTheWay makes a directory in the place of a device's status, which can neither be written nor
// removed then.
func inTheWay(t *testing.T, d *Device) (remove func()) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(d.statusFile(), "in", "the way"), 0o700); err != nil {
		t.Error(err)
	}
	return func() {
		if err := os.RemoveAll(d.statusFile()); err != nil {
			t.Error(err)
		}
	}
}

// What cannot be noted does not happen: devices that cannot say that they may have left stay, and
// those that cannot say that they are arriving do not come.
func TestNotesFail(t *testing.T) {
	for i, name := range []string{"disk", "data"} {
		for _, end := range []vmmtest.End{vmmtest.AtSource, vmmtest.AtTarget} {
			t.Run(fmt.Sprintf("%s at the %s", name, end), func(t *testing.T) {
				m := newMove(t)
				m.hurry()
				h := map[vmmtest.End]*host{vmmtest.AtSource: m.source, vmmtest.AtTarget: m.target}[end]
				m.begin(t)
				remove := inTheWay(t, &h.config.Devices[i])
				if err := m.receive(t.Context(), t); err == nil {
					t.Error("they have moved all the same")
				}
				if err := m.source.write(200000); err != nil {
					t.Errorf("users do not go on: %v", err)
				}
				remove()
				m.written = append(m.written, 200000)
				m.target.close(t)
				left, err := filepath.Glob(m.target.path("*"))
				left = slices.DeleteFunc(left, func(path string) bool {
					return slices.Contains([]string{"disk", ".disk.contents", "links"}, filepath.Base(path))
				})
				if err != nil || len(left) > 0 {
					t.Errorf("left at the target: %v, %v", left, err)
				}
				m.settled(t, errors.New("refused"))
			})
		}
	}
}

// Where it cannot be noted that a part is missing, nothing is noted at all.
func TestMissingNotNoted(t *testing.T) {
	m := newMove(t)
	m.begin(t)
	note := m.target.path("data.missing")
	must(t, os.MkdirAll(filepath.Join(note, "in the way"), 0o700))
	if err := m.receive(t.Context(), t); err == nil {
		t.Error("they have moved all the same")
	}
	must(t, os.RemoveAll(note))
	if s, err := m.target.config.Devices[1].status(); s != "" || err != nil {
		t.Errorf("a device that did not come is %q, %v", s, err)
	}
	m.settled(t, errors.New("refused"))
}

// What has arrived in part and cannot be removed is never taken for the device.
func TestDiscardFails(t *testing.T) {
	m := newMove(t)
	overlay := m.target.path("disk.overlay")
	m.target.config.OnPhase = func(s migrate.Phase) {
		if s == migrate.HandingBack { // the file's name is somebody else's
			if err := errors.Join(os.Rename(overlay, overlay+".moved"), os.MkdirAll(filepath.Join(overlay, "in the way"), 0o700)); err != nil {
				t.Error(err)
			}
		}
	}
	m.link.At = func(from vmmtest.End, is wire.Type) vmmtest.Fate {
		if from == vmmtest.AtTarget && is == wire.TypePrepare {
			return vmmtest.Lost
		}
		return vmmtest.Arrives
	}
	m.link.ForGood = true
	m.hurry()
	m.begin(t)
	if err := m.receive(t.Context(), t); err == nil || !strings.Contains(err.Error(), overlay) {
		t.Errorf("received: %v", err)
	}
	m.target.close(t)
	must(t, errors.Join(os.RemoveAll(overlay), os.Rename(overlay+".moved", overlay)))
	if err := m.target.opens(t); err == nil || !strings.Contains(err.Error(), "never wholly arrived") {
		t.Errorf("a part of a device is opened: %v", err)
	}
}

// broken is a device that cannot be synced any more.
type broken struct{ block.Device }

func (broken) Sync() error { return syscall.EIO }

// A device that has wholly arrived, but cannot be made durable, is not taken for whole by the next
// process.
func TestNotDurable(t *testing.T) {
	m := newMove(t)
	m.target.config.OnPhase = func(s migrate.Phase) {
		if s == migrate.Confirming {
			d := m.target.mounter.devices.Get("disk")
			m.target.mounter.devices.Put("disk", &stack.Stack{Tracker: block.NewTracker(broken{d}, block.PageSize)})
		}
	}
	m.begin(t)
	if err := m.receive(t.Context(), t); !errors.Is(err, syscall.EIO) {
		t.Errorf("received: %v", err)
	}
	if err := m.target.mounter.Close(); !errors.Is(err, syscall.EIO) {
		t.Errorf("close: %v", err)
	}
	if err := m.target.config.Devices[0].files().CheckMissing(); err == nil {
		t.Error("a device that is not durable is taken for whole")
	}
}

// A device that cannot be synced when it closes is an error, and all is closed nevertheless.
func TestCloseFails(t *testing.T) {
	need.Root(t)
	need.FUSE(t)
	h := newHost(t)
	h.make(t, "disk", "data")
	m := h.open(t)
	if err := m.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := m.devices.Get("disk")
	m.devices.Put("disk", &stack.Stack{Tracker: block.NewTracker(broken{s}, block.PageSize)})
	if err := m.Close(); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "device disk") {
		t.Errorf("close: %v", err)
	}
	h.clean(t)
	if err := h.opens(t); err != nil {
		t.Error(err)
	}
}

// Devices of which one cannot be opened, exposed or linked are closed again, and nothing is left of
// their paths.
func TestOpenFails(t *testing.T) {
	need.Root(t)
	need.FUSE(t)
	for _, tt := range []struct {
		name  string
		cause func(t *testing.T, h *host)
		want  string
	}{
		{"no base", func(t *testing.T, h *host) { must(t, os.Remove(h.path("data"))) }, "no such file"},
		{"a status that is no file", func(t *testing.T, h *host) { inTheWay(t, &h.config.Devices[1]) }, "device data"},
		{"a base directory that is a file", func(t *testing.T, h *host) { h.config.BaseDir = h.path("data") }, "not a directory"},
		{"somebody's file in the place of a link", func(t *testing.T, h *host) {
			must(t, errors.Join(os.Mkdir(h.config.Links, 0o700), os.WriteFile(filepath.Join(h.config.Links, "data"), nil, 0o600)))
		}, "is no link"},
		{"links in a file", func(t *testing.T, h *host) { h.config.Links = h.path("data") }, "not a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.make(t, "disk", "data")
			tt.cause(t, h)
			m, err := New(h.config)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Open(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("open: %v; want %q", err, tt.want)
			}
			if err := m.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			if left, err := filepath.Glob(filepath.Join(h.config.BaseDir, "mounter", "*")); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
			if _, err := os.Lstat(filepath.Join(h.config.Links, "disk")); err == nil {
				t.Error("a link is left")
			}
		})
	}
}

// must ends a test that cannot be set up.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

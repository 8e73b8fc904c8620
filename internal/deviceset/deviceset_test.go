package deviceset

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"drafter/internal/block"
	"drafter/internal/expose"
	"drafter/internal/need"
	"drafter/internal/stack"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// device is one whose Sync and Close may fail, and which knows whether it was closed.
type device struct {
	block.Device
	syncs, closes error
	closed        bool
}

func (d *device) Sync() error { return d.syncs }

func (d *device) Close() error {
	d.closed = true
	return d.closes
}

func open(d *device) *stack.Stack {
	d.Device = block.NewZeros(1 << 20)
	return &stack.Stack{Tracker: block.NewTracker(d, block.PageSize)}
}

// Of devices of which one cannot be opened, the others are closed with the set.
func TestOpenFails(t *testing.T) {
	var s Set
	disk, broken := &device{}, errors.New("broken")
	err := s.Open(t.Context(), []string{"disk", "memory"}, func(ctx context.Context, name string) (*stack.Stack, error) {
		if name == "memory" {
			return nil, broken
		}
		return open(disk), nil
	})
	if !errors.Is(err, broken) || !strings.HasPrefix(err.Error(), "device memory: ") {
		t.Errorf("opened: %v", err)
	}
	if s.Get("disk") == nil || s.Get("memory") != nil || len(s.All()) != 1 {
		t.Errorf("the set holds %v", s.All())
	}
	if err := s.Close(true); err != nil || !disk.closed {
		t.Errorf("closed: %t, %v", disk.closed, err)
	}
	if len(s.All()) != 0 {
		t.Errorf("the set still holds %v", s.All())
	}
}

// All devices are closed, whatever the others fail with, and each failure is said.
func TestCloseFails(t *testing.T) {
	for _, sync := range []bool{true, false} {
		var s Set
		devices := map[string]*device{"one": {syncs: syscall.EIO}, "two": {closes: syscall.ENOSPC}, "three": {}}
		for name, d := range devices {
			s.Put(name, open(d))
		}
		err := s.Close(sync)
		if errors.Is(err, syscall.EIO) != sync || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "device two: ") {
			t.Errorf("sync %t: %v", sync, err)
		}
		for name, d := range devices {
			if !d.closed {
				t.Errorf("sync %t: device %s is open", sync, name)
			}
		}
		if err := s.Close(sync); err != nil {
			t.Errorf("sync %t: again: %v", sync, err)
		}
	}
}

// Devices have paths until they are hidden, and nothing is left of these, nor where they could not
// be made.
func TestExpose(t *testing.T) {
	need.Root(t)
	need.FUSE(t)
	base := t.TempDir()
	place := Place{Base: base, Owner: "peer", Way: expose.FUSE}
	var s Set
	s.Put("disk", open(&device{}))
	if err := s.Failed(); err != nil {
		t.Errorf("before there is a path: %v", err)
	}
	if err := s.Expose(t.Context(), place, []expose.Device{{Name: "disk", Device: s.Get("disk")}}); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(s.Path("disk")); err != nil || info.Size() != 1<<20 {
		t.Errorf("the path is no device: %v", err)
	}
	if err := s.Failed(); err != nil {
		t.Errorf("failed: %v", err)
	}
	for range 2 {
		if err := s.Hide(); err != nil {
			t.Error(err)
		}
	}
	if path := s.Path("disk"); path != "" {
		t.Errorf("path %s is left", path)
	}
	if left, err := filepath.Glob(filepath.Join(base, "peer", "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	place.Base = filepath.Join(base, "file")
	if err := os.WriteFile(place.Base, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Expose(t.Context(), place, nil); err == nil {
		t.Error("devices are exposed in a file")
	}
	if err := s.Close(false); err != nil {
		t.Error(err)
	}
}

// A source sends the overlay only of a device whose base is known.
func TestSource(t *testing.T) {
	var s Set
	with, without := open(&device{}), open(&device{})
	with.Base, with.Overlay = block.ID{1}, &block.Overlay{}
	without.Origin, without.Overlay = block.ID{2}, &block.Overlay{}
	s.Put("with", with)
	s.Put("without", without)
	if d := s.Source("with"); d.Name != "with" || d.Overlay == nil || d.Base != with.Base || d.Device != with.Tracker {
		t.Errorf("with a base: %+v", d)
	}
	if d := s.Source("without"); d.Overlay != nil || d.Base != (block.ID{}) || d.Origin != without.Origin {
		t.Errorf("without: %+v", d)
	}
	if err := s.Close(false); err != nil {
		t.Error(err)
	}
}

package migration

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"drafter/internal/await"
	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// bury lets a killed side be forgotten, so that the guest may go on elsewhere.
func (p *pair) bury() {
	p.ledger.mu.Lock()
	defer p.ledger.mu.Unlock()
	p.ledger.running = ""
}

// shut ends all of a pair.
func (p *pair) shut(t *testing.T, arrived *Target) {
	t.Helper()
	p.network.kill()
	if err := errors.Join(arrived.Close(), p.source.Close()); err != nil {
		t.Error(err)
	}
	p.guest.halt()
	p.target.halt()
	p.network.wg.Wait()
}

// becomes waits until a source has come to a state.
func becomes(t *testing.T, s *Source, want migrate.Phase) {
	t.Helper()
	await.None(t, "the source becomes "+string(want), func() string {
		if is := s.Phase(); is != want {
			return "it is " + string(is)
		}
		return ""
	})
}

// parted waits until a source has noticed that its target is away.
func parted(t *testing.T, s *Source) {
	t.Helper()
	await.True(t, "the source notices that its target is away", func() bool { return s.Away() != 0 })
}

// A target that dies after the handoff takes nothing with it that its source has: an operator
// settles where the VM goes on. One that is there is asked nobody about.
func TestSettleServing(t *testing.T) {
	for _, outcome := range []migrate.Outcome{migrate.Here, migrate.Away} {
		t.Run(string(outcome), func(t *testing.T) {
			p, arrived := handedOver(t, 1, nil)
			becomes(t, p.source, migrate.Serving)
			if err := p.source.Settle(outcome); !errors.Is(err, migrate.ErrConnected) {
				t.Fatalf("settled beside its target: %v", err)
			}
			p.kill("target")
			p.bury()
			parted(t, p.source)
			if err := p.source.Settle(outcome); err != nil {
				t.Fatal(err)
			}
			if outcome == migrate.Away {
				becomes(t, p.source, migrate.Moved)
				if err := p.source.GoneError(); err != nil {
					t.Error(err)
				}
			} else {
				becomes(t, p.source, migrate.Kept)
				p.guest.mu.Lock()
				err := p.guest.verify()
				p.guest.mu.Unlock()
				if err != nil {
					t.Error(err)
				}
			}
			if err := p.source.Settle(outcome); err == nil {
				t.Error("it was settled twice")
			}
			p.shut(t, arrived)
		})
	}
}

// A source that is ended does not wait for ever for a target that will never come back. What it has
// is noted first.
func TestRelinquish(t *testing.T) {
	for _, connected := range []bool{false, true} {
		p, arrived := handedOver(t, 1, nil)
		becomes(t, p.source, migrate.Serving)
		if !connected {
			p.kill("target")
		}
		if err := p.source.Revoke(errors.New("ended")); !errors.Is(err, migrate.ErrHandedOver) {
			t.Fatal(err)
		}
		err := p.source.Relinquish(200 * time.Millisecond)
		if connected {
			if err != nil || p.source.Phase() != migrate.Moved {
				t.Errorf("a target that gets on was left: %v, %s", err, p.source.Phase())
			}
		} else if !errors.Is(err, migrate.ErrHandedOver) || !strings.Contains(err.Error(), "may lack") || p.source.Phase() != migrate.LeftServing {
			t.Errorf("Relinquish: %v; the source is %s", err, p.source.Phase())
		}
		p.shut(t, arrived)
	}
}

// A VM of which nothing is missing needs no source, whatever has become of that.
func TestWholeWithoutSource(t *testing.T) {
	var p *pair
	limits := quick()
	limits.Settle = time.Minute
	p = newPair(t, 1, limits, nil)
	arrived, err := Receive(t.Context(), p.config(limits, func(side string, s migrate.Phase) {
		if s == migrate.Confirming {
			p.kill("source")
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-arrived.Whole():
	case <-time.After(time.Minute):
		t.Fatalf("the target is %s", arrived.Phase())
	}
	await.True(t, "the target confirms, and cannot have been told", func() bool { return arrived.Phase() == migrate.Confirming })
	p.target.mu.Lock()
	err = p.target.verify()
	p.target.mu.Unlock()
	if err != nil {
		t.Error(err)
	}
	if err := arrived.Close(); err != nil || arrived.Wait() != nil {
		t.Errorf("its end: %v, %v", err, arrived.Wait())
	}
	p.shut(t, arrived)
}

// A target learns at once that the rest of its VM will never come, and why.
func TestDisowned(t *testing.T) {
	t.Run("another process", func(t *testing.T) {
		p, arrived := handedOver(t, 1, nil)
		other := newPair(t, 2, quick(), nil)
		p.network.mu.Lock()
		p.network.source = other.source
		for _, c := range p.network.conns {
			_ = c.Close()
		}
		p.network.mu.Unlock()
		select {
		case <-arrived.Done():
		case <-time.After(time.Minute):
			t.Fatalf("the target is %s", arrived.Phase())
		}
		if err := arrived.Wait(); err == nil || !strings.Contains(err.Error(), "another process answers") || arrived.Phase() != migrate.LeftFetching {
			t.Errorf("the target is %s: %v", arrived.Phase(), err)
		}
		p.shut(t, arrived)
		other.guest.halt()
		if err := other.source.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Run("taken back", func(t *testing.T) {
		p, arrived := handedOver(t, 1, nil)
		becomes(t, p.source, migrate.Serving)
		p.target.mu.Lock() // the guest there does nothing any more
		p.network.mu.Lock()
		p.network.rate = 0
		for _, c := range p.network.conns {
			_ = c.Close()
		}
		p.bury()
		await.True(t, "the source notices, and is settled", func() bool { return p.source.Settle(migrate.Here) == nil })
		becomes(t, p.source, migrate.Kept)
		p.network.mu.Unlock()
		select {
		case <-arrived.Done():
		case <-time.After(time.Minute):
			t.Fatalf("the target is %s", arrived.Phase())
		}
		if err := arrived.Wait(); !errors.Is(err, migrate.ErrTakenBack) {
			t.Errorf("the target is %s: %v", arrived.Phase(), err)
		}
		p.target.mu.Unlock()
		p.shut(t, arrived)
	})
}

// based is a target that holds a base.
type based struct {
	nobodyVM
	base     *block.Contents
	device   *block.Incoming
	offered  wire.Device
	withheld bool // it does not tell what the base contains
}

func (b *based) Accept(_ context.Context, m wire.Manifest, _ uuid.UUID) ([]TargetDevice, error) {
	b.offered = m.Devices[0]
	d := TargetDevice{Held: wire.HoldsNothing, Device: b.device}
	if b.offered.Base == b.base.Device {
		d.Held = wire.HoldsBase
		if b.offered.Absent && !b.withheld {
			d.Base = b.base
		}
	}
	return []TargetDevice{d}, nil
}

// nobodyVM is a VM of which nothing is asked.
type nobodyVM struct{}

func (nobodyVM) WriteBack(context.Context) error                          { return nil }
func (nobodyVM) Flush(context.Context) error                              { return nil }
func (nobodyVM) Prepare(context.Context) error                            { return nil }
func (nobodyVM) Leave(context.Context, uuid.UUID) error                   { return nil }
func (nobodyVM) Pause(context.Context) (time.Time, error)                 { return time.Now(), nil }
func (nobodyVM) Save(context.Context, uuid.UUID, func(int64, bool)) error { return nil }
func (nobodyVM) Rescue(context.Context) error                             { return nil }
func (nobodyVM) Rescued(context.Context)                                  {}
func (nobodyVM) Mark(context.Context, migrate.Phase, uuid.UUID) error     { return nil }
func (nobodyVM) Start(context.Context) error                              { return nil }
func (nobodyVM) Expect(context.Context, uuid.UUID) error                  { return nil }
func (nobodyVM) Restore(context.Context, uuid.UUID) error                 { return nil }
func (nobodyVM) Resume(context.Context) error                             { return nil }
func (nobodyVM) Complete(context.Context) error                           { return nil }
func (nobodyVM) Discard(context.Context) error                            { return nil }

// A source that lacks the base of its device sends what differs from it to a target that has it:
// the target tells what the base contains.
func TestAbsentBase(t *testing.T) {
	const size = 40*block.ContentBlockSize - 100
	base := newRAM(size)
	for i := range base.data[:30*block.ContentBlockSize] {
		base.data[i] = byte(i * 7 >> 3)
	}
	contents, err := block.Hash(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	limits := quick()
	limits.Silence = time.Minute // nothing is lost
	for _, tt := range []struct {
		name     string
		origin   block.ID
		withheld bool
		most     int64
		want     string
	}{
		{name: "known", origin: contents.Device, most: 3 * block.ContentBlockSize},
		{name: "another base", origin: block.ID{1}, most: size},
		{name: "forgotten", most: size},
		{name: "contents withheld", origin: contents.Device, withheld: true, want: "not those of its base"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			held := newRAM(size)
			copy(held.data, base.data)
			here := newRAM(size)
			copy(here.data, base.data)
			here.data[5], here.data[20*block.ContentBlockSize] = 99, 99
			clear(here.data[7*block.ContentBlockSize:][:block.ContentBlockSize]) // zeros where the base has none
			target := &based{base: contents, withheld: tt.withheld}
			if tt.origin != contents.Device {
				clear(held.data)
			}
			target.device = block.NewIncoming(held, false)
			s, err := NewSource(SourceConfig{VM: nobodyVM{}, Limits: limits.Limits, Devices: []SourceDevice{{Name: "disk", Device: block.NewTracker(here, 64<<10), Origin: tt.origin, MinCycles: 1, MaxCycles: 2}}})
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 4)
			var dialled atomic.Int64
			arrived, err := Receive(t.Context(), TargetConfig{VM: target, Limits: limits.Limits, Dial: func(context.Context) (io.ReadWriteCloser, error) {
				dialled.Add(1)
				ours, theirs := net.Pipe()
				go func() { served <- s.Handle(context.Background(), theirs) }()
				return ours, nil
			}})
			if tt.want != "" {
				if err == nil {
					t.Error("it was accepted")
				}
				if err := s.Close(); err != nil { // all connections have ended then
					t.Error(err)
				}
				var refusals error
				for range dialled.Load() {
					refusals = errors.Join(refusals, <-served)
				}
				if refusals == nil || !strings.Contains(refusals.Error(), tt.want) {
					t.Errorf("the source: %v; want %q", refusals, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := arrived.Wait(); err != nil {
				t.Fatal(err)
			}
			if string(held.data) != string(here.data) {
				t.Error("the device did not arrive as it was")
			}
			stats := arrived.Stats()
			if sent, _, _ := stats.Bytes(); sent > tt.most {
				t.Errorf("%d bytes were sent, of at most %d", sent, tt.most)
			}
			if err := errors.Join(arrived.Close(), s.Close()); err != nil {
				t.Error(err)
			}
			for range dialled.Load() {
				if err := <-served; err != nil {
					t.Errorf("a connection of a good move ended with %v", err)
				}
			}
		})
	}
}

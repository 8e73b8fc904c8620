package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// copier takes copies of a scripted machine, one over the other.
type copier struct {
	pair      *pair
	devices   map[string]*ram
	versions  map[string][]uint64 // of the pages in the moment of the pause
	discarded int
	fail      error
}

func newCopier(p *pair) *copier {
	c := &copier{pair: p, devices: map[string]*ram{}}
	for _, name := range scriptedNames {
		c.devices[name] = newRAM(scriptedSize(name))
	}
	note := func(call string) error {
		if call == "rescue" {
			p.guest.mu.Lock()
			defer p.guest.mu.Unlock()
			c.versions = map[string][]uint64{}
			for name, v := range maps.All(p.ledger.version) {
				c.versions[name] = slices.Clone(v)
			}
		}
		return nil
	}
	p.guest.failing.Store(&note)
	return c
}

func (c *copier) Accept(_ context.Context, m wire.Manifest, _ uuid.UUID) ([]TargetDevice, error) {
	var devices []TargetDevice
	for _, d := range m.Devices {
		devices = append(devices, TargetDevice{Device: block.NewIncoming(c.devices[d.Name], true)})
	}
	return devices, nil
}

func (c *copier) Start(context.Context) error              { return errors.New("a copy is started") }
func (c *copier) Expect(context.Context, uuid.UUID) error  { return errors.New("a copy is expected") }
func (c *copier) Restore(context.Context, uuid.UUID) error { return errors.New("a copy is restored") }
func (c *copier) Resume(context.Context) error             { return errors.New("a copy is resumed") }
func (c *copier) Complete(context.Context) error           { return c.fail }
func (c *copier) Discard(context.Context) error            { c.discarded++; return nil }

// verify checks that the copy is the guest's devices as they were at the pause.
func (c *copier) verify() error {
	for name, versions := range c.versions {
		for page, version := range versions {
			want, got := make([]byte, pageLen(name, int64(page))), make([]byte, pageLen(name, int64(page)))
			if version > 0 {
				encodePage(want, name, int64(page), version)
			}
			if _, err := c.devices[name].ReadAt(got, int64(page)*block.PageSize); err != nil {
				return err
			}
			if string(want) != string(got) {
				return fmt.Errorf("page %d of %s is not version %d", page, name, version)
			}
		}
	}
	return nil
}

func (p *pair) end(t *testing.T) {
	t.Helper()
	p.network.wg.Wait()
	p.guest.halt()
	if err := p.guest.verify(); err != nil {
		t.Error(err)
	}
	if err := p.source.Close(); err != nil {
		t.Error(err)
	}
}

// A guest that does not get ready keeps its VM from being copied and moved, unless the target takes
// it as it is.
func TestForce(t *testing.T) {
	limits := quick()
	limits.Silence = time.Minute // nothing is lost here
	for _, isCopy := range []bool{true, false} {
		for _, force := range []bool{false, true} {
			p := newPair(t, 1, limits, nil)
			c := newCopier(p)
			note := *p.guest.failing.Load()
			silent := func(call string) error {
				if call == "prepare" {
					return fmt.Errorf("%w: no answer", migrate.ErrNotReady)
				}
				return note(call)
			}
			p.guest.failing.Store(&silent)
			config := p.config(limits, nil)
			config.Force = force
			if isCopy {
				config.VM, config.Copy = c, true
			}
			target, err := Receive(t.Context(), config)
			if err == nil {
				err = errors.Join(target.Wait(), target.Close())
			}
			p.network.wg.Wait()
			if want := force; (err == nil) != want || !want && !strings.Contains(fmt.Sprint(err, p.network.err), "with --force") {
				t.Errorf("copy %t, force %t: %v, %v", isCopy, force, err, p.network.err)
			}
			if err == nil && isCopy {
				err = c.verify()
			} else if err == nil {
				p.target.halt()
				err = p.target.verify()
			}
			if force && err != nil {
				t.Error(err)
			}
			p.guest.halt()
			if err := p.source.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	// Other reasons not to pause are not the guest's, and are not overruled.
	p := newPair(t, 1, limits, nil)
	c := newCopier(p)
	refuse := func(call string) error {
		if call == "prepare" {
			return errors.New("not now")
		}
		return nil
	}
	p.guest.failing.Store(&refuse)
	if _, err := Receive(t.Context(), TargetConfig{VM: c, Dial: p.network.dial, Limits: limits.Limits, Copy: true, Force: true}); err == nil || !strings.Contains(err.Error(), "not now") {
		t.Errorf("a source that does not want to: %v", err)
	}
	p.end(t)
}

// A copy is the VM in one moment; the VM goes on, and can be copied and migrated again.
func TestCopy(t *testing.T) {
	p := newPair(t, 1, quick(), nil)
	for range 5 {
		c := newCopier(p)
		target, err := Receive(t.Context(), TargetConfig{VM: c, Dial: p.network.dial, Limits: quick().Limits, Copy: true})
		if err != nil {
			t.Fatal(err)
		}
		p.network.wg.Wait()
		if target.Phase() != migrate.Copied || p.source.Phase() != migrate.Kept || p.network.err != nil {
			t.Errorf("source %s, %v; target %s", p.source.Phase(), p.network.err, target.Phase())
		}
		if err := c.verify(); err != nil {
			t.Error(err)
		}
		p.network.count.Store(0)
	}
	arrived, err := Receive(t.Context(), p.config(quick(), nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := arrived.Wait(); err != nil {
		t.Error(err)
	}
	p.network.wg.Wait()
	p.guest.halt()
	p.target.halt()
	if err := p.target.verify(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(arrived.Close(), p.source.Close()); err != nil {
		t.Error(err)
	}
}

// Copies with a baseline bring what has changed, whatever happened to the copies between; the guest
// goes on in any case.
func TestBaseline(t *testing.T) {
	p := newPair(t, 2, quick(), nil)
	c := newCopier(p)
	note := *p.guest.failing.Load()
	var b Baseline
	rng := rand.New(rand.NewPCG(3, 4))
	calls := []string{"", "write back", "flush", "prepare", "pause", "save", "complete"}
	full, failed := int64(0), 0
	for i := range 60 {
		call := calls[rng.IntN(len(calls))]
		if i == 0 {
			call = ""
		}
		f := func(now string) error {
			if err := note(now); err != nil || now != call {
				return err
			}
			return errors.New("injected: " + call)
		}
		p.guest.failing.Store(&f)
		c.fail = nil
		if call == "complete" {
			c.fail = errors.New("injected: complete")
		}
		stats, err := p.source.Copy(t.Context(), c, &b)
		if (err == nil) != (call == "") {
			t.Fatalf("round %d: %q failed, and the copy ended with %v", i, call, err)
		}
		if p.source.Phase() != migrate.Kept {
			t.Fatalf("round %d: the source is %s", i, p.source.Phase())
		}
		if err != nil {
			failed++
			continue
		}
		if err := c.verify(); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		sent, _, _ := stats.Bytes()
		if full == 0 {
			full = sent
		}
	}
	if failed == 0 || c.discarded != failed {
		t.Errorf("%d copies failed, %d were discarded", failed, c.discarded)
	}
	b.Forget()
	p.end(t)
}

// A copy that is cut off leaves the guest running and the source free, and no copy.
func TestCopyCut(t *testing.T) {
	for after := int64(100); after < 900_000; after = after*3/2 + 1000 {
		p := newPair(t, uint64(after), quick(), nil)
		p.network.wrap = func(_ int64, c io.ReadWriteCloser) io.ReadWriteCloser { return newFaulty(c, after, cut) }
		c := newCopier(p)
		target, err := Receive(t.Context(), TargetConfig{VM: c, Dial: p.network.dial, Limits: quick().Limits, Copy: true})
		if err == nil {
			if target.Phase() != migrate.Copied {
				t.Errorf("cut after %d: the target is %s", after, target.Phase())
			}
			if err := c.verify(); err != nil {
				t.Errorf("cut after %d: %v", after, err)
			}
		}
		p.network.wg.Wait()
		if p.source.Phase() != migrate.Kept {
			t.Errorf("cut after %d: the source is %s", after, p.source.Phase())
		}
		p.end(t)
	}
}

// Of two who want the VM, the one with a copy comes first, and the other gets it afterwards.
func TestMoveDuringCopy(t *testing.T) {
	var p *pair
	moved := make(chan error, 1)
	p = newPair(t, 7, quick(), func(_ string, s migrate.Phase) {
		if s != migrate.Snapshotting {
			return
		}
		p.network.wg.Go(func() {
			arrived, err := Receive(context.Background(), p.config(quick(), nil))
			if err == nil {
				err = errors.Join(arrived.Wait(), arrived.Close())
			}
			moved <- err
		})
	})
	c := newCopier(p)
	if _, err := p.source.Copy(t.Context(), c, nil); err != nil {
		t.Error(err)
	}
	if err := c.verify(); err != nil {
		t.Error(err)
	}
	if err := <-moved; err != nil {
		t.Error(err)
	}
	p.network.wg.Wait()
	p.guest.halt()
	p.target.halt()
	if err := p.target.verify(); err != nil {
		t.Error(err)
	}
	if err := p.source.Close(); err != nil {
		t.Error(err)
	}
}

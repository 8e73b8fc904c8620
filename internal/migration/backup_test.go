package migration

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// backupKinds are what can be wrong with a backup.
var backupKinds = []string{"whole", "whole", "slow", "failing", "gone", "damaged", "hanging"}

// keeper takes a copy.
type keeper map[string]*ram

func (k keeper) Accept(_ context.Context, m wire.Manifest, _ uuid.UUID) ([]TargetDevice, error) {
	var devices []TargetDevice
	for _, d := range m.Devices {
		k[d.Name] = newRAM(d.Size)
		devices = append(devices, TargetDevice{Device: block.NewIncoming(k[d.Name], true)})
	}
	return devices, nil
}

func (keeper) Start(context.Context) error              { return errors.New("a copy is started") }
func (keeper) Expect(context.Context, uuid.UUID) error  { return errors.New("a copy is expected") }
func (keeper) Restore(context.Context, uuid.UUID) error { return errors.New("a copy is restored") }
func (keeper) Resume(context.Context) error             { return errors.New("a copy is resumed") }
func (keeper) Complete(context.Context) error           { return nil }
func (keeper) Discard(context.Context) error            { return nil }

// shelf gives blocks of a device in a backup.
type shelf struct {
	pair *pair
	data *ram
	kind string
	n    atomic.Int64
}

func (s *shelf) Fetch(ctx context.Context, first int64, p []byte, _ bool) error {
	n := s.n.Add(1)
	switch {
	case s.kind == "slow":
		select {
		case <-time.After(time.Duration(n%5) * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	case s.kind == "failing" && n%3 != 0:
		return errors.New("injected: the backup fails")
	case s.kind == "gone" && n > 1:
		return block.ErrReplaced
	case s.kind == "hanging" && n > 2:
		<-ctx.Done()
		return context.Cause(ctx)
	}
	_, err := s.data.ReadAt(p, first*block.ContentBlockSize)
	if s.kind == "damaged" && n > 2 {
		p[n] ^= 1
	}
	s.pair.fetched.Add(int64(len(p)))
	return err
}

// backUp makes a backup from which the target will get the VM, and lets the guest go on until some
// of it has changed.
func (p *pair) backUp(t *testing.T, kind string) {
	t.Helper()
	k := keeper{}
	if _, err := p.source.Copy(t.Context(), k, &p.backup); err != nil {
		t.Fatal(err)
	}
	ids, remotes := map[*block.Tracker]block.ID{}, map[string]*Backup{}
	for name, data := range k {
		contents, err := block.Hash(t.Context(), data)
		if err != nil {
			t.Fatal(err)
		}
		ids[p.guest.devices[name].(*block.Tracker)] = contents.Device
		remotes[name] = &Backup{Remote: block.Remote{Contents: contents, Fetcher: &shelf{pair: p, data: data, kind: kind}}}
	}
	p.backup.Stored(ids)
	p.target.backup = func(d wire.Device) *Backup {
		b := remotes[d.Name]
		if b == nil || b.Contents.Device != d.Backup {
			t.Errorf("device %s: the source offers another backup", d.Name)
			return nil
		}
		return b
	}
	time.Sleep(time.Millisecond) // the guest writes on: the backup is not what it has any more
}

// What a backup has does not come from the source, unless the backup fails.
func TestBackup(t *testing.T) {
	for _, kind := range backupKinds {
		limits := quick()
		if kind == "hanging" {
			limits.Timeout = 20 * time.Millisecond
		}
		p, source, target, err := try(t, 5, limits, 0, fault{name: "none", backup: kind})
		if source != migrate.Moved || target != migrate.Moved {
			t.Fatalf("%s: source %s, target %s, %v", kind, source, target, err)
		}
		stats, all := p.source.Stats(), int64(0)
		for _, d := range stats.Devices {
			all += d.Size
		}
		sent, _, _ := stats.Bytes()
		t.Logf("%s: %d of %d bytes from the source, %d from the backup", kind, sent, all, p.fetched.Load())
		if (kind == "whole" || kind == "slow") && sent > all/2 {
			t.Errorf("%s: %d of %d bytes came from the source", kind, sent, all)
		}
	}
}

// What a target has beneath is fetched from nowhere.
func TestBackupOverBase(t *testing.T) {
	p := newPair(t, 3, quick(), nil)
	p.backUp(t, "whole")
	remote := p.target.backup
	p.target.backup = func(d wire.Device) *Backup {
		b := remote(d)
		if _, err := p.target.under[d.Name].WriteAt(b.Fetcher.(*shelf).data.data, 0); err != nil {
			t.Error(err)
		}
		b.Beneath = b.Contents
		return b
	}
	arrived, err := Receive(t.Context(), p.config(quick(), nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := arrived.Wait(); err != nil {
		t.Error(err)
	}
	if n := p.fetched.Load(); n != 0 {
		t.Errorf("%d bytes were fetched", n)
	}
	p.conclude(t, p.moved(), arrived)
}

// A backup that is replaced between its offer and the answer is still what it was.
func TestBackupReplaced(t *testing.T) {
	p := newPair(t, 6, quick(), nil)
	p.backUp(t, "whole")
	remote := p.target.backup
	p.target.backup = func(d wire.Device) *Backup {
		b := remote(d)
		p.backup.Stored(nil)
		return b
	}
	arrived, err := Receive(t.Context(), p.config(quick(), nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := arrived.Wait(); err != nil {
		t.Error(err)
	}
	p.conclude(t, p.moved(), arrived)
}

// What a copy has taken is not known as changed. So nothing is offered until the copy has ended,
// and all that changed is once it failed.
func TestNoBackupBesideACopy(t *testing.T) {
	size := int64(4 * block.ContentBlockSize)
	tracker := block.NewTracker(newRAM(size), block.PageSize)
	d := &outgoingDevice{SourceDevice: SourceDevice{Device: tracker}}
	var b Baseline
	b.begin(d)
	b.advance()
	b.end(true)
	id := block.ID{1}
	b.Stored(map[*block.Tracker]block.ID{tracker: id})
	write := func(page int64) {
		if _, err := tracker.WriteAt([]byte("changed"), page*block.PageSize); err != nil {
			t.Fatal(err)
		}
	}
	write(1)
	for _, step := range []func(){func() { b.begin(d) }, func() { write(2) }, b.advance, func() { write(3) }} {
		step()
		if got, _ := b.backup(tracker); got != (block.ID{}) {
			t.Fatalf("%x is offered beside a copy", got)
		}
	}
	b.end(false)
	got, pages := b.backup(tracker)
	if got != id || pages.Count() != 3 {
		t.Errorf("%x is offered, with %d pages that changed", got, pages.Count())
	}
	b.begin(d)
	b.advance()
	b.end(true)
	if got, _ := b.backup(tracker); got != (block.ID{}) {
		t.Errorf("%x is offered, which was replaced", got)
	}
}

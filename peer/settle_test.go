package peer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/internal/migration"
	"drafter/internal/signaturetest"
	"drafter/internal/wire"
	"drafter/migrate"
	"drafter/vmm"
)

// left is an instance as a process that ended, or was killed, has left it.
type left struct {
	pkg     *signaturetest.Package
	dir     string
	devices []Device
}

var packageNames = []string{vmm.Config, vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory}

// leave makes an instance whose state device says status. One with arrived came by a migration,
// with or without the package being here, and was killed before all of it was there.
func leave(t *testing.T, status vmm.Status, arrived, withPackage bool) *left {
	t.Helper()
	l := &left{pkg: signaturetest.New(t), dir: filepath.Join(t.TempDir(), "instance")}
	pkg := l.pkg.Dir
	if !withPackage {
		pkg = filepath.Join(t.TempDir(), "nowhere")
	}
	l.devices = NewPackageDevices(packageNames, pkg, l.dir)
	if arrived {
		l.arrive(t, status)
	} else {
		l.run(t, status)
	}
	return l
}

// begin opens the devices for a VM that is to arrive.
func (l *left) begin(t *testing.T) (a *arrival, m wire.Manifest, migration uuid.UUID) {
	t.Helper()
	var err error
	if m.Config, err = os.ReadFile(l.pkg.Path(vmm.Config)); err != nil {
		t.Fatal(err)
	}
	contents := l.pkg.Contents(t)
	for _, name := range packageNames {
		m.Devices = append(m.Devices, wire.Device{Name: name, Size: contents[name].Size, BlockSize: block.ContentBlockSize, Base: contents[name].Device})
	}
	a, migration = &arrival{p: newPeer(t, Config{Devices: l.devices})}, uuid.New()
	if err := a.verify(m); err != nil {
		t.Fatal(err)
	}
	if _, err := a.open(t.Context(), m, migration); err != nil {
		t.Fatal(err)
	}
	return a, m, migration
}

// arrive lets the instance arrive as far as status.
func (l *left) arrive(t *testing.T, status vmm.Status) {
	t.Helper()
	a, m, migration := l.begin(t)
	config := a.p.devices.Get(vmm.Config).Incoming // which comes first
	config.Open(block.NewBitmap(block.Pages(config)), func(int64, int64) {}, nil)
	if _, err := config.Device.WriteAt(m.Config, 0); err != nil {
		t.Fatal(err)
	}
	if err := config.Sync(); err != nil {
		t.Fatal(err)
	}
	if status != vmm.Arriving {
		if err := a.Expect(t.Context(), migration); err != nil {
			t.Fatal(err)
		}
	}
	if status == vmm.Running {
		state := a.p.devices.Get(vmm.State).Incoming.Device
		if err := errors.Join(vmm.NoteTakenOver(state), state.Sync()); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.p.closeDevices(false); err != nil {
		t.Fatal(err)
	}
}

// keepDisks lets all of the instance be here but its memory.
func (l *left) keepDisks(t *testing.T) {
	t.Helper()
	for i := range l.devices {
		if d := &l.devices[i]; d.Name != vmm.Memory {
			if err := d.files().ForgetMissing(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// run lets the instance be one that was started here.
func (l *left) run(t *testing.T, status vmm.Status) {
	t.Helper()
	for _, d := range l.devices {
		s, err := d.files().Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if d.Name == vmm.State {
			err = vmm.WriteState(s, uuid.NewString(), []byte("saved"))
			if err == nil {
				err = vmm.MarkState(s, status)
			}
		}
		if err = errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

func (l *left) start(t *testing.T) error {
	t.Helper()
	p := newPeer(t, Config{Devices: l.devices})
	return errors.Join(p.Resume(t.Context()), p.Close())
}

func (l *left) export(t *testing.T) error {
	t.Helper()
	for _, d := range l.devices {
		if d.Name != vmm.Disk {
			continue
		}
		return d.Export(t.Context(), filepath.Join(t.TempDir(), "exported"), nil)
	}
	return errors.New("it has no disk")
}

func (l *left) settle(t *testing.T, o migrate.Outcome) error {
	t.Helper()
	return Settle(t.Context(), l.devices, o)
}

// startable is in the error of a start that got as far as to look for a VMM, of which these tests
// have none.
const startable = "VMM"

// Every state of docs/migration.md has a way out, and what its errors name works.
func TestStatesHaveWaysOut(t *testing.T) {
	const notInDoubt, partial, itsOwn = "nothing is in doubt", "not all of the VM came here", "which has not moved away"
	for what, tt := range map[string]struct {
		status  vmm.Status
		arrived bool
		whole   bool // all but memory is here

		start, here, away, export, receive string // what is in the error of each; "" for none
		afterHere                          vmm.Status
	}{
		"suspended":       {status: vmm.Suspended, start: startable, here: notInDoubt, away: notInDoubt, receive: itsOwn},
		"running":         {status: vmm.Running, start: "-", here: notInDoubt, away: notInDoubt, receive: itsOwn},
		"powered off":     {status: vmm.PoweredOff, start: "-", here: notInDoubt, away: notInDoubt, receive: itsOwn},
		"arriving":        {status: vmm.Arriving, arrived: true, start: "migrate it again", here: partial, export: "never arrived"},
		"taking over":     {status: vmm.TakingOver, arrived: true, start: "--away", here: partial, export: "never arrived", receive: "--away"},
		"fetching":        {status: vmm.Running, arrived: true, start: "--away", here: partial, export: "never arrived", receive: "--away"},
		"fetching memory": {status: vmm.Running, arrived: true, whole: true, start: "--here", receive: "--here", afterHere: vmm.Running},
		"leaving":         {status: vmm.Leaving, start: "it may run at its target", receive: "--away", afterHere: vmm.Running},
		"in doubt":        {status: vmm.InDoubt, start: "--here", receive: "--away", afterHere: vmm.Suspended},
		"handed over":     {status: vmm.HandedOver, start: "--here", receive: "--away", afterHere: vmm.Suspended},
		"moved":           {status: vmm.Moved, start: "moved away", here: notInDoubt, away: notInDoubt},
	} {
		for _, withPackage := range []bool{true, false} {
			if !withPackage && !tt.arrived {
				continue // it cannot have been started
			}
			t.Run(fmt.Sprintf("%s, with its package %t", what, withPackage), func(t *testing.T) {
				t.Parallel() // it waits for disks
				fresh := func() *left {
					l := leave(t, tt.status, tt.arrived, withPackage)
					if tt.whole {
						l.keepDisks(t)
					}
					return l
				}
				check := func(op string, err error, want string) {
					t.Helper()
					if want != "-" && (err != nil) != (want != "") || err != nil && !strings.Contains(err.Error(), strings.TrimPrefix(want, "-")) {
						t.Errorf("%s: %v; want %q", op, err, want)
					}
				}
				l := fresh()
				check("start", l.start(t), tt.start)
				check("export", l.export(t), tt.export)
				check("start again", l.start(t), tt.start)
				check("receive", makeRoom(l.devices), tt.receive)

				l = fresh()
				err := l.settle(t, migrate.Here)
				check("settle --here", err, tt.here)
				if err == nil {
					if got := l.status(t); got != tt.afterHere {
						t.Errorf("settled here, it is %d, want %d", got, tt.afterHere)
					}
					if err := l.start(t); !strings.Contains(err.Error(), startable) {
						t.Errorf("settled here, it does not start: %v", err)
					}
				}

				l = fresh()
				err = l.settle(t, migrate.Away)
				check("settle --away", err, tt.away)
				if err == nil {
					check("start after --away", l.start(t), "moved away")
					check("receive after --away", makeRoom(l.devices), "")
				}
			})
		}
	}
}

func (l *left) status(t *testing.T) vmm.Status {
	t.Helper()
	for i := range l.devices {
		if l.devices[i].Name != vmm.State {
			continue
		}
		s, err := l.devices[i].openState(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		status, _, _, err := vmm.StateStatus(s)
		if err != nil {
			t.Fatal(err)
		}
		return status
	}
	t.Fatal("it has no state device")
	return 0
}

// Where an instance's package is not, or is not any more, the instance can be settled and replaced
// all the same, and found if it came without.
func TestWithoutPackage(t *testing.T) {
	for _, status := range []vmm.Status{vmm.Moved, vmm.HandedOver} {
		l := leave(t, status, false, true)
		if err := os.Rename(l.pkg.Dir, l.pkg.Dir+".gone"); err != nil {
			t.Fatal(err)
		}
		if status == vmm.HandedOver {
			if err := l.settle(t, migrate.Away); err != nil {
				t.Errorf("settle: %v", err)
			}
		}
		if err := makeRoom(l.devices); err != nil {
			t.Errorf("receive: %v", err)
		}
	}
	l := leave(t, vmm.TakingOver, true, false)
	devices, err := PackageDevices(filepath.Join(l.dir, "nowhere"), l.dir)
	if err != nil || len(devices) != len(packageNames) {
		t.Errorf("%d devices, %v", len(devices), err)
	}
	if _, err := PackageDevices(filepath.Join(l.dir, "nowhere"), t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("neither package nor instance: %v", err)
	}
}

// What has arrived is noted as missing until it is durable.
func TestMissingUntilDurable(t *testing.T) {
	l := leave(t, vmm.Running, true, true)
	if err := l.settle(t, migrate.Away); err != nil {
		t.Fatal(err)
	}
	if err := makeRoom(l.devices); err != nil {
		t.Fatal(err)
	}
	if err := missing(l.devices); err != nil {
		t.Errorf("of what was removed: %v", err)
	}
	a, _, _ := l.begin(t)
	for _, s := range a.p.devices.All() {
		s.Incoming.Open(block.NewBitmap(block.Pages(s.Incoming)), func(int64, int64) {}, nil) // nothing is missing
	}
	for _, name := range []string{vmm.Config, vmm.Kernel, vmm.Disk, vmm.Memory} {
		if err := a.p.device(name).files().CheckMissing(); err == nil {
			t.Errorf("device %s is taken for whole before it is durable", name)
		}
	}
	if err := a.Complete(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := missing(l.devices); err != nil {
		t.Errorf("of what is durable: %v", err)
	}
}

// Once a VM that has arrived runs, what its state device is told outlives the process without a
// sync.
func TestHeaderIsReleased(t *testing.T) {
	l := leave(t, vmm.TakingOver, true, true)
	for i := range l.devices {
		if l.devices[i].Name != vmm.State {
			continue
		}
		s, err := l.devices[i].openState(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		h := &heldHeader{Device: s}
		for _, tt := range []struct {
			note, below vmm.Status
			first       func() error
		}{
			{vmm.Arriving, vmm.TakingOver, func() error { return nil }},
			{vmm.Leaving, vmm.Arriving, h.Sync}, // which gives what was held, and no more
			{vmm.Running, vmm.Running, h.releaseForGood},
			{vmm.Leaving, vmm.Leaving, func() error { return nil }},
		} {
			if err := errors.Join(tt.first(), vmm.NoteState(h, tt.note)); err != nil {
				t.Fatal(err)
			}
			if got, _, _, err := vmm.StateStatus(s); err != nil || got != tt.below {
				t.Errorf("noted %d, the device says %d, %v; want %d", tt.note, got, err, tt.below)
			}
		}
	}
}

// A decision that the peer that runs does not follow is an error of the command, with the peer's
// reason.
func TestSettleRefused(t *testing.T) {
	l := leave(t, vmm.Running, false, true)
	source, err := migration.NewSource(migration.SourceConfig{VM: &departure{}, Devices: []migration.SourceDevice{{Name: vmm.Disk, Device: block.NewTracker(block.NewZeros(1<<20), block.PageSize)}}})
	if err != nil {
		t.Fatal(err)
	}
	p := newPeer(t, Config{Devices: l.devices})
	if _, err := p.moves.Offer(func() (*migration.Source, error) { return source, nil }); err != nil {
		t.Fatal(err)
	}
	if err := p.openDevices(t.Context()); err != nil {
		t.Fatal(err)
	}
	var s settling
	s.follow(p, migrate.InDoubt)
	defer s.follow(p, migrate.Kept)
	if err := l.settle(t, migrate.Here); err == nil || err.Error() != "nothing is in doubt" {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(decisionFile(l.devices)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the decision is left behind: %v", err)
	}
}

// What has arrived in part and cannot be removed keeps the state device, which says so.
func TestDiscardFails(t *testing.T) {
	l := leave(t, vmm.Moved, false, true)
	if err := makeRoom(l.devices); err != nil {
		t.Fatal(err)
	}
	a, _, _ := l.begin(t)
	overlay := a.p.device(vmm.Disk).Overlay
	if err := errors.Join(os.Rename(overlay, overlay+".moved"), os.MkdirAll(filepath.Join(overlay, "in the way"), 0o700)); err != nil {
		t.Fatal(err)
	}
	a.restoring = make(chan struct{})
	if err := a.Discard(t.Context()); err == nil || !strings.Contains(err.Error(), overlay) {
		t.Errorf("discarded: %v", err)
	}
	if err := errors.Join(os.RemoveAll(overlay), os.Rename(overlay+".moved", overlay)); err != nil {
		t.Fatal(err)
	}
	if err := l.start(t); err == nil || !strings.Contains(err.Error(), "this is a part of a VM") {
		t.Errorf("a part of a VM starts: %v", err)
	}
}

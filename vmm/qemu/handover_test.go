package qemu

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/memory"
)

// Two VMMs map one memory while it changes hands. The one that waits writes nothing to it before it
// has the VM: the other one can go on at any time until then.
func TestHandOver(t *testing.T) {
	kernel := exactKernel(t)
	for _, tracking := range []memory.Tracking{memory.TrackScan, memory.TrackFaults} {
		t.Run(string(tracking), func(t *testing.T) {
			way := exactWay{backing: memory.BackingShared, tracking: tracking}
			e := bootExact(t, kernel, way)
			e.rounds(2)

			waiting := e.handed(kernel, uuid.New())
			before := e.truth()
			waiting.loadAllBut1(e)
			if !bytes.Equal(before, e.truth()) {
				t.Error("a VMM that has loaded its state has written to the memory")
			}
			if err := waiting.m.Close(); err != nil {
				t.Error(err)
			}
			if ours, err := e.memory.TakeBack(); err != nil || !ours {
				t.Fatal(ours, err)
			}
			e.state.Reset()
			e.rounds(2) // it goes on as if nothing had been

			migration := uuid.New()
			target := e.handed(kernel, migration)
			e.look() // what was written while it was saved
			target.loadAllBut1(e)
			if err := target.memory.Take(e.memory.InFile()); err != nil {
				t.Fatal(err)
			}
			target.memory.Settle()
			claim, err := target.memory.Claim(migration)
			if err != nil {
				t.Fatal(err)
			}
			claim.Keep()
			if ours, err := e.memory.TakeBack(); err != nil || ours {
				t.Fatal(ours, err)
			}
			target.last = e.truth()
			target.copied = bytes.Clone(target.last)
			if err := e.m.Close(); err != nil {
				t.Fatal(err)
			}
			if err := e.memory.Forget(); err != nil {
				t.Fatal(err)
			}
			target.rounds(3)
			target.end()
		})
	}
}

// handed saves the VM, and starts another one that waits for it, with its memory.
func (e *exact) handed(kernel string, migration uuid.UUID) *exact {
	t := e.t
	t.Helper()
	if err := e.m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	f, err := e.memory.Offer(migration)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file, err := block.CreateFile(filepath.Join(t.TempDir(), "handed"), exactSize)
	if err != nil {
		t.Fatal(err)
	}
	hw := e.m.Hardware()
	r := &exact{t: t, way: e.way, adopts: os.NewFile(uintptr(fd), "adopted")}
	r.start(file, kernel, nil, &hw)
	if err := r.m.Receive(t.Context()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(exactRunning) // the guest writes meanwhile
	if _, err := e.m.PauseToSave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := e.m.Save(t.Context(), &e.state); err != nil {
		t.Fatal(err)
	}
	e.look()
	return r
}

// loadAllBut1 loads what another VM has saved, but for the last byte, with which it would run.
func (r *exact) loadAllBut1(of *exact) {
	t := r.t
	t.Helper()
	if err := r.m.Restore(t.Context(), bytes.NewReader(of.state.Bytes())); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // it is loaded
}

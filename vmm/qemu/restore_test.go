package qemu

import (
	"bytes"
	"errors"
	"testing"

	"drafter/internal/memory"
	"drafter/vmm"
)

// A VM whose state comes in parts runs when it is let go, and never before or after a failure.
func TestParts(t *testing.T) {
	kernel := exactKernel(t)
	way := exactWay{backing: memory.BackingShared, tracking: memory.TrackScan}
	booted := bootExact(t, kernel, way)
	booted.rounds(1)
	booted.end()
	state := bytes.Clone(booted.state.Bytes())
	half := len(state) / 2

	waiting := func(t *testing.T) *exact {
		booted.t = t
		w := booted.waiting(kernel, way)
		if err := w.m.Receive(t.Context()); err != nil {
			t.Fatal(err)
		}
		return w
	}
	neverRan := func(t *testing.T, w *exact) {
		t.Helper()
		<-w.m.Done()
		if w.m.incoming.ran.Load() {
			t.Error("the guest has run")
		}
	}
	t.Run("damaged", func(t *testing.T) {
		w := waiting(t)
		damaged := bytes.Repeat([]byte{0xd0}, len(state)-half)
		err := errors.Join(w.m.Load(t.Context(), state[:half]), w.m.Restore(t.Context(), bytes.NewReader(damaged)))
		if err == nil {
			if err = w.m.Resume(t.Context()); !errors.Is(err, vmm.ErrNotRun) {
				t.Errorf("%v; want %v", err, vmm.ErrNotRun)
			}
		}
		neverRan(t, w)
	})
	t.Run("without its end", func(t *testing.T) {
		w := waiting(t)
		if err := w.m.Load(t.Context(), state[:half]); err != nil {
			t.Fatal(err)
		}
		if err := w.m.Restore(t.Context(), bytes.NewReader(nil)); err == nil {
			t.Error("a state without its end is restored")
		}
		if err := w.m.Close(); err != nil {
			t.Error(err)
		}
		neverRan(t, w)
	})
	// A mistake of the source's, as QEMU takes it: all of the state is there before the VM may run.
	t.Run("too soon", func(t *testing.T) {
		w := waiting(t)
		if err := w.m.Load(t.Context(), state); err != nil {
			t.Fatal(err)
		}
		<-w.m.Done() // it is ended at once
	})
	t.Run("whole", func(t *testing.T) {
		w := waiting(t)
		err := errors.Join(w.m.Load(t.Context(), state[:half]), w.m.Restore(t.Context(), bytes.NewReader(state[half:])))
		if err != nil {
			t.Fatal(err)
		}
		if w.m.incoming.ran.Load() {
			t.Error("the guest runs before it is let go")
		}
		w.rounds(1)
		w.end()
	})
}

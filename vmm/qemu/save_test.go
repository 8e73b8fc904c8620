package qemu

import (
	"context"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"drafter/internal/memory"
	"drafter/internal/need"
)

// A VM goes on after a save, at whatever moment that is given up: QEMU may have got a command whose
// answer nobody waits for any more.
func TestSaveGivenUp(t *testing.T) {
	e := bootExact(t, exactKernel(t), exactWay{backing: memory.BackingShared, tracking: memory.TrackScan})
	givenUp := 0
	for i := range need.Rounds(500, 10000) {
		if err := e.m.Resume(t.Context()); err != nil {
			t.Fatalf("after save %d, of which %d were given up: %v", i, givenUp, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), rand.N(10*time.Millisecond))
		var err error
		if i%2 == 0 {
			_, err = e.m.PauseToSave(ctx)
		} else {
			err = e.m.Pause(ctx)
		}
		if err == nil {
			err = e.m.Save(ctx, io.Discard)
		}
		if cancel(); err != nil {
			givenUp++
		}
	}
	t.Logf("%d were given up", givenUp)
	if err := e.m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := e.m.PauseToSave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := e.m.Save(t.Context(), &e.state); err != nil {
		t.Fatal(err)
	}
	e.end()
}

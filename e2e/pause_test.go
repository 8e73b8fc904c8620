package e2e

import (
	"context"
	"io"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"drafter/internal/instance"
	"drafter/internal/tour"
	"drafter/vmm"
	"drafter/vmm/qemu"
)

// A VM that was paused goes on when nothing comes of it: whether its state was saved or not, and
// whether the pause itself was given up, at whatever moment.
func TestPauseGivenUp(t *testing.T) {
	s := newSite(t)
	c := s.redis(t)
	paths := instance.Paths{}
	for _, f := range tour.Files {
		paths[f.Device] = filepath.Join(s.pkg, f.File)
	}
	config, err := instance.Open(paths)
	if err != nil {
		t.Fatal(err)
	}
	host := vmm.Host{
		Drivers: vmm.Drivers{qemu.Driver{}}, VMM: vmm.VMMAuto, Accel: vmm.AccelAuto, BaseDir: filepath.Join(s.dir, "vms"), Netns: "ark0", CgroupVersion: 2, Output: io.Discard,
	}
	launched, err := instance.Launch(t.Context(), host, config, paths)
	if err != nil {
		t.Fatal(err)
	}
	vm, err := launched.Run(t.Context(), time.Now(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	}()
	count := int64(0)
	runs := func(after string) {
		t.Helper()
		count++
		if n, err := c.Incr(t.Context(), "pauses").Result(); err != nil || n != count {
			t.Fatalf("after %s: %d instead of %d, %v", after, n, count, err)
		}
	}
	runs("start")
	for range 3 {
		if err := vm.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := vm.Rescue(t.Context()); err != nil {
			t.Fatal(err)
		}
		runs("a pause")
		if err := vm.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := vm.SaveLeaving(t.Context(), uuid.New(), nil); err != nil {
			t.Fatal(err)
		}
		if err := vm.Rescue(t.Context()); err != nil {
			t.Fatal(err)
		}
		runs("a save")
	}
	failed := 0
	for after := time.Duration(0); after < 2*time.Millisecond; after += 100 * time.Microsecond {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		if err := vm.Pause(ctx); err != nil {
			failed++
		}
		if err := vm.Rescue(t.Context()); err != nil {
			t.Fatal(err)
		}
		cancel()
		runs("a pause of at most " + after.String())
	}
	if failed == 0 {
		t.Error("no pause was given up")
	}
	t.Logf("%d of 20 pauses were given up", failed)
	failed = 0
	for after := time.Duration(0); after < 20*time.Millisecond; after += time.Millisecond {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		_, err := vm.PauseToSave(ctx)
		if err == nil {
			err = vm.SaveLeaving(ctx, uuid.New(), nil)
		}
		if err != nil {
			failed++
		}
		if err := vm.Rescue(t.Context()); err != nil {
			t.Fatal(err)
		}
		cancel()
		runs("a save of at most " + after.String())
	}
	if failed == 0 {
		t.Error("no save was given up")
	}
	t.Logf("%d of 20 saves were given up", failed)
	if saved, err := vm.Suspend(t.Context(), time.Minute); err != nil || !saved {
		t.Fatalf("suspend: %v, %v", saved, err)
	}
}

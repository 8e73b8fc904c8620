package qemu

import (
	"os"
	"strings"
	"testing"
	"time"

	"drafter/internal/memory"
)

// A VM whose memory cannot be read any more from where it is mapped ends, and says why.
func TestTruncated(t *testing.T) {
	kernel := exactKernel(t)
	booted := bootExact(t, kernel, exactWay{backing: memory.BackingShared, tracking: memory.TrackScan})
	booted.end()
	vm := booted.resumed(kernel, exactWay{backing: memory.BackingPrivate, tracking: memory.TrackScan})
	if err := os.Truncate(vm.file.Name(), 0); err != nil {
		t.Fatal(err)
	}
	err := vm.m.Resume(t.Context())
	select {
	case <-vm.m.Done():
		err = vm.m.Wait()
	case <-time.After(time.Minute):
	}
	if err == nil || !strings.Contains(err.Error(), vm.file.Name()) || !strings.Contains(err.Error(), "was truncated") {
		t.Errorf("%v", err)
	}
}

package instance

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"drafter/internal/vmmtest"
	"drafter/vmm"
)

// A VM that is to boot although it could be resumed boots once, also where its memory is served to
// its VMM only after that.
func TestBootsOnce(t *testing.T) {
	driver := &vmmtest.Driver{T: t, BootsFile: true}
	paths, config := vmmtest.WritePackage(t, t.TempDir())
	h := vmmtest.Host(t, driver)
	h.Boot = true
	l, err := Launch(t.Context(), h, config, Paths(paths))
	if err != nil {
		t.Fatal(err)
	}
	i, err := l.Run(t.Context(), time.Now(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if m := driver.Machines(); len(m) != 2 || m[0].Launched.Boot == nil || m[1].Launched.Boot != nil {
		t.Errorf("%d VMMs were launched, the first to boot, the second not: %v", len(m), driver.Steps())
	}
	if err := i.Close(); err != nil {
		t.Error(err)
	}
}

// What a VM has in its memory after it has booted is all that its memory device holds then, zeros
// included.
func TestBootStorage(t *testing.T) {
	const size = 4 << 20
	dir := t.TempDir()
	device, booted := filepath.Join(dir, "device"), filepath.Join(dir, "booted")
	if err := os.WriteFile(device, bytes.Repeat([]byte("old "), size/4), 0o600); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	copy(want[1<<20:], "booted")
	copy(want[size-4096:], "at the end")
	err := makeFile(booted, func(f *os.File) error {
		for _, at := range []int64{1 << 20, size - 4096} {
			if _, err := f.WriteAt(want[at:at+4096], at); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s := bootStorage{Paths{vmm.Memory: device, vmm.Kernel: "kernel"}, booted}
	if s.Path(vmm.Memory) != booted || s.Path(vmm.Kernel) != "kernel" {
		t.Errorf("paths %s, %s", s.Path(vmm.Memory), s.Path(vmm.Kernel))
	}
	if err := s.Sync(vmm.Memory); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(device); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the device does not hold the memory: %d bytes, %v", len(got), err)
	}
}

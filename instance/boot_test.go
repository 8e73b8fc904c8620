package instance

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"drafter/vmm"
)

// What a VM has in its memory after it has booted is all that its memory device holds then, zeros included.
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

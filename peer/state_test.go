package peer

import (
	"bytes"
	"errors"
	"testing"

	"drafter/internal/block"
)

// lateDevice calls read after each read, before the reader gets to look at what it has.
type lateDevice struct {
	block.Device
	read   func()
	failed error // of the next read
}

func (d *lateDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := d.failed; err != nil {
		d.failed = nil
		return 0, err
	}
	n, err := d.Device.ReadAt(p, off)
	if d.read != nil {
		d.read()
	}
	return n, err
}

// A header that is released while somebody reads is read, whether from here or from the device:
// never what the device held before.
func TestHeldHeaderReleasedMeanwhile(t *testing.T) {
	file, err := block.CreateUnnamed(t.TempDir(), 4*block.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	device := &lateDevice{Device: file}
	h := &heldHeader{Device: device}
	want := bytes.Repeat([]byte{7}, 512)
	if _, err := h.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	device.read = func() {
		device.read = nil
		// What holds the lock keeps a release waiting until it is done.
		if h.mu.TryLock() {
			h.mu.Unlock()
			if err := h.release(); err != nil {
				t.Error(err)
			}
		}
	}
	got := make([]byte, len(want))
	if _, err := h.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %v…, %v; want %v…", got[:4], err, want[:4])
	}
}

// A header that could not be read is not held: what the device has stays.
func TestHeldHeaderNotRead(t *testing.T) {
	file, err := block.CreateUnnamed(t.TempDir(), 4*block.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	want := bytes.Repeat([]byte{7}, 512)
	if _, err := file.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	h := &heldHeader{Device: &lateDevice{Device: file, failed: errors.New("broken disk")}}
	if _, err := h.WriteAt([]byte{8}, 600); err == nil {
		t.Error("a write over what cannot be read succeeds")
	}
	got := make([]byte, len(want))
	if _, err := h.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %v…, %v; want %v…", got[:4], err, want[:4])
	}
	if err := h.release(); err != nil {
		t.Fatal(err)
	}
	if _, err := file.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("released %v…, %v; want %v…", got[:4], err, want[:4])
	}
}

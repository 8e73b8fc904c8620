package fuse

import (
	"bytes"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"drafter/internal/block"
	"drafter/internal/expose"
)

// full is a device on a file system that is full now and then.
type full struct {
	*counting
	isFull atomic.Bool
}

func (f *full) WriteAt(p []byte, off int64) (int, error) {
	if f.isFull.Load() {
		return 0, syscall.ENOSPC
	}
	return f.counting.WriteAt(p, off)
}

// A disk whose file system is full says so to its user, who can try again: it has not failed.
func TestDiskWithoutRoom(t *testing.T) {
	d := &full{counting: newDevice(t, 1<<20)}
	m := mount(t, expose.Device{Name: "disk", Kind: expose.Disk, Device: d})
	f, err := os.OpenFile(m.Path("disk"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d.isFull.Store(true)
	if _, err := f.WriteAt([]byte("hello"), 0); !block.NoRoom(err) {
		t.Errorf("written to a full file system: %v", err)
	}
	d.isFull.Store(false)
	if _, err := f.WriteAt([]byte("hello"), 0); err != nil {
		t.Errorf("written with room: %v", err)
	}
	if err := m.Failed(); err != nil {
		t.Error(err)
	}
}

// lossy is a device that says it has stored what it has not.
type lossy struct{ *counting }

func (lossy) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

func (l lossy) NextData(off int64) (start, end int64, err error) { return off, l.Size(), nil }

// What a storage has lost is noticed before a file gets its name: it is read back from there, not
// from the kernel's cache.
func TestLostWrite(t *testing.T) {
	m := mount(t, expose.Device{Name: "sound", Kind: expose.File, Device: newDevice(t, 1<<20)}, expose.Device{Name: "lossy", Kind: expose.File, Device: lossy{newDevice(t, 1<<20)}})
	for name, sound := range map[string]bool{"sound": true, "lossy": false} {
		f, err := os.OpenFile(m.Path(name), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(bytes.Repeat([]byte{7}, 256<<10), 64<<10); err != nil {
			t.Fatal(err)
		}
		if err := block.SyncAndVerify(t.Context(), f); (err == nil) != sound {
			t.Errorf("%s: %v", name, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

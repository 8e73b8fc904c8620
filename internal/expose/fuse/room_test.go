package fuse

import (
	"bytes"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

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

// Memory whose file system is full loses nothing: what its user writes to the mapping is there
// after the kernel has written it back and forgotten it, and it is stored once there is room.
func TestMemoryWithoutRoom(t *testing.T) {
	want, edits := memoryContent()
	f := &full{counting: newDevice(t, int64(len(want)))}
	if _, err := f.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	f.isFull.Store(true)
	b := block.NewBacklog(f, f.Name())
	b.Keep()
	m := mount(t, expose.Device{Name: "memory", Kind: expose.Memory, Device: b})
	cmd := exec.Command("/proc/self/exe", m.Path("memory"))
	cmd.Env = append(os.Environ(), "FUSE_TEST=edit")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, i := range edits {
		want[i]++
	}
	user, err := os.Open(m.Path("memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	if err := unix.Fadvise(int(user.Fd()), 0, int64(len(want)), unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := user.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("memory is not as it was written: %v", err)
	}
	if err := b.Sync(); !block.NoRoom(err) {
		t.Errorf("sync of what there is no room for: %v", err)
	}
	f.isFull.Store(false)
	if err := b.Sync(); err != nil || b.Missing() != 0 {
		t.Errorf("with room: %v, %d bytes are missing", err, b.Missing())
	}
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was stored in the end is not what was written: %v", err)
	}
	if err := m.Failed(); err != nil {
		t.Error(err)
	}
}

// Memory of which a write-back was lost for good fails every flush from then on, not only the
// first.
func TestLostMemory(t *testing.T) {
	want, _ := memoryContent()
	f := &full{counting: newDevice(t, int64(len(want)))}
	if _, err := f.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	f.isFull.Store(true) // and nothing is kept
	m := mount(t, expose.Device{Name: "memory", Kind: expose.Memory, Device: f})
	cmd := exec.Command("/proc/self/exe", m.Path("memory"))
	cmd.Env = append(os.Environ(), "FUSE_TEST=edit")
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Fatalf("a write-back that failed is not reported: %s", out)
	}
	f.isFull.Store(false)
	user, err := os.OpenFile(m.Path("memory"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	for range 2 {
		if err := user.Sync(); err == nil {
			t.Error("memory is flushed although some of it was lost")
		}
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

package block

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

// smallFileSystem mounts a file system of so many bytes in a mount namespace of the test's own
// thread, in which all of the test has to open its files. resize gives it another size.
func smallFileSystem(t *testing.T, size int) (dir string, resize func(size int)) {
	t.Helper()
	need.Root(t)
	dir = t.TempDir()
	runtime.LockOSThread() // for ever: the thread, and the namespace with it, ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	mount := func(flags uintptr, size int) {
		t.Helper()
		if err := unix.Mount("tmpfs", dir, "tmpfs", flags, fmt.Sprintf("size=%d,mode=700", size)); err != nil {
			t.Fatal(err)
		}
	}
	mount(0, size)
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir, func(size int) { mount(unix.MS_REMOUNT, size) }
}

// An overlay on a file system of every size from too small to just enough: a write that does not
// fit is refused and counted, and the rest is read as it was written, and is stored.
func TestBacklogOfEverySize(t *testing.T) {
	const size = 64*PageSize + 700 // the last page is short
	base, content := fixture(t, size)
	dir, resize := smallFileSystem(t, 1<<20)
	for room := PageSize; room <= 80*PageSize; room += 4 * PageSize {
		resize(room)
		paths := OverlayPaths{Base: base.Base, Overlay: filepath.Join(dir, "overlay"), State: filepath.Join(dir, "state")}
		o, err := tryOpen(t, paths, PageSize)
		if err != nil {
			if !NoRoom(err) {
				t.Fatalf("%d bytes: %v", room, err)
			}
			if err := removeFiles(paths.Overlay, paths.State); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want := bytes.Clone(content)
		write := func() (refused int64) {
			t.Helper()
			for page := range int64(65) {
				p := bytes.Repeat([]byte{byte(page + 1)}, int(min(PageSize, size-page*PageSize)))
				switch _, err := o.WriteAt(p, page*PageSize); {
				case err == nil:
					copy(want[page*PageSize:], p)
				case NoRoom(err):
					refused++
				default:
					t.Fatalf("%d bytes: write page %d: %v", room, page, err)
				}
			}
			return refused
		}
		refused := write()
		same(t, o, want)
		if missing := o.Backlog().Missing(); missing != refused*PageSize {
			t.Errorf("%d bytes: %d pages were refused, %d bytes are missing", room, refused, missing)
		}
		if err := o.Sync(); err != nil {
			t.Fatalf("%d bytes: %v", room, err)
		}
		resize(1 << 20)
		if refused, missing := write(), o.Backlog().Missing(); refused != 0 || missing != 0 {
			t.Errorf("%d bytes: with room %d pages were refused, %d bytes are missing", room, refused, missing)
		}
		shut(t, o)
		again := open(t, paths, PageSize)
		same(t, again, want)
		shut(t, again)
		if err := removeFiles(paths.Overlay, paths.State); err != nil {
			t.Fatal(err)
		}
	}
}

// What was set aside can be written on a full file system.
func TestReserve(t *testing.T) {
	dir, _ := smallFileSystem(t, 64*PageSize)
	path := filepath.Join(dir, "state")
	f, err := CreateFile(path, 32*PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Reserve(path, 16*PageSize); err != nil {
		t.Fatal(err)
	}
	if start, _, err := f.NextData(0); err != nil || start != f.Size() {
		t.Errorf("what is set aside is data at %d: %v", start, err)
	}
	ballast, err := CreateFile(filepath.Join(dir, "ballast"), 64*PageSize)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ballast.WriteAt(make([]byte, 64*PageSize), 0); !NoRoom(err) {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 16*PageSize), 0); err != nil {
		t.Error(err)
	}
	if err := Reserve(path, 32*PageSize); !NoRoom(err) {
		t.Errorf("%v", err)
	}
	shut(t, ballast)
	if err := os.Remove(ballast.f.Name()); err != nil {
		t.Fatal(err)
	}
	before := stored(t, path)
	if err := Reserve(path, 32*PageSize); err != nil {
		t.Error(err)
	}
	if stored(t, path) == before {
		t.Error("nothing was set aside")
	}
	if err := Release(path); err != nil || stored(t, path) != before {
		t.Errorf("%d bytes are stored, %d were before: %v", stored(t, path), before, err)
	}
}

// stored is how many bytes of its file system a file takes.
func stored(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// failing is a device whose writes fail with an error while there is one, and which has no holes.
type failing struct {
	*memory
	err error
}

func (s *failing) WriteAt(p []byte, off int64) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	return s.memory.WriteAt(p, off)
}

func (s *failing) Trim(off, length int64) error { return Trim(struct{ Device }{s}, off, length) }

// An overlay whose storage fails, even while a block is made to vanish that was written in part, is
// as good as before once the storage works.
func TestOverlayOfFailingStorage(t *testing.T) {
	const size, blockSize = 1 << 20, 64 << 10
	base, data := newMemory(size), &failing{memory: newMemory(size)}
	copy(base.bytes, "the head of the first block; the rest of it is zeros")
	s, err := readState(&memory{bytes: initialState(&stateHeader{blockSize: blockSize, size: size})})
	if err != nil {
		t.Fatal(err)
	}
	o := newOverlay(base, NewBacklog(data, "device"), s)
	want := bytes.Clone(base.bytes)
	copy(data.bytes, bytes.Repeat([]byte("what a write has left"), 100)) // and the block is still the base's
	data.err = unix.ENOSPC
	if _, err := o.WriteAt([]byte("more"), 8<<10); !NoRoom(err) {
		t.Fatal(err)
	}
	same(t, o, want)
	data.err = nil
	if _, err := o.WriteAt([]byte("more"), 32<<10); err != nil {
		t.Fatal(err)
	}
	copy(want[32<<10:], "more")
	same(t, o, want)
	data.err = unix.ENOSPC
	copy(data.bytes[blockSize:], "half of a write") // of a block that nobody writes again
	if _, err := o.WriteAt([]byte("more"), blockSize+8<<10); !NoRoom(err) {
		t.Fatal(err)
	}
	data.err = nil
	if err := o.Sync(); err != nil {
		t.Fatal(err)
	}
	same(t, o, want)
	if !IsZero(data.bytes[blockSize : 2*blockSize]) {
		t.Error("a block that is the base's has something left in the overlay's file")
	}
}

package bench

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// What is mapped and touched, and what is only in the file behind it, are told apart.
func TestGuestMemory(t *testing.T) {
	page := os.Getpagesize()
	const size = 37 << 20 // no other mapping has it
	plain, err := os.OpenFile(filepath.Join(t.TempDir(), "memory"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	shared := os.NewFile(uintptr(fd), "guest")
	defer shared.Close()
	for _, c := range []struct {
		name                       string
		file                       *os.File
		flags                      int
		touched, copied, untouched int // pages
	}{
		{"private", plain, unix.MAP_PRIVATE, 7, 4, 0},
		{"memfd", shared, unix.MAP_SHARED, 7, 7, 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := c.file.Truncate(size); err != nil {
				t.Fatal(err)
			}
			m, err := unix.Mmap(int(c.file.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, c.flags)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Munmap(m)
			// the kernel maps neighbours of a page that is read, too
			if err := unix.Madvise(m, unix.MADV_RANDOM); err != nil {
				t.Fatal(err)
			}
			if err := unix.Madvise(m, unix.MADV_NOHUGEPAGE); err != nil {
				t.Fatal(err)
			}
			sum := byte(0)
			for i := range 7 { // 64 pages apart
				if i < 4 {
					m[i*64*page] = 1
				} else if c.flags == unix.MAP_SHARED {
					m[i*64*page] = 0
				}
				sum += m[i*64*page]
			}
			if c.untouched > 0 {
				if _, err := c.file.WriteAt(make([]byte, c.untouched*page), size/2); err != nil {
					t.Fatal(err)
				}
			}
			g, err := guestMemoryOf(os.Getpid(), size)
			if err != nil || sum != 4 {
				t.Fatal(err, sum)
			}
			pages := func(mb float64) int { return int(mb*1e6/float64(page) + 0.5) }
			if got := [3]int{pages(g.touched), pages(g.copied), pages(g.untouched)}; got != [3]int{c.touched, c.copied, c.untouched} {
				t.Errorf("%v pages are touched, copied and untouched", got)
			}
		})
	}
}

// A process' share of the host's memory has what it has written; what goes to memory is no write to
// a disk.
func TestHostMemory(t *testing.T) {
	const size = 32 << 20
	before, err := memoryOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	wrote, err := diskWrites(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	for i := 0; i < size; i += os.Getpagesize() {
		m[i] = 1
	}
	after, err := memoryOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	now, err := diskWrites(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if grown := after.anonymous - before.anonymous; grown < size/1e6*0.9 || grown > size/1e6*1.3 {
		t.Errorf("%.1f MB more after %d bytes", grown, size)
	}
	if grown := after.proportional - before.proportional; grown < size/1e6*0.9 || grown > size/1e6*1.3 {
		t.Errorf("a share of %.1f MB more after %d bytes", grown, size)
	}
	if now != wrote {
		t.Errorf("%.1f MB written to a disk", now-wrote)
	}
}

package memory

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
)

// adopt returns memory that has adopted another one's file.
func adopt(t *testing.T, under block.Device, f *os.File) (*Device, error) {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	d := New(under)
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d, d.Adopt(os.NewFile(uintptr(fd), "adopted"))
}

// Of all who have ever had the memory, one runs its guest, whoever asks when, and however late.
func TestOneOwner(t *testing.T) {
	type holder struct {
		d           *Device
		offers, was uuid.UUID // the migration it has offered the memory to, and the one that it came by
		runs        bool
	}
	claims, back := 0, 0
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		first, _ := share(t, newDevice(4))
		holders := []*holder{{d: first, runs: true}}
		running := func(h *holder) {
			for _, o := range holders {
				if o.runs {
					t.Fatalf("seed %d: two run it", seed)
				}
			}
			h.runs = true
		}
		for range 40 {
			h := holders[rng.IntN(len(holders))]
			switch {
			case h.runs && len(holders) < 8:
				h.offers = uuid.New()
				f, err := h.d.Offer(h.offers)
				if err != nil || f == nil {
					t.Fatal(err)
				}
				d, err := adopt(t, newDevice(4), f)
				if err != nil {
					t.Fatal(err)
				}
				holders = append(holders, &holder{d: d, was: h.offers})
				h.runs = false
			case h.d.adopted.Load():
				h.d.Settle()
				c, err := h.d.Claim(h.was)
				if err != nil {
					continue
				}
				claims++
				if rng.IntN(4) == 0 { // it could not be resumed
					err = c.Release()
				} else {
					running(h)
					c.Keep()
				}
				if err != nil {
					t.Fatal(err)
				}
			case h.d.Offered() && !h.runs:
				ours, err := h.d.TakeBack()
				if err != nil {
					t.Fatal(err)
				}
				if ours {
					back++
					running(h)
				}
			}
		}
	}
	if claims == 0 || back == 0 {
		t.Errorf("%d claims, %d taken back", claims, back)
	}
}

// What could end whoever uses it is no memory.
func TestAdoptRefuses(t *testing.T) {
	const size = 4 * block.PageSize
	memfd := func(bytes int64, seals int) *os.File {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "test")
		_, serr := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
		if err := errors.Join(f.Truncate(bytes), serr); err != nil {
			t.Fatal(err)
		}
		return f
	}
	regular, err := os.Create(filepath.Join(t.TempDir(), "regular"))
	if err != nil {
		t.Fatal(err)
	}
	if err := regular.Truncate(size + block.PageSize); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]*os.File{
		"a file": regular, "a pipe": r, "its other end": w,
		"one that can shrink": memfd(size+block.PageSize, 0), "one that is too small": memfd(size, unix.F_SEAL_SHRINK),
	} {
		if _, err := adopt(t, newDevice(4), f); err == nil {
			t.Errorf("%s was adopted", name)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

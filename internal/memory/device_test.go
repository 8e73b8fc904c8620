package memory

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/need"
)

// stored is what a memory device stores to. A test may look at each write, and refuse it.
type stored struct {
	*device
	write func(off, length int64) error // nil: all are good
}

func (s *stored) WriteAt(b []byte, off int64) (int, error) {
	if s.write != nil {
		if err := s.write(off, int64(len(b))); err != nil {
			return 0, err
		}
	}
	return s.device.WriteAt(b, off)
}

// Trim implements [block.Trimmer]. It needs no room.
func (s *stored) Trim(off, length int64) error { return block.Trim(s.device, off, length) }

// share returns memory that is shared with nobody, and its file.
func share(t *testing.T, under block.Device) (*Device, *os.File) {
	t.Helper()
	d := New(under)
	if err := d.Share(); err != nil {
		t.Fatal(err)
	}
	f, err := d.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(f.Close(), d.Close()); err != nil {
			t.Error(err)
		}
	})
	return d, f
}

// filled is pages that have one byte all over.
func filled(b byte, pages int) []byte { return bytes.Repeat([]byte{b}, pages*page) }

// guestWrites does what a guest does that writes pages, and what is told of it.
func guestWrites(t *testing.T, d *Device, f *os.File, b byte, first, pages int) {
	t.Helper()
	if _, err := f.WriteAt(filled(b, pages), int64(first*page)); err != nil {
		t.Fatal(err)
	}
	d.Written(int64(first*page), int64(pages*page))
}

// hasPages checks what reads return, by ranges that begin and end anywhere, and all at once.
func hasPages(t *testing.T, d *Device, want []byte) {
	t.Helper()
	for range 50 {
		off := rand.IntN(len(want))
		n := 1 + rand.IntN(len(want)-off)
		got := make([]byte, n)
		if _, err := d.ReadAt(got, int64(off)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want[off:off+n]) {
			t.Fatalf("%d bytes at %d are wrong", n, off)
		}
	}
}

// has tells which pages a set has.
func has(b *block.Bitmap) (pages []int64) {
	for p := range b.All() {
		pages = append(pages, p)
	}
	return pages
}

func wantUnsaved(t *testing.T, d *Device, want ...int64) {
	t.Helper()
	got := has(d.Unsaved())
	if len(got) != len(want) {
		t.Fatalf("pages %v are unsaved, want %v", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("pages %v are unsaved, want %v", got, want)
		}
	}
}

// Pages come from the guest if it has written them, and else from what is stored.
func TestDeviceReads(t *testing.T) {
	under := newDevice(16)
	d, f := share(t, under)
	tracker := block.NewTracker(d, 64<<10)
	d.Under(tracker)
	want := bytes.Clone(under.data)
	hasPages(t, d, want)
	guestWrites(t, d, f, 1, 2, 3)
	guestWrites(t, d, f, 2, 15, 1)
	copy(want[2*page:], filled(1, 3))
	copy(want[15*page:], filled(2, 1))
	hasPages(t, d, want)
	wantUnsaved(t, d, 2, 3, 4, 15)
	if got := has(tracker.Take()); len(got) != 4 {
		t.Errorf("the layer above was told of %v", got)
	}

	// What the guest has is at hand, wherever the rest is.
	under.lost.Store(true)
	for _, r := range []struct {
		first, pages int64
		local        bool
	}{{2, 3, true}, {3, 1, true}, {1, 2, false}, {4, 2, false}, {0, 1, false}} {
		p := make([]byte, r.pages*page)
		if got := d.Local(r.first*page, r.pages*page); got != r.local {
			t.Errorf("%d pages from %d on are local: %t", r.pages, r.first, got)
		}
		if got := d.ReadNow(p, r.first*page); got != r.local {
			t.Errorf("%d pages from %d on can be read now: %t", r.pages, r.first, got)
		} else if got && !bytes.Equal(p, want[r.first*page:(r.first+r.pages)*page]) {
			t.Errorf("%d pages from %d on were read wrongly", r.pages, r.first)
		}
	}
}

// What the guest has counts as data, although what is stored has none.
func TestDeviceNextData(t *testing.T) {
	path := filepath.Join(t.TempDir(), "memory")
	file, err := block.CreateFile(path, 16*page)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteAt(filled(1, 2), 6*page); err != nil {
		t.Fatal(err)
	}
	d, f := share(t, file)
	guestWrites(t, d, f, 2, 2, 1)
	guestWrites(t, d, f, 2, 7, 3)
	data := block.NewBitmap(16)
	for off := int64(0); off < d.Size(); {
		start, end, err := d.NextData(off)
		if err != nil {
			t.Fatal(err)
		}
		if start < off || end < start || end == start && start != d.Size() {
			t.Fatalf("the next data after %d is from %d to %d", off, start, end)
		}
		data.SetRange(start/page, end/page)
		off = max(end, off+1)
	}
	for _, p := range []int64{2, 6, 7, 8, 9} {
		if !data.Has(p) {
			t.Errorf("page %d has no data", p)
		}
	}
	if data.Has(0) || data.Has(4) || data.Has(12) {
		t.Errorf("pages %v have data", has(data))
	}
	if start, _, err := d.NextData(2*page + 100); err != nil || start != 2*page+100 {
		t.Errorf("within a page: %d, %v", start, err)
	}
}

// A Store that has no room, or is ended, forgets nothing, and goes on later.
func TestStoreRefused(t *testing.T) {
	const pages = 256
	under := &stored{device: newDevice(pages)}
	d, f := share(t, under)
	want := bytes.Clone(under.data)
	for p := 0; p < pages; p += 2 {
		guestWrites(t, d, f, byte(1+p), p, 1)
		copy(want[p*page:], filled(byte(1+p), 1))
	}
	const full = 100 // of which on the file system has no room
	under.write = func(off, length int64) error {
		if off+length > full*page {
			return unix.ENOSPC
		}
		return nil
	}
	n, err := d.Store(t.Context())
	if !block.NoRoom(err) || n != full/2*page {
		t.Fatalf("stored %d bytes: %v", n, err)
	}
	if got := d.Unsaved(); got.Count() != (pages-full)/2 || got.Next(0) != full {
		t.Errorf("pages %v are unsaved", has(got))
	}
	hasPages(t, d, want)
	if err := d.Sync(); !block.NoRoom(err) {
		t.Errorf("Sync: %v", err)
	}
	if err := d.GiveBack(); err != nil {
		t.Error(err)
	}
	if got := d.Unsaved(); got.Count() != pages/2 {
		t.Errorf("only %d pages are unsaved", got.Count())
	}
	for p := 0; p < full; p += 2 {
		if !block.IsZero(under.data[p*page : (p+1)*page]) {
			t.Errorf("page %d still takes room", p)
		}
	}
	hasPages(t, d, want)
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("nobody waits for it")
	cancel(gone)
	under.write = nil
	if n, err := d.Store(ctx); n != 0 || !errors.Is(err, gone) {
		t.Errorf("stored %d bytes once it had ended: %v", n, err)
	}
	if n, err := d.Store(t.Context()); n != pages/2*page || err != nil {
		t.Errorf("stored %d bytes: %v", n, err)
	}
	if err := d.GiveBack(); err != nil { // there was room
		t.Error(err)
	}
	wantUnsaved(t, d)
	if !bytes.Equal(under.data, want) {
		t.Error("what is stored is wrong")
	}
}

// A page that the guest writes while it is stored is stored again. Until then it is read from the
// guest, as one is that is being stored.
func TestStoreWhileWritten(t *testing.T) {
	under := &stored{device: newDevice(16)}
	d, f := share(t, under)
	guestWrites(t, d, f, 1, 3, 3)
	want := bytes.Clone(under.data)
	copy(want[3*page:], filled(1, 3))
	under.write = func(off, length int64) error { // has been read
		if off != 3*page || length != 3*page {
			t.Errorf("%d bytes at %d are stored", length, off)
		}
		wantUnsaved(t, d, 3, 4, 5)
		hasPages(t, d, want)
		guestWrites(t, d, f, 2, 4, 1)
		copy(want[4*page:], filled(2, 1))
		hasPages(t, d, want)
		return nil
	}
	if n, err := d.Store(t.Context()); n != 3*page || err != nil {
		t.Fatalf("stored %d bytes: %v", n, err)
	}
	wantUnsaved(t, d, 4)
	hasPages(t, d, want)
	under.write = nil
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	wantUnsaved(t, d)
	if !bytes.Equal(under.data, want) {
		t.Error("what is stored is wrong")
	}
}

// Zeros of the guest's are stored as such.
func TestStoreZeros(t *testing.T) {
	under := newDevice(16)
	d, _ := share(t, under)
	d.Blank()
	if got := d.Unsaved().Count(); got != 16 {
		t.Errorf("%d pages are unsaved before a boot", got)
	}
	hasPages(t, d, filled(0, 16))
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(under.data, filled(0, 16)) {
		t.Error("what is stored is not zeros")
	}
}

// What has come from elsewhere is the guest's memory, until it is evicted. What is stored is placed
// only where nothing else has come.
func TestPlaces(t *testing.T) {
	under := newDevice(16)
	d, f := share(t, under)
	want := bytes.Clone(under.data)
	place := func(b byte, first, pages int) {
		t.Helper()
		if _, err := d.WriteAt(filled(b, pages), int64(first*page)); err != nil {
			t.Fatal(err)
		}
		copy(want[first*page:], filled(b, pages))
	}
	place(1, 1, 3)
	place(2, 2, 1) // once more, before the guest runs
	for _, first := range []int{3, 5} {
		if err := d.Trim(int64(first*page), page); err != nil {
			t.Fatal(err)
		}
		clear(want[first*page : (first+1)*page])
	}
	hasPages(t, d, want)
	wantUnsaved(t, d, 1, 2, 3, 5)
	if err := d.Warm(t.Context()); err != nil {
		t.Fatal(err)
	}
	hasPages(t, d, want)
	wantUnsaved(t, d, 1, 2, 3, 5) // the others are what is stored
	inFile := make([]byte, len(want))
	if _, err := f.ReadAt(inFile, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(inFile, want) {
		t.Error("the guest would find other pages")
	}
	if err := d.Evict(2, 7); err != nil {
		t.Fatal(err)
	}
	copy(want[2*page:7*page], under.data[2*page:])
	hasPages(t, d, want)
	wantUnsaved(t, d, 1)
	if _, err := f.ReadAt(inFile, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(inFile[2*page:7*page], filled(0, 5)) {
		t.Error("the guest would not wait for pages that were evicted")
	}

	d.enter()
	place(3, 4, 1) // which it waits for
	if _, err := d.WriteAt(filled(4, 2), 3*page); err == nil {
		t.Error("a page was replaced that the guest has")
	}
	copy(want[3*page:], filled(4, 1)) // which was missing
	if err := d.Trim(page, page); err == nil {
		t.Error("a page that the guest has was given back")
	}
	hasPages(t, d, want)
	if err := d.Warm(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d.present.Has(2) {
		t.Error("pages are warmed once the guest runs")
	}
}

// Of a shared device nothing but whole pages is written or given back.
func TestWholePages(t *testing.T) {
	d, _ := share(t, newDevice(16))
	for _, r := range [][2]int64{{100, page}, {0, 100}, {page, page + 1}, {-page, page}, {15 * page, 2 * page}} {
		if _, err := d.WriteAt(make([]byte, r[1]), r[0]); !errors.Is(err, block.ErrRange) {
			t.Errorf("write %d bytes at %d: %v", r[1], r[0], err)
		}
		if err := d.Trim(r[0], r[1]); !errors.Is(err, block.ErrRange) {
			t.Errorf("give back %d bytes at %d: %v", r[1], r[0], err)
		}
	}
	wantUnsaved(t, d)
}

// What is not shared is written where it is stored. It has nothing to evict and to warm.
func TestNotShared(t *testing.T) {
	under := newDevice(16)
	d := New(under)
	if _, err := d.WriteAt([]byte("some bytes"), 100); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(under.data[100:110], []byte("some bytes")) {
		t.Error("they are not stored")
	}
	if err := d.Trim(page, page); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(under.data[page:2*page], filled(0, 1)) {
		t.Error("a page that was given back is still stored")
	}
	if err := errors.Join(d.Evict(0, 16), d.Warm(t.Context())); err != nil {
		t.Error(err)
	}
	wantUnsaved(t, d)

	// A VMM that has ended takes with it what only it had. That is not stored as something else.
	d.Blank()
	if n, err := d.Store(t.Context()); n != 0 || err == nil {
		t.Errorf("stored %d bytes that nobody has: %v", n, err)
	}
	if d.ReadNow(make([]byte, page), 0) {
		t.Error("a page was read that nobody has")
	}
	if got := d.Unsaved().Count(); got != 16 {
		t.Errorf("%d pages are unsaved", got)
	}
	if err := d.Forget(); err != nil {
		t.Fatal(err)
	}
	hasPages(t, d, under.data)
}

// What only the guest had can be given up. The device can then be shared anew.
func TestForget(t *testing.T) {
	under := newDevice(16)
	d, f := share(t, under)
	d.Blank()
	d.enter()
	guestWrites(t, d, f, 1, 2, 3)
	if err := d.Forget(); err != nil {
		t.Fatal(err)
	}
	wantUnsaved(t, d)
	hasPages(t, d, under.data)
	if err := d.Share(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(filled(1, 1), 2*page); err != nil {
		t.Errorf("a new guest is refused its memory: %v", err)
	}
	wantUnsaved(t, d, 2)
}

// Pages may still arrive, and be read, when a VM is given up.
func TestForgetBesides(t *testing.T) {
	const pages = 64
	d, _ := share(t, newDevice(pages))
	var users sync.WaitGroup
	stop := make(chan struct{})
	use := func(op func() error) {
		users.Go(func() {
			for {
				if err := op(); err != nil && !errors.Is(err, errForgotten) && !errors.Is(err, os.ErrClosed) {
					t.Error(err)
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	use(func() error { _, err := d.WriteAt(filled(1, pages), 0); return err })
	use(func() error { _, err := d.ReadAt(make([]byte, pages*page), 0); return err })
	use(func() error { return d.Trim(0, pages*page) })
	use(func() error { return d.Evict(0, pages) })
	use(func() error { return d.Warm(t.Context()) })
	for range 200 {
		if err := errors.Join(d.Forget(), d.Share()); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	users.Wait()
}

// What a VMM had before the device had it becomes the guest's memory.
func TestCopy(t *testing.T) {
	source, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if err := source.Truncate(16 * page); err != nil {
		t.Fatal(err)
	}
	if _, err := source.WriteAt(filled(1, 2), 3*page); err != nil {
		t.Fatal(err)
	}
	under := newDevice(16)
	d, _ := share(t, under)
	d.Blank()
	if err := d.Copy(source); err != nil {
		t.Fatal(err)
	}
	want := filled(0, 16)
	copy(want[3*page:], filled(1, 2))
	hasPages(t, d, want)
}

// Whoever reads beside a guest that writes, and beside a Store for which there is not always room,
// gets what was told before, or something newer.
func TestDeviceAtOnce(t *testing.T) {
	const pages = 64
	under := &stored{device: newDevice(pages)}
	clear(under.data)
	under.write = func(int64, int64) error {
		if rand.IntN(8) == 0 {
			return unix.ENOSPC
		}
		return nil
	}
	d, f := share(t, under)
	var told [pages]atomic.Uint64 // versions of pages
	rounds := need.Rounds(20_000, 1_000_000)
	var stop atomic.Bool
	var writers, others sync.WaitGroup
	for w := range 2 {
		writers.Go(func() {
			b := make([]byte, 8)
			for v := range rounds {
				p := rand.IntN(pages/2)*2 + w
				binary.NativeEndian.PutUint64(b, uint64(v+1))
				if _, err := f.WriteAt(append(b, make([]byte, page-8)...), int64(p*page)); err != nil {
					t.Error(err)
					return
				}
				d.Written(int64(p*page), page)
				told[p].Store(uint64(v + 1))
			}
		})
	}
	others.Go(func() {
		for !stop.Load() {
			_, err := d.Store(t.Context())
			if block.NoRoom(err) {
				err = d.GiveBack()
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 2 {
		others.Go(func() {
			b, before := make([]byte, 4*page), make([]uint64, 4)
			for !stop.Load() {
				p := rand.IntN(pages - 3)
				for i := range before {
					before[i] = told[p+i].Load()
				}
				if _, err := d.ReadAt(b, int64(p*page)); err != nil {
					t.Error(err)
					return
				}
				for i, want := range before {
					if got := binary.NativeEndian.Uint64(b[i*page:]); got < want {
						t.Errorf("page %d is of version %d, after %d was told", p+i, got, want)
						return
					}
				}
			}
		})
	}
	writers.Wait()
	stop.Store(true)
	others.Wait()
	under.write = nil
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	for p := range told {
		if got, want := binary.NativeEndian.Uint64(under.data[p*page:]), told[p].Load(); got != want {
			t.Errorf("page %d was stored as version %d, want %d", p, got, want)
		}
	}
}

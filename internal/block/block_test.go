package block

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"drafter/internal/need"
)

func TestBitmap(t *testing.T) {
	for _, length := range []int64{1, 63, 64, 65, 1000} {
		b, model := NewBitmap(length), make([]bool, length)
		rng := rand.New(rand.NewPCG(1, uint64(length)))
		for range 300 {
			from := rng.Int64N(length)
			end := from + 1 + rng.Int64N(length-from)
			switch rng.IntN(3) {
			case 0:
				b.SetRange(from, end)
				for i := from; i < end; i++ {
					model[i] = true
				}
			case 1:
				if b.Set(from) == model[from] {
					t.Fatal("Set tells wrongly whether it is new")
				}
				model[from] = true
			case 2:
				if b.Clear(from) != model[from] {
					t.Fatal("Clear tells wrongly whether it was there")
				}
				model[from] = false
			}
			has, next := b.Run(from, end)
			want := from
			for want < end && model[want] == model[from] {
				want++
			}
			if has != model[from] || next != want {
				t.Fatalf("Run(%d, %d) is %t, %d; want %t, %d", from, end, has, next, model[from], want)
			}
		}
		var all []int64
		for i, m := range model {
			if m {
				all = append(all, int64(i))
			}
		}
		if got := slices.Collect(b.All()); !slices.Equal(got, all) || b.Count() != int64(len(all)) {
			t.Fatalf("All is %v (%d); want %v", got, b.Count(), all)
		}
		if taken := b.Take(); taken.Count() != int64(len(all)) || b.Count() != 0 {
			t.Error("Take")
		}
	}
}

// No write is lost between the one who marks and the one who takes.
func TestTakeLosesNothing(t *testing.T) {
	d := NewTracker(newMemory(1<<20), 4096)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	seen := NewBitmap(d.Blocks())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				seen.Add(d.Take())
			}
		}
	}()
	for w := range 4 {
		wg.Go(func() {
			for i := w; i < int(d.Blocks()); i += 4 {
				if _, err := d.WriteAt([]byte{1}, int64(i)*4096+7); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	<-done
	seen.Add(d.Take())
	if seen.Count() != d.Blocks() {
		t.Errorf("%d of %d blocks were seen", seen.Count(), d.Blocks())
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	want := bytes.Repeat([]byte("0123456789abcdef"), 10_000)
	if err := os.WriteFile(path, want, 0o644); err != nil {
		t.Fatal(err)
	}
	d, err := OpenFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Trim(5000, 100_000); err != nil {
		t.Fatal(err)
	}
	clear(want[5000:105_000])
	same(t, d, want)
	if start, _, err := d.NextData(8192); err != nil || start < 100_000 {
		t.Errorf("trimmed, but data at %d, %v", start, err)
	}
	shut(t, d)
	d, err = OpenFile(path, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte{1}, 0); !errors.Is(err, ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	if err := d.Trim(0, 1); !errors.Is(err, ErrReadOnly) {
		t.Errorf("trim: %v", err)
	}
	shut(t, d)
	if _, err := OpenFile(t.TempDir(), true); err == nil {
		t.Error("a directory is a device")
	}
}

func TestContents(t *testing.T) {
	paths, content := fixture(t, 3<<20+5)
	c, err := FileContents(t.Context(), paths.Base)
	if err != nil {
		t.Fatal(err)
	}
	for i, id := range c.Blocks {
		if want := HashBlock(content[i*ContentBlockSize : min((i+1)*ContentBlockSize, len(content))]); id != want {
			t.Fatalf("block %d is %s, want %s", i, id, want)
		}
	}
	if HashBlock(make([]byte, 5<<20)) != (ID{}) || HashBlock([]byte{0, 1}) == (ID{}) {
		t.Error("the zero id is that of zeros, and of nothing else")
	}
	// The same content elsewhere has the same id; a single bit makes another.
	other, _ := fixture(t, 3<<20+5)
	c2, err := FileContents(t.Context(), other.Base)
	if err != nil || c2.Device != c.Device {
		t.Errorf("%s, %s, %v", c.Device, c2.Device, err)
	}
	if err := patch(other.Base, 3<<20+4, "\x00"); err != nil {
		t.Fatal(err)
	}
	c2, err = FileContents(t.Context(), other.Base)
	if err != nil || c2.Device == c.Device {
		t.Errorf("a changed file has the same id, %v", err)
	}
	// The cache is used while it fits, and only then.
	cache := contentsPath(paths.Base)
	kept, err := os.ReadFile(cache)
	if err != nil {
		t.Fatal(err)
	}
	for at := range map[int]bool{8: true, 100: true, len(kept) - 1: true} {
		damaged := bytes.Clone(kept)
		damaged[at] ^= 1
		if err := os.WriteFile(cache, damaged, 0o644); err != nil {
			t.Fatal(err)
		}
		if again, err := FileContents(t.Context(), paths.Base); err != nil || again.Device != c.Device {
			t.Errorf("a cache damaged at %d: %v", at, err)
		}
		if now, err := os.ReadFile(cache); err != nil || !bytes.Equal(now, kept) {
			t.Errorf("a damaged cache stays, %v", err)
		}
	}
}

// Requests allocate nothing, whatever layers they touch.
func TestNoAllocations(t *testing.T) {
	paths, _ := fixture(t, 4<<20)
	d := NewTracker(open(t, paths, 64<<10), 64<<10)
	defer shut(t, d)
	p := make([]byte, 1<<20)
	for i := range int64(16) { // every other block is the overlay's
		if _, err := d.WriteAt(p[:64<<10], i*128<<10); err != nil {
			t.Fatal(err)
		}
	}
	allocations := testing.AllocsPerRun(100, func() {
		if _, err := d.ReadAt(p, 1000); err != nil {
			t.Fatal(err)
		}
		if _, err := d.WriteAt(p[:4096], 5000); err != nil {
			t.Fatal(err)
		}
	})
	if allocations > 0 {
		t.Errorf("a read and a write allocate %.0f times", allocations)
	}
}

func BenchmarkHash(b *testing.B) {
	paths, _ := fixture(b, 256<<20)
	d, err := OpenFile(paths.Base, true)
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	b.SetBytes(d.Size())
	for b.Loop() {
		if _, err := Hash(b.Context(), d); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkTrackerWrite(b *testing.B) {
	d := NewTracker(newMemory(64<<20), 64<<10)
	p := make([]byte, 4096)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for off := int64(0); pb.Next(); off = (off + 4096) % (64 << 20) {
			if _, err := d.WriteAt(p, off); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// What is in the page cache is read without waiting, through all layers; what is not here is not.
func TestReadNow(t *testing.T) {
	const size = 16 * PageSize
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i / 1000)
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := OpenFile(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	p := make([]byte, 2*PageSize)
	if !ReadNow(file, p, PageSize) {
		need.Lacks(t, "cached-reads", "this file system does not tell what is in the page cache")
	}
	d := NewIncoming(file, false)
	tracker := NewTracker(d, 64<<10)
	if ReadNow(tracker, p, 0) {
		t.Error("read of a device that is not open")
	}
	missing := NewBitmap(Pages(d))
	missing.Set(5)
	d.Open(missing, func(int64, int64) {}, nil)
	for off, want := range map[int64]bool{0: true, 3 * PageSize: true, 4 * PageSize: false, 5 * PageSize: false, 6 * PageSize: true, 15 * PageSize: false, -1: false} {
		clear(p)
		got := ReadNow(tracker, p, off)
		if got != want || got && !bytes.Equal(p, data[off:off+int64(len(p))]) {
			t.Errorf("read at %d: %t, %x…", off, got, p[:8])
		}
	}
	d.Abandon()
}

// A device of zeros has the content id of a file of zeros.
func TestZeros(t *testing.T) {
	for _, size := range []int64{1, ContentBlockSize, 5*ContentBlockSize + 7, 40 << 20} {
		z := NewZeros(size)
		c, err := Hash(t.Context(), z)
		want, zerr := ZerosID(t.Context(), size)
		if err != nil || zerr != nil || c.Device != want {
			t.Errorf("%d bytes: %s, %v; want %s, %v", size, c.Device, err, want, zerr)
		}
	}
}

// Who takes the dirty pages, and then those of a watch, misses none that is not dirty again.
func TestWatchAfterTake(t *testing.T) {
	const pages = 1 << 16
	d := NewTracker(NewZeros(pages*PageSize), PageSize)
	w := d.Watch()
	defer w.Close()
	for range need.Rounds(60, 3000) {
		done := make(chan struct{})
		go func() {
			d.mark(0, pages*PageSize)
			close(done)
		}()
		time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond) // at any moment
		d.Take()
		watched := w.Take()
		<-done
		dirty, later := d.Take(), w.Take()
		for page := range later.All() {
			if !watched.Has(page) && !dirty.Has(page) {
				t.Fatalf("page %d is neither among those that were watched nor dirty", page)
			}
		}
	}
}

// A run is never empty, also while its first number is set and cleared: who goes on behind it would
// go backwards.
func TestRunOfChangingBitmap(t *testing.T) {
	b := NewBitmap(1000)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				b.Set(70)
				b.ClearRange(70, 71)
			}
		}
	}()
	for range 2_000_000 {
		if _, next := b.Run(70, 1000); next <= 70 {
			t.Errorf("the run of 70 ends at %d", next)
			break
		}
	}
	close(stop)
	<-done
}

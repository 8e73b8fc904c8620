package block

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"drafter/internal/need"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a base file with some data and some holes, and the paths of an overlay over it.
func fixture(t testing.TB, size int64) (paths OverlayPaths, content []byte) {
	t.Helper()
	dir := t.TempDir()
	paths = OverlayPaths{Base: filepath.Join(dir, "base"), Overlay: filepath.Join(dir, "overlay"), State: filepath.Join(dir, "state")}
	content = make([]byte, size)
	f, err := os.Create(paths.Base)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rng := rand.New(rand.NewPCG(1, 2))
	for off := int64(0); off < size; off += 96 << 10 {
		p := content[off:min(off+int64(rng.IntN(96<<10)), size)]
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return paths, content
}

func open(t testing.TB, paths OverlayPaths, blockSize int64) *Overlay {
	t.Helper()
	o, err := tryOpen(t, paths, blockSize)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// checkOverlay is Check over the base's file.
func checkOverlay(t testing.TB, paths OverlayPaths) ([]string, error) {
	t.Helper()
	c, err := FileContents(t.Context(), paths.Base)
	if err != nil {
		return nil, err
	}
	base, err := OpenFile(paths.Base, true)
	if err != nil {
		return nil, err
	}
	return Check(t.Context(), base, c.Device, paths)
}

func tryOpen(t testing.TB, paths OverlayPaths, blockSize int64) (*Overlay, error) {
	t.Helper()
	c, err := FileContents(t.Context(), paths.Base)
	if err != nil {
		t.Fatal(err)
	}
	base, err := OpenFile(paths.Base, true)
	if err != nil {
		t.Fatal(err)
	}
	return OpenOverlay(base, c.Device, paths, blockSize)
}

func shut(t testing.TB, d Device) {
	t.Helper()
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		t.Fatal(err)
	}
}

func same(t testing.TB, d Device, want []byte) {
	t.Helper()
	got := make([]byte, d.Size())
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %d is %#x, want %#x", i, got[i], want[i])
		}
	}
	// What NextData calls zeros is zeros.
	for off := int64(0); off < d.Size(); {
		start, end, err := NextData(d, off)
		if err != nil {
			t.Fatal(err)
		}
		if !IsZero(want[off:start]) {
			t.Fatalf("NextData(%d) is %d, but there is data in between", off, start)
		}
		if start == d.Size() {
			break
		}
		if end <= start {
			t.Fatalf("NextData(%d) is an empty range at %d", off, start)
		}
		off = end
	}
}

// Random concurrent operations, of many writers within the same blocks, against a plain array of
// bytes, with two overlays stacked and a tracker on top.
func TestModel(t *testing.T) {
	const (
		size      = 6<<20 + 700 // the last block is short
		blockSize = 16 << 10
		workers   = 8
		piece     = 512 // the unit of ownership: workers share blocks, never bytes
		rounds    = 6
	)
	operations := need.Rounds(1<<16, 1<<23) / (workers * rounds)
	lower, model := fixture(t, size)
	upper := OverlayPaths{Base: lower.Overlay, Overlay: lower.Overlay + "2", State: lower.State + "2"}
	for round := range rounds {
		under := open(t, lower, 4<<10)
		var device Device = under
		if round >= 2 { // the first rounds fill the lower overlay
			o, err := OpenOverlay(under, ID{1}, upper, blockSize)
			if err != nil {
				t.Fatal(err)
			}
			device = o
		}
		same(t, device, model)
		before := bytes.Clone(model)
		d := NewTracker(device, blockSize)
		taken := NewBitmap(Pages(d))
		var lock sync.Mutex // guards taken
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(round), uint64(w)))
				buf := make([]byte, 256<<10)
				for i := range operations {
					off, length := owned(rng, w, workers, piece, size)
					p, mine := buf[:length], model[off:off+length]
					switch k := rng.IntN(1000); {
					case k < 450:
						binary.LittleEndian.PutUint64(buf, rng.Uint64())
						for i := 8; i < len(p); i *= 2 {
							copy(p[i:], p[:i])
						}
						if _, err := d.WriteAt(p, off); err != nil {
							t.Error(err)
							return
						}
						copy(mine, p)
					case k < 950:
						if _, err := d.ReadAt(p, off); err != nil || !bytes.Equal(p, mine) {
							t.Errorf("round %d, worker %d: read of %d at %d differs, %v", round, w, length, off, err)
							return
						}
					case k < 998:
						if err := d.Trim(off, length); err != nil {
							t.Error(err)
							return
						}
						clear(mine)
					default:
						blocks := d.Take()
						lock.Lock()
						taken.Add(blocks)
						lock.Unlock()
						if i%16 == 0 { // a disk is slow
							if err := d.Sync(); err != nil {
								t.Error(err)
								return
							}
						}
					}
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
		taken.Add(d.Take())
		for page := range Pages(d) {
			from, end := page*PageSize, min((page+1)*PageSize, size)
			if !bytes.Equal(before[from:end], model[from:end]) && (!taken.Has(page) || d.LastWrite(from/blockSize).IsZero()) {
				t.Fatalf("page %d changed, and the tracker does not know", page)
			}
		}
		same(t, d, model)
		shut(t, d)
	}
	if problems, err := checkOverlay(t, lower); err != nil || len(problems) > 0 {
		t.Errorf("check: %v, %v", problems, err)
	}
}

// owned picks a range of worker w: in the first half of the device small interleaved pieces, in the
// second half large ranges.
func owned(rng *rand.Rand, w, workers, piece int, size int64) (off, length int64) {
	half := size / 2 / int64(piece*workers) * int64(piece*workers)
	if rng.IntN(8) > 0 {
		slots := half / int64(piece*workers)
		off = (rng.Int64N(slots)*int64(workers) + int64(w)) * int64(piece)
		a, b := rng.Int64N(int64(piece)+1), rng.Int64N(int64(piece)+1)
		return off + min(a, b), max(a, b) - min(a, b)
	}
	share := (size - half) / int64(workers)
	from, end := half+int64(w)*share, half+int64(w+1)*share
	if w == workers-1 {
		end = size
	}
	off = from + rng.Int64N(end-from)
	return off, min(rng.Int64N(256<<10), end-off)
}

// Many write parts of the same block at the same moment, when the overlay does not hold it yet.
func TestConcurrentCopyUp(t *testing.T) {
	const size, blockSize, writers = 32 << 20, 64 << 10, 8
	paths, model := fixture(t, size)
	o := open(t, paths, blockSize)
	for block := range int64(size / blockSize) {
		var wg sync.WaitGroup
		start := make(chan struct{})
		for w := range int64(writers) {
			p := bytes.Repeat([]byte{byte(block), byte(w)}, 100)
			off := block*blockSize + w*(blockSize/writers) + block%7
			copy(model[off:], p)
			wg.Go(func() {
				<-start
				if _, err := o.WriteAt(p, off); err != nil {
					t.Error(err)
				}
			})
		}
		close(start)
		wg.Wait()
	}
	same(t, o, model)
	shut(t, o)
}

func TestOverlayLeavesBaseAlone(t *testing.T) {
	paths, content := fixture(t, 1<<20)
	o := open(t, paths, 64<<10)
	if _, err := o.WriteAt([]byte("hello"), 100); err != nil {
		t.Fatal(err)
	}
	if err := o.Trim(128<<10, 256<<10); err != nil {
		t.Fatal(err)
	}
	if got := o.Present().Count(); got != 5 {
		t.Errorf("%d blocks present, want 5", got)
	}
	shut(t, o)
	after, err := os.ReadFile(paths.Base)
	if err != nil || !bytes.Equal(after, content) {
		t.Errorf("the base changed, %v", err)
	}
	copy(content[100:], "hello")
	clear(content[128<<10 : 384<<10])
	o = open(t, paths, 64<<10)
	same(t, o, content)
	shut(t, o)
}

// What a killed writer wrote and did not sync is gone as a whole, and leaves no bytes to shine
// through later.
func TestUnsyncedIsDiscarded(t *testing.T) {
	paths, content := fixture(t, 1<<20)
	o := open(t, paths, 64<<10)
	if _, err := o.WriteAt(bytes.Repeat([]byte{7}, 64<<10), 0); err != nil {
		t.Fatal(err)
	}
	if err := o.Sync(); err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt(bytes.Repeat([]byte{8}, 200<<10), 300<<10); err != nil {
		t.Fatal(err)
	}
	if err := o.Close(); err != nil { // as kill -9: no sync
		t.Fatal(err)
	}
	copy(content, bytes.Repeat([]byte{7}, 64<<10))
	o = open(t, paths, 64<<10)
	same(t, o, content)
	if _, err := o.WriteAt([]byte{9}, 400<<10); err != nil {
		t.Fatal(err)
	}
	content[400<<10] = 9
	same(t, o, content)
	shut(t, o)
}

func TestOutOfRange(t *testing.T) {
	paths, content := fixture(t, 100_000)
	o := open(t, paths, 4096)
	defer shut(t, o)
	tracker := NewTracker(o, 4096)
	for _, tt := range []struct{ off, length int64 }{{-1, 1}, {99_999, 2}, {100_000, 1}, {1 << 62, 100}, {-1 << 62, 1}} {
		p := make([]byte, tt.length)
		for name, err := range map[string]error{
			"read":  second(o.ReadAt(p, tt.off)),
			"write": second(tracker.WriteAt(p, tt.off)),
			"trim":  tracker.Trim(tt.off, tt.length),
		} {
			if !errors.Is(err, ErrRange) {
				t.Errorf("%s of %d at %d: %v", name, tt.length, tt.off, err)
			}
		}
	}
	if err := o.Trim(0, -1); !errors.Is(err, ErrRange) {
		t.Errorf("negative length: %v", err)
	}
	if tracker.Dirty() != 0 {
		t.Error("a refused write marks")
	}
	same(t, o, content)
}

func second(_ int, err error) error { return err }

func TestRefusals(t *testing.T) {
	for name, tt := range map[string]struct {
		damage func(p OverlayPaths) error
		want   string
	}{
		"base changed":        {func(p OverlayPaths) error { return patch(p.Base, 5000, "x") }, "its content has changed"},
		"base longer":         {func(p OverlayPaths) error { return os.Truncate(p.Base, 2<<20) }, "a base of 1048576 bytes"},
		"state missing":       {func(p OverlayPaths) error { return os.Remove(p.State) }, "is missing; restore it"},
		"overlay missing":     {func(p OverlayPaths) error { return os.Remove(p.Overlay) }, "is missing; restore it"},
		"state truncated":     {func(p OverlayPaths) error { return os.Truncate(p.State, 5000) }, "has 5000 bytes instead of"},
		"state empty":         {func(p OverlayPaths) error { return os.Truncate(p.State, 0) }, "truncated to 0"},
		"state of another":    {func(p OverlayPaths) error { return patch(p.State, 0, "Dollar50") }, "magic number"},
		"state header":        {func(p OverlayPaths) error { return patch(p.State, 30, "x") }, "header is damaged"},
		"state newer version": {func(p OverlayPaths) error { return reseal(p.State, 8, 2) }, "version 2"},
		"both copies":         {func(p OverlayPaths) error { return errors.Join(patch(p.State, 5000, "x"), patch(p.State, 9000, "x")) }, "damaged in both copies"},
		"overlay truncated":   {func(p OverlayPaths) error { return os.Truncate(p.Overlay, 1<<20) }, "bytes instead of"},
		"overlay trailer":     {func(p OverlayPaths) error { return patch(p.Overlay, 1<<20, "x") }, "trailer is damaged"},
		"overlay of another instance": {func(p OverlayPaths) error {
			return os.WriteFile(p.Overlay, append(make([]byte, 1<<20), overlayTrailer([16]byte{1})...), 0o644)
		}, "different instances"},
	} {
		t.Run(name, func(t *testing.T) {
			paths, _ := fixture(t, 1<<20)
			o := open(t, paths, 64<<10)
			if _, err := o.WriteAt([]byte("x"), 1000); err != nil {
				t.Fatal(err)
			}
			shut(t, o)
			if err := tt.damage(paths); err != nil {
				t.Fatal(err)
			}
			if o, err := tryOpen(t, paths, 64<<10); err == nil {
				o.Close()
				t.Fatal("accepted")
			} else if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want %q", err, tt.want)
			}
			if problems, err := checkOverlay(t, paths); err != nil || len(problems) == 0 {
				t.Errorf("check finds %v, %v", problems, err)
			}
		})
	}
	paths, _ := fixture(t, 1<<20)
	shut(t, open(t, paths, 64<<10))
	o := open(t, paths, 4096)
	if o.BlockSize() != 64<<10 {
		t.Errorf("an overlay of blocks of 64 KiB has blocks of %d bytes", o.BlockSize())
	}
	shut(t, o)
	// A base that was touched or copied has the same content still.
	if err := exchange(paths.Base); err != nil {
		t.Fatal(err)
	}
	shut(t, open(t, paths, 64<<10))
	// One user at a time.
	o = open(t, paths, 64<<10)
	if _, err := tryOpen(t, paths, 64<<10); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second user: %v", err)
	}
	shut(t, o)
	// Somebody's file is no overlay, however small.
	theirs := OverlayPaths{Base: paths.Base, Overlay: filepath.Join(t.TempDir(), "note"), State: filepath.Join(t.TempDir(), "state")}
	if err := os.WriteFile(theirs.Overlay, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := tryOpen(t, theirs, 64<<10); err == nil || !strings.Contains(err.Error(), "is no overlay") {
		t.Errorf("somebody's file: %v", err)
	}
	if b, err := os.ReadFile(theirs.Overlay); err != nil || string(b) != "mine" {
		t.Errorf("it holds %q, %v", b, err)
	}
	// An interrupted creation is begun anew.
	if err := os.Remove(paths.State); err != nil {
		t.Fatal(err)
	}
	shut(t, open(t, paths, 64<<10))
}

func patch(path string, off int64, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(text), off)
	return errors.Join(err, f.Close())
}

func reseal(path string, off int64, value byte) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	b[off] = value
	sealed(b[:pageSize], headerChecksum)
	return os.WriteFile(path, b, 0o644)
}

func exchange(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(path+".new", b, 0o644), os.Rename(path+".new", path))
}

// A write or sync that fails is not seen, and a failed sync is never forgotten.
func TestFailures(t *testing.T) {
	const size, blockSize = 1 << 20, 64 << 10
	base, data := newMemory(size), newMemory(size)
	for i := range base.bytes {
		base.bytes[i] = byte(i >> 8)
	}
	h := &stateHeader{blockSize: blockSize, size: size}
	state := &memory{bytes: initialState(h)}
	s, err := readState(state)
	if err != nil {
		t.Fatal(err)
	}
	o := newOverlay(base, data, s)
	want := bytes.Clone(base.bytes)
	// Each of the writes that one write causes fails once: head, tail, data.
	for fail := range 3 {
		data.failWrite = fail + 1
		if _, err := o.WriteAt(bytes.Repeat([]byte{0xff}, 70<<10), 10<<10); err == nil {
			t.Fatalf("write %d failed and nobody said so", fail)
		}
		same(t, o, want)
		if !IsZero(data.bytes) {
			t.Fatalf("write %d failed and left data of blocks that are the base's", fail)
		}
	}
	data.failSync = errors.New("disk is broken")
	if err := o.Sync(); !errors.Is(err, data.failSync) {
		t.Errorf("first sync: %v", err)
	}
	broken := data.failSync
	data.failSync = nil
	if err := o.Sync(); !errors.Is(err, broken) {
		t.Errorf("a later sync: %v", err)
	}
}

// memory is a device in memory that can fail, and that can log what happens to it.
type memory struct {
	bytes     []byte
	failWrite int // the n-th write from now fails after half of its bytes
	failSync  error
	log       func(event)
	onSync    func() // called in a Sync, before and after what was written until then is durable
}

func newMemory(size int64) *memory { return &memory{bytes: make([]byte, size)} }

func (m *memory) Size() int64 { return int64(len(m.bytes)) }

func (m *memory) ReadAt(p []byte, off int64) (int, error) { return copy(p, m.bytes[off:]), nil }

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if m.failWrite > 0 {
		if m.failWrite--; m.failWrite == 0 {
			return copy(m.bytes[off:], p[:len(p)/2]), errors.New("write failed")
		}
	}
	if m.log != nil {
		m.log(event{off: off, data: bytes.Clone(p)})
	}
	return copy(m.bytes[off:], p), nil
}

func (m *memory) Trim(off, length int64) error {
	if m.log != nil {
		m.log(event{off: off, data: make([]byte, length)})
	}
	clear(m.bytes[off : off+length])
	return nil
}

// NextData knows holes of 4 KiB, as file systems do.
func (m *memory) NextData(off int64) (start, end int64, err error) {
	const unit = 4096
	size := m.Size()
	for start = off / unit * unit; start < size && IsZero(m.bytes[start:min(start+unit, size)]); start += unit {
	}
	if start >= size {
		return size, size, nil
	}
	for end = start; end < size && !IsZero(m.bytes[end:min(end+unit, size)]); end += unit {
	}
	return max(start, off), min(end, size), nil
}

func (m *memory) Sync() error {
	if m.failSync == nil && m.log != nil {
		m.onSync()
		m.log(event{sync: true})
		m.onSync()
	}
	return m.failSync
}

func (m *memory) Close() error { return nil }

// event is one thing that happened to a file.
type event struct {
	file int
	sync bool
	off  int64
	data []byte
}

func BenchmarkOverlay(b *testing.B) {
	for _, blockSize := range []int64{4 << 10, 64 << 10} {
		for _, request := range []int{4 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("block=%dK/request=%dK", blockSize>>10, request>>10), func(b *testing.B) {
				const size = 256 << 20
				paths, _ := fixture(b, size)
				o := open(b, paths, blockSize)
				defer shut(b, o)
				p := make([]byte, request)
				b.SetBytes(int64(request))
				b.ReportAllocs()
				rng := rand.New(rand.NewPCG(1, 1))
				for b.Loop() {
					off := rng.Int64N(size/int64(request)) * int64(request)
					if _, err := o.WriteAt(p, off); err != nil {
						b.Fatal(err)
					}
					if _, err := o.ReadAt(p, off); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

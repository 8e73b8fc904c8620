package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"drafter/internal/block"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// buffer is a stream in memory.
type buffer struct{ bytes.Buffer }

func (*buffer) Close() error { return nil }

var testSizes = []int64{10*block.PageSize - 100, 4 << 20}

func pages(total int64, set ...int64) *block.Bitmap {
	b := block.NewBitmap(total)
	for _, p := range set {
		b.Set(p)
	}
	return b
}

func messages() []any {
	id := uuid.MustParse("0a0b0c0d-0000-4000-8000-000000000001")
	return []any{
		Hello{Version: 1, Lane: Demand, Resume: true, Migration: id, Features: 5},
		Manifest{Features: 1, Config: []byte(`{"a":1}`), Processor: []byte(`{}`), Generation: id, Devices: []Device{
			{Name: "memory", Size: testSizes[0], BlockSize: 4096, NeedsBase: true, Base: block.ID{1, 2}}, {Name: "disk", Size: testSizes[1], BlockSize: 65536, Absent: true, Open: true, Backup: block.ID{3}},
		}},
		Manifest{Features: FeatureLanding, Departure: []byte("{}"), Devices: []Device{{Name: "memory", Size: testSizes[0], BlockSize: 4096}}},
		Manifest{Features: FeatureSignature, Signature: []byte("signed"), Devices: []Device{{Name: "memory", Size: testSizes[0], BlockSize: 4096}}},
		Accept{Held: []Held{HoldsBackup, Unwanted}, Landing: []byte(`{}`)}, Accept{Held: []Held{HoldsBase | TakesFile}},
		Want{Device: 1, First: 3, Ends: 9},
		Cycle{Number: 3, Bytes: 1 << 40},
		TypeReady,
		State{Final: 1 << 20},
		Handed{Device: 1, Pages: pages(1024, 0, 1, 1000)},
		Authority{Paused: time.Second, Missing: []*block.Bitmap{pages(10, 0, 1, 9), pages(1024)}},
		Ack{Accepted: true}, Ack{Reason: "no"},
		Resume{Outcome: Accepted, Missing: []*block.Bitmap{pages(10), pages(1024, 7, 1023)}},
		TypeComplete, TypeReleased, TypePing, TypePrepare,
		Progress{Cycle: 9},
		Snapshot{Paused: 5 * time.Millisecond},
		Contents{Device: 1, First: 3, Blocks: []block.ID{{1}, {}, {2, 3}}},
		Operation{Device: 1, ID: 7, Kind: Write, Off: 4096, Length: 3, Data: []byte("abc")},
		Operation{Device: 1, ID: 8, Kind: Read, Off: 1, Length: 100, Data: []byte{}},
		Operation{Device: 0, ID: 9, Kind: Trim, Length: testSizes[0], Data: []byte{}},
		Result{ID: 7, Data: []byte("read")},
		Result{ID: 8, Failed: true, Data: []byte("why")},
		Error{Code: CodeBusy, Text: "busy"},
	}
}

// Every message comes out as it went in.
func TestMessages(t *testing.T) {
	for _, want := range messages() {
		var b buffer
		c := NewConn(&b)
		if err := c.Send(want); err != nil {
			t.Fatal(err)
		}
		f, err := c.Read()
		if err != nil {
			t.Fatalf("%T: %v", want, err)
		}
		got, err := Decode(f, testSizes)
		if err != nil || !reflect.DeepEqual(normal(got), normal(want)) {
			t.Errorf("%T: %+v, %v; want %+v", want, got, err, want)
		}
	}
}

// normal replaces sets by what they hold.
func normal(m any) any {
	sets := func(bs []*block.Bitmap) (all [][]int64) {
		for _, b := range bs {
			list := []int64{b.Len()}
			for p := range b.All() {
				list = append(list, p)
			}
			all = append(all, list)
		}
		return all
	}
	switch m := m.(type) {
	case Authority:
		return []any{m.Paused, sets(m.Missing)}
	case Resume:
		return []any{m.Outcome, sets(m.Missing)}
	}
	return m
}

// Extents come out as they went in, in every encoding, the last and short page of a device too.
func TestExtents(t *testing.T) {
	d, err := NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer encoder.Close()
	var stream buffer
	c := NewConn(&stream)
	b := NewExtentBuffer()
	data := b.Data()[:testSizes[0]]
	for i := range data {
		data[i] = byte(i / 700)
	}
	want := bytes.Clone(data)
	if n := b.Compress(encoder, 0, testSizes[0]); int64(n) >= testSizes[0] {
		t.Fatal("it does not compress")
	}
	if err := errors.Join(
		c.SendCompressed(b, 0, 0, testSizes[0], Soon),
		c.SendExtent(b, 0, 0, Raw, 0, testSizes[0], Soon),
		c.SendExtent(b, 9*block.PageSize, 0, Raw, 9*block.PageSize, block.PageSize-100, Urgent),
		c.SendExtent(b, 0, 1, Zero, 8192, 4<<20-8192, Soon),
		c.SendExtent(b, 0, 1, Same, 0, 4096, Soon),
	); err != nil {
		t.Fatal(err)
	}
	for i, tt := range []Extent{
		{0, Raw, 0, testSizes[0], want}, {0, Raw, 0, testSizes[0], want}, {0, Raw, 9 * block.PageSize, block.PageSize - 100, want[9*block.PageSize:]},
		{1, Zero, 8192, 4<<20 - 8192, nil}, {1, Same, 0, 4096, nil},
	} {
		f, err := c.Read()
		if err != nil {
			t.Fatal(err)
		}
		e, err := d.Extent(f, testSizes)
		if err != nil || e.Device != tt.Device || e.Encoding != tt.Encoding || e.Off != tt.Off || e.Len != tt.Len || !bytes.Equal(e.Data, tt.Data) {
			t.Errorf("extent %d: device %d, %s, %d at %d, %v", i, e.Device, e.Encoding, e.Len, e.Off, err)
		}
	}
}

// A set of pages that is too scattered for its limit comes out larger, never smaller.
func TestPageSets(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 300 {
		total := rng.Int64N(5000) + 1
		set := block.NewBitmap(total)
		for range rng.Int64N(total) {
			set.Set(rng.Int64N(total))
		}
		limit := 64 + rng.IntN(2000)
		b := AppendPages(nil, set, limit)
		if len(b) > limit {
			t.Fatalf("round %d: %d bytes, limit %d", round, len(b), limit)
		}
		r := &reader{b: b}
		got := r.pages(total)
		if r.err != nil || len(r.b) > 0 {
			t.Fatalf("round %d: %v, %d bytes left", round, r.err, len(r.b))
		}
		for p := range set.All() {
			if !got.Has(p) {
				t.Fatalf("round %d: page %d is lost", round, p)
			}
		}
		if exact := AppendPages(nil, set, 1<<20); len(exact) <= limit && got.Count() != set.Count() {
			t.Fatalf("round %d: %d pages became %d without need", round, set.Count(), got.Count())
		}
	}
}

// A damaged frame, in whichever bit, is refused.
func TestDamage(t *testing.T) {
	var b buffer
	c := NewConn(&b)
	if err := c.Send(messages()[0]); err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(b.Bytes())
	for bit := range len(whole) * 8 {
		damaged := bytes.Clone(whole)
		damaged[bit/8] ^= 1 << (bit % 8)
		var s buffer
		s.Write(damaged)
		if _, err := NewConn(&s).Read(); err == nil {
			t.Errorf("bit %d does not matter", bit)
		}
	}
}

// What a frame announces is not allocated before it comes.
func TestAnnouncedLength(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, tt := range []struct {
		kind   Type
		length uint32
		want   string
	}{
		{TypeHello, 257, "256 are allowed"}, {TypeAuthority, 1 << 31, "are allowed"}, {TypeAuthority, maxList, "EOF"}, {99, 0, "unknown"}, {TypeExtent, MaxExtent + 13, "are allowed"},
	} {
		h := make([]byte, headerSize)
		binary.LittleEndian.PutUint32(h, tt.length)
		h[4] = byte(tt.kind)
		var s buffer
		s.Write(h)
		if _, err := NewConn(&s).Read(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s of %d bytes: %v", tt.kind, tt.length, err)
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
		t.Errorf("%d bytes were allocated for nothing", n)
	}
}

// counter is a stream in memory that counts what is written.
type counter struct {
	buffer
	writes int
}

func (c *counter) Write(p []byte) (int, error) {
	c.writes++
	return c.buffer.Write(p)
}

// Small frames that may wait go together, in order, and before whatever is sent after them.
func TestLater(t *testing.T) {
	s := &counter{}
	c := NewConn(s)
	send := func(device int, pages int64, when Urgency) {
		t.Helper()
		if err := c.SendExtent(NewExtentBuffer(), 0, device, Raw, 0, pages*block.PageSize, when); err != nil {
			t.Fatal(err)
		}
	}
	var want []int
	for i, step := range []struct {
		do     func()
		sends  []int
		writes int // so far
	}{
		{func() { send(1, 1, Later); send(2, 3, Later) }, []int{1, 2}, 0},
		{func() { _ = c.Flush(); _ = c.Flush() }, nil, 1},
		{func() { send(3, 1, Later); send(4, 4, Later) }, []int{3, 4}, 3}, // the second is too large to wait
		{func() { send(5, 1, Later); send(6, 1, Soon) }, []int{5, 6}, 5},
		{func() { send(7, 1, Later); send(8, 1, Urgent) }, []int{7, 8}, 7},
		{func() {
			for range maxBatch/(4*block.PageSize) + 1 {
				send(9, 3, Later)
			}
		}, []int{9, 9, 9, 9, 9}, 7},
		{func() { send(10, 3, Later); send(11, 1, Later) }, []int{10, 11}, 8}, // more than goes together
		{func() { _ = c.Flush() }, nil, 9},
	} {
		step.do()
		want = append(want, step.sends...)
		if s.writes != step.writes {
			t.Errorf("after step %d there were %d writes, not %d", i, s.writes, step.writes)
		}
	}
	r := NewConn(&s.buffer)
	for i, device := range want {
		f, err := r.Read()
		if err != nil || f.Type != TypeExtent || int(f.Device) != device {
			t.Fatalf("frame %d is %s of device %d, %v; it should be of device %d", i, f.Type, f.Device, err, device)
		}
	}
}

// An urgent frame does not wait for more than the one that is being sent.
func TestUrgentOvertakes(t *testing.T) {
	ours, theirs := net.Pipe()
	c, r := NewConn(ours), NewConn(theirs)
	defer c.Close()
	const background = 20
	done := make(chan error, background+1)
	for range background {
		go func() {
			b := NewExtentBuffer()
			done <- c.SendExtent(b, 0, 1, Raw, 0, MaxExtent, Soon)
		}()
	}
	time.Sleep(10 * time.Millisecond) // all wait now, where nobody can see it
	go func() { done <- c.Send(Want{Device: 0, First: 0, Ends: 1}) }()
	time.Sleep(10 * time.Millisecond) // and so does what is urgent
	for i := range background + 1 {
		f, err := r.Read()
		if err != nil {
			t.Fatal(err)
		}
		if f.Type == TypeWant {
			if i > 2 {
				t.Errorf("it came as number %d", i)
			}
			break
		}
	}
	go io.Copy(io.Discard, theirs)
	for range background + 1 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	theirs.Close()
}

func BenchmarkExtent(b *testing.B) {
	ours, theirs := net.Pipe()
	c, r := NewConn(ours), NewConn(theirs)
	go func() {
		buf := NewExtentBuffer()
		for c.SendExtent(buf, 0, 1, Raw, 0, MaxExtent, Soon) == nil {
		}
	}()
	d, err := NewDecoder()
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	b.SetBytes(MaxExtent)
	b.ReportAllocs()
	for b.Loop() {
		f, err := r.Read()
		if err != nil {
			b.Fatal(err)
		}
		if _, err := d.Extent(f, testSizes); err != nil {
			b.Fatal(err)
		}
	}
	c.Close()
}

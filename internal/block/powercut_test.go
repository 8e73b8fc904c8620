package block

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"drafter/internal/need"
)

// A power cut is tried at every point of a long run: of what was not yet synced, each file keeps
// any part, sector by sector. What opens then must hold in every sector a value that the sector had
// at the last completed Sync of the device, or got later.
func TestPowerCut(t *testing.T) {
	const cutsPerRun = 400
	for seed := range uint64(need.Rounds(2, 64)) {
		r := record(t, seed)
		rng := rand.New(rand.NewPCG(seed, 99))
		for i := range cutsPerRun {
			cut := len(r.events) * (i + 1) / cutsPerRun
			r.verify(t, cut, rng)
		}
	}
}

const (
	sector       = 512
	powerSize    = 300<<10 + sector // the last block is short
	powerBlock   = 8 << 10
	powerSectors = powerSize / sector
)

// recording is all that happened to overlay (file 0) and state file (file 1) of a device, and what
// was written to the device.
type recording struct {
	header  *stateHeader
	base    *memory
	events  []event
	history [powerSectors][]version
	syncs   []int // number of events when each Sync of the device began, paired with when it returned
	ends    []int
}

// version is what a sector got from one write: number, repeated; 0 is zeros. It was written while
// events had the length at.
type version struct {
	at     int
	number uint64
}

func record(t *testing.T, seed uint64) *recording {
	t.Helper()
	r := &recording{base: newMemory(powerSize), header: &stateHeader{blockSize: powerBlock, size: powerSize, id: [16]byte{byte(seed)}}}
	next := uint64(1)
	for s := range powerSectors {
		if s%50 < 30 { // the base has holes
			number(r.base.bytes[s*sector:][:sector], next)
			r.history[s] = []version{{-1, next}}
			next++
		} else {
			r.history[s] = []version{{-1, 0}}
		}
	}
	log := func(file int) func(event) {
		return func(e event) {
			e.file = file
			r.events = append(r.events, e)
		}
	}
	data, state := newMemory(powerSize), &memory{bytes: initialState(r.header)}
	data.log, state.log = log(0), log(1)
	s, err := readState(state)
	if err != nil {
		t.Fatal(err)
	}
	o := newOverlay(r.base, data, s)
	rng := rand.New(rand.NewPCG(seed, 1))
	change := func() {
		first := rng.IntN(powerSectors)
		count := 1 + rng.IntN(min(40, powerSectors-first))
		if rng.IntN(100) < 15 {
			for i := range count {
				r.history[first+i] = append(r.history[first+i], version{len(r.events), 0})
			}
			if err := o.Trim(int64(first*sector), int64(count*sector)); err != nil {
				t.Fatal(err)
			}
			return
		}
		p := make([]byte, count*sector)
		for i := range count {
			number(p[i*sector:][:sector], next)
			r.history[first+i] = append(r.history[first+i], version{len(r.events), next})
			next++
		}
		if _, err := o.WriteAt(p, int64(first*sector)); err != nil {
			t.Fatal(err)
		}
	}
	// Writes go on while a sync is under way.
	data.onSync, state.onSync = change, change
	for range 500 {
		if rng.IntN(100) < 85 {
			change()
			continue
		}
		r.syncs = append(r.syncs, len(r.events))
		if err := o.Sync(); err != nil {
			t.Fatal(err)
		}
		r.ends = append(r.ends, len(r.events))
	}
	return r
}

func number(p []byte, n uint64) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], n)
	}
}

// verify cuts the power after cut events.
func (r *recording) verify(t *testing.T, cut int, rng *rand.Rand) {
	t.Helper()
	data, state := newMemory(powerSize), &memory{bytes: initialState(r.header)}
	files := []*memory{data, state}
	synced := []int{0, 0} // events of a file before this are on its disk
	for i, e := range r.events[:cut] {
		if e.sync {
			synced[e.file] = i
		}
	}
	mode := rng.IntN(4) // nothing of what is not synced, all of it, any writes, any sectors
	for i, e := range r.events[:cut] {
		if e.sync {
			continue
		}
		if i < synced[e.file] || mode == 1 || mode == 2 && rng.IntN(2) == 0 {
			copy(files[e.file].bytes[e.off:], e.data)
			continue
		}
		// Of the state file, whose pages promise to survive it, any few bytes.
		unit := []int{sector, 16}[e.file]
		for off := 0; mode == 3 && off < len(e.data); off += unit {
			if rng.IntN(2) == 0 {
				copy(files[e.file].bytes[int(e.off)+off:], e.data[off:min(off+unit, len(e.data))])
			}
		}
	}
	s, err := readState(state)
	if err != nil {
		t.Fatalf("cut after %d of %d events: %v", cut, len(r.events), err)
	}
	o := newOverlay(r.base, data, s)
	if err := o.discardUncommitted(); err != nil {
		t.Fatal(err)
	}
	durable := -1 // number of events when the last completed Sync began
	for i, end := range r.ends {
		if end <= cut {
			durable = r.syncs[i]
		}
	}
	got := make([]byte, powerSize)
	if _, err := o.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for s := range powerSectors {
		if err := allowed(r.history[s], got[s*sector:][:sector], durable, cut); err != nil {
			t.Fatalf("cut after %d of %d events (mode %d), sector %d: %v", cut, len(r.events), mode, s, err)
		}
	}
}

// allowed tells whether a sector may read so: as the last write before durable left it, or any
// write after that and before cut.
func allowed(history []version, got []byte, durable, cut int) error {
	n := binary.LittleEndian.Uint64(got)
	for i := 8; i < len(got); i += 8 {
		if m := binary.LittleEndian.Uint64(got[i:]); m != n {
			return fmt.Errorf("it is neither old nor new: %d and %d", n, m)
		}
	}
	var numbers []uint64
	for _, v := range history {
		if v.at < durable || v.at == -1 {
			numbers = numbers[:0] // an earlier version is gone
		}
		// A write that begins with as many events as the cut has not begun.
		if v.at < cut || len(numbers) == 0 {
			numbers = append(numbers, v.number)
		}
	}
	if !slices.Contains(numbers, n) {
		return fmt.Errorf("it holds %d; only %v are possible", n, numbers)
	}
	return nil
}

// A state file of a huge device takes no memory for what is not in it.
func TestHugeState(t *testing.T) {
	h := &stateHeader{blockSize: 4096, size: 1 << 56, id: [16]byte{1}}
	if s, err := readState(&hole{h.encode(), h.fileSize()}); err == nil || !strings.Contains(err.Error(), "damaged in both copies") {
		t.Errorf("%v, %v", s, err)
	}
}

// hole is a file with nothing but zeros behind its beginning.
type hole struct {
	head []byte
	size int64
}

func (h *hole) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off < int64(len(h.head)) {
		copy(p, h.head[off:])
	}
	return len(p), nil
}

func (h *hole) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (h *hole) Size() int64                            { return h.size }
func (h *hole) Sync() error                            { return nil }
func (h *hole) Close() error                           { return nil }

// FuzzState opens damaged state files, and such with checksums that are right: they are refused, or
// open and work.
func FuzzState(f *testing.F) {
	h := &stateHeader{blockSize: 4096, size: 200_000, id: [16]byte{1}}
	good := initialState(h)
	f.Add(good, 0, byte(0), false)
	f.Add(good, 200, byte(255), true)
	f.Add(good[:5000], 24, byte(1), false)
	f.Add(sealed(append([]byte(stateMagic), make([]byte, pageSize-8)...), headerChecksum), 12, byte(16), false)
	for _, size := range []int64{1 << 56, 1 << 60} {
		huge := &stateHeader{blockSize: 4096, size: size}
		f.Add(huge.encode(), 16, byte(9), true)
	}
	f.Fuzz(func(t *testing.T, b []byte, at int, value byte, seal bool) {
		if at >= 0 && at < len(b) {
			b[at] ^= value
		}
		for i := 0; seal && i+pageSize <= len(b); i += pageSize {
			checksum := pageChecksum
			if i == 0 {
				checksum = headerChecksum
			}
			sealed(b[i:i+pageSize], checksum)
		}
		s, err := readState(&memory{bytes: b})
		if err != nil {
			return
		}
		if s.header.size > 1<<20 {
			return
		}
		o := newOverlay(newMemory(s.header.size), newMemory(s.header.size), s)
		if err := o.discardUncommitted(); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, s.header.size)
		for i := int64(0); i+3 < s.header.size; i += s.header.blockSize/2 + 1 {
			if _, err := o.WriteAt([]byte("abc"), i); err != nil {
				t.Fatal(err)
			}
			copy(want[i:], "abc")
		}
		if err := o.Sync(); err != nil {
			t.Fatal(err)
		}
		same(t, o, want)
		if _, err := readState(&memory{bytes: b}); err != nil {
			t.Fatalf("what was committed cannot be read: %v", err)
		}
	})
}

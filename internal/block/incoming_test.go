package block

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"drafter/internal/need"
)

// A device that is being received is as the source's, with what its user has written since;
// whatever arrives when.
func TestIncoming(t *testing.T) {
	const pages = 700
	const size = pages*PageSize - 123
	for round := range uint64(need.Rounds(6, 200)) {
		rng := rand.New(rand.NewPCG(round, 1))
		source := make([]byte, size)
		for i := 0; i+8 < size; i += 512 {
			binary.LittleEndian.PutUint64(source[i:], rng.Uint64())
		}
		model := bytes.Clone(source)
		under := newMemory(size)
		d := NewIncoming(under, true)
		missing := NewBitmap(Pages(d))
		for p := range Pages(d) {
			from, end := p*PageSize, min((p+1)*PageSize, size)
			if rng.IntN(4) == 0 {
				missing.Set(p) // what was sent of it before is stale
				if _, err := d.Arrive(make([]byte, end-from), from); err != nil {
					t.Fatal(err)
				}
				continue
			}
			if used, err := d.Arrive(source[from:end], from); err != nil || used != end-from {
				t.Fatal(used, err)
			}
		}
		if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrSealed) {
			t.Errorf("read of a sealed device: %v", err)
		}
		if _, err := d.WriteAt(make([]byte, 1), 0); !errors.Is(err, ErrSealed) || d.Violations() != 2 {
			t.Errorf("write to a sealed device: %v, %d violations", err, d.Violations())
		}
		wants := make(chan [2]int64, 100_000)
		d.Open(missing.Clone(), func(first, end int64) { wants <- [2]int64{first, end} }, nil)

		var wg sync.WaitGroup
		send := func(first, end int64) {
			from, to := first*PageSize, min(end*PageSize, size)
			if _, err := d.Arrive(source[from:to], from); err != nil {
				t.Error(err)
			}
		}
		stop := make(chan struct{})
		wg.Go(func() { // who answers wants
			for {
				select {
				case w := <-wants:
					send(w[0], w[1])
				case <-stop:
					return
				}
			}
		})
		var pushing sync.WaitGroup
		pushing.Go(func() { // who pushes, some of it twice
			rng := rand.New(rand.NewPCG(round, 2))
			for _, p := range rng.Perm(pages) {
				send(int64(p), min(int64(p)+rng.Int64N(4)+1, pages))
				if p%50 == 0 {
					time.Sleep(time.Microsecond)
				}
			}
		})
		const workers = 3
		var users sync.WaitGroup
		for w := range workers { // each uses a third of the device
			users.Go(func() {
				rng := rand.New(rand.NewPCG(round, uint64(3+w)))
				begin, end := int64(w)*size/workers, int64(w+1)*size/workers
				begin, end = begin/PageSize*PageSize, end/PageSize*PageSize
				if w == workers-1 {
					end = size
				}
				for range 400 {
					off := begin + rng.Int64N(end-begin)
					n := min(rng.Int64N(3*PageSize)+1, end-off)
					p := make([]byte, n)
					switch rng.IntN(5) {
					case 0, 1:
						if _, err := d.ReadAt(p, off); err != nil || !bytes.Equal(p, model[off:off+n]) {
							t.Errorf("round %d: read of %d at %d differs, %v", round, n, off, err)
							return
						}
						continue
					case 2:
						if err := d.Trim(off, n); err != nil {
							t.Error(err)
						}
					default:
						for i := range p {
							p[i] = byte(rng.Uint32())
						}
						if _, err := d.WriteAt(p, off); err != nil {
							t.Error(err)
						}
					}
					copy(model[off:], p)
				}
			})
		}
		users.Wait()
		pushing.Wait()
		<-d.Complete()
		close(stop)
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
		same(t, d, model)
	}
}

// Who waits for what will never arrive is told so.
func TestAbandon(t *testing.T) {
	d := NewIncoming(newMemory(1<<20), true)
	missing := NewBitmap(Pages(d))
	missing.Set(3)
	asked := make(chan struct{})
	d.Open(missing, func(int64, int64) { close(asked) }, nil)
	done := make(chan error)
	go func() {
		_, err := d.ReadAt(make([]byte, 8), 3*PageSize+5)
		done <- err
	}()
	<-asked
	d.Abandon()
	if err := <-done; !errors.Is(err, ErrAbandoned) {
		t.Error(err)
	}
	if _, err := d.ReadAt(make([]byte, PageSize), 2*PageSize); err != nil {
		t.Errorf("a page that is there: %v", err)
	}
	if d.Missing() != 1 {
		t.Errorf("%d pages are missing", d.Missing())
	}
}

// What a sync has made durable is not noted as missing; what it has not, is.
func TestIncomingSync(t *testing.T) {
	d := NewIncoming(newMemory(1<<20), false)
	missing := NewBitmap(Pages(d))
	missing.SetRange(0, 10)
	var noted *Bitmap
	d.Open(missing, func(int64, int64) {}, func(m *Bitmap) error {
		noted = m
		return nil
	})
	if _, err := d.WriteAt(make([]byte, 2*PageSize), 4*PageSize); err != nil {
		t.Fatal(err)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	if noted.Count() != 8 || noted.Has(4) || noted.Has(5) || !noted.Has(3) {
		t.Errorf("%d pages are noted as missing", noted.Count())
	}
}

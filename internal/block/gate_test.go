package block

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"drafter/internal/await"
)

// counted counts who is in it.
type counted struct {
	Device
	in, uses atomic.Int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.in.Add(1)
	defer c.in.Add(-1)
	c.uses.Add(1)
	time.Sleep(100 * time.Microsecond) // a device takes a while
	return c.Device.ReadAt(p, off)
}

// Nobody is in a gate that is shut, nor with a device that was replaced.
func TestGate(t *testing.T) {
	devices := []*counted{{Device: NewZeros(1 << 20)}, {Device: NewZeros(1 << 20)}}
	g := NewGate(1 << 20)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := g.ReadAt(make([]byte, 10), 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	time.Sleep(time.Millisecond) // in which somebody would get in
	if devices[0].uses.Load() > 0 {
		t.Error("a gate begins open")
	}
	for i := range 100 {
		d := devices[i%2]
		before := d.uses.Load()
		g.Open(d)
		await.True(t, "a device behind a gate that is open is used", func() bool { return d.uses.Load() > before })
		if i%3 != 0 {
			g.Shut()
			g.Shut()
			if n := d.in.Load(); n != 0 {
				t.Errorf("%d are in a gate that is shut", n)
			}
		}
		if n := devices[(i+1)%2].in.Load(); n != 0 {
			t.Errorf("%d are with a device that was replaced", n)
		}
	}
	g.Open(devices[0])
	close(stop)
	wg.Wait()
}

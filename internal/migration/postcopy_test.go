package migration

import (
	"fmt"
	"io"
	"testing"
	"time"

	"drafter/internal/block"
	"drafter/migrate"
)

// handedOver begins a migration over a slow link that leaves nearly everything to post-copy. It
// returns when the guest runs at the target, which does nothing by itself.
func handedOver(t *testing.T, seed uint64, wrap func(n int64, c io.ReadWriteCloser) io.ReadWriteCloser) (*pair, *Target) {
	t.Helper()
	limits := quick()
	limits.Silence = 5 * time.Second
	limits.Timeout = time.Millisecond
	p := newPair(t, seed, limits, nil)
	p.network.rate, p.network.wrap = 1<<20, wrap
	p.target.rate = time.Hour
	arrived, err := Receive(t.Context(), p.config(limits, nil))
	if err != nil {
		t.Fatal(err)
	}
	return p, arrived
}

// arrive waits until all has arrived, and checks it.
func (p *pair) arrive(t *testing.T, arrived *Target) {
	t.Helper()
	select {
	case <-arrived.Done():
	case <-time.After(time.Minute):
		t.Fatalf("the target does not get on: %s, source %s, %s", arrived.Phase(), p.source.Phase(), p.states.String())
	}
	if err := arrived.Wait(); err != nil || arrived.Phase() != migrate.Moved {
		t.Errorf("the target is %s, %v", arrived.Phase(), err)
	}
	<-p.source.Gone()
	if err := p.source.GoneError(); err != nil || p.source.Phase() != migrate.Moved {
		t.Errorf("the source is %s, %v", p.source.Phase(), err)
	}
	p.conclude(t, p.moved(), arrived)
}

// What was on its way when a connection broke in post-copy is sent again, and only that.
func TestReconnectInPostCopy(t *testing.T) {
	for after := int64(50 << 10); after < 500<<10; after += 100 << 10 {
		t.Run(fmt.Sprintf("after %d bytes", after), func(t *testing.T) {
			t.Parallel()
			var first *faulty
			cuts := 0
			p, arrived := handedOver(t, uint64(after), func(n int64, c io.ReadWriteCloser) io.ReadWriteCloser {
				switch n {
				case 0:
					cuts++
					first = newFaulty(c, 1<<50, cut)
					return first
				case 2: // which replaces it
					cuts++
					return newFaulty(c, after/3, cut)
				}
				return c
			})
			first.left.Store(after)
			p.arrive(t, arrived)
			if cuts != 2 {
				t.Errorf("%d connections were made to be cut, want 2", cuts)
			}
			for _, d := range p.source.Stats().Devices {
				// What is lost with a connection is at most what was in one extent, twice.
				if lost := d.Sent - scriptedSize(d.Name); d.Name == "memory" && lost > 2*postCopyRun*block.PageSize {
					t.Errorf("%d bytes of %d were sent twice", lost, scriptedSize(d.Name))
				}
			}
		})
	}
}

// A page that somebody waits for does not wait for the others.
func TestWantedOvertakes(t *testing.T) {
	p, arrived := handedOver(t, 1, nil)
	in := p.target.incoming["memory"]
	for range 3 {
		missing := in.MissingPages()
		last := int64(-1)
		for page := int64(memoryPages - 1); page >= 0 && last < 0; page-- {
			if missing.Has(page) {
				last = page // of all, the background comes to it last
			}
		}
		if last < 0 {
			t.Fatal("all has arrived before anybody wanted anything")
		}
		before := in.Missing()
		if err := p.target.checkPage("memory", last); err != nil {
			t.Fatal(err)
		}
		if after := in.Missing(); before > memoryPages/2 && after < before/2 {
			t.Errorf("page %d was there when of %d missing pages %d were left", last, before, after)
		}
	}
	p.arrive(t, arrived)
	for _, d := range p.source.Stats().Devices {
		if d.Name == "memory" && d.Wanted == 0 {
			t.Error("nothing was wanted")
		}
	}
}

package migration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"drafter/migrate"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A guest that writes all the time moves, and nothing is lost.
func TestMove(t *testing.T) {
	for _, limits := range []bounds{quick(), func() bounds { l := quick(); l.NoPostCopy = true; return l }(), handover()} {
		p := newPair(t, 1, limits, nil)
		target, err := Receive(t.Context(), p.config(limits, nil))
		if err != nil {
			t.Fatal(err)
		}
		if err := target.Wait(); err != nil {
			t.Fatal(err)
		}
		p.network.wg.Wait()
		if p.network.err != nil || p.source.Phase() != migrate.Moved || target.Phase() != migrate.Moved {
			t.Errorf("source %s, %v; target %s", p.source.Phase(), p.network.err, target.Phase())
		}
		p.guest.halt()
		p.target.halt()
		if err := p.target.verify(); err != nil {
			t.Error(err)
		}
		stats := p.source.Stats()
		t.Logf("%+v", stats)
		pages := int64(0)
		for _, d := range stats.Devices {
			pages += d.Wire
		}
		if pages > stats.Wire || pages < stats.Wire*9/10 { // the rest is what is said about them
			t.Errorf("pages take %d of %d bytes on the wire", pages, stats.Wire)
		}
		if err := p.source.Close(); err != nil {
			t.Error(err)
		}
		if err := target.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A target that has what its VMM needs starts it before the source touches the VM.
func TestHeadStart(t *testing.T) {
	copying := make(chan struct{})
	for _, tt := range []struct {
		name   string
		limits func(*bounds)
		start  func(p *pair) error
		moves  bool
	}{
		{"in time", func(*bounds) {}, func(p *pair) error {
			time.Sleep(20 * time.Millisecond) // in which the source would go on
			if s := p.source.Phase(); s != migrate.Preflight {
				return fmt.Errorf("when the VMM has started, the source is %s", s)
			}
			return nil
		}, true},
		{"too slow", func(l *bounds) { l.HeadStart, l.Silence = time.Millisecond, 10*time.Second }, func(*pair) error {
			select {
			case <-copying:
				return nil
			case <-time.After(5 * time.Second):
				return errors.New("the source waits for the VMM")
			}
		}, true},
		{"not at all", func(*bounds) {}, func(*pair) error { return errors.New("injected") }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			limits := quick()
			tt.limits(&limits)
			p := newPair(t, 1, limits, func(side string, s migrate.Phase) {
				if !tt.moves && side == "source" && s == migrate.PreCopying {
					t.Error("a VM is copied that the target cannot have")
				}
				if tt.name == "too slow" && side == "source" && s == migrate.PreCopying {
					close(copying)
				}
			})
			p.target.bases = true
			p.target.onCall("start", func() error { return tt.start(p) })
			target, err := Receive(t.Context(), p.config(limits, nil))
			if moves := err == nil; moves != tt.moves {
				t.Errorf("%v", err)
			}
			if err == nil {
				if err := errors.Join(target.Wait(), target.Close()); err != nil {
					t.Error(err)
				}
				p.target.halt()
				if err := p.target.verify(); err != nil {
					t.Error(err)
				}
			}
			p.network.wg.Wait()
			p.guest.halt()
			if err := p.source.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// move moves the VM, and checks all of it at its target.
func (p *pair) move(t *testing.T, limits bounds) {
	t.Helper()
	target, err := Receive(t.Context(), p.config(limits, nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(target.Wait(), target.Close()); err != nil {
		t.Error(err)
	}
	p.network.wg.Wait()
	p.guest.halt()
	p.target.halt()
	if err := errors.Join(p.target.verify(), p.source.Close()); err != nil {
		t.Error(err)
	}
}

// A VM runs on at its source while its target waits for a disk.
func TestExpect(t *testing.T) {
	p := newPair(t, 1, quick(), nil)
	var expected atomic.Bool
	p.target.onCall("expect", func() error {
		time.Sleep(50 * time.Millisecond) // a slow disk
		expected.Store(true)
		return nil
	})
	p.guest.onCall("pause", func() error {
		if !expected.Load() {
			t.Error("the VM is paused before its target is prepared")
		}
		return nil
	})
	p.move(t, quick())
}

// Whoever tries again at once is not refused, however long the source takes to notice that the
// first target has gone.
func TestAgain(t *testing.T) {
	p := newPair(t, 1, quick(), nil)
	first, give := context.WithCancel(t.Context())
	p.guest.onCall("prepare", func() error {
		if first.Err() == nil {
			give()
			time.Sleep(200 * time.Millisecond) // a guest that is busy
		}
		return nil
	})
	if _, err := Receive(first, p.config(quick(), nil)); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	p.target = newReceiver(p.ledger, 2)
	p.move(t, quick())
}

// queue is a connection that takes whatever is sent, as the buffers of TCP do, however slow the one
// is who reads.
type queue struct {
	io.ReadWriteCloser
	filled sync.WaitGroup

	mu   sync.Mutex
	more *sync.Cond
	held bytes.Buffer
	err  error
}

func newQueue(c io.ReadWriteCloser) *queue {
	q := &queue{ReadWriteCloser: c}
	q.more = sync.NewCond(&q.mu)
	q.filled.Go(func() {
		p := make([]byte, 64<<10)
		for {
			n, err := c.Read(p)
			q.mu.Lock()
			q.held.Write(p[:n])
			q.err = err
			q.more.Broadcast()
			q.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	return q
}

func (q *queue) Read(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.held.Len() == 0 && q.err == nil {
		q.more.Wait()
	}
	if q.held.Len() > 0 {
		return q.held.Read(p)
	}
	return 0, q.err
}

func (q *queue) waiting() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.held.Len()
}

// A VM is not paused before a target that is near has stored what it was sent.
func TestCatchUp(t *testing.T) {
	limits := quick()
	limits.nearby, limits.patience, limits.Silence = time.Minute, time.Minute, time.Minute
	p := newPair(t, 1, limits, nil)
	var first *queue
	p.network.wrap = func(_ int64, c io.ReadWriteCloser) io.ReadWriteCloser {
		q := newQueue(c)
		if first == nil {
			first = q
		}
		return q
	}
	p.target.onCall("store", func() error { time.Sleep(time.Millisecond); return nil })
	// The last flush before the pause follows the wait; what was written meanwhile is sent after
	// it.
	behind, flushed := -1, -1
	calls := func(call string) error {
		switch call {
		case "flush":
			flushed = first.waiting()
		case "pause":
			behind = flushed
		}
		return t.Context().Err()
	}
	p.guest.failing.Store(&calls)
	target, err := Receive(t.Context(), p.config(limits, nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Wait(); err != nil {
		t.Fatal(err)
	}
	p.network.wg.Wait()
	p.guest.halt()
	p.target.halt()
	if err := p.target.verify(); err != nil {
		t.Error(err)
	}
	if behind < 0 || behind > 100 { // a ping or two
		t.Errorf("when the target had stored what it was sent, %d bytes were on their way", behind)
	}
	if err := p.source.Close(); err != nil {
		t.Error(err)
	}
	if err := target.Close(); err != nil {
		t.Error(err)
	}
	first.filled.Wait()
}

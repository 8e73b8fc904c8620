package migrate

import (
	"bytes"
	"io"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A guest that writes all the time moves, and nothing is lost.
func TestMove(t *testing.T) {
	for _, limits := range []Limits{quick(), func() Limits { l := quick(); l.NoPostCopy = true; return l }()} {
		p := newPair(t, 1, limits, nil)
		target, err := Receive(t.Context(), p.config(limits, nil))
		if err != nil {
			t.Fatal(err)
		}
		if err := target.Wait(); err != nil {
			t.Fatal(err)
		}
		p.network.wg.Wait()
		if p.network.err != nil || p.source.State() != Moved || target.State() != Moved {
			t.Errorf("source %s, %v; target %s", p.source.State(), p.network.err, target.State())
		}
		p.guest.halt()
		p.target.halt()
		if err := p.target.verify(); err != nil {
			t.Error(err)
		}
		t.Logf("%+v", p.source.Stats())
		if err := p.source.Close(); err != nil {
			t.Error(err)
		}
		if err := target.Close(); err != nil {
			t.Error(err)
		}
	}
}

// queue is a connection that takes whatever is sent, as the buffers of TCP do, however slow the one is who reads.
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
	p.target.onCall("cache", func() error { time.Sleep(time.Millisecond); return nil })
	behind := -1
	p.guest.onCall("pause", func() error { behind = first.waiting(); return nil })
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
		t.Errorf("when the VM was paused, %d bytes were on their way", behind)
	}
	if err := p.source.Close(); err != nil {
		t.Error(err)
	}
	if err := target.Close(); err != nil {
		t.Error(err)
	}
	first.filled.Wait()
}

package migration

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"drafter/internal/block"
)

// users write and read a device's pages, each its own, and check what they read.
func users(t *testing.T, d block.Device, n int, stop <-chan struct{}) *sync.WaitGroup {
	var wg sync.WaitGroup
	for u := range n {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(u), 1))
			pages := map[int64][]byte{}
			for {
				select {
				case <-stop:
					return
				default:
				}
				page := rng.Int64N(d.Size()/block.PageSize/int64(n))*int64(n) + int64(u)
				p := make([]byte, block.PageSize)
				if want := pages[page]; want != nil && rng.IntN(2) == 0 {
					if _, err := d.ReadAt(p, page*block.PageSize); err != nil || !bytes.Equal(p, want) {
						t.Errorf("page %d is not what was written: %v", page, err)
						return
					}
					continue
				}
				for i := range p {
					p[i] = byte(rng.Uint32())
				}
				if _, err := d.WriteAt(p, page*block.PageSize); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				pages[page] = p
				if rng.IntN(50) == 0 {
					if err := d.Sync(); err != nil {
						t.Errorf("sync: %v", err)
					}
				}
			}
		})
	}
	return &wg
}

// What the users of a device that has moved away do is done where it is, over connections that
// break all the time.
func TestForward(t *testing.T) {
	f := newForwarder()
	d := &forwardedDevice{f, 0, 1 << 20}
	there := newRAM(1 << 20)
	stop := make(chan struct{})
	wg := users(t, d, 8, stop)
	for i := range 20 {
		ours, theirs := net.Pipe()
		var faulted io.ReadWriteCloser = ours
		if i < 19 {
			faulted = newFaulty(ours, int64(100_000+50_000*i), cut)
		}
		served := make(chan error, 1)
		l := newLink(t.Context(), faulted, time.Second)
		go func() {
			served <- serveForwards(t.Context(), newLink(t.Context(), theirs, time.Second), []block.Device{there})
		}()
		if i == 19 {
			time.AfterFunc(300*time.Millisecond, func() {
				close(stop)
				wg.Wait()
				l.cancel(errors.New("enough"))
			})
		}
		err := f.attach(l)
		l.close(err)
		<-served
	}
	f.fail(block.ErrAbandoned)
	if _, err := d.ReadAt(make([]byte, 10), 0); !errors.Is(err, block.ErrAbandoned) {
		t.Errorf("read of an abandoned device: %v", err)
	}
}

// A target that ends, or cannot do what is asked, says so.
func TestForwardEnds(t *testing.T) {
	f := newForwarder()
	d := &forwardedDevice{f, 0, 4 << 20}
	ours, theirs := net.Pipe()
	l := newLink(t.Context(), ours, time.Second)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() {
		served <- serveForwards(ctx, newLink(t.Context(), theirs, time.Second), []block.Device{block.NewZeros(4 << 20)})
	}()
	attached := make(chan error, 1)
	go func() { attached <- f.attach(l) }()
	if _, err := d.WriteAt([]byte("x"), 5); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("write to a read-only device: %v", err)
	}
	if _, err := d.ReadAt(make([]byte, 3<<19), 0); err != nil {
		t.Errorf("long read: %v", err)
	}
	if _, err := d.ReadAt(make([]byte, 10), 4<<20); !errors.Is(err, block.ErrRange) {
		t.Errorf("read behind the end: %v", err)
	}
	cancel()
	<-served
	l.close(<-attached)
	if err := d.Sync(); err == nil || !strings.Contains(err.Error(), "not served there any more") {
		t.Errorf("after the end: %v", err)
	}
}

package migration

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// shop is a server of an offer that can be cut off and replaced.
type shop struct {
	mu    sync.Mutex
	offer *Offer
	conns []net.Conn
	wg    sync.WaitGroup
	dials atomic.Int64
	after int64 // if not 0, connections break after so many bytes
}

func (s *shop) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dials.Add(1)
	if s.offer == nil {
		return nil, errors.New("closed")
	}
	ours, theirs := net.Pipe()
	s.conns = append(s.conns, theirs)
	offer := s.offer
	s.wg.Go(func() { _ = offer.Handle(context.WithoutCancel(ctx), theirs) })
	if s.after > 0 {
		return newFaulty(ours, s.after, cut), nil
	}
	return ours, nil
}

// reopen cuts all connections; from then on another offer is served, or none.
func (s *shop) reopen(o *Offer) {
	s.mu.Lock()
	for _, c := range s.conns {
		_ = c.Close()
	}
	s.conns, s.offer = nil, o
	s.mu.Unlock()
}

// newGoods makes a package of devices with content of its own.
func newGoods(t *testing.T, seed byte) (*Offer, map[string][]byte) {
	t.Helper()
	data := map[string][]byte{"disk": make([]byte, 5<<20+block.PageSize), "memory": make([]byte, 9<<20), "config": make([]byte, 300)}
	var devices []OfferedDevice
	for name, p := range data {
		rng := rand.NewChaCha8([32]byte{seed, name[0]})
		for i := 0; i < len(p); i += 3 << 16 {
			_, _ = rng.Read(p[i:min(len(p), i+1<<16)])
			copy(p[min(len(p), i+1<<16):min(len(p), i+2<<16)], bytes.Repeat([]byte("text "), 1<<14))
		}
		d := newRAM(int64(len(p)))
		copy(d.data, p)
		c, err := block.Hash(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		devices = append(devices, OfferedDevice{Name: name, Device: d, BlockSize: 64 << 10, Contents: c})
	}
	o, err := NewOffer(devices, nil, 64, quick().Limits)
	if err != nil {
		t.Fatal(err)
	}
	return o, data
}

// pullAll pulls all devices of a package into files below dir, reading at random meanwhile, and
// compares.
func pullAll(t *testing.T, p *Package, dir string, data map[string][]byte) error {
	g, ctx := errgroup.WithContext(t.Context())
	for _, name := range p.Names() {
		remote, _ := p.Remote(name)
		d, err := block.OpenPulled(t.Context(), filepath.Join(dir, name), remote)
		if err != nil {
			return err
		}
		defer func() { _ = d.Close() }()
		g.Go(func() error { return d.Fill(ctx, nil) })
		g.Go(func() error {
			rng := rand.New(rand.NewPCG(1, 2))
			for range 50 {
				buf := make([]byte, 1+rng.IntN(20000))
				off := rng.Int64N(max(d.Size()-int64(len(buf)), 1))
				buf = buf[:min(int64(len(buf)), d.Size()-off)]
				if _, err := d.ReadAt(buf, off); err != nil {
					return err
				}
				if !bytes.Equal(buf, data[name][off:off+int64(len(buf))]) {
					return errors.New("other bytes of " + name)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for name, want := range data {
		f, err := block.OpenFile(filepath.Join(dir, name), true)
		if err != nil {
			return err
		}
		got := make([]byte, f.Size())
		if _, err := f.ReadAt(got, 0); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return errors.New("another file of " + name)
		}
	}
	return nil
}

func (s *shop) close(t *testing.T, offers ...*Offer) {
	t.Helper()
	s.reopen(nil)
	s.wg.Wait()
	for _, o := range offers {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Many targets pull a package at once, over connections that break all the time.
func TestPull(t *testing.T) {
	offer, data := newGoods(t, 1)
	s := &shop{offer: offer, after: 3 << 20}
	var g errgroup.Group
	for range 4 {
		dir := t.TempDir()
		g.Go(func() error {
			p, err := OpenPackage(t.Context(), s.dial, quick().Limits)
			if err != nil {
				return err
			}
			defer func() { _ = p.Close() }()
			return pullAll(t, p, dir, data)
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if n := s.dials.Load(); n <= 4*2 {
		t.Errorf("%d connections; they do not break", n)
	}
	s.close(t, offer)
}

// Another package in the place of the one that is being pulled is refused, not mixed.
func TestPullReplaced(t *testing.T) {
	first, _ := newGoods(t, 1)
	second, _ := newGoods(t, 2)
	s := &shop{offer: first}
	p, err := OpenPackage(t.Context(), s.dial, quick().Limits)
	if err != nil {
		t.Fatal(err)
	}
	remote, ok := p.Remote("memory")
	if !ok {
		t.Fatal("no memory")
	}
	d, err := block.OpenPulled(t.Context(), filepath.Join(t.TempDir(), "memory"), remote)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if _, err := d.ReadAt(buf, 0); err != nil {
		t.Error(err)
	}
	s.reopen(second)
	if err := d.Fill(t.Context(), nil); !errors.Is(err, block.ErrReplaced) {
		t.Errorf("fill: %v", err)
	}
	if _, err := d.ReadAt(buf, 129<<16); !errors.Is(err, block.ErrReplaced) {
		t.Errorf("read: %v", err)
	}
	if _, err := d.ReadAt(buf, 0); err != nil {
		t.Errorf("read of what is there: %v", err)
	}
	if err := errors.Join(d.Close(), p.Close()); err != nil {
		t.Error(err)
	}
	s.close(t, first, second)
}

// While the server is away, who reads waits; it goes on when the server is back.
func TestPullServerAway(t *testing.T) {
	offer, data := newGoods(t, 1)
	s := &shop{offer: offer}
	p, err := OpenPackage(t.Context(), s.dial, quick().Limits)
	if err != nil {
		t.Fatal(err)
	}
	remote, _ := p.Remote("disk")
	d, err := block.OpenPulled(t.Context(), filepath.Join(t.TempDir(), "disk"), remote)
	if err != nil {
		t.Fatal(err)
	}
	s.reopen(nil)
	done := make(chan error, 1)
	buf := make([]byte, 1000)
	go func() {
		_, err := d.ReadAt(buf, 0)
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("read without a server: %v", err)
	case <-time.After(150 * time.Millisecond):
	}
	s.reopen(offer)
	if err := <-done; err != nil || !bytes.Equal(buf, data["disk"][:1000]) {
		t.Errorf("read: %v", err)
	}
	if err := errors.Join(d.Close(), p.Close()); err != nil {
		t.Error(err)
	}
	s.close(t, offer)
}

// An offer tells of its signature, and only those who know what that is.
func TestOfferedSignature(t *testing.T) {
	signed, _ := newGoods(t, 1)
	signed.manifest.Signature = []byte("signed")
	unsigned, _ := newGoods(t, 1)
	for want, offer := range map[string]*Offer{"signed": signed, "": unsigned} {
		s := &shop{offer: offer}
		p, err := OpenPackage(t.Context(), s.dial, quick().Limits)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Signature(); string(got) != want || (got == nil) != (want == "") {
			t.Errorf("signature %q, want %q", got, want)
		}
		stream, err := s.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		l := newLink(t.Context(), stream, quick().Silence)
		if err := l.Send(wire.Hello{Version: wire.Version}); err != nil {
			t.Fatal(err)
		}
		m, err := l.receive(nil)
		if old, ok := m.(wire.Manifest); err != nil || !ok || old.Features != wire.FeaturePackage || old.Signature != nil {
			t.Errorf("a target of an older release gets %v, %v", m, err)
		}
		l.close(errors.New("the test has ended"))
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		s.close(t, offer)
	}
}

// Who asks an offer for a VM is told that there is a package; who asks a source for a package, that
// there is none.
func TestPullMistaken(t *testing.T) {
	offer, _ := newGoods(t, 1)
	s := &shop{offer: offer}
	pair := newPair(t, 1, quick(), nil)
	if _, err := Receive(t.Context(), TargetConfig{VM: pair.target, Dial: s.dial, Limits: quick().Limits}); !errors.Is(err, migrate.ErrPackage) {
		t.Errorf("receive of a package: %v", err)
	}
	if p, err := OpenPackage(t.Context(), pair.network.dial, quick().Limits); err == nil {
		t.Error("a source offers a package", p.Close())
	}
	pair.end(t)
	s.close(t, offer)
}

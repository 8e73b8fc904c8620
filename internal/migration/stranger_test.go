package migration

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
	"drafter/transport"
)

// strangers connect all the time, and say nothing, or ask for a migration that there is not, until
// they are told to stop.
func strangers(t *testing.T, addr string) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var conns []net.Conn
	connect := func() {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return // the source listens no more
		}
		if len(conns)%3 == 0 {
			_ = wire.NewConn(c).Send(wire.Hello{Version: wire.Version, Lane: wire.Demand, Migration: uuid.New()})
		}
		if conns = append(conns, c); len(conns) > 600 {
			conns[0].Close()
			conns = conns[1:]
		}
	}
	for range 400 {
		connect()
	}
	wg.Go(func() {
		for ctx.Err() == nil {
			connect()
			time.Sleep(time.Millisecond) // and again: strangers come without end
		}
	})
	return func() {
		cancel()
		wg.Wait()
		for _, c := range conns {
			c.Close()
		}
	}
}

// Strangers without number keep no target out, neither at its beginning nor when it comes back
// after its connections were lost.
func TestStrangersKeepNoTargetOut(t *testing.T) {
	limits := quick()
	limits.Silence, limits.Prepare, limits.Handoff = 10*time.Second, 10*time.Second, 10*time.Second
	p := newPair(t, 1, limits, nil)
	l, err := (&transport.Trust{Anybody: true}).Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan struct{})
	go func() {
		defer close(served)
		migrate.AcceptAll(ctx, nil, l.Accept, func(ctx context.Context, stream io.ReadWriteCloser) { _ = p.source.Handle(ctx, stream) }) // its state says what became of it
	}()
	stop := strangers(t, l.Addr().String())
	var mu sync.Mutex
	var conns []net.Conn
	config := p.config(limits, func(_ string, s migrate.Phase) {
		if s != migrate.Fetching {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			c.Close()
		}
	})
	config.Dial = func(ctx context.Context) (io.ReadWriteCloser, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
		mu.Lock()
		defer mu.Unlock()
		conns = append(conns, c)
		return c, err
	}
	target, err := Receive(t.Context(), config)
	if err != nil {
		t.Fatalf("source %s: %v", p.source.Phase(), err)
	}
	err = target.Wait()
	if err == nil {
		<-p.source.Gone() // which is so a moment after it has told the target
	}
	if err != nil || p.source.Phase() != migrate.Moved || target.Phase() != migrate.Moved {
		t.Errorf("source %s, target %s, %v", p.source.Phase(), target.Phase(), err)
	}
	stop()
	cancel()
	<-served
	p.guest.halt()
	p.target.halt()
	if err := p.target.verify(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(p.source.Close(), target.Close()); err != nil {
		t.Error(err)
	}
}

// A stranger gets no memory before it has said hello: what is announced beyond that is refused, and
// not waited for.
func TestBeforeHello(t *testing.T) {
	p := newPair(t, 1, quick(), nil)
	ours, theirs := net.Pipe()
	result := make(chan error, 1)
	go func() { result <- p.source.Handle(t.Context(), theirs) }()
	header := make([]byte, 16)
	binary.LittleEndian.PutUint32(header, 8<<20)
	header[4] = byte(wire.TypeResume)
	go func() { _, _ = ours.Write(header) }()
	go func() { _, _ = io.Copy(io.Discard, ours) }() // until Handle has closed it
	if err := <-result; !errors.Is(err, migrate.ErrRefused) || !strings.Contains(err.Error(), "of which 256 are allowed") {
		t.Error(err)
	}
	ours.Close()
	p.guest.halt()
	if err := p.source.Close(); err != nil {
		t.Error(err)
	}
}

// A package is served to several hosts, and a host that has taken its share gets no more.
func TestOfferSharesPlaces(t *testing.T) {
	goods, _ := newGoods(t, 1)
	offer, err := NewOffer(goods.devices, nil, 4, quick().Limits)
	if err != nil {
		t.Fatal(err)
	}
	s := &shop{offer: offer}
	var packages []*Package
	for range 2 {
		p, err := OpenPackage(t.Context(), s.dial, quick().Limits)
		if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
	if _, err := OpenPackage(t.Context(), s.dial, quick().Limits); err == nil || !strings.Contains(err.Error(), "too many connections are served already") {
		t.Errorf("a third connection of a host, of 4: %v", err)
	}
	for _, p := range packages {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	s.wg.Wait()
	if err := errors.Join(offer.Close(), goods.Close()); err != nil {
		t.Error(err)
	}
}

// hostile is a source that offers what it likes.
func hostile(t *testing.T, m wire.Manifest) migrate.Dial {
	return func(context.Context) (io.ReadWriteCloser, error) {
		ours, theirs := net.Pipe()
		go func() {
			c := wire.NewConn(theirs)
			defer c.Close()
			if _, err := c.Read(); err != nil {
				t.Error(err)
			}
			if err := c.Send(m); err != nil {
				t.Error(err)
			}
			_, _ = c.Read() // why it is refused
		}()
		return ours, nil
	}
}

// Devices that this host was not meant for are refused before anything is made for them, whoever
// offers them.
func TestDevicesTooLarge(t *testing.T) {
	limits := quick()
	limits.Silence = 10 * time.Second
	memory, err := block.HostMemory()
	if err != nil {
		t.Fatal(err)
	}
	for what, tt := range map[string]struct {
		sizes []int64
		most  int64
	}{
		"4 EiB":                        {sizes: []int64{4 << 60}},
		"as much as there is":          {sizes: []int64{1<<63 - 1, 1<<63 - 1, 1<<63 - 1}},
		"more than the host's default": {sizes: []int64{memory * 100, memory * 29}},
		"more than a flag allows":      {sizes: []int64{1 << 40, 1}, most: 1 << 40},
	} {
		m := wire.Manifest{}
		for i, size := range tt.sizes {
			m.Devices = append(m.Devices, wire.Device{Name: string(rune('a' + i)), Size: size, BlockSize: 64 << 10})
		}
		limits.MaxSize = tt.most
		vm := newReceiver(newLedger(t), 1)
		_, err := Receive(t.Context(), TargetConfig{VM: vm, Dial: hostile(t, m), Limits: limits.Limits})
		if err == nil || !strings.Contains(err.Error(), "--max-size allows more") {
			t.Errorf("%s: %v", what, err)
		}
		if len(vm.devices) > 0 {
			t.Errorf("%s: devices were made", what)
		}
		m.Features = wire.FeaturePackage
		if _, err := OpenPackage(t.Context(), hostile(t, m), limits.Limits); err == nil || !strings.Contains(err.Error(), "--max-size allows more") {
			t.Errorf("%s, as a package: %v", what, err)
		}
	}
}

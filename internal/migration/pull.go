package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// Package is a package at an [Offer]. It implements [block.Fetcher] for each of its devices. It has
// a connection for blocks that somebody waits for and one for the others, and makes them again when
// they are lost. Its methods are safe for concurrent use.
type Package struct {
	dial    migrate.Dial
	silence time.Duration
	maxSize int64
	devices []wire.Device
	sizes   []int64
	remotes map[string]block.Remote

	signature []byte

	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // readers of connections

	main, demand pullLane
	waiting      atomic.Int64 // urgent requests under way
	lastUrgent   atomic.Int64 // when the last urgent request ended, in nanoseconds since 1970
	single       sync.Mutex   // held by a request in the background while others are urgent
}

// pullLane is one of the connections of a package, if there is one.
type pullLane struct {
	lane    wire.Lane
	sending sync.Mutex // held to connect and to send; what arrives does not wait for it

	mu       sync.Mutex // guards the following
	link     *link
	requests []*pullRequest // those sent, in their order
}

// pullRequest is a want without a complete answer. Answers come in order.
type pullRequest struct {
	device int
	off    int64  // of what comes next
	rest   []byte // where to put it
	done   chan error
}

// OpenPackage connects with an offer and learns which devices it has. Close it.
func OpenPackage(ctx context.Context, dial migrate.Dial, limits migrate.Limits) (_ *Package, err error) {
	if limits, err = limits.WithDefaults(); err != nil {
		return nil, err
	}
	p := &Package{dial: dial, silence: limits.Silence, maxSize: limits.MaxSize, remotes: map[string]block.Remote{}}
	p.main.lane, p.demand.lane = wire.Main, wire.Demand
	p.ctx, p.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	l, m, err := p.connect(ctx, wire.Main, false)
	if err == nil {
		stop := context.AfterFunc(ctx, func() { l.cancel(context.Cause(ctx)) })
		err = p.learn(l, m)
		stop()
	}
	if err != nil {
		if l != nil {
			l.close(err)
		}
		return nil, errors.Join(err, p.Close())
	}
	p.use(&p.main, l)
	return p, nil
}

// connect opens a connection and reads the manifest.
func (p *Package) connect(ctx context.Context, lane wire.Lane, known bool) (*link, wire.Manifest, error) {
	dctx, cancel := context.WithTimeoutCause(ctx, p.silence, errors.New("no answer"))
	defer cancel()
	defer context.AfterFunc(p.ctx, cancel)()
	stream, err := p.dial(dctx)
	if err != nil {
		return nil, wire.Manifest{}, fmt.Errorf("connect: %w", err)
	}
	l := newLink(p.ctx, stream, p.silence)
	stop := context.AfterFunc(dctx, func() { l.cancel(context.Cause(dctx)) })
	defer stop()
	err = l.Send(wire.Hello{Version: wire.Version, Lane: lane, Resume: known, Features: wire.FeatureSignature})
	var m wire.Manifest
	if err == nil {
		var reply any
		if reply, err = l.receive(nil); err == nil {
			var ok bool
			if m, ok = reply.(wire.Manifest); !ok || m.Features&wire.FeaturePackage == 0 {
				err = fmt.Errorf("%w: no manifest of a package", wire.ErrProtocol)
			}
		}
	}
	if err != nil {
		err = l.lost(err)
		l.close(err)
		return nil, m, err
	}
	return l, m, nil
}

// learn reads what the devices contain.
func (p *Package) learn(l *link, m wire.Manifest) error {
	p.devices, p.sizes, p.signature = m.Devices, m.Sizes(), m.Signature
	if err := block.CheckSizes(p.maxSize, p.sizes...); err != nil {
		return err
	}
	for i, d := range m.Devices {
		c := &block.Contents{Size: d.Size, Device: d.Base}
		for blocks := (d.Size + block.ContentBlockSize - 1) / block.ContentBlockSize; int64(len(c.Blocks)) < blocks; {
			reply, err := l.receive(p.sizes)
			if err != nil {
				return err
			}
			some, ok := reply.(wire.Contents)
			if !ok || some.Device != i || some.First != int64(len(c.Blocks)) || len(some.Blocks) == 0 {
				return fmt.Errorf("%w: %T instead of the contents of device %s", wire.ErrProtocol, reply, d.Name)
			}
			c.Blocks = append(c.Blocks, some.Blocks...)
		}
		if err := c.Check(); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
		p.remotes[d.Name] = block.Remote{Contents: c, Fetcher: &pullDevice{p, i}}
	}
	return nil
}

// Names are those of the package's devices.
func (p *Package) Names() []string {
	var names []string
	for _, d := range p.devices {
		names = append(names, d.Name)
	}
	return names
}

// Remote is a device of the package.
func (p *Package) Remote(name string) (block.Remote, bool) {
	r, ok := p.remotes[name]
	return r, ok
}

// Signature is the package's signature in the offer; nil if it has none.
func (p *Package) Signature() []byte { return p.signature }

// Close ends the connections. Fetches under way fail.
func (p *Package) Close() error {
	p.cancel(errors.New("the package was closed"))
	p.wg.Wait()
	return nil
}

// pullDevice is a device of a package.
type pullDevice struct {
	p     *Package
	index int
}

// calm is how long after an urgent request the next one is expected.
const calm = 100 * time.Millisecond

// Fetch implements [block.Fetcher].
func (d *pullDevice) Fetch(ctx context.Context, first int64, p []byte, urgent bool) error {
	lane := &d.p.main
	if urgent {
		lane = &d.p.demand
		d.p.waiting.Add(1)
		defer func() {
			d.p.lastUrgent.Store(time.Now().UnixNano())
			d.p.waiting.Add(-1)
		}()
	} else if d.p.waiting.Load() > 0 || time.Since(time.Unix(0, d.p.lastUrgent.Load())) < calm {
		// The connection's buffers are then full of blocks that nobody waits for.
		d.p.single.Lock()
		defer d.p.single.Unlock()
	}
	r := &pullRequest{device: d.index, off: first * block.ContentBlockSize, rest: p, done: make(chan error, 1)}
	if err := d.p.send(ctx, lane, r); err != nil {
		return err
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// send sends a request, on a new connection if there is none.
func (p *Package) send(ctx context.Context, lane *pullLane, r *pullRequest) error {
	lane.sending.Lock()
	defer lane.sending.Unlock()
	l := lane.current()
	if l == nil {
		var m wire.Manifest
		var err error
		if l, m, err = p.connect(ctx, lane.lane, true); err != nil {
			return err
		}
		if err := p.same(m); err != nil {
			l.close(err)
			return err
		}
		p.use(lane, l)
	}
	pages := (int64(len(r.rest)) + block.PageSize - 1) / block.PageSize
	want := wire.Want{Device: r.device, First: r.off / block.PageSize, Ends: r.off/block.PageSize + pages}
	if !lane.expect(l, r) {
		return l.lost(errors.New("the connection has ended"))
	}
	if err := l.Send(want); err != nil {
		l.cancel(err) // the reader tells all who wait
	}
	return nil
}

// current is the connection of a lane, or nil.
func (lane *pullLane) current() *link {
	lane.mu.Lock()
	defer lane.mu.Unlock()
	if lane.link != nil && lane.link.ctx.Err() != nil {
		lane.drop(lane.link.lost(errors.New("the connection has ended")))
	}
	return lane.link
}

// expect notes that r is sent next over l, if that is still the lane's.
func (lane *pullLane) expect(l *link, r *pullRequest) bool {
	lane.mu.Lock()
	defer lane.mu.Unlock()
	if lane.link != l {
		return false
	}
	lane.requests = append(lane.requests, r)
	return true
}

// same refuses another package than the one that was opened.
func (p *Package) same(m wire.Manifest) error {
	same := len(m.Devices) == len(p.devices)
	for i := 0; same && i < len(m.Devices); i++ {
		same = m.Devices[i].Name == p.devices[i].Name && m.Devices[i].Base == p.devices[i].Base
	}
	if !same {
		return fmt.Errorf("the registry offers another package now: %w", block.ErrReplaced)
	}
	return nil
}

// use makes l the connection of a lane.
func (p *Package) use(lane *pullLane, l *link) {
	lane.mu.Lock()
	lane.link = l
	lane.mu.Unlock()
	p.wg.Go(func() {
		err := l.lost(p.read(lane, l))
		l.close(err)
		lane.mu.Lock()
		defer lane.mu.Unlock()
		if lane.link == l {
			lane.drop(err)
		}
	})
}

// drop gives up a connection that has ended, and the requests on it. The lane's lock is held.
func (lane *pullLane) drop(err error) {
	lane.link = nil
	for _, r := range lane.requests {
		r.done <- err
	}
	lane.requests = nil
}

// read takes the answers on a connection until it ends.
func (p *Package) read(lane *pullLane, l *link) error {
	decoder, err := wire.NewDecoder()
	if err != nil {
		return err
	}
	defer decoder.Close()
	for {
		f, err := l.Read()
		if err != nil {
			return err
		}
		switch f.Type {
		case wire.TypePing:
			continue
		case wire.TypeExtent:
		default:
			m, err := wire.Decode(f, p.sizes)
			if e, ok := m.(wire.Error); ok {
				err = &RemoteError{Code: e.Code, Text: e.Text}
			}
			if err == nil {
				err = fmt.Errorf("%w: %s instead of pages", wire.ErrProtocol, f.Type)
			}
			return err
		}
		e, err := decoder.Extent(f, p.sizes)
		if err != nil {
			return err
		}
		if err := lane.take(l, e); err != nil {
			return err
		}
	}
}

// take gives an extent to the request that it is for: the first.
func (lane *pullLane) take(l *link, e wire.Extent) error {
	lane.mu.Lock()
	defer lane.mu.Unlock()
	if lane.link != l {
		return errors.New("the connection was replaced")
	}
	if len(lane.requests) == 0 {
		return fmt.Errorf("%w: pages that nobody wants", wire.ErrProtocol)
	}
	r := lane.requests[0]
	if e.Device != r.device || e.Off != r.off || e.Len > int64(len(r.rest)) || e.Encoding == wire.Same {
		return fmt.Errorf("%w: other pages than those that were wanted", wire.ErrProtocol)
	}
	if e.Encoding == wire.Zero {
		clear(r.rest[:e.Len])
	} else {
		copy(r.rest, e.Data)
	}
	r.rest, r.off = r.rest[e.Len:], r.off+e.Len
	if len(r.rest) == 0 {
		lane.requests = lane.requests[1:]
		r.done <- nil
	}
	return nil
}

var _ io.Closer = (*Package)(nil)

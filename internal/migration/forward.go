package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// Devices that move without a VM leave users behind, at the paths that they had at the source.
// Their operations are forwarded to where the devices are now. The target opens a connection for
// that, and a new one whenever it is lost; the source sends operations on it. Operations without a
// result when a connection was lost are sent again on the next.

// forwardPatience is how long the users of a device wait for a target that is gone.
const forwardPatience = time.Minute

// forwardsAtOnce is how many operations of a source a target works on.
const forwardsAtOnce = 32

// forwarder asks, at the source.
type forwarder struct {
	mu      sync.Mutex
	next    uint64
	pending map[uint64]*operation
	link    *link
	failed  error       // for good
	giveUp  *time.Timer // runs while there is no connection and somebody waits
}

// operation is one that a user waits for.
type operation struct {
	wire.Operation
	done chan error
	into []byte // of a read
}

func newForwarder() *forwarder { return &forwarder{pending: map[uint64]*operation{}} }

// Forwarded is the i-th of the source's devices at the place that it has moved to. An operation
// before the handoff, or after it failed, waits for ever. It needs [SourceConfig.Forward].
func (s *Source) Forwarded(i int) block.Device {
	return &forwardedDevice{s.forwarder, i, s.config.Devices[i].Device.Size()}
}

// do has an operation done.
func (f *forwarder) do(o *operation) error {
	o.done = make(chan error, 1)
	f.mu.Lock()
	if f.failed != nil {
		f.mu.Unlock()
		return f.failed
	}
	f.next++
	o.ID = f.next
	f.pending[o.ID] = o
	l := f.link
	f.watch()
	f.mu.Unlock()
	if l != nil {
		if err := l.Send(o.Operation); err != nil {
			l.cancel(err) // the next connection sends it again
		}
	}
	return <-o.done
}

// watch bounds how long somebody waits without a connection. mu is held.
func (f *forwarder) watch() {
	if f.link != nil || f.giveUp != nil || len(f.pending) == 0 {
		return
	}
	f.giveUp = time.AfterFunc(forwardPatience, func() {
		f.fail(fmt.Errorf("the device has moved away, and where it went nobody has answered for %s: %w", forwardPatience, block.ErrAbandoned))
	})
}

// fail ends all waiting, for ever.
func (f *forwarder) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed != nil {
		return
	}
	f.failed = err
	for id, o := range f.pending {
		o.done <- err
		delete(f.pending, id)
	}
	if f.link != nil {
		f.link.cancel(err)
	}
	if f.giveUp != nil {
		f.giveUp.Stop()
	}
}

// attachForward serves a connection of the target until it ends.
func (s *Source) attachForward(o *outgoing, l *link) error {
	if s.forwarder == nil {
		err := fmt.Errorf("%w: nobody here uses what has moved", wire.ErrProtocol)
		l.refuse(wire.CodeProtocol, err)
		return err
	}
	// The target runs before its answer is here.
	for phase, changed := o.follow(); phase == migrate.HandingOff || phase == migrate.InDoubt; phase, changed = o.follow() {
		select {
		case <-changed:
		case <-l.ctx.Done():
			return l.lost(io.EOF)
		}
	}
	if phase := o.Phase(); phase != migrate.Serving && phase != migrate.LeftServing && phase != migrate.Moved {
		err := errors.New("the devices have not moved")
		l.refuse(wire.CodeUnknown, err)
		return err
	}
	return s.forwarder.attach(l)
}

// attach makes l the connection, and sends all operations without a result on it.
func (f *forwarder) attach(l *link) error {
	f.mu.Lock()
	if f.failed != nil {
		f.mu.Unlock()
		l.refuse(wire.CodeUnknown, f.failed)
		return f.failed
	}
	if f.giveUp != nil {
		f.giveUp.Stop()
		f.giveUp = nil
	}
	if f.link != nil {
		f.link.cancel(errors.New("the target has reconnected"))
	}
	f.link = l
	var again []*operation
	for _, o := range f.pending {
		again = append(again, o)
	}
	f.mu.Unlock()
	slices.SortFunc(again, func(a, b *operation) int { return int(int64(a.ID - b.ID)) })
	l.wg.Go(func() {
		for _, o := range again {
			if err := l.Send(o.Operation); err != nil {
				l.cancel(err)
				return
			}
		}
	})
	err := l.lost(f.read(l))
	l.cancel(err)
	var remote *RemoteError
	if errors.As(err, &remote) {
		f.fail(fmt.Errorf("the device has moved away, and is not served there any more: %w", err))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.link == l {
		f.link = nil
		f.watch()
	}
	return err
}

// read takes results until the connection ends.
func (f *forwarder) read(l *link) error {
	for {
		m, err := l.receive(nil)
		if err != nil {
			return err
		}
		r, ok := m.(wire.Result)
		if !ok {
			return fmt.Errorf("%w: %T on a forward lane", wire.ErrProtocol, m)
		}
		f.mu.Lock()
		o := f.pending[r.ID]
		delete(f.pending, r.ID)
		f.mu.Unlock()
		switch {
		case o == nil: // another connection had its result
		case r.Failed:
			o.done <- fmt.Errorf("where the device has moved to: %s", wire.Printable(r.Data))
		case len(r.Data) != len(o.into):
			o.done <- fmt.Errorf("%w: %d bytes instead of %d", wire.ErrProtocol, len(r.Data), len(o.into))
		default:
			copy(o.into, r.Data)
			o.done <- nil
		}
	}
}

// forwardedDevice is a device that has moved away. It implements [block.Device].
type forwardedDevice struct {
	f     *forwarder
	index int
	size  int64
}

func (d *forwardedDevice) Size() int64 { return d.size }

// each calls f for parts of a range that fit one operation.
func (d *forwardedDevice) each(off, length int64, f func(off, length int64) error) error {
	if off < 0 || length < 0 || off > d.size-length {
		return fmt.Errorf("%d bytes at %d of a device of %d: %w", length, off, d.size, block.ErrRange)
	}
	for length > 0 {
		n := min(length, wire.MaxExtent)
		if err := f(off, n); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

func (d *forwardedDevice) ReadAt(p []byte, off int64) (int, error) {
	err := d.each(off, int64(len(p)), func(at, n int64) error {
		return d.f.do(&operation{Operation: wire.Operation{Device: d.index, Kind: wire.Read, Off: at, Length: n}, into: p[at-off : at-off+n]})
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (d *forwardedDevice) WriteAt(p []byte, off int64) (int, error) {
	err := d.each(off, int64(len(p)), func(at, n int64) error {
		return d.f.do(&operation{Operation: wire.Operation{Device: d.index, Kind: wire.Write, Off: at, Length: n, Data: p[at-off : at-off+n]}})
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (d *forwardedDevice) Trim(off, length int64) error {
	return d.each(off, length, func(at, n int64) error {
		return d.f.do(&operation{Operation: wire.Operation{Device: d.index, Kind: wire.Trim, Off: at, Length: n}})
	})
}

func (d *forwardedDevice) Sync() error {
	return d.f.do(&operation{Operation: wire.Operation{Device: d.index, Kind: wire.Sync}})
}

func (d *forwardedDevice) Close() error { return nil }

// Forwards tells whether the source has users of the devices that go on there; see
// [Target.ServeForwards].
func (t *Target) Forwards() bool { return t.forwards }

// ServeForwards does the operations of users at the source on devices, in the order of the
// manifest. It returns when ctx ends, when the source does not want that any more, or when the
// source has not been reached for a minute. Call it once the target owns the devices. When ctx
// ends, the source is told that they are no longer served.
func (t *Target) ServeForwards(ctx context.Context, devices []block.Device) {
	reached := time.Now()
	for ctx.Err() == nil {
		l, err := t.connect(context.WithoutCancel(ctx), wire.Forward, false)
		if err == nil {
			err = serveForwards(ctx, l, devices)
			reached = time.Now()
		}
		var remote *RemoteError
		switch {
		case ctx.Err() != nil:
			return
		case errors.As(err, &remote):
			t.config.Logger.Debug("Users of the devices at their source", "error", err)
			return
		case time.Since(reached) > forwardPatience:
			t.config.Logger.Warn("The source of the devices, where they have users, cannot be reached any more", "error", err)
			return
		}
		select {
		case <-time.After(t.config.Limits.Reconnect):
		case <-ctx.Done():
		}
	}
}

// serveForwards serves one connection until it ends.
func serveForwards(ctx context.Context, l *link, devices []block.Device) error {
	var sizes []int64
	for _, d := range devices {
		sizes = append(sizes, d.Size())
	}
	stop := context.AfterFunc(ctx, func() {
		l.refuse(wire.CodeCancelled, errors.New("its mounter was ended"))
		l.cancel(context.Cause(ctx))
	})
	defer stop()
	var wg sync.WaitGroup
	slots := make(chan struct{}, forwardsAtOnce)
	var err error
	for {
		var m any
		if m, err = l.receive(sizes); err != nil {
			break
		}
		o, ok := m.(wire.Operation)
		if !ok {
			err = fmt.Errorf("%w: %T on a forward lane", wire.ErrProtocol, m)
			break
		}
		o.Data = slices.Clone(o.Data)
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := l.Send(perform(devices[o.Device], o)); err != nil {
				l.cancel(err)
			}
		})
	}
	l.close(err)
	wg.Wait()
	return err
}

func perform(d block.Device, o wire.Operation) wire.Result {
	r := wire.Result{ID: o.ID}
	var err error
	switch o.Kind {
	case wire.Read:
		r.Data = make([]byte, o.Length)
		_, err = d.ReadAt(r.Data, o.Off)
	case wire.Write:
		_, err = d.WriteAt(o.Data, o.Off)
	case wire.Trim:
		err = block.Trim(d, o.Off, o.Length)
	case wire.Sync:
		err = d.Sync()
	}
	if err != nil {
		r.Failed, r.Data = true, []byte(err.Error())
	}
	return r
}

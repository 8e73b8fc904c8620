package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"time"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// A copy is a migration whose VM stays where it is: pre-copy as usual, a pause in which the rest is
// put aside, and then its delivery, while the VM goes on. A copy is never in doubt, because it
// never gives the VM away.

// Baseline is the content of a source's last copy to one place, so that the next copy brings only
// what has changed since, in whole blocks of [block.ContentBlockSize]. Its zero value is a place
// that holds nothing. Use it for one copy at a time; its methods are safe for concurrent use.
type Baseline struct {
	mu      sync.Mutex
	watches map[*block.Tracker]*block.Watch
	taken   map[*block.Tracker]*block.Bitmap // of the copy under way
	held    bool                             // the last copy has been delivered
	// What targets can reach of the last copy; nil from a copy's beginning to its end.
	stored map[*block.Tracker]block.ID
	before map[*block.Tracker]block.ID // what was stored when the copy under way began
}

// Held tells whether there is a copy that the next one can build on.
func (b *Baseline) Held() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.held
}

// Forget makes the next copy a full one.
func (b *Baseline) Forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.forget()
}

func (b *Baseline) forget() {
	for _, w := range b.watches {
		w.Close()
	}
	b.watches, b.taken, b.held, b.stored, b.before = nil, nil, false, nil, nil
}

// Stored notes the content ids of devices of the last copy, which targets of migrations can reach;
// see [SourceConfig].
func (b *Baseline) Stored(ids map[*block.Tracker]block.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stored = ids
}

// backup returns the content id of a device where it is stored, and the pages that have changed
// since. They stay changed. The id is zero if the device is not stored, and while a copy has not
// ended: pages that the copy took do not count as changed then.
func (b *Baseline) backup(d *block.Tracker) (block.ID, *block.Bitmap) {
	if b == nil {
		return block.ID{}, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	w := b.watches[d]
	if w == nil || b.stored[d] == (block.ID{}) {
		return block.ID{}, nil
	}
	pages := w.Take()
	w.Return(pages)
	return b.stored[d], pages
}

// Changed returns the pages of a device of the source that have changed since the last copy, or nil
// if that is not known. The next copy does not bring them.
func (b *Baseline) Changed(d *block.Tracker) *block.Bitmap {
	b.mu.Lock()
	defer b.mu.Unlock()
	w := b.watches[d]
	if w == nil || !b.held {
		return nil
	}
	return w.Take()
}

// begin returns the pages of a device that have changed since the last copy, or nil if there was
// none.
func (b *Baseline) begin(d *outgoingDevice) *block.Bitmap {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.stored != nil {
		b.stored, b.before = nil, b.stored
	}
	w := b.watches[d.Device]
	if w == nil {
		if b.watches == nil {
			b.watches, b.taken = map[*block.Tracker]*block.Watch{}, map[*block.Tracker]*block.Bitmap{}
		}
		b.watches[d.Device] = d.Device.Watch()
		return nil
	}
	b.taken[d.Device] = w.Take()
	return b.taken[d.Device]
}

// advance makes the paused VM the new baseline.
func (b *Baseline) advance() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for t, w := range b.watches {
		pages := w.Take()
		if b.taken[t] != nil {
			pages.Add(b.taken[t])
		}
		b.taken[t] = pages
	}
}

// end notes the result of the copy. The next copy brings what a failed one took.
func (b *Baseline) end(delivered bool) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case delivered:
		b.held, b.stored, b.before = true, nil, nil
		clear(b.taken)
	case !b.held:
		b.forget()
	default:
		for t, pages := range b.taken {
			b.watches[t].Return(pages)
		}
		clear(b.taken)
		if b.before != nil {
			b.stored, b.before = b.before, nil
		}
	}
}

// wholeBlocks adds to pages the other pages of their blocks that have not been sent in this copy.
func wholeBlocks(d *outgoingDevice, pages *block.Bitmap) *block.Bitmap {
	const n = block.ContentBlockSize / block.PageSize
	whole := pages.Clone()
	for p := pages.Next(0); p < pages.Len(); p = pages.Next((p/n + 1) * n) {
		for q := p / n * n; q < min((p/n+1)*n, pages.Len()); q++ {
			if d.held[q] == 0 {
				whole.Set(q)
			}
		}
	}
	return whole
}

// stashLimit is how many bytes of the rest of a copy are kept in memory, so that the VM need not
// wait until they are sent.
const stashLimit = 64 << 20

// stashed are pages as they were while the VM was paused.
type stashed struct {
	device     *outgoingDevice
	first, end int64
	data       []byte
}

// freeze pauses the VM and makes all that the target lacks pending.
func (o *outgoing) freeze(ctx context.Context) (paused time.Time, err error) {
	vm := o.config.VM
	if paused, err = vm.Pause(ctx); err != nil {
		return paused, err
	}
	o.figures.update(func(f *figures) { f.paused = paused })
	if err := vm.Save(ctx, o.id, nil); err != nil {
		return paused, err
	}
	if err := vm.Flush(ctx); err != nil {
		return paused, err
	}
	o.take()
	return paused, nil
}

// snapshot pauses the VM until the rest of the copy is put aside.
func (o *outgoing) snapshot(ctx context.Context) (migrate.Phase, error) {
	ctx, cancel := o.revocable(ctx, o.first)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { o.first.cancel(context.Cause(ctx)) })
	defer stop()
	paused, err := o.freeze(ctx)
	if err != nil {
		return "", err
	}
	if o.left()*block.PageSize > stashLimit {
		if err := o.drain(ctx, o.first, time.Time{}); err != nil {
			return "", o.first.lost(err)
		}
	}
	if err := o.fillStash(); err != nil {
		return "", err
	}
	o.copying.baseline.advance()
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err := o.config.VM.Rescue(context.WithoutCancel(ctx)); err != nil {
		return "", err
	}
	o.figures.update(func(f *figures) { f.downtime = time.Since(paused) })
	return migrate.Delivering, nil
}

func (o *outgoing) fillStash() error {
	for _, d := range o.devices {
		for first := d.pending.Next(0); first < d.pending.Len(); first = d.pending.Next(first) {
			_, end := d.pending.Run(first, min(d.pending.Len(), first+maxRun))
			s := stashed{d, first, end, make([]byte, bytesOf(d.Device, first, end))}
			if _, err := d.Device.ReadAt(s.data, first*block.PageSize); err != nil {
				return fmt.Errorf("device %s: %w", d.Name, err)
			}
			o.copying.stash = append(o.copying.stash, s)
			d.pending.ClearRange(first, end)
			first = end
		}
	}
	return nil
}

// deliver sends what was put aside, and waits until the target has made everything durable.
func (o *outgoing) deliver(ctx context.Context) (_ migrate.Phase, err error) {
	defer func() { o.copying.stash = nil }()
	lifetime := context.WithoutCancel(ctx)
	o.wg.Go(func() { o.config.VM.Rescued(lifetime) })
	l := o.first
	ctx, cancel := o.revocable(ctx, l)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.cancel(context.Cause(ctx)) })
	defer stop()
	for _, s := range o.copying.stash {
		o.sender.hash(s.data)
		copy(o.sender.buffer.Data(), s.data)
		if err := o.sendLoaded(ctx, l, o.sender, pages{s.device, s.first, s.end, purposePreCopy}); err != nil {
			return "", l.lost(fmt.Errorf("device %s: %w", s.device.Name, err))
		}
	}
	if err := l.Send(wire.Snapshot{Paused: o.figures.pause()}); err != nil {
		return "", l.lost(err)
	}
	select {
	case <-o.complete.fired():
	case <-ctx.Done():
		return "", fmt.Errorf("the target has not said that it has stored the copy: %w", context.Cause(ctx))
	}
	o.copying.delivered = true
	_ = l.Send(wire.TypeReleased) // the target has what it wanted; it need not get this message
	return migrate.Kept, nil
}

// Copy makes a copy of the VM in this process; the VM goes on. vm is asked to accept the copy, and
// to complete it once all is there, with every device as it was in one moment. The copy is never
// started. With a baseline, which may be nil, only what has changed since the last copy is brought.
func (s *Source) Copy(ctx context.Context, vm TargetVM, baseline *Baseline) (stats migrate.Stats, err error) {
	here, there := net.Pipe()
	limits := s.config.Limits
	// nothing gets lost within a process, and silence means that the process or its host stood
	// still
	limits.Silence = math.MaxInt64
	served := make(chan error, 1)
	go func() { served <- s.handle(context.WithoutCancel(ctx), there, limits.Silence, baseline) }()
	dial := func(context.Context) (io.ReadWriteCloser, error) { return here, nil }
	t, err := Receive(ctx, TargetConfig{VM: vm, Dial: dial, Limits: limits, Copy: true})
	// The target's error says whether the copy is there; the source's says why it is not.
	if serr := <-served; err != nil {
		err = errors.Join(err, serr)
	}
	baseline.end(err == nil)
	if t != nil {
		stats = t.Stats()
	}
	return stats, err
}

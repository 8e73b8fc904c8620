package migration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// preCopy sends everything, and then again and again what has changed meanwhile, until the rest is
// small enough.
func (o *outgoing) preCopy(ctx context.Context) (migrate.Phase, error) {
	ctx, cancel := o.revocable(ctx, o.first)
	defer cancel()
	var deadline time.Time
	if t := o.config.Limits.Timeout; t > 0 {
		deadline = time.Now().Add(t)
	}
	if err := o.pendAll(ctx); err != nil {
		return "", err
	}
	cycles, err := o.sendFirst(ctx)
	if err != nil {
		return "", err
	}
	previous := int64(-1)
	for pass := 1; ; pass++ {
		left, err := o.nextCycle(ctx, cycles+pass)
		if err != nil {
			return "", err
		}
		late := !deadline.IsZero() && time.Now().After(deadline)
		if late && o.config.Limits.AtTimeout == migrate.Cancel {
			return "", fmt.Errorf("the VM writes faster than the connection takes it: %d bytes are left after %s; allow more time, or post-copy", left, o.config.Limits.Timeout)
		}
		if pass > 1 && (late || o.converged(pass, left, previous)) {
			if o.ready.has() {
				return migrate.Preparing, nil
			}
			if late {
				return o.awaitReady(ctx)
			}
		}
		if err := o.drain(ctx, o.first, deadline); err != nil {
			return "", o.first.lost(err)
		}
		shrinks := previous < 0 || left < previous*3/4
		if pass > 1 && (!shrinks || !o.ready.has()) {
			if err := o.pause(ctx); err != nil {
				return "", err
			}
		}
		previous = left
	}
}

// pendAll makes everything pending that the target cannot have.
func (o *outgoing) pendAll(ctx context.Context) error {
	for _, d := range o.devices {
		if d.skip {
			continue
		}
		if err := o.pend(ctx, d); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	return nil
}

// pend makes everything of a device pending that the target cannot have.
func (o *outgoing) pend(ctx context.Context, d *outgoingDevice) error {
	written := d.Device.Take() // before all else: what is written from here on is dirty
	if pages := o.copying.baseline.begin(d); pages != nil {
		d.unknown, d.whole = true, true
		d.pending.Add(wholeBlocks(d, pages))
		return nil
	}
	switch {
	case d.stored:
		// What was written since the offer is dirty; what was before it, changed.
		d.unknown = true
		d.pending.Add(d.changed)
		d.pending.Add(written)
		return nil
	case len(d.contents) > 0:
		return d.pendChanged(ctx)
	case d.holds:
		d.pending.Add(d.Overlay.Pages())
		if d.Memory != nil {
			d.pending.Add(d.Memory.Unsaved())
		}
		return nil
	}
	return d.pendData()
}

// pendChanged makes pending what differs from the contents that the target holds.
func (d *outgoingDevice) pendChanged(ctx context.Context) error {
	c, err := block.Hash(ctx, d.Device)
	if err != nil {
		return err
	}
	d.unknown = true
	for b, id := range c.Blocks {
		if id != d.contents[b] {
			d.pending.SetRange(pagesOfBlock(d.Device, int64(b)))
		}
	}
	return nil
}

// pendData makes everything pending that is not a hole.
func (d *outgoingDevice) pendData() error {
	for off := int64(0); off < d.Device.Size(); {
		start, end, err := d.Device.NextData(off)
		if err != nil {
			return err
		}
		if start < end {
			d.pending.SetRange(start/block.PageSize, (end+block.PageSize-1)/block.PageSize)
		}
		off = max(end, off+1)
	}
	return nil
}

// sendFirst sends, in a cycle of its own, what the target needs before its VMM can start. The VMM
// then starts while the rest is sent. It returns the number of cycles.
func (o *outgoing) sendFirst(ctx context.Context) (cycles int, err error) {
	var first []*outgoingDevice
	var left int64
	for _, d := range o.devices {
		if d.First && !d.holds && !d.stored {
			first = append(first, d)
			left += d.pending.Count() * block.PageSize
		}
	}
	if left == 0 {
		return 0, nil
	}
	if err := o.beginCycle(1, left); err != nil {
		return 0, err
	}
	for _, d := range first {
		if err := o.drainDevice(ctx, o.first, d, true, time.Time{}); err != nil {
			return 0, o.first.lost(err)
		}
	}
	return 1, nil
}

// nextCycle makes pending what was written since the last cycle, and returns how many bytes are
// pending.
func (o *outgoing) nextCycle(ctx context.Context, cycle int) (left int64, err error) {
	if err := o.config.VM.Flush(ctx); err != nil {
		return 0, err
	}
	o.take()
	if err := o.hand(o.first); err != nil {
		return 0, o.first.sendLost(err)
	}
	for _, d := range o.devices {
		left += d.pending.Count() * block.PageSize
	}
	return left, o.beginCycle(cycle, left)
}

func (o *outgoing) beginCycle(cycle int, left int64) error {
	o.figures.update(func(f *figures) { f.cycle = cycle })
	return o.announce(cycle, left)
}

// announce tells the target of a cycle. The target answers when it has stored everything from
// before.
func (o *outgoing) announce(cycle int, left int64) error {
	o.cycles.announce(cycle)
	if err := o.first.Send(wire.Cycle{Number: cycle, Bytes: left}); err != nil {
		return o.first.sendLost(err)
	}
	return nil
}

// cycles are the cycles that the target was told of, and those that it has answered. They are safe
// for concurrent use.
type cycles struct {
	news chan struct{} // holds a token after an answer

	mu        sync.Mutex // guards the following
	announced int
	at        time.Time
	answered  int
	quickest  time.Duration // answer so far; 0: there was none
}

func newCycles() *cycles { return &cycles{news: make(chan struct{}, 1)} }

// announce notes that the target is being told of a cycle.
func (c *cycles) announce(cycle int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.announced, c.at = cycle, time.Now()
}

// answer notes the target's answer to a cycle.
func (c *cycles) answer(cycle int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cycle != c.announced || c.answered == cycle {
		return
	}
	c.answered = cycle
	if took := time.Since(c.at); c.quickest == 0 || took < c.quickest {
		c.quickest = took
	}
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// last returns the last cycle that was answered, and the quickest answer so far.
func (c *cycles) last() (answered int, quickest time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.answered, c.quickest
}

// catchUp waits until the target has stored what it was sent, if the target is near. Otherwise the
// target would do that while the VM is paused.
func (o *outgoing) catchUp(ctx context.Context) error {
	_, quickest := o.cycles.last()
	if quickest == 0 || quickest > o.config.tuning.nearby {
		return nil
	}
	cycle := o.figures.cycles() + 1
	if err := o.announce(cycle, 0); err != nil {
		return err
	}
	timeout := time.NewTimer(o.config.tuning.patience)
	defer timeout.Stop()
	for {
		select {
		case <-o.cycles.news:
			if answered, _ := o.cycles.last(); answered == cycle {
				return nil
			}
		case <-timeout.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// take makes pending what was written.
func (o *outgoing) take() {
	for _, d := range o.devices {
		pages := d.Device.Take()
		if d.whole {
			pages = wholeBlocks(d, pages)
		}
		if !d.skip {
			d.pending.Add(pages)
		}
	}
}

// negligible is a rest, in bytes, that is not worth another cycle.
const negligible = 64 * block.PageSize

// converged tells whether another cycle would bring nothing, or the devices' settings want no
// other.
func (o *outgoing) converged(cycle int, left, previous int64) bool {
	if left <= negligible {
		return true
	}
	// Half of the limit is for the rest of the pause: saving and restoring the state.
	fits := float64(left) <= o.sender.compression.link.perSecond()*o.config.Limits.Downtime.Seconds()/2
	if fits && previous >= 0 && left >= previous*3/4 {
		return true
	}
	all := true
	for _, d := range o.devices {
		if d.dirtyBlocks() <= d.MaxDirtyBlocks {
			d.quiet++
		}
		all = all && (d.skip || d.quiet >= d.MinCycles || cycle > d.MaxCycles)
	}
	return all
}

// dirtyBlocks is the number of blocks that have pending pages.
func (d *outgoingDevice) dirtyBlocks() (n int) {
	pages := d.Device.BlockSize() / block.PageSize
	for p := d.pending.Next(0); p < d.pending.Len(); p = d.pending.Next((p/pages + 1) * pages) {
		n++
	}
	return n
}

func (o *outgoing) awaitReady(ctx context.Context) (migrate.Phase, error) {
	timeout := time.NewTimer(o.config.Limits.Handoff)
	defer timeout.Stop()
	if err := o.first.Send(wire.TypeReady); err != nil {
		return "", o.first.sendLost(err)
	}
	select {
	case <-o.ready.fired():
		return migrate.Preparing, nil
	case <-timeout.C:
		return "", errors.New("the target's VMM does not get ready")
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// pause waits between cycles for the shortest of the devices' throttles, or until the target's VMM
// is ready.
func (o *outgoing) pause(ctx context.Context) error {
	var throttles []time.Duration
	for _, d := range o.devices {
		if !d.skip {
			throttles = append(throttles, d.CycleThrottle)
		}
	}
	if len(throttles) == 0 {
		throttles = []time.Duration{0}
	}
	timer := time.NewTimer(slices.Min(throttles))
	defer timer.Stop()
	ready := o.ready.fired()
	if o.ready.has() {
		ready = nil
	}
	select {
	case <-timer.C:
	case <-ready:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

package migration

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// serve sends the target what it lacks, over all connections that it makes, until it has
// everything, or an operator has settled that it never will.
func (o *outgoing) serve(ctx context.Context) (migrate.Phase, error) {
	settled := make(chan struct{})
	noted := o.noteServing(ctx, settled)
	var ask <-chan time.Time
	if o.handed != nil {
		tick := time.NewTicker(askAgain)
		defer tick.Stop()
		ask = tick.C
	}
	for {
		l, attached := o.lanes.follow()
		if err := o.push(ctx, l); err != nil {
			l.cancel(err)
		}
		select {
		case <-o.complete.fired():
			<-noted
			return o.release(ctx)
		case <-attached:
		case <-ask:
			ours, err := o.handed.Memory.TakeBack()
			if err != nil {
				return "", err
			}
			if ours { // the target had claimed the VM, and could not resume it
				close(settled)
				<-noted
				return migrate.Rescuing, nil
			}
		case d := <-o.settled:
			switch {
			case d.in != migrate.Serving:
			case d.outcome == undecided:
				stats := o.Stats()
				_, _, left := stats.Bytes()
				return "", fmt.Errorf("%w, and its target, which may lack %d bytes, takes nothing more from here", migrate.ErrHandedOver, left)
			case o.lanes.connected(): // it is back
			case d.outcome == migrate.Here:
				close(settled)
				<-noted
				return migrate.Rescuing, nil
			default:
				close(settled)
				<-noted
				return o.release(ctx)
			}
		case <-ctx.Done():
			return "", fmt.Errorf("%w: %w", migrate.ErrHandedOver, context.Cause(ctx))
		}
	}
}

// noteServing notes that the VM runs at its target, unless the target has everything soon, or it is
// settled. The channel is closed when the note has been begun, or will not be made.
func (o *outgoing) noteServing(ctx context.Context, settled <-chan struct{}) <-chan struct{} {
	noted := make(chan struct{})
	o.wg.Go(func() {
		defer close(noted)
		note := time.NewTimer(o.config.tuning.note)
		defer note.Stop()
		select {
		case <-o.complete.fired():
			return
		case <-settled:
			return
		case <-note.C:
		case <-ctx.Done():
		}
		o.mark(ctx, migrate.Serving)
	})
	return noted
}

// release notes that the target has everything, and tells it so.
func (o *outgoing) release(ctx context.Context) (migrate.Phase, error) {
	<-o.mark(ctx, migrate.Moved)
	l, _ := o.lanes.get()
	_ = l.Send(wire.TypeReleased) // a target that does not get it asks again, and then goes on
	return migrate.Moved, nil
}

// push sends everything that is pending, in pieces that do not keep the connection from pages that
// somebody waits for. The device that lacks least comes first: a target that has its disks can boot
// from them, whatever becomes of the rest. It returns early when the link has ended.
func (o *outgoing) push(ctx context.Context, l *link) error {
	left := map[*outgoingDevice]int64{}
	for _, d := range o.devices {
		left[d] = d.pending.Count()
	}
	devices := slices.SortedFunc(maps.Keys(left), func(a, b *outgoingDevice) int {
		return cmp.Or(cmp.Compare(left[a], left[b]), cmp.Compare(a.index, b.index))
	})
	for _, d := range devices {
		for first := d.pending.Next(0); first < d.pending.Len(); first = d.pending.Next(first) {
			_, end := d.pending.Run(first, min(d.pending.Len(), first+postCopyRun))
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if alive, err := o.sendPending(l, o.sender, d, first, end, purposePostCopy); err != nil || !alive {
				return err
			}
			first = end
		}
	}
	return nil
}

// sendPending sends pages after the handoff, unless the link has ended. Then they stay pending: the
// target says what it lacks when it comes back.
func (o *outgoing) sendPending(l *link, s *sender, d *outgoingDevice, first, end int64, why purpose) (alive bool, err error) {
	o.sending.RLock()
	defer o.sending.RUnlock()
	if l.ctx.Err() != nil {
		return false, nil
	}
	d.pending.ClearRange(first, end)
	if err := o.sendPages(l.ctx, l, s, pages{d, first, end, why}); err != nil {
		return false, fmt.Errorf("device %s: %w", d.Name, err)
	}
	return true, nil
}

// startServing answers wants from here on, until ctx ends.
func (o *outgoing) startServing(ctx context.Context) {
	o.serving.Do(func() {
		o.wg.Go(func() {
			s, err := newSender()
			if err != nil {
				o.lanes.urgent().cancel(err)
				return
			}
			defer s.close()
			for {
				select {
				case w := <-o.wants:
					l := o.lanes.urgent()
					if err := o.answer(l, s, w); err != nil {
						l.cancel(err)
					}
				case <-ctx.Done():
					return
				}
			}
		})
	})
}

// answer sends the pages of a want, and then what is pending of the blocks around them.
func (o *outgoing) answer(l *link, s *sender, w wire.Want) error {
	d := o.devices[w.Device]
	if d.skip {
		return fmt.Errorf("%w: pages wanted of device %s, which is not sent", wire.ErrProtocol, d.Name)
	}
	for first := w.First; first < w.Ends; {
		end := min(w.Ends, first+postCopyRun)
		if alive, err := o.sendPending(l, s, d, first, end, purposeWanted); err != nil || !alive {
			return err
		}
		first = end
	}
	pages := d.Device.BlockSize() / block.PageSize
	around, aroundEnd := w.First/pages*pages, min((w.Ends+pages-1)/pages*pages, d.pending.Len())
	for first := d.pending.Next(around); first < aroundEnd; first = d.pending.Next(first) {
		_, end := d.pending.Run(first, min(aroundEnd, first+postCopyRun))
		if alive, err := o.sendPending(l, s, d, first, end, purposePostCopy); err != nil || !alive {
			return err
		}
		first = end
	}
	return nil
}

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// prepare lets the guest get ready, and sends what that changed.
func (o *outgoing) prepare(ctx context.Context) (migrate.Phase, error) {
	ctx, cancel := o.revocable(ctx, o.first)
	defer cancel()
	if lander, ok := o.config.VM.(Lander); ok {
		if err := lander.AwaitLinks(ctx); err != nil {
			return "", err
		}
	}
	if !o.asks.copy {
		if err := o.first.Send(wire.TypePrepare); err != nil {
			return "", o.first.sendLost(err)
		}
	}
	pctx, pcancel := context.WithTimeoutCause(ctx, o.config.Limits.Prepare, fmt.Errorf("the guest did not get ready within %s", o.config.Limits.Prepare))
	err := o.config.VM.Prepare(pctx)
	pcancel()
	switch {
	case err == nil:
	case !errors.Is(err, migrate.ErrNotReady) || ctx.Err() != nil:
		return "", err
	case !o.asks.force:
		return "", fmt.Errorf("%w; look at the guest, or take the VM as it is, with --force", err)
	default:
		o.config.Logger.Warn("The VM is taken as it is, because the target says so", "error", err)
	}
	if _, err := o.nextCycle(ctx, o.figures.cycles()+1); err != nil {
		return "", err
	}
	// What does not fit is left to post-copy. Without post-copy everything is sent, before the
	// pause as far as possible.
	var until time.Time
	if !o.config.Limits.NoPostCopy && !o.asks.copy {
		until = time.Now().Add(o.config.Limits.Downtime)
	}
	if err := o.drain(ctx, o.first, until); err != nil {
		return "", o.first.lost(err)
	}
	if o.asks.copy {
		return migrate.Snapshotting, nil
	}
	if err := o.config.VM.Leave(ctx, o.id); err != nil {
		return "", err
	}
	if err := o.awaitPrepared(ctx); err != nil {
		return "", err
	}
	if err := o.catchUp(ctx); err != nil {
		return "", err
	}
	// What was written meanwhile is sent now, while the VM runs.
	if err := o.config.VM.Flush(ctx); err != nil {
		return "", err
	}
	o.take()
	if err := o.drain(ctx, o.first, until); err != nil {
		return "", o.first.lost(err)
	}
	return migrate.HandingOff, nil
}

// awaitPrepared waits until the target has noted durably that it may take the VM over. Otherwise
// the target would do that while the VM is paused.
func (o *outgoing) awaitPrepared(ctx context.Context) error {
	timeout := time.NewTimer(o.config.Limits.Prepare)
	defer timeout.Stop()
	select {
	case <-o.prepared.fired():
	case <-timeout.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// handOff pauses the VM, sends what is left, and gives it away.
func (o *outgoing) handOff(ctx context.Context) (migrate.Phase, error) {
	l := o.first
	ctx, cancel := o.revocable(ctx, l)
	defer cancel()
	// A write that hangs ends with its link.
	stop := context.AfterFunc(ctx, func() { l.cancel(context.Cause(ctx)) })
	defer stop()
	paused, err := o.config.VM.Pause(ctx)
	if err != nil {
		return "", err
	}
	o.figures.update(func(f *figures) { f.paused = paused })
	var until time.Time
	if !o.config.Limits.NoPostCopy {
		until = paused.Add(o.config.Limits.Downtime / 2)
	}
	if err := o.save(ctx, l, until); err != nil {
		return "", l.lost(err)
	}
	if o.handed != nil {
		o.handed.Memory.Retain()
	}
	missing := make([]*block.Bitmap, len(o.devices))
	for i, d := range o.devices {
		missing[i] = d.pending.Clone()
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	select {
	case a := <-o.acks: // of a target that has reconnected meanwhile
		return "", errors.New(a.Reason)
	default:
	}
	// From the first byte of the authority on, the VM may be the target's, whatever this end is
	// told.
	stop()
	if err := l.Send(wire.Authority{Paused: time.Since(paused), Missing: missing}); err != nil {
		l.cancel(err)
	}
	return migrate.InDoubt, nil
}

// part is up to where a state has its final content. It may be early.
type part struct {
	end   int64
	early bool
}

// save saves the paused VM, and sends what the target lacks until then. Beside the save, memory is
// sent. If that was all, the state follows while it is made, so that the target's VMM loads it
// meanwhile. What is early goes ahead, and all of it does if the target has the memory itself.
func (o *outgoing) save(ctx context.Context, l *link, until time.Time) error {
	vm := o.config.VM
	parts := make(chan part, 1)
	saved := make(chan error, 1)
	go func() {
		defer close(parts)
		saved <- vm.Save(ctx, o.id, func(end int64, early bool) {
			select {
			case <-parts: // an earlier one
			default:
			}
			parts <- part{end, early}
		})
	}()
	var written chan error // nil while nothing of memory is to be sent
	if o.handed == nil {
		written = make(chan error, 1)
		go func() { written <- vm.WriteBack(ctx) }()
	}
	var err error
	var made part
	all := o.handed != nil
	for more := true; more || written != nil; {
		select {
		case made, more = <-parts:
			if !more {
				parts = nil // the save has ended
				continue
			}
		case werr := <-written:
			written = nil
			if err = errors.Join(err, werr); err == nil {
				o.take()
				err = o.drain(ctx, l, until)
			}
			all = o.left() == 0
		}
		if err == nil && made.end > 0 && (made.early || all) {
			err = o.sendState(ctx, l, made.end)
		}
	}
	if serr := <-saved; serr != nil {
		err = serr
	}
	if err == nil {
		err = vm.Flush(ctx)
	}
	if err != nil {
		return err
	}
	o.take()
	return o.drain(ctx, l, until)
}

// sendState sends what was saved until now, and says up to where that is final.
func (o *outgoing) sendState(ctx context.Context, l *link, end int64) error {
	o.take()
	for _, d := range o.devices {
		if !d.First {
			continue
		}
		if err := o.drainDevice(ctx, l, d, true, time.Time{}); err != nil {
			return err
		}
	}
	if err := l.Flush(); err != nil {
		return err
	}
	return l.Send(wire.State{Final: end})
}

// left is the number of pages to send.
func (o *outgoing) left() (pages int64) {
	for _, d := range o.devices {
		pages += d.pending.Count()
	}
	return pages
}

// settle waits until it is known who owns the VM.
func (o *outgoing) settle(ctx context.Context) (migrate.Phase, error) {
	o.startServing(ctx)
	next, err := o.awaitAnswer(ctx)
	if err != nil {
		o.mark(ctx, migrate.InDoubt)
		return "", errors.Join(migrate.ErrInDoubt, err)
	}
	return next, nil
}

// mark notes the VM's status, and returns a channel that is closed when that is done.
func (o *outgoing) mark(ctx context.Context, phase migrate.Phase) <-chan struct{} {
	return o.marks.make(context.WithoutCancel(ctx), &o.wg, o.config.VM, phase, o.id)
}

// awaitAnswer waits for the target to take the VM or to refuse it, or for an operator. Most answers
// come sooner than the doubt could be noted.
func (o *outgoing) awaitAnswer(ctx context.Context) (migrate.Phase, error) {
	note := time.NewTimer(o.config.tuning.note)
	defer note.Stop()
	var parted <-chan struct{}
	if o.handed != nil { // then there is no doubt: either side may ask the memory
		parted = o.first.ctx.Done()
	}
	for {
		select {
		case <-parted:
			parted = nil
			if next, known, err := o.askMemory(); known || err != nil {
				return next, err
			}
		case a := <-o.acks:
			if !a.Accepted {
				o.refused(a.Reason)
				return migrate.Rescuing, nil
			}
			o.figures.update(func(f *figures) { f.downtime = time.Since(f.paused) })
			return migrate.Serving, nil
		case d := <-o.settled:
			switch {
			case d.in != migrate.InDoubt:
			case d.outcome == undecided:
				if next, known, err := o.askMemory(); known || err != nil {
					return next, err
				}
				return "", errors.New("the source was ended")
			case d.outcome == migrate.Here:
				o.refused("an operator decided so")
				return migrate.Rescuing, nil
			default:
				return migrate.Serving, nil
			}
		case <-note.C:
			o.mark(ctx, migrate.InDoubt)
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

func (o *outgoing) refused(reason string) {
	if l, _ := o.lanes.get(); l != nil {
		l.cancel(errors.New("the target refused the VM: " + reason))
	}
}

// rescue lets the VM go on.
func (o *outgoing) rescue(ctx context.Context) (migrate.Phase, error) {
	o.marks.made()
	ctx = context.WithoutCancel(ctx)
	if err := o.takeBack(); err != nil {
		return "", err
	}
	if err := o.config.VM.Rescue(ctx); err != nil {
		return "", err
	}
	o.config.VM.Rescued(ctx)
	return migrate.Kept, nil
}

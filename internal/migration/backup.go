package migration

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"drafter/internal/block"
	"drafter/internal/wire"
)

// A target that reaches a backup of the VM fetches unchanged content from there, while the source
// sends the rest. The target says that it is ready once it has both, so the backup plays no part in
// the handoff. What the backup fails to give, the source sends.

// Backup is a device in a backup.
type Backup struct {
	block.Remote
	Beneath *block.Contents // what the target has already; nil for zeros
}

const (
	backupFetch    = 4  // blocks of one request
	backupRequests = 16 // at once
	backupAttempts = 3
)

// restoring is the content that a target fetches from backups.
type restoring struct {
	left    atomic.Int64  // pages of all devices
	here    chan struct{} // closed when none is left
	once    sync.Once
	hurry   chan struct{} // closed when the source waits for nothing else
	hurried sync.Once
	ctx     context.Context // nil until something is fetched
	cancel  context.CancelCauseFunc
	// closed when nothing is fetched any more, and the source has been asked for what the backups
	// did not give
	asked chan struct{}
}

var errEnded = errors.New("the migration has ended")

func newRestoring() *restoring {
	return &restoring{here: make(chan struct{}), asked: make(chan struct{}), hurry: make(chan struct{})}
}

// end ends the fetching.
func (r *restoring) end() {
	if r.ctx != nil {
		r.cancel(errEnded)
		<-r.asked
	}
}

// took notes that so many pages are no longer left.
func (r *restoring) took(pages int64) {
	if r.left.Add(-pages) == 0 {
		r.once.Do(func() { close(r.here) })
	}
}

// beginBackups notes what the backups have to give of each device.
func (t *Target) beginBackups() error {
	for _, d := range t.devices {
		if d.Held != wire.HoldsBackup {
			continue
		}
		blocks := d.Backup.Contents.Blocks
		if err := d.Backup.Contents.Check(); err != nil || d.Backup.Contents.Size != d.Device.Size() {
			return errors.Join(fmt.Errorf("device %s: its backup is not one of it", d.name), err)
		}
		d.left = block.NewBitmap(block.Pages(d.Device))
		for b, id := range blocks {
			var beneath block.ID
			if d.Backup.Beneath != nil {
				beneath = d.Backup.Beneath.Blocks[b]
			}
			if id != beneath {
				d.left.SetRange(pagesOfBlock(d.Device, int64(b)))
			}
		}
		t.restoring.left.Add(d.left.Count())
	}
	t.restoring.took(0)
	return nil
}

func pagesOfBlock(d block.Device, b int64) (first, end int64) {
	const pages = block.ContentBlockSize / block.PageSize
	return b * pages, min((b+1)*pages, block.Pages(d))
}

// fetchBackups fetches what is in the backups, first the devices that the VMM needs to start. It
// asks the source for what it could not fetch.
func (t *Target) fetchBackups(ctx context.Context, l *link) error {
	r := t.restoring
	defer close(r.asked)
	defer r.cancel(nil)
	stop := context.AfterFunc(l.ctx, func() { r.cancel(errEnded) })
	defer stop()
	done := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(done)
	wg.Go(func() {
		select {
		case <-r.hurry:
			r.cancel(errors.New("the source waits for nothing else"))
		case <-done:
		}
	})
	for _, first := range []bool{true, false} {
		g, gctx := errgroup.WithContext(r.ctx)
		g.SetLimit(backupRequests)
		for _, d := range t.devices {
			if d.left != nil && d.First == first {
				t.fetchBackup(gctx, g, d)
			}
		}
		if err := g.Wait(); err != nil {
			return err
		}
		cycle := t.figures.cycles()
		t.startWhenPossible(ctx, cycle)
	}
	switch cause := context.Cause(r.ctx); {
	case ctx.Err() != nil || errors.Is(cause, errEnded):
		return nil
	case cause != nil && r.left.Load() > 0:
		t.config.Logger.Warn("Not all of the backup could be had; the source sends the rest", "bytes", r.left.Load()*block.PageSize, "error", cause)
	}
	for _, d := range t.devices {
		if d.left == nil {
			continue
		}
		for first := d.left.Next(0); first < d.left.Len(); first = d.left.Next(first) {
			_, end := d.left.Run(first, d.left.Len())
			if err := l.Send(wire.Want{Device: d.index, First: first, Ends: end}); err != nil {
				return l.lost(err)
			}
			first = end
		}
	}
	return nil
}

// fetchBackup fetches what is in the backup of a device. A failure of the backup ends that, and is
// no error.
func (t *Target) fetchBackup(ctx context.Context, g *errgroup.Group, d *incomingDevice) {
	blocks := d.Backup.Contents.Blocks
	wanted := func(b int64) bool {
		first, end := pagesOfBlock(d.Device, b)
		return d.left.Next(first) < end
	}
	for b := int64(0); b < int64(len(blocks)) && ctx.Err() == nil; {
		first := b
		zero := blocks[b] == block.ID{}
		for b++; b < int64(len(blocks)) && b < first+backupFetch && (blocks[b] == block.ID{}) == zero && wanted(b) && wanted(first); b++ {
		}
		if !wanted(first) {
			continue
		}
		g.Go(func() error {
			e := wire.Extent{Device: d.index, Encoding: wire.Zero, Off: first * block.ContentBlockSize}
			e.Len = min(b*block.ContentBlockSize, d.Device.Size()) - e.Off
			if !zero {
				e.Encoding, e.Data = wire.Raw, make([]byte, e.Len)
				if err := d.Backup.fetch(ctx, first, e.Data, t.config.Limits.Reconnect); err != nil {
					t.restoring.cancel(err)
					return nil
				}
			}
			if err := d.storeBackup(t.restoring, e); err != nil {
				return fmt.Errorf("device %s: %w", d.name, err)
			}
			return nil
		})
	}
}

// fetch gets blocks and verifies them. It makes some attempts.
func (b *Backup) fetch(ctx context.Context, first int64, p []byte, pause time.Duration) error {
	for attempt := 1; ; attempt++ {
		err := b.Fetcher.Fetch(ctx, first, p, false)
		for i := 0; err == nil && i < len(p); i += block.ContentBlockSize {
			n := first + int64(i)/block.ContentBlockSize
			if block.HashBlock(p[i:min(i+block.ContentBlockSize, len(p))]) != b.Contents.Blocks[n] {
				err = fmt.Errorf("block %d of the backup is damaged", n)
			}
		}
		if err == nil || attempt == backupAttempts || errors.Is(err, block.ErrReplaced) || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// storeBackup stores the pages of an extent of the backup that the source has not sent.
func (d *incomingDevice) storeBackup(r *restoring, e wire.Extent) error {
	d.store.Lock()
	defer d.store.Unlock()
	if d.opened.Load() {
		return nil // everything that is left was asked for
	}
	end := (e.Off + e.Len + block.PageSize - 1) / block.PageSize
	for at := d.left.Next(e.Off / block.PageSize); at < end; at = d.left.Next(at) {
		_, next := d.left.Run(at, end)
		part := wire.Extent{Device: e.Device, Encoding: e.Encoding, Off: at * block.PageSize, Len: bytesOf(d.Device, at, next)}
		var err error
		if e.Encoding == wire.Zero {
			_, err = d.Device.ArriveZeros(part.Off, part.Len)
		} else {
			part.Data = e.Data[part.Off-e.Off:][:part.Len]
			_, err = d.Device.Arrive(part.Data, part.Off)
		}
		if err != nil {
			return err
		}
		d.fetched.Add(part.Len)
		r.took(d.left.ClearRange(at, next))
		at = next
	}
	return nil
}

// awaitBackups waits until everything in the backups is here, or the source wants to send the rest
// after the handoff.
func (t *Target) awaitBackups(ctx context.Context) error {
	l, _ := t.lanes.get() // until the handoff there is but one
	select {
	case <-t.restoring.here:
		return nil
	case <-t.restoring.hurry:
	case <-l.ctx.Done():
		return context.Cause(l.ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case <-t.restoring.asked:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

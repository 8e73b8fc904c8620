package migration

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"drafter/internal/block"
	"drafter/internal/wire"
)

// incomingDevice is a device that arrives.
type incomingDevice struct {
	TargetDevice
	name  string
	index int
	// held while pages are stored before the handoff, if there is a backup
	store sync.Mutex
	// pages that the source does not send, and that the backup has not given yet; nil without
	left     *block.Bitmap
	asked    *block.Bitmap // pages that were wanted
	received atomic.Int64
	saved    atomic.Int64
	postCopy atomic.Int64
	wanted   atomic.Int64
	fetched  atomic.Int64 // from the backup
	opened   atomic.Bool
}

// store writes pages that have arrived to their device.
func (t *Target) store(l *link, e wire.Extent) error {
	d := t.devices[e.Device]
	if d.Device == nil {
		return fmt.Errorf("%w: it was not wanted", wire.ErrProtocol)
	}
	if d.left != nil && !d.opened.Load() { // only this goroutine opens
		d.store.Lock()
		defer d.store.Unlock()
	}
	var used int64
	var err error
	switch e.Encoding {
	case wire.Raw:
		used, err = d.Device.Arrive(e.Data, e.Off)
		d.received.Add(e.Len)
	case wire.Zero:
		used, err = d.Device.ArriveZeros(e.Off, e.Len)
		d.saved.Add(e.Len)
	case wire.Same:
		used, err = d.Device.ArriveSame(e.Off, e.Len)
		d.saved.Add(e.Len)
	}
	if err != nil {
		return err
	}
	if d.opened.Load() {
		d.postCopy.Add(used)
		_, demand := t.lanes.get()
		demanded := l == demand
		if demanded {
			d.wanted.Add(used)
		}
		return nil
	}
	if d.left != nil {
		t.restoring.took(d.left.ClearRange(e.Off/block.PageSize, (e.Off+e.Len+block.PageSize-1)/block.PageSize))
	}
	return nil
}

// warm brings what the target held from the start nearer to the VM, for as long as the VM may be
// kept from coming. A VM that faults on each page of its base is slow.
func (t *Target) warm(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, t.config.Limits.Warm)
	defer cancel()
	for _, d := range t.devices {
		if d.Warm == nil || d.Held == wire.HoldsNothing {
			continue
		}
		if err := d.Warm(ctx); err != nil {
			return fmt.Errorf("device %s: %w", d.name, err)
		}
	}
	return nil
}

// open lets the VM use its devices. Everything that was sent before the authority has been stored.
func (t *Target) open(a wire.Authority) error {
	for i, d := range t.devices {
		if d.Device == nil {
			continue
		}
		if n := d.Device.Violations(); n > 0 {
			return fmt.Errorf("device %s was used %d times before the handoff, which is a defect of the VMM or its driver", d.name, n)
		}
		if d.left != nil {
			d.store.Lock()
			defer d.store.Unlock()
		}
		if d.left != nil {
			for page := range d.left.All() {
				if !a.Missing[i].Has(page) {
					return fmt.Errorf("%w: device %s: page %d is not here, and the source says that it has sent it", wire.ErrProtocol, d.name, page)
				}
			}
		}
		if d.Evict != nil {
			for at := a.Missing[i].Next(0); at < a.Missing[i].Len(); at = a.Missing[i].Next(at) {
				_, next := a.Missing[i].Run(at, a.Missing[i].Len())
				if err := d.Evict(at, next); err != nil {
					return fmt.Errorf("device %s: %w", d.name, err)
				}
				at = next
			}
		}
		if d.Memory != nil {
			d.Memory.Settle()
		}
		d.opened.Store(true)
		d.Device.Open(a.Missing[i], func(first, end int64) { t.want(i, first, end) }, d.Persist)
	}
	return nil
}

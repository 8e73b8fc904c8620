package migration

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"drafter/internal/block"
	"drafter/internal/wire"
)

// incomingDevice is a device that arrives.
type incomingDevice struct {
	TargetDevice
	name  string
	index int
	// held while pages are stored and cached before the handoff, if there is a cache or a backup
	store sync.Mutex
	// pages that the source does not send, and that the backup has not given yet; nil without
	left     *block.Bitmap
	cached   *block.Bitmap // pages that Cache was called for; nil without
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
	if (d.cached != nil || d.left != nil) && !d.opened.Load() { // only this goroutine opens
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
	return d.cache(e)
}

// cache keeps the VM's page cache in step with the device. It is never called after the handoff,
// because the VM may have written the page by then.
func (d *incomingDevice) cache(e wire.Extent) error {
	if d.Cache == nil || e.Encoding == wire.Same {
		return nil
	}
	first, end := e.Off/block.PageSize, (e.Off+e.Len+block.PageSize-1)/block.PageSize
	if e.Encoding == wire.Zero {
		return d.uncache(first, end)
	}
	d.cached.SetRange(first, end)
	if err := d.Cache(e.Data, e.Off); err != nil {
		return d.uncache(first, end) // an older content of a page may be there
	}
	return nil
}

// uncache removes those of the pages that are cached.
func (d *incomingDevice) uncache(first, end int64) error {
	for at := d.cached.Next(first); at < end; at = d.cached.Next(at) {
		_, next := d.cached.Run(at, end)
		if err := d.Uncache(at*block.PageSize, bytesOf(d.Device, at, next)); err != nil {
			return fmt.Errorf("take back what was cached: %w", err)
		}
		d.cached.ClearRange(at, next)
		at = next
	}
	return nil
}

// warm caches what the target held from the start, for as long as the VM may be kept from coming. A
// VM that faults on each page of its base is slow.
func (t *Target) warm(ctx context.Context) error {
	deadline := time.Now().Add(t.config.Limits.Warm)
	buffer := make([]byte, wire.MaxExtent)
	for _, d := range t.devices {
		if d.cached == nil || d.Held == wire.HoldsNothing {
			continue
		}
		for off := int64(0); off < d.Device.Size() && ctx.Err() == nil && time.Now().Before(deadline); {
			start, end, err := block.NextData(d.Device.Device, off)
			if err != nil {
				return fmt.Errorf("device %s: %w", d.name, err)
			}
			start = start / block.PageSize * block.PageSize
			end = min(end, start+int64(len(buffer)))
			if start >= end {
				break
			}
			if more, err := d.warm(buffer, start/block.PageSize, (end+block.PageSize-1)/block.PageSize); err != nil || !more {
				return err
			}
			off = end
		}
	}
	return nil
}

// warm caches those of the pages that are not. It returns false once the VM may have written them.
func (d *incomingDevice) warm(buffer []byte, first, end int64) (more bool, err error) {
	d.store.Lock()
	defer d.store.Unlock()
	if d.opened.Load() {
		return false, nil
	}
	for at := first; at < end; {
		has, next := d.cached.Run(at, end)
		if !has {
			p := buffer[:bytesOf(d.Device, at, next)]
			if _, err := d.Device.Device.ReadAt(p, at*block.PageSize); err != nil {
				return false, fmt.Errorf("device %s: %w", d.name, err)
			}
			d.cached.SetRange(at, next)
			if d.Cache(p, at*block.PageSize) != nil {
				if err := d.uncache(at, next); err != nil {
					return false, err
				}
			}
		}
		at = next
	}
	return true, nil
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
		if d.cached != nil || d.left != nil {
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
		if d.cached != nil {
			for at := a.Missing[i].Next(0); at < a.Missing[i].Len(); {
				_, next := a.Missing[i].Run(at, a.Missing[i].Len())
				if err := d.uncache(at, next); err != nil {
					return fmt.Errorf("device %s: %w", d.name, err)
				}
				at = a.Missing[i].Next(next)
			}
		}
		d.opened.Store(true)
		d.Device.Open(a.Missing[i], func(first, end int64) { t.want(i, first, end) }, d.Persist)
	}
	return nil
}

package migration

import (
	"errors"
	"fmt"
	"time"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
)

// handed is memory whose file the target has: what is there need not be sent. It is used by the
// goroutine that sends.
type handed struct {
	*outgoingDevice
	told *block.Bitmap // pages that the target was told to take from the file
}

func newHanded(d *outgoingDevice) *handed {
	return &handed{outgoingDevice: d, told: block.NewBitmap(d.pending.Len())}
}

// takes notes whether the target takes the file of a device.
func (o *outgoing) takes(d *outgoingDevice, file bool) error {
	switch offered := o.handed != nil && o.handed.outgoingDevice == d; {
	case file && (!offered || d.stored || d.skip):
		return fmt.Errorf("%w: a file of device %s was taken that was not offered", wire.ErrProtocol, d.Name)
	case !file && offered:
		err := o.takeBack()
		o.handed = nil
		return err
	case file:
		o.config.Logger.Debug("Memory changes hands as a file")
	}
	return nil
}

// hand tells the target of pending pages that it has in the file, and leaves the others pending.
func (o *outgoing) hand(l *link) error {
	h := o.handed
	if h == nil || h.pending.Count() == 0 {
		return nil
	}
	there := h.Memory.InFile()
	tell := block.NewBitmap(h.pending.Len())
	for first := h.pending.Next(0); first < h.pending.Len(); first = h.pending.Next(first) {
		_, end := h.pending.Run(first, h.pending.Len())
		for first < end {
			in, next := there.Run(first, end)
			if in {
				h.pending.ClearRange(first, next)
				h.saved.Add(bytesOf(h.Device, first, next))
				h.tell(tell, first, next)
			} else {
				h.told.ClearRange(first, next) // they are sent
			}
			first = next
		}
	}
	for first := tell.Next(0); first < tell.Len(); first = tell.Next(first) {
		part := block.NewBitmap(tell.Len())
		last := min(first+wire.MaxHanded, tell.Len())
		for ; first < last; first = tell.Next(first) {
			_, end := tell.Run(first, last)
			part.SetRange(first, end)
			first = end
		}
		if err := l.Send(wire.Handed{Device: h.index, Pages: part}); err != nil {
			return err
		}
	}
	return nil
}

// tell adds those of some pages to a set that the target does not know of.
func (h *handed) tell(set *block.Bitmap, first, end int64) {
	for first < end {
		known, next := h.told.Run(first, end)
		if !known {
			h.told.SetRange(first, next)
			set.SetRange(first, next)
			for page := first; page < next; page++ {
				h.held[page] = unknown // what was sent of it before is void
			}
		}
		first = next
	}
}

// askMemory finds out who has the VM, if its memory has changed hands and the target does not say.
func (o *outgoing) askMemory() (next migrate.Phase, known bool, err error) {
	if o.handed == nil {
		return "", false, nil
	}
	ours, err := o.handed.Memory.TakeBack()
	switch {
	case err != nil:
		return "", false, err
	case ours:
		o.refused("it did not answer, and had not taken the VM")
		return migrate.Rescuing, true, nil
	default:
		return migrate.Serving, true, nil
	}
}

// askAgain is how often a source asks memory that its target has claimed.
const askAgain = 200 * time.Millisecond

// takeBack makes memory that is still offered this side's again.
func (o *outgoing) takeBack() error {
	if o.handed == nil || !o.handed.Memory.Offered() {
		return nil
	}
	ours, err := o.handed.Memory.TakeBack()
	if err == nil && !ours {
		err = errors.New("the target has the VM")
	}
	return err
}

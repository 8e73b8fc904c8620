package migration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/zeebo/xxh3"

	"drafter/internal/block"
	"drafter/internal/wire"
)

// sender holds what the sending of pages needs. Use it from one goroutine.
type sender struct {
	*extent // that is sent
	// the others are read ahead; with fewer, reading and sending would wait for each other
	extents     [4]*extent
	base        []byte // content of the base where the extent's pages are
	kinds       [maxRun]kind
	compression *compression
}

// extent is pages that have been read.
type extent struct {
	buffer *wire.ExtentBuffer
	hashes [maxRun]uint64
}

// load reads pages of a device, at most maxRun.
func (e *extent) load(d *outgoingDevice, first, end int64) error {
	data := e.buffer.Data()[:bytesOf(d.Device, first, end)]
	if _, err := d.Device.ReadAt(data, first*block.PageSize); err != nil {
		return err
	}
	e.hash(data)
	return nil
}

func (e *extent) hash(data []byte) {
	for i := 0; len(data) > 0; i++ {
		n := min(len(data), block.PageSize)
		e.hashes[i] = hashPage(data[:n])
		data = data[n:]
	}
}

func newSender() (*sender, error) {
	c, err := newCompression()
	if err != nil {
		return nil, err
	}
	s := &sender{compression: c}
	for i := range s.extents {
		s.extents[i] = &extent{buffer: wire.NewExtentBuffer()}
	}
	s.extent = s.extents[0]
	return s, nil
}

func (s *sender) close() {
	_ = s.compression.encoder.Close() // of an encoder without writer
}

const (
	maxRun      = wire.MaxExtent / block.PageSize // pages of one extent
	postCopyRun = maxRun / 4                      // of one that others may have to wait for
)

// drain sends pending pages: first what the target needs first, then blocks that were not written
// lately, then the others. It stops at until, unless that is zero; but it always sends what the
// target needs first.
func (o *outgoing) drain(ctx context.Context, l *link, until time.Time) error {
	if err := o.drainDevices(ctx, l, until); err != nil {
		return err
	}
	return l.Flush()
}

func (o *outgoing) drainDevices(ctx context.Context, l *link, until time.Time) error {
	if err := o.hand(l); err != nil {
		return err
	}
	for _, d := range o.devices {
		if d.First {
			if err := o.drainDevice(ctx, l, d, true, time.Time{}); err != nil {
				return err
			}
		}
	}
	for _, hot := range []bool{false, true} {
		for _, d := range o.devices {
			if err := o.drainDevice(ctx, l, d, hot, until); err != nil {
				return err
			}
		}
	}
	return nil
}

func (o *outgoing) drainDevice(ctx context.Context, l *link, d *outgoingDevice, hot bool, until time.Time) error {
	var err error
	if until.IsZero() && d.pending.Count() >= o.config.tuning.readAhead {
		err = o.drainAhead(ctx, l, d, hot)
	} else {
		err = o.eachPending(ctx, d, hot, until, func(first, end int64) error {
			return o.sendPages(ctx, l, o.sender, pages{d, first, end, purposePreCopy})
		})
	}
	if err != nil {
		return fmt.Errorf("device %s: %w", d.Name, err)
	}
	return nil
}

// drainAhead reads in one goroutine and sends in another, this one.
func (o *outgoing) drainAhead(ctx context.Context, l *link, d *outgoingDevice, hot bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type loaded struct {
		extent     *extent
		first, end int64
	}
	ready, free := make(chan loaded, len(o.sender.extents)), make(chan *extent, len(o.sender.extents))
	for _, e := range o.sender.extents {
		free <- e
	}
	var readErr error // valid once ready is closed
	go func() {
		defer close(ready)
		readErr = o.eachPending(ctx, d, hot, time.Time{}, func(first, end int64) error {
			e := <-free // which soon has one: see below
			if err := e.load(d, first, end); err != nil {
				return err
			}
			select {
			case ready <- loaded{e, first, end}:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		})
	}()
	var err error
	for r := range ready {
		o.sender.extent = r.extent
		if err == nil {
			if err = o.sendLoaded(ctx, l, o.sender, pages{d, r.first, r.end, purposePreCopy}); err != nil {
				cancel()
			}
		}
		free <- r.extent
	}
	if err != nil {
		return err
	}
	return readErr
}

// eachPending takes pending pages, in order, and calls send for each run of them, of at most maxRun
// pages.
func (o *outgoing) eachPending(ctx context.Context, d *outgoingDevice, hot bool, until time.Time, send func(first, end int64) error) error {
	now := time.Now()
	for first := d.pending.Next(0); first < d.pending.Len(); first = d.pending.Next(first) {
		_, end := d.pending.Run(first, min(d.pending.Len(), first+maxRun))
		if !hot {
			next, cold := d.coldRun(first, end, now)
			if !cold {
				first = next
				continue
			}
			end = next
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !until.IsZero() && time.Now().After(until) {
			return nil
		}
		// In this order, so that a page that is written after it was read is dirty again.
		d.pending.ClearRange(first, end)
		if err := send(first, end); err != nil {
			return err
		}
		first = end
	}
	return nil
}

// coldRun tells whether the block of page first was not written lately, and up to which page, at
// most end, this is so.
func (d *outgoingDevice) coldRun(first, end int64, now time.Time) (next int64, cold bool) {
	pages := d.Device.BlockSize() / block.PageSize
	for b := first / pages; b*pages < end; b++ {
		last := d.Device.LastWrite(b)
		c := last.IsZero() || now.Sub(last) >= d.Expiry
		if b == first/pages {
			cold = c
		} else if c != cold {
			return b * pages, cold
		}
	}
	return end, cold
}

// purpose is why pages are sent.
type purpose int

const (
	purposePreCopy  purpose = iota // the target stores pages in the order of sending
	purposePostCopy                // the target has asked for exactly these, some time ago
	purposeWanted                  // the same, and somebody waits
)

var urgency = [...]wire.Urgency{purposePreCopy: wire.Later, purposePostCopy: wire.Soon, purposeWanted: wire.Urgent}

// kind is how a page is sent.
type kind int

const (
	kindRaw kind = iota
	kindZero
	kindSame
)

var zeroPageHash = hashPage(make([]byte, block.PageSize))

// unknown stands for the hash of a page that the target has in some way.
const unknown = 1

// hashPage returns neither 0 nor unknown.
func hashPage(p []byte) uint64 { return max(unknown+1, xxh3.Hash(p)) }

// pages are consecutive pages of a device, at most maxRun, and the reason why they are sent.
type pages struct {
	*outgoingDevice
	first, end int64
	why        purpose
}

// sendPages sends pages in the cheapest way.
func (o *outgoing) sendPages(ctx context.Context, l *link, s *sender, p pages) error {
	if err := s.load(p.outgoingDevice, p.first, p.end); err != nil {
		return err
	}
	return o.sendLoaded(ctx, l, s, p)
}

// sendLoaded is sendPages for pages that are in the sender's extent.
func (o *outgoing) sendLoaded(ctx context.Context, l *link, s *sender, p pages) error {
	data := s.buffer.Data()[:bytesOf(p.Device, p.first, p.end)]
	if err := s.readBase(p); err != nil {
		return err
	}
	for page := p.first; page < p.end; page++ {
		s.kinds[page-p.first] = s.classify(p, data, page)
	}
	for page := p.first; page < p.end; {
		k, next := s.kinds[page-p.first], page+1
		for next < p.end && s.kinds[next-p.first] == k {
			next++
		}
		if err := o.sendRun(ctx, l, s, p, page, next, k); err != nil {
			return err
		}
		page = next
	}
	return nil
}

// readBase reads the base's content of the pages, if the target holds the base and has not been sent
// all of the pages.
func (s *sender) readBase(p pages) error {
	if !p.holds {
		return nil
	}
	for page := p.first; page < p.end; page++ {
		if p.held[page] != 0 {
			continue
		}
		if s.base == nil {
			s.base = make([]byte, wire.MaxExtent)
		}
		_, err := p.Overlay.Base().ReadAt(s.base[:bytesOf(p.Device, p.first, p.end)], p.first*block.PageSize)
		return err
	}
	return nil
}

// classify decides how a page is sent, each time that it is sent. data is the content of all of the
// pages.
func (s *sender) classify(of pages, data []byte, page int64) kind {
	from := (page - of.first) * block.PageSize
	p := data[from:min(from+block.PageSize, int64(len(data)))]
	hash, held := s.hashes[page-of.first], of.held[page]
	if of.why == purposePreCopy {
		of.held[page] = hash
	} else if held != 0 {
		// The target has given up what it had of a page that was missing at the handoff, and what is
		// sent after the handoff may be lost with its connection.
		held = unknown
	}
	zero := hash == zeroPageHash && allZero(p)
	switch {
	case held != 0 && held == hash,
		held == 0 && of.holds && bytes.Equal(p, s.base[from:from+int64(len(p))]),
		held == 0 && !of.holds && !of.unknown && zero:
		return kindSame
	case zero:
		return kindZero
	}
	return kindRaw
}

var zeroPage [block.PageSize]byte

func allZero(p []byte) bool { return bytes.Equal(p, zeroPage[:len(p)]) }

// sendRun sends the pages from page to end, which are of one kind. The buffer holds all of them.
func (o *outgoing) sendRun(ctx context.Context, l *link, s *sender, of pages, page, end int64, k kind) error {
	d := of.outgoingDevice
	off, length := page*block.PageSize, bytesOf(d.Device, page, end)
	at := off - of.first*block.PageSize
	urgent := of.why == purposeWanted
	when := urgency[of.why]
	if k == kindSame && of.why == purposePreCopy {
		d.saved.Add(length)
		return nil
	}
	if k != kindRaw {
		encoding := wire.Zero
		if k == kindSame {
			encoding = wire.Same
		}
		d.saved.Add(length)
		d.wire.Add(wire.ExtentOverhead)
		return l.SendExtent(s.buffer, at, d.index, encoding, off, length, when)
	}
	start := time.Now()
	if !urgent && o.limiter != nil {
		if err := o.limiter.WaitN(ctx, int(length)); err != nil {
			return errors.Join(context.Cause(ctx), err)
		}
	}
	d.sent.Add(length)
	if of.why != purposePreCopy {
		d.postCopy.Add(length)
	}
	if urgent {
		d.wanted.Add(length)
	}
	if s.compression.worth(s.buffer.Data()[at:at+length]) && s.compression.try(s.buffer, at, length) {
		d.wire.Add(wire.ExtentOverhead + s.buffer.Compressed())
		return l.SendCompressed(s.buffer, d.index, off, length, when)
	}
	d.wire.Add(wire.ExtentOverhead + length)
	err := l.SendExtent(s.buffer, at, d.index, wire.Raw, off, length, when)
	if !urgent {
		s.compression.link.add(length, time.Since(start))
	}
	return err
}

package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/klauspost/compress/zstd"

	"drafter/internal/block"
	"drafter/internal/wire"
	"drafter/migrate"
	"drafter/transport"
)

// OfferedDevice is a device of an offered package. Nobody may write to it.
type OfferedDevice struct {
	Name      string
	Device    block.Device
	BlockSize int64 // bytes; a hint for targets
	Contents  *block.Contents
}

// Offer serves a package to any number of targets at once. A target asks for what it needs, in any
// order; see [OpenPackage]. An offer keeps nothing about its targets.
type Offer struct {
	manifest wire.Manifest
	sizes    []int64
	devices  []OfferedDevice
	encoder  *zstd.Encoder // of all connections
	limits   migrate.Limits
	waiting  transport.Waiting // connections that have not said hello
	places   *transport.Shares // of those that have
}

// NewOffer returns an offer of devices to so many connections at once, with the signature of their
// package if that is not nil. It uses only Silence of limits. Close it when no Handle is running
// any more. The caller owns the devices.
func NewOffer(devices []OfferedDevice, signature []byte, connections int, limits migrate.Limits) (*Offer, error) {
	limits, err := limits.WithDefaults()
	if err != nil {
		return nil, err
	}
	manifest := wire.Manifest{Features: wire.FeaturePackage, Signature: signature}
	o := &Offer{devices: devices, limits: limits, places: transport.NewShares(connections), manifest: manifest}
	for _, d := range devices {
		o.manifest.Devices = append(o.manifest.Devices, wire.Device{Name: d.Name, Size: d.Device.Size(), BlockSize: d.BlockSize, Base: d.Contents.Device})
		o.sizes = append(o.sizes, d.Device.Size())
	}
	if o.encoder, err = newEncoder(runtime.GOMAXPROCS(0)); err != nil {
		return nil, err
	}
	return o, nil
}

// Close frees the offer.
func (o *Offer) Close() error { return o.encoder.Close() }

// Handle serves one connection of a target until it ends, and owns it. Each takes some 2 MiB. If
// there is no place for a connection, it is refused with [migrate.ErrRefused]: a host gets no more
// than are left for others.
func (o *Offer) Handle(ctx context.Context, stream io.ReadWriteCloser) error {
	l := newLink(ctx, stream, o.limits.Silence)
	defer l.close(errors.New("the connection is not needed any more"))
	host := transport.Host(stream)
	hello, err := o.greet(l, host)
	if err != nil {
		l.refuse(codeOf(err), err)
		return fmt.Errorf("%w: %w", migrate.ErrRefused, err)
	}
	defer o.places.Return(host)
	l.Bound(wire.MaxWant)
	if err = o.describe(l, hello); err == nil {
		err = o.serve(ctx, l)
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	l.refuse(codeOf(err), err)
	return err
}

// greet reads what a connection is for, and takes a place for it.
func (o *Offer) greet(l *link, host string) (wire.Hello, error) {
	place := o.waiting.Enter(host, func() { l.cancel(errCrowded) })
	defer place.Leave()
	hello, err := greet(l)
	if err == nil && !o.places.Take(host) {
		err = &RemoteError{Code: wire.CodeBusy, Text: "too many connections are served already; try again"}
	}
	return hello, err
}

// describe tells what there is.
func (o *Offer) describe(l *link, hello wire.Hello) error {
	m := o.manifest
	if m.Signature != nil {
		m.Features |= hello.Features & wire.FeatureSignature
	}
	if err := l.Send(m); err != nil || hello.Resume {
		return err
	}
	for i, d := range o.devices {
		if err := sendContents(l, i, d.Contents); err != nil {
			return err
		}
	}
	return nil
}

// sendContents sends the content ids of a device.
func sendContents(l *link, device int, c *block.Contents) error {
	for first := 0; first < len(c.Blocks); first += wire.MaxContents {
		some := c.Blocks[first:min(first+wire.MaxContents, len(c.Blocks))]
		if err := l.Send(wire.Contents{Device: device, First: int64(first), Blocks: some}); err != nil {
			return err
		}
	}
	return nil
}

// serve answers wants, each with extents of exactly those pages.
func (o *Offer) serve(ctx context.Context, l *link) error {
	buffer, c := wire.NewExtentBuffer(), &compression{encoder: o.encoder}
	for {
		m, err := l.receive(o.sizes)
		if err != nil {
			return err
		}
		want, ok := m.(wire.Want)
		if !ok {
			return fmt.Errorf("%w: %T of a target that pulls a package", wire.ErrProtocol, m)
		}
		for first := want.First; first < want.Ends; first += maxRun {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := o.answer(l, buffer, c, want.Device, first, min(want.Ends, first+maxRun)); err != nil {
				return err
			}
		}
	}
}

func (o *Offer) answer(l *link, buffer *wire.ExtentBuffer, c *compression, device int, first, end int64) error {
	d := o.devices[device]
	off, length := first*block.PageSize, bytesOf(d.Device, first, end)
	data := buffer.Data()[:length]
	if _, err := d.Device.ReadAt(data, off); err != nil {
		return fmt.Errorf("device %s: %w", d.Name, err)
	}
	start := time.Now()
	if c.worth(buffer.Data()[:length]) && c.try(buffer, 0, length) {
		return l.SendCompressed(buffer, device, off, length, wire.Soon)
	}
	err := l.SendExtent(buffer, 0, device, wire.Raw, off, length, wire.Soon)
	c.link.add(length, time.Since(start))
	return err
}

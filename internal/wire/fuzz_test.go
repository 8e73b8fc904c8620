package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// frames are all messages and some extents, as they are sent.
func frames(f *testing.F) (all [][]byte) {
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	defer encoder.Close()
	add := func(send func(*Conn) error) {
		var b buffer
		if err := send(NewConn(&b)); err != nil {
			f.Fatal(err)
		}
		all = append(all, b.Bytes())
	}
	for _, m := range messages() {
		add(func(c *Conn) error { return c.Send(m) })
	}
	b := NewExtentBuffer()
	add(func(c *Conn) error { return c.SendExtent(b, 0, 0, Raw, 0, 4096, Soon) })
	add(func(c *Conn) error { return c.SendExtent(b, 0, 1, Zero, 8192, 4<<20-8192, Soon) })
	add(func(c *Conn) error {
		b.Compress(encoder, 0, testSizes[0])
		return c.SendCompressed(b, 0, 0, testSizes[0], Soon)
	})
	return all
}

// FuzzFrames reads any bytes as frames. What is read out of order, damaged or too long is an error,
// and takes no more memory than came.
func FuzzFrames(f *testing.F) {
	var stream []byte
	for _, b := range frames(f) {
		f.Add(b)
		stream = append(stream, b...)
	}
	f.Add(stream)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := NewConn(&buffer{*bytes.NewBuffer(b)})
		for {
			frame, err := c.Read()
			if err != nil {
				break
			}
			if len(frame.Payload) > maxPayload(frame.Type) {
				t.Fatalf("%s with %d bytes", frame.Type, len(frame.Payload))
			}
		}
		if len(c.buffer) > len(b)+extentHeader+MaxExtent {
			t.Fatalf("%d bytes of memory for %d", len(c.buffer), len(b))
		}
	})
}

// FuzzMessages decodes any payload of any type, with a checksum that is right. What is decoded can
// be sent, and comes out as the same.
func FuzzMessages(f *testing.F) {
	for _, b := range frames(f) {
		f.Add(b[4], b[5], binary.LittleEndian.Uint16(b[6:]), b[headerSize:])
	}
	decoder, err := NewDecoder()
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(decoder.Close)
	f.Fuzz(func(t *testing.T, kind, encoding byte, device uint16, payload []byte) {
		frame := Frame{Type: Type(kind), Encoding: Encoding(encoding), Device: device, Payload: payload}
		if maxPayload(frame.Type) < len(payload) {
			return // is not read
		}
		if frame.Type == TypeExtent {
			e, err := decoder.Extent(frame, testSizes)
			if err == nil && (e.Off < 0 || e.Len <= 0 || e.Off > testSizes[e.Device]-e.Len || e.Encoding == Raw && int64(len(e.Data)) != e.Len) {
				t.Fatalf("%d bytes at %d of device %d, with %d bytes of data", e.Len, e.Off, e.Device, len(e.Data))
			}
			if err != nil && !errors.Is(err, ErrProtocol) {
				t.Fatal(err)
			}
			return
		}
		m, err := Decode(frame, testSizes)
		if err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Fatal(err)
			}
			return
		}
		var b buffer
		c := NewConn(&b)
		if err := c.Send(m); err != nil {
			t.Fatalf("%+v: %v", m, err)
		}
		again, err := c.Read()
		if err != nil {
			t.Fatalf("%+v: %v", m, err)
		}
		sent := bytes.Clone(again.Payload)
		if m, err = Decode(again, testSizes); err != nil {
			t.Fatalf("%+v: %v", m, err)
		}
		if err := c.Send(m); err != nil {
			t.Fatal(err)
		}
		if again, err = c.Read(); err != nil || !bytes.Equal(again.Payload, sent) {
			t.Fatalf("%+v becomes another message, %v", m, err)
		}
	})
}

// What says how a device is called, and how large it is, is bounded.
func TestHostileManifests(t *testing.T) {
	device := Device{Name: "disk", Size: 4096, BlockSize: 4096}
	with := func(change func(*Device)) Device { d := device; change(&d); return d }
	for what, devices := range map[string][]Device{
		"twice":             {device, device},
		"no name":           {with(func(d *Device) { d.Name = "" })},
		"a long name":       {with(func(d *Device) { d.Name = string(bytes.Repeat([]byte("a"), 65)) })},
		"no size":           {with(func(d *Device) { d.Size = 0 })},
		"a negative size":   {with(func(d *Device) { d.Size = -4096 })},
		"no block size":     {with(func(d *Device) { d.BlockSize = 0 })},
		"an odd block size": {with(func(d *Device) { d.BlockSize = 4097 })},
		"too many":          make([]Device, 1001),
	} {
		var b buffer
		c := NewConn(&b)
		if err := c.Send(Manifest{Devices: devices}); err != nil {
			t.Fatal(err)
		}
		f, err := c.Read()
		if err != nil {
			t.Fatal(err)
		}
		if m, err := Decode(f, nil); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %+v, %v", what, m, err)
		}
	}
}

// A duration that is negative, and a text that would be obeyed by a terminal, do not get through.
func TestHostileTexts(t *testing.T) {
	var b buffer
	c := NewConn(&b)
	if err := errors.Join(c.Send(Snapshot{Paused: -time.Second}), c.Send(Error{Code: CodeBusy, Text: "no\r\n\x1b]0;title\x07\xff" + string(bytes.Repeat([]byte("a"), 1000))})); err != nil {
		t.Fatal(err)
	}
	f, err := c.Read()
	if err != nil {
		t.Fatal(err)
	}
	if m, err := Decode(f, nil); !errors.Is(err, ErrProtocol) {
		t.Errorf("%+v, %v", m, err)
	}
	if f, err = c.Read(); err != nil {
		t.Fatal(err)
	}
	m, err := Decode(f, nil)
	if e, ok := m.(Error); !ok || err != nil || !bytes.HasPrefix([]byte(e.Text), []byte("no   ]0;title ?aaa")) {
		t.Errorf("%+v, %v", m, err)
	}
}

// A bound that was set holds for frames that could be longer.
func TestBound(t *testing.T) {
	var b buffer
	c := NewConn(&b)
	if err := c.Send(Error{Text: string(bytes.Repeat([]byte("a"), 300))}); err != nil {
		t.Fatal(err)
	}
	c.Bound(MaxHello)
	if _, err := c.Read(); !errors.Is(err, ErrProtocol) {
		t.Error(err)
	}
	if len(c.buffer) > 0 {
		t.Error("memory was taken for it")
	}
}

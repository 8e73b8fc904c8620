package wire

import (
	"encoding/binary"
	"fmt"

	"github.com/klauspost/compress/zstd"

	"drafter/internal/block"
)

// Encoding says how an extent's data follow.
type Encoding uint8

// The encodings of an extent.
const (
	Raw  Encoding = 0 // as they are
	Zero Encoding = 1 // none: all zeros
	// no data: the content that the target holds is right, from the base or from before the handoff
	Same Encoding = 2
	Zstd Encoding = 3 // one zstd frame (RFC 8878)
)

func (e Encoding) String() string {
	switch e {
	case Raw:
		return "raw"
	case Zero:
		return "zero"
	case Same:
		return "same"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("encoding %d", uint8(e))
}

// Extent is a run of pages of one device. The last page of a device may be short.
//
// Its payload: number of the first page uint64, number of pages uint32, data.
type Extent struct {
	Device   int
	Encoding Encoding
	Off, Len int64  // bytes
	Data     []byte // Raw: Len bytes; Zstd: what decompresses to them
}

// ExtentBuffer holds an extent's frame while it is made, so that data are read into their place and
// sent in one piece. Reuse it.
type ExtentBuffer struct {
	frame      []byte
	compressed []byte
}

// NewExtentBuffer returns a buffer for extents of up to [MaxExtent] bytes.
func NewExtentBuffer() *ExtentBuffer {
	return &ExtentBuffer{frame: make([]byte, headerSize+extentHeader+MaxExtent)}
}

// Data is where up to [MaxExtent] bytes of data belong.
func (b *ExtentBuffer) Data() []byte { return b.frame[headerSize+extentHeader:] }

// SendExtent sends length bytes of the buffer's data, from index at on, or none for encodings
// without. It overwrites what lies before at.
func (c *Conn) SendExtent(b *ExtentBuffer, at int64, device int, encoding Encoding, off, length int64, when Urgency) error {
	n := int64(0)
	if encoding == Raw {
		n = length
	}
	return c.sendExtent(b.frame[at:at+headerSize+extentHeader+n], device, encoding, off, length, when)
}

// Compress compresses length bytes of the buffer's data, from index at on, and returns to how many;
// see SendCompressed.
func (b *ExtentBuffer) Compress(encoder *zstd.Encoder, at, length int64) int {
	if b.compressed == nil {
		b.compressed = make([]byte, headerSize+extentHeader, headerSize+extentHeader+MaxExtent+MaxExtent/128)
	}
	b.compressed = encoder.EncodeAll(b.Data()[at:at+length], b.compressed[:headerSize+extentHeader])
	return len(b.compressed) - headerSize - extentHeader
}

// ExtentOverhead is how many bytes an extent takes on the wire beside its data.
const ExtentOverhead = headerSize + extentHeader

// Compressed is to how many bytes Compress has compressed last.
func (b *ExtentBuffer) Compressed() int64 { return int64(len(b.compressed)) - ExtentOverhead }

// SendCompressed sends what Compress has made, which must be shorter than length.
func (c *Conn) SendCompressed(b *ExtentBuffer, device int, off, length int64, when Urgency) error {
	return c.sendExtent(b.compressed, device, Zstd, off, length, when)
}

func (c *Conn) sendExtent(frame []byte, device int, encoding Encoding, off, length int64, when Urgency) error {
	binary.LittleEndian.PutUint64(frame[headerSize:], uint64(off/block.PageSize))
	binary.LittleEndian.PutUint32(frame[headerSize+8:], uint32(pagesOf(length)))
	sealFrame(frame, TypeExtent, encoding, uint16(device))
	return c.write(frame, when)
}

// Decoder decodes extents. Use it from one goroutine.
type Decoder struct {
	zstd *zstd.Decoder
	data []byte
}

// NewDecoder returns a decoder. Close it.
func NewDecoder() (*Decoder, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxExtent))
	if err != nil {
		return nil, fmt.Errorf("make zstd decoder: %w", err)
	}
	return &Decoder{zstd: z}, nil
}

// Close frees the decoder.
func (d *Decoder) Close() { d.zstd.Close() }

// Extent decodes a frame of TypeExtent and checks it against the devices' sizes. A compressed
// extent comes out raw. Data are valid until the next frame is received or decoded.
func (d *Decoder) Extent(f Frame, sizes []int64) (e Extent, err error) {
	if len(f.Payload) < extentHeader {
		return e, violation("an extent of %d bytes", len(f.Payload))
	}
	if int(f.Device) >= len(sizes) {
		return e, violation("an extent of device %d, of which there are %d", f.Device, len(sizes))
	}
	size := sizes[f.Device]
	first, pages := binary.LittleEndian.Uint64(f.Payload), int64(binary.LittleEndian.Uint32(f.Payload[8:]))
	total := pagesOf(size)
	if pages == 0 || first >= uint64(total) || pages > total-int64(first) {
		return e, violation("an extent of %d pages at %d of a device of %d", pages, first, total)
	}
	e = Extent{Device: int(f.Device), Encoding: f.Encoding, Off: int64(first) * block.PageSize, Data: f.Payload[extentHeader:]}
	e.Len = min(pages*block.PageSize, size-e.Off)
	switch f.Encoding {
	case Zero, Same:
		if len(e.Data) > 0 {
			return e, violation("a %s extent with %d bytes of data", f.Encoding, len(e.Data))
		}
	case Zstd:
		if e.Len > MaxExtent {
			return e, violation("a compressed extent of %d bytes", e.Len)
		}
		if d.data == nil {
			d.data = make([]byte, 0, MaxExtent)
		}
		data, err := d.zstd.DecodeAll(e.Data, d.data[:0])
		if err != nil {
			return e, violation("a compressed extent that does not decompress: %v", err)
		}
		e.Encoding, e.Data = Raw, data
		fallthrough
	case Raw:
		if int64(len(e.Data)) != e.Len {
			return e, violation("an extent of %d bytes has %d", e.Len, len(e.Data))
		}
	default:
		return e, violation("%s is unknown", f.Encoding)
	}
	return e, nil
}

package packager

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/klauspost/compress/zstd"

	"drafter/internal/decompress"
)

// frameSize is how much of the tar stream one zstd frame holds, in bytes. Frames are independent,
// so all cores compress and decompress. One after the other they are an ordinary zstd file (RFC
// 8878, section 3.1).
const frameSize = 1 << 20

var zeroFrame = make([]byte, frameSize)

// pending is a frame that a worker compresses or decompresses. It yields once.
type pending chan framed

type framed struct {
	data []byte
	err  error
}

// frameWriter compresses what is written to it, frame by frame. Close it, also after an error.
type frameWriter struct {
	w     *bufio.Writer
	enc   *zstd.Encoder
	zeros []byte // a compressed frame of zeros: holes cost nothing
	buf   []byte
	queue []pending // frames in order, the oldest first
	err   error
}

func newFrameWriter(w *bufio.Writer) (*frameWriter, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(true))
	if err != nil {
		return nil, err
	}
	return &frameWriter{w: w, enc: enc, zeros: enc.EncodeAll(zeroFrame, nil), buf: make([]byte, 0, frameSize)}, nil
}

func (f *frameWriter) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 && f.err == nil {
		n := copy(f.buf[len(f.buf):frameSize], p)
		f.buf, p, written = f.buf[:len(f.buf)+n], p[n:], written+n
		if len(f.buf) == frameSize {
			f.emit()
		}
	}
	return written, f.err
}

// emit hands the buffer to a worker, after the oldest frame has been written if all workers are
// busy.
func (f *frameWriter) emit() {
	if len(f.queue) > runtime.GOMAXPROCS(0) {
		f.writeOldest()
	}
	frame := make(pending, 1)
	f.queue = append(f.queue, frame)
	if bytes.Equal(f.buf, zeroFrame) {
		frame <- framed{data: f.zeros}
		f.buf = f.buf[:0]
		return
	}
	data := f.buf
	f.buf = make([]byte, 0, frameSize)
	go func() { frame <- framed{data: f.enc.EncodeAll(data, nil)} }()
}

func (f *frameWriter) writeOldest() {
	frame := <-f.queue[0]
	f.queue = f.queue[1:]
	if f.err == nil {
		_, f.err = f.w.Write(frame.data)
	}
}

// Close writes what is left, waits for the workers and flushes the writer below.
func (f *frameWriter) Close() error {
	if len(f.buf) > 0 && f.err == nil {
		f.emit()
	}
	for len(f.queue) > 0 {
		f.writeOldest()
	}
	if f.err == nil {
		f.err = f.w.Flush()
	}
	return errors.Join(f.err, f.enc.Close())
}

// frameReader decompresses a zstd file. Workers decompress frames of up to frameSize. From the
// first larger frame on, which another program made, it decompresses as a stream. Close it.
type frameReader struct {
	r     *bufio.Reader
	dec   *zstd.Decoder
	queue []pending
	ended error  // why no more frames are read; io.EOF at the end
	data  []byte // decompressed, not yet read
	rest  *zstd.Decoder
}

func newFrameReader(r io.Reader) (*frameReader, error) {
	dec, err := decompress.Blocks()
	if err != nil {
		return nil, err
	}
	return &frameReader{r: bufio.NewReaderSize(r, 2*frameSize), dec: dec}, nil
}

func (f *frameReader) Read(p []byte) (int, error) {
	for len(f.data) == 0 {
		if f.rest != nil {
			return f.rest.Read(p)
		}
		for f.ended == nil && len(f.queue) <= runtime.GOMAXPROCS(0) {
			f.ended = f.readFrame()
		}
		if len(f.queue) == 0 {
			if !errors.Is(f.ended, errLargeFrame) {
				return 0, f.ended
			}
			var err error
			if f.rest, err = decompress.Stream(f.r); err != nil {
				return 0, err
			}
			continue
		}
		frame := <-f.queue[0]
		f.queue = f.queue[1:]
		if frame.err != nil {
			return 0, frame.err
		}
		f.data = frame.data
	}
	n := copy(p, f.data)
	f.data = f.data[n:]
	return n, nil
}

// errLargeFrame says that the next frame is to be decompressed as a stream.
var errLargeFrame = errors.New("frame is large")

// readFrame starts to decompress the next frame.
func (f *frameReader) readFrame() error {
	start, err := f.r.Peek(zstd.HeaderMaxSize)
	if len(start) == 0 {
		return err
	}
	var h zstd.Header
	if err := h.Decode(start); err != nil {
		return err
	}
	if h.Skippable || !h.HasFCS || h.FrameContentSize > frameSize {
		return errLargeFrame
	}
	compressed, err := f.frameBytes(h)
	if err != nil {
		return err
	}
	frame := make(pending, 1)
	f.queue = append(f.queue, frame)
	go func() {
		data, err := f.dec.DecodeAll(compressed, make([]byte, 0, h.FrameContentSize))
		frame <- framed{data, err}
	}()
	return nil
}

// frameBytes reads a frame: its header, blocks (RFC 8878, section 3.1.1.2) and checksum.
func (f *frameReader) frameBytes(h zstd.Header) ([]byte, error) {
	frame := bytes.NewBuffer(make([]byte, 0, decompress.Bound(min(int64(h.FrameContentSize), 64<<10))))
	read := func(n int64) error {
		if int64(frame.Len())+n > 2*frameSize {
			return fmt.Errorf("%w: it is larger than its content", zstd.ErrFrameSizeExceeded)
		}
		_, err := io.CopyN(frame, f.r, n)
		if errors.Is(err, io.EOF) {
			return io.ErrUnexpectedEOF
		}
		return err
	}
	if err := read(int64(h.HeaderSize)); err != nil {
		return nil, err
	}
	for last := false; !last; {
		if err := read(3); err != nil {
			return nil, err
		}
		b := frame.Bytes()[frame.Len()-3:]
		header := binary.LittleEndian.Uint32([]byte{b[0], b[1], b[2], 0})
		last = header&1 != 0
		size := int64(header >> 3)
		if kind := header >> 1 & 3; kind == 1 { // one byte, repeated
			size = 1
		}
		if err := read(size); err != nil {
			return nil, err
		}
	}
	if h.HasCheckSum {
		if err := read(4); err != nil {
			return nil, err
		}
	}
	return frame.Bytes(), nil
}

// Close waits for the workers.
func (f *frameReader) Close() {
	for _, frame := range f.queue {
		<-frame
	}
	f.dec.Close()
	if f.rest != nil {
		f.rest.Close()
	}
}

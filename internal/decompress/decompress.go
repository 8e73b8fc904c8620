// Package decompress unpacks zstd (RFC 8878) from strangers. It never returns more bytes, nor takes
// more memory, than the expected content needs.
package decompress

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// maxWindow is the history that a decoder keeps, in bytes: that of "zstd --ultra -22", the most
// that a program uses unless it is asked for more (--long).
const maxWindow = 128 << 20

// Blocks returns a decoder for DecodeAll, on any number of goroutines. It never returns more bytes
// than fit behind its target. Close it.
func Blocks() (*zstd.Decoder, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, fmt.Errorf("make zstd decoder: %w", err)
	}
	return d, nil
}

// Stream returns a decoder of a stream, whose length the caller bounds. Close it.
func Stream(r io.Reader) (*zstd.Decoder, error) {
	d, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecodeBuffersBelow(0))
	if err != nil {
		return nil, fmt.Errorf("make zstd decoder: %w", err)
	}
	return d, nil
}

// Interruptible is r until ctx ends. A decoder can work for long without a read of what is below.
func Interruptible(ctx context.Context, r io.Reader) io.Reader { return &interruptible{ctx, r} }

type interruptible struct {
	ctx context.Context
	r   io.Reader
}

func (i *interruptible) Read(p []byte) (int, error) {
	if i.ctx.Err() != nil {
		return 0, context.Cause(i.ctx)
	}
	return i.r.Read(p)
}

// Bound is the largest compressed form of size bytes that any encoder makes: blocks that do not
// compress are stored, with 3 bytes before each (section 3.1.1.2).
func Bound(size int64) int64 { return size + size>>8 + 1<<10 }

// ErrSize says that content is longer or shorter than it must be.
var ErrSize = errors.New("not of the size it must be")

// Exactly calls read with the content of compressed, and read must take all of its size bytes. More
// or fewer bytes are an error.
func Exactly(compressed []byte, size int64, read func(io.Reader) error) error {
	d, err := Stream(bytes.NewReader(compressed))
	if err != nil {
		return err
	}
	defer d.Close()
	if err := read(io.LimitReader(d, size)); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("shorter than %d bytes: %w", size, ErrSize)
		}
		return err
	}
	var more [1]byte
	if n, err := io.ReadFull(d, more[:]); n > 0 {
		return fmt.Errorf("longer than %d bytes: %w", size, ErrSize)
	} else if !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

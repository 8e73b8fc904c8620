package decompress

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"

	"drafter/internal/bombtest"
)

// Some 40 KB that unpack to a GiB cost no more than what they should have been.
func TestBombs(t *testing.T) {
	compressed := bombtest.Zeros(t, nil, 1<<30)
	d, err := Blocks()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	used := bombtest.Allocated(func() {
		var into [64 << 10]byte
		if _, err := d.DecodeAll(compressed, into[:0]); !errors.Is(err, zstd.ErrDecoderSizeExceeded) {
			t.Errorf("block: %v", err)
		}
		if err := Exactly(compressed, 1<<20, func(r io.Reader) error { _, err := io.Copy(io.Discard, r); return err }); !errors.Is(err, ErrSize) {
			t.Errorf("content: %v", err)
		}
	})
	if used > 64<<20 {
		t.Errorf("%d bytes that unpack to 1 GiB made us allocate %d MiB", len(compressed), used>>20)
	}
}

func TestExactly(t *testing.T) {
	compressed := bombtest.Zeros(t, nil, 1000)
	for size, want := range map[int64]error{1000: nil, 999: ErrSize, 1001: ErrSize} {
		p := make([]byte, size)
		if err := Exactly(compressed, size, func(r io.Reader) error { _, err := io.ReadFull(r, p); return err }); !errors.Is(err, want) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	if err := Exactly([]byte("no zstd"), 10, func(r io.Reader) error { _, err := io.ReadFull(r, make([]byte, 10)); return err }); err == nil {
		t.Error("what is no zstd was unpacked")
	}
}

// A frame that wants to remember a GiB of the past is refused.
func TestWindow(t *testing.T) {
	// Magic number, a descriptor without content size, a window of 2^30 bytes, and a last raw block
	// of one byte (RFC 8878, section 3.1.1).
	frame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 20 << 3, 0x09, 0x00, 0x00, 'x'}
	s, err := Stream(bytes.NewReader(frame))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := io.ReadAll(s); !errors.Is(err, zstd.ErrWindowSizeExceeded) {
		t.Errorf("stream: %v", err)
	}
}

package blueprint

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// Fields of a bzImage's setup header (Documentation/arch/x86/boot.rst of Linux), as offsets into
// the file.
const (
	setupSects    = 0x1f1 // 1 byte: size of the real-mode code in sectors, without the first
	setupMagic    = 0x202 - 4
	payloadOffset = 0x248 // 4 bytes: start of the payload, from the protected-mode code
	payloadLength = 0x24c // 4 bytes
	setupEnd      = 0x250
)

const (
	maxKernel = 1 << 30 // bytes of an unpacked kernel
	// bytes of history that a decompressor keeps: the kernel's build asks for no more
	// (scripts/Makefile.lib)
	maxDictionary = 128 << 20
)

// ExtractKernel writes the ELF kernel inside a bzImage to w. An image that is an ELF file already
// is copied. VMMs start an ELF kernel at once, without firmware and without unpacking it in the
// guest.
func ExtractKernel(w io.Writer, image []byte) error {
	elf := []byte("\x7fELF")
	if bytes.HasPrefix(image, elf) {
		_, err := w.Write(image)
		return err
	}
	if len(image) < setupEnd || string(image[setupMagic+4:setupMagic+8]) != "HdrS" {
		return errors.New("extract kernel: this is neither a bzImage nor an ELF file")
	}
	sectors := int64(image[setupSects])
	if sectors == 0 {
		sectors = 4
	}
	start := (sectors+1)*512 + int64(binary.LittleEndian.Uint32(image[payloadOffset:]))
	end := start + int64(binary.LittleEndian.Uint32(image[payloadLength:]))
	if start >= end || end > int64(len(image)) {
		return errors.New("extract kernel: the bzImage is truncated")
	}
	// The payload ends with the unpacked size in 4 bytes, which decompressors do not know.
	if end-start < 4+int64(len(elf)) {
		return errors.New("extract kernel: the bzImage is truncated")
	}
	want := int64(binary.LittleEndian.Uint32(image[end-4:]))
	if want > maxKernel {
		return fmt.Errorf("extract kernel: it unpacks to %d bytes, more than %d", want, maxKernel)
	}
	r, err := decompressor(image[start : end-4])
	if err != nil {
		return fmt.Errorf("extract kernel: %w", err)
	}
	head := make([]byte, len(elf))
	if _, err := io.ReadFull(r, head); err != nil {
		return fmt.Errorf("extract kernel: %w", err)
	}
	if !bytes.Equal(head, elf) {
		return errors.New("extract kernel: the bzImage does not hold an ELF file")
	}
	n, err := io.Copy(w, io.LimitReader(io.MultiReader(bytes.NewReader(head), r), want+1))
	if err != nil {
		return fmt.Errorf("extract kernel: %w", err)
	}
	if n != want {
		return fmt.Errorf("extract kernel: %d bytes unpacked instead of %d", n, want)
	}
	return nil
}

// decompressor picks one by magic number, as scripts/extract-vmlinux of Linux does.
func decompressor(payload []byte) (io.Reader, error) {
	r := bytes.NewReader(payload)
	switch {
	case bytes.HasPrefix(payload, []byte("\x02\x21\x4c\x18")):
		return lz4.NewReader(r), nil
	case bytes.HasPrefix(payload, []byte("\x1f\x8b")):
		return gzip.NewReader(r)
	case bytes.HasPrefix(payload, []byte("\x28\xb5\x2f\xfd")):
		return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxDictionary))
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		return xz.NewReader(r)
	case bytes.HasPrefix(payload, []byte("BZh")):
		return bzip2.NewReader(r), nil
	case bytes.HasPrefix(payload, []byte("\x5d\x00\x00")):
		return lzma.ReaderConfig{DictCap: maxDictionary}.NewReader(r)
	}
	return nil, fmt.Errorf("its compression (% x) is not supported", payload[:min(6, len(payload))])
}

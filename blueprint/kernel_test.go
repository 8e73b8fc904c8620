package blueprint

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"io"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// bzImage wraps a payload as the kernel's build does.
func bzImage(payload []byte, unpacked int) []byte {
	const sects, gap = 3, 100
	b := make([]byte, (sects+1)*512+gap)
	b[setupSects] = sects
	copy(b[setupMagic+4:], "HdrS")
	binary.LittleEndian.PutUint32(b[payloadOffset:], gap)
	binary.LittleEndian.PutUint32(b[payloadLength:], uint32(len(payload)+4))
	b = append(b, payload...)
	b = binary.LittleEndian.AppendUint32(b, uint32(unpacked))
	return append(b, "something behind it"...)
}

func TestExtractKernel(t *testing.T) {
	elf := append([]byte("\x7fELF"), bytes.Repeat([]byte("kernel code "), 100_000)...)
	compress := func(w io.WriteCloser, err error, b *bytes.Buffer) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(elf); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	var l, g, z, x bytes.Buffer
	legacy := lz4.NewWriter(&l)
	if err := legacy.Apply(lz4.LegacyOption(true)); err != nil {
		t.Fatal(err)
	}
	xw, xerr := xz.NewWriter(&x)
	zw, zerr := zstd.NewWriter(&z)
	for name, payload := range map[string][]byte{
		"lz4":  compress(legacy, nil, &l),
		"gzip": compress(gzip.NewWriter(&g), nil, &g),
		"zstd": compress(zw, zerr, &z),
		"xz":   compress(xw, xerr, &x),
	} {
		var out bytes.Buffer
		if err := ExtractKernel(&out, bzImage(payload, len(elf))); err != nil || !bytes.Equal(out.Bytes(), elf) {
			t.Errorf("%s: %d bytes, %v", name, out.Len(), err)
		}
		if err := ExtractKernel(io.Discard, bzImage(payload, len(elf)+1)); err == nil {
			t.Errorf("%s: a kernel of the wrong size was accepted", name)
		}
		if err := ExtractKernel(io.Discard, bzImage(payload, len(elf))[:len(payload)]); err == nil {
			t.Errorf("%s: a truncated image was accepted", name)
		}
	}
	var out bytes.Buffer
	if err := ExtractKernel(&out, elf); err != nil || !bytes.Equal(out.Bytes(), elf) {
		t.Errorf("an ELF kernel: %v", err)
	}
	for name, tt := range map[string]struct {
		image []byte
		want  string
	}{
		"empty":               {nil, "neither a bzImage nor an ELF"},
		"unknown compression": {bzImage([]byte("????????????"), 1), "is not supported"},
		"4 GiB":               {bzImage(gz(t, "\x7fELF"), 1<<32-1), "unpacks to 4294967295 bytes"},
		"no payload":          {bzImage(nil, 1), "truncated"},
		"large dictionary":    {bzImage(append([]byte("\x5d\x00\x00\x00\x80"), make([]byte, 100)...), 100), "dictionary"},
		"no ELF inside":       {bzImage(gz(t, "just text"), 9), "does not hold an ELF"},
	} {
		if err := ExtractKernel(io.Discard, tt.image); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error is %v; want %q", name, err, tt.want)
		}
	}
}

func gz(t *testing.T, s string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func FuzzExtractKernel(f *testing.F) {
	f.Add(bzImage([]byte("\x1f\x8b"), 3))
	f.Fuzz(func(_ *testing.T, b []byte) {
		if err := ExtractKernel(io.Discard, b); err != nil {
			return // refused, without a panic
		}
	})
}

package s3

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"

	"drafter/block"
)

// index compresses a header that names size and packs, and then n bytes of zeros.
func index(t testing.TB, size int64, packs uint32, n int) []byte {
	t.Helper()
	head := binary.LittleEndian.AppendUint32([]byte(indexMagic), 1)
	head = binary.LittleEndian.AppendUint32(head, packs)
	head = binary.LittleEndian.AppendUint64(head, uint64(size))
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(head); err != nil {
		t.Fatal(err)
	}
	for piece := make([]byte, 1<<20); n > 0; n -= len(piece) {
		if _, err := w.Write(piece[:min(n, len(piece))]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A storage cannot make us take more memory than a device of the size that its manifest names needs.
func TestHostileIndexes(t *testing.T) {
	const size = 64 << 20 // 1,024 blocks
	for name, c := range map[string]struct {
		index []byte
		want  string
	}{
		"bomb":       {index(t, size, 0, 1<<30), "longer than 45080 bytes: not of the size it must be, which is what 1024 blocks in 0 packs need"},
		"short":      {index(t, size, 0, 1000), "shorter than 45080 bytes"},
		"many packs": {index(t, size, 1<<32-1, 1<<20), "none of this device"},
		"other size": {index(t, size+1, 0, 1024*indexEntry), "none of this device"},
		"no zstd":    {[]byte("an index of nothing"), "index: "},
		"empty":      {nil, "index: "},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := decodeIndex(c.index, manifestDevice{Name: "memory", Size: size, Sum: fmt.Sprintf("%x", blake3.Sum256(c.index))})
		runtime.ReadMemStats(&after)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 64<<20 {
			t.Errorf("%s: %d bytes of index made us allocate %d MiB", name, len(c.index), used>>20)
		}
	}
}

func TestHostileManifests(t *testing.T) {
	for want, devices := range map[string][]manifestDevice{
		"too large for this host": {{Name: "memory", Size: maxDevice}},
		"is not valid":            {{Name: "memory", Size: 1 << 62}},
		"lists 1001 devices":      make([]manifestDevice, 1001),
	} {
		b, err := json.Marshal(manifest{Format: manifestFormat, Version: 1, Moment: time.Now(), Devices: devices})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeManifest(b); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func FuzzIndex(f *testing.F) {
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	ids := []block.ID{{1}, {}, {2}}
	d := &device{contents: block.NewContents(3*block.ContentBlockSize, ids), where: []location{{uuid.New(), 0, 10}, {}, {uuid.New(), 5, 20}}}
	f.Add(encodeIndex(d, encoder), d.contents.Size, true)
	f.Add([]byte("plain"), int64(1), false)
	f.Fuzz(func(t *testing.T, b []byte, size int64, plain bool) {
		if size < 0 || size > 1<<30 {
			return
		}
		if plain { // what is in the frame is what the decoder is about
			b = encoder.EncodeAll(b, nil)
		}
		got, err := decodeIndex(b, manifestDevice{Size: size, Sum: fmt.Sprintf("%x", blake3.Sum256(b)), Content: d.contents.Device.String()})
		if err == nil && int64(len(got.where)) != block.CountBlocks(size) {
			t.Errorf("%d blocks for %d bytes", len(got.where), size)
		}
	})
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"format":"drafter-devices","version":1,"devices":[{"name":"memory","size":65536}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeManifest(b)
		if err != nil {
			return
		}
		for _, d := range m.Devices {
			if d.Size < 0 || d.Size > maxDevice || d.Name == "" {
				t.Errorf("%q of %d bytes", d.Name, d.Size)
			}
		}
	})
}

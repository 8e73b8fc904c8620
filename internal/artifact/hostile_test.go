package artifact

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"drafter/internal/block"
	"drafter/internal/bombtest"
	"drafter/internal/ociclient"
)

// blobFile makes a layer of bytes.
func blobFile(t testing.TB, p []byte) *layer {
	t.Helper()
	sum := sha256.Sum256(p)
	path := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
	return &layer{path, v1.Descriptor{MediaType: IndexType, Size: int64(len(p)), Digest: v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", sum)}}}
}

// stranger stores an artifact with one device, whatever its index says, and returns its reference.
func stranger(t *testing.T, d configDevice, index []byte, data []byte) string {
	t.Helper()
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	i, l := blobFile(t, index), blobFile(t, data)
	d.Index, d.Layer = i.descriptor.Digest, l.descriptor.Digest
	img := &image{layers: map[v1.Hash]*layer{d.Index: i, d.Layer: l}}
	var err error
	if img.config, err = json.Marshal(config{Version: 1, Devices: []configDevice{d}}); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(img.config)
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Layers: []v1.Descriptor{i.descriptor, l.descriptor}}
	m.Config = v1.Descriptor{MediaType: ConfigType, Size: int64(len(img.config)), Digest: v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", sum)}}
	if img.manifest, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	ref, err := ociclient.Parse(strings.TrimPrefix(s.URL, "http://")+"/vm:1", true)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := partial.CompressedToImage(img)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, whole); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

func indexHead(size int64) []byte {
	b := append([]byte(indexMagic), 1, 0, 0, 0, 0, 0, 0, 0)
	return binary.LittleEndian.AppendUint64(b, uint64(size))
}

// A registry cannot make us take more memory than a device of the size that it names needs, nor
// name one that this host cannot know.
func TestHostileIndexes(t *testing.T) {
	const size = 64 << 20 // 1,024 blocks
	for name, c := range map[string]struct {
		size  int64
		index []byte
		want  string
	}{
		"bomb":      {size, bombtest.Zeros(t, indexHead(size), 1<<28), "longer than 45080 bytes: not of the size it must be, which is what 1024 blocks need"},
		"short":     {size, bombtest.Zeros(t, indexHead(size), 1000), "shorter than 45080 bytes"},
		"empty":     {size, bombtest.Zeros(t, nil, 0), "shorter than"},
		"other":     {size, bombtest.Zeros(t, nil, 1024*indexEntry+indexHeader), "none of this device"},
		"no zstd":   {size, []byte("an index of nothing"), "index: "},
		"large":     {size, bytes.Repeat([]byte("not compressed at all"), 1<<16), "has more than"},
		"64 TiB":    {maxSize, bombtest.Zeros(t, indexHead(maxSize), 1<<20), "too large for this host"},
		"too large": {maxSize + 1, nil, "is not valid"},
		"negative":  {-1, nil, "is not valid"},
	} {
		ref := stranger(t, configDevice{Name: "memory", Size: c.size, Content: "00"}, c.index, nil)
		used := bombtest.Allocated(func() {
			if p, err := Open(t.Context(), ref, true, 0, nil); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", name, err)
				if err == nil {
					p.Close()
				}
			}
		})
		if used > 64<<20 {
			t.Errorf("%s: %d bytes of index made us allocate %d MiB", name, len(c.index), used>>20)
		}
	}
}

// A frame that unpacks to more than its block is an error, and costs no more than the block.
func TestHostileFrames(t *testing.T) {
	bomb := bombtest.Zeros(t, []byte("block"), 200<<20)
	if len(bomb) > maxFrame {
		t.Fatalf("the bomb has %d bytes", len(bomb))
	}
	p := make([]byte, block.ContentBlockSize)
	p[0] = 1
	contents := block.NewContents(block.ContentBlockSize, []block.ID{block.HashBlock(p)})
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	index := encodeIndex(contents, []frame{{0, uint32(len(bomb))}}, encoder)
	ref := stranger(t, configDevice{Name: "memory", Size: contents.Size, Content: contents.Device.String()}, index, bomb)
	pkg, err := Open(t.Context(), ref, true, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pkg.Close()
	r, _ := pkg.Remote("memory")
	used := bombtest.Allocated(func() {
		if err := r.Fetcher.Fetch(t.Context(), 0, p, true); err == nil {
			t.Error("a bomb was unpacked")
		}
	})
	if used > 32<<20 {
		t.Errorf("%d bytes of frame made us allocate %d MiB", len(bomb), used>>20)
	}
}

func FuzzIndex(f *testing.F) {
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	contents := block.NewContents(3*block.ContentBlockSize, make([]block.ID, 3))
	f.Add(encodeIndex(contents, make([]frame, 3), encoder), contents.Size, true)
	f.Add([]byte("plain"), int64(1), false)
	f.Fuzz(func(t *testing.T, b []byte, size int64, plain bool) {
		if size < 0 || size > 1<<30 {
			return
		}
		if plain { // what is in the frame is what the decoder is about
			b = encoder.EncodeAll(b, nil)
		}
		c, frames, err := decodeIndex(b, configDevice{Size: size, Content: contents.Device.String()})
		if err == nil && (c.Check() != nil && size > 0 || int64(len(frames)) != block.CountBlocks(size)) {
			t.Errorf("%d frames for %d bytes", len(frames), size)
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"version":1,"devices":[{"name":"memory","size":65536,"content":"00"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeConfig(b, 0)
		if err != nil {
			return
		}
		for _, d := range c.Devices {
			if d.Size < 0 || d.Size > maxSize {
				t.Errorf("%d bytes", d.Size)
			}
		}
	})
}

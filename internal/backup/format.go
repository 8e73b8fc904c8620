package backup

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"
	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"

	"drafter/internal/block"
	"drafter/internal/decompress"
)

const (
	manifestName   = "manifest.json"
	manifestFormat = "drafter-devices"
	maxManifest    = 1 << 20 // bytes
	maxDevices     = 1000
	maxName        = 255     // bytes
	maxDevice      = 1 << 46 // bytes, of one device
)

// manifest is the content of manifest.json.
type manifest struct {
	Format     string           `json:"format"`
	Version    int              `json:"version"`
	Generation int64            `json:"generation"` // one more than that of the manifest before
	Writer     uuid.UUID        `json:"writer"`     // who wrote it
	Moment     time.Time        `json:"moment"`     // when the devices were as they are here
	Devices    []manifestDevice `json:"devices"`
}

type manifestDevice struct {
	Name    string    `json:"name"`
	Size    int64     `json:"size"`    // bytes
	Content string    `json:"content"` // id, in hex
	Index   uuid.UUID `json:"index"`
	Sum     string    `json:"sum"` // BLAKE3 of the index, in hex
}

func decodeManifest(b []byte, maxSize int64) (*manifest, error) {
	var m manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%s: %w", manifestName, err)
	}
	if m.Format != manifestFormat {
		return nil, fmt.Errorf("%s is not one of drafter's", manifestName)
	}
	if m.Version != 1 {
		return nil, fmt.Errorf("%s has version %d, this build reads 1; use a newer release", manifestName, m.Version)
	}
	if len(m.Devices) > maxDevices {
		return nil, fmt.Errorf("%s lists %d devices", manifestName, len(m.Devices))
	}
	seen := map[string]bool{}
	var sizes []int64
	for _, d := range m.Devices {
		if d.Size < 0 || d.Size > maxDevice || d.Name == "" || len(d.Name) > maxName || seen[d.Name] {
			return nil, fmt.Errorf("%s: device %.64q of %d bytes is not valid", manifestName, d.Name, d.Size)
		}
		seen[d.Name] = true
		sizes = append(sizes, d.Size)
	}
	if err := block.CheckSizes(maxSize, sizes...); err != nil {
		return nil, fmt.Errorf("%s: %w", manifestName, err)
	}
	return &m, nil
}

// location is where a block is. That of a block of zeros is nowhere.
type location struct {
	pack   uuid.UUID
	off    uint32
	length uint32 // stored bytes; as long as the block when it is not compressed
}

// device is what a manifest and an index say about a device.
type device struct {
	name     string
	index    uuid.UUID
	sum      string
	contents *block.Contents
	where    []location
}

// The index, version 1, little-endian, compressed as one zstd frame: magic "DrafterX", version
// uint32, number of packs uint32, size of the device uint64; the packs' UUIDs; and for each block
// of 64 KiB its content id (32 bytes), and the pack's number, offset and length there (uint32 each;
// all ones for zeros).
const (
	indexMagic  = "DrafterX"
	indexHeader = 24
	indexEntry  = 32 + 12
	nowhere     = ^uint32(0)
)

func encodeIndex(d *device, encoder *zstd.Encoder) []byte {
	numbers := map[uuid.UUID]uint32{}
	var packs []uuid.UUID
	for i, at := range d.where {
		if _, ok := numbers[at.pack]; !ok && d.contents.Blocks[i] != (block.ID{}) {
			numbers[at.pack] = uint32(len(packs))
			packs = append(packs, at.pack)
		}
	}
	b := append(make([]byte, 0, indexHeader+len(packs)*16+len(d.where)*indexEntry), indexMagic...)
	b = binary.LittleEndian.AppendUint32(b, 1)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(packs)))
	b = binary.LittleEndian.AppendUint64(b, uint64(d.contents.Size))
	for _, p := range packs {
		b = append(b, p[:]...)
	}
	for i, at := range d.where {
		id := d.contents.Blocks[i]
		b = append(b, id[:]...)
		words := [3]uint32{nowhere, nowhere, nowhere}
		if id != (block.ID{}) {
			words = [3]uint32{numbers[at.pack], at.off, at.length}
		}
		for _, w := range words {
			b = binary.LittleEndian.AppendUint32(b, w)
		}
	}
	return encoder.EncodeAll(b, nil)
}

// maxIndex bounds the size of the index of a device, in bytes: every block may be of a pack of its
// own.
func maxIndex(device int64) int64 { return indexHeader + block.CountBlocks(device)*(indexEntry+16) }

// decodeIndex checks an index against its line of the manifest.
func decodeIndex(compressed []byte, m manifestDevice) (*device, error) {
	if sum := blake3.Sum256(compressed); fmt.Sprintf("%x", sum) != m.Sum {
		return nil, errors.New("the index is not the one that the manifest names")
	}
	blocks := block.CountBlocks(m.Size)
	packs, err := countPacks(compressed, m.Size)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	d := &device{name: m.Name, index: m.Index, sum: m.Sum}
	err = decompress.Exactly(compressed, indexHeader+packs*16+blocks*indexEntry, func(r io.Reader) error { return d.read(r, m.Size, packs) })
	switch {
	case errors.Is(err, decompress.ErrSize):
		return nil, fmt.Errorf("index: %w, which is what %d blocks in %d packs need", err, blocks, packs)
	case err != nil:
		return nil, fmt.Errorf("index: %w", err)
	case d.contents.Device.String() != m.Content:
		return nil, errors.New("the index has not the content that the manifest names")
	}
	return d, nil
}

// countPacks reads an index' header.
func countPacks(compressed []byte, size int64) (int64, error) {
	r, err := decompress.Stream(bytes.NewReader(compressed))
	if err != nil {
		return 0, err
	}
	defer r.Close()
	var b [indexHeader]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, err
	}
	packs := int64(binary.LittleEndian.Uint32(b[12:]))
	if string(b[:8]) != indexMagic || binary.LittleEndian.Uint32(b[8:]) != 1 || binary.LittleEndian.Uint64(b[16:]) != uint64(size) || packs > block.CountBlocks(size) {
		return 0, errors.New("it is none of this device")
	}
	return packs, nil
}

// read decodes an index whose header is known.
func (d *device) read(r io.Reader, size, packs int64) error {
	in := bufio.NewReaderSize(r, 64<<10)
	if _, err := in.Discard(indexHeader); err != nil {
		return err
	}
	names := make([]uuid.UUID, packs)
	for i := range names {
		if _, err := io.ReadFull(in, names[i][:]); err != nil {
			return err
		}
	}
	ids := make([]block.ID, block.CountBlocks(size))
	d.where = make([]location, len(ids))
	var e [indexEntry]byte
	for i := range ids {
		if _, err := io.ReadFull(in, e[:]); err != nil {
			return err
		}
		copy(ids[i][:], e[:])
		pack, off, length := binary.LittleEndian.Uint32(e[32:]), binary.LittleEndian.Uint32(e[36:]), binary.LittleEndian.Uint32(e[40:])
		if ids[i] == (block.ID{}) {
			continue
		}
		if int64(pack) >= packs || length == 0 || length > block.ContentBlockSize || off > maxPack {
			return fmt.Errorf("block %d is at %d+%d of pack %d", i, off, length, pack)
		}
		d.where[i] = location{names[pack], off, length}
	}
	d.contents = block.NewContents(size, ids)
	return nil
}

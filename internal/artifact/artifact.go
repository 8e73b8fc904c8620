// Package artifact keeps packages as artifacts in any OCI registry (OCI distribution specification
// 1.1), so that one block can be read without the rest.
//
// The manifest is an image manifest (OCI image specification 1.1, "Guidelines for Artifact Usage")
// with
//
//	config   [ConfigType]: JSON that lists the devices, with their sizes, content ids and layers
//	layers   for each device one of [DeviceType] and one of [IndexType], with the annotation "drafter.device";
//	         one of [signature.MediaType], if the package is signed
//
// A layer of [DeviceType] is a series of zstd frames (RFC 8878), each of one block of 64 KiB, or of
// some blocks of zeros: together they are the device, as any zstd program unpacks it. The index,
// version 1, says where each block's frame is: compressed as one zstd frame, little-endian, magic
// "DrafterO", version uint32, reserved uint32, size of the device uint64; and for each block its
// content id (32 bytes, all 0 for zeros), the offset (uint64) and length (uint32) of its frame,
// both 0 for zeros.
package artifact

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/zstd"

	"drafter/internal/block"
	"drafter/internal/decompress"
)

// Media types.
const (
	PackageType = "application/vnd.drafter.package.v1" // the artifactType
	ConfigType  = "application/vnd.drafter.package.config.v1+json"
	DeviceType  = "application/vnd.drafter.package.device.v1+zstd"
	IndexType   = "application/vnd.drafter.package.index.v1+zstd"

	deviceAnnotation = "drafter.device"
	titleAnnotation  = "org.opencontainers.image.title" // the file name that tools give a layer
)

const (
	maxConfig  = 1 << 20 // bytes
	maxDevices = 1000
	maxName    = 255     // bytes
	maxSize    = 1 << 46 // bytes, of a device
)

// config is the content of the config blob.
type config struct {
	Version int            `json:"version"` // 1
	Devices []configDevice `json:"devices"`
}

type configDevice struct {
	Name    string  `json:"name"`
	Size    int64   `json:"size"`    // bytes
	Content string  `json:"content"` // id, in hex
	Layer   v1.Hash `json:"layer"`
	Index   v1.Hash `json:"index"`
}

func decodeConfig(b []byte, maxBytes int64) (*config, error) {
	var c config
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if c.Version != 1 {
		return nil, fmt.Errorf("its config has version %d, this build reads 1; use a newer release", c.Version)
	}
	if len(c.Devices) == 0 || len(c.Devices) > maxDevices {
		return nil, fmt.Errorf("its config lists %d devices", len(c.Devices))
	}
	seen := map[string]bool{}
	var sizes []int64
	for _, d := range c.Devices {
		if d.Name == "" || len(d.Name) > maxName || d.Size < 0 || d.Size > maxSize || seen[d.Name] {
			return nil, fmt.Errorf("its config: device %.64q of %d bytes is not valid", d.Name, d.Size)
		}
		seen[d.Name] = true
		sizes = append(sizes, d.Size)
	}
	if err := block.CheckSizes(maxBytes, sizes...); err != nil {
		return nil, fmt.Errorf("its config: %w", err)
	}
	return &c, nil
}

// frame is where a block is in its layer.
type frame struct {
	off    int64
	length uint32
}

const (
	indexMagic  = "DrafterO"
	indexHeader = 24
	indexEntry  = 32 + 8 + 4
	// bytes of the frame of a block that does not compress
	maxFrame = block.ContentBlockSize + 1<<10
)

func encodeIndex(c *block.Contents, frames []frame, encoder *zstd.Encoder) []byte {
	b := append(make([]byte, 0, indexHeader+len(frames)*indexEntry), indexMagic...)
	b = binary.LittleEndian.AppendUint32(b, 1)
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint64(b, uint64(c.Size))
	for i, f := range frames {
		b = append(b, c.Blocks[i][:]...)
		b = binary.LittleEndian.AppendUint64(b, uint64(f.off))
		b = binary.LittleEndian.AppendUint32(b, f.length)
	}
	return encoder.EncodeAll(b, nil)
}

// indexSize is the size in bytes of the index of a device.
func indexSize(device int64) int64 { return indexHeader + block.CountBlocks(device)*indexEntry }

func decodeIndex(compressed []byte, d configDevice) (c *block.Contents, frames []frame, err error) {
	blocks := block.CountBlocks(d.Size)
	err = decompress.Exactly(compressed, indexSize(d.Size), func(r io.Reader) error {
		in := bufio.NewReaderSize(r, 64<<10)
		var b [indexHeader]byte
		if _, err := io.ReadFull(in, b[:]); err != nil {
			return err
		}
		if string(b[:8]) != indexMagic || binary.LittleEndian.Uint32(b[8:]) != 1 || binary.LittleEndian.Uint64(b[16:]) != uint64(d.Size) {
			return errors.New("it is none of this device")
		}
		ids := make([]block.ID, blocks)
		frames = make([]frame, blocks)
		var e [indexEntry]byte
		for i := range blocks {
			if _, err := io.ReadFull(in, e[:]); err != nil {
				return err
			}
			copy(ids[i][:], e[:])
			frames[i] = frame{int64(binary.LittleEndian.Uint64(e[32:])), binary.LittleEndian.Uint32(e[40:])}
			if f := frames[i]; ids[i] != (block.ID{}) && (f.off < 0 || f.off > maxSize || f.length == 0 || f.length > maxFrame) {
				return fmt.Errorf("block %d is at %d+%d", i, f.off, f.length)
			}
		}
		c = block.NewContents(d.Size, ids)
		return nil
	})
	switch {
	case errors.Is(err, decompress.ErrSize):
		return nil, nil, fmt.Errorf("index: %w, which is what %d blocks need", err, blocks)
	case err != nil:
		return nil, nil, fmt.Errorf("index: %w", err)
	case c.Device.String() != d.Content:
		return nil, nil, errors.New("the index has not the content that the config names")
	}
	return c, frames, nil
}

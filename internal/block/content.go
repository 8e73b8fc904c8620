package block

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"

	"drafter/internal/newfile"

	"github.com/zeebo/blake3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// ID identifies content: the BLAKE3 hash of a block, or of a device. The zero ID is that of a block
// of zeros.
type ID [32]byte

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// ContentBlockSize is the size in bytes of the blocks that have content ids. It is the same for all
// devices, whatever block size they are tracked in, so that ids can be compared.
const ContentBlockSize = 64 << 10

// CountBlocks is how many blocks of ContentBlockSize a device of size bytes has.
func CountBlocks(size int64) int64 {
	n := size / ContentBlockSize
	if size%ContentBlockSize > 0 {
		n++
	}
	return n
}

// Contents are the content ids of a device and of its blocks.
type Contents struct {
	Size   int64
	Device ID   // of the size and all blocks: devices with the same id have the same bytes
	Blocks []ID // of each ContentBlockSize bytes; the last may be fewer
}

// NewContents returns the contents of a device of size bytes. It owns ids, those of its blocks,
// from here on.
func NewContents(size int64, blocks []ID) *Contents {
	c := &Contents{Size: size, Blocks: blocks}
	c.seal()
	return c
}

// HashBlock returns the content id of one block.
func HashBlock(p []byte) ID {
	if IsZero(p) {
		return ID{}
	}
	return blake3.Sum256(p)
}

// IsZero tells whether all bytes are 0.
func IsZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}

// HashBytes returns the contents of a device that consists of p.
func HashBytes(p []byte) *Contents {
	var blocks []ID
	for off := 0; off < len(p); off += ContentBlockSize {
		blocks = append(blocks, HashBlock(p[off:min(off+ContentBlockSize, len(p))]))
	}
	return NewContents(int64(len(p)), blocks)
}

// Hash reads all of a device, on all cores, and returns its content ids.
func Hash(ctx context.Context, d Device) (*Contents, error) {
	c := &Contents{Size: d.Size(), Blocks: make([]ID, (d.Size()+ContentBlockSize-1)/ContentBlockSize)}
	const batch = 16 // blocks read at once
	data, err := dataBlocks(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("hash device: %w", err)
	}
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range runtime.GOMAXPROCS(0) {
		g.Go(func() error {
			buf := make([]byte, batch*ContentBlockSize)
			for ctx.Err() == nil {
				first := next.Add(batch) - batch
				if first >= int64(len(c.Blocks)) {
					return nil
				}
				if has, end := data.Run(first, min(first+batch, data.Len())); !has && end == min(first+batch, data.Len()) {
					continue // a hole, whose blocks have the zero id
				}
				if err := c.hashBatch(d, buf, first); err != nil {
					return err
				}
			}
			return context.Cause(ctx)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("hash device: %w", err)
	}
	c.seal()
	return c, nil
}

// dataBlocks returns the blocks that may hold data.
func dataBlocks(ctx context.Context, d Device) (*Bitmap, error) {
	blocks := NewBitmap((d.Size() + ContentBlockSize - 1) / ContentBlockSize)
	for off := int64(0); off < d.Size(); {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		start, end, err := NextData(d, off)
		if err != nil {
			return nil, err
		}
		if start < end {
			blocks.SetRange(start/ContentBlockSize, (end+ContentBlockSize-1)/ContentBlockSize)
		}
		off = max(end, off+1)
	}
	return blocks, nil
}

func (c *Contents) hashBatch(d Device, buf []byte, first int64) error {
	off := first * ContentBlockSize
	buf = buf[:min(int64(len(buf)), c.Size-off)]
	if _, err := d.ReadAt(buf, off); err != nil {
		return err
	}
	for i := first; len(buf) > 0; i++ {
		n := min(ContentBlockSize, len(buf))
		c.Blocks[i] = HashBlock(buf[:n])
		buf = buf[n:]
	}
	return nil
}

// seal makes the device's id.
func (c *Contents) seal() {
	h := blake3.New()
	// A hash's writer cannot fail.
	_, _ = h.Write(binary.LittleEndian.AppendUint64([]byte("drafter device"), uint64(c.Size)))
	for i := range c.Blocks {
		_, _ = h.Write(c.Blocks[i][:])
	}
	h.Sum(c.Device[:0])
}

// contentsPath is the file beside a base that holds its content ids.
func contentsPath(base string) string {
	return filepath.Join(filepath.Dir(base), "."+filepath.Base(base)+".contents")
}

// The contents file, version 1, little-endian: magic "DrafterC", version uint32, reserved uint32,
// then of the base file size int64, modification and change time int64 in nanoseconds and inode
// uint64; the blocks' ids; a BLAKE3 hash of all that. It is valid for that file with these times
// only.
const contentsMagic = "DrafterC"

// HashFile reads all of a file and returns its content ids. It does not use those kept beside it;
// see [FileContents].
func HashFile(ctx context.Context, path string) (_ *Contents, err error) {
	d, err := OpenFile(path, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return Hash(ctx, d)
}

// FileContents returns the content ids of a file that nobody writes to. It keeps them in a file
// beside it, if that can be made.
func FileContents(ctx context.Context, path string) (_ *Contents, err error) {
	d, err := OpenFile(path, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	stamp, err := d.stamp()
	if err != nil {
		return nil, err
	}
	cache := contentsPath(path)
	if c := readContents(cache, stamp, d.Size()); c != nil {
		return c, nil
	}
	c, err := Hash(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	after, err := d.stamp()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(stamp, after) {
		return nil, fmt.Errorf("%s changed while it was read; a base is read-only", path)
	}
	return c, c.keep(cache, stamp)
}

// keep writes the contents file.
func (c *Contents) keep(path string, stamp []byte) error {
	b := append([]byte(nil), stamp...)
	for i := range c.Blocks {
		b = append(b, c.Blocks[i][:]...)
	}
	sum := blake3.Sum256(b)
	err := newfile.Write(path, func(f *os.File) error {
		_, err := f.Write(append(b, sum[:]...))
		return err
	})
	if errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.ENOSPC) {
		return nil // it is hashed again next time
	}
	return err
}

// Check refuses contents, such as those from elsewhere, whose blocks' ids do not make the device's
// id.
func (c *Contents) Check() error {
	if c.Size <= 0 || int64(len(c.Blocks)) != (c.Size+ContentBlockSize-1)/ContentBlockSize {
		return fmt.Errorf("%d content ids for a device of %d bytes", len(c.Blocks), c.Size)
	}
	sealed := Contents{Size: c.Size, Blocks: c.Blocks}
	sealed.seal()
	if sealed.Device != c.Device {
		return errors.New("the content ids of the blocks are not those of the device")
	}
	return nil
}

// stamp identifies the file and the moment of its last change; it is the head of the contents file.
func (d *File) stamp() ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.f.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: d.f.Name(), Err: err}
	}
	b := append([]byte(contentsMagic), 1, 0, 0, 0, 0, 0, 0, 0)
	for _, n := range []uint64{uint64(d.size), uint64(st.Mtim.Nano()), uint64(st.Ctim.Nano()), st.Ino} {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	return b, nil
}

// readContents returns nil for a file that is missing, stale or damaged.
func readContents(path string, stamp []byte, size int64) *Contents {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	want := int64(len(stamp)) + (CountBlocks(size)+1)*int64(len(ID{}))
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != want || !trusted(&st) {
		return nil
	}
	c := &Contents{Size: size, Blocks: make([]ID, CountBlocks(size))}
	b := make([]byte, want)
	if _, err := io.ReadFull(f, b); err != nil || !bytes.Equal(b[:len(stamp)], stamp) {
		return nil
	}
	body := b[:len(b)-len(ID{})]
	if sum := blake3.Sum256(body); !bytes.Equal(sum[:], b[len(body):]) {
		return nil
	}
	for i := range c.Blocks {
		copy(c.Blocks[i][:], body[len(stamp)+i*len(ID{}):])
	}
	c.seal()
	return c
}

// trusted tells whether only this user, or root, may have written a file.
func trusted(st *unix.Stat_t) bool {
	return (int(st.Uid) == os.Geteuid() || st.Uid == 0) && st.Mode&0o022 == 0
}

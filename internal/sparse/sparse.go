// Package sparse copies files without filling their holes.
package sparse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"drafter/internal/private"
)

// Extent is a run of bytes that a file stores; what lies between extents is a hole, which reads as
// zeros.
type Extent struct{ Offset, Length int64 }

// Extents lists the parts of f that are stored, in order (lseek(2), SEEK_DATA and SEEK_HOLE). On
// file systems without holes it is one extent. It moves f's offset.
func Extents(f *os.File, size int64) ([]Extent, error) {
	var extents []Extent
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole up to the end
		}
		if errors.Is(err, unix.EINVAL) && len(extents) == 0 {
			return []Extent{{0, size}}, nil
		}
		if err != nil {
			return nil, fmt.Errorf("find data in %s: %w", f.Name(), err)
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return nil, fmt.Errorf("find hole in %s: %w", f.Name(), err)
		}
		hole = min(hole, size)
		if data >= hole {
			break
		}
		extents = append(extents, Extent{data, hole - data})
		at = hole
	}
	return extents, nil
}

// chunk is how much is copied between two looks at the context, in bytes.
const chunk = 8 << 20

// CopyFile copies the regular file src to dst, which is created or overwritten (see
// [private.CreateOrOpen]), and syncs it. progress, which may be nil, is called with the number of
// stored bytes copied and to copy. A failed copy removes dst.
func CopyFile(ctx context.Context, dst, src string, progress func(done, total int64)) (err error) {
	in, err := private.Open(src, unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	size := info.Size()
	if !info.Mode().IsRegular() {
		// A block device has no size in its inode.
		if size, err = in.Seek(0, io.SeekEnd); err != nil || size == 0 {
			return fmt.Errorf("copy %s: it is neither a regular file nor a block device", src)
		}
	}
	out, err := private.CreateOrOpen(dst)
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	defer func() {
		err = errors.Join(err, out.Close())
		if err != nil {
			err = errors.Join(err, os.Remove(dst))
		}
	}()
	if err := out.Truncate(0); err != nil {
		return fmt.Errorf("copy: empty %s: %w", dst, err)
	}
	if err := unix.IoctlFileClone(int(out.Fd()), int(in.Fd())); err == nil {
		return syncFile(out)
	}
	if err := out.Truncate(size); err != nil {
		return fmt.Errorf("copy: size %s: %w", dst, err)
	}
	if err := copyExtents(ctx, out, in, size, progress); err != nil {
		return err
	}
	return syncFile(out)
}

// copyExtents copies what in stores of its size bytes.
func copyExtents(ctx context.Context, out, in *os.File, size int64, progress func(done, total int64)) error {
	extents, err := Extents(in, size)
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	var done, total int64
	for _, e := range extents {
		total += e.Length
	}
	for _, e := range extents {
		if _, err := out.Seek(e.Offset, io.SeekStart); err != nil {
			return fmt.Errorf("copy to %s: %w", out.Name(), err)
		}
		if _, err := in.Seek(e.Offset, io.SeekStart); err != nil {
			return fmt.Errorf("copy %s: %w", in.Name(), err)
		}
		for left := e.Length; left > 0; {
			if ctx.Err() != nil {
				return fmt.Errorf("copy %s: %w", in.Name(), context.Cause(ctx))
			}
			// io.Copy between two files becomes copy_file_range(2).
			want := min(chunk, left)
			n, err := io.Copy(out, io.LimitReader(in, want))
			if err == nil && n < want {
				err = io.ErrUnexpectedEOF // the file shrank meanwhile
			}
			if err != nil {
				return fmt.Errorf("copy %s to %s: %w", in.Name(), out.Name(), err)
			}
			left -= n
			done += n
			if progress != nil {
				progress(done, total)
			}
		}
	}
	return nil
}

func syncFile(f *os.File) error {
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", f.Name(), err)
	}
	return nil
}

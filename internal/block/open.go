package block

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"drafter/internal/lockfile"
	"drafter/internal/newfile"
	"drafter/internal/private"
)

// OverlayPaths names the files of an overlay.
type OverlayPaths struct {
	Base    string // for messages; base devices may be of any kind
	Overlay string
	State   string
	// of a new overlay: content id of the base that its device was made from, if that is not the
	// base beneath; else zero
	Origin ID
}

// OpenOverlay opens an overlay over base, whose content id is baseID. It makes both files when
// neither exists. It discards blocks that were written but not synced when their writer was killed.
// The overlay owns base from here on, also when opening fails. It holds a lock on the state file
// until it is closed; an overlay that another process uses is refused. An existing overlay keeps
// its block size. For a new one, a block size of 0 is refused.
func OpenOverlay(base Device, baseID ID, paths OverlayPaths, blockSize int64) (_ *Overlay, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, base.Close())
		}
	}()
	if err := CheckBlockSize(blockSize); err != nil && blockSize != 0 {
		return nil, err
	}
	h := &stateHeader{blockSize: blockSize, size: base.Size(), base: baseID, id: uuid.New(), origin: paths.Origin}
	if err := createOverlay(paths, h); err != nil {
		return nil, err
	}
	state, data, err := openOverlayFiles(paths)
	if err != nil {
		return nil, err
	}
	o := newOverlay(base, data, state)
	if err := o.checkFiles(paths, baseID); err != nil {
		return nil, errors.Join(err, data.Close(), state.close())
	}
	if err := o.discardUncommitted(); err != nil {
		return nil, errors.Join(fmt.Errorf("overlay %s: %w", paths.Overlay, err), data.Close(), state.close())
	}
	o.data = NewBacklog(data, paths.Overlay)
	return o, nil
}

// overlayExists tells whether both files are there. One alone is refused, unless an interrupted
// creation has left it.
func overlayExists(paths OverlayPaths) (bool, error) {
	overlay, err := fileExists(paths.Overlay)
	if err != nil {
		return false, err
	}
	state, err := fileExists(paths.State)
	if err != nil {
		return false, err
	}
	switch {
	case overlay && !state:
		f, err := OpenFile(paths.Overlay, true)
		if err != nil {
			return false, err
		}
		ours := hasTrailer(f)
		start, _, err := f.NextData(0)
		if err = errors.Join(err, f.Close()); err != nil {
			return false, err
		}
		if !ours {
			return false, fmt.Errorf("%s is there, and is no overlay; name another file", paths.Overlay)
		}
		if start < f.Size()-pageSize {
			return false, fmt.Errorf("overlay %s has data, but its state file %s is missing; restore it, or remove the overlay to start from the base", paths.Overlay, paths.State)
		}
		return false, nil
	case state && !overlay:
		return false, fmt.Errorf("state file %s is there, but its overlay %s is missing; restore it, or remove the state file to start from the base", paths.State, paths.Overlay)
	}
	return overlay && state, nil
}

// hasTrailer tells whether a file ends like an overlay.
func hasTrailer(f *File) bool {
	trailer := make([]byte, pageSize)
	if f.Size() < pageSize {
		return false
	}
	_, err := f.ReadAt(trailer, f.Size()-pageSize)
	return err == nil && isTrailer(trailer)
}

func isTrailer(page []byte) bool {
	return string(page[:8]) == overlayMagic && intact(page, trailerChecksum)
}

func fileExists(path string) (bool, error) {
	_, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// createOverlay makes the files unless they exist: the overlay file, then the state file, without
// which there is no overlay.
func createOverlay(paths OverlayPaths, h *stateHeader) (err error) {
	if exists, err := overlayExists(paths); err != nil || exists {
		return err
	}
	if h.blockSize == 0 {
		return fmt.Errorf("overlay %s does not exist", paths.Overlay)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("create overlay %s: %w", paths.Overlay, err)
		}
	}()
	dir := filepath.Dir(paths.State)
	if err := private.MkdirAll(dir); err != nil {
		return err
	}
	lock, err := lockDirectory(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	if exists, err := overlayExists(paths); err != nil || exists {
		return err
	}
	at := trailerOffset(h.size)
	err = newfile.Write(paths.Overlay, func(f *os.File) error {
		if err := f.Truncate(at + pageSize); err != nil {
			return err
		}
		_, err := f.WriteAt(overlayTrailer(h.id), at)
		return err
	})
	if err != nil {
		return err
	}
	return newfile.Write(paths.State, func(f *os.File) error {
		_, err := f.Write(initialState(h))
		return err
	})
}

// lockPatience bounds how long another process may take to make its overlays in a directory.
const lockPatience = 30 * time.Second

// lockDirectory lets one process at a time make overlays in a directory. Nobody else can open the
// lock's file, and so lock it.
func lockDirectory(dir string) (*lockfile.Lock, error) {
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(5 * time.Millisecond) {
		lock, err := lockfile.Try(filepath.Join(dir, ".overlays.lock"))
		var held *lockfile.HeldError
		if !errors.As(err, &held) || time.Now().After(deadline) {
			return lock, err
		}
	}
}

func openOverlayFiles(paths OverlayPaths) (*stateFile, *overlayFile, error) {
	f, err := OpenFile(paths.State, false)
	if err != nil {
		return nil, nil, fmt.Errorf("open state file: %w", err)
	}
	if err := f.Lock(true); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("state file %s is %w; give each instance its own", paths.State, err), f.Close())
	}
	state, err := readState(f)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("state file %s: %w", paths.State, err), f.Close())
	}
	data, err := OpenFile(paths.Overlay, false)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open overlay: %w", err), state.close())
	}
	return state, &overlayFile{File: data, size: state.header.size}, nil
}

// overlayFile is an overlay file without its trailer.
type overlayFile struct {
	*File
	size int64
}

func (f *overlayFile) Size() int64 { return f.size }

func (f *overlayFile) NextData(off int64) (start, end int64, err error) {
	start, end, err = f.File.NextData(off)
	return min(start, f.size), min(end, f.size), err
}

// checkFiles refuses files that do not belong together.
func (o *Overlay) checkFiles(paths OverlayPaths, baseID ID) error {
	h := o.state.header
	if h.size != o.base.Size() {
		return fmt.Errorf("state file %s is for a base of %d bytes, %s has %d; use the base that the overlay was made over", paths.State, h.size, paths.Base, o.base.Size())
	}
	if h.base != baseID {
		return fmt.Errorf("base %s is not the one that overlay %s was made over: it is another one, or its content has changed; use the base as it was", paths.Base, paths.Overlay)
	}
	data, ok := o.data.(*overlayFile)
	if !ok {
		return nil
	}
	trailer := make([]byte, pageSize)
	at := trailerOffset(h.size)
	if data.File.Size() != at+pageSize {
		return fmt.Errorf("overlay %s has %d bytes instead of %d", paths.Overlay, data.File.Size(), at+pageSize)
	}
	if _, err := data.ReadAt(trailer, at); err != nil {
		return err
	}
	if !isTrailer(trailer) {
		return fmt.Errorf("overlay %s is no overlay, or its trailer is damaged", paths.Overlay)
	}
	if uuid.UUID(trailer[8:24]) != h.id {
		return fmt.Errorf("overlay %s and state file %s are of different instances; use those of one", paths.Overlay, paths.State)
	}
	return nil
}

// discardUncommitted makes holes of blocks that are not the overlay's: their writer ended before it
// synced them.
func (o *Overlay) discardUncommitted() error {
	for off := int64(0); off < o.Size(); {
		start, end, err := NextData(o.data, off)
		if err != nil {
			return err
		}
		for start < end {
			has, n := o.run(start, end-start)
			if !has {
				if err := Trim(o.data, start, n); err != nil {
					return err
				}
			}
			start += n
		}
		off = max(end, off+1)
	}
	return nil
}

// Export writes the content of d to a new file, with holes for zeros, and syncs it. progress, which
// may be nil, is called with the bytes that are done, and with all bytes. The file gets its name
// only once it is complete.
func Export(ctx context.Context, path string, d Device, progress func(done, total int64)) error {
	err := newfile.Write(path, func(f *os.File) error {
		if err := f.Truncate(d.Size()); err != nil {
			return err
		}
		buf := make([]byte, 1<<20)
		for off := int64(0); off < d.Size(); {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			start, end, err := NextData(d, off)
			if err != nil {
				return err
			}
			end = min(end, start+int64(len(buf)))
			if p := buf[:end-start]; len(p) > 0 {
				if _, err := d.ReadAt(p, start); err != nil {
					return err
				}
				if _, err := f.WriteAt(p, start); err != nil {
					return err
				}
			}
			if off = end; progress != nil {
				progress(off, d.Size())
			}
		}
		return SyncAndVerify(ctx, f)
	})
	if err != nil {
		return fmt.Errorf("export to %s: %w", path, err)
	}
	return nil
}

// OverlayBase returns the content id and the size in bytes of the base that an existing overlay is
// over. With found false there is no overlay.
func OverlayBase(paths OverlayPaths) (base ID, size int64, found bool, err error) {
	exists, err := overlayExists(paths)
	if err != nil || !exists {
		return base, 0, false, err
	}
	f, err := OpenFile(paths.State, true)
	if err != nil {
		return base, 0, false, err
	}
	page := make([]byte, pageSize)
	_, err = f.ReadAt(page, 0)
	if err = errors.Join(err, f.Close()); err != nil {
		return base, 0, false, fmt.Errorf("state file %s: %w", paths.State, err)
	}
	h, err := decodeHeader(page)
	if err != nil {
		return base, 0, false, fmt.Errorf("state file %s: %w", paths.State, err)
	}
	return h.base, h.size, true, nil
}

// RemoveOverlay removes the files of an overlay that nobody uses. It is no error if there are none.
func RemoveOverlay(paths OverlayPaths) error {
	f, err := OpenFile(paths.State, true)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return removeFiles(paths.Overlay)
	case err != nil:
		return err
	}
	if err := f.Lock(true); err != nil {
		return errors.Join(fmt.Errorf("state file %s is %w", paths.State, err), f.Close())
	}
	return errors.Join(removeFiles(paths.Overlay, paths.State), f.Close())
}

func removeFiles(paths ...string) error {
	for _, p := range paths {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if d, err := os.Open(filepath.Dir(p)); err == nil {
			if err := errors.Join(d.Sync(), d.Close()); err != nil {
				return err
			}
		}
	}
	return nil
}

// CreateFile makes a new file of zeros as a device. It fails if the file exists.
func CreateFile(path string, size int64) (*File, error) {
	f, err := private.Create(path)
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(path))
	}
	return &File{f: f, size: size}, nil
}

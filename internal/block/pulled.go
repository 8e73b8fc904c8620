package block

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"drafter/internal/logging"
	"drafter/internal/newfile"
	"drafter/internal/private"
)

// Fetcher gets content of a device that is elsewhere. It is safe for concurrent use.
type Fetcher interface {
	// Fetch fills p with whole blocks of ContentBlockSize bytes, at most maxFetch of them, from
	// number first on. The device's last block may be short. urgent says that somebody waits. After
	// an error another attempt may succeed, unless the error is ErrReplaced.
	Fetch(ctx context.Context, first int64, p []byte, urgent bool) error
}

// Remote is a device that is elsewhere, and known by its content.
type Remote struct {
	Contents *Contents
	Fetcher  Fetcher
	Logger   *slog.Logger // who hears that it does not come; nil: slog.Default()
}

// ErrReplaced says that the content elsewhere has changed, or is gone for good. Going on would mix
// two versions.
var ErrReplaced = errors.New("it has been replaced or removed while it was being pulled")

const (
	maxFetch = 16 // blocks of one request

	firstRetry = 100 * time.Millisecond
	lastRetry  = 2 * time.Second
	noticeable = 4 // attempts that fail before it is said
)

// Pulled is a read-only device in a file that is filled from elsewhere: with the blocks that are
// read and, by Fill, with all others. Every block is verified by its content id before anybody sees
// it. An incomplete file has a hidden name, and the next pull of the same content goes on with it.
type Pulled struct {
	path    string // of the complete file
	file    *File
	own     bool // the file stays when it is complete
	remote  Remote
	present *Bitmap // blocks
	left    atomic.Int64

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	flights map[int64]*flight // of blocks that are being fetched
	failed  error             // for good
	delayed bool              // attempts fail, and it was said
	closed  bool
}

// flight is a fetch under way.
type flight struct {
	done chan struct{}
	err  error
}

// partialPath is where a file is until it is complete.
func partialPath(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".partial")
}

// PartlyPulled tells whether a part of the file at path has been pulled.
func PartlyPulled(path string) bool {
	_, err := os.Stat(partialPath(path))
	return err == nil
}

// OpenPulled opens the file at path, which does not exist yet, as a device with the content of
// remote. If another process is pulling it at the same time, this one pulls it too, for itself.
func OpenPulled(ctx context.Context, path string, remote Remote) (_ *Pulled, err error) {
	if err := remote.Contents.Check(); err != nil {
		return nil, err
	}
	d := &Pulled{path: path, remote: remote, own: true, flights: map[int64]*flight{}, present: NewBitmap(int64(len(remote.Contents.Blocks)))}
	f, err := private.CreateOrOpen(partialPath(path))
	if err != nil {
		return nil, err
	}
	d.file = &File{f: f, size: remote.Contents.Size}
	if d.file.Lock(true) != nil {
		if err := f.Close(); err != nil {
			return nil, err
		}
		if d.file, err = CreateUnnamed(filepath.Dir(path), remote.Contents.Size); err != nil {
			return nil, err
		}
		d.own = false
	}
	if err := d.takeUp(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("take up %s: %w", d.file.Name(), err), d.file.Close())
	}
	d.left.Store(d.present.Len() - d.present.Count())
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d, nil
}

// CreateUnnamed makes an unnamed file of zeros in dir, which ends with its last user.
func CreateUnnamed(dir string, size int64) (*File, error) {
	f, err := private.CreateTemp(filepath.Join(dir, "unnamed"))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.Remove(f.Name()), f.Truncate(size)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &File{f: f, size: size}, nil
}

// takeUp finds which blocks are in the file already.
func (d *Pulled) takeUp(ctx context.Context) error {
	c := d.remote.Contents
	info, err := d.file.f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != c.Size {
		if err := errors.Join(d.file.f.Truncate(0), d.file.f.Truncate(c.Size)); err != nil {
			return err
		}
	}
	data, err := dataBlocks(ctx, d.file)
	if err != nil {
		return err
	}
	buf := make([]byte, ContentBlockSize)
	for b, id := range c.Blocks {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := int64(b)
		p := buf[:d.length(b, b+1)]
		has := data.Has(b)
		if has {
			if _, err := d.file.ReadAt(p, b*ContentBlockSize); err != nil {
				return err
			}
		}
		switch {
		case has && HashBlock(p) == id, !has && id == (ID{}):
			d.present.Set(b)
		case has:
			if err := d.file.Trim(b*ContentBlockSize, int64(len(p))); err != nil {
				return err
			}
			if id == (ID{}) {
				d.present.Set(b)
			}
		}
	}
	return nil
}

// length is the size in bytes of some blocks.
func (d *Pulled) length(first, end int64) int64 {
	return min(end*ContentBlockSize, d.Size()) - first*ContentBlockSize
}

// Contents are the device's content ids.
func (d *Pulled) Contents() *Contents { return d.remote.Contents }

// Missing is how many bytes are still elsewhere.
func (d *Pulled) Missing() int64 { return d.left.Load() * ContentBlockSize }

// Size implements [Device].
func (d *Pulled) Size() int64 { return d.remote.Contents.Size }

// ReadAt implements [Device]. It waits for what is not there, as long as it takes.
func (d *Pulled) ReadAt(p []byte, off int64) (int, error) {
	if err := checkRange(d, off, int64(len(p))); err != nil {
		return 0, err
	}
	if d.left.Load() > 0 {
		if err := d.need(off/ContentBlockSize, (off+int64(len(p))+ContentBlockSize-1)/ContentBlockSize); err != nil {
			return 0, err
		}
	}
	return d.file.ReadAt(p, off)
}

// Local implements [Localizer].
func (d *Pulled) Local(off, length int64) bool {
	end := (off + length + ContentBlockSize - 1) / ContentBlockSize
	_, next := d.present.Run(off/ContentBlockSize, end)
	return d.left.Load() == 0 || d.present.Has(off/ContentBlockSize) && next >= end
}

// ReadNow implements [NowReader].
func (d *Pulled) ReadNow(p []byte, off int64) bool {
	return d.Local(off, int64(len(p))) && d.file.ReadNow(p, off)
}

// need returns once blocks are there.
func (d *Pulled) need(first, end int64) error {
	for first < end {
		has, next := d.present.Run(first, end)
		if has {
			first = next
			continue
		}
		f, last, mine, err := d.claim(first, min(next, first+maxFetch))
		if err != nil {
			return err
		}
		if mine {
			d.fetch(f, first, last, true)
		}
		select {
		case <-f.done:
		case <-d.ctx.Done():
			return os.ErrClosed
		}
		if f.err != nil {
			return f.err
		}
	}
	return nil
}

// claim returns the flight that fetches block first. If the caller has to fetch, the flight is of
// all blocks up to last, which nobody else fetches.
func (d *Pulled) claim(first, end int64) (f *flight, last int64, mine bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return nil, 0, false, os.ErrClosed
	case d.failed != nil:
		return nil, 0, false, d.failed
	case d.present.Has(first):
		f = &flight{done: make(chan struct{})}
		close(f.done)
		return f, first, false, nil
	case d.flights[first] != nil:
		return d.flights[first], first, false, nil
	}
	f = &flight{done: make(chan struct{})}
	for last = first; last < end && d.flights[last] == nil && !d.present.Has(last); last++ {
		d.flights[last] = f
	}
	d.wg.Add(1)
	return f, last, true, nil
}

// fetch completes a claimed flight. It tries until it succeeds, the device is closed, or no attempt
// can succeed.
func (d *Pulled) fetch(f *flight, first, end int64, urgent bool) {
	defer d.wg.Done()
	p := make([]byte, d.length(first, end))
	wait := firstRetry
	var err error
	for attempt := 1; ; attempt++ {
		if err = d.remote.Fetcher.Fetch(d.ctx, first, p, urgent); err == nil {
			if err = d.store(first, p); !NoRoom(err) {
				break
			}
		}
		if errors.Is(err, ErrReplaced) || d.ctx.Err() != nil {
			break
		}
		if attempt == noticeable {
			d.delay(err)
		}
		select {
		case <-time.After(wait):
		case <-d.ctx.Done():
		}
		wait = min(wait*2, lastRetry)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for b := first; b < end; b++ {
		delete(d.flights, b)
	}
	if err == nil && d.delayed {
		d.delayed = false
		logging.Or(d.remote.Logger).Info("Pulling goes on", "file", d.path)
	}
	if err != nil && d.ctx.Err() == nil {
		d.failed = fmt.Errorf("pull %s: %w", d.path, err)
		f.err = d.failed
	} else if err != nil {
		f.err = os.ErrClosed
	}
	close(f.done)
}

// delay says, once, that attempts fail.
func (d *Pulled) delay(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.delayed {
		d.delayed = true
		logging.Or(d.remote.Logger).Warn("Pulling is held up; trying again until it goes on", "file", d.path, "error", err)
	}
}

// store verifies and keeps blocks.
func (d *Pulled) store(first int64, p []byte) error {
	for b, rest := first, p; len(rest) > 0; b++ {
		n := min(len(rest), ContentBlockSize)
		if HashBlock(rest[:n]) != d.remote.Contents.Blocks[b] {
			return fmt.Errorf("block %d is not what the package says: %w", b, ErrReplaced)
		}
		rest = rest[n:]
	}
	if _, err := d.file.WriteAt(p, first*ContentBlockSize); err != nil {
		return err
	}
	end := first + (int64(len(p))+ContentBlockSize-1)/ContentBlockSize
	for b := first; b < end; b++ {
		if d.present.Set(b) {
			d.left.Add(-1)
		}
	}
	return nil
}

// fillers is how many requests of Fill are under way at once.
const fillers = 4

// Fill fetches all missing blocks, and then gives the file its name, durably. progress, which may
// be nil, is called with the bytes that are there, and with all bytes.
func (d *Pulled) Fill(ctx context.Context, progress func(done, total int64)) error {
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range fillers {
		g.Go(func() error {
			for ctx.Err() == nil {
				first := next.Add(maxFetch) - maxFetch
				if first >= d.present.Len() {
					return nil
				}
				if err := d.fill(ctx, first, min(first+maxFetch, d.present.Len())); err != nil {
					return err
				}
				if progress != nil {
					progress(d.Size()-min(d.Missing(), d.Size()), d.Size())
				}
			}
			return context.Cause(ctx)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return d.publish()
}

// fill fetches what is missing of some blocks.
func (d *Pulled) fill(ctx context.Context, first, end int64) error {
	for first < end {
		has, next := d.present.Run(first, end)
		if has {
			first = next
			continue
		}
		f, last, mine, err := d.claim(first, next)
		if err != nil {
			return err
		}
		if mine {
			go d.fetch(f, first, last, false) // Close waits for it
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if f.err != nil {
			return f.err
		}
	}
	return nil
}

// publish gives the complete file its name.
func (d *Pulled) publish() error {
	if !d.own {
		return nil // the process that pulls it too does so
	}
	if err := d.file.Sync(); err != nil {
		return err
	}
	if err := newfile.Rename(partialPath(d.path), d.path); err != nil {
		return err
	}
	stamp, err := d.file.stamp()
	if err != nil {
		return err
	}
	return errors.Join(d.remote.Contents.keep(contentsPath(d.path), stamp), d.file.Lock(false))
}

// WriteAt implements [Device].
func (d *Pulled) WriteAt([]byte, int64) (int, error) { return 0, ErrReadOnly }

// Sync implements [Device].
func (d *Pulled) Sync() error { return nil }

// NextData implements [Mapper].
func (d *Pulled) NextData(off int64) (start, end int64, err error) {
	blocks := d.remote.Contents.Blocks
	first := off / ContentBlockSize
	for first < int64(len(blocks)) && blocks[first] == (ID{}) {
		first++
	}
	last := first
	for last < int64(len(blocks)) && blocks[last] != (ID{}) {
		last++
	}
	return min(max(off, first*ContentBlockSize), d.Size()), min(last*ContentBlockSize, d.Size()), nil
}

// Abort ends all waiting for content that is elsewhere: it fails from then on.
func (d *Pulled) Abort() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.cancel()
}

// Close implements [Device]. It aborts first.
func (d *Pulled) Close() error {
	d.Abort()
	d.wg.Wait()
	return d.file.Close()
}

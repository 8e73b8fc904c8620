package backup

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/klauspost/compress/zstd"

	"drafter/internal/block"
	"drafter/internal/decompress"
	"drafter/s3"
)

// Backup is the content of a place: devices as they were in one moment. It does not change until
// somebody writes there. Content that a writer has deleted since is gone, and fetching it fails
// with [block.ErrReplaced]. Its methods are safe for concurrent use.
type Backup struct {
	Moment     time.Time
	Generation int64

	store   *Store
	writer  uuid.UUID
	etag    string
	devices []*device
	decoder *zstd.Decoder
}

// Latest returns the backup that is complete, or [s3.ErrNone].
func (s *Store) Latest(ctx context.Context) (*Backup, error) {
	var data []byte
	var etag string
	err := s.try(ctx, attempts, func(ctx context.Context) (err error) {
		data, etag, err = s.get(ctx, manifestName, 0, 0, maxManifest)
		return err
	})
	if notFound(err) {
		return nil, fmt.Errorf("%s: %w", s.place, s3.ErrNone)
	}
	if err != nil {
		return nil, s.explain(err)
	}
	m, err := decodeManifest(data, s.place.MaxSize)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.place, err)
	}
	decoder, err := decompress.Blocks()
	if err != nil {
		return nil, err
	}
	b := &Backup{Moment: m.Moment, Generation: m.Generation, store: s, writer: m.Writer, etag: etag, decoder: decoder}
	for _, md := range m.Devices {
		limit := decompress.Bound(maxIndex(md.Size))
		err := s.try(ctx, attempts, func(ctx context.Context) (err error) {
			data, _, err = s.get(ctx, "index/"+md.Index.String(), 0, 0, limit)
			return err
		})
		if err != nil {
			return nil, errors.Join(s.explain(err), b.Close())
		}
		d, err := decodeIndex(data, md)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%s: device %s: %w", s.place, md.Name, err), b.Close())
		}
		b.devices = append(b.devices, d)
	}
	return b, nil
}

// Names are those of the devices.
func (b *Backup) Names() []string {
	var names []string
	for _, d := range b.devices {
		names = append(names, d.name)
	}
	return names
}

// Remote is a device of the backup.
func (b *Backup) Remote(name string) (block.Remote, bool) {
	for _, d := range b.devices {
		if d.name == name {
			return block.Remote{Contents: d.contents, Fetcher: &fetcher{b, d}}, true
		}
	}
	return block.Remote{}, false
}

// Close frees the backup.
func (b *Backup) Close() error {
	b.decoder.Close()
	b.store.Close()
	return nil
}

// fetcher fetches blocks of a device.
type fetcher struct {
	backup *Backup
	device *device
}

// Fetch implements [block.Fetcher]. It makes one attempt.
func (f *fetcher) Fetch(ctx context.Context, first int64, p []byte, _ bool) error {
	for len(p) > 0 {
		n, err := f.fetchRun(ctx, first, p)
		if err != nil {
			return err
		}
		p = p[min(n*block.ContentBlockSize, int64(len(p))):]
		first += n
	}
	return nil
}

// fetchRun fetches as many blocks as lie beside each other.
func (f *fetcher) fetchRun(ctx context.Context, first int64, p []byte) (int64, error) {
	blocks := (int64(len(p)) + block.ContentBlockSize - 1) / block.ContentBlockSize
	if f.device.contents.Blocks[first] == (block.ID{}) {
		clear(p[:min(block.ContentBlockSize, len(p))])
		return 1, nil
	}
	at := f.device.where[first]
	n, length := int64(1), int64(at.length)
	for n < blocks {
		next := f.device.where[first+n]
		if f.device.contents.Blocks[first+n] == (block.ID{}) || next.pack != at.pack || int64(next.off) != int64(at.off)+length {
			break
		}
		length += int64(next.length)
		n++
	}
	ctx, cancel := context.WithTimeoutCause(ctx, attemptTimeout, fmt.Errorf("not done after %s", attemptTimeout))
	defer cancel()
	data, _, err := f.backup.store.get(ctx, "packs/"+at.pack.String(), int64(at.off), length, 0)
	if notFound(err) {
		return 0, fmt.Errorf("%s: %w", f.backup.store.place, block.ErrReplaced)
	}
	if err != nil {
		return 0, f.backup.store.explain(err)
	}
	for b := first; b < first+n; b++ {
		stored := data[:f.device.where[b].length]
		data = data[len(stored):]
		want := p[:min(block.ContentBlockSize, len(p))]
		p = p[len(want):]
		if len(stored) == len(want) {
			copy(want, stored)
			continue
		}
		got, err := f.backup.decoder.DecodeAll(stored, want[:0:len(want)])
		copy(want, got) // which is where it is already, but for damaged packs
		if err != nil {
			return 0, fmt.Errorf("%s: block %d of device %s: %w", f.backup.store.place, b, f.device.name, err)
		}
		if len(got) != len(want) {
			return 0, fmt.Errorf("%s: block %d of device %s has %d bytes", f.backup.store.place, b, f.device.name, len(got))
		}
	}
	return n, nil
}

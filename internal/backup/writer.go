package backup

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/klauspost/compress/zstd"
	"github.com/minio/minio-go/v7"
	"github.com/zeebo/blake3"
	"golang.org/x/sync/errgroup"

	"drafter/internal/block"
	"drafter/internal/decompress"
	"drafter/s3"
)

const (
	packTarget = 8 << 20                             // bytes of a pack that is full
	maxPack    = packTarget + block.ContentBlockSize // bytes
)

// Writer writes backups to a place; each replaces the one before. One goroutine uses it.
type Writer struct {
	store  *Store
	log    *slog.Logger
	id     uuid.UUID
	latest *Backup // nil: none
	// the writer of the VM's previous owner, until this one has written; nil: none
	before  uuid.UUID
	encoder *zstd.Encoder
	decoder *zstd.Decoder         // of latest, and of those that follow it
	spare   map[block.ID]location // uploaded, but in no manifest yet
	garbage map[string]bool       // objects that nobody needs any more
	swept   bool                  // garbage of earlier writers has been looked for
}

// NewWriter returns a writer that builds on the content of the place. If the storage lacks an
// ability, it fails before anything is written; see [s3.ErrUnfit]. Close it.
// log, which is not nil, hears what cannot be deleted.
func (s *Store) NewWriter(ctx context.Context, log *slog.Logger) (*Writer, error) {
	if err := s.probe(ctx); err != nil {
		return nil, s.explain(err)
	}
	latest, err := s.Latest(ctx)
	if err != nil && !errors.Is(err, s3.ErrNone) {
		return nil, err
	}
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(block.ContentBlockSize))
	if err != nil {
		return nil, fmt.Errorf("make zstd encoder: %w", err)
	}
	w := &Writer{store: s, log: log, id: uuid.New(), latest: latest, encoder: encoder, spare: map[block.ID]location{}, garbage: map[string]bool{}}
	if latest != nil {
		w.decoder = latest.decoder
	} else if w.decoder, err = decompress.Blocks(); err != nil {
		return nil, errors.Join(err, encoder.Close())
	}
	return w, nil
}

// Inherit reads the latest backup again, as that of the owner that the VM has come from, who may
// have written since this writer was made. A write that this owner still has under way does not
// supersede this writer. The next Write needs whole devices, because changes since an older backup
// are of no use.
func (w *Writer) Inherit(ctx context.Context) error {
	latest, err := w.store.Latest(ctx)
	if errors.Is(err, s3.ErrNone) {
		return nil
	}
	if err != nil {
		return err
	}
	w.decoder.Close()
	w.latest, w.decoder, w.before = latest, latest.decoder, latest.writer
	clear(w.spare) // that owner may have taken it for garbage
	return nil
}

// Hurry bounds how long each request may take from now on, all its attempts together.
func (w *Writer) Hurry(patience time.Duration) { w.store.patience = patience }

// Moment is that of the latest backup; zero when there is none.
func (w *Writer) Moment() time.Time {
	if w.latest == nil {
		return time.Time{}
	}
	return w.latest.Moment
}

// Content is that of a device in the latest backup.
func (w *Writer) Content(name string) (id block.ID, ok bool) {
	if w.latest == nil {
		return id, false
	}
	for _, d := range w.latest.devices {
		if d.name == name {
			return d.contents.Device, true
		}
	}
	return id, false
}

// Remote is a device of the latest backup, until the next Write.
func (w *Writer) Remote(name string) (block.Remote, bool) {
	if w.latest == nil {
		return block.Remote{}, false
	}
	return w.latest.Remote(name)
}

// Close frees the writer.
func (w *Writer) Close() error {
	w.decoder.Close()
	if w.latest != nil {
		return errors.Join(w.encoder.Close(), w.latest.Close())
	}
	return w.encoder.Close()
}

// Device is a device to write. It does not change meanwhile.
type Device struct {
	Name   string
	Device block.Device
	// blocks of [block.ContentBlockSize] that may differ from the latest backup's; nil: all
	Changed *block.Bitmap
}

// Written says what a Write did.
type Written struct {
	Changed  int64 // bytes that differ from the backup before
	Uploaded int64 // bytes of packs that were written
}

// Write makes devices the latest backup, as of moment. It is complete once Write returns nil. On an
// error the backup before is still the latest, unless the error says that this is not known. Blocks
// that are there already, at any offset, are not uploaded again, nor are those that a failed Write
// has uploaded.
func (w *Writer) Write(ctx context.Context, moment time.Time, devices []Device) (Written, error) {
	done, err := w.write(ctx, moment, devices)
	if !errors.Is(err, errInherited) {
		return done, err
	}
	if err := w.Inherit(ctx); err != nil {
		return done, err
	}
	whole := slices.Clone(devices) // what has changed is not known any more
	for i := range whole {
		whole[i].Changed = nil
	}
	return w.write(ctx, moment, whole)
}

// errInherited says that the owner before has written once more.
var errInherited = errors.New("the last backup of the VM's source has come in just now")

func (w *Writer) write(ctx context.Context, moment time.Time, devices []Device) (Written, error) {
	var done Written
	known := maps.Clone(w.spare)
	if w.latest != nil {
		for _, d := range w.latest.devices {
			for i, id := range d.contents.Blocks {
				known[id] = d.where[i]
			}
		}
	}
	next := &Backup{store: w.store, Moment: moment, Generation: 1, decoder: w.decoder}
	if w.latest != nil {
		next.Generation = w.latest.Generation + 1
	}
	up := newUploader(ctx, w, known)
	for _, d := range devices {
		nd, changed, err := w.prepare(up, d)
		done.Changed += changed
		if err != nil {
			return done, errors.Join(fmt.Errorf("device %s: %w", d.Name, err), up.end())
		}
		next.devices = append(next.devices, nd)
	}
	err := up.finish()
	done.Uploaded = up.uploaded
	if err != nil {
		return done, w.store.explain(err)
	}
	for _, d := range next.devices {
		if err := w.writeIndex(ctx, d); err != nil {
			return done, w.store.explain(err)
		}
	}
	if err := w.publish(ctx, next); err != nil {
		return done, err
	}
	return done, nil
}

// prepare uploads the new blocks of a device, and returns its index.
func (w *Writer) prepare(up *uploader, d Device) (*device, int64, error) {
	size := d.Device.Size()
	var old *device
	if w.latest != nil {
		for _, l := range w.latest.devices {
			if l.name == d.Name && l.contents.Size == size {
				old = l
			}
		}
	}
	blocks := (size + block.ContentBlockSize - 1) / block.ContentBlockSize
	changed := d.Changed
	ids, where := make([]block.ID, blocks), make([]location, blocks)
	if old != nil {
		copy(ids, old.contents.Blocks)
		copy(where, old.where)
	}
	if old == nil || changed == nil {
		changed = block.NewBitmap(blocks)
		changed.SetRange(0, blocks)
	}
	differ := int64(0)
	buf := make([]byte, 16*block.ContentBlockSize)
	for first := changed.Next(0); first < blocks; first = changed.Next(first) {
		_, end := changed.Run(first, min(first+16, blocks))
		p := buf[:min(end*block.ContentBlockSize, size)-first*block.ContentBlockSize]
		if _, err := d.Device.ReadAt(p, first*block.ContentBlockSize); err != nil {
			return nil, differ, err
		}
		for ; first < end; first++ {
			one := p[:min(block.ContentBlockSize, len(p))]
			p = p[len(one):]
			id := block.HashBlock(one)
			if old != nil && id == ids[first] {
				continue
			}
			differ += int64(len(one))
			ids[first], where[first] = id, location{}
			if id == (block.ID{}) {
				continue
			}
			at, err := up.add(id, one)
			if err != nil {
				return nil, differ, err
			}
			where[first] = at
		}
	}
	nd := &device{name: d.Name, contents: block.NewContents(size, ids), where: where}
	if old != nil && differ == 0 {
		nd.index, nd.sum = old.index, old.sum
	}
	return nd, differ, nil
}

func (w *Writer) writeIndex(ctx context.Context, d *device) error {
	if d.sum != "" {
		return nil // it is there
	}
	data := encodeIndex(d, w.encoder)
	d.index, d.sum = uuid.New(), fmt.Sprintf("%x", blake3.Sum256(data))
	name := "index/" + d.index.String()
	w.garbage[name] = true // unless it gets into a manifest
	return w.store.try(ctx, attempts, func(ctx context.Context) error {
		_, err := w.store.put(ctx, name, data, minio.PutObjectOptions{ContentType: "application/octet-stream"})
		return err
	})
}

// publish writes the manifest, if the one before is still the latest, and collects the garbage.
func (w *Writer) publish(ctx context.Context, next *Backup) error {
	m := manifest{Format: manifestFormat, Version: 1, Generation: next.Generation, Writer: w.id, Moment: next.Moment.UTC()}
	for _, d := range next.devices {
		m.Devices = append(m.Devices, manifestDevice{d.name, d.contents.Size, d.contents.Device.String(), d.index, d.sum})
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("encode manifest: %w", err)
	}
	options := minio.PutObjectOptions{ContentType: "application/json"}
	if w.latest == nil {
		options.SetMatchETagExcept("*")
	} else {
		options.SetMatchETag(w.latest.etag)
	}
	err = w.store.try(ctx, attempts, func(ctx context.Context) (err error) {
		next.etag, err = w.store.put(ctx, manifestName, data, options)
		if !conflict(err) {
			return err
		}
		found, etag, err := w.store.get(ctx, manifestName, 0, 0, maxManifest)
		if err != nil {
			return err
		}
		if bytes.Equal(found, data) { // only the answer was lost
			next.etag = etag
			return nil
		}
		other, err := decodeManifest(found, w.store.place.MaxSize)
		switch {
		case err != nil:
		case other.Writer == w.id: // a Write that failed has come through in the end
			options.SetMatchETag(etag)
			return errors.New("an earlier manifest has arrived late")
		case other.Writer == w.before && w.before != uuid.Nil:
			return errInherited
		}
		return s3.ErrSuperseded
	})
	if errors.Is(err, errInherited) {
		return err
	}
	if errors.Is(err, s3.ErrSuperseded) {
		return fmt.Errorf("%s: %w", w.store.place, err)
	}
	if permanent(err) {
		return w.store.explain(err)
	}
	if err != nil {
		return fmt.Errorf("%w; it is not known whether the manifest was written", w.store.explain(err))
	}
	w.advance(ctx, next)
	return nil
}

// advance makes next the latest backup, and notes the objects that nobody needs any more.
func (w *Writer) advance(ctx context.Context, next *Backup) {
	if w.latest != nil {
		for _, d := range w.latest.devices {
			w.garbage["index/"+d.index.String()] = true
			for _, at := range d.where {
				w.garbage["packs/"+at.pack.String()] = true
			}
		}
	}
	for _, at := range w.spare {
		w.garbage["packs/"+at.pack.String()] = true
	}
	if !w.swept {
		w.swept = w.sweep(ctx)
	}
	for _, d := range next.devices {
		delete(w.garbage, "index/"+d.index.String())
		for _, at := range d.where {
			delete(w.garbage, "packs/"+at.pack.String())
		}
	}
	delete(w.garbage, "packs/"+uuid.Nil.String())
	w.latest, w.before = next, uuid.Nil
	clear(w.spare)
}

// maxGarbage bounds how many objects are noted as left by earlier writers.
const maxGarbage = 1 << 20

// sweep finds the objects that earlier writers have left. The place is this writer's since it wrote
// its first manifest.
func (w *Writer) sweep(ctx context.Context) bool {
	for _, kind := range []string{"packs/", "index/", probes} {
		for object := range w.store.client.ListObjects(ctx, w.store.place.Bucket, minio.ListObjectsOptions{Prefix: w.store.key(kind), Recursive: true}) {
			if object.Err != nil {
				w.log.Debug("List objects", "error", object.Err)
				return false
			}
			if len(w.garbage) >= maxGarbage {
				return true
			}
			w.garbage[kind+strings.TrimPrefix(object.Key, w.store.key(kind))] = true
		}
	}
	return true
}

// Collect deletes the objects that no complete backup needs. If that fails, the next call does it.
func (w *Writer) Collect(ctx context.Context) {
	for name := range maps.Clone(w.garbage) {
		if err := w.store.client.RemoveObject(ctx, w.store.place.Bucket, w.store.key(name), minio.RemoveObjectOptions{}); err != nil {
			w.log.Debug("Delete object", "object", name, "error", err)
			return
		}
		delete(w.garbage, name)
	}
}

// uploader packs blocks and uploads full packs meanwhile.
type uploader struct {
	w        *Writer
	known    map[block.ID]location
	g        *errgroup.Group
	ctx      context.Context
	pack     uuid.UUID
	data     []byte
	added    map[block.ID]location // of the pack that is being filled
	uploaded int64

	mu       sync.Mutex
	finished map[block.ID]location // of packs that are there
}

func newUploader(ctx context.Context, w *Writer, known map[block.ID]location) *uploader {
	u := &uploader{w: w, known: known, pack: uuid.New(), added: map[block.ID]location{}, finished: map[block.ID]location{}}
	u.g, u.ctx = errgroup.WithContext(ctx)
	u.g.SetLimit(w.store.place.Concurrency)
	return u
}

// add returns where a block is, or will be.
func (u *uploader) add(id block.ID, p []byte) (location, error) {
	if at, ok := u.known[id]; ok {
		return at, nil
	}
	if u.ctx.Err() != nil {
		return location{}, context.Cause(u.ctx)
	}
	if u.data == nil {
		u.data = make([]byte, 0, maxPack)
	}
	off := len(u.data)
	u.data = u.w.encoder.EncodeAll(p, u.data)
	if len(u.data)-off >= len(p) {
		u.data = append(u.data[:off], p...)
	}
	at := location{u.pack, uint32(off), uint32(len(u.data) - off)}
	u.known[id], u.added[id] = at, at
	if len(u.data) >= packTarget {
		u.flush()
	}
	return at, nil
}

// flush uploads the pack.
func (u *uploader) flush() {
	pack, data, added := u.pack, u.data, u.added
	if len(data) == 0 {
		return
	}
	u.pack, u.data, u.added = uuid.New(), nil, map[block.ID]location{}
	u.uploaded += int64(len(data))
	u.g.Go(func() error {
		err := u.w.store.try(u.ctx, attempts, func(ctx context.Context) error {
			_, err := u.w.store.put(ctx, "packs/"+pack.String(), data, minio.PutObjectOptions{ContentType: "application/octet-stream"})
			return err
		})
		if err == nil {
			u.mu.Lock()
			defer u.mu.Unlock()
			maps.Copy(u.finished, added)
		}
		return err
	})
}

// finish uploads the rest, and waits.
func (u *uploader) finish() error {
	u.flush()
	return u.end()
}

// end waits, and notes which packs are there, for a Write to come if this one fails.
func (u *uploader) end() error {
	err := u.g.Wait()
	maps.Copy(u.w.spare, u.finished)
	return err
}

package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/klauspost/compress/zstd"

	"drafter/internal/block"
	"drafter/internal/decompress"
	"drafter/internal/ociclient"
	"drafter/signature"
)

// Package is a package in a registry. It is identified by its digest, so its content does not
// change. Its methods are safe for concurrent use.
type Package struct {
	Digest v1.Hash

	size int64 // bytes of its layers

	signature []byte
	repo      name.Repository
	client    *http.Client
	devices   []*device
	decoder   *zstd.Decoder
}

type device struct {
	name     string
	layer    v1.Hash
	contents *block.Contents
	frames   []frame
}

// ErrOther says that a reference leads to something that is no package, such as an image.
var ErrOther = errors.New("it is no package that 'drafter push' made")

// Resolve returns the digest reference that ref stands for at the moment.
// For log, see [ociclient.Transport].
func Resolve(ctx context.Context, ref string, plainHTTP bool, log *slog.Logger) (string, error) {
	r, err := ociclient.Parse(ref, plainHTTP)
	if err != nil {
		return "", err
	}
	if _, ok := r.(name.Digest); ok {
		return r.String(), nil
	}
	d, err := remote.Head(r, ociclient.Options(ctx, r.Context().Registry, plainHTTP, log)...)
	if err != nil {
		return "", fmt.Errorf("open %s: %w", r, oneLine(err))
	}
	return r.Context().Digest(d.Digest.String()).String(), nil
}

// Open reads what the artifact ref holds. Its devices may have at most maxSize bytes together; see
// [block.CheckSizes] for 0. Credentials are those of docker. Close it.
// For log, see [ociclient.Transport].
func Open(ctx context.Context, ref string, plainHTTP bool, maxSize int64, log *slog.Logger) (*Package, error) {
	r, err := ociclient.Parse(ref, plainHTTP)
	if err != nil {
		return nil, err
	}
	p, err := open(ctx, r, plainHTTP, maxSize, log)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", r, oneLine(err))
	}
	return p, nil
}

func open(ctx context.Context, r name.Reference, plainHTTP bool, maxSize int64, log *slog.Logger) (*Package, error) {
	options := ociclient.Options(ctx, r.Context().Registry, plainHTTP, log)
	d, err := remote.Get(r, options...)
	if err != nil {
		return nil, err
	}
	p := &Package{Digest: d.Digest, repo: r.Context()}
	if !d.MediaType.IsImage() {
		return nil, fmt.Errorf("%w, but of type %s", ErrOther, d.MediaType)
	}
	img, err := d.Image()
	if err != nil {
		return nil, err
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	if m.Config.MediaType != ConfigType {
		return nil, fmt.Errorf("%w: its config is of type %s", ErrOther, m.Config.MediaType)
	}
	blobOf := func(h v1.Hash, limit int64) ([]byte, error) {
		l, err := remote.Layer(p.repo.Digest(h.String()), options...)
		if err != nil {
			return nil, err
		}
		body, err := l.Compressed() // which verifies its digest
		if err != nil {
			return nil, err
		}
		defer body.Close()
		b, err := io.ReadAll(io.LimitReader(body, limit+1))
		if err == nil && int64(len(b)) > limit {
			err = fmt.Errorf("blob %s has more than %d bytes", h, limit)
		}
		return b, err
	}
	b, err := blobOf(m.Config.Digest, maxConfig)
	if err != nil {
		return nil, err
	}
	c, err := decodeConfig(b, maxSize)
	if err != nil {
		return nil, err
	}
	if p.decoder, err = decompress.Blocks(); err != nil {
		return nil, err
	}
	for _, cd := range c.Devices {
		b, err := blobOf(cd.Index, decompress.Bound(indexSize(cd.Size)))
		if err != nil {
			p.decoder.Close()
			return nil, err
		}
		d := &device{name: cd.Name, layer: cd.Layer}
		if d.contents, d.frames, err = decodeIndex(b, cd); err != nil {
			p.decoder.Close()
			return nil, fmt.Errorf("device %s: %w", cd.Name, err)
		}
		p.devices = append(p.devices, d)
	}
	for _, l := range m.Layers {
		p.size += l.Size
		if l.MediaType == signature.MediaType {
			if p.signature, err = blobOf(l.Digest, signature.MaxSize); err != nil {
				p.decoder.Close()
				return nil, fmt.Errorf("signature: %w", err)
			}
		}
	}
	if err := p.connect(ctx, plainHTTP, log); err != nil {
		p.decoder.Close()
		return nil, err
	}
	return p, nil
}

// connect makes the client that reads parts of layers.
func (p *Package) connect(ctx context.Context, plainHTTP bool, log *slog.Logger) error {
	auth, err := authn.Resolve(ctx, authn.DefaultKeychain, p.repo)
	if err != nil {
		return err
	}
	base := remote.DefaultTransport.(*http.Transport).Clone()
	base.ResponseHeaderTimeout = 20 * time.Second
	base.MaxIdleConnsPerHost = 16
	t, err := transport.NewWithContext(ctx, p.repo.Registry, auth, ociclient.Transport(base, p.repo.Registry, plainHTTP, log), []string{p.repo.Scope(transport.PullScope)})
	if err != nil {
		return err
	}
	p.client = &http.Client{Transport: t}
	return nil
}

// Names are those of the devices.
func (p *Package) Names() []string {
	var names []string
	for _, d := range p.devices {
		names = append(names, d.name)
	}
	return names
}

// Size is how many bytes the registry has of it.
func (p *Package) Size() int64 { return p.size }

// Signature is the package's; nil if it has none.
func (p *Package) Signature() []byte { return p.signature }

// Remote is a device of the package.
func (p *Package) Remote(name string) (block.Remote, bool) {
	for _, d := range p.devices {
		if d.name == name {
			return block.Remote{Contents: d.contents, Fetcher: &fetcher{p, d}}, true
		}
	}
	return block.Remote{}, false
}

// Close frees the package.
func (p *Package) Close() error {
	p.decoder.Close()
	p.client.CloseIdleConnections()
	return nil
}

// fetcher fetches blocks of a device.
type fetcher struct {
	p *Package
	d *device
}

// fetchTimeout bounds one request, of 1 MiB at most.
const fetchTimeout = time.Minute

// Fetch implements [block.Fetcher]: with one request for all from the first block that is not zeros
// up to the last.
func (f *fetcher) Fetch(ctx context.Context, first int64, p []byte, _ bool) error {
	end := first + (int64(len(p))+block.ContentBlockSize-1)/block.ContentBlockSize
	var from, to int64 = -1, 0
	for b := first; b < end; b++ {
		if fr := f.d.frames[b]; f.d.contents.Blocks[b] != (block.ID{}) {
			if from < 0 {
				from = fr.off
			}
			if fr.off < from || fr.off < to {
				return fmt.Errorf("the index of device %s has frame %d out of order: %w", f.d.name, b, block.ErrReplaced)
			}
			to = fr.off + int64(fr.length)
		}
	}
	if from < 0 {
		clear(p)
		return nil
	}
	if to-from > int64(len(p))+(end-first)*maxFrame {
		return fmt.Errorf("the index of device %s has frames that are far apart: %w", f.d.name, block.ErrReplaced)
	}
	data, err := f.read(ctx, from, to)
	if err != nil {
		return fmt.Errorf("layer %s of %s: %w", f.d.layer, f.p.repo, err)
	}
	for b := first; b < end; b++ {
		want := p[:min(block.ContentBlockSize, len(p))]
		p = p[len(want):]
		if f.d.contents.Blocks[b] == (block.ID{}) {
			clear(want)
			continue
		}
		fr := f.d.frames[b]
		got, err := f.p.decoder.DecodeAll(data[fr.off-from:fr.off-from+int64(fr.length)], want[:0:len(want)])
		if err != nil || len(got) != len(want) {
			return fmt.Errorf("layer %s of %s: frame of block %d: %w", f.d.layer, f.p.repo, b, errors.Join(err, block.ErrReplaced))
		}
		copy(want, got) // which is where it is already, but for damaged frames
	}
	return nil
}

// read reads a part of the layer.
func (f *fetcher) read(ctx context.Context, from, to int64) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, fetchTimeout, fmt.Errorf("not done after %s", fetchTimeout))
	defer cancel()
	scheme := f.p.repo.Scheme()
	url := fmt.Sprintf("%s://%s/v2/%s/blobs/%s", scheme, f.p.repo.RegistryStr(), f.p.repo.RepositoryStr(), f.d.layer)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, to-1))
	resp, err := f.p.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusPartialContent:
	case http.StatusOK: // it does not know ranges, and sends all
		if _, err := io.CopyN(io.Discard, resp.Body, from); err != nil {
			return nil, err
		}
	case http.StatusNotFound, http.StatusGone, http.StatusRequestedRangeNotSatisfiable:
		return nil, fmt.Errorf("%s: %w", resp.Status, block.ErrReplaced)
	default:
		return nil, fmt.Errorf("the registry answers %s", resp.Status)
	}
	data := make([]byte, to-from)
	_, err = io.ReadFull(resp.Body, data)
	return data, err
}

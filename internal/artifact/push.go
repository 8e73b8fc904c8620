package artifact

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"drafter/internal/block"
	"drafter/internal/ociclient"
	"drafter/internal/scratch"
	"drafter/signature"
	"drafter/vmm"
)

// Device is a device to push. It must not change meanwhile.
type Device struct {
	Name string
	File string
}

// Progress says how far a step is, in bytes. It may be nil.
type Progress func(step string, done, total int64)

// Push stores devices as the artifact ref, and returns its digest. It replaces an older artifact at
// once when all is there. Credentials are those of docker. Meanwhile the compressed devices are in
// temporary files.
// For log, see [ociclient.Transport].
func Push(ctx context.Context, ref string, plainHTTP bool, devices []Device, progress Progress, log *slog.Logger) (_ v1.Hash, err error) {
	if progress == nil {
		progress = func(string, int64, int64) {}
	}
	r, err := ociclient.Parse(ref, plainHTTP)
	if err != nil {
		return v1.Hash{}, err
	}
	guarded := ociclient.Transport(remote.DefaultTransport, r.Context().Registry, plainHTTP, log)
	if err := remote.CheckPushPermission(r, authn.DefaultKeychain, guarded); err != nil {
		return v1.Hash{}, fmt.Errorf("push %s: %w; see to the name, and to 'docker login %s'", r, oneLine(err), r.Context().RegistryStr())
	}
	work, err := scratch.New(os.TempDir(), "drafter-push-")
	if err != nil {
		return v1.Hash{}, err
	}
	defer func() { err = errors.Join(err, work.Close()) }()
	img, err := build(ctx, work.Path(""), devices, progress)
	if err != nil {
		return v1.Hash{}, err
	}
	image, err := partial.CompressedToImage(img)
	if err != nil {
		return v1.Hash{}, fmt.Errorf("describe artifact: %w", err)
	}
	updates := make(chan v1.Update, 100)
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		for u := range updates {
			if u.Error == nil {
				progress("Uploading", u.Complete, u.Total)
			}
		}
	}()
	err = remote.Write(r, image, append(ociclient.Options(ctx, r.Context().Registry, plainHTTP, log), remote.WithProgress(updates))...)
	<-shown // Write closes updates
	if err != nil {
		return v1.Hash{}, fmt.Errorf("push %s: %w", r, oneLine(err))
	}
	return image.Digest()
}

// oneLine shortens the errors of registries, which contain the page that a proxy may have sent.
func oneLine(err error) error {
	return &lineError{err}
}

type lineError struct{ err error }

func (e *lineError) Error() string { return strings.Join(strings.Fields(e.err.Error()), " ") }
func (e *lineError) Unwrap() error { return e.err }

// image is an unfinished artifact. It implements [partial.CompressedImageCore].
type image struct {
	manifest, config []byte
	layers           map[v1.Hash]*layer
}

func (i *image) RawConfigFile() ([]byte, error)      { return i.config, nil }
func (i *image) RawManifest() ([]byte, error)        { return i.manifest, nil }
func (i *image) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }
func (i *image) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	l, ok := i.layers[h]
	if !ok {
		return nil, fmt.Errorf("there is no layer %s", h)
	}
	return l, nil
}

// layer is a blob in a file. It implements [partial.CompressedLayer].
type layer struct {
	file       string
	descriptor v1.Descriptor
}

func (l *layer) Digest() (v1.Hash, error)            { return l.descriptor.Digest, nil }
func (l *layer) Size() (int64, error)                { return l.descriptor.Size, nil }
func (l *layer) MediaType() (types.MediaType, error) { return l.descriptor.MediaType, nil }
func (l *layer) Compressed() (io.ReadCloser, error)  { return os.Open(l.file) }

// build compresses the devices into files of dir.
func build(ctx context.Context, dir string, devices []Device, progress Progress) (*image, error) {
	// The manifest is written by hand: the library's has no artifactType.
	type manifest struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     types.MediaType `json:"mediaType"`
		ArtifactType  string          `json:"artifactType"`
		Config        v1.Descriptor   `json:"config"`
		Layers        []v1.Descriptor `json:"layers"`
	}
	img := &image{layers: map[v1.Hash]*layer{}}
	m := manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: PackageType}
	c := config{Version: 1}
	for _, d := range devices {
		data, index, contents, err := buildDevice(ctx, dir, d, progress)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Name, err)
		}
		for _, l := range []*layer{data, index} {
			img.layers[l.descriptor.Digest] = l
			m.Layers = append(m.Layers, l.descriptor)
		}
		c.Devices = append(c.Devices, configDevice{d.Name, contents.Size, contents.Device.String(), data.descriptor.Digest, index.descriptor.Digest})
	}
	signed, err := buildSignature(dir, devices)
	if err != nil {
		return nil, err
	}
	if signed != nil {
		img.layers[signed.descriptor.Digest] = signed
		m.Layers = append(m.Layers, signed.descriptor)
	}
	if img.config, err = json.MarshalIndent(c, "", "  "); err != nil {
		return nil, fmt.Errorf("encode config: %w", err)
	}
	sum := sha256.Sum256(img.config)
	m.Config = v1.Descriptor{MediaType: ConfigType, Size: int64(len(img.config)), Digest: v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", sum)}}
	if img.manifest, err = json.MarshalIndent(m, "", "  "); err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	return img, nil
}

// buildSignature writes the layer of the package's signature; nil if it has none.
func buildSignature(dir string, devices []Device) (*layer, error) {
	i := slices.IndexFunc(devices, func(d Device) bool { return d.Name == vmm.Config })
	if i < 0 {
		return nil, nil
	}
	b, err := signature.Beside(devices[i].File)
	if err != nil || b == nil {
		return nil, err
	}
	out, err := newBlob(dir, signature.MediaType, signature.File)
	if err != nil {
		return nil, err
	}
	if _, err := out.Write(b); err != nil {
		return nil, errors.Join(err, out.close())
	}
	l, err := out.layer("", signature.File)
	if err == nil {
		delete(l.descriptor.Annotations, deviceAnnotation)
	}
	return l, err
}

// batch is how many blocks are compressed at once.
const batch = 64

// buildDevice writes the two layers of a device. The same device always gives the same layers.
func buildDevice(ctx context.Context, dir string, d Device, progress Progress) (data, index *layer, contents *block.Contents, err error) {
	f, err := block.OpenFile(d.File, true)
	if err != nil {
		return nil, nil, nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Lock(false); err != nil {
		return nil, nil, nil, fmt.Errorf("%s is %w; push a package that no instance writes to", d.File, err)
	}
	if contents, err = block.FileContents(ctx, d.File); err != nil {
		return nil, nil, nil, err
	}
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(runtime.GOMAXPROCS(0)), zstd.WithWindowSize(block.ContentBlockSize))
	if err != nil {
		return nil, nil, nil, fmt.Errorf("make zstd encoder: %w", err)
	}
	defer encoder.Close()
	out, err := newBlob(dir, DeviceType, d.Name)
	if err != nil {
		return nil, nil, nil, err
	}
	frames := make([]frame, len(contents.Blocks))
	for first := int64(0); first < int64(len(frames)); first += batch {
		if ctx.Err() != nil {
			return nil, nil, nil, errors.Join(context.Cause(ctx), out.close())
		}
		end := min(first+batch, int64(len(frames)))
		if err := compress(out, f, contents, frames, encoder, first, end); err != nil {
			return nil, nil, nil, errors.Join(err, out.close())
		}
		progress("Compressing "+d.Name, min(end*block.ContentBlockSize, f.Size()), f.Size())
	}
	if data, err = out.layer(d.Name, d.Name+".zst"); err != nil {
		return nil, nil, nil, err
	}
	if out, err = newBlob(dir, IndexType, d.Name); err != nil {
		return nil, nil, nil, err
	}
	if _, err := out.Write(encodeIndex(contents, frames, encoder)); err != nil {
		return nil, nil, nil, errors.Join(err, out.close())
	}
	index, err = out.layer(d.Name, d.Name+".index")
	return data, index, contents, err
}

// compress appends some blocks to a layer. Zeros that follow each other become one frame.
func compress(out *blob, f *block.File, contents *block.Contents, frames []frame, encoder *zstd.Encoder, first, end int64) error {
	compressed := make([][]byte, end-first)
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	length := func(b int64) int64 {
		return min((b+1)*block.ContentBlockSize, contents.Size) - b*block.ContentBlockSize
	}
	for b := first; b < end; b++ {
		if contents.Blocks[b] == (block.ID{}) {
			continue
		}
		g.Go(func() error {
			p := make([]byte, length(b))
			if _, err := f.ReadAt(p, b*block.ContentBlockSize); err != nil {
				return err
			}
			if block.HashBlock(p) != contents.Blocks[b] {
				return errors.New("it changes while it is being pushed")
			}
			compressed[b-first] = encoder.EncodeAll(p, nil)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	zeros := int64(0)
	flush := func() error {
		if zeros == 0 {
			return nil
		}
		_, err := out.Write(encoder.EncodeAll(make([]byte, zeros), nil))
		zeros = 0
		return err
	}
	for b := first; b < end; b++ {
		p := compressed[b-first]
		if p == nil {
			zeros += length(b)
			continue
		}
		if err := flush(); err != nil {
			return err
		}
		frames[b] = frame{out.size, uint32(len(p))}
		if _, err := out.Write(p); err != nil {
			return err
		}
	}
	return flush()
}

// blob is a layer that is being written.
type blob struct {
	f    *os.File
	w    *bufio.Writer
	sum  io.Writer
	hash interface{ Sum([]byte) []byte }
	size int64
	kind string
}

func newBlob(dir, kind, device string) (*blob, error) {
	f, err := os.CreateTemp(dir, device+"-*")
	if err != nil {
		return nil, err
	}
	hash := sha256.New()
	return &blob{f: f, w: bufio.NewWriterSize(f, 1<<20), sum: hash, hash: hash, kind: kind}, nil
}

func (b *blob) Write(p []byte) (int, error) {
	_, _ = b.sum.Write(p) // a hash's writer cannot fail
	b.size += int64(len(p))
	return b.w.Write(p)
}

func (b *blob) close() error { return b.f.Close() }

func (b *blob) layer(device, title string) (*layer, error) {
	if err := errors.Join(b.w.Flush(), b.f.Close()); err != nil {
		return nil, err
	}
	return &layer{b.f.Name(), v1.Descriptor{
		MediaType: types.MediaType(b.kind), Size: b.size, Digest: v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", b.hash.Sum(nil))},
		Annotations: map[string]string{deviceAnnotation: device, titleAnnotation: title},
	}}, nil
}

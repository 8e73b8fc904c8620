package blueprint

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"drafter/internal/decompress"
)

// Images in files. Their blobs are in a directory or a tar archive, which are the same to all that
// is here: an [fs.FS].
//
//	OCI layout       index.json, blobs/sha256/HEX      (image-layout.md of the OCI image specification)
//	docker archive   manifest.json, which names files  (what "docker save" writes, with or without a layout beside it)
//	skopeo's dir     manifest.json, HEX
const (
	layoutIndex    = "index.json"
	dockerManifest = "manifest.json"
)

// Bounds for reading strangers' images before anything is unpacked.
const (
	maxManifest = 4 << 20 // bytes of a manifest or an index, as in Docker
	// files of an archive; an image has one for each layer, and few others
	maxArchiveEntries = 1 << 16
)

// listStored lists the images in a directory or an archive. If there are both a docker archive and
// a layout, preferred says which counts.
func listStored(ctx context.Context, path, preferred string, most int64) ([]found, error) {
	files, err := openFiles(ctx, path, most)
	if err != nil {
		return nil, err
	}
	kinds := map[string]func(fs.FS) ([]found, error){layoutIndex: listLayout, dockerManifest: listDocker}
	for _, kind := range []string{preferred, layoutIndex, dockerManifest} {
		if _, err := fs.Stat(files, kind); err == nil {
			return kinds[kind](files)
		}
	}
	return nil, fmt.Errorf("there is neither an %s (of an OCI layout) nor a %s (of 'docker save') in it", layoutIndex, dockerManifest)
}

func listLayout(files fs.FS) ([]found, error) {
	raw, err := readBounded(files, layoutIndex, maxManifest)
	if err != nil {
		return nil, err
	}
	return listIndex(&storedIndex{blobs{files, func(h v1.Hash, _ bool) string { return path.Join("blobs", h.Algorithm, h.Hex) }}, raw}, true)
}

// listDir lists what skopeo's dir: has, which is one image or index.
func listDir(dir string) ([]found, error) {
	b := blobs{os.DirFS(dir), func(h v1.Hash, manifest bool) string {
		if manifest {
			return h.Hex + "." + dockerManifest
		}
		return h.Hex
	}}
	raw, err := readBounded(b, dockerManifest, maxManifest)
	if err != nil {
		return nil, err
	}
	var kind struct{ Manifests []any }
	if json.Unmarshal(raw, &kind) == nil && kind.Manifests != nil {
		return listIndex(&storedIndex{b, raw}, false)
	}
	return []found{{open: func() (v1.Image, error) { return b.image(raw) }}}, nil
}

// blobs are files named by their content's digest. Those that are read as a whole are verified.
type blobs struct {
	fs.FS
	path func(h v1.Hash, manifest bool) string
}

func (b blobs) read(h v1.Hash, manifest bool, most int64) ([]byte, error) {
	raw, err := readBounded(b, b.path(h, manifest), most)
	if err != nil {
		return nil, err
	}
	if got, _, err := v1.SHA256(bytes.NewReader(raw)); err != nil || got != h {
		return nil, fmt.Errorf("blob %s is damaged: its content is %s", h, got)
	}
	return raw, nil
}

func (b blobs) image(raw []byte) (v1.Image, error) {
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	config, err := b.read(m.Config.Digest, false, maxImageConfig)
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	i := &storedImage{files: b, manifest: raw, config: config, layers: map[v1.Hash]string{}}
	for _, l := range m.Layers {
		i.layers[l.Digest] = b.path(l.Digest, false)
	}
	return partial.CompressedToImage(i)
}

// storedIndex is an index of blobs.
type storedIndex struct {
	blobs
	raw []byte
}

func (i *storedIndex) MediaType() (types.MediaType, error) { return types.OCIImageIndex, nil }
func (i *storedIndex) Digest() (v1.Hash, error)            { return partial.Digest(i) }
func (i *storedIndex) Size() (int64, error)                { return partial.Size(i) }
func (i *storedIndex) RawManifest() ([]byte, error)        { return i.raw, nil }

func (i *storedIndex) IndexManifest() (*v1.IndexManifest, error) {
	return v1.ParseIndexManifest(bytes.NewReader(i.raw))
}

func (i *storedIndex) Image(h v1.Hash) (v1.Image, error) {
	raw, err := i.read(h, true, maxManifest)
	if err != nil {
		return nil, err
	}
	return i.image(raw)
}

func (i *storedIndex) ImageIndex(h v1.Hash) (v1.ImageIndex, error) {
	raw, err := i.read(h, true, maxManifest)
	return &storedIndex{i.blobs, raw}, err
}

// storedImage is what [partial.CompressedToImage] makes an image of.
type storedImage struct {
	files            fs.FS
	manifest, config []byte
	layers           map[v1.Hash]string // files
}

func (i *storedImage) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }
func (i *storedImage) RawManifest() ([]byte, error)        { return i.manifest, nil }
func (i *storedImage) RawConfigFile() ([]byte, error)      { return i.config, nil }

func (i *storedImage) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	info, err := fs.Stat(i.files, i.layers[h])
	if err == nil {
		err = checkRegular(i.files, i.layers[h], math.MaxInt64)
	}
	if err != nil {
		return nil, fmt.Errorf("layer %s is not in it: %w", h, err)
	}
	return &storedLayer{i.files, i.layers[h], h, info.Size()}, nil
}

type storedLayer struct {
	files  fs.FS
	name   string
	digest v1.Hash
	size   int64
}

func (l *storedLayer) Digest() (v1.Hash, error)            { return l.digest, nil }
func (l *storedLayer) Compressed() (io.ReadCloser, error)  { return l.files.Open(l.name) }
func (l *storedLayer) Size() (int64, error)                { return l.size, nil }
func (l *storedLayer) MediaType() (types.MediaType, error) { return types.OCILayer, nil }

// listDocker lists a docker archive's images.
func listDocker(files fs.FS) ([]found, error) {
	raw, err := readBounded(files, dockerManifest, maxManifest)
	if err != nil {
		return nil, err
	}
	var entries []dockerEntry
	if err := json.Unmarshal(raw, &entries); err != nil {
		return nil, fmt.Errorf("read %s: %w", dockerManifest, err)
	}
	list := make([]found, len(entries))
	for n, e := range entries {
		list[n] = found{names: append(e.RepoTags, fmt.Sprint("@", n)), open: func() (v1.Image, error) { return e.image(files) }}
	}
	return list, nil
}

// dockerEntry is an image in a docker archive's manifest.
type dockerEntry struct {
	Config   string
	RepoTags []string
	Layers   []string // files, lowest first
}

func (e *dockerEntry) image(files fs.FS) (v1.Image, error) {
	config, err := readBounded(files, e.Config, maxImageConfig)
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	c, err := v1.ParseConfigFile(bytes.NewReader(config))
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	if len(c.RootFS.DiffIDs) != len(e.Layers) {
		return nil, fmt.Errorf("it is damaged: it has %d layers, its config names %d", len(e.Layers), len(c.RootFS.DiffIDs))
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.DockerManifestSchema2, Config: v1.Descriptor{MediaType: types.DockerConfigJSON}}
	if m.Config.Digest, m.Config.Size, err = v1.SHA256(bytes.NewReader(config)); err != nil {
		return nil, err
	}
	i := &storedImage{files: files, config: config, layers: map[v1.Hash]string{}}
	for n, name := range e.Layers {
		// The id is of the unpacked content, which is checked later. It serves as the digest as
		// well, because an archive has none.
		id := c.RootFS.DiffIDs[n]
		info, err := fs.Stat(files, name)
		if err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", n+1, len(e.Layers), err)
		}
		i.layers[id] = name
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: types.DockerLayer, Digest: id, Size: info.Size()})
	}
	if i.manifest, err = json.Marshal(m); err != nil {
		return nil, err
	}
	return partial.CompressedToImage(i)
}

// readBounded reads a file of at most so many bytes.
func readBounded(files fs.FS, name string, most int64) ([]byte, error) {
	if err := checkRegular(files, name, most); err != nil {
		return nil, err
	}
	f, err := files.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most))
}

// checkRegular refuses what is not a regular file, without opening it: the open of a FIFO would
// wait.
func checkRegular(files fs.FS, name string, most int64) error {
	info, err := fs.Stat(files, name)
	if err == nil && (!info.Mode().IsRegular() || info.Size() > most) {
		err = fmt.Errorf("%s is no regular file of at most %d bytes", name, most)
	}
	return err
}

// openFiles opens a directory, or a tar archive, compressed or not. A compressed archive, or one
// from a pipe, is copied to an unnamed file of at most most bytes, which goes with the process.
func openFiles(ctx context.Context, path string, most int64) (fs.FS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if info.IsDir() {
		return os.DirFS(path), f.Close()
	}
	b := bufio.NewReaderSize(f, 1<<20)
	magic, err := b.Peek(magicLen)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, errors.Join(err, f.Close())
	}
	if compression(magic) != "" || !info.Mode().IsRegular() {
		copied, err := spool(decompress.Interruptible(ctx, b), most)
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("unpack archive: %w", err)
		}
		f = copied
	}
	a, err := newArchive(f)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read archive: %w", err), f.Close())
	}
	return a, nil
}

// spool writes the decompressed content of r to an unnamed file.
func spool(r io.Reader, most int64) (*os.File, error) {
	plain, err := decompressLayer(r)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	f, err := os.CreateTemp("", "drafter-image-")
	if err != nil {
		return nil, err
	}
	if err = os.Remove(f.Name()); err == nil {
		_, err = io.Copy(f, &boundedReader{plain, most})
	}
	if err != nil {
		return nil, errors.Join(noRoom(err, os.TempDir(), tempRemedy), f.Close())
	}
	return f, nil
}

// tarFiles is a tar archive as a file system of its regular files.
type tarFiles struct {
	file    *os.File
	entries map[string]archived
}

// archived is a file of an archive: the place of its content, or another name for it.
type archived struct {
	header       *tar.Header
	offset, size int64
	link         string
}

func newArchive(f *os.File) (*tarFiles, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	a := &tarFiles{f, map[string]archived{}}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return a, nil
		}
		if err != nil {
			return nil, err
		}
		name := path.Clean("/" + h.Name)[1:]
		for key := range h.PAXRecords {
			if strings.HasPrefix(key, "GNU.sparse.") {
				h.Typeflag = tar.TypeGNUSparse
			}
		}
		switch h.Typeflag {
		case tar.TypeGNUSparse: // some KB of archive are of any size then
			return nil, fmt.Errorf("%.64q is sparse, which no part of an image is", name)
		case tar.TypeReg:
			at, err := f.Seek(0, io.SeekCurrent) // a reader of tar reads no byte too many
			if err != nil {
				return nil, err
			}
			a.entries[name] = archived{h, at, h.Size, ""}
		case tar.TypeLink:
			a.entries[name] = archived{link: path.Clean("/" + h.Linkname)[1:]}
		case tar.TypeSymlink: // an older "docker save" stores a layer of several images only once
			a.entries[name] = archived{link: path.Join("/", path.Dir(name), h.Linkname)[1:]}
		}
		if len(a.entries) > maxArchiveEntries {
			return nil, fmt.Errorf("it has more than %d files", maxArchiveEntries)
		}
	}
}

// Open implements [fs.FS].
func (a *tarFiles) Open(name string) (fs.File, error) {
	e, ok := a.entries[path.Clean("/" + name)[1:]]
	for hops := 0; ok && e.header == nil && hops < 8; hops++ {
		e, ok = a.entries[e.link]
	}
	if !ok || e.header == nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return &archivedFile{io.NewSectionReader(a.file, e.offset, e.size), e.header.FileInfo()}, nil
}

type archivedFile struct {
	*io.SectionReader
	info fs.FileInfo
}

func (f *archivedFile) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *archivedFile) Close() error               { return nil }

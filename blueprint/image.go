package blueprint

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"drafter/internal/decompress"
	"drafter/internal/ociclient"
)

// ImageConfig names an OCI image.
type ImageConfig struct {
	// Ref is docker://NAME[:TAG|@DIGEST], oci:LAYOUT[:TAG] or docker-archive:FILE.
	Ref string
	// Platform is OS/ARCH[/VARIANT]; "" for linux and this host's architecture.
	Platform string
	// PlainHTTP talks to the registry without TLS. Registries on loopback addresses are always spoken to so.
	PlainHTTP bool
}

// OpenImage finds an image. Its layers are fetched when they are read. Registry credentials come from docker's configuration file.
func OpenImage(ctx context.Context, c ImageConfig) (v1.Image, error) {
	platform := v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	if c.Platform != "" {
		p, err := v1.ParsePlatform(c.Platform)
		if err != nil {
			return nil, fmt.Errorf("platform %q: %w; write it as linux/amd64", c.Platform, err)
		}
		platform = *p
	}
	image, err := openImage(ctx, c, platform)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", c.Ref, err)
	}
	config, err := checkConfig(image)
	if err != nil {
		return nil, fmt.Errorf("image %s: read config: %w", c.Ref, err)
	}
	if have := config.Platform(); have != nil && have.Architecture != "" && !have.Satisfies(platform) {
		return nil, fmt.Errorf("image %s is for %s, not for %s; name another image, or choose with --platform", c.Ref, have, platform)
	}
	return image, nil
}

// maxImageConfig bounds an image's config, in bytes.
const maxImageConfig = 8 << 20

// checkConfig reads an image's config, if it is of a size that one has.
func checkConfig(image v1.Image) (*v1.ConfigFile, error) {
	m, err := image.Manifest()
	if err != nil {
		return nil, err
	}
	if m.Config.Size < 0 || m.Config.Size > maxImageConfig {
		return nil, fmt.Errorf("it has %d bytes, more than %d", m.Config.Size, maxImageConfig)
	}
	return image.ConfigFile()
}

func openImage(ctx context.Context, c ImageConfig, platform v1.Platform) (v1.Image, error) {
	scheme, rest, _ := strings.Cut(c.Ref, ":")
	switch scheme {
	case "docker":
		return openRegistry(ctx, strings.TrimPrefix(rest, "//"), c.PlainHTTP, platform)
	case "oci":
		return openLayout(rest, platform)
	case "docker-archive":
		image, err := openArchive(ctx, rest)
		if err != nil {
			return nil, fmt.Errorf("read docker archive (what 'docker save' writes): %w", err)
		}
		return image, nil
	}
	return nil, errors.New("unknown kind of reference; write docker://NAME:TAG, oci:DIRECTORY:TAG or docker-archive:FILE")
}

func openRegistry(ctx context.Context, ref string, plainHTTP bool, platform v1.Platform) (v1.Image, error) {
	r, err := ociclient.Parse(ref, plainHTTP)
	if err != nil {
		return nil, err
	}
	desc, err := remote.Get(r, append(ociclient.Options(ctx, r.Context().Registry, plainHTTP), remote.WithPlatform(platform))...)
	if err != nil {
		return nil, fmt.Errorf("reach registry %s: %w", r.Context().RegistryStr(), err)
	}
	if desc.MediaType.IsIndex() {
		index, err := desc.ImageIndex()
		if err != nil {
			return nil, err
		}
		return pickPlatform(index, platform, v1.ImageIndex.Image)
	}
	return desc.Image()
}

// maxEntries bounds the files in a docker archive. An image has one for each layer, and few others.
const maxEntries = 1 << 16

// openArchive opens an archive of one image. The library reads what describes the image as a whole,
// and the layers to know their digests.
func openArchive(ctx context.Context, path string) (v1.Image, error) {
	open := func() (io.ReadCloser, error) {
		f, err := os.Open(path)
		return struct {
			io.Reader
			io.Seeker
			io.Closer
		}{decompress.Interruptible(ctx, f), f, f}, err
	}
	f, err := open()
	if err != nil {
		return nil, err
	}
	size, err := sizesIn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if err := size("manifest.json"); err != nil {
		return nil, err
	}
	manifest, err := tarball.LoadManifest(open)
	if err != nil {
		return nil, err
	}
	for _, d := range manifest {
		if err := size(d.Config); err != nil {
			return nil, err
		}
	}
	return tarball.Image(open, nil)
}

// sizesIn reads which files are in an archive, and returns what refuses those that are longer than
// an image's config. A sparse file is refused: some KB of archive are of any size then.
func sizesIn(archive io.Reader) (check func(name string) error, err error) {
	sizes, links := map[string]int64{}, map[string]string{}
	for r := tar.NewReader(archive); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		for key := range h.PAXRecords {
			if strings.HasPrefix(key, "GNU.sparse.") {
				h.Typeflag = tar.TypeGNUSparse
			}
		}
		name := path.Clean(h.Name)
		if h.Typeflag == tar.TypeGNUSparse {
			return nil, fmt.Errorf("%.64q is sparse, which no part of an image is", name)
		}
		if _, seen := sizes[name]; seen { // the first counts
			continue
		}
		if sizes[name] = h.Size; len(sizes) > maxEntries {
			return nil, fmt.Errorf("it holds more than %d files", maxEntries)
		}
		if h.Typeflag == tar.TypeSymlink || h.Typeflag == tar.TypeLink {
			links[name] = path.Join(path.Dir(name), path.Clean(h.Linkname))
		}
	}
	return func(name string) error {
		at := path.Clean(name)
		for range len(links) + 1 { // the library refuses those that lead in a circle
			if to, ok := links[at]; ok {
				at = to
			}
		}
		if sizes[at] > maxImageConfig {
			return fmt.Errorf("%.64q has %d bytes, more than %d", name, sizes[at], maxImageConfig)
		}
		return nil
	}, nil
}

// openLayout opens DIRECTORY or DIRECTORY:TAG. A directory whose name holds a colon is taken as it is if it exists.
func openLayout(ref string, platform v1.Platform) (v1.Image, error) {
	dir, tag := ref, ""
	if _, err := os.Stat(dir); err != nil {
		if i := strings.LastIndexByte(ref, ':'); i > 0 {
			dir, tag = ref[:i], ref[i+1:]
		}
	}
	if err := checkDocument(filepath.Join(dir, "index.json")); err != nil {
		return nil, fmt.Errorf("open OCI layout: %w", err)
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("open OCI layout: %w", err)
	}
	// What describes an image is read as a whole.
	blob := func(h v1.Hash) string { return filepath.Join(dir, "blobs", h.Algorithm, h.Hex) }
	open := func(index v1.ImageIndex, h v1.Hash) (v1.Image, error) {
		if err := checkDocument(blob(h)); err != nil {
			return nil, err
		}
		image, err := index.Image(h)
		if err != nil {
			return nil, err
		}
		m, err := image.Manifest()
		if err != nil {
			return nil, err
		}
		return image, checkDocument(blob(m.Config.Digest))
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("open OCI layout: %w", err)
	}
	var found []v1.Descriptor
	var tags []string
	for _, d := range manifest.Manifests {
		have := d.Annotations["org.opencontainers.image.ref.name"]
		tags = append(tags, have)
		if tag == "" || have == tag {
			found = append(found, d)
		}
	}
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("the OCI layout has no tag %q; it has: %s", tag, strings.Join(tags, ", "))
	case len(found) == 1 && found[0].MediaType.IsIndex():
		if err := checkDocument(blob(found[0].Digest)); err != nil {
			return nil, err
		}
		nested, err := index.ImageIndex(found[0].Digest)
		if err != nil {
			return nil, err
		}
		return pickPlatform(nested, platform, open)
	case len(found) == 1:
		return open(index, found[0].Digest)
	case tag == "" && !samePlatforms(found):
		return pickPlatform(index, platform, open)
	}
	return nil, fmt.Errorf("the OCI layout holds several images; name one: %s", strings.Join(tags, ", "))
}

// checkDocument refuses what is no regular file, or is longer than what describes an image.
func checkDocument(path string) error {
	info, err := os.Stat(path)
	if err == nil && (!info.Mode().IsRegular() || info.Size() > maxImageConfig) {
		err = fmt.Errorf("%s is no regular file of at most %d bytes", path, maxImageConfig)
	}
	return err
}

// samePlatforms tells whether descriptors leave a platform choice open.
func samePlatforms(ds []v1.Descriptor) bool {
	seen := map[string]bool{}
	for _, d := range ds {
		if d.Platform == nil || seen[d.Platform.String()] {
			return true
		}
		seen[d.Platform.String()] = true
	}
	return false
}

func pickPlatform(index v1.ImageIndex, want v1.Platform, open func(v1.ImageIndex, v1.Hash) (v1.Image, error)) (v1.Image, error) {
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	var have []string
	for _, d := range manifest.Manifests {
		if d.Platform == nil || d.Platform.OS == "unknown" {
			continue // an attestation, not an image
		}
		if d.Platform.Satisfies(want) {
			return open(index, d.Digest)
		}
		have = append(have, d.Platform.String())
	}
	return nil, fmt.Errorf("it is not there for %s, only for %s; choose with --platform", want, strings.Join(have, ", "))
}

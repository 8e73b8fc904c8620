package blueprint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"drafter/internal/ociclient"
)

// ImageConfig names an OCI image.
type ImageConfig struct {
	// Ref is docker://NAME[:TAG|@DIGEST], oci:LAYOUT[:TAG], oci-archive:FILE[:TAG],
	// docker-archive:FILE[:TAG] or dir:DIRECTORY. A tag may be a whole name, or @N: the N-th image,
	// from 0. Archives may be compressed.
	Ref string
	// Platform is OS/ARCH[/VARIANT]; "" for linux and this host's architecture.
	Platform string
	// PlainHTTP talks to the registry without TLS. Registries on loopback addresses need no flag.
	PlainHTTP bool
	// MaxArchive bounds the unpacked size of a compressed archive, in bytes; 0: 64 GiB.
	MaxArchive int64

	Logger *slog.Logger // nil: slog.Default()
}

// OpenImage finds an image. Its layers are fetched when they are read. Registry credentials come
// from docker's configuration file.
func OpenImage(ctx context.Context, c ImageConfig) (v1.Image, error) {
	platform, err := parsePlatform(c.Platform)
	if err != nil {
		return nil, err
	}
	image, err := openImage(ctx, c, platform)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", c.Ref, err)
	}
	config, err := checkConfig(image)
	if err != nil {
		return nil, fmt.Errorf("image %s: read config: %w", c.Ref, err)
	}
	if have := config.Platform(); have != nil && have.Architecture != "" && suits(*have, platform) == 0 {
		return nil, fmt.Errorf("image %s is for %s, not for %s; name another image, or choose with --platform", c.Ref, have, platform)
	}
	m, err := image.Manifest()
	if err != nil {
		return nil, fmt.Errorf("image %s: read manifest: %w", c.Ref, err)
	}
	if err := checkLayers(m); err != nil {
		return nil, fmt.Errorf("image %s: %w", c.Ref, err)
	}
	return image, nil
}

// maxImageConfig bounds an image's config, in bytes.
const maxImageConfig = 8 << 20

// checkConfig reads an image's config, if its size is within bounds.
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
	file, name := cutName(rest)
	most := cmp.Or(c.MaxArchive, defaultMaxBytes)
	var list []found
	var err error
	switch scheme {
	case "docker":
		return openRegistry(ctx, strings.TrimPrefix(rest, "//"), c.PlainHTTP, platform, c.Logger)
	case "oci", "oci-archive":
		list, err = listStored(ctx, file, layoutIndex, most)
	case "docker-archive":
		list, err = listStored(ctx, file, dockerManifest, most)
	case "dir":
		list, err = listDir(file)
	default:
		return nil, errors.New("unknown kind of reference; write docker://NAME:TAG, oci:DIRECTORY:TAG, oci-archive:FILE, docker-archive:FILE or dir:DIRECTORY")
	}
	if err != nil {
		return nil, err
	}
	return choose(list, name, platform)
}

// cutName splits PATH[:NAME]. Both may hold colons: PATH is the longest path that exists.
func cutName(ref string) (file, name string) {
	for i := len(ref); i > 0; i = strings.LastIndexByte(ref[:i], ':') {
		if _, err := os.Stat(ref[:i]); err == nil {
			return ref[:i], strings.TrimPrefix(ref[i:], ":")
		}
	}
	return ref, ""
}

func openRegistry(ctx context.Context, ref string, plainHTTP bool, platform v1.Platform, log *slog.Logger) (v1.Image, error) {
	r, err := ociclient.Parse(ref, plainHTTP)
	if err != nil {
		return nil, err
	}
	desc, err := remote.Get(r, append(ociclient.Options(ctx, r.Context().Registry, plainHTTP, log), remote.WithPlatform(platform))...)
	if err != nil {
		return nil, fmt.Errorf("reach registry %s: %w", r.Context().RegistryStr(), err)
	}
	var image v1.Image
	if desc.MediaType.IsIndex() {
		index, err := desc.ImageIndex()
		if err != nil {
			return nil, err
		}
		list, err := listIndex(index, false)
		if err != nil {
			return nil, err
		}
		if image, err = choose(list, "", platform); err != nil {
			return nil, err
		}
	} else if image, err = desc.Image(); err != nil {
		return nil, err
	}
	m, err := image.Manifest()
	if err != nil {
		return nil, err
	}
	for n, l := range m.Layers {
		if !l.MediaType.IsDistributable() || len(l.URLs) > 0 {
			return nil, fmt.Errorf("its layer %d of %d is not in the registry, but elsewhere (%s); pull it with its own tools and use 'docker save'", n+1, len(m.Layers), l.MediaType)
		}
	}
	return image, nil
}

// found is an image that a reference may mean.
type found struct {
	names    []string     // it can be asked for by each; lists call it by the first
	platform *v1.Platform // nil: its config says
	open     func() (v1.Image, error)
}

// Annotations that name an image: that of the OCI image specification, and that of containerd (and
// so of docker buildx), which puts only the tag into the former.
var nameAnnotations = []string{"io.containerd.image.name", "org.opencontainers.image.ref.name"}

// maxImages bounds how many images an index may lead to.
const maxImages = 1000

// listIndex lists the images of an index and of indexes within it. each says that its entries are
// separate images, as in an OCI layout, and not one image for several platforms.
func listIndex(index v1.ImageIndex, each bool) ([]found, error) {
	var l imageList
	err := l.visit(index, nil, each)
	return l.found, err
}

// imageList is what is found in an index.
type imageList struct {
	found   []found
	visited int
}

// visit adds the images of an index that has names of its own.
func (l *imageList) visit(index v1.ImageIndex, names []string, each bool) error {
	m, err := index.IndexManifest()
	if err != nil {
		return fmt.Errorf("read index: %w", err)
	}
	for n, d := range m.Manifests {
		if l.visited++; l.visited > maxImages {
			return fmt.Errorf("its index leads to more than %d images", maxImages)
		}
		if d.Platform != nil && d.Platform.OS == "unknown" || d.Annotations["vnd.docker.reference.type"] != "" {
			continue // an attestation, not an image
		}
		names := slices.Clone(names)
		for _, a := range nameAnnotations {
			if name := d.Annotations[a]; name != "" {
				names = append(names, name)
			}
		}
		if each {
			names = append(names, fmt.Sprint("@", n))
		}
		switch {
		case d.MediaType.IsIndex():
			nested, err := index.ImageIndex(d.Digest)
			if errors.Is(err, fs.ErrNotExist) {
				continue // of a platform that was not stored
			}
			if err == nil {
				err = l.visit(nested, names, false)
			}
			if err != nil {
				return err
			}
		case d.MediaType.IsImage() || d.MediaType == "":
			l.found = append(l.found, found{names, d.Platform, func() (v1.Image, error) { return index.Image(d.Digest) }})
		}
	}
	return nil
}

// choose returns the image that a tag means, or the only one for "", for the platform that suits
// best.
func choose(list []found, tag string, want v1.Platform) (v1.Image, error) {
	var known, have []string
	var best []found
	level := 0
	var unusable error // why none of the images is the one meant
	for _, f := range list {
		known = append(known, f.known())
		if tag != "" && !f.named(tag) {
			continue
		}
		p := f.platform
		if p == nil {
			image, err := f.open()
			if errors.Is(err, fs.ErrNotExist) {
				unusable = err // of a platform that was not stored
				continue
			}
			if err != nil {
				return nil, err
			}
			m, err := image.Manifest()
			if err != nil {
				return nil, fmt.Errorf("read manifest: %w", err)
			}
			if kind := artifactType(m); kind != "" {
				unusable = fmt.Errorf("it holds no image, but an artifact (%s)", kind)
				known = known[:len(known)-1]
				continue
			}
			config, err := checkConfig(image)
			if err != nil {
				return nil, fmt.Errorf("read config: %w", err)
			}
			p = &v1.Platform{OS: config.OS, Architecture: config.Architecture, Variant: config.Variant}
		}
		have = append(have, p.String())
		if l := suits(*p, want); l > level {
			level, best = l, []found{f}
		} else if l == level && l > 0 && f.known() != best[0].known() {
			best = append(best, f)
		}
	}
	switch {
	case len(best) == 1:
		return best[0].open()
	case len(best) > 1:
		return nil, fmt.Errorf("it holds several images; name one behind a colon: %s", strings.Join(known, ", "))
	case len(have) > 0:
		return nil, fmt.Errorf("it is not there for %s, only for %s; choose with --platform", want, strings.Join(have, ", "))
	case unusable != nil:
		return nil, unusable
	case tag != "":
		return nil, fmt.Errorf("it has no tag %q; it has: %s", tag, strings.Join(known, ", "))
	}
	return nil, errors.New("it holds no image")
}

// artifactType is the type of an artifact that has an image's manifest: a signature, a bill of
// materials, a chart. It is "" for an image.
func artifactType(m *v1.Manifest) string {
	config := string(m.Config.MediaType)
	if m.ArtifactType != "" && !m.Config.MediaType.IsConfig() {
		return m.ArtifactType
	}
	// Docker's first images have configs without a type.
	if config != "" && config != "application/octet-stream" && !strings.Contains(config, "image") {
		return config
	}
	for _, l := range m.Layers {
		if !strings.Contains(string(l.MediaType), "tar") && l.MediaType != "" {
			return string(l.MediaType)
		}
	}
	return ""
}

// checkLayers refuses layers that cannot be unpacked.
func checkLayers(m *v1.Manifest) error {
	for n, l := range m.Layers {
		if strings.HasSuffix(string(l.MediaType), "+encrypted") {
			return fmt.Errorf("its layer %d of %d is encrypted; decrypt it with 'skopeo copy --decryption-key'", n+1, len(m.Layers))
		}
	}
	return nil
}

// known is the name of an image in a list.
func (f *found) known() string {
	if len(f.names) == 0 {
		return ""
	}
	return f.names[0]
}

// named tells whether a user may mean an image by a name. Docker's short names stand for long ones.
func (f *found) named(want string) bool {
	return slices.ContainsFunc(f.names, func(have string) bool {
		if have == want {
			return true
		}
		a, err := name.ParseReference(have)
		b, err2 := name.ParseReference(want)
		return err == nil && err2 == nil && a.Name() == b.Name()
	})
}

// parsePlatform parses OS/ARCH[/VARIANT], OS or ARCH. The defaults are linux, and this host's
// architecture.
func parsePlatform(s string) (v1.Platform, error) {
	platform := v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	if s == "" {
		return platform, nil
	}
	p, err := v1.ParsePlatform(s)
	if err != nil {
		return platform, fmt.Errorf("platform %q: %w; write it as linux/amd64", s, err)
	}
	if p.Architecture == "" && p.OS != platform.OS {
		p.OS, p.Architecture = platform.OS, p.OS
	}
	p.Architecture = architecture(cmp.Or(p.Architecture, platform.Architecture))
	return *p, nil
}

// architecture is Go's name of an architecture that others name differently.
func architecture(s string) string {
	switch s {
	case "x86_64", "x86-64":
		return "amd64"
	case "aarch64":
		return "arm64"
	}
	return s
}

// suits tells how well an image for one platform runs on another: 0 for not at all. A processor
// also runs images for lesser variants of its architecture. A user who names no variant wants the
// one that all processors of the architecture run, and gets more only if there is nothing else.
func suits(have, want v1.Platform) int {
	if have.OS != "" && have.OS != want.OS || have.Architecture != "" && architecture(have.Architecture) != want.Architecture {
		return 0
	}
	const exact = 100
	base := map[string]int{"amd64": 1, "arm64": 8, "arm": 7}[want.Architecture]
	number := func(variant string) int {
		n, err := strconv.Atoi(strings.TrimPrefix(variant, "v"))
		if err != nil {
			return base
		}
		return n
	}
	switch above := number(have.Variant) - number(want.Variant); {
	case above <= 0:
		return exact + above
	case want.Variant == "":
		return exact/2 - above
	}
	return 0
}

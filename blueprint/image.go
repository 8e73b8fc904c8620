package blueprint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

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
		if _, err := os.Stat(rest); err != nil {
			return nil, err
		}
		image, err := tarball.ImageFromPath(rest, nil)
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
		return pickPlatform(index, platform)
	}
	return desc.Image()
}

// openLayout opens DIRECTORY or DIRECTORY:TAG. A directory whose name holds a colon is taken as it is if it exists.
func openLayout(ref string, platform v1.Platform) (v1.Image, error) {
	dir, tag := ref, ""
	if _, err := os.Stat(dir); err != nil {
		if i := strings.LastIndexByte(ref, ':'); i > 0 {
			dir, tag = ref[:i], ref[i+1:]
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("open OCI layout: %w", err)
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
		nested, err := index.ImageIndex(found[0].Digest)
		if err != nil {
			return nil, err
		}
		return pickPlatform(nested, platform)
	case len(found) == 1:
		return index.Image(found[0].Digest)
	case tag == "" && !samePlatforms(found):
		return pickPlatform(index, platform)
	}
	return nil, fmt.Errorf("the OCI layout holds several images; name one: %s", strings.Join(tags, ", "))
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

func pickPlatform(index v1.ImageIndex, want v1.Platform) (v1.Image, error) {
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
			return index.Image(d.Digest)
		}
		have = append(have, d.Platform.String())
	}
	return nil, fmt.Errorf("it is not there for %s, only for %s; choose with --platform", want, strings.Join(have, ", "))
}

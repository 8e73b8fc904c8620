package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"drafter/api"
	"drafter/blueprint"
	"drafter/internal/artifact"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/packager"
)

// An image is not stored: its packages are. Its record says what its reference was when it was looked
// up, so that a run needs no registry. The time of the record is when it was used last.

const registryScheme = "docker://"

// imageReference is a reference with its kind.
func imageReference(ref string) string {
	for _, kind := range []string{registryScheme, "oci:", "oci-archive:", "docker-archive:", "dir:"} {
		if strings.HasPrefix(ref, kind) {
			return ref
		}
	}
	return registryScheme + ref
}

func (d *Daemon) imageRecord(ref, platform string) string {
	return d.dir("images", digestOf([]string{ref, platform})+".json")
}

// readImage returns what a reference was when it was looked up last; without a digest if it never was.
func (d *Daemon) readImage(ref, platform string) api.Image {
	image, err := readImageRecord(d.imageRecord(ref, platform))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.log.Warn("The record of an image cannot be read; it is looked up anew", "image", ref, "error", err)
	}
	return image
}

func readImageRecord(path string) (image api.Image, err error) {
	b, err := private.ReadFile(path, 1<<16)
	if err == nil {
		err = json.Unmarshal(b, &image)
	}
	if err == nil && image.Reference == "" {
		err = errors.New("it does not say of which reference it is")
	}
	if err != nil {
		return api.Image{}, fmt.Errorf("read record %s: %w", path, err)
	}
	return image, nil
}

func (d *Daemon) writeImage(image api.Image) error {
	b, err := json.Marshal(image)
	if err == nil {
		err = newfile.WriteBytes(d.imageRecord(image.Reference, image.Platform), b)
	}
	if err != nil {
		return fmt.Errorf("record image %s: %w", image.Reference, err)
	}
	return nil
}

// touchImage notes that an image is used.
func (d *Daemon) touchImage(image api.Image) {
	err := os.Chtimes(d.imageRecord(image.Reference, image.Platform), time.Time{}, time.Now())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.log.Warn("It is not noted that an image is used", "image", image.Reference, "error", err)
	}
}

// findImage looks up an image, or a package that was pushed under such a reference.
func (d *Daemon) findImage(ctx context.Context, r api.Run) (image v1.Image, found api.Image, err error) {
	found = api.Image{Reference: r.Image, Platform: r.Platform, Found: time.Now().UTC()}
	if strings.HasPrefix(r.Image, registryScheme) {
		p, err := artifact.Open(ctx, r.Image, false, 0, d.log)
		if err == nil {
			found.Artifact, found.Digest, found.Size = true, p.Digest.String(), p.Size()
			return nil, found, p.Close()
		}
		if !errors.Is(err, artifact.ErrOther) {
			return nil, found, err
		}
	}
	if image, err = blueprint.OpenImage(ctx, blueprint.ImageConfig{Ref: r.Image, Platform: r.Platform, Logger: d.log}); err != nil {
		return nil, found, err
	}
	hash, err := image.Digest()
	if err != nil {
		return nil, found, fmt.Errorf("image %s: %w", r.Image, err)
	}
	m, err := image.Manifest()
	if err != nil {
		return nil, found, fmt.Errorf("image %s: read manifest: %w", r.Image, err)
	}
	found.Digest, found.Size = hash.String(), m.Config.Size
	for _, l := range m.Layers {
		found.Size += l.Size
	}
	return image, found, nil
}

// pullArtifact fetches a package from its registry.
func (d *Daemon) pullArtifact(ctx context.Context, image api.Image, dir string, o *operation) error {
	if err := private.MkdirAll(dir); err != nil {
		return err
	}
	from := packager.Artifact{Reference: pinned(image), Logger: d.log}
	_, err := from.Pull(ctx, dir, nil, o.progress)
	return err
}

// pinned is an image's reference by its digest: its tag may lead to another one by now.
func pinned(image api.Image) string {
	name, _, _ := strings.Cut(image.Reference, "@")
	if i := strings.LastIndex(name, ":"); i > strings.LastIndex(name, "/") {
		name = name[:i]
	}
	return name + "@" + image.Digest
}

// Images returns what is known of images, the one found last first.
func (d *Daemon) Images() ([]api.Image, error) {
	files, err := filepath.Glob(d.dir("images", "*.json"))
	if err != nil {
		return nil, err
	}
	list := []api.Image{}
	for _, f := range files {
		image, err := readImageRecord(f)
		if err != nil {
			if !errors.Is(err, os.ErrNotExist) {
				d.log.Warn("The record of an image cannot be read; 'drafter prune' removes it", "error", err)
			}
			continue
		}
		if info, err := os.Stat(f); err == nil {
			image.Used = info.ModTime().UTC()
		}
		d.mu.Lock()
		for key, p := range d.packages {
			if p.of(image) {
				image.Packages = append(image.Packages, key)
			}
		}
		d.mu.Unlock()
		slices.Sort(image.Packages)
		list = append(list, image)
	}
	slices.SortFunc(list, func(a, b api.Image) int { return b.Found.Compare(a.Found) })
	return list, nil
}

// of tells whether a package was made of an image.
func (p *stored) of(image api.Image) bool {
	source := api.FromImage
	if image.Artifact {
		source = api.FromRegistry
	}
	return p.Source == source && p.Digest == image.Digest
}

// RemoveImage forgets a reference, and removes the packages that were made of its image, unless
// another reference stands for the same.
func (d *Daemon) RemoveImage(ref string) error {
	images, err := d.Images()
	if err != nil {
		return err
	}
	var removed, left []api.Image
	for _, i := range images {
		if i.Reference == ref || i.Reference == imageReference(ref) || i.Digest == ref {
			removed = append(removed, i)
		} else {
			left = append(left, i)
		}
	}
	if len(removed) == 0 {
		return fmt.Errorf("image %q: %w; 'drafter images' lists all", ref, ErrNotFound)
	}
	var packages []*stored
	d.mu.Lock()
	for _, p := range d.packages {
		if slices.ContainsFunc(removed, p.of) && !slices.ContainsFunc(left, p.of) {
			packages = append(packages, p)
			err = errors.Join(err, d.needed(p))
		}
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	for _, p := range packages {
		if err := d.discard(p); err != nil {
			return err
		}
	}
	for _, i := range removed {
		if err := newfile.Remove(d.imageRecord(i.Reference, i.Platform)); err != nil {
			return err
		}
	}
	return nil
}

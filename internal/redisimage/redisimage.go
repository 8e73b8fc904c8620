// Package redisimage makes an OCI image of Redis from Debian's packages and serves it from a
// registry, for the demo and the tests, which must not depend on a registry that is far away.
package redisimage

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"drafter/blueprint"
)

// Tag is the image's tag in a layout.
const Tag = "latest"

// redisUID is the user id of the server; the image's config names its user.
const redisUID = 999

// Build makes the image. cache keeps downloaded packages; the image's layer is read from a file in
// dir for as long as the image is used.
func Build(ctx context.Context, cache, dir string) (_ v1.Image, err error) {
	root, err := os.MkdirTemp("", "drafter-redis-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	if err := blueprint.UnpackDebian(ctx, root, cache, nil, nil, "redis-server"); err != nil {
		return nil, err
	}
	for _, dir := range []string{"usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian"} {
		if err := os.RemoveAll(filepath.Join(root, dir)); err != nil {
			return nil, err
		}
	}
	for name, text := range map[string]string{
		"etc/passwd": fmt.Sprintf("root:x:0:0:root:/root:/bin/sh\nredis:x:%d:%d::/data:/bin/false\n", redisUID, redisUID),
		"etc/group":  fmt.Sprintf("root:x:0:\nredis:x:%d:\n", redisUID),
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(os.MkdirAll(filepath.Join(root, "data"), 0o755), os.Chown(filepath.Join(root, "data"), redisUID, redisUID)); err != nil {
		return nil, err
	}
	return Pack(root, filepath.Join(dir, "redis-layer.tar"), v1.Config{
		User:         "redis",
		Entrypoint:   []string{"/usr/bin/redis-server"},
		Cmd:          []string{"--bind", "0.0.0.0", "-::", "--protected-mode", "no", "--dir", "/data", "--appendonly", "yes"},
		WorkingDir:   "/data",
		ExposedPorts: map[string]struct{}{"6379/tcp": {}},
		StopSignal:   "SIGTERM",
	})
}

// Pack makes an image of a root file system, for this architecture. Its one layer is read from
// file, a new one, for as long as the image is used.
func Pack(root, file string, c v1.Config) (v1.Image, error) {
	if err := writeTar(root, file); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromFile(file)
	if err != nil {
		return nil, err
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Config = "linux", runtime.GOARCH, c
	return mutate.ConfigFile(image, config)
}

// WriteLayout stores the image as an OCI layout in dir.
func WriteLayout(image v1.Image, dir string) error {
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return path.AppendImage(image, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": Tag}))
}

// Serve pushes the image to a registry of its own on a loopback port and returns its reference, for
// docker://.
func Serve(image v1.Image) (ref string, stop func(), err error) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	ref = strings.TrimPrefix(server.URL, "http://") + "/redis:" + Tag
	parsed, err := name.ParseReference(ref)
	if err == nil {
		err = remote.Write(parsed, image)
	}
	if err != nil {
		server.Close()
		return "", nil, fmt.Errorf("push image: %w", err)
	}
	return ref, server.Close, nil
}

// writeTar stores a tree with owners and modes.
func writeTar(root, file string) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	t := tar.NewWriter(f)
	// AddFS forgets owners and devices, so the walk is ours.
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		return addToTar(t, root, path, d)
	})
	return errors.Join(err, t.Close())
}

func addToTar(t *tar.Writer, root, path string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	link := ""
	if d.Type() == fs.ModeSymlink {
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	if h.Name, err = filepath.Rel(root, path); err != nil {
		return err
	}
	if err := t.WriteHeader(h); err != nil || !d.Type().IsRegular() {
		return err
	}
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	_, err = io.Copy(t, in)
	return err
}

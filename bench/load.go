package bench

import (
	"archive/tar"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"golang.org/x/sync/errgroup"

	"drafter/internal/redisimage"
	"drafter/internal/tour"
)

// The load of a guest: how much it holds and writes, and where it tells that it runs, which is the
// host's end of the first namespace's link.
const (
	loadResident = 300 // MiB
	loadRate     = 20  // MiB of pages per second
	tickAddr     = "10.0.8.1"
	tickPort     = 7777
)

// Every other load is a pattern of load.c.
const (
	loadRedis = "redis" // with clients
	loadBound = "bound" // writes to pages picked at random, as many as it can
)

//go:embed load/load.c
var loadSource []byte

// compile builds a program from C with gcc, and returns its path.
func compile(ctx context.Context, dir, name string, source []byte) (string, error) {
	bin := filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "gcc", "-O2", "-static", "-o", bin, "-x", "c", "-")
	cmd.Stdin = bytes.NewReader(source)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s with gcc: %w: %s", name, err, out)
	}
	return bin, nil
}

// loadImage makes an OCI image of the load's program.
func (b *bench) loadImage(ctx context.Context, pattern string) (v1.Image, error) {
	bin, err := compile(ctx, b.dir, "load", loadSource)
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		return nil, err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "load", Mode: 0o755, Size: int64(len(program))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(program); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	image, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	rate := loadRate
	if pattern == loadBound {
		rate = 0
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = v1.Config{
		Entrypoint:   []string{"/load", strconv.Itoa(loadResident), strconv.Itoa(rate), pattern, tickAddr, strconv.Itoa(tickPort)},
		ExposedPorts: map[string]struct{}{"7/tcp": {}},
	}
	return mutate.ConfigFile(image, config)
}

// cacheDir keeps what is downloaded.
func cacheDir() (string, error) {
	cache, err := os.UserCacheDir()
	return filepath.Join(cache, "drafter", "debian"), err
}

// blueprint makes, once, what guests with a load boot from, and returns its directory.
func (b *bench) blueprint(ctx context.Context, load string) (string, error) {
	blueprint := filepath.Join(b.dir, "blueprint-"+load)
	if _, err := os.Stat(blueprint); err == nil {
		return blueprint, nil
	}
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	system := filepath.Join(b.dir, "blueprint")
	if _, err := os.Stat(system); err != nil {
		if err := b.drafter.Run(ctx, os.Stderr, "blueprint", "os", "--output", system, "--cache", cache); err != nil {
			return "", err
		}
	}
	var image v1.Image
	if load == loadRedis {
		image, err = redisimage.Build(ctx, cache, b.dir)
	} else {
		image, err = b.loadImage(ctx, load)
	}
	if err != nil {
		return "", err
	}
	layout := filepath.Join(b.dir, "image-"+load)
	if err := redisimage.WriteLayout(image, layout); err != nil {
		return "", err
	}
	if out, err := exec.CommandContext(ctx, "cp", "-a", "--sparse=always", system, blueprint).CombinedOutput(); err != nil {
		return "", fmt.Errorf("copy blueprint: %w: %s", err, out)
	}
	return blueprint, b.drafter.Run(ctx, os.Stderr, "blueprint", "oci", "oci:"+layout, "--output", filepath.Join(blueprint, "oci.ext4"))
}

// pkg is where the package of a guest is.
func (b *bench) pkg(load string, gib int) string {
	return filepath.Join(b.dir, fmt.Sprintf("package-%s-%d", load, gib))
}

// snapshot makes, once, a package of a guest that is under load, and returns its directory.
func (b *bench) snapshot(ctx context.Context, load string, gib int) (string, error) {
	pkg := b.pkg(load, gib)
	if _, err := os.Stat(pkg); err == nil {
		return pkg, nil
	}
	blueprint, err := b.blueprint(ctx, load)
	if err != nil {
		return "", err
	}
	return pkg, b.snapshotTo(ctx, blueprint, pkg, gib, "ark0")
}

// snapshots makes the packages of several contests, two at a time: a boot keeps one CPU busy. It
// needs two network namespaces.
func (b *bench) snapshots(ctx context.Context, contests []contest) error {
	netns := make(chan string, 2)
	netns <- "ark0"
	netns <- "ark1"
	boots, bctx := errgroup.WithContext(ctx)
	for _, c := range contests {
		pkg := b.pkg(c.load, c.gib)
		if _, err := os.Stat(pkg); err == nil {
			continue
		}
		blueprint, err := b.blueprint(bctx, c.load)
		if err != nil {
			return errors.Join(err, boots.Wait())
		}
		if err := os.Mkdir(pkg, 0o755); err != nil { // which is that of the next contests, too
			return errors.Join(err, boots.Wait())
		}
		boots.Go(func() error {
			free := <-netns
			defer func() { netns <- free }()
			return b.snapshotTo(bctx, blueprint, pkg, c.gib, free)
		})
	}
	return boots.Wait()
}

// snapshotTo boots a guest and makes a package of it.
func (b *bench) snapshotTo(ctx context.Context, blueprint, pkg string, gib int, netns string) error {
	return b.drafter.Run(ctx, os.Stderr, "snapshotter", "--enable-output=false", "--netns", netns, "--memory-size", strconv.Itoa(gib<<10), "--chroot-base-dir", filepath.Join(b.dir, "vms"),
		"--devices", tour.SnapshotterDevices(blueprint, pkg))
}

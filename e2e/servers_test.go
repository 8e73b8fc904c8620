package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"drafter/blueprint"
	"drafter/internal/redisimage"
	"drafter/internal/tour"
)

// serverPackages are those of the servers that run in one guest, and of what is used in it.
var serverPackages = []string{
	"redis-server", "postgresql-15", "openssh-server", "nginx-light", "python3-websockets", "iperf3", "curl", "procps", "ncurses-base", "util-linux", "dash", "coreutils",
}

// serverPorts are the ports of the servers in the guest.
var serverPorts = map[string]struct{}{
	"7/tcp": {}, "22/tcp": {}, "80/tcp": {}, "5201/tcp": {}, "5432/tcp": {}, "6379/tcp": {}, "8765/tcp": {}, "7/udp": {}, "4433/udp": {},
}

// serversBlueprint is the bundle of a guest with all of them.
const serversBlueprint = "out/blueprint/servers.ext4"

// pattern is what the guest's web server serves.
func pattern() []byte {
	b := make([]byte, 16<<10)
	rand.NewChaCha8([32]byte{}).Read(b)
	return b
}

// serversBundle makes a bundle with many servers. cache keeps it for the next run.
func serversBundle(ctx context.Context, cache, dir, bundle string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", filepath.Join(dir, "echo"), "drafter/e2e/echo")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build echo: %w: %s", err, out)
	}
	files := map[string][]byte{
		"etc/passwd":  []byte("root::0:0:root:/root:/bin/sh\nsshd:x:998:998::/:/bin/false\npostgres:x:999:999::/data:/bin/sh\n"),
		"etc/group":   []byte("root:x:0:\nsshd:x:998:\npostgres:x:999:\n"),
		"srv/pattern": pattern(),
	}
	for name, path := range map[string]string{
		"start": "testdata/servers/start", "prepare": "testdata/servers/prepare", "srv/nginx.conf": "testdata/servers/nginx.conf", "srv/websocket-server": "testdata/servers/websocket-server",
		"srv/echo": filepath.Join(dir, "echo"),
	} {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files[name] = b
	}
	hash := sha256.New()
	fmt.Fprint(hash, serverPackages, files) // a map is printed in order
	kept := filepath.Join(cache, fmt.Sprintf("servers-%x.ext4", hash.Sum(nil)[:8]))
	if _, err := os.Stat(kept); err == nil {
		return copySparse(ctx, kept, bundle)
	}
	layout := filepath.Join(dir, "servers-image")
	err := debianImage(ctx, cache, layout, v1.Config{
		WorkingDir: "/data", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Entrypoint: []string{"/start"}, ExposedPorts: serverPorts,
	}, files, serverPackages...)
	if err != nil {
		return err
	}
	d := tour.Drafter{Bin: filepath.Join(dir, "bin/plain/drafter"), Dir: dir}
	if err := d.Run(ctx, io.Discard, "blueprint", "oci", "oci:"+layout, "--output", bundle); err != nil {
		return err
	}
	old, err := filepath.Glob(filepath.Join(cache, "servers-*.ext4"))
	if err != nil {
		return err
	}
	for _, path := range old {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	partial := fmt.Sprintf("%s.%d", kept, os.Getpid()) // others may do the same
	return errors.Join(copySparse(ctx, bundle, partial), os.Rename(partial, kept))
}

func copySparse(ctx context.Context, from, to string) error {
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copy bundle: %w: %s", err, out)
	}
	return nil
}

// debianImage makes an OCI layout of Debian's packages, a directory /data of a user 999, and files. One
// called prepare runs in it.
func debianImage(ctx context.Context, cache, layout string, config v1.Config, files map[string][]byte, packages ...string) (err error) {
	root, err := os.MkdirTemp("", "drafter-image-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	if err := blueprint.UnpackDebian(ctx, root, cache, nil, nil, packages...); err != nil {
		return err
	}
	for name, b := range files {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, b, 0o755)); err != nil {
			return err
		}
	}
	const script = `set -e
rm -rf usr/share/doc usr/share/man usr/share/locale usr/lib/*/libLLVM*
test -e bin/sh || ln -s dash bin/sh
install -d root
install -d -m 1777 tmp
install -d -o 999 -g 999 data
if test -e prepare; then
	install -d dev
	mount --bind /dev dev
	chroot . /prepare
fi
`
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "sh", "-c", script)
	cmd.Dir, cmd.Env = root, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("prepare image: %w: %s", err, out)
	}
	image, err := redisimage.Pack(root, layout+".tar", config)
	if err != nil {
		return err
	}
	return redisimage.WriteLayout(image, layout)
}

// serversPackage is the directory of the package of a guest with many servers. It is made once.
func serversPackage(t *testing.T) string {
	t.Helper()
	dir, err := makeServersPackage()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

var makeServersPackage = sync.OnceValues(func() (string, error) {
	d := tour.Drafter{Bin: filepath.Join(work, "bin/plain/drafter"), Dir: filepath.Join(work, "servers")}
	devices, err := json.Marshal(devicesWith(filepath.Join(work, serversBlueprint)))
	if err == nil {
		err = os.MkdirAll(d.Dir, 0o755)
	}
	if err != nil {
		return "", err
	}
	err = d.Run(context.Background(), os.Stderr, "snapshotter", "--enable-output=false", "--chroot-base-dir", "vms", "--memory-size", "512", "--devices", string(devices))
	return filepath.Join(d.Dir, "out/package"), err
})

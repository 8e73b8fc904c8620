package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// busyboxImage makes a docker archive of the busybox of Drafter's OS.
func (s *site) busyboxImage(t *testing.T, archive string, config v1.Config) {
	t.Helper()
	root := filepath.Join(s.dir, "busybox")
	if err := os.MkdirAll(filepath.Join(root, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, s.dir, "debugfs", "-R", "dump /bin/busybox busybox/bin/busybox", filepath.Join(work, "out/blueprint/rootfs.ext4"))
	command(t, s.dir, "chmod", "755", "busybox/bin/busybox")
	for _, applet := range []string{"sh", "httpd", "id", "ping", "sleep", "hostname", "nslookup"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/nowhere", filepath.Join(root, "data")); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	command(t, s.dir, "tar", "-C", root, "--owner=0", "--group=0", "--sparse", "-cf", "layer.tar", ".")
	layer, err := tarball.LayerFromFile(filepath.Join(s.dir, "layer.tar"))
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err == nil {
		image, err = mutate.ConfigFile(image, withConfig(t, image, config))
	}
	if err == nil {
		err = tarball.WriteToFile(filepath.Join(s.dir, archive), name.MustParseReference("as-it-is:1"), image)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func withConfig(t *testing.T, image v1.Image, config v1.Config) *v1.ConfigFile {
	t.Helper()
	c, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture, c.Config = "linux", runtime.GOARCH, config
	return c
}

// What a container finds in its guest is what it finds under Docker: its user may open port 80 and
// ping, names resolve, the working directory is there. Its service is packaged once its port is
// open and its health check, in its container, succeeds.
func TestImageAsItIs(t *testing.T) {
	s := emptySite(t)
	script := `id; pwd; echo env=$A,${B-unset}; echo logged >/dev/stdout; ping -c 1 -w 5 localhost && ping -c 1 -w 5 $(hostname) && echo pinged; sleep 1; echo opening; httpd -p 80 -h / && sleep 2 && echo healthy && touch /dev/shm/ok && sleep 1000`
	s.busyboxImage(t, "image.tar", v1.Config{Cmd: []string{"/bin/sh", "-c", script}, User: "1000:1000", WorkingDir: "/srv/app/dir", Env: []string{"A=1", "A=2", "B"},
		ExposedPorts: map[string]struct{}{"80/tcp": {}}, Volumes: map[string]struct{}{"/data": {}},
		Healthcheck: &v1.HealthConfig{Test: []string{"CMD-SHELL", "test -O /dev/shm/ok && test $A = 2 && test $(pwd) = /srv/app/dir"}}})
	command(t, s.dir, "gzip", "-f", "image.tar")
	command(t, s.dir, "drafter", "blueprint", "oci", "docker-archive:image.tar.gz:as-it-is:1", "--output", "oci.ext4")
	b, err := json.Marshal(devicesWith("oci.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"snapshotter", "--netns", "ark3", "--memory-size", "256", "--chroot-base-dir", "vms", "--devices", string(b)}
	vm, err := s.Start(args...)
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Wait(); err != nil {
		t.Fatalf("%v\nconsole:\n%s", err, s.output(t, vm))
	}
	out := s.output(t, vm)
	for _, want := range []string{"uid=1000 gid=1000", "\n/srv/app/dir\n", "env=2,unset", "\nlogged\n", "\npinged\n", "\nopening\n", "\nhealthy\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("the console never showed %q:\n%s", want, out)
		}
	}

	// A port that nobody opens is named, and no package made; a program that ends is told with its
	// last words.
	s.busyboxImage(t, "image.tar", v1.Config{Entrypoint: []string{"/bin/httpd", "-f", "-p", "80"}, ExposedPorts: map[string]struct{}{"80/tcp": {}, "9999/tcp": {}}})
	command(t, s.dir, "drafter", "blueprint", "oci", "docker-archive:image.tar", "--output", "oci.ext4")
	if got := s.fails(t, append(args, "--enable-output=false", "--resume-timeout", "40s")...); !strings.Contains(got, "nothing listens on its ports 9999;") || !strings.Contains(got, "--ready-ports") {
		t.Errorf("a closed port: %s", got)
	}
	command(t, s.dir, "drafter", "blueprint", "oci", "docker-archive:image.tar", "--output", "oci.ext4", "--command", "echo last words; exit 3")
	if got := s.fails(t, append(args, "--enable-output=false")...); !strings.Contains(got, "last words") || !strings.Contains(got, "exit status 3") {
		t.Errorf("a program that ended: %s", got)
	}
}

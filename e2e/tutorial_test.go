package e2e

import (
	"io"
	"log"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// The tutorial's sections 1 to 4, with their commands: the image from a registry, blueprint and
// package through an archive each, the VM by the commands' own names, its Redis by redis-cli.
func TestTutorial(t *testing.T) {
	s := emptySite(t)
	ref := serveRedis(t)
	// 1. The OS part of the blueprint is the shared one: making it needs Debian's mirror.
	shared := filepath.Join(work, "out/blueprint")
	command(t, s.dir, "sh", "-c", "mkdir -p out/blueprint && cp "+shared+"/vmlinux "+shared+"/initrd "+shared+"/rootfs.ext4 out/blueprint/")
	command(t, s.dir, "drafter", "blueprint", "oci", "docker://"+ref, "--output", "out/blueprint/oci.ext4")
	for _, disk := range []string{"rootfs.ext4", "oci.ext4"} {
		command(t, s.dir, "e2fsck", "-fn", "out/blueprint/"+disk)
	}
	os1 := `[{"name": "kernel", "path": "out/blueprint/vmlinux"}, {"name": "initrd", "path": "out/blueprint/initrd"}, {"name": "disk", "path": "out/blueprint/rootfs.ext4"}]`
	oci := `[{"name": "oci", "path": "out/blueprint/oci.ext4"}]`
	command(t, s.dir, "drafter-packager", "--package-path", "out/drafteros-oci.tar.zst", "--devices", os1)
	command(t, s.dir, "drafter-packager", "--package-path", "out/oci-valkey.tar.zst", "--devices", oci)
	made := sums(t, filepath.Join(s.dir, "out/blueprint"))
	command(t, s.dir, "rm", "-r", "out/blueprint")
	command(t, s.dir, "drafter-packager", "--package-path", "out/drafteros-oci.tar.zst", "--extract", "--devices", os1)
	command(t, s.dir, "drafter-packager", "--package-path", "out/oci-valkey.tar.zst", "--extract", "--devices", oci)
	if got := sums(t, filepath.Join(s.dir, "out/blueprint")); got != made {
		t.Errorf("extracted:\n%s\nmade:\n%s", got, made)
	}
	// An archive is an ordinary one.
	if got := command(t, s.dir, "sh", "-c", "zstd -dc out/oci-valkey.tar.zst | tar t"); !strings.Contains(got, "oci") {
		t.Errorf("tar lists %q", got)
	}

	// 2.
	command(t, s.dir, "drafter-snapshotter", "--netns", "ark0", "--devices", `[
  {"name": "state", "output": "out/package/state.bin"},
  {"name": "memory", "output": "out/package/memory.bin"},
  {"name": "kernel", "input": "out/blueprint/vmlinux", "output": "out/package/vmlinux"},
  {"name": "disk", "input": "out/blueprint/rootfs.ext4", "output": "out/package/rootfs.ext4"},
  {"name": "config", "output": "out/package/config.json"},
  {"name": "oci", "input": "out/blueprint/oci.ext4", "output": "out/package/oci.ext4"}
]`)
	if got := command(t, s.dir, "ls", "out/package"); got != "config.json\nmemory.bin\noci.ext4\nrootfs.ext4\nstate.bin\nvmlinux\n" {
		t.Errorf("the package has %q", got)
	}
	pkg := `[
  {"name": "state", "path": "out/package/state.bin"},
  {"name": "memory", "path": "out/package/memory.bin"},
  {"name": "kernel", "path": "out/package/vmlinux"},
  {"name": "disk", "path": "out/package/rootfs.ext4"},
  {"name": "config", "path": "out/package/config.json"},
  {"name": "oci", "path": "out/package/oci.ext4"}
]`
	command(t, s.dir, "drafter-packager", "--package-path", "out/valkey.tar.zst", "--devices", pkg)
	made = sums(t, s.pkg)
	command(t, s.dir, "rm", "-r", "out/package")
	command(t, s.dir, "drafter-packager", "--package-path", "out/valkey.tar.zst", "--extract", "--devices", pkg)
	if got := sums(t, s.pkg); got != made {
		t.Errorf("extracted:\n%s\nmade:\n%s", got, made)
	}

	// 3. and 4., twice: what is written in the first run is there in the second.
	for round := range 2 {
		vm, err := s.Start("runner", "--netns", "ark0", "--devices", pkg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := vm.Await(t.Context(), "Resumed VM"); err != nil {
			t.Fatal(err)
		}
		f, err := s.Start("forwarder", "--port-forwards", `[{"netns": "ark0", "internalPort": "6379", "protocol": "tcp", "externalAddr": "127.0.0.1:3333"}]`)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Await(t.Context(), "Forwarding"); err != nil {
			t.Fatal(err)
		}
		if round == 0 {
			command(t, s.dir, "redis-cli", "-u", "redis://127.0.0.1:3333/0", "set", "greeting", "hello")
		} else if got := command(t, s.dir, "redis-cli", "-u", "redis://127.0.0.1:3333/0", "get", "greeting"); got != "hello\n" {
			t.Errorf("after the resume: %q", got)
		}
		for _, service := range []interface {
			Signal(syscall.Signal) error
			Wait() error
		}{f, vm} {
			if err := service.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			if err := service.Wait(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// serveRedis serves the Redis image from a registry and returns its reference.
func serveRedis(t *testing.T) string {
	t.Helper()
	index, err := layout.ImageIndexFromPath(filepath.Join(work, "redis-image"))
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	image, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	ref, err := name.ParseReference(l.Addr().String() + "/valkey:latest")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

// The commands answer to their own names.
func TestNames(t *testing.T) {
	for _, name := range []string{"nat", "forwarder", "snapshotter", "packager", "runner", "peer"} {
		out, err := exec.Command("drafter-"+name, "--help").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "drafter "+name+" [flags]") || !strings.Contains(string(out), "Exit codes:") {
			t.Errorf("drafter-%s --help: %v: %s", name, err, out)
		}
	}
}

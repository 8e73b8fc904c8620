package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"drafter/internal/need"
	"drafter/internal/ocitest"
)

// A package goes to an OCI registry and comes back; an instance starts from there at once, and
// without it once all is here.
func TestArtifact(t *testing.T) {
	s := emptySite(t)
	s.Bin = filepath.Join(work, "bin/plain/drafter") // compression is ten times slower with the race detector; the tests of the package artifact have it
	c := s.redisIn(t, "ark0", redisAddr)
	pkg := filepath.Join(work, "out/package")
	ref := ocitest.Start(t) + "/vms/redis:1"
	for range 2 {
		if err := s.Run(t.Context(), os.Stderr, "push", ref, "--package", pkg); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Run(t.Context(), os.Stderr, "pull", "docker://"+ref, "--output", "fetched"); err != nil {
		t.Fatal(err)
	}
	samePackage(t, filepath.Join(s.dir, "fetched"), pkg)
	if line := s.fails(t, "pull", strings.Replace(ref, "redis", "none", 1), "--output", "none"); !strings.Contains(line, "UNKNOWN") {
		t.Error(line)
	}

	args := []string{"peer", "--laddr", "", "--chroot-base-dir", "vms", "--netns", "ark0", "--package", "docker://" + ref, "--instance"}
	start := time.Now()
	vm := s.start(t, append(args, "instance-0")...)
	if err := c.Set(t.Context(), "pulled", "yes", 0).Err(); err != nil {
		t.Fatal(err)
	}
	t.Logf("first reply after %s", time.Since(start).Round(time.Millisecond))
	if err := vm.Signal(syscall.SIGKILL); err != nil { // in the middle of the pull
		t.Fatal(err)
	}
	s.awaitKilled(t, vm)
	vm = s.start(t, append(args, "instance-1")...)
	await(t, vm, "The whole package is here and verified")
	if err := c.Set(t.Context(), "pulled", "yes", 0).Err(); err != nil {
		t.Fatal(err)
	}
	end(t, vm)
	end(t, s.start(t, append(args[:len(args)-1], "--experimental-map-private")...))
	dirs, err := filepath.Glob(filepath.Join(s.dir, "out/packages/*/memory.bin"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("%v, %v", dirs, err)
	}
	samePackage(t, filepath.Dir(dirs[0]), pkg)
}

// A registry that is gone is in nobody's way once the package is here.
func TestArtifactOffline(t *testing.T) {
	s := emptySite(t)
	s.Bin = filepath.Join(work, "bin/plain/drafter")
	c := s.redisIn(t, "ark0", redisAddr)
	args := func(ref string) []string {
		return []string{"peer", "--laddr", "", "--chroot-base-dir", "vms", "--netns", "ark0", "--package", "docker://" + ref, "--instance", "instance-0"}
	}
	var ref string
	t.Run("with the registry", func(t *testing.T) {
		ref = ocitest.Start(t) + "/vms/redis:1"
		if err := s.Run(t.Context(), os.Stderr, "push", ref, "--package", filepath.Join(work, "out/package")); err != nil {
			t.Fatal(err)
		}
		vm := s.start(t, args(ref)...)
		if err := c.Set(t.Context(), "pulled", "yes", 0).Err(); err != nil {
			t.Fatal(err)
		}
		await(t, vm, "The whole package is here and verified")
		end(t, vm)
	})
	if ref == "" {
		need.Lacks(t, "registry", "there was no registry")
	}
	vm := s.start(t, args(ref)...)
	if v, err := c.Get(t.Context(), "pulled").Result(); err != nil || v != "yes" {
		t.Errorf("%q, %v", v, err)
	}
	end(t, vm)
}

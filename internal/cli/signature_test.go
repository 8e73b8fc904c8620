package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"

	"drafter/internal/cli"
	"drafter/internal/need"
	"drafter/internal/signaturetest"
	"drafter/packager"
	"drafter/signature"
	"drafter/vmm"
)

// drafter runs a command in dir and returns its last line.
func drafter(t *testing.T, dir string, args ...string) (line string, ok bool) {
	t.Helper()
	t.Chdir(dir)
	var stderr bytes.Buffer
	code := cli.Run(t.Context(), append([]string{"drafter"}, args...), io.Discard, &stderr)
	lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
	return lines[len(lines)-1], code == 0
}

func succeeds(t *testing.T, dir string, args ...string) {
	t.Helper()
	if line, ok := drafter(t, dir, args...); !ok {
		t.Fatalf("drafter %s: %s", strings.Join(args, " "), line)
	}
}

func fails(t *testing.T, dir, want string, args ...string) {
	t.Helper()
	if line, ok := drafter(t, dir, args...); ok || !strings.HasPrefix(line, "Error: ") || !strings.Contains(line, want) {
		t.Errorf("drafter %s: %q, want an error with %q", strings.Join(args, " "), line, want)
	}
}

// devices is --devices of the package in dir.
func devices(t *testing.T, dir string) string {
	t.Helper()
	var list []packager.Device
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory, vmm.Config} {
		list = append(list, packager.Device{Name: name, Path: filepath.Join(dir, vmm.PackageFile(name))})
	}
	b, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The shell commands of docs/signing.md do what it says.
func TestSigningAsWritten(t *testing.T) {
	for _, tool := range []string{"openssl", "jq", "bash"} {
		need.Program(t, tool)
	}
	text, err := os.ReadFile("../../docs/signing.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(text), "```shell\n")
	script := func(i int) string { s, _, _ := strings.Cut(blocks[i], "```"); return s }
	p := signaturetest.New(t)
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "out"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(p.Dir, filepath.Join(dir, "out/package")); err != nil {
		t.Fatal(err)
	}
	shell := func(script string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "bash", "-euc", script)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for line := range strings.SplitSeq(script(1), "\n") {
		if args, ok := strings.CutPrefix(line, "drafter "); ok {
			succeeds(t, dir, strings.Fields(args)...)
		} else if out, err := shell(line); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	if out, err := shell(script(3)); err != nil || !strings.Contains(out, "Verified Successfully") {
		t.Errorf("openssl: %v\n%s", err, out)
	}
}

// An archive carries the signature of its package, and with a key nothing else than what was signed
// is extracted.
func TestSignedArchive(t *testing.T) {
	p := signaturetest.New(t)
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	extract := []string{"packager", "--extract", "--package-path", "a.tar.zst", "--devices", devices(t, out)}
	verified := slices.Concat(extract, []string{"--verify-key", p.Pub})
	pack := func() { succeeds(t, dir, "packager", "--package-path", "a.tar.zst", "--devices", devices(t, p.Dir)) }
	refused := func(want string) {
		t.Helper()
		fails(t, dir, want, verified...)
		if entries, err := os.ReadDir(out); err == nil && len(entries) > 0 {
			t.Errorf("left behind: %v", entries)
		}
	}
	pack()
	_, stranger := signaturetest.NewKey(t)
	fails(t, dir, "none of the keys", append(extract, "--verify-key", stranger)...)
	fails(t, dir, "--verify-key is for --extract", "packager", "--package-path", "b.tar.zst", "--devices", devices(t, p.Dir), "--verify-key", p.Pub)
	fails(t, dir, "--signature needs --verify-key", append(extract, "--signature", filepath.Join(p.Dir, signature.File))...)
	succeeds(t, dir, verified...)
	succeeds(t, dir, "verify", "--package", out, "--verify-key", p.Pub)
	if err := os.RemoveAll(out); err != nil {
		t.Fatal(err)
	}
	// A part of a package is what was signed, too.
	succeeds(t, dir, "packager", "--extract", "--package-path", "a.tar.zst", "--verify-key", p.Pub, "--devices", `[{"name":"disk","path":"part/disk"}]`)

	p.Change(t, vmm.Memory)
	pack()
	refused("device memory is not what was signed")
	stale, err := os.ReadFile(filepath.Join(p.Dir, signature.File))
	if err != nil {
		t.Fatal(err)
	}
	p.Sign(t, p.Key)
	pack()
	fails(t, dir, "device memory is not what was signed", append(verified, "--signature", write(t, filepath.Join(dir, "stale.sig"), stale))...)
	if err := os.Remove(filepath.Join(p.Dir, signature.File)); err != nil {
		t.Fatal(err)
	}
	pack()
	refused("has no signature")
	succeeds(t, dir, extract...)

	// What others make: a signature that is too long or is none, and a link that would hand out a
	// file of the host.
	for name, content := range map[string]string{"is longer than": strings.Repeat(" ", signature.MaxSize+1), "is a signature of something else": "{}"} {
		write(t, filepath.Join(p.Dir, signature.File), []byte(content))
		list := []string{"-C", p.Dir, "--zstd", "-cf", filepath.Join(dir, "a.tar.zst"), "--transform", "s/vmlinux/kernel/;s/rootfs.ext4/disk/;s/state.bin/state/;s/memory.bin/memory/;s/config.json/config/", signature.File, "vmlinux", "rootfs.ext4", "state.bin", "memory.bin", "config.json"}
		if b, err := exec.Command("tar", list...).CombinedOutput(); err != nil {
			need.Lacks(t, "tar", fmt.Sprintf("tar: %v %s", err, b))
		}
		if err := os.RemoveAll(out); err != nil {
			t.Fatal(err)
		}
		refused(name)
		if name == "is longer than" {
			fails(t, dir, name, extract...) // nor is it read when it is not asked for
		}
	}
	if err := os.Remove(filepath.Join(p.Dir, signature.File)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(p.Dir, signature.File)); err != nil {
		t.Fatal(err)
	}
	fails(t, dir, "too many levels of symbolic links", "packager", "--package-path", "c.tar.zst", "--devices", devices(t, p.Dir))
}

func write(t *testing.T, path string, content []byte) string {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A package in an OCI registry carries its signature, and with a key nothing else than what was
// signed is fetched, whatever the registry does.
func TestSignedArtifact(t *testing.T) {
	handler := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	var evil atomic.Pointer[string] // the tag that is given for the tag 1
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if tag := evil.Load(); tag != nil && r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/manifests/1") {
			r = r.Clone(context.WithoutCancel(r.Context()))
			r.URL.Path = strings.TrimSuffix(r.URL.Path, "1") + *tag
		}
		handler.ServeHTTP(w, r)
	}))
	defer s.Close()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	repo := strings.TrimPrefix(s.URL, "http://") + "/vms/redis"
	p := signaturetest.New(t)
	dir := t.TempDir()
	push := func(tag string) { succeeds(t, dir, "push", repo+":"+tag, "--package", p.Dir) }
	push("1")
	succeeds(t, dir, "verify", "--package", "docker://"+repo+":1", "--verify-key", p.Pub)
	succeeds(t, dir, "pull", repo+":1", "--output", "one", "--verify-key", p.Pub)
	succeeds(t, dir, "verify", "--package", "one", "--verify-key", p.Pub)
	succeeds(t, dir, "pull", repo+":1", "--output", "one", "--verify-key", p.Pub) // what is there is checked again
	(&signaturetest.Package{Dir: filepath.Join(dir, "one")}).ForgeContents(t, vmm.Memory)
	fails(t, dir, "memory.bin exists, and is another one", "pull", repo+":1", "--output", "one", "--verify-key", p.Pub)
	_, stranger := signaturetest.NewKey(t)
	fails(t, dir, "none of the keys", "pull", repo+":1", "--output", "stranger", "--verify-key", stranger)

	// Another package of the same key, pulled with the signature of this one.
	signed := filepath.Join(dir, "one", signature.File)
	p.Change(t, vmm.State)
	push("stale")
	fails(t, dir, "device state is not what was signed", "pull", repo+":stale", "--output", "stale", "--verify-key", p.Pub)
	p.Sign(t, p.Key)
	push("2")
	fails(t, dir, "device state is not what was signed", "pull", repo+":2", "--output", "stale", "--verify-key", p.Pub, "--signature", signed)
	if err := os.Remove(filepath.Join(p.Dir, signature.File)); err != nil {
		t.Fatal(err)
	}
	push("unsigned")
	fails(t, dir, "has no signature", "pull", repo+":unsigned", "--output", "stale", "--verify-key", p.Pub)
	if _, err := os.Stat(filepath.Join(dir, "stale")); err == nil {
		t.Error("something of a package that was refused has been fetched")
	}
	succeeds(t, dir, "pull", repo+":unsigned", "--output", "unsigned")

	// The registry gives another manifest for the tag; once it is for the tag only, after it was
	// resolved.
	tag := "unsigned"
	evil.Store(&tag)
	fails(t, dir, "has no signature", "pull", repo+":1", "--output", "evil", "--verify-key", p.Pub)
	fails(t, dir, "has no signature", "verify", "--package", "docker://"+repo+":1", "--verify-key", p.Pub)
}

// A package is verified before a runner starts anything of it.
func TestSignedRun(t *testing.T) {
	need.Root(t) // as the runner does
	p := signaturetest.New(t)
	dir := t.TempDir()
	run := []string{"runner", "--netns", "", "--chroot-base-dir", "vms", "--devices", devices(t, p.Dir), "--verify-key", p.Pub}
	p.ForgeContents(t, vmm.State)
	fails(t, dir, "device state is not what was signed", run...)
	fails(t, dir, "device state is not what was signed", append(run, "--experimental-map-private")...)
	p.Change(t, vmm.State)
	write(t, p.Path(vmm.Config), []byte("this is not even JSON"))
	fails(t, dir, "is not what was signed", run...)
	fails(t, dir, "--verify-key", append(run, "--verify-key", "")...)
	if err := os.Remove(filepath.Join(p.Dir, signature.File)); err != nil {
		t.Fatal(err)
	}
	fails(t, dir, "has no signature", run...)
}

package blueprint

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/need"
)

// tarOf makes a tar archive of files, links ("-> target") and nothing else, in the order of names.
func tarOf(t *testing.T, files ...[2]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f[0], Size: int64(len(f[1])), Mode: 0o644}
		if target, ok := strings.CutPrefix(f[1], "-> "); ok {
			h.Typeflag, h.Linkname, h.Size, f[1] = tar.TypeSymlink, target, 0, ""
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// compressed is what the tools of these names make of b.
func compressed(t *testing.T, how string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch how {
	case "":
		return b
	case "skippable":
		return append([]byte("\x5e\x2a\x4d\x18\x03\x00\x00\x00abc"), compressed(t, "zstd", b)...)
	case "gzip":
		w = gzip.NewWriter(&out)
	case "zstd":
		w, err = zstd.NewWriter(&out)
	case "xz":
		w, err = xz.NewWriter(&out)
	case "bzip2":
		cmd := exec.Command(need.Program(t, "bzip2"), "-c")
		cmd.Stdin, cmd.Stdout = bytes.NewReader(b), &out
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	if err == nil {
		_, err = w.Write(b)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func hashOf(t *testing.T, b []byte) v1.Hash {
	t.Helper()
	h, _, err := v1.SHA256(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// commandOf opens an image, unpacks it where that is possible, and returns its command.
func commandOf(t *testing.T, ref, platform string) (string, error) {
	t.Helper()
	image, err := OpenImage(t.Context(), ImageConfig{Ref: ref, Platform: platform})
	if err != nil {
		return "", err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return "", err
	}
	if os.Geteuid() == 0 {
		err = UnpackOCI(t.Context(), image, filepath.Join(t.TempDir(), "bundle"), Limits{}, nil, nil)
	}
	return strings.Join(config.Config.Cmd, " "), err
}

// dockerArchive is what "docker save" writes: of two images that share a layer, the second's being
// a link.
func dockerArchive(t *testing.T, layers string) []byte {
	t.Helper()
	layer := tarOf(t, [2]string{"a", "x"})
	config := func(cmd string) string {
		return asJSON(t, v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, Config: v1.Config{Cmd: []string{cmd}}, RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{hashOf(t, layer)}}})
	}
	return tarOf(t, [2]string{"one.json", config("/one")}, [2]string{"two.json", config("/two")}, [2]string{"1/layer.tar", string(compressed(t, layers, layer))},
		[2]string{"2/layer.tar", "-> ../1/layer.tar"},
		[2]string{"./manifest.json", asJSON(t, []dockerEntry{
			{"one.json", []string{"one:1", "registry.example/team/one:latest"}, []string{"1/layer.tar"}},
			{"two.json", nil, []string{"2/layer.tar"}},
		})})
}

func TestDockerArchive(t *testing.T) {
	dir := t.TempDir()
	for _, how := range []string{"", "gzip", "zstd", "skippable", "xz", "bzip2"} {
		t.Run("compressed="+how, func(t *testing.T) {
			path := filepath.Join(dir, "a:b.tar"+how)
			if err := os.WriteFile(path, compressed(t, how, dockerArchive(t, how)), 0o600); err != nil {
				t.Fatal(err)
			}
			for name, want := range map[string]string{":one:1": "/one", ":docker.io/library/one:1": "/one", ":registry.example/team/one": "/one", ":@0": "/one", ":@1": "/two"} {
				if got, err := commandOf(t, "docker-archive:"+path+name, ""); err != nil || got != want {
					t.Errorf("%s is %s, %v", name, got, err)
				}
			}
			for name, want := range map[string]string{"": "name one behind a colon: one:1, @1", ":two:1": `no tag "two:1"; it has: one:1, @1`} {
				if _, err := commandOf(t, "docker-archive:"+path+name, ""); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%q: %v", name, err)
				}
			}
		})
	}
}

// A pipe can be read but once.
func TestArchiveFromPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	archive := dockerArchive(t, "")
	written := make(chan error)
	go func() { written <- os.WriteFile(path, archive, 0) }()
	if got, err := commandOf(t, "docker-archive:"+path+":one:1", ""); err != nil || got != "/one" {
		t.Errorf("got %s, %v", got, err)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
}

// What unpacks to more than is allowed is no archive to read.
func TestArchiveBomb(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bomb")
	if err := os.WriteFile(path, compressed(t, "gzip", make([]byte, 8<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenImage(t.Context(), ImageConfig{Ref: "docker-archive:" + path, MaxArchive: 1 << 20}); err == nil || !strings.Contains(err.Error(), "--max-unpacked") {
		t.Errorf("error is %v", err)
	}
}

// ociLayout is a layout in the making.
type ociLayout struct {
	t     *testing.T
	dir   string
	layer []byte
}

func newLayout(t *testing.T) *ociLayout {
	l := &ociLayout{t, t.TempDir(), nil}
	if err := os.MkdirAll(filepath.Join(l.dir, "blobs/sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	l.layer = tarOf(t, [2]string{"a", "x"})
	l.blob(string(l.layer), types.OCILayer)
	return l
}

func (l *ociLayout) blob(content string, kind types.MediaType) v1.Descriptor {
	l.t.Helper()
	h := hashOf(l.t, []byte(content))
	if err := os.WriteFile(filepath.Join(l.dir, "blobs/sha256", h.Hex), []byte(content), 0o644); err != nil {
		l.t.Fatal(err)
	}
	return v1.Descriptor{MediaType: kind, Digest: h, Size: int64(len(content))}
}

// image adds an image and returns its descriptor.
func (l *ociLayout) image(cmd, platform string) v1.Descriptor {
	l.t.Helper()
	p, err := v1.ParsePlatform(platform)
	if err != nil {
		l.t.Fatal(err)
	}
	config := v1.ConfigFile{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, Config: v1.Config{Cmd: []string{cmd}}, RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{hashOf(l.t, l.layer)}}}
	return l.blob(asJSON(l.t, v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: l.blob(asJSON(l.t, config), types.OCIConfigJSON),
		Layers: []v1.Descriptor{l.blob(string(l.layer), types.OCILayer)}}), types.OCIManifestSchema1)
}

// artifact adds what has a manifest as an image has, but is none, and returns its descriptor.
func (l *ociLayout) artifact(kind string, config, layer types.MediaType) v1.Descriptor {
	l.t.Helper()
	return l.blob(asJSON(l.t, v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: kind,
		Config: l.blob("{}", config), Layers: []v1.Descriptor{l.blob(string(l.layer), layer)}}), types.OCIManifestSchema1)
}

func (l *ociLayout) index(ds ...v1.Descriptor) v1.Descriptor {
	return l.blob(asJSON(l.t, v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: ds}), types.OCIImageIndex)
}

// write ends the layout with its index.
func (l *ociLayout) write(ds ...v1.Descriptor) {
	l.t.Helper()
	if err := os.WriteFile(filepath.Join(l.dir, "index.json"), []byte(asJSON(l.t, v1.IndexManifest{SchemaVersion: 2, Manifests: ds})), 0o644); err != nil {
		l.t.Fatal(err)
	}
}

func with(d v1.Descriptor, platform string, annotations ...string) v1.Descriptor {
	if platform != "" {
		d.Platform, _ = v1.ParsePlatform(platform)
	}
	d.Annotations = map[string]string{}
	for i := 0; i < len(annotations); i += 2 {
		d.Annotations[annotations[i]] = annotations[i+1]
	}
	return d
}

const (
	ociName        = "org.opencontainers.image.ref.name"
	containerdName = "io.containerd.image.name"
)

func TestLayout(t *testing.T) {
	for name, c := range map[string]struct {
		make                func(l *ociLayout) []v1.Descriptor
		ref, platform, want string // want is the command, or in the error if it has a space
	}{
		"whole name": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{with(l.image("/x", "linux/amd64"), "", ociName, "docker.io/library/x:1"), with(l.image("/y", "linux/amd64"), "", ociName, "y")}
		}, ":docker.io/library/x:1", "linux/amd64", "/x"},
		"short for a whole name": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{with(l.image("/x", "linux/amd64"), "", ociName, "docker.io/library/x:1")}
		}, ":x:1", "linux/amd64", "/x"},
		"name of containerd": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{with(l.image("/x", "linux/amd64"), "", containerdName, "docker.io/library/x:1", ociName, "1"), with(l.image("/y", "linux/amd64"), "", containerdName, "docker.io/library/y:1", ociName, "1")}
		}, ":docker.io/library/y:1", "linux/amd64", "/y"},
		"several": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{with(l.image("/x", "linux/amd64"), "", ociName, "a:1"), l.image("/y", "linux/amd64")}
		}, "", "linux/amd64", "several images; name one behind a colon: a:1, @1"},
		"by number": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.image("/x", "linux/amd64"), l.image("/y", "linux/amd64")}
		}, ":@1", "linux/amd64", "/y"},
		"index within index within index": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{with(l.index(l.index(l.index(with(l.image("/x", "linux/amd64"), "linux/amd64")))), "", ociName, "x:1")}
		}, ":x:1", "linux/amd64", "/x"},
		"platform of the config": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.image("/x", "linux/riscv64"), l.image("/y", "linux/amd64")}
		}, "", "x86_64", "/y"},
		"attestation": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.index(with(l.image("/no", "unknown/unknown"), "unknown/unknown"), with(l.image("/x", "linux/amd64"), "linux/amd64"))}
		}, "", "linux/amd64", "/x"},
		"no variant is the least": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.index(with(l.image("/v3", "linux/amd64"), "linux/amd64/v3"), with(l.image("/v1", "linux/amd64"), "linux/amd64"))}
		}, "", "linux/amd64", "/v1"},
		"best variant": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.index(with(l.image("/v1", "linux/amd64"), "linux/amd64"), with(l.image("/v2", "linux/amd64"), "linux/amd64/v2"), with(l.image("/v4", "linux/amd64"), "linux/amd64/v4"))}
		}, "", "linux/amd64/v3", "/v2"},
		"only a higher one": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.index(with(l.image("/v3", "linux/amd64"), "linux/amd64/v3"))}
		}, "", "linux/amd64", "/v3"},
		"too high": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.index(with(l.image("/v3", "linux/amd64/v3"), "linux/amd64/v3"))}
		}, "", "linux/amd64/v2", "only for linux/amd64/v3; choose with --platform"},
		"arm64 is v8": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.index(with(l.image("/arm", "linux/arm64"), "linux/arm64"))}
		}, "", "linux/arm64/v8", "/arm"},
		"other platforms were not stored": {func(l *ociLayout) []v1.Descriptor {
			gone := v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: hashOf(l.t, []byte("gone")), Size: 4}
			return []v1.Descriptor{l.index(gone, with(l.image("/x", "linux/amd64"), "linux/amd64"))}
		}, "", "linux/amd64", "/x"},
		"damaged": {func(l *ociLayout) []v1.Descriptor {
			d := l.image("/x", "linux/amd64")
			if err := os.WriteFile(filepath.Join(l.dir, "blobs/sha256", d.Digest.Hex), []byte("{}"), 0o644); err != nil {
				l.t.Fatal(err)
			}
			return []v1.Descriptor{d}
		}, "", "linux/amd64", "is damaged: its content is"},
		"layer that is elsewhere": {func(l *ociLayout) []v1.Descriptor {
			d := l.image("/x", "linux/amd64")
			if err := os.Remove(filepath.Join(l.dir, "blobs/sha256", hashOf(l.t, l.layer).Hex)); err != nil {
				l.t.Fatal(err)
			}
			return []v1.Descriptor{d}
		}, "", "linux/amd64", "is not in it"},
		"signature beside it": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.image("/x", "linux/amd64"), l.artifact("", types.OCIConfigJSON, "application/vnd.dev.cosign.simplesigning.v1+json")}
		}, "", "linux/amd64", "/x"},
		"bill of materials beside it": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.artifact("application/spdx+json", types.OCIEmptyJSON, "application/spdx+json"), l.image("/x", "linux/amd64")}
		}, "", "linux/amd64", "/x"},
		"chart beside it": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.image("/x", "linux/amd64"), l.artifact("", "application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.helm.chart.content.v1.tar+gzip")}
		}, "", "linux/amd64", "/x"},
		"chart": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.image("/x", "linux/amd64"), with(l.artifact("", "application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.helm.chart.content.v1.tar+gzip"), "", ociName, "c")}
		}, ":c", "linux/amd64", "but an artifact (application/vnd.cncf.helm.config.v1+json)"},
		"encrypted": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{l.artifact("", types.OCIConfigJSON, types.OCILayer+"+encrypted")}
		}, "", "linux/amd64", "layer 1 of 1 is encrypted"},
		"without its manifest": {func(l *ociLayout) []v1.Descriptor {
			return []v1.Descriptor{{MediaType: types.OCIManifestSchema1, Digest: hashOf(l.t, []byte("gone")), Size: 4}}
		}, "", "linux/amd64", "file does not exist|no such file"},
		"too many": {func(l *ociLayout) []v1.Descriptor {
			i := l.index(slices.Repeat([]v1.Descriptor{l.image("/x", "linux/amd64")}, 100)...)
			return slices.Repeat([]v1.Descriptor{i}, 100)
		}, "", "linux/amd64", "more than 1000 images"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "layer that is elsewhere" {
				need.Root(t) // who unpacks it
			}
			l := newLayout(t)
			l.write(c.make(l)...)
			packed := filepath.Join(t.TempDir(), "layout.tar.gz")
			if out, err := exec.Command("tar", "-C", l.dir, "-czf", packed, ".").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for _, ref := range []string{"oci:" + l.dir, "oci-archive:" + packed, "docker-archive:" + packed} {
				got, err := commandOf(t, ref+c.ref, c.platform)
				if strings.Contains(c.want, " ") && (err == nil || !containsOne(err.Error(), c.want)) || !strings.Contains(c.want, " ") && (err != nil || got != c.want) {
					t.Errorf("%s is %q, %v; want %q", ref, got, err, c.want)
				}
			}
		})
	}
}

// containsOne tells whether a text holds one of several, which have bars between them.
func containsOne(text, several string) bool {
	return slices.ContainsFunc(strings.Split(several, "|"), func(s string) bool { return strings.Contains(text, s) })
}

// A docker archive without one of its layers says which.
func TestDockerArchiveWithoutLayer(t *testing.T) {
	config := asJSON(t, v1.ConfigFile{RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{hashOf(t, nil)}}})
	path := filepath.Join(t.TempDir(), "a.tar")
	archive := tarOf(t, [2]string{"c.json", config}, [2]string{"manifest.json", asJSON(t, []dockerEntry{{"c.json", []string{"x:1"}, []string{"1/layer.tar"}}})})
	if err := os.WriteFile(path, archive, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := commandOf(t, "docker-archive:"+path, ""); err == nil || !strings.Contains(err.Error(), "layer 1 of 1: open 1/layer.tar") {
		t.Error(err)
	}
}

// TestDir reads what "skopeo copy … dir:" writes.
func TestDir(t *testing.T) {
	l := newLayout(t)
	d := l.image("/x", "linux/amd64")
	dir := filepath.Join(l.dir, "blobs/sha256")
	if err := os.Rename(filepath.Join(dir, d.Digest.Hex), filepath.Join(dir, "manifest.json")); err != nil {
		t.Fatal(err)
	}
	if got, err := commandOf(t, "dir:"+dir, "linux/amd64"); err != nil || got != "/x" {
		t.Errorf("got %q, %v", got, err)
	}
}

// TestTarDialects unpacks what GNU tar writes in each of its formats.
func TestTarDialects(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	long := strings.Repeat("long-name/", 15) + "caf\xe9" // 154 bytes, and no UTF-8
	if err := errors.Join(
		os.MkdirAll(filepath.Join(dir, filepath.Dir(long)), 0o755),
		os.WriteFile(filepath.Join(dir, long), []byte("long"), 0o644),
		os.WriteFile(filepath.Join(dir, "holes"), nil, 0o644), os.Truncate(filepath.Join(dir, "holes"), 3<<20),
		os.WriteFile(filepath.Join(dir, "short"), []byte("short"), 0o4755), os.Chmod(filepath.Join(dir, "short"), 0o4755|os.ModeSetuid),
		os.Symlink(long, filepath.Join(dir, "symlink")), os.Link(filepath.Join(dir, "short"), filepath.Join(dir, "short-too")),
		os.Chtimes(filepath.Join(dir, "short"), time.Unix(1, 0), time.Unix(1, 0)),
	); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"v7": {"--format=v7", "--exclude=long-name", "--exclude=symlink"}, "ustar": {"--format=ustar", "--exclude=long-name", "--exclude=symlink"}, "oldgnu": {"--format=oldgnu"}, "gnu": {"--format=gnu"}, "pax": {"--format=pax"},
		"sparse, GNU": {"--format=gnu", "--sparse"}, "sparse, oldgnu": {"--format=oldgnu", "--sparse"},
		"sparse, PAX 0.0": {"--format=pax", "--sparse", "--sparse-version=0.0"}, "sparse, PAX 0.1": {"--format=pax", "--sparse", "--sparse-version=0.1"},
		"sparse, PAX 1.0": {"--format=pax", "--sparse", "--sparse-version=1.0"}, "volume": {"--format=gnu", "--label=a-name"},
		"incremental": {"--format=gnu", "--listed-incremental=" + filepath.Join(t.TempDir(), "list")}, "absolute": {"--format=gnu", "--transform=s,^\\.,/,", "--absolute-names"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := exec.Command("tar", append(args, "--xattrs", "-c", "-C", dir, ".")...).Output()
			if err != nil {
				t.Fatal(err)
			}
			root := unpack(t, imageOf(t, runTrue, layerFile(t, out)))
			want := "holes short short-too long-name symlink"
			for _, file := range strings.Fields(want) {
				if strings.Contains(strings.Join(args, " "), "--exclude="+file) {
					continue
				}
				if file == "long-name" {
					file = long
				}
				a, err := os.ReadFile(filepath.Join(dir, file))
				b, err2 := os.ReadFile(filepath.Join(root, file))
				if err != nil || err2 != nil || !bytes.Equal(a, b) {
					t.Errorf("%.20q differs: %v, %v", file, err, err2)
				}
			}
			var st, linked unix.Stat_t
			if err := errors.Join(unix.Stat(filepath.Join(root, "short"), &st), unix.Stat(filepath.Join(root, "short-too"), &linked)); err != nil || st.Mode&0o7777 != 0o4755 || st.Ino != linked.Ino || st.Mtim.Sec != 1 {
				t.Errorf("a file is %o, %d and %d, of %d, %v", st.Mode, st.Ino, linked.Ino, st.Mtim.Sec, err)
			}
		})
	}
}

// TestWhiteouts has layers in which removals and what replaces what they remove come in any order.
func TestWhiteouts(t *testing.T) {
	need.Root(t)
	lower := layerOf(t, directory("dir"), file("dir/old", "old"), directory("dir/sub"), file("dir/sub/old", "old"), file("file", "old"), file("linked", "content"))
	for name, c := range map[string]struct {
		layer []entry
		there map[string]string // and their contents
		gone  []string
	}{
		"before":          {[]entry{file(".wh.dir", ""), directory("dir"), file("dir/new", "new")}, map[string]string{"dir/new": "new"}, []string{"dir/old", "dir/sub"}},
		"behind":          {[]entry{directory("dir"), file("dir/new", "new"), file(".wh.dir", "")}, map[string]string{"dir/new": "new"}, []string{"dir/old", "dir/sub"}},
		"file, before":    {[]entry{file(".wh.file", ""), file("file", "new")}, map[string]string{"file": "new"}, nil},
		"file, behind":    {[]entry{file("file", "new"), file(".wh.file", "")}, map[string]string{"file": "new"}, nil},
		"opaque, behind":  {[]entry{directory("dir"), file("dir/new", "new"), file("dir/.wh..wh..opq", "")}, map[string]string{"dir/new": "new"}, []string{"dir/old", "dir/sub"}},
		"implied, behind": {[]entry{file("dir/new", "new"), file("dir/sub/new", "new"), file(".wh.dir", "")}, map[string]string{"dir/new": "new", "dir/sub/new": "new"}, []string{"dir/old", "dir/sub/old"}},
		"implied, opaque": {[]entry{file("dir/sub/new", "new"), file("dir/.wh..wh..opq", "")}, map[string]string{"dir/sub/new": "new"}, []string{"dir/old", "dir/sub/old"}},
		"implied, all":    {[]entry{file("dir/sub/new", "new"), file(".wh..wh..opq", "")}, map[string]string{"dir/sub/new": "new"}, []string{"dir/old", "dir/sub/old", "file"}},
		"of nothing":      {[]entry{file("dir/.wh.absent", ""), file("absent/.wh.absent", "")}, map[string]string{"dir/old": "old"}, nil},
		"link downwards":  {[]entry{{tar.Header{Typeflag: tar.TypeLink, Name: "again", Linkname: "linked"}, ""}, {tar.Header{Typeflag: tar.TypeLink, Name: "dir/too", Linkname: "/linked"}, ""}}, map[string]string{"again": "content", "dir/too": "content", "linked": "content"}, nil},
		"dir for symlink": {[]entry{file(".wh.dir", ""), symlink("dir", "elsewhere")}, nil, []string{"dir/old"}},
	} {
		t.Run(name, func(t *testing.T) {
			root := unpack(t, imageOf(t, runTrue, lower, layerOf(t, c.layer...)))
			for file, want := range c.there {
				if b, err := os.ReadFile(filepath.Join(root, file)); err != nil || string(b) != want {
					t.Errorf("%s is %q, %v", file, b, err)
				}
			}
			for _, file := range c.gone {
				if _, err := os.Lstat(filepath.Join(root, file)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is there, %v", file, err)
				}
			}
		})
	}
}

// A whiteout that names nothing would remove the directory that it is in.
func TestWhiteoutOfNoFile(t *testing.T) {
	need.Root(t)
	for _, name := range []string{"dir/.wh.", "dir/.wh..", "dir/.wh...", ".wh."} {
		image := imageOf(t, runTrue, layerOf(t, directory("dir"), file("dir/old", "old")), layerOf(t, file(name, "")))
		err := UnpackOCI(t.Context(), image, filepath.Join(t.TempDir(), "bundle"), Limits{}, nil, nil)
		if err == nil || !strings.Contains(err.Error(), "removes no file") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFields converts image configs with fields as people write them.
func TestFields(t *testing.T) {
	need.Root(t)
	root := unpack(t, imageOf(t, runTrue, layerOf(t,
		symlink("data", "/nowhere/deep"), symlink("hop", "data"), symlink("relative", "../up/made"), file("plain", "x"), symlink("loop", "loop"),
		directory("sbin"), directory("lib"), directory("lib/systemd"), file("lib/systemd/systemd", ""), symlink("sbin/init", "/lib/systemd/systemd"),
		directory("other"), file("other/init", "x"))))
	spec, err := runtimeSpec(&v1.ConfigFile{Config: v1.Config{
		Cmd: []string{"x"}, WorkingDir: "relative/is/made", StopSignal: "sigrtmin+3",
		Env:          []string{"A=1", "NOVALUE", "A=2", "HOME", "=odd", "EMPTY=", "PATH=/p=q"},
		Volumes:      map[string]struct{}{"/hop": {}, "/plain": {}, "/relative": {}, "": {}},
		ExposedPorts: map[string]struct{}{"80": {}, "53/udp": {}, "8000-8002/tcp": {}, "junk": {}},
		Labels:       map[string]string{"run.oci.handler": "wasm", "maintainer": "me"},
		Healthcheck:  &v1.HealthConfig{Test: []string{"CMD-SHELL", "x | y"}, Timeout: time.Second}, Shell: []string{"/bin/ash", "-c"}, OnBuild: []string{"RUN x"}, ArgsEscaped: true,
	}}, root, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(spec.Process.Env, " "), "PATH=/p=q HOSTNAME=drafter A=2 EMPTY="; got != want {
		t.Errorf("environment is %q; want %q", got, want)
	}
	if spec.Process.Cwd != "/relative/is/made" {
		t.Errorf("working directory is %s", spec.Process.Cwd)
	}
	for _, dir := range []string{"nowhere/deep", "up/made/is/made"} {
		if info, err := os.Stat(filepath.Join(root, dir)); err != nil || !info.IsDir() {
			t.Errorf("%s: %v", dir, err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(root, "plain")); err != nil || string(b) != "x" {
		t.Errorf("a file that is a volume is %q, %v", b, err)
	}
	want := map[string]string{"maintainer": "me", "drafter.healthcheck": `{"args":["/bin/ash","-c","x | y"],"timeout":1000000000}`, "org.opencontainers.image.exposedPorts": "53/udp,80,8000-8002/tcp", "org.opencontainers.image.stopSignal": "sigrtmin+3"}
	if fmt.Sprint(spec.Annotations) != fmt.Sprint(want) {
		t.Errorf("annotations are %v; want %v", spec.Annotations, want)
	}
	for _, file := range []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"} {
		if !strings.Contains(fmt.Sprint(spec.Mounts), file) {
			t.Errorf("%s is not mounted", file)
		}
	}
	for _, config := range []v1.Config{
		{Cmd: []string{"init"}},
		{Cmd: []string{"init"}, Env: []string{"PATH=/bin:/sbin"}},
		{Entrypoint: []string{"/entrypoint", "-x"}, Cmd: []string{"/sbin/init"}},
	} {
		if _, err := runtimeSpec(&v1.ConfigFile{Config: config}, root, nil); err == nil || !strings.Contains(err.Error(), "starts systemd") {
			t.Errorf("%v: %v", config, err)
		}
	}
	for _, config := range []v1.Config{
		{Cmd: []string{"init"}, Env: []string{"PATH=/other:/sbin"}},
		{Cmd: []string{"/bin/ls", "/lib/systemd", "lib/systemd/systemd"}},
	} {
		if _, err := runtimeSpec(&v1.ConfigFile{Config: config}, root, nil); err != nil {
			t.Errorf("%v: %v", config, err)
		}
	}
	for text, config := range map[string]v1.Config{
		"name one with --command":                {Entrypoint: []string{""}},
		"create working directory /plain/x":      {Cmd: []string{"x"}, WorkingDir: "/plain/x"},
		"create volume /loop":                    {Cmd: []string{"x"}, Volumes: map[string]struct{}{"/loop": {}}},
		"name the service to run with --command": {Entrypoint: []string{"/sbin/init"}},
	} {
		if _, err := runtimeSpec(&v1.ConfigFile{Config: config}, root, nil); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%v: %v; want %q", config, err, text)
		}
	}
}

// An entrypoint that was taken away leaves the command.
func TestEmptyEntrypoint(t *testing.T) {
	for name, c := range map[string]struct {
		config v1.Config
		want   string
	}{
		"taken away":    {v1.Config{Entrypoint: []string{""}, Cmd: []string{"a", ""}}, `["a" ""]`},
		"none":          {v1.Config{Entrypoint: []string{}, Cmd: []string{"a"}}, `["a"]`},
		"nothing":       {v1.Config{Entrypoint: []string{""}}, "[]"},
		"empty command": {v1.Config{Cmd: []string{""}}, "[]"},
		"an argument":   {v1.Config{Entrypoint: []string{"a", ""}, Cmd: []string{"b"}}, `["a" "" "b"]`},
	} {
		if args, err := command(c.config); fmt.Sprintf("%q", args) != c.want || (err == nil) != (c.want != "[]") {
			t.Errorf("%s: %q, %v", name, args, err)
		}
	}
}

// An image without a command is refused before anything is made, and the remedy works.
func TestCommand(t *testing.T) {
	need.Root(t)
	parent := t.TempDir()
	image := imageOf(t, v1.Config{Shell: []string{"/bin/bash", "-lc"}}, layerOf(t, file("a", "x")))
	dir := filepath.Join(parent, "deep", "bundle")
	if err := UnpackOCI(t.Context(), image, dir, Limits{}, nil, nil); err == nil || !strings.Contains(err.Error(), "--command") {
		t.Errorf("error is %v", err)
	}
	if entries, err := os.ReadDir(parent); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	for command, want := range map[string]string{`["/a", "b c"]`: `["/a","b c"]`, "a 'b c'": `["/bin/bash","-lc","a 'b c'"]`} {
		with, err := WithCommand(image, command)
		if err == nil {
			err = UnpackOCI(t.Context(), with, filepath.Join(t.TempDir(), "bundle"), Limits{}, nil, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		config, err := with.ConfigFile()
		if err != nil || asJSON(t, config.Config.Entrypoint) != want {
			t.Errorf("%s is %v, %v", command, config, err)
		}
	}
	if _, err := WithCommand(image, "[1]"); err == nil {
		t.Error("a number is a command")
	}
}

// A file system that is full is named, with its size and the remedy, wherever it fills.
func TestNoRoom(t *testing.T) {
	need.Root(t)
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		need.Lacks(t, "mounts", err)
	}
	defer func() {
		if err := unix.Unmount(small, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	image := imageOf(t, runTrue, layerOf(t, file("blob", strings.Repeat("x", 4<<20))))
	archive := filepath.Join(t.TempDir(), "a.tar.gz")
	if err := os.WriteFile(archive, compressed(t, "gzip", make([]byte, 4<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", small)
	output := filepath.Join(t.TempDir(), "oci.ext4")
	for want, do := range map[string]func() error{
		"set TMPDIR": func() error { return BuildOCI(t.Context(), image, Limits{}, Ext4Config{Output: output}) },
		"TMPDIR to": func() error {
			_, err := OpenImage(t.Context(), ImageConfig{Ref: "docker-archive:" + archive})
			return err
		},
		"name another --output": func() error { return UnpackOCI(t.Context(), image, filepath.Join(small, "bundle"), Limits{}, nil, nil) },
	} {
		err := do()
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), small+" (1.0 MiB, ") || !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: %v", want, err)
		}
	}
	t.Setenv("TMPDIR", t.TempDir())
	if err := BuildOCI(t.Context(), image, Limits{}, Ext4Config{Output: filepath.Join(small, "oci.ext4")}); err == nil || !strings.Contains(err.Error(), "no more room in "+small) || !strings.Contains(err.Error(), "--output") {
		t.Errorf("output: %v", err)
	}
	if entries, err := os.ReadDir(small); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// Who finds a cache in use waits for it, and no longer than it is wanted.
func TestSharedCache(t *testing.T) {
	dir := t.TempDir()
	lock, err := lockfile.Try(filepath.Join(dir, "drafter.lock"))
	if err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lockCache(gone, dir, nil); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "in use by process") {
		t.Errorf("error is %v", err)
	}
	got := make(chan error)
	go func() {
		second, err := lockCache(t.Context(), dir, nil)
		if err == nil {
			err = second.Release()
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("two have the cache, or %v", err)
	case <-time.After(3 * lockPause):
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

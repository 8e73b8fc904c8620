package blueprint

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

type entry struct {
	tar.Header
	content string
}

func file(name, content string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, content}
}

func directory(name string) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, ""}
}

func symlink(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func layerOf(t *testing.T, entries ...entry) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.content))
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func imageOf(t *testing.T, config v1.Config, layers ...v1.Layer) v1.Image {
	t.Helper()
	image, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	c, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture, c.Config = "linux", runtime.GOARCH, config
	if image, err = mutate.ConfigFile(image, c); err != nil {
		t.Fatal(err)
	}
	return image
}

var runTrue = v1.Config{Cmd: []string{"/bin/true"}}

func unpack(t *testing.T, image v1.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "bundle")
	if err := UnpackOCI(context.Background(), image, dir, Limits{}, nil, nil); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "rootfs")
}

func TestLayers(t *testing.T) {
	need.Root(t)
	root := unpack(t, imageOf(t, runTrue,
		layerOf(t,
			directory("etc"), file("etc/removed", "x"), file("etc/kept", "old"),
			directory("opaque"), file("opaque/below", "x"), directory("opaque/sub"), file("opaque/sub/below", "x"),
			file("original", "linked"), entry{tar.Header{Typeflag: tar.TypeLink, Name: "hardlink", Linkname: "original"}, ""},
			entry{tar.Header{Typeflag: tar.TypeReg, Name: "setuid", Mode: 0o4755, Uid: 1234, Gid: 5678}, "x"},
			entry{tar.Header{Typeflag: tar.TypeReg, Name: "attributes", Mode: 0o644, PAXRecords: map[string]string{
				"SCHILY.xattr.user.colour": "blue", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
			}}, "x"},
			entry{tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}, ""},
			entry{tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600}, ""},
			directory("becomes-file"), file("becomes-file/x", "x"),
			file("becomes-directory", "x"),
		),
		layerOf(t,
			file("etc/.wh.removed", ""), file("etc/kept", "new"),
			file("opaque/.wh..wh..opq", ""), file("opaque/above", "x"),
			file("becomes-file", "file"),
			directory("becomes-directory"), file("becomes-directory/x", "x"),
		),
	))
	absent := func(name string) {
		t.Helper()
		if _, err := os.Lstat(filepath.Join(root, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there, %v", name, err)
		}
	}
	content := func(name, want string) {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(b) != want {
			t.Errorf("%s is %q, %v; want %q", name, b, err, want)
		}
	}
	stat := func(name string) (st syscall.Stat_t) {
		t.Helper()
		if err := syscall.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	absent("etc/removed")
	absent("etc/.wh.removed")
	absent("opaque/below")
	absent("opaque/sub")
	absent("opaque/.wh..wh..opq")
	content("etc/kept", "new")
	content("opaque/above", "x")
	content("becomes-file", "file")
	content("becomes-directory/x", "x")
	content("hardlink", "linked")
	if stat("original").Ino != stat("hardlink").Ino {
		t.Error("a hard link became a copy")
	}
	if st := stat("setuid"); st.Uid != 1234 || st.Gid != 5678 || st.Mode&0o7777 != 0o4755 {
		t.Errorf("setuid is %d:%d %o", st.Uid, st.Gid, st.Mode)
	}
	if st := stat("null"); st.Mode&syscall.S_IFMT != syscall.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("null is %o %x", st.Mode, st.Rdev)
	}
	if st := stat("fifo"); st.Mode&syscall.S_IFMT != syscall.S_IFIFO {
		t.Errorf("fifo is %o", st.Mode)
	}
	buf := make([]byte, 100)
	for name, want := range map[string]int{"user.colour": 4, "security.capability": 20} {
		if n, err := unix.Lgetxattr(filepath.Join(root, "attributes"), name, buf); err != nil || n != want {
			t.Errorf("attribute %s has %d bytes, %v; want %d", name, n, err, want)
		}
	}
}

// TestLayersStayInside unpacks layers that try to write elsewhere.
func TestLayersStayInside(t *testing.T) {
	need.Root(t)
	outside := t.TempDir()
	victim := filepath.Join(outside, "victim")
	if err := os.WriteFile(victim, []byte("untouched"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, layers := range map[string][]v1.Layer{
		"dots":              {layerOf(t, file("../../../../../../../../.."+victim, "evil"))},
		"absolute":          {layerOf(t, file(victim, "evil"))},
		"absolute symlink":  {layerOf(t, symlink("link", outside)), layerOf(t, file("link/victim", "evil"))},
		"relative symlink":  {layerOf(t, symlink("link", "../../../../../../../../../.."+outside), file("link/victim", "evil"))},
		"symlink as file":   {layerOf(t, symlink("link", victim)), layerOf(t, file("link", "evil"))},
		"hard link":         {layerOf(t, entry{tar.Header{Typeflag: tar.TypeLink, Name: "link", Linkname: "../../../../../../.." + victim}, ""}, file("link", "evil"))},
		"hard link by path": {layerOf(t, symlink("dir", outside), entry{tar.Header{Typeflag: tar.TypeLink, Name: "link", Linkname: "dir/victim"}, ""}, file("link", "evil"))},
		"whiteout":          {layerOf(t, symlink("link", outside)), layerOf(t, file("link/.wh.victim", ""))},
		"opaque":            {layerOf(t, symlink("link", outside)), layerOf(t, file("link/.wh..wh..opq", ""))},
	} {
		t.Run(name, func(t *testing.T) {
			// Refusing the layer and keeping it inside are both fine.
			if err := UnpackOCI(context.Background(), imageOf(t, runTrue, layers...), filepath.Join(t.TempDir(), "bundle"), Limits{}, nil, nil); err != nil {
				t.Logf("refused: %v", err)
			}
			entries, err := os.ReadDir(outside)
			if err != nil || len(entries) != 1 {
				t.Errorf("outside are %v, %v", entries, err)
			}
			if b, err := os.ReadFile(victim); err != nil || string(b) != "untouched" {
				t.Errorf("a file outside is now %q, %v", b, err)
			}
		})
	}
}

func TestRuntimeSpec(t *testing.T) {
	need.Root(t)
	root := unpack(t, imageOf(t, runTrue, layerOf(t, directory("etc"),
		file("etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n"),
		file("etc/group", "root:x:0:\napp:x:1001:\nextra:x:2000:app\n"))))
	convert := func(c v1.Config) (string, error) {
		spec, err := runtimeSpec(&v1.ConfigFile{Config: c}, root, nil)
		if err != nil {
			return "", err
		}
		p := spec.Process
		return strings.Join([]string{
			strings.Join(p.Args, " "), p.Cwd, strings.Join(p.Env, " "), spec.Annotations["org.opencontainers.image.stopSignal"], spec.Annotations["org.opencontainers.image.exposedPorts"],
		}, "|"), nil
	}
	got, err := convert(v1.Config{
		Entrypoint: []string{"/entry"}, Cmd: []string{"a", "b"}, Env: []string{"PATH=/bin", "K=v"}, WorkingDir: "/work", User: "app",
		StopSignal: "SIGINT", ExposedPorts: map[string]struct{}{"80/tcp": {}, "53/udp": {}}, Volumes: map[string]struct{}{"/var/data": {}},
	})
	if want := "/entry a b|/work|PATH=/bin HOSTNAME=drafter HOME=/home/app K=v|SIGINT|53/udp,80/tcp"; err != nil || got != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if info, err := os.Stat(filepath.Join(root, "var/data")); err != nil || !info.IsDir() {
		t.Errorf("the volume's directory: %v", err)
	}
	for user, want := range map[string][3]uint32{
		"": {0, 0, 0}, "app": {1000, 1001, 1}, "1000": {1000, 1001, 1}, "app:extra": {1000, 2000, 0}, "4242:17": {4242, 17, 0}, "4242": {4242, 0, 0},
	} {
		spec, err := runtimeSpec(&v1.ConfigFile{Config: v1.Config{User: user, Cmd: []string{"x"}}}, root, nil)
		if err != nil {
			t.Errorf("user %q: %v", user, err)
			continue
		}
		u := spec.Process.User
		if got := [3]uint32{u.UID, u.GID, uint32(len(u.AdditionalGids))}; got != want {
			t.Errorf("user %q is %v; want %v", user, got, want)
		}
	}
	for _, user := range []string{"nobody-here", "app:no-group", "-1", "root:x:y"} {
		if _, err := convert(v1.Config{User: user, Cmd: []string{"x"}}); err == nil {
			t.Errorf("user %q was found", user)
		}
	}
	if _, err := convert(v1.Config{}); err == nil || !strings.Contains(err.Error(), "neither an entrypoint nor a command") {
		t.Errorf("no command: %v", err)
	}
}

// TestAbsoluteSymlinks converts images whose passwd and volume lie behind absolute links, which
// mean the image's root, not the host's.
func TestAbsoluteSymlinks(t *testing.T) {
	need.Root(t)
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "passwd"), []byte("host:x:7:7::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	root := unpack(t, imageOf(t, runTrue, layerOf(t,
		directory("etc"), symlink("etc/passwd", outside+"/passwd"), directory(outside[1:]), file(outside[1:]+"/passwd", "guest:x:8:8::/:/bin/sh\n"),
		directory("var"), symlink("var/run", "/run"), directory("run"), symlink("up", "../../../../.."))))
	spec, err := runtimeSpec(&v1.ConfigFile{Config: v1.Config{User: "guest", Cmd: []string{"x"}, Volumes: map[string]struct{}{
		"/var/run/app/data": {}, "/up/made-at-root": {}, "../../also-at-root": {},
	}}}, root, nil)
	if err != nil || spec.Process.User.UID != 8 {
		t.Errorf("the image's user is %v, %v", spec, err)
	}
	for _, dir := range []string{"run/app/data", "made-at-root", "also-at-root"} {
		if info, err := os.Stat(filepath.Join(root, dir)); err != nil || !info.IsDir() {
			t.Errorf("%s: %v", dir, err)
		}
	}
	if _, err := runtimeSpec(&v1.ConfigFile{Config: v1.Config{User: "host", Cmd: []string{"x"}}}, root, nil); err == nil {
		t.Error("the host's passwd was read")
	}
}

func TestPackOCI(t *testing.T) {
	need.Root(t)
	image := imageOf(t, runTrue, layerOf(t, file("a", strings.Repeat("data", 1000)),
		entry{tar.Header{Typeflag: tar.TypeReg, Name: "owned", Mode: 0o640, Uid: 12, Gid: 34, PAXRecords: map[string]string{"SCHILY.xattr.user.k": "v"}}, "x"}))
	output := filepath.Join(t.TempDir(), "oci.ext4")
	steps := map[string]int64{}
	err := BuildOCI(context.Background(), image, Limits{}, Ext4Config{Output: output, Progress: func(step string, done, total int64) { steps[step] = total - done }})
	if err != nil {
		t.Fatal(err)
	}
	if len(steps) == 0 {
		t.Error("no progress")
	}
	for step, left := range steps {
		if left != 0 {
			t.Errorf("step %q ends %d before its total", step, left)
		}
	}
	fsck(t, output)
	for command, want := range map[string]string{
		"stat /rootfs/owned":          "User:    12   Group:    34",
		"ea_get /rootfs/owned user.k": `"v"`,
		"cat /config.json":            `"/bin/true"`,
	} {
		out, err := exec.Command("debugfs", "-R", command, output).Output()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("debugfs %s: %q, %v; want %q", command, out, err, want)
		}
	}
	if err := BuildOCI(context.Background(), image, Limits{}, Ext4Config{Output: output, Size: 1 << 20}); err == nil || !strings.Contains(err.Error(), "pass a larger --size") {
		t.Errorf("a disk too small: %v", err)
	}
	if err := PackOCI(context.Background(), Ext4Config{Source: t.TempDir(), Output: output}); err == nil || !strings.Contains(err.Error(), "no OCI bundle") {
		t.Errorf("no bundle: %v", err)
	}
	fsck(t, output) // still the old one
	if _, err := os.Stat(output + ".partial"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a partial file stays: %v", err)
	}
}

func fsck(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck -fn: %v: %s", err, out)
	}
}

func TestUnpackNotEmpty(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mine"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	err := UnpackOCI(context.Background(), imageOf(t, runTrue), dir, Limits{}, nil, nil)
	if err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("error is %v", err)
	}
}

// TestDamagedLayer changes a layer behind its digest.
func TestDamagedLayer(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	image := imageOf(t, runTrue, layerOf(t, file("a", strings.Repeat("data", 10000))))
	if err := path.AppendImage(image); err != nil {
		t.Fatal(err)
	}
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	other := layerOf(t, file("a", strings.Repeat("evil", 10000)))
	r, err := other.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", digest.Hex), b, 0o644); err != nil {
		t.Fatal(err)
	}
	opened, err := OpenImage(context.Background(), ImageConfig{Ref: "oci:" + dir})
	if err == nil {
		err = UnpackOCI(context.Background(), opened, filepath.Join(t.TempDir(), "bundle"), Limits{}, nil, nil)
	}
	if err == nil || !strings.Contains(err.Error(), "damaged") && !strings.Contains(err.Error(), "sha256") && !strings.Contains(err.Error(), "size") {
		t.Errorf("error is %v", err)
	}
}

func TestOpenImage(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	image := imageOf(t, runTrue, layerOf(t, file("a", "x")))
	foreign, err := mutate.ConfigFile(image, &v1.ConfigFile{OS: "linux", Architecture: "riscv64", Config: runTrue})
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}},
		mutate.IndexAddendum{Add: foreign, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "riscv64"}}})
	onlyForeign := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: foreign, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "riscv64"}}})

	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	at := strings.TrimPrefix(server.URL, "http://")
	push := func(tag string, do func(name.Reference) error) {
		t.Helper()
		ref, err := name.ParseReference(at + "/app:" + tag)
		if err == nil {
			err = do(ref)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	push("image", func(r name.Reference) error { return remote.Write(r, image) })
	push("foreign", func(r name.Reference) error { return remote.Write(r, foreign) })
	push("index", func(r name.Reference) error { return remote.WriteIndex(r, index) })
	push("only-foreign", func(r name.Reference) error { return remote.WriteIndex(r, onlyForeign) })

	path, err := layout.Write(filepath.Join(dir, "layout"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for tag, add := range map[string]func(...layout.Option) error{
		"one": func(o ...layout.Option) error { return path.AppendImage(image, o...) },
		"all": func(o ...layout.Option) error { return path.AppendIndex(index, o...) },
	} {
		if err := add(layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": tag})); err != nil {
			t.Fatal(err)
		}
	}
	archive := filepath.Join(dir, "image.tar")
	tag, err := name.NewTag("app:latest")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(archive, tag, image); err != nil {
		t.Fatal(err)
	}

	for _, tt := range []struct{ ref, platform, wantErr string }{
		{"docker://" + at + "/app:image", "", ""},
		{"docker://" + at + "/app:index", "", ""},
		{"docker://" + at + "/app:index", "linux/riscv64", ""},
		{"docker://" + at + "/app:foreign", "linux/riscv64", ""},
		{"oci:" + dir + "/layout:one", "", ""},
		{"oci:" + dir + "/layout:all", "linux/riscv64", ""},
		{"docker-archive:" + archive, "", ""},
		{"docker://" + at + "/app:foreign", "", "is for linux/riscv64, not for linux/" + runtime.GOARCH},
		{"docker://" + at + "/app:only-foreign", "", "only for linux/riscv64; choose with --platform"},
		{"docker://" + at + "/app:index", "linux/s390x", "not there for linux/s390x"},
		{"docker://" + at + "/absent", "", "reach registry " + at},
		{"docker://127.0.0.1:1/app", "", "connection refused"},
		{"docker://UPPER/case", "", "image docker://UPPER/case"},
		{"oci:" + dir + "/layout:none", "", `no tag "none"; it has: `},
		{"oci:" + dir + "/layout", "", "several images"},
		{"oci:" + dir + "/absent", "", "no such file"},
		{"docker-archive:" + dir + "/absent", "", "no such file"},
		{"docker-archive:/dev/null", "", "image docker-archive:/dev/null"},
		{"redis:latest", "", "unknown kind of reference"},
		{"oci:" + dir + "/layout:one", "a/b/c/d/e", "platform"},
	} {
		_, err := OpenImage(ctx, ImageConfig{Ref: tt.ref, Platform: tt.platform})
		if (err == nil) != (tt.wantErr == "") || err != nil && !strings.Contains(err.Error(), tt.wantErr) {
			t.Errorf("%s for %q: error is %v; want %q", tt.ref, tt.platform, err, tt.wantErr)
		}
	}
}

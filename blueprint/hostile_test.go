package blueprint

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

	"drafter/internal/bombtest"
	"drafter/internal/need"
)

// open makes a directory that everybody can enter.
func open(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// asNobody runs a program as an unprivileged user.
func asNobody(args ...string) ([]byte, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	return cmd.CombinedOutput()
}

// rootKit is a layer with a setuid shell and a disk of the host's that everybody may write to.
func rootKit(t *testing.T) v1.Layer {
	t.Helper()
	shell, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	return layerOf(t, entry{tar.Header{Typeflag: tar.TypeReg, Name: "become-root", Mode: 0o6755}, string(shell)},
		entry{tar.Header{Typeflag: tar.TypeBlock, Name: "disk", Mode: 0o666, Devmajor: 7}, ""})
}

// lateLayer is a layer of which something happens once the layers before it are unpacked.
type lateLayer struct {
	v1.Layer
	then func()
}

func (l *lateLayer) Compressed() (io.ReadCloser, error) {
	l.then()
	return l.Layer.Compressed()
}

// lateImage is an image with one more layer.
type lateImage struct {
	v1.Image
	last v1.Layer
}

func (i *lateImage) Layers() ([]v1.Layer, error) {
	layers, err := i.Image.Layers()
	if len(layers) > 0 {
		layers[len(layers)-1] = i.last
	}
	return layers, err
}

// Nobody but root gets to the setuid programs and devices of an image: not while it is unpacked,
// not afterwards, and not after a failure, which leaves nothing.
func TestUnpackedIsClosed(t *testing.T) {
	need.Root(t)
	umask := syscall.Umask(0)
	defer syscall.Umask(umask)
	parent := open(t)
	dir := filepath.Join(parent, "bundle")
	closed := func(when string) {
		t.Helper()
		entries, err := os.ReadDir(parent)
		if err != nil || len(entries) != 1 {
			t.Fatalf("%s: there are %v, %v", when, entries, err)
		}
		top := filepath.Join(parent, entries[0].Name())
		if info, err := os.Stat(top); err != nil || info.Mode() != os.ModeDir|0o700 {
			t.Errorf("%s: mode %v, %v", when, info.Mode(), err)
		}
		found := false
		err = filepath.WalkDir(top, func(path string, _ os.DirEntry, err error) error {
			if filepath.Base(path) == "become-root" {
				found = true
				if out, err := asNobody(path); err == nil || !errors.Is(err, os.ErrPermission) {
					t.Errorf("%s: nobody runs a setuid program: %s, %v", when, out, err)
				}
			}
			return err
		})
		if err != nil || !found {
			t.Errorf("%s: the program is not there, or %v", when, err)
		}
	}
	image := imageOf(t, runTrue, rootKit(t), layerOf(t, file("a", "b")))
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if err := UnpackOCI(t.Context(), &lateImage{image, &lateLayer{layers[1], func() { closed("meanwhile") }}}, dir, Limits{}, nil, nil); err != nil {
		t.Fatal(err)
	}
	closed("afterwards")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	for when, image := range map[string]v1.Image{
		"after a damaged layer": &lateImage{image, layerOf(t, file("a", "another"))},
		"after an interrupt":    &lateImage{image, &lateLayer{layers[1], cancel}},
		"with no command":       imageOf(t, v1.Config{}, rootKit(t)),
	} {
		if err := UnpackOCI(ctx, image, dir, Limits{}, nil, nil); err == nil {
			t.Errorf("%s: no error", when)
		}
		if entries, err := os.ReadDir(parent); err != nil || len(entries) > 0 {
			t.Errorf("%s: left behind %v, %v", when, entries, err)
		}
	}
}

// layerFile makes a layer of a tar archive as it is.
func layerFile(t *testing.T, tar []byte) v1.Layer {
	t.Helper()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(tar)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// sparse is a tar archive of a file of size bytes without any data, in the format of GNU tar (PAX,
// version 1.0), made by tar itself.
func sparse(t *testing.T, size int64) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sparse")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("tar", "--format=pax", "--sparse", "-c", "-C", filepath.Dir(path), "sparse").Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Layers of some KB that unpack to more than is allowed are refused before they fill the disk,
// whatever the way: compression, sparse files, names.
func TestBombs(t *testing.T) {
	need.Root(t)
	limits := Limits{Bytes: 1 << 20, Files: 100}
	many := make([]entry, 101)
	for i := range many {
		many[i] = file(fmt.Sprint("f", i), "")
	}
	for name, c := range map[string]struct {
		layers []v1.Layer
		want   string
	}{
		"zeros":           {[]v1.Layer{layerOf(t, file("zeros", strings.Repeat("\x00", 2<<20)))}, "--max-unpacked"},
		"several layers":  {[]v1.Layer{layerOf(t, file("a", strings.Repeat("\x00", 600<<10))), layerOf(t, file("a", strings.Repeat("\x00", 600<<10)))}, "--max-unpacked"},
		"sparse":          {[]v1.Layer{layerFile(t, sparse(t, 1<<40))}, "--max-unpacked"},
		"behind the end":  {[]v1.Layer{layerFile(t, make([]byte, 8<<20))}, "--max-unpacked"},
		"files":           {[]v1.Layer{layerOf(t, many...)}, "--max-files"},
		"directories":     {[]v1.Layer{layerOf(t, file(strings.Repeat("d/", 101)+"f", ""))}, "--max-files"},
		"name":            {[]v1.Layer{layerOf(t, file(strings.Repeat("d", 5000), ""))}, "more than 4096 bytes"},
		"within the size": {[]v1.Layer{layerOf(t, file("a", strings.Repeat("\x00", 400<<10))), layerFile(t, sparse(t, 300<<10))}, ""},
	} {
		dir := filepath.Join(t.TempDir(), "bundle")
		start := time.Now()
		err := UnpackOCI(t.Context(), imageOf(t, runTrue, c.layers...), dir, limits, nil, nil)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v after %s", name, err, time.Since(start))
		}
		if c.want == "" {
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(dir, "rootfs/sparse"), &st); err != nil || st.Size != 300<<10 {
				t.Errorf("%s: the sparse file has %d bytes, %v", name, st.Size, err)
			}
		}
	}
}

// A registry whose image has a config of any size does not get it read.
func TestLargeConfig(t *testing.T) {
	image := imageOf(t, v1.Config{Labels: map[string]string{"a": strings.Repeat("x", maxImageConfig)}})
	if _, err := checkConfig(image); err == nil || !strings.Contains(err.Error(), "bytes") {
		t.Errorf("error is %v", err)
	}
}

// A bundle that others can change is not packed, and its config is no way to other files.
func TestPackForeign(t *testing.T) {
	need.Root(t)
	t.Setenv("SUDO_UID", "1234")
	good := `{"process":{"args":["true"]}}`
	for name, c := range map[string]struct {
		lie  func(dir string) error
		want string
	}{
		"link":               {func(d string) error { return os.Symlink("/etc/shadow", filepath.Join(d, "config.json")) }, "no OCI bundle"},
		"fifo":               {func(d string) error { return syscall.Mkfifo(filepath.Join(d, "config.json"), 0o600) }, "no regular file"},
		"another's":          {func(d string) error { return os.Chown(d, 65534, -1) }, "belongs to user 65534"},
		"another's rootfs":   {func(d string) error { return os.Chown(filepath.Join(d, "rootfs"), 65534, -1) }, "belongs to user 65534"},
		"everybody's":        {func(d string) error { return os.Chmod(d, 0o777) }, "everybody can write"},
		"everybody's rootfs": {func(d string) error { return os.Chmod(filepath.Join(d, "rootfs"), 0o777) }, "everybody can write"},
		"of who calls sudo":  {func(d string) error { return os.Chown(d, 1234, -1) }, ""},
	} {
		dir := t.TempDir()
		config := filepath.Join(dir, "config.json")
		if err := errors.Join(os.Mkdir(filepath.Join(dir, "rootfs"), 0o755), c.lie(dir)); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(config); err != nil {
			if err := os.WriteFile(config, []byte(good), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		output := filepath.Join(t.TempDir(), "disk")
		err := PackOCI(t.Context(), Ext4Config{Source: dir, Output: output})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v", name, err)
		}
		if info, err := os.Stat(output); c.want == "" && (err != nil || info.Mode() != 0o600) {
			t.Errorf("%s: the disk is %v, %v", name, info, err)
		}
	}
}

// A cache of packages that another user may write to is refused: what is in it is unpacked as root.
func TestForeignCache(t *testing.T) {
	need.Root(t)
	for name, lie := range map[string]func(dir string) error{
		"another's":   func(d string) error { return os.Chown(d, 65534, -1) },
		"everybody's": func(d string) error { return os.Chmod(d, 0o777) },
	} {
		dir := t.TempDir()
		if err := lie(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := fetchKernel(t.Context(), dir, DefaultKernel, nil); err == nil || !strings.Contains(err.Error(), "--cache") {
			t.Errorf("%s: kernel: %v", name, err)
		}
		if _, err := fetchPackages(t.Context(), dir, nil, "busybox-static"); err == nil || !strings.Contains(err.Error(), "--cache") {
			t.Errorf("%s: packages: %v", name, err)
		}
	}
}

// saved makes what 'docker save' does, with a manifest and further files of some size without data.
func saved(t *testing.T, manifest string, sizes map[string]int64, options ...string) string {
	t.Helper()
	dir := t.TempDir()
	names := []string{"manifest.json"}
	if err := os.WriteFile(filepath.Join(dir, names[0]), []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, size := range sizes {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	if err := os.Symlink("config.json", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "saved.tar")
	args := append(append(options, "--format=pax", "-cf", archive, "-C", dir, "link"), names...)
	if out, err := exec.Command("tar", args...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return archive
}

// What describes an image is read as a whole, so it is refused if it is of any other size: a file
// or an archive of some KB can hold any number of zeros.
func TestLargeDocuments(t *testing.T) {
	const size = 256 << 20
	config := map[string]int64{"config.json": size}
	image := imageOf(t, runTrue, layerOf(t, file("a", "b")))
	m, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	inLayout := func(name string) string {
		dir := t.TempDir()
		l, err := layout.Write(dir, empty.Index)
		if err == nil {
			err = errors.Join(l.AppendImage(image), os.Truncate(filepath.Join(dir, name), size))
		}
		if err != nil {
			t.Fatal(err)
		}
		return "oci:" + dir
	}
	for ref, want := range map[string]string{
		"docker-archive:" + saved(t, `[{"Config":"config.json","Layers":[]}]`, config, "--sparse"):                                           "sparse",
		"docker-archive:" + saved(t, `[{"Config":"link","Layers":[]}]`, config, "--sparse"):                                                  "sparse",
		"docker-archive:" + saved(t, `[{"Config":"config.json","Layers":["l"]}]`, map[string]int64{"config.json": 1, "l": size}, "--sparse"): "sparse",
		"docker-archive:" + saved(t, `[{"Config":"link","Layers":[]}]`, map[string]int64{"config.json": 9 << 20}):                            "of at most 8388608 bytes",
		inLayout("index.json"):                          "no regular file",
		inLayout("blobs/sha256/" + digest.Hex):          "no regular file",
		inLayout("blobs/sha256/" + m.Config.Digest.Hex): "no regular file",
	} {
		var err error
		used := bombtest.Allocated(func() { _, err = OpenImage(t.Context(), ImageConfig{Ref: ref}) })
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", ref, err)
		}
		if used > 64<<20 {
			t.Errorf("%s made us allocate %d MiB", ref, used>>20)
		}
	}
}

// An archive whose layers take for ever to read is given up with the command.
func TestArchiveInterrupted(t *testing.T) {
	need.Root(t)
	path := filepath.Join(t.TempDir(), "saved.tar")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	for name, content := range map[string]string{
		"manifest.json": `[{"Config":"config.json","Layers":["layer"]}]`,
		"config.json":   `{"config":{"Cmd":["x"]},"rootfs":{"diff_ids":["sha256:` + strings.Repeat("0", 64) + `"]}}`,
	} {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content)), Mode: 0o600}))
		_, werr := w.Write([]byte(content))
		err = errors.Join(err, werr)
	}
	const large = 1 << 40
	err = errors.Join(err, w.WriteHeader(&tar.Header{Name: "layer", Size: large, Mode: 0o600, Format: tar.FormatGNU}))
	info, serr := f.Stat()
	if err = errors.Join(err, serr); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(info.Size()+large+1024), f.Close()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	ended := make(chan error, 1)
	dir := t.TempDir()
	go func() {
		image, err := OpenImage(ctx, ImageConfig{Ref: "docker-archive:" + path})
		if err == nil {
			err = UnpackOCI(ctx, image, filepath.Join(dir, "bundle"), Limits{Bytes: large}, nil, nil)
		}
		ended <- err
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error is %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it goes on after the command was given up")
	}
}

// What an image has in place of its files of users is not opened: a FIFO would hold the command up
// for ever, and a device of the host's may act on it, as a watchdog does.
func TestUsersAreFiles(t *testing.T) {
	need.Root(t)
	for name, users := range map[string]entry{
		"fifo":   {tar.Header{Typeflag: tar.TypeFifo, Name: "etc/passwd", Mode: 0o644}, ""},
		"device": {tar.Header{Typeflag: tar.TypeChar, Name: "etc/group", Mode: 0o644, Devmajor: 1, Devminor: 5}, ""},
		"link":   {tar.Header{Typeflag: tar.TypeSymlink, Name: "etc/passwd", Linkname: "/fifo", Mode: 0o777}, ""},
	} {
		image := imageOf(t, v1.Config{Cmd: []string{"/bin/true"}},
			layerOf(t, directory("etc"), users, entry{tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o644}, ""}))
		unpacked := make(chan error, 1)
		dir := t.TempDir() + "/bundle"
		go func() { unpacked <- UnpackOCI(t.Context(), image, dir, Limits{}, nil, nil) }()
		select {
		case err := <-unpacked:
			if err == nil || !strings.Contains(err.Error(), "is no regular file") {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: unpacking is held up", name)
		}
	}
}

// FuzzLayer checks that what is let through keeps to the limits, and is a tar archive.
func FuzzLayer(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "a", Size: 1, Mode: 0o644, PAXRecords: map[string]string{"SCHILY.xattr.user.k": "v"}})); err != nil {
		f.Fatal(err)
	}
	_, _ = w.Write([]byte("x"))
	_ = w.Close()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		left := Limits{Bytes: 1 << 20, Files: 100}
		plain, err := decompressLayer(bytes.NewReader(b))
		if err != nil {
			return
		}
		defer plain.Close()
		var out bytes.Buffer
		if err := left.checkLayer(t.Context(), &out, tar.NewReader(&boundedReader{plain, 2 << 20})); err != nil {
			return
		}
		total := int64(0)
		for r := tar.NewReader(&out); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("what was let through is no archive: %v", err)
			}
			total += h.Size
		}
		if total > 1<<20 {
			t.Errorf("%d bytes were let through", total)
		}
	})
}

package packager

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"drafter/internal/need"
)

// sample makes devices with data, holes, odd sizes and nothing in them.
func sample(t *testing.T, dir string) []Device {
	t.Helper()
	random := rand.New(rand.NewPCG(1, 2))
	write := func(name string, size int64, at ...int64) Device {
		path := filepath.Join(dir, name)
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		for _, offset := range at {
			b := make([]byte, min(70_000, size-offset))
			for i := range b {
				b[i] = byte(random.Uint32())
			}
			if _, err := f.WriteAt(b, offset); err != nil {
				t.Fatal(err)
			}
		}
		return Device{Name: name, Path: path}
	}
	return []Device{
		write("memory", 16<<20, 0, 1<<20+17, 15<<20),
		write("disk", 10<<20+123, 10<<20),
		write("config", 300, 0),
		write("empty", 0),
		write("hole", 8<<20),
	}
}

func create(t *testing.T) (path string, devices []Device) {
	t.Helper()
	dir := t.TempDir()
	devices = sample(t, dir)
	path = filepath.Join(dir, "out", "app.tar.zst")
	if err := Create(context.Background(), path, devices, nil); err != nil {
		t.Fatal(err)
	}
	return path, devices
}

func sameFile(t *testing.T, a, b string) bool {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(x, y)
}

func TestRoundTrip(t *testing.T) {
	path, devices := create(t)
	dir := t.TempDir()
	var targets []Device
	for _, d := range devices {
		targets = append(targets, Device{Name: d.Name, Path: filepath.Join(dir, "new", d.Name)})
	}
	// The order of the list need not be the archive's.
	targets[0], targets[3] = targets[3], targets[0]
	if err := Extract(context.Background(), path, targets, nil, nil); err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		target := filepath.Join(dir, "new", d.Name)
		if !sameFile(t, d.Path, target) {
			t.Errorf("%s differs", d.Name)
		}
		var before, after syscall.Stat_t
		if err := errors.Join(syscall.Stat(d.Path, &before), syscall.Stat(target, &after)); err != nil {
			t.Fatal(err)
		}
		if after.Blocks > before.Blocks+64 {
			t.Errorf("%s stores %d blocks, was %d: its holes are filled", d.Name, after.Blocks, before.Blocks)
		}
	}
	entries, err := os.ReadDir(filepath.Join(dir, "new"))
	if err != nil || len(entries) != len(devices) {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// An archive may come through a pipe.
func TestPipe(t *testing.T) {
	path, devices := create(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	written := make(chan error)
	go func() {
		b, err := os.ReadFile(path)
		_, werr := w.Write(b)
		written <- errors.Join(err, werr, w.Close())
	}()
	target := filepath.Join(t.TempDir(), devices[0].Name)
	err = Extract(t.Context(), fmt.Sprintf("/dev/fd/%d", r.Fd()), []Device{{Name: devices[0].Name, Path: target}}, nil, nil)
	if err := errors.Join(err, <-written); err != nil {
		t.Fatal(err)
	}
	if !sameFile(t, devices[0].Path, target) {
		t.Error("what came through a pipe differs")
	}
}

// TestIndependentTools reads an archive with tar and zstd, and extracts one that they made.
func TestIndependentTools(t *testing.T) {
	need.Program(t, "zstd")
	path, devices := create(t)
	dir := t.TempDir()
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
	}
	run("zstd", "-t", path)
	run("tar", "--zstd", "-xf", path, "-C", dir)
	for _, d := range devices {
		if !sameFile(t, d.Path, filepath.Join(dir, d.Name)) {
			t.Errorf("tar extracts another %s", d.Name)
		}
	}
	theirs := filepath.Join(t.TempDir(), "theirs.tar.zst")
	run("tar", "--zstd", "--sparse", "-cf", theirs, "-C", dir, "memory", "disk")
	out := filepath.Join(t.TempDir(), "memory")
	if err := Extract(context.Background(), theirs, []Device{{"memory", out}}, nil, nil); err != nil {
		t.Fatal(err)
	}
	if !sameFile(t, devices[0].Path, out) {
		t.Error("an archive made by tar is extracted wrongly")
	}
}

// TestTruncated cuts an archive everywhere: nothing is extracted, and what was there stays.
func TestTruncated(t *testing.T) {
	path, _ := create(t)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cut, target := filepath.Join(dir, "cut.tar.zst"), filepath.Join(dir, "config")
	for i := range 100 {
		size := len(whole) * i / 100
		if i <= 90 && i%need.Rounds(5, 1) != 0 {
			continue
		}
		if i > 90 {
			size = len(whole) - (100 - i)
		}
		if err := errors.Join(os.WriteFile(cut, whole[:size], 0o600), os.WriteFile(target, []byte("old"), 0o600)); err != nil {
			t.Fatal(err)
		}
		if err := Extract(context.Background(), cut, []Device{{"config", target}}, nil, nil); err == nil {
			t.Fatalf("%d of %d bytes were taken for a whole archive", size, len(whole))
		}
		if b, err := os.ReadFile(target); err != nil || string(b) != "old" {
			t.Fatalf("what was there is now %q, %v", b, err)
		}
		if left, err := filepath.Glob(filepath.Join(dir, "*config?*")); err != nil || len(left) > 0 {
			t.Fatalf("a partial file stays: %v, %v", left, err)
		}
	}
	damaged := bytes.Clone(whole)
	damaged[len(damaged)/2] ^= 0x10
	if err := os.WriteFile(cut, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Extract(context.Background(), cut, []Device{{"config", target}}, nil, nil); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a flipped bit: %v", err)
	}
}

func TestHostileArchives(t *testing.T) {
	for name, tt := range map[string]struct {
		headers []tar.Header
		want    string
	}{
		"parent directory": {[]tar.Header{{Name: "../evil", Typeflag: tar.TypeReg}}, "is not valid"},
		"absolute path":    {[]tar.Header{{Name: "/etc/evil", Typeflag: tar.TypeReg}}, "is not valid"},
		"symbolic link":    {[]tar.Header{{Name: "config", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}}, "no regular file"},
		"hard link":        {[]tar.Header{{Name: "config", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}}, "no regular file"},
		"device":           {[]tar.Header{{Name: "config", Typeflag: tar.TypeBlock}}, "no regular file"},
		"twice":            {[]tar.Header{{Name: "config", Typeflag: tar.TypeReg}, {Name: "./config", Typeflag: tar.TypeReg}}, "there twice"},
		"not there":        {[]tar.Header{{Name: "kernel", Typeflag: tar.TypeReg}}, `holds no device "config"`},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			z, err := zstd.NewWriter(&b)
			if err != nil {
				t.Fatal(err)
			}
			w := tar.NewWriter(z)
			for _, h := range tt.headers {
				if err := w.WriteHeader(&h); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(w.Close(), z.Close()); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			path := filepath.Join(dir, "a.tar.zst")
			if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			err = Extract(context.Background(), path, []Device{{"config", filepath.Join(dir, "sub", "config")}}, nil, nil)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v; want one with %q", err, tt.want)
			}
			if _, err := os.Stat(filepath.Join(dir, "sub", "config")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("something was extracted: %v", err)
			}
		})
	}
}

func TestCreateFailureLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "app.tar.zst")
	for name, devices := range map[string][]Device{
		"missing":   {{"config", filepath.Join(dir, "missing")}},
		"directory": {{"config", dir}},
		"none":      nil,
		"twice":     {{"config", "a"}, {"config", "b"}},
		"same file": {{"config", "a"}, {"state", "./a"}},
		"bad name":  {{"../config", "a"}},
		"no path":   {{"config", ""}},
	} {
		if err := Create(context.Background(), path, devices, nil); err == nil {
			t.Errorf("%s: no error", name)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
			t.Errorf("%s: left behind %v, %v", name, entries, err)
		}
	}
}

// asNobody makes a directory that an unprivileged user owns, with links to a file of root's under
// every name that might be used there.
func asNobody(t *testing.T, names ...string) (dir, victim string) {
	t.Helper()
	need.Root(t)
	victim = filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	for _, name := range names {
		if err := errors.Join(os.Symlink(victim, filepath.Join(dir, name)), os.Lchown(filepath.Join(dir, name), 65534, 65534)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	return dir, victim
}

// Whoever owns the directory cannot have root's files overwritten, nor put something else in the
// place of what root writes: nothing is written there.
func TestDirectoryOfAnother(t *testing.T) {
	dir, victim := asNobody(t, "a.tar.zst.partial", ".a.tar.zst.partial", "config.partial", "config", "a.tar.zst")
	source, _ := create(t)
	devices := sample(t, t.TempDir())
	for _, f := range []struct {
		name string
		do   func(path string) error
	}{
		{"a.tar.zst", func(path string) error { return Create(t.Context(), path, devices, nil) }},
		{"config", func(path string) error { return Extract(t.Context(), source, []Device{{"config", path}}, nil, nil) }},
	} {
		path := filepath.Join(dir, f.name)
		old := syscall.Umask(0)
		err := f.do(path)
		syscall.Umask(old)
		if err == nil || !strings.Contains(err.Error(), "belongs to user 65534") {
			t.Errorf("%s: %v", f.name, err)
		}
		if b, err := os.ReadFile(victim); err != nil || string(b) != "precious" {
			t.Errorf("%s: a file of root's was overwritten, or %v", f.name, err)
		}
		if info, err := os.Lstat(path); err != nil || info.Mode().Type() != os.ModeSymlink {
			t.Errorf("%s: it was replaced: %v, %v", f.name, info.Mode(), err)
		}
	}
}

// A file that everybody may read is replaced by one that nobody else may, and directories are made
// closed.
func TestClosedToOthers(t *testing.T) {
	base := t.TempDir()
	target, path := filepath.Join(t.TempDir(), "config"), filepath.Join(base, "out", "app.tar.zst")
	devices := sample(t, base)
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	if err := Create(t.Context(), path, devices, nil); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(target, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, d := range []Device{{"config", target}, {"memory", filepath.Join(filepath.Dir(target), "sub", "memory")}} {
		if err := Extract(t.Context(), path, []Device{d}, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): os.ModeDir | 0o700, target: 0o600, filepath.Join(filepath.Dir(target), "sub"): os.ModeDir | 0o700} {
		if info, err := os.Stat(p); err != nil || info.Mode() != want {
			t.Errorf("%s: mode %v, %v", p, info.Mode(), err)
		}
	}
}

// An archive of some KB that unpacks to more than anybody waits for ends with its context, also
// where it is only skipped; sizes that no device has are refused.
func TestBomb(t *testing.T) {
	zeros := func(size int64) string {
		path := filepath.Join(t.TempDir(), "a.tar.zst")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		enc, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		var head bytes.Buffer
		if err := tar.NewWriter(&head).WriteHeader(&tar.Header{Name: "memory", Typeflag: tar.TypeReg, Size: size, Format: tar.FormatGNU}); err != nil {
			t.Fatal(err)
		}
		frame := enc.EncodeAll(make([]byte, frameSize), nil)
		if _, err := f.Write(append(enc.EncodeAll(head.Bytes(), nil), bytes.Repeat(frame, 1<<16)...)); err != nil { // 64 GiB
			t.Fatal(err)
		}
		return path
	}
	dir := t.TempDir()
	for name, devices := range map[string][]Device{"wanted": {{"memory", filepath.Join(dir, "memory")}}, "skipped": {{"config", filepath.Join(dir, "config")}}} {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		err := Extract(ctx, zeros(1<<42), devices, nil, nil)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Extract(t.Context(), zeros(1<<62), []Device{{"memory", filepath.Join(dir, "memory")}}, nil, nil); err == nil || !strings.Contains(err.Error(), "more than any device") {
		t.Errorf("4 EiB: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func FuzzExtract(f *testing.F) {
	f.Add([]byte("\x28\xb5\x2f\xfd"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		path := filepath.Join(dir, "a.tar.zst")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Extract(context.Background(), path, []Device{{"config", filepath.Join(dir, "config")}}, nil, nil); err != nil {
			if _, err := os.Stat(filepath.Join(dir, "config")); !errors.Is(err, os.ErrNotExist) {
				t.Error("a failed extraction left a file")
			}
		}
	})
}

// What unpacks to nothing, however long it is, is given up with the command.
func TestNothingInterrupted(t *testing.T) {
	// A frame of one segment without content: magic number, descriptor, content size, and a last
	// raw block of no bytes (RFC 8878, section 3.1.1).
	frame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x00, 0x01, 0x00, 0x00}
	path := filepath.Join(t.TempDir(), "package.tar.zst")
	if err := os.WriteFile(path, bytes.Repeat(frame, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := Extract(ctx, path, []Device{{"memory", filepath.Join(t.TempDir(), "memory")}}, nil, nil)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

// An extraction over an older version of a package that is interrupted leaves the one or the other,
// and never files of both.
func TestExtractOverAnother(t *testing.T) {
	base, out := t.TempDir(), filepath.Join(t.TempDir(), "package")
	sources, path := sample(t, base), filepath.Join(base, "app.tar.zst")
	if err := Create(t.Context(), path, sources, nil); err != nil {
		t.Fatal(err)
	}
	var targets []Device
	for _, d := range sources {
		targets = append(targets, Device{d.Name, filepath.Join(out, d.Name)})
	}
	if err := os.Mkdir(out, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, d := range targets {
		if err := os.WriteFile(d.Path, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// A VM that runs from the older one keeps it.
	f, err := os.Open(targets[0].Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	if err := Extract(t.Context(), path, targets, nil, nil); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("over a package in use: %v", err)
	}
	for _, d := range targets {
		if b, err := os.ReadFile(d.Path); err != nil || string(b) != "old" {
			t.Errorf("device %s is not the older one: %v", d.Name, err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(out)
	if err != nil {
		t.Fatal(err)
	}
	if err := Extract(t.Context(), path, targets, nil, nil); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(out)
	if err != nil || os.SameFile(before, after) {
		t.Errorf("the files were not replaced together: %v", err)
	}
	for i, d := range targets {
		want, err := os.ReadFile(sources[i].Path)
		got, gerr := os.ReadFile(d.Path)
		if err != nil || gerr != nil || !bytes.Equal(got, want) {
			t.Errorf("device %s is not the newer one: %v, %v", d.Name, err, gerr)
		}
	}
}

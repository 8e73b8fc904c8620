package agent

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

// chroot is a container whose root is a directory.
type chroot struct {
	system
	dir string
}

func (c chroot) Root() (string, error) { return c.dir, nil }

// entries reads an archive: names with what they are.
func entries(t *testing.T, r io.Reader) map[string]string {
	t.Helper()
	all := map[string]string{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		all[h.Name] = string(h.Typeflag) + " " + h.Linkname + string(content[:min(len(content), 100)])
	}
}

func TestCopy(t *testing.T) {
	need.Root(t)
	root, outside := t.TempDir(), t.TempDir()
	c := converse(t, &Server{Container: chroot{dir: root}})
	ctx := within(t, 60*time.Second)
	secret := filepath.Join(outside, "secret")
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	long := strings.Repeat("long", 60)
	then := time.Unix(1234567890, 0)
	must(os.WriteFile(secret, []byte("secret"), 0o600),
		os.MkdirAll(filepath.Join(root, "srv/tree/sub"), 0o755),
		os.WriteFile(filepath.Join(root, "srv/tree/file"), []byte("content"), 0o640),
		os.Chown(filepath.Join(root, "srv/tree/file"), 1234, 5678),
		os.Chmod(filepath.Join(root, "srv/tree/file"), 0o640|os.ModeSetuid),
		os.Link(filepath.Join(root, "srv/tree/file"), filepath.Join(root, "srv/tree/link")),
		os.WriteFile(filepath.Join(root, "srv/tree/sub", long), bytes.Repeat([]byte("x"), 1<<20), 0o600),
		os.Symlink("../../etc/passwd", filepath.Join(root, "srv/tree/soft")),
		os.Symlink(outside, filepath.Join(root, "srv/tree/out")),
		os.Symlink("/srv/tree", filepath.Join(root, "absolute")),
		unix.Mkfifo(filepath.Join(root, "srv/tree/fifo"), 0o600),
		os.Chtimes(filepath.Join(root, "srv/tree/file"), then, then),
		os.Chtimes(filepath.Join(root, "srv/tree/sub"), then, then),
	)
	want := map[string]string{
		"tree/": "5 ", "tree/sub/": "5 ", "tree/file": "0 content", "tree/link": "1 tree/file", "tree/soft": "2 ../../etc/passwd", "tree/out": "2 " + outside, "tree/fifo": "6 ",
		"tree/sub/" + long: "0 " + strings.Repeat("x", 100),
	}
	out, err := c.CopyOut(ctx, File{Path: "/srv/tree"})
	must(err)
	archive, err := io.ReadAll(out)
	must(err, out.Close())
	if got := entries(t, bytes.NewReader(archive)); !maps.Equal(got, want) {
		t.Errorf("%v\nwant %v", got, want)
	}
	for path, names := range map[string][]string{
		"/absolute": {"absolute"}, "/absolute/": {"absolute/", "absolute/fifo", "absolute/file"}, "/absolute/file": {"file"}, "/": {"./", "absolute", "srv/", "srv/tree/"},
		"/srv/tree/out": {"out"},
	} {
		out, err := c.CopyOut(ctx, File{Path: path})
		must(err)
		got := entries(t, out)
		must(out.Close())
		if n := slices.Sorted(maps.Keys(got)); !slices.Equal(n[:min(len(n), len(names))], names) || len(names) == 1 && len(n) != 1 {
			t.Errorf("%s: %v", path, n)
		}
	}
	// What leads out leads nowhere.
	for _, path := range []string{"/srv/tree/out/secret", "/srv/tree/out/", secret, "/srv/none", "/../.." + secret, "relative", ""} {
		if out, err := c.CopyOut(ctx, File{Path: path}); err == nil {
			t.Errorf("%s was copied: %v", path, entries(t, out))
		}
	}

	// In again, elsewhere.
	must(os.Mkdir(filepath.Join(root, "new"), 0o755))
	must(c.CopyIn(ctx, File{Path: "/new"}, bytes.NewReader(archive)))
	var st, link unix.Stat_t
	must(unix.Lstat(filepath.Join(root, "new/tree/file"), &st), unix.Lstat(filepath.Join(root, "new/tree/link"), &link))
	if st.Uid != 1234 || st.Gid != 5678 || st.Mode != unix.S_IFREG|unix.S_ISUID|0o640 || st.Mtim.Sec != then.Unix() || st.Ino != link.Ino {
		t.Errorf("%+v, %+v", st, link)
	}
	must(unix.Lstat(filepath.Join(root, "new/tree/sub"), &st))
	if st.Mtim.Sec != then.Unix() {
		t.Errorf("directory of %d", st.Mtim.Sec)
	}
	out, err = c.CopyOut(ctx, File{Path: "/new/tree"})
	must(err)
	if got := entries(t, out); !maps.Equal(got, want) {
		t.Errorf("%v\nwant %v", got, want)
	}
	must(out.Close())

	// An archive that follows links stays in the root, too.
	var evil bytes.Buffer
	w := tar.NewWriter(&evil)
	must(w.WriteHeader(&tar.Header{Name: "leads", Typeflag: tar.TypeSymlink, Linkname: outside}), w.WriteHeader(&tar.Header{Name: "leads/evil", Mode: 0o600, Typeflag: tar.TypeReg}), w.Close())
	must(c.CopyIn(ctx, File{Path: "/new"}, &evil))
	for _, name := range []string{"../evil", "/../evil", "leads/../../evil"} {
		evil.Reset()
		w := tar.NewWriter(&evil)
		must(w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Typeflag: tar.TypeReg}), w.Close())
		if err := c.CopyIn(ctx, File{Path: "/new"}, &evil); err == nil {
			t.Errorf("%s is unpacked", name)
		}
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) != 1 {
		t.Errorf("outside: %v, %v", left, err)
	}
	// A link within the root is followed.
	must(c.CopyIn(ctx, File{Path: "/absolute/sub/"}, bytes.NewReader(archive)))
	must(unix.Lstat(filepath.Join(root, "srv/tree/sub/tree/file"), &st))

	for dir, says := range map[string]string{"/none": "no such file", "/new/tree/file": "no directory", "relative": "no absolute path"} {
		if err := c.CopyIn(ctx, File{Path: dir}, bytes.NewReader(archive)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("in %s: %v", dir, err)
		}
	}
	if err := c.CopyIn(ctx, File{Path: "/new"}, io.MultiReader(bytes.NewReader(archive[:len(archive)/2]))); err == nil {
		t.Error("half an archive is unpacked")
	}
	broken := errors.New("the disk is broken")
	if err := c.CopyIn(ctx, File{Path: "/new"}, io.MultiReader(bytes.NewReader(archive[:5000]), failing{broken})); !errors.Is(err, broken) {
		t.Errorf("a reader that fails: %v", err)
	}

	// Ended before its time.
	must(os.WriteFile(filepath.Join(root, "big"), make([]byte, 10<<20), 0o600))
	short, cancel := context.WithCancel(ctx)
	out, err = c.CopyOut(short, File{Path: "/big"})
	must(err)
	cancel()
	if _, err := io.Copy(io.Discard, out); !errors.Is(err, context.Canceled) {
		t.Errorf("after its end: %v", err)
	}
	must(out.Close())
	awaitNoSession(t, c)

	info, err := c.Stat(ctx, File{Path: "/srv/tree/file"})
	if err != nil || info.Mode != 0o640|fs.ModeSetuid || info.Size != 7 || !info.Modified.Equal(then) {
		t.Errorf("%+v, %v", info, err)
	}
	if info, err = c.Stat(ctx, File{Path: "/absolute"}); err != nil || !info.Mode.IsDir() {
		t.Errorf("%+v, %v", info, err)
	}
	if info, err = c.Lstat(ctx, File{Path: "/absolute"}); err != nil || info.Mode.Type() != fs.ModeSymlink || info.LinkTarget != "/srv/tree" {
		t.Errorf("%+v, %v", info, err)
	}
	if info, err = c.Stat(ctx, File{Path: secret}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%+v, %v", info, err)
	}
	if info, err = c.Stat(ctx, File{Path: secret, System: true}); err != nil || info.Size != 6 {
		t.Errorf("%+v, %v", info, err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// What a kernel shows of itself is no content.
func TestCopyOfProc(t *testing.T) {
	for path, want := range map[string]string{"/proc": "proc/", "/proc/": "proc/", "/sys": "sys/"} {
		var b bytes.Buffer
		if err := pack(&b, path); err != nil {
			t.Error(err)
		}
		if got := entries(t, &b); len(got) != 1 || got[want] != "5 " {
			t.Errorf("%s: %d entries, %q", path, len(got), got[want])
		}
	}
}

// A file that shrinks while it is copied is filled up, and one that grows is cut, so that the
// archive stays whole.
func TestCopyOfChangingFile(t *testing.T) {
	dir := t.TempDir()
	for name, change := range map[string]int64{"shrinks": 100, "grows": 3 << 20} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, bytes.Repeat([]byte("x"), 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		r, w := io.Pipe()
		go func() { w.CloseWithError(pack(w, path)) }()
		tr := tar.NewReader(r)
		h, err := tr.Next()
		if err == nil {
			_, err = io.ReadFull(tr, make([]byte, 100))
		}
		if err == nil {
			err = os.Truncate(path, change)
		}
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, tr); err != nil || n != 1<<20-100 || h.Size != 1<<20 {
			t.Errorf("%s: %d, %v", name, n, err)
		}
		if _, err := tr.Next(); !errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

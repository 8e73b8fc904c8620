package fileset

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/need"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// listing is what a directory tree holds.
func listing(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		b.WriteString(rel + "=" + string(content) + " ")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(b.String())
}

func fill(t *testing.T, s *Set, text string) {
	t.Helper()
	for name := range s.paths {
		write(t, s.Path(name), text)
	}
}

func TestReplacesDirectoryAtOnce(t *testing.T) {
	dir := t.TempDir()
	paths := map[string]string{"memory": filepath.Join(dir, "backup/memory.bin"), "state": filepath.Join(dir, "backup/state.bin")}
	for _, text := range []string{"one", "two"} {
		s, err := New(paths, "state")
		if err != nil {
			t.Fatal(err)
		}
		before := listing(t, dir)
		fill(t, s, text)
		if text == "two" && !strings.Contains(before, "backup/state.bin=one") {
			t.Errorf("before: %s", before)
		}
		if err := s.Publish(); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "backup/note"), "mine")
	}
	if got, want := listing(t, dir), "backup/memory.bin=two backup/note=mine backup/state.bin=two"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestDiscardLeavesWhatWasThere(t *testing.T) {
	dir := t.TempDir()
	paths := map[string]string{"memory": filepath.Join(dir, "backup/memory.bin")}
	write(t, paths["memory"], "one")
	s, err := New(paths, "")
	if err != nil {
		t.Fatal(err)
	}
	fill(t, s, "half")
	if _, err := New(paths, ""); err == nil {
		t.Error("two writers of one directory at a time")
	}
	if err := s.Discard(); err != nil {
		t.Fatal(err)
	}
	if got, want := listing(t, dir), "backup/memory.bin=one"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// What a killed writer left is gone after the next one.
func TestKilledWriter(t *testing.T) {
	dir := t.TempDir()
	paths := map[string]string{"memory": filepath.Join(dir, "backup/memory.bin")}
	killed, err := New(paths, "")
	if err != nil {
		t.Fatal(err)
	}
	fill(t, killed, "half")
	write(t, filepath.Join(killed.staging(), "other"), "rubbish")
	if err := errors.Join(killed.lock.Abandon(), killed.work[dir].Abandon()); err != nil {
		t.Fatal(err)
	}
	s, err := New(paths, "")
	if err != nil {
		t.Fatal(err)
	}
	fill(t, s, "two")
	if err := s.Publish(); err != nil {
		t.Fatal(err)
	}
	if got, want := listing(t, dir), "backup/memory.bin=two"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestScattered(t *testing.T) {
	dir := t.TempDir()
	paths := map[string]string{"memory": filepath.Join(dir, "a/memory.bin"), "state": filepath.Join(dir, "b/state.bin")}
	write(t, filepath.Join(dir, "a/memory.bin.partial"), "mine")
	s, err := New(paths, "state")
	if err != nil {
		t.Fatal(err)
	}
	fill(t, s, "one")
	if err := s.Publish(); err != nil {
		t.Fatal(err)
	}
	if got, want := listing(t, dir), "a/memory.bin=one a/memory.bin.partial=mine b/state.bin=one"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if _, err := New(paths, "state"); err == nil || !strings.Contains(err.Error(), "cannot be replaced all at once") {
		t.Errorf("files in two directories are replaced: %v", err)
	}
}

// A directory that something is mounted at, or that is the working directory, stays what it is: its
// files come one by one, and replace nothing.
func TestDirectoryKeepsItsPlace(t *testing.T) {
	for _, kind := range []string{"working directory", "mounted"} {
		t.Run(kind, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "dir")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if kind == "mounted" {
				need.Root(t)
				runtime.LockOSThread() // for ever: the namespace ends with the thread
				if err := errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=700")); err != nil {
					t.Fatal(err)
				}
			} else {
				t.Chdir(dir)
			}
			before, err := os.Stat(dir)
			if err != nil {
				t.Fatal(err)
			}
			paths := map[string]string{"a": filepath.Join(dir, "a"), "b": filepath.Join(dir, "b")}
			s, err := New(paths, "b")
			if err != nil {
				t.Fatal(err)
			}
			write(t, s.Path("a"), "new")
			write(t, s.Path("b"), "new")
			if err := s.Publish(); err != nil {
				t.Fatal(err)
			}
			if got := listing(t, dir); got != "a=new b=new" {
				t.Errorf("it holds %q", got)
			}
			if after, err := os.Stat(dir); err != nil || !os.SameFile(before, after) {
				t.Errorf("it is another directory: %v", err)
			}
			if _, err := New(paths, "b"); err == nil || !strings.Contains(err.Error(), "working directory") {
				t.Errorf("over what is there: %v", err)
			}
			if err := unix.Unmount(dir, unix.MNT_DETACH); kind == "mounted" && err != nil {
				t.Error(err)
			}
		})
	}
}

// What is beside a directory is somebody's, whatever it is called.
func TestSomebodysFiles(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, ".backup.new/data"), "mine")
	s, err := New(map[string]string{"memory": filepath.Join(dir, "backup/memory.bin")}, "")
	if err != nil {
		t.Fatal(err)
	}
	fill(t, s, "one")
	if err := s.Publish(); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, ".backup.lock"), "mine")
	if _, err := New(map[string]string{"memory": filepath.Join(dir, "backup/memory.bin")}, ""); err == nil || !strings.Contains(err.Error(), "no lock of this program") {
		t.Errorf("a file in the place of the lock: %v", err)
	}
	if got, want := listing(t, dir), ".backup.lock=mine .backup.new/data=mine backup/memory.bin=one"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestFilesInUse(t *testing.T) {
	dir := t.TempDir()
	paths := map[string]string{"memory": filepath.Join(dir, "backup/memory.bin")}
	write(t, paths["memory"], "one")
	f, err := os.Open(paths["memory"])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := lockfile.Shared(f); err != nil {
		t.Fatal(err)
	}
	if _, err := New(paths, ""); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a base in use is replaced: %v", err)
	}
}

// What is made is for its owner alone, and nothing is written through what a stranger has put into
// a directory of theirs.
func TestStrangersDirectory(t *testing.T) {
	need.Root(t)
	const stranger = 65534
	secret := filepath.Join(t.TempDir(), "secret")
	write(t, secret, "secret")
	dir := t.TempDir()
	if err := os.Chown(dir, stranger, stranger); err != nil {
		t.Fatal(err)
	}
	link := func(name string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.Symlink(secret, path); err != nil {
			t.Fatal(err)
		}
		if err := os.Lchown(path, stranger, stranger); err != nil {
			t.Fatal(err)
		}
	}
	link(".pkg.lock")
	if _, err := New(map[string]string{"config": filepath.Join(dir, "pkg/config.json")}, ""); err == nil {
		t.Errorf("a lock that is a stranger's link: %v", err)
	}
	link("config.json.partial")
	link("state.bin.partial")
	for name, paths := range map[string]map[string]string{
		"scattered": {"config": filepath.Join(dir, "config.json"), "state": filepath.Join(dir, "sub/state.bin")},
		"below":     {"config": filepath.Join(dir, "pkg/config.json")},
		"there":     {"config": filepath.Join(dir, "config.json")},
	} {
		if _, err := New(paths, ""); err == nil || !strings.Contains(err.Error(), "belongs to user 65534") {
			t.Errorf("%s: %v", name, err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("the directory of a stranger: %v, %v", entries, err)
	}
	if b, err := os.ReadFile(secret); err != nil || string(b) != "secret" {
		t.Errorf("the secret is %q, %v", b, err)
	}
	ours := t.TempDir()
	made, err := New(map[string]string{"config": filepath.Join(ours, "pkg/config.json")}, "")
	if err != nil {
		t.Fatal(err)
	}
	fill(t, made, "config")
	if err := made.Publish(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(ours, "pkg")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory of a package: %v, %v", info.Mode(), err)
	}
}

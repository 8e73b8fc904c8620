package newfile

import (
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func write(t *testing.T, path, text string) *File {
	t.Helper()
	f, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return f
}

func holds(t *testing.T, path, text string) {
	t.Helper()
	if b, err := os.ReadFile(path); err != nil || string(b) != text {
		t.Errorf("%s holds %q, %v; want %q", path, b, err, text)
	}
}

func mode(t *testing.T, path string) fs.FileMode {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode()
}

// A file is its owner's alone under any umask, also where a file that all may read was before.
func TestMode(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o777} {
		dir := t.TempDir()
		old := syscall.Umask(umask)
		path := filepath.Join(dir, "made", "file")
		if umask == 0o777 {
			path = filepath.Join(dir, "file")
		}
		err := os.MkdirAll(dir, 0o755)
		f := write(t, path, "new")
		perr := f.Publish()
		syscall.Umask(old)
		if err != nil || perr != nil {
			t.Fatal(err, perr)
		}
		if m := mode(t, path); m != 0o600 {
			t.Errorf("umask %o: mode %s", umask, m)
		}
		if m := mode(t, filepath.Dir(path)).Perm(); umask != 0o777 && m != 0o700 {
			t.Errorf("umask %o: directory has mode %s", umask, m)
		}
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("old"), 0o666); err != nil {
		t.Fatal(err)
	}
	reader, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	f := write(t, path, "new")
	holds(t, path, "old")
	if err := f.Publish(); err != nil {
		t.Fatal(err)
	}
	holds(t, path, "new")
	b := make([]byte, 3)
	if _, err := reader.ReadAt(b, 0); err != nil || string(b) != "old" || mode(t, path) != 0o600 {
		t.Errorf("who had the old file open reads %q, %v; mode %s", b, err, mode(t, path))
	}
}

// Links that others lay in wait are not followed, and a file that is given up leaves nothing.
func TestNothingIsFollowed(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "file")
	for _, name := range []string{"file", "file.partial", ".file.partial", "file.new"} {
		if err := os.Symlink(victim, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	f := write(t, path, "given up")
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 4 {
		t.Errorf("a file in the making has a name: %v, %v", entries, err)
	}
	if err := f.Discard(); err != nil {
		t.Fatal(err)
	}
	if err := write(t, path, "new").Publish(); err != nil {
		t.Fatal(err)
	}
	holds(t, victim, "precious")
	holds(t, path, "new")
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 4 || !mode(t, path).IsRegular() {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// A file system without files that have no name gets a name that cannot be foreseen.
func TestWithoutUnnamedFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	parent, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	f := &File{dir: parent, path: path}
	f.temp = f.hidden()
	if err := f.open(syscall.O_CREAT | syscall.O_EXCL | syscall.O_NOFOLLOW); err != nil {
		t.Fatal(err)
	}
	if err := f.Publish(); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || mode(t, path) != 0o600 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// What is no file, such as /dev/null, stays what it is.
func TestReplacesFilesOnly(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"stdout": "/proc/self/exe", "null": "/dev/null"} {
		if err := os.Symlink(to, filepath.Join(filepath.Dir(fifo), link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{fifo, t.TempDir(), filepath.Join(filepath.Dir(fifo), "stdout"), filepath.Join(filepath.Dir(fifo), "null")} {
		if f, err := Create(path); err == nil {
			t.Errorf("%s would be replaced: %v", path, f.Discard())
		}
	}
	path := filepath.Join(t.TempDir(), "late")
	f := write(t, path, "new")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.Publish(); err == nil || mode(t, path).Type() != fs.ModeNamedPipe {
		t.Errorf("it is %s now, %v", mode(t, path), err)
	}
}

package scratch

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"drafter/internal/mark"
)

func TestMain(m *testing.M) {
	if parent := os.Getenv("SCRATCH_PARENT"); parent != "" { // the owner that is killed
		d, err := New(parent, "work-")
		if err == nil {
			err = os.MkdirAll(d.Path("deep/down"), 0o755)
		}
		if err != nil {
			panic(err)
		}
		if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

// A directory is closed to others, and gone after Close.
func TestClosed(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	parent := t.TempDir()
	d, err := New(parent, "work-")
	if err != nil {
		t.Fatal(err)
	}
	list := names(t, parent)
	if len(list) != 1 {
		t.Fatalf("made: %v", list)
	}
	if info, err := os.Lstat(filepath.Join(parent, list[0])); err != nil || info.Mode() != os.ModeDir|0o700 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := os.WriteFile(d.Path("file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if list := names(t, parent); len(list) != 0 {
		t.Errorf("left behind: %v", list)
	}
}

// What a killed owner leaves goes with the next. What lives stays, and so does what only looks like
// it: a link, an unmarked directory, another user's.
func TestSweep(t *testing.T) {
	parent, elsewhere := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(elsewhere, lockName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	keep := map[string]func(string) error{
		"work-link":     func(p string) error { return os.Symlink(elsewhere, p) },
		"work-file":     func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"work-unmarked": func(p string) error { return os.MkdirAll(filepath.Join(p, "data"), 0o700) },
		"work-locked":   locked,
		"work-open":     func(p string) error { return marked(p, 0o755, os.Geteuid()) },
		"other":         func(p string) error { return marked(p, 0o700, os.Geteuid()) },
	}
	if os.Geteuid() == 0 {
		keep["work-foreign"] = func(p string) error { return marked(p, 0o700, 65534) }
	}
	for name, make := range keep {
		if err := make(filepath.Join(parent, name)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "SCRATCH_PARENT="+parent)
		if err := cmd.Run(); err == nil {
			t.Fatal("the owner was not killed")
		}
		// The first leaves its directory, which the second removes before it leaves its own.
		if list := names(t, parent); len(list) != len(keep)+1 {
			t.Errorf("after a killed owner: %v", list)
		}
	}
	living, err := New(parent, "work-")
	if err != nil {
		t.Fatal(err)
	}
	next, err := New(parent, "work-")
	if err != nil {
		t.Fatal(err)
	}
	if list := names(t, parent); len(list) != len(keep)+2 {
		t.Errorf("with two living owners: %v", list)
	}
	if err := living.Close(); err != nil {
		t.Error(err)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	if list := names(t, parent); len(list) != len(keep) {
		t.Errorf("in the end: %v", list)
	}
	if list := names(t, elsewhere); len(list) != 1 {
		t.Errorf("a link was followed: %v", list)
	}
}

// locked makes a directory with a lock that is not marked.
func locked(path string) error {
	return errors.Join(os.Mkdir(path, 0o700), os.WriteFile(filepath.Join(path, lockName), nil, 0o600))
}

// marked makes a directory with a lock and a mark.
func marked(path string, mode os.FileMode, owner int) error {
	if err := os.Mkdir(path, mode); err != nil {
		return err
	}
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	m, err := mark.Of(dir, markFormat, filepath.Base(path))
	f, ferr := os.Create(filepath.Join(path, lockName))
	return errors.Join(err, ferr, m.Write(f), f.Close(), os.Chown(path, owner, -1))
}

// What somebody has copied, or renamed to keep it, stays.
func TestCopies(t *testing.T) {
	parent := t.TempDir()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "SCRATCH_PARENT="+parent)
	if err := cmd.Run(); err == nil {
		t.Fatal("the owner was not killed")
	}
	left := filepath.Join(parent, names(t, parent)[0])
	if out, err := exec.Command("cp", "-a", left, left+"-copy").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Rename(left, left+"-kept"); err != nil {
		t.Fatal(err)
	}
	d, err := New(parent, "work-")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	for _, suffix := range []string{"-copy", "-kept"} {
		if _, err := os.Stat(filepath.Join(left+suffix, "deep/down")); err != nil {
			t.Errorf("somebody's %s: %v", suffix, err)
		}
	}
}

// Move replaces an empty directory and nothing else, and leaves nothing of a link.
func TestMove(t *testing.T) {
	parent, elsewhere := t.TempDir(), t.TempDir()
	d, err := New(parent, ".work-")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, name := range []string{"new", "empty", "full", "link"} {
		if err := os.MkdirAll(d.Path(name+"/content"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(parent, "empty"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(parent, "full", "old"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, filepath.Join(parent, "link")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"new": true, "empty": true, "full": false, "link": false} {
		if err := d.Move(name, name); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(names(t, elsewhere)) != 0 || names(t, filepath.Join(parent, "full"))[0] != "old" || names(t, filepath.Join(parent, "empty"))[0] != "content" {
		t.Error("moved to the wrong place")
	}
}

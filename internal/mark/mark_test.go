package mark

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

const name = ".mark"

func write(t *testing.T, path string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte("data"), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func list(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// A directory is emptied if it is new, empty, or marked; never if it is somebody's.
func TestRenew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dir")
	for range 3 {
		if err := Renew(dir, name, "test"); err != nil {
			t.Fatal(err)
		}
		if got := list(t, dir); got != name {
			t.Errorf("it holds %s", got)
		}
		write(t, filepath.Join(dir, "sub/file"))
	}
	copied := dir + "-copy"
	if out, err := exec.Command("cp", "-a", dir, copied).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	home := filepath.Join(t.TempDir(), "home")
	write(t, filepath.Join(home, "letter"))
	for path, format := range map[string]string{copied: "test", home: "test", dir: "other"} {
		before := list(t, path)
		if err := Renew(path, name, format); err == nil || !strings.Contains(err.Error(), "would be removed") {
			t.Errorf("%s: %v", path, err)
		}
		if after := list(t, path); after != before {
			t.Errorf("%s held %s, and now %s", path, before, after)
		}
	}
}

// Files of another file system are not ours.
func TestMounted(t *testing.T) {
	need.Root(t)
	dir, theirs := filepath.Join(t.TempDir(), "dir"), t.TempDir()
	if err := Renew(dir, name, "test"); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(theirs, "precious"))
	at := filepath.Join(dir, "mnt")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(theirs, at, "", unix.MS_BIND, ""); err != nil {
		need.Lacks(t, "mounts", err)
	}
	err := Renew(dir, name, "test")
	if uerr := unix.Unmount(at, 0); uerr != nil {
		t.Fatal(uerr)
	}
	if err == nil || !strings.Contains(err.Error(), at) {
		t.Errorf("with something mounted: %v", err)
	}
	if got := list(t, theirs); got != "precious" {
		t.Errorf("left of it: %q", got)
	}
	if err := Renew(dir, name, "test"); err != nil {
		t.Error(err)
	}
}

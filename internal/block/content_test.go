package block

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"drafter/internal/need"
)

// What is read only may be in a directory of another user, where nothing is kept.
func TestContentsInAnotherUsersDirectory(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "base")
	if err := errors.Join(os.WriteFile(path, []byte("content"), 0o644), os.Chown(dir, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	c, err := FileContents(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if want := HashBytes([]byte("content")); c.Device != want.Device {
		t.Errorf("content %s; want %s", c.Device, want.Device)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

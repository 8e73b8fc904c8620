package mounter

import (
	"os"
	"path/filepath"
	"testing"
)

// A link is replaced only if a killed mounter made it for the same device, and removed only if it
// still leads where it did.
func TestSomebodysLinks(t *testing.T) {
	dir := t.TempDir()
	theirs := filepath.Join(dir, "vms/mounter/0123456789abcdef/devices/other")
	if err := os.MkdirAll(theirs, 0o755); err != nil {
		t.Fatal(err)
	}
	for target, want := range map[string]bool{
		filepath.Join(dir, "vms/mounter/fedcba9876543210/devices/data"): true,
		filepath.Join(dir, "vms/mounter/fedcba9876543210/devices/disk"): false, // another device's
		theirs:                          false, // a mounter that lives
		filepath.Join(dir, "elsewhere"): false, // dangling, and somebody's
		"/dev/null":                     false,
	} {
		path := filepath.Join(dir, "data")
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
		err := removeDeadLink(path, "data")
		if _, lerr := os.Lstat(path); (err == nil) != want || os.IsNotExist(lerr) != want {
			t.Errorf("a link to %s: %v, %v", target, err, lerr)
		}
		ours := link{path, target}
		if want {
			if err := os.Symlink("/dev/zero", path); err != nil {
				t.Fatal(err)
			}
			if err := ours.remove(); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(path); err != nil {
				t.Errorf("somebody's new link: %v", err)
			}
			ours.target = "/dev/zero"
		}
		if err := ours.remove(); err != nil {
			t.Error(err)
		}
	}
}

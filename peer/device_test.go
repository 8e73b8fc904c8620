package peer

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	arrivalPatience = 300 * time.Millisecond
	goleak.VerifyTestMain(m)
}

// Who may use a base at the same time.
func TestSharing(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	overlay := func(name string) Device {
		d := DefaultDevice("disk")
		d.Base, d.Overlay, d.State = base, filepath.Join(dir, name+".overlay"), filepath.Join(dir, name+".state")
		return d
	}
	plain := DefaultDevice("disk")
	plain.Base = base
	shared := plain
	shared.Shared = true
	sharedBase := overlay("c")
	sharedBase.SharedBase = true
	for _, tt := range []struct {
		name          string
		first, second Device
		ok            bool
	}{
		{"two overlays", overlay("a"), overlay("b"), true},
		{"one overlay twice", overlay("a"), overlay("a"), false},
		{"shared base", overlay("a"), sharedBase, true},
		{"a writer beside an overlay", overlay("a"), plain, false},
		{"an overlay beside a writer", plain, overlay("a"), false},
		{"two writers", plain, plain, false},
		{"two that share", shared, shared, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			first, err := tt.first.files().Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer first.Close()
			second, err := tt.second.files().Open(t.Context())
			if err == nil {
				defer second.Close()
			}
			if (err == nil) != tt.ok || err != nil && !strings.Contains(err.Error(), "in use") {
				t.Errorf("the second user: %v", err)
			}
		})
	}
}

// A shared device shows each what the other writes.
func TestShared(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	d := DefaultDevice("disk")
	d.Base, d.Shared = base, true
	one, err := d.files().Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	two, err := d.files().Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer two.Close()
	if _, err := one.WriteAt([]byte("hello"), 12345); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 5)
	if _, err := two.ReadAt(p, 12345); err != nil || string(p) != "hello" {
		t.Errorf("%q, %v", p, err)
	}
}

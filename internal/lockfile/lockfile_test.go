package lockfile

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

func TestHeld(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	l, err := Try(path)
	if err != nil {
		t.Fatal(err)
	}
	var held *HeldError
	if _, err := Try(path); !errors.As(err, &held) || !strings.Contains(held.Holder, "process ") {
		t.Errorf("a second holder got %v", err)
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file stays: %v", err)
	}
}

// A file in the place of a lock that is somebody's stays as it is; what a power cut has left of a
// lock is taken.
func TestSomebodysFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	for content, ours := range map[string]bool{"mine": false, "": true, "\x00\x00\x00": true, "process 1 (drafter)\n": true} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Try(path)
		if (err == nil) != ours {
			t.Errorf("%q: %v", content, err)
		}
		if err == nil {
			if err := l.Release(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != content {
			t.Errorf("it holds %q, %v; want %q", b, err, content)
		}
	}
}

// TestOneHolder has many try to hold a lock whose file vanishes at each release.
func TestOneHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	var inside, times atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 500 {
				l, err := Try(path)
				var held *HeldError
				if errors.As(err, &held) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if n := inside.Add(1); n != 1 {
					t.Errorf("%d hold the lock", n)
				}
				times.Add(1)
				inside.Add(-1)
				if err := l.Release(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if times.Load() < 8 {
		t.Errorf("the lock was held %d times only", times.Load())
	}
}

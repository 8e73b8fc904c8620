package stack

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drafter/internal/block"
	"drafter/internal/wire"
)

const size = 4*block.ContentBlockSize - 100

// files are those of a device in a directory of its own. Its base exists.
func files(t *testing.T) *Files {
	t.Helper()
	dir := t.TempDir()
	f := &Files{Base: filepath.Join(dir, "base"), Overlay: filepath.Join(dir, "overlay"), State: filepath.Join(dir, "state"), BlockSize: block.ContentBlockSize}
	content := make([]byte, size)
	copy(content, "base")
	if err := os.WriteFile(f.Base, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

// write writes to an open device and closes it.
func write(t *testing.T, s *Stack, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if s.Incoming != nil {
		s.Incoming.Open(block.NewBitmap(block.Pages(s.Incoming)), func(int64, int64) {}, nil)
	}
	if _, err := s.WriteAt([]byte("changed"), block.ContentBlockSize); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Sync(), s.Close()); err != nil {
		t.Fatal(err)
	}
}

// arrive lets a device arrive that was made from a base of that content.
func arrive(t *testing.T, f *Files, base block.ID) {
	t.Helper()
	s, _, err := f.Receive(t.Context(), wire.Device{Name: "disk", Size: size, Base: base}, func(d block.Device) *block.Incoming { return block.NewIncoming(d, false) })
	write(t, s, err)
}

// never is where nothing can be fetched from.
type never struct{}

func (never) Fetch(context.Context, int64, []byte, bool) error { return block.ErrReplaced }

// What is found about a device is true for all that can be opened.
func TestProblems(t *testing.T) {
	for _, tt := range []struct {
		name string
		make func(t *testing.T, f *Files)
		want string // in the only problem; "" for none
	}{
		{"over its base", func(t *testing.T, f *Files) { s, err := f.Open(t.Context()); write(t, s, err) }, ""},
		{"arrived without its base", func(t *testing.T, f *Files) {
			if err := os.Remove(f.Base); err != nil {
				t.Fatal(err)
			}
			arrive(t, f, block.ID{1})
		}, ""},
		{"arrived before its base", func(t *testing.T, f *Files) { arrive(t, f, block.ID{}) }, ""},
		{"of which a part never arrived", func(t *testing.T, f *Files) {
			s, err := f.Open(t.Context())
			write(t, s, err)
			if err := f.NoteMissing(3 << 30); err != nil {
				t.Fatal(err)
			}
		}, "up to 3221225472 bytes of it never arrived"},
		{"over another base", func(t *testing.T, f *Files) {
			s, err := f.Open(t.Context())
			write(t, s, err)
			if err := os.WriteFile(f.Base, make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "is not the one that overlay"},
		{"without a base that it needs", func(t *testing.T, f *Files) {
			s, err := f.Open(t.Context())
			write(t, s, err)
			if err := os.Remove(f.Base); err != nil {
				t.Fatal(err)
			}
		}, "no such file"},
		{"over a base that is being pulled", func(t *testing.T, f *Files) {
			content, err := os.ReadFile(f.Base)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(f.Base); err != nil {
				t.Fatal(err)
			}
			s, err := f.OpenOver(t.Context(), block.Remote{Contents: block.HashBytes(content), Fetcher: never{}})
			write(t, s, err)
		}, "was not wholly pulled yet"},
		{"removed after a part of it never arrived", func(t *testing.T, f *Files) {
			if err := f.NoteMissing(1); err != nil {
				t.Fatal(err)
			}
		}, "it is made when the device is used"},
		{"never used", func(*testing.T, *Files) {}, "it is made when the device is used"},
		{"without an overlay", func(_ *testing.T, f *Files) { f.Overlay, f.State = "", "" }, ""},
		{"without an overlay, partly arrived", func(t *testing.T, f *Files) {
			f.Overlay, f.State = "", ""
			if err := f.NoteMissing(1); err != nil {
				t.Fatal(err)
			}
		}, "never arrived"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := files(t)
			tt.make(t, f)
			problems, err := f.Problems(t.Context())
			if err != nil || len(problems) > 1 || (tt.want != "") != (len(problems) == 1) || !strings.Contains(strings.Join(problems, ""), tt.want) {
				t.Errorf("%q, %v; want %q", problems, err, tt.want)
			}
		})
	}
}

// A device knows which base it was made from, however often it is opened where that is not.
func TestOriginIsKept(t *testing.T) {
	f := files(t)
	c, err := block.FileContents(t.Context(), f.Base)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(f.Base, f.Base+".gone"); err != nil {
		t.Fatal(err)
	}
	arrive(t, f, c.Device)
	for range 2 {
		s, err := f.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if s.Origin != c.Device || s.Base != (block.ID{}) {
			t.Errorf("it was made from %s and is over %s", s.Origin, s.Base)
		}
		write(t, s, nil)
	}
	there := files(t) // another host, which has it
	s, held, err := there.Receive(t.Context(), wire.Device{Name: "disk", Size: size, Base: c.Device, Absent: true}, func(d block.Device) *block.Incoming { return block.NewIncoming(d, false) })
	if err != nil || held != wire.HoldsBase || s.Contents == nil || s.Contents.Device != c.Device {
		t.Fatalf("it holds %d, %v", held, err)
	}
	write(t, s, nil)
	s, err = there.Open(t.Context())
	if err != nil || s.Base != c.Device || s.Origin != (block.ID{}) {
		t.Fatalf("it is not over its base again: %v", err)
	}
	write(t, s, nil)
}

// What is forgotten shows the base again, or zeros where the base is not. The device opens again.
func TestForget(t *testing.T) {
	for what, want := range map[string]string{"with its base": "base", "without its base": "\x00\x00\x00\x00"} {
		t.Run(what, func(t *testing.T) {
			f := files(t)
			if err := f.Forget(t.Context()); err != nil {
				t.Errorf("of a device that was never opened: %v", err)
			}
			if what == "with its base" {
				s, err := f.Open(t.Context())
				write(t, s, err)
			} else {
				if err := os.Remove(f.Base); err != nil {
					t.Fatal(err)
				}
				arrive(t, f, block.ID{1})
			}
			if err := f.Forget(t.Context()); err != nil {
				t.Fatal(err)
			}
			s, err := f.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			for at, want := range map[int64]string{0: want, block.ContentBlockSize: "\x00\x00\x00\x00"} {
				got := make([]byte, 4)
				if _, err := s.ReadAt(got, at); err != nil || string(got) != want {
					t.Errorf("at %d: %q, %v", at, got, err)
				}
			}
		})
	}
}

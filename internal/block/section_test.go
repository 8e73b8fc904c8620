package block

import (
	"bytes"
	"errors"
	"testing"
)

func TestSection(t *testing.T) {
	f, err := CreateUnnamed(t.TempDir(), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := bytes.Repeat([]byte("initrd"), 1000)
	if _, err := f.WriteAt(want, 5000); err != nil {
		t.Fatal(err)
	}
	s := Section(f, 5000, int64(len(want)))
	got := make([]byte, s.Size())
	if n, err := s.ReadAt(got, 0); n != len(want) || err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", n, err)
	}
	if _, err := s.ReadAt(got, 1); !errors.Is(err, ErrRange) {
		t.Errorf("beyond its end: %v", err)
	}
	if _, err := s.WriteAt(got, 0); !errors.Is(err, ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
}

package sparse

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"drafter/internal/need"
)

func TestCopyFileKeepsHoles(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(100<<20 + 5); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 10 << 20, 100 << 20} {
		if _, err := f.WriteAt([]byte("data!"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	var last, total int64
	if err := CopyFile(context.Background(), dst, src, func(d, n int64) { last, total = d, n }); err != nil {
		t.Fatal(err)
	}
	if last != total {
		t.Errorf("progress ended at %d of %d", last, total)
	}
	a, err := os.ReadFile(src)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(dst)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("the copy differs")
	}
	var st syscall.Stat_t
	if err := syscall.Stat(dst, &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > 1<<20 {
		t.Errorf("the copy stores %d KiB of a file with three small extents", st.Blocks/2)
	}
}

func TestCopyFileEmptyAndAllHole(t *testing.T) {
	for _, size := range []int64{0, 1, 1 << 20} {
		dir := t.TempDir()
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		if err := errors.Join(os.WriteFile(src, nil, 0o600), os.Truncate(src, size)); err != nil {
			t.Fatal(err)
		}
		if err := CopyFile(context.Background(), dst, src, nil); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(dst); err != nil || info.Size() != size {
			t.Errorf("copied %d bytes: %v, %v", size, info, err)
		}
	}
}

func TestCopyFileFailureLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	if err := os.WriteFile(src, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := CopyFile(ctx, dst, src, nil); err == nil {
		need.Lacks(t, "no-clones", "this file system clones files; nothing is to be interrupted")
	}
	if _, err := os.Stat(dst); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed copy is left behind: %v", err)
	}
}

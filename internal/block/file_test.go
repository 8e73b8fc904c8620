package block

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A file that is in memory is known as such.
func TestInMemory(t *testing.T) {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	memfd := os.NewFile(uintptr(fd), "test")
	defer memfd.Close() // nothing was written
	if !(&File{f: memfd}).InMemory() {
		t.Error("a file in memory counts as one on a disk")
	}
	f, err := OpenFile("file.go", true)
	if err != nil {
		t.Fatal(err)
	}
	if f.InMemory() {
		t.Error("this source file counts as one in memory")
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

package migration

import (
	"net"
	"path/filepath"
	"testing"
)

// A source that has ended is known as such, whatever the address and whether or not it ended well.
func TestNobodyListens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "source")
	for _, kept := range []bool{true, false} {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(!kept)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := net.Dial("unix", path); !nobodyListens(err) {
			t.Errorf("socket left behind %v: %v", kept, err)
		}
		if kept {
			path += "-gone"
		}
	}
}

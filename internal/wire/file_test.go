package wire

import (
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// socketPair returns the two ends of a UNIX socket.
func socketPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends []*net.UnixConn
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		ends = append(ends, c.(*net.UnixConn))
	}
	return ends[0], ends[1]
}

// openFiles counts this process' descriptors.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// A file comes with its message. One that nobody expects, or a second one, is not left open.
func TestFile(t *testing.T) {
	for _, tt := range []struct {
		name    string
		expects bool
		files   int
		fails   bool
	}{
		{"one", true, 1, false},
		{"none", true, 0, false},
		{"two", true, 2, true},
		{"not expected", false, 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := openFiles(t)
			a, b := socketPair(t)
			from, to := NewConn(a), NewConn(b)
			if !from.Files() || NewConn(&buffer{}).Files() {
				t.Error("which connections carry files is not known")
			}
			if tt.expects {
				to.ExpectFile()
			}
			sent, err := os.CreateTemp(t.TempDir(), "")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := sent.WriteString("content"); err != nil {
				t.Fatal(err)
			}
			if err := from.Send(TypePing); err != nil {
				t.Fatal(err)
			}
			for range tt.files {
				if err := from.SendFile(Cycle{Number: 1}, sent); err != nil {
					t.Fatal(err)
				}
			}
			if err := from.Send(TypeReady); err != nil {
				t.Fatal(err)
			}
			failed := false
			for want := tt.files + 2; want > 0 && !failed; want-- {
				if _, err := to.Read(); err != nil {
					failed = true
				}
			}
			if failed != tt.fails {
				t.Errorf("failed: %t", failed)
			}
			f := to.TakeFile()
			if got := f != nil; got != (tt.expects && tt.files > 0) {
				t.Errorf("a file: %t", got)
			}
			if f != nil {
				b := make([]byte, 7)
				if _, err := f.ReadAt(b, 0); err != nil || string(b) != "content" {
					t.Errorf("%q, %v", b, err)
				}
				if err := f.Close(); err != nil {
					t.Error(err)
				}
			}
			for _, c := range []io.Closer{sent, from, to} {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}
			if after := openFiles(t); after != before {
				t.Errorf("%d files are open instead of %d", after, before)
			}
		})
	}
}

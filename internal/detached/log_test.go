package detached

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const logLine = "line %06d of a log that is long enough to fill some room in a file of the test's directory\n"

// logLines is a process that logs and then dies.
func logLines(text string) {
	lines, _ := strconv.Atoi(text)
	to := Stderr()
	for i := range lines {
		if _, err := fmt.Fprintf(to, logLine, i); err != nil {
			os.Exit(1)
		}
	}
	panic("the end")
}

// A process' log is two files of which neither grows without bound. What it prints as it dies is the
// last of it. It is in the journal, too, if whoever has started the process writes there.
func TestLog(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	lock := filepath.Join(dir, "lock")
	t.Setenv("DETACHED_TEST_LOCK", lock)
	lines := 2*mostLog/len(fmt.Sprintf(logLine, 0)) + 100
	t.Setenv("DETACHED_TEST_LINES", strconv.Itoa(lines))

	read, write, err := os.Pipe() // stands in for the journal
	if err != nil {
		t.Fatal(err)
	}
	stderr := os.Stderr
	defer func() { os.Stderr = stderr }()
	os.Stderr = write
	var st unix.Stat_t
	if err := unix.Fstat(int(write.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	t.Setenv("JOURNAL_STREAM", fmt.Sprintf("%d:%d", st.Dev, st.Ino))
	journal := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(read)
		journal <- b
	}()
	if p, err := Start(t.Context(), Command{Lock: lock, Program: os.Args[0], Args: []string{"-test.run=^$"}, Log: path}); err == nil {
		t.Error("it has ended at once", p.Close())
	}
	os.Stderr = stderr
	if err := write.Close(); err != nil {
		t.Fatal(err)
	}
	told := <-journal

	older, err := os.ReadFile(OlderLog(path))
	newer, nerr := os.ReadFile(path)
	if err := errors.Join(err, nerr); err != nil {
		t.Fatal(err)
	}
	if len(older) > mostLog || len(newer) > mostLog || len(older) < mostLog/2 {
		t.Errorf("%d and %d bytes; %d are allowed", len(older), len(newer), mostLog)
	}
	all := slices.Concat(older, newer)
	whole, rest, found := bytes.Cut(all, []byte("panic: the end"))
	if !found || !bytes.Contains(rest, []byte("goroutine 1")) {
		t.Errorf("what it died of is not in the log: %.200q", rest)
	}
	text := strings.TrimSuffix(string(whole), "\n")
	list := strings.Split(text, "\n")
	for i, line := range list {
		if want := fmt.Sprintf(logLine, lines-len(list)+i); line+"\n" != want {
			t.Fatalf("line %d is %q, want %q", i, line, want)
		}
	}
	if n := bytes.Count(told, []byte("\n")); n != lines {
		t.Errorf("%d lines of %d are in the journal", n, lines)
	}
}

// A log that is there is continued; what is not systemd's stream is no journal.
func TestOpenLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("JOURNAL_STREAM", "1:1")
	f, journal, err := openLog(path)
	if err != nil || journal != nil {
		t.Fatal(journal, err)
	}
	l := &log{path: path, most: 10, file: f}
	defer f.Close()
	for _, line := range []string{"1\n", "12345678\n", "1234567890123\n", "2\n"} {
		if _, err := l.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{path: "2\n", OlderLog(path): "1234567890123\n"} {
		if b, err := os.ReadFile(name); string(b) != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", name, b, err, want)
		}
	}
}

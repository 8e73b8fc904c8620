package daemon

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"drafter/api"
	"drafter/internal/control"
)

// The last lines are lines, however they were printed.
func TestTail(t *testing.T) {
	for n, want := range map[int]string{
		0: "", 1: "four\n", 2: "three\nfour\n", 3: "two\nthree\nfour\n", 4: "one\ntwo\nthree\nfour\n", 9: "one\ntwo\nthree\nfour\n",
	} {
		last := tail{most: n}
		for _, text := range []string{"one\ntwo\nth", "ree\n", "four\n"} {
			last.add(api.LogLine{Text: text})
		}
		got := ""
		for _, l := range last.lines {
			got += l.Text
		}
		if got != want {
			t.Errorf("the last %d: %q, want %q", n, got, want)
		}
	}
	last := tail{most: 1}
	last.add(api.LogLine{Text: "a\nunfinished"})
	if len(last.lines) != 1 || last.lines[0].Text != "unfinished" {
		t.Error(last.lines)
	}
}

// A log is read once, also what is written in parts, and what comes after its file was rotated.
func TestLogReader(t *testing.T) {
	dir := t.TempDir()
	files := control.LogFiles(dir)
	write := func(b []byte) {
		t.Helper()
		f, err := os.OpenFile(files[1], os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err == nil {
			_, err = f.Write(b)
		}
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	line := func(text string) []byte {
		b, err := json.Marshal(control.Line{Text: text})
		if err != nil {
			t.Fatal(err)
		}
		return append(b, '\n')
	}
	r := logReader{dir: dir}
	reads := func(want string) {
		t.Helper()
		got := ""
		if err := r.read(func(l api.LogLine) error { got += l.Text; return nil }); err != nil || got != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
	reads("")
	write(line("a"))
	reads("a")
	half := line("b")
	write(half[:5])
	reads("")
	write(half[5:])
	write(line("c"))
	if err := os.Rename(files[1], files[0]); err != nil {
		t.Fatal(err)
	}
	write(line("d"))
	reads("bcd")
	reads("")
	if err := r.close(); err != nil {
		t.Error(err)
	}
	r = logReader{dir: dir}
	reads("abcd")
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// A log is read on in the seat to which a VM has moved.
func TestLogMovesOn(t *testing.T) {
	write := func(dir string, lines ...string) {
		t.Helper()
		if err := os.WriteFile(control.LogFiles(dir)[1], []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	one, two := t.TempDir(), t.TempDir()
	old, a, b, c := `{"text":"old","boot":"1","next":9}`, `{"text":"a","boot":"2","next":1}`,
		`{"text":"b","boot":"2","next":2}`, `{"text":"c","boot":"3","next":1}`
	write(one, old, a)
	write(two, old, a, b, c)
	r := logReader{dir: one}
	var got string
	read := func() {
		t.Helper()
		if err := r.read(func(l api.LogLine) error { got += l.Text; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	read()
	if err := r.moveOn(two); err != nil {
		t.Fatal(err)
	}
	read()
	if err := r.close(); err != nil || got != "oldabc" {
		t.Errorf("%q, %v", got, err)
	}
}

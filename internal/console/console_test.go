package console

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
)

func TestLastLines(t *testing.T) {
	var l LastLines
	if got := l.Quote("x"); got != "" {
		t.Errorf("nothing said: %q", got)
	}
	for i := range 1000 {
		fmt.Fprintf(&l, "line %d\r\n", i)
	}
	got := l.Quote("the last lines")
	if !strings.HasPrefix(got, "; the last lines: ") || !strings.HasSuffix(got, "line 998 | line 999") || len(got) > keepBytes+500 || strings.ContainsAny(got, "\r\n") {
		t.Errorf("%q", got)
	}
}

// pipe is a writer that is closed by nobody.
type pipe struct{ io.Writer }

func (pipe) Close() error { return nil }

// A guest that writes for ever is cut; a system that boots is not.
func TestOutputIsBounded(t *testing.T) {
	line := strings.Repeat("x", 62) + "\r\n"
	for name, size := range map[string]int{"boot": outputAtOnce, "flood": 16 * outputAtOnce} {
		synctest.Test(t, func(t *testing.T) { // the clock stands still while it writes
			var out bytes.Buffer
			w := NewOutput(&out)
			c := New(io.NopCloser(strings.NewReader(strings.Repeat(line, size/len(line)))), pipe{io.Discard}, w, nil)
			c.Run()
			w.Close()
			said := fmt.Sprintf("[drafter: left out %d bytes of the console]", size-outputAtOnce)
			if cut := strings.Contains(out.String(), said); cut != (size > outputAtOnce) || out.Len() > outputAtOnce+200 || out.Len() < outputAtOnce {
				t.Errorf("%s of %d bytes: %d came, and at the end %q", name, size, out.Len(), out.String()[out.Len()-70:])
			}
		})
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain, ünicode 世界 | \"quoted\" \\": "plain, ünicode 世界 | \"quoted\" \\",
		"\x1b[2J\x1b]0;title\a":             `\x1b[2J\x1b]0;title\a`,
		"a\r\nb\x00\x9b\xff":                `a\r\nb\x00\x9b\xff`,
		"\u009b31m\u202egpj":                `\u009b31m\u202egpj`,
	} {
		if got := Printable(in); got != want {
			t.Errorf("%q: %s; want %s", in, got, want)
		}
	}
	var l LastLines
	fmt.Fprintf(&l, "\x1b[2Jpanic\n")
	if got := l.Quote("x"); got != `; x: \x1b[2Jpanic` {
		t.Errorf("%q", got)
	}
}

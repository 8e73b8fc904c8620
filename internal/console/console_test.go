package console

import (
	"fmt"
	"strings"
	"testing"
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

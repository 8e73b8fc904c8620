package daemon

import (
	"testing"

	"drafter/api"
)

// The last lines are lines, however they were printed.
func TestTail(t *testing.T) {
	list := func() []api.LogLine {
		return []api.LogLine{{Text: "one\ntwo\nth"}, {Text: "ree\n"}, {Text: "four\n"}}
	}
	for n, want := range map[int]string{-1: "one\ntwo\nthree\nfour\n", 0: "", 1: "four\n", 2: "three\nfour\n", 3: "two\nthree\nfour\n", 4: "one\ntwo\nthree\nfour\n", 9: "one\ntwo\nthree\nfour\n"} {
		got := ""
		for _, l := range tail(list(), n) {
			got += l.Text
		}
		if got != want {
			t.Errorf("the last %d: %q, want %q", n, got, want)
		}
	}
	if got := tail([]api.LogLine{{Text: "a\nunfinished"}}, 1); len(got) != 1 || got[0].Text != "unfinished" {
		t.Error(got)
	}
}

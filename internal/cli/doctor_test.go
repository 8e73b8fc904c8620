package cli

import (
	"bytes"
	"testing"

	"drafter/api"
)

// A result is one line, and its remedy another. On a terminal levels have colours.
func TestShowChecks(t *testing.T) {
	results := []api.Check{
		{Name: "kernel", Level: api.OK, Text: "Linux 6.7"},
		{Name: "fuse", Level: api.Bad, Text: "none", Remedy: "load it"},
	}
	for colours, want := range map[bool]string{
		false: "ok       kernel       Linux 6.7\nerror    fuse         none\n                      remedy: load it\n",
		true:  "\x1b[32mok     \x1b[0m  kernel       Linux 6.7\n\x1b[31merror  \x1b[0m  fuse         none\n                      remedy: load it\n",
	} {
		var out bytes.Buffer
		if showChecks(&out, results, colours); out.String() != want {
			t.Errorf("%q, want %q", out.String(), want)
		}
	}
}

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drafter/bench"
)

// A report of an older result says which figures that lacks, and has the others.
func TestOlderResult(t *testing.T) {
	input := filepath.Join(t.TempDir(), "result.json")
	older := bench.Result{ // of some parts only
		Rounds: map[string][]float64{"resume_ms": {7, 8, 9}},
		Ratios: map[string]float64{"resume_ms": 8},
	}
	text, err := json.Marshal(older)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(input, text, 0o600); err != nil {
		t.Fatal(err)
	}
	page := reported(t, input)
	for _, line := range []string{
		"| `resume_ms` | ≤ 8 | 8 (7 … 9) | 3 | reached |",
		"| `suspend_500_pause_ms` | ≤ 30 | not measured | | |",
	} {
		if !strings.Contains(page, line) {
			t.Errorf("%q is not in the report:\n%s", line, page)
		}
	}
}

// The result that lies in the repository can be reported, whenever it was made.
func TestLatestResult(t *testing.T) {
	page := reported(t, "../results/latest.json")
	for _, b := range bars {
		if strings.Count(page, "`"+b.key+"` | "+b.String()+" |") != 1 {
			t.Errorf("the report does not have %s once", b.key)
		}
	}
}

func TestVerdict(t *testing.T) {
	for _, c := range []struct {
		bar  bar
		v    float64
		want string
	}{
		{bar{sign: "≤", value: 0}, 0, "reached"},
		{bar{sign: "≤", value: 0}, 0.1, "not reached"},
		{bar{sign: "≥", value: 1}, 1, "reached"},
		{bar{sign: "≥", value: 1}, 0.9, "not reached"},
		{bar{}, 0.9, ""},
	} {
		if got := c.bar.verdict(c.v); got != c.want {
			t.Errorf("%v at %s is %q instead of %q", c.v, c.bar, got, c.want)
		}
	}
}

// reported makes the page of a result.
func reported(t *testing.T, input string) string {
	t.Helper()
	dir := t.TempDir()
	if err := write(input, dir); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(dir, "benchmarks.md"))
	if err != nil {
		t.Fatal(err)
	}
	return string(page)
}

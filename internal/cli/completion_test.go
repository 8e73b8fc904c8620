package cli

import (
	"os/exec"
	"strings"
	"testing"

	"drafter/internal/need"
)

// The scripts are ones that bash reads, and there is none for a shell that nobody has.
func TestCompletion(t *testing.T) {
	bash := need.Program(t, "bash")
	var out, errs strings.Builder
	if code := Run(t.Context(), []string{"drafter", "completion", "bash"}, &out, &errs); code != exitOK {
		t.Fatal(code, errs.String())
	}
	check := exec.CommandContext(t.Context(), bash, "-n")
	check.Stdin = strings.NewReader(out.String())
	if said, err := check.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, said)
	}
	for args, code := range map[string]int{"zsh": exitOK, "fish": exitOK, "csh": exitUsage, "": exitUsage} {
		out.Reset()
		got := Run(t.Context(), append([]string{"drafter", "completion"}, strings.Fields(args)...), &out, &errs)
		if got != code || (code == exitOK) != strings.Contains(out.String(), "drafter") {
			t.Errorf("%q: exit code %d, want %d", args, got, code)
		}
	}
	out.Reset()
	if Run(t.Context(), []string{"drafter", "__complete", "run", "--pull", ""}, &out, &errs); !strings.HasPrefix(out.String(), "missing\nalways\nnever\n") {
		t.Errorf("--pull is completed with %q", out.String())
	}
}

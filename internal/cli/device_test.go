package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What a mounter left of a device that is elsewhere is neither called sound nor exported.
func TestDeviceOfAMounter(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, error) {
		var out strings.Builder
		cmd := newDevice()
		cmd.SetOut(&out)
		cmd.SetErr(&out)
		cmd.SetArgs(append(args, "--base", base, "--overlay", "", "--state", ""))
		err := cmd.Execute()
		return out.String(), err
	}
	if out, err := run("check"); err != nil || out != "The device is sound.\n" {
		t.Errorf("a sound device: %q, %v", out, err)
	}
	for status, want := range map[string]string{"gone": "moved away", "leaving": "whether the target has it", "arriving": "never wholly arrived"} {
		if err := os.WriteFile(base+".status", []byte(status+" 00000000-0000-0000-0000-000000000000\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := run("check"); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s is told as %q, %v", status, out, err)
		}
		exported := filepath.Join(dir, "exported")
		if _, err := run("export", "--output", exported); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s is exported: %v", status, err)
		}
		if _, err := os.Stat(exported); err == nil {
			t.Errorf("%s: an export is there", status)
		}
	}
}

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"drafter/peer"
	"drafter/vmm"
	"drafter/vmm/qemu"
)

// The program of docs/embedding.md, in a module of its own, makes a package and moves its VM with
// public packages alone.
func TestEmbedding(t *testing.T) {
	dir := t.TempDir()
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	embed := buildEmbedding(t, run, dir)
	out := run(embed, filepath.Join(work, "out/blueprint"), "vm")
	for _, want := range []string{"runs at the source\n", "runs at the target; downtime is known: true\n", "moved away from the source\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("the program does not say %q:\n%s", want, out)
		}
	}
}

// buildEmbedding makes a module of the program in dir, and builds it.
func buildEmbedding(t *testing.T, run func(name string, args ...string) string, dir string) string {
	t.Helper()
	text, err := os.ReadFile("../docs/embedding.md")
	if err != nil {
		t.Fatal(err)
	}
	program := regexp.MustCompile("(?s)\n```go\n(.*?)\n```\n").FindSubmatch(text)
	if program == nil {
		t.Fatal("docs/embedding.md has no program")
	}
	module, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	sum, err := os.ReadFile("../go.sum")
	if err != nil {
		t.Fatal(err)
	}
	// What the library requires, its users do: go mod tidy would ask a proxy for it.
	mod = []byte(strings.Replace(string(mod), "module drafter\n", "module example.com/embedding\n\nrequire drafter v0.0.0\n\nreplace drafter => "+module+"\n", 1))
	for name, content := range map[string][]byte{"main.go": program[1], "go.mod": mod, "go.sum": sum} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run("go", "build", "-o", "embed", ".")
	return filepath.Join(dir, "embed")
}

// newPeer is a peer for an instance of the package, in a network namespace that 'drafter nat' made.
// The instance is kept in dir.
func newPeer(netns, dir string, options ...func(*peer.Config)) (*peer.Peer, error) {
	devices, err := peer.PackageDevices(filepath.Join(work, "out/package"), dir)
	if err != nil {
		return nil, err
	}
	config := peer.Config{
		Host:          vmm.Host{Drivers: vmm.Drivers{qemu.Driver{}}, VMM: vmm.VMMAuto, Accel: vmm.AccelAuto, BaseDir: filepath.Join(work, "vms"), Netns: netns, CgroupVersion: 2},
		Devices:       devices,
		ResumeTimeout: time.Minute,
		RescueTimeout: 5 * time.Second,
	}
	for _, option := range options {
		option(&config)
	}
	return peer.New(config)
}

package e2e

import (
	"bytes"
	"compress/gzip"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// The limits hold in cgroup version 2, too, whose controllers this host may have in version 1: the
// tests of package process run in a guest, whose kernel has them all.
func TestLimitsInVersion2(t *testing.T) {
	s := emptySite(t)
	binary := filepath.Join(s.dir, "process.test")
	build := exec.Command("go", "test", "-c", "-ldflags", "-s -w", "-o", binary, "drafter/internal/process")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	p := resume(t, "ark0", filepath.Join(s.dir, "instance"))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for chunk := range slices.Chunk(packed.Bytes(), 1<<20) {
		if r, err := p.Agent().Exec(ctx, chunk, "sh", "-c", "cat >> /tmp/process.test.gz"); err != nil || r.GetExitStatus() != 0 {
			t.Fatal(r, err)
		}
	}
	const script = "cd /tmp && gunzip process.test.gz && chmod +x process.test && exec ./process.test -test.v -test.run 'TestStartsInCgroup/2|TestLimits/2|TestSomebodysCgroup/2|TestDelegated'"
	r, err := p.Agent().Exec(ctx, nil, "sh", "-c", script)
	if err != nil || r.GetExitStatus() != 0 || bytes.Contains(r.GetStdout(), []byte("SKIPPED")) {
		t.Errorf("exit status %d, %v: %s%s", r.GetExitStatus(), err, r.GetStdout(), r.GetStderr())
	}
	t.Logf("%s", r.GetStdout())
}

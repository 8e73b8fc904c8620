// Package ocitest runs a real OCI registry, distribution's, for tests.
package ocitest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"drafter/internal/need"
)

// Start runs the registry until the test ends, and returns its HOST:PORT.
func Start(t testing.TB) string {
	t.Helper()
	program := need.Program(t, "registry")
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	config := fmt.Sprintf("version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: %s/data\nhttp:\n  addr: %s\n", dir, host)
	path := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "serve", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // by that
	})
	for range 200 {
		if c, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", host); err == nil {
			_ = c.Close() // nothing was sent
			return host
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("the registry does not listen: %s", &output)
	return ""
}

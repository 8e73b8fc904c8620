package firecracker

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

	"drafter/internal/console"
)

// What a guest can make Firecracker write is left out of the log beyond a limit, whatever its
// length.
func TestFollowLog(t *testing.T) {
	var log bytes.Buffer
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer w.Close()
		fmt.Fprintf(w, "2026-01-01T00:00:00 [vm:fc_vcpu 0:ERROR] \x1b[2Jlong %s\n", strings.Repeat("x", 200<<10))
		for i := range 10000 {
			fmt.Fprintf(w, "2026-01-01T00:00:00 [vm:fc_vcpu 0:ERROR] virtio %d\n", i)
		}
	}()
	var last console.LastLines
	followLog(r, &last, slog.New(slog.NewTextHandler(&log, nil)))
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if lines := strings.Count(log.String(), "\n"); lines > 50 || log.Len() > 10*maxLine {
		t.Errorf("%d lines of log, %d bytes", lines, log.Len())
	}
	if !strings.Contains(log.String(), "virtio 0") || strings.Contains(log.String(), "\x1b") {
		t.Errorf("the log:\n%s", log.String())
	}
	if quote := last.Quote("its last words"); !strings.HasSuffix(quote, "virtio 9999") {
		t.Error(quote)
	}
}

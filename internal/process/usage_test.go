package process

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"drafter/internal/await"
)

// A process' usage is that of all its descendants; the largest of them is the VMM.
func TestUsage(t *testing.T) {
	cmd := exec.Command(
		"sh",
		"-c",
		"sh -c 'while :; do :; done' & head -c 30000000 /dev/zero | tail -c 20000000 >/dev/null; sleep 1000 & wait",
	)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		below, err := children(cmd.Process.Pid)
		if err != nil || len(below) < 2 {
			t.Error(below, err)
		}
		for _, pid := range below {
			if p, err := os.FindProcess(pid); err == nil {
				p.Kill()
			}
		}
		cmd.Wait()
	}()
	await.True(t, "the loop's time counts", func() bool {
		u, err := UsageOf(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		return u.CPU > 200*time.Millisecond && u.Resident > 100<<10 && u.Resident < 1<<30 &&
			u.Received == 0
	})
	if _, err := UsageOf(1 << 22); err == nil {
		t.Error("there is no such process")
	}
}

// Of a namespace's interfaces only the tap's count: what it receives the guest has sent.
func TestTapBytes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dev")
	const text = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       7       1    0    0    0     0          0         0        7       1    0    0    0     0       0          0
  tap0: 1296    16    0    0    0     0          0         0  4294967296    22    0    0    0     0       0          0
 veth0: 5    16    0    0    0     0          0         0  6    22    0    0    0     0       0          0
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if received, sent, err := tapBytes(path); received != 1296 || sent != 4294967296 || err != nil {
		t.Error(received, sent, err)
	}
	if _, _, err := tapBytes(path + "none"); err != nil {
		t.Error("a VMM that has just ended:", err)
	}
}

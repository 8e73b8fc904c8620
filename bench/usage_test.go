package bench

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

// The time of a process counts, that of one below it, and what one has used that has ended; what
// was used before does not.
func TestCPUMeter(t *testing.T) {
	const each = 0.3 // seconds
	burn := func(seconds float64) {
		before, err := cpuSeconds(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		for now := before; now-before < seconds; {
			if now, err = cpuSeconds(os.Getpid()); err != nil {
				t.Fatal(err)
			}
		}
	}
	burn(each)
	m := meterCPU(os.Getpid())
	burn(each)
	// a child of a child, which bounds its own time
	child := exec.Command("sh", "-c", "sh -c 'ulimit -t 1; while :; do :; done'; sleep 0.3")
	if err := child.Run(); err != nil {
		t.Fatal(err)
	}
	// SIGXCPU came after a second
	if got := m.used(); got < each+0.8 || got > each+1.8 {
		t.Errorf("%.2f s were used", got)
	}
	m.restart()
	time.Sleep(20 * time.Millisecond)
	if got := m.end(); got > 0.2 {
		t.Errorf("%.2f s were used after a restart", got)
	}
}

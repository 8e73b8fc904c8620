package daemon

import (
	"os/exec"
	"syscall"
	"testing"

	"github.com/prometheus/procfs"

	"drafter/api"
)

// What processes use is counted with what those use that they have started.
func TestProcessesOfVM(t *testing.T) {
	cmd := exec.Command("sh", "-c", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 1000 & echo; wait")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		t.Fatal(err)
	}
	var s api.Stats
	if err := addProcesses(&s, proc, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if s.Processes != 2 || s.CPUNanoseconds <= 0 || s.Memory <= 0 {
		t.Errorf("%+v", s)
	}
	// One that has gone is nobody's.
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	s = api.Stats{}
	if err := addProcesses(&s, proc, gone.Process.Pid); err != nil || s.Processes != 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

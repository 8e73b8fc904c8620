package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	until "drafter/internal/await"
	"drafter/internal/need"
)

// mounts is a drafter that runs until it is ended: a mounter of a small device. It may be started
// by a command.
func mounts(t *testing.T, by ...string) *exec.Cmd {
	t.Helper()
	need.FUSE(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "data"), make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args := slices.Concat(by, []string{exe, "mounter", "--raddr", "", "--laddr", "", "--links", "", "--chroot-base-dir", "vms", "--log-format", "json",
		"--devices", `[{"name":"data","base":"data","blockSize":65536}]`})
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "DRAFTER_AS=program")
	return cmd
}

// await reads a log until it has a line with message.
func await(t *testing.T, log io.Reader, message string) {
	t.Helper()
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		var line struct{ Msg string }
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == message {
			return
		}
	}
	t.Fatalf("the log has no line %q", message)
}

// ends signals a command, which shall end well.
func ends(t *testing.T, cmd *exec.Cmd, signal os.Signal) {
	t.Helper()
	if err := cmd.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(time.Minute):
		_ = cmd.Process.Kill()
		t.Fatalf("it does not end: %v", <-ended)
	}
}

// A pipe that nobody reads is no reason not to begin, nor not to end.
func TestStuckOutput(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	fd := int(w.Fd())
	if err := syscall.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	for err == nil { // until it is full
		_, err = syscall.Write(fd, make([]byte, 4096))
	}
	if err := syscall.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	cmd := mounts(t)
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	until.True(t, "a device is exposed", func() bool {
		found, _ := filepath.Glob(filepath.Join(cmd.Dir, "vms/*/*/devices/data"))
		return len(found) == 1
	})
	ends(t, cmd, syscall.SIGTERM)
}

// A terminal that goes away ends a command as SIGTERM does; under nohup it goes on.
func TestHangup(t *testing.T) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP) // else a test under nohup starts what ignores it
	defer signal.Stop(hangups)
	for _, by := range [][]string{nil, {"nohup"}} {
		cmd := mounts(t, by...)
		log, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		await(t, log, "Exposed device")
		if by != nil {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
			if err != nil {
				t.Fatal(err)
			}
			_, ignored, _ := strings.Cut(string(status), "SigIgn:\t")
			if signals, err := strconv.ParseUint(strings.Fields(ignored)[0], 16, 64); err != nil || signals&1 == 0 { // signal 1
				t.Errorf("it ignores the signals %x, %v", signals, err)
			}
			ends(t, cmd, syscall.SIGTERM)
			continue
		}
		ends(t, cmd, syscall.SIGHUP)
	}
}

// A short command whose reader has gone ends quietly.
func TestQuietEnd(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	for _, args := range [][]string{{"version"}, {"peer", "--help"}} {
		cmd := exec.Command("/proc/self/exe", args...)
		cmd.Env = append(os.Environ(), "DRAFTER_AS=program")
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = w, &stderr
		if err := cmd.Run(); err != nil || strings.TrimSpace(stderr.String()) != "" {
			t.Errorf("%s: %v, %q", args[0], err, stderr.String())
		}
	}
}

package detached

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if path := os.Getenv("DETACHED_TEST_LOCK"); path != "" {
		if os.Getenv("DETACHED_TEST_FAILS") != "" {
			os.Exit(3)
		}
		if _, err := Lock(path); err != nil {
			os.Exit(1)
		}
		daemon.SdNotify(false, daemon.SdNotifyReady)
		select {}
	}
	goleak.VerifyTestMain(m)
}

// A process that was started is found by its lock, as long as it lives, and by nobody else's.
func TestFind(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	t.Setenv("DETACHED_TEST_LOCK", path)
	if p, err := Find(path); p != nil || err != nil {
		t.Fatal(p, err)
	}
	started, err := Start(t.Context(), Command{Lock: path, Program: os.Args[0], Args: []string{"-test.run=^$"}})
	if err != nil {
		t.Fatal(err)
	}
	defer started.Close()
	if _, err := os.Lstat(path + ".notify"); err == nil {
		t.Error("its socket is left")
	}
	found, err := Find(path)
	if err != nil || found == nil || found.PID != started.PID {
		t.Fatal(found, err)
	}
	defer found.Close()
	if err := found.Signal(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	<-found.Done()
	<-started.Done()
	if p, err := Find(path); p != nil || err != nil {
		t.Error(p, err)
	}
	if err := found.Signal(syscall.SIGTERM); err != nil {
		t.Error("a process that has ended:", err)
	}
}

// A process that ends before it is ready is an error.
func TestNotReady(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	t.Setenv("DETACHED_TEST_LOCK", path)
	t.Setenv("DETACHED_TEST_FAILS", "x")
	_, err := Start(t.Context(), Command{Lock: path, Program: os.Args[0], Args: []string{"-test.run=^$"}})
	if err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Error(err)
	}
}

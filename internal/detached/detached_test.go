package detached

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/goleak"

	"drafter/internal/lockfile"
)

func TestMain(m *testing.M) {
	if path := os.Getenv("DETACHED_TEST_LOCK"); path != "" {
		if lines := os.Getenv("DETACHED_TEST_LINES"); lines != "" {
			logLines(lines)
		}
		if os.Getenv("DETACHED_TEST_FAILS") != "" {
			os.Exit(3)
		}
		if _, err := Lock(path); err != nil {
			os.Exit(1)
		}
		if os.Getenv("DETACHED_TEST_SLOW") == "" {
			daemon.SdNotify(false, daemon.SdNotifyReady)
		}
		for {
			time.Sleep(time.Hour)
		}
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

// A lock that names this process, or one that has not got it, is nobody's process to signal.
func TestFindNobodyElse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	lock, err := lockfile.Try(path)
	if err != nil {
		t.Fatal(err)
	}
	found := make(chan *Process)
	go func() {
		p, err := Find(path)
		if err != nil {
			t.Error(err)
		}
		found <- p
	}()
	select {
	case p := <-found:
		t.Fatal("it was found: ", p.PID)
	case <-time.After(20 * time.Millisecond):
	}
	// as one does whose number was given to process 1 before it could write its own
	if _, err := lock.File().WriteAt([]byte("process 1 (init)\n"), 0); err != nil {
		t.Fatal(err)
	}
	select {
	case p := <-found:
		t.Fatal("it was found: ", p.PID)
	case <-time.After(20 * time.Millisecond):
	}
	if err := lock.Release(); err != nil {
		t.Error(err)
	}
	if p := <-found; p != nil {
		t.Error(p.PID)
	}
}

// A process that starts is ended with the context, and left alone if that is what its end means.
func TestStartCutOff(t *testing.T) {
	for _, cause := range []error{ErrLeave, errors.New("it was cancelled")} {
		path := filepath.Join(t.TempDir(), "lock")
		t.Setenv("DETACHED_TEST_LOCK", path)
		t.Setenv("DETACHED_TEST_SLOW", "x")
		ctx, cancel := context.WithCancelCause(t.Context())
		stop := time.AfterFunc(50*time.Millisecond, func() { cancel(cause) })
		if _, err := Start(ctx, Command{Lock: path, Program: os.Args[0], Args: []string{"-test.run=^$"}}); !errors.Is(err, cause) {
			t.Error(err)
		}
		stop.Stop()
		p, err := Find(path)
		if err != nil || (p != nil) != errors.Is(cause, ErrLeave) {
			t.Fatal(p, err)
		}
		if p != nil {
			if err := errors.Join(p.End(time.Minute), p.Close()); err != nil {
				t.Error(err)
			}
		}
	}
}

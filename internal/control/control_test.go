package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"drafter/agent"
	"drafter/internal/kind"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testDir makes a directory whose name leaves room for a socket's.
func testDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "c")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A process is found while it lives, says what it does, is asked to suspend, and leaves how it ended.
func TestControl(t *testing.T) {
	dir := testDir(t)
	suspended := make(chan struct{})
	s, err := Serve(dir, func() { close(suspended) }, func() *agent.Client { return nil })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Serve(dir, nil, nil); !errors.Is(err, kind.ErrInUse) {
		t.Error("a second process took the directory:", err)
	}
	c, err := Dial(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	status, err := c.Status(t.Context(), &StatusRequest{})
	if err != nil || status.GetState() != Starting || status.GetPid() != int64(os.Getpid()) {
		t.Error(status, err)
	}
	var wait sync.WaitGroup
	wait.Go(func() {
		status, err := c.Status(t.Context(), &StatusRequest{State: Starting})
		if err != nil || status.GetState() != Running || status.GetBooted() != "no state" {
			t.Error(status, err)
		}
	})
	s.Set(Running, "no state")
	wait.Wait()
	guest, err := Guest(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := guest.Run(t.Context(), agent.Command{Args: []string{"sh"}}); err == nil || !strings.Contains(err.Error(), "cannot be called at this moment") {
		t.Error(err)
	}
	if err := guest.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Suspend(t.Context(), &SuspendRequest{}); err != nil {
		t.Error(err)
	}
	<-suspended
	at := time.Now().UTC()
	if err := s.Close(End{Outcome: Suspended, At: at}); err != nil {
		t.Error(err)
	}
	<-c.Gone()
	if end, err := LastEnd(dir); err != nil || end == nil || end.Outcome != Suspended || !end.At.Equal(at) {
		t.Error(end, err)
	}
	if _, err := Dial(t.Context(), dir); !errors.Is(err, ErrNone) {
		t.Error(err)
	}
}

// talk serves an agent that keeps a log, and connects with it.
func talk(t *testing.T, log *agent.Log) *agent.Client {
	t.Helper()
	listener, err := net.Listen("unix", filepath.Join(testDir(t), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := (&agent.Server{Log: log}).Serve(ctx, listener); err != nil && ctx.Err() == nil {
			t.Error(err)
		}
	})
	conn, err := net.Dial("unix", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := agent.NewClient(conn)
	t.Cleanup(func() {
		c.Close()
		cancel()
		serving.Wait()
	})
	return c
}

func read(t *testing.T, dir string) (text string) {
	t.Helper()
	for _, path := range LogFiles(dir) {
		b, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for line := range bytes.Lines(b) {
			var l Line
			if json.Unmarshal(line, &l) == nil {
				text += l.Stream + ":" + l.Text
			}
		}
	}
	return text
}

// What a service prints is written once, also when the process that writes it is another one, was
// killed in the middle of a line, or the guest has booted again.
func TestLog(t *testing.T) {
	dir := testDir(t)
	log := agent.NewLog()
	print := func(text string, stderr bool) {
		t.Helper()
		if err := log.Copy(strings.NewReader(text), stderr); err != nil {
			t.Fatal(err)
		}
	}
	c := talk(t, log)
	keep := func(c *agent.Client, until string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		var keeping sync.WaitGroup
		keeping.Go(func() {
			if _, err := Log(ctx, dir, func() *agent.Client { return c }, slog.Default()); err != nil {
				t.Error(err)
			}
		})
		for !strings.HasSuffix(read(t, dir), until) && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		cancel()
		keeping.Wait()
	}
	print("one\n", false)
	keep(c, "one\n")
	print("two\n", true)
	f, err := os.OpenFile(filepath.Join(dir, logFile), os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.WriteString(`{"text":"cut o`)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	keep(c, "two\n")
	print("a\xc3", false) // "aé", written in two parts
	keep(c, "a")
	print("\xa9\n", false)
	keep(c, "\n")
	other := agent.NewLog()
	if err := other.Copy(strings.NewReader("booted again\n"), false); err != nil {
		t.Fatal(err)
	}
	c = talk(t, other)
	keep(c, "booted again\n")
	other.End(7)
	ended, err := Log(t.Context(), dir, func() *agent.Client { return c }, slog.Default())
	if err != nil || ended == nil || *ended != 7 {
		t.Error(ended, err)
	}
	if got, want := read(t, dir), "stdout:one\nstderr:two\nstdout:astdout:é\nstdout:booted again\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// The exit status of a service that has printed nothing is known, though its guest says it only once.
func TestSilentEnd(t *testing.T) {
	log := agent.NewLog()
	log.End(3)
	c := talk(t, log)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	asked := 0
	ended, err := Log(ctx, testDir(t), func() *agent.Client {
		if asked++; asked > 1 {
			return nil // it has powered itself off
		}
		return c
	}, slog.Default())
	if err != nil || ended == nil || *ended != 3 {
		t.Error(ended, err)
	}
}

package instance

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	"drafter/agent"
	"drafter/vmm"
)

// fickle is an agent that names another closed port at each question, and answers at once.
type fickle struct {
	agent.Server
	asked atomic.Uint32 // by handlers, one of which may outlive its server
}

func (f *fickle) Ready(context.Context, *agent.ReadyRequest) (*agent.ReadyResponse, error) {
	return &agent.ReadyResponse{ClosedPorts: []uint32{f.asked.Add(1)}}, nil
}

// serveAgent serves an agent until the test ends. It returns what connects with it.
func serveAgent(t *testing.T, guest agent.AgentService) (dial func() net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	agent.RegisterAgentService(server, guest)
	served := make(chan error)
	go func() { served <- server.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		err := server.Close()
		if serr := <-served; !errors.Is(serr, ttrpc.ErrServerClosed) {
			err = errors.Join(err, serr)
		}
		if err != nil {
			t.Error(err)
		}
	})
	return func() net.Conn {
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
}

// late is the agent of a guest that is told the time.
type late struct {
	agent.Server
	most chan time.Duration // by how much its clock may be set at most
}

func (l *late) CatchUp(_ context.Context, r *agent.CatchUpRequest) (*agent.CatchUpResponse, error) {
	l.most <- time.Duration(r.GetMostStepNano())
	return &agent.CatchUpResponse{}, nil
}

func (l *late) AfterResume(_ context.Context, r *agent.AfterResumeRequest) (*agent.AfterResumeResponse, error) {
	l.most <- time.Duration(r.GetMostStepNano())
	return &agent.AfterResumeResponse{}, nil
}

// connected is a machine whose guest has an agent.
type connected struct {
	vmm.Machine // nothing else of which is used
	dial        func() net.Conn
}

func (c connected) GuestConn(context.Context, uint32) (net.Conn, error) { return c.dial(), nil }

// A guest that stood still for a disk is told the time when it goes on, or when its agent is next
// spoken to: as much as it missed, and once.
func TestWentOn(t *testing.T) {
	guest := &late{most: make(chan time.Duration, 1)}
	i := &Instance{log: slog.Default(), machine: connected{nil, serveAgent(t, guest)}, config: &vmm.PackageConfig{}}
	i.config.AgentPort = 1
	told := func(want time.Duration) {
		t.Helper()
		select {
		case got := <-guest.most:
			if got != want {
				t.Errorf("the clock may be set by %s; want %s", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Error("the guest was not told")
		}
	}
	i.wentOn(time.Hour) // while the VM is about to be paused, say
	i.stood = time.Second
	if err := i.RescueAgent(t.Context(), 10*time.Second); err != nil {
		t.Fatal(err)
	}
	told(time.Hour + 2*time.Second)
	i.wentOn(time.Minute)
	told(time.Minute + sameTime)
	i.catchUp.Wait() // it is noted behind the answer
	if err := i.dropAgent(); err != nil {
		t.Error(err)
	}
	if err := i.RescueAgent(t.Context(), 10*time.Second); err != nil {
		t.Fatal(err)
	}
	told(2 * time.Second)
	i.keepClock = true
	i.wentOn(time.Minute)
	if err := i.dropAgent(); err != nil || i.missed.Load() != 0 {
		t.Error(err, i.missed.Load())
	}
}

// logged is a log to which what comes last is written at some time.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// However often a guest changes its mind, the log stays short.
func TestFickleGuest(t *testing.T) {
	guest := &fickle{}
	client := agent.NewClient(serveAgent(t, guest)())
	var log logged
	i := &Instance{log: slog.New(slog.NewTextHandler(&log, nil))}
	i.agent.Store(client)
	err := i.AwaitReady(t.Context(), 2*time.Second)
	if err == nil || !strings.Contains(err.Error(), "nothing listens on its ports") {
		t.Errorf("never ready: %v", err)
	}
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	const most = 20 // ten at once, and one a second
	if lines := strings.Count(log.String(), "\n"); guest.asked.Load() <= most || lines > most {
		t.Errorf("%d answers made %d lines", guest.asked.Load(), lines)
	}
}

package instance

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	"drafter/agent"
)

// fickle is an agent that names another closed port at each question, and answers at once.
type fickle struct {
	agent.Server
	asked atomic.Uint32 // by handlers, one of which may outlive its server
}

func (f *fickle) Ready(context.Context, *agent.ReadyRequest) (*agent.ReadyResponse, error) {
	return &agent.ReadyResponse{ClosedPorts: []uint32{f.asked.Add(1)}}, nil
}

// However often a guest changes its mind, the log stays short.
func TestFickleGuest(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	guest := &fickle{}
	agent.RegisterAgentService(server, guest)
	served := make(chan error)
	go func() { served <- server.Serve(context.Background(), l) }()
	var log bytes.Buffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(old)

	client := agent.NewClient(conn)
	i := &Instance{agent: client}
	err = i.AwaitReady(t.Context(), 2*time.Second)
	if err == nil || !strings.Contains(err.Error(), "nothing listens on its ports") {
		t.Errorf("never ready: %v", err)
	}
	if err := errors.Join(client.Close(), server.Close()); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil && !errors.Is(err, ttrpc.ErrServerClosed) {
		t.Error(err)
	}
	const most = 20 // ten at once, and one a second
	if lines := strings.Count(log.String(), "\n"); guest.asked.Load() <= most || lines > most {
		t.Errorf("%d answers made %d lines", guest.asked.Load(), lines)
	}
}

package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"drafter/agent"
)

// The init starts the container and learns how it ends. The agent has the container's output, and
// the host. Both are told what concerns them by messages over a socket.
type message struct {
	Start *start `json:"start,omitempty"` // to the init: the container that is held
	// to the agent: what came of that
	Started bool   `json:"started,omitempty"`
	Failure string `json:"failure,omitempty"`
	// to the agent: how the container has ended, as from wait(2)
	Ended *int `json:"ended,omitempty"`
	// to the init: how the program has ended that an interactive container waited for
	Exited *int `json:"exited,omitempty"`
	// to the init: a host knows it
	Heard bool `json:"heard,omitempty"`
}

type start struct {
	Env []string `json:"env"`
}

// Descriptors of the agent that the init gives it, with --container.
const (
	stdoutFD = 3 + iota
	stderrFD
	controlFD
)

// control is the init's end.
type control struct {
	stdout, stderr [2]*os.File // pipes of the container's output: the agent's end, and the container's
	socket         [2]*os.File // ours, and the agent's
	out            *json.Encoder
	starts         chan *start
	exits          chan int // of one program
	heard          chan struct{}
}

func newControl() (*control, error) {
	c := &control{starts: make(chan *start), exits: make(chan int, 1), heard: make(chan struct{})}
	for _, p := range []*[2]*os.File{&c.stdout, &c.stderr} {
		var err error
		if p[0], p[1], err = os.Pipe(); err != nil {
			return nil, fmt.Errorf("container's output: %w", err)
		}
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socket for the agent: %w", err)
	}
	for n, fd := range fds {
		c.socket[n] = os.NewFile(uintptr(fd), "control")
	}
	c.out = json.NewEncoder(c.socket[0])
	return c, nil
}

// agentFiles are the agent's ends, from stdoutFD on. The init keeps the container's output open, so
// that it does not fail should the agent end.
func (c *control) agentFiles() []*os.File {
	return []*os.File{c.stdout[0], c.stderr[0], c.socket[1]}
}

// listen takes the agent's messages until its end.
func (c *control) listen() {
	c.socket[1].Close() // the agent has it
	for in := json.NewDecoder(c.socket[0]); ; {
		var m message
		if err := in.Decode(&m); err != nil {
			if !errors.Is(err, io.EOF) {
				slog.Error("The agent is not heard any more", "error", err)
			}
			return
		}
		if m.Start != nil {
			c.starts <- m.Start
		}
		if m.Exited != nil {
			c.exits <- *m.Exited
		}
		if m.Heard {
			close(c.heard)
			return
		}
	}
}

// closeOutput closes the container's ends: its output ends with it.
func (c *control) closeOutput() {
	c.stdout[1].Close()
	c.stderr[1].Close()
}

// drain keeps the container from waiting for an agent that is no more.
func (c *control) drain() {
	for _, f := range []*os.File{c.stdout[0], c.stderr[0]} {
		go func() {
			if _, err := io.Copy(os.Stdout, f); err != nil {
				slog.Warn("The container's output is lost", "error", err)
			}
		}()
	}
}

// answer tells what came of a start.
func (c *control) answer(err error) {
	m := message{Started: true}
	if err != nil {
		m = message{Failure: err.Error()}
	}
	c.send(m)
}

// hearTimeout is how long a guest whose container has ended waits for a host to learn how.
const hearTimeout = time.Second

// tell tells how the container has ended, and waits until a host knows.
func (c *control) tell(status syscall.WaitStatus) {
	c.closeOutput()
	n := status.ExitStatus()
	if status.Signaled() {
		n = 128 + int(status.Signal())
	}
	c.send(message{Ended: &n})
	select {
	case <-c.heard:
	case <-time.After(hearTimeout):
	}
}

func (c *control) send(m message) {
	if err := c.out.Encode(m); err != nil {
		slog.Error("The agent is not told", "error", err)
	}
}

// Supervised makes s the agent of a container that the init has started, or holds. It keeps the
// container's output, and shows it on the console.
func Supervised(ctx context.Context, s *agent.Server, held, interactive bool) error {
	container, err := OpenContainer()
	if err != nil {
		return err
	}
	socket := os.NewFile(controlFD, "control")
	conn, err := net.FileConn(socket)
	if err = errors.Join(err, socket.Close()); err != nil {
		return fmt.Errorf("the init's socket: %w", err)
	}
	return supervised(ctx, s, container, conn, os.NewFile(stdoutFD, "stdout"), os.NewFile(stderrFD, "stderr"), held, interactive)
}

func supervised(ctx context.Context, s *agent.Server, container *Container, conn net.Conn, stdout, stderr io.Reader, held, interactive bool) error {
	s.Container, s.Log = container, agent.NewLog()
	var copied sync.WaitGroup
	for n, r := range []io.Reader{stdout, stderr} {
		copied.Go(func() {
			if err := s.Log.Copy(r, n == 1); err != nil {
				slog.Error("The container's output is lost", "error", err)
			}
		})
	}
	// What the console is too slow for is left out: the container does not wait for it.
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		if err := s.Log.Follow(ctx, func(c agent.LogChunk) error {
			_, err := os.Stdout.Write(c.Data)
			return err
		}); err != nil && ctx.Err() == nil {
			slog.Error("The container's output is not shown", "error", err)
		}
	}()
	c := &supervisor{out: json.NewEncoder(conn), held: held, started: make(chan error, 1)}
	if held {
		s.Held = c.isHeld
		s.StartWorkload = func(env []string) error { return c.start(container, env) }
	}
	if interactive {
		s.Main = func() ([]string, func(int32), error) { return c.begin(container) }
	}
	go func() {
		for in := json.NewDecoder(conn); ; {
			var m message
			if err := in.Decode(&m); err != nil {
				return // the init ends last
			}
			switch {
			case m.Ended != nil:
				copied.Wait()
				s.Log.End(*m.Ended)
				<-shown
				<-s.Log.Heard()
				c.send(message{Heard: true})
			case m.Failure != "":
				c.started <- errors.New(m.Failure)
			case m.Started:
				c.started <- nil
			}
		}
	}()
	return nil
}

// supervisor is the agent's end.
type supervisor struct {
	out     *json.Encoder
	started chan error

	starting sync.Mutex
	mu       sync.Mutex // of the rest
	held     bool
	begun    bool // the program that an interactive container waits for
}

func (c *supervisor) isHeld() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.held
}

func (c *supervisor) send(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.out.Encode(m); err != nil {
		slog.Error("The init is not told", "error", err)
	}
}

// start has the init start the container.
func (c *supervisor) start(container *Container, env []string) error {
	if err := agent.CheckEnv(env); err != nil {
		return err
	}
	c.starting.Lock()
	defer c.starting.Unlock()
	if !c.isHeld() {
		return errors.New("the workload was started before")
	}
	c.send(message{Start: &start{Env: env}})
	if err := <-c.started; err != nil {
		return err
	}
	container.addEnv(env)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = false
	return nil
}

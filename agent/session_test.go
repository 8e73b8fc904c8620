package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"drafter/internal/need"
)

// converse starts an agent and returns a client of it.
func converse(t *testing.T, s *Server) *Client {
	t.Helper()
	port, host := serialPair(t)
	serve(t, s, port)
	greet(t, host)
	c := NewClient(noClose{host})
	t.Cleanup(func() { c.Close() })
	return c
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// outcome reads all output and waits.
func outcome(t *testing.T, s *Session) (stdout, stderr string, status int, err error) {
	t.Helper()
	var out, errOut []byte
	var both sync.WaitGroup
	both.Go(func() { out, _ = io.ReadAll(s.Stdout) })
	both.Go(func() { errOut, _ = io.ReadAll(s.Stderr) })
	both.Wait()
	status, err = s.Wait()
	return string(out), string(errOut), status, err
}

func TestRun(t *testing.T) {
	c := converse(t, &Server{})
	dir := t.TempDir()
	file := filepath.Join(dir, "plain")
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		command        Command
		stdin          string
		stdout, stderr string
		status         int
		fails          int // to start, with this status
	}{
		"both outputs":   {Command{Args: []string{"sh", "-c", "cat; echo problem >&2; exit 3"}, Stdin: true}, "from stdin\n", "from stdin\n", "problem\n", 3, 0},
		"no input":       {Command{Args: []string{"cat"}}, "", "", "", 0, 0},
		"killed":         {Command{Args: []string{"sh", "-c", "kill -9 $$"}}, "", "", "", 137, 0},
		"environment":    {Command{Args: []string{"sh", "-c", "echo $A-$B; pwd"}, Env: []string{"A=1", "B=2", "A=3"}, Dir: dir}, "", "3-2\n" + dir + "\n", "", 0, 0},
		"no reader":      {Command{Args: []string{"true"}, Stdin: true}, strings.Repeat("x", 1<<20), "", "", 0, 0},
		"much":           {Command{Args: []string{"cat"}, Stdin: true}, strings.Repeat("x", 3<<20), strings.Repeat("x", 3<<20), "", 0, 0},
		"output at exit": {Command{Args: []string{"sh", "-c", "head -c 60000 /dev/zero; sleep 10 & exit 4"}}, "", strings.Repeat("\x00", 60000), "", 4, 0},
		"missing":        {Command{Args: []string{"no-such-program"}}, "", "", "", 0, NotFound},
		"missing path":   {Command{Args: []string{dir + "/none"}}, "", "", "", 0, NotFound},
		"no program":     {Command{}, "", "", "", 0, NotFound},
		"directory":      {Command{Args: []string{dir}}, "", "", "", 0, CannotExecute},
		"no x bit":       {Command{Args: []string{file}}, "", "", "", 0, CannotExecute},
		"no directory":   {Command{Args: []string{"true"}, Dir: dir + "/none"}, "", "", "", 0, CannotExecute},
		"no user":        {Command{Args: []string{"true"}, User: "nobody-has-this-name"}, "", "", "", 0, CannotExecute},
		"no variable":    {Command{Args: []string{"true"}, Env: []string{"=1"}}, "", "", "", 0, CannotExecute},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := c.Run(within(t, 20*time.Second), tt.command)
			if tt.fails != 0 {
				var start *StartError
				if !errors.As(err, &start) || start.ExitStatus != tt.fails {
					t.Fatalf("starts: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if tt.command.Stdin {
				go func() {
					io.WriteString(s.Stdin, tt.stdin)
					s.Stdin.Close()
				}()
			}
			stdout, stderr, status, err := outcome(t, s)
			if err != nil || stdout != tt.stdout || stderr != tt.stderr || status != tt.status {
				t.Errorf("%d bytes, %q, %d, %v", len(stdout), stderr, status, err)
			}
		})
	}
	awaitNoSession(t, c)
}

func awaitNoSession(t *testing.T, c *Client) {
	t.Helper()
	for ctx := within(t, 10*time.Second); c.sessions.Load() > 0; runtime.Gosched() {
		if ctx.Err() != nil {
			t.Fatalf("%d sessions are left", c.sessions.Load())
		}
	}
}

func TestRunAsUser(t *testing.T) {
	need.Root(t)
	c := converse(t, &Server{})
	for user, want := range map[string]string{
		"": "0:0", "nobody": "65534:65534 /nonexistent", "1234": "1234:0 /", "1234:77": "1234:77 /", "nobody:daemon": "65534:1 /nonexistent",
	} {
		s, err := c.Run(within(t, 20*time.Second), Command{Args: []string{"sh", "-c", "echo $(id -u):$(id -g) $HOME"}, User: user})
		if err != nil {
			t.Fatal(err)
		}
		if stdout, stderr, _, err := outcome(t, s); err != nil || !strings.HasPrefix(stdout, want) {
			t.Errorf("%q runs as %q, %s, %v", user, stdout, stderr, err)
		}
	}
}

func TestSignal(t *testing.T) {
	c := converse(t, &Server{})
	s, err := c.Run(within(t, 20*time.Second), Command{Args: []string{"sh", "-c", "trap 'echo told; exit 5' USR1; echo ready; while :; do sleep 0.05; done"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(s.Stdout, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	if err := s.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if stdout, _, status, err := outcome(t, s); err != nil || stdout != "told\n" || status != 5 {
		t.Errorf("%q, %d, %v", stdout, status, err)
	}
	if err := s.Signal(syscall.SIGUSR1); err != nil {
		t.Errorf("a program that has ended: %v", err)
	}
}

// await reads a terminal until it has printed text.
func await(t *testing.T, r io.Reader, text string) string {
	t.Helper()
	var got []byte
	p := make([]byte, 1024)
	for !strings.Contains(string(got), text) {
		n, err := r.Read(p)
		got = append(got, p[:n]...)
		if err != nil {
			t.Fatalf("%q, then %v; want %q", got, err, text)
		}
	}
	return string(got)
}

func TestTerminal(t *testing.T) {
	c := converse(t, &Server{})
	s, err := c.Run(within(t, 20*time.Second), Command{
		Args: []string{"sh", "-c", `trap 'echo size $(stty size)' WINCH; trap 'echo interrupted' INT; tty; stty size; echo "$TERM" >&2; while ! read line; do :; done; cat >/dev/null; echo end; exit 6`},
		TTY:  true, Rows: 31, Columns: 117, Stdin: true, Env: []string{"TERM=vt220"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := await(t, s.Stdout, "vt220\r\n"); !strings.Contains(got, "/dev/pts/") || !strings.Contains(got, "31 117\r\n") {
		t.Errorf("begins with %q", got)
	}
	if err := s.Resize(20, 50); err != nil {
		t.Fatal(err)
	}
	await(t, s.Stdout, "size 20 50\r\n")
	if _, err := io.WriteString(s.Stdin, "\x03"); err != nil { // Ctrl-C
		t.Fatal(err)
	}
	await(t, s.Stdout, "interrupted\r\n")
	if _, err := io.WriteString(s.Stdin, "a\nb\n"); err != nil {
		t.Fatal(err)
	}
	if err := s.Stdin.Close(); err != nil {
		t.Fatal(err)
	}
	await(t, s.Stdout, "end\r\n")
	if _, _, status, err := outcome(t, s); err != nil || status != 6 {
		t.Errorf("%d, %v", status, err)
	}
}

// A program with a terminal of its own ends when nobody is there any more, and so does what it has
// started, in whatever group.
func TestEndOfSession(t *testing.T) {
	for _, tty := range []bool{false, true} {
		for name, end := range map[string]func(*Client, context.CancelFunc){
			"context": func(_ *Client, cancel context.CancelFunc) { cancel() },
			"client":  func(c *Client, _ context.CancelFunc) { c.Close() },
		} {
			t.Run(fmt.Sprintf("%s, terminal %v", name, tty), func(t *testing.T) {
				l, err := net.Listen("unix", filepath.Join(t.TempDir(), "agent"))
				if err != nil {
					t.Fatal(err)
				}
				agent, stop := context.WithCancel(context.Background())
				served := make(chan error, 1)
				go func() { served <- (&Server{}).Serve(agent, l) }()
				defer func() {
					stop()
					if err := <-served; err != nil {
						t.Error(err)
					}
				}()
				conn, err := net.Dial("unix", l.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				c := NewClient(conn)
				defer c.Close()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				s, err := c.Run(ctx, Command{Args: []string{"bash", "-c", "set -m; trap '' HUP; sleep 1000 & echo $!; (trap '' HUP INT TERM; sleep 1000) & echo $!; echo $$; wait"}, TTY: tty})
				if err != nil {
					t.Fatal(err)
				}
				var pids [3]string
				if _, err := fmt.Fscan(s.Stdout, &pids[0], &pids[1], &pids[2]); err != nil {
					t.Fatal(err)
				}
				end(c, cancel)
				if _, err := s.Wait(); err == nil || name == "context" && !errors.Is(err, context.Canceled) {
					t.Errorf("ends with %v", err)
				}
				if _, err := io.Copy(io.Discard, s.Stdout); err == nil {
					t.Error("the output is complete")
				}
				awaitGone(t, pids[:]...)
			})
		}
	}
}

// A host that is gone, but whose port is full of what it did not read, ends its programs all the same.
func TestHostGoneFromFullPort(t *testing.T) {
	port, host := serialPair(t)
	serve(t, &Server{}, port)
	greet(t, host)
	c := NewClient(noClose{host})
	defer c.Close()
	var pids []string
	for range 8 {
		s, err := c.Run(within(t, 20*time.Second), Command{Args: []string{"sh", "-c", "echo $$ >&2; sleep 0.2; exec cat /dev/zero"}})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 10)
		n, err := s.Stderr.Read(p)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, strings.TrimSpace(string(p[:n])))
	}
	c.ttrpc.Close() // it reads no more
	raw, err := host.(*net.UnixConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// Until the guest cannot write any more.
	for last, since := 0, time.Now(); last == 0 || time.Since(since) < 200*time.Millisecond; runtime.Gosched() {
		var waiting int
		if err := raw.Control(func(fd uintptr) { waiting, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }); err != nil {
			t.Fatal(err)
		}
		if waiting != last {
			last, since = waiting, time.Now()
		}
	}
	if err := host.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	awaitGone(t, pids...)
}

// awaitGone waits for processes to end. One whose parent does not reap it has.
func awaitGone(t *testing.T, pids ...string) {
	t.Helper()
	for ctx := within(t, 10*time.Second); ; runtime.Gosched() {
		var left []string
		for _, pid := range pids {
			if stat, err := os.ReadFile("/proc/" + pid + "/stat"); err == nil && !strings.Contains(string(stat), ") Z ") {
				left = append(left, pid)
			}
		}
		if len(left) == 0 {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%v go on", left)
		}
	}
}

// What nobody reads is in nobody's way: neither output that the host does not read, nor input that
// a program does not read.
func TestFlow(t *testing.T) {
	c := converse(t, &Server{})
	ctx := within(t, 60*time.Second)
	silent, cancel := context.WithCancel(ctx)
	defer cancel()
	var writers sync.WaitGroup
	var sessions []*Session
	for n := range maxSessions {
		command := Command{Args: []string{"cat", "/dev/zero"}}
		if n%2 == 1 {
			command = Command{Args: []string{"sleep", "1000"}, Stdin: true}
		}
		s, err := c.Run(silent, command)
		if err != nil {
			t.Fatal(err)
		}
		sessions = append(sessions, s)
		if command.Stdin {
			writers.Go(func() {
				for b := make([]byte, 1<<20); ; {
					if _, err := s.Stdin.Write(b[:1+n*n%100]); err != nil { // small ones, too
						return
					}
				}
			})
		}
	}
	if s, err := c.Run(ctx, Command{Args: []string{"true"}}); !errors.Is(err, errTooMany) {
		t.Errorf("one more: %v, %v", s, err)
	}
	// Until nothing moves any more.
	full := func() (n int) {
		for i, s := range sessions {
			s.stdout.mu.Lock()
			s.stdin.mu.Lock()
			if i%2 == 0 && window-s.stdout.unread <= overhead || i%2 == 1 && window-s.stdin.spent <= overhead {
				n++
			}
			s.stdin.mu.Unlock()
			s.stdout.mu.Unlock()
		}
		return n
	}
	for full() < maxSessions {
		if ctx.Err() != nil {
			t.Fatalf("%d of %d are full", full(), maxSessions)
		}
		runtime.Gosched()
	}
	for range 10 {
		began := time.Now()
		if _, err := c.CatchUp(ctx, time.Nanosecond); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 500*time.Millisecond { // some of one here; other tests run, too
			t.Errorf("a call took %s", took)
		}
	}
	// The session of who reads goes on.
	if _, err := io.CopyN(io.Discard, sessions[0].Stdout, 1<<20); err != nil {
		t.Error(err)
	}
	cancel()
	writers.Wait()
	awaitNoSession(t, c)
	// The guest has no more of them, either.
	s, err := c.Run(ctx, Command{Args: []string{"true"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := outcome(t, s); err != nil {
		t.Error(err)
	}
}

// hostile answers one Run with what it likes.
type hostile struct {
	Server
	answer func(Workload_RunServer)
}

func (h *hostile) Run(_ context.Context, stream Workload_RunServer) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	h.answer(stream)
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

// serveAs serves an agent's calls without ours.
func serveAs(t *testing.T, register func(*ttrpc.Server)) net.Conn {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	register(server)
	done := make(chan error)
	go func() { done <- server.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-done; err != nil && !errors.Is(err, ttrpc.ErrServerClosed) {
			t.Error(err)
		}
	})
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func TestHostileSession(t *testing.T) {
	stdout := func(n int) *RunResponse { return &RunResponse{Message: &RunResponse_Stdout{Stdout: make([]byte, n)}} }
	started := &RunResponse{Message: &RunResponse_Started{Started: &Started{}}}
	end := &RunResponse{Message: &RunResponse_End{End: &End{}}}
	for name, messages := range map[string][]*RunResponse{
		"more than fits":      {started, stdout(maxPiece), stdout(maxPiece), stdout(maxPiece), stdout(maxPiece)},
		"many small ones":     append([]*RunResponse{started}, slicesRepeat(stdout(0), window/overhead+1)...),
		"a piece too long":    {started, stdout(maxPiece + 1)},
		"a message too long":  {started, stdout(maxData)},
		"started twice":       {started, started},
		"more after the end":  {started, end, stdout(1)},
		"ends well at once":   {end},
		"ends twice":          {started, end, end},
		"read what was not":   {started, {Message: &RunResponse_StdinTaken{StdinTaken: &Taken{Bytes: 1}}}},
		"read nothing":        {started, {Message: &RunResponse_StdinTaken{}}},
		"says nothing":        {started, {}},
		"says nothing, first": {{}},
	} {
		t.Run(name, func(t *testing.T) {
			conn := serveAs(t, func(server *ttrpc.Server) {
				RegisterWorkloadService(server, &hostile{answer: func(stream Workload_RunServer) {
					for _, m := range messages {
						stream.Send(m)
					}
				}})
			})
			c := NewClient(conn)
			defer c.Close()
			s, err := c.Run(within(t, 20*time.Second), Command{Args: []string{"true"}})
			if err == nil {
				_, err = s.Wait()
			}
			if cerr := c.ttrpc.UserOnCloseWait(within(t, 10*time.Second)); cerr != nil {
				t.Errorf("the guest is heard on: %v", cerr)
			}
			if cut := c.conn.reason(errors.New("closed")); !strings.Contains(cut.Error(), "the guest sent what nobody asked for") {
				t.Errorf("it ends with %v, and %v", cut, err)
			}
		})
	}
}

// A guest cannot make the host read a message that is longer than any of a session.
func TestLongMessage(t *testing.T) {
	host, guest := net.Pipe()
	defer guest.Close()
	c := NewClient(host)
	defer c.Close()
	go func() {
		io.ReadFull(guest, make([]byte, headerLen))
		go io.Copy(io.Discard, guest)
		guest.Write(message(typeData, 1, maxData+1))
	}()
	if _, err := c.Run(within(t, 10*time.Second), Command{Args: []string{"true"}}); err == nil || !strings.Contains(err.Error(), "the guest sent what nobody asked for") {
		t.Errorf("%v", err)
	}
}

// A guest runs no more than it has room for, whatever its host asks.
func TestGuestIsFull(t *testing.T) {
	s := &Server{}
	c := converse(t, s)
	s.sessions.Store(maxSessions)
	if _, err := c.Run(within(t, 10*time.Second), Command{Args: []string{"true"}}); err == nil || !strings.Contains(err.Error(), errTooMany.Error()) {
		t.Errorf("one more: %v", err)
	}
	s.sessions.Store(maxSessions - 1)
	session, err := c.Run(within(t, 10*time.Second), Command{Args: []string{"true"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, status, err := outcome(t, session); err != nil || status != 0 {
		t.Errorf("%d, %v", status, err)
	}
}

func slicesRepeat(m *RunResponse, n int) (all []*RunResponse) {
	for range n {
		all = append(all, m)
	}
	return all
}

// A host that meets an agent of before there were sessions says so, and its other calls go on.
func TestSessionOfOldAgent(t *testing.T) {
	c := NewClient(serveAs(t, func(server *ttrpc.Server) {
		server.RegisterService("drafter.agent.v1.Agent", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{}})
	}))
	defer c.Close()
	for range 3 {
		if _, err := c.Run(within(t, 20*time.Second), Command{Args: []string{"true"}}); err == nil || !strings.Contains(err.Error(), "package the guest anew") || strings.Contains(err.Error(), "\n") {
			t.Errorf("run: %v", err)
		}
		if _, err := c.Stat(t.Context(), File{Path: "/"}); err == nil || !strings.Contains(err.Error(), "package the guest anew") {
			t.Errorf("stat: %v", err)
		}
		if _, err := c.Ready(t.Context()); err != nil {
			t.Errorf("another call: %v", err)
		}
	}
}

// FuzzSession answers the host's calls with any bytes.
func FuzzSession(f *testing.F) {
	frame := func(kind, flags byte, stream uint32, m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		head := message(kind, stream, uint32(len(b)))
		head[9] = flags
		return append(head, b...)
	}
	started := frame(typeData, 0, 1, &RunResponse{Message: &RunResponse_Started{Started: &Started{}}})
	stdout := frame(typeData, 0, 1, &RunResponse{Message: &RunResponse_Stdout{Stdout: []byte("hello")}})
	taken := frame(typeData, 0, 1, &RunResponse{Message: &RunResponse_StdinTaken{StdinTaken: &Taken{Bytes: overhead + 1}}})
	end := frame(typeData, 0, 1, &RunResponse{Message: &RunResponse_End{End: &End{ExitStatus: 3, Error: "no"}}})
	over := message(typeData, 1, 0)
	over[9] = 5 // closed, without data
	for _, b := range [][]byte{
		bytes.Join([][]byte{started, stdout, taken, end, over}, nil), end, started, bytes.Join([][]byte{started, over}, nil), message(typeResponse, 1, 0),
		bytes.Join([][]byte{started, stdout[:7]}, nil), frame(typeData, 0, 1, &RunResponse{}), {0xff},
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		host, guest := net.Pipe()
		c := NewClient(host)
		defer c.Close()
		go func() {
			io.ReadFull(guest, make([]byte, headerLen))
			go io.Copy(io.Discard, guest)
			guest.Write(b)
			guest.Close()
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		s, err := c.Run(ctx, Command{Args: []string{"cat"}, Stdin: true})
		if err != nil {
			return
		}
		s.Stdin.Write([]byte("x"))
		s.Stdin.Close()
		if out, err := io.ReadAll(s.Stdout); len(out) > len(b) || ctx.Err() != nil {
			t.Errorf("%d bytes, %v", len(out), err)
		}
		s.Wait()
		if ctx.Err() != nil {
			t.Error("it hangs")
		}
	})
}

// FuzzTake gives the guest's end of a session any messages.
func FuzzTake(f *testing.F) {
	for _, m := range []*RunRequest{
		{Message: &RunRequest_Stdin{Stdin: []byte("x")}}, {Message: &RunRequest_StdoutTaken{}}, {Message: &RunRequest_StderrTaken{StderrTaken: &Taken{Bytes: 1 << 31}}},
		{Message: &RunRequest_WindowSize{}}, {Message: &RunRequest_Signal{Signal: -1}}, {Message: &RunRequest_EndOfInput{}}, {},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &RunRequest{}
		if proto.Unmarshal(b, m) != nil {
			return
		}
		g := &served{stdout: newAllowance(), stderr: newAllowance(), stdin: newInbox(func(uint32) {})}
		for range window {
			if g.take(m) != nil {
				break
			}
		}
		if g.stdin.unread > window || g.stdout.spent < 0 || g.stderr.spent < 0 {
			t.Errorf("%d, %d, %d", g.stdin.unread, g.stdout.spent, g.stderr.spent)
		}
	})
}

// A session that is ended before the guest has begun is ended there once it has. Until then the
// guest is sent nothing: an agent of an older release would take it for a call of its own.
func TestEndBeforeStart(t *testing.T) {
	begin, ended := make(chan struct{}), make(chan error, 1)
	h := &hostile{answer: func(stream Workload_RunServer) {
		<-begin
		stream.Send(&RunResponse{Message: &RunResponse_Started{Started: &Started{}}})
		_, err := stream.Recv()
		ended <- err
	}}
	host := &counting{Conn: serveAs(t, func(server *ttrpc.Server) { RegisterWorkloadService(server, h) })}
	c := NewClient(host)
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Run(ctx, Command{Args: []string{"true"}}); !errors.Is(err, context.Canceled) || host.written.Load() > 0 {
		t.Errorf("before it began: %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	go func() {
		for host.written.Load() == 0 {
			runtime.Gosched()
		}
		cancel()
	}()
	if _, err := c.Run(ctx, Command{Args: []string{"true"}}); !errors.Is(err, context.Canceled) {
		t.Errorf("while it begins: %v", err)
	}
	if n := host.written.Load(); n != 1 {
		t.Errorf("%d messages", n)
	}
	close(begin)
	if err := <-ended; !errors.Is(err, io.EOF) {
		t.Errorf("the guest gets %v", err)
	}
}

// counting counts messages.
type counting struct {
	net.Conn
	written atomic.Int32
}

func (c *counting) Write(p []byte) (int, error) {
	c.written.Add(1)
	return c.Conn.Write(p)
}

// Programs, directories and users are looked up below the root, whatever its links say.
func TestResolve(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(root, "real/bin"), 0o755), os.Mkdir(filepath.Join(root, "etc"), 0o755), os.WriteFile(filepath.Join(root, "real/bin/program"), nil, 0o755),
		os.Symlink("/real/bin", filepath.Join(root, "bin")), os.Symlink("../../../../../../../../real/bin/program", filepath.Join(root, "up")),
		os.WriteFile(filepath.Join(outside, "program"), nil, 0o755), os.WriteFile(filepath.Join(outside, "passwd"), []byte("evil:x:0:0::/:/bin/sh\n"), 0o644),
		os.Symlink(outside, filepath.Join(root, "out")), os.Symlink(filepath.Join(outside, "passwd"), filepath.Join(root, "etc/passwd")))
	base := Execution{Env: []string{"PATH=/out:/bin", "A=1"}, Dir: "/"}
	for _, tt := range []struct {
		program *Program
		path    string // "" for an error
	}{
		{&Program{Args: []string{"program"}}, "/bin/program"},
		{&Program{Args: []string{"/up"}}, "/up"},
		{&Program{Args: []string{"./program"}, Dir: "bin"}, "/bin/program"},
		{&Program{Args: []string{"program"}, Env: []string{"PATH=real/bin"}}, "/real/bin/program"},
		{&Program{Args: []string{"/out/program"}}, ""},
		{&Program{Args: []string{filepath.Join(outside, "program")}}, ""},
		{&Program{Args: []string{"program"}, Dir: "/out"}, ""},
		{&Program{Args: []string{"program"}, User: "evil"}, ""},
		{&Program{Args: []string{"program"}, User: "12:34"}, "/bin/program"},
	} {
		e, err := Resolve(root, tt.program, base)
		if tt.path == "" {
			var start *StartError
			if !errors.As(err, &start) {
				t.Errorf("%v: %+v, %v", tt.program, e, err)
			}
			continue
		}
		if err != nil || e.Path != tt.path {
			t.Errorf("%v: %+v, %v", tt.program, e, err)
		}
	}
	if len(base.Env) != 2 || base.Env[0] != "PATH=/out:/bin" {
		t.Errorf("the base became %q", base.Env)
	}
	// Something that is no file keeps nobody waiting.
	must(os.Remove(filepath.Join(root, "etc/passwd")), syscall.Mkfifo(filepath.Join(root, "etc/passwd"), 0o644))
	if _, err := Resolve(root, &Program{Args: []string{"program"}, User: "12"}, base); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("a pipe for a file: %v", err)
	}
}

// The program that a workload waits for runs once, and its status is told when the host knows it.
func TestMainProgram(t *testing.T) {
	var refuse error
	statuses := make(chan int32, 1)
	s := &Server{Main: func() ([]string, func(int32), error) {
		return []string{"sh", "-c", "read n || exec sleep 1000; exit $n"}, func(status int32) { statuses <- status }, refuse
	}}
	c := converse(t, s)
	p, err := c.Run(within(t, 20*time.Second), Command{Main: true, Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Stdin.Write([]byte("7\n")); err != nil {
		t.Fatal(err)
	}
	if status, err := p.Wait(); status != 7 || err != nil {
		t.Error(status, err)
	}
	if status := <-statuses; status != 7 {
		t.Error("it was told", status)
	}
	// The host goes.
	ctx, cancel := context.WithCancel(t.Context())
	if _, err = c.Run(ctx, Command{Main: true, Stdin: true}); err != nil {
		t.Fatal(err)
	}
	cancel()
	if status := <-statuses; status != 137 {
		t.Error("it was told", status)
	}
	refuse = errors.New("it runs already")
	var start *StartError
	if _, err := c.Run(t.Context(), Command{Main: true}); !errors.As(err, &start) || !strings.Contains(err.Error(), "it runs already") {
		t.Error(err)
	}
	if _, err := converse(t, &Server{}).Run(t.Context(), Command{Main: true}); !errors.As(err, &start) {
		t.Error("a guest without such a workload:", err)
	}
}

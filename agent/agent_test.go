package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serialPair is a serial port and the host's end of it. Like a virtio-serial port it has no
// connections: what the host sent stays in it.
func serialPair(t *testing.T) (port *serialPort, host net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[1]), "host")
	host, err = net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	guest := os.NewFile(uintptr(fds[0]), "guest")
	t.Cleanup(func() { guest.Close(); host.Close() })
	return newSerialPort(guest, "test"), host
}

// serve runs an agent on a port, as a guest does.
func serve(t *testing.T, s *Server, port *serialPort) {
	t.Helper()
	l := Listen(0, time.Second)
	l.serial = port
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
}

// noClose keeps the host's end open when a client closes its connection, but ends the client's
// reading.
type noClose struct{ net.Conn }

func (c noClose) Close() error { return c.SetDeadline(time.Unix(1, 0)) }

func greet(t *testing.T, host net.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := host.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if err := Greet(ctx, host); err != nil {
		t.Fatal(err)
	}
}

func TestExec(t *testing.T) {
	port, host := serialPair(t)
	serve(t, &Server{}, port)
	greet(t, host)
	c := NewClient(noClose{host})
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r, err := c.Exec(ctx, []byte("from stdin\n"), "sh", "-c", "cat; echo problem >&2; exit 3")
	if err != nil {
		t.Fatal(err)
	}
	if string(r.Stdout) != "from stdin\n" || string(r.Stderr) != "problem\n" || r.ExitStatus != 3 {
		t.Errorf("got %q, %q, %d", r.Stdout, r.Stderr, r.ExitStatus)
	}
	if r, err = c.Exec(ctx, nil, "sh", "-c", "kill -9 $$"); err != nil || r.ExitStatus != 128+9 {
		t.Errorf("a killed program: %v, %v", r, err)
	}
	if r, err = c.Exec(ctx, nil, "head", "-c", "3000000", "/dev/zero"); err != nil || len(r.Stdout) != maxOutput {
		t.Errorf("much output: %d bytes, %v", len(r.GetStdout()), err)
	}
	if _, err = c.Exec(ctx, nil, "no-such-program"); err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("a program that is missing: %v", err)
	}
	if _, err = c.Exec(ctx, nil); err == nil {
		t.Error("no program was accepted")
	}
	// Calls may overlap.
	var all sync.WaitGroup
	for range 10 {
		all.Go(func() {
			if r, err := c.Exec(ctx, nil, "sleep", "0.1"); err != nil || r.ExitStatus != 0 {
				t.Errorf("overlapping: %v, %v", r, err)
			}
		})
	}
	all.Wait()
}

func TestBeforeSuspendCommand(t *testing.T) {
	file := t.TempDir() + "/ran"
	port, host := serialPair(t)
	s := &Server{BeforeSuspendCmd: "touch " + file}
	serve(t, s, port)
	greet(t, host)
	c := NewClient(noClose{host})
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := c.BeforeSuspend(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	s.BeforeSuspendCmd = "echo disk is full >&2; exit 1"
	if err := c.BeforeSuspend(ctx); err == nil || !strings.Contains(err.Error(), "disk is full") {
		t.Errorf("a failing command: %v", err)
	}
	s.BeforeSuspendCmd = "sleep 5"
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := c.BeforeSuspend(short); err == nil || !strings.Contains(err.Error(), "did not answer in time") {
		t.Errorf("a command that takes too long: %v", err)
	}
}

// TestNewHost is what a resume looks like to a guest that was suspended in a conversation: no end
// of the old one, remains of it in the queue, then another host's greeting. Done again and again.
func TestNewHost(t *testing.T) {
	port, host := serialPair(t)
	serve(t, &Server{}, port)
	for round := range 20 {
		greet(t, host)
		c := NewClient(noClose{host})
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		r, err := c.Exec(ctx, nil, "echo", "hello")
		if err != nil || string(r.Stdout) != "hello\n" {
			t.Fatalf("round %d: %v, %v", round, r, err)
		}
		if err := errors.Join(c.Close(), c.ttrpc.UserOnCloseWait(ctx)); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := host.SetDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		// Half a message, lost in the suspend.
		if _, err := host.Write([]byte{0, 0}[:round%3]); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSilentGuest greets a port that nobody serves.
func TestSilentGuest(t *testing.T) {
	_, host := serialPair(t)
	cause := errors.New("no liveness within 50ms")
	ctx, cancel := context.WithTimeoutCause(context.Background(), 50*time.Millisecond, cause)
	defer cancel()
	if err := Greet(ctx, host); !errors.Is(err, cause) {
		t.Errorf("error is %v", err)
	}
}

// TestLateGuest starts the guest's program only after several greetings were sent, of which it must
// take all but one for repetitions.
func TestLateGuest(t *testing.T) {
	port, host := serialPair(t)
	greeted := make(chan error)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		greeted <- Greet(ctx, host)
	}()
	time.Sleep(3 * greetingPause) // the guest is late: it misses greetings
	serve(t, &Server{}, port)
	if err := <-greeted; err != nil {
		t.Fatal(err)
	}
	if err := host.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	c := NewClient(noClose{host})
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if r, err := c.Exec(ctx, nil, "true"); err != nil || r.ExitStatus != 0 {
		t.Errorf("got %v, %v", r, err)
	}
}

func TestSkipTo(t *testing.T) {
	for _, tt := range []struct{ in, rest string }{
		{"abcMARKrest", "rest"},
		{"MARK", ""},
		{"MAMARMARKx", "x"},
		{"MARMARKMARK", "MARK"},
	} {
		r := strings.NewReader(tt.in)
		if err := skipTo(r, []byte("MARK")); err != nil {
			t.Errorf("%q: %v", tt.in, err)
		}
		if rest, _ := io.ReadAll(r); string(rest) != tt.rest {
			t.Errorf("%q leaves %q; want %q", tt.in, rest, tt.rest)
		}
	}
	if err := skipTo(bytes.NewReader([]byte("MAR")), []byte("MARK")); err == nil {
		t.Error("an incomplete mark was found")
	}
}

func TestNoHost(t *testing.T) {
	if _, err := os.Stat("/dev/vsock"); err == nil {
		need.Lacks(t, "no-vsock", "this host has vsock; the test is for one without")
	}
	l := Listen(4711, 50*time.Millisecond)
	defer l.Close()
	_, err := l.Accept()
	if err == nil || !strings.Contains(err.Error(), "no host within 50ms") || !strings.Contains(err.Error(), `no virtio-serial port "drafter.4711"`) && !strings.Contains(err.Error(), "drafter.4711") {
		t.Errorf("error is %v", err)
	}
}

// message is one of ttrpc's.
func message(kind byte, stream, length uint32) []byte {
	b := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, length), stream)
	return append(b, kind, 0)
}

// A guest that sends what nobody asked for is cut off, before it makes us write lines.
func TestHostileAgent(t *testing.T) {
	for name, answer := range map[string][]byte{
		"answer without a call": message(typeResponse, 7, 0),
		"answer to a later one": message(typeResponse, 3, 0),
		"a call":                message(typeRequest, 1, 0),
		"data":                  message(3, 1, 0),
		"no type":               message(0, 1, 0),
		"too long":              message(typeResponse, 1, maxMessage+1),
		"two answers":           append(append(message(typeResponse, 1, 2), 0x12, 0), message(typeResponse, 1, 0)...),
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := net.Pipe()
			defer guest.Close()
			c := NewClient(host)
			defer c.Close()
			called := make(chan error, 1)
			go func() { called <- c.BeforeSuspend(t.Context()) }()
			if _, err := io.ReadFull(guest, make([]byte, headerLen+1)); err != nil {
				t.Fatal(err)
			}
			go io.Copy(io.Discard, guest)
			if name == "two answers" {
				if _, err := guest.Write(answer[:headerLen+2]); err != nil {
					t.Fatal(err)
				}
				if err := <-called; err != nil {
					t.Errorf("the answer: %v", err)
				}
				called <- errors.New("the guest sent what nobody asked for")
				answer = answer[headerLen+2:]
			}
			// It goes on until it notices.
			for range 1000 {
				if _, err := guest.Write(answer); err != nil {
					if err := <-called; err == nil || !strings.Contains(err.Error(), "the guest sent what nobody asked for") {
						t.Errorf("the call: %v", err)
					}
					return
				}
			}
			t.Error("the host goes on listening")
		})
	}
}

// A guest's words in an error are few, and do nothing to a terminal.
func TestWordsOfAGuest(t *testing.T) {
	port, host := serialPair(t)
	serve(t, &Server{BeforeSuspendCmd: `printf '\033[2J%0100000d' 0; exit 1`}, port)
	greet(t, host)
	c := NewClient(noClose{host})
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	err := c.BeforeSuspend(ctx)
	if err == nil || len(err.Error()) > maxWords+100 || !strings.Contains(err.Error(), `\x1b[2J000`) || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("%.2000v", err)
	}
}

// The clock is set after a resume or a move; after a copy only if it was the host's, less the
// pause; and never for a guest that keeps its own time. A host of a release that does not say which
// is one that resumes.
func TestClock(t *testing.T) {
	need.Root(t)
	old := setClock
	defer func() { setClock = old }()
	port, host := serialPair(t)
	s := &Server{}
	var set int
	var want time.Time
	setClock = func(now time.Time) error {
		set++
		if !now.Equal(want) {
			t.Errorf("set to %s; want %s", now, want)
		}
		return nil
	}
	serve(t, s, port)
	greet(t, host)
	c := NewClient(noClose{host})
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, tt := range []struct {
		keeps  bool          // the guest says so
		behind time.Duration // the guest
		most   time.Duration
		set    bool
	}{
		{false, time.Hour, 0, true}, {false, -time.Hour, 0, true}, // it was away
		{false, time.Minute, 2 * time.Minute, true},                                             // it stood still
		{false, time.Hour, 2 * time.Minute, false}, {false, -time.Hour, 2 * time.Minute, false}, // it was set by hand
		{false, -time.Minute, 2 * time.Minute, false}, // it is never set back
		{false, time.Hour, -1, false}, {true, time.Hour, 0, false}, {true, time.Minute, 2 * time.Minute, false},
	} {
		if tt.most > 0 {
			s.KeepClock, set, want = tt.keeps, 0, time.Now().Add(tt.behind)
			r, err := c.calls.CatchUp(ctx, &CatchUpRequest{NowUnixNano: want.UnixNano(), MostStepNano: int64(tt.most)})
			if err != nil || (set == 1) != tt.set || (r.GetClockStepNano() != 0) != tt.set {
				t.Errorf("%+v: caught up %d times by %s, %v", tt, set, time.Duration(r.GetClockStepNano()), err)
			}
		}
		s.KeepClock, set, want = tt.keeps, 0, time.Now().Add(tt.behind)
		r, err := c.calls.AfterResume(ctx, &AfterResumeRequest{NowUnixNano: want.UnixNano(), MostStepNano: int64(tt.most)})
		if err != nil || (set == 1) != tt.set || (r.GetClockStepNano() != 0) != tt.set {
			t.Errorf("%+v: set %d times, step %s, %v", tt, set, time.Duration(r.GetClockStepNano()), err)
		}
	}
}

// sluggish is an agent that reads its first calls late, and whose clock is its own.
type sluggish struct {
	AgentService
	lags   []time.Duration // of the calls to come
	behind time.Duration   // its clock
	calls  int
}

func (s *sluggish) told(nowUnixNano, mostStepNano int64) int64 {
	if s.calls++; s.calls <= len(s.lags) {
		time.Sleep(s.lags[s.calls-1])
	}
	step, most := time.Until(time.Unix(0, nowUnixNano))+s.behind, time.Duration(mostStepNano)
	if most < 0 || most > 0 && (step <= 0 || step > most) {
		return 0
	}
	s.behind -= step
	return int64(step)
}

func (s *sluggish) AfterResume(_ context.Context, r *AfterResumeRequest) (*AfterResumeResponse, error) {
	return &AfterResumeResponse{ClockStepNano: s.told(r.GetNowUnixNano(), r.GetMostStepNano())}, nil
}

func (s *sluggish) CatchUp(_ context.Context, r *CatchUpRequest) (*CatchUpResponse, error) {
	return &CatchUpResponse{ClockStepNano: s.told(r.GetNowUnixNano(), r.GetMostStepNano())}, nil
}

// A guest that reads late what time it is, is right all the same.
func TestClockOfSluggishGuest(t *testing.T) {
	const lag = 4 * prompt
	for _, tt := range []struct {
		behind, most time.Duration
		lags         []time.Duration
		calls        int
		want         time.Duration // how far the clock is behind at the end, give or take prompt
	}{
		{time.Hour, 0, nil, 1, 0},
		{time.Hour, 0, []time.Duration{lag}, 2, 0},
		{-time.Hour, 0, []time.Duration{lag, lag, lag}, 4, 0},
		{lag / 2, time.Minute, []time.Duration{lag}, 2, 0}, // the first step would have been one back
		{time.Hour, time.Minute, []time.Duration{lag}, 2, time.Hour},
		{time.Hour, -1, []time.Duration{lag}, 1, time.Hour},
	} {
		s := &sluggish{lags: tt.lags, behind: tt.behind}
		_, host := net.Pipe()
		c := NewClient(host)
		c.calls = s
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		step, err := c.AfterResume(ctx, tt.most, "")
		cancel()
		if err != nil || s.calls != tt.calls || step != tt.behind-s.behind || (s.behind-tt.want).Abs() > prompt {
			t.Errorf("%+v: %d calls, step %s, behind by %s: %v", tt, s.calls, step, s.behind, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestResolvConf writes the name servers as a container sees them: into the file that it has
// mounted.
func TestResolvConf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("nameserver 192.0.2.53\nsearch a.long.domain.test\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	mounted, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer mounted.Close()
	s := &Server{ResolvConf: path}
	const now = "nameserver 198.51.100.53\n"
	if err := errors.Join(s.writeResolvConf(now), s.writeResolvConf("")); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(mounted); err != nil || string(got) != now {
		t.Errorf("the container reads %q, %v", got, err)
	}
	if err := (&Server{ResolvConf: filepath.Join(path, "x")}).writeResolvConf("nameserver 192.0.2.53\n"); err == nil {
		t.Error("a file that cannot be written is no error")
	}
	if err := (&Server{}).writeResolvConf("nameserver 192.0.2.53\n"); err != nil {
		t.Errorf("an agent of another distribution: %v", err)
	}
}

// TestReady asks a guest until its service is ready. An agent that serves none is, and so is one
// that does not know the question.
func TestReady(t *testing.T) {
	port, host := serialPair(t)
	var asked atomic.Int32
	serve(t, &Server{Service: func() (bool, []uint32, error) {
		if asked.Add(1) == 1 {
			return false, []uint32{9999}, nil
		}
		return true, nil, nil
	}}, port)
	greet(t, host)
	c := NewClient(noClose{host})
	defer c.Close()
	if r, err := c.Ready(t.Context()); err != nil || !r.GetReady() || len(r.GetClosedPorts()) > 0 || asked.Load() != 2 {
		t.Errorf("%v, %v after %d", r, err, asked.Load())
	}
}

func TestNotReady(t *testing.T) {
	port, host := serialPair(t)
	serve(t, &Server{Service: func() (bool, []uint32, error) { return false, []uint32{80, 9999}, nil }}, port)
	greet(t, host)
	c := NewClient(noClose{host})
	defer c.Close()
	if r, err := c.Ready(t.Context()); err != nil || r.GetReady() || !slices.Equal(r.GetClosedPorts(), []uint32{80, 9999}) {
		t.Errorf("%v, %v", r, err)
	}
}

// TestReadyCmd checks a service until the check succeeds, and tells how it failed until then.
func TestReadyCmd(t *testing.T) {
	port, host := serialPair(t)
	file := filepath.Join(t.TempDir(), "healthy")
	s := &Server{ReadyCmd: "cat " + file, ReadyCmdTimeout: time.Minute}
	serve(t, s, port)
	greet(t, host)
	c := NewClient(noClose{host})
	defer c.Close()
	for {
		r, err := c.Ready(t.Context())
		if err != nil || r.GetReady() {
			t.Fatalf("%v, %v", r, err)
		}
		if strings.Contains(r.GetFailure(), "No such file") {
			break
		}
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for {
		r, err := c.Ready(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if r.GetReady() {
			break
		}
	}
}

// TestReadyCmdHangs ends a check that takes too long, and one that runs when the agent ends.
func TestReadyCmdHangs(t *testing.T) {
	port, host := serialPair(t)
	serve(t, &Server{ReadyCmd: "sleep 1000", ReadyCmdTimeout: 50 * time.Millisecond}, port)
	greet(t, host)
	c := NewClient(noClose{host})
	defer c.Close()
	for {
		r, err := c.Ready(t.Context())
		if err != nil || r.GetReady() {
			t.Fatalf("%v, %v", r, err)
		}
		if r.GetFailure() == "not done after 50ms" {
			break
		}
	}
}

func TestNothingToBeReady(t *testing.T) {
	port, host := serialPair(t)
	serve(t, &Server{}, port)
	greet(t, host)
	c := NewClient(noClose{host})
	defer c.Close()
	if r, err := c.Ready(t.Context()); err != nil || !r.GetReady() {
		t.Errorf("%v, %v", r, err)
	}
}

// TestOldAgent asks an agent of before there was the question.
func TestOldAgent(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	host, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	server.RegisterService("drafter.agent.v1.Agent", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{}})
	done := make(chan error)
	go func() { done <- server.Serve(context.Background(), l) }()
	c := NewClient(host)
	if r, err := c.Ready(t.Context()); err != nil || !r.GetReady() {
		t.Errorf("%v, %v", r, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil && !errors.Is(err, ttrpc.ErrServerClosed) {
		t.Error(err)
	}
}

// A conversation that has ended leaves the port to the next one.
func TestEndedConversation(t *testing.T) {
	port, host := serialPair(t)
	var conversations []net.Conn
	for range 2 {
		greeted := make(chan error, 1)
		go func() { greeted <- Greet(t.Context(), host) }()
		c, err := port.accept(t.Context())
		if err = errors.Join(err, <-greeted); err != nil {
			t.Fatal(err)
		}
		conversations = append(conversations, c)
		if len(conversations) == 1 {
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := conversations[0].Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a read in the first one: %v", err)
	}
	if _, err := conversations[1].Write([]byte("hello")); err != nil {
		t.Errorf("a write in the second one: %v", err)
	}
	if err := conversations[1].Close(); err != nil {
		t.Error(err)
	}
}

package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"drafter/internal/logging"
)

// Server is the guest's end.
type Server struct {
	Shell            string // runs the commands below; "sh" if empty
	BeforeSuspendCmd string // "" for none
	AfterResumeCmd   string // "" for none
	KeepClock        bool   // the guest keeps its own time: its clock is never set
	// file that has the name servers of the host that the guest is on; "" for none
	ResolvConf string

	// Service tells whether the guest's service is ready, and which of its TCP ports it has not
	// opened yet. It is called often, by any goroutine. nil: there is no service to wait for.
	Service func() (ready bool, closed []uint32, err error)

	// ReadyCmd is a command that succeeds once the service is ready. It is tried when the service's
	// ports are open. "" for none.
	ReadyCmd        string
	ReadyCmdTimeout time.Duration // of one run

	// Container is where programs run and files lie that a host asks for; nil: the guest's system.
	Container Container

	// Log is what the workload prints; nil if that is not kept.
	Log *Log

	// StartWorkload starts a workload that is held; nil if none ever was.
	StartWorkload func(env []string) error
	// Held tells whether the workload is still held; nil if it never was.
	Held func() bool

	// Main begins the program of a workload that waits for a host to run it, and returns its arguments.
	// ended is called with its exit status once the host knows that. nil: the workload does not wait.
	Main func() (args []string, ended func(status int32), err error)

	Logger *slog.Logger // nil: slog.Default()

	check    check
	sessions atomic.Int32
	killer   killer
	running  sync.WaitGroup // sessions
}

var _ AgentService = (*Server)(nil)

// maxOutput bounds what Exec keeps of a program's output, per stream, in bytes.
const maxOutput = 1 << 20

// Serve answers calls on the conversations that l yields until ctx ends. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	server, err := ttrpc.NewServer()
	if err != nil {
		return fmt.Errorf("serve agent: %w", err)
	}
	RegisterAgentService(server, s)
	RegisterWorkloadService(server, s)
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	defer s.check.open(ctx)()
	defer s.running.Wait()
	if err := server.Serve(ctx, l); ctx.Err() == nil {
		return fmt.Errorf("serve agent: %w", err)
	}
	return nil
}

// BeforeSuspend implements [AgentService].
func (s *Server) BeforeSuspend(ctx context.Context, _ *BeforeSuspendRequest) (*BeforeSuspendResponse, error) {
	if err := s.command(ctx, s.BeforeSuspendCmd); ctx.Err() != nil {
		return nil, ctx.Err() // whatever it says, it was ended as the host's time was over
	} else if err != nil {
		return nil, fmt.Errorf("before-suspend command: %w", err)
	}
	unix.Sync()
	if s.Log != nil {
		s.Log.suspends()
	}
	return &BeforeSuspendResponse{}, nil
}

// A host that asks whether the service is ready gets an answer after readyWait. Until then the
// service is looked at every readyPause.
const (
	readyWait  = time.Second
	readyPause = 20 * time.Millisecond
)

// Ready implements [AgentService].
func (s *Server) Ready(ctx context.Context, _ *ReadyRequest) (*ReadyResponse, error) {
	deadline := time.Now().Add(readyWait)
	for {
		r, err := s.ready() //nolint:contextcheck // the check goes on after the call that has it run
		if err != nil || r.Ready || r.Held || time.Now().After(deadline) {
			return r, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(readyPause):
		}
	}
}

func (s *Server) ready() (*ReadyResponse, error) {
	if s.Held != nil && s.Held() {
		return &ReadyResponse{Held: true}, nil
	}
	r := &ReadyResponse{Ready: true}
	var err error
	if s.Service != nil {
		if r.Ready, r.ClosedPorts, err = s.Service(); err != nil || !r.Ready {
			return r, err
		}
	}
	if s.ReadyCmd != "" {
		r.Ready, r.Failure = s.check.look(s.ReadyCmdTimeout, func(ctx context.Context) error { return s.command(ctx, s.ReadyCmd) })
	}
	return r, nil
}

// checkPause lies between the end of a check and the next one.
const checkPause = time.Second

// check is a command that runs in the background, for calls that ask for its outcome.
type check struct {
	ctx     context.Context // ends with the server
	mu      sync.Mutex
	wg      sync.WaitGroup
	running bool
	ended   time.Time
	passed  bool
	failure string
}

// open lets the check run until end is called, which waits for it. Calls may outlive their server.
func (c *check) open(ctx context.Context) (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	c.ctx, c.failure = ctx, "not done yet"
	return func() {
		c.mu.Lock()
		cancel()
		c.mu.Unlock()
		c.wg.Wait()
	}
}

// look tells whether the check has passed, or how it failed. A check that failed runs again.
func (c *check) look(timeout time.Duration, run func(context.Context) error) (passed bool, failure string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.running && !c.passed && c.ctx.Err() == nil && time.Since(c.ended) >= checkPause {
		c.running = true
		c.wg.Go(func() {
			ctx, cancel := context.WithTimeoutCause(c.ctx, timeout, fmt.Errorf("not done after %s", timeout))
			defer cancel()
			err := run(ctx)
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			c.running, c.ended = false, time.Now()
			if c.passed = err == nil; !c.passed {
				c.failure = err.Error()
			}
		})
	}
	return c.passed, c.failure
}

// AfterResume implements [AgentService].
func (s *Server) AfterResume(ctx context.Context, r *AfterResumeRequest) (*AfterResumeResponse, error) {
	if err := reseed(r.GetEntropy()); err != nil {
		return nil, err
	}
	step, err := s.stepClock(r.GetNowUnixNano(), r.GetMostStepNano())
	if err != nil {
		return nil, err
	}
	if s.Log != nil && r.GetMostStepNano() <= 0 { // the VM was away
		s.Log.wasResumed()
	}
	response := &AfterResumeResponse{ClockStepNano: int64(step)}
	if err := s.writeResolvConf(r.GetResolvConf()); err != nil {
		response.ResolvConfError = err.Error() // the guest runs on without
	}
	if err := s.command(ctx, s.AfterResumeCmd); ctx.Err() != nil {
		return nil, ctx.Err()
	} else if err != nil {
		return nil, fmt.Errorf("after-resume command: %w", err)
	}
	return response, nil
}

// CatchUp implements [AgentService].
func (s *Server) CatchUp(_ context.Context, r *CatchUpRequest) (*CatchUpResponse, error) {
	step, err := s.stepClock(r.GetNowUnixNano(), r.GetMostStepNano())
	return &CatchUpResponse{ClockStepNano: int64(step)}, err
}

// stepClock sets the clock as [Client.AfterResume] says, and returns by how much.
func (s *Server) stepClock(nowUnixNano, mostStepNano int64) (time.Duration, error) {
	now, most := time.Unix(0, nowUnixNano), time.Duration(mostStepNano)
	step := time.Until(now)
	if s.KeepClock || most < 0 || most > 0 && (step <= 0 || step > most) {
		return 0, nil
	}
	if err := setClock(now); err != nil {
		return 0, fmt.Errorf("set clock to %s: %w", now, err)
	}
	return step, nil
}

// writeResolvConf overwrites the file, and does not replace it, because containers have it mounted.
func (s *Server) writeResolvConf(text string) error {
	if s.ResolvConf == "" || text == "" {
		return nil
	}
	return os.WriteFile(s.ResolvConf, []byte(text), 0o644)
}

// setClock sets the system's clock.
var setClock = func(now time.Time) error {
	ts, err := unix.TimeToTimespec(now)
	if err != nil {
		return err
	}
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// ioctls of random(4).
const (
	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207
)

// reseed mixes entropy into the kernel's pool, credits it, and makes the generator use it at once.
func reseed(entropy []byte) error {
	fd, err := unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("reseed: open /dev/urandom: %w", err)
	}
	defer unix.Close(fd)
	if len(entropy) > 0 {
		// struct rand_pool_info { int entropy_count; int buf_size; __u32 buf[]; }
		info := make([]uint32, 2+(len(entropy)+3)/4)
		info[0], info[1] = uint32(len(entropy)*8), uint32(len(entropy))
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&info[2])), 4*(len(info)-2)), entropy)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndAddEntropy, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
			return fmt.Errorf("reseed: add entropy: %w", errno)
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed: %w", errno)
	}
	return nil
}

func (s *Server) command(ctx context.Context, command string) error {
	if command == "" {
		return nil
	}
	shell := s.Shell
	if shell == "" {
		shell = "sh"
	}
	out := &boundedBuffer{}
	cmd := program(ctx, shell, "-c", command)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%q: %w: %s", command, err, bytes.TrimSpace(out.kept))
	}
	logging.Or(s.Logger).Info("Ran command", "command", command)
	return nil
}

// program returns a command that ends with ctx, and all its children with it.
func program(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // for a child that left the group and holds the output open
	return cmd
}

// Exec implements [AgentService].
func (s *Server) Exec(ctx context.Context, r *ExecRequest) (*ExecResponse, error) {
	if len(r.GetArgs()) == 0 {
		return nil, errors.New("exec: no program named")
	}
	stdout, stderr := &boundedBuffer{}, &boundedBuffer{}
	cmd := program(ctx, r.GetArgs()[0], r.GetArgs()[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(r.GetStdin()), stdout, stderr
	status, err := ExitStatus(cmd.Run())
	if err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	return &ExecResponse{ExitStatus: int32(status), Stdout: stdout.kept, Stderr: stderr.kept}, nil
}

// boundedBuffer keeps the first maxOutput bytes written to it. It does not embed a bytes.Buffer,
// whose ReadFrom knows no bound.
type boundedBuffer struct{ kept []byte }

func (b *boundedBuffer) Write(p []byte) (int, error) {
	b.kept = append(b.kept, p[:min(len(p), maxOutput-len(b.kept))]...)
	return len(p), nil
}

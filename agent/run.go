package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var _ WorkloadService = (*Server)(nil)

// Container is where a guest's workload runs.
type Container interface {
	// Root is its root directory.
	Root() (string, error)
	// Start starts a program with these files as its input and outputs, in a session of processes of its
	// own. A program with a terminal gets none of them. The error is a [StartError].
	Start(p *Program, stdin, stdout, stderr *os.File) (*Process, error)
}

// Process is a program that was started.
type Process struct {
	PID  int
	TTY  *os.File                       // the other end of its terminal; it can be polled
	Wait func() (status int, err error) // is called once
}

// where returns where programs run and files lie.
func (s *Server) where(p Place) Container {
	if p == Place_SYSTEM || s.Container == nil {
		return system{}
	}
	return s.Container
}

// served is a session at the guest's end.
type served struct {
	stream         Workload_RunServer
	stdin          *inbox
	stdout, stderr *allowance
	cancel         context.CancelFunc
	killer         *killer
	over           func(status int32) // is called with the status that the host knows; may be nil

	begin    sync.Once
	received chan struct{} // closed when the host has hung up, or is gone

	mu      sync.Mutex
	process *Process // nil when there is none any more
}

// Run implements [WorkloadService].
func (s *Server) Run(ctx context.Context, stream Workload_RunServer) error {
	s.running.Add(1)
	defer s.running.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g := &served{stream: stream, stdout: newAllowance(), stderr: newAllowance(), cancel: cancel, received: make(chan struct{}), killer: &s.killer}
	g.stdin = newInbox(func(n uint32) {
		_ = stream.Send(&RunResponse{Message: &RunResponse_StdinTaken{StdinTaken: &Taken{Bytes: n}}})
	})
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	end := &End{}
	if n := s.sessions.Add(1); n > maxSessions {
		end.Error = errTooMany.Error()
	} else {
		end.ExitStatus, err = s.serve(ctx, g, first)
		var start *StartError
		if errors.As(err, &start) {
			end.ExitStatus = int32(start.ExitStatus)
		}
		if err != nil {
			end.Error = Words(err.Error())
		}
	}
	s.sessions.Add(-1)
	defer func() {
		if g.over != nil {
			g.over(end.GetExitStatus())
		}
	}()
	// The host hangs up when it has this, so that nothing arrives for a call that is over.
	if err := stream.Send(&RunResponse{Message: &RunResponse_End{End: end}}); err != nil {
		return err
	}
	g.receive()
	<-g.received
	return nil
}

func (s *Server) serve(ctx context.Context, g *served, first *RunRequest) (status int32, err error) {
	switch m := first.GetMessage().(type) {
	case *RunRequest_Program:
		if m.Program.GetMain() {
			return s.runMain(ctx, g, m.Program)
		}
		return g.run(ctx, s.where(m.Program.GetPlace()), m.Program)
	case *RunRequest_CopyOut:
		return 0, g.copyOut(s.where(m.CopyOut.GetPlace()), m.CopyOut.GetPath())
	case *RunRequest_CopyIn:
		return 0, g.copyIn(s.where(m.CopyIn.GetPlace()), m.CopyIn.GetPath())
	}
	return 0, errors.New("the agent is of an older release, and does not know this request; package the guest anew with a blueprint of this release")
}

// runMain runs the program that the workload waits for.
func (s *Server) runMain(ctx context.Context, g *served, p *Program) (int32, error) {
	if s.Main == nil {
		return 0, &StartError{CannotExecute, "the workload does not wait for its program"}
	}
	var err error
	if p.Args, g.over, err = s.Main(); err != nil {
		return 0, &StartError{CannotExecute, err.Error()}
	}
	return g.run(ctx, s.where(Place_WORKLOAD), p)
}

// started tells the host that it may send.
func (g *served) started() error {
	err := g.stream.Send(&RunResponse{Message: &RunResponse_Started{Started: &Started{}}})
	g.receive()
	return err
}

// receive begins to take what the host sends, until it hangs up. It never waits for what runs,
// because the other calls of the conversation arrive behind.
func (g *served) receive() {
	g.begin.Do(func() {
		go func() {
			defer close(g.received)
			for {
				m, err := g.stream.Recv()
				if err == nil {
					err = g.take(m)
				}
				if err != nil {
					g.stdin.drop(err)
					g.stdout.end(err)
					g.stderr.end(err)
					g.cancel()
					return
				}
			}
		}()
	})
}

func (g *served) take(m *RunRequest) error {
	switch m := m.GetMessage().(type) {
	case *RunRequest_Stdin:
		return g.stdin.put(m.Stdin)
	case *RunRequest_EndOfInput:
		g.stdin.end(io.EOF)
	case *RunRequest_StdoutTaken:
		return g.stdout.taken(m.StdoutTaken.GetBytes())
	case *RunRequest_StderrTaken:
		return g.stderr.taken(m.StderrTaken.GetBytes())
	case *RunRequest_WindowSize:
		g.withProcess(func(p *Process) {
			if p.TTY != nil {
				_ = setSize(p.TTY, m.WindowSize) // the terminal may be gone
			}
		})
	case *RunRequest_Signal:
		g.withProcess(func(p *Process) { _ = syscall.Kill(p.PID, syscall.Signal(m.Signal)) }) // the program may have ended
	default:
		return errUnasked
	}
	return nil
}

func (g *served) withProcess(do func(*Process)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.process != nil {
		do(g.process)
	}
}

func (g *served) setProcess(p *Process) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.process = p
}

// run runs a program until it has ended and the host has read what it printed.
func (g *served) run(ctx context.Context, c Container, p *Program) (status int32, err error) {
	if len(p.GetArgs()) == 0 || p.GetArgs()[0] == "" {
		return 0, &StartError{NotFound, "no program named"}
	}
	var s stdio
	defer s.close()
	if err := s.open(p); err != nil {
		return 0, &StartError{CannotExecute, err.Error()}
	}
	process, err := c.Start(p, s.child[0], s.child[1], s.child[2])
	s.closeChild()
	if err != nil {
		return 0, err
	}
	in, outs := s.host[0], s.host[1:]
	if process.TTY != nil {
		s.host[0] = process.TTY // is closed with them
		in, outs = process.TTY, []*os.File{process.TTY}
	}
	g.setProcess(process)
	session := sessionOf(process.PID)
	defer context.AfterFunc(ctx, func() { g.withProcess(func(p *Process) { g.killer.kill(p.PID, session) }) })()

	var outputs, input sync.WaitGroup
	sends := []func([]byte) error{g.sendStdout, g.sendStderr}
	for n, a := range []*allowance{g.stdout, g.stderr}[:len(outs)] {
		outputs.Go(func() { pump(outs[n], a, sends[n]) })
	}
	began := g.started()
	if in != nil {
		input.Go(func() { g.feed(in, process.TTY != nil) })
	}
	n, err := process.Wait()
	g.setProcess(nil)
	for _, f := range outs {
		f.SetReadDeadline(time.Unix(1, 0)) // see pump
	}
	outputs.Wait()
	g.stdin.drop(os.ErrProcessDone)
	s.close()
	input.Wait()
	return int32(n), errors.Join(err, began)
}

// stdio is the pipes of a program without a terminal.
type stdio struct {
	child [3]*os.File // the program's ends
	host  [3]*os.File // ours
}

func (s *stdio) open(p *Program) (err error) {
	if p.GetTty() {
		return nil
	}
	if p.GetStdin() {
		s.child[0], s.host[0], err = os.Pipe()
	} else {
		s.child[0], err = os.Open(os.DevNull)
	}
	for n := 1; n <= 2 && err == nil; n++ {
		s.host[n], s.child[n], err = os.Pipe()
	}
	return err
}

func (s *stdio) close() {
	s.closeChild()
	for n, f := range s.host {
		if f != nil {
			f.Close()
			s.host[n] = nil
		}
	}
}

func (s *stdio) closeChild() {
	for n, f := range s.child {
		if f != nil {
			f.Close()
			s.child[n] = nil
		}
	}
}

func (g *served) sendStdout(p []byte) error {
	return g.stream.Send(&RunResponse{Message: &RunResponse_Stdout{Stdout: p}})
}

func (g *served) sendStderr(p []byte) error {
	return g.stream.Send(&RunResponse{Message: &RunResponse_Stderr{Stderr: p}})
}

// pump sends what a program prints. When the program has ended, the file's deadline is over: then
// only what the pipe or terminal holds is read, because others that the program started may have
// it, too, and go on.
func pump(f *os.File, a *allowance, send func([]byte) error) {
	buf := make([]byte, maxPiece)
	ended, left := false, maxPipe
	for left > 0 {
		room, err := a.await()
		if err != nil {
			return // the host does not read any more
		}
		var n int
		if ended {
			n, err = readNow(f, buf[:room])
			left -= n
		} else if n, err = f.Read(buf[:room]); n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
			if f.SetReadDeadline(time.Time{}) != nil {
				return
			}
			ended = true
			continue
		}
		if n > 0 {
			a.spend(buf[:n])
			if send(buf[:n]) != nil {
				return
			}
		}
		if err != nil || n == 0 {
			return // the end, which is EIO on a terminal
		}
	}
}

// maxPipe is what a pipe holds at most, in bytes (pipe-max-size of proc_sys_fs(5)).
const maxPipe = 1 << 20

// readNow reads what is there.
func readNow(f *os.File, p []byte) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	if cerr := raw.Read(func(fd uintptr) bool {
		for {
			if n, err = unix.Read(int(fd), p); !errors.Is(err, unix.EINTR) {
				return true
			}
		}
	}); cerr != nil {
		err = cerr
	}
	return max(n, 0), err
}

// feed gives a program its input. What a program does not want to read is dropped.
func (g *served) feed(f *os.File, tty bool) {
	buf := make([]byte, maxPiece)
	for {
		n, err := g.stdin.Read(buf)
		switch {
		case errors.Is(err, io.EOF) && tty:
			_, _ = f.Write([]byte{endOfTransmission}) // nobody may be there
			return
		case err != nil && !tty:
			f.Close()
			return
		case err != nil:
			return
		}
		if _, err := f.Write(buf[:n]); err != nil {
			_, _ = io.Copy(io.Discard, g.stdin) // ends with the session
			return
		}
	}
}

// endOfTransmission is Ctrl-D, the end of input on a terminal.
const endOfTransmission = 4

func setSize(tty *os.File, size *WindowSize) error {
	raw, err := tty.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(min(size.GetRows(), 1<<16-1)), Col: uint16(min(size.GetColumns(), 1<<16-1))})
	})
	return errors.Join(cerr, err)
}

// sessionOf returns the session of a process. A program that a runtime starts does not lead its own.
func sessionOf(pid int) int {
	own, _ := unix.Getsid(0) // never fails
	if id, err := unix.Getsid(pid); err == nil && id != own {
		return id
	}
	return pid // it has ended
}

// killer kills sessions. When a host goes, many of them end at once; to find what is in one of them
// takes as long as to find what is in all.
type killer struct {
	mu       sync.Mutex
	sessions map[int]bool // to be killed

	scanning sync.Mutex
}

// kill kills a program, all that runs in its session, and what these have started in it meanwhile. A
// program may have become the leader of a session since it was started.
func (k *killer) kill(program, session int) {
	k.set(true, program, session)
	defer k.set(false, program, session) // if something cannot be killed
	k.scanning.Lock()
	defer k.scanning.Unlock()
	for range maxSessions {
		k.mu.Lock()
		doomed := maps.Clone(k.sessions)
		k.mu.Unlock()
		if !doomed[session] {
			return // another call has seen to it
		}
		if !killAll(doomed) {
			k.set(false, slices.Collect(maps.Keys(doomed))...)
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (k *killer) set(doomed bool, sessions ...int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, id := range sessions {
		if doomed {
			if k.sessions == nil {
				k.sessions = map[int]bool{}
			}
			k.sessions[id] = true
		} else {
			delete(k.sessions, id)
		}
	}
}

// killAll kills what is in some sessions now, and tells whether there was anything.
func killAll(sessions map[int]bool) bool {
	found := false
	processes, _ := os.ReadDir("/proc")
	for _, p := range processes {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		// There may be many, of which few are meant.
		if id, err := unix.Getsid(pid); err != nil || !sessions[id] || hasEnded(pid) {
			continue
		}
		if syscall.Kill(pid, syscall.SIGKILL) == nil {
			found = true
		}
	}
	return found
}

// hasEnded tells whether a process waits for its parent to learn that it has ended, or is no more.
func hasEnded(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	// "PID (COMMAND) STATE …", where the command may hold anything.
	_, state, _ := strings.Cut(string(stat[max(bytes.LastIndexByte(stat, ')'), 0):]), " ")
	return strings.HasPrefix(state, "Z") || strings.HasPrefix(state, "X")
}

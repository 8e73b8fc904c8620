package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Command is a program to run in a guest.
type Command struct {
	Args []string // program and arguments; the program is looked up on the PATH of its environment
	Env  []string // added to the environment, as NAME=value
	Dir  string   // working directory; "" for the container's, or / in the guest's system

	// User is "name", "uid", "name:group" or "uid:gid", as passwd(5) and group(5) there have them; ""
	// for the container's, or root in the guest's system.
	User string

	TTY           bool // with a terminal of this size; 0 for one that is not known
	Rows, Columns uint16

	Stdin  bool // there will be input; a program with a terminal always may have some
	System bool // in the guest's system, even if the guest has a container for its workload

	// Main stands for the program of a workload that waits for it; see [Server].Main. There are no Args.
	Main bool
}

// Run starts a program in the guest. It returns once the program runs; if it cannot be started, the
// error is a [StartError]. When ctx ends, the program and what it started are killed, as they are
// when the client or the guest's host goes.
func (c *Client) Run(ctx context.Context, command Command) (*Session, error) {
	s, err := c.session(ctx, "run", &RunRequest{Message: &RunRequest_Program{Program: &Program{
		Place: place(command.System), Args: command.Args, Env: command.Env, Dir: command.Dir, User: command.User,
		Tty: command.TTY, WindowSize: &WindowSize{Rows: uint32(command.Rows), Columns: uint32(command.Columns)}, Stdin: command.Stdin,
		Main: command.Main,
	}}})
	if err == nil && !command.Stdin && !command.TTY {
		s.stdin.end(errNoStdin)
	}
	return s, err
}

var errNoStdin = errors.New("the program was started without input")

func place(system bool) Place {
	if system {
		return Place_SYSTEM
	}
	return Place_WORKLOAD
}

// Exit statuses of programs that were not started, as shells have them.
const (
	CannotExecute = 126
	NotFound      = 127
)

// StartError says why a program was not started.
type StartError struct {
	ExitStatus int // CannotExecute or NotFound
	Reason     string
}

func (e *StartError) Error() string { return e.Reason }

// Session is a program that runs in a guest. Both outputs have to be read: a program whose output
// nobody reads waits, and nothing else does. Its methods are safe for concurrent use.
type Session struct {
	// Stdin is the program's input. Closing it ends the input; on a terminal, that is Ctrl-D.
	Stdin io.WriteCloser
	// Stdout and Stderr end when the program has ended and all of its output was read. With a
	// terminal, all output is in Stdout.
	Stdout, Stderr io.Reader

	client *Client
	call   string
	stream Workload_RunClient

	stdout, stderr *inbox
	stdin          *allowance

	writing sync.Mutex // held by a Write to Stdin

	mu        sync.Mutex // held while a message is sent
	begun     bool       // the guest has: messages may be sent
	isCut     bool       // it is to be ended
	hungUp    bool       // the last message was sent
	inputDone bool

	over           bool // the guest has sent its last message but the one that ends the stream
	started, ended chan struct{}
	end            sync.Once
	status         int
	err            error
}

const workloadService = "drafter.agent.v1.Workload"

// session sends the first message and returns once the guest has begun with what it says, or cannot.
// Until then nothing else is sent, because to an agent that does not know the call it would be for
// no call at all.
func (c *Client) session(ctx context.Context, call string, first *RunRequest) (*Session, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("agent %s: %w", call, err)
	}
	if c.sessions.Add(1) > maxSessions {
		c.sessions.Add(-1)
		return nil, fmt.Errorf("agent %s: %w", call, errTooMany)
	}
	// The stream outlives ctx until the guest has ended what runs.
	stream, err := c.ttrpc.NewStream(context.WithoutCancel(ctx), &ttrpc.StreamDesc{StreamingClient: true, StreamingServer: true}, workloadService, "Run", first)
	if err != nil {
		c.sessions.Add(-1)
		return nil, c.explain(ctx, call, err)
	}
	s := &Session{client: c, call: call, stream: &workloadRunClient{stream}, stdin: newAllowance(), started: make(chan struct{}), ended: make(chan struct{})}
	s.stdout = newInbox(func(n uint32) {
		_ = s.send(&RunRequest{Message: &RunRequest_StdoutTaken{StdoutTaken: &Taken{Bytes: n}}})
	})
	s.stderr = newInbox(func(n uint32) {
		_ = s.send(&RunRequest{Message: &RunRequest_StderrTaken{StderrTaken: &Taken{Bytes: n}}})
	})
	s.Stdin, s.Stdout, s.Stderr = (*stdin)(s), s.stdout, s.stderr
	stop := context.AfterFunc(ctx, func() { s.cut(fmt.Errorf("agent %s: %w", call, context.Cause(ctx))) })
	go func() { //nolint:contextcheck // it outlives ctx
		defer stop()
		s.receive()
	}()
	select {
	case <-s.started:
		return s, nil
	case <-s.ended:
		select {
		case <-s.started:
			return s, nil
		default:
			return nil, s.err
		}
	}
}

var errTooMany = fmt.Errorf("%d programs and copies are under way in the guest; end one of them first", maxSessions)

// receive takes what the guest sends, until the session is over for both.
func (s *Session) receive() {
	defer s.client.sessions.Add(-1)
	for {
		m, err := s.stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			s.mu.Lock()
			s.hungUp = true
			s.mu.Unlock()
			s.finish(0, s.client.explain(context.Background(), s.call, missing(err)))
			return
		}
		if err := s.take(m); err != nil {
			s.client.conn.refuse(err)
		}
	}
}

// missing says what to do about an agent of before there were sessions.
func missing(err error) error {
	if status.Code(err) == codes.Unimplemented {
		return fmt.Errorf("the guest's agent is of an older release, without this call; package the guest anew with a blueprint of this release: %w", err)
	}
	return err
}

var errUnasked = errors.New("a message that does not belong here")

func (s *Session) take(m *RunResponse) error {
	if s.over {
		return errUnasked
	}
	started := closed(s.started)
	switch m := m.GetMessage().(type) {
	case *RunResponse_Started:
		if started {
			return errUnasked
		}
		close(s.started)
		s.begin()
	case *RunResponse_Stdout:
		return s.stdout.put(m.Stdout)
	case *RunResponse_Stderr:
		return s.stderr.put(m.Stderr)
	case *RunResponse_StdinTaken:
		return s.stdin.taken(m.StdinTaken.GetBytes())
	case *RunResponse_End:
		s.over = true
		status, reason := int(uint8(m.End.GetExitStatus())), Words(m.End.GetError())
		var err error
		switch {
		case reason == "" && !started:
			return errUnasked
		case reason != "" && !started && (status == CannotExecute || status == NotFound):
			err = &StartError{status, reason}
		case reason != "":
			err = errors.New(reason)
		}
		if err != nil {
			err = fmt.Errorf("agent %s: %w", s.call, err)
		}
		s.finish(status, err)
		s.cut(nil)
		s.begin()
	default:
		return errUnasked
	}
	return nil
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// finish ends the session for whoever uses it. What has arrived can still be read.
func (s *Session) finish(status int, err error) {
	s.end.Do(func() {
		s.status, s.err = status, err
		end := err
		if end == nil {
			end = io.EOF
		}
		s.stdout.end(end)
		s.stderr.end(end)
		s.stdin.end(os.ErrProcessDone)
		close(s.ended)
	})
}

// cut ends the session for both, before its time if it has not ended.
func (s *Session) cut(err error) {
	s.finish(0, err)
	if s.err != nil {
		s.stdout.drop(s.err)
		s.stderr.drop(s.err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.isCut = true
	s.hangUp()
}

// begin lets messages be sent.
func (s *Session) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begun = true
	s.hangUp()
}

// hangUp sends the last message, if it is time.
func (s *Session) hangUp() {
	if s.begun && s.isCut && !s.hungUp {
		s.hungUp = true
		_ = s.stream.CloseSend() // a failure ends receive, too
	}
}

// send sends a message, or drops it if the session is over. A failure ends receive, too, and is told
// there.
func (s *Session) send(m *RunRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hungUp {
		return os.ErrProcessDone
	}
	return s.stream.Send(m)
}

// Wait returns when the program has ended, and all that it printed has arrived: its exit status as
// from wait(2), 128 plus the signal's number for one that was killed. An error is one of the
// conversation, or that ctx has ended.
func (s *Session) Wait() (status int, err error) {
	<-s.ended
	return s.status, s.err
}

// Done is closed when Wait returns.
func (s *Session) Done() <-chan struct{} { return s.ended }

// Signal sends a signal to the program. One that has ended is no error.
func (s *Session) Signal(signal syscall.Signal) error {
	return s.tell(&RunRequest{Message: &RunRequest_Signal{Signal: int32(signal)}})
}

// Resize sets the size of the program's terminal.
func (s *Session) Resize(rows, columns uint16) error {
	return s.tell(&RunRequest{Message: &RunRequest_WindowSize{WindowSize: &WindowSize{Rows: uint32(rows), Columns: uint32(columns)}}})
}

func (s *Session) tell(m *RunRequest) error {
	if err := s.send(m); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return s.client.explain(context.Background(), s.call, err)
	}
	return nil
}

// stdin is a session's input.
type stdin Session

func (w *stdin) Write(p []byte) (int, error) {
	s := (*Session)(w)
	s.writing.Lock()
	defer s.writing.Unlock()
	var sent int
	for len(p) > 0 {
		room, err := s.stdin.await()
		if err != nil {
			return sent, err
		}
		piece := p[:min(room, len(p))]
		s.stdin.spend(piece)
		if err := s.send(&RunRequest{Message: &RunRequest_Stdin{Stdin: piece}}); err != nil {
			return sent, err
		}
		sent += len(piece)
		p = p[len(piece):]
	}
	return sent, nil
}

func (w *stdin) Close() error {
	s := (*Session)(w)
	s.stdin.end(os.ErrClosed)
	s.mu.Lock()
	done := s.inputDone
	s.inputDone = true
	s.mu.Unlock()
	if done {
		return nil
	}
	return s.tell(&RunRequest{Message: &RunRequest_EndOfInput{EndOfInput: &EndOfInput{}}})
}

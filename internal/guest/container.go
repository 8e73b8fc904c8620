package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"drafter/agent"
)

// Container is the bundle's container, for the agent.
type Container struct {
	mu      sync.Mutex
	process specs.Process // of the service

	dir     string // for files of the runtime
	pidFile string
	runtime func(args ...string) *exec.Cmd
}

// OpenContainer reads the bundle that the init has mounted.
func OpenContainer() (*Container, error) {
	b, err := readBundle()
	if err != nil {
		return nil, fmt.Errorf("OCI bundle: %w", err)
	}
	return &Container{process: *b.spec.Process, dir: "/run", pidFile: containerPID, runtime: crun}, nil
}

// addEnv gives programs what the service was started with, too.
func (c *Container) addEnv(env []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.process.Env = agent.WithEnv(c.process.Env, env)
}

var errNoContainer = errors.New("the container does not run")

// Root implements [agent.Container]. It is the container's own view, with what it has mounted.
func (c *Container) Root() (string, error) {
	pid, err := readPID(c.pidFile)
	if err != nil {
		return "", errNoContainer
	}
	return fmt.Sprintf("/proc/%d/root", pid), nil
}

func readPID(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

func cannotStart(err error) error {
	return &agent.StartError{ExitStatus: agent.CannotExecute, Reason: err.Error()}
}

// Start implements [agent.Container].
func (c *Container) Start(p *agent.Program, stdin, stdout, stderr *os.File) (*agent.Process, error) {
	root, err := c.Root()
	if err != nil {
		return nil, cannotStart(err)
	}
	process, err := c.describe(root, p)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(c.dir, "exec-")
	if err != nil {
		return nil, cannotStart(err)
	}
	started, err := c.start(dir, process, stdin, stdout, stderr)
	if err != nil {
		return nil, cannotStart(errors.Join(err, os.RemoveAll(dir)))
	}
	return started, nil
}

// describe is the program for the runtime. It has the rights of the service.
func (c *Container) describe(root string, p *agent.Program) (*specs.Process, error) {
	c.mu.Lock()
	process := c.process
	c.mu.Unlock()
	e, err := agent.Resolve(root, p, agent.Execution{Env: process.Env, Dir: process.Cwd, User: user.ExecUser{Uid: int(process.User.UID), Gid: int(process.User.GID)}})
	if err != nil {
		return nil, err
	}
	process.Args, process.Env, process.Cwd, process.Terminal = p.GetArgs(), e.Env, e.Dir, p.GetTty()
	if size := p.GetWindowSize(); p.GetTty() && size.GetRows() > 0 && size.GetColumns() > 0 {
		process.ConsoleSize = &specs.Box{Height: uint(size.GetRows()), Width: uint(size.GetColumns())}
	}
	if p.GetUser() != "" {
		process.User = specs.User{UID: uint32(e.User.Uid), GID: uint32(e.User.Gid), Umask: process.User.Umask}
		for _, g := range e.User.Sgids {
			process.User.AdditionalGids = append(process.User.AdditionalGids, uint32(g))
		}
	}
	// A user who is not root keeps what is ambient only, which bundles say for such users alone.
	if rights := process.Capabilities; process.User.UID != 0 && rights != nil && len(rights.Ambient) == 0 && slices.Contains(rights.Bounding, ambientCapability) {
		more := *rights
		more.Inheritable, more.Ambient = []string{ambientCapability}, []string{ambientCapability}
		process.Capabilities = &more
	}
	return &process, nil
}

// ambientCapability lets any user ping with any program.
const ambientCapability = "CAP_NET_RAW"

// start has the runtime start a program. The directory goes with it.
func (c *Container) start(dir string, process *specs.Process, stdin, stdout, stderr *os.File) (*agent.Process, error) {
	file := func(name string) string { return filepath.Join(dir, name) }
	raw, err := json.Marshal(process)
	if err == nil {
		err = os.WriteFile(file("process.json"), raw, 0o600)
	}
	if err != nil {
		return nil, err
	}
	args := []string{"--log", file("log"), "--log-format", "json", "exec", "--process", file("process.json"), "--pid-file", file("pid")}
	var consoles *net.UnixListener
	if process.Terminal {
		if consoles, err = net.ListenUnix("unix", &net.UnixAddr{Name: file("console"), Net: "unix"}); err != nil {
			return nil, err
		}
		defer consoles.Close()
		args = append(args, "--console-socket", file("console"))
	}
	cmd := c.runtime(append(args, containerName)...)
	if !process.Terminal {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, stderr
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var status int
	var waitErr error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		status, waitErr = agent.ExitStatus(cmd.Wait())
		if consoles != nil {
			consoles.Close()
		}
	}()
	var tty *os.File
	if consoles != nil {
		if tty, err = receiveFile(consoles); err != nil {
			_ = cmd.Process.Kill()
			<-ended
			return nil, c.failure(file("log"), err)
		}
		if err := agent.GiveTTY(tty, int(process.User.UID)); err != nil {
			slog.Warn("A program's user cannot open its terminal", "error", err)
		}
	}
	for {
		pid, perr := readPID(file("pid"))
		if perr == nil {
			return &agent.Process{PID: pid, TTY: tty, Wait: func() (int, error) {
				<-ended
				return status, errors.Join(waitErr, os.RemoveAll(dir))
			}}, nil
		}
		select {
		case <-ended:
			// It may have written the file just before.
			if _, perr := readPID(file("pid")); perr == nil {
				continue
			}
			if tty != nil {
				tty.Close()
			}
			return nil, c.failure(file("log"), fmt.Errorf("the runtime ended with status %d", status))
		case <-time.After(time.Millisecond):
		}
	}
}

// failure is what the runtime has logged last, or err.
func (c *Container) failure(log string, err error) error {
	b, rerr := os.ReadFile(log)
	if rerr != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	var entry struct {
		Msg string `json:"msg"`
	}
	if json.Unmarshal([]byte(lines[len(lines)-1]), &entry) != nil || entry.Msg == "" {
		return err
	}
	return errors.New(entry.Msg)
}

// receiveFile takes the one file that somebody sends over a socket, here a terminal's end.
func receiveFile(l *net.UnixListener) (*os.File, error) {
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	rights := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 64), rights)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil {
		return nil, err
	}
	if len(messages) != 1 {
		return nil, fmt.Errorf("%d messages with files instead of one", len(messages))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fds[0])
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, errors.Join(err, unix.Close(fds[0]))
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

// Package tour drives the drafter command as a user on the README's tour does. The demo, the
// benchmarks and the end-to-end tests share it.
package tour

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Drafter is the program to drive.
type Drafter struct {
	Bin  string
	Dir  string   // where it runs; "" for here
	Logs string   // where the output of its services is kept, in files
	Env  []string // beside this process' own
	// where its services print, such as a guest's console, instead of a file; nil for that
	Console io.Writer
	// command that runs it, such as one that enters other namespaces and replaces itself
	Via []string
}

// command is Bin with arguments, run Via.
func (d Drafter) command(args []string) []string {
	return append(append(slices.Clone(d.Via), d.Bin), args...)
}

// StepTimeout bounds each command and each wait.
const StepTimeout = 5 * time.Minute

// Run runs a command to its end. Its log goes to this process' stderr. When ctx ends, the command
// is told to end.
func (d Drafter) Run(ctx context.Context, stdout io.Writer, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, StepTimeout)
	defer cancel()
	line := d.command(args)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	cmd.Dir, cmd.Env = d.Dir, append(os.Environ(), d.Env...)
	cmd.Stdout, cmd.Stderr = stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("drafter %s: %w", args[0], err)
	}
	return nil
}

// Service is a drafter command that runs in the background.
type Service struct {
	// Output is the file with what the command printed on stdout: the guest's console, for a
	// runner.
	Output string
	Input  io.WriteCloser // the command's stdin

	name  string
	cmd   *exec.Cmd
	lines chan Line // closed when the command has ended
	done  chan struct{}

	mu         sync.Mutex // guards the following
	last       string     // what was last said that is no log line: an error message
	complaints []string
	err        error
}

// Line is one line of a service's log.
type Line struct {
	Time       time.Time     `json:"time"`
	Level      slog.Level    `json:"level"`
	Message    string        `json:"msg"`
	Took       time.Duration `json:"took"`
	Paused     time.Duration `json:"paused"`
	Preflight  time.Duration `json:"preflight"`
	AgentAfter time.Duration `json:"agentAfter"`
	Downtime   time.Duration `json:"downtime"`
	Bytes      int64         `json:"bytes"`
	BytesSaved int64         `json:"bytesSaved"`
	// of Bytes: those of memory
	MemoryBytes int64  `json:"memoryBytes"`
	Text        string `json:"-"` // the whole line
}

// Start starts a command. End or Kill it, and Wait.
func (d Drafter) Start(args ...string) (*Service, error) {
	output, err := os.CreateTemp(d.Logs, args[0]+"-*.log")
	if err != nil {
		return nil, err
	}
	defer output.Close()
	line := d.command(append(args, "--log-format", "json"))
	s := &Service{
		Output: output.Name(), name: args[0], lines: make(chan Line, 1000), done: make(chan struct{}),
		cmd: exec.Command(line[0], line[1:]...),
	}
	s.cmd.Dir, s.cmd.Env = d.Dir, append(os.Environ(), d.Env...)
	if s.Output, err = filepath.Abs(s.Output); err != nil {
		return nil, err
	}
	s.cmd.Stdout = output
	if d.Console != nil {
		s.cmd.Stdout = d.Console
	}
	// Ctrl-C is for this process, which ends its services in order
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if s.Input, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stderr, err := s.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start drafter %s: %w; run 'make build'", s.name, err)
	}
	go s.follow(stderr)
	return s, nil
}

func (s *Service) follow(stderr io.Reader) {
	defer close(s.done)
	scanner := bufio.NewScanner(stderr)
	for scanner.Scan() {
		line := Line{Text: scanner.Text()}
		if json.Unmarshal(scanner.Bytes(), &line) != nil {
			s.mu.Lock()
			s.last += line.Text + "\n"
			s.mu.Unlock()
		} else if line.Level >= slog.LevelWarn {
			s.mu.Lock()
			s.complaints = append(s.complaints, line.Text)
			s.mu.Unlock()
		}
		select {
		case s.lines <- line:
		default: // nobody reads this log
		}
	}
	close(s.lines)
	err := s.cmd.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("drafter %s: %w: %s", s.name, err, strings.TrimSpace(s.last))
	}
	s.err = err
}

// Await returns the next line of the log with message, or with one of others.
func (s *Service) Await(ctx context.Context, message string, others ...string) (Line, error) {
	timeout := time.NewTimer(StepTimeout)
	defer timeout.Stop()
	for {
		select {
		case line, ok := <-s.lines:
			if !ok {
				return line, errors.Join(fmt.Errorf("drafter %s ended before %q", s.name, message), s.Wait())
			}
			if line.Message == message || slices.Contains(others, line.Message) {
				return line, nil
			}
		case <-ctx.Done():
			return Line{}, ctx.Err()
		case <-timeout.C:
			return Line{}, fmt.Errorf("drafter %s did not get to %q in %s", s.name, message, StepTimeout)
		}
	}
}

// Complaints are the warnings and errors that the command has logged.
func (s *Service) Complaints() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.complaints)
}

// PID is the command's process id.
func (s *Service) PID() int { return s.cmd.Process.Pid }

// Signal sends a signal; that the command has ended is no error.
func (s *Service) Signal(signal syscall.Signal) error {
	if err := s.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Wait returns how the command ended: nil after success, else an error with what it said.
func (s *Service) Wait() error {
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Done is closed when the command has ended.
func (s *Service) Done() <-chan struct{} { return s.done }

// End terminates the command, if it still runs, and waits for it. One that does not end says where
// it stands, in the error.
func (s *Service) End() error {
	err := s.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
	case <-time.After(StepTimeout):
		// see package runtime
		err = errors.Join(err, fmt.Errorf("drafter %s did not end in %s", s.name, StepTimeout), s.Signal(syscall.SIGQUIT))
	}
	return errors.Join(err, s.Wait())
}

// Files maps devices to the names their files have on the tour, in the order in which they are
// listed.
var Files = []struct{ Device, File string }{
	{"state", "state.bin"}, {"memory", "memory.bin"}, {"kernel", "vmlinux"}, {"disk", "rootfs.ext4"}, {"config", "config.json"}, {"oci", "oci.ext4"},
}

// SnapshotterDevices is the value of --devices that makes package from blueprint, two directories.
// Devices whose file the blueprint lacks, other than those the snapshotter makes, are left out.
func SnapshotterDevices(blueprint, pkg string) string {
	var devices []map[string]string
	for _, f := range Files {
		device := map[string]string{"name": f.Device, "output": filepath.Join(pkg, f.File)}
		input := filepath.Join(blueprint, f.File)
		switch _, err := os.Stat(input); {
		case err == nil:
			device["input"] = input
		case f.Device == "oci":
			continue
		}
		devices = append(devices, device)
	}
	return encode(devices)
}

// PackageDevices is the value of --devices that names the files of the package in a directory.
func PackageDevices(pkg string) string {
	var devices []map[string]string
	for _, f := range Files {
		path := filepath.Join(pkg, f.File)
		if _, err := os.Stat(path); err == nil || f.Device != "oci" {
			devices = append(devices, map[string]string{"name": f.Device, "path": path})
		}
	}
	return encode(devices)
}

// Forward is the value of --port-forwards that makes a TCP port of the guest in netns reachable at
// addr.
func Forward(netns, port, addr string) string {
	return encode([]map[string]string{{"netns": netns, "internalPort": port, "protocol": "tcp", "externalAddr": addr}})
}

func encode(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps of strings
	}
	return string(b)
}

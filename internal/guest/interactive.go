package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// InteractiveArgument is the word on the kernel command line that says that the container waits for a
// host to run its program, which so can have a terminal or input of the host's. Until then Idle is
// all that runs in it. The system ends with the program.
const InteractiveArgument = "drafter.interactive"

// IdleProgram is the name under which this binary is Idle.
const IdleProgram = "drafter-idle"

// idlePath is where a container that waits has it: in a tmpfs, so that the image stays as it is.
const idlePath = "/dev/" + IdleProgram

// Idle is process 1 of a container that waits for its program. It returns, with the exit status, when
// it is told to end.
func Idle() int {
	signal.Ignore(unix.SIGCHLD) // the kernel reaps what is left to it
	signals := make(chan os.Signal, 8)
	signal.Notify(signals)
	for s := range signals {
		switch number, _ := s.(syscall.Signal); number {
		case unix.SIGCHLD, unix.SIGURG, unix.SIGWINCH, unix.SIGCONT, unix.SIGPIPE: // whose default is to do nothing; runtime.preempt
		default:
			return 128 + int(number)
		}
	}
	return 0
}

// waitingConfig makes a bundle's config that of a container that waits for its program.
func waitingConfig(config []byte) ([]byte, error) {
	var all, process map[string]json.RawMessage // what we do not know stays
	var mounts []json.RawMessage
	if err := json.Unmarshal(config, &all); err != nil {
		return nil, fmt.Errorf("config.json: %w", err)
	}
	if err := json.Unmarshal(all["process"], &process); err != nil {
		return nil, fmt.Errorf("config.json: process: %w", err)
	}
	if process == nil {
		return nil, errors.New("config.json: there is no process")
	}
	if len(all["mounts"]) > 0 {
		if err := json.Unmarshal(all["mounts"], &mounts); err != nil {
			return nil, fmt.Errorf("config.json: mounts: %w", err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	mount, merr := json.Marshal(specs.Mount{Destination: idlePath, Type: "bind", Source: self, Options: []string{"bind", "ro", "nosuid"}})
	args, aerr := json.Marshal([]string{idlePath})
	process["args"] = args
	whole, perr := json.Marshal(process)
	list, lerr := json.Marshal(append(mounts, mount))
	if err := errors.Join(merr, aerr, perr, lerr); err != nil {
		return nil, err
	}
	all["process"], all["mounts"] = whole, list
	return json.Marshal(all)
}

// begin begins the program that a container waits for; see [drafter/agent.Server].
func (c *supervisor) begin(container *Container) (args []string, ended func(int32), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.held:
		return nil, nil, errors.New("the container was not started yet")
	case c.begun:
		return nil, nil, errors.New("its program runs already")
	}
	c.begun = true
	container.mu.Lock()
	defer container.mu.Unlock()
	return slices.Clone(container.process.Args), func(status int32) {
		n := int(status)
		c.send(message{Exited: &n})
	}, nil
}

// exited is how a program with an exit status has ended, as from wait(2).
func exited(status int) syscall.WaitStatus { return syscall.WaitStatus(status & 0xff << 8) }

// Package control is how a host's programs and the process that owns a VM find and call each other
// (control.proto). Either may end, be killed and start again without the other.
//
// A VM has a control directory. While its process lives, a lock there is held and a socket answers;
// when it has ended, a file there says how.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/ttrpc"

	"drafter/agent"
	"drafter/internal/detached"
	"drafter/internal/lockfile"
	"drafter/internal/newfile"
	"drafter/internal/private"
)

// The files in a control directory.
const (
	lockFile   = "lock"
	socketFile = "socket"
	endFile    = "end.json"
)

// envFile has the environment of a service that is held, as a JSON list of NAME=value.
const envFile = "env.json"

// WriteEnv notes what to add to the environment of a VM's service, which its package holds: the VM's
// process starts it with that, whenever the guest boots or is resumed for the first time. Only root
// can read it.
func WriteEnv(dir string, env []string) error {
	if err := private.MkdirAll(dir); err != nil {
		return err
	}
	b, err := json.Marshal(env)
	if err == nil {
		err = newfile.WriteBytes(filepath.Join(dir, envFile), b)
	}
	if err != nil {
		return fmt.Errorf("note the environment of the VM's service: %w", err)
	}
	return nil
}

// ReadEnv reads what [WriteEnv] has noted; nothing if it has not.
func ReadEnv(dir string) (env []string, err error) {
	b, err := private.ReadFile(filepath.Join(dir, envFile), 4<<20)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &env)
	}
	if err != nil {
		return nil, fmt.Errorf("read the environment of the VM's service: %w", err)
	}
	return env, nil
}

// LockFile is the lock of a control directory; see package detached.
func LockFile(dir string) string { return filepath.Join(dir, lockFile) }

// States of a VM's process.
const (
	Starting = "starting" // the VM does not run yet
	Running  = "running"
	Ending   = "ending" // it is suspended, moves away, or ends
)

// Outcomes of a VM's process.
const (
	Suspended  = "suspended"   // it can be resumed
	PoweredOff = "powered off" // by its guest
	Moved      = "moved"       // it runs elsewhere
	Failed     = "failed"
)

// End is how a VM's process has ended.
type End struct {
	Outcome string    `json:"outcome"`
	Error   string    `json:"error,omitempty"`
	At      time.Time `json:"at"`
	// ExitStatus is that of the VM's service, if it has ended and that is known.
	ExitStatus *int `json:"exitStatus,omitempty"`
}

// Server answers calls to the process that owns a VM.
type Server struct {
	dir     string
	suspend func()
	lock    *lockfile.Lock
	ttrpc   *ttrpc.Server
	serving sync.WaitGroup
	cancel  context.CancelFunc

	mu      sync.Mutex
	status  StatusResponse
	changed chan struct{} // closed at the next change
}

var _ ControlService = (*Server)(nil)

// Serve takes a VM's control directory, makes it if need be, and answers there. suspend lets the VM
// be suspended and the process end; it returns at once. guest returns the connection with the guest's
// agent, or nil; programs of this host can call the agent by the same socket. A directory whose process lives is refused
// with an error that is [kind.ErrInUse]. Close the server.
func Serve(dir string, suspend func(), guest func() *agent.Client) (_ *Server, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("control directory %s: %w", dir, err)
		}
	}()
	if err := private.MkdirAll(dir); err != nil {
		return nil, err
	}
	s := &Server{dir: dir, suspend: suspend, changed: make(chan struct{})}
	s.status.State, s.status.Pid = Starting, int64(os.Getpid())
	if s.lock, err = detached.Lock(LockFile(dir)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.lock.Release())
		}
	}()
	// Those of the last process: it has ended, since the lock was free.
	for _, name := range []string{socketFile, endFile} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	listener, err := net.Listen("unix", filepath.Join(dir, socketFile))
	if err != nil {
		return nil, err
	}
	if s.ttrpc, err = ttrpc.NewServer(); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	RegisterControlService(s.ttrpc, s)
	agent.RegisterWorkloadService(s.ttrpc, agent.Relay{Client: guest})
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.serving.Go(func() {
		_ = s.ttrpc.Serve(ctx, listener) // until Close
	})
	return s, nil
}

// Set tells callers of another state, and why the VM booted; "" if it did not.
func (s *Server) Set(state, booted string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.State, s.status.Booted = state, booted
	close(s.changed)
	s.changed = make(chan struct{})
}

// patience is how long a call waits for a change.
const patience = time.Minute

// Status implements [ControlService].
func (s *Server) Status(ctx context.Context, r *StatusRequest) (*StatusResponse, error) {
	deadline := time.After(patience)
	for {
		s.mu.Lock()
		status, changed := &StatusResponse{State: s.status.State, Pid: s.status.Pid, Booted: s.status.Booted}, s.changed
		s.mu.Unlock()
		if status.GetState() != r.GetState() {
			return status, nil
		}
		select {
		case <-changed:
		case <-deadline:
			return status, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Suspend implements [ControlService].
func (s *Server) Suspend(context.Context, *SuspendRequest) (*SuspendResponse, error) {
	s.suspend()
	return &SuspendResponse{}, nil
}

// Close notes how the process has ended, and gives the directory back.
func (s *Server) Close(end End) error {
	err := writeEnd(s.dir, end)
	s.cancel()
	err = errors.Join(err, s.ttrpc.Close())
	s.serving.Wait()
	return errors.Join(err, s.lock.Release())
}

func writeEnd(dir string, end End) error {
	b, err := json.Marshal(end)
	if err == nil {
		err = newfile.WriteBytes(filepath.Join(dir, endFile), b)
	}
	if err != nil {
		return fmt.Errorf("note how the VM has ended: %w", err)
	}
	return nil
}

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
	"github.com/prometheus/client_golang/prometheus"

	"drafter/agent"
	"drafter/internal/detached"
	"drafter/internal/lockfile"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/migrate"
)

// The files in a control directory.
const (
	lockFile   = "lock"
	socketFile = "socket"
	endFile    = "end.json"
)

// EnvFile has the environment of a service that is held, as a JSON list of NAME=value.
func EnvFile(dir string) string { return filepath.Join(dir, "env.json") }

// WriteEnv notes what to add to the environment of a VM's service, which its package holds: the VM's
// process starts it with that, whenever the guest boots or is resumed for the first time. Only root
// can read it.
func WriteEnv(dir string, env []string) error {
	if err := private.MkdirAll(dir); err != nil {
		return err
	}
	b, err := json.Marshal(env)
	if err == nil {
		err = newfile.WriteBytes(EnvFile(dir), b)
	}
	if err != nil {
		return fmt.Errorf("note the environment of the VM's service: %w", err)
	}
	return nil
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
	// Of a VM that has moved: for how long it was paused, how long all took, how many bytes were sent,
	// and how many that were written before were not.
	Paused time.Duration `json:"paused,omitempty"`
	Took   time.Duration `json:"took,omitempty"`
	Sent   int64         `json:"sent,omitempty"`
	Saved  int64         `json:"saved,omitempty"`
}

// Progress is how many bytes of a VM are at its target, of how many.
func Progress(s migrate.Stats) (done, total int64) {
	for _, d := range s.Devices {
		total += d.Size
		done += d.Size - min(d.Pending, d.Size)
	}
	return done, total
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
	mover   Mover
	figures prometheus.Gatherer
}

// Mover moves a VM away. Its methods may be called by any goroutine.
type Mover interface {
	// Offer lets a target that connects have the VM, and returns where it listens.
	Offer(context.Context, *OfferRequest) (address string, err error)
	// Withdraw takes the offer back, and tells whether the VM has moved.
	Withdraw(context.Context) (moved bool, err error)
	// Stats are the figures of the migration, if there was one.
	Stats() (migrate.Stats, bool)
}

// SetMover says who moves the VM away, once it can be.
func (s *Server) SetMover(m Mover) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mover = m
}

var errNotMovable = errors.New("the VM does not run here, so it cannot be moved")

func (s *Server) movable() (Mover, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mover == nil {
		return nil, errNotMovable
	}
	return s.mover, nil
}

// Offer implements [ControlService].
func (s *Server) Offer(ctx context.Context, r *OfferRequest) (*OfferResponse, error) {
	m, err := s.movable()
	if err != nil {
		return nil, err
	}
	addr, err := m.Offer(ctx, r)
	return &OfferResponse{Address: addr}, err
}

// Withdraw implements [ControlService].
func (s *Server) Withdraw(ctx context.Context, _ *WithdrawRequest) (*WithdrawResponse, error) {
	m, err := s.movable()
	if err != nil {
		return nil, err
	}
	moved, err := m.Withdraw(ctx)
	return &WithdrawResponse{Moved: moved}, err
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
	s := &Server{dir: dir, suspend: suspend, changed: make(chan struct{}), figures: prometheus.NewRegistry()}
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
		mover := s.mover
		s.mu.Unlock()
		if mover != nil {
			if stats, ok := mover.Stats(); ok {
				status.Phase, status.PausedNs = string(stats.Phase), int64(stats.Paused)
				status.Sent, status.Total = Progress(stats)
			}
		}
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

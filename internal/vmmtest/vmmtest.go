// Package vmmtest is a VMM without a VM, for tests: a driver whose machines keep a guest that does
// nothing but count. Each of their steps can fail, wait, or end the VMM, as a test says. For moves
// between two of them there is a [Link], which breaks as a test says.
//
// A machine holds its users to what [vmm.Machine] says, and its guest to what a package promises: a
// state is restored once, into memory that is as it was when the state was saved, and memory is in
// its device only once it was flushed.
package vmmtest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/ttrpc"

	"drafter/agent"
	"drafter/internal/block"
	"drafter/internal/memory"
	"drafter/vmm"
)

// Step is what is asked of a driver, its machine, or the agent in its guest.
type Step string

// The steps.
const (
	Check         Step = "check"
	Launch        Step = "launch"
	Restore       Step = "restore"
	Resume        Step = "resume"
	Pause         Step = "pause"
	Save          Step = "save"
	Flush         Step = "flush"
	GuestConn     Step = "guest connection"
	Close         Step = "close"
	BeforeSuspend Step = "before-suspend"
	AfterResume   Step = "after-resume"
	CatchUp       Step = "catch-up"
	Ready         Step = "ready"
)

// Driver is a [vmm.Driver]. Its fields are set before it is used.
type Driver struct {
	T testing.TB // is told what its users do wrong

	// At, if not nil, is called at the beginning of each step; m is nil until Launch is over. Its
	// error is the step's, which is not done then, but for Close.
	At func(ctx context.Context, s Step, m *Machine) error

	Silent bool // whether nobody serves the guest's ports
	// machines boot with their memory in a file; others map the memory device's
	BootsFile bool

	mu       sync.Mutex
	steps    []Step
	machines []*Machine
}

// Name is that of all of these drivers.
const Name = "vmmtest"

// Hardware is what all of the machines have.
var Hardware = vmm.Hardware{VMM: Name, Version: "1", Machine: "test-1", CPU: "test", Accel: vmm.AccelTCG}

// Name implements [vmm.Driver].
func (d *Driver) Name() string { return Name }

// BootsFromFile implements [vmm.FileBooter].
func (d *Driver) BootsFromFile() bool { return d.BootsFile }

// Steps are those that were begun, in order.
func (d *Driver) Steps() []Step {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.steps)
}

// Machines are those that were launched, in order.
func (d *Driver) Machines() []*Machine {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.machines)
}

// AllClosed tells whether no VMM is left.
func (d *Driver) AllClosed() bool {
	return !slices.ContainsFunc(d.Machines(), func(m *Machine) bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return !m.closed
	})
}

// FailAt makes one step fail.
func (d *Driver) FailAt(step Step, err error) {
	d.At = func(_ context.Context, s Step, _ *Machine) error {
		if s == step {
			return err
		}
		return nil
	}
}

func (d *Driver) begin(ctx context.Context, s Step, m *Machine) error {
	d.mu.Lock()
	d.steps = append(d.steps, s)
	d.mu.Unlock()
	if d.At == nil {
		return nil
	}
	return d.At(ctx, s, m)
}

// Check implements [vmm.Checker].
func (d *Driver) Check(ctx context.Context, _ vmm.Launch) error { return d.begin(ctx, Check, nil) }

// Launch implements [vmm.Driver].
func (d *Driver) Launch(ctx context.Context, l vmm.Launch) (vmm.Machine, error) {
	if err := d.begin(ctx, Launch, nil); err != nil {
		return nil, err
	}
	if inFile := l.Boot != nil && d.BootsFile; inFile != (l.Memory == nil) || inFile != (l.MemoryFile != "") {
		d.T.Errorf("launched with memory %v and file %q", l.Memory, l.MemoryFile)
	}
	if l.Memory != nil && !d.BootsFile {
		if err := l.Memory.(*memory.Device).Share(); err != nil {
			return nil, err
		}
	}
	m := &Machine{Launched: l, driver: d, done: make(chan struct{}), running: l.Boot != nil, restored: l.Boot != nil}
	if m.running {
		m.count = 1
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.machines = append(d.machines, m)
	return m, nil
}

// Machine is a [vmm.Machine]. Its guest counts how often it was started.
type Machine struct {
	Launched vmm.Launch

	driver *Driver
	done   chan struct{}

	mu       sync.Mutex
	running  bool
	restored bool
	stalled  bool
	doubt    bool // a pause has failed: the guest may run
	closed   bool
	count    uint64
	exit     error // once done is closed
	agents   []*ttrpc.Server
	serving  sync.WaitGroup
}

var (
	_ vmm.Checker = (*Driver)(nil)
	_ vmm.Staller = (*Machine)(nil)
)

// Hardware implements [vmm.Machine].
func (m *Machine) Hardware() vmm.Hardware { return Hardware }

// Count is how often the guest was started.
func (m *Machine) Count() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.count
}

// Running tells whether the guest runs.
func (m *Machine) Running() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.running
}

// Stall makes the guest stand still for a disk, or go on.
func (m *Machine) Stall(stalled bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stalled = stalled
}

// Stalled implements [vmm.Staller].
func (m *Machine) Stalled() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stalled
}

// Exit ends the VMM by itself: with nil, as its guest has powered itself off.
func (m *Machine) Exit(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.end(err)
}

func (m *Machine) end(err error) {
	select {
	case <-m.done:
	default:
		m.exit, m.running = err, false
		close(m.done)
	}
}

// step begins a step that an ended VMM cannot do, and which needs a guest that runs, or one that
// does not.
func (m *Machine) step(ctx context.Context, s Step, running bool) error {
	if err := m.driver.begin(ctx, s, m); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.done:
		return fmt.Errorf("%s: the VMM has ended", s)
	default:
	}
	if m.running != running && !m.doubt {
		m.driver.T.Errorf("%s of a machine whose guest runs: %t", s, m.running)
	}
	return nil
}

// memory opens the guest's memory.
func (m *Machine) memory() (readWriter, error) {
	if m.Launched.Memory != nil {
		return held{m.Launched.Memory.(*memory.Device).Top()}, nil
	}
	return os.OpenFile(m.Launched.MemoryFile, os.O_RDWR, 0)
}

type readWriter interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
}

// held is a device that stays its owner's.
type held struct{ block.Device }

func (held) Close() error { return nil }

// Restore implements [vmm.Machine].
func (m *Machine) Restore(ctx context.Context, state io.Reader) error {
	if err := m.step(ctx, Restore, false); err != nil {
		return err
	}
	saved, err := io.ReadAll(state)
	if err != nil {
		return err
	}
	if len(saved) != 8 {
		return fmt.Errorf("a state of %d bytes", len(saved))
	}
	is, err := m.read(ctx)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.restored {
		m.driver.T.Error("restored twice, or after a boot")
	}
	if string(saved) != string(is) {
		m.driver.T.Errorf("the state is of the memory %x, which is %x", saved, is)
	}
	m.restored, m.count = true, binary.LittleEndian.Uint64(saved)
	return nil
}

// read reads what the guest has in its memory. A page that is missing ends with its owner.
func (m *Machine) read(ctx context.Context) ([]byte, error) {
	memory, err := m.memory()
	if err != nil {
		return nil, err
	}
	is, done := make([]byte, 8), make(chan error, 1)
	m.serving.Go(func() {
		_, err := memory.ReadAt(is, 0)
		done <- errors.Join(err, memory.Close())
	})
	select {
	case err := <-done:
		return is, err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Resume implements [vmm.Machine].
func (m *Machine) Resume(ctx context.Context) error {
	if err := m.step(ctx, Resume, false); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.restored {
		m.driver.T.Error("resumed without a state")
	}
	m.running, m.doubt = true, false
	m.count++
	return nil
}

// Pause implements [vmm.Machine].
func (m *Machine) Pause(ctx context.Context) error {
	err := m.step(ctx, Pause, true)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.doubt = err != nil
	if err == nil {
		m.running = false
	}
	return err
}

func (m *Machine) saved() []byte { return binary.LittleEndian.AppendUint64(nil, m.Count()) }

// Save implements [vmm.Machine]. It writes guest memory, as QEMU does: what was flushed before is
// not enough.
func (m *Machine) Save(ctx context.Context, w io.Writer) error {
	if err := m.step(ctx, Save, false); err != nil {
		return err
	}
	m.mu.Lock()
	m.count++
	m.mu.Unlock()
	_, err := w.Write(m.saved())
	return err
}

// Flush implements [vmm.Machine].
func (m *Machine) Flush(ctx context.Context) error {
	if err := m.step(ctx, Flush, m.Running()); err != nil {
		return err
	}
	memory, err := m.memory()
	if err != nil {
		return err
	}
	page := make([]byte, block.PageSize)
	if _, err = memory.ReadAt(page, 0); err == nil {
		copy(page, m.saved())
		_, err = memory.WriteAt(page, 0)
	}
	return errors.Join(err, memory.Close())
}

// Done implements [vmm.Machine].
func (m *Machine) Done() <-chan struct{} { return m.done }

// Wait implements [vmm.Machine].
func (m *Machine) Wait() error {
	<-m.done
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exit
}

// Close implements [vmm.Machine]. It ends the VMM even if the step fails.
func (m *Machine) Close() error {
	m.mu.Lock()
	again := m.closed
	m.closed = true
	agents := m.agents
	m.agents = nil
	m.end(nil)
	m.mu.Unlock()
	if again {
		return nil
	}
	err := m.driver.begin(context.Background(), Close, m)
	for _, a := range agents {
		_ = a.Close() // its connections end with it
	}
	m.serving.Wait()
	return err
}

// GuestConn implements [vmm.Machine]. Every port is that of an agent.
func (m *Machine) GuestConn(ctx context.Context, _ uint32) (net.Conn, error) {
	if err := m.driver.begin(ctx, GuestConn, m); err != nil {
		return nil, err
	}
	if m.driver.Silent {
		select {
		case <-m.done:
			return nil, errors.New("the VMM has ended")
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	here, there := net.Pipe()
	server, err := ttrpc.NewServer()
	if err != nil {
		return nil, err
	}
	agent.RegisterAgentService(server, &guest{m})
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, errors.New("the VMM has ended")
	}
	m.agents = append(m.agents, server)
	m.serving.Go(func() {
		// ends with the machine
		_ = server.Serve(context.WithoutCancel(ctx), &once{conn: there, ended: m.done})
	})
	return here, nil
}

// once is a listener that one connection comes to.
type once struct {
	conn  net.Conn
	ended <-chan struct{}
}

func (l *once) Accept() (net.Conn, error) {
	if c := l.conn; c != nil {
		l.conn = nil
		return c, nil
	}
	<-l.ended
	return nil, net.ErrClosed
}

func (l *once) Close() error { return nil }

func (l *once) Addr() net.Addr { return &net.UnixAddr{Name: Name} }

// guest is the agent.
type guest struct{ machine *Machine }

func (g *guest) step(ctx context.Context, s Step) error {
	return g.machine.driver.begin(ctx, s, g.machine)
}

func (g *guest) BeforeSuspend(ctx context.Context, _ *agent.BeforeSuspendRequest) (*agent.BeforeSuspendResponse, error) {
	return &agent.BeforeSuspendResponse{}, g.step(ctx, BeforeSuspend)
}

func (g *guest) AfterResume(ctx context.Context, _ *agent.AfterResumeRequest) (*agent.AfterResumeResponse, error) {
	return &agent.AfterResumeResponse{}, g.step(ctx, AfterResume)
}

func (g *guest) CatchUp(ctx context.Context, _ *agent.CatchUpRequest) (*agent.CatchUpResponse, error) {
	return &agent.CatchUpResponse{}, g.step(ctx, CatchUp)
}

func (g *guest) Ready(ctx context.Context, _ *agent.ReadyRequest) (*agent.ReadyResponse, error) {
	return &agent.ReadyResponse{Ready: true}, g.step(ctx, Ready)
}

func (g *guest) Exec(context.Context, *agent.ExecRequest) (*agent.ExecResponse, error) {
	return &agent.ExecResponse{}, nil
}

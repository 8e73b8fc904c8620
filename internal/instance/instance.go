// Package instance runs one VM from its devices: boots or resumes it, talks to its agent, and
// suspends it again. Snapshotter, runner and peer are built on it; it does not care what stands
// behind a device's path.
package instance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/google/uuid"

	"drafter/agent"
	"drafter/internal/block"
	"drafter/internal/console"
	"drafter/internal/kind"
	"drafter/internal/logging"
	"drafter/internal/output"
	"drafter/internal/private"
	"drafter/network"
	"drafter/vmm"
)

// Paths maps device names to paths a VMM can open.
type Paths map[string]string

// Sync makes a device durable by its path.
func (p Paths) Sync(name string) error {
	f, err := private.Open(p[name], os.O_RDWR)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// StateRoom is how many bytes of the state device are set aside while its VM runs, so that the VM
// can be handed over or suspended when the file system is full. The largest state seen is 680 KB.
const StateRoom = 2 << 20

// Reserve sets room aside for all of the memory and the state, so that neither can be in want of it
// while the VM runs: a VMM that maps its memory ends when a file system is full.
func (p Paths) Reserve() error {
	for name, length := range map[string]int64{vmm.Memory: math.MaxInt64, vmm.State: StateRoom} {
		if p[name] == "" {
			continue
		}
		if err := block.Reserve(p[name], length); err != nil {
			return fmt.Errorf("set room aside for device %s: %w", name, err)
		}
	}
	return nil
}

// Release gives back what Reserve set aside and nobody wrote.
func (p Paths) Release() error {
	var errs []error
	for _, name := range []string{vmm.Memory, vmm.State} {
		if p[name] != "" {
			errs = append(errs, block.Release(p[name]))
		}
	}
	return errors.Join(errs...)
}

// Path implements [Storage].
func (p Paths) Path(name string) string { return p[name] }

// State implements [Storage].
func (p Paths) State() (StateDevice, error) { return private.Open(p[vmm.State], os.O_RDWR) }

// Memory implements [Storage].
func (p Paths) Memory() (block.Device, error) {
	f, err := block.OpenFile(p[vmm.Memory], false)
	if err != nil {
		return nil, err // a nil *File in an interface is not nil
	}
	return f, nil
}

// Storage is where the devices of an instance are.
type Storage interface {
	// Path is where a VMM opens memory, kernel or a disk. It may be "" for [vmm.Initrd], whose
	// content the kernel device holds.
	Path(name string) string
	// Memory opens the memory device, for a VMM that is served its memory.
	Memory() (block.Device, error)
	// Sync makes a device durable: what the VMM wrote has reached it.
	Sync(name string) error
	// State opens the state device.
	State() (StateDevice, error)
}

// StateDevice is an open state device. *os.File is one.
type StateDevice interface {
	vmm.StateDevice
	io.Closer
	Name() string // path, for messages
}

// ErrNotStarted says that there is no VM yet.
var ErrNotStarted = errors.New("the VM was not started; resume or receive it first")

// Instance is one running VM. Resume and Suspend are called by one goroutine; Wait and Close by
// any. A nil Instance stands for a VM that was not started: Done, Wait, Agent, Suspend and Mark say
// so.
type Instance struct {
	machine vmm.Machine
	dir     *vmm.Dir
	output  *output.Writer // nil discards
	log     *slog.Logger
	config  *vmm.PackageConfig
	// Of the VM, not of its package: it is kept as long as the VM goes on in one place. Zero while
	// it is booted for a package.
	generation uuid.UUID
	storage    Storage
	memory     block.Device                 // what a VMM that is served its memory has it from; nil for the others
	agent      atomic.Pointer[agent.Client] // nil while the guest is not to be talked to
	reboots    atomic.Int64                 // how often the guest has booted again
	agentOf    int64                        // the boot of the guest that agent is of
	why        error                        // why the VM booted from its disks here; nil if it was resumed
	frozen     bool                         // suspended or handed over: the state device says so
	paused     time.Time                    // since when, for a migration; zero while it runs
	stood      time.Duration                // how long it was paused last
	missed     atomic.Int64                 // how long it stood still for disks, in nanoseconds, without that its clock was set since
	catchUp    sync.WaitGroup               // who sets its clock after that; ended by the end of the agent's connection
	keepClock  bool                         // its clock is never to be set
	left       bool                         // the state device holds a state for the target of a migration, or says that it may
	leaves     bool                         // the VM may be that target's

	resolver func() (network.Resolver, error) // nil without network
	booting  *ready                           // of a VM that was booted: its console
}

// Boot starts a new VM from the kernel, memory and disks at paths and waits until its liveness
// program has reported and its agent answers, for at most timeout. The devices keep the order of
// names in the guest. id becomes the package's.
func Boot(ctx context.Context, h vmm.Host, spec vmm.Spec, id string, names []string, paths Paths, timeout time.Duration) (*Instance, error) {
	if err := errors.Join(vmm.CheckNetwork(spec.Interface, spec.MAC), vmm.CheckBootArgs(spec.BootArgs)); err != nil {
		return nil, err
	}
	driver, err := h.Drivers.Select(h.VMM, "")
	if err != nil {
		return nil, err
	}
	i := &Instance{log: logging.Or(h.Logger), storage: paths, config: &vmm.PackageConfig{
		Version: vmm.PackageVersion, ID: id, Created: time.Now().UTC(),
		Architecture: runtime.GOARCH, CPUs: spec.CPUs, BootArgs: spec.BootArgs, Initrd: &spec.Initrd,
		Interface: spec.Interface, MAC: spec.MAC,
		AgentPort: spec.AgentPort, LivenessPort: spec.LivenessPort,
	}}
	for _, n := range names {
		size := spec.MemorySize
		switch n {
		case vmm.Config, vmm.Initrd:
			continue
		case vmm.Memory:
		case vmm.State:
			size = vmm.StateSize
		default:
			info, err := os.Stat(paths[n])
			if err != nil {
				return nil, fmt.Errorf("device %s: %w", n, err)
			}
			size = info.Size()
		}
		i.config.Devices = append(i.config.Devices, vmm.PackageDevice{Name: n, Size: size})
	}
	l, err := i.launch(h, driver)
	if err != nil {
		return nil, err
	}
	l.CPU, l.Memory = spec.CPU, paths[vmm.Memory]
	ready := newReady(spec.ReadyOutput, l.Output)
	l.Output, i.booting = ready, ready
	if l.Boot, err = i.boot(); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	if i.machine, err = driver.Launch(ctx, l); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	i.config.Hardware = i.machine.Hardware()
	if err := i.awaitGuest(ctx, timeout); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	return i, nil
}

// launch makes the VM's directory and all of the launch that does not depend on how the machine
// starts.
func (i *Instance) launch(h vmm.Host, driver vmm.Driver) (vmm.Launch, error) {
	if h.Netns != "" && i.config.Interface != "" {
		if err := network.GuardGuest(h.Netns, i.config.MAC); err != nil {
			return vmm.Launch{}, fmt.Errorf("guard network namespace %q: %w", h.Netns, err)
		}
	}
	memory, _ := i.config.Device(vmm.Memory)
	if h.Limits.Memory != 0 && h.Limits.Memory < memory.Size {
		return vmm.Launch{}, fmt.Errorf("--memory-max is %s, and the VM has %s of memory, which its VMM holds; raise it", humanize.IBytes(uint64(h.Limits.Memory)), humanize.IBytes(uint64(memory.Size)))
	}
	dir, err := vmm.CreateDir(h.BaseDir, driver.Name(), i.log)
	if err != nil {
		return vmm.Launch{}, err
	}
	i.dir, i.keepClock = dir, h.KeepClock
	l := vmm.Launch{
		Dir: dir,
		Board: vmm.Board{
			Accel: h.Accel, CPUs: i.config.CPUs, MemorySize: memory.Size, HugePages: h.HugePages, MAC: i.config.MAC, Generation: i.generation,
		},
		Devices: vmm.Devices{Kernel: i.storage.Path(vmm.Kernel), FillMemory: h.FillMemory},
		Confinement: vmm.Confinement{
			Netns: h.Netns, UID: h.UID, GID: h.GID, NUMANode: h.NUMANode, CgroupVersion: h.CgroupVersion, Limits: h.Limits,
		},
		Input:  h.Input,
		Logger: i.log,
	}
	if h.Output != nil {
		i.output = console.NewOutput(h.Output)
		l.Output = i.output
	}
	for _, port := range []uint32{i.config.AgentPort, i.config.LivenessPort} {
		if port != 0 {
			l.Ports = append(l.Ports, port)
		}
	}
	if h.Netns != "" && i.config.Interface != "" {
		l.Interface = i.config.Interface
		i.resolver = func() (network.Resolver, error) { return network.ResolverFor(h.NameServers) }
	}
	for _, name := range i.config.Disks() {
		l.Disks = append(l.Disks, vmm.Block{Name: name, Path: i.storage.Path(name)})
	}
	return l, nil
}

// awaitGuest waits for a booting guest.
func (i *Instance) awaitGuest(ctx context.Context, timeout time.Duration) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not there after %s; look at the guest's console, or pass a longer --resume-timeout", timeout))
	defer cancel()
	defer func() { err = i.late(err) }()
	select {
	case <-i.booting.seen:
	case <-i.machine.Done():
		return i.ended()
	case <-ctx.Done():
		return fmt.Errorf("wait for %q on the guest's console: %w", i.booting.text, context.Cause(ctx))
	}
	if i.config.LivenessPort != 0 {
		liveness, err := i.machine.GuestConn(ctx, i.config.LivenessPort)
		if err == nil {
			err = liveness.Close()
		}
		if err != nil {
			return fmt.Errorf("wait for the guest's liveness: %w", err)
		}
	}
	return i.connectAgent(ctx)
}

// late prefers that a guest stands still over that it is not there in time.
func (i *Instance) late(err error) error {
	if err != nil && i.stalled() {
		return errors.New("the guest stands still, as what it writes cannot be stored; make room for its disks, which the log names")
	}
	return err
}

// endPatience is how long a VM whose agent has gone may take to end.
const endPatience = 5 * time.Second

// AwaitReady waits until the service of a guest that was booted is ready, for at most timeout. A
// guest without an agent cannot be asked.
func (i *Instance) AwaitReady(ctx context.Context, timeout time.Duration) (err error) {
	if i.agent.Load() == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	defer func() { err = i.late(err) }()
	const maxPorts = 16 // to tell of: a guest may name any number
	var closed []uint32
	var failure string
	news := logging.Limited{Logger: i.log}
	for ; ; time.Sleep(10 * time.Millisecond) { // whatever it answers, it is not asked without end
		r, err := i.agent.Load().Ready(ctx)
		switch {
		case err == nil && r.GetReady():
			return nil
		case err == nil:
			now, said := r.GetClosedPorts(), agent.Words(r.GetFailure())
			if now = now[:min(len(now), maxPorts)]; !slices.Equal(now, closed) || said != failure {
				closed, failure = now, said
				news.Log(slog.LevelInfo, "Waiting for the guest's service", "closedPorts", closed, "check", failure)
			}
		case errors.Is(ctx.Err(), context.DeadlineExceeded) && failure != "" && len(closed) == 0:
			return fmt.Errorf("the guest is up, but after %s the check of its service fails: %s; pass a longer --resume-timeout, or --ready-ports to wait for ports only",
				timeout.Round(time.Second), failure)
		case errors.Is(ctx.Err(), context.DeadlineExceeded):
			return fmt.Errorf("the guest is up, but after %s nothing listens on its ports %s; pass a longer --resume-timeout, or name the ports that its service opens with --ready-ports",
				timeout.Round(time.Second), strings.Trim(fmt.Sprint(closed), "[]"))
		case err != nil:
			select { // a guest that powers off ends its agent first, and the VM's end says why
			case <-i.machine.Done():
				return i.ended()
			case <-time.After(endPatience):
				return err
			}
		}
	}
}

// ended says how a booting guest has ended.
func (i *Instance) ended() error {
	if err := i.machine.Wait(); err != nil {
		return err
	}
	return fmt.Errorf("%w before it was ready%s", vmm.ErrPoweredOff, i.booting.lines.Quote("the console's last lines"))
}

// connectAgent connects with the guest's agent, if it has one.
func (i *Instance) connectAgent(ctx context.Context) error {
	if i.config.AgentPort == 0 {
		return nil
	}
	conn, err := i.machine.GuestConn(ctx, i.config.AgentPort)
	if err != nil {
		return fmt.Errorf("wait for the guest's agent: %w", err)
	}
	c := agent.NewClient(conn)
	c.Logger = i.log
	i.agent.Store(c)
	return nil
}

// Open reads and checks the config device at paths, and that every device it lists is there with
// the right size. A package that is refused here has not been touched.
func Open(paths Paths) (*vmm.PackageConfig, error) {
	if paths[vmm.Config] == "" {
		return nil, errors.New("device config is missing")
	}
	config, err := vmm.ReadPackageConfig(paths[vmm.Config])
	if err != nil {
		return nil, err
	}
	sizes := map[string]int64{}
	for name, path := range paths {
		if sizes[name], err = deviceSize(path); err != nil {
			return nil, fmt.Errorf("device %s: %w", name, err)
		}
	}
	return config, CheckSizes(config, sizes, paths)
}

// CheckSizes refuses devices, given by their sizes in bytes, that are not those of the package.
// What is wrong is found in their paths.
func CheckSizes(config *vmm.PackageConfig, sizes map[string]int64, paths map[string]string) error {
	for _, d := range config.Devices {
		size, ok := sizes[d.Name]
		if !ok {
			return fmt.Errorf("device %s of the package is missing; add it to --devices", d.Name)
		}
		if size < d.Size {
			return fmt.Errorf("device %s (%s) is truncated: %d bytes instead of %d", d.Name, paths[d.Name], size, d.Size)
		}
	}
	for name := range sizes {
		if _, ok := config.Device(name); !ok && name != vmm.Config {
			return fmt.Errorf("device %s is not part of the package; a VM's devices are fixed when it is snapshotted", name)
		}
	}
	return nil
}

func deviceSize(path string) (int64, error) {
	f, err := private.Open(path, os.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	// Works for block devices too, whose inode has no size.
	return f.Seek(0, io.SeekEnd)
}

// Launched is a VMM process that waits for its VM, or in which it boots. All that can fail for want
// of a resource has been done.
type Launched struct {
	i    *Instance
	host vmm.Host
}

// Launch starts the VMM for an instance: without touching memory or disks, if its state can be
// resumed, else it boots from its disks; see [vmm.CheckStart]. [Launched.Run] comes next. The guest
// will be told that others may have gone on from the same state.
func Launch(ctx context.Context, h vmm.Host, config *vmm.PackageConfig, storage Storage) (*Launched, error) {
	generation, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("make generation id: %w", err)
	}
	return launch(ctx, h, config, storage, generation, true)
}

// LaunchMoved starts the VMM for the VM of that generation, which goes on here and nowhere else.
// See [Launched.Restore].
func LaunchMoved(ctx context.Context, h vmm.Host, config *vmm.PackageConfig, storage Storage, generation uuid.UUID) (*Launched, error) {
	return launch(ctx, h, config, storage, generation, false)
}

func launch(ctx context.Context, h vmm.Host, config *vmm.PackageConfig, storage Storage, generation uuid.UUID, here bool) (*Launched, error) {
	driver, err := h.Drivers.Select(h.VMM, config.Hardware.VMM)
	if err != nil {
		return nil, err
	}
	memory, _ := config.Device(vmm.Memory)
	if err := h.CheckMemory(memory.Size); err != nil {
		return nil, err
	}
	i := &Instance{log: logging.Or(h.Logger), config: config, storage: storage, generation: generation}
	l, err := i.launch(h, driver)
	if err != nil {
		return nil, err
	}
	l.Recorded = &config.Hardware
	if !vmm.ServesMemory(driver) {
		l.Memory = storage.Path(vmm.Memory)
	} else if i.memory, err = storage.Memory(); err != nil {
		return nil, errors.Join(fmt.Errorf("open memory device: %w", err), i.Close())
	}
	l.MemoryDevice = i.memory
	l.OnReboot, l.OnGoOn = i.rebooted, i.wentOn
	if l.Reboot, err = i.boot(); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	if here {
		// What is suspended is given up only where a VMM can start.
		if err := bootable(ctx, h, config); err != nil {
			return nil, errors.Join(err, i.Close())
		}
		if err := i.bootUnlessResumable(driver, &l, h.Boot); err != nil {
			return nil, errors.Join(err, i.Close())
		}
	}
	if i.machine, err = driver.Launch(ctx, l); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	if i.why != nil {
		i.log.Warn("Booting VM from its disks: it is not resumed", "because", i.why)
	}
	return &Launched{i, h}, nil
}

// Close gives the VM up before it ran.
func (l *Launched) Close() error { return l.i.Close() }

// Resume loads the state device, marks it as running and lets the guest run. The guest runs when it
// returns; tell it so with [Instance.AfterResume]. On failure the VMM is gone; the state device can
// be resumed again unless a vCPU has run.
func (l *Launched) Resume(ctx context.Context) (_ *Instance, err error) {
	i := l.i
	defer func() {
		if err != nil {
			err = errors.Join(err, i.Close())
		}
	}()
	dev, err := i.storage.State()
	if err != nil {
		return nil, fmt.Errorf("open state device: %w", err)
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	state, err := vmm.ReadState(dev, i.config.ID)
	if err == nil {
		err = i.machine.Restore(ctx, bytes.NewReader(state))
	}
	if err != nil {
		err = fmt.Errorf("state device %s: %w", dev.Name(), err)
		if ctx.Err() == nil {
			if l.host.Netns == "" && l.i.config.Interface != "" {
				err = fmt.Errorf("%w; if the VM was made with a network, name a network namespace with --netns", err)
			}
			err = fmt.Errorf("%w; if it can never be loaded here, --boot starts the VM from its disks, as after a power cut", err)
		}
		return nil, err
	}
	// From here on memory and disks move away from the saved state.
	if err := vmm.MarkState(dev, vmm.Running); err != nil {
		return nil, fmt.Errorf("state device %s: %w", dev.Name(), err)
	}
	if err := i.machine.Resume(ctx); err != nil {
		return nil, err
	}
	return i, nil
}

// RescueSuspendTimeout bounds the suspend of a VM that runs, but whose agent does not answer.
const RescueSuspendTimeout = 5 * time.Minute

// Run resumes the VM and tells its agent, which has timeout to answer; or waits that long for the
// guest of a VM that boots. began is when the caller began to work on it. The guest may run
// although Run fails: then there is an instance beside the error, to be suspended so that nothing
// is lost.
func (l *Launched) Run(ctx context.Context, began time.Time, timeout time.Duration) (*Instance, error) {
	if l.i.why != nil {
		return l.boots(ctx, began, timeout)
	}
	i, err := l.Resume(ctx)
	if err != nil {
		return nil, fmt.Errorf("resume: %w", err)
	}
	running := time.Since(began)
	if err := i.AfterResume(ctx, timeout); err != nil {
		return i, fmt.Errorf("resume: %w", err)
	}
	i.log.Info("Resumed VM", "took", running.Round(time.Millisecond), "agentAfter", time.Since(began).Round(time.Millisecond))
	return i, nil
}

// AfterResume connects to the agent and tells it that the guest runs again, for at most timeout.
// The agent sets the guest's clock.
func (i *Instance) AfterResume(ctx context.Context, timeout time.Duration) error {
	return i.tellAgent(ctx, timeout, 0)
}

// tellAgent is AfterResume for a clock that is moved by mostStep; see [agent.Client.AfterResume].
func (i *Instance) tellAgent(ctx context.Context, timeout, mostStep time.Duration) error {
	if i.keepClock {
		mostStep = -1
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer after %s", timeout))
	defer cancel()
	if err := i.connectAgent(ctx); err != nil || i.agent.Load() == nil {
		return err
	}
	missed := i.missed.Load()
	if mostStep > 0 {
		mostStep += time.Duration(missed)
	}
	step, err := i.agent.Load().AfterResume(ctx, mostStep, i.nameServers().String())
	if err != nil {
		return err
	}
	i.missed.Add(-missed)
	i.logStep(ctx, step)
	return nil
}

func (i *Instance) logStep(ctx context.Context, step time.Duration) {
	level := slog.LevelDebug
	if step.Abs() > time.Second {
		level = slog.LevelInfo
	}
	i.log.Log(ctx, level, "Set the guest's clock", "step", step.Round(time.Microsecond))
}

// catchUpTimeout bounds the agent's answer when the guest's clock is made up for.
const catchUpTimeout = time.Minute

// wentOn makes up for the time that the guest stood still for a disk: its clock stood, too.
func (i *Instance) wentOn(stood time.Duration) {
	if i.keepClock {
		return
	}
	i.missed.Add(int64(stood))
	c := i.agent.Load()
	if c == nil {
		return // who tells the agent next says it
	}
	i.catchUp.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), catchUpTimeout)
		defer cancel()
		missed := i.missed.Load()
		step, err := c.CatchUp(ctx, time.Duration(missed)+sameTime)
		if err != nil && i.agent.Load() != c {
			return // likewise
		}
		if err != nil {
			i.log.Warn("The guest's clock is behind, as it stood still", "by", stood.Round(time.Second), "error", err)
			return
		}
		i.missed.Add(-missed)
		i.logStep(ctx, step)
	})
}

// nameServers returns whom the guest is to ask for names on this host: nobody without network. If
// nobody is known, it keeps whom it has.
func (i *Instance) nameServers() network.Resolver {
	if i.resolver == nil {
		return network.Resolver{}
	}
	r, err := i.resolver()
	if err != nil {
		i.log.Warn("The guest gets no name server", "error", err)
	}
	return r
}

// withNameServers adds name servers to the address among kernel arguments (ip=, see nfsroot.rst of
// Linux), which has room for two, unless the user gave some. A package does not keep them: they are
// this host's, of today.
func (i *Instance) withNameServers(args string) string {
	words := strings.Fields(args)
	for at, w := range words {
		const fields = 7 // before the name servers
		if !strings.HasPrefix(w, "ip=") || strings.Count(w, ":") != fields-1 {
			continue
		}
		servers := i.nameServers().NameServers
		for _, ip := range servers[:min(2, len(servers))] {
			words[at] += ":" + ip.String()
		}
	}
	return strings.Join(words, " ")
}

// Suspend stops the VM for good and leaves it in its devices, so that it can be resumed. The
// guest's agent gets agentTimeout to prepare; when it fails to, the VM is suspended all the same
// and the failure is part of the error. Saved says whether the devices hold the VM; if they do not,
// it runs on, and Suspend can be tried again.
func (i *Instance) Suspend(ctx context.Context, agentTimeout time.Duration) (saved bool, err error) {
	if i == nil {
		return false, ErrNotStarted
	}
	if i.frozen {
		return true, nil
	}
	var agentErr error
	if i.forgetAgent() || i.agent.Load() != nil {
		actx, cancel := context.WithTimeout(ctx, agentTimeout)
		agentErr = i.Prepare(actx)
		cancel()
	}
	agentErr = errors.Join(agentErr, i.dropAgent())
	if err := i.save(ctx); err != nil {
		if !errors.Is(err, vmm.ErrPoweredOff) {
			err = kind.Of(vmm.ErrNotSuspended, err)
		}
		return false, errors.Join(err, agentErr, i.goOn(context.WithoutCancel(ctx), agentTimeout))
	}
	i.frozen = true
	return true, agentErr
}

// goOn lets a VM run on that could not be saved, unless it has ended.
func (i *Instance) goOn(ctx context.Context, agentTimeout time.Duration) error {
	select {
	case <-i.machine.Done():
		return nil
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	if err := i.Rescue(ctx); err != nil {
		return fmt.Errorf("let the VM run on: %w", err)
	}
	if i.stalled() {
		return nil
	}
	if err := i.RescueAgent(ctx, agentTimeout); err != nil { // the VM runs
		i.log.Warn("The VM runs on, but its agent does not answer", "error", err)
	}
	return nil
}

// A VMM that pauses waits for what its guest has under way. One that does not answer is spoken of
// so often, and given up after so long.
var (
	pauseReminder = 10 * time.Second
	pauseTimeout  = time.Minute // which a test shortens
)

// syncDisks makes durable what the guest has written so far, so that little of it is left for the
// pause, which is bounded: a slow storage may take its time, unlike a VMM. A sync that never
// returns ends with this process.
func (i *Instance) syncDisks(ctx context.Context) error {
	synced := make(chan struct{})
	var err error // valid once synced is closed; a storage may tell of a failure only once
	go func() {
		defer close(synced)
		for _, name := range i.config.Disks() {
			if serr := i.storage.Sync(name); serr != nil {
				err = fmt.Errorf("device %s: %w", name, serr)
				return
			}
		}
	}()
	if err := i.patiently(ctx, synced, "The disks are being stored; a storage is slow, or does not answer"); err != nil {
		return fmt.Errorf("sync disks: %w", err)
	}
	return err
}

// pauseForGood is Pause for a suspend.
func (i *Instance) pauseForGood(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, pauseTimeout, fmt.Errorf("the VM did not pause within %s: its VMM, or the storage of a disk, does not answer", pauseTimeout))
	defer cancel()
	paused := make(chan struct{})
	var err error // valid once paused is closed
	go func() {
		defer close(paused)
		err = i.Pause(ctx)
	}()
	_ = i.patiently(context.WithoutCancel(ctx), paused, "The VM does not pause: its VMM, or the storage of a disk, does not answer")
	return err
}

// patiently waits until done is closed, or ctx ends, and says now and then what is waited for.
func (i *Instance) patiently(ctx context.Context, done <-chan struct{}, what string) error {
	tick := time.NewTicker(pauseReminder)
	defer tick.Stop()
	for began := time.Now(); ; {
		select {
		case <-done:
			return nil
		case <-tick.C:
			i.log.Warn(what, "for", time.Since(began).Round(time.Second)) //nolint:sloglint // the caller's
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (i *Instance) save(ctx context.Context) error {
	if err := i.syncDisks(ctx); err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	if err := i.pauseForGood(ctx); err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	var state vmm.StateBuffer
	if err := i.machine.Save(ctx, &state); err != nil {
		return fmt.Errorf("suspend: %w", i.prefer(err))
	}
	if err := i.machine.Flush(ctx); err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	// The state goes last: it must never be there without the memory and disks that fit it.
	for _, name := range append(i.config.Disks(), vmm.Memory) {
		if err := i.storage.Sync(name); err != nil {
			return fmt.Errorf("suspend: device %s: %w", name, err)
		}
	}
	i.left, i.frozen = true, true // even if it fails: a Rescue takes back what the device says
	return i.withState(func(dev StateDevice) error { return vmm.WriteState(dev, i.config.ID, state.Bytes()) })
}

// withState lets use work on the state device.
func (i *Instance) withState(use func(StateDevice) error) error {
	dev, err := i.storage.State()
	if err != nil {
		return fmt.Errorf("open state device: %w", err)
	}
	if err := errors.Join(use(dev), dev.Close()); err != nil {
		return fmt.Errorf("state device %s: %w", dev.Name(), err)
	}
	return nil
}

// prefer returns how the VM ended, if it did, instead of an error that follows from it.
func (i *Instance) prefer(err error) error {
	select {
	case <-i.machine.Done():
		if exit := i.machine.Wait(); exit != nil {
			return exit
		}
		return vmm.ErrPoweredOff
	default:
		return err
	}
}

// Metrics is what the VMM counts, if it does; safe for concurrent use.
func (i *Instance) Metrics() map[string]float64 {
	if m, ok := i.machine.(vmm.Meter); ok {
		return m.Metrics()
	}
	return nil
}

// Generation is the VM's generation ID.
func (i *Instance) Generation() uuid.UUID { return i.generation }

// Config is what the package of this instance records.
func (i *Instance) Config() *vmm.PackageConfig { return i.config }

// Agent is the connection with the guest's agent, nil before AfterResume and after Suspend. It ends
// when the guest reboots.
func (i *Instance) Agent() *agent.Client {
	if i == nil {
		return nil
	}
	return i.agent.Load()
}

// Done is closed when the VMM has ended by itself.
func (i *Instance) Done() <-chan struct{} {
	if i == nil {
		return nil
	}
	return i.machine.Done()
}

// Wait blocks until the VMM ends. It returns nil when the guest powered itself off, which it notes
// in the state device, and after Close.
func (i *Instance) Wait() error {
	if i == nil {
		return ErrNotStarted
	}
	if err := i.machine.Wait(); err != nil {
		return err
	}
	if i.frozen {
		return nil
	}
	return i.withState(func(dev StateDevice) error { return vmm.MarkState(dev, vmm.PoweredOff) })
}

// Close ends the VM, if it still runs, without saving it, and removes what it needed on the host.
func (i *Instance) Close() error {
	errs := []error{i.dropAgent()}
	if i.machine != nil {
		errs = append(errs, i.machine.Close())
	}
	i.catchUp.Wait()
	if i.output != nil {
		i.output.Close()
	}
	if i.memory != nil {
		errs = append(errs, i.memory.Close())
		i.memory = nil
	}
	if i.dir != nil {
		errs = append(errs, i.dir.Close())
		i.dir = nil
	}
	return errors.Join(errs...)
}

// CheckNames refuses a device list that names a device twice, badly, or lacks one of required.
func CheckNames(names []string, required ...string) error {
	seen := map[string]bool{}
	for _, n := range names {
		if err := vmm.CheckDeviceName(n); err != nil {
			return err
		}
		if seen[n] {
			return fmt.Errorf("device %q is listed twice", n)
		}
		seen[n] = true
	}
	for _, r := range required {
		if !slices.Contains(names, r) {
			return fmt.Errorf("device %q is missing; add it to --devices", r)
		}
	}
	return nil
}

// Package instance runs one VM from its devices: boots or resumes it, talks to its agent, and
// suspends it. Snapshotter, runner and peer are built on it. It does not know how a device's path
// is served.
package instance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
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
	"drafter/internal/guest"
	"drafter/internal/kind"
	"drafter/internal/logging"
	"drafter/internal/memory"
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

// Reserve sets room aside for all of the memory and the state, so that the VM can be suspended when
// the file system is full.
func (p Paths) Reserve() error {
	for _, room := range []struct { // the larger first: a user makes room once
		device string
		bytes  int64
	}{{vmm.Memory, math.MaxInt64}, {vmm.State, StateRoom}} {
		if p[room.device] == "" {
			continue
		}
		if err := block.Reserve(p[room.device], room.bytes); err != nil {
			return fmt.Errorf("set room aside for device %s: %w", room.device, err)
		}
	}
	return nil
}

// Release gives back the reserved room that nobody has written.
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
func (p Paths) Memory() (*memory.Device, func() error, error) {
	f, err := block.OpenFile(p[vmm.Memory], false)
	if err != nil {
		return nil, nil, err
	}
	d := memory.New(f)
	d.Over(f, nil)
	return d, d.Close, nil
}

// Storage is where the devices of an instance are.
type Storage interface {
	// Path is the path at which a VMM opens the kernel or a disk, or boots with memory. It may be
	// "" for [vmm.Initrd], whose content the kernel device holds.
	Path(name string) string
	// Memory opens the memory device. close ends its use.
	Memory() (d *memory.Device, close func() error, err error)
	// Sync makes a device durable, with all that the VMM has written.
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

// status is what the state device says, or may say after an error, about a VM that has a VMM.
type status int

const (
	running status = iota // the VM is here
	copying               // the device holds a state for a copy; the VM is here
	leaving               // the VM may soon run at the target of a migration
	frozen                // the VM is suspended, or handed over
)

// ErrNotStarted says that there is no VM yet.
var ErrNotStarted = vmm.ErrNotStarted

// Instance is one running VM. One goroutine calls Resume and Suspend; any may call Wait and Close.
// A nil Instance stands for a VM that was not started: Done, Wait, Agent, Suspend and Mark say so.
type Instance struct {
	machine vmm.Machine
	dir     *vmm.Dir
	output  *output.Writer // nil discards
	log     *slog.Logger
	config  *vmm.PackageConfig
	// It belongs to the VM, not to its package: it stays the same while the VM goes on in one
	// place. Zero while the VM is booted for a package.
	generation uuid.UUID
	moved      bool // it comes from elsewhere
	storage    Storage
	memory     *memory.Device // nil while it is a file, of a VMM that boots with one
	endMemory  func() error
	agent      atomic.Pointer[agent.Client] // nil while the guest must not be called
	reboots    atomic.Int64                 // how often the guest has booted again
	agentOf    int64                        // the boot of the guest that agent belongs to
	// why the VM booted from its disks here; nil if it was resumed
	why     error
	closing atomic.Bool // its VMM does not end by itself any more
	status  status
	paused  time.Time     // since when, for a migration; zero while it runs
	stood   time.Duration // how long it was paused last
	// from the pause of a suspend until all was stored
	suspendPause time.Duration
	// how long it stood still for disks since its clock was last set, in nanoseconds
	missed atomic.Int64
	// of the goroutine that sets its clock after that; the end of the agent's connection ends it
	catchUp   sync.WaitGroup
	keepClock bool // its clock is never set

	resolver func() (network.Resolver, error) // nil without network
	booting  *ready                           // its console while it boots
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
	l.CPU = spec.CPU
	ready := newReady(spec.ReadyOutput, l.Output)
	l.Output, i.booting = ready, ready
	if l.Boot, err = i.boot(); err == nil {
		err = i.openMemory(driver, &l)
	}
	if err != nil {
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

// launch makes the VM's directory and the part of the launch that does not depend on how the
// machine starts.
func (i *Instance) launch(h vmm.Host, driver vmm.Driver) (vmm.Launch, error) {
	if h.Netns != "" && i.config.Interface != "" {
		if err := network.GuardGuest(h.Netns, network.Guest{VM: i.generation, MAC: i.config.MAC, Lands: i.moved, Egress: h.Egress}); err != nil {
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
		Devices: vmm.Devices{Kernel: i.storage.Path(vmm.Kernel), Tracking: h.Tracking, Backing: h.Backing, FillMemory: h.FillMemory},
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
		i.resolver = func() (network.Resolver, error) {
			_, guest6, err := network.GuestAddress6(h.Netns)
			if err != nil {
				return network.Resolver{}, err
			}
			return network.ResolverFor(h.NameServers, guest6 != nil)
		}
	}
	for _, name := range i.config.Disks() {
		l.Disks = append(l.Disks, vmm.Block{Name: name, Path: i.storage.Path(name)})
	}
	return l, nil
}

// openMemory opens the memory that the launch needs.
func (i *Instance) openMemory(driver vmm.Driver, l *vmm.Launch) (err error) {
	if l.Boot != nil && vmm.BootsFromFile(driver) {
		l.MemoryFile = i.storage.Path(vmm.Memory)
		return nil
	}
	if i.memory, i.endMemory, err = i.storage.Memory(); err != nil {
		return fmt.Errorf("open memory device: %w", err)
	}
	l.Memory = i.memory
	if l.Boot != nil {
		i.memory.Blank()
	}
	return nil
}

// sync makes a device durable, with all that the VMM has written.
func (i *Instance) sync(name string) error {
	if name == vmm.Memory && i.memory != nil {
		return i.memory.Top().Sync()
	}
	return i.storage.Sync(name)
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

// late reports that a guest stands still for a disk rather than that it is late.
func (i *Instance) late(err error) error {
	if err != nil && i.stalled() {
		return errors.New("the guest stands still, as what it writes cannot be stored; make room for its disks, which the log names")
	}
	return err
}

// endPatience is how long a VM may take to end after its agent has gone.
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
	const maxPorts = 16 // to name: a guest may name any number
	var closed []uint32
	var failure string
	news := logging.Limited{Logger: i.log}
	// the pause bounds the rate of calls, whatever the guest answers
	for ; ; time.Sleep(10 * time.Millisecond) {
		r, err := i.agent.Load().Ready(ctx)
		switch {
		case err == nil && (r.GetReady() || r.GetHeld()): // a service that is held starts later
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
			select { // a guest that powers off ends its agent first; the error is how the VM ended
			case <-i.machine.Done():
				return i.ended()
			case <-time.After(endPatience):
				return err
			}
		}
	}
}

// ended returns how a booting guest has ended.
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
// the right size. On an error the package is unchanged.
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

// CheckSizes refuses devices, given by their sizes in bytes, that do not match the package. Its
// errors name their paths.
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
	// Block devices have no size in their inode.
	return f.Seek(0, io.SeekEnd)
}

// Launched is a VMM process that waits for its VM, or in which the VM boots. Everything that can
// fail for want of a resource has been done.
type Launched struct {
	i     *Instance
	host  vmm.Host
	state vmm.StateReader // of a state that a migration brings
}

// Launch starts the VMM for an instance. If its state can be resumed, memory and disks are not
// touched; else the VM boots from its disks (see [vmm.CheckStart]). Call [Launched.Run] next. The
// guest will be told that others may have gone on from the same state.
func Launch(ctx context.Context, h vmm.Host, config *vmm.PackageConfig, storage Storage) (*Launched, error) {
	generation, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("make generation id: %w", err)
	}
	return launch(ctx, h, config, storage, generation, true)
}

// LaunchMoved starts the VMM for a VM of that generation, which goes on here and nowhere else. Call
// [Launched.Restore] next.
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
	i := &Instance{log: logging.Or(h.Logger), config: config, storage: storage, generation: generation, moved: !here}
	l, err := i.launch(h, driver)
	if err != nil {
		return nil, err
	}
	l.Recorded = &config.Hardware
	l.OnReboot, l.OnGoOn = i.rebooted, i.wentOn
	if l.Reboot, err = i.boot(); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	if here {
		// A suspended state is given up only if a VMM can start.
		if err := bootable(ctx, h, config); err != nil {
			return nil, errors.Join(err, i.Close())
		}
		if err := i.bootUnlessResumable(driver, &l, h.Boot); err != nil {
			return nil, errors.Join(err, i.Close())
		}
	}
	if err := i.openMemory(driver, &l); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	if i.machine, err = driver.Launch(ctx, l); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	if i.why != nil {
		i.log.Warn("Booting VM from its disks: it is not resumed", "because", i.why)
	}
	return &Launched{i: i, host: h}, nil
}

// Close gives up a VM that has not run.
func (l *Launched) Close() error { return l.i.Close() }

// Resume loads the state device, marks it as running and lets the guest run. When it returns nil
// the guest runs; tell it so with [Instance.AfterResume]. On an error the VMM is gone, and the
// state device can be resumed again unless a vCPU has run.
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
	// From here on memory and disks no longer fit the saved state.
	if err := vmm.MarkState(dev, vmm.Running); err != nil {
		return nil, fmt.Errorf("state device %s: %w", dev.Name(), err)
	}
	if err := i.machine.Resume(ctx); err != nil {
		return nil, err
	}
	return i, nil
}

// RescueSuspendTimeout bounds the suspend of a VM that runs and whose agent does not answer.
const RescueSuspendTimeout = 5 * time.Minute

// Run resumes the VM and calls its agent, which has timeout to answer. If the VM boots, Run waits
// for its guest for that long. began is when the caller began the start, for the log. The guest may
// run although Run fails. Then Run returns an instance beside the error; suspend it so that nothing
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

// tellAgent is AfterResume with a limit for the step of the clock; see [agent.Client.AfterResume].
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

// catchUpTimeout bounds the agent's answer when it sets a clock that stood still.
const catchUpTimeout = time.Minute

// wentOn sets the guest's clock after it stood still for a disk, because its clock stood still,
// too.
func (i *Instance) wentOn(stood time.Duration) {
	if i.keepClock {
		return
	}
	i.missed.Add(int64(stood))
	c := i.agent.Load()
	if c == nil {
		return // the next call of the agent sets it
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

// nameServers returns the name servers that the guest is to use on this host: none without network.
// If none are known, the guest keeps those that it has.
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

// withNameServers adds name servers to the addresses among kernel arguments (ip=, see nfsroot.rst of
// Linux, which has room for two, and [guest.IPv6Argument]), unless the user gave some. They do not
// become part of a package, because they are this host's, today.
func (i *Instance) withNameServers(args string) string {
	words := strings.Fields(args)
	servers := sync.OnceValue(func() []net.IP { return i.nameServers().NameServers })
	for at, w := range words {
		const fields, fields6 = 7, 2 // before the name servers
		ip4 := strings.HasPrefix(w, "ip=") && strings.Count(w, ":") == fields-1
		ip6 := strings.HasPrefix(w, guest.IPv6Argument+"=") && strings.Count(w, ",") == fields6-1
		if !ip4 && !ip6 {
			continue
		}
		separator, room := ":", 2
		if ip6 {
			separator, room = ",", 3
		}
		for _, ip := range servers() {
			if (ip.To4() != nil) == ip4 && room > 0 {
				words[at] += separator + ip.String()
				room--
			}
		}
	}
	return strings.Join(words, " ")
}

// Suspend stops the VM for good and leaves it in its devices, so that it can be resumed. The
// guest's agent gets agentTimeout to prepare. If it fails to, the VM is suspended all the same, and
// the error says so. saved tells whether the devices hold the VM. If not, it runs on, and Suspend
// can be tried again.
func (i *Instance) Suspend(ctx context.Context, agentTimeout time.Duration) (saved bool, err error) {
	if i == nil {
		return false, ErrNotStarted
	}
	if i.status == frozen {
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
		err = errors.Join(err, agentErr, i.goOn(context.WithoutCancel(ctx), agentTimeout))
		if i.memory != nil {
			err = errors.Join(err, i.memory.GiveBack())
		}
		return false, err
	}
	return true, agentErr
}

// goOn resumes a VM that could not be saved, unless it has ended.
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

// A VMM that pauses waits for its guest's requests. While it does not answer, the log says so every
// pauseReminder. After pauseTimeout it is given up.
var (
	pauseReminder = 10 * time.Second
	pauseTimeout  = time.Minute // which a test shortens
)

// syncDisks makes durable what the guest has written so far. Little is then left for the pause,
// which is bounded: a slow storage may take its time, but a VMM may not. A sync that never returns
// ends with this process.
func (i *Instance) syncDisks(ctx context.Context) error {
	synced := make(chan struct{})
	var err error // valid once synced is closed; a storage may report a failure only once
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

// storeAhead stores most of what only the guest has of its memory while the guest runs, so that
// little is left for the pause.
func (i *Instance) storeAhead(ctx context.Context) error {
	if p, ok := i.machine.(vmm.FlushPauser); i.memory == nil || ok && p.FlushPauses() {
		return nil
	}
	const enough = 1 << 20 // bytes
	for last := int64(math.MaxInt64); ; {
		if err := i.Flush(ctx); err != nil {
			return err
		}
		stored, err := i.memory.Store(ctx)
		enoughStored := stored <= enough || stored > last/4*3 // else the guest writes less and less
		if err == nil && enoughStored {
			err = i.memory.Top().Sync()
		}
		if err != nil {
			return fmt.Errorf("device %s: %w", vmm.Memory, err)
		}
		if enoughStored {
			return nil
		}
		last = stored
	}
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

// patiently waits until done is closed or ctx ends, and logs what every pauseReminder.
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
	if err := i.storeAhead(ctx); err != nil {
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
	// The state goes last: it must never be there without memory and disks that fit it.
	for _, name := range append(i.config.Disks(), vmm.Memory) {
		if err := i.sync(name); err != nil {
			return fmt.Errorf("suspend: device %s: %w", name, err)
		}
	}
	i.status = frozen // even if the write fails: Rescue writes the device again
	err := i.withState(func(dev StateDevice) error { return vmm.WriteState(dev, i.config.ID, state.Bytes()) })
	i.suspendPause = time.Since(i.paused)
	return err
}

// SuspendPause is how long the guest of a suspended VM stood still until all of it was stored. Call
// it after Suspend.
func (i *Instance) SuspendPause() time.Duration { return i.suspendPause }

// withState calls use with the open state device.
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

// prefer returns how the VM ended, if it has, and err if not: err follows from the end.
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

// Metrics returns the VMM's counters by name; nil if it has none. It is safe for concurrent use.
func (i *Instance) Metrics() map[string]float64 {
	if m, ok := i.machine.(vmm.Meter); ok {
		return m.Metrics()
	}
	return nil
}

// Generation is the VM's generation ID.
func (i *Instance) Generation() uuid.UUID { return i.generation }

// Config is the config of the instance's package.
func (i *Instance) Config() *vmm.PackageConfig { return i.config }

// Booted returns why the VM booted from its disks here; nil if it was resumed, or came from elsewhere.
func (i *Instance) Booted() error { return i.why }

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

// Wait blocks until the VMM ends. It returns nil after Close, and when the guest powered itself
// off, which Wait notes in the state device.
func (i *Instance) Wait() error {
	if i == nil {
		return ErrNotStarted
	}
	if err := i.machine.Wait(); err != nil {
		return err
	}
	if i.status == frozen || i.closing.Load() {
		return nil
	}
	return i.withState(func(dev StateDevice) error { return vmm.MarkState(dev, vmm.PoweredOff) })
}

// Close ends the VM, if it still runs, without saving it, and removes what it needed on the host.
func (i *Instance) Close() error {
	i.closing.Store(true)
	errs := []error{i.dropAgent()}
	if i.machine != nil {
		errs = append(errs, i.machine.Close())
	}
	i.catchUp.Wait()
	if i.output != nil {
		i.output.Close()
	}
	if i.memory != nil {
		if i.status != frozen { // else what could not be stored yet may still be wanted
			errs = append(errs, i.memory.Forget())
		}
		errs = append(errs, i.endMemory())
		i.memory = nil
	}
	if i.dir != nil {
		errs = append(errs, i.dir.Close())
		i.dir = nil
	}
	return errors.Join(errs...)
}

// CheckNames refuses a device list with an invalid name or a name twice, or without one of
// required.
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

// Package firecracker drives unmodified releases of Firecracker, behind their jailer.
//
// A machine that boots has memory of its own, and boots only to be snapshotted. Every other machine
// is restored: package memory serves its memory from the memory device, a page at a time, and knows
// which pages it writes while it runs.
package firecracker

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"drafter/internal/console"
	"drafter/internal/kind"
	"drafter/internal/logging"
	"drafter/internal/memory"
	"drafter/internal/process"
	"drafter/vmm"
)

// Driver is the Firecracker driver. The zero value looks both programs up on PATH.
type Driver struct {
	Bin    string // "" for "firecracker"
	Jailer string // "" for "jailer"

	untracked bool // as if this kernel could not write-protect memory
}

var (
	_ vmm.Driver     = Driver{}
	_ vmm.Checker    = Driver{}
	_ vmm.Describer  = Driver{}
	_ vmm.FileBooter = Driver{}
)

// Name implements [vmm.Driver].
func (Driver) Name() string { return vmm.VMMFirecracker }

// BootsFromFile implements [vmm.FileBooter].
func (Driver) BootsFromFile() bool { return true }

// Machine types. Pages of 2 MiB are a property of the saved state.
const (
	machine     = "firecracker"
	machineHuge = "firecracker-2M"
)

const (
	networkID = "net"
	entropyID = "entropy"

	// startTimeout bounds how long Firecracker may take until it answers.
	startTimeout = 30 * time.Second
)

// programs finds Firecracker and the jailer, as absolute paths.
func (d Driver) programs() (bin, jailer string, err error) {
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
		return "", "", fmt.Errorf("firecracker does not support %s", runtime.GOARCH)
	}
	for _, p := range []struct {
		to         *string
		name, flag string
	}{{&bin, d.Bin, "firecracker"}, {&jailer, d.Jailer, "jailer"}} {
		name := p.name
		if name == "" {
			name = p.flag
		}
		path, err := exec.LookPath(name)
		if err == nil {
			path, err = filepath.Abs(path)
		}
		if err != nil {
			return "", "", kind.Of(exec.ErrNotFound, fmt.Errorf("%s (%s) is not installed; install a release of Firecracker, or pass --%s-bin", p.flag, name, p.flag))
		}
		*p.to = path
	}
	return bin, jailer, nil
}

// Check implements [vmm.Checker].
func (d Driver) Check(ctx context.Context, l vmm.Launch) error {
	_, _, _, err := d.checkHost(ctx, &l)
	return err
}

func (d Driver) checkHost(ctx context.Context, l *vmm.Launch) (bin, jailer string, v vmm.Version, err error) {
	if bin, jailer, err = d.programs(); err != nil {
		return
	}
	if l.Accel == vmm.AccelTCG {
		return bin, jailer, v, errors.New("firecracker needs KVM, it has no --accel tcg; choose --vmm qemu")
	}
	if _, _, err = vmm.Accelerator(vmm.AccelKVM); err != nil {
		return
	}
	if v, err = installedVersion(ctx, bin); err != nil {
		return
	}
	if l.Recorded != nil {
		err = compatible(*l.Recorded, v)
	}
	return
}

// Describe implements [vmm.Describer].
func (d Driver) Describe(ctx context.Context, l vmm.Launch) (vmm.Hardware, error) {
	l.Recorded = nil
	_, _, v, err := d.checkHost(ctx, &l)
	if err != nil {
		return vmm.Hardware{}, err
	}
	hw, _, err := hardware(v, &l)
	return hw, err
}

// hardware is that of a machine that boots.
func hardware(v vmm.Version, l *vmm.Launch) (vmm.Hardware, *cpuConfig, error) {
	hw := vmm.Hardware{VMM: vmm.VMMFirecracker, Version: v.String(), Machine: machine, Accel: vmm.AccelKVM}
	if l.HugePages {
		hw.Machine = machineHuge
	}
	config, err := readCPU(l.CPU)
	if err != nil {
		return hw, nil, err
	}
	hw.CPU = config.name
	return hw, config, nil
}

// Launch implements [vmm.Driver].
func (d Driver) Launch(ctx context.Context, l vmm.Launch) (vmm.Machine, error) {
	bin, jailer, v, err := d.checkHost(ctx, &l)
	if err != nil {
		return nil, err
	}
	if l.MemorySize%(1<<20) != 0 || l.HugePages && l.MemorySize%(2<<20) != 0 {
		return nil, fmt.Errorf("memory of %d bytes is not a whole number of pages and MiB", l.MemorySize)
	}
	device, ok := l.Memory.(*memory.Device)
	if ok == (l.Boot != nil) {
		return nil, errors.New("a machine boots with its memory in a file, and is restored with a memory device of Drafter's")
	}
	l.Logger = logging.Or(l.Logger)
	m := &Machine{launch: l, device: device, ended: make(chan struct{})}
	var config *cpuConfig
	if l.Recorded != nil {
		m.hardware = vmm.Hardware{
			VMM: vmm.VMMFirecracker, Version: v.String(), Machine: l.Recorded.Machine, CPU: l.Recorded.CPU, Accel: vmm.AccelKVM,
		}
		if config, err = recordedCPU(l.Recorded.CPU); err != nil && l.Boot != nil {
			return nil, err
		}
	} else if m.hardware, config, err = hardware(v, &l); err != nil {
		return nil, err
	}
	m.huge = m.hardware.Machine == machineHuge
	m.logsDirty = m.huge || d.untracked || !memory.CanTrack()
	switch {
	case l.Tracking == vmm.TrackScan:
		return nil, errors.New("--track-writes scan is not for Firecracker, which makes its userfaultfd itself; choose auto")
	case l.Tracking == vmm.TrackFaults && m.logsDirty:
		return nil, errors.New("--track-writes faults is neither for huge pages nor for kernels before 5.7; choose auto")
	}
	if err := m.start(ctx, bin, jailer); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	if l.Boot != nil {
		if err := m.boot(ctx, config); err != nil {
			return nil, errors.Join(m.orExit(err), m.Close())
		}
	}
	return m, nil
}

// cpuConfig is a CPU template (docs/cpu_templates of Firecracker).
type cpuConfig struct {
	name   string
	static string          // name of one that is built in, or ""
	custom json.RawMessage // or nil
}

// readCPU parses the name of a static template, or reads the custom one at a path.
func readCPU(cpu string) (*cpuConfig, error) {
	switch {
	case cpu == "" || cpu == "None":
		return &cpuConfig{name: "None"}, nil
	case !strings.ContainsAny(cpu, "./"):
		return &cpuConfig{name: cpu, static: cpu}, nil
	}
	b, err := os.ReadFile(cpu)
	if err != nil {
		return nil, fmt.Errorf("CPU template: %w", err)
	}
	if !json.Valid(b) {
		return nil, fmt.Errorf("CPU template %s is not JSON; see docs/cpu_templates of Firecracker", cpu)
	}
	return &cpuConfig{name: fmt.Sprintf(customCPU+"%x", sha256.Sum256(b))[:23], custom: b}, nil
}

// recordedCPU is readCPU for the template that a package records. A package contains no custom
// template.
func recordedCPU(name string) (*cpuConfig, error) {
	if strings.HasPrefix(name, customCPU) {
		return nil, fmt.Errorf("the VM cannot boot again: its CPU template %s is not part of its package; take its disks with 'drafter device export' and make a package of them", name)
	}
	return readCPU(name)
}

// customCPU begins the name of a custom template; the start of its SHA-256 follows.
const customCPU = "custom-"

// Machine is one Firecracker process.
type Machine struct {
	launch    vmm.Launch
	hardware  vmm.Hardware
	huge      bool // memory consists of pages of 2 MiB
	logsDirty bool // KVM notes which pages are written, not we

	process *process.Process
	api     *api
	ports   ports
	device  *memory.Device    // nil when booting
	uffd    *net.UnixListener // nil likewise
	fifos   []*os.File        // log and metrics
	console *console.Console
	last    *console.LastLines // of stderr and log

	workers sync.WaitGroup // who reads from the process, or watches it
	ended   chan struct{}  // closed when the process and all workers have ended

	mu      sync.Mutex
	memory  *memory.Handler // nil until Restore
	paused  bool
	written int64 // by the guest between the last two deltas of a running VM, in bytes
	vain    bool  // it writes as fast as deltas are made
	counted map[string]float64
	lost    error // why memory could not be served
	closing bool
	exit    error
}

var (
	_ vmm.Machine = (*Machine)(nil)
	_ vmm.Meter   = (*Machine)(nil)
)

// start starts Firecracker in its jail, and returns when it answers.
func (m *Machine) start(ctx context.Context, bin, jailer string) (err error) {
	l := &m.launch
	j, err := newJail(l, bin)
	if err != nil {
		return err
	}
	if m.ports, err = listen(l); err != nil {
		return err
	}
	if l.Boot == nil {
		if m.uffd, err = listenAt(l, uffdSocket); err != nil {
			return err
		}
	}
	for _, name := range []string{jailLog, jailMetrics} {
		f, err := openFIFO(filepath.Join(j.root, name))
		if err != nil {
			return err
		}
		m.fifos = append(m.fifos, f)
	}
	if err := m.spawn(j, jailer); err != nil {
		return err
	}
	if err := l.Dir.Record(vmm.Process(m.process.Identity())); err != nil {
		return err
	}
	m.api = newAPI(l.Dir.Socket(apiSocket), l.UID)
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("firecracker did not answer within %s", startTimeout))
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-m.process.Done():
			cancel()
		case <-stop:
		}
	}()
	if err := m.api.await(ctx); err != nil {
		select {
		case <-m.process.Done():
			<-m.ended
			if exit := m.Wait(); exit != nil {
				return fmt.Errorf("start Firecracker: %w", exit)
			}
		default:
		}
		return fmt.Errorf("start Firecracker: %w", err)
	}
	// The process was the jailer when it was recorded first.
	if err := l.Dir.Record(vmm.Process(m.process.Identity())); err != nil {
		return err
	}
	return m.command(m.api.put(ctx, "/metrics", metrics{"/" + jailMetrics}))
}

// spawn starts the process and those who read from it.
func (m *Machine) spawn(j *jail, jailer string) error {
	l := &m.launch
	var ours, theirs []*os.File
	pipe := func() (r, w *os.File, err error) {
		r, w, err = os.Pipe()
		if err != nil {
			err = fmt.Errorf("create pipe: %w", err)
		}
		return
	}
	inRead, inWrite, err := pipe()
	outRead, outWrite, oerr := pipe()
	errRead, errWrite, eerr := pipe()
	ours, theirs = []*os.File{inWrite, outRead, errRead}, []*os.File{inRead, outWrite, errWrite}
	err = errors.Join(err, oerr, eerr)
	if err == nil {
		m.process, err = process.Start(process.Config{
			Path: jailer, Args: j.arguments(l, level(l.Logger)), Dir: "/",
			Netns: l.Netns, UID: 0, GID: 0, NUMANode: l.NUMANode, CgroupVersion: l.CgroupVersion, CgroupName: l.Dir.ID, Limits: process.Limits(l.Limits),
			FilesIn: func() ([]*os.File, error) { return nil, offerTap(l.Interface, l.UID, l.GID) },
			Stdin:   inRead, Stdout: outWrite, Stderr: errWrite,
			Mounts: j.mounts, Outlives: l.UID != 0 || l.GID != 0, Logger: l.Logger,
		})
	}
	for _, f := range theirs {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	if m.process == nil {
		for _, f := range ours {
			if f != nil {
				err = errors.Join(err, f.Close())
			}
		}
		return err
	}
	m.console = console.New(outRead, inWrite, l.Output, l.Input)
	m.last = &console.LastLines{}
	m.workers.Go(m.console.Run)
	m.workers.Go(func() {
		// Ends with the process, whose exit is the error that counts.
		_, _ = io.Copy(m.last, errRead)
		_ = errRead.Close()
	})
	var readers sync.WaitGroup
	readers.Go(func() { followLog(m.fifos[0], m.last, m.launch.Logger) })
	readers.Go(func() { followMetrics(m.fifos[1], m.count) })
	m.workers.Go(func() {
		<-m.process.Done()
		for _, f := range m.fifos {
			_ = f.Close() // nothing was written to it
		}
		readers.Wait()
	})
	go m.supervise()
	return err
}

// boot configures the machine and lets it run.
func (m *Machine) boot(ctx context.Context, cpu *cpuConfig) error {
	l := &m.launch
	source := bootSource{KernelImagePath: "/" + jailKernel, BootArgs: l.Boot.Args}
	if l.Boot.Initrd != "" {
		source.InitrdPath = "/" + jailInitrd
	}
	config := machineConfiguration{VCPUCount: l.CPUs, MemSizeMiB: l.MemorySize >> 20, TrackDirtyPages: !m.huge, CPUTemplate: cpu.static}
	if m.huge {
		config.HugePages = "2M"
	}
	type call struct {
		path string
		body any
	}
	calls := []call{{"/machine-config", config}, {"/boot-source", source}}
	if cpu.custom != nil {
		calls = append(calls, call{"/cpu-config", cpu.custom})
	}
	ids := map[string]string{}
	for _, d := range l.Disks {
		id := strings.Map(alphanumeric, d.Name)
		if other, ok := ids[id]; ok {
			return fmt.Errorf("disks %s and %s have the same id %s for Firecracker; rename one", other, d.Name, id)
		}
		ids[id] = d.Name
		// The guest's flushes reach the device. Which disk is the root, the kernel's arguments say.
		calls = append(calls, call{"/drives/" + id, drive{DriveID: id, PathOnHost: "/" + diskFile(d.Name), CacheType: "Writeback"}})
	}
	if l.Interface != "" {
		calls = append(calls, call{"/network-interfaces/" + networkID, networkInterface{networkID, l.Interface, l.MAC}})
	}
	calls = append(calls, call{"/vsock", vsockDevice{guestCID, "/" + vsockSocket}}, call{"/" + entropyID, struct{}{}}, call{"/actions", action{"InstanceStart"}})
	for _, c := range calls {
		if err := m.api.put(ctx, c.path, c.body); err != nil {
			return err
		}
	}
	return nil
}

// alphanumeric makes a device's name an id of Firecracker's, which is made of letters, digits and
// '_'.
func alphanumeric(r rune) rune {
	if r == '-' || r == '.' {
		return '_'
	}
	return r
}

// supervise waits for the process and then for those who read from it.
func (m *Machine) supervise() {
	err := m.process.Wait()
	m.workers.Wait()
	m.mu.Lock()
	switch {
	case m.closing:
	case m.lost != nil:
		m.exit = fmt.Errorf("the VM was ended, as its memory was lost: %w", m.lost)
	case err == nil && strings.Contains(m.console.Tail(), "Kernel panic"):
		m.exit = fmt.Errorf("the guest's kernel panicked%s", m.console.Tail())
	case err == nil: // a guest that reboots ends Firecracker like one that powers off
	default:
		m.exit = fmt.Errorf("firecracker ended unexpectedly: %w%s%s", err, m.last.Quote("its last words"), m.console.Tail())
	}
	m.mu.Unlock()
	close(m.ended)
}

// orExit returns how a VM that has just ended did so, or err, which may be its consequence. A
// process that dies takes a moment to be reaped.
func (m *Machine) orExit(err error) error {
	var refused *refusedError
	if err == nil || errors.As(err, &refused) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return err
	}
	select {
	case <-m.ended:
	case <-time.After(time.Second):
		return err
	}
	if exit := m.Wait(); exit != nil {
		return exit
	}
	return fmt.Errorf("%w%s", vmm.ErrPoweredOff, m.console.Tail())
}

// command returns the error of a call; if Firecracker has died, it says how.
func (m *Machine) command(err error) error { return m.orExit(err) }

// maxCounted bounds how many of Firecracker's counters are kept; it has some 500.
const maxCounted = 4096

func (m *Machine) count(name string, value float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.counted == nil {
		m.counted = map[string]float64{}
	}
	if _, ok := m.counted[name]; ok || len(m.counted) < maxCounted {
		m.counted[name] = value
	}
}

// Metrics implements [vmm.Meter]: Firecracker's last report of its counters (docs/metrics.md of
// Firecracker), by group and name, and the faults served.
func (m *Machine) Metrics() map[string]float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := map[string]float64{}
	for k, v := range m.counted {
		all[k] = v
	}
	if m.memory != nil {
		missing, writes := m.memory.Faults()
		all["drafter.faults"], all["drafter.writeFaults"] = float64(missing), float64(writes)
	}
	return all
}

// Hardware implements [vmm.Machine].
func (m *Machine) Hardware() vmm.Hardware { return m.hardware }

// Resume implements [vmm.Machine].
func (m *Machine) Resume(ctx context.Context) error { return m.turn(ctx, "Resumed", false) }

// Pause implements [vmm.Machine].
func (m *Machine) Pause(ctx context.Context) error { return m.turn(ctx, "Paused", true) }

func (m *Machine) turn(ctx context.Context, state string, paused bool) error {
	if err := m.command(m.api.patch(ctx, "/vm", vmState{state})); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.paused = paused
	return nil
}

// GuestConn implements [vmm.Machine].
func (m *Machine) GuestConn(ctx context.Context, port uint32) (net.Conn, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-m.ended:
			cancel(errors.New("firecracker has ended"))
		case <-stop:
		}
	}()
	conn, err := m.ports.accept(ctx, port)
	if err != nil {
		return nil, m.orExit(err)
	}
	return conn, nil
}

// Done implements [vmm.Machine].
func (m *Machine) Done() <-chan struct{} { return m.ended }

// Wait implements [vmm.Machine].
func (m *Machine) Wait() error {
	<-m.ended
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exit
}

// Close implements [vmm.Machine].
func (m *Machine) Close() error {
	m.mu.Lock()
	again := m.closing
	m.closing = true
	m.mu.Unlock()
	if again {
		if m.process != nil {
			<-m.ended
		}
		return nil
	}
	var errs []error
	if m.process != nil {
		errs = append(errs, m.process.Kill())
		<-m.ended
	} else {
		for _, f := range m.fifos {
			errs = append(errs, f.Close())
		}
	}
	m.mu.Lock()
	h := m.memory
	m.mu.Unlock()
	if h != nil {
		errs = append(errs, h.Close())
	}
	if m.api != nil {
		m.api.close()
	}
	errs = append(errs, m.ports.close())
	if m.uffd != nil {
		if err := m.uffd.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

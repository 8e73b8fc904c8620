// Package qemu drives QEMU: a microvm where KVM is usable, a q35 under emulation.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"drafter/agent"
	"drafter/internal/console"
	"drafter/internal/kind"
	"drafter/internal/logging"
	"drafter/internal/memory"
	"drafter/internal/process"
	"drafter/vmm"
)

// Driver is the QEMU driver. The zero value is ready.
type Driver struct {
	Bin string // looked up on PATH when it holds no slash; "" for the one of this architecture
	// machines have memory of their own instead of a memory device, a memfd with
	// [vmm.BackingShared], and wait for [Machine.ReceiveOwn] instead of Restore
	Own bool
	// a directory of the host's that machines may write to, for [Machine.SendOwn] and ReceiveOwn;
	// "" for none
	Dir string
}

var _ vmm.Driver = Driver{}

// Name implements [vmm.Driver].
func (Driver) Name() string { return vmm.VMMQEMU }

// packageNames are the Debian packages with a missing QEMU.
var packageNames = map[string]string{"amd64": "qemu-system-x86", "arm64": "qemu-system-arm"}

// binary finds QEMU for this architecture. The path is absolute and leads through no links, because
// QEMU is started in a root directory that holds little more than that file.
func binary(bin string) (string, error) {
	if bin == "" {
		switch runtime.GOARCH {
		case "amd64":
			bin = "qemu-system-x86_64"
		default:
			return "", fmt.Errorf("the QEMU driver does not support %s yet", runtime.GOARCH)
		}
	}
	path, err := exec.LookPath(bin)
	if err != nil {
		return "", kind.Of(exec.ErrNotFound, fmt.Errorf("QEMU (%s) is not installed; install it with 'apt-get install %s', or pass --qemu-bin", bin, packageNames[runtime.GOARCH]))
	}
	if path, err = filepath.Abs(path); err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", fmt.Errorf("find QEMU: %w", err)
	}
	return path, nil
}

// versions are those of binaries that were asked, by versionKey. A daemon asks often, and QEMU takes
// its time.
var versions sync.Map

// versionKey identifies a binary as it is: an upgrade replaces the file.
type versionKey struct {
	device, inode    uint64
	size             int64
	modified, change syscall.Timespec
}

// installedVersion asks a binary for its version, unless it has.
func installedVersion(ctx context.Context, path string) (vmm.Version, error) {
	info, err := os.Stat(path)
	if err != nil {
		return vmm.Version{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	st := info.Sys().(*syscall.Stat_t)
	key := versionKey{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
	if v, ok := versions.Load(key); ok {
		return v.(vmm.Version), nil
	}
	v, err := askVersion(ctx, path)
	if err == nil {
		versions.Store(key, v)
	}
	return v, err
}

func askVersion(ctx context.Context, path string) (vmm.Version, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return vmm.Version{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	_, after, found := strings.Cut(string(out), "version ")
	if !found {
		return vmm.Version{}, fmt.Errorf("ask %s for its version: it does not look like QEMU", path)
	}
	return vmm.ParseVersion(after)
}

// Installed implements [vmm.Installed].
func (d Driver) Installed(ctx context.Context) (vmm.Version, error) {
	path, err := binary(d.Bin)
	if err != nil {
		return vmm.Version{}, err
	}
	return installedVersion(ctx, path)
}

// compatible refuses state that this QEMU could misread. Versioned machine types load on the same
// and on newer releases, but not on older ones; a microvm has no versions, so it loads only where
// it was saved. 8.0.0 reads a 7.2 machine's PCI state wrongly (fixed in 8.0.1).
func compatible(recorded vmm.Hardware, have vmm.Version) error {
	if recorded.VMM != vmm.VMMQEMU {
		return kind.Of(vmm.ErrIncompatible, fmt.Errorf("the package was made with %s, it cannot be resumed with QEMU", recorded.VMM))
	}
	want, err := vmm.ParseVersion(recorded.Version)
	if err != nil {
		return err
	}
	switch {
	case recorded.Machine == machineMicroVM && have != want:
		return kind.Of(vmm.ErrIncompatible, fmt.Errorf("a microvm package made with QEMU %s resumes only there, this host has %s; make the package again here", want, have))
	case have.ReleasedBefore(want):
		return kind.Of(vmm.ErrIncompatible, fmt.Errorf("the package was made with QEMU %s, this host has the older %s; upgrade QEMU here, or make the package with the older one", want, have))
	case have == vmm.Version{Major: 8} && want.Before(have):
		return kind.Of(vmm.ErrIncompatible, errors.New("QEMU 8.0.0 misreads machines of older releases; upgrade it to 8.0.1 or later"))
	}
	return nil
}

// startTimeout bounds how long QEMU may take until it answers on QMP.
const startTimeout = 30 * time.Second

// maxWorkers is how many threads QEMU starts at most for the I/O of its disks (thread-pool-max of
// its main loop).
const maxWorkers = 64

// checkThreads refuses a limit that QEMU could exceed: it ends when it cannot start a thread.
func checkThreads(l *vmm.Launch) error {
	const others = 16 // main loop, RCU, monitor, migration, with some to spare
	if least := maxWorkers + others + l.CPUs; l.Limits.PIDs > 0 && l.Limits.PIDs < least {
		return fmt.Errorf("--pids-max is %d, and QEMU has up to %d threads with this VM; raise it", l.Limits.PIDs, least)
	}
	return nil
}

// Launch implements [vmm.Driver].
func (d Driver) Launch(ctx context.Context, l vmm.Launch) (vmm.Machine, error) {
	if err := checkThreads(&l); err != nil {
		return nil, err
	}
	path, err := binary(d.Bin)
	if err != nil {
		return nil, err
	}
	hw, err := hardware(ctx, path, &l)
	if err != nil {
		return nil, err
	}
	args, err := arguments(&l, hw)
	if err != nil {
		return nil, err
	}
	device, ok := l.Memory.(*memory.Device)
	if d.Own == ok {
		return nil, errors.New("a machine has either memory of its own or a memory device of Drafter's")
	}
	l.Logger = logging.Or(l.Logger)
	m := &Machine{launch: l, device: device, hardware: hw, ended: make(chan struct{}), migration: make(chan string, 16), stalls: make(chan diskError, 1), stops: make(chan time.Time, 1), resets: newResets()}
	root, err := d.jail(&l, path, hw.Accel)
	if err == nil {
		err = m.start(ctx, path, args, root)
	}
	if err == nil && l.Boot == nil && !d.Own {
		err = m.await(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

var (
	_ vmm.Checker   = Driver{}
	_ vmm.Describer = Driver{}
)

// Describe implements [vmm.Describer].
func (d Driver) Describe(ctx context.Context, l vmm.Launch) (vmm.Hardware, error) {
	path, err := binary(d.Bin)
	if err != nil {
		return vmm.Hardware{}, err
	}
	l.Recorded = nil
	return hardware(ctx, path, &l)
}

// Check implements [vmm.Checker].
func (d Driver) Check(ctx context.Context, l vmm.Launch) error {
	path, err := binary(d.Bin)
	if err != nil {
		return err
	}
	hw, err := hardware(ctx, path, &l)
	if err != nil {
		return err
	}
	version, err := installedVersion(ctx, path)
	if err != nil {
		return err
	}
	return compatible(hw, version)
}

// hardware returns the machine's hardware: what was recorded, or what suits this host.
func hardware(ctx context.Context, path string, l *vmm.Launch) (vmm.Hardware, error) {
	if l.Recorded != nil {
		hw := *l.Recorded
		if !machineForm.MatchString(hw.Machine) {
			return hw, fmt.Errorf("machine %.80q is not one that this program makes", hw.Machine)
		}
		if err := checkCPU(hw.CPU); err != nil {
			return hw, err
		}
		accel := l.Accel
		if accel == "" || accel == vmm.AccelAuto {
			accel = hw.Accel
		}
		if accel != hw.Accel {
			return hw, fmt.Errorf("the package was made with --accel %s and cannot be resumed with %s; make it again with --accel %s", hw.Accel, accel, accel)
		}
		_, _, err := vmm.Accelerator(accel)
		return hw, err
	}
	accel, _, err := vmm.Accelerator(l.Accel)
	if err != nil {
		return vmm.Hardware{}, err
	}
	version, err := installedVersion(ctx, path)
	if err != nil {
		return vmm.Hardware{}, err
	}
	cpu := l.CPU
	if cpu == "" {
		cpu = map[string]string{vmm.AccelTCG: cpuTCG, vmm.AccelKVM: cpuKVM}[accel]
	}
	if err := checkCPU(cpu); err != nil {
		return vmm.Hardware{}, fmt.Errorf("--cpu-template: %w", err)
	}
	return vmm.Hardware{
		VMM:     vmm.VMMQEMU,
		Version: version.String(),
		Machine: chooseMachine(accel, version, len(l.Disks)),
		CPU:     cpu,
		Accel:   accel,
	}, nil
}

// machineForm lists the machine types that chooseMachine chooses.
var machineForm = regexp.MustCompile(`^(microvm|pc-q35-[0-9]{1,3}\.[0-9]{1,3})$`)

// Machine is one QEMU process.
type Machine struct {
	launch   vmm.Launch
	hardware vmm.Hardware

	device   *memory.Device  // nil for a machine with memory of its own
	memory   *memory.Handler // serves it; nil likewise
	exports  bool            // its disks are to be written over NBD, see ExportOwn
	private  bool            // it is a private mapping of what the memory device is stored in
	lost     error           // why memory could not be served
	incoming incoming        // the state that Restore loads

	paused   atomic.Bool
	running  sync.Mutex  // held while the vCPUs are let go or stopped
	saving   sync.Mutex  // guards the following
	outgoing *os.File    // where a save reads the state; nil before prepareSave, and after the save
	begun    *save       // that has not ended; else nil
	saved    atomic.Bool // since the VM was let go last

	stops   chan time.Time // of the vCPUs: holds the time of one
	process *process.Process
	qmp     *qmp
	console *console.Console
	stderr  *console.LastLines

	workers   sync.WaitGroup // console, stderr and event readers
	migration chan string    // status values of MIGRATION events

	stalls     chan diskError // that stopped the VM
	stalled    atomic.Bool    // the VM stands still for a disk
	diskErrors atomic.Int64
	ended      chan struct{} // closed when the process and all workers have ended

	resets resets // of a guest that boots again

	mu       sync.Mutex
	shutdown string // reason of the SHUTDOWN event
	closing  bool
	exit     error
}

var _ vmm.Machine = (*Machine)(nil)

func (m *Machine) start(ctx context.Context, path string, args []string, root *process.Root) (err error) {
	l := &m.launch
	qmpConn, qmpFile, err := socketPair()
	if err != nil {
		return fmt.Errorf("create QMP socket: %w", err)
	}
	consoleConn, consoleFile, err := socketPair()
	if err != nil {
		return errors.Join(fmt.Errorf("create console socket: %w", err), qmpConn.Close(), qmpFile.Close())
	}
	stderrRead, stderrWrite, err := os.Pipe()
	if err != nil {
		return errors.Join(fmt.Errorf("create pipe: %w", err), qmpConn.Close(), qmpFile.Close(), consoleConn.Close(), consoleFile.Close())
	}

	theirs := []*os.File{qmpFile, consoleFile}
	for _, port := range l.Ports {
		var f *os.File
		if f, err = listenPort(l, port); err != nil {
			break
		}
		theirs = append(theirs, f)
	}
	if err == nil && l.Memory != nil {
		var files []*os.File
		files, err = m.openMemory()
		theirs = append(theirs, files...)
	}
	if err == nil {
		m.process, err = process.Start(process.Config{
			Path: path, Args: args, Dir: "/", Env: []string{"GLIBC_TUNABLES=" + tunables()}, Root: root,
			Netns: l.Netns, UID: l.UID, GID: l.GID, NUMANode: l.NUMANode,
			CgroupVersion: l.CgroupVersion, CgroupName: l.Dir.ID, Limits: process.Limits(l.Limits),
			Files:   theirs,
			FilesIn: func() ([]*os.File, error) { return openTap(l.Interface, l.Netns) },
			Stderr:  stderrWrite,
			Logger:  l.Logger,
		})
	}
	// QEMU's ends are QEMU's alone: when it dies, ours report it.
	for _, f := range append(theirs, stderrWrite) {
		err = errors.Join(err, f.Close())
	}
	if m.process == nil {
		return errors.Join(err, qmpConn.Close(), consoleConn.Close(), stderrRead.Close())
	}
	m.console = console.New(consoleConn, consoleConn, l.Output, l.Input)
	m.stderr = &console.LastLines{}
	m.workers.Go(func() {
		// The goroutine ends with the process. The process' exit is the error that counts.
		_, _ = io.Copy(m.stderr, stderrRead)
		_ = stderrRead.Close()
	})
	m.workers.Go(m.console.Run)
	go m.supervise()
	if err = errors.Join(err, l.Dir.Record(vmm.Process(m.process.Identity()))); err != nil {
		return errors.Join(err, qmpConn.Close())
	}

	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("QEMU did not answer within %s", startTimeout))
	defer cancel()
	q, version, err := newQMP(ctx, qmpConn)
	if err != nil {
		return fmt.Errorf("start %s as %s: %w", path, m.hardware.Machine, m.orExit(err))
	}
	m.qmp = q
	m.workers.Go(m.watch)
	m.workers.Go(m.standStill)
	// The process was this program when it was recorded first.
	if err := l.Dir.Record(vmm.Process(m.process.Identity())); err != nil {
		return err
	}
	if l.Recorded != nil {
		if err := compatible(*l.Recorded, version); err != nil {
			return err
		}
	}
	if err := m.configureMigration(ctx); err != nil || l.Memory == nil {
		return err
	}
	if err := m.serveMemory(); err != nil {
		return m.orExit(fmt.Errorf("serve memory: %w", err))
	}
	if l.Boot != nil {
		return m.command(ctx, "cont", nil)
	}
	return nil
}

// tunables lets QEMU's heap grow by huge pages (see the GNU C Library manual, "Memory Allocation
// Tunables"). While it restores a state it takes a thousand pages more, and a fault for each would
// be half of the time that takes.
func tunables() string {
	const own = "glibc.malloc.hugetlb=1"
	if users := os.Getenv("GLIBC_TUNABLES"); users != "" {
		return own + ":" + users // the last of several counts
	}
	return own
}

// configureMigration lets Save and Restore handle everything but the shared memory, at full speed.
// At QEMU's default bandwidth a save sleeps for 100 ms in its rate limiter.
func (m *Machine) configureMigration(ctx context.Context) error {
	if err := m.setCapabilities(ctx, capability{"x-ignore-shared", true}, capability{"events", true}); err != nil {
		return err
	}
	return m.qmp.execute(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": int64(1) << 40}, nil)
}

// capability is one of a migration.
type capability struct {
	Capability string `json:"capability"`
	State      bool   `json:"state"`
}

func (m *Machine) setCapabilities(ctx context.Context, list ...capability) error {
	return m.command(ctx, "migrate-set-capabilities", map[string]any{"capabilities": list})
}

// supervise waits for the process, and then for the goroutines that read from it: their ends close
// with it.
func (m *Machine) supervise() {
	err := m.process.Wait()
	m.workers.Wait()
	m.mu.Lock()
	switch {
	case m.closing:
	case m.lost != nil:
		m.exit = fmt.Errorf("the VM was ended, as its memory was lost: %w", m.lost)
	case err == nil && m.shutdown == "guest-shutdown":
	case err == nil && m.shutdown == "guest-reset" && m.launch.Reboot != nil:
		m.exit = fmt.Errorf("the guest rebooted again and again%s", m.console.Tail())
	case err == nil && m.shutdown == "guest-reset":
		m.exit = fmt.Errorf("the guest rebooted, or its kernel panicked%s", m.console.Tail())
	case err == nil:
		m.exit = fmt.Errorf("QEMU exited (%s)%s%s", m.shutdown, m.stderr.Quote("its last words"), m.console.Tail())
	default:
		if m.private && process.Signaled(err, unix.SIGBUS) {
			err = fmt.Errorf("%w: it could not read memory from %s, which was truncated, or whose disk fails", err, m.device.BaseName())
		}
		m.exit = fmt.Errorf("QEMU ended unexpectedly: %w%s%s", err, m.stderr.Quote("its last words"), m.console.Tail())
	}
	m.mu.Unlock()
	close(m.ended)
}

// watch follows QEMU's events until the connection ends.
func (m *Machine) watch() {
	for e := range m.qmp.events {
		switch e.Name {
		case "SHUTDOWN":
			var data struct {
				Reason string `json:"reason"`
			}
			if json.Unmarshal(e.Data, &data) == nil {
				m.mu.Lock()
				m.shutdown = data.Reason
				m.mu.Unlock()
			}
		case "STOP":
			select {
			case m.stops <- time.Now():
			default:
			}
		case "RESUME":
			m.incoming.resumed(m)
		case "RESET":
			m.rebooted()
		case "BLOCK_IO_ERROR":
			m.noteDiskError(e.Data)
		case "MIGRATION":
			var data struct {
				Status string `json:"status"`
			}
			if json.Unmarshal(e.Data, &data) == nil {
				m.noteMigration(data.Status)
			}
		}
	}
}

func (m *Machine) noteMigration(status string) {
	select {
	case m.migration <- status:
	default: // nobody waits for a migration; a full channel holds only stale values
	}
}

// orExit returns how a VM that has just ended did so, or err, which may be its consequence. A
// process that dies takes a moment to be reaped.
func (m *Machine) orExit(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
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

// command runs a QMP command; if QEMU has died, the error says how.
func (m *Machine) command(ctx context.Context, name string, arguments any, files ...*os.File) error {
	err := m.qmp.execute(ctx, name, arguments, nil, files...)
	var refused *qmpError
	if err == nil || errors.As(err, &refused) || ctx.Err() != nil {
		return err
	}
	return m.orExit(err)
}

// Hardware implements [vmm.Machine].
func (m *Machine) Hardware() vmm.Hardware { return m.hardware }

// Resume implements [vmm.Machine].
func (m *Machine) Resume(ctx context.Context) error {
	if err := m.giveUpSave(ctx); err != nil {
		return err
	}
	m.running.Lock()
	defer m.running.Unlock()
	running, err := m.endState(ctx)
	if err != nil {
		return err
	}
	m.paused.Store(false)
	if running {
		return nil
	}
	if err := m.awaitSaved(ctx); err != nil {
		return err
	}
	return m.command(ctx, "cont", nil)
}

// Pause implements [vmm.Machine].
func (m *Machine) Pause(ctx context.Context) error {
	m.running.Lock()
	defer m.running.Unlock()
	if err := m.command(ctx, "stop", nil); err != nil {
		return err
	}
	m.paused.Store(true)
	return nil
}

// Flush implements [vmm.Machine]. It does not pause the guest. While the guest runs it also prepares
// Save. Beside a Save it waits for the guest's disk writes.
func (m *Machine) Flush(ctx context.Context) error {
	var err error
	if m.paused.Load() {
		err = m.awaitSettled(ctx)
	} else {
		err = m.prepareSave(ctx)
	}
	if err != nil {
		return err
	}
	if err := m.memory.Collect(ctx); err != nil {
		return m.orExit(err)
	}
	return nil
}

func portSocket(port uint32) string { return fmt.Sprintf("vsock.sock_%d", port) }
func portName(port uint32) string   { return agent.PortName(port) }

// GuestConn implements [vmm.Machine]. The ports are virtio-serial ones; see [agent.Greet].
func (m *Machine) GuestConn(ctx context.Context, port uint32) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", m.launch.Dir.Socket(portSocket(port)))
	if err != nil {
		return nil, m.orExit(fmt.Errorf("connect to guest port %d: %w", port, err))
	}
	if err := agent.Greet(ctx, conn); err != nil {
		return nil, m.orExit(errors.Join(fmt.Errorf("guest port %d: %w", port, err), conn.Close()))
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
		if m.qmp != nil {
			m.qmp.close() // its error is that the connection ended
		}
		<-m.ended
	}
	if m.memory != nil {
		errs = append(errs, m.memory.Close())
	}
	errs = append(errs, m.endSave())
	for _, f := range []*os.File{m.incoming.w.Swap(nil), m.outgoing} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// socketPair returns our end and the child's end of a stream.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
	conn, err := net.FileConn(ours)
	if err = errors.Join(err, ours.Close()); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil
}

// openTap opens a tap device in the calling thread's network namespace.
func openTap(name, ns string) ([]*os.File, error) {
	if name == "" {
		return nil, nil
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w; load the tun module", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("interface name %q: %w", name, err), unix.Close(fd))
	}
	if _, err := net.InterfaceByName(name); err != nil {
		return nil, errors.Join(fmt.Errorf("interface %s does not exist in network namespace %q; start drafter nat", name, ns), unix.Close(fd))
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		if errors.Is(err, unix.EBUSY) {
			err = fmt.Errorf("another VM uses interface %s in network namespace %q; choose another --netns", name, ns)
		} else {
			err = fmt.Errorf("attach to interface %s in network namespace %q: %w", name, ns, err)
		}
		return nil, errors.Join(err, unix.Close(fd))
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("configure interface %s: %w", name, err), unix.Close(fd))
	}
	return []*os.File{os.NewFile(uintptr(fd), name)}, nil
}

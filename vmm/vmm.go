// Package vmm launches, pauses, saves and resumes virtual machines. It holds what all virtual
// machine monitors (VMMs) share: the driver interface, the package's config and state devices, and
// the directory of a VM. The drivers are in vmm/qemu and vmm/firecracker.
package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sort"
	"strings"
	"time"

	"github.com/google/uuid"

	"drafter/internal/memory"
)

// Reserved device names. Every other name is an extra disk, attached in list order after "disk".
// [Initrd] is no device of a package: its content lies behind that of the kernel; see
// [PackageConfig].
const (
	Kernel = "kernel"
	Disk   = "disk"
	State  = "state"
	Memory = "memory"
	Config = "config"
	Initrd = "initrd"
)

// Default ports of the guest's agent and liveness programs.
const (
	DefaultAgentPort    uint32 = 26
	DefaultLivenessPort uint32 = 25
)

// Accelerators a driver may be asked for; AccelAuto picks one that works on this host (see
// [Accelerator]).
const (
	AccelAuto = "auto"
	AccelKVM  = "kvm"
	AccelTCG  = "tcg"
)

// How it becomes known which pages a guest writes: the kernel notes them (since Linux 6.7, with
// QEMU), each first write is a fault that is answered, or whichever is there.
const (
	TrackAuto   = string(memory.TrackAuto)
	TrackScan   = string(memory.TrackScan)
	TrackFaults = string(memory.TrackFaults)
)

// How QEMU has the memory of a VM that starts here: it maps the file that memory is stored in
// privately (since Linux 6.7), it shares memory that is filled while the guest runs, or the first
// where that can be done.
const (
	BackingAuto    = string(memory.BackingAuto)
	BackingPrivate = string(memory.BackingPrivate)
	BackingShared  = string(memory.BackingShared)
)

// Block is one disk of a machine: the path the VMM opens and the device's name. Order in a slice is
// the order in the guest (vda, vdb, …).
type Block struct {
	Name string
	Path string
}

// Boot says how a machine starts from nothing.
type Boot struct {
	Kernel string // path of an ELF vmlinux
	Initrd string // path of a cpio archive, or "" for none
	Args   string // kernel command line
}

// Launch is what a driver needs to start a VMM process. Paths are absolute.
type Launch struct {
	Dir *Dir // the VM's own directory; the driver puts its sockets there

	Board
	Devices
	Confinement

	// serial console of the guest; nil discards. The guest waits for its writes, which one
	// goroutine makes
	Output io.Writer
	Input  io.Reader // nil: no input

	Logger *slog.Logger // nil: slog.Default()

	Boot   *Boot // nil: the machine waits for Restore
	Reboot *Boot // what a guest that reboots boots from; nil: the machine ends then

	// OnReboot, if not nil, is called when the guest boots again, with the last lines of its
	// console. again is true for a reboot that follows at once, as when firmware resets the
	// machine. OnReboot must not wait for the machine.
	OnReboot func(console string, again bool)

	// OnGoOn, if not nil, is called when a guest goes on after it stood still for a disk, with how
	// long it stood still. It must not wait for the machine.
	OnGoOn func(stood time.Duration)
}

// Board is the virtual hardware of a machine, without disks.
type Board struct {
	Accel string // AccelAuto, AccelKVM or AccelTCG
	CPU   string // CPU model or template to boot with; "" for the driver's default
	// the hardware that the state to restore was saved on; nil when booting. A driver that cannot
	// restore it fails.
	Recorded *Hardware

	CPUs       int
	MemorySize int64 // bytes
	HugePages  bool  // memory consists of pages of 2 MiB; the host must have set them aside

	Interface string // tap interface inside Netns; "" for no network
	MAC       string

	Ports []uint32 // guest ports reachable by [Machine.GuestConn]

	// Generation is the VM's generation ID (Microsoft's "Virtual Machine Generation ID"). A new one
	// tells the guest that others may go on from the same state, so that it makes new secrets.
	// Zero: any new one. Firecracker makes a new one at each restore, and ignores this.
	Generation uuid.UUID
}

// Devices are a machine's devices.
type Devices struct {
	// Memory is the memory device, which has MemorySize bytes. The caller owns it. It is nil when
	// the machine has memory of its own, or has it in MemoryFile. The drivers of this module need
	// the one that its components make.
	Memory MemoryDevice
	// path of a file for the memory of a machine that boots, of a driver that is a [FileBooter]
	MemoryFile string
	Tracking   string // how the guest's writes become known; "" for TrackAuto
	Backing    string // how the VMM has its memory; "" for BackingAuto
	// a restored machine's memory is loaded while the guest runs, not only the pages that the guest
	// touches
	FillMemory bool

	// path of the kernel device; a restore fills the same firmware slots with it as a boot
	Kernel string
	Disks  []Block
}

// Confinement says where, and as which user, a VMM runs.
type Confinement struct {
	Netns         string // name of a network namespace, "" for the caller's
	UID, GID      int    // user and group of the VMM process
	NUMANode      int
	CgroupVersion int // 1 or 2
	Limits        Limits
}

// MemoryDevice is the memory device of a VM. It is safe for concurrent use.
type MemoryDevice interface {
	io.ReaderAt
	io.WriterAt
	Size() int64 // bytes
	Sync() error
	Close() error
}

// MaxCPUs is more CPUs than any host has.
const MaxCPUs = 8192

// Limits bound what a VMM uses of its host. Zero fields have the meanings below.
type Limits struct {
	Memory int64   // bytes; 0 for no limit
	CPUs   float64 // of time, in CPUs, from 0.01 to MaxCPUs; 0 for no limit
	// processes and threads; below 0 for no limit, 0 for 1024 where the host can limit them
	PIDs int
}

// Hardware identifies the virtual hardware that a VM's saved state depends on. The package records
// it.
type Hardware struct {
	VMM     string `json:"vmm"`     // driver name: "qemu", "firecracker"
	Version string `json:"version"` // of the VMM binary, e.g. "7.2.22"
	Machine string `json:"machine"` // versioned machine type, e.g. "pc-q35-7.2"; never an alias
	CPU     string `json:"cpu"`     // CPU model or template
	Accel   string `json:"accel"`   // "kvm" or "tcg"
}

// Driver starts machines on one kind of VMM.
type Driver interface {
	// Name is the value of --vmm that picks the driver.
	Name() string
	// Launch starts a VMM process. With l.Boot the guest runs when Launch returns. Without it the
	// machine waits for Restore. ctx bounds the start only; the machine lives until Close.
	Launch(ctx context.Context, l Launch) (Machine, error)
}

// FileBooter is a [Driver] whose machines boot with their memory in [Devices].MemoryFile. Only
// restored ones have it in [Devices].Memory.
type FileBooter interface {
	BootsFromFile() bool
}

// SharesMemory tells whether a driver's machines map a file of the memory device. Others are only
// served it, page by page.
func (h *Host) SharesMemory(d Driver) bool { return !BootsFromFile(d) && !h.HugePages }

// BootsFromFile tells whether a driver is a [FileBooter].
func BootsFromFile(d Driver) bool {
	b, ok := d.(FileBooter)
	return ok && b.BootsFromFile()
}

// Checker is a [Driver] that can check in advance whether it would refuse a launch with recorded
// hardware. It reads only Accel and Recorded.
type Checker interface {
	Check(ctx context.Context, l Launch) error
}

// Installed is a [Driver] that can say which release of its VMM this host has. An error says what is
// missing, and how to mend it.
type Installed interface {
	Installed(ctx context.Context) (Version, error)
}

// Describer is a [Driver] that tells in advance which hardware a machine that boots would have.
type Describer interface {
	// Describe reads only Accel, CPU, HugePages and the number of Disks.
	Describe(ctx context.Context, l Launch) (Hardware, error)
}

// Describe tells which hardware a machine of a driver that boots would have, as far as that is known
// in advance.
func Describe(ctx context.Context, d Driver, l Launch) (Hardware, error) {
	if d, ok := d.(Describer); ok {
		return d.Describe(ctx, l)
	}
	return Hardware{VMM: d.Name()}, nil
}

// Machine is one running or paused VM. Wait and Close may be called at any time. Callers make the
// other calls one at a time, but Flush, unless it pauses (see [FlushPauser]), also beside Save.
type Machine interface {
	Hardware() Hardware
	// Restore loads what Save wrote; the machine is paused afterwards. Only for machines launched
	// without Boot, once.
	Restore(ctx context.Context, state io.Reader) error
	Resume(ctx context.Context) error
	// Pause stops all vCPUs, and flushes the guest's disk writes to their devices, before it
	// returns. After an error the guest may be paused all the same, until Resume.
	Pause(ctx context.Context) error
	// Flush makes every guest memory write up to now visible in the memory device.
	Flush(ctx context.Context) error
	// Save writes the paused machine's state, without memory and disks. It may itself write guest
	// memory: call Flush afterwards.
	Save(ctx context.Context, state io.Writer) error
	// GuestConn returns a connection with the program that serves port in the guest. It waits for
	// the program until ctx ends. At most one connection per port is open at a time. After it is
	// closed the program waits for the next.
	GuestConn(ctx context.Context, port uint32) (net.Conn, error)
	// Done is closed when the VMM has exited; Wait then tells how.
	Done() <-chan struct{}
	// Wait blocks until the VMM exits. It returns nil after a Close, or when the guest powered
	// itself off. Else it returns an error with the VMM's last words and the console's last lines.
	Wait() error
	// Close ends the VMM and frees what the driver created on the host. It is idempotent.
	Close() error
}

// FlushPauser is a [Machine] whose Flush may have to pause the guest.
type FlushPauser interface {
	FlushPauses() bool
}

// SavePauser is a [Machine] that can begin to save while it pauses.
type SavePauser interface {
	// PauseToSave is Pause, with Save to be called next, and returns when the guest stopped. The VMM
	// may still complete the guest's disk writes; a Flush beside Save waits for that. From then on
	// only Save writes guest memory, and nothing that Restore reads there. Resume takes it back.
	PauseToSave(ctx context.Context) (stopped time.Time, err error)
}

// EarlyWriter is what Save may be given to write a state to, after PauseToSave.
type EarlyWriter interface {
	io.Writer
	// WriteEarly is Write for a part that can be loaded before guest memory is complete.
	WriteEarly(p []byte) (int, error)
}

// Receiver is a [Machine] that can take its state in parts, while that is made elsewhere.
type Receiver interface {
	// Receive gets the machine ready for a state in parts. Its error may be an
	// [errors.ErrUnsupported]. Otherwise Restore need not have loaded all of the state when it
	// returns, and the error of Resume may be an [ErrNotRun].
	Receive(ctx context.Context) error
	// Load loads the next part of the state; Restore gets the rest, which is not empty. Guest memory
	// is complete, but for what the save may still write, or the part was written early.
	Load(ctx context.Context, part []byte) error
}

// ErrNotRun says that a guest has not run, and never will.
var ErrNotRun = errors.New("the VM has not run")

// Staller is a [Machine] whose VMM stops a guest that cannot use a disk, until it can.
type Staller interface {
	// Stalled tells whether the guest stands still for a disk. It is safe for concurrent use.
	Stalled() bool
}

// Meter is a [Machine] whose VMM has counters.
type Meter interface {
	// Metrics returns the last known values by name. It is safe for concurrent use.
	Metrics() map[string]float64
}

// Driver names for --vmm; VMMAuto takes the driver a package was made with, or QEMU for a new one.
const (
	VMMAuto        = "auto"
	VMMQEMU        = "qemu"
	VMMFirecracker = "firecracker"
)

// Drivers is the set of drivers a program was built with.
type Drivers []Driver

// Select returns the driver called name. For "auto" or "" it is the one called recorded, or the
// first one when nothing is recorded.
func (ds Drivers) Select(name, recorded string) (Driver, error) {
	if name == "" || name == VMMAuto {
		if recorded == "" && len(ds) > 0 {
			return ds[0], nil
		}
		name = recorded
	}
	names := make([]string, 0, len(ds))
	for _, d := range ds {
		if d.Name() == name {
			return d, nil
		}
		names = append(names, d.Name())
	}
	sort.Strings(names)
	return nil, fmt.Errorf("VMM %q is not supported by this build; choose one of: auto, %s", name, strings.Join(names, ", "))
}

// Package vmm launches, pauses, saves and resumes virtual machines. It holds what every virtual
// machine monitor (VMM) shares: the driver interface, the package's config and state devices, and
// the directory a VM lives in. The drivers are in vmm/qemu and its siblings.
package vmm

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sort"
	"strings"
	"time"

	"github.com/google/uuid"
)

// Reserved device names. Every other name is an extra disk, attached in list order after "disk".
// [Initrd] is none of a package's devices: its content is kept behind that of the kernel; see
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

// Launch is all a driver needs to start a VMM process. Paths are absolute.
type Launch struct {
	Dir *Dir // the VM's own directory; the driver puts its sockets there

	Board
	Devices
	Confinement

	Output io.Writer // serial console of the guest, which waits for it; nil discards. Written to from one goroutine.
	Input  io.Reader // nil: no input

	Logger *slog.Logger // nil: slog.Default()

	Boot   *Boot // nil: the machine waits for Restore
	Reboot *Boot // what a guest that reboots boots from, as a machine does by itself; nil: the machine ends then

	// OnReboot, if not nil, is called when the guest boots again, with the last lines of its
	// console. again is true for one that follows at once, as when firmware resets the machine on
	// its way. It must not wait for the machine.
	OnReboot func(console string, again bool)

	// OnGoOn, if not nil, is called when a guest goes on that stood still for a disk, with how long
	// it did. It must not wait for the machine.
	OnGoOn func(stood time.Duration)
}

// Board is the virtual hardware of a machine, disks apart.
type Board struct {
	Accel    string    // AccelAuto, AccelKVM or AccelTCG
	CPU      string    // CPU model or template to boot with; "" for the driver's default
	Recorded *Hardware // what the state to restore was saved on; nil when booting. What cannot restore it is refused.

	CPUs       int
	MemorySize int64 // bytes
	HugePages  bool  // whether memory consists of pages of 2 MiB; the host must have set them aside

	Interface string // tap interface inside Netns; "" for no network
	MAC       string

	Ports []uint32 // guest ports reachable by [Machine.GuestConn]

	// Generation is the VM's generation ID (Microsoft's "Virtual Machine Generation ID"): another
	// one tells the guest that it has gone on from the same state elsewhere, too, so that it makes
	// new secrets. Zero: any new one. Firecracker makes a new one at each restore, whatever this
	// is.
	Generation uuid.UUID
}

// Devices are a machine's devices.
type Devices struct {
	// Memory is the path of the memory device, already MemorySize bytes long. It is "" when the
	// driver is a [MemoryServer] and restores, or the machine has memory of its own.
	Memory       string
	MemoryDevice MemoryDevice // the memory device itself, for a MemoryServer that restores; it stays the caller's
	FillMemory   bool         // whether a MemoryServer brings all of memory into the guest behind it, not only what the guest touches

	Kernel string // path of the kernel device; on a restore it fills the same firmware slots as at boot
	Disks  []Block
}

// Confinement is where and as whom a VMM runs.
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

// Limits bound what a VMM uses of its host. Zero values mean that there is no such limit.
type Limits struct {
	Memory int64   // bytes; 0 for no limit
	CPUs   float64 // of time, in CPUs, from 0.01 to MaxCPUs; 0 for no limit
	PIDs   int     // processes and threads; below 0 for no limit, 0 for 1024 where the host can limit them
}

// Hardware identifies what a VM was built on, to the degree that its saved state depends on it. It
// is recorded in the package.
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
	// Launch starts a VMM process. With l.Boot the guest runs when Launch returns; without, the
	// machine waits for Restore. ctx bounds the start only; the machine lives until Close.
	Launch(ctx context.Context, l Launch) (Machine, error)
}

// MemoryServer is a [Driver] whose restored machines take their memory from [Launch.MemoryDevice],
// a page at a time and through this process: the device needs no path.
type MemoryServer interface {
	ServesMemory() bool
}

// ServesMemory tells whether a driver is a [MemoryServer].
func ServesMemory(d Driver) bool {
	s, ok := d.(MemoryServer)
	return ok && s.ServesMemory()
}

// Checker is a [Driver] that can tell beforehand whether a launch with a recorded hardware would be
// refused. Only Accel and Recorded are looked at.
type Checker interface {
	Check(ctx context.Context, l Launch) error
}

// Machine is one running or paused VM. Its methods are safe for concurrent use with Wait and Close;
// the others are called one at a time.
type Machine interface {
	Hardware() Hardware
	// Restore loads what Save wrote; the machine is paused afterwards. Only for machines launched
	// without Boot, once.
	Restore(ctx context.Context, state io.Reader) error
	Resume(ctx context.Context) error
	// Pause returns when no vCPU runs any more and all disk writes of the guest have been flushed
	// to their devices. After an error the guest may be paused all the same, until Resume.
	Pause(ctx context.Context) error
	// Flush makes every guest memory write up to now visible in the memory device and durable
	// there.
	Flush(ctx context.Context) error
	// Save writes the paused machine's state (all but memory and disks), and flushes memory
	// meanwhile. It may itself write guest memory: flush afterwards.
	Save(ctx context.Context, state io.Writer) error
	// GuestConn returns a connection with the program that serves port in the guest, waiting for
	// the program until ctx ends. At most one connection per port is open at a time; closing it
	// lets the program wait for the next.
	GuestConn(ctx context.Context, port uint32) (net.Conn, error)
	// Done is closed when the VMM has exited; Wait then tells how.
	Done() <-chan struct{}
	// Wait blocks until the VMM exits. It returns nil after a Close or when the guest powered
	// itself off, else an error that carries the VMM's last words and the console's last lines.
	Wait() error
	// Close ends the VMM and frees what the driver created on the host. It is idempotent.
	Close() error
}

// FlushPauser is a [Machine] whose Flush may have to pause the guest.
type FlushPauser interface {
	FlushPauses() bool
}

// Staller is a [Machine] whose VMM stops a guest that cannot use a disk, until it can.
type Staller interface {
	// Stalled tells whether the guest stands still for that. It is safe for concurrent use.
	Stalled() bool
}

// Meter is a [Machine] whose VMM counts what it does.
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
		if recorded == "" {
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

package vmm

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"

	"github.com/dustin/go-humanize"

	"drafter/internal/block"
	"drafter/internal/logging"
	"drafter/internal/memory"
)

// Host says where, and as which user, a VM runs.
type Host struct {
	Drivers Drivers // at least one
	VMM     string  // VMMAuto, "" for the same, or a driver's name
	Accel   string  // AccelAuto, "" for the same, AccelKVM or AccelTCG

	BaseDir       string    // parent of the VM's own directory (--chroot-base-dir); must be named
	Netns         string    // "" for no network namespace of its own
	UID, GID      int       // both 0: a user of the VM's own, see ClaimUser
	Users         UserRange // the ones that VMs get; zero: DefaultUsers
	NUMANode      int
	CgroupVersion int    // 1 or 2; 0: 2
	Limits        Limits // of the VMM
	// load all of a resumed VM's memory while it runs; for drivers that serve memory
	FillMemory bool
	Tracking   string // how the guest's writes become known: TrackAuto, "" for the same, …
	Backing    string // how QEMU has the memory of a VM that starts here: BackingAuto, "" for the same, …
	HugePages  bool   // the VM's memory consists of pages of 2 MiB
	MaxMemory  int64  // most bytes that a VM's memory may have; 0: as much as the host has
	KeepClock  bool   // the guest keeps its own time: its clock is not set after a resume
	// boot from the disks a VM that is started here, even if it could be resumed
	Boot bool

	NameServers []string // addresses that guests ask; none for the host's own
	// what the guest may open connections to, as network.Guest has it; nil: what the NAT lets guests
	Egress []string

	// guest console; nil discards. A writer that blocks or fails misses some of it, and delays
	// nobody
	Output io.Writer
	Input  io.Reader // nil for none

	Logger *slog.Logger // what is to be said of the VM, and of who runs it; nil: slog.Default()
}

// Complete fills in the defaults, and refuses invalid fields by their names.
func (h *Host) Complete() error {
	if len(h.Drivers) == 0 {
		return errors.New("Host.Drivers is empty; name the drivers of VMMs, such as qemu.Driver{}")
	}
	if slices.Contains(h.Drivers, nil) {
		return errors.New("Host.Drivers has one that is nil")
	}
	if _, err := h.Drivers.Select(h.VMM, ""); err != nil {
		return fmt.Errorf("Host.VMM: %w", err)
	}
	if u := h.Users; u.Count > 0 && (u.First == 0 && u.Count > 1 || uint64(u.First)+uint64(u.Count) >= 1<<32) {
		return fmt.Errorf("Host.Users is %d from %d on; it must neither begin with root nor end beyond the last user", u.Count, u.First)
	}
	switch h.Accel {
	case "", AccelAuto, AccelKVM, AccelTCG:
	default:
		return fmt.Errorf("Host.Accel is %q; choose auto, kvm or tcg", h.Accel)
	}
	if err := memory.Backing(h.Backing).Check(); err != nil {
		return fmt.Errorf("Host.Backing: %w", err)
	}
	if err := memory.Tracking(h.Tracking).Check(); err != nil {
		return fmt.Errorf("Host.Tracking: %w", err)
	}
	if h.MaxMemory < 0 {
		return errors.New("Host.MaxMemory must not be negative")
	}
	if h.BaseDir == "" {
		return errors.New("Host.BaseDir is empty; name a directory for VMs")
	}
	if h.UID < 0 || h.GID < 0 || int64(h.UID) >= 1<<32-1 || int64(h.GID) >= 1<<32-1 {
		return errors.New("Host.UID and Host.GID must be ids of a user and a group")
	}
	if c := h.Limits.CPUs; c != 0 && !(c >= 0.01 && c <= MaxCPUs) { // nor what is no number
		return fmt.Errorf("Host.Limits.CPUs is %v; choose 0.01 to %d, or 0 for no limit", c, MaxCPUs)
	}
	if h.Limits.Memory < 0 {
		return errors.New("Host.Limits.Memory must not be negative")
	}
	switch h.CgroupVersion {
	case 0:
		h.CgroupVersion = 2
	case 1, 2:
	default:
		return fmt.Errorf("Host.CgroupVersion is %d; choose 1 or 2", h.CgroupVersion)
	}
	h.Logger = logging.Or(h.Logger)
	return nil
}

// ClaimUser gives the VM a user of its own, unless the host names one. Close the user, which may be
// nil, after the VM's directory.
func (h *Host) ClaimUser() (*User, error) {
	if h.UID != 0 || h.GID != 0 {
		return nil, nil
	}
	u, err := ClaimUser(h.Users)
	if u != nil {
		h.UID, h.GID = u.ID, u.ID
	}
	return u, err
}

// CheckMemory refuses a VM with more bytes of memory than MaxMemory or, if that is 0, than the host
// has.
func (h *Host) CheckMemory(size int64) error {
	most := h.MaxMemory
	if most == 0 {
		var err error
		if most, err = block.HostMemory(); err != nil {
			return err
		}
	}
	if size > most {
		return fmt.Errorf("the VM has %s of memory, this host %s; allow it with --max-memory", humanize.IBytes(uint64(size)), humanize.IBytes(uint64(most)))
	}
	return nil
}

// DefaultBootArgs are arguments with which the kernels of Drafter's blueprints boot.
const DefaultBootArgs = "console=ttyS0 panic=1 pci=off modules=ext4 rootfstype=ext4 root=/dev/vda " +
	"i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd rootflags=rw printk.devkmsg=on " +
	"printk_ratelimit=0 printk_ratelimit_burst=0 clocksource=tsc nokaslr " +
	"lapic=notscdeadline tsc=unstable"

// Spec is the hardware of a VM that is to be booted.
type Spec struct {
	CPUs       int     // 0: 1
	MemorySize int64   // bytes; 0: 1 GiB
	CPU        string  // model of QEMU or template of Firecracker; "" for the driver's default
	BootArgs   string  // of the kernel; "": DefaultBootArgs
	Initrd     Section // of the kernel device; see [PackageConfig]

	Interface string // "" for no network
	MAC       string

	AgentPort, LivenessPort uint32 // 0: the guest has none

	ReadyOutput string // the guest is up only once its console has shown this; "" for nothing
}

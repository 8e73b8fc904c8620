package vmm

import (
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/dustin/go-humanize"

	"drafter/internal/block"
	"drafter/internal/logging"
)

// Host says where and as whom a VM runs, whichever VM it is.
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
	FillMemory    bool   // whether to bring all of a resumed VM's memory into it behind it, where the driver serves memory
	HugePages     bool   // whether a VM's memory consists of pages of 2 MiB
	MaxMemory     int64  // bytes that a VM's memory may have; 0: as much as the host has
	KeepClock     bool   // whether the guest keeps its own time, so that its clock is not set after a resume
	Boot          bool   // whether a VM that is started here boots from its disks, also if it could be resumed

	NameServers []string // IPv4 addresses that guests ask; none for the host's own

	Output io.Writer // guest console; nil discards. One that blocks or fails misses some of it, and holds nobody up.
	Input  io.Reader // nil for none

	Logger *slog.Logger // what is to be said of the VM, and of who runs it; nil: slog.Default()
}

// Complete fills in the defaults, and refuses what cannot work by the name of its field.
func (h *Host) Complete() error {
	if len(h.Drivers) == 0 {
		return errors.New("Host.Drivers is empty; name the drivers of VMMs, such as qemu.Driver{}")
	}
	if _, err := h.Drivers.Select(h.VMM, ""); err != nil {
		return fmt.Errorf("Host.VMM: %w", err)
	}
	if h.BaseDir == "" {
		return errors.New("Host.BaseDir is empty; name a directory for VMs")
	}
	if h.UID < 0 || h.GID < 0 {
		return errors.New("Host.UID and Host.GID must not be negative")
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
// nil, when the VM's directory has been closed.
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

// CheckMemory refuses a VM with more bytes of memory than this host is meant for.
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

// Spec is what a VM to boot shall consist of.
type Spec struct {
	CPUs       int     // 0: 1
	MemorySize int64   // bytes; 0: 1 GiB
	CPU        string  // model of QEMU or template of Firecracker; "" for the driver's default
	BootArgs   string  // of the kernel; "": DefaultBootArgs
	Initrd     Section // of the kernel device; see [PackageConfig]

	Interface string // "" for no network
	MAC       string

	AgentPort, LivenessPort uint32 // 0: the guest has none

	ReadyOutput string // the guest is up once its console has shown this, too; "" for nothing
}

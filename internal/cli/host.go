package cli

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"drafter/internal/memory"
	"drafter/internal/process"
	"drafter/network"
	"drafter/vmm"
	"drafter/vmm/firecracker"
	"drafter/vmm/qemu"
)

// hostFlags are the flags of snapshotter, runner and peer about where, and as which user, a VM
// runs.
type hostFlags struct {
	host          vmm.Host
	enableInput   bool
	enableOutput  bool
	resumeTimeout time.Duration

	firecrackerBin, jailerBin, qemuBin string

	maxMemory string
	memoryMax string
	cmd       *cobra.Command
}

func (h *hostFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	h.cmd = cmd
	f.StringVar(&h.host.VMM, "vmm", vmm.VMMAuto, "VMM to use: auto, qemu or firecracker")
	f.StringVar(&h.host.Accel, "accel", vmm.AccelAuto, "Accelerator to use: auto, kvm or tcg (emulation)")
	f.StringVar(&h.qemuBin, "qemu-bin", "", "QEMU binary (default: the one for this architecture)")
	f.StringVar(&h.firecrackerBin, "firecracker-bin", "firecracker", "Firecracker binary")
	f.StringVar(&h.jailerBin, "jailer-bin", "jailer", "Jailer binary (from Firecracker)")
	f.StringVar(&h.host.BaseDir, "chroot-base-dir", "out/vms", "Directory in which each VM gets one of its own")
	f.StringVar(&h.host.Netns, "netns", "ark0", "Network namespace to run the VMM in (leave empty for a VM without network)")
	f.StringSliceVar(&h.host.NameServers, "dns", nil, "Name servers that the guest asks, at most three addresses (default: the host's own at each start, also those behind a stub such as systemd-resolved's)")
	f.StringSliceVar(&h.host.Egress, "egress", nil, "What the guest may open connections to, of what the NAT lets it: allow, deny, or a list of subnets and names, each for all ports or with one (192.0.2.0/24,*.example.com,example.org:443/tcp); it holds on this host only, not where the VM moves to; see drafter nat (default allow)")
	f.IntVar(&h.host.UID, "uid", 0, "User ID for the VMM process (0, with --gid 0: one of --uid-range for each VM)")
	f.IntVar(&h.host.GID, "gid", 0, "Group ID for the VMM process")
	h.host.Users = vmm.DefaultUsers
	f.Var(&h.host.Users, "uid-range", "User IDs for VMs, FIRST-LAST, each used by one VM at a time (0-0: VMs run as root)")
	f.IntVar(&h.host.NUMANode, "numa-node", 0, "NUMA node to run the VMM in")
	f.IntVar(&h.host.CgroupVersion, "cgroup-version", 2, "Cgroup version to use: 1 or 2")
	f.StringVar(&h.memoryMax, "memory-max", "", "Most bytes of this host's memory that the VMM may use, the guest's included, such as 2GB; it is killed if it needs more (default no limit)")
	f.Float64Var(&h.host.Limits.CPUs, "cpus-max", 0, "Most CPU time that the VMM may use, in CPUs, 0.01 or more, such as 1.5 (0: no limit)")
	f.IntVar(&h.host.Limits.PIDs, "pids-max", process.DefaultPIDs, "Most processes and threads that the VMM may have (0: no limit)")
	f.BoolVar(&h.host.HugePages, "huge-pages", false, "Use pages of 2 MiB for the VM's memory, which the host must have set aside (vm.nr_hugepages)")
	f.BoolVar(&h.host.FillMemory, "fill-memory", true, "Load all of a resumed VM's memory while it runs, not only the pages that it touches; Firecracker only")
	f.StringVar(&h.host.Backing, "memory-backing", vmm.BackingAuto, "How QEMU has the memory of a VM that is started here: private (it maps the package's file, and costs what it writes; Linux 6.7), shared (a copy in memory, made while the VM runs) or auto")
	f.StringVar(&h.host.Tracking, "track-writes", vmm.TrackAuto, "How it becomes known which pages of memory the guest writes: scan (the kernel notes them, Linux 6.7 and QEMU only), faults (each first write is a fault) or auto")
	f.BoolVar(&h.host.KeepClock, "no-set-clock", false, "Leave the guest's clock alone after a resume or a move, for a guest that keeps its own time; with snapshotter, for all VMs of the package")
	f.BoolVar(&h.enableOutput, "enable-output", true, "Show the VM's console on stdout")
	f.BoolVar(&h.enableInput, "enable-input", false, "Pass stdin to the VM's console (in Drafter's OS a line there starts a shell)")
	f.DurationVar(&h.resumeTimeout, "resume-timeout", time.Minute, "Maximum amount of time to wait for the guest's agent and liveness, such as 90s (0: not at all)")
}

// orAtOnce keeps a timeout of 0 from standing for the default.
func orAtOnce(d time.Duration) time.Duration { return cmp.Or(d, -1) }

// addMaxMemory is for those who start a VM that others have made.
func (h *hostFlags) addMaxMemory(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&h.host.Boot, "boot", false, "Boot the VM from its disks, as after a power cut, even if it could be resumed: the content of its memory is lost")
	cmd.Flags().StringVar(&h.maxMemory, "max-memory", "", "Most bytes of memory that the VM may have, such as 64GB (default: this host's memory)")
}

// resolve completes the host. restore undoes its changes of the terminal.
func (h *hostFlags) resolve(stdout io.Writer) (host vmm.Host, restore func(), err error) {
	if err := requireRoot(); err != nil {
		return h.host, nil, err
	}
	host = h.host
	host.Drivers = vmm.Drivers{qemu.Driver{Bin: h.qemuBin}, firecracker.Driver{Bin: h.firecrackerBin, Jailer: h.jailerBin}}
	if _, err := host.Drivers.Select(host.VMM, ""); err != nil {
		return host, nil, &usageError{fmt.Errorf("--vmm: %w", err)}
	}
	if err := vmm.CheckBaseDir(host.BaseDir); err != nil {
		return host, nil, &usageError{err}
	}
	if len(host.NameServers) > 0 {
		if _, err := network.ResolverFor(host.NameServers, true); err != nil {
			return host, nil, &usageError{err}
		}
	}
	if err := network.CheckEgress(host.Egress); err != nil {
		return host, nil, &usageError{err}
	}
	if host.UID < 0 || host.GID < 0 {
		return host, nil, &usageError{errors.New("--uid and --gid must not be negative")}
	}
	if err := memory.Backing(host.Backing).Check(); err != nil {
		return host, nil, &usageError{fmt.Errorf("--memory-backing: %w", err)}
	}
	if err := memory.Tracking(host.Tracking).Check(); err != nil {
		return host, nil, &usageError{fmt.Errorf("--track-writes: %w", err)}
	}
	if host.MaxMemory, err = parseBytes("max-memory", h.maxMemory); err != nil {
		return host, nil, err
	}
	if host.Limits, err = h.limits(); err != nil {
		return host, nil, err
	}
	if h.enableOutput {
		host.Output = stdout
	}
	restore = func() {}
	if h.enableInput {
		input, r, err := openInput(false)
		if err != nil {
			return host, nil, err
		}
		host.Input, restore = input, r
	}
	if _, why, err := vmm.Accelerator(host.Accel); err == nil {
		slog.Debug("Chose accelerator", "why", why)
	}
	return host, restore, nil
}

// limits returns the VMM's limits. A limit that a flag gives must be available; the default is used
// only where the host can limit.
func (h *hostFlags) limits() (l vmm.Limits, err error) {
	l = h.host.Limits
	if l.Memory, err = parseBytes("memory-max", h.memoryMax); err != nil {
		return l, err
	}
	if l.CPUs != 0 && !(l.CPUs >= 0.01 && l.CPUs <= vmm.MaxCPUs) { // nor what is no number
		return l, &usageError{fmt.Errorf("--cpus-max must be from 0.01 to %d, or 0 for no limit", vmm.MaxCPUs)}
	}
	switch {
	case l.PIDs < 0:
		return l, &usageError{errors.New("--pids-max must not be negative")}
	case !h.cmd.Flags().Changed("pids-max"):
		l.PIDs = 0
	case l.PIDs == 0:
		l.PIDs = -1
	}
	return l, nil
}

func requireRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("this command needs root: it makes network namespaces, cgroups and VMs; run it with sudo")
	}
	return nil
}

// openInput makes stdin readable without blocking for ever. A terminal passes each key on at once
// and leaves echoing to the guest; Ctrl-C still is ours, unless the terminal is to be raw.
func openInput(raw bool) (*os.File, func(), error) {
	const stdin = 0
	flags, err := unix.FcntlInt(stdin, unix.F_GETFL, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open stdin: %w", err)
	}
	var saved *unix.Termios
	if t, err := unix.IoctlGetTermios(stdin, unix.TCGETS); err == nil {
		saved = t
		keys := *t
		keys.Lflag &^= unix.ICANON | unix.ECHO
		keys.Cc[unix.VMIN], keys.Cc[unix.VTIME] = 1, 0
		if raw { // as cfmakeraw(3) has it
			keys.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
			keys.Oflag &^= unix.OPOST
			keys.Lflag &^= unix.ECHONL | unix.ISIG | unix.IEXTEN
			keys.Cflag = keys.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
		}
		if err := unix.IoctlSetTermios(stdin, unix.TCSETS, &keys); err != nil {
			return nil, nil, fmt.Errorf("configure terminal: %w", err)
		}
	}
	if err := unix.SetNonblock(stdin, true); err != nil {
		return nil, nil, fmt.Errorf("open stdin: %w", err)
	}
	restore := func() {
		// Best effort for whoever reads the terminal after us.
		if saved != nil {
			if err := unix.IoctlSetTermios(stdin, unix.TCSETS, saved); err != nil {
				slog.Warn("The terminal's settings stay changed; run 'stty sane'", "error", err)
			}
		}
		if _, err := unix.FcntlInt(stdin, unix.F_SETFL, flags); err != nil {
			slog.Warn("stdin stays non-blocking", "error", err)
		}
	}
	fd, err := unix.Dup(stdin)
	if err != nil {
		restore()
		return nil, nil, fmt.Errorf("open stdin: %w", err)
	}
	return os.NewFile(uintptr(fd), "stdin"), restore, nil
}

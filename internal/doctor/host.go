package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/vmm"
)

// path is a file of the host.
func (h Host) path(name string) string { return filepath.Join("/", h.root, name) }

// read returns what a file of the kernel says, without the newline at its end; "" if it cannot be read.
func (h Host) read(name string) string {
	b, err := os.ReadFile(h.path(name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// release checks the kernel's.
func (h Host) release(context.Context) Result {
	const name, path = "kernel", "proc/sys/kernel/osrelease"
	text := h.read(path)
	var major, minor int
	if _, err := fmt.Sscanf(text, "%d.%d", &major, &minor); err != nil {
		return bad(
			name,
			fmt.Sprintf("/%s does not tell the release: %q", path, text),
			"mount /proc",
		)
	}
	text = "Linux " + text
	switch release := 1000*major + minor; {
	case release < 6001:
		return bad(name, text+": QEMU cannot share a VM's memory", "install Linux 6.1 or later")
	case release < 6007:
		return warning(
			name,
			text+": a VM that starts copies its memory",
			"install Linux 6.7 or later; VMs then map the package's memory, and start faster",
		)
	}
	return ok(name, text)
}

// virtualization checks KVM.
func (h Host) virtualization(context.Context) Result {
	const name = "kvm"
	f, err := os.OpenFile(h.path("dev/kvm"), os.O_RDWR, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return warning(
			name,
			"there is no /dev/kvm: VMs are emulated, which is slow",
			"turn virtualization on in the firmware (or nested virtualization, in a VM), and load kvm_intel or kvm_amd",
		)
	case err != nil:
		return warning(
			name,
			fmt.Sprintf("KVM is not usable (%v): VMs are emulated, which is slow", err),
			"give root access to /dev/kvm",
		)
	}
	if err := f.Close(); err != nil {
		return warning(name, err.Error(), "")
	}
	if _, err := os.Stat(h.path("sys/module/kvm_pvm")); err == nil {
		return warning(
			name,
			"KVM is provided by PVM, which runs PVM-aware guest kernels only: VMs are emulated",
			"use a host with hardware virtualization; with a PVM-aware blueprint, the low-level commands take --accel kvm",
		)
	}
	return ok(name, "KVM is usable")
}

// installed checks a VMM.
func (h Host) installed(ctx context.Context, name string, v vmm.Installed) Result {
	version, err := v.Installed(ctx)
	switch {
	case err == nil:
		return ok(name, version.String())
	case name == h.Drivers[0].Name():
		return bad(name, err.Error(), "install it, and see that it is on the daemon's PATH")
	}
	return ok(name, err.Error()+"; only --vmm "+name+" of the low-level commands needs it")
}

func (h Host) userfaultfd(context.Context) Result {
	const name = "userfaultfd"
	switch {
	case !h.kernel.tracks():
		return bad(
			name,
			"this process cannot use userfaultfd(2), or the kernel's does not write-protect memory",
			"run as root, outside of a container that forbids it, on a kernel with CONFIG_USERFAULTFD",
		)
	case !h.kernel.scans():
		return warning(
			name,
			"the kernel does not note which pages a VM writes: each first write is a fault during a move",
			"install Linux 6.7 or later",
		)
	}
	return ok(name, "the kernel serves memory, and notes what is written")
}

func (h Host) fuse(context.Context) Result {
	const name = "fuse"
	f, err := os.OpenFile(h.path("dev/fuse"), os.O_RDWR, 0)
	if err != nil {
		return bad(name, err.Error(), "run 'modprobe fuse'; in a container, give it /dev/fuse")
	}
	if err := f.Close(); err != nil {
		return bad(name, err.Error(), "")
	}
	return ok(name, "/dev/fuse is usable")
}

func (h Host) nftables(context.Context) Result {
	const name = "nftables"
	if err := h.kernel.nftables(); err != nil {
		return bad(name, err.Error(), "run as root, and load the kernel's module nf_tables")
	}
	return ok(name, "the kernel answers")
}

// firewalls checks the rules of others.
func (h Host) firewalls(context.Context) Result {
	const name = "firewalls"
	list, err := h.kernel.firewalls(h.NAT)
	if err != nil {
		return warning(name, "the rules of other firewalls cannot be read: "+err.Error(), "")
	}
	var texts, remedies []string
	for _, o := range list {
		texts = append(texts, o.Text)
		if !slices.Contains(remedies, o.Remedy) {
			remedies = append(remedies, o.Remedy)
		}
	}
	if len(list) > 0 {
		return warning(name, strings.Join(texts, "; "), strings.Join(remedies, "; "))
	}
	return ok(name, "none drops what VMs need")
}

// subnets checks the addresses of VMs beside those of the host and of other NATs.
func (h Host) subnets(context.Context) Result {
	const name = "networks"
	if err := h.kernel.subnets(h.NAT); err != nil {
		return bad(
			name,
			err.Error(),
			"start the daemon with other --host-veth-cidr and --namespace-veth-cidr",
		)
	}
	return ok(
		name,
		fmt.Sprintf("%s and %s are free for VMs", h.NAT.HostVethCIDR, h.NAT.NamespaceVethCIDR),
	)
}

func (h Host) cgroups(context.Context) Result {
	const name, lost = "cgroups", ": VMs have no limits"
	const remedy = "boot with cgroup version 2 alone (systemd.unified_cgroup_hierarchy=1), or let the container have its own"
	dir, have, err := h.kernel.controllers()
	if err != nil {
		return warning(name, err.Error()+lost, remedy)
	}
	for _, c := range []string{"memory", "cpu", "pids", "io"} {
		if !slices.Contains(have, c) {
			return warning(name, fmt.Sprintf("%s has no controller %s%s", dir, c, lost), remedy)
		}
	}
	return ok(name, "VMs get groups with limits below "+dir)
}

// What a VM of the default size needs.
const (
	wantedMemory = 1 << 30
	leastMemory  = 128 << 20
	wantedDisk   = 10 << 30
	leastDisk    = 1 << 30
)

// memory checks how much a further VM could have.
func (h Host) memory(context.Context) Result {
	const name = "memory"
	_, after, _ := strings.Cut(h.read("proc/meminfo"), "MemAvailable:")
	kib, err := strconv.ParseInt(strings.TrimSpace(strings.Split(after, "kB")[0]), 10, 64)
	if err != nil {
		return bad(name, "/proc/meminfo does not tell what is available", "mount /proc")
	}
	return room(
		name,
		kib<<10,
		leastMemory,
		wantedMemory,
		"available",
		"stop VMs or other programs, or add memory",
	)
}

func (h Host) disk(context.Context) Result {
	dir := h.Dir
	for ; ; dir = filepath.Dir(dir) { // the daemon makes it
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			break
		}
	}
	r, err := block.RoomAt(dir)
	if err != nil {
		return bad("disk", err.Error(), "")
	}
	return room(
		"disk",
		r.Free,
		leastDisk,
		wantedDisk,
		"free at "+h.Dir,
		"remove VMs ('drafter rm') or other files there, or start the daemon with another --dir",
	)
}

func room(name string, have, least, wanted int64, where, remedy string) Result {
	text := humanize.IBytes(uint64(have)) + " " + where
	switch {
	case have < least:
		return bad(name, text, remedy)
	case have < wanted:
		return warning(name, text, remedy)
	}
	return ok(name, text)
}

// oldest is a year before the first release.
const oldest = 2025

// clock checks whether the host's time is right, as far as the kernel knows.
func (h Host) clock(context.Context) Result {
	const name, remedy = "clock", "run chrony or systemd-timesyncd ('timedatectl set-ntp true')"
	if now := h.kernel.now(); now.Year() < oldest {
		return bad(
			name,
			"it is "+now.Format(
				"2006-01-02 15:04",
			)+": certificates of registries are not valid yet",
			remedy,
		)
	}
	var t unix.Timex
	if _, err := h.kernel.adjtimex(&t); err != nil {
		return warning(name, "ask the kernel for the clock: "+err.Error(), "")
	}
	if t.Status&unix.STA_UNSYNC != 0 {
		return warning(name, "no time server sets it; guests take their time from it", remedy)
	}
	return ok(name, "a time server sets it")
}

package qemu

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"drafter/vmm"
)

// Machine types. microvm is the fastest to start. Under emulation its kernel hangs now and then
// while it calibrates timers (it has neither HPET nor PM timer), so emulation takes q35. A q35 is
// named by version, because an alias means another machine on another host.
const (
	machineMicroVM = "microvm"
	machineQ35     = "pc-q35-"
)

// Default CPU models. They name features, never "host": every host that the VM moves to must have
// what it was booted with.
const (
	cpuTCG = "Nehalem-v1"
	cpuKVM = "Westmere-v1" // with AES; any x86 server since 2011 has its features
)

// PCI slots on a q35's root bus. Fixed, so that adding a device never moves another.
const (
	slotNet       = 0x2
	slotPorts     = 0x3
	slotRNG       = 0x4
	slotFirstDisk = 0x8
	slotLastDisk  = 0x1e // 0x1f is the chipset's
)

// microvm has eight virtio-mmio slots, three of which are ours.
const maxMicroVMDisks = 5

// The descriptors of every VMM process: those of the ports in their order, those of its memory (see
// memoryFiles), then the tap device if there is one.
const (
	fdQMP = 3 + iota
	fdConsole
	fdPorts
)

// chooseMachine returns the machine type for a new VM.
func chooseMachine(accel string, version vmm.Version, disks int) string {
	if accel == vmm.AccelKVM && disks <= maxMicroVMDisks {
		return machineMicroVM
	}
	return fmt.Sprintf("%s%d.%d", machineQ35, version.Major, version.Minor)
}

// arguments builds QEMU's command line.
func arguments(l *vmm.Launch, hw vmm.Hardware) ([]string, error) {
	micro := hw.Machine == machineMicroVM
	if micro && len(l.Disks) > maxMicroVMDisks {
		return nil, fmt.Errorf("a %s has room for %d disks, %d are given", hw.Machine, maxMicroVMDisks, len(l.Disks))
	}
	if most := slotLastDisk - slotFirstDisk + 1; len(l.Disks) > most {
		return nil, fmt.Errorf("a %s has room for %d disks, %d are given", hw.Machine, most, len(l.Disks))
	}
	a := &argumentList{micro: micro}
	machine := hw.Machine + ",memory-backend=memory"
	if micro {
		machine += ",acpi=on,rtc=on,isa-serial=on,pit=off,pic=off,x-option-roms=off,auto-kernel-cmdline=off"
	} else {
		machine += ",usb=off,vmport=off,smm=off,sata=off,smbus=off,graphics=off"
	}
	a.add("-name", "drafter:"+strings.ReplaceAll(l.Dir.Path(), ",", ",,"))
	a.add("-nodefaults")
	a.add("-no-user-config")
	if l.Reboot == nil {
		a.add("-no-reboot")
	}
	a.add("-display", "none")
	a.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	// a description of the state in JSON, which is for debugging only
	a.add("-machine", machine+",suppress-vmdesc=on")
	a.add("-accel", hw.Accel)
	a.add("-cpu", hw.CPU+withoutVirtualization)
	a.add("-smp", strconv.Itoa(l.CPUs))
	a.add("-m", fmt.Sprintf("%dB", l.MemorySize))
	size := strconv.FormatInt(l.MemorySize, 10)
	switch {
	case l.Memory == nil && l.Backing != vmm.BackingShared:
		a.add("-object", options("memory-backend-ram,id=memory", "size", size))
	case l.HugePages:
		a.add("-object", options("memory-backend-memfd,id=memory,share=on,hugetlb=on,hugetlbsize=2M", "size", size))
	default: // see serveMemory
		a.add("-object", options("memory-backend-memfd,id=memory,share=on", "size", size))
	}
	if !micro {
		guid := "auto"
		if l.Generation != uuid.Nil {
			guid = l.Generation.String()
		}
		a.add("-device", "vmgenid,guid="+guid)
	}
	a.add("-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", fdQMP))
	a.add("-mon", "chardev=qmp,mode=control")
	a.add("-chardev", fmt.Sprintf("socket,id=console,fd=%d", fdConsole))
	a.add("-serial", "chardev:console")
	a.add("-kernel", jailKernel)
	if boot := cmp.Or(l.Boot, l.Reboot); boot != nil { // the firmware finds these at a reset
		if boot.Initrd != "" {
			a.add("-initrd", jailInitrd)
		}
		a.add("-append", bootArgs(boot.Args, micro))
	}
	if l.Boot == nil {
		a.add("-incoming", "defer")
	}
	if l.Boot == nil || l.Memory != nil {
		a.add("-S")
	}

	if l.Interface != "" {
		a.add("-netdev", fmt.Sprintf("tap,id=net,fd=%d", fdPorts+len(l.Ports)+memoryFiles(l)))
		// No option ROM: nothing boots from the network.
		a.virtio("net", slotNet, "netdev=net,romfile=", "mac", l.MAC)
	}
	a.virtio("serial", slotPorts, "id=ports")
	for i, port := range l.Ports {
		a.add("-chardev", fmt.Sprintf("socket,id=port%d,server=on,wait=off,fd=%d", port, fdPorts+i))
		a.add("-device", fmt.Sprintf("virtserialport,bus=ports.0,nr=%d,chardev=port%d,name=%s", i+1, port, portName(port)))
	}
	a.add("-object", "rng-random,id=rng,filename=/dev/urandom")
	a.virtio("rng", slotRNG, "rng=rng")
	for i, d := range l.Disks {
		node := diskNode(i)
		a.add("-blockdev", options("driver=file,discard=unmap", "node-name", node+"-file", "filename", jailDisk(d.Name)))
		a.add("-blockdev", fmt.Sprintf("driver=raw,discard=unmap,node-name=%s,file=%s-file", node, node))
		// The serial is what /dev/disk/by-id shows; virtio carries 20 bytes of it.
		a.virtio("blk", slotFirstDisk+i, "drive="+node+",werror=stop,rerror=stop", "serial", d.Name[:min(20, len(d.Name))])
	}
	return a.list, nil
}

type argumentList struct {
	list  []string
	micro bool
}

func (a *argumentList) add(args ...string) { a.list = append(a.list, args...) }

// virtio adds a virtio device on the machine's bus: a PCI slot of a q35, an mmio transport of a
// microvm in order of appearance.
func (a *argumentList) virtio(kind string, slot int, rest string, pairs ...string) {
	if a.micro {
		rest = strings.TrimSuffix(rest, ",romfile=")
		a.add("-device", options("virtio-"+kind+"-device,"+rest, pairs...))
		return
	}
	a.add("-device", options(fmt.Sprintf("virtio-%s-pci,bus=pcie.0,addr=%#x,%s", kind, slot, rest), pairs...))
}

// options appends key=value pairs to a QEMU option string, doubling commas in the values as QEMU
// wants them.
func options(head string, pairs ...string) string {
	var b strings.Builder
	b.WriteString(head)
	for i := 0; i+1 < len(pairs); i += 2 {
		fmt.Fprintf(&b, ",%s=%s", pairs[i], strings.ReplaceAll(pairs[i+1], ",", ",,"))
	}
	return b.String()
}

// bootArgs removes arguments that would keep a q35 from its devices: "pci=off" is right only for
// machines without PCI.
func bootArgs(args string, micro bool) string {
	if micro {
		return args
	}
	var kept []string
	for _, a := range strings.Fields(args) {
		if a != "pci=off" {
			kept = append(kept, a)
		}
	}
	return strings.Join(kept, " ")
}

package daemon

import (
	"errors"
	"fmt"
	"os"

	"github.com/dustin/go-humanize"

	"drafter/api"
	"drafter/internal/block"
	cgroup "drafter/internal/process"
	"drafter/vmm"
)

// A VM's processes (its peer, the VMM, the forwarder) are in a cgroup of the VM's own. It bounds what
// a guest can make them use. It is there while the VM runs, whether or not a daemon does.

// What a VM may use beside what its guest has. It is far more than its processes are known to need
// (docs/limits.md), so that only a defect, or a guest that attacks them, is ended for it.
const (
	memoryOverhead = 512 << 20
	tcgOverhead    = 1 << 30 // QEMU's translations, where it emulates
	cpuOverhead    = 1       // disks, network, moves
)

// limiter returns the limits of a VM's group. dir is on the VM's disk.
type limiter func(r api.VM, dir string) (cgroup.Limits, cgroup.Bandwidth, error)

func limits(r api.VM, dir string) (cgroup.Limits, cgroup.Bandwidth, error) {
	l := cgroup.Limits{
		Memory: r.Memory + memoryOverhead, CPUs: float64(r.CPUs + cpuOverhead),
		PIDs: 2 * cgroup.DefaultPIDs, // of which the VMM can have half
	}
	if accel, _, err := vmm.Accelerator(vmm.AccelAuto); err != nil || accel == vmm.AccelTCG {
		l.Memory += tcgOverhead
	}
	b := cgroup.Bandwidth{Read: r.DiskRead, Write: r.DiskWrite}
	var err error
	if b.Read > 0 || b.Write > 0 {
		b.Disk, err = cgroup.DiskOf(dir)
	}
	return l, b, err
}

// groupPath is where a VM gets its group; "" if it gets none.
func (d *Daemon) groupPath(id string) string {
	if d.groups == "" {
		return ""
	}
	return cgroup.GroupPath(d.groups, id)
}

// findGroups finds out where VMs get groups: nowhere on a host that cannot limit them.
func (d *Daemon) findGroups() {
	base, _, err := cgroup.Controllers()
	if err == nil {
		err = d.tryGroup(base)
	}
	if err != nil {
		d.log.Warn(
			"VMs have no limits of memory, CPU time, processes and disk bandwidth on this host; see 'drafter doctor'",
			"reason",
			err,
		)
		return
	}
	d.groups = base
}

// tryGroup makes a group as VMs have, and removes it.
func (d *Daemon) tryGroup(base string) error {
	l, b, err := d.config.limits(api.VM{Memory: 1 << 30, CPUs: 1}, d.dir("vms"))
	if err != nil {
		return err
	}
	g, err := cgroup.NewGroup(base, fmt.Sprint("try-", os.Getpid()), l, b, d.log)
	var unavailable *cgroup.UnavailableError
	if errors.As(err, &unavailable) {
		return unavailable.Err
	}
	if err != nil {
		return err
	}
	return g.Remove()
}

// makeGroup makes the group that the VM's record names.
func (v *vm) makeGroup() error {
	r := v.look()
	if r.Cgroup == "" {
		return nil
	}
	l, b, err := v.d.config.limits(r, v.dir)
	if err == nil {
		_, err = cgroup.NewGroup(v.d.groups, r.ID, l, b, v.d.log)
	}
	if err != nil {
		return fmt.Errorf("limit VM %s: %w", r.Name, err)
	}
	return nil
}

// enterGroup returns the entrance of the VM's group; nil if the VM has none.
func (v *vm) enterGroup(r api.VM) (*os.File, error) {
	if r.Cgroup == "" {
		return nil, nil
	}
	g, err := cgroup.FindGroup(r.Cgroup, r.ID)
	if err == nil && g == nil {
		err = fmt.Errorf("cgroup %s of VM %s: %w", r.Cgroup, r.Name, os.ErrNotExist)
	}
	if err != nil {
		return nil, err
	}
	return g.Entrance()
}

// leaveGroup removes the VM's group, and tells whether the kernel has killed one of its processes for
// the limit of memory.
func (v *vm) leaveGroup(r api.VM) (outOfMemory bool, err error) {
	if r.Cgroup == "" {
		return false, nil
	}
	g, err := cgroup.FindGroup(r.Cgroup, r.ID)
	if g == nil || err != nil {
		return false, err
	}
	return g.OutOfMemory(), g.Remove()
}

func outOfMemory(r api.VM) string {
	return fmt.Sprintf(
		"the kernel has ended it, because its processes needed much more memory than the guest's %s; run it with more --memory",
		humanize.IBytes(uint64(r.Memory)),
	)
}

// checkSize refuses a VM that is too large for this host, or has limits that it cannot have.
func (d *Daemon) checkSize(r *api.Run) error {
	have, err := block.HostMemory()
	if err != nil {
		return err
	}
	switch {
	case r.Memory > have:
		return fmt.Errorf(
			"the VM is to have %s of memory, and this host has %s: %w",
			humanize.IBytes(uint64(r.Memory)),
			humanize.IBytes(uint64(have)),
			ErrInvalid,
		)
	case r.CPUs > vmm.MaxCPUs:
		return fmt.Errorf(
			"the VM is to have %d CPUs; it can have %d: %w",
			r.CPUs,
			vmm.MaxCPUs,
			ErrInvalid,
		)
	case r.DiskRead == 0 && r.DiskWrite == 0:
		return nil
	case d.groups == "":
		return fmt.Errorf(
			"this host cannot limit the disk bandwidth; see 'drafter doctor': %w",
			ErrInvalid,
		)
	}
	if _, _, err := d.config.limits(api.VM{DiskRead: r.DiskRead, DiskWrite: r.DiskWrite}, d.dir("vms")); err != nil {
		return fmt.Errorf("%w: %w", err, ErrInvalid)
	}
	return nil
}

package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dustin/go-humanize"

	"drafter/api"
	"drafter/internal/block"
	"drafter/internal/detached"
	cgroup "drafter/internal/process"
	"drafter/vmm"
)

// The process that owns a VM, and its VMM, are in a cgroup of the VM's own. It bounds what a guest can
// make them use. It is there while the VM runs, whether or not a daemon does. A VM that moves within the
// host has another one, as it has another seat: for a while there are two of each.

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

// groupPath is where a VM gets its group after so many moves; "" if it gets none. Another daemon of this
// machine, with other namespaces, may have the same VM.
func (d *Daemon) groupPath(id string, moves int) string {
	if d.groups == "" {
		return ""
	}
	return cgroup.GroupPath(d.groups, fmt.Sprintf("%s-%d-%x", id, moves, fingerprint(d.key.Certificate[0])[:4]))
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

// enterGroup makes the group that the VM has after so many moves, and returns its entrance; nil if it
// has none. No process of that seat lives.
func (v *vm) enterGroup(moves int) (*os.File, error) {
	r := v.look()
	path := v.d.groupPath(r.ID, moves)
	if path == "" {
		return nil, nil
	}
	l, b, err := v.d.config.limits(r, v.dir)
	var g *cgroup.Group
	if err == nil {
		g, err = cgroup.NewGroup(v.d.groups, filepath.Base(path), l, b, v.d.log)
	}
	if err != nil {
		return nil, fmt.Errorf("limit VM %s: %w", r.Name, err)
	}
	return g.Entrance()
}

// leaveGroup removes a group, unless its path is "", and tells whether the kernel has killed one of its
// processes for the limit of memory.
func leaveGroup(path string) (outOfMemory bool, err error) {
	if path == "" {
		return false, nil
	}
	g, err := cgroup.FindGroup(path, filepath.Base(path))
	if g == nil || err != nil {
		return false, err
	}
	return g.OutOfMemory(), g.Remove()
}

// leaveSeat removes the group of a seat that the VM does not have.
func (v *vm) leaveSeat(moves int) error {
	p, err := detached.Find(v.seatAfter(moves).lock())
	if err != nil {
		return err
	}
	if p != nil {
		return p.Close() // it still sends
	}
	_, err = leaveGroup(v.d.groupPath(v.look().ID, moves))
	return err
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

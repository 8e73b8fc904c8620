// Package doctor checks whether a host has what its VMs need, and says how to mend what it lacks. It
// changes nothing.
package doctor

import (
	"context"
	"time"

	"golang.org/x/sys/unix"

	"drafter/api"
	"drafter/internal/memory"
	"drafter/internal/process"
	"drafter/network"
	"drafter/vmm"
)

// Result is what a check has found.
type Result = api.Check

// Check looks at one thing. It returns soon after its context has ended.
type Check func(context.Context) Result

// Host is what the checks look at.
type Host struct {
	Dir     string // of the daemon, or a parent of it that exists
	NAT     network.NATConfig
	Drivers vmm.Drivers

	root   string // of /proc, /sys and /dev; "" for the real one
	kernel kernel
}

// kernel answers questions to the kernel that are no files.
type kernel struct {
	tracks, scans func() bool // writes to memory; see package memory
	nftables      func() error
	firewalls     func(network.NATConfig) ([]network.Obstacle, error)
	subnets       func(network.NATConfig) error
	controllers   func() (string, []string, error)
	adjtimex      func(*unix.Timex) (int, error)
	now           func() time.Time
}

// Checks are all that can be checked of a host by itself.
func (h Host) Checks() []Check {
	h.kernel = kernel{
		memory.CanTrack, memory.CanScan, network.CheckNftables, network.Firewalls, network.CheckSubnets, process.Controllers, unix.Adjtimex, time.Now,
	}
	return h.checks()
}

func (h Host) checks() []Check {
	list := []Check{h.release, h.virtualization}
	for _, d := range h.Drivers {
		if v, ok := d.(vmm.Installed); ok {
			list = append(
				list,
				func(ctx context.Context) Result { return h.installed(ctx, d.Name(), v) },
			)
		}
	}
	return append(
		list,
		h.userfaultfd,
		h.fuse,
		h.nftables,
		h.firewalls,
		h.subnets,
		h.cgroups,
		h.memory,
		h.disk,
		h.clock,
	)
}

// patience is how long a check may take.
const patience = 10 * time.Second

// Run makes checks, one after the other.
func Run(ctx context.Context, checks []Check) []Result {
	list := []Result{}
	for _, check := range checks {
		ctx, cancel := context.WithTimeout(ctx, patience)
		list = append(list, check(ctx))
		cancel()
	}
	return list
}

func ok(name, text string) Result { return Result{Name: name, Level: api.OK, Text: text} }

func warning(name, text, remedy string) Result {
	return Result{Name: name, Level: api.Warning, Text: text, Remedy: remedy}
}

func bad(name, text, remedy string) Result {
	return Result{Name: name, Level: api.Bad, Text: text, Remedy: remedy}
}

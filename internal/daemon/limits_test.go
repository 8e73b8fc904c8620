package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"drafter/api"
	"drafter/internal/await"
	"drafter/internal/need"
	cgroup "drafter/internal/process"
)

// noLimits lets VMs have groups also on hosts that cannot limit them.
func noLimits(api.VM, string) (cgroup.Limits, cgroup.Bandwidth, error) {
	return cgroup.Limits{PIDs: -1}, cgroup.Bandwidth{}, nil
}

// groupHas tells what is wrong with the group of a VM that runs.
func groupHas(vm api.VM) string {
	if vm.Cgroup == "" {
		return "" // this host has none
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", vm.PID))
	if err != nil || !strings.Contains(string(b), "/drafter/"+filepath.Base(vm.Cgroup)+"/members\n") {
		return fmt.Sprintf("VM %s is in %s, %v, instead of %s", vm.Name, b, err, vm.Cgroup)
	}
	return ""
}

// A VM's processes are in a group of its own while it runs, also beyond the daemon that started it.
func TestGroup(t *testing.T) {
	need.Root(t)
	dir := testDir(t)
	d := open(t, dir)
	if d.groups == "" {
		need.Lacks(t, "cgroup2", "no groups can be made here")
	}
	o, err := d.Run(api.Run{Image: "docker://image", Ports: []api.Port{{Host: 1000, Guest: 80}}})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	vm := d.VMs()[0]
	if problem := groupHas(vm); problem != "" || vm.Cgroup == "" {
		t.Error(problem)
	}
	if members, err := os.ReadFile(filepath.Join(vm.Cgroup, "members/cgroup.procs")); err != nil ||
		len(strings.Fields(string(members))) != 1 {
		t.Errorf("the peer is in it: %q, %v", members, err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	d = open(t, dir)
	if problem := groupHas(d.VMs()[0]); problem != "" {
		t.Error(problem)
	}
	gone := func(when string) {
		t.Helper()
		if _, err := os.Stat(vm.Cgroup); !errors.Is(err, os.ErrNotExist) ||
			d.VMs()[0].Cgroup != "" {
			t.Errorf("%s the group is there: %v, %s", when, err, d.VMs()[0].Cgroup)
		}
	}
	o, err = d.Stop("image")
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	gone("of a VM that was stopped")
	o, err = d.Start("image")
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if problem := groupHas(d.VMs()[0]); problem != "" {
		t.Error(problem)
	}
	o, err = d.Kill("image")
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	gone("of a VM that was killed")
	o, err = d.Remove("image", false)
	if err := errors.Join(d.done(t, o, err), d.Close()); err != nil {
		t.Error(err)
	}
}

// A VM that the kernel ends for its memory says so.
func TestOutOfMemory(t *testing.T) {
	need.Root(t)
	c := testConfig(testDir(t))
	c.limits = func(api.VM, string) (cgroup.Limits, cgroup.Bandwidth, error) {
		return cgroup.Limits{Memory: 64 << 20, PIDs: -1}, cgroup.Bandwidth{}, nil
	}
	t.Setenv("STAND_IN_EATS", fmt.Sprint(128<<20))
	d, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	if d.groups == "" {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		need.Lacks(t, "cgroup2", "no memory can be limited here")
	}
	o, err := d.Run(api.Run{Image: "docker://image"})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	vm := d.VMs()[0]
	await.True(t, "the VM has ended", func() bool { return d.VMs()[0].State == api.Failed })
	if now, err := d.VM(vm.ID); err != nil || now.State != api.Failed ||
		!strings.Contains(now.Error, "run it with more --memory") {
		t.Errorf("%+v, %v", now, err)
	}
	o, err = d.Remove(vm.ID, false)
	if err := errors.Join(d.done(t, o, err), d.Close()); err != nil {
		t.Error(err)
	}
}

// The limits leave room for what runs beside the guest.
func TestLimits(t *testing.T) {
	l, b, err := limits(api.VM{Memory: 1 << 30, CPUs: 2}, t.TempDir())
	if err != nil || l.Memory < 1<<30+memoryOverhead || l.CPUs != 3 ||
		l.PIDs != 2*cgroup.DefaultPIDs ||
		b != (cgroup.Bandwidth{}) {
		t.Errorf("%+v, %+v, %v", l, b, err)
	}
}

// What a host cannot give is refused before anything is made.
func TestTooLarge(t *testing.T) {
	dir := testDir(t)
	c := testConfig(dir)
	d, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		run  api.Run
		want string
	}{
		{api.Run{Image: "docker://image", Memory: 1 << 50}, "this host has"},
		{api.Run{Image: "docker://image", CPUs: 1 << 20}, "CPUs"},
	} {
		if _, err := d.Run(tt.run); !errors.Is(err, ErrInvalid) ||
			!strings.Contains(err.Error(), tt.want) ||
			strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: %v", tt.run, err)
		}
	}
	d.groups = ""
	if _, err := d.Run(api.Run{Image: "docker://image", DiskWrite: 1 << 20}); !errors.Is(
		err,
		ErrInvalid,
	) ||
		!strings.Contains(err.Error(), "disk bandwidth") {
		t.Error(err)
	}
	if entries, err := os.ReadDir(filepath.Join(dir, "lib/vms")); err != nil || len(entries) > 0 {
		t.Error("left:", entries, err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

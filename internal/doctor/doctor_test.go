package doctor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drafter/api"
	"drafter/internal/need"
	"drafter/network"
	"drafter/vmm"
)

// driver stands in for a VMM.
type driver struct {
	vmm.Driver
	name string
	err  error
}

func (d driver) Name() string { return d.name }

func (d driver) Installed(
	context.Context,
) (vmm.Version, error) {
	return vmm.Version{Major: 7}, d.err
}

// healthy is a host on which all is well.
func healthy(t *testing.T) Host {
	t.Helper()
	root := t.TempDir()
	for name, text := range map[string]string{
		"proc/sys/kernel/osrelease": "6.12.1-amd64\n",
		"proc/meminfo":              "MemTotal: 9000000 kB\nMemFree: 10 kB\nMemAvailable:    8000000 kB\n",
		"dev/kvm":                   "", "dev/fuse": "",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	yes := func() bool { return true }
	return Host{
		Dir: root, Drivers: vmm.Drivers{driver{name: "one"}, driver{name: "two"}}, root: root,
		kernel: kernel{
			tracks: yes, scans: yes, nftables: func() error { return nil },
			firewalls:   func(network.NATConfig) ([]network.Obstacle, error) { return nil, nil },
			subnets:     func(network.NATConfig) error { return nil },
			controllers: func() (string, []string, error) { return "/group", []string{"io", "cpu", "memory", "pids"}, nil },
			adjtimex:    func(*unix.Timex) (int, error) { return 0, nil }, now: time.Now,
		},
	}
}

// Each check can say that something is well, and what is not, with a remedy.
func TestChecks(t *testing.T) {
	write := func(name, text string) func(*Host) {
		return func(h *Host) {
			if err := os.WriteFile(h.path(name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(name string) func(*Host) {
		return func(h *Host) {
			if err := os.Remove(h.path(name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	no, failed := func() bool { return false }, errors.New("it failed")
	for what, tt := range map[string]struct {
		change      func(*Host)
		check, want string // "LEVEL text"
	}{
		"old kernel":     {write("proc/sys/kernel/osrelease", "5.10.0-1"), "kernel", "error Linux 5.10.0-1"},
		"kernel 6.0":     {write("proc/sys/kernel/osrelease", "6.0.19"), "kernel", "error Linux 6.0"},
		"kernel 6.1":     {write("proc/sys/kernel/osrelease", "6.1.0"), "kernel", "warning Linux 6.1.0: a VM that starts copies"},
		"kernel 6.7":     {write("proc/sys/kernel/osrelease", "6.7.0"), "kernel", "ok "},
		"kernel 10":      {write("proc/sys/kernel/osrelease", "10.0"), "kernel", "ok "},
		"no release":     {remove("proc/sys/kernel/osrelease"), "kernel", "error "},
		"no KVM":         {remove("dev/kvm"), "kvm", "warning there is no /dev/kvm"},
		"PVM":            {func(h *Host) { os.MkdirAll(h.path("sys/module/kvm_pvm"), 0o700) }, "kvm", "warning KVM is provided by PVM"},
		"no first VMM":   {func(h *Host) { h.Drivers[0] = driver{name: "one", err: failed} }, "one", "error it failed"},
		"no second VMM":  {func(h *Host) { h.Drivers[1] = driver{name: "two", err: failed} }, "two", "ok it failed; only --vmm two"},
		"no userfaultfd": {func(h *Host) { h.kernel.tracks = no }, "userfaultfd", "error "},
		"no scan":        {func(h *Host) { h.kernel.scans = no }, "userfaultfd", "warning "},
		"no FUSE":        {remove("dev/fuse"), "fuse", "error "},
		"no nftables":    {func(h *Host) { h.kernel.nftables = func() error { return failed } }, "nftables", "error it failed"},
		"a firewall":     {func(h *Host) { h.kernel.firewalls = dropping }, "firewalls", "warning chain a drops x; chain b drops y"},
		"unreadable firewall": {func(h *Host) {
			h.kernel.firewalls = func(network.NATConfig) ([]network.Obstacle, error) { return nil, failed }
		}, "firewalls", "warning the rules"},
		"subnets of others": {func(h *Host) { h.kernel.subnets = func(network.NATConfig) error { return failed } }, "networks", "error it failed"},
		"no cgroups":        {func(h *Host) { h.kernel.controllers = func() (string, []string, error) { return "", nil, failed } }, "cgroups", "warning it failed: VMs have no limits"},
		"not all controllers": {func(h *Host) {
			h.kernel.controllers = func() (string, []string, error) { return "/g", []string{"cpu", "io", "pids"}, nil }
		}, "cgroups", "warning /g has no controller memory"},
		"little memory":    {write("proc/meminfo", "MemAvailable: 900000 kB\n"), "memory", "warning 879 MiB available"},
		"no memory":        {write("proc/meminfo", "MemAvailable: 100 kB\n"), "memory", "error 100 KiB available"},
		"unknown memory":   {write("proc/meminfo", "MemTotal: 100 kB\n"), "memory", "error /proc/meminfo"},
		"a clock that ran": {func(h *Host) { h.kernel.now = func() time.Time { return time.Unix(60, 0).UTC() } }, "clock", "error it is 1970-01-01 00:01"},
		"free clock": {func(h *Host) {
			h.kernel.adjtimex = func(t *unix.Timex) (int, error) { t.Status = unix.STA_UNSYNC; return unix.TIME_ERROR, nil }
		}, "clock", "warning no time server"},
		"a directory to be made": {func(h *Host) { h.Dir = filepath.Join(h.Dir, "to/be/made") }, "disk", " free at "},
		"nothing":                {func(*Host) {}, "", ""},
	} {
		h := healthy(t)
		tt.change(&h)
		seen := false
		for _, r := range Run(t.Context(), h.checks()) {
			text := r.Level + " " + r.Text
			switch {
			case r.Name == tt.check:
				seen = true
				if !strings.Contains(text, tt.want) ||
					r.Level != api.OK && r.Name != "disk" && r.Remedy == "" &&
						what != "unreadable firewall" {
					t.Errorf("%s: %s (%s), want %q", what, text, r.Remedy, tt.want)
				}
			case r.Level != api.OK && r.Name != "disk": // that is this machine's
				t.Errorf("%s: %s: %s", what, r.Name, text)
			}
		}
		if !seen && tt.check != "" {
			t.Errorf("%s: nothing is called %s", what, tt.check)
		}
	}
}

func dropping(network.NATConfig) ([]network.Obstacle, error) {
	return []network.Obstacle{
		{Text: "chain a drops x", Remedy: "open it"},
		{Text: "chain b drops y", Remedy: "open it"},
	}, nil
}

// A disk is judged by what is free on it.
func TestDisk(t *testing.T) {
	need.Root(t)
	for size, want := range map[string]string{"20G": api.OK, "5G": api.Warning, "10M": api.Bad} {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
			t.Fatal(err)
		}
		r := Host{Dir: dir}.disk(t.Context())
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
		if r.Level != want {
			t.Errorf("%s: %+v, want %s", size, r, want)
		}
	}
}

// The real checks answer, whatever this host has.
func TestThisHost(t *testing.T) {
	nat := network.DefaultNAT()
	list := Run(t.Context(), Host{Dir: t.TempDir(), NAT: nat}.Checks())
	if len(list) != 11 {
		t.Errorf("%d results: %+v", len(list), list)
	}
	for _, r := range list {
		if r.Name == "" || r.Text == "" || r.Level == "" {
			t.Errorf("%+v", r)
		}
	}
}

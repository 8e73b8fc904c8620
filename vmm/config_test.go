package vmm

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

func validConfig() *PackageConfig {
	return &PackageConfig{
		Version: PackageVersion, ID: "0a0b0c0d-0000-4000-8000-000000000001", Created: time.Unix(0, 0).UTC(),
		Architecture: runtime.GOARCH, CPUs: 1, Hardware: Hardware{VMMQEMU, "7.2.22", "pc-q35-7.2", "Nehalem-v1", AccelTCG},
		Interface: "tap0", MAC: "02:0e:d9:fd:68:3d", AgentPort: 26, LivenessPort: 25, BootArgs: "console=ttyS0",
		Devices: []PackageDevice{
			{"oci", 4096}, {State, StateSize}, {Memory, 1 << 30}, {Kernel, 10}, {Disk, 8192}, {"mydisk", 5},
		},
	}
}

func TestPackageConfigRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.json")
	b, err := validConfig().Encode()
	if err != nil {
		t.Fatal(err)
	}
	// A block device pads it with zeros.
	if err := os.WriteFile(path, append(b, make([]byte, 4096)...), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := ReadPackageConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(c.Disks(), " "); got != "disk oci mydisk" {
		t.Errorf("disks are %q; the order is disk, then the others as listed", got)
	}
}

func TestPackageConfigRefused(t *testing.T) {
	change := func(f func(*PackageConfig)) string {
		c := validConfig()
		f(c)
		b, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for name, tt := range map[string]struct{ config, want string }{
		"empty":         {"", "not a package config"},
		"not JSON":      {"\x7fELF", "not a package config"},
		"truncated":     {change(func(*PackageConfig) {})[:100], "not a package config"},
		"no version":    {"{}", "no version"},
		"newer":         {`{"version": 2, "later": true}`, "package format 2 is not supported"},
		"unknown field": {`{"version": 1, "agentVSockPort": 26}`, `unknown field "agentVSockPort"`},
		"architecture":  {change(func(c *PackageConfig) { c.Architecture = "riscv64" }), "made for riscv64, this host is " + runtime.GOARCH},
		"no memory":     {change(func(c *PackageConfig) { c.Devices = c.Devices[:2] }), `device "memory" is missing`},
		"initrd":        {change(func(c *PackageConfig) { c.Initrd = &Section{Offset: 1 << 62, Size: 1 << 62} }), "of the kernel device"},
		"twice":         {change(func(c *PackageConfig) { c.Devices = append(c.Devices, c.Devices[0]) }), `device "oci" is listed twice`},
		"path as name":  {change(func(c *PackageConfig) { c.Devices[0].Name = "../etc" }), `"../etc" is not valid`},
		"negative size": {change(func(c *PackageConfig) { c.Devices[0].Size = -1 }), "has size -1"},
		"no CPU":        {change(func(c *PackageConfig) { c.CPUs = 0 }), "cpus is 0"},
		"one file":      {change(func(c *PackageConfig) { c.Devices[0].Name = "rootfs" }), "same file rootfs.ext4"},
		"config listed": {change(func(c *PackageConfig) { c.Devices[0].Name = Config }), "which no package lists"},
		"id":            {change(func(c *PackageConfig) { c.ID = "../../x" }), `id "../../x" is no UUID`},
		"vmm":           {change(func(c *PackageConfig) { c.Hardware.VMM = "/bin/sh" }), "hardware.vmm"},
		"version":       {change(func(c *PackageConfig) { c.Hardware.Version = "7.2.22,x" }), "hardware.version"},
		"machine":       {change(func(c *PackageConfig) { c.Hardware.Machine = "pc-q35-7.2,initrd=/etc/shadow" }), "hardware.machine"},
		"cpu":           {change(func(c *PackageConfig) { c.Hardware.CPU = "Nehalem /etc/shadow" }), "hardware.cpu"},
		"accel":         {change(func(c *PackageConfig) { c.Hardware.Accel = "tcg,tb-size=1" }), "hardware.accel"},
		"interface":     {change(func(c *PackageConfig) { c.Interface = "../tap0" }), "interface"},
		"long name":     {change(func(c *PackageConfig) { c.Interface = "tap0000000000000" }), "interface"},
		"MAC":           {change(func(c *PackageConfig) { c.MAC = "02:0e:d9:fd:68:3d,bus=x" }), "mac"},
		"multicast":     {change(func(c *PackageConfig) { c.MAC = "01:00:5e:00:00:01" }), "mac"},
		"boot args":     {change(func(c *PackageConfig) { c.BootArgs = "quiet\ninit=/bin/sh" }), "bootArgs"},
		"long args":     {change(func(c *PackageConfig) { c.BootArgs = strings.Repeat("a", 2048) }), "bootArgs"},
		"one port":      {change(func(c *PackageConfig) { c.AgentPort = 25 }), "share port 25"},
		"too long":      {strings.Repeat(" ", maxConfig+1), "longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := DecodePackageConfig([]byte(tt.config))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v; want one with %q", err, tt.want)
			}
		})
	}
}

// A device does not stand for another one's file, whatever it is called.
func TestPackageFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(c *PackageConfig) {
		t.Helper()
		b, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range c.Devices[:6] {
			if err := os.WriteFile(filepath.Join(dir, PackageFile(d.Name)), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, PackageFile(Config)), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(validConfig())
	if names, files, err := PackageFiles(dir); err != nil || len(names) != 7 || files["oci"] != "oci.ext4" {
		t.Errorf("%v, %v, %v", names, files, err)
	}
	for _, name := range []string{PackageFile(Config), PackageFile(Kernel), PackageFile(Memory), "oci.ext4"} {
		c := validConfig()
		c.Devices = append(c.Devices, PackageDevice{name, 5})
		write(c)
		if _, _, err := PackageFiles(dir); err == nil || !strings.Contains(err.Error(), "in the same file "+name) {
			t.Errorf("a device called %s: %v", name, err)
		}
	}
}

package vmm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"drafter/internal/block"
	"drafter/internal/private"
)

// PackageVersion is the version of the config device's format. A reader refuses any other.
const PackageVersion = 1

// maxConfig bounds what is read of a config device, in bytes.
const maxConfig = 1 << 20

// PackageConfig is the content of the config device, as JSON: all that a resume needs beside the
// other devices.
type PackageConfig struct {
	Version int       `json:"version"` // PackageVersion
	ID      string    `json:"id"`      // UUID of the package; the state device holds the same
	Created time.Time `json:"created"`

	Architecture string   `json:"architecture"` // as GOARCH: "amd64", "arm64"
	Hardware     Hardware `json:"hardware"`
	CPUs         int      `json:"cpus"`
	BootArgs     string   `json:"bootArgs"`

	Interface string `json:"interface"` // tap interface in the namespace
	MAC       string `json:"mac"`

	AgentPort    uint32 `json:"agentPort"`
	LivenessPort uint32 `json:"livenessPort"`

	// Initrd is the place of the initramfs in the kernel device, behind the kernel. With a size of
	// 0 the VM boots without one. nil in packages of older releases, which did not keep it: these
	// can be resumed only.
	Initrd *Section `json:"initrd,omitempty"`

	// Devices lists the package's devices in the order they were given, config excepted. Disks keep
	// this order in the guest.
	Devices []PackageDevice `json:"devices"`
}

// PackageDevice is one device of a package.
type PackageDevice struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
}

// Section is a part of a device.
type Section struct {
	Offset int64 `json:"offset"` // bytes
	Size   int64 `json:"size"`   // bytes
}

// Device returns the device called name.
func (c *PackageConfig) Device(name string) (PackageDevice, bool) {
	for _, d := range c.Devices {
		if d.Name == name {
			return d, true
		}
	}
	return PackageDevice{}, false
}

// Disks returns the names of the disks in guest order: "disk", then the extra ones.
func (c *PackageConfig) Disks() []string {
	names := make([]string, len(c.Devices))
	for i, d := range c.Devices {
		names[i] = d.Name
	}
	return DiskOrder(names)
}

// DiskOrder returns the disks among names, in the order in which a guest sees them.
func DiskOrder(names []string) []string {
	var disks []string
	for _, n := range names {
		if n == Disk {
			disks = append(disks, n)
		}
	}
	for _, n := range names {
		switch n {
		case Kernel, Disk, State, Memory, Config, Initrd:
		default:
			disks = append(disks, n)
		}
	}
	return disks
}

// Encode returns the config device's content.
func (c *PackageConfig) Encode() ([]byte, error) {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode package config: %w", err)
	}
	return append(b, '\n'), nil
}

// ReadPackageConfig reads and checks the config device at path. Zero bytes after the JSON (the
// padding of a block device) are ignored.
func ReadPackageConfig(path string) (*PackageConfig, error) {
	f, err := private.Open(path, os.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("open config device: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, fmt.Errorf("read config device %s: %w", path, err)
	}
	c, err := DecodePackageConfig(b)
	if err != nil {
		return nil, fmt.Errorf("config device %s: %w", path, err)
	}
	return c, nil
}

// DecodePackageConfig checks the content of a config device; see [ReadPackageConfig].
func DecodePackageConfig(b []byte) (*PackageConfig, error) {
	if len(b) > maxConfig {
		return nil, fmt.Errorf("longer than %d bytes, so it is no package config", maxConfig)
	}
	b = bytes.TrimRight(b, "\x00")
	var v struct {
		Version *int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, fmt.Errorf("not a package config: %w", err)
	}
	if v.Version == nil {
		return nil, errors.New("not a package config: it has no version")
	}
	if *v.Version != PackageVersion {
		return nil, fmt.Errorf("package format %d is not supported (this build reads %d); make the package again with drafter snapshotter", *v.Version, PackageVersion)
	}
	c := &PackageConfig{}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(c); err != nil {
		return nil, fmt.Errorf("not a package config: %w", err)
	}
	return c, c.validate()
}

func (c *PackageConfig) validate() error {
	if c.Architecture != runtime.GOARCH {
		return fmt.Errorf("the package was made for %s, this host is %s; make one from a blueprint for %s", c.Architecture, runtime.GOARCH, runtime.GOARCH)
	}
	if c.CPUs < 1 || c.CPUs > 1024 {
		return fmt.Errorf("cpus is %d, not in 1…1024", c.CPUs)
	}
	if err := c.checkFields(); err != nil {
		return err
	}
	seen, files := map[string]bool{}, map[string]string{}
	for _, d := range c.Devices {
		if d.Name == Config || d.Name == Initrd {
			return fmt.Errorf("device %q is listed, which no package lists", d.Name)
		}
		if err := CheckDeviceName(d.Name); err != nil {
			return err
		}
		if seen[d.Name] {
			return fmt.Errorf("device %q is listed twice", d.Name)
		}
		if other, ok := files[PackageFile(d.Name)]; ok {
			return fmt.Errorf("devices %q and %q would be in the same file %s", other, d.Name, PackageFile(d.Name))
		}
		seen[d.Name], files[PackageFile(d.Name)] = true, d.Name
		if d.Size <= 0 {
			return fmt.Errorf("device %q has size %d", d.Name, d.Size)
		}
	}
	for _, n := range []string{State, Memory, Kernel, Disk} {
		if !seen[n] {
			return fmt.Errorf("device %q is missing", n)
		}
	}
	kernel, _ := c.Device(Kernel)
	if s := c.Initrd; s != nil && (s.Offset < 0 || s.Size < 0 || s.Size > kernel.Size || s.Offset > kernel.Size-s.Size) {
		return fmt.Errorf("initrd is %d bytes at %d of the kernel device, which has %d", s.Size, s.Offset, kernel.Size)
	}
	return nil
}

// PackageFile is the usual name of a device's file in a package's directory.
func PackageFile(device string) string {
	switch device {
	case Kernel:
		return "vmlinux"
	case Disk:
		return "rootfs.ext4"
	case State:
		return "state.bin"
	case Memory:
		return "memory.bin"
	case Config:
		return "config.json"
	}
	return device + ".ext4"
}

// PackageFiles returns the names of the devices of the package in dir, and each one's file name
// there.
func PackageFiles(dir string) (names []string, files map[string]string, err error) {
	config, err := ReadPackageConfig(filepath.Join(dir, PackageFile(Config)))
	if err != nil {
		return nil, nil, err
	}
	names, files = []string{Config}, map[string]string{}
	for _, d := range config.Devices {
		names = append(names, d.Name)
	}
	taken := map[string]string{}
	for _, name := range names {
		file, err := findPackageFile(dir, name)
		if err != nil {
			return nil, nil, err
		}
		if other, ok := taken[file]; ok {
			return nil, nil, fmt.Errorf("devices %q and %q would be in the same file %s", other, name, file)
		}
		files[name], taken[file] = file, name
	}
	return names, files, nil
}

func findPackageFile(dir, name string) (string, error) {
	candidates := []string{PackageFile(name)}
	if candidates[0] == name+".ext4" {
		candidates = append(candidates, name+".img", name+".bin", name)
	}
	for _, c := range candidates {
		path := filepath.Join(dir, c)
		if _, err := os.Stat(path); err == nil || block.PartlyPulled(path) {
			return c, nil
		}
	}
	return "", fmt.Errorf("package %s has no file %s for device %s; name its file with --device name=%s,base=…", dir, filepath.Join(dir, candidates[0]), name, name)
}

// CheckDeviceName refuses names that no file could have. A device's name has 1 to 64 letters,
// digits, '-', '_' or '.', and does not start with a dot.
func CheckDeviceName(name string) error {
	ok := len(name) >= 1 && len(name) <= 64 && name[0] != '.'
	for _, r := range name {
		ok = ok && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
	}
	if !ok {
		return fmt.Errorf("device name %q is not valid: use 1 to 64 letters, digits, '-', '_' or '.'", name)
	}
	return nil
}

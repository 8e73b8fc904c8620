package vmmtest

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/google/uuid"

	"drafter/vmm"
)

// Size is that of all devices of a package but its state, in bytes.
const Size = 64 << 10

// AgentPort is where the agent of a package's guest is.
const AgentPort = vmm.DefaultAgentPort

// WritePackage makes the package of a suspended machine in dir, whose guest has an agent and no
// network, and can boot. It returns the paths of its devices.
func WritePackage(t testing.TB, dir string) (paths map[string]string, config *vmm.PackageConfig) {
	t.Helper()
	config = &vmm.PackageConfig{
		Version: vmm.PackageVersion, ID: uuid.NewString(), Created: time.Now().UTC(),
		Architecture: runtime.GOARCH, Hardware: Hardware, CPUs: 1, AgentPort: AgentPort, Initrd: &vmm.Section{},
	}
	paths = map[string]string{}
	saved := binary.LittleEndian.AppendUint64(nil, 1)
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.Memory, vmm.State} {
		size := int64(Size)
		if name == vmm.State {
			size = vmm.StateSize
		}
		config.Devices = append(config.Devices, vmm.PackageDevice{Name: name, Size: size})
		paths[name] = filepath.Join(dir, vmm.PackageFile(name))
		f, err := os.OpenFile(paths[name], os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		err = f.Truncate(size)
		switch {
		case err != nil:
		case name == vmm.State:
			err = vmm.WriteState(f, config.ID, saved)
		case name == vmm.Memory:
			_, err = f.WriteAt(saved, 0)
		default:
			_, err = f.WriteAt([]byte(name), 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	b, err := config.Encode()
	if err != nil {
		t.Fatal(err)
	}
	paths[vmm.Config] = filepath.Join(dir, vmm.PackageFile(vmm.Config))
	if err := os.WriteFile(paths[vmm.Config], b, 0o600); err != nil {
		t.Fatal(err)
	}
	return paths, config
}

// Host is one for machines of a driver, with nothing of root's.
func Host(t testing.TB, d *Driver) vmm.Host {
	t.Helper()
	dir, err := os.MkdirTemp("", "vms-") // short enough for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return vmm.Host{Drivers: vmm.Drivers{d}, BaseDir: dir, Users: vmm.UserRange{Count: 1}}
}

// Status is what the state device at path says.
func Status(t testing.TB, path string) vmm.Status {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	status, _, _, err := vmm.StateStatus(f)
	if err != nil {
		t.Fatal(err)
	}
	return status
}

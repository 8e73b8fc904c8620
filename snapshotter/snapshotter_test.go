package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/need"
	"drafter/internal/scratch"
	"drafter/internal/vmmtest"
	"drafter/vmm"
)

// TestMain is also a snapshotter that has lent files to its VM's user, and is killed.
func TestMain(m *testing.M) {
	if base := os.Getenv("LEND_IN"); base != "" {
		d, err := vmm.CreateDir(base, "test", nil)
		for _, path := range os.Args[1:] {
			if err == nil {
				err = d.Lend(path, int(vmm.DefaultUsers.First), int(vmm.DefaultUsers.First), true)
			}
		}
		if err == nil {
			err = unix.Kill(os.Getpid(), unix.SIGKILL)
		}
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

var errBroken = errors.New("broken")

// What a killed snapshotter has lent to the user of its VM does not stop the next one.
func TestKilledSnapshotter(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	out := func(name string) string { return filepath.Join(dir, "out", name) }
	driver := &vmmtest.Driver{T: t}
	driver.FailAt(vmmtest.Launch, errBroken)
	c := Config{
		Host: vmm.Host{Drivers: vmm.Drivers{driver}, BaseDir: filepath.Join(dir, "vms")},
		Spec: vmm.Spec{CPUs: 1, MemorySize: 64 << 20}, Timeout: time.Minute,
	}
	exe, err := os.Executable()
	if err = errors.Join(err, os.Mkdir(filepath.Join(dir, "out"), 0o700)); err != nil {
		t.Fatal(err)
	}
	left, err := scratch.New(filepath.Join(dir, "out"), scratchPrefix)
	if err != nil {
		t.Fatal(err)
	}
	users := filepath.Join(dir, "out", vmm.Disk+".partial") // somebody's file
	if err := os.WriteFile(users, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	var args []string // files that are lent
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory, vmm.Config} {
		d := Device{Name: name, Output: out(name)}
		if name == vmm.Kernel || name == vmm.Disk {
			d.Input = exe // an ELF file of this architecture
		}
		c.Devices = append(c.Devices, d)
		if name == vmm.Disk || name == vmm.Memory {
			args = append(args, filepath.Join(left.Name(), name))
			if err := os.WriteFile(filepath.Join(left.Name(), name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	killed := exec.Command(exe, args...)
	killed.Env = append(os.Environ(), "LEND_IN="+c.Host.BaseDir)
	if out, err := killed.CombinedOutput(); err == nil || len(out) > 0 {
		t.Fatalf("%v: %s", err, out)
	}
	var st unix.Stat_t
	if err := unix.Stat(args[0], &st); err != nil || st.Uid != vmm.DefaultUsers.First {
		t.Fatalf("the file was not lent: %d, %v", st.Uid, err)
	}
	if err := left.Abandon(); err != nil {
		t.Fatal(err)
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Run(t.Context()); !errors.Is(err, errBroken) {
		t.Errorf("the next one ends with %v; want it to come to its VMM", err)
	}
	if b, err := os.ReadFile(users); err != nil || string(b) != "mine" {
		t.Errorf("somebody's file is %q, %v", b, err)
	}
	if entries, err := os.ReadDir(filepath.Join(dir, "out")); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// Who names /dev/null as an output does not lose it.
func TestOutputIsAFile(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	host := vmmtest.Host(t, &vmmtest.Driver{T: t})
	c := Config{Host: host, Spec: vmm.Spec{CPUs: 1, MemorySize: 64 << 20}, Devices: []Device{
		{Name: vmm.Kernel, Input: exe, Output: filepath.Join(dir, "kernel")},
		{Name: vmm.Disk, Input: exe, Output: filepath.Join(dir, "disk")},
		{Name: vmm.State, Output: fifo},
		{Name: vmm.Memory, Output: filepath.Join(dir, "memory")},
		{Name: vmm.Config, Output: filepath.Join(dir, "config")},
	}}
	if _, err := New(c); err == nil || !strings.Contains(err.Error(), "device state: "+fifo) {
		t.Error(err)
	}
}

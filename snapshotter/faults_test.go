package snapshotter

import (
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"drafter/internal/instance"
	"drafter/internal/vmmtest"
	"drafter/vmm"
)

// shot is a package that is to be made.
type shot struct {
	driver *vmmtest.Driver
	config Config
	out    string // the directory of the package
	before int    // files in it
}

// newShot has a blueprint, and a driver. A package made before may be in the way.
func newShot(t *testing.T, before bool) *shot {
	t.Helper()
	dir := t.TempDir()
	s := &shot{driver: &vmmtest.Driver{T: t}, out: filepath.Join(dir, "out")}
	kernel, disk := filepath.Join(dir, "kernel"), filepath.Join(dir, "disk")
	if err := errors.Join(os.WriteFile(kernel, elfFile(t), 0o600), os.WriteFile(disk, make([]byte, vmmtest.Size), 0o600), os.Mkdir(s.out, 0o700)); err != nil {
		t.Fatal(err)
	}
	s.config = Config{
		Host: vmmtest.Host(t, s.driver), Timeout: time.Minute,
		Spec: vmm.Spec{CPUs: 1, MemorySize: 64 << 20, AgentPort: vmmtest.AgentPort},
	}
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory, vmm.Config} {
		d := Device{Name: name, Output: filepath.Join(s.out, vmm.PackageFile(name))}
		switch name {
		case vmm.Kernel:
			d.Input = kernel
		case vmm.Disk:
			d.Input = disk
		}
		s.config.Devices = append(s.config.Devices, d)
		if before {
			if err := os.WriteFile(d.Output, []byte("of before"), 0o600); err != nil {
				t.Fatal(err)
			}
			s.before++
		}
	}
	return s
}

// elfFile is an ELF file of this architecture, as a kernel is, with nothing in it.
func elfFile(t *testing.T) []byte {
	t.Helper()
	machine := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[runtime.GOARCH]
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT), Ehsize: 64}
	copy(h.Ident[:], elf.ELFMAG+"\x02\x01\x01")
	b, err := binary.Append(nil, binary.LittleEndian, h)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (s *shot) run(ctx context.Context, t *testing.T) error {
	t.Helper()
	shooter, err := New(s.config)
	if err != nil {
		t.Fatal(err)
	}
	_, err = shooter.Run(ctx)
	if !s.driver.AllClosed() {
		t.Error("a VMM is left")
	}
	return err
}

func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// untouched says that the package of before is there, or none, and nothing else.
func (s *shot) untouched(t *testing.T) {
	t.Helper()
	names := files(t, s.out)
	if len(names) != s.before {
		t.Errorf("there are %q; want %d files", names, s.before)
	}
	for _, name := range names {
		if b, err := os.ReadFile(filepath.Join(s.out, name)); err != nil || string(b) != "of before" {
			t.Errorf("%s holds %d bytes, %v", name, len(b), err)
		}
	}
	if names := files(t, s.config.Host.BaseDir); slices.ContainsFunc(names, func(n string) bool { return n != vmmtest.Name && n != ".drafter" }) {
		t.Errorf("VMs have left %q", names)
	}
	if names, err := filepath.Glob(filepath.Join(s.config.Host.BaseDir, vmmtest.Name, "*")); err != nil || len(names) > 0 {
		t.Errorf("VMs have left %q, %v", names, err)
	}
}

// A package that is made is one that can be opened, over what was there before.
func TestMade(t *testing.T) {
	for _, before := range []bool{false, true} {
		s := newShot(t, before)
		if err := s.run(t.Context(), t); err != nil {
			t.Fatal(err)
		}
		paths := instance.Paths{}
		for _, d := range s.config.Devices {
			paths[d.Name] = d.Output
		}
		if names := files(t, s.out); len(names) != len(paths) {
			t.Errorf("there are %q", names)
		}
		if c, err := instance.Open(paths); err != nil || c.Hardware != vmmtest.Hardware {
			t.Errorf("its config: %+v, %v", c, err)
		}
		if got := vmmtest.Status(t, paths[vmm.State]); got != vmm.Suspended {
			t.Errorf("its state says %d", got)
		}
		steps := s.driver.Steps()
		save := slices.Index(steps, vmmtest.Save)
		if save < 0 || !slices.Contains(steps[save:], vmmtest.Flush) { // the save writes memory
			t.Errorf("the VMM was asked to %v", steps)
		}
	}
}

// Whatever fails, what was there before is there still, and nothing else.
func TestFails(t *testing.T) {
	at := func(step vmmtest.Step, do func(*vmmtest.Machine) error) func(*shot, context.CancelCauseFunc) {
		return func(s *shot, _ context.CancelCauseFunc) {
			s.driver.At = func(_ context.Context, at vmmtest.Step, m *vmmtest.Machine) error {
				if at == step {
					return do(m)
				}
				return nil
			}
		}
	}
	broken := func(*vmmtest.Machine) error { return errBroken }
	for _, tt := range []struct {
		name  string
		cause func(s *shot, cancel context.CancelCauseFunc)
		want  string
	}{
		{"launch", at(vmmtest.Launch, broken), "boot: broken"},
		{"guest connection", at(vmmtest.GuestConn, broken), "wait for the guest's agent: broken"},
		{"ready", at(vmmtest.Ready, broken), "broken"},
		{"before-suspend", at(vmmtest.BeforeSuspend, broken), "broken"},
		{"pause", at(vmmtest.Pause, broken), "suspend: broken"},
		{"save", at(vmmtest.Save, broken), "suspend: broken"},
		{"flush", at(vmmtest.Flush, broken), "suspend: broken"},
		{"close", at(vmmtest.Close, broken), "broken"},
		{"a guest that powers off as it boots", at(vmmtest.GuestConn, func(m *vmmtest.Machine) error {
			_, err := io.WriteString(m.Launched.Output, "no init found\n")
			m.Exit(nil)
			return errors.Join(err, errBroken)
		}), "broken"},
		{"a VMM that ends as the guest is asked", at(vmmtest.Ready, func(m *vmmtest.Machine) error {
			m.Exit(errors.New("the VMM was killed"))
			return errBroken
		}), "the VMM was killed"},
		{"a VMM that ends as it saves", at(vmmtest.Save, func(m *vmmtest.Machine) error {
			m.Exit(errors.New("the VMM was killed"))
			return errBroken
		}), "the VMM was killed"},
		{"a silent guest", func(s *shot, _ context.CancelCauseFunc) {
			s.driver.Silent = true
			s.config.Timeout = time.Millisecond
		}, "pass a longer --resume-timeout"},
		{"the user", func(s *shot, cancel context.CancelCauseFunc) {
			s.driver.Silent = true
			s.driver.At = func(_ context.Context, at vmmtest.Step, _ *vmmtest.Machine) error {
				if at == vmmtest.GuestConn {
					cancel(errors.New("the user has had enough"))
				}
				return nil
			}
		}, "the user has had enough"},
		{"a console without the text", func(s *shot, cancel context.CancelCauseFunc) {
			s.config.Spec.ReadyOutput = "login:"
			s.driver.At = func(_ context.Context, at vmmtest.Step, _ *vmmtest.Machine) error {
				if at == vmmtest.Launch {
					cancel(errors.New("the user has had enough"))
				}
				return nil
			}
		}, `wait for "login:" on the guest's console: the user has had enough`},
		{"an input that has gone", func(s *shot, _ context.CancelCauseFunc) {
			s.config.Progress = func(string, int64, int64) {}
			s.config.Devices[1].Input = "/nowhere/disk"
		}, "device disk: input: "},
		{"memory that is more than allowed", func(s *shot, _ context.CancelCauseFunc) {
			s.config.Host.Limits.Memory = 1 << 20
		}, "--memory-max is 1.0 MiB"},
		{"an unknown VMM", func(s *shot, _ context.CancelCauseFunc) { s.config.Host.VMM = "other" }, `VMM "other" is not supported`},
		{"kernel arguments that are none", func(s *shot, _ context.CancelCauseFunc) { s.config.Spec.BootArgs = "a\x00b" }, "boot: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // one waits for a guest that may be powering off
			s := newShot(t, true)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			tt.cause(s, cancel)
			shooter, err := New(s.config)
			if err == nil {
				_, err = shooter.Run(ctx)
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			if !s.driver.AllClosed() {
				t.Error("a VMM is left")
			}
			s.untouched(t)
		})
	}
}

// A guest that has ended before it was ready is quoted.
func TestEndsEarly(t *testing.T) {
	s := newShot(t, false)
	s.config.Spec.ReadyOutput = "login:"
	s.config.Host.Drivers = vmm.Drivers{ending{s.driver}}
	err := s.run(t.Context(), t)
	if !errors.Is(err, vmm.ErrPoweredOff) || !strings.Contains(err.Error(), "before it was ready") || !strings.Contains(err.Error(), "no init found") {
		t.Errorf("error %v", err)
	}
	s.untouched(t)
}

// ending is a driver whose guests print a line and power off at once.
type ending struct{ *vmmtest.Driver }

func (d ending) Launch(ctx context.Context, l vmm.Launch) (vmm.Machine, error) {
	m, err := d.Driver.Launch(ctx, l)
	if err != nil {
		return nil, err
	}
	_, err = io.WriteString(l.Output, "no init found\n")
	m.(*vmmtest.Machine).Exit(nil)
	return m, err
}

// Two packages are not made in one directory at once.
func TestTwiceAtOnce(t *testing.T) {
	s := newShot(t, false)
	other := *s
	other.config.Host = vmmtest.Host(t, &vmmtest.Driver{T: t})
	s.driver.At = func(_ context.Context, at vmmtest.Step, _ *vmmtest.Machine) error {
		if at == vmmtest.Launch {
			if err := other.run(t.Context(), t); err == nil || !strings.Contains(err.Error(), "a package is being made in") {
				t.Errorf("the second ends with %v", err)
			}
		}
		return nil
	}
	if err := s.run(t.Context(), t); err != nil {
		t.Error(err)
	}
}

// An output that something gets in the way of meanwhile leaves nothing that could be resumed.
func TestInTheWay(t *testing.T) {
	s := newShot(t, true)
	disk := filepath.Join(s.out, vmm.PackageFile(vmm.Disk))
	s.driver.At = func(_ context.Context, at vmmtest.Step, _ *vmmtest.Machine) error {
		if at == vmmtest.Save {
			return errors.Join(os.Remove(disk), os.Mkdir(disk, 0o700))
		}
		return nil
	}
	if err := s.run(t.Context(), t); err == nil || !strings.Contains(err.Error(), "publish device disk: ") {
		t.Errorf("error %v", err)
	}
	if names := files(t, s.out); slices.Contains(names, vmm.PackageFile(vmm.State)) || slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, scratchPrefix) }) {
		t.Errorf("there are %q", names)
	}
}

// What cannot be a package is refused before anything is touched.
func TestRefused(t *testing.T) {
	device := func(s *shot, name string) *Device {
		return &s.config.Devices[slices.IndexFunc(s.config.Devices, func(d Device) bool { return d.Name == name })]
	}
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, s *shot)
		want   string
	}{
		{"a device twice", func(_ *testing.T, s *shot) { s.config.Devices = append(s.config.Devices, s.config.Devices[0]) }, "listed twice"},
		{"no memory", func(_ *testing.T, s *shot) {
			s.config.Devices = slices.DeleteFunc(s.config.Devices, func(d Device) bool { return d.Name == vmm.Memory })
		}, `device "memory" is missing`},
		{"no CPU", func(_ *testing.T, s *shot) { s.config.Spec.CPUs = -1 }, "cpu count is -1"},
		{"little memory", func(_ *testing.T, s *shot) { s.config.Spec.MemorySize = 63 << 20 }, "memory size is 63 MB"},
		{"one port for two", func(_ *testing.T, s *shot) { s.config.Spec.LivenessPort = s.config.Spec.AgentPort }, "share port"},
		{"ports that are none", func(_ *testing.T, s *shot) { s.config.ReadyPorts = "80,http" }, "ready ports: "},
		{"a state with an input", func(_ *testing.T, s *shot) { device(s, vmm.State).Input = "state" }, "device state has an input"},
		{"an initrd with an output", func(_ *testing.T, s *shot) {
			s.config.Devices = append(s.config.Devices, Device{Name: vmm.Initrd, Input: "initrd", Output: "initrd"})
		}, "device initrd has an output"},
		{"an initrd that is not there", func(_ *testing.T, s *shot) {
			s.config.Devices = append(s.config.Devices, Device{Name: vmm.Initrd, Input: "/nowhere/initrd"})
		}, "device initrd: input: "},
		{"a disk without an input", func(_ *testing.T, s *shot) { device(s, vmm.Disk).Input = "" }, "device disk has no input"},
		{"a disk that is a directory", func(t *testing.T, s *shot) { device(s, vmm.Disk).Input = t.TempDir() }, "is a directory"},
		{"a kernel that is none", func(_ *testing.T, s *shot) { device(s, vmm.Kernel).Input = device(s, vmm.Disk).Input }, "device kernel: input "},
		{"no output", func(_ *testing.T, s *shot) { device(s, vmm.Memory).Output = "" }, "device memory has no output"},
		{"two outputs in one", func(_ *testing.T, s *shot) { device(s, vmm.Memory).Output = device(s, vmm.State).Output }, "have the same output"},
		{"an input that is the output", func(_ *testing.T, s *shot) { device(s, vmm.Disk).Output = device(s, vmm.Disk).Input }, "are the same file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newShot(t, true)
			tt.change(t, s)
			if _, err := New(s.config); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			s.untouched(t)
		})
	}
}

package runner

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"drafter/internal/vmmtest"
	"drafter/vmm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errBroken = errors.New("broken")

// run is a package, and what runs it.
type run struct {
	driver *vmmtest.Driver
	paths  map[string]string
	config Config
}

func newRun(t *testing.T) *run {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "package")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r := &run{driver: &vmmtest.Driver{T: t}}
	r.paths, _ = vmmtest.WritePackage(t, dir)
	r.config = Config{Host: vmmtest.Host(t, r.driver), ResumeTimeout: time.Minute, RescueTimeout: time.Minute}
	for _, name := range slices.Sorted(maps.Keys(r.paths)) {
		r.config.Devices = append(r.config.Devices, Device{Name: name, Path: r.paths[name]})
	}
	return r
}

// open makes the runner, which is closed at the end of the test.
func (r *run) open(t *testing.T) *Runner {
	t.Helper()
	runner, err := New(r.config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := runner.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if !r.driver.AllClosed() {
			t.Error("a VMM is left")
		}
	})
	return runner
}

func (r *run) resume(t *testing.T) *Runner {
	t.Helper()
	runner := r.open(t)
	if err := runner.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	return runner
}

func (r *run) status(t *testing.T, want vmm.Status) {
	t.Helper()
	if got := vmmtest.Status(t, r.paths[vmm.State]); got != want {
		t.Errorf("the state device says %d; want %d", got, want)
	}
}

// again runs the package once more, from its suspended state if boots is false, and suspends it.
func (r *run) again(t *testing.T, boots bool) {
	t.Helper()
	before := len(r.driver.Machines())
	r.driver.At, r.driver.Silent = nil, false
	r.config.ResumeTimeout, r.config.RescueTimeout = time.Minute, time.Minute
	runner, err := New(r.config)
	if err != nil {
		t.Fatal(err)
	}
	if err := runner.Resume(t.Context()); err != nil {
		t.Errorf("the next run: %v", err)
	} else if got := r.driver.Machines()[before].Launched.Boot != nil; got != boots {
		t.Errorf("the next run boots: %t; want %t", got, boots)
	} else if err := runner.Suspend(t.Context()); err != nil {
		t.Errorf("the next run: %v", err)
	}
	if err := runner.Close(); err != nil {
		t.Errorf("the next run: %v", err)
	}
	r.status(t, vmm.Suspended)
}

// Whatever fails while a package is resumed, nothing is left on the host, and the next run goes on
// from the package, unless a vCPU may have run without that its memory was saved.
func TestResumeFails(t *testing.T) {
	for _, tt := range []struct {
		at     vmmtest.Step
		want   string     // in the error
		status vmm.Status // of the package afterwards
		boots  bool       // whether the next run does
	}{
		{vmmtest.Launch, "resume: broken", vmm.Suspended, false},
		{vmmtest.Restore, "--boot starts the VM from its disks", vmm.Suspended, false},
		{vmmtest.Resume, "resume: broken", vmm.Running, true},
		{vmmtest.GuestConn, "wait for the guest's agent: broken", vmm.Suspended, false},
		{vmmtest.AfterResume, "broken", vmm.Suspended, false},
	} {
		t.Run(string(tt.at), func(t *testing.T) {
			r := newRun(t)
			r.driver.FailAt(tt.at, errBroken)
			runner := r.open(t)
			if err := runner.Resume(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			if err := runner.Close(); err != nil {
				t.Error(err)
			}
			if !r.driver.AllClosed() {
				t.Error("a VMM is left")
			}
			r.status(t, tt.status)
			r.again(t, tt.boots)
		})
	}
}

// A guest whose agent is silent is suspended again, and not lost; so is one whose user gives up.
func TestSilentAgent(t *testing.T) {
	for name, end := range map[string]func(*run, context.CancelFunc){
		"for too long": func(r *run, _ context.CancelFunc) { r.config.ResumeTimeout = time.Nanosecond },
		"until one gives up": func(r *run, cancel context.CancelFunc) {
			r.driver.At = func(_ context.Context, s vmmtest.Step, _ *vmmtest.Machine) error {
				if s == vmmtest.GuestConn {
					cancel()
				}
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRun(t)
			r.driver.Silent = true
			r.config.RescueTimeout = time.Millisecond // for the agent, which is asked again
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			end(r, cancel)
			runner := r.open(t)
			if err := runner.Resume(ctx); err == nil || !strings.Contains(err.Error(), "wait for the guest's agent") {
				t.Errorf("error %v", err)
			}
			r.status(t, vmm.Suspended)
			if err := runner.Close(); err != nil {
				t.Error(err)
			}
			r.again(t, false)
		})
	}
}

// A VM whose suspend fails runs on, and can be suspended once the cause is gone.
func TestSuspendFails(t *testing.T) {
	broken := func(step vmmtest.Step) func(*testing.T, *run) func() {
		return func(_ *testing.T, r *run) func() {
			r.driver.FailAt(step, errBroken)
			return func() { r.driver.At = nil }
		}
	}
	for _, tt := range []struct {
		name  string
		cause func(t *testing.T, r *run) (mend func())
		want  string
	}{
		{"pause", broken(vmmtest.Pause), "suspend: broken"},
		{"save", broken(vmmtest.Save), "suspend: broken"},
		{"flush", broken(vmmtest.Flush), "suspend: broken"},
		{"a disk that is gone", func(t *testing.T, r *run) func() {
			away := r.paths[vmm.Disk] + ".away"
			if err := os.Rename(r.paths[vmm.Disk], away); err != nil {
				t.Fatal(err)
			}
			return func() {
				if err := os.Rename(away, r.paths[vmm.Disk]); err != nil {
					t.Fatal(err)
				}
			}
		}, "suspend: device disk"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRun(t)
			runner := r.resume(t)
			mend := tt.cause(t, r)
			if err := runner.Suspend(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			m := r.driver.Machines()[0]
			select {
			case <-runner.Done():
				t.Fatal("the VM has ended")
			default:
			}
			if !m.Running() {
				t.Error("the guest does not go on")
			}
			r.status(t, vmm.Running)
			if runner.Agent() == nil {
				t.Error("its agent was not told")
			}
			mend()
			if err := runner.Suspend(t.Context()); err != nil {
				t.Errorf("once more: %v", err)
			}
			if err := runner.Close(); err != nil {
				t.Error(err)
			}
			r.status(t, vmm.Suspended)
			r.again(t, false)
		})
	}
}

// What fails beside the VM is told, but the VM is saved.
func TestSuspendComplains(t *testing.T) {
	for _, step := range []vmmtest.Step{vmmtest.BeforeSuspend, vmmtest.Close} {
		t.Run(string(step), func(t *testing.T) {
			r := newRun(t)
			runner := r.resume(t)
			r.driver.FailAt(step, errBroken)
			if err := runner.Suspend(t.Context()); err == nil || !strings.Contains(err.Error(), errBroken.Error()) {
				t.Errorf("error %v", err)
			}
			r.status(t, vmm.Suspended)
			if err := runner.Close(); err != nil {
				t.Error(err)
			}
			r.again(t, false)
		})
	}
}

// A VMM that ends in the middle of a suspend is named as the cause, and its VM boots next.
func TestVMMEnds(t *testing.T) {
	for _, step := range []vmmtest.Step{vmmtest.Pause, vmmtest.Save} {
		t.Run(string(step), func(t *testing.T) {
			r := newRun(t)
			runner := r.resume(t)
			exit := errors.New("the VMM was killed")
			r.driver.At = func(_ context.Context, s vmmtest.Step, m *vmmtest.Machine) error {
				if s == step {
					m.Exit(exit)
				}
				return nil
			}
			if err := runner.Suspend(t.Context()); !errors.Is(err, exit) {
				t.Errorf("error %v; want %v", err, exit)
			}
			if err := runner.Wait(); !errors.Is(err, exit) {
				t.Errorf("it ended with %v", err)
			}
			if err := runner.Close(); err != nil {
				t.Error(err)
			}
			r.status(t, vmm.Running)
			r.again(t, true)
		})
	}
}

// A guest that powers itself off leaves nothing to resume, and boots next.
func TestPowersOff(t *testing.T) {
	r := newRun(t)
	runner := r.resume(t)
	r.driver.Machines()[0].Exit(nil)
	<-runner.Done()
	if err := runner.Wait(); err != nil {
		t.Error(err)
	}
	r.status(t, vmm.PoweredOff)
	if err := runner.Close(); err != nil {
		t.Error(err)
	}
	r.again(t, true)
}

// What cannot be a package, or would overwrite it, is refused before anything is touched.
func TestRefused(t *testing.T) {
	device := func(r *run, name string) *Device {
		return &r.config.Devices[slices.IndexFunc(r.config.Devices, func(d Device) bool { return d.Name == name })]
	}
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, r *run)
		want   string
	}{
		{"a device twice", func(_ *testing.T, r *run) {
			r.config.Devices = append(r.config.Devices, r.config.Devices[0])
		}, "listed twice"},
		{"a name that is a path", func(_ *testing.T, r *run) { device(r, vmm.Disk).Name = "../disk" }, "not valid"},
		{"no config", func(_ *testing.T, r *run) { r.config.Devices = r.config.Devices[1:] }, `device "config" is missing`},
		{"no path", func(_ *testing.T, r *run) { device(r, vmm.Disk).Path = "" }, "device disk has no path"},
		{"a missing device", func(_ *testing.T, r *run) {
			r.config.Devices = slices.DeleteFunc(r.config.Devices, func(d Device) bool { return d.Name == vmm.Disk })
		}, "device disk of the package is missing"},
		{"a device too many", func(_ *testing.T, r *run) {
			r.config.Devices = append(r.config.Devices, Device{Name: "more", Path: r.paths[vmm.Disk]})
		}, "device more is not part of the package"},
		{"a truncated device", func(t *testing.T, r *run) {
			if err := os.Truncate(r.paths[vmm.Memory], vmmtest.Size-1); err != nil {
				t.Fatal(err)
			}
		}, fmt.Sprintf("is truncated: %d bytes instead of %d", vmmtest.Size-1, vmmtest.Size)},
		{"a config that is none", func(t *testing.T, r *run) {
			if err := os.WriteFile(r.paths[vmm.Config], []byte("{}"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "not a package config"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRun(t)
			tt.change(t, r)
			if _, err := New(r.config); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			if len(r.driver.Steps()) > 0 {
				t.Errorf("the driver was asked to %v", r.driver.Steps())
			}
			r.status(t, vmm.Suspended)
		})
	}
}

// A package is one run's.
func TestInUse(t *testing.T) {
	r := newRun(t)
	r.resume(t)
	other, err := New(r.config)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Resume(t.Context()); err == nil || !strings.Contains(err.Error(), "run a copy of the package") {
		t.Errorf("a second run: %v", err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	if n := len(r.driver.Machines()); n != 1 {
		t.Errorf("%d VMMs were started", n)
	}
}

// A call out of order is refused, and changes nothing.
func TestOrder(t *testing.T) {
	r := newRun(t)
	runner := r.open(t)
	refused := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v; want %v", what, err, want)
		}
	}
	refused("suspended before it runs", runner.Suspend(t.Context()), vmm.ErrNotStarted)
	refused("waited for before it runs", runner.Wait(), vmm.ErrNotStarted)
	refused("resumed", runner.Resume(t.Context()), nil)
	refused("resumed again", runner.Resume(t.Context()), vmm.ErrStarted)
	refused("suspended", runner.Suspend(t.Context()), nil)
	refused("closed", runner.Close(), nil)
	refused("closed again", runner.Close(), nil)
	refused("suspended after its end", runner.Suspend(t.Context()), vmm.ErrClosed)
	refused("waited for after its end", runner.Wait(), vmm.ErrClosed)
	refused("resumed after its end", runner.Resume(t.Context()), vmm.ErrClosed)
	r.status(t, vmm.Suspended)
	r.again(t, false)
}

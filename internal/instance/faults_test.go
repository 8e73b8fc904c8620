package instance

import (
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"drafter/internal/block"
	"drafter/internal/memory"
	"drafter/internal/vmmtest"
	"drafter/vmm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errBroken = errors.New("broken")

// faulty are devices that fail. at, if not nil, is called at the beginning of each call: "sync
// disk", "open state", "read state", "write state", "sync state", "close state", "open memory".
type faulty struct {
	Paths
	at func(call string) error
}

func (f *faulty) call(name string) error {
	if f.at == nil {
		return nil
	}
	return f.at(name)
}

// fail makes a call fail, once.
func (f *faulty) fail(call string, err error) {
	failed := false
	f.at = func(c string) error {
		if c != call || failed {
			return nil
		}
		failed = true
		return err
	}
}

func (f *faulty) Sync(name string) error {
	if err := f.call("sync " + name); err != nil {
		return err
	}
	return f.Paths.Sync(name)
}

func (f *faulty) Memory() (*memory.Device, func() error, error) {
	if err := f.call("open memory"); err != nil {
		return nil, nil, err
	}
	file, err := block.OpenFile(f.Paths[vmm.Memory], false)
	if err != nil {
		return nil, nil, err
	}
	d := memory.New(faultyMemory{file, f})
	return d, d.Close, nil
}

// faultyMemory is what memory is stored in.
type faultyMemory struct {
	*block.File
	f *faulty
}

func (m faultyMemory) WriteAt(p []byte, off int64) (int, error) {
	if err := m.f.call("write " + vmm.Memory); err != nil {
		return 0, err
	}
	return m.File.WriteAt(p, off)
}

func (m faultyMemory) Sync() error {
	if err := m.f.call("sync " + vmm.Memory); err != nil {
		return err
	}
	return m.File.Sync()
}

func (f *faulty) State() (StateDevice, error) {
	if err := f.call("open state"); err != nil {
		return nil, err
	}
	d, err := f.Paths.State()
	return faultyState{d, f}, err
}

type faultyState struct {
	StateDevice
	f *faulty
}

func (s faultyState) ReadAt(p []byte, off int64) (int, error) {
	if err := s.f.call("read state"); err != nil {
		return 0, err
	}
	return s.StateDevice.ReadAt(p, off)
}

// WriteAt writes half of what it is given when it fails, as a disk that is full does.
func (s faultyState) WriteAt(p []byte, off int64) (int, error) {
	if err := s.f.call("write state"); err != nil {
		n, _ := s.StateDevice.WriteAt(p[:len(p)/2], off)
		return n, err
	}
	return s.StateDevice.WriteAt(p, off)
}

func (s faultyState) Sync() error {
	if err := s.f.call("sync state"); err != nil {
		return err
	}
	return s.StateDevice.Sync()
}

func (s faultyState) Close() error {
	return errors.Join(s.f.call("close state"), s.StateDevice.Close())
}

// bed is a package, and what it runs on.
type bed struct {
	driver  *vmmtest.Driver
	host    vmm.Host
	config  *vmm.PackageConfig
	storage *faulty
}

func newBed(t *testing.T) *bed {
	t.Helper()
	b := &bed{driver: &vmmtest.Driver{T: t}}
	b.host = vmmtest.Host(t, b.driver)
	paths, config := vmmtest.WritePackage(t, t.TempDir())
	b.config, b.storage = config, &faulty{Paths: paths}
	t.Cleanup(func() {
		if !b.driver.AllClosed() {
			t.Error("a VMM is left")
		}
	})
	return b
}

func (b *bed) launch(t *testing.T) *Launched {
	t.Helper()
	l, err := Launch(t.Context(), b.host, b.config, b.storage)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// run resumes the VM. It is closed at the end of the test.
func (b *bed) run(t *testing.T) (*Instance, *vmmtest.Machine) {
	t.Helper()
	i, err := b.launch(t).Run(t.Context(), time.Now(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := i.Close(); err != nil {
			t.Error(err)
		}
	})
	machines := b.driver.Machines()
	return i, machines[len(machines)-1]
}

func (b *bed) status(t *testing.T, want vmm.Status) {
	t.Helper()
	if got := vmmtest.Status(t, b.storage.Paths[vmm.State]); got != want {
		t.Errorf("the state device says %d; want %d", got, want)
	}
}

// A launch that fails leaves the package as it was, and nothing on the host.
func TestLaunchFails(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cause func(t *testing.T, b *bed)
		want  string
	}{
		{"the VMM", func(_ *testing.T, b *bed) { b.driver.FailAt(vmmtest.Launch, errBroken) }, "broken"},
		{"an unknown VMM", func(_ *testing.T, b *bed) { b.host.VMM = "other" }, `VMM "other" is not supported`},
		{"more memory than the host is meant for", func(_ *testing.T, b *bed) { b.host.MaxMemory = 1 }, "--max-memory"},
		{"more memory than the VMM may have", func(_ *testing.T, b *bed) { b.host.Limits.Memory = 1 }, "--memory-max is 1 B"},
		{"served memory that does not open", func(_ *testing.T, b *bed) {
			b.driver.BootsFile = true
			b.storage.fail("open memory", syscall.EIO)
		}, "open memory device: input/output error"},
		{"a state that does not open", func(_ *testing.T, b *bed) { b.storage.fail("open state", syscall.EIO) }, "open state device: input/output error"},
		{"a state that does not read", func(_ *testing.T, b *bed) { b.storage.fail("read state", syscall.EIO) }, "read header: input/output error"},
		{"a VMM that would not boot it", func(_ *testing.T, b *bed) {
			b.host.Boot = true
			b.driver.FailAt(vmmtest.Check, errBroken)
		}, "broken"},
		{"a boot without an initramfs", func(_ *testing.T, b *bed) {
			b.host.Boot = true
			b.config.Initrd = nil
		}, "holds no initramfs"},
		{"an initramfs that cannot be copied", func(t *testing.T, b *bed) {
			b.config.Initrd = &vmm.Section{Size: 1}
			if err := os.Remove(b.storage.Paths[vmm.Kernel]); err != nil {
				t.Fatal(err)
			}
		}, "copy the initramfs: "},
		{"a boot that cannot be noted", func(_ *testing.T, b *bed) {
			b.host.Boot = true
			b.storage.fail("sync state", syscall.ENOSPC)
			b.storage.at = also(b.storage.at, "write state", syscall.ENOSPC)
		}, "no space left on device"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			tt.cause(t, b)
			if _, err := Launch(t.Context(), b.host, b.config, b.storage); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			entries, err := os.ReadDir(b.host.BaseDir + "/" + vmmtest.Name)
			if err != nil && !errors.Is(err, os.ErrNotExist) || len(entries) > 0 {
				t.Errorf("VMs have left %v, %v", entries, err)
			}
		})
	}
}

// also fails another call, too.
func also(at func(string) error, call string, err error) func(string) error {
	return func(c string) error {
		if c == call {
			return err
		}
		return at(c)
	}
}

// A resume that fails before a vCPU runs leaves a package that can be resumed; one that fails as a
// vCPU is let go, or when that cannot be noted, leaves no VM that runs.
func TestResumeFails(t *testing.T) {
	for _, tt := range []struct {
		name   string
		cause  func(b *bed)
		want   string
		status vmm.Status
	}{
		{"restore", func(b *bed) { b.driver.FailAt(vmmtest.Restore, errBroken) }, "--boot starts the VM from its disks", vmm.Suspended},
		{"a short read of the state", func(b *bed) { b.storage.fail("read state", errors.New("short")) }, "read header: short", vmm.Suspended},
		{"an I/O error behind the header", func(b *bed) {
			reads := 0
			b.storage.at = func(c string) error {
				if c == "read state" {
					if reads++; reads == 2 {
						return syscall.EIO
					}
				}
				return nil
			}
		}, "read state: input/output error", vmm.Suspended},
		{"a state that does not open", func(b *bed) { b.storage.fail("open state", syscall.EIO) }, "open state device", vmm.Suspended},
		{"a mark that is not durable", func(b *bed) { b.storage.fail("sync state", syscall.EIO) }, "sync state header", vmm.Running},
		{"the vCPUs", func(b *bed) { b.driver.FailAt(vmmtest.Resume, errBroken) }, "broken", vmm.Running},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			l := b.launch(t)
			tt.cause(b)
			i, err := l.Run(t.Context(), time.Now(), time.Minute)
			if i != nil || err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			if m := b.driver.Machines()[0]; m.Running() || !l.Ended() {
				t.Error("the VMM is there")
			}
			b.status(t, tt.status)
		})
	}
}

// A VM whose user gives up while it is restored is not said to be in want of a boot.
func TestResumeEnds(t *testing.T) {
	b := newBed(t)
	l := b.launch(t)
	ctx, cancel := context.WithCancel(t.Context())
	b.driver.At = func(ctx context.Context, s vmmtest.Step, _ *vmmtest.Machine) error {
		if s == vmmtest.Restore {
			cancel()
			return ctx.Err()
		}
		return nil
	}
	if _, err := l.Run(ctx, time.Now(), time.Minute); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "--boot") {
		t.Errorf("error %v", err)
	}
	b.status(t, vmm.Suspended)
}

// A VM that runs although its agent does not answer is there beside the error, and can be
// suspended.
func TestAgentFails(t *testing.T) {
	for _, step := range []vmmtest.Step{vmmtest.GuestConn, vmmtest.AfterResume} {
		t.Run(string(step), func(t *testing.T) {
			b := newBed(t)
			b.driver.FailAt(step, errBroken)
			i, err := b.launch(t).Run(t.Context(), time.Now(), time.Minute)
			if err == nil || i == nil || !strings.Contains(err.Error(), "broken") {
				t.Fatalf("%v, error %v", i, err)
			}
			if !b.driver.Machines()[0].Running() {
				t.Error("the VM does not run")
			}
			saved, err := i.Suspend(t.Context(), time.Minute)
			if !saved || err != nil {
				t.Errorf("saved: %t, %v", saved, err)
			}
			b.status(t, vmm.Suspended)
			if err := i.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A VMM that does not answer holds a suspend up for a bounded time only, and the VM is as it was.
func TestSuspendOfSilentVMM(t *testing.T) {
	old := pauseTimeout
	pauseTimeout = 50 * time.Millisecond
	defer func() { pauseTimeout = old }()
	b := newBed(t)
	i, _ := b.run(t)
	b.driver.At = func(ctx context.Context, s vmmtest.Step, _ *vmmtest.Machine) error {
		if s == vmmtest.Pause {
			<-ctx.Done()
			return context.Cause(ctx)
		}
		return nil
	}
	saved, err := i.Suspend(t.Context(), time.Minute)
	if saved || !errors.Is(err, vmm.ErrNotSuspended) || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("saved: %t, %v", saved, err)
	}
	b.driver.At = nil
	if saved, err := i.Suspend(t.Context(), time.Minute); !saved || err != nil {
		t.Errorf("once it answers: %t, %v", saved, err)
	}
}

// The pause of a suspend is from when the guest stands still until all of it is stored. What is done
// while the guest runs is not of it.
func TestSuspendPause(t *testing.T) {
	b := newBed(t)
	i, _ := b.run(t)
	const ahead, within = 200 * time.Millisecond, 20 * time.Millisecond
	paused := false
	b.driver.At = func(_ context.Context, s vmmtest.Step, _ *vmmtest.Machine) error {
		switch s {
		case vmmtest.Pause:
			paused = true
		case vmmtest.Save:
			time.Sleep(within)
		}
		return nil
	}
	b.storage.at = func(call string) error {
		if call == "sync disk" && !paused {
			time.Sleep(ahead)
		}
		return nil
	}
	if saved, err := i.Suspend(t.Context(), time.Minute); !saved || err != nil {
		t.Fatalf("saved: %t, %v", saved, err)
	}
	if got := i.SuspendPause(); got < within || got >= ahead {
		t.Errorf("the pause is %s", got)
	}
}

// A storage that hangs holds a suspend up as long as its caller allows, and the VM runs on.
func TestSuspendOnHangingStorage(t *testing.T) {
	b := newBed(t)
	i, m := b.run(t)
	hang := make(chan struct{})
	b.storage.at = func(call string) error {
		if call == "sync disk" {
			<-hang
		}
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errBroken)
	defer cancel()
	saved, err := i.Suspend(ctx, time.Minute)
	if saved || !errors.Is(err, vmm.ErrNotSuspended) || !errors.Is(err, errBroken) || !m.Running() {
		t.Errorf("saved: %t, %v; the guest runs: %t", saved, err, m.Running())
	}
	close(hang)
	if saved, err := i.Suspend(t.Context(), time.Minute); !saved || err != nil {
		t.Errorf("once it answers: %t, %v", saved, err)
	}
}

// A VM that cannot be saved runs on, and can be suspended later; what its devices say is true all
// the time. A disk that fails is named, with why.
func TestSuspendFails(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cause func(b *bed)
		want  string
		is    error
	}{
		{"pause", func(b *bed) { b.driver.FailAt(vmmtest.Pause, errBroken) }, "suspend: broken", nil},
		{"save", func(b *bed) { b.driver.FailAt(vmmtest.Save, errBroken) }, "suspend: broken", nil},
		{"flush", func(b *bed) { b.driver.FailAt(vmmtest.Flush, errBroken) }, "suspend: broken", nil},
		{"a full disk", func(b *bed) { b.storage.fail("sync disk", syscall.ENOSPC) }, "suspend: device disk: ", syscall.ENOSPC},
		{"a broken disk", func(b *bed) { b.storage.fail("sync disk", syscall.EIO) }, "suspend: device disk: ", syscall.EIO},
		{"memory without room", func(b *bed) { b.storage.fail("write memory", syscall.ENOSPC) }, "are not stored: no space left on device; make room there", syscall.ENOSPC},
		{"memory on a broken storage", func(b *bed) { b.storage.fail("write memory", syscall.EIO) }, "cannot be stored: input/output error", syscall.EIO},
		{"full memory", func(b *bed) { b.storage.fail("sync memory", syscall.ENOSPC) }, "suspend: device memory: ", syscall.ENOSPC},
		{"a state that does not open", func(b *bed) { b.storage.fail("open state", syscall.EIO) }, "open state device: ", syscall.EIO},
		{"a state without room", func(b *bed) { b.storage.fail("write state", syscall.ENOSPC) }, "write state: ", syscall.ENOSPC},
		{"a state that is not durable", func(b *bed) { b.storage.fail("sync state", syscall.EIO) }, "sync state: ", syscall.EIO},
		{"a state that does not close", func(b *bed) { b.storage.fail("close state", syscall.EIO) }, "state device ", syscall.EIO},
		{"a header that is not durable", func(b *bed) {
			syncs := 0
			b.storage.at = func(c string) error {
				if c == "sync state" {
					if syncs++; syncs == 2 {
						return syscall.EIO
					}
				}
				return nil
			}
		}, "sync state header: ", syscall.EIO},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			i, m := b.run(t)
			tt.cause(b)
			saved, err := i.Suspend(t.Context(), time.Minute)
			if saved || !errors.Is(err, vmm.ErrNotSuspended) || !strings.Contains(err.Error(), tt.want) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("saved: %t, error %v; want one with %q", saved, err, tt.want)
			}
			if !m.Running() || i.Agent() == nil {
				t.Errorf("the guest runs: %t, its agent: %v", m.Running(), i.Agent())
			}
			b.status(t, vmm.Running)
			b.storage.at, b.driver.At = nil, nil
			if saved, err := i.Suspend(t.Context(), time.Minute); !saved || err != nil {
				t.Errorf("once more: %t, %v", saved, err)
			}
			if saved, err := i.Suspend(t.Context(), time.Minute); !saved || err != nil {
				t.Errorf("of what is suspended: %t, %v", saved, err)
			}
			b.status(t, vmm.Suspended)
			if err := i.Close(); err != nil {
				t.Error(err)
			}
			b.run(t)
		})
	}
}

// A VM whose state device fails and fails again stands still rather than run beside what says that
// it is suspended.
func TestStateStaysBroken(t *testing.T) {
	b := newBed(t)
	i, m := b.run(t)
	syncs := 0
	b.storage.at = func(c string) error {
		if c == "close state" { // after it was written
			syncs++
			return syscall.EIO
		}
		if c == "write state" && syncs > 0 {
			return syscall.EIO
		}
		return nil
	}
	if saved, err := i.Suspend(t.Context(), time.Minute); saved || err == nil || !strings.Contains(err.Error(), "let the VM run on: ") {
		t.Errorf("saved: %t, %v", saved, err)
	}
	if m.Running() {
		t.Error("the VM runs, and its devices may say that it is suspended")
	}
}

// An agent that does not get ready is told of, and its VM saved; so is one that is silent.
func TestUnreadyGuest(t *testing.T) {
	for name, cause := range map[string]func(b *bed){
		"says so": func(b *bed) { b.driver.FailAt(vmmtest.BeforeSuspend, errBroken) },
		"is silent": func(b *bed) {
			b.driver.At = func(ctx context.Context, s vmmtest.Step, _ *vmmtest.Machine) error {
				if s == vmmtest.BeforeSuspend {
					<-ctx.Done()
				}
				return ctx.Err()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			i, _ := b.run(t)
			cause(b)
			if saved, err := i.Suspend(t.Context(), 50*time.Millisecond); !saved || err == nil || !strings.Contains(err.Error(), "the guest's agent: ") {
				t.Errorf("saved: %t, %v", saved, err)
			}
			b.status(t, vmm.Suspended)
		})
	}
}

// A guest that stands still for a disk is not asked to get ready.
func TestStalledGuest(t *testing.T) {
	b := newBed(t)
	i, m := b.run(t)
	m.Stall(true)
	b.driver.FailAt(vmmtest.BeforeSuspend, errBroken)
	if saved, err := i.Suspend(t.Context(), time.Minute); !saved || err != nil {
		t.Errorf("saved: %t, %v", saved, err)
	}
}

// What becomes of a VM that is handed over, or not, is what its state device says.
func TestHandoffFails(t *testing.T) {
	id := uuid.New()
	for _, tt := range []struct {
		name   string
		do     func(t *testing.T, b *bed, i *Instance, m *vmmtest.Machine) error
		want   string // in its error; "" for none
		status vmm.Status
		after  vmm.Status // the VM was let go on
	}{
		{"a note that is not durable", func(t *testing.T, b *bed, i *Instance, _ *vmmtest.Machine) error {
			b.storage.fail("sync state", syscall.EIO)
			return i.NoteLeaving(id)
		}, "input/output error", vmm.Leaving, vmm.Running},
		{"a state that does not save", func(t *testing.T, b *bed, i *Instance, _ *vmmtest.Machine) error {
			b.driver.FailAt(vmmtest.Save, errBroken)
			return errors.Join(i.NoteLeaving(id), i.Pause(t.Context()), i.SaveLeaving(t.Context(), id, nil))
		}, "broken", vmm.Leaving, vmm.Running},
		{"a state without room", func(t *testing.T, b *bed, i *Instance, _ *vmmtest.Machine) error {
			if err := errors.Join(i.NoteLeaving(id), i.Pause(t.Context())); err != nil {
				return err
			}
			b.storage.fail("write state", syscall.ENOSPC)
			return i.SaveLeaving(t.Context(), id, nil)
		}, "no space left on device", vmm.Leaving, vmm.Running},
		{"a copy", func(t *testing.T, _ *bed, i *Instance, _ *vmmtest.Machine) error {
			return errors.Join(i.Pause(t.Context()), i.SaveLeaving(t.Context(), id, nil))
		}, "", vmm.Copying, vmm.Running},
		{"a move before it is in doubt", func(t *testing.T, _ *bed, i *Instance, _ *vmmtest.Machine) error {
			return errors.Join(i.NoteLeaving(id), i.Pause(t.Context()), i.SaveLeaving(t.Context(), id, nil))
		}, "", vmm.Leaving, vmm.Running},
		{"a move", func(t *testing.T, _ *bed, i *Instance, _ *vmmtest.Machine) error {
			return errors.Join(i.NoteLeaving(id), i.Pause(t.Context()), i.SaveLeaving(t.Context(), id, nil), i.Mark(vmm.InDoubt))
		}, "", vmm.InDoubt, vmm.Running},
		{"a mark that is not durable", func(t *testing.T, b *bed, i *Instance, _ *vmmtest.Machine) error {
			if err := errors.Join(i.NoteLeaving(id), i.Pause(t.Context()), i.SaveLeaving(t.Context(), id, nil)); err != nil {
				return err
			}
			b.storage.fail("sync state", syscall.EIO)
			return i.Mark(vmm.InDoubt)
		}, "input/output error", vmm.InDoubt, vmm.Running},
		{"a VMM that ends when it may be settled", func(t *testing.T, _ *bed, i *Instance, m *vmmtest.Machine) error {
			err := errors.Join(i.NoteLeaving(id), i.Pause(t.Context()), i.SaveLeaving(t.Context(), id, nil), i.Mark(vmm.HandedOver))
			m.Exit(errBroken)
			return err
		}, "", vmm.HandedOver, vmm.HandedOver},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			i, m := b.run(t)
			err := tt.do(t, b, i, m)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			b.status(t, tt.status)
			b.storage.at, b.driver.At = nil, nil
			err = i.Rescue(t.Context())
			if goesOn := tt.after == vmm.Running; (err == nil) != goesOn || m.Running() != goesOn {
				t.Errorf("it goes on: %t, %v", m.Running(), err)
			}
			b.status(t, tt.after)
		})
	}
}

// Where the VM arrives, it is restored from the state of its migration and no other, and says that
// it runs before it does.
func TestArrivalFails(t *testing.T) {
	id := uuid.New()
	for _, tt := range []struct {
		name   string
		of     uuid.UUID
		cause  func(b *bed)
		want   string
		status vmm.Status
	}{
		{"nothing", id, func(*bed) {}, "", vmm.Running},
		{"of another migration", uuid.New(), func(*bed) {}, "does not hold the state of migration", vmm.Leaving},
		{"restore", id, func(b *bed) { b.driver.FailAt(vmmtest.Restore, errBroken) }, "broken", vmm.Leaving},
		{"a state that does not read", id, func(b *bed) { b.storage.fail("read state", syscall.EIO) }, "input/output error", vmm.Leaving},
		{"a note without room", id, func(b *bed) { b.storage.fail("write state", syscall.ENOSPC) }, "no space left on device", vmm.Leaving},
		{"the vCPUs", id, func(b *bed) { b.driver.FailAt(vmmtest.Resume, errBroken) }, "broken", vmm.Running},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			state, err := b.storage.Paths.State()
			if err != nil {
				t.Fatal(err)
			}
			saved, err := vmm.ReadState(state, b.config.ID)
			if err := errors.Join(err, vmm.WriteMigratedState(state, b.config.ID, saved, id, vmm.Leaving), state.Close()); err != nil {
				t.Fatal(err)
			}
			generation := uuid.New()
			l, err := LaunchMoved(t.Context(), b.host, b.config, b.storage, generation)
			if err != nil {
				t.Fatal(err)
			}
			tt.cause(b)
			err = l.Restore(t.Context(), tt.of)
			if err == nil {
				var i *Instance
				if i, err = l.Go(t.Context()); i.Generation() != generation || b.driver.Machines()[0].Launched.Generation != generation {
					t.Errorf("generation %s", i.Generation())
				}
			}
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			if l.Ended() || b.driver.Machines()[0].Running() != (err == nil) {
				t.Error("the guest runs, or the VMM has ended")
			}
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			if err := l.Wait(); err != nil || !l.Ended() {
				t.Errorf("it ended with %v", err)
			}
			if tt.name != "a note without room" { // half of which is there
				b.status(t, tt.status)
			}
		})
	}
}

// A package whose devices are not as it says is refused, and no other.
func TestOpen(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, p Paths)
		want   string
	}{
		{"as it is", func(*testing.T, Paths) {}, ""},
		{"no config", func(_ *testing.T, p Paths) { delete(p, vmm.Config) }, "device config is missing"},
		{"no disk", func(_ *testing.T, p Paths) { delete(p, vmm.Disk) }, "device disk of the package is missing"},
		{"one more", func(_ *testing.T, p Paths) { p["more"] = p[vmm.Disk] }, "device more is not part of the package"},
		{"a disk that is not there", func(_ *testing.T, p Paths) { p[vmm.Disk] += ".none" }, "device disk: "},
		{"memory that is truncated", func(t *testing.T, p Paths) {
			if err := os.Truncate(p[vmm.Memory], 1); err != nil {
				t.Fatal(err)
			}
		}, "is truncated: 1 bytes instead of 65536"},
		{"a longer disk", func(t *testing.T, p Paths) {
			if err := os.Truncate(p[vmm.Disk], 2*vmmtest.Size); err != nil {
				t.Fatal(err)
			}
		}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			paths, _ := vmmtest.WritePackage(t, t.TempDir())
			tt.change(t, paths)
			if _, err := Open(paths); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
		})
	}
}

// Names are those of files, and each is there once.
func TestCheckNames(t *testing.T) {
	for _, tt := range []struct {
		names []string
		want  string
	}{
		{[]string{vmm.Config, vmm.Disk}, ""},
		{[]string{vmm.Config, vmm.Config}, `device "config" is listed twice`},
		{[]string{vmm.Disk}, `device "config" is missing`},
		{[]string{vmm.Config, ""}, "not valid"},
		{[]string{vmm.Config, ".hidden"}, "not valid"},
		{[]string{vmm.Config, "a/b"}, "not valid"},
		{[]string{vmm.Config, strings.Repeat("x", 65)}, "not valid"},
	} {
		err := CheckNames(tt.names, vmm.Config)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v; want an error with %q", tt.names, err, tt.want)
		}
	}
}

package peer

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/vmmtest"
	"drafter/migrate"
	"drafter/vmm"
)

// newPrivate makes a host that maps a package privately. The outputs are in a directory of their
// own, out. At the end of the test the package is as it was.
func newPrivate(t *testing.T) (h *host, out string) {
	t.Helper()
	pkg := newPackage(t)
	h, out = newHost(t, pkg), filepath.Join(t.TempDir(), "out")
	for i := range h.config.Devices {
		h.config.Devices[i].Overlay, h.config.Devices[i].State = "", ""
	}
	h.config.MapPrivate = true
	h.config.MemoryOutput, h.config.StateOutput = filepath.Join(out, "memory"), filepath.Join(out, "state")
	before := contents(t, pkg)
	t.Cleanup(func() {
		after := contents(t, pkg)
		for name, content := range before {
			if after[name] != content {
				t.Errorf("%s of the package has changed", name)
			}
		}
		if len(after) != len(before) {
			t.Errorf("beside the package's files there are %q", names(t, pkg))
		}
	})
	return h, out
}

// contents maps the names in a directory to the content of each file.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	contents := map[string]string{}
	for _, name := range names(t, dir) {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		contents[name] = string(b)
	}
	return contents
}

// names are those in a directory, which need not be there.
func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// resume starts the VM, which writes to its disk.
func (h *host) resume(t *testing.T) *Peer {
	t.Helper()
	p := h.open(t)
	if err := p.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.write(9000); err != nil {
		t.Fatal(err)
	}
	return p
}

// startsFrom starts the package that h has left. Its guest goes on, unless it boots.
func (h *host) startsFrom(t *testing.T, boots bool) {
	t.Helper()
	next := newHost(t, "")
	next.config.Devices = h.outputDevices()
	if err := next.open(t).Resume(t.Context()); err != nil {
		t.Fatalf("start what is left: %v", err)
	}
	if err := next.lacks(9000); err != nil {
		t.Error(err)
	}
	if got := next.machine().Launched.Boot != nil; got != boots {
		t.Errorf("what is left boots: %t; want %t", got, boots)
	}
	if n := next.machine().Count(); !boots && n != 4 { // packaged, resumed, suspended, and resumed
		t.Errorf("the guest is at %d", n)
	}
	next.close(t)
}

// outputDevices are the package in h's outputs.
func (h *host) outputDevices() (devices []Device) {
	for name, path := range h.peer.outputs() {
		d := DefaultDevice(name)
		d.Base = path
		devices = append(devices, d)
	}
	return devices
}

// What a private map leaves is a package that goes on, wherever its state is.
func TestPrivate(t *testing.T) {
	for _, state := range []string{"state", "elsewhere/state"} {
		t.Run(state, func(t *testing.T) {
			h, out := newPrivate(t)
			h.config.StateOutput = filepath.Join(out, state)
			p := h.resume(t)
			if err := p.Suspend(t.Context()); err != nil {
				t.Fatal(err)
			}
			h.close(t)
			want := []string{"config.json", "memory", "rootfs.ext4", strings.Split(state, "/")[0], "vmlinux"}
			slices.Sort(want)
			if got := names(t, out); !slices.Equal(got, want) {
				t.Errorf("outputs %q; want %q", got, want)
			}
			h.startsFrom(t, false)
		})
	}
}

// A guest that powers itself off, and a VMM that dies, leave disks to boot from, as without a private
// map.
func TestPrivateEndsByItself(t *testing.T) {
	for what, how := range map[string]error{"powered off": nil, "died": errBroken} {
		t.Run(what, func(t *testing.T) {
			h, _ := newPrivate(t)
			p := h.resume(t)
			h.machine().Exit(how)
			if err := p.Wait(); !errors.Is(err, how) {
				t.Errorf("it ended with %v", err)
			}
			h.close(t)
			h.startsFrom(t, true)
		})
	}
}

// Any number of VMs run from a package at once, and without outputs nothing of them is left: no
// suspend is made, which could fail for want of room. Somebody who writes to the package has it
// alone.
func TestPrivateTogether(t *testing.T) {
	h, out := newPrivate(t)
	h.config.MemoryOutput, h.config.StateOutput = "", ""
	h.driver.At = func(_ context.Context, s vmmtest.Step, _ *vmmtest.Machine) error {
		if s == vmmtest.Save {
			return syscall.ENOSPC
		}
		return nil
	}
	first := h.resume(t)
	other := newHost(t, "")
	other.config.Devices, other.config.MapPrivate = h.config.Devices, true
	second := other.open(t)
	if err := second.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if other.lacks(9000) == nil {
		t.Error("one sees what the other has written")
	}
	writer := newHost(t, "")
	writer.config.Devices = h.config.Devices
	if err := writer.open(t).Resume(t.Context()); !errors.Is(err, vmm.ErrInUse) {
		t.Errorf("a writer beside them: %v", err)
	}
	if err := errors.Join(first.Suspend(t.Context()), second.Suspend(t.Context())); err != nil {
		t.Error(err)
	}
	h.close(t)
	if left := names(t, out); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// A private map beside somebody who writes to the package is refused, in words that mend it.
func TestPrivateInUse(t *testing.T) {
	h, _ := newPrivate(t)
	base, err := block.OpenFile(h.config.Devices[0].Base, false)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	if err := base.Lock(true); err != nil {
		t.Fatal(err)
	}
	err = h.open(t).Resume(t.Context())
	if !errors.Is(err, vmm.ErrInUse) || !strings.Contains(err.Error(), "run a copy of the package, or pass --experimental-map-private to both") {
		t.Errorf("error %v", err)
	}
}

// Outputs that something is in the way of can be stored once it is gone. Until then there is no
// state, also no older one, and so nothing that can be resumed without the rest of it.
func TestPrivateInTheWay(t *testing.T) {
	h, out := newPrivate(t)
	p := h.resume(t)
	inTheWay := filepath.Join(out, "rootfs.ext4")
	if err := errors.Join(os.MkdirAll(inTheWay, 0o700), os.WriteFile(h.config.StateOutput, []byte("old"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := p.Suspend(t.Context()); !errors.Is(err, ErrNotStored) || !strings.Contains(err.Error(), "store outputs: ") {
		t.Errorf("error %v", err)
	}
	if slices.Contains(names(t, out), "state") {
		t.Error("the state is there without a disk")
	}
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	if err := p.Suspend(t.Context()); err != nil {
		t.Errorf("once more: %v", err)
	}
	h.close(t)
	h.startsFrom(t, false)
}

// A VM that never ran leaves no outputs, nor anything else.
func TestPrivateFails(t *testing.T) {
	for _, step := range []vmmtest.Step{vmmtest.Launch, vmmtest.Restore, vmmtest.Resume} {
		t.Run(string(step), func(t *testing.T) {
			h, out := newPrivate(t)
			h.driver.FailAt(step, errBroken)
			if err := h.open(t).Resume(t.Context()); !errors.Is(err, errBroken) {
				t.Errorf("error %v", err)
			}
			h.close(t)
			if left := names(t, out); len(left) > 0 {
				t.Errorf("%q is left", left)
			}
		})
	}
}

// What has no meaning is refused before anything is touched.
func TestPrivateRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, c *Config)
		want   string
	}{
		{"one output", func(_ *testing.T, c *Config) { c.StateOutput = "" }, "name both or none"},
		{"the other output", func(_ *testing.T, c *Config) { c.MemoryOutput = "" }, "name both or none"},
		{"an overlay", func(_ *testing.T, c *Config) { c.Devices[2].Overlay, c.Devices[2].State = "overlay", "state" }, "name the base alone"},
		{"an output that is the package's", func(t *testing.T, c *Config) {
			link := filepath.Join(t.TempDir(), "link")
			if err := os.Symlink(filepath.Dir(c.Devices[0].Base), link); err != nil {
				t.Fatal(err)
			}
			c.MemoryOutput = filepath.Join(link, "memory")
		}, "would overwrite the package's"},
		{"two outputs in one", func(_ *testing.T, c *Config) { c.StateOutput = c.MemoryOutput }, "would overwrite the output of"},
		{"an output that is a FIFO", func(t *testing.T, c *Config) {
			c.StateOutput = filepath.Join(t.TempDir(), "state")
			if err := unix.Mkfifo(c.StateOutput, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "no regular file; name another output"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, _ := newPrivate(t)
			tt.change(t, &h.config)
			if _, err := New(h.config); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
		})
	}
	t.Run("outputs are ignored without the map", func(t *testing.T) {
		h, out := newHost(t, newPackage(t)), filepath.Join(t.TempDir(), "out")
		h.config.MemoryOutput = filepath.Join(out, "memory")
		if err := h.resume(t).Suspend(t.Context()); err != nil {
			t.Error(err)
		}
		h.close(t)
		if left := names(t, out); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

// A VM whose package is mapped privately moves away with what it has changed, and leaves nothing. A
// target that has the package gets the changes only. The other way round a VM does not come: it would
// be lost with its target.
func TestPrivateMoves(t *testing.T) {
	h, out := newPrivate(t)
	there := filepath.Join(t.TempDir(), "package") // another host has a copy of it
	if err := os.CopyFS(there, os.DirFS(filepath.Dir(h.config.Devices[0].Base))); err != nil {
		t.Fatal(err)
	}
	m := newMove(t, there, true)
	h.config.Hooks, h.config.Limits = m.source.config.Hooks, m.source.config.Limits
	m.source = h
	to := m.target.config.Devices
	m.target.config.Devices, m.target.config.MapPrivate = h.config.Devices, true
	m.begin(t)
	if err := m.receive(t.Context(), t); err == nil || !strings.Contains(err.Error(), "leave --experimental-map-private out") {
		t.Errorf("it came to a private map: %v", err)
	}
	m.target.close(t)
	m.target.config.Devices, m.target.config.MapPrivate = to, false
	if err := m.receive(t.Context(), t); err != nil {
		t.Fatal(err)
	}
	if <-m.served; !m.moved || m.err != nil {
		t.Errorf("served: %t, %v", m.moved, m.err)
	}
	disk := m.target.peer.devices.Get(vmm.Disk)
	if disk.Base == (block.ID{}) {
		t.Error("the whole disk was sent")
	}
	m.target.close(t)
	h.close(t)
	if left := names(t, out); len(left) > 0 {
		t.Errorf("a VM that has moved away leaves %q", left)
	}
	m.over.Store(true)
	if err := m.target.starts(t, m.written...); err != nil {
		t.Errorf("it does not start where it moved to: %v", err)
	}
}

// elsewhere is the package in a directory, as if it were on another host.
type elsewhere string

func (e elsewhere) Names() []string { return packageNames }

func (e elsewhere) Close() error { return nil }

func (e elsewhere) Remote(name string) (block.Remote, bool) {
	path := filepath.Join(string(e), vmm.PackageFile(name))
	c, err := block.HashFile(context.Background(), path)
	return block.Remote{Contents: c, Fetcher: file(path)}, err == nil
}

type file string

func (f file) Fetch(_ context.Context, first int64, p []byte, _ bool) error {
	d, err := block.OpenFile(string(f), true)
	if err != nil {
		return err
	}
	_, err = d.ReadAt(p, first*block.ContentBlockSize)
	return errors.Join(err, d.Close())
}

// A package that is pulled can be mapped privately while it comes, and once it is here.
func TestPrivatePull(t *testing.T) {
	h, _ := newPrivate(t)
	from, pulled := elsewhere(filepath.Dir(h.config.Devices[0].Base)), filepath.Join(t.TempDir(), "pulled")
	h.config.Devices, h.config.Derive = nil, func(names []string) ([]Device, error) { return NewPackageDevices(names, pulled, ""), nil }
	for range 2 {
		p := h.open(t)
		if err := p.Pull(t.Context(), &Origin{from}); err != nil {
			t.Fatal(err)
		}
		if err := h.write(9000); err != nil {
			t.Fatal(err)
		}
		if err := p.PullError(); err != nil {
			t.Fatal(err)
		}
		if err := p.Suspend(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.close(t)
		h.startsFrom(t, false)
		for name, content := range contents(t, string(from)) {
			if contents(t, pulled)[name] != content {
				t.Errorf("%s that was pulled has changed", name)
			}
		}
	}
}

// A VM that is in doubt can be settled while its process waits. Later it is kept in the outputs, and
// goes on from there once it is settled.
func TestPrivateInDoubt(t *testing.T) {
	h, _ := newPrivate(t)
	p := h.resume(t)
	logged := NewPackageDevices(packageNames, filepath.Dir(h.config.Devices[0].Base), p.private.Path())
	if got, want := decisionFile(logged), decisionFile(p.config.Devices); got != want {
		t.Errorf("a decision is left at %s, and looked for at %s", got, want)
	}
	d := &departure{p: p}
	id := uuid.New()
	_, err := d.Pause(t.Context())
	err = errors.Join(err, d.Leave(t.Context(), id), d.Save(t.Context(), id, nil), d.Flush(t.Context()), d.Mark(t.Context(), migrate.InDoubt, id))
	if err != nil {
		t.Fatal(err)
	}
	h.close(t)
	devices := h.outputDevices()
	next := newHost(t, "")
	next.config.Devices = devices
	if err := next.open(t).Resume(t.Context()); err == nil || !strings.Contains(err.Error(), "settle") {
		t.Errorf("a VM in doubt starts: %v", err)
	}
	next.close(t)
	if err := Settle(t.Context(), devices, migrate.Here); err != nil {
		t.Fatal(err)
	}
	h.startsFrom(t, false)
}

package daemon

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"drafter/api"
	"drafter/internal/await"
	"drafter/internal/need"
)

// end ends a daemon and all that it looks after, of which nothing is left.
func (d *Daemon) end(t *testing.T, dir string) {
	t.Helper()
	for _, vm := range d.VMs() {
		o, err := d.Remove(vm.ID, true)
		if err := d.done(t, o, err); err != nil {
			t.Error(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if left := standIns(t, dir); len(left) != 0 {
		t.Error("left:", left)
	}
}

// A VM that does not get to run can be killed, and removed, while others wait for it.
func TestEndAtOnce(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	o, err := d.Run(api.Run{Image: "docker://image", Name: "sound"})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	o, err = d.Stop("sound")
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	t.Setenv("STAND_IN_WAITS", filepath.Join(dir, "never"))
	starts, err := d.Start("sound")
	if err != nil {
		t.Fatal(err)
	}
	await.True(t, "its process is there", func() bool { return strings.Contains(strings.Join(standIns(t, dir), " "), "peer") })
	o, err = d.Kill("sound")
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if err := d.done(t, starts, nil); err == nil {
		t.Error("a VM that was killed has started")
	}
	if vm, err := d.VM("sound"); err != nil || vm.State != api.Failed || vm.Namespace != "" {
		t.Errorf("%+v, %v", vm, err)
	}
	if _, err := d.Kill("sound"); !errors.Is(err, ErrConflict) {
		t.Error("a VM that does not run is killed:", err)
	}
	runs, err := d.Run(api.Run{Image: "docker://image", Name: "other"})
	if err != nil {
		t.Fatal(err)
	}
	await.True(t, "its process is there", func() bool { return strings.Contains(strings.Join(standIns(t, dir), " "), "peer") })
	o, err = d.Remove("other", true)
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if err := d.done(t, runs, nil); err == nil {
		t.Error("a VM that was removed runs")
	}
	d.end(t, dir)
}

// A daemon that ends well leaves a VM that starts alone, and the next one knows it.
func TestEndWhileStarting(t *testing.T) {
	dir := testDir(t)
	gate := filepath.Join(dir, "go")
	t.Setenv("STAND_IN_WAITS", gate)
	d := open(t, dir)
	if _, err := d.Run(api.Run{Image: "docker://image", Ports: []api.Port{{Host: 1000, Guest: 80}}}); err != nil {
		t.Fatal(err)
	}
	await.True(t, "its process is there", func() bool { return strings.Contains(strings.Join(standIns(t, dir), " "), "peer") })
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	await.True(t, "it runs", func() bool { vm, err := d.VM("image"); return err == nil && vm.State == api.Running })
	d.end(t, dir)
}

// A VM that was run to be removed at its end is removed by the next daemon if there was none then.
func TestRemoveAtEndLater(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	o, err := d.Run(api.Run{Image: "docker://image", Remove: true})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	pid := d.VMs()[0].PID
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	await.True(t, "it has ended", func() bool { return !strings.Contains(strings.Join(standIns(t, dir), " "), "peer") })
	d = open(t, dir)
	if list := d.VMs(); len(list) != 0 {
		t.Error("left:", list)
	}
	d.end(t, dir)
}

// What lies among the VMs and is none, or cannot be read, keeps no other from its daemon.
func TestBadRecords(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	o, err := d.Run(api.Run{Image: "docker://image", Name: "sound"})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Run(api.Run{Image: "docker://image", Command: []string{strings.Repeat("<", 100<<10)}}); !errors.Is(err, ErrInvalid) {
		t.Error("a record is too long to be read again:", err)
	}
	id := d.VMs()[0].ID
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	vms := filepath.Join(dir, "lib/vms")
	record, err := os.ReadFile(filepath.Join(vms, id, recordFile))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"0123456789ab": record, "0123456789ac": []byte("{"), "0123456789ad": bytes.Repeat([]byte(" "), 5<<20), id + ".bak": record, "lost+found": nil,
	} {
		if err := os.Mkdir(filepath.Join(vms, name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(vms, name, recordFile), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(vms, "0123456789ae"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lib/events"), os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.Write(append(bytes.Repeat([]byte("x"), 2<<20), `
{"id":7}`...))
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	d = open(t, dir)
	if list := d.VMs(); len(list) != 1 || list[0].ID != id || list[0].State != api.Running {
		t.Errorf("%+v", list)
	}
	d.end(t, dir)
	if _, err := os.Stat(filepath.Join(vms, "lost+found", recordFile)); err != nil {
		t.Error("what is not ours was removed:", err)
	}
}

// A daemon that cannot take up its directory leaves the NAT of running VMs alone.
func TestOpenFails(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	o, err := d.Run(api.Run{Image: "docker://image"})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	vms := filepath.Join(dir, "lib/vms")
	if err := errors.Join(os.Rename(vms, vms+"-away"), os.WriteFile(vms, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	before := standIns(t, dir)
	if _, err := Open(testConfig(dir)); err == nil {
		t.Error("a file was taken for a directory")
	}
	if now := standIns(t, dir); len(now) != len(before) {
		t.Errorf("%v, before: %v", now, before)
	}
	if err := errors.Join(os.Remove(vms), os.Rename(vms+"-away", vms)); err != nil {
		t.Fatal(err)
	}
	open(t, dir).end(t, dir)
}

// On a full disk VMs end and are removed, and what the daemon says is so.
func TestFullDisk(t *testing.T) {
	need.Root(t)
	dir := testDirOn(t, func(lib string) {
		if err := unix.Mount("tmpfs", lib, "tmpfs", 0, "size=1m,mode=700"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(lib, 0); err != nil {
				t.Error(err)
			}
		})
	})
	d := open(t, dir)
	var ids []string
	for range 3 {
		o, err := d.Run(api.Run{Image: "docker://image"})
		if err := d.done(t, o, err); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, o.VM)
	}
	fill := filepath.Join(dir, "lib/fill")
	if err := os.WriteFile(fill, make([]byte, 2<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	o, err := d.Remove(ids[0], true)
	if err := d.done(t, o, err); err != nil {
		t.Error("a VM is not removed:", err)
	}
	if err := os.WriteFile(fill, make([]byte, 2<<20), 0o600); !errors.Is(err, unix.ENOSPC) { // what that has freed
		t.Fatal(err)
	}
	o, err = d.Kill(ids[1])
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if vm, err := d.VM(ids[1]); err != nil || vm.State != api.Failed || vm.PID != 0 {
		t.Errorf("a VM that was killed: %+v, %v", vm, err)
	}
	if o, err := d.Start(ids[1]); d.done(t, o, err) == nil {
		t.Error("a VM has started that cannot be recorded")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	d = open(t, dir)
	for id, state := range map[string]string{ids[1]: api.Failed, ids[2]: api.Running} {
		if vm, err := d.VM(id); err != nil || vm.State != state {
			t.Errorf("the next daemon: %+v, %v; want %s", vm, err, state)
		}
	}
	d.end(t, dir)
}

package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"drafter/api"
	"drafter/internal/await"
)

// is waits until a VM has a state, and returns it.
func (d *Daemon) is(t *testing.T, name, state string) (vm api.VM) {
	t.Helper()
	await.None(t, name+" is "+state, func() string {
		var err error
		if vm, err = d.VM(name); err != nil || vm.State != state {
			return fmt.Sprintf("%+v, %v", vm, err)
		}
		return ""
	})
	return vm
}

// A VM whose service has ended, or whose process was killed, is started again by its policy; one that a
// user has ended is not. When the daemon starts, it starts what the policies say.
func TestRestartPolicy(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	for _, policy := range []string{api.No, api.Always, api.UnlessStopped} {
		o, err := d.Run(api.Run{Image: "docker://image", Name: policy, Restart: policy})
		if err := d.done(t, o, err); err != nil {
			t.Fatal(err)
		}
	}
	all := func(what string, states map[string]string) {
		t.Helper()
		for name, state := range states {
			if vm := d.is(t, name, state); vm.Restart != name {
				t.Errorf("%s: %+v", what, vm)
			}
		}
	}
	do := func(verb func(string) (api.Operation, error), names ...string) {
		t.Helper()
		for _, name := range names {
			o, err := verb(name)
			if err := d.done(t, o, err); err != nil {
				t.Fatal(name, err)
			}
		}
	}
	next := func() {
		t.Helper()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = open(t, dir)
	}

	// It is killed, or its service ends.
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGUSR1} {
		for _, name := range []string{api.Always, api.UnlessStopped} {
			before := d.is(t, name, api.Running)
			if err := syscall.Kill(before.PID, signal); err != nil {
				t.Fatal(err)
			}
			await.True(t, "it runs again", func() bool {
				vm, err := d.VM(name)
				return err == nil && vm.State == api.Running && vm.PID != before.PID
			})
		}
	}
	if err := syscall.Kill(d.is(t, api.No, api.Running).PID, syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	all("its service has ended", map[string]string{api.No: api.Exited, api.Always: api.Running})
	next()
	all("the next daemon", map[string]string{api.No: api.Exited, api.Always: api.Running, api.UnlessStopped: api.Running})

	// By a user.
	do(d.Start, api.No)
	do(d.Stop, api.No, api.Always, api.UnlessStopped)
	all("stopped", map[string]string{api.No: api.Stopped, api.Always: api.Stopped, api.UnlessStopped: api.Stopped})
	next()
	all("the next daemon after stop", map[string]string{api.No: api.Stopped, api.Always: api.Running, api.UnlessStopped: api.Stopped})
	do(d.Start, api.No, api.UnlessStopped)
	do(d.Kill, api.No, api.Always, api.UnlessStopped)
	if vm := d.is(t, api.Always, api.Failed); !vm.UserStopped || d.vms[vm.ID].restarts() {
		t.Errorf("killed: %+v", vm)
	}
	next()
	all("the next daemon after kill", map[string]string{api.No: api.Failed, api.Always: api.Running, api.UnlessStopped: api.Failed})

	// For the host's shutdown. Whoever has its process suspend it does not want it back at once.
	do(d.Start, api.No, api.UnlessStopped)
	if vm := d.is(t, api.UnlessStopped, api.Running); vm.UserStopped {
		t.Errorf("started: %+v", vm)
	}
	if err := syscall.Kill(d.is(t, api.Always, api.Running).PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if vm := d.is(t, api.Always, api.Stopped); vm.UserStopped || d.vms[vm.ID].restarts() {
		t.Errorf("suspended by its process: %+v", vm)
	}
	if err := d.done(t, d.Shutdown(), nil); err != nil {
		t.Error(err)
	}
	all("the host ends", map[string]string{api.No: api.Stopped, api.Always: api.Stopped, api.UnlessStopped: api.Stopped})
	next()
	all("the host is back", map[string]string{api.No: api.Stopped, api.Always: api.Running, api.UnlessStopped: api.Running})

	// While there is no daemon.
	pid := d.is(t, api.UnlessStopped, api.Running).PID
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	if vm := d.is(t, api.UnlessStopped, api.Running); vm.PID == pid {
		t.Errorf("%+v", vm)
	}
	d.end(t, dir)
}

// A VM that ends again and again is started less and less often, until a user stops it.
func TestRestartLess(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	o, err := d.Run(api.Run{Image: "docker://image", Restart: api.Always})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	last := d.is(t, "image", api.Running)
	for pause := firstPause; pause <= 4*firstPause; pause *= 2 {
		killed := time.Now()
		if err := syscall.Kill(last.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		pid := last.PID
		await.True(t, "it runs again", func() bool { last, err = d.VM("image"); return last.State == api.Running && last.PID != pid })
		if took := time.Since(killed); took < pause {
			t.Errorf("it was started after %s; the pause is %s", took, pause)
		}
	}
	// One that has run for long begins anew.
	d.mu.Lock()
	d.vms[last.ID].process.ran = time.Now().Add(-longRun)
	d.mu.Unlock()
	t.Setenv("STAND_IN_FAILS", "x")
	if err := syscall.Kill(last.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	pauses := func() time.Duration {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.vms[last.ID].again.pause
	}
	await.True(t, "the pause is short again", func() bool { return pauses() == firstPause })
	await.True(t, "it is tried again", func() bool { return pauses() >= 4*firstPause })
	o, err = d.Stop("image")
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	await.True(t, "nobody tries any more", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return !d.vms[last.ID].again.busy })
	if err := os.Unsetenv("STAND_IN_FAILS"); err != nil {
		t.Fatal(err)
	}
	o, err = d.Start("image")
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	d.end(t, dir)
}

// Who waits for a VM's end hears how it has ended, also if it was started again or removed since.
func TestWaitForEnd(t *testing.T) {
	for _, r := range []api.Run{{Restart: api.Always}, {Remove: true}, {}} {
		dir := testDir(t)
		d := open(t, dir)
		r.Image = "docker://image"
		o, err := d.Run(r)
		if err := d.done(t, o, err); err != nil {
			t.Fatal(err)
		}
		if vm, err := d.awaitEnd(t.Context(), "image", time.Millisecond); err != nil || vm.State != api.Running {
			t.Errorf("before its end: %+v, %v", vm, err)
		}
		ends := make(chan api.VM)
		go func() {
			vm, err := d.awaitEnd(t.Context(), "image", time.Minute)
			if err != nil {
				t.Error(err)
			}
			ends <- vm
		}()
		if err := syscall.Kill(d.VMs()[0].PID, syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		if vm := <-ends; vm.State != api.Exited || vm.ExitStatus == nil || *vm.ExitStatus != 3 {
			t.Errorf("%+v", vm)
		}
		d.end(t, dir)
	}
}

// A VM is renamed, for good; two have no name in common.
func TestRename(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	for _, name := range []string{"one", "two"} {
		o, err := d.Run(api.Run{Image: "docker://image", Name: name})
		if err := d.done(t, o, err); err != nil {
			t.Fatal(err)
		}
	}
	id := d.is(t, "one", api.Running).ID
	if _, err := d.Rename("one", "two"); !errors.Is(err, ErrConflict) {
		t.Error(err)
	}
	if _, err := d.Rename("one", "No name"); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	if _, err := d.Rename("none", "three"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if vm, err := d.Rename("one", "three"); err != nil || vm.Name != "three" || vm.ID != id {
		t.Error(vm, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	if vm := d.is(t, "three", api.Running); vm.ID != id {
		t.Errorf("%+v", vm)
	}
	if _, err := d.VM("one"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	d.end(t, dir)
}

// A guest that does not shut down is killed, and the VM starts again. What a run changes of its image's
// program is checked.
func TestRestartKills(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	o, err := d.Run(api.Run{Image: "docker://image"})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	before := d.is(t, "image", api.Running)
	o, err = d.Restart("image", 10*time.Millisecond)
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if vm := d.is(t, "image", api.Running); vm.PID == before.PID {
		t.Errorf("%+v", vm)
	}
	b, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(d.is(t, "image", api.Running).PID), "cmdline"))
	if err != nil || len(b) < 6 || string(b[len(b)-7:]) != "--boot\x00" {
		t.Errorf("%q, %v", b, err)
	}
	for _, r := range []api.Run{
		{Dir: "relative"}, {User: "a\x00"}, {Egress: []string{"a b"}}, {Egress: []string{}}, {Restart: "often"}, {Restart: api.Always, Remove: true},
		{Restart: api.Always, TTY: true},
	} {
		r.Image = "docker://image"
		if _, err := d.Run(r); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	d.end(t, dir)
}

package vmm

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"drafter/internal/lockfile"
	"drafter/internal/process"
)

// TestOrphanReclaimed starts a process in a VM directory whose owner then vanishes.
func TestOrphanReclaimed(t *testing.T) {
	base := t.TempDir()
	d, err := CreateDir(base, "test")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	id, err := process.Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Record(id); err != nil {
		t.Fatal(err)
	}
	parent := filepath.Join(base, "test")
	if err := ReclaimOrphans(parent); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(d.Root()); err != nil {
		t.Fatalf("the directory of a live owner was removed: %v", err)
	}
	// What a kill -9 of the owner does: the lock is gone, the directory is not.
	if err := d.lock.Abandon(); err != nil {
		t.Fatal(err)
	}
	if err := ReclaimOrphans(parent); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || !strings.Contains(exit.Error(), "killed") {
		t.Errorf("the orphan ended with %v; want killed", err)
	}
	entries, err := os.ReadDir(parent)
	if err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// TestReclaimAll cleans up behind two killed owners, below a directory that is named relative to this process' own.
func TestReclaimAll(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := ReclaimAll("vms"); err != nil {
		t.Fatalf("nothing there: %v", err)
	}
	for _, driver := range []string{"peer", "test"} {
		d, err := CreateDir("vms", driver)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.lock.Abandon(); err != nil {
			t.Fatal(err)
		}
	}
	live, err := CreateDir("vms", "live")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("vms/note", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ReclaimAll("vms"); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob("vms/*/*")
	if err != nil || len(left) != 1 || filepath.Base(left[0]) != live.ID {
		t.Errorf("left: %v, %v; want the live one", left, err)
	}
	if err := live.Close(); err != nil {
		t.Error(err)
	}
}

// A process is ended only if all of what was noted of it agrees, and only cgroups of VMs are removed.
func TestReclaimChecksIdentity(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	id, err := process.Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*process.Identity){
		"start time": func(id *process.Identity) { id.StartTime = "1" },
		"executable": func(id *process.Identity) { id.Executable = "1:2" },
		"nothing":    func(id *process.Identity) { id.Executable, id.StartTime = "", "" },
	} {
		forged := id
		change(&forged)
		if err := forged.Reclaim("test"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := filepath.Join(t.TempDir(), "drafter", "test")
	if err := os.MkdirAll(other, 0o700); err != nil {
		t.Fatal(err)
	}
	forged := id
	forged.Cgroups = []string{other}
	if err := forged.Reclaim("test"); err == nil || !strings.Contains(err.Error(), "not a cgroup of VM test") {
		t.Errorf("a directory that is no cgroup: %v", err)
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("it was removed: %v", err)
	}
	if _, err := process.Identify(cmd.Process.Pid); err != nil {
		t.Errorf("the process was killed: %v", err)
	}
}

// Where others could make a VM's directory, no VM is started and nothing is cleaned up: a note of theirs would name the process to kill.
func TestForgedDirectory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: giving files away needs root")
	}
	const stranger = 65534
	victim := exec.Command("sleep", "1000")
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	defer victim.Wait()
	defer victim.Process.Kill()
	id, err := process.Identify(victim.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	note, err := json.Marshal(id)
	if err != nil {
		t.Fatal(err)
	}
	forge := func(dir string) {
		t.Helper()
		err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, dirProcess), note, 0o600), os.WriteFile(filepath.Join(dir, dirLock), nil, 0o600))
		if err != nil {
			t.Fatal(err)
		}
	}
	theirs := t.TempDir()
	forge(filepath.Join(theirs, "qemu", "0123456789abcdef"))
	if err := os.Chown(theirs, stranger, stranger); err != nil {
		t.Fatal(err)
	}
	for name, use := range map[string]func() error{
		"create":  func() error { _, err := CreateDir(theirs, "qemu"); return err },
		"reclaim": func() error { return ReclaimAll(theirs) },
	} {
		if err := use(); err == nil || !strings.Contains(err.Error(), "user 65534") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Moved into a directory of root's, it is still a stranger's.
	ours := t.TempDir()
	forged := filepath.Join(ours, "qemu", "0123456789abcdef")
	forge(forged)
	if err := os.Chown(forged, stranger, stranger); err != nil {
		t.Fatal(err)
	}
	if err := ReclaimAll(ours); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(forged); err != nil {
		t.Errorf("a stranger's directory was removed: %v", err)
	}
	if err := victim.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the process was killed: %v", err)
	}
}

func TestDirTooLong(t *testing.T) {
	_, err := CreateDir(filepath.Join(t.TempDir(), strings.Repeat("d", 100)), "test")
	if err == nil || !strings.Contains(err.Error(), "too long for UNIX sockets") {
		t.Errorf("error is %v", err)
	}
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		t.Error("reported as locked")
	}
}

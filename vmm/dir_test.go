package vmm

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"drafter/internal/lockfile"
	"drafter/internal/mark"
	"drafter/internal/need"
	"drafter/internal/process"
)

// TestOrphanReclaimed starts a process in a VM directory whose owner then vanishes.
func TestOrphanReclaimed(t *testing.T) {
	base := t.TempDir()
	d, err := CreateDir(base, "test", nil)
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
	if err := d.Record(Process(id)); err != nil {
		t.Fatal(err)
	}
	parent := filepath.Join(base, "test")
	if err := ReclaimAll(base, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(d.Root()); err != nil {
		t.Fatalf("the directory of a live owner was removed: %v", err)
	}
	// What a kill -9 of the owner does: the lock is gone, the directory is not.
	if err := d.lock.Abandon(); err != nil {
		t.Fatal(err)
	}
	if err := ReclaimAll(base, nil); err != nil {
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

// TestReclaimAll cleans up behind two killed owners, below a directory that is named relative to
// this process' own.
func TestReclaimAll(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := ReclaimAll("vms", nil); err != nil {
		t.Fatalf("nothing there: %v", err)
	}
	for _, driver := range []string{"peer", "test"} {
		d, err := CreateDir("vms", driver, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.lock.Abandon(); err != nil {
			t.Fatal(err)
		}
	}
	live, err := CreateDir("vms", "live", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("vms/note", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ReclaimAll("vms", nil); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob("vms/[a-z]*/*")
	if err != nil || len(left) != 1 || filepath.Base(left[0]) != live.ID {
		t.Errorf("left: %v, %v; want the live one", left, err)
	}
	if err := live.Close(); err != nil {
		t.Error(err)
	}
}

// A process is ended only if all of what was noted of it agrees, and only cgroups of VMs are
// removed.
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

// Where others could make a VM's directory, no VM is started and nothing is cleaned up: a note of
// theirs would name the process to kill.
func TestForgedDirectory(t *testing.T) {
	need.Root(t)
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
	const name = "0123456789abcdef"
	forge := func(dir string) {
		t.Helper()
		records := filepath.Join(filepath.Dir(filepath.Dir(dir)), dirRecords)
		err := errors.Join(os.MkdirAll(dir, 0o700), os.MkdirAll(records, 0o700), os.WriteFile(filepath.Join(dir, dirProcess), note, 0o600))
		if err == nil {
			err = os.WriteFile(filepath.Join(records, "qemu."+name+recordSuffix), nil, 0o600)
		}
		d, oerr := os.Open(dir)
		if err := errors.Join(err, oerr); err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		m, err := mark.Of(d, markFormat, name)
		f, ferr := os.Create(filepath.Join(dir, dirMark))
		if err := errors.Join(err, ferr, m.Write(f), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	theirs := t.TempDir()
	forge(filepath.Join(theirs, "qemu", name))
	if err := os.Chown(theirs, stranger, stranger); err != nil {
		t.Fatal(err)
	}
	for name, use := range map[string]func() error{
		"create":  func() error { _, err := CreateDir(theirs, "qemu", nil); return err },
		"reclaim": func() error { return ReclaimAll(theirs, nil) },
	} {
		if err := use(); err == nil || !strings.Contains(err.Error(), "user 65534") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Moved into a directory of root's, it is still a stranger's.
	ours := t.TempDir()
	forged := filepath.Join(ours, "qemu", name)
	forge(forged)
	if err := os.Chown(forged, stranger, stranger); err != nil {
		t.Fatal(err)
	}
	if err := ReclaimAll(ours, nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(forged); err != nil {
		t.Errorf("a stranger's directory was removed: %v", err)
	}
	if err := victim.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the process was killed: %v", err)
	}
}

// Where a base is somebody's directory, nothing of theirs is removed, whatever it looks like: not
// what has a lock in it, nor what is called like something in the making, nor what a release
// without marks made.
func TestSomebodysDirectories(t *testing.T) {
	base := t.TempDir()
	old := time.Now().Add(-time.Hour)
	for _, dir := range []string{"apt/lists", "apt/lists.new", "qemu/0123456789abcdef", "qemu/snapshot.new", dirRecords + "/precious"} {
		path := filepath.Join(base, dir)
		err := errors.Join(os.MkdirAll(path, 0o700), os.Chmod(path, 0o700), os.WriteFile(filepath.Join(path, "lock"), nil, 0o640), os.WriteFile(filepath.Join(path, "data"), nil, 0o600), os.Chtimes(path, old, old))
		if err != nil {
			t.Fatal(err)
		}
	}
	// A record of what is somebody's by now, and files that are no records.
	for _, name := range []string{"qemu.0123456789abcdef.lock", "qemu.fedcba9876543210.lock", "note.txt"} {
		if err := os.WriteFile(filepath.Join(base, dirRecords, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Mkdir(filepath.Join(base, "qemu/fedcba9876543210"), 0o700), os.Chmod(filepath.Join(base, dirRecords), 0o700)); err != nil {
		t.Fatal(err)
	}
	d, err := CreateDir(base, "qemu", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"apt/lists/data", "apt/lists.new/data", "qemu/0123456789abcdef/data", "qemu/snapshot.new/data", dirRecords + "/precious/data", dirRecords + "/note.txt"} {
		if _, err := os.Stat(filepath.Join(base, file)); err != nil {
			t.Errorf("somebody's file: %v", err)
		}
	}
	left, err := os.ReadDir(filepath.Join(base, "qemu"))
	if err != nil || len(left) != 2 { // an owner that was killed before it marked its directory leaves an empty one, which goes
		t.Errorf("left: %v, %v", left, err)
	}
	if records, err := filepath.Glob(filepath.Join(base, dirRecords, "*.lock")); err != nil || len(records) != 0 {
		t.Errorf("records: %v, %v", records, err)
	}
}

// A copy of a base is somebody's: neither the copied directory goes, nor the VMM that lives in the
// original.
func TestCopyOfBase(t *testing.T) {
	base, copied := t.TempDir(), filepath.Join(t.TempDir(), "copy")
	d, err := CreateDir(base, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	id, err := process.Identify(cmd.Process.Pid)
	if err := errors.Join(err, d.Record(Process(id))); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", base, copied).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := ReclaimAll(copied, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(copied, "test", d.ID, dirProcess)); err != nil {
		t.Errorf("the copy was removed: %v", err)
	}
	if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the VMM of the original was ended: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// What a power cut leaves of the notes ends no start.
func TestAfterPowerCut(t *testing.T) {
	base := t.TempDir()
	d, err := CreateDir(base, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{dirProcess, dirLent} {
		if err := os.WriteFile(filepath.Join(d.Path(), name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(d.lock.Abandon(), ReclaimAll(base, nil)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(d.Path()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it stays: %v", err)
	}
}

// Many make directories at once, and all look for orphans meanwhile: nobody is in another one's
// way.
func TestManyDirs(t *testing.T) {
	base := t.TempDir()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 20 {
				d, err := CreateDir(base, "test", nil)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := os.Stat(d.Root()); err != nil {
					t.Error(err)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if left, err := filepath.Glob(filepath.Join(base, "*/*")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestCheckBaseDir(t *testing.T) {
	t.Chdir(t.TempDir())
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/", link); err != nil {
		t.Fatal(err)
	}
	for _, base := range []string{"", "/", "//", "/..", link} {
		if _, err := CreateDir(base, "test", nil); err == nil || !strings.Contains(err.Error(), "--chroot-base-dir") {
			t.Errorf("create in %q: %v", base, err)
		}
		if err := ReclaimAll(base, nil); err == nil {
			t.Errorf("reclaim in %q: no error", base)
		}
	}
	if entries, err := os.ReadDir("."); err != nil || len(entries) != 0 {
		t.Errorf("made: %v, %v", entries, err)
	}
}

func TestDirTooLong(t *testing.T) {
	_, err := CreateDir(filepath.Join(t.TempDir(), strings.Repeat("d", 100)), "test", nil)
	if err == nil || !strings.Contains(err.Error(), "too long for UNIX sockets") {
		t.Errorf("error is %v", err)
	}
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		t.Error("reported as locked")
	}
}

package vmm

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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

// TestReclaimSparesStrangers makes sure that a reused process id is not killed.
func TestReclaimSparesStrangers(t *testing.T) {
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
	id.StartTime = "1"
	if err := id.Reclaim("test"); err != nil {
		t.Fatal(err)
	}
	if _, err := process.Identify(cmd.Process.Pid); err != nil {
		t.Errorf("a process with another start time was killed: %v", err)
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

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	until "drafter/internal/await"
	"drafter/internal/tour"
)

// acknowledged is how many numbers of the load have been acknowledged.
func (l *load) acknowledged() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.acked)
}

// getsOn waits until a load has got some way.
func (l *load) getsOn(t *testing.T) {
	t.Helper()
	before := l.acknowledged()
	until.True(t, "the load gets on", func() bool { return l.acknowledged() >= before+100 })
}

// holds checks that a Redis has at least the first n numbers of a load, in order.
func holds(t *testing.T, c *redis.Client, n int) {
	t.Helper()
	list, err := c.LRange(t.Context(), "load", 0, -1).Result()
	if err != nil {
		t.Fatal(err)
	}
	next := 0
	for i := 0; i < len(list); i += 2 {
		if list[i] == fmt.Sprint(next) {
			next++
		}
	}
	if next < n {
		t.Errorf("%d numbers were acknowledged before, %d are there", n, next)
	}
}

// cleanDisks checks the file systems of a package's disks as a boot would: a journal may be
// replayed, nothing else may be wrong.
func cleanDisks(t *testing.T, pkg string) {
	t.Helper()
	disks, err := filepath.Glob(filepath.Join(pkg, "*.ext4"))
	if err != nil || len(disks) == 0 {
		t.Fatalf("disks of %s: %v, %v", pkg, disks, err)
	}
	for _, disk := range disks {
		scratch := disk + ".check"
		if out, err := exec.Command("cp", "--sparse=always", disk, scratch).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		replay := exec.Command("e2fsck", "-E", "journal_only", "-y", scratch)
		out, _ := replay.CombinedOutput() // 1: it replayed
		if replay.ProcessState.ExitCode() > 1 {
			t.Errorf("%s: replay: %s", disk, out)
		}
		if out, err := exec.Command("e2fsck", "-fn", scratch).CombinedOutput(); err != nil {
			t.Errorf("%s is not clean: %v: %s", disk, err, out)
		}
		if err := os.Remove(scratch); err != nil {
			t.Error(err)
		}
	}
}

// resumes runs a package, once, and returns what has to be ended.
func (s *site) resumes(t *testing.T, pkg, netns string) *tour.Service {
	t.Helper()
	return s.start(t, "runner", "--chroot-base-dir", "vms", "--netns", netns, "--devices", tour.PackageDevices(pkg))
}

// A VM under load is checkpointed five times, over the same files, and terminated at last. Each
// result runs again with all that was acknowledged before, and the VM never stops for longer than
// for a handoff.
func TestCheckpoints(t *testing.T) {
	s := emptySite(t)
	c := s.redisIn(t, "ark1", "127.0.0.1:4444")
	s.redisIn(t, "ark0", "127.0.0.1:3333")
	vm := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337")
	l := startLoad(t.Context(), "127.0.0.1:3333")
	backup := filepath.Join(s.dir, "backup")
	for i := range soak(3, 10) {
		l.getsOn(t)
		before := l.acknowledged()
		if err := s.Run(t.Context(), os.Stderr, "checkpoint", "--raddr", "localhost:1337", "--output", backup); err != nil {
			t.Fatal(err)
		}
		cleanDisks(t, backup)
		copied := s.resumes(t, backup, "ark1")
		holds(t, c, before)
		end(t, copied)
		t.Logf("checkpoint %d holds the first %d writes; %d are acknowledged by now", i, before, l.acknowledged())
	}
	l.stop()
	l.wg.Wait()
	before := l.acknowledged()
	if err := s.Run(t.Context(), os.Stderr, "terminator", "--raddr", "localhost:1337", "--output", backup); err != nil {
		t.Fatal(err)
	}
	if err := vm.Wait(); err != nil {
		t.Fatal(err)
	}
	cleanDisks(t, backup)
	ended := s.resumes(t, backup, "ark1")
	holds(t, c, before)
	end(t, ended)
	t.Logf("%d writes, longest silence %s", before, l.gap.Round(time.Millisecond))
	if line := s.fails(t, s.peerArgs("instance-0")...); !strings.Contains(line, "moved away") {
		t.Errorf("an instance that was terminated starts again: %s", line)
	}
}

// Only some devices are written, and what cannot work is refused before anything happens.
func TestSomeDevices(t *testing.T) {
	s := emptySite(t)
	c := s.redisIn(t, "ark0", redisAddr)
	vm := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337")
	device := func(name, output string) string {
		return fmt.Sprintf(`[{"name":%q,"output":%q}]`, name, filepath.Join(s.dir, output))
	}
	if err := s.Run(t.Context(), os.Stderr, "checkpoint", "--raddr", "localhost:1337", "--devices", device("disk", "disks/only.img")); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(s.dir, "disks/*"))
	if err != nil || len(files) != 1 {
		t.Errorf("files: %v, %v", files, err)
	}
	if line := s.fails(t, "terminator", "--raddr", "localhost:1337", "--devices", device("data", "disks/data.img")); !strings.Contains(line, "device data does not come with the VM") {
		t.Error(line)
	}
	if err := c.Set(t.Context(), "runs", "on", 0).Err(); err != nil {
		t.Error(err)
	}
	end(t, vm)
}

// A checkpoint that is killed, or whose disk is full, leaves the checkpoint before it, and the VM
// as it is.
func TestFailedCheckpoint(t *testing.T) {
	s := emptySite(t)
	c := s.redisIn(t, "ark0", redisAddr)
	vm := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337")
	small := filepath.Join(s.dir, "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", small).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	unmounted := false
	defer func() {
		if !unmounted {
			exec.Command("umount", "-l", small).Run()
		}
	}()
	backup := filepath.Join(small, "backup")
	checkpoint := []string{"checkpoint", "--raddr", "localhost:1337", "--output", backup}
	if err := s.Run(t.Context(), os.Stderr, checkpoint...); err != nil {
		t.Fatal(err)
	}
	before := sums(t, backup)
	if out, err := exec.Command("sh", "-c", "head -c 1000m /dev/zero > "+small+"/filler; true").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if line := s.fails(t, checkpoint...); !strings.Contains(line, "no space left") {
		t.Errorf("a full disk: %s", line)
	}
	if after := sums(t, backup); after != before {
		t.Errorf("a full disk changed the checkpoint before:\n%s\nwas:\n%s", after, before)
	}
	if err := os.Remove(filepath.Join(small, "filler")); err != nil {
		t.Fatal(err)
	}
	killed, err := s.Start(append(checkpoint, "--log-level", "debug")...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := killed.Await(t.Context(), "Receiving the VM's devices while it runs at its source"); err != nil {
		t.Fatal(err)
	}
	if err := killed.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, killed)
	if after := sums(t, backup); after != before {
		t.Errorf("a killed checkpoint changed the one before:\n%s\nwas:\n%s", after, before)
	}
	if err := c.Set(t.Context(), "runs", "on", 0).Err(); err != nil {
		t.Error(err)
	}
	if err := s.Run(t.Context(), os.Stderr, checkpoint...); err != nil {
		t.Error(err)
	}
	if entries, err := os.ReadDir(small); err != nil || len(entries) != 1 {
		t.Errorf("left beside the checkpoint: %v, %v", entries, err)
	}
	end(t, vm)
	if out, err := exec.Command("umount", small).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	unmounted = true
}

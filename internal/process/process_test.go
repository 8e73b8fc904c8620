package process

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"drafter/internal/await"
)

// TestMain doubles as an owner that starts a child and waits to be killed.
func TestMain(m *testing.M) {
	if os.Getenv("PROCESS_TEST_OWNER") != "" {
		p, err := Start(Config{Path: "/bin/sleep", Args: []string{"1000"}})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(p.PID())
		select {}
	}
	if what := os.Getenv("PROCESS_TEST_MEMBER"); what != "" {
		if err := member(what); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func TestStartAndKill(t *testing.T) {
	p, err := Start(Config{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := p.Wait(); !errors.As(err, &exit) {
		t.Errorf("ended with %v", err)
	}
	if err := p.Kill(); err != nil {
		t.Errorf("killing a dead process: %v", err)
	}
}

// TestRoom: the kernel's table of a child's descriptors is large from the start (FDSize of
// proc_pid_status(5)).
func TestRoom(t *testing.T) {
	p, err := Start(Config{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "\nFDSize:")
	line, _, _ := strings.Cut(after, "\n")
	if n, err := strconv.Atoi(strings.TrimSpace(line)); err != nil || n < room {
		t.Errorf("the child's table has room for %d descriptors (%v); want at least %d", n, err, room)
	}
}

// A child leaves no core dump, and what this process may leave is as before.
func TestNoCore(t *testing.T) {
	var before unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_CORE, nil, &before); err != nil {
		t.Fatal(err)
	}
	soft := min(4096, before.Max)
	if err := setCoreLimit(soft, before.Max); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := setCoreLimit(before.Cur, before.Max); err != nil {
			t.Error(err)
		}
	})
	p, err := Start(Config{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	for pid, want := range map[int]uint64{p.PID(): 0, 0: soft} {
		var limit unix.Rlimit
		if err := unix.Prlimit(pid, unix.RLIMIT_CORE, nil, &limit); err != nil || limit.Cur != want {
			t.Errorf("process %d may dump %d bytes (%v); want %d", pid, limit.Cur, err, want)
		}
	}
}

func TestStartErrors(t *testing.T) {
	for name, tt := range map[string]struct {
		config Config
		want   string
	}{
		"no such program":   {Config{Path: "/does/not/exist"}, "start /does/not/exist"},
		"no such namespace": {Config{Path: "/bin/true", Netns: "does-not-exist"}, "start drafter nat"},
		"no such node":      {Config{Path: "/bin/true", NUMANode: 999}, "NUMA node 999 does not exist"},
		"no such cgroup":    {Config{Path: "/bin/true", CgroupVersion: 3}, "cgroup version 3 does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Start(tt.config)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v; want one with %q", err, tt.want)
			}
		})
	}
}

func TestUserAndCgroup(t *testing.T) {
	cgroupVersions(t, func(t *testing.T, version int) {
		p, err := Start(Config{Path: "/bin/sleep", Args: []string{"1000"}, UID: 65534, GID: 65534, CgroupVersion: version, CgroupName: "process-test"})
		if err != nil {
			t.Fatal(err)
		}
		groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID()))
		if err != nil || !strings.Contains(string(groups), "/drafter/process-test") {
			t.Errorf("its cgroups are %q, %v", groups, err)
		}
		var st syscall.Stat_t
		if err := syscall.Stat(fmt.Sprintf("/proc/%d", p.PID()), &st); err != nil || st.Uid != 65534 {
			t.Errorf("it runs as %d, %v", st.Uid, err)
		}
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
		var exit *exec.ExitError
		if err := p.Wait(); !errors.As(err, &exit) {
			t.Errorf("ended with %v", err)
		}
		for _, dir := range p.Identity().Cgroups {
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("cgroup %s stays: %v", dir, err)
			}
		}
	})
}

// TestChildDiesWithOwner kills an owner with SIGKILL, which gives it no chance to clean up.
func TestChildDiesWithOwner(t *testing.T) {
	owner := exec.Command(os.Args[0])
	owner.Env = append(os.Environ(), "PROCESS_TEST_OWNER=1")
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(child, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	owner.Wait()
	if err := waitPidfd(fd, 10*time.Second); err != nil {
		t.Errorf("the child outlives its owner: %v", err)
	}
}

func TestParseCPUList(t *testing.T) {
	set, err := parseCPUList("0-2,5")
	if err != nil || set.Count() != 4 || !set.IsSet(5) || set.IsSet(3) {
		t.Errorf("0-2,5 is %d CPUs, %v", set.Count(), err)
	}
	for _, bad := range []string{"", "x", "3-1", "1-"} {
		if _, err := parseCPUList(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// A process whose first thread has ended while another has not holds what it has; one that runs, or
// is gone, is not dying.
func TestDying(t *testing.T) {
	source := `#include <pthread.h>
#include <unistd.h>
static void *stay(void *x) { pause(); return x; }
int main(void) { pthread_t t; pthread_create(&t, 0, stay, 0); pthread_exit(0); }`
	bin := filepath.Join(t.TempDir(), "leaderless")
	gcc := exec.Command("gcc", "-pthread", "-x", "c", "-o", bin, "-")
	gcc.Stdin = strings.NewReader(source)
	if out, err := gcc.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cmd := exec.Command(bin)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	await.True(t, "it is seen to be dying", func() bool { return Dying(pid) })
	if Dying(os.Getpid()) {
		t.Error("this process is said to be dying")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if Dying(pid) {
		t.Error("a process that is gone is said to be dying")
	}
}

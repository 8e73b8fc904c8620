package process

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

// cgroupVersions calls use with each version that this host has.
func cgroupVersions(t *testing.T, use func(t *testing.T, version int)) {
	t.Helper()
	need.Root(t)
	for _, version := range []int{1, 2} {
		t.Run(strconv.Itoa(version), func(t *testing.T) {
			if _, err := findHierarchies(version); err != nil {
				need.Lacks(t, fmt.Sprint("cgroup", version), err)
			}
			use(t, version)
		})
	}
}

// run runs a shell script in a group with limits and returns what it prints, and how it ended.
func run(t *testing.T, version int, limits Limits, script string) (string, error) {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p, err := Start(Config{Path: "/bin/sh", Args: []string{"-c", script}, CgroupVersion: version, CgroupName: "limits-test", Limits: limits, Stdout: out, Stderr: out, Env: []string{"PATH=" + os.Getenv("PATH")}})
	if err != nil {
		var unavailable *UnavailableError
		if errors.As(err, &unavailable) {
			need.Lacks(t, fmt.Sprint("cgroup", version), err)
		}
		t.Fatal(err)
	}
	ended := p.Wait()
	for _, dir := range p.Identity().Cgroups {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("cgroup %s stays: %v", dir, err)
		}
	}
	b, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(b), ended
}

// A child is in its group before it does anything, and the thread that started it is not.
func TestStartsInCgroup(t *testing.T) {
	cgroupVersions(t, func(t *testing.T, version int) {
		own, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		out, err := run(t, version, Limits{}, "exec cat /proc/self/cgroup")
		if err != nil || !strings.Contains(out, "/drafter/limits-test") {
			t.Errorf("it began in %s, %v", out, err)
		}
		after, err := os.ReadFile("/proc/self/cgroup")
		if err != nil || string(after) != string(own) {
			t.Errorf("this process is in %s, %v; was in %s", after, err, own)
		}
	})
}

// Each limit holds for a child that tries to exceed it.
func TestLimits(t *testing.T) {
	cgroupVersions(t, func(t *testing.T, version int) {
		t.Run("memory", func(t *testing.T) {
			out, err := run(t, version, Limits{Memory: 16 << 20}, "echo began; head -c 50000000 /dev/zero | tail -c 40000000 > /dev/null")
			if !strings.HasPrefix(out, "began\n") || !errors.Is(err, errOutOfMemory) {
				t.Errorf("40 MB in 16 MiB: %q, %v", out, err)
			}
		})
		t.Run("memory that suffices", func(t *testing.T) {
			if out, err := run(t, version, Limits{Memory: 16 << 20}, "echo began"); out != "began\n" || err != nil {
				t.Errorf("%q, %v", out, err)
			}
		})
		t.Run("processes", func(t *testing.T) {
			out, err := run(t, version, Limits{PIDs: 5}, "for i in 1 2 3 4 5 6 7 8 9; do sleep 1000 & echo $i; done")
			// Beside the shell, the thread that started it counts in version 1, until it has left
			// the group.
			if strings.Contains(out, "5\n") || !strings.Contains(out, "3\n") {
				t.Errorf("9 children of a shell, 5 processes: %q, %v", out, err)
			}
		})
		t.Run("CPUs", func(t *testing.T) {
			begin := time.Now()
			p, err := Start(Config{Path: "/bin/sh", Args: []string{"-c", "while :; do :; done"}, CgroupVersion: version, CgroupName: "limits-test", Limits: Limits{CPUs: 0.1}})
			var unavailable *UnavailableError
			if errors.As(err, &unavailable) {
				need.Lacks(t, fmt.Sprint("cgroup", version), err)
			}
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second) // what it may use is per time
			used, err := cpuTime(p.PID())
			elapsed := time.Since(begin)
			if kerr := p.Kill(); err != nil || kerr != nil {
				t.Fatal(err, kerr)
			}
			p.Wait()
			if used > elapsed/4 {
				t.Errorf("it used %s of %s; it may use a tenth", used, elapsed)
			}
		})
	})
}

// cpuTime reads utime and stime of proc_pid_stat(5), in ticks of 10 ms.
func cpuTime(pid int) (time.Duration, error) {
	fields, err := statFields(pid)
	if err != nil {
		return 0, err
	}
	user, err := strconv.Atoi(fields[11])
	system, serr := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err, serr)
}

// What is asked for and cannot be had is an error that says why; nothing is left.
func TestUnavailableLimit(t *testing.T) {
	need.Root(t)
	if _, err := Start(Config{Path: "/bin/true", Limits: Limits{Memory: 1 << 30}}); err == nil || !strings.Contains(err.Error(), "without a cgroup") {
		t.Errorf("without a cgroup: %v", err)
	}
	hierarchies, err := findHierarchies(2)
	if err != nil || lists(filepath.Join(hierarchies[0].mount, "cgroup.controllers"), "memory") {
		need.Lacks(t, "cgroup2-without-memory", fmt.Sprint("cgroup version 2 has the controller memory here, or there is none: ", err))
	}
	_, err = Start(Config{Path: "/bin/true", CgroupVersion: 2, CgroupName: "limits-test", Limits: Limits{Memory: 1 << 30}})
	if err == nil || !strings.Contains(err.Error(), "--memory-max") || !strings.Contains(err.Error(), "--cgroup-version 1") {
		t.Errorf("without the controller: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(hierarchies[0].mount, cgroupPath("limits-test"))); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A group of that name that somebody has made stays, as does what only looks like a VM's.
func TestSomebodysCgroup(t *testing.T) {
	cgroupVersions(t, func(t *testing.T, version int) {
		hierarchies, err := findHierarchies(version)
		if err != nil {
			t.Fatal(err)
		}
		parent := filepath.Join(hierarchies[0].mount, "somebodys-"+strconv.Itoa(os.Getpid()))
		dir := filepath.Join(parent, "vm")
		if err := os.Mkdir(parent, 0o755); err != nil {
			need.Lacks(t, fmt.Sprint("cgroup", version), err)
		}
		defer unix.Rmdir(parent)
		for range 2 {
			if err := errors.Join(makeGroup(dir), removeCgroup([]string{dir})); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(parent); err != nil {
				t.Errorf("somebody's group: %v", err)
			}
		}
		ours := filepath.Join(parent, "ours", "vm")
		if err := errors.Join(makeGroup(ours), removeCgroup([]string{ours})); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Dir(ours)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the parent stays: %v", err)
		}
		for _, forged := range []string{parent, filepath.Join(parent, "drafter/other"), "/tmp/drafter/vm", hierarchies[0].mount + "/../drafter/vm"} {
			if err := checkCgroups([]string{forged}, "vm"); err == nil {
				t.Errorf("%s passes for the group of a VM", forged)
			}
		}
	})
}

// A unit to which systemd has delegated its group has its VMs there.
func TestDelegated(t *testing.T) {
	need.Root(t)
	hierarchies, err := findHierarchies(2)
	if err != nil {
		need.Lacks(t, "cgroup2", err)
	}
	mount := hierarchies[0].mount
	if got := delegated(mount); got != mount {
		need.Lacks(t, "undelegated-cgroup", "this process is in a delegated group, "+got)
	}
	unit := filepath.Join(mount, fmt.Sprintf("unit-%d", os.Getpid()))
	leaf := filepath.Join(unit, "service")
	if err := errors.Join(os.Mkdir(unit, 0o755), os.Mkdir(leaf, 0o755)); err != nil {
		need.Lacks(t, "cgroup2", err)
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "0::")
	home, _, _ := strings.Cut(after, "\n")
	join := func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)
	}
	defer func() {
		if err := errors.Join(join(filepath.Join(mount, home)), unix.Rmdir(leaf), unix.Rmdir(unit)); err != nil {
			t.Error(err)
		}
	}()
	if err := errors.Join(unix.Setxattr(unit, "user.delegate", []byte("1"), 0), join(leaf)); err != nil {
		need.Lacks(t, "cgroup2", err)
	}
	if got := delegated(mount); got != unit {
		t.Errorf("VMs go to %s; want %s", got, unit)
	}
	g, err := createCgroup(2, "limits-test", Limits{}, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(unit, "drafter", "limits-test"); g.dirs[0] != want || checkCgroups(g.dirs, "limits-test") != nil {
		t.Errorf("a VM's group is %s, want %s", g.dirs[0], want)
	}
	if err := removeCgroup(g.dirs); err != nil {
		t.Error(err)
	}
}

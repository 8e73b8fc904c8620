package process

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

// member is this program, as a process in a group that does as its environment says.
func member(what string) error {
	size := 48 << 20
	switch what {
	case "owner": // of a VM: its VMM gets a group of its own
		p, err := Start(
			Config{
				Path:          "/bin/cat",
				Args:          []string{"/proc/self/cgroup"},
				CgroupVersion: 2,
				CgroupName:    "vmm",
				Stdout:        os.Stdout,
			},
		)
		if err != nil {
			return err
		}
		return p.Wait()
	case "memory":
		b := make([]byte, size)
		for i := range b {
			b[i] = 1
		}
	case "memfd": // as guest memory
		fd, err := unix.MemfdCreate("guest", 0)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), "guest")
		_, err = io.Copy(f, io.LimitReader(zeros{}, int64(size)))
		return err
	case "write":
		f, err := os.OpenFile(os.Getenv("PROCESS_TEST_FILE"), os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		for range 4 {
			if _, err := f.Write(make([]byte, 1<<20)); err != nil {
				return err
			}
			if err := f.Sync(); err != nil {
				return err
			}
		}
		return f.Close()
	}
	return nil
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// within runs this program in a new group, as detached processes run, and returns what it prints.
func within(
	t *testing.T,
	limits Limits,
	disk Bandwidth,
	what string,
	env ...string,
) (g *Group, out string, err error) {
	t.Helper()
	need.Root(t)
	base, have, err := Controllers()
	if err != nil {
		need.Lacks(t, "cgroup2", err)
	}
	for _, b := range append(limits.bounds(2), disk.bounds()...) {
		if !strings.Contains(" "+strings.Join(have, " ")+" ", " "+b.controller+" ") {
			need.Lacks(
				t,
				"cgroup2",
				"there is no controller "+b.controller+" in cgroup version 2 here",
			)
		}
	}
	g, err = NewGroup(base, fmt.Sprint("group-test-", os.Getpid()), limits, disk, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Remove(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(g.Path); !errors.Is(err, os.ErrNotExist) {
			t.Error("the group stays:", err)
		}
	})
	entrance, err := g.Entrance()
	if err != nil {
		t.Fatal(err)
	}
	defer entrance.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(append(os.Environ(), "PROCESS_TEST_MEMBER="+what), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(entrance.Fd())}
	b, err := cmd.CombinedOutput()
	return g, string(b), err
}

// A process begins in the group, and the VMM that it starts gets a group of its own there.
func TestGroup(t *testing.T) {
	g, out, err := within(t, Limits{PIDs: -1}, Bandwidth{}, "owner")
	_, path, _ := strings.Cut(out, "0::")
	if path = strings.TrimSpace(path); err != nil ||
		!strings.HasSuffix(path, "/drafter/"+filepath.Base(g.Path)+"/drafter/vmm") {
		t.Errorf("the VMM was in %s, %v; the group is %s", out, err, g.Path)
	}
	if found, err := FindGroup(g.Path, filepath.Base(g.Path)); err != nil || found == nil ||
		*found != *g {
		t.Errorf("found %+v, %v", found, err)
	}
	if found, err := FindGroup(g.Path, "another"); err == nil {
		t.Errorf("it is another VM's: %+v", found)
	}
	if found, err := FindGroup(g.Path+"-none", "group-test"); found != nil || err != nil {
		t.Errorf("found %+v, %v", found, err)
	}
	other := filepath.Join(filepath.Dir(g.Path), "somebody")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	defer unix.Rmdir(other)
	if found, err := FindGroup(other, "another"); err == nil {
		t.Errorf("it is somebody else's: %+v", found)
	}
	// whoever made this one was killed before it was marked
	if found, err := FindGroup(other, "somebody"); found != nil || err != nil {
		t.Errorf("found %+v, %v", found, err)
	}
	// and one that is there already is made anew
	again, err := NewGroup(
		filepath.Dir(filepath.Dir(g.Path)),
		filepath.Base(g.Path),
		Limits{PIDs: -1},
		Bandwidth{},
		slog.Default(),
	)
	if err != nil || again.Path != g.Path {
		t.Error(again, err)
	}
}

// What is left in a group is killed as it is removed.
func TestGroupEndsMembers(t *testing.T) {
	g, _, err := within(t, Limits{PIDs: -1}, Bandwidth{}, "nothing")
	if err != nil {
		t.Fatal(err)
	}
	sleep := exec.Command("sleep", "1000")
	entrance, err := g.Entrance()
	if err != nil {
		t.Fatal(err)
	}
	defer entrance.Close()
	sleep.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(entrance.Fd())}
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- sleep.Wait() }()
	if err := g.Remove(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !Signaled(err, syscall.SIGKILL) {
		t.Error(err)
	}
}

// Memory counts for the group, also that of a memfd, and what is killed for it is known.
func TestGroupMemory(t *testing.T) {
	for _, what := range []string{"memory", "memfd"} {
		t.Run(what, func(t *testing.T) {
			g, out, err := within(t, Limits{Memory: 32 << 20, PIDs: -1}, Bandwidth{}, what)
			if !Signaled(err, syscall.SIGKILL) || !g.OutOfMemory() {
				t.Errorf("48 MiB in 32 MiB: %v, %s", err, out)
			}
		})
		t.Run(what+" that suffices", func(t *testing.T) {
			g, out, err := within(t, Limits{Memory: 128 << 20, PIDs: -1}, Bandwidth{}, what)
			if err != nil || g.OutOfMemory() {
				t.Errorf("%v, %s", err, out)
			}
		})
	}
}

// Writes of a group are as slow as they are to be.
func TestGroupBandwidth(t *testing.T) {
	dir, err := os.MkdirTemp(os.Getenv("PROCESS_TEST_DISK"), "group-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	disk, err := DiskOf(dir)
	if err != nil {
		need.Lacks(t, "disk", err)
	}
	began := time.Now()
	_, out, err := within(
		t,
		Limits{PIDs: -1},
		Bandwidth{Disk: disk, Write: 2 << 20},
		"write",
		"PROCESS_TEST_FILE="+filepath.Join(dir, "file"),
	)
	if took := time.Since(began); err != nil || took < time.Second {
		t.Errorf("4 MiB at 2 MiB/s: %s, %v, %s", took, err, out)
	}
}

// What is written for each limit, into a directory that stands in for a group.
func TestGroupFiles(t *testing.T) {
	base := t.TempDir()
	if err := unix.Setxattr(base, "user.test", nil, 0); err != nil {
		need.Lacks(t, "xattr", err)
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(base, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("cgroup.controllers", "cpu io memory pids\n")
	write("cgroup.subtree_control", "cpu memory pids io\n")
	limits, disk := Limits{Memory: 1 << 30, CPUs: 3, PIDs: 100}, Bandwidth{"8:16", 5, 7}
	g, err := NewGroup(base, "vm", limits, disk, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"memory.max": "1073741824", "cpu.max": "300000 100000", "pids.max": "100", "io.max": "8:16 rbps=5 wbps=7"} {
		if b, err := os.ReadFile(filepath.Join(g.Path, name)); string(b) != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", name, b, err, want)
		}
	}
	for text, want := range map[string]bool{"oom 3\noom_kill 0\n": false, "low 0\noom_kill 2\noom_group_kill 0\n": true} {
		if err := os.WriteFile(filepath.Join(g.Path, "memory.events"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := g.OutOfMemory(); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
	write("cgroup.subtree_control", "cpu memory pids\n")
	write("cgroup.controllers", "cpu memory pids\n")
	var unavailable *UnavailableError
	if _, err := NewGroup(base, "other", limits, disk, slog.Default()); !errors.As(
		err,
		&unavailable,
	) ||
		!strings.Contains(err.Error(), "no controller io") {
		t.Error(err)
	}
}

// A partition's bandwidth is that of its disk. What is on no disk has none.
func TestDiskOf(t *testing.T) {
	sys := t.TempDir()
	for name, text := range map[string]string{"devices/sda/dev": "8:0\n", "devices/sda/sda1/dev": "8:1\n", "devices/sda/sda1/partition": "1\n"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(sys, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sys, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(sys, "dev/block"), 0o700); err != nil {
		t.Fatal(err)
	}
	for number, to := range map[string]string{"8:0": "sda", "8:1": "sda/sda1"} {
		if err := os.Symlink("../../devices/"+to, filepath.Join(sys, "dev/block", number)); err != nil {
			t.Fatal(err)
		}
	}
	for number, want := range map[string]string{"8:0": "8:0", "8:1": "8:0", "0:30": ""} {
		got, err := diskNumber(sys, number, "/dir")
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %s, %v; want %s", number, got, err, want)
		}
	}
}

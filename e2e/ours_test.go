package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	until "drafter/internal/await"
	"drafter/internal/tour"
)

// What is the host's and the guest's own stays theirs: directories below --chroot-base-dir that
// only look like a VM's, and a clock that was set by hand, which a checkpoint leaves alone and only
// a resume sets. The VMM is in its cgroup from the start, with the limits that were given.
func TestOursAndTheirs(t *testing.T) {
	s := emptySite(t)
	old := time.Now().Add(-time.Hour)
	var theirs []string
	for _, dir := range []string{"apt/lists", "apt/lists.new", "qemu/0123456789abcdef", "drafter/peer.new"} {
		path := filepath.Join(s.dir, "base", dir)
		theirs = append(theirs, filepath.Join(path, "data"))
		err := errors.Join(os.MkdirAll(path, 0o700), os.WriteFile(filepath.Join(path, "lock"), nil, 0o640), os.WriteFile(filepath.Join(path, "data"), nil, 0o600), os.Chtimes(path, old, old))
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, base := range []string{"", "/"} {
		if line := s.fails(t, s.peerArgs("instance", "--chroot-base-dir", base)...); !strings.Contains(line, "name a directory for VMs") {
			t.Errorf("base %q: %s", base, line)
		}
	}
	if line := s.fails(t, s.peerArgs("instance", "--memory-max", "100MB", "--cgroup-version", "1")...); !strings.Contains(line, "--memory-max") {
		t.Errorf("a limit below the VM's memory: %s", line)
	}
	flags := []string{"--chroot-base-dir", "base", "--netns", "ark0", "--enable-input", "--laddr", "localhost:1337", "--cgroup-version", "1", "--memory-max", "2GiB", "--pids-max", "200", "--cpus-max", "2"}
	vm := s.peer(t, "instance", flags...)
	checkLimits(t, s.vmmPIDIn(t, "base"))
	const day = 24 * 60 * 60
	tell(t, vm, "date -s @"+strconv.FormatInt(time.Now().Unix()+day, 10))
	if off := ahead(t, vm); off < day-600 || off > day+600 {
		t.Fatalf("the guest's clock was not set: %d s ahead", off)
	}
	if err := s.Run(t.Context(), os.Stderr, "checkpoint", "--raddr", "localhost:1337", "--output", filepath.Join(s.dir, "copy")); err != nil {
		t.Fatal(err)
	}
	if off := ahead(t, vm); off < day-600 {
		t.Errorf("after a checkpoint the guest's clock is %d s ahead; it was set to %d", off, day)
	}
	end(t, vm)
	vm = s.peer(t, "instance", append(flags, "--no-set-clock")...)
	if off := ahead(t, vm); off < day-600 {
		t.Errorf("after a resume with --no-set-clock the guest's clock is %d s ahead; it was set to %d", off, day)
	}
	end(t, vm)
	vm, err := s.Start(s.peerArgs("instance", flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.End()
	for _, line := range []string{"Set the guest's clock", "Resumed VM"} { // a step of a day is said
		if _, err := vm.Await(t.Context(), line); err != nil {
			t.Fatal(err)
		}
	}
	if off := ahead(t, vm); off > 600 || off < -600 {
		t.Errorf("after a resume the guest's clock is %d s ahead", off)
	}
	end(t, vm)
	for _, file := range theirs {
		if _, err := os.Stat(file); err != nil {
			t.Errorf("somebody's file: %v", err)
		}
	}
}

// tell types a line into the guest's shell.
func tell(t *testing.T, vm *tour.Service, line string) {
	t.Helper()
	if _, err := io.WriteString(vm.Input, "\n"+line+"\n"); err != nil {
		t.Fatal(err)
	}
}

// ahead is by how many seconds the guest's clock is before this host's.
func ahead(t *testing.T, vm *tour.Service) int64 {
	t.Helper()
	mark := fmt.Sprintf("now%d", time.Now().UnixNano())
	tell(t, vm, "echo "+mark+"=$(date +%s)") // the shell's echo of the line has no number behind the mark
	var seconds int64
	until.True(t, "the guest's shell answers in "+vm.Output, func() bool {
		b, err := os.ReadFile(vm.Output)
		if err != nil {
			t.Fatal(err)
		}
		_, after, _ := strings.Cut(strings.ReplaceAll(string(b), mark+"=$", ""), mark+"=")
		line, _, whole := strings.Cut(after, "\n")
		seconds, err = strconv.ParseInt(strings.TrimSpace(line), 10, 64)
		return whole && err == nil
	})
	return seconds - time.Now().Unix()
}

// checkLimits looks at the cgroups of a VMM (cgroups(7), /proc/[pid]/cgroup).
func checkLimits(t *testing.T, pid int) {
	t.Helper()
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"memory.limit_in_bytes": "2147483648", "pids.max": "200", "cpu.cfs_quota_us": "200000"} {
		controller, _, _ := strings.Cut(file, ".")
		found := regexp.MustCompile(`(?m)^\d+:(?:\S+,)?` + controller + `(?:,\S+)?:(/drafter/\S+)$`).FindSubmatch(groups)
		if found == nil {
			t.Errorf("the VMM has no %s cgroup of ours:\n%s", controller, groups)
			continue
		}
		b, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", controller, string(found[1]), file))
		if got := strings.TrimSpace(string(b)); err != nil || got != want {
			t.Errorf("%s is %s; want %s: %v", file, got, want, err)
		}
	}
}

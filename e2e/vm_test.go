package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	until "drafter/internal/await"
	"drafter/internal/block"
	"drafter/internal/tour"
)

const redisAddr = "127.0.0.1:3333"

// site is one test's directory, with a copy of the shared package in it.
type site struct {
	tour.Drafter
	dir string
	pkg string // directory of the package
}

func newSite(t *testing.T) *site {
	t.Helper()
	// Not t.TempDir: the names of tests make socket paths too long.
	dir, err := os.MkdirTemp(work, "t")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{Drafter: tour.Drafter{Bin: "drafter", Dir: dir, Logs: dir}, dir: dir, pkg: filepath.Join(dir, "out/package")}
	s.copyPackage(t, filepath.Join(work, "out/package"), s.pkg)
	before := inventory()
	t.Cleanup(func() {
		if after := inventory(); after != before {
			t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *site) copyPackage(t *testing.T, from, to string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copy package: %v: %s", err, out)
	}
}

// run starts the package with further flags and waits until it runs. Unless the test ended it, it
// is ended with the test, without error.
func (s *site) run(t *testing.T, flags ...string) *tour.Service {
	t.Helper()
	return s.start(t, s.runnerArgs(flags...)...)
}

// start starts a command that runs a VM.
func (s *site) start(t *testing.T, args ...string) *tour.Service {
	t.Helper()
	vm, err := s.Start(args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		select {
		case <-vm.Done(): // the test has seen to it
		default:
			end(t, vm)
		}
	})
	if _, err := vm.Await(t.Context(), "Resumed VM"); err != nil {
		t.Fatal(err)
	}
	return vm
}

// boots says that an instance, or package, is not resumed.
const boots = "Booting VM from its disks: it is not resumed"

// boots starts what cannot be resumed for a reason, and ends it while it boots.
func (s *site) boots(t *testing.T, reason string, args ...string) {
	t.Helper()
	vm, err := s.Start(args...)
	if err != nil {
		t.Fatal(err)
	}
	line, err := vm.Await(t.Context(), boots)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(line.Text, reason) {
		t.Errorf("%s; want %q", line.Text, reason)
	}
	end(t, vm)
}

// runnerArgs start the package.
func (s *site) runnerArgs(flags ...string) []string {
	return append([]string{"runner", "--chroot-base-dir", "vms", "--devices", tour.PackageDevices(s.pkg)}, flags...)
}

// refused runs the package and returns the error line it fails with.
func (s *site) refused(t *testing.T, flags ...string) string {
	t.Helper()
	return s.fails(t, s.runnerArgs(flags...)...)
}

// fails runs a command and returns the error line it fails with.
func (s *site) fails(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("drafter", args...)
	cmd.Dir = s.dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err == nil {
		t.Fatalf("drafter %s did not fail", args[0])
	}
	for line := range strings.SplitSeq(stderr.String(), "\n") {
		if strings.HasPrefix(line, "Error: ") {
			return line
		}
	}
	t.Fatalf("no error line: %s", stderr.String())
	return ""
}

func end(t *testing.T, s *tour.Service) {
	t.Helper()
	if err := s.End(); err != nil {
		t.Fatal(err)
	}
}

// redis returns a client of the guest in ark0, through a forwarder that ends with the test.
func (s *site) redis(t *testing.T) *redis.Client { return s.redisIn(t, "ark0", redisAddr) }

// redisIn returns a client of the guest in a namespace, through a forward from addr.
func (s *site) redisIn(t *testing.T, netns, addr string) *redis.Client {
	t.Helper()
	f, err := s.Start("forwarder", "--port-forwards", tour.Forward(netns, "6379", addr))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Await(t.Context(), "Forwarding"); err != nil {
		t.Fatal(err)
	}
	c := redis.NewClient(&redis.Options{Addr: addr, MaxRetries: 5})
	t.Cleanup(func() {
		c.Close()
		end(t, f)
	})
	return c
}

func (s *site) output(t *testing.T, vm *tour.Service) string {
	t.Helper()
	b, err := os.ReadFile(vm.Output)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(b), "\r", "")
}

// waitOutput waits until the guest's console shows a text, and returns all of it.
func (s *site) waitOutput(t *testing.T, vm *tour.Service, text string) string {
	t.Helper()
	var out string
	until.NoneWithin(t, tour.StepTimeout, fmt.Sprintf("the console shows %q", text), func() string {
		if out = s.output(t, vm); strings.Contains(out, text) {
			return ""
		}
		return "it shows\n" + out
	})
	return out
}

// vmmPID is the process of the one VM that runs at the site.
func (s *site) vmmPID(t *testing.T) int { return s.vmmPIDIn(t, "vms") }

// vmmPIDIn is vmmPID for a VM with another --chroot-base-dir.
func (s *site) vmmPIDIn(t *testing.T, base string) int {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.dir, base, "*/*/process.json"))
	if err != nil || len(files) != 1 {
		t.Fatalf("VMs: %v, %v; want one", files, err)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	var id struct{ PID int }
	if err := json.Unmarshal(b, &id); err != nil || id.PID == 0 {
		t.Fatalf("%s: %v", b, err)
	}
	return id.PID
}

// sums returns a checksum of every file of a directory.
func sums(t *testing.T, dir string) (list string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list += contentID(t, filepath.Join(dir, e.Name())) + "  " + e.Name() + "\n"
	}
	return list
}

// contentID identifies what is in a file.
func contentID(t *testing.T, path string) string {
	t.Helper()
	f, err := block.OpenFile(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := block.Hash(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	return c.Device.String()
}

// A VM that is suspended and resumed again and again keeps all that its clients wrote.
func TestTwentyRounds(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	c := s.redis(t)
	before := inventory()
	const rounds, keys = 20, 50
	var runID string
	for round := range rounds {
		vm := s.run(t)
		for old := range round {
			for i := range keys {
				key := fmt.Sprintf("round:%d:%d", old, i)
				if got, err := c.Get(ctx, key).Result(); err != nil || got != value(old, i) {
					t.Fatalf("round %d: %s is %q, %v", round, key, got, err)
				}
			}
		}
		for i := range keys {
			if err := c.Set(ctx, fmt.Sprintf("round:%d:%d", round, i), value(round, i), 0).Err(); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
		}
		if n, err := c.Incr(ctx, "rounds").Result(); err != nil || n != int64(round+1) {
			t.Fatalf("round %d: counter is %d, %v", round, n, err)
		}
		// The clock is right again, although time stood still.
		now, err := c.Time(ctx).Result()
		if off := time.Since(now); err != nil || off.Abs() > time.Second {
			t.Errorf("round %d: the guest's clock is off by %s, %v", round, off, err)
		}
		info, err := c.Info(ctx, "server").Result()
		if err != nil {
			t.Fatal(err)
		}
		_, info, _ = strings.Cut(info, "run_id:")
		if id := strings.Fields(info)[0]; round > 0 && id != runID {
			t.Fatalf("round %d: this is another Redis process", round)
		} else {
			runID = id
		}
		// Both ways to end are alike.
		if err := vm.Signal([]syscall.Signal{syscall.SIGINT, syscall.SIGTERM}[round%2]); err != nil {
			t.Fatal(err)
		}
		if err := vm.Wait(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	if after := inventory(); after != before {
		t.Errorf("left behind after %d rounds:\n%s\nbefore:\n%s", rounds, after, before)
	}
	for _, disk := range []string{"rootfs.ext4", "oci.ext4"} {
		// A running system's file system is not clean but for its journal; fsck replays that first.
		cmd := exec.Command("e2fsck", "-fp", filepath.Join(s.pkg, disk))
		if out, err := cmd.CombinedOutput(); err != nil && cmd.ProcessState.ExitCode() != 1 { // 1: mended
			t.Errorf("%s: %v: %s", disk, err, out)
		}
	}
}

func value(round, i int) string { return fmt.Sprintf("value %d of round %d", i*i, round) }

// A package that is run privately stays as it was, bit for bit, and can be run several times at
// once.
func TestMapPrivate(t *testing.T) {
	s := newSite(t)
	before := sums(t, s.pkg)
	c := s.redis(t)
	first := s.run(t, "--experimental-map-private", "--experimental-map-private-memory-output", "private/memory.bin", "--experimental-map-private-state-output", "private/state.bin")
	second := s.run(t, "--experimental-map-private", "--netns", "ark1")
	if err := c.Set(t.Context(), "kept", "yes", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if line := s.refused(t, "--netns", "ark2"); !strings.Contains(line, "in use") {
		t.Errorf("a shared run beside private ones: %s", line)
	}
	end(t, second)
	end(t, first)
	if after := sums(t, s.pkg); after != before {
		t.Errorf("the package changed:\n%s\nbefore:\n%s", after, before)
	}
	// The outputs are a package.
	if err := os.Rename(filepath.Join(s.dir, "private"), filepath.Join(s.dir, "kept")); err != nil {
		t.Fatal(err)
	}
	s.pkg = filepath.Join(s.dir, "kept")
	s.run(t)
	if got, err := c.Get(t.Context(), "kept").Result(); err != nil || got != "yes" {
		t.Errorf("after the resume of the outputs: %q, %v", got, err)
	}
}

// Two runs of one package go on from the same moment, but not with the same random numbers. Console
// and shell work on the way.
func TestClonesDifferAndConsole(t *testing.T) {
	s := newSite(t)
	var seen []string
	for _, ns := range []string{"ark0", "ark1"} {
		vm := s.run(t, "--experimental-map-private", "--enable-input", "--netns", ns)
		for _, line := range []string{"\n", "echo random=$(head -c16 /dev/urandom | od -An -tx1 | tr -d ' ').\n"} {
			if _, err := io.WriteString(vm.Input, line); err != nil {
				t.Fatal(err)
			}
			if line == "\n" {
				s.waitOutput(t, vm, "drafter# ")
			}
		}
		// The terminal echoes the command; its output follows on a line of its own.
		_, number, _ := strings.Cut(s.waitOutput(t, vm, "\nrandom="), "\nrandom=")
		for !strings.Contains(number, ".") {
			_, number, _ = strings.Cut(s.output(t, vm), "\nrandom=")
		}
		number, _, _ = strings.Cut(number, ".")
		if len(number) != 32 {
			t.Fatalf("no random number on the console: %q", s.output(t, vm))
		}
		seen = append(seen, number)
		end(t, vm)
	}
	if seen[0] == seen[1] {
		t.Errorf("both clones drew %s", seen[0])
	}
}

// What a killed runner leaves is removed by the next, which boots the VM from its disks.
func TestKilledRunner(t *testing.T) {
	s := newSite(t)
	clean := inventory()
	vm := s.run(t)
	pid := s.vmmPID(t)
	if err := vm.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := vm.Wait(); err == nil {
		t.Fatal("killed without an error")
	}
	s.boots(t, "its process was killed", s.runnerArgs()...)
	if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && len(cmdline) > 0 {
		t.Errorf("the VMM still runs: %s", cmdline)
	}
	if after := inventory(); after != clean {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, clean)
	}
}

// A VMM that dies is noticed at once, and what the guest said last is in the error.
func TestKilledVMM(t *testing.T) {
	s := newSite(t)
	vm := s.run(t, "--enable-input")
	if _, err := io.WriteString(vm.Input, "\necho famous last words\n"); err != nil {
		t.Fatal(err)
	}
	s.waitOutput(t, vm, "\nfamous last words\n")
	if err := syscall.Kill(s.vmmPID(t), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-vm.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the runner did not notice")
	}
	err := vm.Wait()
	if err == nil {
		t.Fatal("a killed VMM is no error")
	}
	for _, want := range []string{"QEMU ended unexpectedly", "signal: killed", "famous last words"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
}

// A guest that powers itself off ends its runner well, and boots at the next start.
func TestPowerOff(t *testing.T) {
	s := newSite(t)
	vm := s.run(t, "--enable-input")
	if _, err := io.WriteString(vm.Input, "\npoweroff\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.Await(t.Context(), "The guest powered itself off"); err != nil {
		t.Fatal(err)
	}
	if err := vm.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, disk := range []string{"rootfs.ext4", "oci.ext4"} {
		if out, err := exec.Command("e2fsck", "-fn", filepath.Join(s.pkg, disk)).CombinedOutput(); err != nil {
			t.Errorf("%s after a clean end: %v: %s", disk, err, out)
		}
	}
	// A package that is older than that can only be resumed.
	file := filepath.Join(s.pkg, "config.json")
	config, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var old map[string]any
	if err := json.Unmarshal(config, &old); err != nil {
		t.Fatal(err)
	}
	delete(old, "initrd")
	b, err := json.Marshal(old)
	if err != nil {
		t.Fatal(err)
	}
	write(t, file, string(b))
	if line := s.refused(t); !strings.Contains(line, "holds no initramfs") || !strings.Contains(line, "drafter snapshotter") {
		t.Errorf("a package without an initramfs: %s", line)
	}
	write(t, file, string(config))
	s.boots(t, "powered itself off", s.runnerArgs()...)

	// A state that cannot be loaded is no dead end.
	state, err := os.OpenFile(filepath.Join(s.pkg, "state.bin"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = state.WriteAt([]byte("damage"), 12<<10)
	if err := errors.Join(err, state.Close()); err != nil {
		t.Fatal(err)
	}
	if line := s.refused(t); !strings.Contains(line, "--boot") {
		t.Errorf("a damaged state: %s", line)
	}
	s.boots(t, "--boot", s.runnerArgs("--boot")...)
}

// The VMM runs as the user it is told to, who owns the package meanwhile.
func TestUser(t *testing.T) {
	s := newSite(t)
	s.checkUser(t, s.run(t, "--uid", "4321", "--gid", "4322", "--cgroup-version", "1"))
	// An instance's files stay with root: the VMM sees its devices only.
	s.checkUser(t, s.peer(t, "instance", "--uid", "4321", "--gid", "4322", "--cgroup-version", "1"))
	for _, f := range tour.Files {
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(s.pkg, f.File), &st); err != nil || st.Uid != 0 || st.Mode&0o777 != 0o600 {
			t.Errorf("%s belongs to user %d, and has mode %04o afterwards; %v", f.File, st.Uid, st.Mode&0o777, err)
		}
	}
}

// checkUser looks at a VM that shall run as user 4321, and ends it.
func (s *site) checkUser(t *testing.T, vm *tour.Service) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.vmmPID(t)))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t4321\t4321\t4321\t4321", "Gid:\t4322\t4322\t4322\t4322", "Seccomp:\t2", "CapEff:\t0000000000000000"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("%q is not in the VMM's status:\n%s", want, status)
		}
	}
	cgroups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", s.vmmPID(t)))
	if err != nil || !strings.Contains(string(cgroups), "/drafter/") {
		t.Errorf("the VMM's cgroups: %s, %v", cgroups, err)
	}
	c := redis.NewClient(&redis.Options{Addr: "10.0.15.1:6379"})
	defer c.Close()
	if got, err := c.Ping(t.Context()).Result(); err != nil || got != "PONG" {
		t.Errorf("Redis: %q, %v", got, err)
	}
	end(t, vm)
}

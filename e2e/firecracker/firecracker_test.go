// Package firecracker tests drafter with a real Firecracker behind its real jailer, on a host of
// its own in namespaces. The guest is internal/testguest: it checks every page of its memory, again
// and again, and ticks on its console; none of its ticks may be lost or come twice, whatever is
// done to its VM.
//
// The programs are looked up on PATH. Where they, or KVM, are missing, all of it is skipped.
package firecracker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	until "drafter/internal/await"
	"drafter/internal/need"
	"drafter/internal/testguest"
	"drafter/internal/testhost"
	"drafter/internal/tour"
)

var work = os.Getenv("DRAFTER_E2E")

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if code, can := need.Suite("all tests with a real Firecracker", "root", "firecracker", "gcc", "ip"); !can {
		return code
	}
	var code int
	var err error
	if testhost.Inside() {
		code, err = runInside(m)
	} else {
		code, err = runOutside()
	}
	if err != nil {
		fmt.Println("FAIL:", err)
		return 1
	}
	return code
}

func runOutside() (code int, err error) {
	if work, err = os.MkdirTemp("", "e2e-fc-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	if err := os.Chmod(work, 0o755); err != nil { // for other users' VMMs
		return 0, err
	}
	build := exec.Command("go", "build", "-race", "-o", filepath.Join(work, "bin", "drafter"), "drafter/cmd/drafter")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build: %w: %s", err, out)
	}
	if err := os.MkdirAll(filepath.Join(work, "blueprint"), 0o755); err != nil {
		return 0, err
	}
	err = errors.Join(testguest.Build(filepath.Join(work, "blueprint/guest")), testguest.WriteDisk(filepath.Join(work, "blueprint/disk")))
	if err != nil {
		return 0, err
	}
	if err := stockKernel(); err != nil {
		return 0, err
	}
	return testhost.Enter(os.Stdout, nil, "DRAFTER_E2E="+work, "PATH="+filepath.Join(work, "bin")+":"+os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0")
}

// stockKernel makes a blueprint with Debian's kernel, or takes the one in the directory that
// DRAFTER_BLUEPRINT names.
func stockKernel() error {
	stock := filepath.Join(work, "stock")
	if dir := os.Getenv("DRAFTER_BLUEPRINT"); dir != "" {
		return os.Symlink(dir, stock)
	}
	build := exec.Command("go", "build", "-o", filepath.Join(work, "bin", "drafter-guest"), "drafter/cmd/drafter-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // there is no dynamic linker in the initrd
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w: %s", err, out)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	d := tour.Drafter{Bin: filepath.Join(work, "bin", "drafter"), Dir: work, Logs: work}
	return d.Run(context.Background(), io.Discard, "blueprint", "os", "--output", stock, "--cache", filepath.Join(cache, "drafter", "debian"))
}

func runInside(m *testing.M) (code int, err error) {
	if err := testhost.SetUp(work); err != nil {
		return 0, fmt.Errorf("set up test host: %w", err)
	}
	d := tour.Drafter{Bin: "drafter", Dir: work, Logs: work}
	before := inventory()
	nat, err := d.Start("nat", "--namespace-count", "3")
	if err != nil {
		return 0, err
	}
	defer func() {
		err = errors.Join(err, nat.End())
		if after := inventory(); after != before {
			err = errors.Join(err, fmt.Errorf("the tests left the host dirty:\n%s\nbefore:\n%s", after, before))
		}
	}()
	if _, err := nat.Await(context.Background(), "NAT is up"); err != nil {
		return 0, err
	}
	if err := snapshot(d, "package"); err != nil {
		return 0, err
	}
	return m.Run(), nil
}

// inventory lists all that could be left on the host.
func inventory() string {
	var b strings.Builder
	for _, c := range []struct{ name, command string }{
		{"links", "ip -o link | cut -d: -f2"},
		{"namespaces", "ip netns list"},
		{"run", "find /run/drafter 2>/dev/null; true"},
		{"mounts", "cut -d' ' -f5 /proc/self/mountinfo | grep -v /run/netns/; true"},
		{"cgroups", "find /sys/fs/cgroup -type d -path '*/drafter*'"},
		{"VM directories", "find " + work + " -path '*/vms/*/*'"},
		{"VMMs", "grep -sal '^/firecracker' /proc/[0-9]*/cmdline; true"},
	} {
		out, err := exec.Command("sh", "-c", c.command).CombinedOutput()
		if err != nil {
			out = append(out, err.Error()...)
		}
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		sort.Strings(lines)
		fmt.Fprintf(&b, "%s:\n  %s\n", c.name, strings.Join(lines, "\n  "))
	}
	return b.String()
}

// load is what the guests do.
var load = testguest.Options{ResidentMiB: 16, Rate: 1000, Words: testguest.Affordable(4)}

// snapshot makes a package of the guest.
func snapshot(d tour.Drafter, pkg string, flags ...string) error {
	args, err := load.Arguments()
	if err != nil {
		return err
	}
	devices := `[{"name":"kernel","input":"blueprint/guest","output":"PKG/vmlinux"},{"name":"disk","input":"blueprint/disk","output":"PKG/rootfs.ext4"},` +
		`{"name":"state","output":"PKG/state.bin"},{"name":"memory","output":"PKG/memory.bin"},{"name":"config","output":"PKG/config.json"}]`
	return d.Run(context.Background(), io.Discard, append([]string{"snapshotter", "--vmm", "firecracker", "--netns", "ark0", "--chroot-base-dir", "vms", "--memory-size", "128",
		"--agent-vsock-port", "0", "--liveness-vsock-port", "0", "--ready-output", testguest.Ready, "--boot-args", args, "--enable-output=false",
		"--devices", strings.ReplaceAll(devices, "PKG", pkg)}, flags...)...)
}

// site is a directory with a copy of the package.
type site struct {
	tour.Drafter
	dir string
}

func newSite(t *testing.T) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{tour.Drafter{Bin: "drafter", Dir: dir, Logs: dir}, dir}
	if out, err := exec.Command("cp", "-r", "--sparse=always", filepath.Join(work, "package"), dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return s
}

// start starts a command and waits until its VM runs.
func (s *site) start(t *testing.T, args ...string) *tour.Service {
	t.Helper()
	vm, err := s.Start(args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vm.End() }) // of a test that has failed
	if _, err := vm.Await(t.Context(), "Resumed VM"); err != nil {
		t.Fatal(err)
	}
	return vm
}

func (s *site) runner(t *testing.T, flags ...string) *tour.Service {
	t.Helper()
	return s.start(t, append([]string{"runner", "--netns", "ark0", "--chroot-base-dir", "vms", "--devices", tour.PackageDevices("package")}, flags...)...)
}

func (s *site) peerArgs(instance string, flags ...string) []string {
	return append([]string{"peer", "--raddr", "", "--laddr", "", "--chroot-base-dir", "vms", "--package", "package", "--instance", instance}, flags...)
}

func end(t *testing.T, vm *tour.Service) {
	t.Helper()
	if err := vm.End(); err != nil {
		t.Fatal(err)
	}
}

// console is what VMs have printed, one after the other.
func console(t *testing.T, vms ...*tour.Service) []byte {
	t.Helper()
	var all []byte
	for _, vm := range vms {
		b, err := os.ReadFile(vm.Output)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	return all
}

// passes waits until the last of VMs that follow each other has checked all of its memory so often
// since, and checks what all of them have printed.
func passes(t *testing.T, n int64, vms ...*tour.Service) testguest.Console {
	t.Helper()
	last := vms[len(vms)-1]
	until.None(t, "the guest gets on", func() string {
		// What it has printed begins in the middle of a line of the one before.
		_, own, _ := strings.Cut(string(console(t, last)), "\n")
		if int64(strings.Count(own, "\np ")) > n {
			return ""
		}
		return fmt.Sprintf("its last words are %q", own[max(0, len(own)-200):])
	})
	return parse(t, vms...)
}

func parse(t *testing.T, vms ...*tour.Service) testguest.Console {
	t.Helper()
	c, err := testguest.Parse(console(t, vms...))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A VM that is suspended and resumed a hundred times loses no page and no tick.
func TestResumes(t *testing.T) {
	rounds := 100
	if testing.Short() {
		rounds = 5
	}
	s := newSite(t)
	var vms []*tour.Service
	for range rounds {
		vm := s.runner(t)
		vms = append(vms, vm)
		time.Sleep(50 * time.Millisecond)
		end(t, vm)
	}
	vm := s.runner(t)
	c := passes(t, 1, append(vms, vm)...)
	end(t, vm)
	t.Logf("%d resumes, %d ticks, %d checks of all memory, %d characters repeated", rounds+1, c.Last-c.First+1, c.Passes, c.Repeated)
}

// Instances of one package run at the same time, do not see each other, and leave the package as it
// is.
func TestClones(t *testing.T) {
	s := newSite(t)
	before := checksum(t, s.dir)
	var vms []*tour.Service
	for i := range 3 {
		vms = append(vms, s.start(t, s.peerArgs(fmt.Sprintf("clone-%d", i), "--netns", fmt.Sprintf("ark%d", i))...))
	}
	for _, vm := range vms {
		passes(t, 2, vm)
	}
	for i, vm := range vms {
		end(t, vm)
		again := s.start(t, s.peerArgs(fmt.Sprintf("clone-%d", i), "--netns", fmt.Sprintf("ark%d", i))...)
		passes(t, 1, vm, again)
		end(t, again)
	}
	if after := checksum(t, s.dir); after != before {
		t.Errorf("the package has changed:\n%s\nwas:\n%s", after, before)
	}
}

func checksum(t *testing.T, dir string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "sha256sum "+dir+"/package/*").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// A VM moves along a chain of peers, between network namespaces, and is suspended and resumed at
// its end.
func TestMigrations(t *testing.T) {
	for name, flags := range map[string][]string{
		"pre-copy":  {"--disable-postcopy-migration"},
		"post-copy": {"--migration-timeout", "100ms", "--bandwidth", "2MB"}, // most of memory follows the VM
		"default":   nil,
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			const first = 13370
			at := func(i int) string { return "localhost:" + strconv.Itoa(first+i) }
			vms := []*tour.Service{s.start(t, s.peerArgs("hop-0", append(flags, "--netns", "ark0", "--laddr", at(0))...)...)}
			passes(t, 1, vms...)
			for i := 1; i <= 3; i++ {
				metrics := "localhost:" + strconv.Itoa(first+100+i)
				args := append([]string{"--netns", fmt.Sprintf("ark%d", i%2), "--raddr", at(i - 1), "--laddr", at(i), "--metrics", metrics}, flags...)
				vm := s.start(t, s.peerArgs(fmt.Sprintf("hop-%d", i), args...)...)
				if err := vms[i-1].Wait(); err != nil { // it has moved away, and the target has all of it
					t.Fatal(err)
				}
				late := transferred(t, metrics, "post-copy") + transferred(t, metrics, "wanted")
				if name == "pre-copy" && late > 0 || name == "post-copy" && late == 0 {
					t.Errorf("hop %d: %.0f bytes of memory came after the handoff", i, late)
				}
				vms = append(vms, vm)
				c := passes(t, 1, vms...)
				t.Logf("hop %d: %.0f bytes of memory after the handoff, %d ticks so far, %d characters repeated", i, late, c.Last-c.First+1, c.Repeated)
			}
			end(t, vms[3])
			again := s.start(t, s.peerArgs("hop-3", "--netns", "ark1")...)
			passes(t, 1, append(vms, again)...)
			end(t, again)
		})
	}
}

// transferred is what a peer says of the bytes of memory that came in a phase.
func transferred(t *testing.T, addr, phase string) float64 {
	t.Helper()
	res, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := strings.Cut(string(b), fmt.Sprintf("drafter_migration_device_transferred_bytes{device=%q,phase=%q} ", "memory", phase))
	if !found {
		t.Fatalf("no metric for phase %s", phase)
	}
	value, _, _ := strings.Cut(after, "\n")
	f, err := strconv.ParseFloat(value, 64)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// Memory of huge pages is not tracked by write protection: each flush is a Diff snapshot. A CPU
// template is part of the package.
func TestHugePages(t *testing.T) {
	setHugePages(t, 160) // of 2 MiB: those of two VMs, and some
	template := filepath.Join(t.TempDir(), "template.json")
	if err := os.WriteFile(template, []byte(`{"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":[{"register":"ecx","bitmap":"0b0xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}]}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSite(t)
	if err := os.RemoveAll(filepath.Join(s.dir, "package")); err != nil {
		t.Fatal(err)
	}
	if err := snapshot(tour.Drafter{Bin: "drafter", Dir: work, Logs: s.dir}, filepath.Join(s.dir, "package"), "--huge-pages", "--cpu-template", template); err != nil {
		t.Fatal(err)
	}
	source := s.start(t, s.peerArgs("hop-0", "--huge-pages", "--netns", "ark0", "--laddr", "localhost:13370")...)
	passes(t, 1, source)
	target := s.start(t, s.peerArgs("hop-1", "--huge-pages", "--netns", "ark1", "--raddr", "localhost:13370")...)
	if err := source.Wait(); err != nil {
		t.Fatal(err)
	}
	passes(t, 1, source, target)
	end(t, target)
	again := s.start(t, s.peerArgs("hop-1", "--huge-pages", "--netns", "ark1")...)
	passes(t, 1, source, target, again)
	end(t, again)
}

// setHugePages sets huge pages aside, and gives them back at the end of the test.
func setHugePages(t *testing.T, count int) {
	t.Helper()
	const path = "/proc/sys/vm/nr_hugepages"
	before, err := os.ReadFile(path)
	if err != nil {
		need.Lacks(t, "huge-pages", err)
	}
	if err := os.WriteFile(path, []byte(strconv.Itoa(count)), 0o644); err != nil {
		need.Lacks(t, "huge-pages", err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(path, before, 0o644); err != nil {
			t.Error(err)
		}
	})
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := strconv.Atoi(strings.TrimSpace(string(after))); err != nil || n < count {
		need.Lacks(t, "huge-pages", fmt.Sprintf("the host gives %s instead of %d", strings.TrimSpace(string(after)), count))
	}
}

// When the process that serves a VM's memory is killed, the VM does not stand still: it ends,
// whoever it runs as and in whichever cgroups, and the next start cleans up and boots it.
func TestKilledOwner(t *testing.T) {
	for uid, cgroup := range map[string]struct{ version, line string }{"0": {"2", "0::/drafter/"}, "4711": {"1", ":memory:/drafter/"}} {
		t.Run("uid "+uid, func(t *testing.T) {
			s := newSite(t)
			for dir := s.dir; dir != "/"; dir = filepath.Dir(dir) {
				if err := os.Chmod(dir, 0o755); err != nil && dir != "/tmp" {
					t.Fatal(err)
				}
				if filepath.Dir(dir) == "/tmp" {
					break
				}
			}
			clean := inventory()
			flags := []string{"--uid", uid, "--gid", uid, "--cgroup-version", cgroup.version}
			vm := s.runner(t, flags...)
			if cgroups, err := os.ReadFile(filepath.Join(filepath.Dir(strings.TrimSpace(vmms(inventory()))), "cgroup")); err != nil || !strings.Contains(string(cgroups), cgroup.line) {
				t.Errorf("the VMM's cgroups: %s, %v; want one of %q", cgroups, err, cgroup.line)
			}
			status, err := os.ReadFile(filepath.Join(filepath.Dir(strings.TrimSpace(vmms(inventory()))), "status"))
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
				if !strings.Contains(string(status), "\n"+want+"\n") {
					t.Errorf("the VMM has not %q:\n%s", want, status)
				}
			}
			end(t, vm) // what was changed by another user's VMM can be resumed
			next := s.runner(t, flags...)
			passes(t, 1, vm, next)
			if err := next.Signal(syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			_ = next.Wait() // killed
			until.NoneWithin(t, 10*time.Second, "the VMM ends with its owner", func() string {
				if there := inventory(); strings.Contains(vmms(there), "/proc") {
					return there
				}
				return ""
			})
			again := s.runner(t, flags...) // it boots, is suspended and resumed
			passes(t, 1, again)
			end(t, again)
			last := s.runner(t, flags...)
			passes(t, 1, again, last)
			end(t, last)
			if after := inventory(); after != clean {
				t.Errorf("left behind:\n%s\nbefore:\n%s", after, clean)
			}
		})
	}
}

// vmms is the part of an inventory that lists VMMs.
func vmms(inventory string) string {
	_, list, _ := strings.Cut(inventory, "VMMs:")
	return list
}

// A stock kernel that is snapshotted in the middle of its boot boots on wherever it is resumed and
// moved to. Under PVM its instructions are emulated, and it only gets as far as its early boot: far
// enough for that.
func TestStockKernel(t *testing.T) {
	s := &site{tour.Drafter{Bin: "drafter", Dir: t.TempDir(), Logs: t.TempDir()}, ""}
	devices := strings.ReplaceAll(`[{"name":"kernel","input":"STOCK/vmlinux","output":"package/vmlinux"},{"name":"disk","input":"STOCK/rootfs.ext4","output":"package/rootfs.ext4"},`+
		`{"name":"state","output":"package/state.bin"},{"name":"memory","output":"package/memory.bin"},{"name":"config","output":"package/config.json"}]`, "STOCK", filepath.Join(work, "stock"))
	var booted bytes.Buffer
	err := s.Run(t.Context(), &booted, "snapshotter", "--vmm", "firecracker", "--netns", "ark0", "--chroot-base-dir", "vms", "--memory-size", "256",
		"--agent-vsock-port", "0", "--liveness-vsock-port", "0", "--ready-output", "Command line:", "--devices", devices,
		"--boot-args", "earlyprintk=ttyS0 console=ttyS0 ignore_loglevel initcall_debug panic=1 pci=off modules=ext4 rootfstype=ext4 root=/dev/vda rootflags=rw nokaslr tsc=unstable")
	if err != nil {
		t.Fatal(err)
	}
	source := s.start(t, s.peerArgs("hop-0", "--enable-input", "--netns", "ark0", "--laddr", "localhost:13370")...)
	lines(t, source, 5)
	target := s.start(t, s.peerArgs("hop-1", "--enable-input", "--netns", "ark1", "--raddr", "localhost:13370")...)
	if err := source.Wait(); err != nil {
		t.Fatal(err)
	}
	lines(t, target, 5)
	end(t, target)
	again := s.start(t, s.peerArgs("hop-1", "--enable-input", "--netns", "ark1")...)
	lines(t, again, 5)
	end(t, again)

	last, count := -1.0, 0
	for line := range strings.SplitSeq(booted.String()+string(console(t, source, target, again)), "\n") {
		stamp, _, found := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "["), "]")
		at, err := strconv.ParseFloat(strings.TrimSpace(stamp), 64)
		if !found || err != nil {
			continue // its continuation, or cut
		}
		if count++; at < last {
			t.Errorf("after %.6f s the kernel says: %s", last, line)
		}
		last = at
	}
	t.Logf("%d lines of a kernel, up to %.3f s after its start", count, last)
}

// lines waits until a VM has printed so many whole lines. Enter, pressed again and again, lets one
// that has booted already print some.
func lines(t *testing.T, vm *tour.Service, n int) {
	t.Helper()
	until.None(t, "the kernel gets on", func() string {
		shown := console(t, vm)
		if bytes.Count(shown, []byte{'\n'}) > n {
			return ""
		}
		if _, err := vm.Input.Write([]byte{'\r'}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-vm.Done():
			t.Fatalf("the VM has ended: %v", vm.Wait())
		default:
		}
		return fmt.Sprintf("it shows %q", shown)
	})
}

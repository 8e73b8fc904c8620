package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"

	"drafter/internal/tour"
	"drafter/vmm"
)

// nobody runs a shell script as a user who owns nothing, and returns what it prints.
func nobody(t *testing.T, script string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	return fmt.Sprintf("%s (%v)", out, err)
}

// A VMM has a user of its own and no privileges, sees nothing of the host but its programs,
// inherits nothing of its owner's, and cannot be looked into.
func TestConfinedVMM(t *testing.T) {
	s := emptySite(t)
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-owner")
	uids := map[string]bool{}
	for i, instance := range []string{"one", "two"} {
		vm := s.peer(t, instance, "--netns", fmt.Sprintf("ark%d", i), "--chroot-base-dir", instance+"/vms")
		defer end(t, vm)
		pid := s.vmmPIDIn(t, instance+"/vms")
		read := func(file string) string {
			t.Helper()
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		status := map[string]string{}
		for line := range strings.SplitSeq(read("status"), "\n") {
			key, value, _ := strings.Cut(line, ":")
			status[key] = strings.TrimSpace(value)
		}
		for key, want := range map[string]string{
			"CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapInh": "0000000000000000", "CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
			"NoNewPrivs": "1", "Seccomp": "2", "Groups": "",
		} {
			if status[key] != want {
				t.Errorf("%s is %q; want %q", key, status[key], want)
			}
		}
		uid, _, _ := strings.Cut(status["Uid"], "\t")
		if !strings.HasPrefix(uid, "19000") || uids[uid] || status["Uid"] != strings.Repeat(uid+"\t", 3)+uid || status["Gid"] != status["Uid"] {
			t.Errorf("users %q, groups %q; want one of its own", status["Uid"], status["Gid"])
		}
		uids[uid] = true
		if fields := strings.Fields(status["NSpid"]); len(fields) != 2 || fields[1] != "1" {
			t.Errorf("process ids %q; want the first of a namespace of its own", status["NSpid"])
		}
		for _, ns := range []string{"mnt", "pid", "ipc", "uts", "net"} {
			ours, err := os.Readlink("/proc/self/ns/" + ns)
			if err != nil {
				t.Fatal(err)
			}
			if its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns)); err != nil || its == ours {
				t.Errorf("namespace %s is its owner's (%v)", ns, err)
			}
		}
		if environ := strings.TrimRight(read("environ"), "\x00"); strings.Contains(environ, "\x00") || !strings.HasPrefix(environ, "GLIBC_TUNABLES=") {
			t.Errorf("environment %q", environ)
		}
		if limits := read("limits"); !strings.Contains(limits, "Max core file size        0 ") {
			t.Errorf("limits:\n%s", limits)
		}
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			t.Fatal(err)
		}
		var open []string
		for _, fd := range fds {
			target, err := os.Readlink(fd)
			if err != nil {
				continue // closed just now
			}
			kind, _, _ := strings.Cut(target, ":[")
			if !slices.Contains([]string{
				"socket", "pipe", "anon_inode", "/dev/null", "/dev/net/tun", "/dev/urandom", "/kernel",
				"anon_inode:[eventfd]", "anon_inode:[signalfd]", "anon_inode:[eventpoll]", "/disk-disk", "/disk-oci",
				"/memfd:memory-backend-memfd (deleted)", // which it makes and which is empty
			}, kind) {
				t.Errorf("it has %s open", target)
			}
			open = append(open, kind)
		}
		t.Logf("uid %s, CapEff %s, Seccomp %s, NSpid %s, environment %q, open %v", uid, status["CapEff"], status["Seccomp"], status["NSpid"], read("environ"), open)
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !slices.Contains([]string{"bin", "dev", "disk-disk", "disk-oci", "etc", "initrd", "kernel", "lib", "lib32", "lib64", "libx32", "sbin", "sys", "usr"}, e.Name()) {
				t.Errorf("it sees /%s", e.Name())
			}
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/etc/passwd", pid)); err == nil {
			t.Error("it sees /etc/passwd")
		}
	}
}

// sharedMemory is a path to the memory that a VM shares with its peer, which is the process pid.
func sharedMemory(t *testing.T, pid int) string {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if link, err := os.Readlink(fd); err == nil && strings.HasPrefix(link, "/memfd:drafter-memory") {
			return fd
		}
	}
	t.Fatal("nobody shares memory")
	return ""
}

// A local user neither reads nor writes what a VM consists of: guest memory where VMM and peer have
// it, disks by their paths, sockets, overlays, packages.
func TestLocalUser(t *testing.T) {
	s := emptySite(t)
	s.open(t)
	vm := s.peer(t, "instance", "--netns", "ark0", "--metrics", "", "--memory-backing", "shared")
	defer end(t, vm)
	c := s.redisIn(t, "ark0", "127.0.0.1:3333")
	if err := c.Set(t.Context(), "balance", "one-hundred-and-two", redis.KeepTTL).Err(); err != nil {
		t.Fatal(err)
	}
	disk, err := filepath.Glob(filepath.Join(s.dir, "vms/peer/*/devices/disk"))
	if err != nil || len(disk) != 1 {
		t.Fatalf("disk: %v, %v", disk, err)
	}
	pid := s.vmmPID(t)
	memory := sharedMemory(t, vm.PID())
	if b, err := os.ReadFile(memory); err != nil || !bytes.Contains(b, []byte("one-hundred-and-two")) {
		t.Fatalf("root does not find the balance in the VM's memory: %v", err)
	}
	out := nobody(t, fmt.Sprintf(`id -u; grep -c one-hundred-and-two %s /proc/%d/mem; for f in %s %s; do dd if=/dev/zero of=$f bs=1 count=1 conv=notrunc; done`, memory, pid, memory, disk[0]))
	if !strings.HasPrefix(out, "65534\n") || strings.Count(out, "Permission denied") != 4 {
		t.Errorf("nobody gets at the memory of a VM, or its disk: %s", out)
	}
	for _, dir := range []string{"vms", "instance"} {
		err := filepath.Walk(filepath.Join(s.dir, dir), func(path string, info os.FileInfo, err error) error {
			if err == nil && info.Mode().Type() != os.ModeSymlink && info.Mode().Perm()&0o077 != 0 {
				t.Errorf("others may use %s: %s", path, info.Mode())
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	// The kernel keeps another VM's user out as well.
	cmd := exec.CommandContext(t.Context(), "cat", disk[0])
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: vmm.DefaultUsers.First, Gid: vmm.DefaultUsers.First}}
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "Permission denied") {
		t.Errorf("another VM's user reads a disk: %s, %v", out, err)
	}
}

// What a package says of its machine goes no further than it may, whoever reads it: a file of the
// host's that is named there does not reach the guest.
func TestHostilePackage(t *testing.T) {
	s := newSite(t)
	path := filepath.Join(s.pkg, "config.json")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for field, value := range map[string]string{
		"machine": "pc-q35-7.2,initrd=/etc/shadow", "cpu": "Nehalem-v1,+svm", "accel": "tcg,tb-size=1", "vmm": "../qemu", "version": "7.2.22 /etc/shadow",
		"interface": "../tap0", "mac": "02:0e:d9:fd:68:3d,script=/bin/sh", "bootArgs": "quiet\nroot", "id": "x",
	} {
		var config map[string]any
		if err := json.Unmarshal(good, &config); err != nil {
			t.Fatal(err)
		}
		if _, ok := config[field]; ok {
			config[field] = value
		} else {
			config["hardware"].(map[string]any)[field] = value
		}
		b, err := json.Marshal(config)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		word := map[string]string{"cpu": "CPU feature"}[field]
		if word == "" {
			word = field
		}
		for name, line := range map[string]string{"runner": s.refused(t), "peer": s.fails(t, "peer", "--raddr", "", "--laddr", "", "--chroot-base-dir", "vms", "--package", s.pkg, "--instance", "i-"+field)} {
			if !strings.Contains(line, word) {
				t.Errorf("%s %s=%q: %s", name, field, value, line)
			}
		}
	}
}

// Whatever the umask, nobody else can read what commands leave.
func TestFilesArePrivate(t *testing.T) {
	s := newSite(t)
	umask := func(format string, args ...any) {
		t.Helper()
		command(t, s.dir, "sh", "-c", "umask 0; exec "+fmt.Sprintf(format, args...))
	}
	devices := tour.PackageDevices(s.pkg)
	umask("drafter-packager --package-path made/archive.tar.zst --devices '%s'", devices)
	umask("drafter-packager --extract --package-path made/archive.tar.zst --devices '%s'", tour.PackageDevices(filepath.Join(s.dir, "made/extracted")))
	s.open(t)
	vm := s.start(t, "peer", "--raddr", "", "--laddr", "localhost:1337", "--chroot-base-dir", "vms", "--package", s.pkg, "--instance", "made/instance")
	umask("drafter checkpoint --raddr localhost:1337 --output made/checkpoint")
	umask("drafter terminator --raddr localhost:1337 --output made/terminated")
	if err := vm.Wait(); err != nil {
		t.Error(err)
	}
	const disk = "rootfs.ext4"
	umask("drafter device export --base %s/%s --overlay made/instance/overlay/%s --state made/instance/state/%s --output made/exported/disk", s.pkg, disk, disk, disk)
	files := 0
	for _, dir := range []string{filepath.Join(s.dir, "made"), filepath.Join(work, "out/package")} {
		err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
			if err != nil {
				return err
			}
			if want := map[bool]os.FileMode{true: 0o700, false: 0o600}[info.IsDir()]; info.Mode().Perm() != want {
				t.Errorf("%s has mode %s", path, info.Mode())
			}
			files++
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	if files < 20 {
		t.Errorf("only %d files were looked at", files)
	}
}

// open lets other users come as far as the site, so that it is not its directory that keeps them
// out.
func (s *site) open(t *testing.T) {
	t.Helper()
	for dir := s.dir; dir != "/" && strings.HasPrefix(dir, work); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func command(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func diskFrom(t *testing.T, dir, image string, mb int) {
	t.Helper()
	command(t, ".", "mke2fs", "-q", "-t", "ext4", "-d", dir, image, fmt.Sprintf("%dM", mb))
}

// emptySite is a site whose package the test makes itself.
func emptySite(t *testing.T) *site {
	t.Helper()
	s := newSite(t)
	if err := os.RemoveAll(s.pkg); err != nil {
		t.Fatal(err)
	}
	return s
}

// A Debian with systemd, made by debootstrap, runs agent and liveness as services, here in an
// instance of its package.
func TestForeignDistribution(t *testing.T) {
	s := emptySite(t)
	root := filepath.Join(s.dir, "root")
	command(t, ".", "cp", "-a", filepath.Join(work, "debian"), root)
	command(t, ".", "cp", filepath.Join(work, "bin/drafter-guest"), filepath.Join(root, "usr/local/bin/"))
	for _, name := range []string{"agent", "liveness"} {
		if err := os.Symlink("drafter-guest", filepath.Join(root, "usr/local/bin/drafter-"+name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(root, "etc/systemd/system/drafter-agent.service"), `[Unit]
Description=Drafter agent
[Service]
ExecStart=/usr/local/bin/drafter-agent --before-suspend-cmd "echo before >> /var/hooks" --after-resume-cmd "echo after >> /var/hooks; cat /var/hooks > /dev/console; sh /root/fill > /dev/console 2>&1" --shell-cmd bash
Restart=always
[Install]
WantedBy=multi-user.target
`)
	write(t, filepath.Join(root, "etc/systemd/system/drafter-liveness.service"), `[Unit]
Description=Drafter liveness
After=drafter-agent.service
[Service]
Type=oneshot
ExecStart=/usr/local/bin/drafter-liveness
RemainAfterExit=yes
[Install]
WantedBy=multi-user.target
`)
	write(t, filepath.Join(root, "root/fill"), `set -e
mkfs.ext4 -q -F /dev/vdb
mount /dev/vdb /mnt
cp -a /etc /usr/sbin /mnt/
umount /mnt
e2fsck -fn /dev/vdb > /dev/null
echo "the scratch disk is clean"
`)
	for _, name := range []string{"agent", "liveness"} {
		unit := "drafter-" + name + ".service"
		wants := filepath.Join(root, "etc/systemd/system/multi-user.target.wants")
		if err := os.MkdirAll(wants, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("../"+unit, filepath.Join(wants, unit)); err != nil {
			t.Fatal(err)
		}
	}
	blueprint := filepath.Join(s.dir, "out/blueprint")
	if err := os.MkdirAll(blueprint, 0o755); err != nil {
		t.Fatal(err)
	}
	diskFrom(t, root, filepath.Join(blueprint, "rootfs.ext4"), 1024)
	for _, name := range []string{"vmlinux", "initrd"} {
		command(t, ".", "cp", filepath.Join(work, "out/blueprint", name), blueprint)
	}
	write(t, filepath.Join(blueprint, "scratch.img"), "")
	if err := os.Truncate(filepath.Join(blueprint, "scratch.img"), 128<<20); err != nil {
		t.Fatal(err)
	}
	devices := []map[string]string{
		{"name": "state", "output": "out/package/state.bin"},
		{"name": "memory", "output": "out/package/memory.bin"},
		{"name": "kernel", "input": "out/blueprint/vmlinux", "output": "out/package/vmlinux"},
		{"name": "disk", "input": "out/blueprint/rootfs.ext4", "output": "out/package/rootfs.ext4"},
		{"name": "config", "output": "out/package/config.json"},
		{"name": "scratch", "input": "out/blueprint/scratch.img", "output": "out/package/scratch.img"},
	}
	s.snapshot(t, devices, "--memory-size", "512")
	for round := range 2 {
		vm := s.start(t, "peer", "--raddr", "", "--laddr", "", "--chroot-base-dir", "vms", "--package", s.pkg, "--instance", "instance")
		// What the console shows was written by the guest's own shell, in its own file.
		out := s.waitOutput(t, vm, strings.Repeat("before\nafter\n", round+1))
		if strings.Contains(out, "Kernel panic") {
			t.Fatal(out)
		}
		// A file system made, filled and checked by the guest is sound from outside too.
		s.waitOutput(t, vm, "the scratch disk is clean")
		end(t, vm)
		command(t, s.dir, "drafter", "device", "export", "--base", "out/package/scratch.img", "--overlay", "instance/overlay/scratch.img", "--state", "instance/state/scratch.img", "--output", "scratch")
		command(t, s.dir, "e2fsck", "-fn", "scratch")
		if got := command(t, s.dir, "debugfs", "-R", "cat /etc/hostname", "scratch"); !strings.Contains(got, "\n") {
			t.Errorf("a file of the guest: %q", got)
		}
	}
}

// devicesWith are those of a package of Drafter's OS with a bundle.
func devicesWith(oci string) []map[string]string {
	in := filepath.Join(work, "out/blueprint")
	return []map[string]string{
		{"name": "state", "output": "out/package/state.bin"},
		{"name": "memory", "output": "out/package/memory.bin"},
		{"name": "kernel", "input": in + "/vmlinux", "output": "out/package/vmlinux"},
		{"name": "disk", "input": in + "/rootfs.ext4", "output": "out/package/rootfs.ext4"},
		{"name": "config", "output": "out/package/config.json"},
		{"name": "oci", "input": oci, "output": "out/package/oci.ext4"},
	}
}

// snapshot makes the site's package.
func (s *site) snapshot(t *testing.T, devices []map[string]string, flags ...string) {
	t.Helper()
	b, err := json.Marshal(devices)
	if err != nil {
		t.Fatal(err)
	}
	vm, err := s.Start(append([]string{"snapshotter", "--chroot-base-dir", "vms", "--devices", string(b)}, flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Wait(); err != nil {
		t.Fatalf("%v\nconsole:\n%s", err, s.output(t, vm))
	}
}

// A bundle edited before packing runs as edited, beside a disk of the user's, on other hardware
// than the default.
func TestEditedBundle(t *testing.T) {
	s := emptySite(t)
	bundle := filepath.Join(s.dir, "bundle")
	command(t, ".", "drafter", "blueprint", "oci", "unpack", "oci:"+filepath.Join(work, "redis-image"), "--output", bundle)
	path := filepath.Join(bundle, "config.json")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(b, &config); err != nil {
		t.Fatal(err)
	}
	process := config["process"].(map[string]any)
	process["args"] = append(process["args"].([]any), "--maxmemory", "12345678")
	annotations, _ := config["annotations"].(map[string]any)
	if annotations == nil {
		annotations = map[string]any{}
	}
	annotations["drafter.before-suspend-cmd"] = "echo suspending > /dev/console"
	annotations["drafter.after-resume-cmd"] = "date +resumed-in-%Y > /dev/console"
	config["annotations"] = annotations
	if b, err = json.Marshal(config); err != nil {
		t.Fatal(err)
	}
	write(t, path, string(b))
	blueprint := filepath.Join(s.dir, "out/blueprint")
	command(t, ".", "drafter", "blueprint", "oci", "pack", bundle, "--output", filepath.Join(blueprint, "oci.ext4"), "--size", "300MiB")
	command(t, ".", "e2fsck", "-fn", filepath.Join(blueprint, "oci.ext4"))
	mine := filepath.Join(s.dir, "mine")
	write(t, filepath.Join(mine, "hello"), "from my disk\n")
	diskFrom(t, mine, filepath.Join(blueprint, "mydisk.ext4"), 16)

	mydisk := map[string]string{"name": "mydisk", "input": "out/blueprint/mydisk.ext4", "output": "out/package/mydisk.ext4"}
	s.snapshot(t, append(devicesWith("out/blueprint/oci.ext4"), mydisk), "--memory-size", "384", "--cpu-count", "2", "--agent-vsock-port", "30", "--liveness-vsock-port", "31", "--netns", "ark3")

	devices := `[{"name":"state","path":"out/package/state.bin"},{"name":"memory","path":"out/package/memory.bin"},{"name":"kernel","path":"out/package/vmlinux"},` +
		`{"name":"disk","path":"out/package/rootfs.ext4"},{"name":"config","path":"out/package/config.json"},{"name":"oci","path":"out/package/oci.ext4"},{"name":"mydisk","path":"out/package/mydisk.ext4"}]`
	vm := s.run(t, "--devices", devices, "--enable-input")
	c := s.redis(t)
	if got, err := c.ConfigGet(t.Context(), "maxmemory").Result(); err != nil || got["maxmemory"] != "12345678" {
		t.Errorf("the edited argument: %v, %v", got, err)
	}
	for _, line := range []string{"", "mkdir /tmp/m; mount /dev/vdc /tmp/m; cat /tmp/m/hello; umount /tmp/m", "grep -c ^processor /proc/cpuinfo | sed s/^/cpus=/"} {
		if _, err := vm.Input.Write([]byte(line + "\n")); err != nil {
			t.Fatal(err)
		}
		if line == "" {
			s.waitOutput(t, vm, "drafter# ")
		}
	}
	for _, want := range []string{"resumed-in-20", "\nfrom my disk\n", "\ncpus=2\n"} {
		s.waitOutput(t, vm, want)
	}
	end(t, vm)
	if out := s.output(t, vm); !strings.Contains(out, "suspending\n") {
		t.Errorf("the before-suspend command left no trace: %q", out)
	}
}

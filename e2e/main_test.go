// Package e2e tests drafter from outside: real binaries, real guests under a real VMM, a real Redis
// and its client. All of it runs on a host of its own (network and mount namespaces), built once
// and shared by the tests.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/need"
	"drafter/internal/redisimage"
	"drafter/internal/testhost"
	"drafter/internal/tour"
)

// work is the directory all tests share:
//
//	bin/            drafter (with the race detector), its links, and drafter-guest
//	bin/plain/      drafter without the race detector
//	out/blueprint/  the blueprint of a Redis guest, and a bundle with many servers
//	out/package/    the package made of it
//	redis-image/    the OCI layout of Redis
//	debian/         a foreign root file system
//	databases-image/  the OCI layout of Redis and PostgreSQL, for 'make soak'
var work = os.Getenv("DRAFTER_E2E")

func TestMain(m *testing.M) {
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP) // else tests under nohup start what ignores it
	os.Exit(run(m))
}

func run(m *testing.M) int {
	flag.Parse()
	if flag.Lookup("test.list").Value.String() != "" {
		return m.Run()
	}
	if code, can := need.Suite("all end-to-end tests", "root", "qemu-system-x86_64", "mke2fs", "redis-cli", "redis-server", "debootstrap", "nft", "ip"); !can {
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

// runOutside makes what needs the Internet and then starts the tests on a host without it.
func runOutside() (code int, err error) {
	if work, err = os.MkdirTemp("", "e2e-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	start := time.Now()
	if err := build(); err != nil {
		return 0, fmt.Errorf("build: %w", err)
	}
	fmt.Printf("built binaries and blueprints in %s\n", time.Since(start).Round(time.Second))
	return enter()
}

// enter starts the tests: on two hosts that share them, unless some have been chosen.
func enter() (code int, err error) {
	host := func(output io.Writer, number int, args ...string) (int, error) {
		return testhost.Enter(output, args, "DRAFTER_E2E="+work, fmt.Sprint("DRAFTER_E2E_HOST=", number),
			"PATH="+filepath.Join(work, "bin")+":"+os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0") // a second per command otherwise
	}
	if flag.Lookup("test.run").Value.String() != "" {
		return host(os.Stdout, 0)
	}
	names, err := exec.Command("/proc/self/exe", "-test.list", ".").Output()
	if err != nil {
		return 0, fmt.Errorf("list the tests: %w", err)
	}
	var halves [2][]string
	for i, name := range strings.Fields(string(names)) {
		halves[i%2] = append(halves[i%2], name)
	}
	var other bytes.Buffer // is printed once the first half is
	var otherCode int
	var otherErr error
	var wg sync.WaitGroup
	wg.Go(func() { otherCode, otherErr = host(&other, 1, "-test.run=^("+strings.Join(halves[1], "|")+")$") })
	code, err = host(os.Stdout, 0, "-test.run=^("+strings.Join(halves[0], "|")+")$")
	wg.Wait()
	_, werr := os.Stdout.Write(other.Bytes())
	return max(code, otherCode), errors.Join(err, otherErr, werr)
}

func build() error {
	ctx := context.Background()
	bin := filepath.Join(work, "bin")
	for _, args := range [][]string{
		{"build", "-race", "-o", filepath.Join(bin, "drafter"), "drafter/cmd/drafter"},
		// What is all compression and checksums is slowed down tenfold by the race detector; the
		// tests of the packages archive and block have it on.
		{"build", "-o", filepath.Join(bin, "plain", "drafter"), "drafter/cmd/drafter"},
		{"build", "-o", filepath.Join(bin, "drafter-guest"), "drafter/cmd/drafter-guest"},
	} {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = os.Environ()
		if args[1] != "-race" {
			cmd.Env = append(cmd.Env, "CGO_ENABLED=0")
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	for _, name := range []string{"nat", "forwarder", "snapshotter", "runner", "peer", "registry", "mounter", "terminator", "checkpoint"} {
		if err := os.Symlink("drafter", filepath.Join(bin, "drafter-"+name)); err != nil {
			return err
		}
	}
	if err := os.Symlink("plain/drafter", filepath.Join(bin, "drafter-packager")); err != nil {
		return err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	cache = filepath.Join(cache, "drafter", "debian")
	image, err := redisimage.Build(ctx, cache, work)
	if err != nil {
		return fmt.Errorf("Redis image: %w", err)
	}
	if err := redisimage.WriteLayout(image, filepath.Join(work, "redis-image")); err != nil {
		return err
	}
	if need.Soaking() {
		if err := databases(ctx, cache, filepath.Join(work, "databases-image")); err != nil {
			return fmt.Errorf("image of databases: %w", err)
		}
	}
	d := tour.Drafter{Bin: filepath.Join(bin, "drafter"), Dir: work}
	if err := d.Run(ctx, os.Stderr, "blueprint", "os", "--output", "out/blueprint", "--cache", cache); err != nil {
		return err
	}
	return errors.Join(
		d.Run(ctx, os.Stderr, "blueprint", "oci", "oci:redis-image", "--output", "out/blueprint/oci.ext4"),
		serversBundle(ctx, cache, work, filepath.Join(work, serversBlueprint)),
		debootstrap(ctx, filepath.Join(work, "debian"), cache))
}

// debootstrap makes a small Debian with systemd. The result is kept in cache.
func debootstrap(ctx context.Context, dir, cache string) error {
	kept := filepath.Join(cache, "debootstrap-bookworm-systemd.tar")
	script := `set -e; mkdir -p "$1"
test -e "$2" || {
	debootstrap --variant=minbase --include=systemd,systemd-sysv,iproute2 bookworm "$1"
	rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/*
	tar -C "$1" --xattrs -cf "$2.partial" . && mv "$2.partial" "$2"
	exit
}
tar -C "$1" --xattrs -xpf "$2"`
	if out, err := exec.CommandContext(ctx, "sh", "-c", script, "sh", dir, kept).CombinedOutput(); err != nil {
		return fmt.Errorf("debootstrap: %w: %s", err, out)
	}
	return nil
}

// runInside runs the tests behind one NAT and with one package, both made by the commands that are
// under test.
func runInside(m *testing.M) (code int, err error) {
	if err := testhost.SetUp(work); err != nil {
		return 0, fmt.Errorf("set up test host: %w", err)
	}
	if err := ownWork(); err != nil {
		return 0, err
	}
	ctx := context.Background()
	d := tour.Drafter{Bin: "drafter", Dir: work, Logs: work}
	before := inventory()
	nat, err := d.Start("nat", "--namespace-count", "4")
	if err != nil {
		return 0, err
	}
	defer func() {
		err = errors.Join(err, nat.End())
		if after := inventory(); after != before {
			err = errors.Join(err, fmt.Errorf("the tests left the host dirty:\n%s\nbefore:\n%s", after, before))
		}
	}()
	if _, err := nat.Await(ctx, "NAT is up"); err != nil {
		return 0, err
	}
	err = d.Run(ctx, os.Stderr, "snapshotter", "--netns", "ark0", "--enable-output=false", "--chroot-base-dir", "vms",
		"--devices", tour.SnapshotterDevices(filepath.Join(work, "out/blueprint"), "out/package"))
	if err != nil {
		return 0, err
	}
	return m.Run(), nil
}

// ownWork gives this host a directory of its own, with what both share in it.
func ownWork() error {
	shared := work
	work = filepath.Join(shared, os.Getenv("DRAFTER_E2E_HOST")) // short: names of sockets are
	for _, name := range []string{"bin", "out/blueprint", "redis-image", "debian", "databases-image"} {
		from, to := filepath.Join(shared, name), filepath.Join(work, name)
		if _, err := os.Stat(from); errors.Is(err, os.ErrNotExist) {
			continue // without 'make soak'
		}
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("share %s: %w", name, err)
		}
	}
	return nil
}

// soak is how many rounds a test has that finds more the longer it runs: normal ones, or long ones
// with 'make soak', or few with -short.
func soak(normal, long int) int {
	switch {
	case need.Soaking():
		return long
	case testing.Short():
		return 3
	}
	return normal
}

// inventory lists all that drafter could leave on a host.
func inventory() string {
	var b strings.Builder
	section := func(name string, lines []string) {
		sort.Strings(lines)
		fmt.Fprintf(&b, "%s:\n  %s\n", name, strings.Join(lines, "\n  "))
	}
	for _, c := range []struct{ name, command string }{
		{"links", "ip -o link | cut -d: -f2"},
		{"namespaces", "ip netns list"},
		{"routes", "ip -4 route; ip -6 route"},
		{"rules", "nft --terse list ruleset"},
		{"forwarding", "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/all/route_localnet /proc/sys/net/ipv6/conf/all/forwarding /proc/sys/net/ipv6/conf/eth0/accept_ra"},
		{"run", "find /run/drafter 2>/dev/null; true"},
		{"mounts", "cut -d' ' -f5 /proc/self/mountinfo | grep -v /run/netns/; true"},
		{"cgroups", "find /sys/fs/cgroup -type d -path '*/drafter*'"},
		{"temporary files", "ls -d /tmp/drafter* 2>/dev/null; true"},
		{"VM directories", "find " + work + " -path '*/vms/*/*'"},
	} {
		out, err := exec.Command("sh", "-c", c.command).CombinedOutput()
		if err != nil {
			out = append(out, err.Error()...)
		}
		section(c.name, strings.Split(strings.TrimSpace(string(out)), "\n"))
	}
	section("VMMs", vmms())
	return b.String()
}

// vmms lists the VMM processes of this test run.
func vmms() []string {
	var found []string
	cmdlines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		panic(err) // the pattern is constant
	}
	for _, path := range cmdlines {
		b, err := os.ReadFile(path)
		if err == nil && bytes.Contains(b[:max(0, bytes.IndexByte(b, 0))], []byte("qemu-system")) && bytes.Contains(b, []byte(work)) {
			found = append(found, strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return found
}

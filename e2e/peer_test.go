package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"drafter/internal/process"
	"drafter/internal/tour"
	"drafter/vmm"
)

// peer starts an instance of the shared package, which is used as it is: nobody writes to it.
func (s *site) peer(t *testing.T, instance string, flags ...string) *tour.Service {
	t.Helper()
	return s.start(t, s.peerArgs(instance, flags...)...)
}

func (s *site) peerArgs(instance string, flags ...string) []string {
	return append([]string{"peer", "--raddr", "", "--laddr", "", "--chroot-base-dir", "vms", "--package", filepath.Join(work, "out/package"), "--instance", instance}, flags...)
}

// fullJSON is --devices with every field of the reference.
func fullJSON(t *testing.T, pkg, instance string) string {
	t.Helper()
	var devices []map[string]any
	for _, f := range tour.Files {
		devices = append(devices, map[string]any{
			"name": f.Device, "base": filepath.Join(pkg, f.File), "overlay": filepath.Join(instance, "overlay", f.File), "state": filepath.Join(instance, "state", f.File),
			"blockSize": 65536, "expiry": 1000000000, "maxDirtyBlocks": 200, "minCycles": 5, "maxCycles": 20, "cycleThrottle": 500000000,
			"makeMigratable": true, "shared": false, "sharedbase": false, "s3sync": false, "s3accesskey": "", "s3secretkey": "", "s3endpoint": "",
			"s3secure": false, "s3bucket": "", "s3concurrency": 0,
		})
	}
	b, err := json.Marshal(devices)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Two instances of one package run at the same time, keep their own data over a stop and a start,
// and leave the package as it is.
func TestTwoInstances(t *testing.T) {
	s := emptySite(t)
	pkg := filepath.Join(work, "out/package")
	before := sums(t, pkg)
	zero := s.redisIn(t, "ark0", "127.0.0.1:3333")
	one := s.redisIn(t, "ark1", "127.0.0.1:4444")
	for round := range 3 {
		// One is named by two directories, the other in full.
		vm0 := s.peer(t, "instance-0", "--netns", "ark0", "--device", "name=disk,blockSize=4096")
		vm1 := s.start(t, "peer", "--raddr", "", "--laddr", "", "--chroot-base-dir", "vms", "--netns", "ark1", "--devices", fullJSON(t, pkg, filepath.Join(s.dir, "instance-1")))
		for who, c := range map[string]*redis.Client{"zero": zero, "one": one} {
			for old := range round {
				if got, err := c.Get(t.Context(), fmt.Sprintf("round:%d", old)).Result(); err != nil || got != who {
					t.Errorf("round %d: instance %s has %q of round %d, %v", round, who, got, old, err)
				}
			}
			if err := c.Set(t.Context(), fmt.Sprintf("round:%d", round), who, 0).Err(); err != nil {
				t.Error(err)
			}
		}
		if round == 0 {
			if line := s.fails(t, s.peerArgs("instance-0", "--netns", "ark2")...); !strings.Contains(line, "in use") {
				t.Errorf("the same instance twice: %s", line)
			}
		}
		end(t, vm0)
		end(t, vm1)
	}
	if after := sums(t, pkg); after != before {
		t.Errorf("the package changed:\n%s\nbefore:\n%s", after, before)
	}
	for _, f := range tour.Files {
		out := command(t, s.dir, "drafter", "device", "check", "--base", filepath.Join(pkg, f.File), "--overlay", "instance-0/overlay/"+f.File, "--state", "instance-0/state/"+f.File)
		if out != "The device is sound.\n" {
			t.Errorf("device %s: %s", f.Device, out)
		}
	}
}

// Without overlays an instance writes to the package, which the runner goes on with.
func TestPeerWithoutOverlay(t *testing.T) {
	s := newSite(t)
	c := s.redis(t)
	for round := range 6 {
		var vm *tour.Service
		if round%2 == 0 {
			vm = s.start(t, "peer", "--raddr", "", "--laddr", "", "--chroot-base-dir", "vms", "--package", s.pkg)
		} else {
			vm = s.run(t)
		}
		if got, err := c.Get(t.Context(), "round").Int(); round > 0 && (err != nil || got != round-1) {
			t.Errorf("round %d: %d, %v", round, got, err)
		}
		if err := c.Set(t.Context(), "round", round, 0).Err(); err != nil {
			t.Fatal(err)
		}
		end(t, vm)
	}
}

// Peers that map a package privately leave it as it was, bit for bit, and nothing else but outputs,
// however they end: suspended, killed, or because their VM has moved away.
func TestPeerMapPrivate(t *testing.T) {
	s := newSite(t)
	before := sums(t, s.pkg)
	private := func(flags ...string) []string {
		return append([]string{"peer", "--raddr", "", "--laddr", "", "--chroot-base-dir", "vms", "--package", s.pkg, "--experimental-map-private"}, flags...)
	}
	kept, other := s.redisIn(t, "ark0", "127.0.0.1:3333"), s.redisIn(t, "ark1", "127.0.0.1:4444")
	out := newSmallDisk(t, filepath.Join(s.dir, "kept"), "16m") // too small, at first
	memory, state := filepath.Join(out.dir, "memory.bin"), filepath.Join(out.dir, "state.bin")
	first := s.start(t, private("--experimental-map-private-memory-output", memory, "--experimental-map-private-state-output", state)...)
	second := s.start(t, private("--netns", "ark1")...)
	for value, c := range map[string]*redis.Client{"kept": kept, "lost": other} {
		if err := c.Set(t.Context(), "key", value, 0).Err(); err != nil {
			t.Fatal(err)
		}
		save(t, c)
	}
	if line := s.refused(t, "--netns", "ark2"); !strings.Contains(line, "in use") {
		t.Errorf("a runner beside private peers: %s", line)
	}
	if line := s.fails(t, private("--netns", "ark2", "--instance", "instance")...); !strings.Contains(line, "--package without --instance") {
		t.Errorf("with overlays: %s", line)
	}
	if err := second.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, second)

	third := s.start(t, private("--netns", "ark1", "--laddr", "localhost:1337")...)
	if left, err := filepath.Glob(filepath.Join(s.dir, "vms/private/*")); err != nil || len(left) != 2 {
		t.Errorf("beside those of two peers there are directories of a killed one: %q, %v", left, err)
	}
	if got, err := other.Get(t.Context(), "key").Result(); !errors.Is(err, redis.Nil) {
		t.Errorf("the next one sees what the killed one had: %q, %v", got, err)
	}
	if err := other.Set(t.Context(), "key", "moved", 0).Err(); err != nil {
		t.Fatal(err)
	}
	there := s.redisIn(t, "ark2", "127.0.0.1:5555")
	target := s.peer(t, "instance", "--netns", "ark2", "--raddr", "localhost:1337")
	if err := third.Wait(); err != nil {
		t.Errorf("the one whose VM has moved away: %v", err)
	}
	if got, err := there.Get(t.Context(), "key").Result(); err != nil || got != "moved" {
		t.Errorf("where it moved to: %q, %v", got, err)
	}
	end(t, target)

	if err := first.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	await(t, first, "The VM is suspended, but its outputs cannot be stored yet")
	out.resize(t, "2g")
	if err := first.Wait(); err != nil {
		t.Errorf("the one with outputs: %v", err)
	}
	if after := sums(t, s.pkg); after != before {
		t.Errorf("the package changed:\n%s\nbefore:\n%s", after, before)
	}
	s.pkg = out.dir
	s.run(t)
	if got, err := kept.Get(t.Context(), "key").Result(); err != nil || got != "kept" {
		t.Errorf("after the resume of the outputs: %q, %v", got, err)
	}
}

// A busy instance whose process is killed at a random moment leaves a host that the next start
// cleans, disks whose file systems recover, and every write that Redis had synced.
func TestKilledPeer(t *testing.T) {
	rounds := soak(5, 50)
	s := emptySite(t)
	clean := inventory()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	// The guest's own address: forwarders are not what is tested.
	c := redis.NewClient(&redis.Options{Addr: "10.0.15.1:6379", MaxRetries: -1, DialTimeout: time.Second, ReadTimeout: 5 * time.Second})
	defer c.Close()
	for round := range rounds {
		instance := fmt.Sprintf("instance-%d", round)
		vm := s.peer(t, instance)
		if err := c.ConfigSet(t.Context(), "appendfsync", "always").Err(); err != nil {
			t.Fatal(err)
		}
		acknowledged := s.killWhileWriting(t, vm, c, rng, round)
		if round == rounds-1 {
			s.boots(t, "its process was killed", s.peerArgs(instance)...)
		} else if line := s.fails(t, s.peerArgs(instance, "--max-memory", "1MB")...); !strings.Contains(line, "--max-memory") { // its clean-up leaves the disks as they are
			t.Fatalf("round %d: the next start: %s", round, line)
		}
		if after := strings.ReplaceAll(inventory(), filepath.Join(s.dir, instance), ""); after != clean {
			t.Fatalf("round %d: left behind:\n%s\nbefore:\n%s", round, after, clean)
		}
		s.recover(t, instance, round, acknowledged)
		if err := os.RemoveAll(filepath.Join(s.dir, instance)); err != nil {
			t.Fatal(err)
		}
	}
}

// killWhileWriting returns how many writes were acknowledged.
func (s *site) killWhileWriting(t *testing.T, vm *tour.Service, c *redis.Client, rng *rand.Rand, round int) int {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	acknowledged := make(chan int, 1)
	go func() {
		n := 0
		for c.Set(ctx, fmt.Sprintf("round:%d:%d", round, n), strings.Repeat("x", 3000), 0).Err() == nil {
			n++
		}
		acknowledged <- n
	}()
	time.Sleep(time.Duration(rng.IntN(800)) * time.Millisecond) // the random moment
	if err := vm.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, vm)
	cancel()
	return <-acknowledged
}

// awaitKilled waits for a killed process. One that waited for its own devices ends with the next
// start on the host, which takes them away.
func (s *site) awaitKilled(t *testing.T, vm interface {
	PID() int
	Done() <-chan struct{}
}) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		select {
		case <-vm.Done():
			return
		case <-time.After(2 * time.Second):
		}
		if time.Now().After(deadline) {
			t.Fatal("a killed process does not end: it hangs in the kernel")
		}
		if process.Dying(vm.PID()) {
			t.Log("the killed process waits for its own devices")
			if err := vmm.ReclaimAll(filepath.Join(s.dir, "vms"), nil); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// recover takes the disk with Redis' data out of a killed instance and looks into it as after a
// power cut.
func (s *site) recover(t *testing.T, instance string, round, acknowledged int) {
	t.Helper()
	disks := []string{"oci.ext4"}
	if round%10 == 0 {
		disks = append(disks, "rootfs.ext4") // nobody writes there
	}
	for _, disk := range disks {
		command(t, s.dir, filepath.Join(work, "bin/plain/drafter"), "device", "export", "--base", filepath.Join(work, "out/package", disk), "--overlay", filepath.Join(instance, "overlay", disk),
			"--state", filepath.Join(instance, "state", disk), "--output", disk)
		cmd := exec.Command("e2fsck", "-fp", disk)
		cmd.Dir = s.dir
		if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() > 1 {
			t.Fatalf("round %d: %s does not recover: %v: %s", round, disk, err, out)
		}
		command(t, s.dir, "e2fsck", "-fn", disk)
	}
	data := filepath.Join(s.dir, "data")
	if err := os.RemoveAll(data); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, s.dir, "debugfs", "-R", "rdump /rootfs/data/appendonlydir data", "oci.ext4")
	socket := filepath.Join(s.dir, "redis.sock")
	server := exec.Command("redis-server", "--port", "0", "--unixsocket", socket, "--dir", data, "--appendonly", "yes", "--save", "")
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := server.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = server.Wait() // killed
	}()
	waitLine(t, out, "eady to accept connections")
	c := redis.NewClient(&redis.Options{Network: "unix", Addr: socket})
	defer c.Close()
	for i := range acknowledged {
		if n, err := c.StrLen(t.Context(), fmt.Sprintf("round:%d:%d", round, i)).Result(); err != nil || n != 3000 {
			t.Fatalf("round %d: write %d of %d acknowledged ones is lost: %d bytes, %v", round, i, acknowledged, n, err)
		}
	}
}

func waitLine(t *testing.T, r interface{ Read([]byte) (int, error) }, text string) {
	t.Helper()
	var seen strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(seen.String(), text) {
		n, err := r.Read(buf)
		seen.Write(buf[:n])
		if err != nil {
			t.Fatalf("%v: %s", err, seen.String())
		}
	}
}

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"drafter/api"
	until "drafter/internal/await"
)

// refused runs a command that fails, and returns what it says.
func (h *house) refused(t *testing.T, args ...string) string {
	t.Helper()
	var said bytes.Buffer
	cmd := h.command(t, args...)
	cmd.Stderr = &said
	if err := cmd.Run(); err == nil {
		t.Errorf("%v succeeds", args)
	}
	return said.String()
}

// packages are those of the daemon, by what they are called.
func (h *house) packages(t *testing.T) map[string]api.Package {
	t.Helper()
	var list []api.Package
	if err := json.Unmarshal([]byte(h.drafter(t, "package", "ls", "--format", "json")), &list); err != nil {
		t.Fatal(err)
	}
	packages := map[string]api.Package{}
	for _, p := range list {
		name := p.Name
		if name == "" {
			name = p.Key
		}
		packages[name] = p
	}
	return packages
}

// counter is a client that counts in a Redis.
type counter struct {
	reached atomic.Int64
	silence time.Duration // the longest
	failed  error
	stop    context.CancelFunc
	wait    sync.WaitGroup
}

// count begins to count, over one connection, a thousand times a second at most.
func (h *house) count(t *testing.T, port string) *counter {
	t.Helper()
	k := &counter{}
	ctx, stop := context.WithCancel(t.Context())
	k.stop = stop
	conn := h.redisAt(t, port).Conn()
	k.wait.Go(func() {
		defer conn.Close()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for last := time.Now(); ; {
			n, err := conn.Incr(ctx, "n").Result()
			if err != nil {
				if ctx.Err() == nil {
					k.failed = err
				}
				return
			}
			k.reached.Store(n)
			k.silence, last = max(k.silence, time.Since(last)), time.Now()
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	})
	return k
}

// awaits waits until it has counted on, and returns how far.
func (k *counter) awaits(t *testing.T) int64 {
	t.Helper()
	from := k.reached.Load()
	until.True(t, "the client counts on", func() bool { return k.reached.Load() >= from+50 })
	return k.reached.Load()
}

// end returns the longest silence.
func (k *counter) end(t *testing.T) time.Duration {
	t.Helper()
	k.stop()
	k.wait.Wait()
	if k.failed != nil {
		t.Error("the connection broke:", k.failed)
	}
	return k.silence
}

// redisAt is a client of a Redis that a house publishes.
func (h *house) redisAt(t *testing.T, port string) *redis.Client {
	t.Helper()
	c := redis.NewClient(&redis.Options{Addr: h.host.Addr + ":" + port, MaxRetries: 10})
	t.Cleanup(func() { c.Close() })
	return c
}

// An image is pulled, and run at once. A VM that goes on becomes a package, which runs, is exported and
// imported. What a VM needs stays; all else can go.
func TestStores(t *testing.T) {
	h := newHouse(t, emptySite(t), 21)
	end(t, h.daemon)
	h.Bin = filepath.Join(work, "bin/plain/drafter") // copies are checksums; the race detector makes them ten times slower
	h.start(t)
	image := "oci:" + filepath.Join(work, "redis-image")
	key := h.drafter(t, "pull", image)
	if out := h.drafter(t, "images", "--format", "{{.Reference}} {{.Packages}}"); out != image+" ["+key+"]" {
		t.Errorf("images: %q", out)
	}
	began := time.Now()
	h.drafter(t, "run", "-d", "--name", "cache", "-p", "6379:6379", image)
	t.Logf("the first run after the pull took %s", time.Since(began).Round(time.Millisecond))
	if p := h.packages(t); len(p) != 1 || p[key].Hardware.CPU == "" || p[key].Size == 0 || strings.Join(p[key].VMs, " ") != "cache" {
		t.Errorf("packages: %+v", p)
	}

	// A VM whose client counts, and hardly notices.
	counting := h.count(t, "6379")
	before := counting.awaits(t)
	began = time.Now()
	h.drafter(t, "snapshot", "cache", "warm")
	took := time.Since(began)
	after := counting.awaits(t)
	t.Logf("the snapshot took %s; the longest silence was %s", took.Round(time.Millisecond), counting.end(t).Round(time.Millisecond))
	h.drafter(t, "run", "-d", "--name", "copy", "-p", "6380:6379", "warm")
	if n, err := h.redisAt(t, "6380").Get(t.Context(), "n").Int64(); err != nil || n < before || n > after {
		t.Errorf("the copy has %d, %v; %d were counted before it, and %d after", n, err, before, after)
	}
	if vm := h.inspect(t, "copy"); vm.Booted != "" || vm.Memory != h.inspect(t, "cache").Memory {
		t.Errorf("the copy: %+v", vm)
	}
	ids := map[string]bool{}
	for _, vm := range []string{"cache", "copy"} {
		ids[h.drafter(t, "exec", "--system", vm, "cat", "/proc/sys/kernel/random/boot_id")] = true
	}
	if len(ids) != 2 {
		t.Errorf("the copy has the VM's identity: %v", ids)
	}
	if said := h.refused(t, "snapshot", "cache", "warm"); !strings.Contains(said, "there is a package warm") {
		t.Error(said)
	}
	if said := h.refused(t, "run", "-d", "-m", "2GiB", "warm"); !strings.Contains(said, "leave that out") {
		t.Error(said)
	}

	for command, want := range map[string]string{"run": image, "push": "cache", "snapshot": "copy", "package": "inspect"} {
		if out := h.drafter(t, "__complete", command, ""); !strings.Contains(out, want) {
			t.Errorf("%s is completed with %q", command, out)
		}
	}
	if out := h.drafter(t, "__complete", "package", "rm", ""); !strings.Contains(out, "warm\tVM cache") {
		t.Errorf("packages are completed with %q", out)
	}
	testNeeded(t, h, image, key)
	testArchive(t, h)
	testStopped(t, h)

	// The next daemon knows all of it.
	packages := h.packages(t)
	h.kill(t)
	h.start(t)
	if now := h.packages(t); len(now) != len(packages) || now["warm"].Key != packages["warm"].Key || now["warm"].VM != "cache" {
		t.Errorf("%+v; there were %+v", now, packages)
	}

	h.drafter(t, append([]string{"rm", "--force"}, strings.Fields(h.drafter(t, "ps", "-aq"))...)...)
	if out := h.drafter(t, "prune", "--dry-run", "--until", "24h"); !strings.Contains(out, "nothing to remove") {
		t.Error(out)
	}
	if out := h.drafter(t, "prune", "--force"); !strings.Contains(out, "Freed") {
		t.Error(out)
	}
	if left := h.packages(t); len(left) == 0 || left[key].Key != "" || left["warm"].Name == "" {
		t.Errorf("without --all, what has a name stays: %+v", left)
	}
	h.drafter(t, "prune", "--force", "--all")
	for _, dir := range []string{"packages", "images"} {
		if left, err := os.ReadDir(filepath.Join(h.dir, "lib", dir)); err != nil || len(left) != 0 {
			t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
}

// What a VM runs from stays.
func testNeeded(t *testing.T, h *house, image, key string) {
	for _, c := range []struct {
		args []string
		vm   string
	}{
		{[]string{"package", "rm", "warm"}, "VM copy"},
		{[]string{"package", "rm", key[:12]}, "VM cache"},
		{[]string{"image", "rm", image}, "VM cache"},
	} {
		if said := h.refused(t, c.args...); !strings.Contains(said, c.vm) {
			t.Errorf("%v: %s", c.args, said)
		}
	}
	if out := h.drafter(t, "prune", "--force", "--all"); !strings.Contains(out, "nothing to remove") {
		t.Error(out)
	}
	if said := h.refused(t, "package", "rm", "none"); !strings.Contains(said, "not found") {
		t.Error(said)
	}
}

// A package goes to a file that other tools read, and comes back.
func testArchive(t *testing.T, h *house) {
	file := filepath.Join(h.dir, "warm.tar.zst")
	h.drafter(t, "package", "export", "warm", file)
	out, err := exec.Command("tar", "--list", "--zstd", "--file", file).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, device := range []string{"kernel", "disk", "oci", "memory", "state", "config"} {
		if !strings.Contains("\n"+string(out), "\n"+device+"\n") {
			t.Errorf("device %s is not in the archive: %s", device, out)
		}
	}
	h.drafter(t, "package", "import", file, "imported")
	if err := os.Truncate(file, 10<<20); err != nil {
		t.Fatal(err)
	}
	if said := h.refused(t, "package", "import", file, "broken"); !strings.Contains(said, "truncated") {
		t.Error(said)
	}
	h.drafter(t, "run", "-d", "--name", "other", "-p", "6381:6379", "imported")
	if n, err := h.redisAt(t, "6381").Get(t.Context(), "n").Int64(); err != nil || n == 0 {
		t.Errorf("what was imported has %d, %v", n, err)
	}
}

// A VM that is stopped becomes a package, too. What runs from that is a VM as any other.
func testStopped(t *testing.T, h *house) {
	c := h.redisAt(t, "6381")
	if err := c.Set(t.Context(), "key", "value", 0).Err(); err != nil {
		t.Fatal(err)
	}
	h.drafter(t, "exec", "other", "redis-cli", "save")
	h.drafter(t, "stop", "other")
	h.drafter(t, "snapshot", "other", "cold")
	h.drafter(t, "rm", "other")
	h.drafter(t, "run", "-d", "--name", "last", "-p", "6381:6379", "cold")
	if v, err := c.Get(t.Context(), "key").Result(); err != nil || v != "value" {
		t.Errorf("%q, %v", v, err)
	}
	h.drafter(t, "kill", "last")
	if said := h.refused(t, "snapshot", "last", "none"); !strings.Contains(said, "start it first") {
		t.Error(said)
	}
	h.drafter(t, "start", "last")
	if v, err := c.Get(t.Context(), "key").Result(); err != nil || v != "value" || h.inspect(t, "last").Booted == "" {
		t.Errorf("after a power cut: %q, %v", v, err)
	}
}

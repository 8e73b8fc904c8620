package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"

	"drafter/internal/block"
	"drafter/internal/migration"
	"drafter/internal/tour"
	"drafter/migrate"
	"drafter/vmm"
)

// serveRegistry serves a package until the test ends it.
func serveRegistry(t *testing.T, d tour.Drafter, laddr, pkg string) *tour.Service {
	t.Helper()
	r, err := d.Start("registry", "--laddr", laddr, "--insecure", "--package", pkg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		select {
		case <-r.Done():
		default:
			end(t, r)
		}
	})
	if _, err := r.Await(t.Context(), "Serving"); err != nil {
		t.Fatal(err)
	}
	return r
}

// samePackage compares the devices' files of two directories.
func samePackage(t *testing.T, got, want string) {
	t.Helper()
	for _, f := range tour.Files {
		same(t, filepath.Join(got, f.File), filepath.Join(want, f.File))
	}
}

// same compares two files.
func same(t *testing.T, got, want string) {
	t.Helper()
	if out, err := exec.Command("cmp", got, want).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// A host that has nothing starts Redis from a registry over a network, long before all of the
// package is there; afterwards it needs no network.
func TestRegistry(t *testing.T) {
	s := emptySite(t)
	pkg := filepath.Join(work, "out/package")
	server, host := newHost(t, s, 1), newHost(t, s, 2)
	registered := serveRegistry(t, server.Drafter, server.addr+":1600", pkg)
	c := redis.NewClient(&redis.Options{Addr: host.addr + ":3333", MaxRetries: 10})
	defer c.Close()
	flags := []string{"--package", "pulled", "--raddr", server.addr + ":1600", "--insecure"}

	host.limit(t, 100_000_000)
	start := time.Now()
	vm := host.peer(t, "instance-0", flags...)
	if err := c.Set(t.Context(), "pulled", "yes", 0).Err(); err != nil {
		t.Fatal(err)
	}
	reply := time.Since(start)
	if _, err := os.Stat(filepath.Join(s.dir, "pulled/memory.bin")); err == nil {
		t.Error("all of the memory was there before the first reply")
	}
	host.limit(t, 1_000_000_000)
	await(t, vm, "The whole package is here and verified")
	t.Logf("first reply after %s, all after %s", reply.Round(time.Millisecond), time.Since(start).Round(time.Millisecond))
	end(t, vm)
	samePackage(t, filepath.Join(s.dir, "pulled"), pkg)

	end(t, registered)
	vm = host.peer(t, "instance-0", "--package", "pulled")
	if v, err := c.Get(t.Context(), "pulled").Result(); err != nil || v != "yes" {
		t.Errorf("%q, %v", v, err)
	}
	end(t, vm)
	samePackage(t, filepath.Join(s.dir, "pulled"), pkg)
}

// A pull goes on where it was: after a suspend, after its process was killed, and while the server
// is away. The VM waits for what it lacks.
func TestInterruptedPull(t *testing.T) {
	s := emptySite(t)
	pkg := filepath.Join(work, "out/package")
	c := s.redisIn(t, "ark0", redisAddr)
	const addr = "localhost:1600"
	const slow, fast = 500_000, 10_000_000 // slow, the package does not get here before it is to
	proxy := newProxy(t, addr, fast)
	registered := serveRegistry(t, s.Drafter, addr, pkg)
	args := func(instance string, flags ...string) []string {
		return s.peerArgs(instance, append([]string{"--netns", "ark0", "--package", "pulled"}, flags...)...)
	}
	pull := []string{"--raddr", proxy.addr}

	vm := s.start(t, args("instance-0", pull...)...)
	if err := c.Set(t.Context(), "round", "1", 0).Err(); err != nil {
		t.Fatal(err)
	}
	proxy.rate(slow)
	end(t, vm)
	if line := s.fails(t, args("instance-0")...); !strings.Contains(line, "was not wholly pulled yet") {
		t.Error(line)
	}
	proxy.rate(fast)
	vm = s.start(t, args("instance-0", pull...)...)
	if v, err := c.Get(t.Context(), "round").Result(); err != nil || v != "1" {
		t.Errorf("after a suspend: %q, %v", v, err)
	}
	proxy.rate(slow)
	if err := vm.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, vm)
	here := blocks(t, s.dir, "pulled/.memory.bin.partial")
	if here == 0 {
		t.Error("nothing of the memory is kept")
	}

	proxy.rate(fast)
	vm = s.start(t, args("instance-1", pull...)...)
	proxy.rate(slow)
	end(t, registered)
	await(t, vm, "Pulling is held up; trying again until it goes on")
	registered = serveRegistry(t, s.Drafter, addr, pkg)
	proxy.rate(1_000_000_000)
	await(t, vm, "The whole package is here and verified")
	if err := c.Set(t.Context(), "round", "2", 0).Err(); err != nil {
		t.Error(err)
	}
	end(t, vm)
	samePackage(t, filepath.Join(s.dir, "pulled"), pkg)
	t.Logf("%d MiB of the memory were kept", here>>20)
	end(t, registered)
}

// Another package in the place of the one that is being pulled is an error that says so, not a mix;
// and what has been pulled of the old one is of no harm to who pulls the new one.
func TestReplacedPackage(t *testing.T) {
	s := newSite(t)
	s.redisIn(t, "ark0", redisAddr)
	other := filepath.Join(work, "out/package")
	const addr = "localhost:1600"
	proxy := newProxy(t, addr, 20_000_000)
	runs := s.run(t, "--netns", "ark1")
	end(t, runs) // which writes to s.pkg: now it is another package
	registered := serveRegistry(t, s.Drafter, addr, other)
	vm, err := s.Start(s.peerArgs("instance-0", "--netns", "ark0", "--package", "pulled", "--raddr", proxy.addr)...)
	if err != nil {
		t.Fatal(err)
	}
	await(t, vm, "Resumed VM")
	proxy.rate(500_000) // the rest does not come before the package is another
	end(t, registered)
	registered = serveRegistry(t, s.Drafter, addr, s.pkg)
	if _, err := vm.Await(t.Context(), "The rest of the package cannot be pulled; the VM goes on with what it has, and fails where it lacks something"); err != nil {
		// What it lacks may be what it reads next: then that is how it ends.
		if !strings.Contains(err.Error(), "the registry offers another package now") {
			t.Fatal(err)
		}
	}
	_ = vm.End() // it may have failed by now, as it said
	if line := s.fails(t, s.peerArgs("instance-0", "--netns", "ark0", "--package", "pulled", "--raddr", addr)...); !strings.Contains(line, "not the one that overlay") {
		t.Error(line)
	}
	vm = s.start(t, s.peerArgs("instance-1", "--netns", "ark0", "--package", "pulled", "--raddr", addr)...)
	await(t, vm, "The whole package is here and verified")
	end(t, vm)
	samePackage(t, filepath.Join(s.dir, "pulled"), s.pkg)
	end(t, registered)
}

// Ten targets pull at once. Each gets the same bytes, and the server's memory does not grow with
// what it sends.
func TestTenTargets(t *testing.T) {
	s := emptySite(t)
	pkg := filepath.Join(work, "out/package")
	d := s.Drafter
	d.Bin = filepath.Join(work, "bin/plain/drafter")
	registered := serveRegistry(t, d, "localhost:1600", pkg)
	before := residentMemory(t, registered.PID())
	peak, stop := int64(0), make(chan struct{})
	var watch errgroup.Group
	watch.Go(func() error {
		for {
			select {
			case <-stop:
				return nil
			case <-time.After(20 * time.Millisecond):
				peak = max(peak, residentMemory(t, registered.PID()))
			}
		}
	})
	dial := func(ctx context.Context) (io.ReadWriteCloser, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", "localhost:1600")
	}
	// Memory is mostly zeros, which cost only the targets something.
	pulls := func(i int, device string) bool { return device != vmm.Memory || i < 2 }
	start := time.Now()
	g, ctx := errgroup.WithContext(t.Context())
	for i := range 10 {
		g.Go(func() error {
			p, err := migration.OpenPackage(ctx, dial, migrate.Limits{})
			if err != nil {
				return err
			}
			for _, name := range p.Names() {
				if !pulls(i, name) {
					continue
				}
				remote, _ := p.Remote(name)
				d, err := block.OpenPulled(t.Context(), filepath.Join(s.dir, fmt.Sprint("target-", i), name), remote)
				if err != nil {
					return err
				}
				if err := errors.Join(d.Fill(ctx, nil), d.Close()); err != nil {
					return err
				}
			}
			return p.Close()
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	close(stop)
	_ = watch.Wait() // it cannot fail
	for _, f := range tour.Files {
		want := contentID(t, filepath.Join(pkg, f.File))
		for i := range 10 {
			if !pulls(i, f.Device) {
				continue
			}
			if got := contentID(t, filepath.Join(s.dir, fmt.Sprint("target-", i), f.Device)); got != want {
				t.Errorf("%s of target %d is %s, want %s", f.Device, i, got, want)
			}
		}
	}
	t.Logf("ten targets in %s; the server's memory: %d MiB before, at most %d MiB meanwhile", took.Round(time.Millisecond), before>>20, peak>>20)
	// Twenty connections of 2 MiB, and what the compression of one request per core takes.
	if peak-before > 100<<20 {
		t.Errorf("the server's memory grew by %d MiB", (peak-before)>>20)
	}
	end(t, registered)
}

// residentMemory is a process' anonymous memory in bytes.
func residentMemory(t *testing.T, pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Error(err)
		return 0
	}
	m := regexp.MustCompile(`RssAnon:\s+(\d+) kB`).FindSubmatch(b)
	if m == nil {
		t.Error("no RssAnon")
		return 0
	}
	n, err := strconv.ParseInt(string(m[1]), 10, 64)
	if err != nil {
		t.Error(err)
	}
	return n << 10
}

// blocks is how many bytes of a file are allocated.
func blocks(t *testing.T, dir, file string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(dir, file), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

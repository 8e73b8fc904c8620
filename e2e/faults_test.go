package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"drafter/internal/tour"
)

// link is a proxy between a target and its source that can be cut, frozen, and made deaf for what
// the target says.
type link struct {
	addr string
	l    net.Listener
	wg   sync.WaitGroup
	deaf atomic.Bool

	mu    sync.Mutex
	conns []*proxied
}

// proxied is one connection through a link.
type proxied struct {
	target, source net.Conn
	frozen         atomic.Bool
}

func newLink(t *testing.T, to string) *link {
	t.Helper()
	return newLinkAt(t, "127.0.0.1:0", to)
}

func newLinkAt(t *testing.T, addr, to string) *link {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	p := &link{addr: l.Addr().String(), l: l}
	p.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			c := &proxied{target: in, source: out}
			p.mu.Lock()
			p.conns = append(p.conns, c)
			p.mu.Unlock()
			p.wg.Go(func() { c.pass(in, out, nil) })
			p.wg.Go(func() { c.pass(out, in, &p.deaf) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.cut()
		p.wg.Wait()
	})
	return p
}

// pass passes on what comes from one side to the other, until the connection ends. What comes while
// it is frozen or deaf is lost.
func (c *proxied) pass(to, from net.Conn, deaf *atomic.Bool) {
	defer to.Close()
	defer from.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		if c.frozen.Load() || deaf != nil && deaf.Load() {
			continue
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

// cut breaks all connections there are.
func (p *link) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.target.Close()
		c.source.Close()
	}
	p.conns = nil
}

// freeze lets nothing through any more on the connections that there are.
func (p *link) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.frozen.Store(true)
	}
}

// withoutPackage are the flags of a peer whose bases do not exist.
func (s *site) withoutPackage(number int) []string {
	var flags []string
	for _, f := range tour.Files {
		flags = append(flags, "--device", "name="+f.Device+",base="+filepath.Join(s.dir, fmt.Sprintf("none-%d", number), f.File))
	}
	return flags
}

// await waits for a line of a service that is still running.
func await(t *testing.T, vm *tour.Service, message string) tour.Line {
	t.Helper()
	line, err := vm.Await(t.Context(), message)
	if err != nil {
		t.Fatal(err)
	}
	return line
}

// Whatever goes wrong before the handoff, the VM runs on where it is, and the target leaves nothing
// behind.
func TestFaultsBeforeHandoff(t *testing.T) {
	s := emptySite(t)
	c := s.redisIn(t, "ark0", "127.0.0.1:3333")
	// Slow enough to be caught at it.
	source := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337", "--bandwidth", "30MB")
	runID := serverInfo(t, c, "run_id")
	target := func(raddr string, flags ...string) *tour.Service {
		t.Helper()
		args := append(s.peerArgs("instance-1", "--netns", "ark1", "--raddr", raddr), s.withoutPackage(1)...)
		vm, err := s.Start(append(args, flags...)...)
		if err != nil {
			t.Fatal(err)
		}
		return vm
	}
	alive := func(what string) {
		t.Helper()
		if err := c.Set(t.Context(), "fault", what, 0).Err(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if got := serverInfo(t, c, "run_id"); got != runID {
			t.Fatalf("%s: this is another Redis process", what)
		}
	}
	fails := func(vm *tour.Service, want string) {
		t.Helper()
		if err := vm.Wait(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	empty := func(what string) {
		t.Helper()
		var left []string
		err := filepath.Walk(filepath.Join(s.dir, "instance-1"), func(path string, info os.FileInfo, err error) error {
			if err == nil && info.Mode().IsRegular() {
				left = append(left, path)
			}
			return err
		})
		if err != nil && !os.IsNotExist(err) || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", what, left, err)
		}
	}

	// Strangers: one who says nothing, one who talks nonsense, and a port scan.
	silent, err := net.Dial("tcp", "localhost:1337")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for range 20 {
		garbage, err := net.Dial("tcp", "localhost:1337")
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		rng := rand.New(rand.NewPCG(1, 2))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		garbage.Write(b)
		garbage.Close()
	}
	alive("strangers")

	vm := target("localhost:1337")
	await(t, vm, "Receiving the VM's devices while it runs at its source")
	time.Sleep(500 * time.Millisecond) // in the midst of pre-copy
	second, err := s.Start(append(s.peerArgs("instance-2", "--netns", "ark2", "--raddr", "localhost:1337"), s.withoutPackage(2)...)...)
	if err != nil {
		t.Fatal(err)
	}
	fails(second, "being migrated already")
	alive("a second target")
	if err := vm.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, vm)
	await(t, source, "A connection or a migration failed; the VM runs here")
	alive("target killed")
	if line := s.fails(t, append(s.peerArgs("instance-1", "--netns", "ark1"), s.withoutPackage(1)...)...); !strings.Contains(line, "did not get to its end") {
		t.Errorf("start of what a killed target left: %s", line)
	}

	l := newLink(t, "localhost:1337")
	vm = target(l.addr) // in the place of what the killed one left
	await(t, vm, "Receiving the VM's devices while it runs at its source")
	time.Sleep(500 * time.Millisecond) // in the midst of pre-copy
	l.cut()
	fails(vm, "the VM stays at its source")
	alive("link cut")
	empty("link cut")

	vm = target("localhost:1337")
	await(t, vm, "Receiving the VM's devices while it runs at its source")
	time.Sleep(300 * time.Millisecond) // in the midst of pre-copy
	if err := vm.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	fails(vm, "receive VM")
	alive("target ended")
	empty("target ended")

	vm = target("localhost:1337", "--qemu-bin", "/bin/false")
	fails(vm, "/bin/false")
	alive("no VMM at the target")
	empty("no VMM at the target")

	full := filepath.Join(s.dir, "instance-1")
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", full).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	vm = target("localhost:1337")
	fails(vm, "no space left")
	alive("target's disk full")
	empty("target's disk full")
	if err := syscall.Unmount(full, 0); err != nil {
		t.Fatal(err)
	}

	if line := s.fails(t, append(s.peerArgs("instance-1", "--netns", "ark1", "--raddr", "localhost:1337"), "--device", "name=kernel,base="+filepath.Join(work, "bin/drafter-guest"))...); !strings.Contains(line, "is not the one that the VM was made from") {
		t.Errorf("another base: %s", line)
	}
	if line := s.fails(t, append(s.peerArgs("instance-1", "--netns", "ark1", "--raddr", "localhost:1337"), "--device", "name=more,base=more.img,overlay=o.img,state=s.img")...); !strings.Contains(line, "does not come with the VM") {
		t.Errorf("a device too many: %s", line)
	}
	alive("refused")

	// The source is ended while it migrates: the VM is suspended, and starts again.
	vm = target("localhost:1337")
	await(t, vm, "Receiving the VM's devices while it runs at its source")
	end(t, source)
	fails(vm, "the VM stays at its source")
	empty("source ended")
	source = s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337", "--bandwidth", "30MB")
	if got, err := c.Get(t.Context(), "fault").Result(); err != nil || got != "refused" {
		t.Errorf("%q, %v", got, err)
	}

	// The source is killed: the target gives up.
	vm = target("localhost:1337")
	await(t, vm, "Receiving the VM's devices while it runs at its source")
	time.Sleep(300 * time.Millisecond) // in the midst of pre-copy
	if err := source.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, source)
	fails(vm, "the VM stays at its source")
	empty("source killed")
	s.boots(t, "its process was killed", s.peerArgs("instance-0")...)
}

// A VM that is handed over before most of it was sent runs at once, gets the rest behind, and
// outlives lost connections.
func TestPostCopy(t *testing.T) {
	s := emptySite(t)
	zero, one := s.redisIn(t, "ark0", "127.0.0.1:3333"), s.redisIn(t, "ark1", "127.0.0.1:4444")
	source := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337", "--bandwidth", "40MB", "--migration-timeout", "1500ms")
	const keys = 300
	for i := range keys {
		if err := zero.Set(t.Context(), fmt.Sprintf("key:%d", i), strings.Repeat(value(0, i), 100), 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	runID := serverInfo(t, zero, "run_id")
	l := newLink(t, "localhost:1337")
	vm, err := s.Start(append(s.peerArgs("instance-1", "--netns", "ark1", "--raddr", l.addr), s.withoutPackage(1)...)...)
	if err != nil {
		t.Fatal(err)
	}
	await(t, vm, "The VM was handed over; resuming it here")
	for range 3 {
		time.Sleep(700 * time.Millisecond) // in the midst of post-copy, again and again
		l.cut()
	}
	await(t, vm, "Resumed VM")
	for i := range keys {
		if got, err := one.Get(t.Context(), fmt.Sprintf("key:%d", i)).Result(); err != nil || got != strings.Repeat(value(0, i), 100) {
			t.Fatalf("key %d: %d bytes, %v", i, len(got), err)
		}
	}
	if got := serverInfo(t, one, "run_id"); got != runID {
		t.Error("this is another Redis process")
	}
	line := moved(t, source)
	t.Log(line.Text)
	end(t, vm)
	// What is there now is all of it.
	again := s.start(t, append(s.peerArgs("instance-1", "--netns", "ark1"), s.withoutPackage(1)...)...)
	if got, err := one.Get(t.Context(), "key:7").Result(); err != nil || got != strings.Repeat(value(0, 7), 100) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	end(t, again)
}

// A guest that writes faster than the link takes it ends as the strategy says.
func TestTimeoutStrategies(t *testing.T) {
	s := emptySite(t)
	zero, one := s.redisIn(t, "ark0", "127.0.0.1:3333"), s.redisIn(t, "ark1", "127.0.0.1:4444")
	filler := redis.NewClient(&redis.Options{Addr: "127.0.0.1:3333", MaxRetries: -1, DialerRetries: 1, DialTimeout: time.Second, ReadTimeout: time.Second, WriteTimeout: time.Second})
	defer filler.Close()
	for _, strategy := range []string{"cancel", "postcopy"} {
		source := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337", "--bandwidth", "8MB", "--migration-timeout", "4s", "--timeout-strategy", strategy)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, 2))
			b := make([]byte, 200<<10)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				for j := range b {
					b[j] = byte(rng.Uint32())
				}
				filler.Set(t.Context(), fmt.Sprintf("fill:%d", i%50), b, 0) // an error is what the move looks like from here
			}
		})
		time.Sleep(2 * time.Second) // the guest has much that is dirty
		began := time.Now()
		vm, err := s.Start(s.peerArgs("instance-1", "--netns", "ark1", "--raddr", "localhost:1337")...)
		if err != nil {
			t.Fatal(err)
		}
		if strategy == "cancel" {
			if err := vm.Wait(); err == nil || !strings.Contains(err.Error(), "writes faster than the connection takes it") {
				t.Errorf("%v", err)
			}
			close(stop)
			wg.Wait()
			if err := zero.Ping(t.Context()).Err(); err != nil {
				t.Errorf("the VM does not run on: %v", err)
			}
			end(t, source)
			continue
		}
		await(t, vm, "The VM was handed over; resuming it here")
		if d := time.Since(began); d > 20*time.Second {
			t.Errorf("the handoff came after %s", d)
		}
		close(stop)
		wg.Wait()
		await(t, vm, "Resumed VM")
		if err := one.Ping(t.Context()).Err(); err != nil {
			t.Error(err)
		}
		moved(t, source)
		end(t, vm)
	}
}

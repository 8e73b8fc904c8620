package e2e

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	until "drafter/internal/await"
	"drafter/internal/tour"
	"drafter/terminator"
)

// doubt brings an instance's VM into doubt: its target, an instance of that name, gets it and is
// killed; the source never hears of it. What the target leaves says that the VM runs there, if it
// came to note that, and nothing comes in its place then.
func (s *site) doubt(t *testing.T, source *tour.Service, name string) {
	t.Helper()
	l := newLink(t, "localhost:1337")
	target, err := s.Start(s.peerArgs(name, "--netns", "ark1", "--raddr", l.addr)...)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		select {
		case <-target.Done(): // which it is not to be
			cancel()
		case <-ctx.Done():
		}
	}()
	if _, err := source.Await(ctx, "Pausing the VM to hand it over"); err != nil {
		cancel()
		t.Fatal(err, target.End())
	}
	l.deaf.Store(true)
	await(t, target, "The VM was handed over; resuming it here")
	if err := target.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, target)
	l.cut()
	await(t, source, "The target does not answer: it is in doubt who owns the VM, which stays paused here; waiting for the target, or for 'drafter peer settle'")
}

// A source that does not know whether its VM runs at its target keeps it paused until an operator
// has decided, whether it waits, was ended, or killed.
func TestSettle(t *testing.T) {
	s := emptySite(t)
	c := s.redisIn(t, "ark0", "127.0.0.1:3333")
	start := func() *tour.Service { return s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337") }
	settle := func(how string) []string {
		return []string{"peer", "settle", how, "--package", filepath.Join(work, "out/package"), "--instance", "instance-0"}
	}
	source := start()
	runID := serverInfo(t, c, "run_id")
	if line := s.fails(t, settle("--here")...); !strings.Contains(line, "has nothing in doubt") {
		t.Errorf("nothing to settle: %s", line)
	}
	alive := func(what string) {
		t.Helper()
		if got := serverInfo(t, c, "run_id"); got != runID {
			t.Fatalf("%s: this is another Redis process", what)
		}
		if got, err := c.Get(t.Context(), "before").Result(); err != nil || got != "the handoff" {
			t.Fatalf("%s: %q, %v", what, got, err)
		}
	}
	if err := c.Set(t.Context(), "before", "the handoff", 0).Err(); err != nil {
		t.Fatal(err)
	}

	s.doubt(t, source, "instance-1")
	paused := redis.NewClient(&redis.Options{Addr: "127.0.0.1:3333", MaxRetries: -1, DialerRetries: 1, DialTimeout: 500 * time.Millisecond, ReadTimeout: 500 * time.Millisecond})
	defer paused.Close()
	if err := paused.Ping(t.Context()).Err(); err == nil {
		t.Error("the VM runs while it is in doubt")
	}
	command(t, s.dir, "drafter", settle("--here")...)
	await(t, source, "The migration failed; the VM goes on here")
	alive("settled while the source waits")

	s.doubt(t, source, "instance-2")
	if err := source.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, source)
	if line := s.fails(t, s.peerArgs("instance-0")...); !strings.Contains(line, "drafter peer settle") {
		t.Errorf("start of a VM in doubt: %s", line)
	}
	command(t, s.dir, "drafter", settle("--here")...)
	source = start()
	alive("settled after the source was killed")

	s.doubt(t, source, "instance-3")
	if err := source.End(); err == nil || !strings.Contains(err.Error(), "drafter peer settle") {
		t.Errorf("end of a source in doubt: %v", err)
	}
	command(t, s.dir, "drafter", settle("--away")...)
	if line := s.fails(t, s.peerArgs("instance-0")...); !strings.Contains(line, "moved away") {
		t.Errorf("start of a VM that was settled to be away: %s", line)
	}
	// This cleans up behind the last target, too.
	if line := s.fails(t, s.peerArgs("instance-3", "--netns", "ark1")...); !strings.Contains(line, "taken over from another host") && !strings.Contains(line, "never arrived") && !strings.Contains(line, "before it was certain that the VM ran here") {
		t.Errorf("start of what a killed target left: %s", line)
	}
}

// A VMM that dies ends the VM where it runs, and only there.
func TestVMMDies(t *testing.T) {
	s := emptySite(t)
	c := s.redisIn(t, "ark0", "127.0.0.1:3333")
	target := func() *tour.Service {
		t.Helper()
		vm, err := s.Start(s.peerArgs("instance-1", "--netns", "ark1", "--raddr", "localhost:1337", "--chroot-base-dir", "target/vms")...)
		if err != nil {
			t.Fatal(err)
		}
		await(t, vm, "Receiving the VM's devices while it runs at its source")
		return vm
	}
	fails := func(vm *tour.Service, want string) {
		t.Helper()
		if err := vm.Wait(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	source := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337", "--bandwidth", "4MB")
	rng := rand.NewChaCha8([32]byte{})
	content := make([]byte, 1<<20)
	for i := range 30 { // which takes the link long enough
		rng.Read(content)
		if err := c.Set(t.Context(), fmt.Sprintf("content:%d", i), content, 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	vm := target()
	until.True(t, "the target has a VMM", func() bool {
		files, _ := filepath.Glob(filepath.Join(s.dir, "target/vms/*/*/process.json"))
		return len(files) == 1
	})
	time.Sleep(2 * time.Second) // it is being started, and then waits for its VM
	pid := s.vmmPIDIn(t, "target/vms")
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	fails(vm, "the VMM ended before the VM was there: QEMU ended unexpectedly: signal: killed")
	if err := c.Set(t.Context(), "key", "value", 0).Err(); err != nil {
		t.Errorf("the VM does not run on: %v", err)
	}

	vm = target()
	if err := syscall.Kill(s.vmmPID(t), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	fails(source, "signal: killed")
	fails(vm, "the VM stays at its source")
	s.boots(t, "was not suspended since", s.peerArgs("instance-0")...)
}

// A guest whose agent hangs does not get lost: it is not handed over, unless by force.
func TestAgentHangs(t *testing.T) {
	s := emptySite(t)
	source := resume(t, "ark0", filepath.Join(s.dir, "source"))
	c := redis.NewClient(&redis.Options{Addr: "10.0.15.1:6379"})
	defer c.Close()
	runID := serverInfo(t, c, "run_id")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := source.Agent().Exec(ctx, nil, "sh", "-c", "kill -STOP $PPID"); err == nil {
		t.Fatal("the agent answered after it was stopped")
	}
	streams := make(chan io.ReadWriteCloser)
	served := make(chan error, 1)
	sctx, end := context.WithCancel(t.Context())
	go func() {
		_, err := source.Serve(sctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
			select {
			case stream := <-streams:
				return stream, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		})
		served <- err
	}()
	target, err := newPeer("ark1", filepath.Join(s.dir, "target"))
	if err != nil {
		t.Fatal(err)
	}
	dial := func(ctx context.Context) (io.ReadWriteCloser, error) {
		here, there := net.Pipe()
		select {
		case streams <- there:
			return here, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	err = target.Receive(t.Context(), dial)
	if err == nil || !strings.Contains(err.Error(), "the VM stays at its source") || !strings.Contains(err.Error(), "--force") {
		t.Errorf("the target: %v", err)
	}
	if err := target.Close(); err != nil {
		t.Error(err)
	}
	// Who wants the VM as it is gets it.
	backup, err := terminator.New(terminator.Config{Dir: filepath.Join(s.dir, "backup"), Copy: true, Force: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Run(t.Context(), dial); err != nil {
		t.Errorf("a checkpoint by force: %v", err)
	}
	if got := serverInfo(t, c, "run_id"); got != runID {
		t.Error("this is another Redis process")
	}
	end()
	if err := <-served; err != nil {
		t.Errorf("the source: %v", err)
	}
}

// A target whose source is killed in post-copy goes on with what it has, until an operator gives it
// up: the source still has what there was at the handoff. Or the target boots, if its disks came.
func TestSourceDiesInPostCopy(t *testing.T) {
	s := emptySite(t)
	c := s.redisIn(t, "ark0", "127.0.0.1:3333")
	source := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337", "--bandwidth", "8MB", "--migration-timeout", "500ms")
	if err := c.Set(t.Context(), "before", "the handoff", 0).Err(); err != nil {
		t.Fatal(err)
	}
	vm, err := s.Start(append(s.peerArgs("instance-1", "--netns", "ark1", "--raddr", "localhost:1337"), s.withoutPackage(1)...)...)
	if err != nil {
		t.Fatal(err)
	}
	await(t, vm, "The VM was handed over; resuming it here")
	time.Sleep(3 * time.Second) // the source has noted what it has, and much is missing at the target
	if err := source.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, source)
	time.Sleep(time.Second) // in which the target would give up
	select {
	case <-vm.Done():
		t.Fatalf("the target gave up: %v", vm.Wait())
	default:
	}
	settle := func(how, instance string) []string {
		return []string{"peer", "settle", how, "--package", filepath.Join(work, "out/package"), "--instance", instance}
	}
	if line := s.fails(t, settle("--here", "instance-1")...); !strings.Contains(line, "are still at its source") {
		t.Errorf("settled to go on without what is missing: %s", line)
	}
	command(t, s.dir, "drafter", settle("--away", "instance-1")...)
	if err := vm.Wait(); err == nil || !strings.Contains(err.Error(), "as an operator has settled here") {
		t.Errorf("the target ended with %v", err)
	}
	wants := map[string]string{"instance-0": "go on from that moment with 'drafter peer settle --here'", "instance-1": "moved away"}
	for _, instance := range []string{"instance-0", "instance-1"} {
		args := s.peerArgs(instance)
		if instance == "instance-1" {
			args = append(args, s.withoutPackage(1)...)
		}
		if line := s.fails(t, args...); !strings.Contains(line, wants[instance]) {
			t.Errorf("start of %s: %s; want %q", instance, line, wants[instance])
		}
	}
	command(t, s.dir, "drafter", settle("--here", "instance-0")...)
	source = s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337", "--bandwidth", "8MB", "--migration-timeout", "500ms")
	if got, err := c.Get(t.Context(), "before").Result(); err != nil || got != "the handoff" {
		t.Errorf("at the source again: %q, %v", got, err)
	}

	// Where all of the disks came, what was acknowledged after the handoff is kept: the VM boots
	// there.
	if err := c.ConfigSet(t.Context(), "appendfsync", "always").Err(); err != nil {
		t.Fatal(err)
	}
	c = s.redisIn(t, "ark1", "127.0.0.1:4444")
	target := s.peerArgs("instance-2", "--netns", "ark1", "--device", "name=memory,base="+filepath.Join(s.dir, "none/memory.bin"))
	vm = s.start(t, append(target, "--raddr", "localhost:1337")...)
	if err := c.Set(t.Context(), "after", "the handoff", 0).Err(); err != nil {
		t.Fatal(err)
	}
	note := func(file string) bool {
		_, err := os.Stat(filepath.Join(s.dir, "instance-2/state", file+".missing"))
		return err == nil
	}
	until.True(t, "the disks come", func() bool { return !note("rootfs.ext4") && !note("oci.ext4") })
	if err := source.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, source)
	if !note("memory.bin") {
		t.Fatal("all of the memory came")
	}
	if line := s.fails(t, settle("--here", "instance-2")...); !strings.Contains(line, "boot from them after 'drafter peer settle --here'") {
		t.Errorf("settled while it runs: %s", line)
	}
	if err := vm.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, vm)
	if line := s.fails(t, target...); !strings.Contains(line, "drafter peer settle --here") {
		t.Errorf("start of what has its disks only: %s", line)
	}
	command(t, s.dir, "drafter", settle("--here", "instance-2")...)
	if vm, err = s.Start(target...); err != nil {
		t.Fatal(err)
	}
	await(t, vm, "Booted VM")
	if got, err := c.Get(t.Context(), "after").Result(); err != nil || got != "the handoff" {
		t.Errorf("booted from what came: %q, %v", got, err)
	}
	end(t, vm)
}

// A good move is one without a complaint. A target without the package gets all of the VM, starts
// again from that, and the next one that has the package gets little. Whoever dies after a handoff,
// the VM goes on where it is complete, or where an operator says that it does.
func TestAfterHandoff(t *testing.T) {
	s := emptySite(t)
	clients := []*redis.Client{s.redisIn(t, "ark0", "127.0.0.1:3333"), s.redisIn(t, "ark1", "127.0.0.1:4444")}
	flags := func(at int, more ...string) []string {
		return append([]string{"--netns", fmt.Sprintf("ark%d", at), "--laddr", fmt.Sprintf("localhost:%d", 1337+at)}, more...)
	}
	const fromZero, fromOne = "localhost:1337", "localhost:1338"
	written := 0
	alive := func(at int, what string) {
		t.Helper()
		for i := range written {
			if got, err := clients[at].Get(t.Context(), fmt.Sprint("key:", i)).Result(); err != nil || got != "value" {
				t.Fatalf("%s: key %d is %q, %v", what, i, got, err)
			}
		}
		if err := clients[at].Set(t.Context(), fmt.Sprint("key:", written), "value", 0).Err(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		written++
	}
	settle := func(how, instance string) {
		t.Helper()
		command(t, s.dir, "drafter", "peer", "settle", how, "--package", filepath.Join(work, "out/package"), "--instance", instance)
	}

	zero := s.peer(t, "instance-0", flags(0)...)
	alive(0, "at first")
	one := s.peer(t, "instance-1", flags(1, "--raddr", fromZero)...)
	t.Log(moved(t, zero).Text)
	quiet(t, zero)
	quiet(t, one)
	alive(1, "after a good move")

	// Without the package, into where it has moved away from.
	none := append([]string{"peer", "--chroot-base-dir", "vms", "--package", "nowhere", "--instance", "instance-0"}, flags(0)...)
	zero = s.start(t, append(none, "--raddr", fromOne)...)
	t.Log(moved(t, one).Text)
	quiet(t, one)
	quiet(t, zero)
	alive(0, "without the package")
	end(t, zero)
	zero = s.start(t, append(none, "--raddr", "")...)
	alive(0, "started again without the package")

	one = s.peer(t, "instance-1", flags(1, "--raddr", fromZero)...)
	line := moved(t, zero)
	t.Log(line.Text)
	if line.Bytes > 100<<20 {
		t.Errorf("a move to where the package is sent %d bytes", line.Bytes)
	}
	alive(1, "where the package is")
	for _, base := range []string{filepath.Join(work, "out/package/rootfs.ext4"), "nowhere/rootfs.ext4"} {
		command(t, s.dir, "drafter", "device", "check", "--base", base, "--overlay", "instance-0/overlay/rootfs.ext4", "--state", "instance-0/state/rootfs.ext4")
	}

	// The source dies, and does not know that its target lacks nothing.
	l := newLink(t, fromOne)
	two, err := s.Start(s.peerArgs("instance-2", flags(0, "--raddr", l.addr, "--bandwidth", "8MB", "--migration-timeout", "500ms")...)...)
	if err != nil {
		t.Fatal(err)
	}
	await(t, two, "The VM was handed over; resuming it here")
	l.deaf.Store(true)
	await(t, two, "Resumed VM")
	if err := one.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, one)
	end(t, two)
	if line := s.fails(t, s.peerArgs("instance-1")...); !strings.Contains(line, "drafter peer settle --here") || !strings.Contains(line, "--away") {
		t.Errorf("start of what may have moved: %s", line)
	}
	settle("--away", "instance-1")
	two = s.peer(t, "instance-2", flags(0, "--bandwidth", "8MB", "--migration-timeout", "500ms")...)
	alive(0, "after its source died")

	// The target dies, and lacks much.
	away := append([]string{"peer", "--chroot-base-dir", "vms", "--package", "nowhere", "--instance", "instance-3"}, flags(1)...)
	three, err := s.Start(append(away, "--raddr", fromZero)...)
	if err != nil {
		t.Fatal(err)
	}
	await(t, two, "The VM runs at its target; sending what is left")
	if line := s.fails(t, "peer", "settle", "--here", "--package", filepath.Join(work, "out/package"), "--instance", "instance-2"); !strings.Contains(line, "target is connected") {
		t.Errorf("settled beside a target that is there: %s", line)
	}
	if err := three.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, three)
	if line := s.fails(t, append(away, "--raddr", "")...); !strings.Contains(line, "drafter peer settle --here") {
		t.Errorf("start of what a killed target left: %s", line)
	}
	settle("--here", "instance-2")
	await(t, two, "The migration failed; the VM goes on here")
	alive(0, "after its target died")
	end(t, two)
	two = s.peer(t, "instance-2", flags(0)...)
	alive(0, "suspended and started after its target died")
	end(t, two)
}

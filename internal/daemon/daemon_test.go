package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/goleak"

	"drafter/agent"
	"drafter/api"
	"drafter/client"
	"drafter/internal/await"
	"drafter/internal/control"
	"drafter/internal/detached"
	"drafter/internal/vmmtest"
	"drafter/vmm"
)

// The test binary stands in for drafter: its peer has no VM, its nat and forwarder no network.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-test.") {
		if err := standIn(os.Args[1], os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func standIn(command string, args []string) error {
	flag := func(name string) string {
		if i := slices.Index(args, "--"+name); i >= 0 {
			return args[i+1]
		}
		return ""
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	switch command {
	case "daemon":
		return standInDaemon(ctx, args[0])
	case "peer":
		s, err := control.Serve(flag("control"), stop, func() *agent.Client { return nil })
		if err != nil {
			return err
		}
		if os.Getenv("STAND_IN_FAILS") != "" {
			return errors.Join(s.Close(control.End{Outcome: control.Failed, Error: "no memory is left", At: time.Now()}), errors.New("failed"))
		}
		if path := os.Getenv("STAND_IN_WAITS"); path != "" {
			for _, err := os.Stat(path); err != nil && ctx.Err() == nil; _, err = os.Stat(path) {
				time.Sleep(time.Millisecond)
			}
			if ctx.Err() != nil { // as a guest that hangs: SIGTERM is not enough
				time.Sleep(time.Hour)
			}
		}
		if raddr := flag("raddr"); raddr != "" {
			if err := receive(raddr); err != nil {
				return errors.Join(s.Close(control.End{Outcome: control.Failed, Error: err.Error(), At: time.Now()}), err)
			}
		}
		mover := &standInMover{moved: make(chan struct{})}
		s.SetMover(mover)
		if err := s.Measure(standInFigures{}); err != nil {
			return err
		}
		s.Set(control.Running, "")
		daemon.SdNotify(false, daemon.SdNotifyReady)
		if n, err := strconv.Atoi(os.Getenv("STAND_IN_EATS")); err == nil {
			for b := range slices.Chunk(make([]byte, n), 4096) {
				b[0] = 1
			}
		}
		exits := make(chan os.Signal, 1)
		signal.Notify(exits, syscall.SIGUSR1)
		select {
		case <-exits: // its service has
			status := 3
			return s.Close(control.End{Outcome: control.PoweredOff, At: time.Now(), ExitStatus: &status})
		case <-mover.moved:
			return s.Close(control.End{Outcome: control.Moved, At: time.Now()})
		case <-ctx.Done():
		}
		outcome := control.Suspended
		if moved, _ := mover.Withdraw(context.Background()); moved {
			outcome = control.Moved
		}
		return s.Close(control.End{Outcome: outcome, At: time.Now()})
	default:
		lock, err := detached.Lock(flag("lock"))
		if err != nil {
			return err
		}
		daemon.SdNotify(false, daemon.SdNotifyReady)
		<-ctx.Done()
		return lock.Release()
	}
}

// standInDaemon is a daemon process, for tests to kill.
func standInDaemon(ctx context.Context, dir string) error {
	c := testConfig(dir)
	if addr, err := os.ReadFile(filepath.Join(dir, "listen")); err == nil {
		c.Name, c.Listen = baseName(filepath.Base(dir)), string(addr)
	}
	d, err := Open(c)
	if err != nil {
		return err
	}
	if c.Listen != "" {
		l, err := net.Listen("tcp", c.Listen)
		if err != nil {
			return errors.Join(err, d.Close())
		}
		go http.Serve(tls.NewListener(l, d.TLS()), d.HostHandler()) // until the process ends
	}
	os.Remove(filepath.Join(dir, "socket"))
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		return err
	}
	go http.Serve(l, d.Handler()) // until the process ends
	daemon.SdNotify(false, daemon.SdNotifyReady)
	<-ctx.Done()
	return d.Close()
}

type noDriver struct {
	vmm.Driver

	version, cpu, accel string
}

func (noDriver) Name() string { return "none" }

func (d noDriver) Describe(context.Context, vmm.Launch) (vmm.Hardware, error) {
	return vmm.Hardware{VMM: "none", Version: d.version, CPU: d.cpu, Accel: d.accel}, nil
}

func testConfig(dir string) Config {
	namespaces, err := strconv.Atoi(os.Getenv("STAND_IN_NAMESPACES"))
	if err != nil {
		namespaces = 20
	}
	return Config{Dir: filepath.Join(dir, "lib"), Program: os.Args[0], Blueprint: filepath.Join(dir, "blueprint"), NamespaceCount: namespaces, Drivers: vmm.Drivers{noDriver{}}, limits: noLimits}
}

// testDir makes a directory in which there is a package of the image "docker://image" already.
func testDir(t testing.TB) string {
	t.Helper()
	return testDirOn(t, func(string) {})
}

// testDirOn is testDir with a disk that is mounted.
func testDirOn(t testing.TB, mount func(lib string)) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "d") // the names of tests make socket paths too long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !t.Failed() {
			os.RemoveAll(dir)
		}
	})
	if err := os.Mkdir(filepath.Join(dir, "lib"), 0o700); err != nil {
		t.Fatal(err)
	}
	mount(filepath.Join(dir, "lib"))
	for _, name := range []string{"blueprint", "lib/packages", "lib/images"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"vmlinux", "initrd", "rootfs.ext4"} {
		if err := os.WriteFile(filepath.Join(dir, "blueprint", name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d := &Daemon{config: testConfig(dir)}
	_, key, err := d.blueprint(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	k := templateKey{Digest: "sha256:1", Memory: 1 << 30, CPUs: 1, Blueprint: key, Platform: "linux/" + runtime.GOARCH, Hardware: vmm.Hardware{VMM: "none"}}
	if err := os.Mkdir(d.packageDir(k.String()), 0o700); err != nil {
		t.Fatal(err)
	}
	vmmtest.WritePackage(t, d.packageDir(k.String()))
	if err := d.writeImage(api.Image{Reference: "docker://image", Digest: "sha256:1"}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func open(t testing.TB, dir string) *Daemon {
	t.Helper()
	d, err := Open(testConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// done waits until an operation has ended, and returns its error.
func (d *Daemon) done(t testing.TB, o api.Operation, err error) error {
	t.Helper()
	if err == nil {
		o, err = d.Operation(t.Context(), o.ID, time.Minute)
	}
	if err == nil && o.State != api.Done {
		err = fmt.Errorf("%s: %s", o.State, o.Error)
	}
	return err
}

// A VM is run, stopped, started, killed and removed, some of it while another daemon looks after it.
func TestLife(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	o, err := d.Run(api.Run{Image: "docker://image", Ports: []api.Port{{Host: 1000, Guest: 80}}})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	vm, err := d.VM("image")
	if err != nil || vm.State != api.Running || vm.Namespace != "vm0" || vm.PID == 0 || vm.ID != o.VM {
		t.Fatal(vm, err)
	}
	if _, err := d.Run(api.Run{Image: "docker://image", Ports: []api.Port{{Address: "127.0.0.1", Host: 1000, Guest: 80, Protocol: "tcp"}}}); !errors.Is(err, ErrConflict) {
		t.Error("a port was published twice:", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	if now, err := d.VM(vm.ID[:5]); err != nil || fmt.Sprint(now) != fmt.Sprint(vm) {
		t.Errorf("%+v, %v; it was %+v", now, err, vm)
	}
	o, err = d.Remove("image", false)
	if err := d.done(t, o, err); err == nil {
		t.Error("a VM that runs was removed")
	}
	o, err = d.Stop("image")
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if now, err := d.VM("image"); err != nil || now.State != api.Stopped || now.PID != 0 || now.Namespace != "" {
		t.Errorf("%+v, %v", now, err)
	}
	o, err = d.Start("image")
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	o, err = d.Kill("image")
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if now, err := d.VM("image"); err != nil || now.State != api.Failed || !strings.Contains(now.Error, "killed") {
		t.Errorf("%+v, %v", now, err)
	}
	o, err = d.Remove("image", false)
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if _, err := d.VM("image"); !errors.Is(err, ErrNotFound) {
		t.Error("it was removed:", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if left := standIns(t, dir); len(left) != 0 {
		t.Error("left:", left)
	}
}

// A VM that cannot start leaves nothing, and says why.
func TestCannotStart(t *testing.T) {
	t.Setenv("STAND_IN_FAILS", "x")
	d := open(t, testDir(t))
	o, err := d.Run(api.Run{Image: "docker://image"})
	if err := d.done(t, o, err); err == nil || !strings.Contains(err.Error(), "no memory is left") {
		t.Error(err)
	}
	if list := d.VMs(); len(list) != 0 {
		t.Error("left:", list)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// A VM that was run to be removed goes when it has ended, however that is.
func TestRemoveAtEnd(t *testing.T) {
	for _, end := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		d := open(t, testDir(t))
		o, err := d.Run(api.Run{Image: "docker://image", Remove: true})
		if err := d.done(t, o, err); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(d.VMs()[0].PID, end); err != nil {
			t.Fatal(err)
		}
		await.True(t, "the VM is removed", func() bool { return len(d.VMs()) == 0 })
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A NAT that is killed while a VM runs is started again; so is a forwarder, by the next daemon.
func TestHelpersStartAgain(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	o, err := d.Run(api.Run{Image: "docker://image", Ports: []api.Port{{Host: 1000, Guest: 80}}})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	find := func(name string) (pid int) {
		t.Helper()
		for _, p := range standIns(t, dir) {
			if rest, ok := strings.CutPrefix(p, name+" "); ok {
				pid, _ = strconv.Atoi(rest)
			}
		}
		return pid
	}
	kill := func(name string) (pid int) {
		t.Helper()
		pid = find(name)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(name, err)
		}
		return pid
	}
	nat := kill("nat")
	await.True(t, "there is another NAT", func() bool { now := find("nat"); return now != 0 && now != nat })
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	forwarder := kill("forwarder")
	d = open(t, dir)
	await.True(t, "there is another forwarder", func() bool { now := find("forwarder"); return now != 0 && now != forwarder })
	o, err = d.Remove("image", true)
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if left := standIns(t, dir); len(left) != 0 {
		t.Error("left:", left)
	}
}

// standIns returns the processes that stand in for what a daemon in a directory has started.
func standIns(t testing.TB, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		words := strings.Split(string(b), "\x00")
		if len(words) > 1 && words[0] == os.Args[0] && strings.Contains(string(b), dir) {
			all = append(all, words[1]+" "+e.Name())
		}
	}
	return all
}

// rounds is how often the daemon is killed.
func rounds() int {
	if os.Getenv("DRAFTER_SOAK") != "" {
		return 200
	}
	return 30
}

// A daemon is killed at any moment of what it does. The next one knows each VM that runs, and no
// other; none runs twice, and nothing is left.
func TestKilled(t *testing.T) {
	dir := testDir(t)
	socket := filepath.Join(dir, "socket")
	start := func() *exec.Cmd {
		t.Helper()
		cmd := exec.Command(os.Args[0], "daemon", dir)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		await.True(t, "the daemon answers", func() bool {
			c := client.New(socket)
			defer c.Close()
			_, err := c.Host(t.Context())
			return err == nil
		})
		return cmd
	}
	seed := rand.Uint64()
	t.Log("seed", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var last int64
	for round := range rounds() {
		daemon := start()
		c := client.New(socket)
		check(t, c, dir)
		done, moment := make(chan struct{}), time.Duration(random.IntN(300))*time.Millisecond
		go func() {
			defer close(done)
			for ctx := t.Context(); ; {
				vms, err := c.VMs(ctx)
				if err != nil {
					return // the daemon is killed
				}
				var o api.Operation
				switch n := random.IntN(10); {
				case n < 4 && len(vms) < 8 || len(vms) == 0:
					o, err = c.Run(ctx, api.Run{Image: "docker://image", Ports: []api.Port{{Host: 1000 + random.IntN(50000), Guest: 80}}, Remove: n == 0, Restart: []string{"", "", api.Always, api.UnlessStopped}[n%4]})
				case n < 6:
					o, err = c.Stop(ctx, vms[random.IntN(len(vms))].ID)
				case n < 8:
					o, err = c.Start(ctx, vms[random.IntN(len(vms))].ID)
				default:
					o, err = c.Remove(ctx, vms[random.IntN(len(vms))].ID, true)
				}
				if err == nil && random.IntN(3) > 0 {
					_, _ = c.Await(ctx, o, nil) // it may not be possible, or be cut off
				}
			}
		}()
		time.Sleep(moment)
		if err := daemon.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		daemon.Wait()
		<-done
		c.Close()
		if t.Failed() {
			t.Fatal("in round ", round)
		}
		last = eventsGoOn(t, dir, last)
	}
	daemon := start()
	c := client.New(socket)
	check(t, c, dir)
	vms, err := c.VMs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, vm := range vms {
		o, err := c.Remove(t.Context(), vm.ID, true)
		if err == nil {
			_, err = c.Await(t.Context(), o, nil)
		}
		if err != nil {
			t.Error(err)
		}
	}
	c.Close()
	daemon.Process.Signal(syscall.SIGTERM)
	if err := daemon.Wait(); err != nil {
		t.Error(err)
	}
	if left := standIns(t, dir); len(left) > 0 {
		t.Error("left:", left)
	}
	if entries, err := os.ReadDir(filepath.Join(dir, "lib/vms")); err != nil || len(entries) > 0 {
		t.Error("left:", entries, err)
	}
}

// check compares what a daemon says with the processes that there are, once it is at rest.
func check(t *testing.T, c *client.Client, dir string) {
	t.Helper()
	await.None(t, "VMs and processes agree", func() string {
		vms, err := c.VMs(t.Context())
		if err != nil {
			return err.Error()
		}
		want := map[string]int{}
		for _, vm := range vms {
			switch vm.State {
			case api.Running:
				want["peer "+strconv.Itoa(vm.PID)]++
				want["forwarder"]++
				if problem := groupHas(vm); problem != "" {
					return problem
				}
			case api.Stopped, api.Failed:
				if vm.Cgroup != "" {
					return vm.Name + " still has a group"
				}
				if wanted(vm, true) {
					return vm.Name + " is not started by its policy"
				}
			default:
				return vm.Name + " is " + vm.State
			}
		}
		for _, p := range standIns(t, dir) {
			switch name, _, _ := strings.Cut(p, " "); name {
			case "peer":
				want[p]--
			case "forwarder":
				want[name]--
			}
		}
		for name, n := range want {
			if n != 0 {
				return fmt.Sprintf("%s: %d more or less of %v and %v", name, n, vms, standIns(t, dir))
			}
		}
		return ""
	})
}

// eventsGoOn checks that events go on where they were, and returns the ID of the last one.
func eventsGoOn(t *testing.T, dir string, last int64) int64 {
	t.Helper()
	e, err := openEvents(filepath.Join(dir, "lib/events"), slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	defer e.close()
	for i, event := range e.list {
		if i > 0 && event.ID != e.list[i-1].ID+1 {
			t.Errorf("event %d follows %d", event.ID, e.list[i-1].ID)
		}
	}
	if n := len(e.list); n > 0 {
		if e.list[n-1].ID < last {
			t.Errorf("the last event is %d, and was %d", e.list[n-1].ID, last)
		}
		last = e.list[n-1].ID
	}
	return last
}

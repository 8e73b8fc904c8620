package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/redis/go-redis/v9"

	"drafter/api"
	until "drafter/internal/await"
	"drafter/internal/tour"
)

// lockedBuffer is written to while it is read.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// What the verbs of every day do to a VM, which most of this shares.
func TestVerbs(t *testing.T) {
	h := newHouse(t, emptySite(t), 61)
	image := "oci:" + filepath.Join(work, "redis-image")
	began := time.Now()
	h.drafter(t, "run", "-d", "--name", "cache", "-p", "6379:6379", "-l", "tier=web", "--entrypoint", "/usr/bin/redis-server", "-u", "root", "-w", "/var/own",
		"--egress", "10.77.61.1/32:7000/tcp", image, "--bind", "0.0.0.0", "--protected-mode", "no", "--appendonly", "yes")
	t.Logf("the first run took %s", time.Since(began).Round(time.Millisecond))
	c := redis.NewClient(&redis.Options{Addr: h.host.Addr + ":6379", MaxRetries: 10})
	defer c.Close()
	if dir, err := c.ConfigGet(t.Context(), "dir").Result(); err != nil || dir["dir"] != "/var/own" {
		t.Error(dir, err)
	}
	if who := h.drafter(t, "exec", "--system", "cache", "sh", "-c", "stat -c %u /proc/$(pidof redis-server)"); who != "0" {
		t.Error("the server's user is", who)
	}
	testEgress(t, h)
	testNames(t, h)
	testRestart(t, h, c)
	testAttach(t, h, c)
	testWait(t, h)
	testStats(t, h, c)
	testGuestEnds(t, h, c)
	testCrash(t, h, c)
	testPolicy(t, h, image)
	testInteractive(t, h, image)
}

// A VM opens connections to what its policy names only.
func testEgress(t *testing.T, h *house) {
	for port, opens := range map[string]bool{"7000": true, "7001": false} {
		l, err := net.Listen("tcp", "10.77.61.1:"+port)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
				conn.Close()
			}
		}()
		err = h.command(t, "exec", "--system", "cache", "nc", "-w", "5", "10.77.61.1", port).Run()
		if opens != (err == nil) {
			t.Errorf("port %s: %v", port, err)
		}
	}
}

// VMs are listed by what they are, and renamed; their ports are shown.
func testNames(t *testing.T, h *house) {
	id := h.inspect(t, "cache").ID
	for filter, listed := range map[string]bool{
		"name=^cac": true, "name=other": false, "status=running": true, "status=exited": false, "label=tier": true, "label=tier=web": true, "label=tier=db": false,
		"id=" + id[:4]: true,
	} {
		if out := h.drafter(t, "ps", "-q", "--filter", filter); (out == id) != listed {
			t.Errorf("%s lists %q", filter, out)
		}
	}
	if out := h.drafter(t, "port", "cache"); out != "6379/tcp -> *:6379" {
		t.Errorf("port: %q", out)
	}
	if out := h.drafter(t, "port", "cache", "6379"); out != "*:6379" {
		t.Errorf("port 6379: %q", out)
	}
	h.drafter(t, "rename", "cache", "sessions")
	if vm := h.inspect(t, "sessions"); vm.ID != id {
		t.Errorf("%+v", vm)
	}
	h.drafter(t, "rename", "sessions", "cache")
}

// A guest that is restarted ends well: what was not synced is there, too.
func testRestart(t *testing.T, h *house, c *redis.Client) {
	if err := errors.Join(c.ConfigSet(t.Context(), "appendfsync", "no").Err(), c.Set(t.Context(), "key", "value", 0).Err()); err != nil {
		t.Fatal(err)
	}
	before := h.inspect(t, "cache")
	began := time.Now()
	h.drafter(t, "restart", "cache")
	t.Logf("a restart took %s", time.Since(began).Round(time.Millisecond))
	if vm := h.inspect(t, "cache"); vm.State != api.Running || vm.Booted == "" || vm.PID == before.PID {
		t.Errorf("%+v", vm)
	}
	if v, err := c.Get(t.Context(), "key").Result(); err != nil || v != "value" {
		t.Errorf("the key is %q, %v", v, err)
	}
	if log := h.drafter(t, "logs", "cache"); !strings.Contains(log, "User requested shutdown") {
		t.Errorf("the server was not told to end: %s", log)
	}
}

// Who attaches sees what is printed from then on, and detaches.
func testAttach(t *testing.T, h *house, c *redis.Client) {
	cmd := h.command(t, "attach", "cache")
	var out lockedBuffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	until.TrueWithin(t, tour.StepTimeout, "attach shows what is printed", func() bool {
		if err := c.BgSave(t.Context()).Err(); err != nil {
			t.Log(err)
		}
		return strings.Contains(out.String(), "Background saving started")
	})
	if strings.Contains(out.String(), "Ready to accept connections") {
		t.Error("attach shows what was printed before")
	}
	if err := errors.Join(cmd.Process.Signal(syscall.SIGINT), cmd.Wait()); err != nil {
		t.Error("detached:", err)
	}
	if vm := h.inspect(t, "cache"); vm.State != api.Running {
		t.Errorf("%+v", vm)
	}
}

// wait prints how a VM's service has ended.
func testWait(t *testing.T, h *house) {
	for verb, status := range map[string]string{"kill": "137\n", "stop": "0\n"} {
		waits := h.command(t, "wait", "cache")
		var out bytes.Buffer
		waits.Stdout = &out
		if err := waits.Start(); err != nil {
			t.Fatal(err)
		}
		h.drafter(t, verb, "cache")
		if err := waits.Wait(); err != nil || out.String() != status {
			t.Errorf("%s: %q, %v", verb, out.String(), err)
		}
		h.drafter(t, "start", "cache")
	}
	if out := h.drafter(t, "ps", "-q", "--filter", "status=stopped"); out != "" {
		t.Error("it runs:", out)
	}
}

// A VM's figures are those of what it does.
func testStats(t *testing.T, h *house, c *redis.Client) {
	stats := func() (all []struct {
		api.Stats
		CPUPercent, MemoryPercent float64
	}) {
		t.Helper()
		if err := json.Unmarshal([]byte(h.drafter(t, "stats", "--no-stream", "--format", "json", "cache")), &all); err != nil || len(all) != 1 {
			t.Fatal(all, err)
		}
		return all
	}
	before := stats()[0]
	const size = 8 << 20
	if err := c.Set(t.Context(), "big", strings.Repeat("x", size), 0).Err(); err != nil {
		t.Fatal(err)
	}
	busy := h.command(t, "exec", "--system", "cache", "sh", "-c", "while :; do :; done")
	if err := busy.Start(); err != nil {
		t.Fatal(err)
	}
	now := stats()[0]
	if err := errors.Join(busy.Process.Signal(syscall.SIGTERM), ignore(busy.Wait())); err != nil {
		t.Fatal(err)
	}
	if now.CPUPercent < 20 || now.CPUNanoseconds <= before.CPUNanoseconds {
		t.Errorf("a VM that is busy uses %.1f%% of a CPU", now.CPUPercent)
	}
	if got := now.NetworkReceived - before.NetworkReceived; got < size || got > 2*size {
		t.Errorf("it has received %d bytes of %d", got, size)
	}
	if now.Memory < 64<<20 || now.Memory > 4<<30 || now.GuestMemory != 1<<30 || now.Processes < 2 {
		t.Errorf("%+v", now)
	}
	if out := h.drafter(t, "stats", "--no-stream"); strings.Count(out, "\n") != 1 || !strings.Contains(out, "cache") {
		t.Errorf("stats of all: %q", out)
	}
	if out := h.drafter(t, "top", "cache"); !strings.Contains(out, "redis-server") {
		t.Errorf("top: %q", out)
	}
	if err := c.Del(t.Context(), "big").Err(); err != nil {
		t.Error(err)
	}
}

// ignore is for the end of what was told to end.
func ignore(err error) error {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil
	}
	return err
}

// A guest that powers itself off ends the VM; the next start boots it, and says why. One that reboots
// boots again in the VM that it has.
func testGuestEnds(t *testing.T, h *house, c *redis.Client) {
	h.drafter(t, "exec", "--system", "cache", "poweroff")
	h.awaitState(t, "cache", api.Exited)
	h.drafter(t, "start", "cache")
	before := h.inspect(t, "cache")
	if before.State != api.Running || !strings.Contains(before.Booted, "off") {
		t.Errorf("after a power-off: %+v", before)
	}
	if v, err := c.Get(t.Context(), "key").Result(); err != nil || v != "value" {
		t.Errorf("the key is %q, %v", v, err)
	}
	server := func() string {
		info := c.Info(t.Context(), "server").Val()
		_, id, _ := strings.Cut(info, "run_id:")
		id, _, _ = strings.Cut(id, "\r")
		return id
	}
	was := server()
	if was == "" {
		t.Fatal("the server has no ID")
	}
	h.drafter(t, "exec", "--system", "cache", "reboot")
	until.TrueWithin(t, tour.StepTimeout, "there is another server", func() bool { now := server(); return now != "" && now != was })
	if vm := h.inspect(t, "cache"); vm.State != api.Running || vm.PID != before.PID {
		t.Errorf("after a reboot: %+v", vm)
	}
	h.drafter(t, "restart", "--time", "1", "cache")
}

// All processes of a VM, and its daemon, are killed at once. It starts again, with what was synced, and
// its disk is sound.
func testCrash(t *testing.T, h *house, c *redis.Client) {
	if err := errors.Join(c.ConfigSet(t.Context(), "appendfsync", "always").Err(), c.Set(t.Context(), "synced", "value", 0).Err()); err != nil {
		t.Fatal(err)
	}
	vm := h.inspect(t, "cache")
	doomed := append(processesWith(t, filepath.Join(h.dir, "lib")), vm.PID, h.daemon.PID())
	if len(doomed) < 4 { // with the VMM and the forwarder
		t.Error("there are few processes:", doomed)
	}
	for _, pid := range doomed {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
	h.daemon.Wait()
	h.start(t)
	h.awaitState(t, "cache", api.Failed)
	h.drafter(t, "start", "cache")
	if v, err := c.Get(t.Context(), "synced").Result(); err != nil || v != "value" {
		t.Errorf("the key is %q, %v", v, err)
	}
	if vm := h.inspect(t, "cache"); vm.State != api.Running || vm.Booted == "" {
		t.Errorf("%+v", vm)
	}
	if out := h.drafter(t, "exec", "--system", "cache", "sh", "-c", "dmesg | grep -E 'EXT4-fs.*(error|warning)' || true"); out != "" {
		t.Errorf("the guest finds its disk %q", out)
	}
	h.drafter(t, "exec", "--system", "cache", "poweroff")
	h.awaitState(t, "cache", api.Exited)
	disk := filepath.Join(h.dir, "crashed.ext4")
	instance := filepath.Join(h.dir, "lib/vms", vm.ID, "0/instance")
	h.drafter(t, "device", "export", "--base", filepath.Join(h.dir, "lib/packages", vm.Package, "oci.ext4"), "--overlay", filepath.Join(instance, "overlay/oci.ext4"),
		"--state", filepath.Join(instance, "state/oci.ext4"), "--output", disk)
	if out, err := exec.Command("e2fsck", "-fn", disk).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	h.drafter(t, "start", "cache")
}

// processesWith returns the processes that have a path among their arguments.
func processesWith(t *testing.T, path string) (all []int) {
	t.Helper()
	lists, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range lists {
		b, err := os.ReadFile(list)
		pid, perr := strconv.Atoi(filepath.Base(filepath.Dir(list)))
		if err == nil && perr == nil && bytes.Contains(b, []byte(path)) && pid != os.Getpid() {
			all = append(all, pid)
		}
	}
	return all
}

// A VM with a policy is started again when it was killed, and goes on when its host has been shut down;
// one without stays suspended.
func testPolicy(t *testing.T, h *house, image string) {
	h.drafter(t, "run", "-d", "--name", "kept", "--restart", "unless-stopped", "-p", "6382:6379", "--entrypoint", "/usr/bin/redis-server", "-u", "root", "-w", "/var/own",
		"--egress", "10.77.61.1/32:7000/tcp", image, "--bind", "0.0.0.0", "--protected-mode", "no", "--appendonly", "yes")
	c := redis.NewClient(&redis.Options{Addr: h.host.Addr + ":6382", MaxRetries: 10})
	defer c.Close()
	pid := h.inspect(t, "kept").PID
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until.TrueWithin(t, tour.StepTimeout, "it runs again", func() bool { vm := h.inspect(t, "kept"); return vm.State == api.Running && vm.PID != pid })
	if err := errors.Join(c.ConfigSet(t.Context(), "appendfsync", "no").Err(), c.Set(t.Context(), "key", "value", 0).Err()); err != nil {
		t.Fatal(err)
	}
	h.drafter(t, "stop", "--all")
	for _, name := range []string{"kept", "cache"} {
		if vm := h.inspect(t, name); vm.State != api.Stopped {
			t.Errorf("%+v", vm)
		}
	}
	end(t, h.daemon)
	h.start(t)
	h.awaitState(t, "kept", api.Running)
	if vm := h.inspect(t, "kept"); vm.Booted != "" {
		t.Error("it was not resumed:", vm.Booted)
	}
	if v, err := c.Get(t.Context(), "key").Result(); err != nil || v != "value" {
		t.Errorf("the key is %q, %v", v, err)
	}
	if vm := h.inspect(t, "cache"); vm.State != api.Stopped {
		t.Errorf("%+v", vm)
	}
	h.drafter(t, "rm", "--force", "kept", "cache")
}

// A VM's program has a terminal, or input, and both end together.
func testInteractive(t *testing.T, h *house, image string) {
	run := func(flags ...string) []string {
		return append(append([]string{"run", "--rm", "--name", "shell"}, flags...), "--entrypoint", "redis-cli", image)
	}
	terminal, err := pty.StartWithSize(h.command(t, run("-it")...), &pty.Winsize{Rows: 30, Cols: 100})
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	if err := terminal.SetReadDeadline(time.Now().Add(2 * tour.StepTimeout)); err != nil {
		t.Fatal(err)
	}
	screen, buf := "", make([]byte, 1024)
	for !strings.Contains(screen, "not connected>") {
		n, err := terminal.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, screen)
		}
		screen += string(buf[:n])
	}
	if vm := h.inspect(t, "shell"); vm.State != api.Running || !vm.TTY || !vm.Stdin {
		t.Errorf("%+v", vm)
	}
	if err := h.command(t, "attach", "shell").Run(); err == nil {
		t.Error("its program was run twice")
	}
	if _, err := terminal.WriteString("quit\r"); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = terminal.Read(buf)
	}
	if left := h.drafter(t, "ps", "-aq", "--filter", "name=^shell$"); left != "" {
		t.Error("it is not removed:", left)
	}

	began := time.Now()
	cmd := h.command(t, append(run("-i"), "-x", "set", "key")...)
	cmd.Stdin = strings.NewReader("value")
	cmd.Stderr = nil
	out, err := cmd.CombinedOutput()
	t.Logf("run -i took %s: %s", time.Since(began).Round(time.Millisecond), out)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), "Could not connect") {
		t.Errorf("%q, %v", out, err)
	}
	if left := h.drafter(t, "ps", "-aq", "--filter", "name=^shell$"); left != "" {
		t.Error("it is not removed:", left)
	}

	// One that nobody runs yet; and whoever runs it is killed.
	h.drafter(t, "run", "-d", "-i", "--name", "later", "--entrypoint", "redis-cli", image)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	cmd = h.command(t, "attach", "later")
	cmd.Stdin = r
	if err := errors.Join(cmd.Start(), r.Close()); err != nil {
		t.Fatal(err)
	}
	until.TrueWithin(t, tour.StepTimeout, "its program runs", func() bool {
		return h.command(t, "exec", "--system", "later", "pidof", "redis-cli").Run() == nil
	})
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	h.awaitState(t, "later", api.Exited)
	if vm := h.inspect(t, "later"); vm.ExitStatus == nil || *vm.ExitStatus != 137 {
		t.Errorf("%+v", vm)
	}
	h.drafter(t, "rm", "later")
}

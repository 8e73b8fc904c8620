package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/redis/go-redis/v9"

	"drafter/api"
	until "drafter/internal/await"
	"drafter/internal/testhost"
	"drafter/internal/tour"
)

// house is a host with a daemon.
type house struct {
	tour.Drafter
	host   *testhost.Host
	number int
	dir    string
	daemon *tour.Service
}

func newHouse(t *testing.T, s *site, number int) *house {
	t.Helper()
	host, err := testhost.NewHost(number, 1_000_000_000)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.Close(); err != nil {
			t.Error(err)
		}
	})
	h := &house{Drafter: s.Drafter, host: host, number: number, dir: filepath.Join(s.dir, strconv.Itoa(number))}
	h.Via, h.Env = host.Via(s.dir), []string{"DRAFTER_SOCKET=" + filepath.Join(h.dir, "socket")}
	if err := os.Mkdir(h.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	h.start(t)
	t.Cleanup(func() {
		if left := h.drafter(t, "ps", "-aq"); left != "" { // the test has failed
			h.drafter(t, append([]string{"rm", "--force"}, strings.Fields(left)...)...)
		}
		end(t, h.daemon)
	})
	return h
}

// address is where other houses reach the daemon.
func (h *house) address() string { return h.host.Addr + ":7443" }

// start starts the daemon.
func (h *house) start(t *testing.T) {
	t.Helper()
	var err error
	h.daemon, err = h.Start("daemon", "--dir", filepath.Join(h.dir, "lib"), "--socket", filepath.Join(h.dir, "socket"),
		"--blueprint", filepath.Join(work, "out/blueprint"), "--host-interface", "eth0", "--namespace-count", "3",
		"--name", fmt.Sprint("host", h.number), "--listen", h.address())
	if err == nil {
		_, err = h.daemon.Await(t.Context(), "The daemon is up")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// kill kills the daemon.
func (h *house) kill(t *testing.T) {
	t.Helper()
	if err := h.daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.daemon.Wait() // it says that it was killed
}

// drafter runs a command and returns what it prints.
func (h *house) drafter(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	if err := h.Run(context.WithoutCancel(t.Context()), &out, args...); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out.String())
}

// inspect returns a VM.
func (h *house) inspect(t *testing.T, name string) api.VM {
	t.Helper()
	var vms []api.VM
	if err := json.Unmarshal([]byte(h.drafter(t, "inspect", name)), &vms); err != nil || len(vms) != 1 {
		t.Fatal(vms, err)
	}
	return vms[0]
}

// awaitState waits until a VM has a state.
func (h *house) awaitState(t *testing.T, name, state string) {
	t.Helper()
	until.TrueWithin(t, tour.StepTimeout, name+" is "+state, func() bool { return h.inspect(t, name).State == state })
}

// One command runs an image. The daemon may be killed: VM, port and connection go on, and the next
// daemon knows them. A VM always starts again.
func TestDaemon(t *testing.T) {
	h := newHouse(t, emptySite(t), 1)
	image := "oci:" + filepath.Join(work, "redis-image")
	began := time.Now()
	id := h.drafter(t, "run", "-d", "--name", "cache", "-p", "6379:6379", image)
	t.Logf("the first run took %s", time.Since(began).Round(time.Millisecond))
	c := redis.NewClient(&redis.Options{Addr: h.host.Addr + ":6379", MaxRetries: 10})
	defer c.Close()
	if err := c.Set(t.Context(), "key", "value", 0).Err(); err != nil {
		t.Fatal(err)
	}
	holds := func() {
		t.Helper()
		if v, err := c.Get(t.Context(), "key").Result(); err != nil || v != "value" {
			t.Errorf("the key is %q, %v", v, err)
		}
	}

	testExec(t, h, "cache")
	testCopy(t, h, "cache")
	if log := h.drafter(t, "logs", "cache"); !strings.Contains(log, "Ready to accept connections") {
		t.Errorf("logs: %q", log)
	}
	if log := h.drafter(t, "logs", "--tail", "1", "cache"); strings.Contains(log, "\n") || log == "" {
		t.Errorf("the last line: %q", log)
	}

	// The daemon's death.
	conn := c.Conn()
	defer conn.Close()
	client, err := conn.ClientID(t.Context()).Result()
	if err != nil {
		t.Fatal(err)
	}
	before := h.inspect(t, "cache")
	h.kill(t)
	holds()
	h.start(t)
	if after := h.inspect(t, "cache"); fmt.Sprint(after) != fmt.Sprint(before) || after.ID != id || after.State != api.Running {
		t.Errorf("before: %+v\nafter: %+v", before, after)
	}
	if now, err := conn.ClientID(t.Context()).Result(); err != nil || now != client {
		t.Errorf("the connection is %d, was %d: %v", now, client, err)
	}

	// Another VM of the image.
	began = time.Now()
	other := h.drafter(t, "run", "-d", "-p", "6380:6379", image)
	t.Logf("the second run took %s", time.Since(began).Round(time.Millisecond))
	if ids := h.drafter(t, "ps", "-q"); ids != other+"\n"+id {
		t.Errorf("ps: %q", ids)
	}
	c2 := redis.NewClient(&redis.Options{Addr: h.host.Addr + ":6380", MaxRetries: 10})
	defer c2.Close()
	if n, err := c2.DBSize(t.Context()).Result(); err != nil || n != 0 {
		t.Errorf("the other VM has %d keys, %v", n, err)
	}
	var out bytes.Buffer
	if err := h.Run(t.Context(), &out, "run", "-d", "-p", "6380:6379", image); err == nil {
		t.Error("a port was published twice")
	}

	// Stopped by a daemon, and started by the next one.
	h.drafter(t, "stop", "cache")
	if vm := h.inspect(t, "cache"); vm.State != api.Stopped || vm.PID != 0 || vm.Namespace != "" {
		t.Errorf("stopped: %+v", vm)
	}
	if err := c.Ping(t.Context()).Err(); err == nil {
		t.Error("a VM that was stopped answers")
	}
	h.kill(t)
	h.start(t)
	h.drafter(t, "start", "cache")
	holds()
	if vm := h.inspect(t, "cache"); vm.Booted != "" {
		t.Errorf("it was not resumed: %s", vm.Booted)
	}

	// Its process is killed; so is the daemon meanwhile.
	if err := syscall.Kill(h.inspect(t, "cache").PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.awaitState(t, "cache", api.Failed)
	h.kill(t)
	if err := syscall.Kill(h.inspectLast(t, other).PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.start(t)
	h.awaitState(t, other, api.Failed)
	h.drafter(t, "start", "cache", other)
	if vm := h.inspect(t, "cache"); vm.State != api.Running || vm.Booted == "" {
		t.Errorf("it runs again, and says why it booted: %+v", vm)
	}
	if err := c.Ping(t.Context()).Err(); err != nil {
		t.Error(err)
	}

	// A secret is the VM's own: it is not in the package, and still there when the guest has booted again.
	h.drafter(t, "stop", other)
	t.Setenv("SECRET", "rosebud")
	h.drafter(t, "run", "-d", "--name", "secret", "-e", "SECRET", "-p", "6381:6379", image)
	knows := func() {
		t.Helper()
		h.drafter(t, "exec", "--system", "secret", "grep", "-q", "SECRET=rosebud", "/run/crun/oci/config.json")
		h.drafter(t, "exec", "secret", "redis-cli", "ping")
	}
	knows()
	h.drafter(t, "kill", "secret")
	h.drafter(t, "start", "secret")
	knows()
	if vm := h.inspect(t, "secret"); vm.Booted == "" {
		t.Error("it was to boot again")
	} else if out, err := exec.Command("grep", "-r", "--binary-files=text", "-l", "rosebud", filepath.Join(h.dir, "lib/packages", vm.Package)).CombinedOutput(); len(out) > 0 {
		t.Errorf("the secret is in the package: %s, %v", out, err)
	}
	h.drafter(t, "rm", "--force", "secret")

	// All goes.
	if err := h.Run(t.Context(), &out, "rm", "cache"); err == nil {
		t.Error("a VM that runs was removed without --force")
	}
	h.drafter(t, "rm", "--force", "cache", other)
	if left := h.drafter(t, "ps", "-aq"); left != "" {
		t.Errorf("left: %s", left)
	}
	if entries, err := os.ReadDir(filepath.Join(h.dir, "lib/vms")); err != nil || len(entries) != 0 {
		t.Errorf("left in vms: %v, %v", entries, err)
	}
}

// inspectLast reads a VM's record without a daemon.
func (h *house) inspectLast(t *testing.T, id string) (vm api.VM) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(h.dir, "lib/vms", id, "vm.json"))
	if err == nil {
		err = json.Unmarshal(b, &vm)
	}
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

// command is a command of drafter on the house's host.
func (h *house) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	words := slices.Concat(h.Via, []string{h.Bin}, args)
	cmd := exec.CommandContext(t.Context(), words[0], words[1:]...)
	cmd.Env = append(os.Environ(), h.Env...)
	cmd.Stderr = os.Stderr
	return cmd
}

// Programs run in a VM as they would here: with input, output, exit status, signals and a terminal.
// The image has no shell.
func testExec(t *testing.T, h *house, vm string) {
	cmd := h.command(t, "exec", "-i", "--system", "-e", "NAME=value", vm, "sh", "-c", `cat; echo "$NAME"; exit 7`)
	cmd.Stdin = strings.NewReader("input\n")
	out, err := cmd.Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 || string(out) != "input\nvalue\n" {
		t.Errorf("%q, %v", out, err)
	}
	if out := h.drafter(t, "exec", vm, "redis-cli", "get", "key"); out != "value" {
		t.Errorf("the server beside it says %q", out)
	}
	cmd = h.command(t, "exec", vm, "no-such-program")
	if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 127 {
		t.Error(err)
	}

	cmd = h.command(t, "exec", "--system", vm, "sh", "-c", "trap 'echo ended; exit 3' TERM; echo ready; while :; do sleep 0.1; done")
	from, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(from)
	if !lines.Scan() || lines.Text() != "ready" {
		t.Fatal(lines.Text(), lines.Err())
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if !lines.Scan() || lines.Text() != "ended" {
		t.Error(lines.Text(), lines.Err())
	}
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Error(err)
	}

	// Input that the program does not read holds up no signal.
	zero, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	cmd = h.command(t, "exec", "-i", "--system", vm, "sh", "-c", "echo ready; exec sleep 1000")
	cmd.Stdin = zero
	if from, err = cmd.StdoutPipe(); err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if lines := bufio.NewScanner(from); !lines.Scan() || lines.Text() != "ready" {
		t.Fatal(lines.Text(), lines.Err())
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 128+int(syscall.SIGTERM) {
		t.Error(err)
	}
	cmd = h.command(t, "exec", "-i", "--system", vm, "wc", "-c")
	cmd.Stdin = io.LimitReader(zero, 3<<20)
	if out, err := cmd.Output(); err != nil || strings.TrimSpace(string(out)) != fmt.Sprint(3<<20) {
		t.Errorf("%q, %v", out, err)
	}

	// nsenter leaves the terminal to drafter.
	terminal, err := pty.StartWithSize(h.command(t, "exec", "-it", "--system", vm, "sh"), &pty.Winsize{Rows: 30, Cols: 100})
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	if err := terminal.SetReadDeadline(time.Now().Add(tour.StepTimeout)); err != nil {
		t.Fatal(err)
	}
	enter := func(text string) {
		t.Helper()
		if _, err := terminal.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	screen := ""
	shows := func(text string) {
		t.Helper()
		buf := make([]byte, 1024)
		for !strings.Contains(screen, text) {
			n, err := terminal.Read(buf)
			if err != nil {
				t.Fatalf("%v after %q", err, screen)
			}
			screen += string(buf[:n])
		}
		_, screen, _ = strings.Cut(screen, text)
	}
	enter("stty size; echo $((6*7))\r")
	shows("30 100")
	shows("42")
	if err := pty.Setsize(terminal, &pty.Winsize{Rows: 40, Cols: 120}); err != nil {
		t.Fatal(err)
	}
	enter("until [ \"$(stty size)\" = '40 120' ]; do sleep 0.1; done; echo res''ized\r")
	shows("resized")
	enter("sh -c \"echo sl''eeps; exec sleep 1000\"\r")
	shows("sleeps")
	enter("\x03") // Ctrl-C
	enter("echo still he''re; exit\r")
	shows("still here")
}

// A tree goes into a VM and comes back as it was.
func testCopy(t *testing.T, h *house, vm string) {
	tree, back := filepath.Join(h.dir, "tree"), filepath.Join(h.dir, "back")
	write(t, filepath.Join(tree, "below/file"), "content")
	if err := errors.Join(os.Symlink("below/file", filepath.Join(tree, "link")), os.Chmod(filepath.Join(tree, "below/file"), 0o741)); err != nil {
		t.Fatal(err)
	}
	h.drafter(t, "cp", tree, vm+":/")
	h.drafter(t, "cp", vm+":/tree", back)
	if out, err := exec.Command("diff", "-r", "--no-dereference", tree, back).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if info, err := os.Stat(filepath.Join(back, "below/file")); err != nil || info.Mode() != 0o741 {
		t.Error(info, err)
	}
	h.drafter(t, "cp", filepath.Join(tree, "below/file"), vm+":/other")
	h.drafter(t, "cp", vm+":/other", back)
	if b, err := os.ReadFile(filepath.Join(back, "other")); err != nil || string(b) != "content" {
		t.Errorf("%q, %v", b, err)
	}
	var out bytes.Buffer
	if err := h.Run(t.Context(), &out, "cp", vm+":/no/such/file", back); err == nil {
		t.Error("a file that is not there was copied")
	}
}

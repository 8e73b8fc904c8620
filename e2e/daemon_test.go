package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

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
	dir    string
	daemon *tour.Service
}

func newHouse(t *testing.T, number int) *house {
	t.Helper()
	s := emptySite(t)
	host, err := testhost.NewHost(number, 1_000_000_000)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.Close(); err != nil {
			t.Error(err)
		}
	})
	h := &house{Drafter: s.Drafter, host: host, dir: s.dir}
	h.Via, h.Env = host.Via(s.dir), []string{"DRAFTER_SOCKET=" + filepath.Join(s.dir, "socket")}
	h.start(t)
	t.Cleanup(func() { end(t, h.daemon) })
	return h
}

// start starts the daemon.
func (h *house) start(t *testing.T) {
	t.Helper()
	var err error
	h.daemon, err = h.Start("daemon", "--dir", filepath.Join(h.dir, "lib"), "--socket", filepath.Join(h.dir, "socket"),
		"--blueprint", filepath.Join(work, "out/blueprint"), "--host-interface", "eth0", "--namespace-count", "3")
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
	if err := h.Run(t.Context(), &out, args...); err != nil {
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
	h := newHouse(t, 1)
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

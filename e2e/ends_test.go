package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	until "drafter/internal/await"
)

// launched is a peer whose stdout and stderr are files of the test's choice.
func (s *site) launched(t *testing.T, stdout, stderr *os.File, flags ...string) (*exec.Cmd, io.Writer) {
	t.Helper()
	cmd := exec.Command("drafter", s.peerArgs("instance", append(flags, "--netns", "ark0", "--log-format", "json", "--enable-input")...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, stdout, stderr
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // unless it has ended
	return cmd, input
}

// endsWell waits for a command's end, which no test waits for longer.
func endsWell(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(time.Minute):
		// Nobody may read what it prints.
		stacks, _ := exec.Command("sh", "-c", `for t in /proc/$0/task/*; do cat $t/comm $t/stack; done`, strconv.Itoa(cmd.Process.Pid)).CombinedOutput()
		_ = cmd.Process.Signal(syscall.SIGQUIT)
		t.Fatalf("it does not end: %v\n%s", <-ended, stacks)
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	return r, w
}

// direct is a client of the guest in ark0, at its own address.
func direct(t *testing.T) *redis.Client {
	c := redis.NewClient(&redis.Options{Addr: "10.0.15.1:6379", MaxRetries: -1, DialTimeout: time.Second, ReadTimeout: 5 * time.Second})
	t.Cleanup(func() { c.Close() })
	return c
}

// awaitRedis waits until the guest serves.
func awaitRedis(t *testing.T, c *redis.Client) {
	t.Helper()
	until.NoneWithin(t, 2*time.Minute, "the guest serves", func() string {
		conn, err := net.DialTimeout("tcp", c.Options().Addr, time.Second)
		if err == nil {
			conn.Close()
			err = c.Ping(t.Context()).Err()
		}
		if err != nil {
			return err.Error()
		}
		return ""
	})
}

// Whatever ends an instance, or is done to its terminal, its VM is kept: suspended where that can
// be, else it boots from its disks, with all that was acknowledged, and the log says which and why.
func TestEnds(t *testing.T) {
	s := emptySite(t)
	c := direct(t)
	said := func(text string) { // the log is in a file
		t.Helper()
		b, err := os.ReadFile(filepath.Join(s.dir, "log"))
		if err != nil || !bytes.Contains(b, []byte(text)) {
			t.Errorf("%q is not in the log: %v\n%s", text, err, b)
		}
	}
	logFile := func() *os.File {
		t.Helper()
		f, err := os.Create(filepath.Join(s.dir, "log"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if b, err := os.ReadFile(f.Name()); t.Failed() {
				t.Logf("the log: %v\n%s", err, b)
			}
			f.Close()
		})
		return f
	}
	kept := 0
	alive := func(how string) { // what the last start wrote is there, and more can be written
		t.Helper()
		awaitRedis(t, c)
		if err := c.ConfigSet(t.Context(), "appendfsync", "always").Err(); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Get(t.Context(), "kept").Int(); kept > 0 && (err != nil || n != kept) {
			t.Fatalf("%s: %d, %v; want %d", how, n, err, kept)
		}
		kept++
		if err := c.Set(t.Context(), "kept", kept, 0).Err(); err != nil {
			t.Fatal(err)
		}
	}

	// Who reads its output ends; somebody's mount namespace has its devices mounted; the terminal
	// is closed.
	r, w := pipe(t)
	vm, _ := s.launched(t, w, w)
	w.Close()
	log := bufio.NewScanner(r)
	for log.Scan() && !strings.Contains(log.Text(), "Resumed VM") {
	}
	alive("resumed")
	r.Close()
	other := exec.Command("unshare", "-m", "sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		other.Process.Kill()
		other.Wait()
	})
	if err := vm.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	endsWell(t, vm)

	// Nobody reads its output, and the log disk is full. The guest prints more than any pipe holds,
	// and goes on; then it is off.
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	_, w = pipe(t)
	vm, input := s.launched(t, w, full)
	alive("suspended on SIGHUP")
	fmt.Fprint(input, "\nhead -c 700000 /dev/zero | tr '\\0' x; sync; poweroff\n")
	endsWell(t, vm)

	// One that is off boots again.
	log1 := logFile()
	vm, _ = s.launched(t, nil, log1)
	alive("powered off")
	said("powered itself off")
	if err := vm.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = vm.Wait() // killed

	// So does one whose process was killed; and a guest that reboots, which then moves as ever.
	vm, input = s.launched(t, nil, logFile(), "--laddr", "localhost:1337")
	alive("killed")
	said("its process was killed, or the host failed")
	id := serverInfo(t, c, "run_id")
	fmt.Fprint(input, "\nreboot\n")
	until.True(t, "the guest reboots", func() bool { return c.Info(t.Context(), "server").Err() != nil })
	awaitRedis(t, c)
	said("The guest reboots")
	if serverInfo(t, c, "run_id") == id {
		t.Error("it is the same process of Redis")
	}
	alive("rebooted")
	target := s.peer(t, "moved", "--netns", "ark1", "--raddr", "localhost:1337")
	endsWell(t, vm)
	c = s.redisIn(t, "ark1", "127.0.0.1:4444")
	alive("moved after a reboot")
	end(t, target)
}

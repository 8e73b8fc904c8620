package inject

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

// TestMain doubles as a busy child: it answers each line with itself, while other threads of it
// compute, sleep and allocate, and counts signals.
func TestMain(m *testing.M) {
	if os.Getenv("INJECT_TEST_CHILD") != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

func child() {
	signals := make(chan os.Signal, 1000)
	signal.Notify(signals, syscall.SIGUSR1)
	for range 3 {
		go func() {
			for sum := 0; ; sum++ {
				if b := make([]byte, 1<<16); sum%1000 == 0 {
					time.Sleep(time.Duration(b[sum%len(b)]) + time.Microsecond)
				}
			}
		}()
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if in.Text() == "signals" {
			n := 0
			for len(signals) > 0 {
				<-signals
				n++
			}
			fmt.Println(n)
			continue
		}
		fmt.Println(in.Text())
	}
}

// conversation is with a child.
type conversation struct {
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Scanner
}

func talk(t *testing.T, attr *syscall.SysProcAttr, files ...*os.File) *conversation {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "INJECT_TEST_CHILD=1")
	cmd.SysProcAttr, cmd.ExtraFiles, cmd.Stderr = attr, files, os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	c := &conversation{cmd, in, bufio.NewScanner(out)}
	c.echo(t, "hello")
	return c
}

func (c *conversation) ask(t *testing.T, line string) string {
	t.Helper()
	fmt.Fprintln(c.in, line)
	if !c.out.Scan() {
		t.Fatalf("the child has ended: %v", c.out.Err())
	}
	return c.out.Text()
}

func (c *conversation) echo(t *testing.T, line string) {
	t.Helper()
	if answer := c.ask(t, line); answer != line {
		t.Fatalf("the child answers %q to %q", answer, line)
	}
}

// getpid makes a call of which the result is known.
func getpid(pid int) error {
	return Into(pid, func(p *Tracee) error {
		for range 3 {
			got, err := p.Call(unix.SYS_GETPID)
			if err != nil || int(got) != pid {
				return fmt.Errorf("getpid: %d, %w", got, err)
			}
		}
		_, err := p.Call(unix.SYS_CLOSE, 9999)
		if !errors.Is(err, unix.EBADF) {
			return fmt.Errorf("close of what is not open: %w", err)
		}
		return nil
	})
}

// A busy process goes on as if nothing had been, whatever it was at, and gets its signals.
func TestBusy(t *testing.T) {
	c := talk(t, nil)
	var talking sync.WaitGroup
	stop := make(chan struct{})
	talking.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
				if line := fmt.Sprint("line ", n); c.ask(t, line) != line {
					t.Error("the child answers something else")
					return
				}
			}
		}
	})
	for range 2000 {
		if err := getpid(c.cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	talking.Wait()
	err := Into(c.cmd.Process.Pid, func(p *Tracee) error {
		if err := unix.Tgkill(p.PID(), p.PID(), unix.SIGUSR1); err != nil {
			return err
		}
		_, err := p.Call(unix.SYS_GETPID) // no signal is in its way
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for c.ask(t, "signals") != "1" { // and it arrives
		time.Sleep(time.Millisecond)
	}
}

// A process that waits in a system call waits on in it.
func TestWaiting(t *testing.T) {
	for _, program := range [][]string{{"sleep", "1000"}, {"cat"}, {"tail", "-f", "/dev/null"}} {
		cmd := exec.Command(program[0], program[1:]...)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for range 200 {
			if err := getpid(cmd.Process.Pid); err != nil {
				t.Errorf("%q: %v", program, err)
				break
			}
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		if err != nil || !strings.Contains(string(status), "TracerPid:\t0\n") || !strings.Contains(string(status), "SigBlk:\t0000000000000000\n") {
			t.Errorf("%q: %v\n%s", program, err, status)
		}
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
	}
}

// A process that is killed meanwhile is left to who waits for it.
func TestKilled(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	err := Into(cmd.Process.Pid, func(p *Tracee) error {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		for {
			if _, err := p.Call(unix.SYS_GETPID); err != nil {
				return err
			}
		}
	})
	if !errors.Is(err, ErrEnded) && !errors.Is(err, unix.ESRCH) {
		t.Error(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("it ends with %v", err)
	}
	if err := getpid(cmd.Process.Pid); err == nil {
		t.Error("a process that is gone is traced")
	}
}

// Nobody traces a process of which another one is the tracer, and the error says so.
func TestTraced(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	err := Into(cmd.Process.Pid, func(*Tracee) error { return getpid(cmd.Process.Pid) })
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "nobody else who traces it") {
		t.Error(err)
	}
}

// A private mapping takes the place of another one, and a userfaultfd is had, of a process of
// another user, too.
func TestMemory(t *testing.T) {
	need.Root(t)
	device, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR, 0)
	if err != nil {
		need.Lacks(t, "userfaultfd", err)
	}
	defer device.Close()
	file, err := os.CreateTemp(t.TempDir(), "memory")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteString("content of the file"); err != nil {
		t.Fatal(err)
	}
	c := talk(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4711, Gid: 4711}}, file, device)
	pid := c.cmd.Process.Pid
	var u *os.File
	err = Into(pid, func(p *Tracee) (err error) {
		addr, err := p.Call(unix.SYS_MMAP, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS, ^uintptr(0), 0)
		if err != nil {
			return err
		}
		if err := p.Map(addr, 4096, 3, false); err != nil {
			return err
		}
		got := make([]byte, 19)
		_, err = unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &got[0], Len: 19}}, []unix.RemoteIovec{{Base: addr, Len: 19}}, 0)
		if err != nil || string(got) != "content of the file" {
			return fmt.Errorf("the mapping holds %q: %w", got, err)
		}
		u, err = p.Userfaultfd(4)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := u.Close(); err != nil {
		t.Error(err)
	}
	c.echo(t, "goes on")
}

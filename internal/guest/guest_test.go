package guest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestParseIPArgument(t *testing.T) {
	c, err := parseIPArgument("172.16.0.2::172.16.0.1:255.255.255.252::eth0:none:1.1.1.1:9.9.9.9")
	if err != nil {
		t.Fatal(err)
	}
	if c.address.String() != "172.16.0.2/30" || c.gateway.String() != "172.16.0.1" || c.device != "eth0" || len(c.dns) != 2 || c.dns[0].String() != "1.1.1.1" {
		t.Errorf("%+v", c)
	}
	if c, err = parseIPArgument("172.16.0.2:::255.255.255.252"); err != nil || c.gateway != nil || c.device != "eth0" {
		t.Errorf("short: %+v, %v", c, err)
	}
	for _, bad := range []string{"", "dhcp", "172.16.0.2", "::1:::::", "172.16.0.2::x:255.255.255.0", strings.Repeat(":", 20)} {
		if c, err := parseIPArgument(bad); err == nil {
			t.Errorf("%q: %+v", bad, c)
		}
	}
}

func TestParseIPv6Argument(t *testing.T) {
	for s, dns := range map[string]string{
		"fd00:1::2/126,fd00:1::1": "[]", "fd00:1::2/126,fd00:1::1,2001:db8::53,2001:db8::54": "[2001:db8::53 2001:db8::54]",
	} {
		c, err := parseIPv6Argument(s)
		if err != nil || c.address.String() != "fd00:1::2/126" || c.gateway.String() != "fd00:1::1" || fmt.Sprint(c.dns) != dns {
			t.Errorf("%q: %+v, %v", s, c, err)
		}
	}
	for _, bad := range []string{"", ",", "fd00:1::2/126", "fd00:1::2,fd00:1::1", "172.16.0.2/30,172.16.0.1", "fd00:1::2/126,172.16.0.1", "fd00:1::2/126,fd00:1::1,", "fd00:1::2/126,fd00:1::1,9.9.9.9"} {
		if c, err := parseIPv6Argument(bad); err == nil {
			t.Errorf("%q: %+v", bad, c)
		}
	}
}

func TestMountOptions(t *testing.T) {
	for options, want := range map[string]struct {
		flags uintptr
		data  string
	}{
		"":                      {0, ""},
		"rw":                    {0, ""},
		"ro,noatime":            {unix.MS_RDONLY | unix.MS_NOATIME, ""},
		"data=ordered,ro,dax=x": {unix.MS_RDONLY, "data=ordered,dax=x"},
	} {
		if flags, data := mountOptions(options); flags != want.flags || data != want.data {
			t.Errorf("%q: %#x, %q", options, flags, data)
		}
	}
}

func TestCmdline(t *testing.T) {
	c := cmdline{"quiet", "root=/dev/vda", "root=/dev/vdb", "init=", "rw"}
	if got := c.get("root", "x"); got != "/dev/vdb" {
		t.Errorf("the last one counts in the kernel: %q", got)
	}
	if got := c.get("console", "ttyS0"); got != "ttyS0" {
		t.Errorf("default: %q", got)
	}
	if !c.has("rw") || c.has("ro") {
		t.Error("flags")
	}
}

func TestParseSignal(t *testing.T) {
	for name, want := range map[string]int{
		"": 15, "SIGTERM": 15, "TERM": 15, "quit": 3, "SigInt": 2, "9": 9, "SIGRTMIN": 34, "RTMIN+3": 37, "sigrtmin+3": 37, "SIGRTMAX-1": 63, "SIGUSR1": 10, "64": 64,
		"SIGRTMIN+99": 0, "0": 0, "-1": 0, "65": 0, "SIGNONE": 0, "RTMIN+": 0, "RTMINX": 0,
	} {
		got, err := ParseSignal(name)
		if int(got) != want || (err == nil) != (want != 0) {
			t.Errorf("%q is %d, %v; want %d", name, got, err, want)
		}
	}
}

func TestReadiness(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	open := l.Addr().(*net.TCPAddr).Port
	for list, closed := range map[string]string{
		fmt.Sprint(open): "[]", fmt.Sprintf("%d/tcp, %d", open, open): "[]", fmt.Sprintf("1-3/TCP,53/udp,%d/tcp", open): "[1 2 3]",
	} {
		r, err := NewReadiness(list)
		if err != nil {
			t.Errorf("%q: %v", list, err)
			continue
		}
		if ready, got, err := r.Check(); err != nil || fmt.Sprint(got) != closed || ready != (closed == "[]") {
			t.Errorf("%q: ready %v, closed %v, %v", list, ready, got, err)
		}
	}
	// What is on loopback is not open to others.
	for address, ready := range map[string]bool{"127.0.0.1:0": false, "127.1.2.3:0": false, "[::1]:0": false, "0.0.0.0:0": true, "[::]:0": true} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		r, err := NewReadiness(fmt.Sprint(l.Addr().(*net.TCPAddr).Port))
		if err != nil {
			t.Fatal(err)
		}
		r.Outside = true
		if got, _, err := r.Check(); got != ready || err != nil {
			t.Errorf("%s: ready %v, %v", address, got, err)
		}
	}
	if !isLoopback("0000000000000000FFFF00000100007F") || isLoopback("0000000000000000FFFF00000100000A") {
		t.Error("addresses that are mapped into IPv6")
	}
	for _, list := range []string{NoPorts, "53/udp"} {
		r, err := NewReadiness(list)
		if err != nil {
			t.Fatal(err)
		}
		if ready, _, err := r.Check(); ready || err != nil {
			t.Errorf("%s: ready at once, or %v", list, err)
		}
		r.began = r.began.Add(-settleTime)
		if ready, _, err := r.Check(); !ready || err != nil {
			t.Errorf("%s: not ready, or %v", list, err)
		}
	}
	for _, list := range []string{"", "x", "0", "65536", "9-3", "80;90", "-"} {
		if r, err := NewReadiness(list); err == nil {
			t.Errorf("%q is %v", list, r)
		}
	}
}

// TestHealthChecks converts health checks in every form that images have them in.
func TestHealthChecks(t *testing.T) {
	for _, c := range []struct {
		test, shell []string
		want        string // "" for none, "refused" for an error
	}{
		{nil, nil, ""},
		{[]string{}, nil, ""},
		{[]string{"NONE"}, nil, ""},
		{[]string{"CMD", "curl", "-f", "http://localhost"}, []string{"/bin/bash", "-c"}, "curl|-f|http://localhost"},
		{[]string{"CMD-SHELL", "a && b"}, nil, "/bin/sh|-c|a && b"},
		{[]string{"CMD-SHELL", "a && b"}, []string{"/bin/bash", "-ec"}, "/bin/bash|-ec|a && b"},
		{[]string{"CMD"}, nil, "refused"},
		{[]string{"CMD-SHELL"}, nil, "refused"},
		{[]string{"true"}, nil, "refused"},
		{[]string{""}, nil, "refused"},
	} {
		check, err := NewHealthCheck(c.test, c.shell, 0)
		got := ""
		switch {
		case err != nil:
			got = "refused"
		case check != nil:
			got = strings.Join(check.Args, "|")
			if check.Timeout != 30*time.Second {
				t.Errorf("%q has %s", c.test, check.Timeout)
			}
		}
		if got != c.want {
			t.Errorf("%q: %q, %v; want %q", c.test, got, err, c.want)
		}
	}
}

// What a check left when its time was over is ended by the next one, and nothing else is.
func TestCheckIsAlone(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pid")
	hangs := alone("setsid sh -c 'printf %s $$ >"+pids+"; sleep 1000 & echo started; wait'", pids)
	first := exec.Command("sh", "-c", hangs)
	first.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := first.StdoutPipe()
	if err == nil {
		err = first.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); err != nil || line != "started\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if err := syscall.Kill(-first.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Process.Wait(); err != nil {
		t.Fatal(err)
	}
	b, err := exec.Command("sh", "-c", alone("exit 3", pids)).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || len(b) > 0 {
		t.Errorf("the next one ends with %v: %s", err, b)
	}
	if _, err := r.ReadByte(); !errors.Is(err, io.EOF) { // as long as one of them lives, it has the pipe
		t.Errorf("the first one still runs: %v", err)
	}
	if b, err := exec.Command("sh", "-c", alone("echo well", pids)).CombinedOutput(); err != nil || string(b) != "well\n" {
		t.Errorf("%q, %v", b, err)
	}
}

// Whoever names ports wants these to be waited for, and nothing else.
func TestAgentArgs(t *testing.T) {
	healthDir = t.TempDir()
	defer func() { healthDir = "/run" }()
	check, err := NewHealthCheck([]string{"CMD", "/check"}, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(check)
	if err != nil {
		t.Fatal(err)
	}
	b := &bundle{spec: specs.Spec{Process: &specs.Process{}, Annotations: map[string]string{
		ExposedPortsAnnotation: "80/tcp", HealthCheckAnnotation: string(text),
	}}}
	for _, c := range []struct {
		cmd     cmdline
		ports   string
		checked bool
	}{
		{nil, "80/tcp", true},
		{cmdline{ReadyPortsArgument + "=81"}, "81", false},
		{cmdline{ReadyPortsArgument + "=" + NoPorts}, NoPorts, false},
	} {
		args := " " + strings.Join(agentArgs(c.cmd, b), " ") + " "
		if !strings.Contains(args, " --ready-ports "+c.ports+" ") || strings.Contains(args, " --ready-cmd ") != c.checked || strings.Contains(args, " --ready-from-outside ") != c.checked {
			t.Errorf("%v: %s", c.cmd, args)
		}
	}
	// Nothing is to be waited for where nothing runs yet.
	args := strings.Join(agentArgs(cmdline{InteractiveArgument}, b), " ")
	if strings.Contains(args, "--ready") || !strings.Contains(args, "--interactive") {
		t.Errorf("interactive: %s", args)
	}
}

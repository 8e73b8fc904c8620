package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/redis/go-redis/v9"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	until "drafter/internal/await"
	"drafter/internal/testhost"
	"drafter/internal/tour"
)

// flushRules is what a firewall does that is loaded anew. A guest is reached afterwards as before.
func (s *site) flushRules(t *testing.T) {
	t.Helper()
	f, err := s.Start("forwarder", "--port-forwards", tour.Forward("ark0", "6379", redisAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, f)
	if _, err := f.Await(t.Context(), "Forwarding"); err != nil {
		t.Fatal(err)
	}
	command(t, s.dir, "nft", "flush", "ruleset")
	if _, err := f.Await(t.Context(), "Put back what somebody has removed or changed"); err != nil {
		t.Fatal(err)
	}
	c := redis.NewClient(&redis.Options{Addr: redisAddr, MaxRetries: 5})
	defer c.Close()
	if err := c.Ping(t.Context()).Err(); err != nil {
		t.Errorf("after the rules were put back: %v", err)
	}
	until.TrueWithin(t, tour.StepTimeout, "the NAT's table is back", func() bool {
		return strings.Contains(command(t, s.dir, "nft", "list", "tables"), "drafter-nat-ark")
	})
}

// setNameServer gives the host a name server until the test ends.
func (s *site) setNameServer(t *testing.T, addr string) {
	t.Helper()
	etc := filepath.Join(s.dir, "resolv.conf")
	write(t, etc, "nameserver "+addr+"\n")
	if err := unix.Mount(etc, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// A guest asks the name servers of the host that it is on, as they are at each start: behind a stub
// those that the stub asks.
func TestNameServers(t *testing.T) {
	s := newSite(t)
	const behind = "/run/systemd/resolve/resolv.conf"
	if err := os.MkdirAll(filepath.Dir(behind), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll("/run/systemd") })
	s.setNameServer(t, "127.0.0.53")
	for _, tt := range []struct {
		behind, want string
		flags        []string
	}{
		{"nameserver 198.51.100.53\nsearch a.test\n", "nameserver 198.51.100.53\nsearch a.test\n", nil},
		{"nameserver 203.0.113.53\n", "nameserver 203.0.113.53\n", nil},
		{"nameserver 203.0.113.53\n", "nameserver 192.0.2.53\nnameserver 192.0.2.54\n", []string{"--dns", "192.0.2.53,192.0.2.54"}},
	} {
		write(t, behind, tt.behind)
		vm := s.run(t, append([]string{"--enable-input"}, tt.flags...)...)
		if tt.flags == nil {
			s.flushRules(t)
		}
		io.WriteString(vm.Input, "\n")
		s.waitOutput(t, vm, "drafter# ")
		// What the container has, too.
		io.WriteString(vm.Input, "echo 'be''gin'; cat /etc/resolv.conf /proc/$(pidof redis-server)/root/etc/resolv.conf; echo 'e''nd'\n")
		out := s.waitOutput(t, vm, "\nend\n")
		out = regexp.MustCompile(`(?m)^\[ *\d+\.\d+\] .*\n`).ReplaceAllString(out, "") // the kernel says something now and then
		if want := "\nbegin\n" + tt.want + tt.want + "end\n"; !strings.Contains(out, want) {
			t.Errorf("with %q behind the stub and %v the console shows\n%s\nwant %q", tt.behind, tt.flags, out, want)
		}
		end(t, vm)
	}
}

// A guest opens connections to what its egress has, and is reached as ever.
func TestEgress(t *testing.T) {
	s := newSite(t)
	s.setNameServer(t, outside)
	serveOutside(t)
	for _, tt := range []struct{ egress, byAddress, byName string }{
		{"allow", "PONG", "PONG"},
		{"deny", "refused", "resolution"},
		{"192.0.2.0/24:6380/tcp", "PONG", "resolution"},
		// The address is closed until the guest has asked for the name.
		{"redis.test:6380/tcp", "refused", "PONG"},
		{"*.redis.test", "refused", "not known"},
	} {
		vm := s.run(t, "--enable-input", "--egress", tt.egress)
		io.WriteString(vm.Input, "\n")
		s.waitOutput(t, vm, "drafter# ")
		io.WriteString(vm.Input, "echo 'be''gin'; ping() { chroot /proc/$(pidof redis-server)/root /usr/bin/redis-cli -p 6380 -h $1 ping 2>&1; }; ping "+outside+"; ping redis.test; echo 'e''nd'\n")
		out := s.waitOutput(t, vm, "\nend\n")
		out = out[strings.LastIndex(out, "\nbegin\n")+1:]
		if !regexp.MustCompile(`(?s)begin\n.*` + tt.byAddress + `.*\n.*` + tt.byName + `.*\nend`).MatchString(out) {
			t.Errorf("with --egress %s the console shows\n%s\nwant %q by the address, %q by the name", tt.egress, out, tt.byAddress, tt.byName)
		}
		end(t, vm)
	}
	if line := s.fails(t, s.runnerArgs("--egress", "alow")...); !strings.Contains(line, `--egress "alow" is neither allow, deny`) {
		t.Errorf("a policy that is none: %s", line)
	}
}

// outside is the address of the host outside.
const outside = "192.0.2.254"

// serveOutside starts a Redis outside, at port 6380, and a name server that knows it as redis.test.
func serveOutside(t *testing.T) {
	t.Helper()
	cmd := exec.Command("ip", "netns", "exec", testhost.Outside, "redis-server", "--port", "6380", "--bind", outside, "--protected-mode", "no", "--save", "")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	listening := make(chan error)
	var packets net.PacketConn
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := netns.GetFromName(testhost.Outside)
		if err == nil {
			err = errors.Join(netns.Set(ns), ns.Close())
		}
		if err == nil {
			packets, err = net.ListenPacket("udp4", outside+":53")
		}
		listening <- err
	}()
	if err := <-listening; err != nil {
		t.Fatal(err)
	}
	answer := func(w dns.ResponseWriter, query *dns.Msg) {
		m := new(dns.Msg).SetReply(query)
		if q := query.Question[0]; q.Name != "redis.test." {
			m.Rcode = dns.RcodeNameError
		} else if q.Qtype == dns.TypeA {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(outside)}}
		}
		w.WriteMsg(m)
	}
	started, ended := make(chan struct{}), make(chan struct{})
	server := &dns.Server{PacketConn: packets, Handler: dns.HandlerFunc(answer), NotifyStartedFunc: func() { close(started) }}
	go func() {
		defer close(ended)
		server.ActivateAndServe()
	}()
	<-started
	t.Cleanup(func() { server.Shutdown(); <-ended })
}

// A guest reaches others by IPv6, and is reached, as soon as it has booted and after a resume.
func TestIPv6(t *testing.T) {
	s := newSite(t)
	listener := make(chan net.Listener)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is in another namespace now
		ns, err := netns.GetFromName(testhost.Outside)
		if err == nil {
			err = errors.Join(netns.Set(ns), ns.Close())
		}
		var l net.Listener
		if err == nil {
			l, err = net.Listen("tcp6", "[2001:db8::192.0.2.254]:8080")
		}
		if err != nil {
			t.Error(err)
		}
		listener <- l
	}()
	l := <-listener
	if l == nil {
		t.FailNow()
	}
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			fmt.Fprintf(w, "you are %s\n", host)
		}),
		ReadHeaderTimeout: time.Minute,
	}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	const external = "[2001:db8::c000:201]:3333"
	f, err := s.Start("forwarder", "--port-forwards", tour.Forward("ark0", "8080", external))
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, f)
	if _, err := f.Await(t.Context(), "Forwarding"); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second one resumes what the first one suspended
		vm := s.run(t, "--enable-input")
		io.WriteString(vm.Input, "\n")
		s.waitOutput(t, vm, "drafter# ")
		io.WriteString(vm.Input, "pkill nc; wget -qO- 'http://[2001:db8::c000:2fe]:8080/'; nc -ll -p 8080 -e echo six & sleep 1; echo 'e''nd'\n")
		if out := s.waitOutput(t, vm, "\nend\n"); !strings.Contains(out, "you are 2001:db8::c000:201\n") {
			t.Errorf("the guest asks by IPv6, and the console shows\n%s", out)
		}
		until.NoneWithin(t, tour.StepTimeout, "the guest answers", func() string {
			c, err := net.DialTimeout("tcp6", external, time.Second)
			if err != nil {
				return err.Error()
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(time.Second))
			if b, err := io.ReadAll(c); string(b) != "six\n" {
				return fmt.Sprintf("%q, %v", b, err)
			}
			return ""
		})
		end(t, vm)
	}
}

package network

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"drafter/internal/await"
	"drafter/internal/need"
	"drafter/internal/testhost"
)

// journal is what was logged.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

// read returns what was logged since the last call.
func (j *journal) read() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.text.Reset()
	return strings.ReplaceAll(j.text.String(), `\"`, `"`)
}

// readLog keeps what is logged until the test ends.
func readLog(t *testing.T) *journal {
	j := &journal{}
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(j, nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	return j
}

// shell runs a command on the host.
func shell(t *testing.T, command string) {
	t.Helper()
	if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
}

// endWatch ends a watch: from then on the test looks itself.
func endWatch(t *testing.T, w **watch) {
	t.Helper()
	if err := (*w).Close(); err != nil {
		t.Fatal(err)
	}
	*w = nil
}

// abandon does to a NAT what kill -9 does: its sockets and locks end, and nothing else.
func abandon(t *testing.T, n *NAT) {
	t.Helper()
	endWatch(t, &n.watch)
	if err := errors.Join(n.egress.Close(), n.tunnel.close(), n.lock.Abandon()); err != nil {
		t.Fatal(err)
	}
}

// startForwarder forwards until the test ends.
func startForwarder(t *testing.T, forwards ...PortForward) *Forwarder {
	t.Helper()
	f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: forwards})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// TestPutBack does to a NAT and a forwarder what others on a host do: a firewall that is loaded
// anew, a network service that removes what it does not know, an administrator.
func TestPutBack(t *testing.T) {
	need.Root(t)
	log := readLog(t)
	interval := lookInterval
	lookInterval = 200 * time.Millisecond
	t.Cleanup(func() { lookInterval = interval }) // when all watches have ended
	startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	listen(t, testhost.Outside, "192.0.2.254:80", "outside")
	listen(t, guest, "172.16.0.2:80", "guest")
	listen(t, testhost.Outside, ipv6("192.0.2.254:80"), "outside")
	listen(t, guest, ipv6("172.16.0.2:80"), "guest")
	startForwarder(t, forwardTo("ark0", "tcp", "127.0.0.1:3333"), forwardTo("ark0", "udp", "192.0.2.1:3333"), forwardTo("ark0", "udp", ipv6("192.0.2.1:3333")))
	whole := func() string {
		for _, d := range []struct{ ns, network, addr, want string }{
			{guest, "udp4", "192.0.2.254:80", "outside to 192.0.2.1"},
			{"", "tcp4", "10.0.15.1:80", "guest to 10.0.8.1"},
			{"", "tcp4", "127.0.0.1:3333", "guest to 10.0.8.1"},
			{testhost.Outside, "udp4", "192.0.2.1:3333", "guest to 192.0.2.254"},
			{guest, "udp6", ipv6("192.0.2.254:80"), ipv6("outside to 192.0.2.1")},
			{"", "tcp6", ipv6("10.0.15.1:80"), ipv6("guest to 10.0.8.1")},
			{testhost.Outside, "udp6", ipv6("192.0.2.1:3333"), ipv6("guest to 192.0.2.254")},
		} {
			if got := ask(t, d.ns, d.network, d.addr); got != d.want {
				return fmt.Sprintf("%s from %q to %s: %q; want %q", d.network, d.ns, d.addr, got, d.want)
			}
		}
		return ""
	}
	if why := whole(); why != "" {
		t.Fatal(why)
	}
	before := log.read()
	if strings.Contains(before, "Put back") {
		t.Fatalf("nobody has changed anything:\n%s", before)
	}
	for _, tt := range []struct{ name, command, said string }{
		{"all rules", "nft flush ruleset", "nftables table inet drafter-nat-ark"},
		{"one table", "nft delete table inet drafter-nat-ark", "nftables table inet drafter-nat-ark"},
		{"a chain's rules", "nft flush chain inet drafter-nat-ark outgoing", "nftables table inet drafter-nat-ark"},
		{"a policy", "nft chain inet drafter-nat-ark forwarded '{ policy drop; }'", "nftables table inet drafter-nat-ark"},
		{"an element", "nft delete element inet drafter-nat-ark links '{ ark0-veth }'", "nftables table inet drafter-nat-ark"},
		{"a further rule", "nft insert rule inet drafter-nat-ark forwarded drop", "nftables table inet drafter-nat-ark"},
		{"a dormant table", "nft add table inet drafter-nat-ark '{ flags dormant; }'", "nftables table inet drafter-nat-ark"},
		{"the forwarder's", "nft delete table inet $(nft list tables | sed -n 's/.*\\(drafter-forwarder-.*\\)/\\1/p')", "nftables table inet drafter-forwarder-"},
		{"forwarding", "sysctl -qw net.ipv4.ip_forward=0", "net.ipv4.ip_forward"},
		{"forwarding by IPv6", "sysctl -qw net.ipv6.conf.all.forwarding=0", "net.ipv6.conf.all.forwarding"},
		{"IPv6 of a link", "sysctl -qw net.ipv6.conf.ark0-veth.disable_ipv6=1", "link ark0-veth"},
		{"IPv6 addresses", "ip -6 addr flush dev ark0-veth", "link ark0-veth"},
		{"a route of IPv6", "ip -6 route del " + ipv6("10.0.15.1"), "link ark0-veth"},
		{"a route of IPv6 elsewhere", "ip -6 route replace " + ipv6("10.0.15.1 via 192.0.2.254"), "link ark0-veth"},
		{"a neighbour", "ip -6 neigh del " + ipv6("10.0.8.2") + " dev ark0-veth", "link ark0-veth"},
		{"another neighbour", "ip -6 neigh replace " + ipv6("10.0.8.2") + " lladdr 02:00:00:00:00:66 nud permanent dev ark0-veth", "link ark0-veth"},
		{"another MAC address", "ip -n ark0 link set veth0 address 02:00:00:00:00:66", "link ark0-veth"},
		{"the namespace's neighbour", "ip -n ark0 -6 neigh del " + ipv6("10.0.8.1") + " dev veth0", "link ark0-veth"},
		{"the namespace's routes of IPv6", "ip -n ark0 -6 route del default", "link ark0-veth"},
		{"all routes of IPv6 of the namespace", "ip -n ark0 -6 route flush table main", "link ark0-veth"},
		{"the tap's addresses of IPv6", "ip -n ark0 -6 addr flush dev tap0", "link ark0-veth"},
		{"the namespace's forwarding by IPv6", "ip netns exec ark0 sysctl -qw net.ipv6.conf.all.forwarding=0", "link ark0-veth"},
		{"the namespace's IPv6", "ip netns exec ark0 sysctl -qw net.ipv6.conf.all.disable_ipv6=1", "link ark0-veth"},
		{"forwarding of a link", "sysctl -qw net.ipv4.conf.ark0-veth.forwarding=0", "link ark0-veth"},
		{"loopback forwards", "sysctl -qw net.ipv4.conf.ark0-veth.route_localnet=0", "link ark0-veth"},
		{"a link", "ip link del ark0-veth", "link ark0-veth"},
		{"a link that is down", "ip link set ark0-veth down", "link ark0-veth"},
		{"addresses", "ip addr flush dev ark0-veth", "link ark0-veth"},
		{"routes of the link", "ip route flush dev ark0-veth", "link ark0-veth"},
		{"a route", "ip route del 10.0.15.1", "link ark0-veth"},
		{"a route elsewhere", "ip route replace 10.0.15.1 via 192.0.2.254", "link ark0-veth"},
		{"the namespace's rules", "ip netns exec ark0 nft flush ruleset", "nftables table inet drafter in ark0"},
		{"the namespace's routes", "ip -n ark0 route del default", "link ark0-veth"},
		{"the namespace's routes", "ip -n ark0 route flush dev veth0", "link ark0-veth"},
		{"all routes of the namespace", "ip -n ark0 route flush table main", "link ark0-veth"},
		{"a tap that is down", "ip -n ark0 link set tap0 down", "link ark0-veth"},
		{"the namespace's addresses", "ip -n ark0 addr flush dev veth0", "link ark0-veth"},
		{"the namespace's forwarding", "ip netns exec ark0 sysctl -qw net.ipv4.ip_forward=0", "link ark0-veth"},
		{"a namespace that nobody uses", "ip netns del ark1", "link ark1-veth"},
		{"a name without its namespace", "umount /run/netns/ark1", "link ark1-veth"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			shell(t, tt.command)
			said := ""
			await.None(t, "a line in the log", func() string {
				said += log.read()
				if !strings.Contains(said, "Put back what somebody has removed or changed") || !strings.Contains(said, tt.said) {
					return fmt.Sprintf("it says %q", said)
				}
				return ""
			})
			await.None(t, "all that was there before", whole)
			if said += log.read(); strings.Contains(said, "cannot be put back") {
				t.Errorf("the log says:\n%s", said)
			}
		})
	}
	log.read()
	if whole() != "" {
		t.Error("it does not stay")
	}
	time.Sleep(4 * lookInterval)
	if said := log.read(); said != "" {
		t.Errorf("nobody has changed anything any more:\n%s", said)
	}
}

// TestOpenedMeanwhile lets connections come to be while the rules are gone: they would stay as they
// are, without translation and without a guard.
func TestOpenedMeanwhile(t *testing.T) {
	need.Root(t)
	byBoth(t, testOpenedMeanwhile)
}

func testOpenedMeanwhile(t *testing.T, v func(string) string) {
	n := startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	listen(t, testhost.Outside, v("192.0.2.254:80"), "outside")
	listen(t, guest, v("172.16.0.2:80"), "guest")
	echoServer(t, "", v("192.0.2.1:26022"))
	f := startForwarder(t, forwardTo("ark0", "udp", v("192.0.2.1:3333")))
	endWatch(t, &n.watch)
	endWatch(t, &f.watch)
	shell(t, "nft flush ruleset")
	from := &net.UDPAddr{Port: 40000}
	if got := askFrom(t, guest, v("udp4"), v("192.0.2.254:80"), from); got != "" {
		t.Fatalf("without rules a guest reaches outside: %q", got)
	}
	if got := askFrom(t, testhost.Outside, v("udp4"), v("192.0.2.1:3333"), from); got != "" {
		t.Fatalf("without rules a forward answers: %q", got)
	}
	var toHost net.Conn
	if err := inNamespace(guest, func() (err error) { toHost, err = net.Dial(v("tcp4"), v("192.0.2.1:26022")); return err }); err != nil {
		t.Fatal(err)
	}
	defer toHost.Close()
	n.look()
	f.look()
	if got := askFrom(t, guest, v("udp4"), v("192.0.2.254:80"), from); got != v("outside to 192.0.2.1") {
		t.Errorf("the guest reaches outside from the same port: %q", got)
	}
	if got := askFrom(t, testhost.Outside, v("udp4"), v("192.0.2.1:3333"), from); got != v("guest to 192.0.2.254") {
		t.Errorf("the forward answers the same port: %q", got)
	}
	toHost.SetDeadline(time.Now().Add(time.Second))
	fmt.Fprint(toHost, "x")
	if _, err := toHost.Read(make([]byte, 1)); err == nil {
		t.Error("the guest still talks with the host")
	}
}

// TestTapGuardPutBack flushes the rules inside a namespace: its guest stays confined to its own
// address.
func TestTapGuardPutBack(t *testing.T) {
	need.Root(t)
	interval := lookInterval
	lookInterval = 50 * time.Millisecond
	t.Cleanup(func() { lookInterval = interval }) // when all watches have ended
	startNAT(t, testConfig())
	rules := func() string {
		out, err := exec.Command("ip", "netns", "exec", "ark0", "nft", "list", "ruleset").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	for _, mac := range []string{testConfig().NamespaceInterfaceMAC, ""} {
		if err := GuardGuest("ark0", Guest{MAC: mac}); err != nil {
			t.Fatal(err)
		}
		before := rules()
		for _, change := range []string{"flush ruleset", "delete table netdev drafter-guest", "flush table netdev drafter-guest"} {
			shell(t, "ip netns exec ark0 nft "+change)
			await.None(t, change, func() string {
				for line := range strings.Lines(before) {
					if now := rules(); !strings.Contains(now, line) {
						return "missing: " + line
					}
				}
				return ""
			})
		}
	}
}

// TestTranslatedMeanwhile removes the NAT's table on a host on which another program translates what
// guests send: what they opened meanwhile ends, and what they had goes on.
func TestTranslatedMeanwhile(t *testing.T) {
	need.Root(t)
	byBoth(t, testTranslatedMeanwhile)
}

func testTranslatedMeanwhile(t *testing.T, v func(string) string) {
	for _, addr := range []string{"169.254.169.254", "203.0.113.1"} {
		giveAddress(t, v(addr+"/32"))
		giveRoute(t, "", v(addr+"/32"), net.ParseIP(v("192.0.2.254")))
		echoServer(t, testhost.Outside, v(addr+":7"))
	}
	n := startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	shell(t, "nft 'add table inet others; add chain inet others postrouting { type nat hook postrouting priority 100; }; add rule inet others postrouting oifname eth0 masquerade'")
	t.Cleanup(func() { shell(t, "nft delete table inet others") })
	dial := func(addr string) *talk {
		t.Helper()
		k := dialTalk(t, addr, guest, v("tcp4"), v(addr+":7"))
		if err := k.goesOn(); err != nil {
			t.Fatal(err)
		}
		return k
	}
	stays := dial("203.0.113.1")
	endWatch(t, &n.watch)
	shell(t, "nft delete table inet "+n.natTable())
	ends := dial("169.254.169.254")
	n.look()
	if ends.goesOn() == nil {
		t.Error("a guest still talks with a metadata service")
	}
	if err := stays.goesOn(); err != nil {
		t.Errorf("a connection that was open: %v", err)
	}
}

// TestUnruledOfKilledNAT removes rules while no NAT runs: what a guest has opened then ends with the
// next one, and without that all goes on.
func TestUnruledOfKilledNAT(t *testing.T) {
	need.Root(t)
	byBoth(t, testUnruledOfKilledNAT)
}

func testUnruledOfKilledNAT(t *testing.T, v func(string) string) {
	echoServer(t, "", v("192.0.2.1:7"))
	shell(t, "nft 'add table inet others; add chain inet others input { type filter hook input priority 0; }; add rule inet others input ct state invalid drop'")
	t.Cleanup(func() { shell(t, "nft delete table inet others") })
	killNAT(t)
	claim, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	guest := attachGuest(t, "ark0")
	echoServer(t, guest, v("172.16.0.2:7"))
	toGuest := dialTalk(t, "the guest", "", v("tcp4"), v("10.0.15.1:7"))
	n, err := StartNAT(context.Background(), testConfig())
	if err != nil {
		t.Fatal(err)
	}
	if err := toGuest.goesOn(); err != nil {
		t.Errorf("a connection with a NAT that was killed: %v", err)
	}
	abandon(t, n)
	shell(t, "nft delete table inet "+n.natTable())
	toHost := dialTalk(t, "the host", guest, v("tcp4"), v("192.0.2.1:7"))
	if err := toHost.goesOn(); err != nil {
		t.Fatal(err)
	}
	if n, err = StartNAT(context.Background(), testConfig()); err != nil {
		t.Fatal(err)
	}
	if toHost.goesOn() == nil {
		t.Error("a guest still talks with the host")
	}
	if err := errors.Join(claim.Close(), n.Close()); err != nil {
		t.Error(err)
	}
}

// TestUDPFollows sends from one port all the time: before there is a forward, through it, and after
// it leads elsewhere.
func TestUDPFollows(t *testing.T) {
	need.Root(t)
	byBoth(t, testUDPFollows)
}

func testUDPFollows(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	for _, ns := range []string{"ark0", "ark1"} {
		listen(t, attachGuest(t, ns), v("172.16.0.2:80"), ns)
	}
	external := v("192.0.2.1:3333")
	client, onHost := &net.UDPAddr{Port: 40001}, &net.UDPAddr{IP: net.ParseIP(v("192.0.2.1")), Port: 40002}
	check := func(want string) {
		t.Helper()
		var got, host string
		var wait sync.WaitGroup
		wait.Go(func() { got = askFrom(t, testhost.Outside, v("udp4"), external, client) })
		wait.Go(func() { host = askFrom(t, "", v("udp4"), external, onHost) })
		wait.Wait()
		if !strings.HasPrefix(got, want) || !strings.HasPrefix(host, want) || want == "" && got+host != "" {
			t.Errorf("from outside %q, from the host %q; want %q", got, host, want)
		}
	}
	check("")
	for _, ns := range []string{"ark0", "ark1", "ark0"} {
		f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: []PortForward{forwardTo(ns, "udp", external)}})
		if err != nil {
			t.Fatal(err)
		}
		check(ns + " to ")
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		check("") // and so that nobody is behind the forward again
	}
	// Killed, and another one leads elsewhere.
	killed := startForwarder(t, forwardTo("ark0", "udp", external))
	check("ark0 to ")
	for _, socket := range killed.reserved {
		socket.Close()
	}
	endWatch(t, &killed.watch)
	if err := killed.lock.Abandon(); err != nil {
		t.Fatal(err)
	}
	killed.lock = nil
	startForwarder(t, forwardTo("ark1", "udp", external))
	check("ark1 to ")
}

// TestOwnPort lets a guest connect to a port of its own that is published, as other guests may not.
func TestOwnPort(t *testing.T) {
	need.Root(t)
	byBoth(t, testOwnPort)
}

func testOwnPort(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	guests := map[string]string{}
	for _, ns := range []string{"ark0", "ark1"} {
		guests[ns] = attachGuest(t, ns)
		listen(t, guests[ns], v("172.16.0.2:80"), ns)
	}
	startForwarder(t, forwardTo("ark0", "tcp", v("192.0.2.1:3333")), forwardTo("ark0", "udp", v("192.0.2.1:3333")), forwardTo("ark1", "tcp", v("192.0.2.1:4444")))
	for _, tt := range []struct{ ns, network, addr, want string }{
		{"ark0", v("tcp4"), v("192.0.2.1:3333"), v("ark0 to 10.0.8.1")},
		{"ark0", v("udp4"), v("192.0.2.1:3333"), v("ark0 to 10.0.8.1")},
		{"ark1", v("tcp4"), v("192.0.2.1:4444"), v("ark1 to 10.0.8.5")},
		{"ark1", v("tcp4"), v("192.0.2.1:3333"), ""},
		{"ark0", v("tcp4"), v("192.0.2.1:4444"), ""},
	} {
		if got := ask(t, guests[tt.ns], tt.network, tt.addr); got != tt.want {
			t.Errorf("%s from the guest of %s to %s: %q; want %q", tt.network, tt.ns, tt.addr, got, tt.want)
		}
	}
}

// TestReset ends a VM that others are connected with: those who wait for it, those for whom it
// waits, and those who connect hear at once that it is gone.
func TestReset(t *testing.T) {
	need.Root(t)
	byBoth(t, testReset)
}

func testReset(t *testing.T, v func(string) string) {
	n := startNAT(t, testConfig())
	endWatch(t, &n.watch)
	startForwarder(t, forwardTo("ark0", "tcp", v("127.0.0.1:3333")), forwardTo("ark0", "tcp", v("192.0.2.1:3333")), forwardTo("ark0", "udp", v("192.0.2.1:3333")))
	var server net.Listener
	err := inNamespace(testhost.Outside, func() (err error) { server, err = net.Listen(v("tcp4"), v("192.0.2.254:7")); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	for how, end := range map[string]func(*Claim) error{
		// The VMM of a VM that has moved is still there for a while.
		"vacated":   func(c *Claim) error { return c.Vacate() },
		"suspended": func(c *Claim) error { unplug["ark0"](); return c.Close() },
		"killed": func(c *Claim) error {
			n.look()
			unplug["ark0"]()
			await.None(t, "the kernel notices that nobody is behind the tap", func() string {
				vacant := false
				if err := inNamespace("ark0", func() error { vacant = n.layout.vacant(); return nil }); err != nil || !vacant {
					return fmt.Sprint(err)
				}
				return ""
			})
			n.look()
			return c.lock.Release()
		},
		"killed, and another VM follows": func(c *Claim) error {
			unplug["ark0"]()
			return errors.Join(c.lock.Release(), GuardGuest("ark0", Guest{MAC: testConfig().NamespaceInterfaceMAC}))
		},
	} {
		t.Run(how, func(t *testing.T) {
			claim, err := ClaimNamespace("ark0")
			if err == nil {
				err = GuardGuest("ark0", Guest{MAC: testConfig().NamespaceInterfaceMAC})
			}
			if err != nil {
				t.Fatal(err)
			}
			guest := attachGuest(t, "ark0")
			echoServer(t, guest, v("172.16.0.2:80"))
			dial := func(ns, network, addr string) (c net.Conn, err error) {
				// Nobody sends anything by himself.
				dialer := net.Dialer{Timeout: 10 * time.Second, KeepAlive: -1}
				f := func() (err error) { c, err = dialer.Dial(network, addr); return err }
				if ns == "" {
					return c, f()
				}
				return c, inNamespace(ns, f)
			}
			waiting := map[string]net.Conn{}
			for who, to := range map[string][2]string{
				"the host's client":   {"", v("127.0.0.1:3333")},
				"one without forward": {"", v("10.0.15.1:80")},
				"one from outside":    {testhost.Outside, v("192.0.2.1:3333")},
				"the guest":           {guest, v("192.0.2.254:7")},
			} {
				c, err := dial(to[0], v("tcp4"), to[1])
				if err == nil && who == "the guest" {
					who = "the guest's server"
					defer c.Close()
					if c, err = server.Accept(); err == nil {
						err = c.(*net.TCPConn).SetKeepAlive(false)
					}
				}
				if err != nil {
					t.Fatalf("%s: %v", who, err)
				}
				defer c.Close()
				waiting[who] = c
			}
			if err := end(claim); err != nil {
				t.Fatal(err)
			}
			for who, c := range waiting {
				c.SetDeadline(time.Now().Add(30 * time.Second))
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s waits, and hears %v", who, err)
				}
			}
			for _, to := range [][2]string{{"", v("127.0.0.1:3333")}, {"", v("10.0.15.1:80")}, {testhost.Outside, v("192.0.2.1:3333")}} {
				await.None(t, "a new connection to "+to[1], func() string {
					start := time.Now()
					c, err := dial(to[0], v("tcp4"), to[1])
					if err == nil {
						c.Close()
					}
					if !errors.Is(err, syscall.ECONNREFUSED) && to[1] != "[::1]:3333" { // a relay accepts first
						return fmt.Sprintf("%v after %s", err, time.Since(start))
					}
					return ""
				})
			}
			c, err := dial(testhost.Outside, v("udp4"), v("192.0.2.1:3333"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			fmt.Fprint(c, "x")
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("who sends UDP hears %v", err)
			}
			if how == "vacated" {
				if err := claim.Occupy(); err != nil {
					t.Error(err)
				}
				await.None(t, "the guest is there again", func() string {
					c, err := dial(testhost.Outside, v("tcp4"), v("192.0.2.1:3333"))
					if err != nil {
						return err.Error()
					}
					c.Close()
					return ""
				})
				unplug["ark0"]()
				if err := claim.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestResetSparesOthers makes sure that a guest which is there loses nothing.
func TestResetSparesOthers(t *testing.T) {
	need.Root(t)
	byBoth(t, testResetSparesOthers)
}

func testResetSparesOthers(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	echoServer(t, guest, v("172.16.0.2:80"))
	c, err := net.Dial(v("tcp4"), v("10.0.15.1:80"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	config := testConfig()
	l, err := config.parse()
	if err != nil {
		t.Fatal(err)
	}
	if err := inNamespace("ark0", l.resetConnections); err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprint(c, "x")
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

// TestRoutes starts a NAT on hosts with routes of many shapes.
func TestRoutes(t *testing.T) {
	need.Root(t)
	log := readLog(t)
	lan := attachLAN(t)
	listen(t, testhost.Outside, "192.0.2.254:80", "outside")
	listen(t, lan, "198.51.100.2:80", "lan")
	listen(t, lan, ipv6("198.51.100.2:80"), "lan")
	restore := "ip route replace default via 192.0.2.254 dev eth0; ip -6 route del default; ip -6 route add default via " + ipv6("192.0.2.254") + " dev eth0"
	want6 := map[string]string{
		"none": "", "unreachable": "", "none but IPv6": "lan0", "IPv6 elsewhere": "lan0", "several next hops of IPv6": "eth0,lan0", "a VPN's halves of IPv6": "lan0",
	}
	for _, tt := range []struct{ name, set, undo, want string }{
		{"one", "true", "true", "eth0"},
		{"several next hops", "ip route replace default nexthop via 192.0.2.254 dev eth0 nexthop via 198.51.100.2 dev lan0", "true", "eth0,lan0"},
		{"metrics", "ip route del default; ip route add default via 192.0.2.254 metric 200; ip route add default via 198.51.100.2 metric 100", "ip route del default metric 200; ip route del default metric 100", "lan0"},
		{"a VPN's halves", "ip route add 0.0.0.0/1 via 198.51.100.2; ip route add 128.0.0.0/1 via 198.51.100.2", "ip route del 0.0.0.0/1; ip route del 128.0.0.0/1", "lan0"},
		{"a VPN's table", "ip route add default dev lan0 table 51820; ip rule add not fwmark 0xca6c table 51820; ip rule add table main suppress_prefixlength 0",
			"ip rule del table main suppress_prefixlength 0; ip rule del table 51820; ip route flush table 51820", "lan0"},
		{"a table of one source", "ip route add default via 198.51.100.2 table 77; ip rule add from 198.51.100.1 table 77", "ip rule del table 77; ip route flush table 77", "eth0"},
		{"on link", "ip route replace default via 203.0.113.1 dev eth0 onlink", "true", "eth0"},
		{"no gateway", "ip route replace default dev lan0", "true", "lan0"},
		{"none", "ip route del default; ip -6 route del default", "true", ""},
		{"unreachable", "ip route del default; ip -6 route del default; ip route add unreachable default", "ip route del unreachable default", ""},
		{"none but IPv6", "ip route del default; ip -6 route replace default via " + ipv6("198.51.100.2") + " dev lan0", "true", ""},
		{"IPv6 elsewhere", "ip -6 route replace default via " + ipv6("198.51.100.2") + " dev lan0", "true", "eth0"},
		{"several next hops of IPv6", "ip -6 route del default; ip -6 route add default nexthop via " + ipv6("192.0.2.254") + " dev eth0 nexthop via " + ipv6("198.51.100.2") + " dev lan0", "true", "eth0"},
		{"a VPN's halves of IPv6", "ip -6 route add ::/1 via " + ipv6("198.51.100.2"), "ip -6 route del ::/1", "eth0"},
		{"a next hop object", "ip nexthop add id 1 via 198.51.100.2 dev lan0; ip route replace default nhid 1", "ip route del default; ip nexthop del id 1", "lan0"},
		{"a next hop of IPv6", "ip -4 route replace 0.0.0.0/0 via inet6 fe80::1 dev lan0", "true", "lan0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			shell(t, tt.set)
			defer shell(t, tt.undo+"; "+restore)
			log.read()
			n, err := StartNAT(context.Background(), testConfig())
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			if got := strings.Join(n.outgoing, ","); got != tt.want {
				t.Errorf("guests go out through %q; want %q", got, tt.want)
			}
			want6, ok := want6[tt.name]
			if !ok {
				want6 = "eth0"
			}
			if got := strings.Join(n.outgoing6, ","); got != want6 {
				t.Errorf("by IPv6 guests go out through %q; want %q", got, want6)
			}
			if said := log.read(); (tt.want+want6 == "") != strings.Contains(said, "no default route") {
				t.Errorf("the log says:\n%s", said)
			}
		})
	}
	t.Run("it changes", func(t *testing.T) {
		n := startNAT(t, testConfig())
		guest := attachGuest(t, "ark0")
		for _, d := range [][2]string{{"udp4", "198.51.100.2:80"}, {"udp6", ipv6("198.51.100.2:80")}} {
			if got := ask(t, guest, d[0], d[1]); got != "" {
				t.Fatalf("a network behind another interface: %q", got)
			}
		}
		defer shell(t, restore)
		shell(t, "ip -6 route replace default via "+ipv6("198.51.100.2")+" dev lan0")
		await.None(t, "guests go out as the host does by IPv6", func() string {
			if got := ask(t, guest, "udp6", ipv6("198.51.100.2:80")); got != ipv6("lan to 198.51.100.1") {
				return got + "?"
			}
			return ""
		})
		if got := ask(t, guest, "udp4", "198.51.100.2:80"); got != "" {
			t.Errorf("the way out of IPv6 is one of IPv4: %q", got)
		}
		shell(t, "ip route replace default via 198.51.100.2 dev lan0")
		await.None(t, "guests go out as the host does", func() string {
			if got := ask(t, guest, "udp4", "198.51.100.2:80"); got != "lan to 198.51.100.1" {
				return got + "?"
			}
			return ""
		})
		endWatch(t, &n.watch)
		if got := ask(t, guest, "udp4", "192.0.2.254:80"); got != "" {
			t.Errorf("the network of before is open still: %q", got)
		}
		if said := log.read(); !strings.Contains(said, "way out has changed") {
			t.Errorf("the log says:\n%s", said)
		}
	})
}

// TestWideNetwork starts a NAT where its addresses are a part of a network that the host is in.
func TestWideNetwork(t *testing.T) {
	need.Root(t)
	log := readLog(t)
	for _, addr := range []string{"10.0.0.5/8", "10.0.8.1/20", "10.0.14.5/23"} {
		shell(t, "ip addr add "+addr+" dev eth0")
		n, err := StartNAT(context.Background(), testConfig())
		if err == nil {
			n.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "eth0") || !strings.Contains(err.Error(), "choose") {
			t.Errorf("%s: %v", addr, err)
		}
		shell(t, "ip addr del "+addr+" dev eth0")
	}
	shell(t, "ip route add 10.0.0.0/8 via 192.0.2.254")
	t.Cleanup(func() { shell(t, "ip route del 10.0.0.0/8") })
	startNAT(t, testConfig())
	if said := log.read(); !strings.Contains(said, "route=10.0.0.0/8") {
		t.Errorf("of a route to a wider network the log says:\n%s", said)
	}
}

// TestWideNetworkLater joins networks that the NAT's addresses are a part of while it runs: each is
// named once.
func TestWideNetworkLater(t *testing.T) {
	need.Root(t)
	log := readLog(t)
	n := startNAT(t, testConfig())
	endWatch(t, &n.watch)
	for _, address := range []string{"10.0.0.5/8", "10.0.9.1/32"} {
		log.read()
		n.look()
		if said := log.read(); strings.Contains(said, "joined") {
			t.Fatalf("before: %s", said)
		}
		shell(t, "ip address add "+address+" dev lo")
		n.look()
		if said := log.read(); !strings.Contains(said, address+" of lo") {
			t.Errorf("%s: the log says: %s", address, said)
		}
		n.look()
		if said := log.read(); said != "" {
			t.Errorf("%s: the log says again: %s", address, said)
		}
		shell(t, "ip address del "+address+" dev lo")
		n.look()
	}
}

// TestHostForwarding turns forwarding off for the host's way out, which is named once.
func TestHostForwarding(t *testing.T) {
	need.Root(t)
	log := readLog(t)
	n := startNAT(t, testConfig())
	endWatch(t, &n.watch)
	log.read()
	shell(t, "echo 0 > /proc/sys/net/ipv4/conf/eth0/forwarding")
	t.Cleanup(func() { shell(t, "echo 1 > /proc/sys/net/ipv4/conf/eth0/forwarding") })
	n.look()
	if said := log.read(); !strings.Contains(said, "net/ipv4/conf/eth0/forwarding=1") {
		t.Errorf("the log says: %s", said)
	}
	n.look()
	if said := log.read(); said != "" {
		t.Errorf("the log says again: %s", said)
	}
}

// TestLinkForwarding turns forwarding off for the interfaces of a namespace only.
func TestLinkForwarding(t *testing.T) {
	need.Root(t)
	byBoth(t, testLinkForwarding)
}

func testLinkForwarding(t *testing.T, v func(string) string) {
	n := startNAT(t, testConfig())
	endWatch(t, &n.watch)
	guest := attachGuest(t, "ark0")
	listen(t, testhost.Outside, v("192.0.2.254:80"), "outside")
	for _, link := range []string{"tap0", "veth0"} {
		shell(t, "echo 0 | ip netns exec ark0 tee /proc/sys/net/ipv4/conf/"+link+"/forwarding")
		n.look()
		if got := ask(t, guest, v("udp4"), v("192.0.2.254:80")); got != v("outside to 192.0.2.1") {
			t.Errorf("without forwarding of %s: %q", link, got)
		}
	}
}

// TestLinkInBridge puts the host's end of a link into a bridge.
func TestLinkInBridge(t *testing.T) {
	need.Root(t)
	byBoth(t, testLinkInBridge)
}

func testLinkInBridge(t *testing.T, v func(string) string) {
	n := startNAT(t, testConfig())
	endWatch(t, &n.watch)
	guest := attachGuest(t, "ark0")
	listen(t, testhost.Outside, v("192.0.2.254:80"), "outside")
	shell(t, "ip link add foreign0 type bridge && ip link set foreign0 up && ip link set ark0-veth master foreign0")
	defer shell(t, "ip link del foreign0")
	n.look()
	if got := ask(t, guest, v("udp4"), v("192.0.2.254:80")); got != v("outside to 192.0.2.1") {
		t.Errorf("out of the bridge: %q", got)
	}
}

// TestRemovesNamespacesOnly has a name in a record that leads elsewhere: what is there stays.
func TestRemovesNamespacesOnly(t *testing.T) {
	need.Root(t)
	file := filepath.Join(t.TempDir(), "empty")
	shell(t, "touch "+file)
	path, err := filepath.Rel(netnsDir, file)
	if err != nil {
		t.Fatal(err)
	}
	if err := removeNamespace(path, slog.Default()); err == nil {
		t.Errorf("%s is taken for a namespace", path)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

// TestForwardingRestored ends NATs in every order, one of them killed, while somebody turns
// forwarding off and on.
func TestForwardingRestored(t *testing.T) {
	need.Root(t)
	listen(t, testhost.Outside, "192.0.2.254:80", "outside")
	forwarding := func(want string) {
		t.Helper()
		if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err != nil || strings.TrimSpace(string(b)) != want {
			t.Errorf("ip_forward is %s, %v; want %s", b, err, want)
		}
	}
	killed := exec.Command("/proc/self/exe")
	killed.Env = append(os.Environ(), "NETWORK_TEST=nat")
	out, err := killed.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := killed.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "started: <nil>\n" {
		t.Fatalf("%q, %v", line, err)
	}
	other, err := StartNAT(context.Background(), otherConfig())
	if err != nil {
		t.Fatal(err)
	}
	guest := attachGuest(t, "bee0")
	reaches := func() {
		t.Helper()
		await.None(t, "the other NAT's guest reaches outside", func() string {
			if got := ask(t, guest, "udp4", "192.0.2.254:80"); got != "outside to 192.0.2.1" {
				return got + "?"
			}
			return ""
		})
	}
	reaches()
	if err := killed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	killed.Wait()
	reaches()
	shell(t, "sysctl -qw net.ipv4.ip_forward=0")
	reaches()
	// The killed one's end, at its next start.
	again, err := StartNAT(context.Background(), testConfig())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	reaches()
	forwarding("1")
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	forwarding("0")
	// Somebody else forwards, and turns it off while a NAT runs: then it is off afterwards.
	shell(t, "sysctl -qw net.ipv4.ip_forward=1")
	n, err := StartNAT(context.Background(), testConfig())
	if err != nil {
		t.Fatal(err)
	}
	shell(t, "sysctl -qw net.ipv4.ip_forward=0")
	n.look()
	forwarding("1")
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	forwarding("0")
}

// TestForwardingSettings starts NATs on a host that takes no ICMP redirects, and forwards what comes in
// at one interface only: it goes on to, and does so after them.
func TestForwardingSettings(t *testing.T) {
	need.Root(t)
	lan := attachLAN(t)
	listen(t, testhost.Outside, "192.0.2.254:80", "outside")
	giveRoute(t, testhost.Outside, "198.51.100.0/24", net.IPv4(192, 0, 2, 1))
	giveRoute(t, testhost.Outside, ipv6("198.51.100.0/24"), net.ParseIP(ipv6("192.0.2.1")))
	settings := []string{"ipv4.conf.all.accept_redirects=0", "ipv4.conf.lan0.forwarding=1", "ipv6.conf.lan0.forwarding=1"}
	routes := []string{"192.0.2.254:80"}
	if _, err := os.Stat("/proc/sys/net/ipv6/conf/lan0/force_forwarding"); err == nil { // Linux 6.17
		settings = append(settings, "ipv6.conf.lan0.force_forwarding=1")
		listen(t, testhost.Outside, ipv6("192.0.2.254:80"), "outside")
		routes = append(routes, ipv6("192.0.2.254:80"))
	}
	// The LAN may ask, and so the interface to it is the one that forwards. Answers come in at the other.
	shell(t, "sysctl -qw net.ipv4.conf.eth0.forwarding=1 net.ipv6.conf.eth0.forwarding=0")
	t.Cleanup(func() { shell(t, "sysctl -qw net.ipv4.conf.eth0.forwarding=0 net.ipv4.conf.all.accept_redirects=1") })
	settings = append(settings, "ipv4.conf.eth0.forwarding=1")
	for _, s := range settings {
		shell(t, "sysctl -qw net."+s)
	}
	if len(routes) == 2 {
		shell(t, "sysctl -qw net.ipv6.conf.eth0.force_forwarding=1")
		settings = append(settings, "ipv6.conf.eth0.force_forwarding=1")
		t.Cleanup(func() { shell(t, "sysctl -qw net.ipv6.conf.eth0.force_forwarding=0") })
	}
	forwards := func(when string) {
		t.Helper()
		for _, addr := range routes {
			if got := ask(t, lan, over("tcp", addr), addr); !strings.HasPrefix(got, "outside to ") {
				t.Errorf("%s, from the LAN to %s: %q", when, addr, got)
			}
		}
	}
	forwards("before")
	first, err := StartNAT(context.Background(), testConfig())
	if err != nil {
		t.Fatal(err)
	}
	second, err := StartNAT(context.Background(), otherConfig())
	if err != nil {
		t.Fatal(err)
	}
	forwards("with two NATs")
	abandon(t, first)
	if first, err = StartNAT(context.Background(), testConfig()); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*NAT{second, first} {
		forwards("with a NAT")
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
	forwards("after the NATs")
	for _, s := range settings {
		name, want, _ := strings.Cut(s, "=")
		b, err := os.ReadFile("/proc/sys/net/" + strings.ReplaceAll(name, ".", "/"))
		if err != nil || strings.TrimSpace(string(b)) != want {
			t.Errorf("%s: it is %s, %v", s, b, err)
		}
	}
}

// TestResolver reads what hosts have as their name servers.
func TestResolver(t *testing.T) {
	files := resolverFiles
	t.Cleanup(func() { resolverFiles = files })
	const real = "nameserver 192.0.2.53\nnameserver 2001:db8::1\nsearch a.test b.test\n"
	const stub = "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch a.test\n"
	for name, tt := range map[string]struct{ etc, resolved, manager, want, err string }{
		"a real one":                     {real, "", "", "nameserver 192.0.2.53\nsearch a.test b.test\n", ""},
		"systemd-resolved":               {stub, "nameserver 198.51.100.53\nsearch c.test\n", "", "nameserver 198.51.100.53\nsearch a.test\n", ""},
		"NetworkManager with dnsmasq":    {"nameserver 127.0.1.1\n", "", real, "nameserver 192.0.2.53\nsearch a.test b.test\n", ""},
		"a stub of the host's, and more": {"nameserver 127.0.0.1\nnameserver 192.0.2.53\n", "nameserver 9.9.9.9\n", "", "nameserver 192.0.2.53\n", ""},
		"more than are asked":            {"nameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4\n", "", "", "nameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\n", ""},
		"comments and the last search":   {"# x\n; nameserver 1.1.1.1\nnameserver\tx\ndomain a.test\nsearch b.test\n\tnameserver 1.1.1.2 # y", "", "", "nameserver 1.1.1.2\nsearch b.test\n", ""},
		"no search at all":               {"nameserver 1.1.1.1\nsearch .\n", "", "", "nameserver 1.1.1.1\n", ""},
		"the host itself":                {"nameserver 0.0.0.0\n", "", "", "", "names none"},
		"only a stub":                    {stub, stub, "", "", "--dns"},
		"only IPv6":                      {"nameserver 2001:db8::1\nnameserver fe80::1%eth0\n", "", "", "", "--dns"},
		"IPv6: both":                     {real, "", "", "nameserver 192.0.2.53\nnameserver 2001:db8::1\nsearch a.test b.test\n", ""},
		"IPv6: no other":                 {"nameserver 2001:db8::1\nnameserver fe80::1%eth0\n", "", "", "nameserver 2001:db8::1\n", ""},
		"IPv6: only of this host":        {"nameserver ::1\nnameserver fe80::1%eth0\nnameserver ::\nnameserver fe80::1\n", "", "", "", "link-local"},
		"IPv6: behind a stub":            {stub, "nameserver fd00::53\n", "", "nameserver fd00::53\nsearch a.test\n", ""},
		"empty":                          {"\n", "", "", "", "names none"},
		"missing":                        {"", "", "", "", "no such file"},
	} {
		dir := t.TempDir()
		resolverFiles = nil
		for i, text := range []string{tt.etc, tt.resolved, tt.manager} {
			path := filepath.Join(dir, fmt.Sprint(i))
			resolverFiles = append(resolverFiles, path)
			if text != "" {
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		r, err := ResolverFor(nil, strings.HasPrefix(name, "IPv6"))
		if got := r.String(); got != tt.want || (err == nil) != (tt.err == "") || err != nil && (!strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: %q, %v; want %q, %q", name, got, err, tt.want, tt.err)
		}
	}
	if r, err := ResolverFor([]string{"9.9.9.9", "2620:fe::fe"}, false); err != nil || r.String() != "nameserver 9.9.9.9\nnameserver 2620:fe::fe\n" {
		t.Errorf("given ones: %q, %v", r, err)
	}
	for _, bad := range [][]string{{"127.0.0.53"}, {"0.0.0.0"}, {"::1"}, {"fe80::1"}, {"fe80::1%eth0"}, {"dns.test"}, {""}, {"1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"}} {
		if r, err := ResolverFor(bad, true); err == nil || !strings.Contains(err.Error(), "--dns") {
			t.Errorf("%q: %q, %v", bad, r, err)
		}
	}
}

// TestClosedNameServer names the host's name servers that guests do not reach.
func TestClosedNameServer(t *testing.T) {
	need.Root(t)
	lan := attachLAN(t)
	_ = lan
	log := readLog(t)
	files := resolverFiles
	t.Cleanup(func() { resolverFiles = files })
	resolverFiles = []string{filepath.Join(t.TempDir(), "resolv.conf")}
	for _, tt := range []struct{ server, open string }{
		{"192.0.2.254", ""},
		{"203.0.113.1", ""}, // beyond the default route
		{"169.254.169.254", "--allow-cidr 169.254.169.254/32:53/udp,169.254.169.254/32:53/tcp"}, // Google's cloud
		{"168.63.129.16", "--allow-cidr 168.63.129.16/32"},                                      // Azure
		{"192.0.2.1", "--allow-host 53/udp,53/tcp"},
		{"198.51.100.2", "--allow-cidr 198.51.100.2/32"},
		{"2001:db8:53::1", ""},
		{ipv6("192.0.2.254"), ""},
		{"fd00:ec2::253", "--allow-cidr fd00:ec2::253/128:53/udp,fd00:ec2::253/128:53/tcp"}, // Amazon's
		{ipv6("192.0.2.1"), "--allow-host 53/udp,53/tcp"},
		{ipv6("198.51.100.2"), "--allow-cidr " + ipv6("198.51.100.2") + "/128"},
		{"172.16.0.2", "--namespace-interface-ip"}, // Amazon's in 172.16.0.0/16
	} {
		if err := os.WriteFile(resolverFiles[0], []byte("nameserver "+tt.server+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		c := testConfig()
		for range 2 {
			log.read()
			n, err := StartNAT(context.Background(), c)
			if err != nil {
				t.Fatal(err)
			}
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
			if said := log.read(); strings.Contains(said, "do not reach a name server") != (tt.open != "") || !strings.Contains(said, tt.open) {
				t.Errorf("%s: the log says\n%s", tt.server, said)
			}
			// With what it says, all is well.
			flag, value, _ := strings.Cut(tt.open, " ")
			if flag == "--allow-cidr" && !strings.Contains(value, ":") {
				value += ":53/udp"
			}
			switch flag {
			case "--allow-cidr":
				c.AllowCIDRs = strings.Split(value, ",")
			case "--allow-host":
				c.AllowHost = strings.Split(value, ",")
			case "--namespace-interface-ip":
				c.NamespaceInterfaceGateway, c.NamespaceInterfaceIP = "172.20.0.1", "172.20.0.2"
			}
			tt.open = ""
		}
	}
}

// TestFirewalls starts a NAT on hosts with other firewalls. What is proposed for each lets guests
// through.
func TestFirewalls(t *testing.T) {
	need.Root(t)
	byBoth(t, testFirewalls)
}

func pointers(list []string) (all []*string) {
	for i := range list {
		all = append(all, &list[i])
	}
	return all
}

func testFirewalls(t *testing.T, v func(string) string) {
	log := readLog(t)
	n := startNAT(t, testConfig())
	endWatch(t, &n.watch)
	guest := attachGuest(t, "ark0")
	listen(t, testhost.Outside, v("192.0.2.254:80"), "outside")
	listen(t, guest, v("172.16.0.2:80"), "guest")
	startForwarder(t, forwardTo("ark0", "tcp", v("192.0.2.1:3333")))
	through := func() bool {
		return ask(t, guest, v("tcp4"), v("192.0.2.254:80")) != "" && ask(t, testhost.Outside, v("tcp4"), v("192.0.2.1:3333")) != "" && ask(t, "", v("tcp4"), v("10.0.15.1:80")) != ""
	}
	for _, tt := range []struct {
		name, rules  string
		cut          bool
		chain, opens string   // in the log
		open         []string // what these commands do
	}{
		{"Docker", `table ip filter {
			chain DOCKER-USER { }
			chain DOCKER-FORWARD { oifname "docker0" ct state related,established accept; iifname "docker0" accept; }
			chain FORWARD { type filter hook forward priority 0; policy drop; jump DOCKER-USER; jump DOCKER-FORWARD; }
		}`, true, "chain=FORWARD", "iptables -I DOCKER-USER -i 'ark+' -j ACCEPT; iptables -I DOCKER-USER -o 'ark+' -j ACCEPT",
			[]string{`ip filter DOCKER-USER iifname "ark*" accept`, `ip filter DOCKER-USER oifname "ark*" accept`}},
		{"ufw", `table ip filter {
			chain ufw-user-forward { }
			chain ufw-before-forward { ct state related,established accept; jump ufw-user-forward; }
			chain FORWARD { type filter hook forward priority 0; policy drop; jump ufw-before-forward; }
		}`, true, "chain=FORWARD", "ufw route allow from 10.0.15.0/24; ufw route allow to 10.0.8.0/22",
			[]string{"ip filter ufw-user-forward ip saddr 10.0.15.0/24 accept", "ip filter ufw-user-forward ip daddr 10.0.8.0/22 accept"}},
		{"firewalld", `table inet firewalld {
			set trusted { type ipv4_addr; flags interval; elements = { 172.30.0.0/16 }; }
			chain filter_FORWARD { type filter hook forward priority 10; policy accept;
				ct state established,related accept; ct status dnat accept; iifname "lo" accept; ip saddr @trusted accept; reject with icmpx admin-prohibited; }
		}`, true, "chain=filter_FORWARD", " --add-source=10.0.15.0/24 --add-source=10.0.8.0/22",
			[]string{"inet firewalld filter_FORWARD ip saddr 10.0.15.0/24 accept", "inet firewalld filter_FORWARD ip6 saddr " + ipv6("10.0.15.0/24") + " accept"}},
		{"an administrator's own", `table inet mine {
			chain forward { type filter hook forward priority -5; policy drop; ct state vmap { established : accept, related : accept, invalid : drop }; }
		}`, true, "chain=forward", `nft insert rule inet mine forward iifname "ark*" accept; nft insert rule inet mine forward oifname "ark*" accept`,
			[]string{`inet mine forward iifname "ark*" accept`, `inet mine forward oifname "ark*" accept`}},
		{"on the way out", `table ip mine {
			chain out { type filter hook postrouting priority 0; policy drop; oifname "lo" accept; }
		}`, true, "chain=out", `nft insert rule ip mine out iifname "ark*" accept; nft insert rule ip mine out oifname "ark*" accept`,
			[]string{`ip mine out iifname "ark*" accept`, `ip mine out oifname "ark*" accept`}},
		{"no packets of the host's own", `table ip filter { chain OUTPUT { type filter hook output priority 0; policy drop; oifname "lo" accept; ct state established accept; }
		}`,
			true, "chain=OUTPUT", "iptables -I OUTPUT -o 'ark+' -j ACCEPT", []string{`ip filter OUTPUT oifname "ark*" accept`}},
		{"one that lets pass", `table inet open {
			set mine { type ifname; elements = { "ark0-veth", "ark1-veth" }; }
			chain forward { type filter hook forward priority 0; policy drop; iifname @mine accept; ct state established accept; ct status dnat oifname "ark0-veth" accept; }
			chain input { type filter hook input priority 0; policy accept; tcp dport 80 drop; }
		}`, false, "", "", nil},
		{"one that closes others", `table inet open {
			chain forward { type filter hook forward priority 0; policy accept; iifname "docker0" drop; ip saddr 10.0.0.0/21 drop; oifname != { "eth0", "ark0-veth", "ark1-veth" } drop; }
		}`,
			false, "", "", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if v("tcp4") == "tcp6" {
				of6 := strings.NewReplacer("ip filter ufw-", "ip6 filter ufw6-", "ip filter", "ip6 filter", "ip mine", "ip6 mine", "ip saddr 10", "ip6 saddr 10", "ip daddr 10", "ip6 daddr 10",
					"ip saddr @", "ip6 saddr @", `oifname "lo" accept;`, `oifname "lo" accept; meta l4proto ipv6-icmp accept;`, "ipv4_addr", "ipv6_addr", "iptables", "ip6tables", "chain ufw-", "chain ufw6-", "jump ufw-", "jump ufw6-")
				for _, text := range append([]*string{&tt.rules, &tt.opens}, pointers(tt.open)...) {
					*text = ipv6(of6.Replace(*text))
				}
			}
			log.read()
			rules := exec.Command("nft", "-f", "-")
			rules.Stdin = strings.NewReader(tt.rules)
			if out, err := rules.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			table := strings.Join(strings.Fields(tt.rules)[1:3], " ")
			defer shell(t, "nft delete table "+table)
			if through() == tt.cut {
				t.Fatalf("guests are cut off: %v", !tt.cut)
			}
			n.look()
			if said := log.read(); tt.cut != strings.Contains(said, "drops what guests need") || !strings.Contains(said, tt.chain) || !strings.Contains(said, tt.opens) {
				t.Errorf("the log says:\n%s", said)
			}
			for _, rule := range tt.open {
				shell(t, "nft insert rule "+strings.ReplaceAll(rule, `"ark*"`, `'"ark*"'`))
			}
			if !through() {
				t.Error("guests are cut off still")
			}
			n.look()
			n.look()
			if said := log.read(); said != "" {
				t.Errorf("after that the log says:\n%s", said)
			}
		})
	}
}

// With ManageForward, guests get through firewalls that forward nothing, also after these were loaded
// anew, and nothing of it is left.
func TestManageForward(t *testing.T) {
	need.Root(t)
	log := readLog(t)
	const docker, docker6, mine = "ip filter", "ip6 filter", "inet mine"
	load := func() {
		t.Helper()
		rules := exec.Command("nft", "-f", "-")
		rules.Stdin = strings.NewReader(`table ip filter {
			chain DOCKER-USER { }
			chain FORWARD { type filter hook forward priority 0; policy drop; jump DOCKER-USER; }
		}
		table ip6 filter {
			chain FORWARD { type filter hook forward priority 0; policy drop; }
		}
		table inet mine {
			chain forward { type filter hook forward priority -5; policy accept; iifname != "docker0" drop; }
		}`)
		if out, err := rules.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	load()
	t.Cleanup(func() { shell(t, "nft delete table "+docker+"; nft delete table "+docker6+"; nft delete table "+mine) })
	c := testConfig()
	c.ManageForward = true
	n := startNAT(t, c)
	endWatch(t, &n.watch)
	guest := attachGuest(t, "ark0")
	listen(t, testhost.Outside, "192.0.2.254:80", "outside")
	listen(t, testhost.Outside, ipv6("192.0.2.254:80"), "outside")
	listen(t, guest, "172.16.0.2:80", "guest")
	startForwarder(t, forwardTo("ark0", "tcp", "192.0.2.1:3333"))
	through := func(when string) {
		t.Helper()
		if ask(t, guest, "tcp4", "192.0.2.254:80") == "" || ask(t, testhost.Outside, "tcp4", "192.0.2.1:3333") == "" || ask(t, guest, "tcp6", ipv6("192.0.2.254:80")) == "" {
			t.Errorf("%s guests are cut off", when)
		}
		if said := log.read(); strings.Count(said, "Let guests through") != 3 {
			t.Errorf("%s the log says:\n%s", when, said)
		}
		n.look()
		if said := log.read(); said != "" {
			t.Errorf("%s, later, the log says:\n%s", when, said)
		}
	}
	through("at the start")
	shell(t, "nft delete table "+docker+"; nft delete table "+docker6+"; nft delete table "+mine)
	load()
	n.look()
	through("after others were loaded anew")
}

// legacyRule is an entry of iptables-legacy's for packets from and to interfaces whose names begin
// so, "" for any: with a verdict, or the end of the table without.
func legacyRule(in, out string, verdict *int32) []byte {
	target := binary.NativeEndian.AppendUint16(nil, 40)
	if verdict == nil {
		target = append(binary.NativeEndian.AppendUint16(nil, 64), "ERROR"...)
	}
	size := binary.NativeEndian.Uint16(target)
	target = append(target, make([]byte, int(size)-len(target))...)
	if verdict != nil {
		binary.NativeEndian.PutUint32(target[iptHeader:], uint32(*verdict))
	} else {
		copy(target[iptHeader:], "ERROR")
	}
	e := make([]byte, iptEntry)
	copy(e[16:], in)
	copy(e[32:], out)
	for i := range in {
		e[48+i] = 0xff
	}
	for i := range out {
		e[64+i] = 0xff
	}
	binary.NativeEndian.PutUint16(e[88:], iptEntry)
	binary.NativeEndian.PutUint16(e[90:], iptEntry+size)
	return append(e, target...)
}

// setLegacy replaces the filter table of iptables-legacy (struct ipt_replace): FORWARD has rules
// before its policy, the others let pass.
func setLegacy(t *testing.T, policy int32, rules ...[]byte) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	info := make([]byte, 84)
	copy(info, "filter")
	if err := getOption(fd, iptGetInfo, info); err != nil { // this makes it
		need.Lacks(t, "iptables-legacy", err)
	}
	accept := int32(iptAccept)
	pass := legacyRule("", "", &accept)
	entries := slices.Concat(append([][]byte{pass}, append(rules, legacyRule("", "", &policy), pass, legacyRule("", "", nil))...)...)
	counters := make([]byte, 16*binary.NativeEndian.Uint32(info[76:]))
	r := make([]byte, 96, 96+len(entries))
	copy(r, "filter")
	put := func(at int, v int) { binary.NativeEndian.PutUint32(r[at:], uint32(v)) }
	put(32, 1<<1|1<<2|1<<3) // hooks
	put(36, len(rules)+4)
	put(40, len(entries))
	forward := len(pass)
	last := forward + len(slices.Concat(rules...))
	for hook, at := range map[int][2]int{1: {0, 0}, 2: {forward, last}, 3: {last + len(pass), last + len(pass)}} {
		put(44+4*hook, at[0])
		put(64+4*hook, at[1])
	}
	put(84, len(counters)/16)
	binary.NativeEndian.PutUint64(r[88:], uint64(uintptr(unsafe.Pointer(&counters[0]))))
	r = append(r, entries...)
	const replace = 64 // IPT_SO_SET_REPLACE
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.IPPROTO_IP, replace, uintptr(unsafe.Pointer(&r[0])), uintptr(len(r)), 0)
	runtime.KeepAlive(counters)
	if errno != 0 {
		t.Fatalf("replace the table of iptables-legacy: %v", errno)
	}
}

// TestLegacyFirewall is TestFirewalls for iptables-legacy.
func TestLegacyFirewall(t *testing.T) {
	need.Root(t)
	log := readLog(t)
	n := startNAT(t, testConfig())
	endWatch(t, &n.watch)
	guest := attachGuest(t, "ark0")
	listen(t, testhost.Outside, "192.0.2.254:80", "outside")
	drop, accept := int32(iptDrop), int32(iptAccept)
	setLegacy(t, drop, legacyRule("docker0", "", &accept), legacyRule("ark0-veth", "docker0", &accept))
	t.Cleanup(func() { setLegacy(t, accept) })
	n.look()
	const commands = `open="iptables-legacy -I FORWARD -i 'ark+' -j ACCEPT; iptables-legacy -I FORWARD -o 'ark+' -j ACCEPT"`
	if said := log.read(); !strings.Contains(said, `table="filter (iptables-legacy)" chain=FORWARD drops="connections of guests, answers to guests, what drafter forwarder publishes"`) || !strings.Contains(said, commands) {
		t.Errorf("the log says:\n%s", said)
	}
	if got := ask(t, guest, "udp4", "192.0.2.254:80"); got != "" {
		t.Fatalf("a guest reaches outside: %q", got)
	}
	setLegacy(t, drop, legacyRule("ark", "", &accept), legacyRule("", "ark", &accept))
	if got := ask(t, guest, "udp4", "192.0.2.254:80"); got != "outside to 192.0.2.1" {
		t.Errorf("a guest reaches outside: %q", got)
	}
	n.look()
	if said := log.read(); said != "" {
		t.Errorf("after that the log says:\n%s", said)
	}
	setLegacy(t, accept, legacyRule("ark0", "", &drop))
	n.look()
	if said := log.read(); !strings.Contains(said, `drops="connections of guests"`) {
		t.Errorf("of a rule that drops the log says:\n%s", said)
	}
}

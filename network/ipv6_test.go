package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/await"
	"drafter/internal/need"
	"drafter/internal/testhost"
)

// TestRoutedPrefix gives namespaces addresses of a prefix that is routed to the host: guests send with
// these, and are reached no more than others.
func TestRoutedPrefix(t *testing.T) {
	need.Root(t)
	c := testConfig()
	c.NamespaceVethCIDR6, c.IPv6Routed = "2001:db8:1:2::/64", true
	startNAT(t, c)
	shell(t, "ip -n outside -6 route add 2001:db8:1:2::/64 via "+ipv6("192.0.2.1"))
	t.Cleanup(func() { shell(t, "ip -n outside -6 route del 2001:db8:1:2::/64") })
	guest0, guest1 := attachGuest(t, "ark0"), attachGuest(t, "ark1")
	listen(t, testhost.Outside, ipv6("192.0.2.254:80"), "outside")
	listen(t, testhost.Outside, "192.0.2.254:80", "outside")
	listen(t, guest0, ipv6("172.16.0.2:80"), "guest0")
	startForwarder(t, forwardTo("ark0", "tcp", ipv6("192.0.2.1:3333")))
	for _, tt := range []struct{ ns, network, addr, want string }{
		{guest0, "tcp6", ipv6("192.0.2.254:80"), "outside to 2001:db8:1:2::1"},
		{guest1, "udp6", ipv6("192.0.2.254:80"), "outside to 2001:db8:1:2::2"},
		{guest0, "tcp4", "192.0.2.254:80", "outside to 192.0.2.1"},
		{testhost.Outside, "tcp6", "[2001:db8:1:2::1]:80", ""},
		{guest1, "tcp6", "[2001:db8:1:2::1]:80", ""},
		{"", "tcp6", "[2001:db8:1:2::1]:80", ipv6("guest0 to 10.0.8.1")},
		{testhost.Outside, "tcp6", ipv6("192.0.2.1:3333"), ipv6("guest0 to 192.0.2.254")},
	} {
		if got := ask(t, tt.ns, tt.network, tt.addr); got != tt.want {
			t.Errorf("%s from %q to %s: %q; want %q", tt.network, tt.ns, tt.addr, got, tt.want)
		}
	}
	c.NamespaceVethCIDR6 = ""
	if _, err := c.parse(); err == nil || !strings.Contains(err.Error(), "--namespace-veth-cidr6") {
		t.Errorf("a routed prefix that is not named: %v", err)
	}
}

// TestGuarded6 has addresses that no guest reaches by IPv6, and others.
func TestGuarded6(t *testing.T) {
	for addr, closed := range map[string]bool{
		"::1": true, "::ffff:192.0.2.1": true, "fe80::1": true, "ff02::1": true, "fd00:ec2::254": true, "fd20:ce::254": true, "fd00:c1::a9fe:a9fe": true,
		"fd00:42::42": true, "fd00:a9fe:a9fe::1": true, "64:ff9b::169.254.169.254": true, "64:ff9b::127.0.0.1": true,
		"64:ff9b:1::169.254.169.254": true, "2002:a9fe:a9fe::1": true, "2002:7f00:1::": true, "64:ff9b:1::198.51.100.1": false, "2002:c633:6401::1": false,
		"64:ff9b::198.51.100.1": false, "2001:4860:4860::8888": false, "fd12:3456::1": false,
	} {
		// Of an IPv4 address in IPv6, package net would think that it is one of IPv4.
		b := net.ParseIP(addr).To16()
		in := slices.ContainsFunc(guarded6, func(n *net.IPNet) bool {
			ones, _ := n.Mask.Size()
			whole, rest := ones/8, ones%8
			return slices.Equal(b[:whole], n.IP.To16()[:whole]) && (rest == 0 || (b[whole]^n.IP.To16()[whole])>>(8-rest) == 0)
		})
		if in != closed {
			t.Errorf("%s is closed: %v; want %v", addr, in, closed)
		}
	}
}

// advertise lets the host outside say that it is a router.
func advertise(t *testing.T) {
	t.Helper()
	err := inNamespace(testhost.Outside, func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255); err != nil {
			return err
		}
		to := &unix.SockaddrInet6{Addr: [16]byte(net.ParseIP("ff02::1")), ZoneId: uint32(link.Index)}
		return unix.Sendto(fd, []byte{134, 0, 0, 0, 64, 0, 0x0e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0}, 0, to)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRouterAdvertisements starts and ends a NAT on a host that has its default route by router
// advertisements, as most have: it keeps it, and goes on to take them.
func TestRouterAdvertisements(t *testing.T) {
	need.Root(t)
	value := func(name string) string {
		t.Helper()
		b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	route := func() string {
		t.Helper()
		out, err := exec.Command("ip", "-6", "route", "list", "default").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	learns := func() {
		t.Helper()
		shell(t, "ip -6 route flush default proto ra")
		await.None(t, "the host learns its default route", func() string {
			advertise(t)
			if got := route(); !strings.Contains(got, "proto ra") {
				return got
			}
			return ""
		})
	}
	via := ipv6("192.0.2.254")
	shell(t, "ip -6 route del default")
	t.Cleanup(func() {
		shell(t, "ip -6 route flush default; ip -6 route add default via "+via+" dev eth0")
	})
	if got := value("eth0/accept_ra"); got != "1" {
		t.Fatalf("accept_ra is %s", got)
	}
	learns()
	n := startNAT(t, testConfig())
	endWatch(t, &n.watch)
	if !strings.Contains(route(), "proto ra") {
		t.Errorf("the host has lost its default route: %s", route())
	}
	guest := attachGuest(t, "ark0")
	listen(t, testhost.Outside, ipv6("192.0.2.254:80"), "outside")
	if got := ask(t, guest, "tcp6", ipv6("192.0.2.254:80")); got != ipv6("outside to 192.0.2.1") {
		t.Errorf("the guest reaches outside: %q", got)
	}
	learns()
	// One that is plugged in later takes them, too, as it would have.
	shell(t, "ip link add late0 type veth peer name late1; sysctl -qw net.ipv6.conf.late0.accept_ra=1")
	defer shell(t, "ip link del late0")
	shell(t, "ip link add gone0 type veth peer name gone1")
	n.look()
	shell(t, "ip link del gone0")
	n.look()
	if got := strings.Join(n.record.AcceptRA, " "); !strings.Contains(got, "late0") || strings.Contains(got, "gone") {
		t.Errorf("noted are %s", got)
	}
	other, err := StartNAT(context.Background(), otherConfig())
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil { // the last one restores what this one has noted
		t.Fatal(err)
	}
	for name, want := range map[string]string{"all/forwarding": "1", "eth0/accept_ra": "2", "late0/accept_ra": "2", "lo/accept_ra": "1"} {
		if got := value(name); got != want {
			t.Errorf("while a NAT runs, %s is %s; want %s", name, got, want)
		}
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"all/forwarding": "0", "eth0/accept_ra": "1", "late0/accept_ra": "1"} {
		if got := value(name); got != want {
			t.Errorf("after all NATs %s is %s; want %s", name, got, want)
		}
	}
	if !strings.Contains(route(), "proto ra") {
		t.Errorf("the host has lost its default route: %s", route())
	}
}

// TestRouterBefore starts a NAT on a host that forwards IPv6 already: it changes nothing of that.
func TestRouterBefore(t *testing.T) {
	need.Root(t)
	lan := attachLAN(t)
	listen(t, lan, ipv6("198.51.100.2:80"), "lan")
	shell(t, "sysctl -qw net.ipv6.conf.all.forwarding=1 net.ipv6.conf.eth0.forwarding=0; ip -n outside -6 route add "+ipv6("198.51.100.0/24 via 192.0.2.1"))
	t.Cleanup(func() {
		shell(t, "sysctl -qw net.ipv6.conf.all.forwarding=0; ip -n outside -6 route del "+ipv6("198.51.100.0/24"))
	})
	for _, ip6 := range []bool{true, false} {
		c := testConfig()
		c.IPv6 = ip6
		n, err := StartNAT(context.Background(), c)
		if err != nil {
			t.Fatal(err)
		}
		if got := ask(t, testhost.Outside, "tcp6", ipv6("198.51.100.2:80")); got != ipv6("lan to 192.0.2.254") {
			t.Errorf("with IPv6 %v, the host is no router any more: %q", ip6, got)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"all/forwarding=1", "eth0/forwarding=0", "eth0/accept_ra=1"} {
			path, want, _ := strings.Cut(name, "=")
			if b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + path); err != nil || strings.TrimSpace(string(b)) != want {
				t.Errorf("%s: it is %s, %v", name, b, err)
			}
		}
	}
}

// TestWithoutIPv6 has guests without IPv6: with a kernel that has none, and where it is turned off.
// Nothing goes by IPv6 then.
func TestWithoutIPv6(t *testing.T) {
	need.Root(t)
	settings := ipv6Settings
	t.Cleanup(func() { ipv6Settings = settings })
	for name, family := range map[string]string{"none in the kernel": "ip", "turned off on the host": "inet", "turned off for guests": "inet"} {
		t.Run(name, func(t *testing.T) {
			c := testConfig()
			switch name {
			case "none in the kernel":
				ipv6Settings = "/proc/sys/net/none"
				defer func() { ipv6Settings = settings }()
			case "turned off for guests":
				c.IPv6 = false
			default:
				shell(t, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
				defer shell(t, "sysctl -qw net.ipv6.conf.all.disable_ipv6=0; ip -6 addr add "+ipv6("192.0.2.1/24")+" dev eth0 nodad; ip -6 route add default via "+ipv6("192.0.2.254")+" dev eth0")
			}
			n, err := StartNAT(context.Background(), c)
			if err != nil {
				t.Fatal(err)
			}
			guest := attachGuest(t, "ark0")
			if err := GuardGuest("ark0", Guest{MAC: testConfig().NamespaceInterfaceMAC}); err != nil {
				t.Fatal(err)
			}
			f := startForwarder(t, forwardTo("ark0", "tcp", "192.0.2.1:3333"))
			listen(t, testhost.Outside, "192.0.2.254:80", "outside")
			listen(t, testhost.Outside, ipv6("192.0.2.254:80"), "outside")
			listen(t, guest, "172.16.0.2:80", "guest")
			for _, tt := range []struct{ ns, network, addr, want string }{
				{guest, "tcp4", "192.0.2.254:80", "outside to 192.0.2.1"},
				{testhost.Outside, "tcp4", "192.0.2.1:3333", "guest to 192.0.2.254"},
				{guest, "tcp6", ipv6("192.0.2.254:80"), ""},
				{guest, "tcp6", ipv6("172.16.0.1:80"), ""},
			} {
				if got := ask(t, tt.ns, tt.network, tt.addr); got != tt.want {
					t.Errorf("%s from %q to %s: %q; want %q", tt.network, tt.ns, tt.addr, got, tt.want)
				}
			}
			for _, ns := range []string{"", "ip netns exec ark0 "} {
				shell(t, ns+"nft list tables | grep -q '^table "+family+" drafter'")
			}
			shell(t, "! ip -n ark0 -6 addr list dev tap0 | grep inet6")
			n.look()
			if err := errors.Join(f.Close(), n.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestIPv6Later starts a NAT with IPv6 after one without was killed that a VM goes on in, and the other
// way round.
func TestIPv6Later(t *testing.T) {
	need.Root(t)
	c := testConfig()
	c.IPv6 = false
	n, err := StartNAT(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	claim, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	guest := attachGuest(t, "ark0")
	listen(t, testhost.Outside, "192.0.2.254:80", "outside")
	listen(t, testhost.Outside, ipv6("192.0.2.254:80"), "outside")
	for _, ip6 := range []bool{false, true, false, true} {
		abandon(t, n)
		c.IPv6 = ip6
		if n, err = StartNAT(context.Background(), c); err != nil {
			t.Fatal(err)
		}
		want := ""
		if ip6 {
			want = ipv6("outside to 192.0.2.1")
		}
		if got := ask(t, guest, "tcp6", ipv6("192.0.2.254:80")); got != want {
			t.Errorf("with IPv6 %v the guest reaches outside: %q; want %q", ip6, got, want)
		}
		if got := ask(t, guest, "tcp4", "192.0.2.254:80"); got != "outside to 192.0.2.1" {
			t.Errorf("with IPv6 %v the guest reaches outside by IPv4: %q", ip6, got)
		}
	}
	changed := c
	changed.HostVethCIDR6 = "fd00:1::/64"
	if _, err := StartNAT(context.Background(), changed); err == nil {
		t.Error("a second NAT")
	}
	abandon(t, n)
	if _, err := StartNAT(context.Background(), changed); err == nil || !strings.Contains(err.Error(), "laid out by other flags") {
		t.Errorf("another layout of IPv6 under a running VM: %v", err)
	}
	if n, err = StartNAT(context.Background(), c); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(claim.Close(), n.Close()); err != nil {
		t.Error(err)
	}
}

// TestRelay forwards what the kernel cannot: from one protocol to the other.
func TestRelay(t *testing.T) {
	need.Root(t)
	startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	listen(t, guest, "172.16.0.2:80", "four")
	listen(t, guest, ipv6("172.16.0.2:80"), "six")
	echoServer(t, guest, "172.16.0.2:7")
	to := func(family, port, external string) PortForward {
		return PortForward{Netns: "ark0", InternalPort: port, Protocol: "tcp", ExternalAddr: external, InternalFamily: family}
	}
	// Ports of their own: where a relay took connections, the kernel keeps them for a minute.
	f := startForwarder(t, to("ipv6", "80", "192.0.2.1:23333"), to("ipv4", "80", ipv6("192.0.2.1:24444")), to("", "80", "[::1]:5555"), to("ipv4", "7", "[::1]:7777"),
		to("ipv4", "9", "[::1]:9999"))
	for _, tt := range []struct{ ns, network, addr, want string }{
		{"", "tcp4", "192.0.2.1:23333", ipv6("six to 10.0.8.1")},
		{testhost.Outside, "tcp4", "192.0.2.1:23333", ipv6("six to 10.0.8.1")},
		{testhost.Outside, "tcp6", ipv6("192.0.2.1:24444"), "four to 10.0.8.1"},
		{"", "tcp6", "[::1]:5555", ipv6("six to 10.0.8.1")},
		{"", "tcp6", "[::1]:9999", ""}, // nobody listens
	} {
		if got := ask(t, tt.ns, tt.network, tt.addr); got != tt.want {
			t.Errorf("%s from %q to %s: %q; want %q", tt.network, tt.ns, tt.addr, got, tt.want)
		}
	}
	dial := func() *net.TCPConn {
		t.Helper()
		c, err := net.Dial("tcp6", "[::1]:7777")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.TCPConn)
	}
	// All that was sent arrives, also after the sender has ended its half.
	ended := dial()
	data := slices.Repeat([]byte("all of it"), 100_000)
	sent := make(chan error)
	go func() {
		_, err := ended.Write(data)
		sent <- errors.Join(err, ended.CloseWrite())
	}()
	got := make([]byte, 0, len(data))
	for buf := make([]byte, 1<<16); ; {
		n, err := ended.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil {
			break
		}
	}
	if err := <-sent; err != nil || string(got) != string(data) {
		t.Errorf("%d of %d bytes came back, %v", len(got), len(data), err)
	}
	// What is open ends with the forwarder, and with the guest.
	for _, end := range []struct {
		of string
		do func() error
	}{
		{"the forwarder", func() error {
			err := f.Close()
			f = startForwarder(t, to("ipv4", "7", "[::1]:7777"))
			return err
		}},
		{"the guest", func() error {
			unplug["ark0"]()
			config := testConfig()
			l, err := config.parse()
			return errors.Join(err, inNamespace("ark0", func() error { return config.vacate(l) }))
		}},
	} {
		open := dial()
		fmt.Fprint(open, "x")
		if _, err := open.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if err := end.do(); err != nil {
			t.Fatal(err)
		}
		if _, err := open.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("at the end of %s: %v", end.of, err)
		}
	}
	if got := ask(t, "", "tcp6", "[::1]:5555"); got != "" {
		t.Errorf("a closed forward answers %q", got)
	}
}

// TestNoWayOutByIPv6 has a host without a default route of IPv6: a guest hears at once that there is
// none, and goes on to IPv4.
func TestNoWayOutByIPv6(t *testing.T) {
	need.Root(t)
	via := ipv6("192.0.2.254")
	shell(t, "ip -6 route del default")
	t.Cleanup(func() { shell(t, "ip -6 route add default via "+via+" dev eth0") })
	startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	if err := GuardGuest("ark0", Guest{MAC: testConfig().NamespaceInterfaceMAC}); err != nil {
		t.Fatal(err)
	}
	err := inNamespace(guest, func() error {
		c, err := net.DialTimeout("tcp6", "[2001:4860:4860::8888]:80", 10*time.Second)
		if err == nil {
			c.Close()
		}
		return err
	})
	if !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("the guest hears %v", err)
	}
}

package network

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"drafter/internal/await"
	"drafter/internal/need"
	"drafter/internal/rundir"
	"drafter/internal/testhost"
)

// TestMain runs the tests on a host of their own.
func TestMain(m *testing.M) {
	switch os.Getenv("NETWORK_TEST") {
	case "nat":
		runNAT()
	case "first":
		fmt.Println(runFirst())
		return
	}
	fuzzes := slices.ContainsFunc(os.Args, func(a string) bool { return strings.HasPrefix(a, "-test.fuzz") })
	if os.Geteuid() == 0 && !testhost.Listing() && !fuzzes {
		if !testhost.Inside() {
			code, err := testhost.EnterShared(os.Stdout, 6)
			if err != nil {
				fmt.Println(err)
				code = 1
			}
			os.Exit(code)
		}
		if err := testhost.SetUp(""); err != nil {
			fmt.Println("set up test host:", err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

func subnet(s string) *net.IPNet {
	ip, n, err := net.ParseCIDR(s)
	if err != nil {
		panic(err)
	}
	n.IP = ip
	if ip4 := ip.To4(); ip4 != nil {
		n.IP = ip4
	}
	return n
}

// byBoth runs a test twice: by IPv4, and by IPv6 with every text that names IPv4 addresses and networks
// translated.
func byBoth(t *testing.T, test func(t *testing.T, v func(string) string)) {
	t.Run("IPv4", func(t *testing.T) { test(t, func(s string) string { return s }) })
	t.Run("IPv6", func(t *testing.T) { test(t, ipv6) })
}

var (
	ipv4Networks  = strings.NewReplacer("tcp4", "tcp6", "udp4", "udp6", "ip4:", "ip6:")
	ipv4Addresses = regexp.MustCompile(`\b(\d+\.\d+\.\d+\.\d+)(/\d+)?(:\d+)?`)
	ipv6Services  = map[string]string{
		"127.0.0.1": "::1", "0.0.0.0": "::", "169.254.169.254": "fd00:ec2::254", "100.100.100.200": "fd20:ce::254",
	}
)

// ipv6 translates addresses: those of the NAT are behind its prefix, those of others behind
// 2001:db8::/96, and services have their own.
func ipv6(s string) string {
	return ipv4Addresses.ReplaceAllStringFunc(ipv4Networks.Replace(s), func(s string) string {
		part := ipv4Addresses.FindStringSubmatch(s)
		addr, ok := ipv6Services[part[1]]
		if !ok {
			ip := net.ParseIP(part[1])
			prefix := net.ParseIP("2001:db8::")
			if ip.IsPrivate() {
				prefix = prefix6
			}
			addr = slices.Concat(prefix[:12], ip.To4()).String()
		}
		if part[2] != "" {
			bits, _ := strconv.Atoi(part[2][1:])
			return fmt.Sprintf("%s/%d%s", addr, bits+prefix6Bits, part[3])
		}
		if part[3] != "" {
			return "[" + addr + "]" + part[3]
		}
		return addr
	})
}

func testConfig() NATConfig {
	return NATConfig{
		HostVethCIDR: "10.0.8.0/22", NamespaceVethCIDR: "10.0.15.0/24", BlockedSubnetCIDR: "10.0.15.0/24",
		NamespaceInterface: "tap0", NamespaceInterfaceGateway: "172.16.0.1", NamespaceInterfaceNetmask: 30,
		NamespaceInterfaceIP: "172.16.0.2", NamespaceInterfaceMAC: "02:0e:d9:fd:68:3d",
		NamespacePrefix: "ark", NamespaceCount: 2, AllowIncomingTraffic: true, IPv6: true,
	}
}

// runNAT is a NAT process for the tests to kill.
func runNAT() {
	_, err := StartNAT(context.Background(), testConfig())
	fmt.Println("started:", err)
	select {}
}

// inventory is all that a NAT or forwarder could leave on a host, but for what is only counted.
func inventory(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", `ip -o link | cut -d: -f2 | sort; ip netns list | sort; (ip -4 route; ip -6 route) | sed 's/ linkdown//; s/ expires [0-9a-z]*//'; nft --terse list ruleset; find /run/drafter | sort; cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding /proc/sys/net/ipv6/conf/eth0/accept_ra`).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "No such file") {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func startNAT(t *testing.T, c NATConfig) *NAT {
	t.Helper()
	before := inventory(t)
	n, err := StartNAT(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if after := inventory(t); after != before {
			t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
		}
	})
	return n
}

// unplug takes the guest of a namespace away from its tap, as the end of a VMM does.
var unplug = map[string]func(){}

// attachGuest puts a host "guest-NS" behind a namespace's tap, as a VM would be.
func attachGuest(t *testing.T, ns string) string {
	t.Helper()
	guest := "guest-" + ns
	if err := createNamespace(guest); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := deleteNamespace(guest); err != nil {
			t.Error(err)
		}
	})
	ends := [2]*os.File{openTap(t, ns, "tap0"), openTap(t, guest, "eth0")}
	setUpGuest(t, guest)
	awaitOccupied(t, ns)
	done := make(chan struct{}, 2)
	for i := range ends {
		go func() {
			buf := make([]byte, 1<<17)
			for {
				n, err := ends[i].Read(buf)
				if err != nil {
					break
				}
				ends[1-i].Write(buf[:n]) // a frame that does not fit is lost, as on a wire
			}
			done <- struct{}{}
		}()
	}
	unplug[ns] = func() {
		for _, e := range ends {
			e.Close()
		}
	}
	t.Cleanup(func() {
		for _, e := range ends {
			e.Close()
		}
		<-done
		<-done
	})
	return guest
}

// openTap opens a tap in a namespace.
func openTap(t *testing.T, ns, name string) (tap *os.File) {
	t.Helper()
	err := inNamespace(ns, func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			return err
		}
		tap = os.NewFile(uintptr(fd), name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tap
}

// setUpGuest gives a guest's interface its addresses.
func setUpGuest(t *testing.T, guest string) {
	t.Helper()
	err := inNamespace(guest, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		// The same MAC address as the tap's, as the defaults have it.
		mac, err := net.ParseMAC(testConfig().NamespaceInterfaceMAC)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetHardwareAddr(link, mac); err != nil {
			return err
		}
		if err := configureLink(link, subnet("172.16.0.2/30"), subnet(ipv6("172.16.0.2/30"))); err != nil {
			return err
		}
		return errors.Join(
			netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IPv4(172, 16, 0, 1)}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(ipv6("172.16.0.1"))}))
	})
	if err != nil {
		t.Fatal(err)
	}
}

// awaitOccupied waits until the kernel notices that somebody is behind a namespace's tap.
func awaitOccupied(t *testing.T, ns string) {
	t.Helper()
	config := testConfig()
	l, err := config.parse()
	if err != nil {
		t.Fatal(err)
	}
	await.None(t, "the kernel notices that somebody is behind the tap", func() string {
		vacant := true
		if err := inNamespace(ns, func() error { vacant = l.vacant(); return nil }); err != nil || vacant {
			return fmt.Sprint("vacant: ", vacant, ", ", err)
		}
		return ""
	})
}

// listen serves TCP and UDP on addr in a namespace: each connection or packet is answered with name
// and the peer's address.
func listen(t *testing.T, ns, addr, name string) {
	t.Helper()
	var l net.Listener
	var p net.PacketConn
	start := func() (err error) {
		if l, err = net.Listen(over("tcp", addr), addr); err != nil {
			return err
		}
		p, err = net.ListenPacket(over("udp", addr), addr)
		return err
	}
	err := error(nil)
	if ns == "" {
		err = start()
	} else {
		err = inNamespace(ns, start)
	}
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{}, 2)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				break
			}
			fmt.Fprintf(c, "%s to %s\n", name, c.RemoteAddr().(*net.TCPAddr).IP)
			c.Close()
		}
		done <- struct{}{}
	}()
	go func() {
		buf := make([]byte, 100)
		for {
			_, from, err := p.ReadFrom(buf)
			if err != nil {
				break
			}
			fmt.Fprintf(&packetWriter{p, from}, "%s to %s\n", name, from.(*net.UDPAddr).IP)
		}
		done <- struct{}{}
	}()
	t.Cleanup(func() { l.Close(); p.Close(); <-done; <-done })
}

// over is a network by the protocol of an address, such as tcp6.
func over(network, addr string) string {
	if strings.HasPrefix(addr, "[") {
		return network + "6"
	}
	return network + "4"
}

type packetWriter struct {
	net.PacketConn
	to net.Addr
}

func (p *packetWriter) Write(b []byte) (int, error) { return p.WriteTo(b, p.to) }

// ask connects from a namespace and returns the answer, or "" when there is none.
func ask(t *testing.T, ns, network, addr string) (answer string) {
	t.Helper()
	return askFrom(t, ns, network, addr, nil)
}

// askFrom is ask from a local address; nil for any.
func askFrom(t *testing.T, ns, network, addr string, local net.Addr) (answer string) {
	t.Helper()
	dial := func() error {
		c, err := (&net.Dialer{Timeout: 2 * time.Second, LocalAddr: local}).Dial(network, addr)
		if err != nil {
			return nil // no answer is an answer
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		fmt.Fprintln(c, "hello")
		answer, _ = bufio.NewReader(c).ReadString('\n')
		answer = strings.TrimSpace(answer)
		return nil
	}
	err := error(nil)
	if ns == "" {
		err = dial()
	} else {
		err = inNamespace(ns, dial)
	}
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

func TestGuestReachesOutside(t *testing.T) {
	need.Root(t)
	byBoth(t, testGuestReachesOutside)
}

func testGuestReachesOutside(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	guest0, guest1 := attachGuest(t, "ark0"), attachGuest(t, "ark1")
	for _, ns := range []string{"ark0", "ark1"} {
		if err := GuardGuest(ns, Guest{MAC: testConfig().NamespaceInterfaceMAC}); err != nil {
			t.Fatal(err)
		}
	}
	listen(t, "outside", v("192.0.2.254:80"), "outside")
	listen(t, guest1, v("172.16.0.2:80"), "guest1")
	for _, network := range []string{v("tcp4"), v("udp4")} {
		if got := ask(t, guest0, network, v("192.0.2.254:80")); got != v("outside to 192.0.2.1") {
			t.Errorf("%s outside: %q", network, got)
		}
		// The host needs no forwarder: a guest has its own address there.
		for _, addr := range []string{v("10.0.15.2:80"), v("10.0.8.6:80")} {
			if got := ask(t, "", network, addr); !strings.HasPrefix(got, "guest1 to ") {
				t.Errorf("%s from the host to %s: %q", network, addr, got)
			}
		}
	}
}

func TestNoIncomingTraffic(t *testing.T) {
	need.Root(t)
	byBoth(t, testNoIncomingTraffic)
}

func testNoIncomingTraffic(t *testing.T, v func(string) string) {
	c := testConfig()
	c.AllowIncomingTraffic = false
	startNAT(t, c)
	guest := attachGuest(t, "ark0")
	listen(t, guest, v("172.16.0.2:80"), "guest")
	listen(t, "outside", v("192.0.2.254:80"), "outside")
	if got := ask(t, "", v("tcp4"), v("10.0.15.1:80")); got != "" {
		t.Errorf("the guest was reached: %q", got)
	}
	if got := ask(t, guest, v("tcp4"), v("192.0.2.254:80")); got != v("outside to 192.0.2.1") {
		t.Errorf("the guest reaches outside: %q", got)
	}
}

func forwardTo(ns, protocol, external string) PortForward {
	return PortForward{Netns: ns, InternalPort: "80", Protocol: protocol, ExternalAddr: external}
}

// possible are those forwards and questions that there are: nobody takes UDP at the loopback address of
// IPv6.
func possible(forwards ...PortForward) []PortForward {
	return slices.DeleteFunc(forwards, func(p PortForward) bool { return !asks(p.Protocol, p.ExternalAddr) })
}

func asks(network, addr string) bool {
	return !strings.HasPrefix(network, "udp") || !strings.HasPrefix(addr, "[::1]")
}

func TestForwarder(t *testing.T) {
	need.Root(t)
	byBoth(t, testForwarder)
}

func testForwarder(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	guest0, guest1 := attachGuest(t, "ark0"), attachGuest(t, "ark1")
	listen(t, guest0, v("172.16.0.2:80"), "guest0")
	listen(t, guest1, v("172.16.0.2:80"), "guest1")
	before := inventory(t)
	start := func(forwards ...PortForward) *Forwarder {
		t.Helper()
		f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: possible(forwards...)})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	first := start(forwardTo("ark0", "tcp", v("127.0.0.1:3333")), forwardTo("ark0", "udp", v("127.0.0.1:3333")), forwardTo("ark0", "tcp", v("192.0.2.1:3333")), forwardTo("ark0", "udp", v("192.0.2.1:3333")))
	second := start(forwardTo("ark1", "tcp", v("127.0.0.1:4444")), forwardTo("ark1", "tcp", v("192.0.2.1:4444")))
	for _, tt := range []struct{ ns, network, addr, want string }{
		{"", v("tcp4"), v("127.0.0.1:3333"), v("guest0 to 10.0.8.1")},
		{"", v("udp4"), v("127.0.0.1:3333"), v("guest0 to 10.0.8.1")},
		{"", v("tcp4"), v("192.0.2.1:3333"), v("guest0 to 192.0.2.1")},
		{"outside", v("tcp4"), v("192.0.2.1:3333"), v("guest0 to 192.0.2.254")},
		{"outside", v("udp4"), v("192.0.2.1:3333"), v("guest0 to 192.0.2.254")},
		{"", v("tcp4"), v("127.0.0.1:4444"), v("guest1 to 10.0.8.5")},
		{"outside", v("tcp4"), v("192.0.2.1:4444"), v("guest1 to 192.0.2.254")},
		{"outside", v("tcp4"), v("192.0.2.1:5555"), ""},
	} {
		if got := ask(t, tt.ns, tt.network, tt.addr); got != tt.want && asks(tt.network, tt.addr) {
			t.Errorf("%s from %q to %s: %q; want %q", tt.network, tt.ns, tt.addr, got, tt.want)
		}
	}
	// The forwards of one end with it, those of the other stay.
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, "", v("tcp4"), v("127.0.0.1:4444")); got != "" {
		t.Errorf("a closed forward answers %q", got)
	}
	if got := ask(t, "", v("tcp4"), v("127.0.0.1:3333")); got == "" {
		t.Error("another forwarder's end ended this one's forwards")
	}
	for name, tt := range map[string]struct {
		forward PortForward
		want    string
	}{
		"taken by a forwarder": {forwardTo("ark1", "tcp", v("127.0.0.1:3333")), "taken by another process"},
		"wildcard":             {forwardTo("ark0", "tcp", v("0.0.0.0:3333")), "wildcard addresses cannot be forwarded"},
		"wildcard port":        {forwardTo("ark0", "tcp", ":3333"), "wildcard addresses cannot be forwarded"},
		"UDP of IPv6 loopback": {forwardTo("ark0", "udp", "[::1]:7777"), "takes TCP only"},
		"UDP to IPv6":          {PortForward{Netns: "ark0", InternalPort: "80", Protocol: "udp", ExternalAddr: "192.0.2.1:7777", InternalFamily: "ipv6"}, "takes TCP only"},
		"no family":            {PortForward{Netns: "ark0", InternalPort: "80", Protocol: "tcp", ExternalAddr: "192.0.2.1:7777", InternalFamily: "6"}, "choose ipv4 or ipv6"},
		"link-local":           {forwardTo("ark0", "tcp", "[fe80::1%eth0]:3333"), "not link-local"},
		"IPv4 in IPv6":         {forwardTo("ark0", "tcp", "[::ffff:192.0.2.1]:3333"), "cannot be forwarded"},
		"IPv6 wildcard":        {forwardTo("ark0", "tcp", "[::]:3333"), "wildcard"},
		"no address of ours":   {forwardTo("ark0", "tcp", v("198.51.100.1:3333")), "no address of this host"},
		"host name":            {forwardTo("ark0", "tcp", "localhost:3333"), "no address and port"},
		"no namespace":         {forwardTo("ark77", "tcp", v("127.0.0.1:7777")), `"ark77" does not exist; start drafter nat`},
		"protocol":             {forwardTo("ark0", "sctp", v("127.0.0.1:7777")), `"sctp" is not supported`},
		"port of guests":       {forwardTo("ark0", "tcp", v("127.0.0.1:61000")), "external ports from 61000 on"},
		"internal port":        {PortForward{Netns: "ark0", InternalPort: "0", Protocol: "tcp", ExternalAddr: v("127.0.0.1:7777")}, "not in 1…65535"},
		"not a NAT's":          {forwardTo("outside", "tcp", v("127.0.0.1:7777")), v("no address in 10.0.8.0/22")},
	} {
		f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: []PortForward{tt.forward}})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error is %v; want one with %q", name, err, tt.want)
		}
		if err == nil {
			f.Close()
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if after := inventory(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

// TestLoopbackGuarded makes sure that a guest cannot send to the host's loopback addresses through
// a forward's link.
func TestLoopbackGuarded(t *testing.T) {
	need.Root(t)
	byBoth(t, testLoopbackGuarded)
}

func testLoopbackGuarded(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: []PortForward{forwardTo("ark0", "tcp", v("127.0.0.1:3333"))}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	listen(t, "", v("127.0.0.1:9999"), "secret")
	for _, ns := range []string{"ark0", guest} {
		err := inNamespace(ns, func() error {
			// What a hostile guest would do: route loopback addresses to the wire.
			name, via := "veth0", net.ParseIP(v("10.0.8.1"))
			if ns == guest {
				name, via = "eth0", net.ParseIP(v("172.16.0.1"))
			}
			if err := setSysctl("net/ipv4/conf/"+name+"/route_localnet", "1"); err != nil {
				return err
			}
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: subnet(v("127.0.0.1/32")), Gw: via})
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := ask(t, ns, v("tcp4"), v("127.0.0.1:9999")); got != "" {
			t.Errorf("from %s: %q", ns, got)
		}
	}
}

func TestNATRefused(t *testing.T) {
	need.Root(t)
	before := inventory(t)
	for name, tt := range map[string]struct {
		change func(*NATConfig)
		want   string
	}{
		"no such interface":     {func(c *NATConfig) { c.HostInterface = "wlp0s20f3" }, `"wlp0s20f3" does not exist`},
		"no subnet":             {func(c *NATConfig) { c.HostVethCIDR = "10.0.8.0" }, "--host-veth-cidr"},
		"IPv6 subnet":           {func(c *NATConfig) { c.BlockedSubnetCIDR = "fd00::/64" }, "--blocked-subnet-cidr"},
		"no gateway":            {func(c *NATConfig) { c.NamespaceInterfaceGateway = "x" }, "--namespace-interface-gateway"},
		"guest elsewhere":       {func(c *NATConfig) { c.NamespaceInterfaceIP = "172.16.1.2" }, "--namespace-interface-ip"},
		"no MAC":                {func(c *NATConfig) { c.NamespaceInterfaceMAC = "x" }, "--namespace-interface-mac"},
		"prefix as path":        {func(c *NATConfig) { c.NamespacePrefix = "../x" }, "--namespace-prefix"},
		"too many":              {func(c *NATConfig) { c.NamespaceCount = 255 }, "room for 1 to 254"},
		"no room":               {func(c *NATConfig) { c.HostVethCIDR = "10.0.8.0/31" }, "no room"},
		"port without protocol": {func(c *NATConfig) { c.AllowHost = []string{"53"} }, `--allow-host "53" is no port and protocol`},
		"port of nothing":       {func(c *NATConfig) { c.AllowHost = []string{"0/udp"} }, `--allow-host "0/udp"`},
		"address opened":        {func(c *NATConfig) { c.AllowCIDRs = []string{"192.0.2.1"} }, `--allow-cidr "192.0.2.1" is no subnet`},
		"IPv4 in IPv6 opened":   {func(c *NATConfig) { c.AllowCIDRs = []string{"::ffff:192.0.2.0/120"} }, `--allow-cidr "::ffff:192.0.2.0/120" is no subnet`},
		"no subnet of IPv6":     {func(c *NATConfig) { c.HostVethCIDR6 = "10.0.8.0/22" }, `--host-veth-cidr6 "10.0.8.0/22" is no IPv6 subnet`},
		"IPv4 in IPv6":          {func(c *NATConfig) { c.BlockedSubnetCIDR6 = "::ffff:10.0.8.0/120" }, `--blocked-subnet-cidr6 "::ffff:10.0.8.0/120"`},
		"link-local subnet":     {func(c *NATConfig) { c.NamespaceVethCIDR6 = "fe80::/64" }, `--namespace-veth-cidr6 "fe80::/64"`},
		"no gateway of IPv6":    {func(c *NATConfig) { c.NamespaceInterfaceGateway6 = "172.16.0.1" }, `--namespace-interface-gateway6 "172.16.0.1" is no IPv6 address`},
		"guest of IPv6 away":    {func(c *NATConfig) { c.NamespaceInterfaceIP6 = "fd00::2" }, "--namespace-interface-ip6 fd00::2"},
		"netmask of IPv6":       {func(c *NATConfig) { c.NamespaceInterfaceNetmask6 = 127 }, "--namespace-interface-netmask6 is 127"},
		"no room by IPv6":       {func(c *NATConfig) { c.NamespaceVethCIDR6 = "fd00:1::/127" }, "no room"},
		"IPv6 of other":         {func(c *NATConfig) { c.HostVethCIDR6 = "2001:db8::/64" }, "address 2001:db8::c000:201 of interface eth0"},
		"opened for a name":     {func(c *NATConfig) { c.AllowCIDRs = []string{"192.0.2.1/32:dns/udp"} }, `--allow-cidr "192.0.2.1/32:dns/udp"`},
		"less than none":        {func(c *NATConfig) { c.MaxConnections = -1 }, "--max-connections is -1"},
		"addresses of other":    {func(c *NATConfig) { c.HostVethCIDR = "192.0.2.0/24" }, "address 192.0.2.1 of interface eth0"},
		"subnet in another":     {func(c *NATConfig) { c.NamespaceVethCIDR = "10.0.9.0/24" }, "--host-veth-cidr 10.0.8.0/22 overlaps with --namespace-veth-cidr 10.0.9.0/24"},
		"guest in a subnet":     {func(c *NATConfig) { c.NamespaceVethCIDR6 = "fd0e:d9fd:683d::ac10:0/112" }, "overlaps with the network of --namespace-interface-gateway6"},
		"names of other":        {func(c *NATConfig) { c.NamespacePrefix = "taken" }, `"taken0" exists and is not ours`},
	} {
		if name == "names of other" {
			if err := createNamespace("taken0"); err != nil {
				t.Fatal(err)
			}
		}
		c := testConfig()
		tt.change(&c)
		n, err := StartNAT(context.Background(), c)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error is %v; want one with %q", name, err, tt.want)
		}
		if err == nil {
			n.Close()
		}
	}
	if err := deleteNamespace("taken0"); err != nil {
		t.Error(err)
	}
	if after := inventory(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

func TestTwoNATs(t *testing.T) {
	need.Root(t)
	startNAT(t, testConfig())
	if _, err := StartNAT(context.Background(), testConfig()); err == nil || !strings.Contains(err.Error(), "runs already as process") {
		t.Errorf("a second NAT: %v", err)
	}
	other, err := StartNAT(context.Background(), otherConfig())
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	// Rules for links named eth0-veth… are none for eth0.
	c := otherConfig()
	c.NamespacePrefix = "eth"
	startNAT(t, c)
	listen(t, "", "192.0.2.1:80", "host")
	if got := ask(t, testhost.Outside, "tcp4", "192.0.2.1:80"); got != "host to 192.0.2.254" {
		t.Errorf("the host is reached from outside: %q", got)
	}
}

// killNAT starts a NAT process and kills it.
func killNAT(t *testing.T) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "NETWORK_TEST=nat")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "started: <nil>\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
}

// TestKilledNAT kills a NAT process, once with a VM in one of its namespaces.
func TestKilledNAT(t *testing.T) {
	need.Root(t)
	before := inventory(t)
	killNAT(t)
	n, err := StartNAT(context.Background(), testConfig())
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if after := inventory(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}

	killNAT(t)
	claim, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	guest := attachGuest(t, "ark0")
	changed := testConfig()
	changed.NamespaceVethCIDR = "10.0.16.0/24"
	if _, err := StartNAT(context.Background(), changed); err == nil || !strings.Contains(err.Error(), `"ark0" is in use by process`) {
		t.Errorf("another layout under a running VM: %v", err)
	}
	listen(t, guest, "172.16.0.2:80", "guest")
	if got := ask(t, "", "tcp4", "10.0.15.1:80"); !strings.HasPrefix(got, "guest to ") {
		t.Errorf("the host reaches the VM: %q", got)
	}
	closed := testConfig()
	closed.AllowIncomingTraffic = false
	if n, err = StartNAT(context.Background(), closed); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, "", "tcp4", "10.0.15.1:80"); got != "" {
		t.Errorf("a namespace that was kept has the rules of before: %q", got)
	}
	listen(t, "outside", "192.0.2.254:80", "outside")
	if got := ask(t, guest, "tcp4", "192.0.2.254:80"); got != "outside to 192.0.2.1" {
		t.Errorf("the VM that was there before reaches outside: %q", got)
	}
	if err := errors.Join(claim.Close(), n.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestOlderTables starts a NAT and a forwarder after those of an older release were killed, whose
// tables are of family ip: no rule of these stays.
func TestOlderTables(t *testing.T) {
	need.Root(t)
	killNAT(t)
	claim, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	guest := attachGuest(t, "ark0")
	const dead = forwarderPrefix + "1"
	lock, err := rundir.Lock(forwarderLocks + dead)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Abandon(); err != nil { // as after kill -9
		t.Fatal(err)
	}
	const rules = "add table ip %[1]s; add chain ip %[1]s old { type filter hook forward priority 0; policy drop; }"
	for _, table := range []string{dead, "drafter-nat-ark"} {
		shell(t, fmt.Sprintf("nft '"+rules+"'", table))
	}
	shell(t, fmt.Sprintf("ip netns exec ark0 nft '"+rules+"'", namespaceTable))
	n, err := StartNAT(context.Background(), testConfig())
	if err != nil {
		t.Fatal(err)
	}
	listen(t, guest, "172.16.0.2:80", "guest")
	listen(t, "outside", "192.0.2.254:80", "outside")
	f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: []PortForward{forwardTo("ark0", "tcp", "192.0.2.1:3333")}})
	if err != nil {
		t.Fatal(err)
	}
	for _, ns := range []string{"", "ip netns exec ark0 "} {
		shell(t, "! "+ns+"nft list tables | grep 'table ip '")
	}
	if got := ask(t, guest, "tcp4", "192.0.2.254:80"); got != "outside to 192.0.2.1" {
		t.Errorf("the guest reaches outside: %q", got)
	}
	if got := ask(t, "outside", "tcp4", "192.0.2.1:3333"); got != "guest to 192.0.2.254" {
		t.Errorf("the guest is reached: %q", got)
	}
	if err := errors.Join(f.Close(), claim.Close(), n.Close()); err != nil {
		t.Fatal(err)
	}
}

// A namespace that somebody has made in the place of ours stays, at the end of a NAT and after a
// kill.
func TestSomebodysNamespace(t *testing.T) {
	need.Root(t)
	before := inventory(t)
	shell := func(script string) {
		t.Helper()
		if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
	}
	const replace = "ip netns del ark1; touch /run/netns/ark1; unshare --net=/run/netns/ark1 ip tuntap add tap9 mode tap"
	n, err := StartNAT(context.Background(), testConfig())
	if err != nil {
		t.Fatal(err)
	}
	shell(replace)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	shell("ip -n ark1 link show tap9; ip netns del ark1")
	if after := inventory(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}

	killNAT(t)
	shell(replace)
	if _, err := StartNAT(context.Background(), testConfig()); err == nil || !strings.Contains(err.Error(), `"ark1" exists and is not ours`) {
		t.Errorf("over somebody's namespace: %v", err)
	}
	shell("ip -n ark1 link show tap9; ip netns del ark1")
	if n, err = StartNAT(context.Background(), testConfig()); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if after := inventory(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

// What has a name of ours without being ours stays as it is: before a start, which says so, at the
// end of a NAT, and after a kill.
func TestSomebodysThings(t *testing.T) {
	need.Root(t)
	before := inventory(t)
	const record = "/run/drafter/nat-ark.json"
	run := func() {
		t.Helper()
		n, err := StartNAT(context.Background(), testConfig())
		if err == nil {
			err = n.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, tt := range map[string]struct{ make, check, remove, want string }{
		"namespace without anything": {"ip netns add ark1", "ip netns exec ark1 true", "ip netns del ark1", `"ark1" exists and is not ours`},
		"file":                       {"mkdir -p /run/netns; echo theirs > /run/netns/ark1", "grep -q theirs /run/netns/ark1", "rm /run/netns/ark1; rmdir /run/netns 2>/dev/null || true", `"ark1" exists and is not ours`},
		"directory":                  {"mkdir -p /run/netns/ark1", "test -d /run/netns/ark1", "rmdir /run/netns/ark1; rmdir /run/netns 2>/dev/null || true", `"ark1" exists and is not ours`},
		"link to nothing":            {"mkdir -p /run/netns; ln -s /nowhere /run/netns/ark1", "test -L /run/netns/ark1", "rm /run/netns/ark1; rmdir /run/netns 2>/dev/null || true", `"ark1" exists and is not ours`},
		"FIFO":                       {"mkdir -p /run/netns; mkfifo /run/netns/ark1", "test -p /run/netns/ark1", "rm /run/netns/ark1; rmdir /run/netns 2>/dev/null || true", `"ark1" exists and is not ours`},
		"bridge":                     {"ip link add ark1-veth type bridge", "ip -d link show ark1-veth | grep 'bridge forward'", "ip link del ark1-veth", "interface ark1-veth exists and is not ours"},
		"link":                       {"ip link add ark1-veth type veth peer name theirs", "ip link show theirs", "ip link del theirs", "interface ark1-veth exists and is not ours"},
		"table":                      {"nft 'add table inet drafter-nat-ark; add chain inet drafter-nat-ark theirs'", "nft list chain inet drafter-nat-ark theirs", "nft delete table inet drafter-nat-ark", "table inet drafter-nat-ark exists and is not ours"},
		"table of IPv4":              {"nft 'add table ip drafter-nat-ark; add chain ip drafter-nat-ark theirs'", "nft list chain ip drafter-nat-ark theirs", "nft delete table ip drafter-nat-ark", "table ip drafter-nat-ark exists and is not ours"},
	} {
		shell(t, tt.make)
		if n, err := StartNAT(context.Background(), testConfig()); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				n.Close()
			}
		}
		shell(t, tt.check+"; "+tt.remove)
		if strings.HasPrefix(name, "table") {
			continue // its record says whose it is
		}
		killNAT(t)
		if err := removeNamespace("ark1", slog.Default()); err != nil {
			t.Fatal(err)
		}
		shell(t, tt.make)
		if _, err := StartNAT(context.Background(), testConfig()); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s, after a kill: %v", name, err)
		}
		shell(t, tt.check+"; "+tt.remove)
		run()
	}
	shell(t, "mkdir -p -m 700 /run/drafter; echo theirs > /run/precious; ln -s /run/precious "+record+".new")
	run()
	shell(t, "rm "+record+".new; grep -x theirs /run/precious; rm /run/precious; rmdir /run/drafter")
	if after := inventory(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

func TestClaims(t *testing.T) {
	need.Root(t)
	n := startNAT(t, testConfig())
	a, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ClaimNamespace("ark0"); err == nil || !strings.Contains(err.Error(), `"ark0" is in use by process`) {
		t.Errorf("a second claim: %v", err)
	}
	name, b, err := n.Claim()
	if err != nil || name != "ark1" {
		t.Fatalf("any namespace: %q, %v", name, err)
	}
	if _, _, err := n.Claim(); err == nil || !strings.Contains(err.Error(), "all 2 network namespaces are in use") {
		t.Errorf("one too many: %v", err)
	}
	if err := errors.Join(a.Close(), b.Close()); err != nil {
		t.Fatal(err)
	}
	if a, err = ClaimNamespace("ark0"); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"nowhere", "../etc", ".."} {
		if _, err := ClaimNamespace(bad); err == nil {
			t.Errorf("%q was claimed", bad)
		}
	}
	if none, err := ClaimNamespace(""); err != nil || none.Close() != nil {
		t.Errorf("no namespace: %v", err)
	}
}

func TestGuestAddress(t *testing.T) {
	need.Root(t)
	startNAT(t, testConfig())
	gateway, guest, err := GuestAddress("ark0", "tap0")
	if err != nil || gateway.String() != "172.16.0.1" || guest.String() != "172.16.0.2/30" {
		t.Errorf("%s, %s, %v", gateway, guest, err)
	}
	gateway, guest, err = GuestAddress6("ark0")
	if err != nil || gateway.String() != ipv6("172.16.0.1") || guest.String() != ipv6("172.16.0.2/30") {
		t.Errorf("%s, %s, %v", gateway, guest, err)
	}
	if _, guest, err = GuestAddress6("outside"); guest != nil || err != nil {
		t.Errorf("a namespace that no NAT made: %s, %v", guest, err)
	}
	if _, _, err := GuestAddress("ark0", "tap9"); err == nil || !strings.Contains(err.Error(), "tap9 does not exist") {
		t.Errorf("a missing interface: %v", err)
	}
	for in, want := range map[string]string{"10.0.0.1/24": "10.0.0.2/24", "10.0.0.254/24": "10.0.0.253/24", "10.0.0.2/30": "10.0.0.1/30"} {
		if got, err := neighbour(subnet(in)); err != nil || got.String() != want {
			t.Errorf("the neighbour of %s is %s, %v; want %s", in, got, err, want)
		}
	}
	if _, err := neighbour(subnet("10.0.0.1/32")); err == nil {
		t.Error("a lone address has a neighbour")
	}
}

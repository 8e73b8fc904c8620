package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"drafter/internal/need"
	"drafter/internal/rundir"
	"drafter/internal/testhost"
)

// otherConfig is that of a second NAT on the same host.
func otherConfig() NATConfig {
	c := testConfig()
	c.NamespacePrefix, c.HostVethCIDR, c.NamespaceVethCIDR, c.BlockedSubnetCIDR = "bee", "10.1.8.0/22", "10.1.15.0/24", "10.1.15.0/24"
	return c
}

// giveAddress gives the host outside a further address until the test ends.
func giveAddress(t *testing.T, addr string) {
	t.Helper()
	change := func(f func(netlink.Link, *netlink.Addr) error) error {
		return inNamespace(testhost.Outside, func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			a := &netlink.Addr{IPNet: subnet(addr), Scope: unix.RT_SCOPE_UNIVERSE}
			if a.IP.To4() == nil {
				a.Flags = unix.IFA_F_NODAD // it is used at once
			}
			return f(link, a)
		})
	}
	if err := change(netlink.AddrAdd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { change(netlink.AddrDel) })
}

// giveRoute routes a subnet from a namespace ("" for the host) until the test ends.
func giveRoute(t *testing.T, ns, to string, via net.IP) {
	t.Helper()
	change := func(f func(*netlink.Route) error) error {
		route := func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return f(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: subnet(to), Gw: via})
		}
		if ns == "" {
			return route()
		}
		return inNamespace(ns, route)
	}
	if err := change(netlink.RouteAdd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { change(netlink.RouteDel) })
}

// attachLAN links the host (198.51.100.1) with a further network, whose namespace it returns
// (198.51.100.2): the bridge of another program, say.
func attachLAN(t *testing.T) string {
	t.Helper()
	const name = "lan"
	if err := createNamespace(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { deleteNamespace(name) })
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "lan0"
	ns, err := netns.GetFromName(name)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	link := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(link) })
	if err := configureLink(link, subnet("198.51.100.1/24"), subnet(ipv6("198.51.100.1/24"))); err != nil {
		t.Fatal(err)
	}
	err = inNamespace(name, func() error {
		peer, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := configureLink(peer, subnet("198.51.100.2/24"), subnet(ipv6("198.51.100.2/24"))); err != nil {
			return err
		}
		return errors.Join(
			netlink.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Gw: net.IPv4(198, 51, 100, 1)}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Gw: net.ParseIP(ipv6("198.51.100.1"))}))
	})
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// TestGuestConfined tries what a guest must not reach: first as it is, then with some of it opened.
func TestGuestConfined(t *testing.T) {
	need.Root(t)
	byBoth(t, testGuestConfined)
}

func testGuestConfined(t *testing.T, v func(string) string) {
	lan := attachLAN(t)
	for _, addr := range []string{v("169.254.169.254/32"), v("100.100.100.200/32")} {
		giveAddress(t, addr)
		giveRoute(t, "", addr, net.ParseIP(v("192.0.2.254")))
	}
	for _, port := range []string{":80", ":81"} {
		for _, addr := range []string{"192.0.2.254", "169.254.169.254", "100.100.100.200"} {
			listen(t, testhost.Outside, v(addr+port), "outside")
		}
		listen(t, lan, v("198.51.100.2"+port), "lan")
	}
	for name, opened := range map[string]bool{"closed": false, "opened": true} {
		t.Run(name, func(t *testing.T) {
			c, other := testConfig(), otherConfig()
			if opened {
				c.AllowHost = []string{"80/tcp", "80/udp"}
				c.AllowCIDRs = []string{
					v("10.0.15.2/32:80/tcp"), v("10.0.15.2/32:80/udp"), v("10.1.15.0/24"), v("198.51.100.0/24:80/tcp"), v("198.51.100.0/24:80/udp"),
					v("169.254.169.254/32:80/tcp"), v("169.254.169.254/32:80/udp"), v("192.0.2.1/32:3333/tcp"), v("192.0.2.1/32:3333/udp"),
				}
			}
			startNAT(t, c)
			startNAT(t, other)
			guest0, guest1, guest2 := attachGuest(t, "ark0"), attachGuest(t, "ark1"), attachGuest(t, "bee0")
			listen(t, "ark0", v("0.0.0.0:80"), "namespace")
			for _, port := range []string{":80", ":81"} {
				for _, addr := range []string{"192.0.2.1", "198.51.100.1", "10.0.8.1", "10.0.8.5"} {
					listen(t, "", v(addr+port), "host")
				}
				listen(t, guest1, v("172.16.0.2"+port), "guest1")
				listen(t, guest2, v("172.16.0.2"+port), "guest2")
			}
			f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: []PortForward{
				forwardTo("ark1", "tcp", v("192.0.2.1:3333")), forwardTo("ark1", "udp", v("192.0.2.1:3333")), forwardTo("ark1", "tcp", v("192.0.2.1:4444")),
			}})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })

			var wait sync.WaitGroup
			for _, d := range []struct {
				addr, answer string
				always       bool // whether it is there without being opened
			}{
				{v("192.0.2.254:80"), v("outside to 192.0.2.1"), true},
				{v("192.0.2.254:81"), v("outside to 192.0.2.1"), true},
				// Other guests, directly and through what is published for outside.
				{v("10.0.15.2:80"), v("guest1 to 10.0.15.1"), false},
				{v("10.0.15.2:81"), "", false},
				{v("10.0.8.6:80"), "", false},
				{v("10.1.15.1:81"), "", false}, // closed by the other NAT, too
				{v("10.1.8.2:80"), "", false},
				{v("192.0.2.1:3333"), v("guest1 to 10.0.15.1"), false},
				{v("192.0.2.1:4444"), "", false},
				// The host, at each of its addresses.
				{v("192.0.2.1:80"), v("host to 10.0.15.1"), false},
				{v("192.0.2.1:81"), "", false},
				{v("10.0.8.1:80"), v("host to 10.0.15.1"), false},
				{v("10.0.8.1:81"), "", false},
				{v("10.0.8.5:81"), "", false},
				{v("198.51.100.1:81"), "", false},
				// What is behind another of its interfaces.
				{v("198.51.100.2:80"), v("lan to 198.51.100.1"), false},
				{v("198.51.100.2:81"), "", false},
				// Metadata services.
				{v("169.254.169.254:80"), v("outside to 192.0.2.1"), false},
				{v("169.254.169.254:81"), "", false},
				{v("100.100.100.200:80"), "", false},
				// The namespace itself.
				{v("172.16.0.1:80"), "", false},
				{"[fe80::1%eth0]:80", "", false},
				{v("10.0.8.2:80"), "", false},
				{v("10.0.15.1:80"), "", false},
			} {
				for _, network := range []string{v("tcp4"), v("udp4")} {
					wait.Go(func() {
						want := d.answer
						if !opened && !d.always {
							want = ""
						}
						if got := ask(t, guest0, network, d.addr); got != want {
							t.Errorf("%s to %s: %q; want %q", network, d.addr, got, want)
						}
					})
				}
			}
			wait.Wait()
			// No end of a link has a link-local address, to which a guest's VMM could connect.
			for _, ns := range []string{"", "ark0"} {
				if addrs := linkLocal(t, ns); len(addrs) != 0 {
					t.Errorf("link-local addresses in namespace %q: %v", ns, addrs)
				}
			}
		})
	}
}

// linkLocal returns the link-local addresses of a NAT's links in a namespace.
func linkLocal(t *testing.T, ns string) (found []string) {
	t.Helper()
	list := func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			addrs, err := netlink.AddrList(l, netlink.FAMILY_V6)
			if err != nil {
				return err
			}
			for _, a := range addrs {
				if a.IP.IsLinkLocalUnicast() && (l.Attrs().Name == namespaceVeth || strings.HasSuffix(l.Attrs().Name, "-veth")) {
					found = append(found, l.Attrs().Name+" "+a.String())
				}
			}
		}
		return err
	}
	err := error(nil)
	if ns == "" {
		err = list()
	} else {
		err = inNamespace(ns, list)
	}
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// capture returns what arrives at eth0 of a namespace from now on, as one line a frame. It ends
// with the test.
func capture(t *testing.T, ns string) <-chan string {
	t.Helper()
	var socket *os.File
	err := inNamespace(ns, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
		socket = os.NewFile(uintptr(fd), "capture")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	frames, done := make(chan string, 1000), make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, err := socket.Read(buf)
			if err != nil {
				return
			}
			select {
			case frames <- describe(buf[:n]):
			default:
			}
		}
	}()
	t.Cleanup(func() { socket.Close(); <-done })
	return frames
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)) }

// describe tells the source of a packet in a frame, and the port it is for.
func describe(frame []byte) string {
	if len(frame) >= 58 && binary.BigEndian.Uint16(frame[12:]) == unix.ETH_P_IPV6 {
		return fmt.Sprintf("%s port %d", net.IP(frame[22:38]), binary.BigEndian.Uint16(frame[56:]))
	}
	if len(frame) < 38 || binary.BigEndian.Uint16(frame[12:]) != unix.ETH_P_IP {
		return "other"
	}
	return fmt.Sprintf("%s port %d", net.IP(frame[26:30]), binary.BigEndian.Uint16(frame[36:]))
}

// send writes frames to eth0 of a guest.
func send(t *testing.T, guest string, frames ...[]byte) {
	t.Helper()
	err := inNamespace(guest, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, f := range frames {
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: link.Attrs().Index}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// frame is an Ethernet frame to a namespace's tap.
func frame(from net.HardwareAddr, ethertype uint16, payload []byte) []byte {
	b := append(mac(testConfig().NamespaceInterfaceMAC), from...)
	return append(binary.BigEndian.AppendUint16(b, ethertype), payload...)
}

// ipFrame is a frame with an IPv4 or IPv6 packet.
func ipFrame(from net.HardwareAddr, packet []byte) []byte {
	if packet[0]>>4 == 6 {
		return frame(from, unix.ETH_P_IPV6, packet)
	}
	return frame(from, unix.ETH_P_IP, packet)
}

// outside is the address of the host outside.
const outside = "192.0.2.254"

// packet6 is an IPv6 packet, with the checksum that these protocols need.
func packet6(from, to string, protocol byte, payload []byte) []byte {
	payload = slices.Clone(payload)
	if protocol == unix.IPPROTO_ICMP && payload[0] == 8 {
		protocol, payload[0] = unix.IPPROTO_ICMPV6, 128
	}
	addresses := slices.Concat(net.ParseIP(from), net.ParseIP(to))
	if at, ok := map[byte]int{unix.IPPROTO_TCP: 16, unix.IPPROTO_UDP: 6, unix.IPPROTO_ICMPV6: 2}[protocol]; ok {
		payload[at], payload[at+1] = 0, 0
		pseudo := binary.BigEndian.AppendUint32(slices.Clone(addresses), uint32(len(payload)))
		binary.BigEndian.PutUint16(payload[at:], checksum(slices.Concat(pseudo, []byte{0, 0, 0, protocol}, payload)))
	}
	header := binary.BigEndian.AppendUint16([]byte{6 << 4, 0, 0, 0}, uint16(len(payload)))
	return slices.Concat(header, []byte{protocol, 255}, addresses, payload)
}

// packet is an IP packet of a protocol to the host outside.
func packet(from string, protocol byte, payload []byte) []byte {
	if strings.Contains(from, ":") {
		return packet6(from, ipv6(outside), protocol, payload)
	}
	b := make([]byte, 20, 20+len(payload))
	b[0], b[8], b[9] = 0x45, 64, protocol
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	copy(b[12:], net.ParseIP(from).To4())
	copy(b[16:], net.ParseIP(outside).To4())
	binary.BigEndian.PutUint16(b[10:], checksum(b))
	return append(b, payload...)
}

func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// udp is a datagram without data and checksum, from port 1000.
func udp(toPort uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, 1000)
	b = binary.BigEndian.AppendUint16(b, toPort)
	return append(b, 0, 8, 0, 0)
}

// tcp is a segment without data, with flags, from the guest to the host outside.
func tcp(fromPort, toPort uint16, flags byte) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, fromPort)
	binary.BigEndian.PutUint16(b[2:], toPort)
	b[12], b[13] = 5<<4, flags
	pseudo := append([]byte{172, 16, 0, 2}, net.ParseIP(outside).To4()...)
	binary.BigEndian.PutUint16(b[16:], checksum(append(append(pseudo, 0, unix.IPPROTO_TCP, 0, 20), b...)))
	return b
}

// echo is an ICMP echo request.
func echo(id uint16) []byte {
	b := []byte{8, 0, 0, 0, byte(id >> 8), byte(id), 0, 1}
	binary.BigEndian.PutUint16(b[2:], checksum(b))
	return b
}

// arp is a message of an operation (1 asks for target, 2 tells it).
func arp(operation uint16, senderMAC net.HardwareAddr, sender, target string) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, 1, 8, 0, 6, 4}, operation)
	b = append(append(b, senderMAC...), net.ParseIP(sender).To4()...)
	return append(append(b, make([]byte, 6)...), net.ParseIP(target).To4()...)
}

// discoveryOfOthers are messages of neighbour discovery with addresses that a guest does not have, and
// those of routers.
func discoveryOfOthers(own, foreign net.HardwareAddr) (frames [][]byte) {
	guest, gateway, host := ipv6("172.16.0.2"), ipv6("172.16.0.1"), ipv6("10.0.8.1")
	icmp := func(from net.HardwareAddr, source, to string, message []byte) {
		frames = append(frames, frame(from, unix.ETH_P_IPV6, packet6(source, to, unix.IPPROTO_ICMPV6, message)))
	}
	// A solicitation or advertisement about a target, with an option for a MAC address.
	about := func(message byte, target string, option byte, mac net.HardwareAddr) []byte {
		return slices.Concat([]byte{message, 0, 0, 0, 0x60, 0, 0, 0}, []byte(net.ParseIP(target)), []byte{option, 1}, []byte(mac))
	}
	// A router for an hour, with a prefix for all to have addresses in.
	router := slices.Concat([]byte{134, 0, 0, 0, 64, 0, 0x0e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0},
		[]byte(net.ParseIP("2001:db8:66::")))
	const solicitation, advertisement, source, target = 135, 136, 1, 2
	icmp(own, guest, gateway, about(advertisement, gateway, target, own))
	icmp(own, guest, gateway, about(advertisement, host, target, own))
	icmp(own, guest, gateway, about(advertisement, guest, target, foreign))
	icmp(foreign, guest, gateway, about(advertisement, guest, target, foreign))
	icmp(own, guest, gateway, about(solicitation, gateway, source, foreign))
	icmp(own, ipv6("172.16.0.3"), gateway, about(solicitation, gateway, source, own))
	for i := range 100 { // and so on until the kernel's table is full
		icmp(own, fmt.Sprintf("fe80::66:%d", i), gateway, about(solicitation, gateway, source, own))
	}
	for _, from := range []string{guest, linkLocalOf(own).String(), "fe80::66"} {
		icmp(own, from, "ff02::1", router)
		icmp(own, from, "ff02::1", slices.Concat([]byte{137, 0, 0, 0, 0, 0, 0, 0}, []byte(net.ParseIP(guest)), []byte(net.ParseIP(ipv6("10.0.8.2")))))
		// behind another header, as which it would not be known at first sight
		hidden := packet6(from, "ff02::1", unix.IPPROTO_ICMPV6, router)
		frames = append(frames, frame(own, unix.ETH_P_IPV6,
			packet6(from, "ff02::1", unix.IPPROTO_DSTOPTS, slices.Concat([]byte{unix.IPPROTO_ICMPV6, 0, 1, 4, 0, 0, 0, 0}, hidden[40:]))))
	}
	return frames
}

// TestGuestCannotSpoof lets a guest send with the addresses of others.
func TestGuestCannotSpoof(t *testing.T) {
	need.Root(t)
	byBoth(t, testGuestCannotSpoof)
}

func testGuestCannotSpoof(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	own, foreign := mac(testConfig().NamespaceInterfaceMAC), mac("02:00:00:00:00:66")
	if err := GuardGuest("ark0", Guest{MAC: own.String()}); err != nil {
		t.Fatal(err)
	}
	listen(t, testhost.Outside, v("192.0.2.254:80"), "outside")
	giveRoute(t, testhost.Outside, v("10.0.8.0/21"), net.ParseIP(v("192.0.2.1")))
	if got := ask(t, guest, v("udp4"), v("192.0.2.254:80")); got != v("outside to 192.0.2.1") {
		t.Fatalf("the guest reaches outside: %q", got)
	}
	arrived := capture(t, testhost.Outside)
	send(t, guest,
		ipFrame(own, packet(v("203.0.113.7"), unix.IPPROTO_UDP, udp(1001))),
		ipFrame(own, packet(v("10.0.15.2"), unix.IPPROTO_UDP, udp(1002))),
		ipFrame(own, packet(v("172.16.0.1"), unix.IPPROTO_UDP, udp(1003))),
		ipFrame(own, packet(v("192.0.2.1"), unix.IPPROTO_UDP, udp(1004))),
		ipFrame(foreign, packet(v("172.16.0.2"), unix.IPPROTO_UDP, udp(1005))),
		// What is no connection gets no other source: it must not go out with the guest's own,
		// which is everyone's.
		ipFrame(own, packet(v("172.16.0.2"), unix.IPPROTO_TCP, tcp(1000, 1006, 0x04 /* RST */))),
		ipFrame(own, packet(v("172.16.0.2"), unix.IPPROTO_UDP, udp(1007))),
	)
	for from := range arrived {
		if from == v("192.0.2.1 port 1007") { // the one that may; frames keep their order
			break
		}
		if strings.Contains(from, " port 10") {
			t.Errorf("left the host: from %s", from)
		}
	}

	// The neighbour table of the namespace believes nobody but the guest.
	if v("172.16.0.2") == "172.16.0.2" {
		send(t, guest,
			frame(own, unix.ETH_P_ARP, arp(2, foreign, "172.16.0.2", "172.16.0.1")),
			frame(foreign, unix.ETH_P_ARP, arp(1, foreign, "172.16.0.2", "172.16.0.1")),
			frame(own, unix.ETH_P_ARP, arp(1, own, "172.16.0.3", "172.16.0.1")),
			frame(own, unix.ETH_P_ARP, arp(1, own, "10.0.8.1", "10.0.8.2")),
		)
	} else {
		send(t, guest, discoveryOfOthers(own, foreign)...)
	}
	if got := ask(t, guest, v("udp4"), v("192.0.2.254:80")); got == "" {
		t.Error("the guest does not reach outside any more")
	}
	err := inNamespace("ark0", func() error {
		link, err := netlink.LinkByName("tap0")
		if err != nil {
			return err
		}
		neighbours, err := netlink.NeighList(link.Attrs().Index, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, n := range neighbours {
			known := n.IP.Equal(net.IPv4(172, 16, 0, 2)) || n.IP.Equal(net.ParseIP(ipv6("172.16.0.2"))) || n.IP.Equal(linkLocalOf(own))
			if len(n.HardwareAddr) != 0 && !n.IP.IsMulticast() && (!known || n.HardwareAddr.String() != own.String()) {
				t.Errorf("the namespace believes that %s is at %s", n.IP, n.HardwareAddr)
			}
		}
		routes, err := netlink.RouteList(nil, netlink.FAMILY_V6)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Gw != nil && !r.Gw.Equal(net.ParseIP(ipv6("10.0.8.1"))) {
				t.Errorf("the namespace has a route %s", r)
			}
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
		if len(addrs) != 2 {
			t.Errorf("the tap has the addresses %v", addrs)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}

	// The next guest may have another MAC address.
	if err := GuardGuest("ark0", Guest{MAC: foreign.String()}); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, guest, v("udp4"), v("192.0.2.254:80")); got != "" {
		t.Errorf("another MAC address: %q", got)
	}
	for _, bad := range []string{"x", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"} {
		if err := GuardGuest("ark0", Guest{MAC: bad}); err == nil || !strings.Contains(err.Error(), "is not that of one interface") {
			t.Errorf("MAC address %q: %v", bad, err)
		}
	}
	if err := GuardGuest(testhost.Outside, Guest{MAC: own.String()}); err != nil {
		t.Errorf("a namespace that no NAT made: %v", err)
	}
	err = inNamespace(testhost.Outside, func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := conn.ListTables()
		if len(tables) != 0 {
			t.Errorf("a namespace that no NAT made got tables: %v", tables)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// tracked returns how many connections a namespace tracks, "" for the host.
func tracked(t *testing.T, ns string) (count int) {
	t.Helper()
	read := func() error {
		b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		if err != nil {
			return err
		}
		count, err = strconv.Atoi(strings.TrimSpace(string(b)))
		return err
	}
	err := error(nil)
	if ns == "" {
		err = read()
	} else {
		err = inNamespace(ns, read)
	}
	if err != nil {
		t.Fatal(err)
	}
	return count
}

// TestConnectionLimit floods the host's connection tracking with connections of one guest.
func TestConnectionLimit(t *testing.T) {
	need.Root(t)
	byBoth(t, testConnectionLimit)
}

func testConnectionLimit(t *testing.T, v func(string) string) {
	const limit, flood = 200, 1000
	c := testConfig()
	c.MaxConnections = limit
	startNAT(t, c)
	guest, other := attachGuest(t, "ark0"), attachGuest(t, "ark1")
	listen(t, testhost.Outside, v("192.0.2.254:80"), "outside")
	listen(t, guest, v("172.16.0.2:80"), "guest")
	// A connection from before shows when the flood has gone through: frames keep their order.
	var before net.Conn
	if err := inNamespace(guest, func() (err error) { before, err = net.Dial(v("udp4"), v("192.0.2.254:80")); return err }); err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	settle := func() {
		t.Helper()
		before.SetDeadline(time.Now().Add(10 * time.Second))
		fmt.Fprintln(before, "hello")
		if _, err := before.Read(make([]byte, 100)); err != nil {
			t.Fatalf("a connection from before the flood: %v", err)
		}
	}
	settle()
	hostBefore, namespaceBefore := tracked(t, ""), tracked(t, "ark0")
	from := v("172.16.0.2")
	own := mac(testConfig().NamespaceInterfaceMAC)
	for name, payload := range map[string]func(i int) (byte, []byte){
		"udp":  func(i int) (byte, []byte) { return unix.IPPROTO_UDP, udp(uint16(2000 + i)) },
		"icmp": func(i int) (byte, []byte) { return unix.IPPROTO_ICMP, echo(uint16(i)) },
		"syn": func(i int) (byte, []byte) {
			return unix.IPPROTO_TCP, tcp(1000, uint16(2000+i), 0x02 /* SYN */)
		},
		"ack": func(i int) (byte, []byte) {
			return unix.IPPROTO_TCP, tcp(1001, uint16(2000+i), 0x10 /* ACK */)
		},
		"sctp": func(i int) (byte, []byte) { return unix.IPPROTO_SCTP, udp(uint16(2000 + i)) },
	} {
		var frames [][]byte
		for i := range flood {
			protocol, data := payload(i)
			frames = append(frames, ipFrame(own, packet(from, protocol, data)))
		}
		for some := range slices.Chunk(frames, 100) {
			send(t, guest, some...)
			settle() // so that no queue overflows
		}
		if n := tracked(t, "") - hostBefore; n > limit {
			t.Errorf("after a flood of %s the host tracks %d more connections", name, n)
		}
		if n := tracked(t, "ark0") - namespaceBefore; n > limit {
			t.Errorf("after a flood of %s the namespace tracks %d more connections", name, n)
		}
	}
	// Others are not concerned, nor is who connects to the guest.
	if got := ask(t, other, v("tcp4"), v("192.0.2.254:80")); got != v("outside to 192.0.2.1") {
		t.Errorf("another guest reaches outside: %q", got)
	}
	if got := ask(t, "", v("tcp4"), v("10.0.15.1:80")); !strings.HasPrefix(got, "guest to ") {
		t.Errorf("the host reaches the guest: %q", got)
	}

	const timeout = "net/netfilter/nf_conntrack_udp_timeout"
	shorten := func() error { return setSysctl(timeout, "1") }
	if err := errors.Join(shorten(), inNamespace("ark1", shorten)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { setSysctl(timeout, "30") }) // the kernel's own
	// The host counts by itself: what comes from within the namespace does not pass the namespace's
	// own rules.
	hostBefore = tracked(t, "")
	err := inNamespace("ark1", func() error {
		socket, err := net.ListenUDP(v("udp4"), &net.UDPAddr{IP: net.ParseIP(v("10.0.15.2"))})
		if err != nil {
			return err
		}
		defer socket.Close()
		for i := range flood {
			if _, err := socket.WriteToUDP([]byte("x"), &net.UDPAddr{IP: net.ParseIP(v("192.0.2.254")), Port: 2000 + i}); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := tracked(t, "") - hostBefore; n > limit {
		t.Errorf("after a flood from the namespace itself the host tracks %d more connections", n)
	}

	// Connections that have ended make room.
	deadline := time.Now().Add(time.Minute)
	for ask(t, other, v("udp4"), v("192.0.2.254:80")) == "" {
		if time.Now().After(deadline) {
			t.Fatal("the limit stays reached after the connections have ended")
		}
	}
}

// TestConnectionShare makes sure that all guests together leave half of the host's connection
// tracking free.
func TestConnectionShare(t *testing.T) {
	need.Root(t)
	if n := startNAT(t, testConfig()); n.ConnectionLimit() != mostConnections {
		t.Errorf("of 2 guests each may have %d connections", n.ConnectionLimit())
	}
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		t.Fatal(err)
	}
	size, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	for _, guests := range []int{100, size} {
		n := &NAT{layout: &layout{count: guests}}
		if limit, err := n.connectionLimit(); err != nil || limit != max(1, size/3/guests) {
			t.Errorf("of %d guests each may have %d connections, %v; the host tracks %d", guests, limit, err, size)
		}
	}
}

// TestNeighbour tries what somebody on the host's network reaches: what is forwarded, and nothing
// else.
func TestNeighbour(t *testing.T) {
	need.Root(t)
	byBoth(t, testNeighbour)
}

func testNeighbour(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	lan := attachLAN(t)
	guest := attachGuest(t, "ark0")
	listen(t, guest, v("172.16.0.2:80"), "guest")
	f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: possible(
		forwardTo("ark0", "tcp", v("192.0.2.1:3333")), forwardTo("ark0", "udp", v("192.0.2.1:3333")),
		forwardTo("ark0", "tcp", v("127.0.0.1:4444")), forwardTo("ark0", "udp", v("127.0.0.1:4444")),
	)})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// What a hostile neighbour would do: route the host's inner addresses, and even its loopback
	// addresses, to it.
	giveRoute(t, testhost.Outside, v("10.0.8.0/21"), net.ParseIP(v("192.0.2.1")))
	giveRoute(t, testhost.Outside, v("127.0.0.1/32"), net.ParseIP(v("192.0.2.1")))
	giveRoute(t, testhost.Outside, v("172.16.0.0/30"), net.ParseIP(v("192.0.2.1")))
	err = inNamespace(testhost.Outside, func() error { return setSysctl("net/ipv4/conf/eth0/route_localnet", "1") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		inNamespace(testhost.Outside, func() error { return setSysctl("net/ipv4/conf/eth0/route_localnet", "0") })
	})
	var wait sync.WaitGroup
	for _, tt := range []struct{ ns, addr, want string }{
		{testhost.Outside, v("192.0.2.1:3333"), v("guest to 192.0.2.254")},
		{testhost.Outside, v("10.0.15.1:80"), ""},
		{testhost.Outside, v("10.0.8.2:80"), ""},
		{testhost.Outside, v("172.16.0.2:80"), ""},
		{testhost.Outside, v("127.0.0.1:4444"), ""},
		{lan, v("192.0.2.1:3333"), v("guest to 198.51.100.2")},
		{lan, v("10.0.15.1:80"), ""},
		{lan, v("10.0.8.2:80"), ""},
		{"", v("10.0.15.1:80"), v("guest to 10.0.8.1")},
		{"", v("10.0.8.2:80"), v("guest to 10.0.8.1")},
		{"", v("127.0.0.1:4444"), v("guest to 10.0.8.1")},
	} {
		for _, network := range []string{v("tcp4"), v("udp4")} {
			wait.Go(func() {
				if got := ask(t, tt.ns, network, tt.addr); got != tt.want && asks(network, tt.addr) {
					t.Errorf("%s from %q to %s: %q; want %q", network, tt.ns, tt.addr, got, tt.want)
				}
			})
		}
	}
	wait.Wait()
}

// TestICMPErrors makes sure that errors about a guest's packets reach it: path MTU discovery needs
// them.
func TestICMPErrors(t *testing.T) {
	need.Root(t)
	byBoth(t, testICMPErrors)
}

func testICMPErrors(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	if err := GuardGuest("ark0", Guest{MAC: testConfig().NamespaceInterfaceMAC}); err != nil {
		t.Fatal(err)
	}
	err := inNamespace(guest, func() error {
		c, err := net.Dial(v("udp4"), v("192.0.2.254:9")) // nobody listens: the host outside answers by ICMP
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
			return fmt.Errorf("the guest hears %w", err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestPortShadow lets a guest send to a client of others from their port: what the client then
// sends to that port must not be taken for an answer.
func TestPortShadow(t *testing.T) {
	need.Root(t)
	byBoth(t, testPortShadow)
}

func testPortShadow(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	guest0, guest1 := attachGuest(t, "ark0"), attachGuest(t, "ark1")
	listen(t, guest1, v("172.16.0.2:80"), "guest1")
	listen(t, "", v("192.0.2.1:26820"), "host")
	f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: []PortForward{
		forwardTo("ark1", "tcp", v("192.0.2.1:26379")), forwardTo("ark1", "udp", v("192.0.2.1:26379")),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	own := mac(testConfig().NamespaceInterfaceMAC)
	arrived := capture(t, testhost.Outside)
	for i, tt := range []struct {
		victim uint16
		want   string
	}{{26820, v("host to 192.0.2.254")}, {26379, v("guest1 to 192.0.2.254")}} {
		client := 41000 + uint16(i)
		datagram := udp(client)
		binary.BigEndian.PutUint16(datagram, tt.victim)
		send(t, guest0,
			ipFrame(own, packet(v("172.16.0.2"), unix.IPPROTO_UDP, datagram)),
			ipFrame(own, packet(v("172.16.0.2"), unix.IPPROTO_TCP, tcp(tt.victim, client, 0x02 /* SYN */))),
			ipFrame(own, packet(v("172.16.0.2"), unix.IPPROTO_UDP, udp(client+100))))
		for from := range arrived {
			if from == fmt.Sprintf(v("192.0.2.1 port %d"), client+100) { // frames keep their order
				break
			}
		}
		addr := v(fmt.Sprintf("192.0.2.1:%d", tt.victim))
		for network, local := range map[string]net.Addr{v("udp4"): &net.UDPAddr{Port: int(client)}, v("tcp4"): &net.TCPAddr{Port: int(client)}} {
			if got := askFrom(t, testhost.Outside, network, addr, local); got != tt.want {
				t.Errorf("%s from the client to %s: %q; want %q", network, addr, got, tt.want)
			}
		}
	}
}

// TestInherit gives a namespace to a second guest, after the first one has given it back, and after
// it was killed.
func TestInherit(t *testing.T) {
	need.Root(t)
	byBoth(t, testInherit)
}

func testInherit(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	listen(t, testhost.Outside, v("192.0.2.254:80"), "outside")
	f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: []PortForward{forwardTo("ark0", "tcp", v("192.0.2.1:3333"))}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	other := attachGuest(t, "ark1")
	// Earlier tests have used these addresses, too.
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, other, v("udp4"), v("192.0.2.254:80")); got == "" {
		t.Fatal("another guest does not reach outside")
	}
	hostBefore, namespaceBefore := tracked(t, ""), tracked(t, "ark0")
	for _, killed := range []bool{false, true} {
		t.Run(fmt.Sprintf("killed %v", killed), func(t *testing.T) {
			claim, err := ClaimNamespace("ark0")
			if err != nil {
				t.Fatal(err)
			}
			guest := attachGuest(t, "ark0")
			listen(t, guest, v("172.16.0.2:80"), "guest")
			for _, network := range []string{v("tcp4"), v("udp4")} {
				if ask(t, guest, network, v("192.0.2.254:80")) == "" || ask(t, "", network, v("10.0.15.1:80")) == "" || ask(t, "", network, v("10.0.8.2:80")) == "" {
					t.Fatal("the guest is not connected")
				}
			}
			if got := ask(t, testhost.Outside, v("tcp4"), v("192.0.2.1:3333")); got == "" {
				t.Fatal("the guest is not reached from outside")
			}
			if tracked(t, "") == hostBefore || tracked(t, "ark0") == namespaceBefore {
				t.Fatal("no connection of the guest is tracked")
			}
			if killed {
				err = errors.Join(claim.lock.Release(), GuardGuest("ark0", Guest{MAC: testConfig().NamespaceInterfaceMAC}))
			} else {
				err = claim.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
			if host, namespace := tracked(t, ""), tracked(t, "ark0"); host != hostBefore || namespace != namespaceBefore {
				t.Errorf("the host tracks %d connections and the namespace %d; before the guest %d and %d", host, namespace, hostBefore, namespaceBefore)
			}
		})
	}
}

// TestNoRouter makes sure that a host that did not forward becomes no router between its other
// networks, and that the last NAT restores that.
func TestNoRouter(t *testing.T) {
	need.Root(t)
	byBoth(t, testNoRouter)
}

func testNoRouter(t *testing.T, v func(string) string) {
	lan := attachLAN(t)
	guest := func(ns string) { listen(t, attachGuest(t, ns), v("172.16.0.2:80"), ns) }
	listen(t, lan, v("198.51.100.2:80"), "lan")
	listen(t, testhost.Outside, v("192.0.2.254:80"), "outside")
	giveRoute(t, testhost.Outside, v("198.51.100.0/24"), net.ParseIP(v("192.0.2.1")))
	start := func(c NATConfig) *NAT {
		t.Helper()
		n, err := StartNAT(context.Background(), c)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	first := start(testConfig())
	second := start(otherConfig())
	guest("bee0")
	// What Docker does for a published port.
	publish, err := newRuleset(nftables.TableFamilyINet, "published")
	if err != nil {
		t.Fatal(err)
	}
	publish.rule(publish.chain(hookIncoming), toAddress(subnet(v("192.0.2.1/32"))), toPort("tcp", 8080), destinationNAT(net.ParseIP(v("198.51.100.2")), 80))
	if err := publish.apply(); err != nil {
		t.Fatal(err)
	}
	defer shell(t, "nft delete table inet published")
	f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.1.8.0/22", PortForwards: []PortForward{forwardTo("bee0", "tcp", v("192.0.2.1:3333"))}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	check := func() {
		t.Helper()
		for _, tt := range []struct{ ns, addr, want string }{
			{testhost.Outside, v("198.51.100.2:80"), ""},
			{lan, v("192.0.2.254:80"), ""},
			{testhost.Outside, v("192.0.2.1:8080"), v("lan to 192.0.2.254")},
			{testhost.Outside, v("192.0.2.1:3333"), v("bee0 to 192.0.2.254")},
			{"guest-bee0", v("192.0.2.254:80"), v("outside to 192.0.2.1")},
		} {
			if got := ask(t, tt.ns, v("tcp4"), tt.addr); got != tt.want {
				t.Errorf("from %s to %s: %q; want %q", tt.ns, tt.addr, got, tt.want)
			}
		}
	}
	check()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	check() // the second one goes on
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if b, err := os.ReadFile("/proc/sys/net/" + name); err != nil || string(b) != "0\n" {
			t.Errorf("after both NATs %s is %q, %v", name, b, err)
		}
	}
}

// TestBridged has a bridge on the host, whose packets pass netfilter's rules (br_netfilter): what it
// connects stays so, although the host forwards nothing between its interfaces.
func TestBridged(t *testing.T) {
	need.Root(t)
	if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
		t.Log("this kernel shows netfilter no packets of bridges")
	} else {
		shell(t, "sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1")
	}
	shell(t, "ip link add others0 type bridge && ip link set others0 up")
	t.Cleanup(func() { shell(t, "ip link del others0") })
	for i, name := range []string{"left", "right"} {
		shell(t, fmt.Sprintf("ip netns add %[1]s && ip link add port%[2]d type veth peer name eth0 netns %[1]s && ip link set port%[2]d master others0 up", name, i))
		t.Cleanup(func() { shell(t, fmt.Sprintf("ip link del port%d; ip netns del %s", i, name)) })
		for _, addr := range []string{fmt.Sprintf("198.51.100.%d/24", i+1), ipv6(fmt.Sprintf("198.51.100.%d/24", i+1)) + " nodad"} {
			shell(t, "ip -n "+name+" address add "+addr+" dev eth0 && ip -n "+name+" link set eth0 up")
		}
	}
	listen(t, "right", "198.51.100.2:80", "right")
	listen(t, "right", ipv6("198.51.100.2:80"), "right")
	startNAT(t, testConfig())
	startNAT(t, otherConfig())
	for _, addr := range []string{"198.51.100.2:80", ipv6("198.51.100.2:80")} {
		if got := ask(t, "left", over("tcp", addr), addr); !strings.HasPrefix(got, "right to ") {
			t.Errorf("over the bridge to %s: %q", addr, got)
		}
	}
}

// TestOverlap starts a NAT with subnets of another one, or to which the host has a route already.
func TestOverlap(t *testing.T) {
	need.Root(t)
	startNAT(t, testConfig())
	giveRoute(t, "", "10.3.8.4/30", net.IPv4(192, 0, 2, 254))
	giveRoute(t, "", "10.4.0.0/16", net.IPv4(192, 0, 2, 254))
	before := inventory(t)
	for _, tt := range []struct{ host, namespace, want string }{
		{"10.1.8.0/22", "10.0.15.0/24", "--namespace-veth-cidr 10.0.15.0/24 overlaps with 10.0.15.0/24 of the NAT for namespaces ark"},
		{"10.0.8.128/25", "10.1.15.0/24", "--host-veth-cidr 10.0.8.128/25 overlaps with 10.0.8.0/22"},
		{"10.1.8.0/22", "10.0.10.0/24", "overlaps with 10.0.8.0/22"},
		{"10.0.15.0/25", "10.1.15.0/24", "overlaps with"},
		{"10.3.8.0/22", "10.1.15.0/24", "--host-veth-cidr 10.3.8.0/22 is routed elsewhere: to 10.3.8.4/30"},
		{"10.1.8.0/22", "10.3.8.0/24", "is routed elsewhere"},
		{"10.4.8.0/22", "10.4.15.0/24", ""}, // only a wider route
	} {
		c := otherConfig()
		c.HostVethCIDR, c.NamespaceVethCIDR = tt.host, tt.namespace
		n, err := StartNAT(context.Background(), c)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s and %s: %v; want %q", tt.host, tt.namespace, err, tt.want)
		}
		if err == nil {
			err = n.Close()
		} else {
			err = nil
		}
		if after := inventory(t); err != nil || after != before {
			t.Errorf("%v; left behind:\n%s\nbefore:\n%s", err, after, before)
		}
	}
}

// TestOverlapWithKilled starts a NAT with the subnets of one that was killed, by another name.
func TestOverlapWithKilled(t *testing.T) {
	need.Root(t)
	c := testConfig()
	c.NamespacePrefix = "bee"
	refused := func(want string) {
		t.Helper()
		if _, err := StartNAT(context.Background(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	n, err := StartNAT(context.Background(), testConfig())
	if err != nil {
		t.Fatal(err)
	}
	refused("of the NAT for namespaces ark…; choose another")
	abandon(t, n)
	refused("of the NAT for namespaces ark…; it was killed: start it again with --namespace-prefix ark")
	if n, err = StartNAT(context.Background(), testConfig()); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
}

// checkedContext checks something whenever it is asked whether it has ended.
type checkedContext struct {
	context.Context
	check func()
}

func (c checkedContext) Err() error { c.check(); return c.Context.Err() }

// TestRecordedNamespaces makes sure that a NAT removes no namespace that it has not made: "ark1"
// and "ark" both have an ark10.
func TestRecordedNamespaces(t *testing.T) {
	need.Root(t)
	// At any time, a killed NAT has noted nothing that it has not made.
	c := testConfig()
	c.NamespaceCount = 3
	checked := 0
	ctx := checkedContext{context.Background(), func() {
		records, err := natRecords()
		if err != nil || len(records) != 1 {
			t.Fatalf("records %v, %v", records, err)
		}
		for _, name := range records[0].Namespaces {
			checked++
			if _, err := os.Stat(netnsDir + "/" + name); err != nil {
				t.Errorf("noted: %v", err)
			}
		}
	}}
	n, err := StartNAT(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if checked == 0 {
		t.Error("no namespace was noted")
	}

	// A NAT was killed between its note and the namespace; then another one made that.
	c = otherConfig()
	c.NamespacePrefix, c.NamespaceCount = "ark1", 1
	killed := &NAT{config: c, record: natRecord{Config: c, Namespaces: []string{"ark10"}, IPForward: "1"}}
	if err := os.MkdirAll(rundir.Path, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := killed.writeRecord(); err != nil {
		t.Fatal(err)
	}
	c = testConfig()
	c.NamespaceCount = 11
	if n, err = StartNAT(context.Background(), c); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(os.Remove(killed.recordPath()), n.Close(), rundir.Remove()); err != nil {
			t.Error(err)
		}
	}()
	if _, err := StartNAT(context.Background(), killed.config); err == nil || !strings.Contains(err.Error(), `"ark10" exists and is not ours`) {
		t.Errorf("a second NAT with the same namespace: %v", err)
	}
	if _, err := os.Stat(netnsDir + "/ark10"); err != nil {
		t.Errorf("the other NAT's namespace: %v", err)
	}
}

// echoServer answers all that it hears on TCP connections to addr in a namespace, "" for the host.
func echoServer(t *testing.T, ns, addr string) {
	t.Helper()
	var l net.Listener
	start := func() (err error) { l, err = net.Listen(over("tcp", addr), addr); return err }
	err := error(nil)
	if ns == "" {
		err = start()
	} else {
		err = inNamespace(ns, start)
	}
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	var open []net.Conn
	accepted := make(chan struct{})
	go func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			open = append(open, c)
			wait.Go(func() {
				io.Copy(c, c)
				c.Close()
			})
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-accepted
		for _, c := range open {
			c.Close()
		}
		wait.Wait()
	})
}

// TestStale makes sure that connections end with the permission that let them in.
func TestStale(t *testing.T) {
	need.Root(t)
	byBoth(t, testStale)
}

func testStale(t *testing.T, v func(string) string) {
	c := testConfig()
	c.AllowHost = []string{"26022/tcp"}
	n, err := StartNAT(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	guest := attachGuest(t, "ark0")
	echoServer(t, guest, v("172.16.0.2:80"))
	echoServer(t, "", v("192.0.2.1:26022"))
	dial := func(ns, addr string) (conn net.Conn) {
		t.Helper()
		if err := inNamespace(ns, func() (err error) { conn, err = net.DialTimeout(v("tcp4"), addr, 2*time.Second); return err }); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	answers := func(conn net.Conn) bool {
		conn.SetDeadline(time.Now().Add(time.Second))
		fmt.Fprint(conn, "x")
		_, err := conn.Read(make([]byte, 1))
		return err == nil
	}
	start := func(external string) *Forwarder {
		t.Helper()
		f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: []PortForward{forwardTo("ark0", "tcp", external)}})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	ended, killed, stays := start(v("192.0.2.1:3333")), start(v("192.0.2.1:4444")), start(v("192.0.2.1:5555"))
	viaEnded, viaKilled, viaStays := dial(testhost.Outside, v("192.0.2.1:3333")), dial(testhost.Outside, v("192.0.2.1:4444")), dial(testhost.Outside, v("192.0.2.1:5555"))
	if !answers(viaEnded) || !answers(viaKilled) || !answers(viaStays) {
		t.Fatal("a forward does not answer")
	}
	if err := ended.Close(); err != nil {
		t.Fatal(err)
	}
	for _, socket := range killed.reserved {
		socket.Close()
	}
	endWatch(t, &killed.watch)
	// As after kill -9: the lock's file stays.
	if err := killed.lock.Abandon(); err != nil {
		t.Fatal(err)
	}
	if err := start(v("192.0.2.1:6666")).Close(); err != nil {
		t.Fatal(err)
	}
	if answers(viaEnded) || answers(viaKilled) {
		t.Error("a connection through a forward outlives it")
	}
	if !answers(viaStays) {
		t.Error("a connection through another forward has ended")
	}

	toHost := dial(guest, v("192.0.2.1:26022"))
	if !answers(toHost) {
		t.Fatal("the host does not answer")
	}
	claim, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	restart := func() {
		t.Helper()
		abandon(t, n)
		if n, err = StartNAT(context.Background(), c); err != nil {
			t.Fatal(err)
		}
	}
	restart()
	if !answers(toHost) || !answers(viaStays) {
		t.Error("a connection ended although it is permitted still")
	}
	c.AllowHost = nil
	restart()
	if answers(toHost) {
		t.Error("a connection to the host outlives its --allow-host")
	}
	if err := errors.Join(stays.Close(), claim.Close(), n.Close()); err != nil {
		t.Error(err)
	}
}

// TestClosedConnections lets a guest open and close connections as fast as it can: those that have
// ended stay tracked, but are not among those that count.
func TestClosedConnections(t *testing.T) {
	need.Root(t)
	byBoth(t, testClosedConnections)
}

func testClosedConnections(t *testing.T, v func(string) string) {
	const limit = 40
	c := testConfig()
	c.MaxConnections = limit
	startNAT(t, c)
	guest := attachGuest(t, "ark0")
	listen(t, testhost.Outside, v("192.0.2.254:80"), "outside")
	start, opened := time.Now(), 0
	for range 4 * limit {
		err := inNamespace(guest, func() error {
			conn, err := net.DialTimeout(v("tcp4"), v("192.0.2.254:80"), 100*time.Millisecond)
			if conn == nil {
				return nil // dropped
			}
			opened++
			conn.(*net.TCPConn).SetLinger(0) // by RST
			return errors.Join(err, conn.Close())
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// Dropped SYNs are sent again, so that the guest opens as many as it may.
	if most := openRate(limit) * (2 + int(time.Since(start).Seconds())); opened == 0 || opened > most {
		t.Errorf("the guest opened %d connections in %s; at most %d are expected", opened, time.Since(start), most)
	}
	tracks := func() error {
		const timeWait, closed = 7, 8 // nf_conntrack_tcp.h
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		for _, f := range flows {
			state, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP)
			if ok && (state.State == timeWait || state.State == closed) && f.Forward.DstIP.String() == outside && f.Forward.SrcIP.String() != "192.0.2.1" && f.TimeOut > closedTimeout {
				t.Errorf("an ended connection stays tracked: %s", f)
			}
		}
		return err
	}
	if err := errors.Join(tracks(), inNamespace("ark0", tracks)); err != nil {
		t.Fatal(err)
	}
}

// TestTapRenewed lets a VMM that was broken into do to its tap what its descriptor allows. The next
// VM has a tap as from the NAT.
func TestTapRenewed(t *testing.T) {
	need.Root(t)
	byBoth(t, testTapRenewed)
}

func testTapRenewed(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	listen(t, testhost.Outside, v("192.0.2.254:80"), "outside")
	for name, attack := range map[string]func(fd int) error{
		"none":    func(int) error { return nil },
		"removed": func(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 0) },
		"owned":   func(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETOWNER, 12345) },
		"another MAC address": func(fd int) error {
			var ifr [40]byte // struct ifreq: name, then sockaddr
			binary.NativeEndian.PutUint16(ifr[16:], unix.ARPHRD_ETHER)
			copy(ifr[18:], mac("02:00:00:00:00:66"))
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFHWADDR, uintptr(unsafe.Pointer(&ifr)))
			if errno != 0 {
				return errno
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := inNamespace("ark0", func() error {
				fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				ifr, err := unix.NewIfreq("tap0")
				if err != nil {
					return err
				}
				ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
				if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
					return err
				}
				return attack(fd)
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := GuardGuest("ark0", Guest{MAC: testConfig().NamespaceInterfaceMAC}); err != nil {
				t.Fatal(err)
			}
			err = inNamespace("ark0", func() error {
				link, err := netlink.LinkByName("tap0")
				if err != nil {
					return err
				}
				tap := link.(*netlink.Tuntap)
				if tap.NonPersist || tap.HardwareAddr.String() != testConfig().NamespaceInterfaceMAC || tap.Owner == 12345 {
					t.Errorf("the tap is %+v", tap)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			guest := attachGuest(t, "ark0")
			if got := ask(t, guest, v("udp4"), v("192.0.2.254:80")); got != v("outside to 192.0.2.1") {
				t.Errorf("the next guest reaches outside: %q", got)
			}
		})
	}
}

// TestAllowedSubnet opens a subnet that the host has an address in, and another address of the
// host.
func TestAllowedSubnet(t *testing.T) {
	need.Root(t)
	byBoth(t, testAllowedSubnet)
}

func testAllowedSubnet(t *testing.T, v func(string) string) {
	lan := attachLAN(t)
	c := testConfig()
	c.AllowCIDRs = []string{v("198.51.100.0/24"), v("192.0.2.1/32:80/tcp")}
	startNAT(t, c)
	guest := attachGuest(t, "ark0")
	listen(t, lan, v("198.51.100.2:80"), "lan")
	listen(t, "", v("198.51.100.1:80"), "host")
	listen(t, "", v("192.0.2.1:80"), "host")
	for addr, want := range map[string]string{
		v("198.51.100.2:80"): v("lan to 198.51.100.1"), v("198.51.100.1:80"): "", v("192.0.2.1:80"): v("host to 10.0.15.1"),
	} {
		if got := ask(t, guest, v("tcp4"), addr); got != want {
			t.Errorf("%s: %q; want %q", addr, got, want)
		}
	}
}

// TestPortless lets a guest send to a host outside by protocols without ports: what that host then
// sends to this one by the same protocol, a tunnel's packets say, must not be taken for answers.
func TestPortless(t *testing.T) {
	need.Root(t)
	byBoth(t, testPortless)
}

func testPortless(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	own := mac(testConfig().NamespaceInterfaceMAC)
	arrived, sent := capture(t, guest), capture(t, testhost.Outside)
	foreignICMP := byte(unix.IPPROTO_ICMP) // that of the other protocol
	if v("ip4:") == "ip4:" {
		foreignICMP = unix.IPPROTO_ICMPV6
	}
	for _, protocol := range []byte{unix.IPPROTO_IPIP, unix.IPPROTO_GRE, unix.IPPROTO_ESP, unix.IPPROTO_SCTP, unix.IPPROTO_UDPLITE, 253, foreignICMP} {
		mark := 1000 + uint16(protocol)
		payload := binary.BigEndian.AppendUint16([]byte{0, 0}, mark) // where [describe] looks for a port
		send(t, guest, ipFrame(own, packet(v("172.16.0.2"), protocol, append(payload, make([]byte, 28)...))))
		time.Sleep(100 * time.Millisecond) // in which the host would take it for the beginning of a connection
		server, err := net.ListenPacket(fmt.Sprintf(v("ip4:%d"), protocol), v("192.0.2.1"))
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		err = inNamespace(testhost.Outside, func() error {
			c, err := net.Dial(fmt.Sprintf(v("ip4:%d"), protocol), v("192.0.2.1"))
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write(append(payload, make([]byte, 28)...))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		server.SetReadDeadline(time.Now().Add(time.Second))
		if _, _, err := server.ReadFrom(make([]byte, 100)); err != nil {
			t.Errorf("protocol %d: the host does not get what is sent to it: %v", protocol, err)
		}
		time.Sleep(50 * time.Millisecond) // in which a packet would get to where none may come
		for len(arrived) > 0 {
			if from := <-arrived; from == fmt.Sprintf(v("192.0.2.254 port %d"), mark) {
				t.Errorf("protocol %d: the guest gets what is sent to the host", protocol)
			}
		}
		for len(sent) > 0 {
			if from := <-sent; from == fmt.Sprintf(v("192.0.2.1 port %d"), mark) {
				t.Errorf("protocol %d: a guest sends as the host", protocol)
			}
		}
	}
}

// TestAllowedWider opens subnets that closed ones are part of, or the address that a forward is
// published at: neither opens other guests, metadata services, or what the user has closed.
func TestAllowedWider(t *testing.T) {
	need.Root(t)
	byBoth(t, testAllowedWider)
}

func testAllowedWider(t *testing.T, v func(string) string) {
	c := testConfig()
	c.AllowCIDRs = []string{v("10.0.0.0/8"), v("192.0.2.0/24"), "0.0.0.0/0", "fd00::/8"}
	c.BlockedSubnetCIDR, c.BlockedSubnetCIDR6 = "10.9.0.0/16", ipv6("10.9.0.0/16")
	for _, addr := range []string{"169.254.169.254", "10.9.0.1", "10.10.0.1"} {
		giveAddress(t, v(addr+"/32"))
		giveRoute(t, "", v(addr+"/32"), net.ParseIP(v("192.0.2.254")))
		listen(t, testhost.Outside, v(addr+":80"), "outside")
	}
	startNAT(t, c)
	guest0, guest1 := attachGuest(t, "ark0"), attachGuest(t, "ark1")
	listen(t, guest1, v("172.16.0.2:80"), "guest1")
	f, err := StartForwarder(ForwarderConfig{HostVethCIDR: "10.0.8.0/22", PortForwards: []PortForward{forwardTo("ark1", "tcp", v("192.0.2.1:3333"))}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, addr := range []string{v("10.0.15.2:80"), v("10.0.8.6:80"), v("192.0.2.1:3333"), v("169.254.169.254:80"), v("10.9.0.1:80")} {
		if got := ask(t, guest0, v("tcp4"), addr); got != "" {
			t.Errorf("%s: %q", addr, got)
		}
	}
	if got := ask(t, guest0, v("tcp4"), v("10.10.0.1:80")); got != v("outside to 192.0.2.1") {
		t.Errorf("what is opened: %q", got)
	}
}

// TestOthersMasquerade lets another program of the host translate all that leaves it, as those for
// VPNs do: what a guest sends has the ports of guests all the same.
func TestOthersMasquerade(t *testing.T) {
	need.Root(t)
	byBoth(t, testOthersMasquerade)
}

func testOthersMasquerade(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	out, err := exec.Command("nft", "add table inet others; add chain inet others postrouting { type nat hook postrouting priority 100; }; add rule inet others postrouting oifname eth0 masquerade").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("nft", "delete table inet others").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	listen(t, "", v("192.0.2.1:26830"), "host")
	own := mac(testConfig().NamespaceInterfaceMAC)
	arrived := capture(t, testhost.Outside)
	const client = 41500
	datagram := udp(client)
	binary.BigEndian.PutUint16(datagram, 26830)
	send(t, guest,
		ipFrame(own, packet(v("172.16.0.2"), unix.IPPROTO_UDP, datagram)),
		ipFrame(own, packet(v("172.16.0.2"), unix.IPPROTO_UDP, udp(client+100))))
	for from := range arrived {
		if from == fmt.Sprintf(v("192.0.2.1 port %d"), client+100) { // frames keep their order
			break
		}
	}
	if got := askFrom(t, testhost.Outside, v("udp4"), v("192.0.2.1:26830"), &net.UDPAddr{Port: client}); got != v("host to 192.0.2.254") {
		t.Errorf("a client of the host's gets %q", got)
	}
}

package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A client of a guest that is gone, because it was suspended or has moved, must not wait for ever.
// While no VMM is behind the tap, the namespace answers packets for the guest with RST
// (namespaceRules). But a client that waits for the guest sends nothing. So Drafter makes it send:
// a SYN within an existing connection is answered with an ACK, whatever its numbers (RFC 9293,
// 3.10.7.4; RFC 5961, 4.2), and connection tracking lets it pass (nf_conntrack_proto_tcp.c,
// TCP_CONNTRACK_IGNORE). That ACK is answered with an RST that has the right number. A connection
// whose guest is there is not affected.

const (
	tcpSYN    = 0x02
	tcpURG    = 0x20
	tcpSYNACK = 0x12

	tcpEstablished = 3 // nf_conntrack_tcp.h
	tcpCloseWait   = 5
	tcpLastAck     = 6

	// for answers: a client that has just answered waits for 500 ms (tcp_invalid_ratelimit)
	resetPatience = time.Second
	// of an RST through the host, whose connection tracking must see it
	resetTransit = 50 * time.Millisecond
)

// Vacate resets the connections with the namespace's guest, and lets new ones be refused. Call it
// when the VM no longer runs here, even if its VMM is still there: the VM loses its network. Vacate
// does nothing for a namespace that no NAT made.
func (c *Claim) Vacate() error {
	return c.atTap("reset connections", func(config *NATConfig, l *layout) error { return config.vacate(l) })
}

// Occupy undoes Vacate, and a departure that has ended, for a VM that goes on here after all.
// Connections that were reset stay reset.
func (c *Claim) Occupy() error {
	err := takeBack(c.namespace)
	return errors.Join(err, c.atTap("connect the guest", func(config *NATConfig, l *layout) error {
		return l.bringUpTap(config.NamespaceInterface)
	}))
}

// bringUpTap brings up the tap of the calling thread's namespace again. One that is not there is no
// error.
func (l *layout) bringUpTap(name string) error {
	link, err := netlink.LinkByName(name)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	return l.configureTap(link) // the kernel has forgotten its IPv6 addresses
}

// vacate is [Claim.Vacate] within the namespace.
func (c NATConfig) vacate(l *layout) error {
	link, err := netlink.LinkByName(c.NamespaceInterface)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return l.resetConnections() // a VMM may have removed it
	}
	if err == nil {
		err = netlink.LinkSetDown(link)
	}
	if err != nil {
		return fmt.Errorf("take down %s: %w", c.NamespaceInterface, err)
	}
	return l.resetConnections()
}

// atTap runs f in the namespace, if a NAT made it.
func (c *Claim) atTap(what string, f func(*NATConfig, *layout) error) error {
	if c.lock == nil {
		return nil
	}
	config, err := natOf(c.namespace)
	if config == nil || err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(netnsDir, c.namespace)); errors.Is(err, os.ErrNotExist) {
		return nil // the NAT has just ended
	}
	l, err := config.parse()
	if err != nil {
		return err
	}
	if err := inNamespace(c.namespace, func() error { return f(config, l) }); err != nil {
		return fmt.Errorf("%s of network namespace %q: %w", what, c.namespace, err)
	}
	return nil
}

// occupied tells whether a VMM has a tap of the calling thread's namespace.
func occupied(tap string) bool {
	link, err := netlink.LinkByName(tap)
	return err == nil && link.Attrs().RawFlags&unix.IFF_LOWER_UP != 0
}

// vacant tells whether packets for the guest take the route of vacantMetric, in the calling
// thread's namespace. The kernel takes up to a second to notice that a VMM was killed.
func (l *layout) vacant() bool {
	link, err := linkTowards(l.guest)
	return err == nil && link == "lo"
}

// resetConnections resets the TCP connections of the calling thread's namespace that have nobody
// behind the tap.
func (l *layout) resetConnections() error {
	sockets := map[*pool]int{}
	for _, p := range l.pools() {
		socket, err := unix.Socket(p.family(), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(socket)
		sockets[p] = socket
	}
	asked := false
	for deadline := time.Now().Add(resetPatience); ; time.Sleep(10 * time.Millisecond) {
		open := false
		for p, socket := range sockets {
			some, err := p.askClients(socket)
			if err != nil {
				return err
			}
			open = open || some
		}
		asked = asked || open
		if !open || time.Now().After(deadline) {
			break
		}
	}
	if asked {
		time.Sleep(resetTransit)
	}
	return nil
}

// askClients lets the other ends of the guest's open connections send something, and tells whether
// there are any.
func (p *pool) askClients(socket int) (open bool, err error) {
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.InetFamily(p.family()))
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return false, fmt.Errorf("list connections: %w", err)
	}
	for _, f := range flows {
		state, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP)
		if !ok || state.State < tcpEstablished || state.State > tcpCloseWait {
			continue
		}
		// a SYN from the end that opened the connection, a SYN+ACK from the other
		tuple, flags := f.Forward, byte(tcpSYN)
		if f.Reverse.SrcIP.Equal(p.guest) && !f.Forward.SrcIP.Equal(p.guest) {
			tuple, flags = f.Reverse, tcpSYNACK
		}
		if !tuple.SrcIP.Equal(p.guest) {
			continue
		}
		open = true
		ask := segment(tuple.SrcIP, tuple.DstIP, tuple.SrcPort, tuple.DstPort, flags)
		var to unix.Sockaddr = &unix.SockaddrInet6{Addr: [16]byte(tuple.DstIP.To16())}
		if ip := tuple.DstIP.To4(); ip != nil {
			to = &unix.SockaddrInet4{Addr: [4]byte(ip)}
		}
		if err := unix.Sendto(socket, ask, 0, to); err != nil {
			return false, fmt.Errorf("send to %s: %w", tuple.DstIP, err)
		}
	}
	return open, nil
}

// segment is an IPv4 packet (RFC 791) or an IPv6 packet (RFC 8200) with a TCP segment (RFC 9293)
// without data.
func segment(from, to net.IP, fromPort, toPort uint16, flags byte) []byte {
	const size = 20 // bytes of TCP's header, and of IPv4's
	var header []byte
	addresses := slices.Concat(from.To4(), to.To4())
	if len(addresses) > 0 {
		// the kernel fills in length and checksum (raw(7))
		header = append(header, 4<<4|size/4, 0, 0, 0, 0, 0, 0, 0, 64, unix.IPPROTO_TCP, 0, 0)
	} else {
		addresses = slices.Concat(from.To16(), to.To16())
		header = append(header, 6<<4, 0, 0, 0, 0, size, unix.IPPROTO_TCP, 64)
	}
	tcp := make([]byte, size)
	binary.BigEndian.PutUint16(tcp, fromPort)
	binary.BigEndian.PutUint16(tcp[2:], toPort)
	tcp[12], tcp[13] = size/4<<4, flags
	sum := uint32(unix.IPPROTO_TCP + size) // the pseudo header's, with the addresses
	covered := slices.Concat(addresses, tcp)
	for at := 0; at < len(covered); at += 2 {
		sum += uint32(binary.BigEndian.Uint16(covered[at:]))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(tcp[16:], ^uint16(sum+sum>>16))
	return slices.Concat(header, addresses, tcp)
}

package network

import (
	"encoding/binary"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// pool are a layout's addresses of one protocol, IPv4 or IPv6.
type pool struct {
	suffix                           string // of its flags: "", or "6" for IPv6
	hostVeth, namespaceVeth, blocked *net.IPNet
	gateway, guest                   net.IP
	mask                             net.IPMask // of the tap's subnet
}

// poolFlags are what a pool is parsed from.
type poolFlags struct {
	suffix                           string
	hostVeth, namespaceVeth, blocked string
	gateway, guest                   string
	netmask                          int
}

// prefix6 is the unique local prefix (RFC 4193) behind which guests' IPv6 addresses are by default. It
// is alike on every host, as the IPv4 addresses are: what leaves a host has the host's address.
var prefix6 = net.ParseIP("fd0e:d9fd:683d::")

const prefix6Bits = 96 // of 128, and the others are an IPv4 address

// behindPrefix6 is an IPv4 subnet behind prefix6.
func behindPrefix6(n *net.IPNet) *net.IPNet {
	bits, _ := n.Mask.Size()
	return &net.IPNet{IP: slices.Concat(prefix6[:prefix6Bits/8], n.IP.To4()), Mask: net.CIDRMask(prefix6Bits+bits, 128)}
}

func (p *pool) parse(f poolFlags) error {
	p.suffix = f.suffix
	protocol, size := "IPv4", net.IPv4len
	if f.suffix != "" {
		protocol, size = "IPv6", net.IPv6len
	}
	for _, s := range []struct {
		flag, value string
		into        **net.IPNet
	}{
		{"host-veth-cidr", f.hostVeth, &p.hostVeth},
		{"namespace-veth-cidr", f.namespaceVeth, &p.namespaceVeth},
		{"blocked-subnet-cidr", f.blocked, &p.blocked},
	} {
		var err error
		if *s.into, err = parseSubnet(s.flag+f.suffix, s.value, size == net.IPv6len); err != nil {
			return err
		}
	}
	for _, a := range []struct {
		flag, value string
		into        *net.IP
	}{
		{"namespace-interface-gateway", f.gateway, &p.gateway},
		{"namespace-interface-ip", f.guest, &p.guest},
	} {
		ip := net.ParseIP(a.value)
		if size == net.IPv4len {
			ip = ip.To4()
		} else if ip.To4() != nil || !ip.IsGlobalUnicast() {
			ip = nil
		}
		if ip == nil {
			return fmt.Errorf("--%s%s %q is no %s address", a.flag, f.suffix, a.value, protocol)
		}
		*a.into = ip
	}
	if most := 8*size - 2; f.netmask < 1 || f.netmask > most {
		return fmt.Errorf("--namespace-interface-netmask%s is %d; it must be 1 to %d bits", f.suffix, f.netmask, most)
	}
	p.mask = net.CIDRMask(f.netmask, 8*size)
	if tap := (&net.IPNet{IP: p.gateway, Mask: p.mask}); !tap.Contains(p.guest) || p.guest.Equal(p.gateway) {
		return fmt.Errorf("--namespace-interface-ip%s %s must be another address in the subnet of the gateway %s", f.suffix, p.guest, tap)
	}
	return nil
}

// parseSubnet reads a flag's subnet.
func parseSubnet(flag, value string, ip6 bool) (*net.IPNet, error) {
	_, n, err := net.ParseCIDR(value)
	switch {
	case !ip6 && (err != nil || len(n.Mask) != net.IPv4len):
		return nil, fmt.Errorf("--%s %q is no IPv4 subnet; write it as 10.0.8.0/22", flag, value)
	case ip6 && (err != nil || len(n.Mask) != net.IPv6len || !n.IP.IsGlobalUnicast() || n.IP.To4() != nil):
		return nil, fmt.Errorf("--%s %q is no IPv6 subnet; write it as fd00:1::/64", flag, value)
	}
	return n, nil
}

// String tells all that namespaces and guests have of it.
func (p *pool) String() string {
	return fmt.Sprint(p.hostVeth, p.namespaceVeth, p.gateway, p.guest, p.mask)
}

// room is how many namespaces the subnets hold. A subnet's first and last address are not used.
func (p *pool) room() int {
	most := func(n *net.IPNet) int {
		ones, bits := n.Mask.Size()
		return 1 << min(bits-ones, 20)
	}
	return min(most(p.hostVeth)/4, most(p.namespaceVeth)-2, 9999)
}

func (p *pool) hostSide(i int) net.IP      { return addIP(p.hostVeth.IP, 4*i+1) }
func (p *pool) namespaceSide(i int) net.IP { return addIP(p.hostVeth.IP, 4*i+2) }
func (p *pool) namespaceIP(i int) net.IP   { return addIP(p.namespaceVeth.IP, i+1) }

// linkNetwork is an address of a link between host and namespace, in a subnet of four.
func (p *pool) linkNetwork(ip net.IP) *net.IPNet {
	bits := 8 * len(p.hostVeth.Mask)
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(bits-2, bits)}
}

// tapNetwork is the subnet of gateway and guest.
func (p *pool) tapNetwork() *net.IPNet {
	return &net.IPNet{IP: p.gateway.Mask(p.mask), Mask: p.mask}
}

// family is the addresses' of sockets and connections.
func (p *pool) family() int {
	if p.suffix != "" {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// closed are the addresses that no guest reaches unless they are opened.
func (p *pool) closed() []*net.IPNet {
	own := []*net.IPNet{p.hostVeth, p.namespaceVeth, p.blocked}
	if p.suffix != "" {
		return append(own, guarded6...)
	}
	return append(own, guarded...)
}

// publicAddresses have one of each part of the address space that a route may lead to.
func (p *pool) publicAddresses() []net.IP {
	if p.suffix != "" {
		return publicAddresses6
	}
	return publicAddresses
}

// neighbour is the other end of a link as the kernel is told of it.
func (p *pool) neighbour(link netlink.Link, ip net.IP, mac net.HardwareAddr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: p.family(), State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: mac}
}

// setNeighbour tells the kernel of the other end of a link, so that no rule has to let neighbour
// discovery through.
func (p *pool) setNeighbour(link netlink.Link, ip net.IP, mac net.HardwareAddr) error {
	if err := netlink.NeighSet(p.neighbour(link, ip, mac)); err != nil {
		return fmt.Errorf("set neighbour of %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// knows tells whether setNeighbour's work is there.
func (p *pool) knows(link netlink.Link, ip net.IP, mac net.HardwareAddr) (bool, error) {
	all, err := netlink.NeighList(link.Attrs().Index, p.family())
	return slices.ContainsFunc(all, func(n netlink.Neigh) bool {
		return n.IP.Equal(ip) && n.State == netlink.NUD_PERMANENT && slices.Equal(n.HardwareAddr, mac)
	}), err
}

// addIP returns the address n after ip.
func addIP(ip net.IP, n int) net.IP {
	if b := slices.Clone(ip.To4()); b != nil {
		binary.BigEndian.PutUint32(b, binary.BigEndian.Uint32(b)+uint32(n))
		return b
	}
	b := slices.Clone(ip)
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])+uint64(n))
	return b
}

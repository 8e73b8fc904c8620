package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func (n *NAT) createNamespace(i int) error {
	name := n.name(i)
	if err := createNamespace(name); err != nil {
		return err
	}
	if err := inNamespace(name, func() error { return n.config.createTap(n.layout) }); err != nil {
		return fmt.Errorf("set up network namespace %q: %w", name, err)
	}
	return n.connect(i)
}

// connect makes a namespace's link with the host, or the missing parts of it.
func (n *NAT) connect(i int) (err error) {
	name, l := n.name(i), n.layout
	defer func() {
		if err != nil {
			err = fmt.Errorf("connect network namespace %q: %w", name, err)
		}
	}()
	ns, err := netns.GetFromName(name)
	if err != nil {
		return err
	}
	defer ns.Close()
	veth, ours, err := hostVeth(name)
	if veth != nil && ours && !leadsInto(veth, ns) { // but into one that was removed, and is still in use
		if err := netlink.LinkDel(veth); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove %s: %w", hostVethName(name), err)
		}
		veth = nil
	}
	switch {
	case err != nil:
		return err
	case veth == nil:
		attrs := netlink.NewLinkAttrs()
		attrs.Name = hostVethName(name)
		veth = &netlink.Veth{LinkAttrs: attrs, PeerName: namespaceVeth, PeerNamespace: netlink.NsFd(ns)}
		if err = netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("create %s: %w", attrs.Name, err)
		}
		if err := netlink.LinkSetAlias(veth, namespaceMark); err != nil {
			return fmt.Errorf("mark %s: %w", attrs.Name, err)
		}
		if veth, err = netlink.LinkByName(attrs.Name); err != nil { // with its MAC address
			return err
		}
	case !ours:
		return errSomebodysLink(name)
	}
	if veth.Attrs().MasterIndex != 0 {
		if err := netlink.LinkSetNoMaster(veth); err != nil {
			return fmt.Errorf("take %s out of a bridge: %w", hostVethName(name), err)
		}
	}
	for _, p := range n.linkParameters(i) {
		if _, err := keepSysctl(p.name, p.value); err != nil {
			return err
		}
	}
	var addrs []*net.IPNet
	for _, p := range l.pools() {
		addrs = append(addrs, p.linkNetwork(p.hostSide(i)))
	}
	if err := configureLink(veth, addrs...); err != nil {
		return err
	}
	var inside net.HardwareAddr
	err = inNamespace(name, func() (err error) {
		inside, err = n.configureNamespace(i, veth.Attrs().HardwareAddr)
		return err
	})
	if err != nil {
		return err
	}
	for _, p := range l.pools() {
		if err := p.setNeighbour(veth, p.namespaceSide(i), inside); err != nil {
			return err
		}
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: veth.Attrs().Index, Dst: host(p.namespaceIP(i)), Gw: p.namespaceSide(i)}); err != nil {
			return fmt.Errorf("set route to %s: %w", p.namespaceIP(i), err)
		}
	}
	return nil
}

// parameter is a kernel parameter and its value.
type parameter struct{ name, value string }

// linkParameters are the kernel parameters of the host's end of a link. They go with the link.
func (n *NAT) linkParameters(i int) []parameter {
	name := hostVethName(n.name(i))
	return append(n.layout.parameters6(name),
		parameter{"net/ipv4/conf/" + name + "/forwarding", "1"},
		// For forwards from loopback addresses. The host's raw rule guards it.
		parameter{"net/ipv4/conf/" + name + "/route_localnet", "1"})
}

func configureLink(link netlink.Link, addrs ...*net.IPNet) error {
	for _, a := range addrs {
		addr := &netlink.Addr{IPNet: a}
		if a.IP.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD // nobody else has it, and it is needed at once
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("set address of %s to %s: %w", link.Attrs().Name, a, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", link.Attrs().Name, err)
	}
	for _, a := range addrs {
		// The kernel makes it with the address, but not again for an address that is there.
		network := &net.IPNet{IP: a.IP.Mask(a.Mask), Mask: a.Mask}
		if bits, _ := a.Mask.Size(); bits == 32 || a.IP.To4() == nil {
			continue // that of IPv6 is made again
		}
		route := &netlink.Route{
			LinkIndex: link.Attrs().Index, Dst: network, Src: a.IP, Scope: netlink.SCOPE_LINK, Protocol: unix.RTPROT_KERNEL,
		}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("set route to %s: %w", network, err)
		}
	}
	return nil
}

// vacantMetric is the metric of the route that packets for the guest take while nobody is behind
// the tap.
const vacantMetric = 1000

// configureNamespace runs inside the namespace. outside is the MAC address of the host's end of its
// link; that of its own end is returned.
func (n *NAT) configureNamespace(i int, outside net.HardwareAddr) (inside net.HardwareAddr, err error) {
	l := n.layout
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	veth, err := netlink.LinkByName(namespaceVeth)
	if err != nil {
		return nil, err
	}
	for _, p := range append(l.forwardParameters(), l.parameters6(namespaceVeth)...) {
		if _, err := keepSysctl(p.name, p.value); err != nil {
			return nil, err
		}
	}
	var addrs []*net.IPNet
	for _, p := range l.pools() {
		addrs = append(addrs, p.linkNetwork(p.namespaceSide(i)), host(p.namespaceIP(i)))
	}
	err = errors.Join(configureLink(lo), configureLink(veth, addrs...))
	if tap, missing := netlink.LinkByName(n.config.NamespaceInterface); missing == nil {
		err = errors.Join(err, l.configureTap(tap))
	}
	if err != nil {
		return nil, err
	}
	for _, p := range l.pools() {
		if err := p.setNeighbour(veth, p.hostSide(i), outside); err != nil {
			return nil, err
		}
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: veth.Attrs().Index, Gw: p.hostSide(i)}); err != nil {
			return nil, fmt.Errorf("set default route: %w", err)
		}
		vacant := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: p.tapNetwork(), Priority: vacantMetric, Scope: netlink.SCOPE_LINK}
		if p == l.ip6 {
			// By IPv6 the kernel forwards nothing to lo, but answers by itself, and not with RST.
			vacant.LinkIndex, vacant.Scope = veth.Attrs().Index, netlink.SCOPE_UNIVERSE
		}
		if err := netlink.RouteReplace(vacant); err != nil {
			return nil, fmt.Errorf("set route for a guest that is not there: %w", err)
		}
	}
	return veth.Attrs().HardwareAddr, nil
}

// createTap makes the tap inside the namespace.
func (c NATConfig) createTap(l *layout) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = c.NamespaceInterface
	tap := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR, Queues: 0}
	if err := netlink.LinkAdd(tap); err != nil {
		return fmt.Errorf("create %s: %w", c.NamespaceInterface, err)
	}
	if err := netlink.LinkSetHardwareAddr(tap, l.mac); err != nil {
		return fmt.Errorf("set MAC address of %s: %w", c.NamespaceInterface, err)
	}
	return l.configureTap(tap)
}

// configureTap configures the tap inside the namespace.
func (l *layout) configureTap(tap netlink.Link) error {
	name := tap.Attrs().Name
	// Without a VMM behind the tap its route does not count, so clients are refused at once.
	parameters := append(l.parameters6(name), parameter{"net/ipv4/conf/" + name + "/ignore_routes_with_linkdown", "1"})
	addrs := []*net.IPNet{{IP: l.gateway, Mask: l.mask}}
	if l.ip6 != nil {
		parameters = append(parameters, parameter{"net/ipv6/conf/" + name + "/ignore_routes_with_linkdown", "1"})
		addrs = append(addrs, &net.IPNet{IP: l.ip6.gateway, Mask: l.ip6.mask}, tapLinkLocal)
	}
	for _, p := range parameters {
		if _, err := keepSysctl(p.name, p.value); err != nil {
			return err
		}
	}
	return configureLink(tap, addrs...)
}

// renewTap replaces the tap unless a VMM has it. A VMM that was broken into may have changed or
// removed the tap through its descriptor (TUNSETPERSIST, SIOCSIFHWADDR, TUNSETOWNER and others).
func (c NATConfig) renewTap(l *layout) error {
	link, err := netlink.LinkByName(c.NamespaceInterface)
	switch missing := (netlink.LinkNotFoundError{}); {
	case errors.As(err, &missing):
	case err != nil:
		return fmt.Errorf("find %s: %w", c.NamespaceInterface, err)
	case link.Attrs().RawFlags&unix.IFF_LOWER_UP != 0:
		return nil
	default:
		if err := netlink.LinkDel(link); err != nil {
			return fmt.Errorf("remove %s: %w", c.NamespaceInterface, err)
		}
	}
	return c.createTap(l)
}

// guard puts the rules for guests in force, for a namespace and its link.
func (n *NAT) guard(i int) error {
	return inNamespace(n.name(i), func() error {
		err := errors.Join(markNamespace(), n.namespaceRules(i, n.connections))
		if n.layout.ip6 == nil {
			err = errors.Join(err, disableIPv6("all"))
		}
		for _, state := range []string{"time_wait", "close"} {
			err = errors.Join(err, setSysctl("net/netfilter/nf_conntrack_tcp_timeout_"+state, strconv.Itoa(closedTimeout)))
		}
		if err != nil {
			return err
		}
		n.guestTables[i].table = namespaceTable
		return n.guestTables[i].note()
	})
}

// disableIPv6 turns IPv6 off for an interface of the calling thread's namespace, or for all present
// and future ones. A kernel without IPv6 is no error.
func disableIPv6(iface string) error {
	err := setSysctl("net/ipv6/conf/"+iface+"/disable_ipv6", "1")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A link between an anchor and a landing has a name of its own. Neither end has an address: each knows
// the other one's by an entry for a neighbour, so nothing need be asked for.
func toLanding(link string) string  { return landingLinks + link }
func fromAnchor(link string) string { return anchorLinks + link }

const (
	landingLinks = "to-"
	anchorLinks  = "from-"
)

var (
	landingIP  = net.IPv4(169, 254, 77, 2).To4()
	anchorIP   = net.IPv4(169, 254, 77, 1).To4()
	landingIP6 = net.ParseIP("fe80::4d:2")
	anchorIP6  = net.ParseIP("fe80::4d:1")
	landingMAC = net.HardwareAddr{0x02, 0x0e, 0xd9, 0xfd, 0x4d, 2}
	anchorMAC  = net.HardwareAddr{0x02, 0x0e, 0xd9, 0xfd, 0x4d, 1}
)

// landingTables is the first routing table of those in which answers go back to an anchor. A link's
// index is added, which is also the mark of its connections.
const landingTables = 0x0e000000

// connectAnchor makes a link from an anchor to a landing on the same host.
func connectAnchor(anchor, landing, link, tap string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("connect network namespaces %q and %q: %w", anchor, landing, err)
		}
	}()
	if _, err := linkNumber(link); err != nil {
		return err
	}
	there, err := openNamespace(landing)
	if err != nil {
		return err
	}
	defer there.Close()
	err = inNamespace(anchor, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = toLanding(link), anchorMAC
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: fromAnchor(link), PeerHardwareAddr: landingMAC, PeerNamespace: netlink.NsFd(there)}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return configureAnchorLink(veth.Name, landingMAC, landingIP, landingIP6)
	})
	if err != nil {
		return err
	}
	return inNamespace(landing, func() error { return land(link, tap) })
}

// configureAnchorLink configures an end of a link, at whose other end is a neighbour.
func configureAnchorLink(name string, mac net.HardwareAddr, addresses ...net.IP) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if !markedLink(link) {
		if err := netlink.LinkSetAlias(link, namespaceMark); err != nil {
			return fmt.Errorf("mark %s: %w", name, err)
		}
	}
	// Packets come in that others would not send this way.
	if err := looseSources(name); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	if link.Attrs().RawFlags&unix.IFF_NOARP != 0 {
		return nil // through a tunnel
	}
	for _, ip := range addresses {
		if ip.To4() == nil && !hasIPv6() {
			continue
		}
		err = netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, Family: familyOfIP(ip), State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: mac})
		if err != nil {
			return fmt.Errorf("set neighbour of %s: %w", name, err)
		}
	}
	return nil
}

func familyOfIP(ip net.IP) int {
	if ip.To4() == nil {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// looseSources lets packets with any source in at an interface of the calling thread's namespace.
// The kernel checks the larger of two parameters (ip-sysctl.rst, rp_filter), so that of all
// interfaces is spread over the others first.
func looseSources(name string) error {
	const all = "/proc/sys/net/ipv4/conf/all/rp_filter"
	b, err := os.ReadFile(all)
	if err != nil {
		return fmt.Errorf("read kernel parameter: %w", err)
	}
	if value := strings.TrimSpace(string(b)); value != "0" {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		for _, l := range links {
			own := "net/ipv4/conf/" + l.Attrs().Name + "/rp_filter"
			if b, err := os.ReadFile("/proc/sys/" + own); err == nil && strings.TrimSpace(string(b)) < value {
				if err := setSysctl(own, value); err != nil {
					return err
				}
			}
		}
		if err := setSysctl("net/ipv4/conf/all/rp_filter", "0"); err != nil {
			return err
		}
	}
	return setSysctl("net/ipv4/conf/"+name+"/rp_filter", "0")
}

// land lets the guest's packets of an anchor's connections go back by its link, in the calling
// thread's namespace.
func land(link, tap string) error {
	name := fromAnchor(link)
	if err := configureAnchorLink(name, anchorMAC, anchorIP, anchorIP6); err != nil {
		return err
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	mark := uint32(l.Attrs().Index)
	for _, ip := range []net.IP{anchorIP, anchorIP6} {
		if ip.To4() == nil && !hasIPv6() {
			continue
		}
		back := &netlink.Route{LinkIndex: l.Attrs().Index, Gw: ip, Table: landingTables + int(mark), Flags: int(netlink.FLAG_ONLINK)}
		if err := netlink.RouteReplace(back); err != nil {
			return fmt.Errorf("set route by %s: %w", name, err)
		}
		rule := netlink.NewRule()
		rule.Mark, rule.Table, rule.Family = mark, landingTables+int(mark), familyOfIP(ip)
		if err := netlink.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add rule for %s: %w", name, err)
		}
	}
	return landingRules(link, tap, mark)
}

// leadGuest lets packets for the guest go by a link, or to the tap if that is "", in the calling
// thread's namespace.
func leadGuest(l *layout, name string) error {
	if name == "" {
		routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Dst != nil && (r.Gw.Equal(landingIP) || r.Gw.Equal(landingIP6)) {
				if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
					return err
				}
			}
		}
		return nil
	}
	link, err := netlink.LinkByName(toLanding(name))
	if err != nil {
		return err
	}
	for _, p := range l.pools() {
		via := landingIP
		if p == l.ip6 {
			via = landingIP6
		}
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: host(p.guest), Gw: via, Flags: int(netlink.FLAG_ONLINK)}
		if err := netlink.RouteReplace(route); err != nil {
			return err
		}
	}
	return nil
}

// dropLink removes an end of a link, and what belongs to it. What does not exist is no error.
func dropLink(ns, name string) error {
	if _, err := os.Stat(filepath.Join(netnsDir, ns)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	err := inNamespace(ns, func() error {
		link, err := netlink.LinkByName(name)
		if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
			return sweepLandings()
		}
		if err != nil {
			return err
		}
		if err := errors.Join(deleteAnchorLink(name), sweepLandings()); err != nil || !strings.HasPrefix(name, anchorLinks) {
			return err
		}
		// Another link may get its number, and so their mark.
		return forgetConnections(func(f *netlink.ConntrackFlow) bool { return f.Mark == uint32(link.Attrs().Index) })
	})
	if err != nil {
		return fmt.Errorf("remove %s in network namespace %q: %w", name, ns, err)
	}
	return nil
}

// listAnchorLinks lists those interfaces of the calling thread's namespace that are ours and whose
// names begin like that.
func listAnchorLinks(prefix string) (names []string, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, prefix) && markedLink(l) {
			names = append(names, l.Attrs().Name)
		}
	}
	return names, nil
}

// markedLink tells whether an end of a link is ours. One that goes through a tunnel says to whom.
func markedLink(l netlink.Link) bool {
	_, tunnels := peerOf(l)
	return tunnels || l.Attrs().Alias == namespaceMark
}

// deleteAnchorLink removes an interface of the calling thread's namespace. What does not exist is no
// error.
func deleteAnchorLink(name string) error {
	link, err := netlink.LinkByName(name)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil
	}
	if err == nil {
		if err = netlink.LinkDel(link); errors.Is(err, unix.ENODEV) { // with its other end
			err = nil
		}
	}
	return err
}

// sweepLandings removes rules of the calling thread's namespace whose links are gone.
func sweepLandings() error {
	// A link is made before its rule, so that it is seen if the rule was.
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	marks := map[uint32]bool{}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, anchorLinks) {
			marks[uint32(l.Attrs().Index)] = true
		}
	}
	stale := false
	for _, r := range rules {
		if r.Table-landingTables != int(r.Mark) || r.Mark == 0 || marks[r.Mark] {
			continue
		}
		stale = true
		if err := netlink.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove rule: %w", err)
		}
	}
	if !stale {
		return nil
	}
	return sweepLandingTables()
}

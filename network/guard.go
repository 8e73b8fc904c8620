package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"drafter/internal/rundir"
)

// A guest reaches what lies beyond the host's outgoing interface, and is reached by the host and
// through port forwards. Everything else is dropped, in three places:
//
//   - at the tap ([GuardGuest]): frames that do not carry the guest's own addresses, and all that is not IP or ARP;
//   - in the namespace (namespaceRules): what is meant for the namespace itself, and new connections beyond the limit;
//   - on the host (hostRules): what is meant for the host, for guests and for [guarded] addresses, new connections beyond the limit, and
//     what comes from outside without a forward. If the host forwarded nothing before the NAT, what is between its other interfaces, too.
//
// Answers to connections that were let through always pass.

// guarded are addresses beyond the outgoing interface that no guest reaches unless they are opened.
var guarded = []*net.IPNet{
	cidr("0.0.0.0/8"), // "this network": Linux takes 0.0.0.0 for itself (RFC 1122, 3.2.1.3)
	loopback,
	cidr("169.254.0.0/16"),     // link-local (RFC 3927), with the metadata services of most clouds
	cidr("100.100.100.200/32"), // metadata service of Alibaba Cloud
	cidr("168.63.129.16/32"),   // WireServer of Azure
	// protocol assignments (RFC 6890), with the metadata service of Oracle Cloud
	cidr("192.0.0.0/24"),
	cidr("224.0.0.0/4"), // multicast
	cidr("240.0.0.0/4"), // reserved, with the broadcast address
}

// Guests' packets leave the host from these ports. If a guest could choose the port, it would
// receive what a client sends to the host's service or to another guest's forward at that port: the
// connection tracking takes that for an answer (CVE-2021-3773). Linux gives sockets 32768 to 60999
// (ip(7), ip_local_port_range).
const firstGuestPort, lastGuestPort = 61000, 65535

// checkGuestPorts warns where the host's own sockets may get the ports of guests.
func checkGuestPorts(log *slog.Logger) error {
	const name = "net.ipv4.ip_local_port_range"
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return fmt.Errorf("read kernel parameter: %w", err)
	}
	var first, last int
	if _, err := fmt.Sscan(string(b), &first, &last); err != nil {
		return fmt.Errorf("read kernel parameter %s: %w", name, err)
	}
	if last >= firstGuestPort {
		log.Warn("Guests may take what is sent to the host's sockets at ports from "+strconv.Itoa(firstGuestPort)+ //nolint:sloglint // a constant
			" on; set "+name+" to end below", "range", fmt.Sprintf("%d-%d", first, last))
	}
	return nil
}

func cidr(s string) *net.IPNet {
	_, n, err := net.ParseCIDR(s)
	if err != nil {
		panic(err) // a constant of this package
	}
	return n
}

// opening is a destination that the user opened for guests: a protocol and port ("" and 0 for all)
// at addresses (nil for those of the host).
type opening struct {
	to       *net.IPNet
	protocol string
	port     uint16
}

// parseOpenings reads the values of --allow-host and --allow-cidr.
func (c *NATConfig) parseOpenings() ([]opening, error) {
	var openings []opening
	for _, s := range c.AllowHost {
		var o opening
		if !o.parsePort(s) {
			return nil, fmt.Errorf("--allow-host %q is no port and protocol; write it as 53/udp", s)
		}
		openings = append(openings, o)
	}
	for _, s := range c.AllowCIDRs {
		address, rest, _ := strings.Cut(s, "/")
		bits, port, hasPort := strings.Cut(rest, ":")
		_, to, err := net.ParseCIDR(address + "/" + bits)
		o := opening{to: to}
		if err != nil || len(to.Mask) != len(host(to.IP).IP) || hasPort && !o.parsePort(port) {
			return nil, fmt.Errorf("--allow-cidr %q is no subnet; write it as 192.168.1.0/24, fd00:1::/64 or 169.254.169.254/32:53/udp", s)
		}
		openings = append(openings, o)
	}
	return openings, nil
}

func (o *opening) parsePort(s string) (ok bool) {
	number, protocol, _ := strings.Cut(s, "/")
	port, err := strconv.ParseUint(number, 10, 16)
	o.port, o.protocol = uint16(port), protocol
	return err == nil && port != 0 && (protocol == "tcp" || protocol == "udp")
}

// host tells whether o opens the host itself. A subnet does not, even if the host is in it.
func (o opening) host() bool {
	if o.to == nil {
		return true
	}
	return o.bits() == 8*len(o.to.Mask)
}

// spares tells whether what is closed stays so, although it is a part of o, or behind a forward at an
// address in it: guests, metadata services and others have to be named.
func (o opening) spares(closed *net.IPNet) bool { return !o.host() && !contains(closed, o.to) }

// concerns tells whether it opens addresses of a pool's protocol.
func (o opening) concerns(p *pool) bool { return o.to != nil && len(o.to.Mask) == len(p.hostVeth.Mask) }

// bits is how narrow it is.
func (o opening) bits() int {
	if o.to == nil {
		return 0
	}
	bits, _ := o.to.Mask.Size()
	return bits
}

// contains tells whether all of b is in a.
func contains(a, b *net.IPNet) bool {
	x, _ := a.Mask.Size()
	y, _ := b.Mask.Size()
	return x <= y && a.Contains(b.IP)
}

// match matches packets of a guest to the destination that the guest addressed, because a forward
// may lead elsewhere.
func (o opening) match() (parts [][]expr.Any) {
	if o.to != nil {
		parts = append(parts, toOriginalAddress(o.to))
	}
	if o.port != 0 {
		parts = append(parts, toOriginalPort(o.protocol, o.port))
	}
	return parts
}

// hostRules are the rules of the host's table. They name each link, because a prefix would match
// interfaces of others.
func (n *NAT) hostRules(connections int) error {
	l := n.layout
	r, err := newRuleset(rulesFamily(), n.natTable())
	if err != nil {
		return err
	}
	var names []string
	for i := range l.count {
		names = append(names, hostVethName(n.name(i)))
	}
	links, err := r.interfaces("links", names)
	if err != nil {
		return err
	}
	outgoing, err := r.interfaces("outgoing", n.outgoing)
	if err != nil {
		return err
	}
	outgoing6, err := r.interfaces("outgoing6", n.outgoing6)
	if err != nil {
		return err
	}
	// From a link to itself: a guest that uses a port of its own that the forwarder publishes.
	back, err := r.interfacePairs("back", names)
	if err != nil {
		return err
	}
	counted, err := r.counters("connections", len(names))
	if err != nil {
		return err
	}
	opened, err := r.counters("opened", len(names))
	if err != nil {
		return err
	}

	// The forwarder lets packets for loopback addresses leave through a link. None may come in
	// through one.
	r.rule(r.chain(hookRaw), fromInterfaces(links), toAddress(loopback), drop())
	// A guest's packets leave with the host's address. The rule is added below; until then none
	// leave.
	asHost := r.subchain("as-host")
	leaving, left := r.chain(hookOutgoing), r.chain(hookLeaving)
	for _, p := range l.pools() {
		if p == &l.pool || !n.config.IPv6Routed {
			r.rule(leaving, fromAddress(p.namespaceVeth), notToInterfaces(links), continueAt(asHost))
			r.rule(left, fromAddress(p.namespaceVeth), fromInterfaces(links), notToInterfaces(links), drop())
		}
		// The namespace takes nothing from its own address.
		r.rule(leaving, fromAddress(p.namespaceVeth), betweenInterfaces(back), masquerade())
	}

	limited := r.subchain("limited")
	r.rule(limited, overLinkRate(opened, openRate(connections)), drop())
	r.rule(limited, overConnections(counted, connections), drop())
	r.forgetClosed(limited)
	// For other protocols the connection tracking knows no ports. It would take everything that a
	// server sends to the host for answers to the guest.
	for _, known := range [][]expr.Any{transport(unix.IPPROTO_TCP), transport(unix.IPPROTO_UDP), icmp(), icmp6()} {
		r.rule(limited, known, accept())
	}
	r.rule(limited, drop())

	fromGuest, toHost, toGuest := r.subchain("from-guest"), r.subchain("to-host"), r.subchain("to-guest")
	for _, c := range []*nftables.Chain{fromGuest, toHost} {
		r.answers(c)
		// Only the guest opens connections, not the VMM in the namespace. Only connections get a
		// new source address.
		for _, p := range l.pools() {
			r.rule(c, notFromAddress(p.namespaceVeth), drop())
		}
		if l.ip6 == nil {
			r.rule(c, protocolIPv6(), drop())
		}
		r.rule(c, notNewConnection(), drop())
	}
	l.openRules(r, fromGuest, toHost, limited)
	r.rule(toHost, drop())
	r.rule(fromGuest, forwardedByRule(), betweenInterfaces(back), continueAt(limited))
	for _, p := range l.pools() {
		for _, closed := range p.closed() {
			r.rule(fromGuest, toAddress(closed), drop())
		}
	}
	r.rule(fromGuest, protocolIPv4(), toInterfaces(outgoing), continueAt(limited))
	r.rule(fromGuest, protocolIPv6(), toInterfaces(outgoing6), continueAt(limited))
	r.rule(fromGuest, drop())

	r.answers(toGuest)
	r.rule(toGuest, forwardedByRule(), accept())
	r.rule(toGuest, drop())

	// A host that did not forward before does not become a router: only packets that others
	// translate, such as those to a published port, go on.
	between := r.subchain("between")
	r.answers(between)
	r.rule(between, forwardedByRule(), accept())
	r.rule(between, drop())
	bridges, err := bridges()
	if err != nil {
		return err
	}
	bridged, err := r.interfacePairs("bridged", bridges)
	if err != nil {
		return err
	}
	closed, err := r.interfaces("closed", n.record.Closed)
	if err != nil {
		return err
	}
	closed6, err := r.interfaces("closed6", n.record.Closed6)
	if err != nil {
		return err
	}

	forwarded := r.chain(hookForwarded)
	r.rule(forwarded, fromInterfaces(links), continueAt(fromGuest))
	r.rule(forwarded, toInterfaces(links), continueAt(toGuest))
	// What stays within a bridge is not routed, but comes here, too (br_netfilter).
	r.rule(forwarded, betweenInterfaces(bridged), accept())
	r.rule(forwarded, protocolIPv4(), fromInterfaces(closed), continueAt(between))
	r.rule(forwarded, protocolIPv6(), fromInterfaces(closed6), continueAt(between))
	r.rule(r.chain(hookDelivered), fromInterfaces(links), continueAt(toHost))
	if err := r.apply(); err != nil {
		return err
	}
	return r.masqueradeAt(asHost, firstGuestPort, lastGuestPort)
}

// bridges are the host's.
func bridges() (names []string, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if l.Type() == "bridge" {
			names = append(names, l.Attrs().Name)
		}
	}
	return names, nil
}

// openRules let guests reach what is opened.
func (l *layout) openRules(r *ruleset, fromGuest, toHost, limited *nftables.Chain) {
	narrowFirst := func(a, b opening) int { return b.bits() - a.bits() }
	for _, o := range slices.SortedStableFunc(slices.Values(l.openings), narrowFirst) {
		if o.to == nil {
			r.rule(toHost, append(o.match(), continueAt(limited))...)
		}
		for _, p := range l.pools() {
			if !o.concerns(p) {
				continue
			}
			if o.host() {
				r.rule(toHost, append(o.match(), continueAt(limited))...)
			}
			for _, closed := range p.closed() {
				if o.spares(closed) {
					r.rule(fromGuest, append(o.match(), toAddress(closed), drop())...)
				}
			}
			r.rule(fromGuest, append(o.match(), continueAt(limited))...)
		}
	}
}

// openRate is how many connections a second a guest may open that may have so many open at a time.
// Connections that have ended and are still tracked add at most half as many: as many at once, and
// as many in closedTimeout.
func openRate(connections int) int { return max(1, connections/4) }

// answers accepts packets of connections that were let through, and the ICMP errors about them.
func (r *ruleset) answers(c *nftables.Chain) {
	r.rule(c, connectionState(expr.CtStateBitESTABLISHED), accept())
	r.rule(c, connectionState(expr.CtStateBitRELATED), icmp(), accept())
	r.rule(c, connectionState(expr.CtStateBitRELATED), icmp6(), accept())
}

// namespaceTable is the name of a namespace's table.
const namespaceTable = "drafter"

// namespaceRules are the rules of a namespace's table. They let packets pass between its link and
// the guest, and nothing else.
func (n *NAT) namespaceRules(i, connections int) error {
	c, l := n.config, n.layout
	r, err := newRuleset(rulesFamily(), namespaceTable)
	if err != nil {
		return err
	}
	outgoing, incoming, forwarded := r.chain(hookOutgoing), r.chain(hookIncoming), r.chain(hookForwarded)
	for _, p := range l.pools() {
		r.rule(outgoing, fromAddress(host(p.guest)), toInterface(namespaceVeth), sourceNAT(p.namespaceIP(i)))
		for _, ip := range []net.IP{p.namespaceSide(i), p.namespaceIP(i)} {
			if c.AllowIncomingTraffic {
				r.rule(incoming, fromInterface(namespaceVeth), toAddress(host(ip)), destinationNAT(p.guest, 0))
			}
		}
	}

	// While nobody is behind the tap, packets for the guest take the route of vacantMetric.
	r.rule(forwarded, fromInterface(namespaceVeth), toInterface("lo"), transport(unix.IPPROTO_TCP), reset())
	r.rule(forwarded, fromInterface(namespaceVeth), toInterface("lo"), unreachable())
	if l.ip6 != nil {
		vacant := [][]expr.Any{fromInterface(namespaceVeth), toInterface(namespaceVeth), toAddress(host(l.ip6.guest))}
		r.rule(forwarded, append(slices.Clone(vacant), transport(unix.IPPROTO_TCP), reset())...)
		r.rule(forwarded, append(vacant, unreachable6())...)
	}
	r.answers(forwarded)
	// They were let in at their anchor. The kernel may know them only from now on.
	for _, p := range l.pools() {
		r.rule(forwarded, ofAnchor(), fromSomeAnchor(), toInterface(c.NamespaceInterface), toAddress(host(p.guest)), accept())
		r.rule(forwarded, ofAnchor(), fromInterface(c.NamespaceInterface), toSomeAnchor(), fromAddress(host(p.guest)), accept())
	}
	r.rule(forwarded, notNewConnection(), drop())
	// A guest that has moved may open a connection anew that was known here: one of UDP that was quiet
	// for a while, say.
	opened := r.subchain("opened")
	for _, p := range l.pools() {
		for _, way := range [][]expr.Any{fromInterface(c.NamespaceInterface), fromSomeLanding()} {
			r.rule(forwarded, way, toInterface(namespaceVeth), fromAddress(host(p.guest)), continueAt(opened))
		}
	}
	r.rule(opened, overRate(openRate(connections)), drop())
	r.rule(opened, overLimit(connections), drop())
	r.rule(opened, accept())
	for _, p := range l.pools() {
		for _, way := range [][]expr.Any{toInterface(c.NamespaceInterface), toSomeLanding()} {
			if c.AllowIncomingTraffic {
				r.rule(forwarded, fromInterface(namespaceVeth), way, toAddress(host(p.guest)), accept())
			}
		}
	}
	r.rule(forwarded, drop())

	delivered := r.chain(hookDelivered)
	r.answers(delivered)
	r.rule(delivered, fromInterface("lo"), accept())
	for _, message := range []byte{neighbourSolicitation, neighbourAdvertisement} {
		r.rule(delivered, fromInterface(c.NamespaceInterface), icmp6(), icmpType(message), accept())
	}
	for _, p := range l.pools() {
		for _, protocol := range []string{"udp", "tcp"} { // the DNS forwarder; see egress.apply
			r.rule(delivered, fromInterface(c.NamespaceInterface), toAddress(host(p.gateway)), toPort(protocol, dnsPort), accept())
		}
	}
	r.rule(delivered, drop())
	return r.apply()
}

// Guest is a VM that is about to use a namespace.
type Guest struct {
	VM    uuid.UUID // its generation
	MAC   string    // "" for one that is not known
	Lands bool      // it comes from elsewhere, and may have its anchor here
	// what it may open connections to, of what [NATConfig.Egress] lets guests; nil: all of that
	Egress []string
}

// GuardGuest lets only the guest's own frames leave the tap of a namespace that a NAT made: IPv4
// and IPv6 from its addresses, and ARP and neighbour discovery for them, all from its MAC address,
// if that is known. Everything else is dropped before anybody sees it. Connections of an earlier
// VM are ended, because a VM that was killed did not give its claim back; so are its anchors.
// Those of a VM that comes back to its anchor stay. Another VM's anchor is refused. The tap is
// made anew unless it is in use. Call GuardGuest before a VMM takes the tap; it replaces the guard
// and the egress of an earlier VM. It does nothing, and returns nil, for a namespace that no NAT
// made: the rules there are its owner's.
func GuardGuest(ns string, g Guest) error {
	policy, err := parseEgress(g.Egress)
	if err != nil {
		return err
	}
	c, err := natOf(ns)
	if c == nil && err == nil && policy != nil {
		return fmt.Errorf("--egress: no NAT made network namespace %q; use one of drafter nat, or leave --egress out", ns)
	}
	if c == nil || err != nil {
		return err
	}
	l, err := c.parse()
	if err != nil {
		return err
	}
	var hardware net.HardwareAddr
	if g.MAC != "" {
		if hardware, err = net.ParseMAC(g.MAC); err != nil || len(hardware) != 6 || hardware[0]&1 != 0 {
			return fmt.Errorf("MAC address %q of the guest is not that of one interface; write it as 02:0e:d9:fd:68:3d", g.MAC)
		}
	}
	home, err := g.home(ns)
	if err != nil {
		return err
	}
	if err := endAnchorsOfOthers(ns, g.VM); err != nil {
		return err
	}
	if err := c.setEgress(ns, g.Egress, true); err != nil {
		return err
	}
	err = inNamespace(ns, func() error {
		if !home && !occupied(c.NamespaceInterface) {
			if err := c.vacate(l); err != nil {
				return err
			}
		}
		if err := c.renewTap(l); err != nil {
			return err
		}
		return c.guardTap(l, hardware)
	})
	if err != nil || home {
		return err
	}
	return forgetTenant(ns)
}

// guardTable is the name of the table with the rules at the tap. While they are in force, the tap
// has it as an alias (ip-link(8)), followed by the MAC address that they let pass. The alias goes
// with the tap.
const guardTable = "drafter-guest"

// guardTap puts the rules at the tap of the calling thread's namespace in force.
func (c NATConfig) guardTap(l *layout, hardware net.HardwareAddr) error {
	tap, err := netlink.LinkByName(c.NamespaceInterface)
	if err != nil {
		return fmt.Errorf("find %s: %w", c.NamespaceInterface, err)
	}
	// The alias first: a NAT that looks meanwhile then puts the same rules in force.
	if err := netlink.LinkSetAlias(tap, guardTable+" "+hardware.String()); err != nil {
		return fmt.Errorf("mark %s: %w", c.NamespaceInterface, err)
	}
	r, err := newRuleset(nftables.TableFamilyNetdev, guardTable)
	if err != nil {
		return err
	}
	frames := r.chainOn(hookReceived, c.NamespaceInterface)
	for _, rule := range l.tapRules(hardware) {
		r.rule(frames, rule...)
	}
	return r.apply()
}

// tapRules are the rules at the tap.
func (l *layout) tapRules(hardware net.HardwareAddr) (rules [][][]expr.Any) {
	rule := func(parts ...[]expr.Any) { rules = append(rules, parts) }
	if hardware != nil {
		rule(notFromMAC(hardware), drop())
	}
	rule(fromAddress(host(l.guest)), accept())
	rule(protocolARP(), arpFrom(hardware, l.guest), accept())
	if l.ip6 != nil {
		guest := host(l.ip6.guest)
		rule(fromAddress(guest), solicitation(hardware), accept())
		if hardware != nil {
			// The kernel asks from there whether the gateway is still where it was.
			rule(fromAddress(host(linkLocalOf(hardware))), solicitation(hardware), accept())
		}
		for _, with := range []bool{true, false} {
			rule(fromAddress(guest), advertisement(guest.IP, hardware, with), accept())
		}
		// Nothing else of neighbour discovery, above all no router advertisement, and no multicast
		// membership: these are at 130 and above. Errors and echoes are below.
		rule(icmp6(), icmpTypeFrom(multicastListenerQuery), drop())
		rule(fromAddress(guest), accept())
	}
	rule(drop())
	return rules
}

// keepTapGuard puts the rules at the tap of the calling thread's namespace back if any of them is
// gone.
func (c NATConfig) keepTapGuard(l *layout) (done bool, err error) {
	tap, err := netlink.LinkByName(c.NamespaceInterface)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("find %s: %w", c.NamespaceInterface, err)
	}
	mac, guarded := strings.CutPrefix(tap.Attrs().Alias, guardTable+" ")
	if !guarded {
		return false, nil
	}
	var hardware net.HardwareAddr
	if mac != "" {
		if hardware, err = net.ParseMAC(mac); err != nil {
			return false, fmt.Errorf("read alias of %s: %w", c.NamespaceInterface, err)
		}
	}
	state, err := tableState(unix.NFPROTO_NETDEV, guardTable)
	if whole := 2 + len(l.tapRules(hardware)); err != nil || len(state) == whole { // with the table and its chain
		return false, err
	}
	return true, c.guardTap(l, hardware)
}

// natOf returns the configuration of the NAT that made a namespace, or nil if none did.
func natOf(ns string) (*NATConfig, error) {
	records, err := natRecords()
	for _, r := range records {
		if slices.Contains(r.Namespaces, ns) {
			return &r.Config, nil
		}
	}
	return nil, err
}

// natRecords reads the records of all NATs of this host.
func natRecords() (records []natRecord, err error) {
	paths, err := filepath.Glob(filepath.Join(rundir.Path, "nat-*.json"))
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // it has just ended
		}
		var record natRecord
		if err == nil {
			err = json.Unmarshal(b, &record)
		}
		if err != nil {
			return nil, fmt.Errorf("read record of the NAT: %s: %w", path, err)
		}
		records = append(records, record)
	}
	return records, nil
}

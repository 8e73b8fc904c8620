package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"drafter/internal/rundir"
)

// lookAtOnce is how many namespaces one look visits. Each costs some 0.8 ms of CPU time.
const lookAtOnce = 32

// look puts back what somebody has removed or changed since the last look, and says so. It follows
// the host's default route.
func (n *NAT) look() {
	done, err := n.keepForwarding()
	n.news.mended("net.ipv4.ip_forward", done, err)
	done, err = n.keepForwarding6()
	n.news.mended("net.ipv6.conf.all.forwarding", done, err)
	err = n.followRoute()
	n.news.mended("the way out", false, err)
	done, err = n.keepHostRules()
	n.news.mended("nftables table inet "+n.natTable(), done, err)
	for range min(n.layout.count, lookAtOnce) {
		i := n.next
		n.next = (n.next + 1) % n.layout.count
		name := n.name(i)
		done, err := n.keepLink(i)
		n.news.mended("link "+hostVethName(name), done, err)
		if err == nil {
			n.keepInside(i)
		}
	}
	n.news.mended("the host's addresses", false, n.sayNetworks())
	n.news.mended("the host's interfaces", false, n.sayForwarding())
	n.sayFirewalls()
	n.sayNameServers()
	n.news.mended("notices to other hosts", false, n.tunnel.deliver())
	n.news.mended("the ends of tunnels", false, n.tunnel.forgetPeers())
	n.news.mended("the locks of anchors", false, errors.Join(rundir.Sweep(anchorRecords), rundir.Sweep(landingRecords), rundir.Sweep(noticeRecords), sweepExpected()))
}

// keepInside keeps what is in a namespace. If somebody removes that meanwhile, the next look makes all of
// it again, and nothing is to be said.
func (n *NAT) keepInside(i int) {
	name := n.name(i)
	mended := func(what string, done bool, err error) {
		if err != nil {
			nameOnly, gone := isNameOnly(name)
			if nameOnly || errors.Is(gone, os.ErrNotExist) {
				return
			}
		}
		n.news.mended(what, done, err)
	}
	done, err := n.keepNamespaceRules(i)
	mended("nftables table inet "+namespaceTable+" in "+name, done, err)
	err = inNamespace(name, func() (err error) {
		done, err = n.config.keepTapGuard(n.layout)
		return err
	})
	mended("nftables table netdev "+guardTable+" in "+name, done, err)
	done, err = n.egress.keep(name)
	mended("nftables table inet "+egressTable+" in "+name, done, err)
	mended("the anchor "+name, false, n.keepAnchor(name))
	mended("what leads to "+name, false, n.keepLandings(name))
}

// sayNetworks names networks that the host has joined since the start and that overlap with the
// NAT's addresses. At its start the NAT would have refused them.
func (n *NAT) sayNetworks() error {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	found := map[string][]string{}
	for _, a := range addrs {
		link, err := netlink.LinkByIndex(a.LinkIndex)
		if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
			continue // gone since
		}
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		name := link.Attrs().Name
		if link.Attrs().Alias == namespaceMark || slices.ContainsFunc(n.created, func(ns string) bool { return hostVethName(ns) == name }) {
			continue
		}
		network := &net.IPNet{IP: a.IP.Mask(a.Mask), Mask: a.Mask}
		for flag, subnet := range n.subnets() {
			if network.Contains(subnet.IP) || subnet.Contains(a.IP) {
				found[flag] = append(found[flag], a.IPNet.String()+" of "+name)
			}
		}
	}
	for flag, subnet := range n.subnets() {
		line := ""
		if len(found[flag]) > 0 {
			line = "This host has joined a network that the NAT's addresses are a part of; " +
				"it does not reach those there. Choose others at the next start"
		}
		slices.Sort(found[flag])
		n.news.say("networks of --"+flag, line, "flag", "--"+flag, "subnet", subnet.String(),
			"network", strings.Join(found[flag], ", "))
	}
	return nil
}

// keepForwarding turns forwarding on again. If somebody has turned it off, the last NAT that ends
// turns it off, too.
func (n *NAT) keepForwarding() (done bool, err error) {
	b, err := os.ReadFile("/proc/sys/" + forwarding4)
	if err != nil {
		return false, fmt.Errorf("read kernel parameter: %w", err)
	}
	if strings.TrimSpace(string(b)) == "1" {
		return false, nil
	}
	if n.record.IPForward != "0" {
		n.record.IPForward = "0"
		n.record.Settings, err = forwardingSettings("ipv4")
		err = errors.Join(err, n.writeRecord())
	}
	return true, errors.Join(err, setSysctl(forwarding4, "1"))
}

// sayForwarding names interfaces from which the host does not forward. That is the host's decision.
func (n *NAT) sayForwarding() error {
	for _, out := range n.outgoing {
		parameter := "net/ipv4/conf/" + out + "/forwarding"
		b, err := os.ReadFile("/proc/sys/" + parameter)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("read kernel parameter: %w", err)
		}
		line := ""
		if strings.TrimSpace(string(b)) == "0" {
			line = "This host forwards nothing that comes in at an interface, " +
				"so guests get no answers from there; turn it on with 'sysctl -w'"
		}
		n.news.say("forwarding of "+out, line, "interface", out, "parameter", parameter+"=1")
	}
	return nil
}

// followRoute moves the guests' way out when the host's has changed. While the host has none, the
// last one stays.
func (n *NAT) followRoute() error {
	if !n.follows {
		return nil
	}
	now, now6, err := n.waysOut("")
	if len(now) == 0 {
		now = n.outgoing
	}
	if len(now6) == 0 {
		now6 = n.outgoing6
	}
	if err != nil || slices.Equal(now, n.outgoing) && slices.Equal(now6, n.outgoing6) {
		return err
	}
	before := n.hostInterface()
	n.outgoing, n.outgoing6 = now, now6
	n.config.HostInterface = n.hostInterface()
	n.config.Logger.Info("The host's way out has changed; guests follow it", "from", before, "to", n.config.HostInterface)
	n.record.Config = n.config
	return errors.Join(n.writeRecord(), n.applyHostRules())
}

// applyHostRules puts the host's rules in force and notes the kernel's form of them.
func (n *NAT) applyHostRules() error {
	if err := n.hostRules(n.connections); err != nil {
		return err
	}
	n.hostTable.table = n.natTable()
	return n.hostTable.note()
}

func (n *NAT) keepHostRules() (done bool, err error) {
	if intact, err := n.hostTable.intact(); err != nil || intact {
		return false, err
	}
	if err := n.applyHostRules(); err != nil {
		return false, err
	}
	return true, n.forgetUnruled()
}

// forgetUnruled ends connections that were opened while the host's rules were gone: they did not pass
// them, and would go on without them. What somebody else has translated does not have a port of guests.
func (n *NAT) forgetUnruled() error {
	return forgetConnections(func(f *netlink.ConntrackFlow) bool {
		return slices.ContainsFunc(n.layout.pools(), func(p *pool) bool {
			ofGuest := p.namespaceVeth.Contains(f.Forward.SrcIP)
			toGuest := p.namespaceVeth.Contains(f.Forward.DstIP) || p.hostVeth.Contains(f.Forward.DstIP)
			// What has a routed prefix ends, too, as it is never translated.
			asHost := !f.Reverse.DstIP.Equal(f.Forward.SrcIP) && f.Reverse.DstPort >= firstGuestPort
			return ofGuest && !asHost || toGuest && f.Reverse.SrcIP.Equal(f.Forward.DstIP)
		})
	})
}

// keepLink keeps a namespace and its link with the host.
func (n *NAT) keepLink(i int) (done bool, err error) {
	name := n.name(i)
	nameOnly, err := isNameOnly(name)
	if nameOnly || errors.Is(err, os.ErrNotExist) {
		claim, err := claimNamespace(name)
		if err != nil {
			return false, fmt.Errorf("somebody has removed network namespace %s under its VM, which is cut off until it is resumed: %w", name, err)
		}
		err = errors.Join(removeNamespace(name, n.config.Logger), n.createNamespace(i), claim.Release())
		return true, errors.Join(err, n.guard(i), n.egress.enforce(name, false, false))
	}
	connected, err := n.connected(i)
	if connected {
		return false, nil
	}
	if ours, merr := madeHere(name); merr != nil || !ours {
		return false, errors.Join(merr, fmt.Errorf("somebody has made network namespace %s anew; it stays", name))
	}
	if err != nil {
		return false, err
	}
	if err := n.connect(i); err != nil {
		return false, err
	}
	// The kernel takes up an IPv6 address a moment after it was told.
	for deadline := time.Now().Add(renewal); ; time.Sleep(5 * time.Millisecond) {
		if connected, err = n.connected(i); err != nil || connected || time.Now().After(deadline) {
			break
		}
	}
	if err == nil && !connected {
		err = fmt.Errorf("packets for it take another way: see 'ip route get %s'", n.layout.namespaceIP(i))
	}
	return true, err
}

// renewal is longer than a tap takes to be made anew, or an address to be taken up, on a busy host.
const renewal = 100 * time.Millisecond

// keepNamespaceRules keeps a namespace's rules, and resets the connections of a VM whose VMM was
// killed.
func (n *NAT) keepNamespaceRules(i int) (done bool, err error) {
	err = inNamespace(n.name(i), func() error {
		vacant := n.layout.vacant()
		if vacant && !n.vacant[i] {
			if err := n.layout.resetConnections(); err != nil {
				return err
			}
		}
		n.vacant[i] = vacant
		intact, err := n.guestTables[i].intact()
		done = !intact
		return err
	})
	if err != nil || !done {
		return false, err
	}
	if err := n.guard(i); err != nil {
		return false, err
	}
	return true, inNamespace(n.name(i), func() error {
		// those that nothing has translated
		return forgetConnections(func(f *netlink.ConntrackFlow) bool {
			return f.Reverse.DstIP.Equal(f.Forward.SrcIP) && f.Reverse.SrcIP.Equal(f.Forward.DstIP)
		})
	})
}

// tapKept tells whether the tap, if there is one, is unchanged. A tap that was removed from under a
// VM cannot be put back; the next VM gets another.
func (n *NAT) tapKept() (bool, error) {
	tap, err := netlink.LinkByName(n.config.NamespaceInterface)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	routes, err := netlink.RouteList(tap, netlink.FAMILY_ALL)
	led := func(p *pool) bool {
		return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst != nil && r.Dst.String() == p.tapNetwork().String() })
	}
	whole := tap.Attrs().Flags&net.FlagUp != 0
	for _, p := range n.layout.pools() {
		whole = whole && led(p)
	}
	return whole, err
}

// connected tells whether packets get from the host to a namespace and back, and corrects the
// kernel parameters on that way.
func (n *NAT) connected(i int) (bool, error) {
	l := n.layout
	link := hostVethName(n.name(i))
	veth, _, err := hostVeth(n.name(i))
	// a bridge would take what comes in
	whole := err == nil && veth != nil && veth.Attrs().MasterIndex == 0
	for _, p := range l.pools() {
		for _, ip := range []net.IP{p.namespaceSide(i), p.namespaceIP(i)} {
			to, err := linkTowards(ip)
			whole = whole && err == nil && to == link
		}
	}
	keep := func(p parameter) error {
		changed, err := keepSysctl(p.name, p.value)
		whole = whole && !changed
		return err
	}
	for _, p := range n.linkParameters(i) {
		if err := keep(p); err != nil {
			return false, err
		}
	}
	var outside net.HardwareAddr
	if veth != nil {
		outside = veth.Attrs().HardwareAddr
	}
	var inside netlink.Link
	err = inNamespace(n.name(i), func() (err error) {
		inside, err = n.connectedInside(i, outside, keep)
		return err
	})
	if err != nil || inside == nil || !whole {
		return false, err
	}
	for _, p := range l.pools() {
		known, err := p.knows(veth, p.namespaceSide(i), inside.Attrs().HardwareAddr)
		whole = whole && err == nil && known
	}
	return whole, err
}

// connectedInside is connected within the namespace. It returns the namespace's end of the link, nil if
// packets do not get through. outside is the MAC address of the host's end.
func (n *NAT) connectedInside(i int, outside net.HardwareAddr, keep func(parameter) error) (netlink.Link, error) {
	l := n.layout
	parameters := l.forwardParameters()
	for _, link := range []string{n.config.NamespaceInterface, namespaceVeth} {
		parameters = append(append(parameters, l.parameters6(link)...), parameter{"net/ipv4/conf/" + link + "/forwarding", "1"})
	}
	for _, p := range parameters {
		if err := keep(p); err != nil {
			return nil, err
		}
	}
	kept, err := n.tapKept()
	if err == nil && !kept {
		time.Sleep(renewal) // a VM that leaves may have just taken its tap away
		kept, err = n.tapKept()
	}
	if err != nil || !kept {
		return nil, err
	}
	inside, err := netlink.LinkByName(namespaceVeth)
	if err != nil {
		return nil, nil //nolint:nilerr,nilnil // it is made anew
	}
	whole := true
	for _, p := range l.pools() {
		out, err := netlink.RouteGet(p.publicAddresses()[0])
		whole = whole && err == nil && len(out) > 0 && out[0].Gw.Equal(p.hostSide(i))
		own, err := netlink.RouteGet(p.namespaceIP(i))
		whole = whole && err == nil && len(own) > 0 && own[0].Type == unix.RTN_LOCAL
		known, err := p.knows(inside, p.hostSide(i), outside)
		whole = whole && err == nil && known
	}
	if !whole {
		return nil, nil //nolint:nilnil // as the comment says
	}
	return inside, nil
}

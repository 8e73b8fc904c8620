package network

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"drafter/internal/kind"
	"drafter/internal/lockfile"
	"drafter/internal/logging"
	"drafter/internal/newfile"
	"drafter/internal/rundir"
)

// NATConfig lays out a pool of network namespaces. With the defaults, namespace number i (ark0 is
// the first) looks like this:
//
//	host                       namespace ark<i>                          guest
//	ark<i>-veth 10.0.8.4i+1 ── veth0 10.0.8.4i+2, 10.0.15.i+1
//	                           tap0  172.16.0.1 ──────────────────────── 172.16.0.2
//
// Guests are alike in every namespace, so that one package runs in any. What a guest sends gets its
// namespace's address (10.0.15.i+1), then the host's. What the host sends to 10.0.8.4i+2 or
// 10.0.15.i+1 reaches the guest; others need a port forward.
//
// With IPv6, each of these has an IPv6 address, too: by default the IPv4 address behind
// fd0e:d9fd:683d::/96.
//
// A guest reaches what is behind the outgoing interface. It reaches neither the host nor other
// guests, nor link-local addresses and the metadata services of clouds, unless they are opened.
type NATConfig struct {
	// outgoing interfaces, such as eth0 or eth0,eth1; "" for those of the current default route
	HostInterface     string
	HostVethCIDR      string // one /30 for each namespace's link with the host
	NamespaceVethCIDR string // one address for each namespace
	BlockedSubnetCIDR string // guests cannot reach it either

	// guests have IPv6 beside IPv4, unless the host's kernel has none
	IPv6 bool
	// NamespaceVethCIDR6 is routed to this host: what guests send by IPv6 leaves with its addresses
	// instead of the host's
	IPv6Routed bool
	// as their namesakes; "" and 0 for those behind fd0e:d9fd:683d::/96
	HostVethCIDR6, NamespaceVethCIDR6, BlockedSubnetCIDR6 string
	NamespaceInterfaceGateway6, NamespaceInterfaceIP6     string
	NamespaceInterfaceNetmask6                            int

	AllowHost []string // ports of the host that guests reach, such as 53/udp
	// closed addresses that guests reach, such as 192.168.1.0/24, or with one port
	// 169.254.169.254/32:53/udp; the host's own only as /32
	AllowCIDRs []string
	// most connections that a guest may have open at a time; 0: an equal share of a third of what
	// the host can track, up to 8192
	MaxConnections int
	// rules are put into other firewalls of the host that drop what it forwards for guests, until Close
	ManageForward bool
	// what guests may open connections to, of what they reach at all: subnets and names, such as
	// 192.0.2.0/24 and *.example.com:443/tcp; or only "allow", as nil, or "deny". A VM may have less:
	// see [Guest].
	Egress []string
	// how long connections of a VM that has moved may go on by way of the namespace that it has left;
	// 0: for ever
	AnchorTimeout time.Duration
	// UDP port of the tunnel by which connections go on of VMs that move to other hosts; 0: there is
	// no tunnel
	TunnelPort int
	// this host's address for other hosts' tunnels; "": that to which its migrations lead
	TunnelAddress string

	NamespaceInterface        string // tap interface for the VMM
	NamespaceInterfaceGateway string // its address, the guest's gateway
	NamespaceInterfaceNetmask int    // bits
	NamespaceInterfaceIP      string // the guest's address
	// of the tap; the same everywhere, so that a guest that has moved still knows its gateway
	NamespaceInterfaceMAC string

	NamespacePrefix      string
	NamespaceCount       int  // 0: as many as both CIDRs hold
	AllowIncomingTraffic bool // the host reaches guests without a port forward

	Logger *slog.Logger `json:"-"` // nil: slog.Default()
}

// DefaultNAT is a layout that works on most hosts, with 16 namespaces.
func DefaultNAT() NATConfig {
	return NATConfig{
		HostVethCIDR: "10.0.8.0/22", NamespaceVethCIDR: "10.0.15.0/24", BlockedSubnetCIDR: "10.0.15.0/24",
		NamespaceInterface: "tap0", NamespaceInterfaceGateway: "172.16.0.1", NamespaceInterfaceNetmask: 30,
		NamespaceInterfaceIP: "172.16.0.2", NamespaceInterfaceMAC: "02:0e:d9:fd:68:3d",
		NamespacePrefix: "ark", NamespaceCount: 16, AllowIncomingTraffic: true, AnchorTimeout: 24 * time.Hour, IPv6: true,
	}
}

// NAT is a running pool. Its namespaces exist until Close.
type NAT struct {
	config  NATConfig
	layout  *layout
	lock    *lockfile.Lock
	record  natRecord
	created []string // what Close removes, oldest first

	connections int  // most that a guest may have open at a time
	changed     bool // namespaces that are kept had other permissions

	outgoing  []string // interfaces
	outgoing6 []string // those of IPv6
	follows   bool     // whether they are those of the default route

	watch       *watch
	hostTable   applied
	guestTables []applied // of the namespaces
	vacant      []bool    // namespaces behind whose tap was no VMM at the last look
	firewall    *firewall // of others
	next        int       // namespace that the next look visits first
	news        *news
	tunnel      *tunnel // nil: there is none
	egress      *egressControl
}

// natRecord is kept on disk while a NAT runs, so that the next NAT can clean up after a crash.
type natRecord struct {
	Config     NATConfig `json:"config"`
	Namespaces []string  `json:"namespaces"` // that it has made; the last one may not be made yet
	IPForward  string    `json:"ipForward"`  // its value before any NAT
	// interfaces between which nothing was forwarded before any NAT
	Closed []string `json:"closed"`
	// of IPv6; "" if no NAT has changed it
	IPv6Forward string   `json:"ipv6Forward,omitempty"`
	Closed6     []string `json:"closed6,omitempty"`
	// interfaces that took router advertisements only while the host forwarded nothing
	AcceptRA []string `json:"acceptRA,omitempty"`
	// whether the namespaces are marked; those of older releases are not
	Marked bool `json:"marked"`
	// nil: there is none
	Tunnel *tunnelAccess `json:"tunnel"`
}

// layout is a parsed NATConfig.
type layout struct {
	pool           // of IPv4
	ip6      *pool // nil: guests have no IPv6
	mac      net.HardwareAddr
	openings []opening
	egress   egressPolicy
	count    int
}

// namespacePrefix leaves room for a number and "-veth" in an interface name of 15 bytes.
var namespacePrefix = regexp.MustCompile(`^[a-z][a-z0-9]{0,5}$`)

func (c *NATConfig) parse() (*layout, error) {
	l := &layout{}
	err := l.parse(poolFlags{
		"", c.HostVethCIDR, c.NamespaceVethCIDR, c.BlockedSubnetCIDR, c.NamespaceInterfaceGateway, c.NamespaceInterfaceIP, c.NamespaceInterfaceNetmask,
	})
	if err != nil {
		return nil, err
	}
	if c.IPv6Routed && c.NamespaceVethCIDR6 == "" {
		return nil, errors.New("--ipv6-routed needs the --namespace-veth-cidr6 that is routed to this host")
	}
	if c.IPv6 {
		l.ip6 = &pool{}
		err := l.ip6.parse(poolFlags{
			"6", cmp.Or(c.HostVethCIDR6, behindPrefix6(l.hostVeth).String()), cmp.Or(c.NamespaceVethCIDR6, behindPrefix6(l.namespaceVeth).String()),
			cmp.Or(c.BlockedSubnetCIDR6, behindPrefix6(l.blocked).String()),
			cmp.Or(c.NamespaceInterfaceGateway6, behindPrefix6(host(l.gateway)).IP.String()),
			cmp.Or(c.NamespaceInterfaceIP6, behindPrefix6(host(l.guest)).IP.String()),
			cmp.Or(c.NamespaceInterfaceNetmask6, prefix6Bits+c.NamespaceInterfaceNetmask),
		})
		if err != nil {
			return nil, err
		}
	}
	if l.mac, err = net.ParseMAC(c.NamespaceInterfaceMAC); err != nil || len(l.mac) != 6 {
		return nil, fmt.Errorf("--namespace-interface-mac %q is no MAC address", c.NamespaceInterfaceMAC)
	}
	if !namespacePrefix.MatchString(c.NamespacePrefix) {
		return nil, fmt.Errorf("--namespace-prefix %q is not valid; use a letter and up to 5 letters or digits", c.NamespacePrefix)
	}
	if n := c.NamespaceInterface; n == "" || len(n) > 15 {
		return nil, fmt.Errorf("--namespace-interface %q is no interface name", n)
	}
	tightest := slices.MinFunc(l.pools(), func(a, b *pool) int { return a.room() - b.room() })
	room := tightest.room()
	if room < 1 {
		return nil, fmt.Errorf("the subnets %s and %s have no room for a namespace", tightest.hostVeth, tightest.namespaceVeth)
	}
	if l.openings, err = c.parseOpenings(); err != nil {
		return nil, err
	}
	if l.egress, err = parseEgress(c.Egress); err != nil {
		return nil, err
	}
	if c.AnchorTimeout < 0 {
		return nil, fmt.Errorf("--anchor-timeout is %s; it must be 0 or more", c.AnchorTimeout)
	}
	if c.TunnelPort < 0 || c.TunnelPort > 65535 {
		return nil, fmt.Errorf("--tunnel-port is %d; it must be a UDP port, or 0 for none", c.TunnelPort)
	}
	if c.TunnelAddress != "" && net.ParseIP(c.TunnelAddress) == nil {
		return nil, fmt.Errorf("--tunnel-address %q is no IP address", c.TunnelAddress)
	}
	if c.MaxConnections < 0 {
		return nil, fmt.Errorf("--max-connections is %d; it must be 0 or more", c.MaxConnections)
	}
	l.count = c.NamespaceCount
	if l.count == 0 {
		l.count = room
	}
	if l.count < 0 || l.count > room {
		return nil, fmt.Errorf("--namespace-count is %d; the subnets %s and %s have room for 1 to %d", c.NamespaceCount, tightest.hostVeth, tightest.namespaceVeth, room)
	}
	return l, nil
}

// pools are the addresses of IPv4, and those of IPv6 if there are any.
func (l *layout) pools() []*pool {
	if l.ip6 == nil {
		return []*pool{&l.pool}
	}
	return []*pool{&l.pool, l.ip6}
}

func (n *NAT) name(i int) string { return fmt.Sprintf("%s%d", n.config.NamespacePrefix, i) }
func (n *NAT) natTable() string  { return "drafter-nat-" + n.config.NamespacePrefix }
func (n *NAT) recordPath() string {
	return filepath.Join(rundir.Path, "nat-"+n.config.NamespacePrefix+".json")
}
func hostVethName(name string) string { return name + "-veth" }

func errSomebodysLink(name string) error {
	return fmt.Errorf("interface %s exists and is not ours; remove it, or choose another --namespace-prefix", hostVethName(name))
}

// namespaceVeth is the name of a namespace's end of its link with the host.
const namespaceVeth = "veth0"

// StartNAT makes the namespaces and the host's rules. It first removes what a killed NAT left
// behind, except for namespaces that a VM still uses: these are taken over unchanged.
func StartNAT(ctx context.Context, c NATConfig) (_ *NAT, err error) {
	c.Logger = logging.Or(c.Logger)
	if c.IPv6 && !hasIPv6() {
		c.Logger.Info("This host has no IPv6; guests have none, either")
		c.IPv6 = false
	}
	l, err := c.parse()
	if err != nil {
		return nil, err
	}
	n := &NAT{config: c, layout: l, guestTables: make([]applied, l.count), vacant: make([]bool, l.count), news: newNews(c.Logger)}
	lock, err := rundir.Lock("nat-" + c.NamespacePrefix)
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return nil, kind.Of(ErrInUse, fmt.Errorf("a NAT for namespaces %s… runs already as %s; end it, or choose another --namespace-prefix", c.NamespacePrefix, held.Holder))
	}
	if err != nil {
		return nil, fmt.Errorf("start NAT: %w", err)
	}
	n.lock = lock
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if n.outgoing, n.outgoing6, err = n.waysOut(c.HostInterface); err != nil {
		return nil, err
	}
	if len(n.outgoing) == 0 && len(n.outgoing6) == 0 {
		n.config.Logger.Warn("This host has no default route: until it has, guests reach only what --allow-host and --allow-cidr open. Name a --host-interface to change that")
	}
	n.follows, n.config.HostInterface = c.HostInterface == "", n.hostInterface()
	kept, err := n.reclaim()
	if err != nil {
		return nil, fmt.Errorf("clean up after an earlier NAT: %w", err)
	}
	if err := n.checkFree(kept); err != nil {
		return nil, err
	}
	if err := n.prepareHost(kept); err != nil {
		return nil, err
	}
	if n.egress, err = startEgressControl(n); err != nil {
		return nil, err
	}
	for i := range l.count {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err := n.makeNamespace(i, kept); err != nil {
			return nil, err
		}
	}
	if err := n.startTunnel(); err != nil && len(kept) == 0 {
		return nil, err
	} else if err != nil {
		n.config.Logger.Error("The NAT has no tunnel; it goes on for the VMs that use its namespaces", "error", err)
	}
	n.sayFirewalls()
	n.sayNameServers()
	n.watch, err = startWatch(n.look) //nolint:contextcheck // it ends with Close
	return n, err
}

// makeNamespace makes a namespace, or what is missing of one that was kept.
func (n *NAT) makeNamespace(i int, kept []string) error {
	name := n.name(i)
	n.created = append(n.created, name)
	if !slices.Contains(kept, name) {
		// Noted one by one, because the next NAT removes what is noted.
		n.record.Namespaces = append(n.record.Namespaces, name)
		if err := n.writeRecord(); err != nil {
			return err
		}
		if err := n.createNamespace(i); err != nil {
			return err
		}
	} else if err := n.connect(i); err != nil {
		return err
	}
	// A namespace that was kept may be of an older release, or have been made with other flags.
	if err := n.guard(i); err != nil {
		return fmt.Errorf("guard network namespace %q: %w", name, err)
	}
	isKept := slices.Contains(kept, name)
	if isKept || len(n.config.Egress) > 0 {
		if err := n.egress.enforce(name, isKept, isKept && !n.changed); err != nil {
			return err
		}
	}
	if n.changed && isKept {
		// The flags may no longer allow what was let in before.
		return forgetTenant(name)
	}
	return nil
}

// publicAddresses has one address of each quarter of the address space: a VPN may route halves or
// quarters.
var publicAddresses = []net.IP{net.IPv4(8, 8, 8, 8), net.IPv4(65, 0, 0, 1), net.IPv4(130, 0, 0, 1), net.IPv4(193, 0, 0, 1)}

// waysOut checks given interfaces, such as eth0 or eth0,eth1, or finds those through which the host
// reaches the Internet at the moment, by IPv4 and by IPv6.
func (n *NAT) waysOut(names string) (out, out6 []string, err error) {
	if names != "" {
		out = strings.Split(names, ",")
		for _, name := range out {
			if _, err := netlink.LinkByName(name); err != nil {
				return nil, nil, fmt.Errorf("--host-interface %q does not exist; see 'ip link' for those there are", name)
			}
		}
		return out, out, nil
	}
	if out, err = outgoingInterfaces(publicAddresses); err == nil && n.layout.ip6 != nil {
		out6, err = outgoingInterfaces(publicAddresses6)
	}
	return out, out6, err
}

// hostInterface is what --host-interface would name.
func (n *NAT) hostInterface() string {
	all := slices.Concat(n.outgoing, n.outgoing6)
	slices.Sort(all)
	return strings.Join(slices.Compact(all), ",")
}

// outgoingInterfaces finds those through which the host reaches public addresses at the moment. A
// route with several next hops has several. A host without such a route has no way out.
func outgoingInterfaces(addresses []net.IP) (found []string, err error) {
	for _, ip := range addresses {
		// The kernel decides, by metrics, rules and tables.
		routes, err := netlink.RouteGetWithOptions(ip, &netlink.RouteGetOptions{FIBMatch: true})
		if err != nil {
			continue // no route, or one that says unreachable
		}
		for _, r := range routes {
			hops := []int{r.LinkIndex}
			for _, h := range r.MultiPath {
				hops = append(hops, h.LinkIndex)
			}
			for _, index := range hops {
				if index == 0 {
					continue
				}
				link, err := netlink.LinkByIndex(index)
				if err != nil {
					return nil, fmt.Errorf("find default route: %w", err)
				}
				if name := link.Attrs().Name; link.Attrs().Flags&net.FlagLoopback == 0 && !slices.Contains(found, name) {
					found = append(found, name)
				}
			}
		}
	}
	slices.Sort(found)
	return found, nil
}

// reclaim removes what the last NAT of this prefix left, and returns the namespaces that are still
// in use.
func (n *NAT) reclaim() (kept []string, err error) {
	b, err := os.ReadFile(n.recordPath())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var old natRecord
	if err := json.Unmarshal(b, &old); err != nil {
		return nil, fmt.Errorf("%s: %w; remove the file after removing the namespaces by hand", n.recordPath(), err)
	}
	others, err := n.others()
	if err != nil {
		return nil, err
	}
	for _, name := range old.Namespaces {
		// The prefixes ark and ark1 may both have made ark10. This NAT was killed just before it
		// did.
		if slices.ContainsFunc(others, func(o natRecord) bool { return slices.Contains(o.Namespaces, name) }) {
			continue
		}
		anchor, aerr := anchorOf(name)
		lock, err := claimNamespace(name)
		var held *lockfile.HeldError
		switch {
		case aerr != nil:
			return nil, aerr
		case err == nil && anchor != nil && old.Config.samePool(n.config):
			kept = append(kept, name)
			n.changed = n.changed || old.Config.permissions() != n.config.permissions()
			if err := lock.Release(); err != nil {
				return nil, err
			}
		case errors.As(err, &held):
			if !old.Config.samePool(n.config) {
				return nil, fmt.Errorf("network namespace %q is in use by %s and laid out by other flags; end that process first", name, held.Holder)
			}
			kept = append(kept, name)
			n.changed = n.changed || old.Config.permissions() != n.config.permissions()
		case err != nil:
			return nil, err
		default:
			if _, err := os.Stat(filepath.Join(netnsDir, name)); err == nil && !old.Marked {
				if err := inNamespace(name, markNamespace); err != nil {
					return nil, errors.Join(err, lock.Release())
				}
			}
			if err := errors.Join(removeNamespace(name, n.config.Logger), lock.Release()); err != nil {
				return nil, err
			}
		}
	}
	if err := n.leaveFirewalls(); err != nil {
		return nil, err
	}
	n.config.Logger.Info("Removed what a killed NAT left behind", "namespaces", len(old.Namespaces)-len(kept), "inUse", len(kept))
	n.record.IPForward, n.record.Closed = old.IPForward, old.Closed
	n.record.IPv6Forward, n.record.Closed6, n.record.AcceptRA = old.IPv6Forward, old.Closed6, old.AcceptRA
	return kept, nil
}

// samePool tells whether namespaces that were laid out by c can be kept: they may gain or lose IPv6.
func (c NATConfig) samePool(now NATConfig) bool {
	if c.pool() != now.pool() {
		return false
	}
	before, err := c.parse()
	after, nerr := now.parse()
	return err == nil && nerr == nil && (before.ip6 == nil || after.ip6 == nil || before.ip6.String() == after.ip6.String())
}

// pool is the layout of the namespaces by IPv4. Everything else is set anew for those that are kept.
func (c NATConfig) pool() [8]string {
	return [...]string{
		c.HostVethCIDR, c.NamespaceVethCIDR, c.NamespaceInterface, c.NamespaceInterfaceGateway, strconv.Itoa(c.NamespaceInterfaceNetmask),
		c.NamespaceInterfaceIP, c.NamespaceInterfaceMAC, c.NamespacePrefix,
	}
}

// permissions are what guests may reach, and who may reach them.
func (c NATConfig) permissions() string {
	return fmt.Sprintf("%q %q %q %q %q %v %q %v", c.HostInterface, c.BlockedSubnetCIDR, c.AllowHost, c.AllowCIDRs, c.Egress, c.AllowIncomingTraffic, c.BlockedSubnetCIDR6, c.IPv6Routed)
}

// checkFree refuses to start where the names or addresses belong to somebody else.
func (n *NAT) checkFree(kept []string) error {
	for _, check := range []func(kept []string) error{n.checkNamespaces, n.checkTable, n.checkAddresses, n.checkOthers, n.checkRoutes} {
		if err := check(kept); err != nil {
			return err
		}
	}
	return nil
}

// checkNamespaces refuses namespaces and links that are not ours, and those in use beyond the
// count.
func (n *NAT) checkNamespaces(kept []string) error {
	for i := range n.layout.count {
		name := n.name(i)
		if slices.Contains(kept, name) {
			if ours, err := madeHere(name); err == nil && !ours {
				return fmt.Errorf("network namespace %q was made anew by somebody, and is not ours; remove it, or choose another --namespace-prefix", name)
			}
			continue
		}
		if _, err := os.Lstat(filepath.Join(netnsDir, name)); err == nil {
			return fmt.Errorf("network namespace %q exists and is not ours; remove it, or choose another --namespace-prefix", name)
		}
		if link, _, err := hostVeth(name); err != nil {
			return err
		} else if link != nil {
			return errSomebodysLink(name)
		}
	}
	for _, k := range kept {
		known := false
		for i := range n.layout.count {
			known = known || n.name(i) == k
		}
		if !known {
			return fmt.Errorf("network namespace %q is in use but beyond --namespace-count %d", k, n.layout.count)
		}
	}
	return nil
}

// checkTable refuses a table of the NAT's name where no NAT has run.
func (n *NAT) checkTable([]string) error {
	if _, err := os.Stat(n.recordPath()); !errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for family, name := range map[byte]string{unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip"} { // older releases' is of ip
		table, err := tableState(family, n.natTable())
		if err != nil {
			return err
		}
		if len(table) > 0 {
			return fmt.Errorf("nftables table %[1]s %[2]s exists and is not ours; remove it ('nft delete table %[1]s %[2]s'), or choose another --namespace-prefix", name, n.natTable())
		}
	}
	return nil
}

// checkAddresses refuses subnets that an interface of this host has an address in, or is in the
// network of.
func (n *NAT) checkAddresses(kept []string) error {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		link, err := netlink.LinkByIndex(a.LinkIndex)
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		if isHostVeth(link, kept) {
			continue
		}
		for _, p := range n.layout.pools() {
			if p.hostVeth.Contains(a.IP) || p.namespaceVeth.Contains(a.IP) {
				return fmt.Errorf("address %s of interface %s is inside the NAT's subnets; choose other --host-veth-cidr%[3]s and --namespace-veth-cidr%[3]s", a.IP, link.Attrs().Name, p.suffix)
			}
		}
		network := &net.IPNet{IP: a.IP.Mask(a.Mask), Mask: a.Mask}
		for flag, subnet := range n.subnets() {
			// The host could no longer reach the owner of such an address. A pool that VMs use
			// stays.
			if len(kept) == 0 && network.Contains(subnet.IP) {
				return fmt.Errorf("--%s %s is a part of the network %s of interface %s, of which it would take those addresses; choose another, as 172.31.252.0/22 or 192.168.252.0/22", flag, subnet, network, link.Attrs().Name)
			}
		}
	}
	return nil
}

// isHostVeth tells whether a link is the host's end of a kept namespace's.
func isHostVeth(link netlink.Link, kept []string) bool {
	return slices.ContainsFunc(kept, func(name string) bool { return hostVethName(name) == link.Attrs().Name })
}

// subnets are the addresses that the NAT takes, by flag, those of IPv4 first.
func (n *NAT) subnets() iter.Seq2[string, *net.IPNet] {
	return func(yield func(string, *net.IPNet) bool) {
		for _, p := range n.layout.pools() {
			if !yield("host-veth-cidr"+p.suffix, p.hostVeth) || !yield("namespace-veth-cidr"+p.suffix, p.namespaceVeth) {
				return
			}
		}
	}
}

// checkOthers refuses subnets of another NAT.
func (n *NAT) checkOthers([]string) error {
	others, err := n.others()
	if err != nil {
		return err
	}
	for _, o := range others {
		l, err := o.Config.parse()
		if err != nil {
			return fmt.Errorf("read record of the NAT for namespaces %s…: %w", o.Config.NamespacePrefix, err)
		}
		for flag, subnet := range n.subnets() {
			for _, p := range l.pools() {
				for _, taken := range []*net.IPNet{p.hostVeth, p.namespaceVeth} {
					if subnet.Contains(taken.IP) || taken.Contains(subnet.IP) {
						return fmt.Errorf("--%s %s overlaps with %s of the NAT for namespaces %s…; choose another", flag, subnet, taken, o.Config.NamespacePrefix)
					}
				}
			}
		}
	}
	return nil
}

// checkRoutes refuses subnets of which the host already routes a part elsewhere. A route that is
// wider than a subnet is none of these: the NAT's own are more specific. What they hide is said.
func (n *NAT) checkRoutes(kept []string) error {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for flag, subnet := range n.subnets() {
		wide, _ := subnet.Mask.Size()
		for _, r := range routes {
			if r.Dst == nil || len(r.Dst.Mask) != len(subnet.Mask) || !subnet.Contains(r.Dst.IP) && !r.Dst.Contains(subnet.IP) {
				continue
			}
			if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil && isHostVeth(link, kept) {
				continue
			}
			switch bits, _ := r.Dst.Mask.Size(); {
			case bits >= wide:
				return fmt.Errorf("--%s %s is routed elsewhere: to %s; choose another, or remove that route", flag, subnet, r.Dst)
			case bits > halves && len(kept) == 0 && r.Type == unix.RTN_UNICAST:
				n.config.Logger.Warn("This host has a route to a network that the NAT's addresses are a part of; it does not reach those there any more. Choose others if somebody has them",
					"flag", "--"+flag, "subnet", subnet.String(), "route", r.Dst.String())
			}
		}
	}
	return nil
}

// halves are the prefix lengths of the routes by which a VPN replaces the default route.
const halves = 1

// prepareHost notes the host's settings, then turns forwarding on.
func (n *NAT) prepareHost(kept []string) error {
	const forward = "net/ipv4/ip_forward"
	b, err := os.ReadFile("/proc/sys/" + forward)
	if err != nil {
		return fmt.Errorf("read kernel parameter: %w", err)
	}
	n.record.Config, n.record.Marked = n.config, true
	if err := n.noteForwarding(string(b[:1])); err != nil {
		return err
	}
	n.record.Namespaces = append([]string{}, kept...)
	if err := n.writeRecord(); err != nil {
		return err
	}
	if err := setSysctl(forward, "1"); err != nil {
		return err
	}
	if _, err := n.keepForwarding6(); err != nil {
		return err
	}
	if err := checkGuestPorts(n.config.Logger); err != nil {
		return err
	}
	if n.connections, err = n.connectionLimit(); err != nil {
		return err
	}
	return n.applyHostRules()
}

// noteForwarding notes what Close restores, given the present value of ip_forward: if another NAT
// has turned it on, the value from before that.
func (n *NAT) noteForwarding(value string) error {
	if n.record.IPForward != "" {
		return nil
	}
	others, err := n.others()
	if err != nil {
		return err
	}
	n.record.IPForward = value
	for _, o := range others {
		if o.IPForward == "0" {
			n.record.IPForward, n.record.Closed = o.IPForward, o.Closed
			return nil
		}
	}
	if value != "0" {
		return nil
	}
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		n.record.Closed = append(n.record.Closed, l.Attrs().Name)
	}
	return nil
}

// others are the records of the NATs with other prefixes.
func (n *NAT) others() ([]natRecord, error) {
	records, err := natRecords()
	return slices.DeleteFunc(records, func(r natRecord) bool { return r.Config.NamespacePrefix == n.config.NamespacePrefix }), err
}

// mostConnections bounds a share of the connection tracking. The kernel walks through a guest's
// connections at each new one. With 8192, one walk takes about half a millisecond; more would let a
// guest burn the host's time.
const mostConnections = 8192

// connectionLimit returns how many connections a guest may have opened at a time.
func (n *NAT) connectionLimit() (int, error) {
	if n.config.MaxConnections != 0 {
		return n.config.MaxConnections, nil
	}
	const table = "/proc/sys/net/netfilter/nf_conntrack_max"
	b, err := os.ReadFile(table)
	if errors.Is(err, os.ErrNotExist) {
		// Rules that need the connection tracking load it.
		if err := n.hostRules(1); err != nil {
			return 0, err
		}
		b, err = os.ReadFile(table)
	}
	if err != nil {
		return 0, fmt.Errorf("read kernel parameter: %w", err)
	}
	size, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("read kernel parameter %s: %w", table, err)
	}
	// With the ended ones, all guests together may use half of what the host tracks (openRate).
	return max(1, min(mostConnections, size/3/n.layout.count)), nil
}

// writeRecord replaces the record in one step.
func (n *NAT) writeRecord() error {
	b, err := json.Marshal(n.record)
	if err == nil {
		err = replaceFile(n.recordPath(), b)
	}
	if err != nil {
		return fmt.Errorf("record NAT: %w", err)
	}
	return nil
}

// replaceFile replaces a file in one step. If the name is a link, what it leads to stays unchanged.
func replaceFile(path string, b []byte) error {
	f, err := newfile.Create(path)
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		return errors.Join(err, f.Discard())
	}
	return f.Publish()
}

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

// Namespaces returns the names of the pool's namespaces.
func (n *NAT) Namespaces() []string { return slices.Clone(n.created) }

// Egress returns what guests may open connections to, as it is written for --egress.
func (n *NAT) Egress() string { return n.layout.egress.String() }

// ConnectionLimit returns how many connections each guest may have open at a time.
func (n *NAT) ConnectionLimit() int { return n.connections }

// Claim claims any free namespace of the pool and returns its name.
func (n *NAT) Claim() (string, *Claim, error) {
	if n.lock == nil {
		return "", nil, kind.Of(kind.ErrClosed, errors.New("claim network namespace: the NAT is closed"))
	}
	for _, name := range n.created {
		if anchor, err := anchorOf(name); err != nil {
			return "", nil, err
		} else if anchor != nil {
			continue
		}
		claim, err := claimNamespace(name)
		var held *lockfile.HeldError
		if errors.As(err, &held) {
			continue
		}
		if err != nil {
			return "", nil, fmt.Errorf("claim network namespace %q: %w", name, err)
		}
		return name, &Claim{name, claim}, nil
	}
	return "", nil, kind.Of(ErrInUse, fmt.Errorf("all %d network namespaces are in use; raise --namespace-count", len(n.created)))
}

// removeNamespace removes a namespace and its link with the host. A namespace that somebody has
// made in place of ours stays.
func removeNamespace(name string, log *slog.Logger) error {
	if err := checkNamespaceName(name); err != nil {
		return err
	}
	var errs []error
	if _, err := os.Stat(filepath.Join(netnsDir, name)); err == nil {
		ours, err := madeHere(name)
		if err != nil {
			return err
		}
		if !ours {
			log.Warn("A network namespace was made anew by somebody, and stays", "namespace", name)
			return nil
		}
	}
	// The link first: a VMM that still runs keeps the namespace alive, and the link and its
	// addresses with it.
	link, ours, err := hostVeth(name)
	errs = append(errs, err)
	if link != nil && ours {
		// The kernel removes it, too, behind a namespace that is gone.
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove %s: %w", hostVethName(name), err))
		}
	}
	errs = append(errs, deleteNamespace(name), forgetAnchor(name), expectNobody(name), forgetList(landingRecords, name), forgetEgress(name))
	return errors.Join(errs...)
}

// endLinks ends what goes on by the tunnel, and tells the other hosts.
func (n *NAT) endLinks() error {
	if n.tunnel == nil {
		return nil
	}
	var errs []error
	for _, ns := range n.created {
		errs = append(errs, endLandings(ns, uuid.Nil))
		a, err := anchorOf(ns)
		if a != nil && a.At != nil {
			err = a.disconnect()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Close removes everything the NAT has made and restores what it has changed. VMs in its namespaces
// lose their network.
func (n *NAT) Close() error {
	if n.lock == nil {
		return nil
	}
	errs := []error{n.watch.Close()}
	n.watch = nil
	errs = append(errs, n.egress.Close(), n.endLinks(), n.tunnel.close())
	for _, name := range slices.Backward(n.created) {
		errs = append(errs, removeNamespace(name, n.config.Logger))
	}
	if n.record.Namespaces != nil {
		errs = append(errs, n.removeTunnel(), n.leaveFirewalls(), deleteTable(n.natTable()))
		if err := errors.Join(errs...); err == nil {
			errs = append(errs, os.Remove(n.recordPath()))
		}
		// The last NAT restores them. Each removes its own record first, so that of two that end
		// together one is the last.
		others, err := n.others()
		errs = append(errs, err)
		if n.record.IPForward == "0" && len(others) == 0 && err == nil {
			errs = append(errs, setSysctl("net/ipv4/ip_forward", "0"))
		}
		errs = append(errs, n.restoreForwarding6())
	}
	errs = append(errs, n.lock.Release(), rundir.Remove())
	n.lock = nil
	return errors.Join(errs...)
}

package network

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
	// 169.254.169.254/32:53/udp; the host's own only as /32, and narrower closed ones only by themselves
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
	// kernel parameters that do not come back when forwarding is turned off again, and their values
	// before any NAT; those of IPv6
	Settings  map[string]string `json:"settings,omitempty"`
	Settings6 map[string]string `json:"settings6,omitempty"`
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
	n.record.IPForward, n.record.Closed, n.record.Settings = old.IPForward, old.Closed, old.Settings
	n.record.IPv6Forward, n.record.Closed6, n.record.Settings6, n.record.AcceptRA = old.IPv6Forward, old.Closed6, old.Settings6, old.AcceptRA
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

// prepareHost notes the host's settings, then turns forwarding on.
func (n *NAT) prepareHost(kept []string) error {
	b, err := os.ReadFile("/proc/sys/" + forwarding4)
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
	if err := setSysctl(forwarding4, "1"); err != nil {
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
	ruled := false
	for _, family := range []byte{unix.NFPROTO_INET, unix.NFPROTO_IPV4} { // older releases' is of ip
		table, err := tableState(family, n.natTable())
		if err != nil {
			return err
		}
		ruled = ruled || len(table) > 0
	}
	if err := n.applyHostRules(); err != nil {
		return err
	}
	if len(kept) > 0 && !ruled { // somebody has removed the table since the earlier NAT was killed
		return n.forgetUnruled()
	}
	return nil
}

const forwarding4 = "net/ipv4/ip_forward"

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
			n.record.IPForward, n.record.Closed, n.record.Settings = o.IPForward, o.Closed, o.Settings
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
	n.record.Settings, err = forwardingSettings("ipv4")
	for _, l := range links {
		if name := l.Attrs().Name; n.record.Settings["net/ipv4/conf/"+name+"/forwarding"] == "" {
			n.record.Closed = append(n.record.Closed, name)
		}
	}
	return err
}

// forwardingSettings are the kernel parameters of a protocol that a host has lost when forwarding was
// turned on for all its interfaces and off again (inet_forward_change and addrconf_fixup_forwarding of
// Linux): that some interfaces forward, and that none takes ICMP redirects.
func forwardingSettings(protocol string) (map[string]string, error) {
	settings := map[string]string{}
	const root = "/proc/sys/"
	for name, value := range map[string]string{"*/forwarding": "1", "*/force_forwarding": "1", "all/accept_redirects": "0"} {
		paths, err := filepath.Glob(root + "net/" + protocol + "/conf/" + name)
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			b, err := os.ReadFile(path)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return nil, fmt.Errorf("read kernel parameter: %w", err)
			}
			if strings.TrimSpace(string(b)) == value {
				settings[strings.TrimPrefix(path, root)] = value
			}
		}
	}
	return settings, nil
}

// turnOff turns forwarding off, and leaves settings as they were.
func turnOff(forward string, settings map[string]string) error {
	errs := []error{setSysctl(forward, "0")}
	for name, value := range settings {
		_, err := keepSysctl(name, value)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
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
		err = newfile.WriteBytes(n.recordPath(), b)
	}
	if err != nil {
		return fmt.Errorf("record NAT: %w", err)
	}
	return nil
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
			errs = append(errs, turnOff(forwarding4, n.record.Settings))
		}
		errs = append(errs, n.restoreForwarding6())
	}
	errs = append(errs, n.lock.Release(), rundir.Remove())
	n.lock = nil
	return errors.Join(errs...)
}

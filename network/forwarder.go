package network

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/logging"
	"drafter/internal/newfile"
	"drafter/internal/rundir"
)

// PortForward makes a guest's port reachable at an address of the host's.
type PortForward struct {
	Netns        string `json:"netns"`        // namespace the guest is in
	InternalPort string `json:"internalPort"` // port in the guest
	Protocol     string `json:"protocol"`     // "tcp" or "udp"
	// address and port (below 61000) on the host; no wildcard
	ExternalAddr string `json:"externalAddr"`
	// "ipv4" or "ipv6": by which the guest is reached; "" for that of ExternalAddr. Another one, and
	// the loopback address of IPv6, take TCP only
	InternalFamily string `json:"internalFamily,omitempty"`
}

// ForwarderConfig says what to forward.
type ForwarderConfig struct {
	HostVethCIDR  string // the NAT's
	HostVethCIDR6 string // likewise; "" for HostVethCIDR behind the prefix of a NAT's defaults
	PortForwards  []PortForward

	Logger *slog.Logger // nil: slog.Default()
}

// Forwarder is a set of port forwards in force until Close.
type Forwarder struct {
	name     string // of the table and the lock file
	lock     *lockfile.Lock
	reserved []io.Closer

	forwards []forward
	table    applied
	watch    *watch
	news     *news
}

const forwarderPrefix = "drafter-forwarder-"

// forward is a PortForward resolved on this host.
type forward struct {
	PortForward
	external   netip.AddrPort
	internal   uint16
	target     net.IP // the namespace's end of its link
	targetLink string // the host's end
	relayed    bool   // by this process, because the kernel cannot
}

// StartForwarder puts the forwards in force. It first removes what a killed forwarder left behind.
func StartForwarder(c ForwarderConfig) (_ *Forwarder, err error) {
	links := &hostVeths{}
	if links.ip4, err = parseSubnet("host-veth-cidr", c.HostVethCIDR, false); err != nil {
		return nil, err
	}
	links.ip6, err = parseSubnet("host-veth-cidr6", cmp.Or(c.HostVethCIDR6, behindPrefix6(links.ip4).String()), true)
	if err != nil {
		return nil, err
	}
	if len(c.PortForwards) == 0 {
		return nil, errors.New("no port forwards are given; pass --port-forwards")
	}
	var forwards []forward
	for _, p := range c.PortForwards {
		f, err := p.resolve(links)
		if err != nil {
			return nil, fmt.Errorf("port forward %s to %s:%s: %w", p.ExternalAddr, p.Netns, p.InternalPort, err)
		}
		forwards = append(forwards, f)
	}
	c.Logger = logging.Or(c.Logger)
	if err := reclaimForwarders(c.Logger); err != nil {
		return nil, fmt.Errorf("clean up after an earlier forwarder: %w", err)
	}
	f := &Forwarder{name: forwarderPrefix + strconv.Itoa(os.Getpid()), forwards: forwards, news: newNews(c.Logger)}
	for suffix := 0; f.lock == nil; suffix++ {
		if suffix > 0 {
			f.name = fmt.Sprintf("%s%d-%d", forwarderPrefix, os.Getpid(), suffix)
		}
		var held *lockfile.HeldError
		if f.lock, err = rundir.Lock(forwarderLocks + f.name); err != nil && !errors.As(err, &held) {
			return nil, fmt.Errorf("start forwarder: %w", err)
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	list, err := json.Marshal(c.PortForwards)
	if err == nil {
		err = newfile.WriteBytes(f.listPath(), list)
	}
	if err != nil {
		return nil, fmt.Errorf("note forwards: %w", err)
	}
	for _, p := range forwards {
		if p.relayed {
			err = f.relay(p, c.Logger)
		} else {
			err = f.reserve(p)
		}
		if err != nil {
			return nil, err
		}
	}
	f.forwards = slices.DeleteFunc(f.forwards, func(p forward) bool { return p.relayed })
	if err := f.apply(); err != nil {
		return nil, err
	}
	f.watch, err = startWatch(f.look)
	return f, err
}

// apply puts the forwards in force and notes the kernel's form of them. A client that sent to an
// address before has a connection that leads elsewhere. apply ends it, so that the next packet
// takes the forward.
func (f *Forwarder) apply() error {
	if err := f.applyRules(f.forwards); err != nil {
		return err
	}
	f.table.table = f.name
	if err := f.table.note(); err != nil {
		return err
	}
	return forgetConnections(func(c *netlink.ConntrackFlow) bool {
		return slices.ContainsFunc(f.forwards, func(p forward) bool {
			return p.takes(c) && (!c.Reverse.SrcIP.Equal(p.target) || c.Reverse.SrcPort != p.internal)
		})
	})
}

// takes tells whether a connection was opened to the external address of p.
func (p PortForward) takes(c *netlink.ConntrackFlow) bool {
	external, err := netip.ParseAddrPort(p.ExternalAddr)
	protocol := map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[c.Forward.Protocol]
	return err == nil && external == netip.AddrPortFrom(addrOf(c.Forward.DstIP), c.Forward.DstPort) && p.Protocol == protocol
}

// look puts the forwards back in force if somebody has removed or changed them.
func (f *Forwarder) look() {
	intact, err := f.table.intact()
	if err == nil && !intact {
		err = f.apply()
	}
	f.news.mended("nftables table inet "+f.name, !intact, err)
	for _, p := range f.forwards {
		line := ""
		if own, err := hostAddress(p.external.Addr().AsSlice()); err == nil && !own {
			line = "A forward's address is none of this host any more"
		}
		f.news.say(p.ExternalAddr, line, "address", p.external.Addr().String())
	}
}

// forwarderLocks is the directory below [rundir.Path] in which each forwarder has a lock and a list
// of its forwards, both named like its table.
const forwarderLocks = "forwarders/"

// hostVeths are the subnets of links between host and namespaces, each with its flag's name.
type hostVeths struct{ ip4, ip6 *net.IPNet }

// Check refuses a forward that no host can have. Whether this one can is known at the start.
func (p PortForward) Check() error {
	_, _, err := p.parse()
	return err
}

// parse returns the forward as far as that needs no namespace, and whether it leads to IPv6.
func (p PortForward) parse() (f forward, ip6 bool, err error) {
	f = forward{PortForward: p}
	if p.Protocol != "tcp" && p.Protocol != "udp" {
		return f, false, fmt.Errorf("protocol %q is not supported; choose tcp or udp", p.Protocol)
	}
	port, err := strconv.ParseUint(p.InternalPort, 10, 16)
	if err != nil || port == 0 {
		return f, false, fmt.Errorf("internal port %q is not in 1…65535", p.InternalPort)
	}
	f.internal = uint16(port)
	if strings.HasPrefix(p.ExternalAddr, ":") {
		return f, false, errWildcard
	}
	if f.external, err = netip.ParseAddrPort(p.ExternalAddr); err != nil || f.external.Port() == 0 {
		return f, false, fmt.Errorf("external address %q is no address and port; write it as 127.0.0.1:3333", p.ExternalAddr)
	}
	if f.external.Port() >= firstGuestPort {
		return f, false, fmt.Errorf("external ports from %d on are those that guests send from; choose one below", firstGuestPort)
	}
	if f.external.Addr().IsUnspecified() {
		return f, false, errWildcard
	}
	addr := f.external.Addr()
	if addr.Is4In6() || addr.Zone() != "" || addr.IsLinkLocalUnicast() && addr.Is6() || addr.IsMulticast() {
		return f, false, fmt.Errorf("%s cannot be forwarded; name an address that is IPv4, or IPv6 and not link-local", addr)
	}
	ip6 = addr.Is6()
	switch p.InternalFamily {
	case "":
	case "ipv4", "ipv6":
		ip6 = p.InternalFamily == "ipv6"
	default:
		return f, false, fmt.Errorf("internal family %q is not supported; choose ipv4 or ipv6", p.InternalFamily)
	}
	f.relayed = ip6 != addr.Is6() || ip6 && addr.IsLoopback()
	if f.relayed && p.Protocol != "tcp" {
		return f, false, fmt.Errorf("%s to the guest by %s takes TCP only; forward an address that is no loopback address and of the same protocol", addr, familyOf(ip6))
	}
	return f, ip6, nil
}

func (p PortForward) resolve(links *hostVeths) (forward, error) {
	f, ip6, err := p.parse()
	if err != nil {
		return f, err
	}
	if f.target, err = links.namespaceAddress(p.Netns, ip6); err != nil {
		return f, err
	}
	if f.targetLink, err = linkTowards(f.target); err != nil {
		return f, err
	}
	return f, checkLoopback(f)
}

func familyOf(ip6 bool) string {
	if ip6 {
		return "IPv6"
	}
	return "IPv4"
}

// errWildcard refuses wildcard addresses: the rules rewrite packets by destination address, and
// every address of the host also carries other traffic.
var errWildcard = errors.New("wildcard addresses cannot be forwarded: they would take the port on every address, those of other VMs included; name each address")

// namespaceAddress finds a namespace's end of its link with the host.
func (h *hostVeths) namespaceAddress(ns string, ip6 bool) (ip net.IP, err error) {
	hostVeth, flag := h.ip4, "--host-veth-cidr"
	if ip6 {
		hostVeth, flag = h.ip6, "--host-veth-cidr6, and start it with IPv6"
	}
	err = inNamespace(ns, func() error {
		addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list addresses in network namespace %q: %w", ns, err)
		}
		for _, a := range addrs {
			if hostVeth.Contains(a.IP) {
				ip = a.IP
				return nil
			}
		}
		return fmt.Errorf("network namespace %q has no address in %s; pass the NAT's %s", ns, hostVeth, flag)
	})
	return ip, err
}

func linkTowards(ip net.IP) (string, error) {
	routes, err := netlink.RouteGet(ip)
	if err != nil || len(routes) == 0 {
		return "", fmt.Errorf("find route to %s: %w", ip, err)
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", fmt.Errorf("find route to %s: %w", ip, err)
	}
	return link.Attrs().Name, nil
}

// reserve binds the external address without listening. So a port in use is noticed here, and
// nobody can take it later, whose traffic the rules would divert.
func (f *Forwarder) reserve(p forward) error {
	kind := unix.SOCK_STREAM
	if p.Protocol == "udp" {
		kind = unix.SOCK_DGRAM
	}
	family := unix.AF_INET
	if p.external.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("reserve %s/%s: %w", p.external, p.Protocol, err)
	}
	socket := os.NewFile(uintptr(fd), p.external.String())
	if port := int(p.external.Port()); family == unix.AF_INET {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: p.external.Addr().As4()})
	} else {
		err = unix.Bind(fd, &unix.SockaddrInet6{Port: port, Addr: p.external.Addr().As16()})
	}
	if err != nil {
		return errors.Join(p.explain(err), socket.Close())
	}
	f.reserved = append(f.reserved, socket)
	return nil
}

// relay forwards in this process.
func (f *Forwarder) relay(p forward, log *slog.Logger) error {
	to := netip.AddrPortFrom(addrOf(p.target), p.internal)
	r, err := startRelay(p.external.String(), to.String(), log)
	if err != nil {
		return p.explain(err)
	}
	f.reserved = append(f.reserved, r)
	return nil
}

func addrOf(ip net.IP) netip.Addr {
	addr, _ := netip.AddrFromSlice(ip)
	return addr.Unmap()
}

// explain tells why the external address cannot be had.
func (p forward) explain(err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("port %s/%s is taken by another process; choose another external address", p.external, p.Protocol)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("%s is no address of this host; see 'ip address' for those there are", p.external.Addr())
	}
	return fmt.Errorf("reserve %s/%s: %w", p.external, p.Protocol, err)
}

// checkLoopback refuses a loopback address if packets with a loopback source cannot leave through
// the link. The NAT allows that on its links.
func checkLoopback(p forward) error {
	if !p.external.Addr().IsLoopback() || p.relayed {
		return nil
	}
	name := "/proc/sys/net/ipv4/conf/" + p.targetLink + "/route_localnet"
	b, err := os.ReadFile(name)
	if err != nil {
		return fmt.Errorf("read kernel parameter: %w", err)
	}
	if strings.TrimSpace(string(b)) == "0" {
		return fmt.Errorf("the link %s was not made by drafter nat: it does not take packets from loopback addresses; set %s to 1", p.targetLink, name)
	}
	return nil
}

func (f *Forwarder) applyRules(forwards []forward) error {
	r, err := newRuleset(rulesFamily(), f.name)
	if err != nil {
		return err
	}
	raw, incoming, local, outgoing := r.chain(hookRaw), r.chain(hookIncoming), r.chain(hookLocal), r.chain(hookOutgoing)
	var links []string
	for _, p := range forwards {
		external := host(p.external.Addr().AsSlice())
		// Others reach the address through prerouting, the host itself through output. Only the
		// host may reach a loopback address. The kernel would not stop a neighbour who sends to it,
		// because it checks the address only after this rule.
		if !p.external.Addr().IsLoopback() {
			r.rule(incoming, toAddress(external), toPort(p.Protocol, p.external.Port()), destinationNAT(p.target, p.internal))
		}
		r.rule(local, toAddress(external), toPort(p.Protocol, p.external.Port()), destinationNAT(p.target, p.internal))
		if !slices.Contains(links, p.targetLink) {
			links = append(links, p.targetLink)
			r.rule(outgoing, fromAddress(loopback), toInterface(p.targetLink), masquerade())
			r.rule(raw, fromInterface(p.targetLink), toAddress(loopback), drop())
		}
	}
	return r.apply()
}

// reclaimForwarders removes the tables of forwarders that no longer run.
func reclaimForwarders(log *slog.Logger) error {
	locks, err := filepath.Glob(filepath.Join(rundir.Path, forwarderLocks, forwarderPrefix+"*.lock"))
	if err != nil {
		return err
	}
	for _, path := range locks {
		name := strings.TrimSuffix(filepath.Base(path), ".lock")
		lock, err := rundir.Lock(forwarderLocks + name)
		var held *lockfile.HeldError
		if errors.As(err, &held) {
			continue
		}
		if err != nil {
			return err
		}
		dead := &Forwarder{name: name, lock: lock}
		if err := dead.Close(); err != nil {
			return err
		}
		log.Info("Removed what a killed forwarder left behind", "table", name)
	}
	return nil
}

// isPublished tells whether a forwarder that runs leads to a namespace.
func isPublished(ns string) (bool, error) {
	lists, err := filepath.Glob(filepath.Join(rundir.Path, forwarderLocks, forwarderPrefix+"*.json"))
	if err != nil {
		return false, err
	}
	for _, path := range lists {
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // it has just ended
		}
		var list []PortForward
		if err == nil {
			err = json.Unmarshal(b, &list)
		}
		if err != nil {
			return false, fmt.Errorf("read forwards: %s: %w", path, err)
		}
		if !slices.ContainsFunc(list, func(p PortForward) bool { return p.Netns == ns }) {
			continue
		}
		lock, err := rundir.Lock(forwarderLocks + strings.TrimSuffix(filepath.Base(path), ".json"))
		var held *lockfile.HeldError
		if errors.As(err, &held) {
			return true, nil
		}
		if err == nil { // it was killed
			err = lock.Release()
		}
		if err != nil {
			return false, err
		}
	}
	return false, nil
}

// listPath is where a forwarder notes its forwards, so that the next one can end their connections
// after a crash.
func (f *Forwarder) listPath() string {
	return filepath.Join(rundir.Path, forwarderLocks, f.name+".json")
}

// forgetForwards ends the connections that came in through the forwards.
func (f *Forwarder) forgetForwards() error {
	b, err := os.ReadFile(f.listPath())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var list []PortForward
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil {
		return fmt.Errorf("read forwards: %s: %w", f.listPath(), err)
	}
	err = forgetConnections(func(c *netlink.ConntrackFlow) bool {
		return slices.ContainsFunc(list, func(p PortForward) bool { return p.takes(c) })
	})
	return errors.Join(err, os.Remove(f.listPath()))
}

// Close ends the forwards, and the connections that came in through them. New ones are refused.
func (f *Forwarder) Close() error {
	if f.lock == nil {
		return nil
	}
	errs := []error{f.watch.Close(), deleteTable(f.name), f.forgetForwards()}
	for _, r := range f.reserved {
		errs = append(errs, r.Close())
	}
	errs = append(errs, f.lock.Release(), rundir.Remove())
	f.lock = nil
	return errors.Join(errs...)
}

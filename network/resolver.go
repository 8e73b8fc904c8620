package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// resolverFiles are the host's name servers (resolv.conf(5)), and where those behind a stub on a
// loopback address are: systemd-resolved's, NetworkManager's. Variables for the tests.
var resolverFiles = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"}

// maxNameServers is MAXNS of resolv.h: a resolver asks no more.
const maxNameServers = 3

// Resolver is whom a guest asks for names.
type Resolver struct {
	NameServers []net.IP // at most three, no loopback address
	Search      []string // domains
}

// ResolverFor returns the resolver for guests: with the given name servers, or else with the host's
// own at the moment, which are not its stubs on loopback addresses. ip6 tells whether guests have IPv6.
func ResolverFor(nameServers []string, ip6 bool) (Resolver, error) {
	if len(nameServers) > 0 {
		var r Resolver
		for _, s := range nameServers {
			ip := net.ParseIP(s)
			if !usable(ip, true) {
				return r, fmt.Errorf("--dns %q is no address of a name server that a guest can ask", s)
			}
			r.NameServers = append(r.NameServers, ip)
		}
		if len(r.NameServers) > maxNameServers {
			return r, fmt.Errorf("--dns has %d name servers; at most %d are asked", len(r.NameServers), maxNameServers)
		}
		return r, nil
	}
	var found Resolver
	var errs []error
	for _, path := range resolverFiles {
		b, err := os.ReadFile(path)
		if err != nil {
			if path == resolverFiles[0] || !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
			continue
		}
		r := parseResolver(string(b), ip6)
		if len(found.Search) == 0 {
			found.Search = r.Search
		}
		if len(r.NameServers) > 0 {
			found.NameServers = r.NameServers
			return found, nil
		}
		errs = append(errs, fmt.Errorf("%s names none", path))
	}
	reachable := "not on a loopback or link-local address"
	if !ip6 {
		reachable = "IPv4, not on a loopback address"
	}
	return Resolver{}, fmt.Errorf("this host has no name server that a guest could ask (%s): %w; name one with --dns", reachable, joined(errs))
}

// joined is errors.Join in one line.
func joined(errs []error) error {
	var lines []string
	for _, err := range errs {
		lines = append(lines, err.Error())
	}
	return errors.New(strings.Join(lines, ", "))
}

// usable tells whether guests may reach an address, those with IPv6 or those without.
func usable(ip net.IP, ip6 bool) bool {
	if ip == nil || ip.IsLoopback() || ip.IsUnspecified() || ip.IsMulticast() {
		return false
	}
	return ip.To4() != nil || ip6 && !ip.IsLinkLocalUnicast()
}

// parseResolver reads a resolv.conf(5): the last of search and domain counts.
func parseResolver(text string, ip6 bool) (r Resolver) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if ip := net.ParseIP(fields[1]); usable(ip, ip6) && len(r.NameServers) < maxNameServers {
				r.NameServers = append(r.NameServers, ip)
			}
		case "search", "domain":
			r.Search = slices.DeleteFunc(slices.Clone(fields[1:]), func(s string) bool { return s == "." })
		}
	}
	return r
}

// String is a resolv.conf(5).
func (r Resolver) String() string {
	var b strings.Builder
	for _, ip := range r.NameServers {
		fmt.Fprintf(&b, "nameserver %s\n", ip)
	}
	if len(r.Search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(r.Search, " "))
	}
	return b.String()
}

// sayNameServers names the host's name servers that guests do not reach, and what opens them. With an
// egress that is not allow they need none, or those that it has.
func (n *NAT) sayNameServers() {
	if n.layout.egress != nil {
		return
	}
	r, err := ResolverFor(nil, n.layout.ip6 != nil)
	if err != nil {
		n.news.say("name servers", "Guests have no name server unless --dns names one", "error", err)
		return
	}
	for _, ip := range r.NameServers {
		flags := n.opens(ip)
		line := ""
		if flags != "" {
			line = "Guests do not reach a name server of this host; open it, or name another one to guests with --dns"
		}
		n.news.say("name server "+ip.String(), line, "nameServer", ip.String(), "open", flags)
	}
}

// opens returns the flags that let guests reach a name server; "" if they do.
func (n *NAT) opens(ip net.IP) string {
	p, outgoing := &n.layout.pool, n.outgoing
	if ip.To4() == nil {
		p, outgoing = n.layout.ip6, n.outgoing6
	}
	to, err := hostAddress(ip)
	closed := err == nil && to
	opened := slices.ContainsFunc(n.layout.openings, func(o opening) bool {
		if o.port != 0 && (o.port != dnsPort || o.protocol != "udp") {
			return false
		}
		if o.to == nil || closed {
			return closed && o.host() && (o.to == nil || o.to.Contains(ip))
		}
		return o.to.Contains(ip) && !slices.ContainsFunc(p.closed(), func(c *net.IPNet) bool { return c.Contains(ip) && o.spares(c) })
	})
	switch {
	case p.tapNetwork().Contains(ip):
		return fmt.Sprintf("other --namespace-interface-gateway%[1]s and --namespace-interface-ip%[1]s: these hide it", p.suffix)
	case opened:
		return ""
	case closed:
		return "--allow-host 53/udp,53/tcp"
	}
	for _, c := range p.closed() {
		closed = closed || c.Contains(ip)
	}
	if link, err := linkTowards(ip); err == nil && !slices.Contains(outgoing, link) {
		closed = true
	}
	if closed {
		return fmt.Sprintf("--allow-cidr %[1]s:53/udp,%[1]s:53/tcp", host(ip))
	}
	return ""
}

// hostAddress tells whether an address is the host's own.
func hostAddress(ip net.IP) (bool, error) {
	routes, err := netlink.RouteGet(ip)
	if err != nil {
		return false, err
	}
	return len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL, nil
}

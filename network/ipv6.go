package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// ipv6Settings is there if the kernel has IPv6. A variable for the tests.
var ipv6Settings = "/proc/sys/net/ipv6"

// hasIPv6 tells whether the calling thread's network namespace has IPv6.
func hasIPv6() bool {
	b, err := os.ReadFile(ipv6Settings + "/conf/all/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "0"
}

// publicAddresses6 has one address of each half of what is routed publicly (2000::/3), and of the
// networks of the registries.
var publicAddresses6 = []net.IP{net.ParseIP("2001:4860:4860::8888"), net.ParseIP("2606:4700::1"), net.ParseIP("2a00:1450::1"), net.ParseIP("3000::1")}

// guarded6 is [guarded] for IPv6.
var guarded6 = append([]*net.IPNet{
	cidr("::/96"),                  // unspecified and loopback addresses
	cidr("::ffff:0:0/96"),          // IPv4 addresses (RFC 4291, 2.5.5.2)
	cidr("fe80::/10"),              // link-local
	cidr("fec0::/10"),              // site-local, as which nothing is routed any more (RFC 3879)
	cidr("ff00::/8"),               // multicast
	cidr("fd00:ec2::/32"),          // metadata service, name server and clock of Amazon's cloud
	cidr("fd20:ce::254/128"),       // metadata service of Google's
	cidr("fd00:c1::a9fe:a9fe/128"), // of Oracle's
	cidr("fd00:42::42/128"),        // of Scaleway's
	cidr("fd00:a9fe:a9fe::1/128"),  // of Akamai's
}, translated(guarded)...)

// translated are IPv4 addresses as a NAT64 of the network would reach them (RFC 6052, 2.1; RFC 8215), or
// a router of 6to4 (RFC 3056).
func translated(addresses []*net.IPNet) (all []*net.IPNet) {
	for _, before := range []*net.IPNet{cidr("64:ff9b::/96"), cidr("64:ff9b:1::/96"), cidr("2002::/16")} {
		length, _ := before.Mask.Size()
		for _, a := range addresses {
			bits, _ := a.Mask.Size()
			ip := slices.Clone(before.IP)
			copy(ip[length/8:], a.IP.To4())
			all = append(all, &net.IPNet{IP: ip, Mask: net.CIDRMask(length+bits, 128)})
		}
	}
	return all
}

// tapLinkLocal is the tap's link-local address, from which the namespace asks for the guest. That made
// of its MAC address may be the guest's own.
var tapLinkLocal = &net.IPNet{IP: net.ParseIP("fe80::1"), Mask: net.CIDRMask(64, 128)}

// parameters6 are the kernel parameters of an interface of ours, in the order in which they are set.
func (l *layout) parameters6(name string) []parameter {
	of := "net/ipv6/conf/" + name
	if l.ip6 == nil {
		// Without this, link-local addresses would reach whatever listens on the host's [::].
		return []parameter{{of + "/disable_ipv6", "1"}}
	}
	// With no address but our own. The kernel makes one as soon as the interface has IPv6.
	return []parameter{{of + "/addr_gen_mode", "1"}, {of + "/accept_ra", "0"}, {of + "/disable_ipv6", "0"}}
}

// forwardParameters are the kernel parameters of a namespace.
func (l *layout) forwardParameters() []parameter {
	all := []parameter{{"net/ipv4/ip_forward", "1"}}
	if l.ip6 == nil {
		return all
	}
	return append(all, parameter{"net/ipv6/conf/all/addr_gen_mode", "1"}, parameter{"net/ipv6/conf/default/accept_ra", "0"},
		parameter{"net/ipv6/conf/all/disable_ipv6", "0"}, parameter{"net/ipv6/conf/default/disable_ipv6", "0"},
		parameter{"net/ipv6/conf/all/forwarding", "1"})
}

const forwarding6 = "net/ipv6/conf/all/forwarding"

func acceptRA(link string) string { return "net/ipv6/conf/" + link + "/accept_ra" }

// keepForwarding6 turns forwarding by IPv6 on, or on again, and notes before what Close restores. A
// host that forwards takes router advertisements, and with them its own default route, only where
// accept_ra is 2 (ip-sysctl.rst). So it becomes 2 where it was 1.
func (n *NAT) keepForwarding6() (done bool, err error) {
	if n.layout.ip6 == nil {
		return false, nil
	}
	b, err := os.ReadFile("/proc/sys/" + forwarding6)
	if err != nil {
		return false, fmt.Errorf("read kernel parameter: %w", err)
	}
	off := strings.TrimSpace(string(b)) == "0"
	links, err := netlink.LinkList()
	if err != nil {
		return false, fmt.Errorf("list interfaces: %w", err)
	}
	done = off && n.record.IPv6Forward != "" // it was on before
	changed, err := n.noteForwarding6(off, links)
	if err != nil {
		return false, err
	}
	var advertised []string
	if n.record.IPv6Forward == "0" {
		advertised = takingAdvertisements(links)
	}
	for _, name := range advertised {
		if !slices.Contains(n.record.AcceptRA, name) {
			n.record.AcceptRA, changed = append(n.record.AcceptRA, name), true
		}
	}
	if changed {
		if err := n.writeRecord(); err != nil {
			return false, err
		}
	}
	for _, name := range advertised {
		if err := setSysctl(acceptRA(name), "2"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, err
		}
	}
	if off {
		err = setSysctl(forwarding6, "1")
	}
	return done, err
}

// noteForwarding6 notes what Close restores, given whether forwarding is off: if another NAT has turned
// it on, what that has noted. It tells whether anything is to be written.
func (n *NAT) noteForwarding6(off bool, links []netlink.Link) (changed bool, err error) {
	others, err := n.others()
	if err != nil {
		return false, err
	}
	others = slices.DeleteFunc(others, func(o natRecord) bool { return o.IPv6Forward != "0" })
	r := &n.record
	switch {
	case r.IPv6Forward == "" && len(others) > 0:
		r.IPv6Forward, r.Closed6, r.Settings6, changed = "0", others[0].Closed6, others[0].Settings6, true
	case r.IPv6Forward == "" && !off:
		r.IPv6Forward, changed = "1", true
	case r.IPv6Forward == "":
		r.IPv6Forward, changed = "0", true
		if r.Settings6, err = forwardingSettings("ipv6"); err != nil {
			return false, err
		}
		for _, l := range links {
			if name := l.Attrs().Name; r.Settings6["net/ipv6/conf/"+name+"/force_forwarding"] == "" {
				r.Closed6 = append(r.Closed6, name)
			}
		}
	case off && r.IPv6Forward != "0":
		// As with IPv4: the last NAT that ends turns it off, too.
		r.IPv6Forward, changed = "0", true
		if r.Settings6, err = forwardingSettings("ipv6"); err != nil {
			return false, err
		}
	}
	// Interfaces come and go, such as those of containers.
	gone := func(name string) bool {
		return !slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Attrs().Name == name })
	}
	before := len(r.AcceptRA)
	r.AcceptRA = slices.DeleteFunc(r.AcceptRA, gone)
	changed = changed || len(r.AcceptRA) != before
	for _, o := range others {
		for _, name := range o.AcceptRA {
			if !slices.Contains(r.AcceptRA, name) && !gone(name) {
				r.AcceptRA, changed = append(r.AcceptRA, name), true
			}
		}
	}
	return changed, nil
}

// takingAdvertisements are the interfaces that take router advertisements unless they forward.
func takingAdvertisements(links []netlink.Link) (names []string) {
	for _, l := range links {
		name := l.Attrs().Name
		b, err := os.ReadFile("/proc/sys/" + acceptRA(name))
		if err == nil && strings.TrimSpace(string(b)) == "1" && l.Attrs().Flags&net.FlagLoopback == 0 {
			names = append(names, name)
		}
	}
	return names
}

// restoreForwarding6 undoes keepForwarding6 unless another NAT needs it.
func (n *NAT) restoreForwarding6() error {
	others, err := n.others()
	if err != nil || n.record.IPv6Forward != "0" || slices.ContainsFunc(others, func(o natRecord) bool { return o.IPv6Forward != "" }) {
		return err
	}
	if err := turnOff(forwarding6, n.record.Settings6); err != nil {
		return err
	}
	for _, name := range n.record.AcceptRA {
		b, err := os.ReadFile("/proc/sys/" + acceptRA(name))
		if err != nil || strings.TrimSpace(string(b)) != "2" {
			continue // it is gone, or somebody else has set it
		}
		if err := setSysctl(acceptRA(name), "1"); err != nil {
			return err
		}
	}
	return nil
}

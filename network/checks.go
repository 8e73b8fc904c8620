package network

import (
	"errors"
	"fmt"
	"iter"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/rundir"
)

// At its start, a NAT refuses names and addresses that are others'.

// checkFree refuses to start where the names or addresses belong to somebody else.
func (n *NAT) checkFree(kept []string) error {
	for _, check := range []func(kept []string) error{n.checkOwn, n.checkNamespaces, n.checkTable, n.checkOthers, n.checkAddresses, n.checkRoutes} {
		if err := check(kept); err != nil {
			return err
		}
	}
	return nil
}

// checkOwn refuses subnets of the NAT of which one is a part of another.
func (n *NAT) checkOwn([]string) error {
	for _, p := range n.layout.pools() {
		type part struct {
			flag   string
			subnet *net.IPNet
		}
		parts := []part{
			{"--host-veth-cidr" + p.suffix, p.hostVeth},
			{"--namespace-veth-cidr" + p.suffix, p.namespaceVeth},
			{"the network of --namespace-interface-gateway" + p.suffix, p.tapNetwork()},
		}
		for i, a := range parts {
			for _, b := range parts[i+1:] {
				if a.subnet.Contains(b.subnet.IP) || b.subnet.Contains(a.subnet.IP) {
					return fmt.Errorf("%s %s overlaps with %s %s; choose another", a.flag, a.subnet, b.flag, b.subnet)
				}
			}
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
						mend := "choose another"
						if running, err := o.running(); err == nil && !running {
							mend = fmt.Sprintf("it was killed: start it again with --namespace-prefix %s, or choose another", o.Config.NamespacePrefix)
						}
						return fmt.Errorf("--%s %s overlaps with %s of the NAT for namespaces %s…; %s", flag, subnet, taken, o.Config.NamespacePrefix, mend)
					}
				}
			}
		}
	}
	return nil
}

// running tells whether a NAT runs.
func (r natRecord) running() (bool, error) {
	lock, err := rundir.Lock("nat-" + r.Config.NamespacePrefix)
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return false, lock.Release()
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

package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forgetGuest ends the connections of a namespace's guest, so that the next guest does not inherit
// them: those that its namespace tracks, and those that the host tracks to and from its addresses.
func forgetGuest(ns string, addresses ...net.IP) error {
	err := inNamespace(ns, func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
	if err != nil {
		return fmt.Errorf("forget connections in network namespace %q: %w", ns, err)
	}
	return forgetConnections(func(f *netlink.ConntrackFlow) bool {
		return slices.ContainsFunc(addresses, func(ip net.IP) bool {
			return ip.Equal(f.Forward.SrcIP) || ip.Equal(f.Forward.DstIP) || ip.Equal(f.Reverse.SrcIP) || ip.Equal(f.Reverse.DstIP)
		})
	})
}

// forgetConnections ends the host's connections that a function chooses. It reads all of them.
func forgetConnections(chosen conntrackFilter) error {
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		var err error = netlink.ErrDumpInterrupted
		for tries := 0; tries < 10 && errors.Is(err, netlink.ErrDumpInterrupted); tries++ {
			_, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, chosen)
		}
		if err != nil {
			return fmt.Errorf("forget connections: %w", err)
		}
	}
	return nil
}

// connectionsIn opens what a namespace tracks. Close it.
func connectionsIn(name string) (*netlink.Handle, error) {
	ns, err := openNamespace(name)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	tracked, err := netlink.NewHandleAt(ns, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open connections of network namespace %q: %w", name, err)
	}
	return tracked, nil
}

// listConnections lists the connections of a family that a namespace tracks.
func listConnections(tracked *netlink.Handle, family int) (flows []*netlink.ConntrackFlow, err error) {
	err = netlink.ErrDumpInterrupted
	for tries := 0; tries < 10 && errors.Is(err, netlink.ErrDumpInterrupted); tries++ {
		flows, err = tracked.ConntrackTableList(netlink.ConntrackTable, netlink.InetFamily(family))
	}
	if err != nil {
		return nil, fmt.Errorf("list connections: %w", err)
	}
	return flows, nil
}

type conntrackFilter func(*netlink.ConntrackFlow) bool

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f conntrackFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool { return f(flow) }

// forgetTenant is forgetGuest for a namespace that a NAT made. It does nothing for others.
func forgetTenant(ns string) error {
	c, err := natOf(ns)
	if c == nil || err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(netnsDir, ns)); errors.Is(err, os.ErrNotExist) {
		return nil // the NAT has just ended
	}
	l, err := c.parse()
	if err != nil {
		return err
	}
	i, err := strconv.Atoi(strings.TrimPrefix(ns, c.NamespacePrefix))
	if err != nil {
		return fmt.Errorf("network namespace %q is none of prefix %s", ns, c.NamespacePrefix)
	}
	var addresses []net.IP
	for _, p := range l.pools() {
		addresses = append(addresses, p.namespaceSide(i), p.namespaceIP(i))
	}
	return forgetGuest(ns, addresses...)
}

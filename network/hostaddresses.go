package network

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
)

// HostAddresses returns the host's IPv4 addresses at which ports of VMs can be published: the loopback
// address, and those of its interfaces, but for NATs' links to namespaces.
func HostAddresses() ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	addrs := []string{"127.0.0.1"}
	for _, l := range links {
		a := l.Attrs()
		if a.Alias == namespaceMark || a.Flags&net.FlagUp == 0 || a.Flags&net.FlagLoopback != 0 {
			continue
		}
		list, err := netlink.AddrList(l, netlink.FAMILY_V4)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", a.Name, err)
		}
		for _, addr := range list {
			addrs = append(addrs, addr.IP.String())
		}
	}
	return addrs, nil
}

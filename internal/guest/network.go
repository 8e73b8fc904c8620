package guest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// networkConfig is what the ip= argument says (Documentation/admin-guide/nfs/nfsroot.rst of Linux):
// ip=<client>:<server>:<gateway>:<netmask>:<hostname>:<device>:<autoconf>:<dns0>:<dns1>
type networkConfig struct {
	address  *net.IPNet
	gateway  net.IP
	hostname string
	device   string
	dns      []net.IP
}

func parseIPArgument(s string) (*networkConfig, error) {
	f := strings.Split(s, ":")
	if len(f) > 10 {
		return nil, fmt.Errorf("ip=%s: too many fields", s)
	}
	f = append(f, make([]string, 10-len(f))...)
	c := &networkConfig{hostname: f[4], device: f[5]}
	ip := net.ParseIP(f[0]).To4()
	mask := net.ParseIP(f[3]).To4()
	if ip == nil || mask == nil {
		return nil, fmt.Errorf("ip=%s: client and netmask must be IPv4 addresses", s)
	}
	c.address = &net.IPNet{IP: ip, Mask: net.IPMask(mask)}
	if f[2] != "" {
		if c.gateway = net.ParseIP(f[2]).To4(); c.gateway == nil {
			return nil, fmt.Errorf("ip=%s: gateway must be an IPv4 address", s)
		}
	}
	if c.device == "" {
		c.device = "eth0"
	}
	for _, d := range f[7:9] {
		if ip := net.ParseIP(d); ip != nil {
			c.dns = append(c.dns, ip)
		}
	}
	return c, nil
}

// configureNetwork brings up the loopback interface and, where the command line has ip=, the one it
// names.
func configureNetwork(cmd cmdline) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback interface: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up loopback interface: %w", err)
	}
	arg := cmd.get("ip", "")
	if arg == "" {
		return writeResolvConf(nil)
	}
	c, err := parseIPArgument(arg)
	if err != nil {
		return err
	}
	link, err := awaitLink(c.device)
	if err != nil {
		return err
	}
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: c.address}); err != nil {
		return fmt.Errorf("set address of %s to %s: %w", c.device, c.address, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", c.device, err)
	}
	if c.gateway != nil {
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: c.gateway}); err != nil {
			return fmt.Errorf("set default route to %s: %w", c.gateway, err)
		}
	}
	if arg := cmd.get(IPv6Argument, ""); arg != "" {
		c6, err := parseIPv6Argument(arg)
		if err == nil {
			err = c6.configureIPv6(link)
		}
		if err != nil {
			return err
		}
		c.dns = append(c.dns, c6.dns...)
	}
	return writeResolvConf(c.dns)
}

// parseIPv6Argument reads the value of [IPv6Argument].
func parseIPv6Argument(s string) (*networkConfig, error) {
	ip6 := func(s string) net.IP {
		if ip := net.ParseIP(s); ip.To4() == nil {
			return ip
		}
		return nil
	}
	fields := strings.Split(s, ",")
	ip, address, err := net.ParseCIDR(fields[0])
	if err != nil || ip.To4() != nil || len(fields) < 2 {
		return nil, errIPv6Argument(s)
	}
	address.IP = ip
	c := &networkConfig{address: address, gateway: ip6(fields[1])}
	if c.gateway == nil {
		return nil, errIPv6Argument(s)
	}
	for _, f := range fields[2:] {
		ip := ip6(f)
		if ip == nil {
			return nil, errIPv6Argument(s)
		}
		c.dns = append(c.dns, ip)
	}
	return c, nil
}

func errIPv6Argument(s string) error {
	return fmt.Errorf("%s=%s: write it as fd00:1::2/126,fd00:1::1", IPv6Argument, s)
}

// configureIPv6 gives an interface that is up its IPv6 address. A kernel of the user's may be without.
func (c *networkConfig) configureIPv6(link netlink.Link) error {
	name := link.Attrs().Name
	if _, err := os.Stat("/proc/sys/net/ipv6/conf/" + name); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	// Nobody else is there who could have it, and the service may need it at once.
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: c.address, Flags: unix.IFA_F_NODAD}); err != nil {
		return fmt.Errorf("set address of %s to %s: %w", name, c.address, err)
	}
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: c.gateway}); err != nil {
		return fmt.Errorf("set default route to %s: %w", c.gateway, err)
	}
	return nil
}

// writeResolvConf makes the file even if it stays empty: bundles bind it.
func writeResolvConf(servers []net.IP) error {
	var b strings.Builder
	for _, ip := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", ip)
	}
	if err := os.WriteFile(ResolvConf, []byte(b.String()), 0o644); err != nil {
		return fmt.Errorf("write name servers: %w", err)
	}
	return nil
}

// ResolvConf is the file with the guest's name servers, which the agent writes after each resume.
// The OCI bundle binds it to /etc/resolv.conf.
const ResolvConf = "/run/resolv.conf"

// hostsFile is what /etc/hosts of our OS leads to; the OCI bundle binds that.
const hostsFile = "/run/hosts"

// prepareContainer gives a container what it finds under other engines: its own name in /etc/hosts,
// ports below 1024 and ping for any user (Docker's default sysctls; the container shares the VM's
// network).
func prepareContainer(cmd cmdline) error {
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("write hosts: %w", err)
	}
	address := "127.0.1.1"
	if c, err := parseIPArgument(cmd.get("ip", "")); err == nil {
		address = c.address.IP.String()
	}
	text := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n" + address + "\t" + name + "\n"
	if err := os.WriteFile(hostsFile, []byte(text), 0o644); err != nil {
		return fmt.Errorf("write hosts: %w", err)
	}
	for name, value := range map[string]string{"ip_unprivileged_port_start": "0", "ping_group_range": "0 2147483647"} {
		// A kernel of the user's may be without.
		if err := os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set net.ipv4.%s: %w", name, err)
		}
	}
	return nil
}

// awaitLink waits for a network interface, whose driver may still be probing.
func awaitLink(name string) (netlink.Link, error) {
	deadline := time.Now().Add(5 * time.Second)
	for {
		link, err := netlink.LinkByName(name)
		if err == nil {
			return link, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("find network interface %s: %w", name, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

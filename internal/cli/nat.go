package cli

import (
	"context"
	"errors"
	"log/slog"

	"github.com/spf13/cobra"

	"drafter/network"
)

func newNAT() *cobra.Command {
	c := network.DefaultNAT()
	metrics := ""
	var lock lockFlag
	cmd := &cobra.Command{
		Use:   "nat",
		Short: "Give VMs network namespaces with a way to the outside",
		Long: `Makes a pool of network namespaces (ark0, ark1, …), each with a tap interface
for one VM. VMs reach what the host reaches through its outgoing interface: that of the current
default route, or several if the route has several next hops. Runs until it is ended (Ctrl-C), then
removes all of it. The next start removes what a killed NAT left behind.

The guest is 172.16.0.2 in every namespace, so that one package runs in any of them. From the host,
namespace N is 10.0.15.(N+1). From anywhere else a guest is reached through drafter forwarder only.

Guests have IPv6 beside IPv4, unless the host's kernel has none, or with --ipv6=false. By default each
IPv6 address is the IPv4 address behind fd0e:d9fd:683d::/96: the guest is fd0e:d9fd:683d::172.16.0.2,
and namespace N fd0e:d9fd:683d::10.0.15.(N+1). What guests send leaves with an IPv6 address of the
host (NAT66). If a prefix is routed to the host, guests can send with addresses of it instead:

  drafter nat --namespace-veth-cidr6 2001:db8:1:2::/64 --ipv6-routed

All that follows is true of both protocols.

A guest cannot reach the host itself, other guests, networks behind other interfaces of the host,
link-local addresses (169.254.0.0/16, fe80::/10) and the metadata services of clouds. Open what your
guests need, for example the host's own name server, or that of a cloud:

  drafter nat --allow-host 53/udp,53/tcp --allow-cidr 169.254.169.254/32:53/udp

Guests reach a subnet of --allow-cidr through whichever interface the host reaches it. Such a subnet
does not open the host's own addresses in it: use --allow-host, or name the address with /32. Nor
does it open a narrower one that is closed, such as other guests (10.0.15.0/24), metadata services, or
--blocked-subnet-cidr: name those, too.

If the host did not forward packets before, it now forwards for its guests only. A packet that comes
in at an interface which was there then, and leaves at another, is dropped unless somebody translates
it (a published port of Docker, say). The last NAT that ends turns forwarding off again. A host that forwards IPv6 takes router advertisements
only where the kernel parameter accept_ra is 2; so it is 2 meanwhile where it was 1.

With --egress guests open connections only to what you name:

  drafter nat --egress 192.0.2.0/24,example.com:443/tcp,*.example.org

Each entry is a subnet or address, IPv4 or IPv6, or a name, and may end with a port and protocol, as
in [2001:db8::7]:443/tcp.
example.com is that name only. *.example.org is every name below it, at any depth, and not
example.org. With deny they open none. Answers to connections that came in always go out. What is
closed without --egress stays closed. An owner of a VM narrows it down with --egress of drafter
runner, peer and snapshotter: a connection must then be in both lists. That holds on this host only;
where a VM moves to, it has what is said there.

If a list has names, DNS queries of the guest (port 53) go to a forwarder in this process, whichever
name server they are for. It asks the host's name servers for names in the list. Others do not exist
(NXDOMAIN), and the log names each once. The first 64 addresses in an answer, also those of aliases
(CNAME), are open for its TTL, of which the guest sees at most an hour, and up to a minute longer; at
most 1024 are open at a time, and then names get no answer. Connections go on after that. A name opens
no address that is private, the host's or closed: list it as a subnet, too. A guest that has moved, or
was resumed, has to ask again. A list without names answers none, so a name must be in both lists. DNS
over TLS and DNS over HTTPS are connections as all others.

A port that drafter forwarder publishes is one of the host's. To let other guests use it, open its
address (--allow-cidr 192.0.2.1/32:3333/tcp). The guest that it leads to reaches it without that.

A guest sends with its own IP and MAC addresses only: TCP, UDP and ICMP. Its packets
leave the host from ports 61000 to 65535. Run no services at these, and keep
net.ipv4.ip_local_port_range below them, as is the default.

A VM that moves to another namespace of this host keeps its connections: see drafter anchor. So does
one that moves to another host, if the NATs of both have a tunnel, and each reaches the other's port:

  drafter nat --tunnel-port 7777

The tunnel is encrypted (WireGuard). A NAT exchanges packets only with those of hosts with which VMs
were moved. The port is a UDP port of the host; open it for those in your firewall.

What others remove or change of all this while it runs (rules, links, addresses, routes, forwarding)
is put back within seconds, and the log says so. Other firewalls of the host are left alone. If one
drops what guests need, the log names it, with the commands that let guests through. With
--manage-forward the NAT lets guests through what drops forwarded packets, until it ends. The log
also names a name server of the host that guests do not reach.
` + exitCodeHelp,
		Example: "  drafter nat --host-interface eth0",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			if err := network.CheckEgress(c.Egress); err != nil {
				return &usageError{err}
			}
			return lock.with(func() error { return runNAT(cmd.Context(), c, metrics) })
		},
	}
	lock.add(cmd)
	f := cmd.Flags()
	f.StringVar(&c.HostInterface, "host-interface", "", "Host gateway interface, or several (eth0,eth1) (default: those of the current default route)")
	f.StringVar(&c.HostVethCIDR, "host-veth-cidr", c.HostVethCIDR, "CIDR for the veths outside the namespace")
	f.StringVar(&c.NamespaceVethCIDR, "namespace-veth-cidr", c.NamespaceVethCIDR, "CIDR for the veths inside the namespace")
	f.StringVar(&c.BlockedSubnetCIDR, "blocked-subnet-cidr", c.BlockedSubnetCIDR, "Further CIDR to block for the namespace")
	f.BoolVar(&c.IPv6, "ipv6", c.IPv6, "Give guests IPv6 beside IPv4, unless the host's kernel has none")
	f.BoolVar(&c.IPv6Routed, "ipv6-routed", c.IPv6Routed, "The CIDR of --namespace-veth-cidr6 is routed to this host: what guests send leaves with its addresses, not with one of the host")
	f.StringVar(&c.HostVethCIDR6, "host-veth-cidr6", "", "IPv6 CIDR for the veths outside the namespace (default: --host-veth-cidr behind fd0e:d9fd:683d::/96)")
	f.StringVar(&c.NamespaceVethCIDR6, "namespace-veth-cidr6", "", "IPv6 CIDR for the veths inside the namespace (default: --namespace-veth-cidr behind fd0e:d9fd:683d::/96)")
	f.StringVar(&c.BlockedSubnetCIDR6, "blocked-subnet-cidr6", "", "Further IPv6 CIDR to block for the namespace (default: --blocked-subnet-cidr behind fd0e:d9fd:683d::/96)")
	f.StringSliceVar(&c.AllowHost, "allow-host", nil, "Ports of the host that guests may reach, at any of its addresses, as PORT/PROTOCOL (53/udp,53/tcp)")
	f.StringSliceVar(&c.AllowCIDRs, "allow-cidr", nil, "CIDRs that guests may reach although they are closed by default, or one port there (192.168.1.0/24,fd00:1::/64,169.254.169.254/32:53/udp)")
	f.StringSliceVar(&c.Egress, "egress", nil, "What guests may open connections to, of what they reach at all: allow, deny, or a list of subnets and names, each for all ports or with one (192.0.2.0/24,*.example.com,example.org:443/tcp) (default allow)")
	f.IntVar(&c.MaxConnections, "max-connections", 0, "Most connections that a guest may have open at a time, of all protocols; it may open a quarter as many a second (0: an equal share of a third of what the host can track, up to 8192)")
	f.StringVar(&c.NamespaceInterface, "namespace-interface", c.NamespaceInterface, "Name for the interface inside the namespace")
	f.StringVar(&c.NamespaceInterfaceGateway, "namespace-interface-gateway", c.NamespaceInterfaceGateway, "Gateway for the interface inside the namespace")
	f.IntVar(&c.NamespaceInterfaceNetmask, "namespace-interface-netmask", c.NamespaceInterfaceNetmask, "Length of the network prefix for the interface inside the namespace, in bits")
	f.StringVar(&c.NamespaceInterfaceIP, "namespace-interface-ip", c.NamespaceInterfaceIP, "IP for the guest behind the interface inside the namespace")
	f.StringVar(&c.NamespaceInterfaceGateway6, "namespace-interface-gateway6", "", "IPv6 gateway for the interface inside the namespace (default: --namespace-interface-gateway behind fd0e:d9fd:683d::/96)")
	f.IntVar(&c.NamespaceInterfaceNetmask6, "namespace-interface-netmask6", 0, "Length of the IPv6 network prefix for the interface inside the namespace, in bits (0: that of --namespace-interface-netmask behind /96)")
	f.StringVar(&c.NamespaceInterfaceIP6, "namespace-interface-ip6", "", "IPv6 address for the guest behind the interface inside the namespace (default: --namespace-interface-ip behind fd0e:d9fd:683d::/96)")
	f.StringVar(&c.NamespaceInterfaceMAC, "namespace-interface-mac", c.NamespaceInterfaceMAC, "MAC address for the interface inside the namespace")
	f.StringVar(&c.NamespacePrefix, "namespace-prefix", c.NamespacePrefix, "Prefix of the namespaces' names")
	f.IntVar(&c.NamespaceCount, "namespace-count", c.NamespaceCount, "Number of namespaces to make (0: as many as the CIDRs hold)")
	f.DurationVar(&c.AnchorTimeout, "anchor-timeout", c.AnchorTimeout, "How long connections of a VM that has moved may go on by way of the namespace that it has left (0: for ever)")
	f.BoolVar(&c.ManageForward, "manage-forward", c.ManageForward, "Put rules into other firewalls of the host (Docker, ufw, firewalld, …) that drop what it forwards for guests; they are removed at the end")
	f.IntVar(&c.TunnelPort, "tunnel-port", c.TunnelPort, "UDP port of an encrypted tunnel between the NATs of hosts, by which connections go on of VMs that move from one to the other (0: they end then)")
	f.StringVar(&c.TunnelAddress, "tunnel-address", c.TunnelAddress, "IP address by which other hosts reach that port (default: the one by which they reach the peers here)")
	f.StringVar(&metrics, "metrics", "", "Address (HOST:PORT) to serve Prometheus metrics of anchors and the tunnel from, without authentication: names, addresses and numbers (leave empty to disable)")
	f.BoolVar(&c.AllowIncomingTraffic, "allow-incoming-traffic", c.AllowIncomingTraffic, "Let the host connect to guests, at the addresses of their namespaces (10.0.15.N:PORT by default)")
	return cmd
}

// runNAT is a NAT until ctx ends.
func runNAT(ctx context.Context, c network.NATConfig, metrics string) (err error) {
	nat, err := network.StartNAT(ctx, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nat.Close()) }()
	stopMetrics, err := serveMetrics(ctx, metrics, nat.Metrics())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopMetrics()) }()
	names := nat.Namespaces()
	slog.Info("NAT is up", "namespaces", len(names), "first", names[0], "last", names[len(names)-1], "connectionLimit", nat.ConnectionLimit(), "egress", nat.Egress())
	notifyReady()
	<-ctx.Done()
	slog.Info("Shutting down")
	return nil
}

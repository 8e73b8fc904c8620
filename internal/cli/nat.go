package cli

import (
	"log/slog"

	"github.com/spf13/cobra"

	"drafter/network"
)

func newNAT() *cobra.Command {
	c := network.DefaultNAT()
	cmd := &cobra.Command{
		Use:   "nat",
		Short: "Give VMs network namespaces with a way to the outside",
		Long: `Makes a pool of network namespaces (ark0, ark1, …), each with a tap interface for one VM, and lets the VMs reach what the host reaches
through its outgoing interface: the one of the default route at the moment, or several if that has several next hops. Runs until it is ended (Ctrl-C), then removes all of it. What a killed NAT left behind is removed at the next
start.

The guest is 172.16.0.2 in every namespace, so that one package runs in any. From the host, namespace N is 10.0.15.(N+1). From anywhere else a
guest is reached through drafter forwarder only.

A guest cannot reach the host itself, other guests, networks behind other interfaces of the host, link-local addresses (169.254.0.0/16) and
the metadata services of clouds. Open what your guests need, for example the host's own name server, or that of a cloud:

  drafter nat --allow-host 53/udp,53/tcp --allow-cidr 169.254.169.254/32:53/udp

What --allow-cidr opens is reached through whichever interface the host reaches it. A subnet of --allow-cidr does not open the host's own addresses in
it: use --allow-host, or name the address with /32. Nor does one that is wider than the NAT's subnets open other guests: name those (10.0.15.0/24).

If the host did not forward packets, it does so for its guests only: what comes in at an interface that was there, for behind another one, is
dropped unless somebody translates it (a published port of Docker, say). The last NAT that ends turns forwarding off again.

A port that drafter forwarder publishes is one of the host's: to let other guests use it, open its address (--allow-cidr 192.0.2.1/32:3333/tcp).
The guest that it leads to reaches it without that.
A guest sends with its own IPv4 and MAC address only, TCP, UDP and ICMP, and no IPv6. What it sends leaves the host from ports 61000 to 65535: run no services at
these, and keep net.ipv4.ip_local_port_range below, as is the default.

What others remove or change of all this while it runs (rules, links, addresses, routes, forwarding) is put back within seconds, and the log says so.
Other firewalls of the host are left alone. One that drops what guests need is named in the log, with the commands that let guests through; so is
a name server of the host that guests do not reach.
` + exitCodeHelp,
		Example: "  drafter nat --host-interface eth0",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			nat, err := network.StartNAT(cmd.Context(), c)
			if err != nil {
				return err
			}
			names := nat.Namespaces()
			slog.Info("NAT is up", "namespaces", len(names), "first", names[0], "last", names[len(names)-1], "connectionLimit", nat.ConnectionLimit())
			<-cmd.Context().Done()
			slog.Info("Shutting down")
			return nat.Close()
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.HostInterface, "host-interface", "", "Host gateway interface, or several (eth0,eth1) (default: those of the default route, whichever they are at the moment)")
	f.StringVar(&c.HostVethCIDR, "host-veth-cidr", c.HostVethCIDR, "CIDR for the veths outside the namespace")
	f.StringVar(&c.NamespaceVethCIDR, "namespace-veth-cidr", c.NamespaceVethCIDR, "CIDR for the veths inside the namespace")
	f.StringVar(&c.BlockedSubnetCIDR, "blocked-subnet-cidr", c.BlockedSubnetCIDR, "Further CIDR to block for the namespace")
	f.StringSliceVar(&c.AllowHost, "allow-host", nil, "Ports of the host that guests may reach, at any of its addresses (53/udp,53/tcp)")
	f.StringSliceVar(&c.AllowCIDRs, "allow-cidr", nil, "CIDRs that guests may reach although they are closed, or one port there (192.168.1.0/24,169.254.169.254/32:53/udp)")
	f.IntVar(&c.MaxConnections, "max-connections", 0, "Connections that a guest may have opened at a time, of all protocols; it may open a quarter as many a second (0: an equal share of a third of what the host can track, up to 8192)")
	f.StringVar(&c.NamespaceInterface, "namespace-interface", c.NamespaceInterface, "Name for the interface inside the namespace")
	f.StringVar(&c.NamespaceInterfaceGateway, "namespace-interface-gateway", c.NamespaceInterfaceGateway, "Gateway for the interface inside the namespace")
	f.IntVar(&c.NamespaceInterfaceNetmask, "namespace-interface-netmask", c.NamespaceInterfaceNetmask, "Netmask for the interface inside the namespace, in bits")
	f.StringVar(&c.NamespaceInterfaceIP, "namespace-interface-ip", c.NamespaceInterfaceIP, "IP for the guest behind the interface inside the namespace")
	f.StringVar(&c.NamespaceInterfaceMAC, "namespace-interface-mac", c.NamespaceInterfaceMAC, "MAC address for the interface inside the namespace")
	f.StringVar(&c.NamespacePrefix, "namespace-prefix", c.NamespacePrefix, "Prefix for the namespace IDs")
	f.IntVar(&c.NamespaceCount, "namespace-count", c.NamespaceCount, "Number of namespaces to make (0: as many as the CIDRs hold)")
	f.BoolVar(&c.AllowIncomingTraffic, "allow-incoming-traffic", c.AllowIncomingTraffic, "Whether to allow incoming traffic from the host to the namespaces (at host-veth-internal-ip:port)")
	return cmd
}

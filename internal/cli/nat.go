package cli

import (
	"log/slog"

	"github.com/spf13/cobra"

	"drafter/network"
)

func newNAT() *cobra.Command {
	var c network.NATConfig
	cmd := &cobra.Command{
		Use:   "nat",
		Short: "Give VMs network namespaces with a way to the outside",
		Long: `Makes a pool of network namespaces (ark0, ark1, …), each with a tap interface for one VM, and lets the VMs reach what the host can reach.
Runs until it is ended (Ctrl-C), then removes all of it. What a killed NAT left behind is removed at the next start.

The guest is 172.16.0.2 in every namespace, so that one package runs in any. From the host, namespace N is 10.0.15.(N+1).
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
			slog.Info("NAT is up", "namespaces", len(names), "first", names[0], "last", names[len(names)-1])
			<-cmd.Context().Done()
			slog.Info("Shutting down")
			return nat.Close()
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.HostInterface, "host-interface", "", "Host gateway interface (default: the one of the default route)")
	f.StringVar(&c.HostVethCIDR, "host-veth-cidr", "10.0.8.0/22", "CIDR for the veths outside the namespace")
	f.StringVar(&c.NamespaceVethCIDR, "namespace-veth-cidr", "10.0.15.0/24", "CIDR for the veths inside the namespace")
	f.StringVar(&c.BlockedSubnetCIDR, "blocked-subnet-cidr", "10.0.15.0/24", "CIDR to block for the namespace")
	f.StringVar(&c.NamespaceInterface, "namespace-interface", "tap0", "Name for the interface inside the namespace")
	f.StringVar(&c.NamespaceInterfaceGateway, "namespace-interface-gateway", "172.16.0.1", "Gateway for the interface inside the namespace")
	f.IntVar(&c.NamespaceInterfaceNetmask, "namespace-interface-netmask", 30, "Netmask for the interface inside the namespace, in bits")
	f.StringVar(&c.NamespaceInterfaceIP, "namespace-interface-ip", "172.16.0.2", "IP for the guest behind the interface inside the namespace")
	f.StringVar(&c.NamespaceInterfaceMAC, "namespace-interface-mac", "02:0e:d9:fd:68:3d", "MAC address for the interface inside the namespace")
	f.StringVar(&c.NamespacePrefix, "namespace-prefix", "ark", "Prefix for the namespace IDs")
	f.IntVar(&c.NamespaceCount, "namespace-count", 16, "Number of namespaces to make (0: as many as the CIDRs hold)")
	f.BoolVar(&c.AllowIncomingTraffic, "allow-incoming-traffic", true, "Whether to allow incoming traffic to the namespaces (at host-veth-internal-ip:port)")
	return cmd
}

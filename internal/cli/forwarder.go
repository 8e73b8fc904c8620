package cli

import (
	"context"
	"log/slog"

	"github.com/spf13/cobra"

	"drafter/network"
)

func newForwarder() *cobra.Command {
	var hostVeth, hostVeth6, forwards string
	var lock lockFlag
	cmd := &cobra.Command{
		Use:   "forwarder",
		Short: "Make ports of VMs reachable on the host",
		Long: `Forwards addresses of the host to ports of VMs until it is ended (Ctrl-C). An
address is reachable from the host itself and, unless it is a loopback address, from outside. To
serve both, forward both addresses. If another firewall of the host drops forwarded packets, the log
of drafter nat says what allows them. Forwards that others remove are put back.

While no VM is behind a forward, new connections are refused. Connections of a VM that was
suspended, has moved away or was killed are reset. Guests send from ports 61000 to 65535; these
cannot be forwarded.

An IPv6 address leads to the guest's IPv6 address, and one of IPv4 to its IPv4 address. Say
"internalFamily":"ipv4" (or "ipv6") to lead it to the other one. Such forwards, and those of [::1], take
TCP only: this process passes on what is sent, and the guest sees the host as its client.
` + exitCodeHelp,
		Example: `  drafter forwarder --port-forwards '[{"netns":"ark0","internalPort":"6379","protocol":"tcp","externalAddr":"127.0.0.1:3333"}]'`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := parseJSON[network.PortForward]("port-forwards", forwards)
			if err != nil {
				return err
			}
			if err := requireRoot(); err != nil {
				return err
			}
			config := network.ForwarderConfig{HostVethCIDR: hostVeth, HostVethCIDR6: hostVeth6, PortForwards: list}
			return lock.with(func() error { return runForwarder(cmd.Context(), config) })
		},
	}
	lock.add(cmd)
	cmd.Flags().StringVar(&hostVeth, "host-veth-cidr", "10.0.8.0/22", "CIDR for the veths outside the namespace")
	cmd.Flags().StringVar(&hostVeth6, "host-veth-cidr6", "", "IPv6 CIDR for the veths outside the namespace (default: --host-veth-cidr behind fd0e:d9fd:683d::/96)")
	cmd.Flags().StringVar(&forwards, "port-forwards", defaultJSON([]network.PortForward{
		{Netns: "ark0", InternalPort: "6379", Protocol: "tcp", ExternalAddr: "127.0.0.1:3333"},
	}), "Port forwards configuration (wildcard IPs like 0.0.0.0 are not valid, be explicit)")
	return cmd
}

// runForwarder forwards until ctx ends.
func runForwarder(ctx context.Context, c network.ForwarderConfig) error {
	f, err := network.StartForwarder(c) //nolint:contextcheck // it ends with Close
	if err != nil {
		return err
	}
	for _, p := range c.PortForwards {
		slog.Info("Forwarding", "from", p.ExternalAddr, "to", p.Netns+":"+p.InternalPort, "protocol", p.Protocol)
	}
	notifyReady()
	<-ctx.Done()
	slog.Info("Shutting down")
	return f.Close()
}

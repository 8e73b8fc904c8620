package cli

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drafter/network"
)

func newAnchor() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "anchor",
		Short: "Look at connections of VMs that have moved",
		Long: `A VM that moves keeps its connections. The namespace that it leaves becomes an anchor:
connections go on there, and packets for the VM are led to where it is. Ports that drafter forwarder
publishes there lead to the VM, too. Between hosts, that takes drafter nat --tunnel-port on both.

An anchor ends with its last connection, unless a port is published there; when the VM ends; or when
the time is over that drafter nat gives it (--anchor-timeout). Its namespace is then free again.
` + exitCodeHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newAnchorList(), newAnchorRemove())
	return cmd
}

func newAnchorList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the anchors of this host",
		Long: `Lists the anchors of this host: the namespace that a VM has left, where the VM is, since
when, how many connections go on, and how many bytes have passed in both directions. A VM on another
host is at a namespace and that host's address, such as ark1 on 192.0.2.7.
` + exitCodeHelp,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			anchors, err := network.Anchors()
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
			fmt.Fprintln(w, "NETNS\tLEADS TO\tSINCE\tCONNECTIONS\tBYTES")
			for _, a := range anchors {
				t, err := a.Traffic()
				if err != nil {
					return err
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", a.Netns, a.Where(), a.Since.Local().Format(time.DateTime), t.Connections, humanize.IBytes(t.Bytes))
			}
			return w.Flush()
		},
	}
}

func newAnchorRemove() *cobra.Command {
	return &cobra.Command{
		Use:   "remove NETNS…",
		Short: "End the connections that go on at anchors",
		Long: `Ends anchors. Their TCP connections are reset, and their namespaces are free for other VMs.
The VM runs on where it is.
` + exitCodeHelp,
		Example: "  drafter anchor remove ark0",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, names []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			for _, name := range names {
				if err := network.RemoveAnchor(name); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

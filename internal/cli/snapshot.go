package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"drafter/client"
)

func newSnapshot() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: "snapshot VM NAME", Short: "Make a package of a VM, which goes on",
		Long: `Makes a package of a VM: its memory and its disks in one moment. The VM pauses for some milliseconds
and goes on; one that is stopped stays stopped. 'drafter run NAME' starts any number of new VMs from
there. Each has an identity of its own, and its guest is told so (VMGenID). The package holds all
that is in the VM's memory, secrets too.
` + exitCodeHelp,
		Example: `  drafter snapshot cache warm
  drafter run -d -p 6380:6379 warm`,
		Args: cobra.ExactArgs(2), ValidArgsFunction: first(e.names),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client.New(e.socket)
			defer c.Close()
			o, err := c.Snapshot(cmd.Context(), args[0], args[1])
			if err == nil {
				o, err = awaitOrCancel(cmd, c, o)
			}
			if err == nil {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), o.Package)
			}
			return err
		},
	})
}

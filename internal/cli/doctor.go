package cli

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"drafter/api"
	"drafter/internal/daemon"
	"drafter/internal/doctor"
	"drafter/internal/output"
	"drafter/network"
)

// addNetwork adds the flags of the VMs' network.
func addNetwork(cmd *cobra.Command, c *daemon.Config) {
	f := cmd.Flags()
	f.StringVar(
		&c.HostInterface,
		"host-interface",
		"",
		"Host gateway interface for VMs, or several (eth0,eth1) (default: those of the current default route)",
	)
	f.StringVar(
		&c.HostVethCIDR,
		"host-veth-cidr",
		"10.0.16.0/22",
		"CIDR for the VMs' veths outside their namespaces",
	)
	f.StringVar(
		&c.NamespaceVethCIDR,
		"namespace-veth-cidr",
		"10.0.23.0/24",
		"CIDR for the VMs' veths inside their namespaces",
	)
	f.StringVar(
		&c.NamespacePrefix,
		"namespace-prefix",
		"vm",
		"Prefix of the names of the VMs' network namespaces",
	)
	f.IntVar(
		&c.NamespaceCount,
		"namespace-count",
		32,
		"Number of network namespaces, and so of VMs that can run at a time",
	)
}

const defaultDaemonDir = "/var/lib/drafter"

// hostChecks are what is checked of a daemon's host.
func hostChecks(c daemon.Config) []doctor.Check {
	nat := network.DefaultNAT()
	nat.HostInterface, nat.NamespacePrefix, nat.NamespaceCount = c.HostInterface, c.NamespacePrefix, c.NamespaceCount
	nat.HostVethCIDR, nat.NamespaceVethCIDR, nat.BlockedSubnetCIDR = c.HostVethCIDR, c.NamespaceVethCIDR, c.NamespaceVethCIDR
	return doctor.Host{Dir: c.Dir, NAT: nat, Drivers: daemonDrivers()}.Checks()
}

func newDoctor() *cobra.Command {
	var c daemon.Config
	var f format
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check whether this host can run VMs, and say how to mend what it lacks",
		Long: `Checks kernel, virtualization, VMMs, nftables, cgroups, firewalls, addresses, memory, disk and
clock of this host. Each line is ok, warning (VMs run, but something is slower, or missing) or error
(VMs do not run), with the remedy. Nothing is changed.

It needs no daemon. The daemon makes the same checks at its start: its log has what is not ok, and GET
/v1/host all. Give the flags that the daemon has.

Exit codes: 0 success, 1 something is an error, 2 wrong usage.`,
		Example: `  drafter doctor
  drafter doctor --format json
  drafter doctor --format '{{.Level}} {{.Name}}'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			results := doctor.Run(cmd.Context(), hostChecks(c))
			out := cmd.OutOrStdout()
			if err := show(f, out, results, func(w io.Writer) { showChecks(w, results, colours(out)) }); err != nil {
				return err
			}
			for _, r := range results {
				if r.Level == api.Bad {
					return exitStatus(exitFailure)
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&c.Dir, "dir", defaultDaemonDir, "Directory of the daemon")
	addNetwork(cmd, &c)
	f.add(cmd)
	return cmd
}

// colours tells whether to use colours on w.
func colours(w io.Writer) bool {
	if r, ok := w.(results); ok {
		w = r.File
	}
	return output.Terminal(w) != nil && os.Getenv("NO_COLOR") == ""
}

// showChecks writes a line for each result, and one for its remedy.
func showChecks(w io.Writer, results []api.Check, colours bool) {
	codes := map[string]int{api.OK: 32, api.Warning: 33, api.Bad: 31} // green, yellow, red
	for _, r := range results {
		level := fmt.Sprintf("%-7s", r.Level)
		if colours {
			level = fmt.Sprintf("\x1b[%dm%s\x1b[0m", codes[r.Level], level)
		}
		fmt.Fprintf(w, "%s  %-11s  %s\n", level, r.Name, r.Text)
		if r.Remedy != "" {
			fmt.Fprintf(w, "%9s%-11s  %s\n", "", "", "remedy: "+r.Remedy)
		}
	}
}

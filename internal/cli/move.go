package cli

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drafter/api"
	"drafter/client"
)

func newMove() *cobra.Command {
	var e everyday
	var to string
	var f format
	cmd := &cobra.Command{
		Use:   "move VM…",
		Short: "Move VMs that run to another host",
		Long: `Moves VMs that run to another host, which 'drafter host add' has added. While its memory and
disks are copied, a VM runs; it then stands still for some milliseconds, and goes on at the other host
with all its connections. Its published ports are published there, too. This host goes on to lead
clients to it that know it by this host's address: 'drafter ps -a' shows it as moved here.

Whatever fails, the VM runs once: here, or there. Ctrl-C lets it stay here, unless it is there already.
` + exitCodeHelp,
		Example:           "  drafter move cache --to host2",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.names,
		RunE: func(cmd *cobra.Command, args []string) error {
			if to == "" {
				return &usageError{fmt.Errorf("give --to HOST; 'drafter host ls' lists hosts")}
			}
			c := client.New(e.socket)
			defer c.Close()
			for _, name := range args {
				o, err := c.Move(cmd.Context(), name, to)
				if err == nil {
					o, err = awaitOrCancel(cmd, c, o)
				}
				if err != nil {
					return err
				}
				if err := showMove(cmd.OutOrStdout(), f, name, o); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "Name of the host")
	_ = cmd.RegisterFlagCompletionFunc("to", e.hosts) // the flag is there
	f.add(cmd)
	return e.add(cmd)
}

// showMove prints the name of a VM that has moved, and what that has taken.
func showMove(out io.Writer, f format, name string, o api.Operation) error {
	if f != "table" {
		return show(f, out, []api.Operation{o}, nil)
	}
	text := name
	if m := o.Move; m != nil {
		text += fmt.Sprintf("\tstood still for %s, %s sent", m.Paused.Round(100*time.Microsecond), humanize.IBytes(uint64(m.Sent)))
	}
	_, err := fmt.Fprintln(out, text)
	return err
}

func newUpgrade() *cobra.Command {
	var e everyday
	var all bool
	var f format
	cmd := &cobra.Command{
		Use:   "upgrade VM…",
		Short: "Replace the processes of VMs by the installed version",
		Long: `Each VM that runs has a process of its own, which goes on when drafter is upgraded. This
replaces it by one of the version that is installed now. The VM stands still for some milliseconds, and
keeps its connections.
` + exitCodeHelp,
		Example:           "  drafter upgrade --all",
		ValidArgsFunction: e.names,
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client.New(e.socket)
			defer c.Close()
			if all == (len(args) > 0) {
				return &usageError{fmt.Errorf("name VMs, or give --all")}
			}
			if all {
				vms, err := c.VMs(cmd.Context())
				if err != nil {
					return err
				}
				for _, vm := range vms {
					if vm.State == api.Running {
						args = append(args, vm.Name)
					}
				}
			}
			for _, name := range args {
				o, err := c.Upgrade(cmd.Context(), name)
				if err == nil {
					o, err = awaitOperation(cmd, c, o)
				}
				if err != nil {
					return err
				}
				if err := showMove(cmd.OutOrStdout(), f, name, o); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "All VMs that run")
	f.add(cmd)
	return e.add(cmd)
}

func newDrain() *cobra.Command {
	var e everyday
	var r api.Drain
	cmd := &cobra.Command{
		Use:   "drain",
		Short: "Move all VMs that run to other hosts",
		Long: `Moves all VMs that run here to other hosts, each to the one with the most memory free that
takes it. No VM starts here until 'drafter undrain', which also brings them back. Ctrl-C ends it: what
has moved stays there.
` + exitCodeHelp,
		Example: "  drafter drain --parallel 2",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := client.New(e.socket)
			defer c.Close()
			o, err := c.Drain(cmd.Context(), r)
			if err == nil {
				_, err = awaitOrCancel(cmd, c, o)
			}
			return err
		},
	}
	cmd.Flags().IntVar(&r.Parallel, "parallel", 1, "How many VMs move at a time")
	return e.add(cmd)
}

func newUndrain() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use:     "undrain",
		Short:   "Bring back the VMs that a drain has moved away",
		Long:    "Lets VMs start on this host again, and brings those back that 'drafter drain' has moved away.\n" + exitCodeHelp,
		Example: "  drafter undrain",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := client.New(e.socket)
			defer c.Close()
			o, err := c.Undrain(cmd.Context())
			if err == nil {
				_, err = awaitOrCancel(cmd, c, o)
			}
			return err
		},
	})
}

func newHost() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "host",
		Short: "Let hosts know each other, so that VMs can move between them",
		Long: `Hosts know each other by their keys. 'drafter host token' on one host prints a token, which
holds for ten minutes and for one host. 'drafter host add' on the other host, with that token, lets each
know the key of the other. Both daemons need --listen.
` + exitCodeHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newHostAdd(), newHostList(), newHostRemove(), newHostToken())
	return cmd
}

func newHostAdd() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use:   "add NAME ADDRESS [TOKEN]",
		Short: "Add another host",
		Long: `Adds another host: HOST:PORT is the --listen of its daemon, and the token is what 'drafter host
token' printed there. Without a token here, it is read from standard input.
` + exitCodeHelp,
		Example: `  drafter host add host2 192.0.2.8:7443 GJ3x…
  ssh host2 drafter host token | drafter host add host2 192.0.2.8:7443`,
		Args: cobra.RangeArgs(2, 3),
		RunE: func(cmd *cobra.Command, args []string) error {
			a := api.AddHost{Name: args[0], Address: args[1]}
			if len(args) > 2 {
				a.Token = args[2]
			} else {
				b, err := io.ReadAll(io.LimitReader(os.Stdin, 1<<10))
				if err != nil {
					return fmt.Errorf("read the token: %w", err)
				}
				a.Token = strings.TrimSpace(string(b))
			}
			c := client.New(e.socket)
			defer c.Close()
			n, err := c.AddHost(cmd.Context(), a)
			if err == nil {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), n.Name)
			}
			return err
		},
	})
}

func newHostList() *cobra.Command {
	var e everyday
	var f format
	cmd := &cobra.Command{
		Use: "ls", Short: "List the other hosts that this one knows",
		Long: "Lists the other hosts that this one knows.\n" + exitCodeHelp, Args: noArgs,
		Example: "  drafter host ls --format '{{.Name}} {{.Address}}'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := client.New(e.socket)
			defer c.Close()
			hosts, err := c.Hosts(cmd.Context())
			if err != nil {
				return err
			}
			return show(f, cmd.OutOrStdout(), hosts, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tADDRESS\tADDED")
				for _, h := range hosts {
					fmt.Fprintf(w, "%s\t%s\t%s\n", h.Name, h.Address, humanize.Time(h.Added))
				}
			})
		},
	}
	f.add(cmd)
	return e.add(cmd)
}

func newHostRemove() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: "rm NAME…", Short: "Forget other hosts",
		Long:    "Forgets other hosts: VMs can no longer move between them and this one.\n" + exitCodeHelp,
		Example: "  drafter host rm host2", Args: cobra.MinimumNArgs(1), ValidArgsFunction: e.hosts,
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client.New(e.socket)
			defer c.Close()
			for _, name := range args {
				if err := c.RemoveHost(cmd.Context(), name); err != nil {
					return err
				}
			}
			return nil
		},
	})
}

func newHostToken() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: "token", Short: "Print a token, with which another host can be added",
		Long: `Prints a token. With it, 'drafter host add' on another host lets the two know each other. It
holds for ten minutes, and for one host. Who has it can move VMs between that host and this one.
` + exitCodeHelp,
		Example: "  drafter host token",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := client.New(e.socket)
			defer c.Close()
			t, err := c.Token(cmd.Context())
			if err == nil {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), t.Token)
			}
			return err
		},
	})
}

// hosts completes the names of hosts.
func (e *everyday) hosts(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	c := client.New(e.socket)
	defer c.Close()
	list, err := c.Hosts(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, h := range list {
		names = append(names, h.Name+"\t"+h.Address)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

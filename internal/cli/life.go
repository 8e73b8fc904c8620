package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"drafter/api"
	"drafter/client"
)

// runMain runs the program that a VM waits for, and returns once both have ended.
func runMain(cmd *cobra.Command, c *client.Client, socket, id string, stdin, tty bool) error {
	err := execIn(cmd, socket, id, api.Exec{Main: true, TTY: tty}, stdin)
	var status exitStatus
	if err != nil && !errors.As(err, &status) {
		return err
	}
	if _, werr := awaitEnd(context.WithoutCancel(cmd.Context()), c, id); werr != nil {
		return werr
	}
	return err
}

// awaitEnd waits until a VM does not run.
func awaitEnd(ctx context.Context, c *client.Client, id string) (api.VM, error) {
	vm, err := c.Wait(ctx, id)
	if refused := (*client.Error)(nil); errors.As(err, &refused) && refused.Status == http.StatusNotFound {
		return ended(ctx, c, id)
	}
	return vm, err
}

func newAttach() *cobra.Command {
	var e everyday
	cmd := &cobra.Command{
		Use: "attach VM", Short: "Show what a VM's service prints from now on",
		Long: `Shows what the service of a VM prints from now on, until the VM has ended, and ends with the
service's exit status. Ctrl-C detaches; the VM goes on.

A VM that was run with --interactive (-i) or --tty (-t), and whose program does not run, runs it now,
with this command's input or terminal. Both end with it.
` + exitCodeHelp,
		Args: oneArg("VM"), ValidArgsFunction: e.names,
		Example: `  drafter attach cache
  drafter run -dit --name shell docker://debian
  drafter attach shell`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client.New(e.socket)
			defer c.Close()
			vm, err := c.VM(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if vm.Stdin || vm.TTY {
				if vm.Stdin && vm.TTY && !term.IsTerminal(0) {
					return &usageError{fmt.Errorf("VM %s was run with --tty (-t) and --interactive (-i); it needs a terminal as stdin", args[0])}
				}
				return runMain(cmd, c, e.socket, vm.ID, vm.Stdin, vm.TTY)
			}
			if vm.State != api.Running {
				return fmt.Errorf("VM %s is %s; it has to run ('drafter start %s')", args[0], vm.State, args[0])
			}
			err = c.Logs(cmd.Context(), vm.ID, client.LogOptions{Follow: true}, printLog(cmd))
			if cmd.Context().Err() != nil {
				return nil
			}
			if err != nil {
				return err
			}
			return endOf(ended(cmd.Context(), c, vm.ID))
		},
	}
	return e.add(cmd)
}

func newRestart() *cobra.Command {
	patience := 30
	cmd := onEach("restart", "Shut VMs down, and boot them again", `Shuts the guests of VMs down, as a power button does, and boots them again from their own disks. A
guest that does not shut down in time is ended as by a power cut. A VM that does not run boots, even
if it could be resumed.`,
		func(cmd *cobra.Command, c *client.Client, name string) (api.Operation, error) {
			if patience < 0 || patience > 3600 {
				return api.Operation{}, &usageError{fmt.Errorf("--time %d is not within 0 and 3600", patience)}
			}
			return c.Restart(cmd.Context(), name, time.Duration(patience)*time.Second)
		})
	cmd.Flags().IntVarP(&patience, "time", "t", patience, "Seconds that a guest has to shut down, before its VM is killed")
	return cmd
}

func newRename() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: "rename VM NAME", Short: "Give a VM another name", Long: "Gives a VM another name. It may run.\n" + exitCodeHelp,
		Args: cobra.ExactArgs(2), ValidArgsFunction: e.names,
		Example: "  drafter rename cache sessions",
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client.New(e.socket)
			defer c.Close()
			_, err := c.Rename(cmd.Context(), args[0], args[1])
			return err
		},
	})
}

// killedStatus is the exit status of a service that was killed with its VM, as a shell has it.
const killedStatus = 137

func newWait() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: "wait VM…", Short: "Wait until VMs have ended, and print their exit statuses",
		Long: `Waits until each VM does not run any more, and prints the exit status of its service: 137 if the VM
was killed or has failed, and 0 if it was suspended.
` + exitCodeHelp,
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: e.names,
		Example: "  drafter wait job",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			c := client.New(e.socket)
			defer c.Close()
			for _, name := range args {
				status, werr := waitFor(cmd.Context(), c, name)
				if werr == nil {
					_, werr = fmt.Fprintln(cmd.OutOrStdout(), status)
				}
				err = errors.Join(err, werr)
			}
			return err
		},
	})
}

// waitFor waits until a VM has ended, and returns its service's exit status.
func waitFor(ctx context.Context, c *client.Client, name string) (int, error) {
	vm, err := c.VM(ctx, name)
	if err == nil {
		vm, err = awaitEnd(ctx, c, vm.ID)
	}
	switch {
	case err != nil:
		return 0, err
	case vm.State == api.Moved:
		return 0, errMoved(vm)
	case vm.ExitStatus != nil:
		return *vm.ExitStatus, nil
	case vm.State == api.Failed || vm.Error != "":
		return killedStatus, nil
	}
	return 0, nil
}

func newPort() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: "port VM [PORT[/tcp|udp]]", Short: "Show where the ports of a VM are published",
		Long: "Shows the ports of a VM, and where on this host they are published; or that of one port.\n" + exitCodeHelp,
		Args: cobra.RangeArgs(1, 2), ValidArgsFunction: e.names,
		Example: `  drafter port cache
  drafter port cache 6379/tcp`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client.New(e.socket)
			defer c.Close()
			vm, err := c.VM(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if len(args) == 1 {
				for _, p := range vm.Ports {
					if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%d/%s -> %s\n", p.Guest, p.Protocol, publishedAt(p)); err != nil {
						return err
					}
				}
				return nil
			}
			number, protocol, ok := strings.Cut(args[1], "/")
			if !ok {
				protocol = "tcp"
			}
			found := false
			for _, p := range vm.Ports {
				if strconv.Itoa(p.Guest) == number && p.Protocol == protocol {
					found = true
					if _, err := fmt.Fprintln(cmd.OutOrStdout(), publishedAt(p)); err != nil {
						return err
					}
				}
			}
			if !found {
				return fmt.Errorf("port %s/%s of VM %s is not published", number, protocol, args[0])
			}
			return nil
		},
	})
}

package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"drafter/api"
	"drafter/client"
	"drafter/internal/progress"
)

// everyday is a command that calls the daemon.
type everyday struct{ socket string }

func (e *everyday) add(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&e.socket, "socket", cmp.Or(os.Getenv("DRAFTER_SOCKET"), client.Socket), "UNIX socket of the daemon (also: DRAFTER_SOCKET)")
	return cmd
}

// names completes the names of VMs.
func (e *everyday) names(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	c := client.New(e.socket)
	defer c.Close()
	list, err := c.VMs(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, vm := range list {
		names = append(names, vm.Name+"\t"+vm.Image)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// awaitOrCancel is awaitOperation for one that is cancelled when this process is told to end.
func awaitOrCancel(cmd *cobra.Command, c *client.Client, o api.Operation) (api.Operation, error) {
	o, err := awaitOperation(cmd, c, o)
	if cmd.Context().Err() == nil {
		return o, err
	}
	ctx := context.WithoutCancel(cmd.Context())
	if err := c.Cancel(ctx, o.ID); err != nil {
		return o, err
	}
	return c.Await(ctx, o, nil)
}

// awaitOperation shows an operation until it has ended.
func awaitOperation(cmd *cobra.Command, c *client.Client, o api.Operation) (api.Operation, error) {
	bars := progress.New(cmd.ErrOrStderr())
	defer bars.Close()
	return c.Await(cmd.Context(), o, func(p api.Progress) { bars.Report(p.Step, p.Done, p.Total) })
}

func newRunVM() *cobra.Command {
	var e everyday
	var r api.Run
	var ports, labels, envFiles []string
	var memory, diskRead, diskWrite, entrypoint string
	var detach bool
	cmd := &cobra.Command{
		Use:   "run [flags] IMAGE|PACKAGE [COMMAND [ARG…]]",
		Short: "Run an OCI image, or a package, as a VM",
		Long: `Makes a VM of an OCI image and starts it. The first run of an image boots it, waits until
its service is ready, and keeps the suspended VM as a package. Every further run of the same image,
command, entrypoint, user, working directory, egress, memory and CPUs resumes that package, in a
fraction of a second. 'drafter pull' makes the package ahead.

A package is named by its name or key ('drafter package ls'), or as docker://NAME if 'drafter push' has
stored it there. Its command, environment, memory and CPUs are as they are.

With --env the package is one whose service has not started: it starts in the VM, with these variables.
So the package has no secrets in it, and the service takes its time.

With --interactive (-i) or --tty (-t) the image's program is no service. It waits until this command,
or 'drafter attach', runs it with its input, or with a terminal. The VM ends with it, and this command
with its exit status. If this command is killed, so are the program and its VM. 'drafter logs' does not
have what it prints.
` + referenceHelp + `A name alone (valkey/valkey) means docker://NAME.
` + exitCodeHelp,
		Example: `  drafter run -d --name cache -p 6379:6379 docker://valkey/valkey
  drafter run -d --rm -m 512MB docker://nginx nginx -g 'daemon off;'
  drafter run -it --rm --entrypoint sh -u nobody -w /tmp docker://valkey/valkey
  drafter run -d --egress '*.debian.org:443/tcp' docker://nginx`,
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: first(e.complete(runnable)),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Image, r.Command = args[0], args[1:]
			if cmd.Flags().Changed("entrypoint") {
				r.Entrypoint = []string{entrypoint}
			}
			if cmd.Flags().Changed("egress") && len(r.Egress) == 0 {
				return &usageError{errors.New("--egress is empty; write allow, deny or a list, or leave it out")}
			}
			if r.TTY && r.Stdin && !detach && !term.IsTerminal(0) {
				return errNoTerminal
			}
			var err error
			if r.Memory, err = parseBytes("memory", memory); err != nil {
				return err
			}
			if r.DiskRead, err = parseBytes("disk-read-bps", diskRead); err != nil {
				return err
			}
			if r.DiskWrite, err = parseBytes("disk-write-bps", diskWrite); err != nil {
				return err
			}
			if r.Ports, err = parsePorts(ports); err != nil {
				return err
			}
			if r.Labels, err = parseLabels(labels); err != nil {
				return err
			}
			if r.Env, err = environmentWith(r.Env, envFiles); err != nil {
				return err
			}
			c := client.New(e.socket)
			defer c.Close()
			o, err := c.Run(cmd.Context(), r)
			if err != nil {
				return err
			}
			if o, err = awaitOrCancel(cmd, c, o); err != nil {
				return err
			}
			if detach {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), o.VM)
				return err
			}
			if r.Stdin || r.TTY {
				return runMain(cmd, c, e.socket, o.VM, r.Stdin, r.TTY)
			}
			return watchVM(cmd, c, o.VM)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&detach, "detach", "d", false, "Return once the VM runs, and print its ID (default: show what its service prints until it has ended; Ctrl-C stops the VM)")
	f.StringVar(&entrypoint, "entrypoint", "", "Program in place of the image's entrypoint, whose command is left out, too (an empty one: COMMAND is the program)")
	f.StringVarP(&r.Dir, "workdir", "w", "", "Working directory (default: the image's)")
	f.StringVarP(&r.User, "user", "u", "", "User, as NAME, UID, NAME:GROUP or UID:GID (default: the image's)")
	f.BoolVarP(&r.Stdin, "interactive", "i", false, "Pass stdin to the image's program, with which the VM ends")
	f.BoolVarP(&r.TTY, "tty", "t", false, "Give the image's program a terminal; the VM ends with it")
	f.StringSliceVar(&r.Egress, "egress", nil, "What the VM may open connections to: allow, deny, or a list of subnets and names, each for all ports or with one (192.0.2.0/24,*.example.com,example.org:443/tcp); see drafter nat (default allow)")
	f.StringVar(&r.Name, "name", "", "Name of the VM (default: the image's)")
	f.StringArrayVarP(&ports, "publish", "p", nil, "Publish a port of the VM, as [ADDRESS:]PORT:VM-PORT[/tcp|udp] (repeatable)")
	f.StringArrayVarP(&r.Env, "env", "e", nil, "Environment variable, as NAME=value, or NAME for its value here (repeatable); it is kept for this VM, not in the package")
	f.StringArrayVar(&envFiles, "env-file", nil, "File with a variable on each line; lines that begin with # are left out (repeatable)")
	f.StringArrayVarP(&labels, "label", "l", nil, "A label, as KEY=VALUE (repeatable)")
	f.StringVarP(&memory, "memory", "m", "", "Memory of the VM, such as 512MB (default 1GiB)")
	f.IntVar(&r.CPUs, "cpus", 0, "Number of virtual CPUs (default 1)")
	f.StringVar(&diskRead, "disk-read-bps", "", "Most bytes a second that the VM reads from its host's disk, such as 50MB (default no limit)")
	f.StringVar(&diskWrite, "disk-write-bps", "", "Most bytes a second that the VM writes to its host's disk, such as 50MB (default no limit)")
	f.StringVar(&r.Platform, "platform", "", "Platform of the image, such as linux/arm64 (default: this host's)")
	f.StringVar(&r.Pull, "pull", "missing", "When to look for the image anew: missing, always or never")
	f.StringVar(&r.Restart, "restart", api.No, "Whether the VM is started again when its service has ended or its process was killed, and with the daemon: no, always or unless-stopped (not if a user has stopped it)")
	f.BoolVar(&r.Remove, "rm", false, "Remove the VM when it has ended")
	values(cmd, "pull", "missing", "always", "never")
	return e.add(cmd)
}

// watchVM shows what a VM's service prints until the VM has ended, and ends with the service's exit
// status. When this process is told to end, the VM is stopped.
func watchVM(cmd *cobra.Command, c *client.Client, id string) error {
	err := c.Logs(cmd.Context(), id, client.LogOptions{Follow: true, Tail: -1}, printLog(cmd))
	if cmd.Context().Err() != nil {
		ctx := context.WithoutCancel(cmd.Context())
		o, err := c.Stop(ctx, id)
		if err == nil {
			_, err = c.Await(ctx, o, nil)
		}
		return err
	}
	if err != nil {
		return err
	}
	vm, err := ended(cmd.Context(), c, id)
	return endOf(vm, err)
}

// errMoved says that how a VM ends is to be seen elsewhere.
func errMoved(vm api.VM) error {
	return fmt.Errorf("VM %s has moved, and runs on host %s", vm.Name, vm.Host)
}

// endOf is how a command ends that has shown a VM until its end.
func endOf(vm api.VM, err error) error {
	switch {
	case err != nil:
		return err
	case vm.Error != "":
		return errors.New(vm.Error)
	case vm.State == api.Moved:
		return errMoved(vm)
	case vm.ExitStatus != nil && *vm.ExitStatus != 0:
		return exitStatus(*vm.ExitStatus)
	}
	return nil
}

// ended returns a VM that has ended, also if it was removed then: its last event has it.
func ended(ctx context.Context, c *client.Client, id string) (vm api.VM, err error) {
	vm, err = c.VM(ctx, id)
	if refused := (*client.Error)(nil); !errors.As(err, &refused) || refused.Status != http.StatusNotFound {
		return vm, err
	}
	removed := errors.New("it was removed")
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err = c.Events(ctx, 0, func(e api.Event) error {
		if e.VM == nil || e.VM.ID != id {
			return nil
		}
		if vm = *e.VM; e.Type == "vm.removed" {
			return removed
		}
		return nil
	})
	if errors.Is(err, removed) {
		err = nil
	}
	return vm, err
}

// printLog prints what a service has printed, where it printed it.
func printLog(cmd *cobra.Command) func(api.LogLine) error {
	return func(l api.LogLine) error {
		to := cmd.OutOrStdout()
		if l.Stream == "stderr" {
			to = cmd.ErrOrStderr()
		}
		_, err := io.WriteString(to, l.Text)
		return err
	}
}

// parsePorts parses ports as docker writes them.
func parsePorts(texts []string) (ports []api.Port, err error) {
	for _, text := range texts {
		rest, protocol, ok := strings.Cut(text, "/")
		p := api.Port{Protocol: "tcp"}
		if ok {
			p.Protocol = protocol
		}
		i := strings.LastIndex(rest, ":")
		if i >= 0 {
			p.Guest, err = strconv.Atoi(rest[i+1:])
			if j := strings.LastIndex(rest[:i], ":"); j >= 0 {
				p.Address, rest = strings.Trim(rest[:j], "[]"), rest[j+1:i]
			} else {
				rest = rest[:i]
			}
		}
		var herr error
		p.Host, herr = strconv.Atoi(rest)
		if i < 0 || err != nil || herr != nil || p.Protocol != "tcp" && p.Protocol != "udp" {
			return nil, &usageError{fmt.Errorf("--publish %q is not of the form [ADDRESS:]PORT:VM-PORT[/tcp|udp], such as 8080:80", text)}
		}
		ports = append(ports, p)
	}
	return ports, nil
}

func parseLabels(texts []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, text := range texts {
		key, value, ok := strings.Cut(text, "=")
		if !ok || key == "" {
			return nil, &usageError{fmt.Errorf("--label %q is not of the form KEY=VALUE", text)}
		}
		labels[key] = value
	}
	return labels, nil
}

// onEach makes a command that does the same to each VM that is named.
func onEach(use, short, long string, do func(*cobra.Command, *client.Client, string) (api.Operation, error)) *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: use + " VM…", Short: short, Long: long + "\n" + exitCodeHelp, Args: cobra.MinimumNArgs(1), ValidArgsFunction: e.names,
		Example: "  drafter " + use + " cache",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			c := client.New(e.socket)
			defer c.Close()
			for _, name := range args {
				o, oerr := do(cmd, c, name)
				if oerr == nil {
					_, oerr = awaitOperation(cmd, c, o)
				}
				if oerr == nil {
					_, oerr = fmt.Fprintln(cmd.OutOrStdout(), name)
				}
				err = errors.Join(err, oerr)
			}
			return err
		},
	})
}

func newStart() *cobra.Command {
	return onEach("start", "Start VMs", "Starts VMs. One that was stopped is resumed and goes on where it was. Any other boots from its own\ndisks.",
		func(cmd *cobra.Command, c *client.Client, name string) (api.Operation, error) {
			return c.Start(cmd.Context(), name)
		})
}

func newStop() *cobra.Command {
	var all bool
	cmd := onEach("stop", "Suspend VMs", `Suspends VMs: 'drafter start' resumes them, and their programs go on where they were.

With --all it suspends all VMs that run, for the host's shutdown. That does not count as stopped by a
user: VMs with --restart always or unless-stopped go on when the daemon has started again.`,
		func(cmd *cobra.Command, c *client.Client, name string) (api.Operation, error) {
			return c.Stop(cmd.Context(), name)
		})
	cmd.Use = "stop VM… | --all"
	cmd.Flags().BoolVarP(&all, "all", "a", false, "All VMs that run, for the host's shutdown")
	named, onNamed := cmd.Args, cmd.RunE
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if all {
			return noArgs(cmd, args)
		}
		return named(cmd, args)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !all {
			return onNamed(cmd, args)
		}
		c := client.New(cmd.Flag("socket").Value.String())
		defer c.Close()
		o, err := c.Shutdown(cmd.Context())
		if err == nil {
			_, err = awaitOperation(cmd, c, o)
		}
		return err
	}
	return cmd
}

func newKill() *cobra.Command {
	return onEach("kill", "End VMs as a power cut does", "Ends VMs at once. Their disks hold what their programs have synced; the next start boots them.",
		func(cmd *cobra.Command, c *client.Client, name string) (api.Operation, error) {
			return c.Kill(cmd.Context(), name)
		})
}

func newRemove() *cobra.Command {
	var force bool
	cmd := onEach("rm", "Remove VMs", "Removes VMs and all that they have written. The package that they were started from stays.",
		func(cmd *cobra.Command, c *client.Client, name string) (api.Operation, error) {
			return c.Remove(cmd.Context(), name, force)
		})
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Also VMs that run")
	return cmd
}

// format is how a command shows what it has found.
type format string

func (f *format) add(cmd *cobra.Command) {
	cmd.Flags().StringVar((*string)(f), "format", "table", "How to show it: table, json, or a Go template such as '{{.Name}} {{.State}}'")
	values(cmd, "format", "table", "json")
}

// show writes all as JSON or by a template, or calls table.
func show[T any](f format, out io.Writer, all []T, table func(io.Writer)) error {
	switch f {
	case "table":
		w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
		table(w)
		return w.Flush()
	case "json":
		to := json.NewEncoder(out)
		to.SetIndent("", "  ")
		return to.Encode(all)
	}
	t, err := template.New("format").Option("missingkey=error").Parse(string(f))
	if err != nil {
		return &usageError{fmt.Errorf("--format: %w", err)}
	}
	for _, one := range all {
		if err := t.Execute(out, one); err != nil {
			return &usageError{fmt.Errorf("--format: %w", err)}
		}
		if _, err := fmt.Fprintln(out); err != nil {
			return err
		}
	}
	return nil
}

func newPS() *cobra.Command {
	var e everyday
	var f format
	var all, quiet bool
	var filters []string
	cmd := &cobra.Command{
		Use: "ps", Short: "List VMs", Args: noArgs,
		Long: "Lists VMs that run, the newest first.\n" + filterHelp + exitCodeHelp,
		Example: `  drafter ps -a --format '{{.Name}} {{.State}}'
  drafter ps -q --filter label=tier=web --filter status=exited --filter status=failed`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			filter, err := parseFilters(filters)
			if err != nil {
				return err
			}
			c := client.New(e.socket)
			defer c.Close()
			vms, err := c.VMs(cmd.Context())
			if err != nil {
				return err
			}
			shown := []api.VM{}
			for _, vm := range vms {
				listed := all || filter.states() || vm.PID != 0 ||
					vm.State == api.Starting || vm.State == api.Arriving || vm.State == api.Creating
				if listed && filter.match(vm) {
					shown = append(shown, vm)
				}
			}
			if quiet {
				f = "{{.ID}}"
			}
			return show(f, cmd.OutOrStdout(), shown, func(w io.Writer) {
				fmt.Fprintln(w, "ID\tNAME\tIMAGE\tSTATE\tSINCE\tPORTS")
				for _, vm := range shown {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", vm.ID, vm.Name, vm.Image, vm.State, humanize.Time(since(vm)), portText(vm.Ports))
				}
			})
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "Also VMs that do not run")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "Only IDs")
	cmd.Flags().StringArrayVarP(&filters, "filter", "f", nil, "Only VMs to which it applies: name=, id=, status= or label= (repeatable)")
	f.add(cmd)
	return e.add(cmd)
}

func since(vm api.VM) time.Time {
	switch {
	case vm.PID == 0 && vm.Ended != nil:
		return *vm.Ended
	case vm.Started != nil:
		return *vm.Started
	}
	return vm.Created
}

func portText(ports []api.Port) string {
	var texts []string
	for _, p := range ports {
		texts = append(texts, fmt.Sprintf("%s->%d/%s", publishedAt(p), p.Guest, p.Protocol))
	}
	return strings.Join(texts, ", ")
}

func publishedAt(p api.Port) string {
	if p.Address == "" {
		return fmt.Sprintf("*:%d", p.Host)
	}
	return net.JoinHostPort(p.Address, strconv.Itoa(p.Host))
}

func newInspect() *cobra.Command {
	var e everyday
	var f format
	cmd := &cobra.Command{
		Use: "inspect VM…", Short: "Tell all of VMs", Long: "Tells all that is known of VMs, as JSON.\n" + exitCodeHelp, Args: cobra.MinimumNArgs(1), ValidArgsFunction: e.names,
		Example: "  drafter inspect cache --format '{{.State}}'",
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client.New(e.socket)
			defer c.Close()
			var vms []api.VM
			for _, name := range args {
				vm, err := c.VM(cmd.Context(), name)
				if err != nil {
					return err
				}
				vms = append(vms, vm)
			}
			if f == "table" {
				f = "json"
			}
			return show(f, cmd.OutOrStdout(), vms, nil)
		},
	}
	f.add(cmd)
	cmd.Flags().Lookup("format").DefValue = "json"
	f = "json"
	return e.add(cmd)
}

func newLogs() *cobra.Command {
	var e everyday
	o := client.LogOptions{}
	var since string
	cmd := &cobra.Command{
		Use: "logs VM", Short: "Show what a VM's service has printed",
		Long: "Shows what the service of a VM's image has printed: its stdout on stdout, and its stderr on stderr.\n" + exitCodeHelp,
		Args: oneArg("VM"), ValidArgsFunction: e.names,
		Example: `  drafter logs -f --tail 20 cache
  drafter logs --since 10m cache`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if o.Since, err = parseSince(since); err != nil {
				return err
			}
			c := client.New(e.socket)
			defer c.Close()
			err = c.Logs(cmd.Context(), args[0], o, printLog(cmd))
			if cmd.Context().Err() != nil {
				return nil
			}
			return err
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&o.Follow, "follow", "f", false, "Go on with what it prints, until the VM has ended")
	f.IntVarP(&o.Tail, "tail", "n", -1, "Only the last lines, so many of them (-1: all)")
	f.StringVar(&since, "since", "", "Only what is newer: a time (2026-01-02T15:04:05Z), or how long ago (10m)")
	return e.add(cmd)
}

// parseSince parses a time, or how long ago it was.
func parseSince(text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if ago, err := time.ParseDuration(text); err == nil {
		return time.Now().Add(-ago), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return at, &usageError{fmt.Errorf("--since %q is neither a time (2026-01-02T15:04:05Z) nor how long ago (10m)", text)}
	}
	return at, nil
}

func newEvents() *cobra.Command {
	var e everyday
	var last int64
	cmd := &cobra.Command{
		Use: "events", Short: "Follow what happens to VMs", Long: "Prints events as they happen, one JSON object a line, until it is ended (Ctrl-C).\n" + exitCodeHelp, Args: noArgs,
		Example: "  drafter events --after 0",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := client.New(e.socket)
			defer c.Close()
			to := json.NewEncoder(cmd.OutOrStdout())
			err := c.Events(cmd.Context(), last, func(e api.Event) error { return to.Encode(e) })
			if cmd.Context().Err() != nil {
				return nil
			}
			return err
		},
	}
	cmd.Flags().Int64Var(&last, "after", -1, "ID of the event to go on after (-1: from now on)")
	return e.add(cmd)
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drafter/api"
	"drafter/client"
	"drafter/internal/output"
)

// load is a VM's stats, with what two of them tell.
type load struct {
	api.Stats

	CPUPercent    float64 `json:"cpuPercent"` // 100 for one CPU of the host
	MemoryPercent float64 `json:"memoryPercent"`
}

const statsInterval = time.Second

func newStats() *cobra.Command {
	var e everyday
	var f format
	var once bool
	cmd := &cobra.Command{
		Use: "stats [VM…]", Short: "Show what VMs use of this host",
		Long: `Shows each second what VMs use: of CPUs (100% is one CPU of this host), of memory, of the network and
of disks. Without names it shows all VMs that run. Ctrl-C ends it.

MEM is the memory that a VM's processes use, that of its guest among it, and the memory that the guest
has. NET is what the guest has received and sent, DISK what was read from this host's disks and written
to them since the VM's last start.
` + exitCodeHelp,
		ValidArgsFunction: e.names,
		Example: `  drafter stats
  drafter stats --no-stream --format '{{.Name}} {{.CPUPercent}} {{.Memory}}' cache`,
		RunE: func(cmd *cobra.Command, names []string) error {
			c := client.New(e.socket)
			defer c.Close()
			err := showStats(cmd.Context(), c, names, once, func(loads []load) error {
				if !once && f == "table" && output.Terminal(cmd.OutOrStdout()) != nil {
					if _, err := io.WriteString(cmd.OutOrStdout(), "\x1b[H\x1b[2J"); err != nil {
						return err
					}
				}
				return show(f, cmd.OutOrStdout(), loads, func(w io.Writer) { statsTable(w, loads) })
			})
			if cmd.Context().Err() != nil {
				return nil
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&once, "no-stream", false, "Show it once, as of one second")
	f.add(cmd)
	return e.add(cmd)
}

func statsTable(w io.Writer, loads []load) {
	fmt.Fprintln(w, "ID\tNAME\tCPU %\tMEM USAGE / GUEST\tMEM %\tNET I/O\tDISK I/O\tPROCESSES")
	size := func(n uint64) string { return strings.ReplaceAll(humanize.IBytes(n), " ", "") }
	for _, l := range loads {
		fmt.Fprintf(w, "%s\t%s\t%.2f%%\t%s / %s\t%.2f%%\t%s / %s\t%s / %s\t%d\n", l.ID, l.Name, l.CPUPercent, size(uint64(l.Memory)), size(uint64(l.GuestMemory)),
			l.MemoryPercent, size(l.NetworkReceived), size(l.NetworkSent), size(l.DiskRead), size(l.DiskWritten), l.Processes)
	}
}

// showStats calls f each second, or once, until none of the VMs that were named runs.
func showStats(ctx context.Context, c *client.Client, names []string, once bool, f func([]load) error) error {
	before, err := stats(ctx, c, names, len(names) == 0)
	for err == nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(statsInterval):
		}
		var now []api.Stats
		if now, err = stats(ctx, c, names, true); err != nil || len(names) > 0 && len(now) == 0 {
			return err
		}
		loads := []load{}
		for _, s := range now {
			l := load{Stats: s, MemoryPercent: 100 * float64(s.Memory) / float64(s.GuestMemory)}
			if i := slices.IndexFunc(before, func(b api.Stats) bool { return b.ID == s.ID }); i >= 0 && s.Time.After(before[i].Time) {
				// A VM that was started meanwhile begins anew.
				l.CPUPercent = max(0, 100*float64(s.CPUNanoseconds-before[i].CPUNanoseconds)/float64(s.Time.Sub(before[i].Time)))
			}
			loads = append(loads, l)
		}
		if err = f(loads); once {
			return err
		}
		before = now
	}
	return err
}

// stats are those of the VMs that are named, or of all. VMs that have ended are left out, or an error.
func stats(ctx context.Context, c *client.Client, names []string, leaveOut bool) (all []api.Stats, err error) {
	if len(names) == 0 {
		vms, err := c.VMs(ctx)
		if err != nil {
			return nil, err
		}
		for _, vm := range vms {
			if vm.PID != 0 {
				names = append(names, vm.ID)
			}
		}
	}
	for _, name := range names {
		s, err := c.Stats(ctx, name)
		var refused *client.Error
		if leaveOut && errors.As(err, &refused) && (refused.Status == http.StatusNotFound || refused.Status == http.StatusConflict) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

func newTop() *cobra.Command {
	var e everyday
	cmd := &cobra.Command{
		Use: "top VM [PS-OPTION…]", Short: "Show the processes in a VM",
		Long: "Shows the processes in a VM, those of its image and those of its own system, as ps of busybox does.\n" + exitCodeHelp,
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: e.names,
		Example: `  drafter top cache
  drafter top cache -o pid,rss,args`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return execIn(cmd, e.socket, args[0], api.Exec{System: true, Args: append([]string{"ps"}, args[1:]...)}, false)
		},
	}
	cmd.Flags().SetInterspersed(false)
	return e.add(cmd)
}

// drafter-bench measures Drafter on this host, beside QEMU's own live migration.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"drafter/bench"
	"drafter/peer"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var o bench.Options
	names, texts := bench.Parts()
	var list strings.Builder
	for i := range names {
		fmt.Fprintf(&list, "  %-12s %s\n", names[i], texts[i])
	}
	cmd := &cobra.Command{
		Use:   "drafter-bench",
		Short: "Measure Drafter on this host, beside QEMU's own live migration",
		Long: `Measures Drafter, as root, and leaves a file with every round, medians, least and most, and ratios.
'make bench-report' makes a page with tables and charts of it.

The parts are:
` + list.String() + `
A guest holds 300 MiB that cannot be compressed, writes to 20 MiB of pages a second, and ticks every
10 ms. It is moved by Drafter and by QEMU itself, in turn, several times. Other guests write to a
small set of pages, or to one after the other, or are a Redis with clients. The guest's load is built
with gcc.

Nothing else should run on the host. --quick takes some ten minutes on two CPUs with emulation, and
does not count a first round of moves; all of it takes far longer.

Exit codes: 0 success, 1 failure.`,
		Example: `  drafter-bench --quick
  drafter-bench --parts engine,resume --rounds 20`,
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Drafter == "" {
				self, err := os.Executable()
				if err != nil {
					return err
				}
				o.Drafter = filepath.Join(filepath.Dir(self), "drafter")
			}
			o.Progress = cmd.ErrOrStderr()
			if err := peer.ProtectProcess(); err != nil { // as 'drafter peer' does
				fmt.Fprintln(o.Progress, "This process may be held up by the kernel:", err)
			}
			return bench.Run(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Drafter, "drafter", "", "The drafter to measure (default: the one beside this program)")
	f.BoolVar(&o.Quick, "quick", false, "Measure only the parts that the ratios need")
	f.StringSliceVar(&o.Parts, "parts", nil, "Parts to measure; none for all, or for those that --quick needs")
	f.IntVar(&o.Rounds, "rounds", 0, "Measurements of each part (0: the part's own number)")
	f.StringVar(&o.Dir, "dir", "out/bench", "Directory for packages and instances; files of an earlier run are removed first, and a directory with other files is refused")
	f.StringVar(&o.Output, "output", "bench/results/latest.json", "File for the result")
	return cmd
}

package cli

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"drafter/bench"
)

func newBench() *cobra.Command {
	var o bench.Options
	names, texts := bench.Parts()
	var list strings.Builder
	for i := range names {
		fmt.Fprintf(&list, "  %-12s %s\n", names[i], texts[i])
	}
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure Drafter on this host, beside QEMU's own live migration",
		Long: `Measures, as root, and leaves a file with every round, medians, least and most, and ratios. In the sources, 'make bench-report' makes a page with tables and charts of it.

The parts are:
` + list.String() + `
A guest holds 300 MiB that cannot be compressed, writes to 20 MiB of pages a second, and ticks every 10 ms. It is moved by Drafter and by QEMU itself, in turn, several times. Other
guests write to a small set of pages, or to one after the other, or are a Redis with clients. The guest's load is built with gcc.

Nothing else should run on the host. --quick takes some three minutes on two CPUs with emulation, and does not count a
first round of moves; all of it takes far longer.
` + exitCodeHelp,
		Example: `  drafter bench --quick
  drafter bench --parts engine,resume --rounds 20`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.Drafter, err = os.Executable(); err != nil {
				return err
			}
			o.Progress = cmd.ErrOrStderr()
			return bench.Run(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.Quick, "quick", false, "Whether to measure only what the ratios need")
	f.StringSliceVar(&o.Parts, "parts", nil, "Parts to measure; none for all, or for those that --quick needs")
	f.IntVar(&o.Rounds, "rounds", 0, "How often each part measures; 0 for as often as it says")
	f.StringVar(&o.Dir, "dir", "out/bench", "Directory for packages and instances; what an earlier run left in it is removed first, and one with other files is refused")
	f.StringVar(&o.Output, "output", "bench/results/latest.json", "File for the result")
	cmd.AddCommand(&cobra.Command{
		Use: "mapping FILE COLD", Hidden: true, Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return bench.Mapping(cmd.OutOrStdout(), args[0], args[1])
		},
	})
	return cmd
}

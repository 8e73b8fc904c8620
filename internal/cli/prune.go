package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"drafter/api"
	"drafter/client"
)

func newPrune() *cobra.Command {
	var e everyday
	var r api.Prune
	var unused time.Duration
	var force bool
	cmd := &cobra.Command{
		Use: "prune", Short: "Remove what no VM needs",
		Long: `Removes packages, images and OS blueprints that no VM needs. It shows what it will remove, and asks.
What is removed is made again by the next run of its image. Packages with names stay: snapshots, and
what was imported. --all removes them, too, unless a VM runs from them.
` + exitCodeHelp,
		Example: `  drafter prune --dry-run
  drafter prune --force --until 24h`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if unused < 0 {
				return &usageError{fmt.Errorf("--until %s is no time ago, such as 24h", unused)}
			}
			r.Unused = int64(unused / time.Second)
			c := client.New(e.socket)
			defer c.Close()
			dry := r
			dry.DryRun = true
			found, err := c.Prune(cmd.Context(), dry)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if len(found.Packages)+len(found.Images)+len(found.Blueprints) == 0 {
				_, err := fmt.Fprintln(out, "There is nothing to remove.")
				return err
			}
			if !force || r.DryRun {
				if err := showPruned(out, found); err != nil || r.DryRun {
					return err
				}
				if yes, err := confirm(cmd, "Remove all of that?"); !yes || err != nil {
					return err
				}
			}
			done, err := c.Prune(cmd.Context(), r)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(out, "Freed %s.\n", humanize.IBytes(uint64(done.Freed)))
			return err
		},
	}
	f := cmd.Flags()
	f.DurationVar(&unused, "until", 0, "Only what was not used for so long, such as 24h (default: all)")
	f.BoolVarP(&r.All, "all", "a", false, "Also packages with names")
	f.BoolVarP(&force, "force", "f", false, "Do not ask")
	f.BoolVar(&r.DryRun, "dry-run", false, "Only show what would be removed")
	return e.add(cmd)
}

func showPruned(out io.Writer, p api.Pruned) error {
	if len(p.Packages) > 0 {
		if err := show("table", out, p.Packages, func(w io.Writer) { packageTable(w, p.Packages) }); err != nil {
			return err
		}
	}
	if len(p.Images) > 0 {
		if err := show("table", out, p.Images, func(w io.Writer) { imageTable(w, p.Images) }); err != nil {
			return err
		}
	}
	for _, key := range p.Blueprints {
		fmt.Fprintf(out, "OS blueprint %s\n", key[:min(len(key), 12)])
	}
	_, err := fmt.Fprintf(out, "All of that takes %s.\n", humanize.IBytes(uint64(p.Freed)))
	return err
}

// confirm asks on the terminal.
func confirm(cmd *cobra.Command, question string) (bool, error) {
	in, ok := cmd.InOrStdin().(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return false, &usageError{errors.New("this needs a terminal, to ask; pass --force to go on without a question")}
	}
	fmt.Fprint(cmd.ErrOrStderr(), question, " [y/N] ")
	answers := make(chan string, 1)
	go func() {
		var answer string
		_, _ = fmt.Fscanln(in, &answer) // an empty line, or none, is a no
		answers <- strings.ToLower(answer)
	}()
	select {
	case answer := <-answers:
		return answer == "y" || answer == "yes", nil
	case <-cmd.Context().Done(): // Ctrl-C: the process ends, and with it who reads
		return false, nil
	}
}

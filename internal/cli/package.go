package cli

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drafter/api"
	"drafter/client"
	"drafter/internal/newfile"
	"drafter/internal/progress"
)

func newPackage() *cobra.Command {
	cmd := &cobra.Command{
		Use: "package", Short: "Look after the packages of this host", Args: noArgs,
		Long: `Looks after the packages of the daemon. A package is a suspended VM, from which any number of VMs
start: the first run of an image makes one, and so do 'drafter snapshot', 'drafter pull' and 'drafter
package import'. 'drafter run' takes its name or key in place of an image.
` + exitCodeHelp,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newPackageList(), newPackageInspect(), newPackageRemove(), newPackageExport(), newPackageImport())
	return cmd
}

// packageName is what a package is called.
func packageName(p api.Package) string { return cmp.Or(p.Name, p.Key[:min(len(p.Key), 12)]) }

// packageOrigin is where a package comes from.
func packageOrigin(p api.Package) string {
	switch p.Source {
	case api.FromSnapshot:
		return "VM " + p.VM
	case api.FromImport:
		return "an archive"
	}
	return strings.Join(append([]string{p.Reference}, p.Command...), " ")
}

func newPackageList() *cobra.Command {
	var e everyday
	var f format
	cmd := &cobra.Command{
		Use: "ls", Short: "List packages", Long: "Lists packages, the newest first.\n" + exitCodeHelp, Args: noArgs,
		Example: "  drafter package ls --format '{{.Key}} {{.VMs}}'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := client.New(e.socket)
			defer c.Close()
			list, err := c.Packages(cmd.Context())
			if err != nil {
				return err
			}
			return show(f, cmd.OutOrStdout(), list, func(w io.Writer) { packageTable(w, list) })
		},
	}
	f.add(cmd)
	return e.add(cmd)
}

func packageTable(w io.Writer, list []api.Package) {
	fmt.Fprintln(w, "PACKAGE\tFROM\tMEMORY\tCPUS\tSIZE\tVMS\tUSED")
	for _, p := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%d\t%s\n", packageName(p), packageOrigin(p),
			humanize.IBytes(uint64(p.Memory)), p.CPUs, humanize.IBytes(uint64(p.Size)), len(p.VMs), humanize.Time(p.Used))
	}
}

func newPackageInspect() *cobra.Command {
	var e everyday
	var f format
	cmd := &cobra.Command{
		Use: "inspect PACKAGE…", Short: "Tell all of packages", Long: "Tells all that is known of packages, as JSON.\n" + exitCodeHelp,
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: e.complete(packageNames),
		Example: "  drafter package inspect warm --format '{{.Hardware.CPU}}'",
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client.New(e.socket)
			defer c.Close()
			var list []api.Package
			for _, name := range args {
				p, err := c.Package(cmd.Context(), name)
				if err != nil {
					return err
				}
				list = append(list, p)
			}
			if f == "table" {
				f = "json"
			}
			return show(f, cmd.OutOrStdout(), list, nil)
		},
	}
	f.add(cmd)
	cmd.Flags().Lookup("format").DefValue = "json"
	f = "json"
	return e.add(cmd)
}

func newPackageRemove() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: "rm PACKAGE…", Short: "Remove packages", Long: "Removes packages. One from which a VM runs is refused.\n" + exitCodeHelp,
		Example: "  drafter package rm warm",
		Args:    cobra.MinimumNArgs(1), ValidArgsFunction: e.complete(packageNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.each(cmd, args, func(c *client.Client, name string) error { return c.RemovePackage(cmd.Context(), name) })
		},
	})
}

func newPackageExport() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: "export PACKAGE FILE", Short: "Write a package to a file",
		Long: `Writes a package to a .tar.zst file, which 'drafter package import' and 'drafter packager --extract'
take. The file gets its name once it is complete. It holds all that was in the VM's memory, secrets
too; only its owner can read it.
` + exitCodeHelp,
		Example: "  drafter package export warm warm.tar.zst",
		Args:    cobra.ExactArgs(2), ValidArgsFunction: firstThenFile(e.complete(packageNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := client.New(e.socket)
			defer c.Close()
			archive, err := c.Export(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer archive.Close()
			bars := progress.New(cmd.ErrOrStderr())
			defer bars.Close()
			err = newfile.Write(args[1], func(f *os.File) error {
				_, err := io.Copy(f, &counted{r: archive, report: func(n int64) { bars.Report("Exporting", n, 0) }})
				return err
			})
			if err != nil {
				return fmt.Errorf("export package %s to %s: %w", args[0], args[1], err)
			}
			return nil
		},
	})
}

func newPackageImport() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: "import FILE [NAME]", Short: "Make a package of a file",
		Long: `Makes a package of a .tar.zst file, as 'drafter package export' and 'drafter packager' write it, and
prints its key. 'drafter run NAME' starts VMs from it. Whoever has made the file decides what runs in
them.
` + exitCodeHelp,
		Example: "  drafter package import warm.tar.zst warm",
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				return err
			}
			name := ""
			if len(args) == 2 {
				name = args[1]
			}
			c := client.New(e.socket)
			defer c.Close()
			bars := progress.New(cmd.ErrOrStderr())
			defer bars.Close()
			p, err := c.Import(cmd.Context(), name, &counted{r: f, report: func(n int64) { bars.Report("Importing", n, info.Size()) }})
			if err != nil {
				return fmt.Errorf("import %s: %w", args[0], err)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), p.Key)
			return err
		},
	})
}

// counted reports how many bytes were read.
type counted struct {
	r      io.Reader
	n      int64
	report func(int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.report(c.n)
	return n, err
}

// firstThenFile completes the first argument by f, and further ones as files.
func firstThenFile(f cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		return f(cmd, args, typed)
	}
}

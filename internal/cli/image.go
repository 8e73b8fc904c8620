package cli

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drafter/api"
	"drafter/client"
)

// complete completes what list returns of the daemon.
func (e *everyday) complete(list func(*cobra.Command, *client.Client) ([]string, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		c := client.New(e.socket)
		defer c.Close()
		names, err := list(cmd, c)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// first completes the first argument only.
func first(f cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return f(cmd, args, typed)
	}
}

func imageNames(cmd *cobra.Command, c *client.Client) (names []string, err error) {
	images, err := c.Images(cmd.Context())
	for _, i := range images {
		names = append(names, i.Reference+"\t"+shortDigest(i.Digest))
	}
	return names, err
}

func packageNames(cmd *cobra.Command, c *client.Client) (names []string, err error) {
	packages, err := c.Packages(cmd.Context())
	for _, p := range packages {
		names = append(names, packageName(p)+"\t"+packageOrigin(p))
	}
	return names, err
}

// runnable are the names that 'drafter run' takes.
func runnable(cmd *cobra.Command, c *client.Client) ([]string, error) {
	images, err := imageNames(cmd, c)
	packages, perr := packageNames(cmd, c)
	return slices.Concat(images, packages), errors.Join(err, perr)
}

// pushable are the names that 'drafter push' takes.
func pushable(cmd *cobra.Command, c *client.Client) ([]string, error) {
	names, err := packageNames(cmd, c)
	vms, verr := c.VMs(cmd.Context())
	for _, vm := range vms {
		names = append(names, vm.Name+"\t"+vm.Image)
	}
	return names, errors.Join(err, verr)
}

func shortDigest(digest string) string { return digest[:min(len(digest), len("sha256:")+12)] }

func newImages() *cobra.Command {
	var e everyday
	var f format
	cmd := &cobra.Command{
		Use: "images", Short: "List images",
		Long: `Lists the images that 'drafter run' and 'drafter pull' have looked up, the latest first. An image
itself is not stored, but the packages that were made of it.
` + exitCodeHelp,
		Args:    noArgs,
		Example: "  drafter images --format '{{.Reference}} {{.Digest}}'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := client.New(e.socket)
			defer c.Close()
			images, err := c.Images(cmd.Context())
			if err != nil {
				return err
			}
			return show(f, cmd.OutOrStdout(), images, func(w io.Writer) { imageTable(w, images) })
		},
	}
	f.add(cmd)
	return e.add(cmd)
}

func imageTable(w io.Writer, images []api.Image) {
	fmt.Fprintln(w, "IMAGE\tPLATFORM\tDIGEST\tSIZE\tPACKAGES\tFOUND")
	for _, i := range images {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n",
			i.Reference, i.Platform, shortDigest(i.Digest), humanize.IBytes(uint64(i.Size)), len(i.Packages), humanize.Time(i.Found))
	}
}

func newImage() *cobra.Command {
	cmd := &cobra.Command{
		Use: "image", Short: "Remove images", Args: noArgs,
		Long: "Removes images. 'drafter images' lists them.\n" + exitCodeHelp,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newImageRemove())
	return cmd
}

func newImageRemove() *cobra.Command {
	var e everyday
	return e.add(&cobra.Command{
		Use: "rm IMAGE…", Short: "Remove images and their packages",
		Long: `Forgets images, by reference or digest, and removes the packages that were made of them. One
from which a VM runs is refused.
` + exitCodeHelp,
		Example: "  drafter image rm docker://valkey/valkey",
		Args:    cobra.MinimumNArgs(1), ValidArgsFunction: e.complete(imageNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.each(cmd, args, func(c *client.Client, name string) error { return c.RemoveImage(cmd.Context(), name) })
		},
	})
}

// each does the same to each thing that is named, and prints the names of those where it was done.
func (e *everyday) each(cmd *cobra.Command, names []string, do func(*client.Client, string) error) (err error) {
	c := client.New(e.socket)
	defer c.Close()
	for _, name := range names {
		derr := do(c, name)
		if derr == nil {
			_, derr = fmt.Fprintln(cmd.OutOrStdout(), name)
		}
		err = errors.Join(err, derr)
	}
	return err
}

package cli

import (
	"errors"
	"fmt"
	"net/http"
	"path"
	"strings"

	"github.com/moby/go-archive"
	"github.com/spf13/cobra"

	"drafter/client"
)

func newCopy() *cobra.Command {
	var e everyday
	cmd := &cobra.Command{
		Use:   "cp SOURCE TARGET",
		Short: "Copy files to a VM, or from it",
		Long: `Copies a file, or a directory and all below it, from this host to the container of a VM's
image, or from there to here. One of both is VM:PATH. As with docker: a target that is a directory
gets the source into it; SOURCE/. stands for what is in a directory.
` + exitCodeHelp,
		Example: `  drafter cp cache:/etc/hosts .
  drafter cp site/. web:/usr/share/nginx/html`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, source := placeOf(args[0])
			to, target := placeOf(args[1])
			if (from == "") == (to == "") {
				return &usageError{errors.New("one of both must be VM:PATH; to copy between VMs, copy to this host first")}
			}
			c := client.New(e.socket)
			defer c.Close()
			if from != "" {
				return copyOut(cmd, c, from, source, target)
			}
			return copyIn(cmd, c, source, to, target)
		},
	}
	return e.add(cmd)
}

// placeOf splits VM:PATH. A path of this host has no VM: it begins with / or ., or has no colon.
func placeOf(arg string) (vm, file string) {
	if vm, file, ok := strings.Cut(arg, ":"); ok && !strings.HasPrefix(arg, "/") && !strings.HasPrefix(arg, ".") {
		return vm, inContainer(file)
	}
	return "", arg
}

// inContainer makes a path absolute, and keeps what it ends with.
func inContainer(file string) string {
	clean := path.Join("/", file)
	switch {
	case strings.HasSuffix(file, "/."):
		return strings.TrimSuffix(clean, "/") + "/."
	case strings.HasSuffix(file, "/") && clean != "/":
		return clean + "/"
	}
	return clean
}

func copyOut(cmd *cobra.Command, c *client.Client, vm, source, target string) error {
	info, err := c.Stat(cmd.Context(), vm, source)
	if err != nil {
		return err
	}
	content, err := c.CopyOut(cmd.Context(), vm, strings.TrimSuffix(source, "/."))
	if err != nil {
		return err
	}
	defer content.Close()
	if err := archive.CopyTo(content, archive.CopyInfo{Path: source, Exists: true, IsDir: info.Directory}, target); err != nil {
		return fmt.Errorf("copy from VM %s to %s: %w", vm, target, err)
	}
	return nil
}

func copyIn(cmd *cobra.Command, c *client.Client, source, vm, target string) (err error) {
	from, err := archive.CopyInfoSourcePath(source, false)
	if err != nil {
		return fmt.Errorf("copy %s: %w", source, err)
	}
	to := archive.CopyInfo{Path: target}
	info, err := c.Stat(cmd.Context(), vm, target)
	var refused *client.Error
	switch {
	case err == nil:
		to.Exists, to.IsDir = true, info.Directory
	case !errors.As(err, &refused) || refused.Status != http.StatusNotFound:
		return err
	default: // its directory is there, or the VM says that it is not
	}
	packed, err := archive.TarResource(from)
	if err != nil {
		return fmt.Errorf("copy %s: %w", source, err)
	}
	defer func() { err = errors.Join(err, packed.Close()) }()
	dir, content, err := archive.PrepareArchiveCopy(packed, from, to)
	if err != nil {
		return fmt.Errorf("copy %s to VM %s: %w", source, vm, err)
	}
	defer func() { err = errors.Join(err, content.Close()) }()
	return c.CopyIn(cmd.Context(), vm, dir, content)
}

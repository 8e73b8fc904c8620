package cli

import (
	"errors"
	"log/slog"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drafter/internal/block"
	"drafter/registry"
	"drafter/vmm"
)

func newRegistry() *cobra.Command {
	var (
		connection   transportFlags
		c            registry.Config
		devices, pkg string
		laddr        string
	)
	cmd := &cobra.Command{
		Use:   "registry",
		Short: "Serve a VM package to any number of hosts",
		Long: `Serves the devices of a package, read-only, to any number of peers at once. A
peer whose --raddr is the registry's --laddr starts an instance of the package at once, and pulls
the rest behind the running VM.

The files must not change while they are served. To serve another version, put it into another
directory and restart. Peers that are pulling the old one then fail rather than mix the two, unless
they have all of it already.

Whoever can connect can read the package, including the memory of its VM. So only root and the user
of this process on this host can connect, unless there is TLS. To serve other hosts, pass an address
that they reach and --tls-cert, --tls-key and --tls-ca, or --insecure on a network that you trust.
` + exitCodeHelp,
		Example: `  drafter registry --laddr localhost:1600 --package out/package
  drafter registry --laddr :1600 --tls-ca ca.pem --tls-cert host.pem --tls-key host.key --package out/package`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			ctx := cmd.Context()
			switch {
			case pkg != "" && cmd.Flags().Changed("devices"):
				return &usageError{errors.New("--package and --devices both name the devices; give one of them")}
			case pkg != "":
				c.Devices, err = registry.PackageDevices(pkg)
			default:
				c.Devices, err = parseJSON[registry.Device]("devices", devices)
			}
			if err != nil {
				return err
			}
			listener, err := connection.listen(ctx, laddr)
			if err != nil {
				return err
			}
			defer listener.Close()
			start := time.Now()
			r, err := registry.Open(ctx, c)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, r.Close()) }()
			var size int64
			for _, d := range r.Devices() {
				size += d.Size
				slog.Info("Serving device", "device", d.Name, "size", humanize.IBytes(uint64(d.Size)), "content", d.Content)
			}
			slog.Info("Serving", "address", listener.Addr(), "size", humanize.IBytes(uint64(size)), "took", time.Since(start).Round(time.Millisecond))
			r.Serve(ctx, listener.Accept)
			return nil
		},
	}
	connection.add(cmd)
	var defaults []registry.Device
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory, vmm.Config} {
		defaults = append(defaults, registry.Device{Name: name, Input: "out/package/" + vmm.PackageFile(name), BlockSize: block.ContentBlockSize})
	}
	f := cmd.Flags()
	f.StringVar(&devices, "devices", defaultJSON(defaults), "Devices configuration")
	f.StringVar(&pkg, "package", "", "Directory of the package (instead of --devices)")
	f.StringVar(&laddr, "laddr", "localhost:1600", "Address to listen on: HOST:PORT or unix:PATH")
	f.IntVar(&c.Connections, "concurrency", 1024, "Most connections to serve at once, each of some 2 MiB of memory; a peer has two, and a host gets no more than are left for others")
	return cmd
}

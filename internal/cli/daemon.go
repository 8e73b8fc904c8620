package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"drafter/client"
	"drafter/internal/daemon"
	"drafter/vmm"
	"drafter/vmm/firecracker"
	"drafter/vmm/qemu"
)

func newDaemon() *cobra.Command {
	c := daemon.Config{Version: Version}
	var socket string
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Look after the VMs of this host",
		Long: `Looks after the VMs that 'drafter run' makes, and answers 'drafter ps', 'drafter stop'
and the other everyday commands over a UNIX socket.

Each VM is owned by a process of its own. The daemon may end, be killed or be replaced: VMs and their
ports go on, and the next daemon finds them. The NAT that gives VMs their networks ends with the
daemon if no VM runs.

At its start the daemon starts the VMs whose --restart says so. Before the host shuts down, 'drafter
stop --all' suspends all VMs, as drafter-shutdown.service does.

Who may open the socket may do all that root may: it belongs to root and the group drafter, if there
is one. The API is REST with JSON. GET /openapi.json describes it.
` + exitCodeHelp,
		Example: `  drafter daemon
  drafter run -d -p 6379:6379 docker://valkey/valkey`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			return runDaemon(cmd.Context(), c, socket)
		},
	}
	f := cmd.Flags()
	f.StringVar(&socket, "socket", client.Socket, "UNIX socket to answer at")
	f.StringVar(&c.Dir, "dir", "/var/lib/drafter", "Directory for VMs, packages and records")
	f.StringVar(&c.Guest, "guest-bin", "", "drafter-guest binary (default: beside this program, or on PATH)")
	f.StringVar(&c.Blueprint, "blueprint", "", "Directory of an OS blueprint, as 'drafter blueprint os' makes it (default: one is made for the first VM)")
	f.StringVar(&c.HostInterface, "host-interface", "", "Host gateway interface for VMs, or several (eth0,eth1) (default: those of the current default route)")
	f.StringVar(&c.HostVethCIDR, "host-veth-cidr", "10.0.16.0/22", "CIDR for the VMs' veths outside their namespaces")
	f.StringVar(&c.NamespaceVethCIDR, "namespace-veth-cidr", "10.0.23.0/24", "CIDR for the VMs' veths inside their namespaces")
	f.StringVar(&c.NamespacePrefix, "namespace-prefix", "vm", "Prefix of the names of the VMs' network namespaces")
	f.IntVar(&c.NamespaceCount, "namespace-count", 32, "Number of network namespaces, and so of VMs that can run at a time")
	return cmd
}

//nolint:contextcheck // streams and operations go on until the daemon ends, not its callers
func runDaemon(ctx context.Context, c daemon.Config, socket string) (err error) {
	if c.Guest, err = findGuest(c.Guest); err != nil && c.Blueprint == "" {
		return err
	}
	if c.Program, err = os.Executable(); err != nil {
		return err
	}
	c.Drivers = vmm.Drivers{qemu.Driver{}, firecracker.Driver{Bin: "firecracker", Jailer: "jailer"}}
	d, err := daemon.Open(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	listener, err := listenAt(socket)
	if err != nil {
		return err
	}
	serving, stop := context.WithCancel(context.Background())
	defer stop()
	server := &http.Server{Handler: d.Handler(), ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return serving }}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	slog.Info("The daemon is up", "socket", socket, "directory", c.Dir)
	notifyReady()
	select {
	case err = <-done:
		return fmt.Errorf("serve the API: %w", err)
	case <-ctx.Done():
	}
	slog.Info("Shutting down; VMs go on")
	stop() // streams end
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err = server.Shutdown(closing); errors.Is(err, context.DeadlineExceeded) {
		err = server.Close() // a client does not read its answer
	}
	if served := <-done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// listenAt listens at a UNIX socket for root and the group drafter. The socket of a daemon that was
// killed is removed: nobody answers there.
func listenAt(socket string) (net.Listener, error) {
	if info, err := os.Lstat(socket); err == nil && info.Mode().Type() == os.ModeSocket {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return nil, errors.Join(fmt.Errorf("another process answers at %s; choose another --socket", socket), conn.Close())
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, err
		}
		if err := os.Remove(socket); err != nil {
			return nil, err
		}
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	err = os.Chmod(socket, 0o600)
	if group, gerr := user.LookupGroup("drafter"); gerr == nil && err == nil {
		gid, _ := strconv.Atoi(group.Gid) // it is a number on Linux
		if err = os.Chown(socket, 0, gid); err == nil {
			err = os.Chmod(socket, 0o660)
		}
	}
	if err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}

package cli

import (
	"context"
	"crypto/tls"
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

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"drafter/client"
	"drafter/internal/daemon"
	"drafter/transport"
	"drafter/vmm"
	"drafter/vmm/firecracker"
	"drafter/vmm/qemu"
)

func newDaemon() *cobra.Command {
	c := daemon.Config{Version: Version}
	var socket, metrics string
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Look after the VMs of this host",
		Long: `Looks after the VMs that 'drafter run' makes, and answers 'drafter ps', 'drafter stop'
and the other everyday commands over a UNIX socket.

Each VM is owned by a process of its own. The daemon may end, be killed or be replaced: VMs and their
ports go on, and the next daemon finds them. The NAT that gives VMs their networks ends with the
daemon if no VM runs.

With --listen, VMs can move between this host and others ('drafter move'). Hosts know each other by
keys: make a token here ('drafter host token'), and give it to 'drafter host add' on the other host,
or the other way round. A move also needs a TCP port that the kernel chooses, from the host to which
the VM moves to this one.

At its start the daemon starts the VMs whose --restart says so. Before the host shuts down, 'drafter
stop --all' suspends all VMs, as drafter-shutdown.service does.

Who may open the socket may do all that root may: it belongs to root and the group drafter, if there
is one. The API is REST with JSON. GET /openapi.json describes it.
` + exitCodeHelp,
		Example: `  drafter daemon
  drafter run -d -p 6379:6379 docker://valkey/valkey
  drafter daemon --listen 192.0.2.7:7443`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := requireRoot(); err != nil {
				return err
			}
			if err := checkListen(&c, cmd.Flags().Changed("tunnel-port")); err != nil {
				return err
			}
			return runDaemon(cmd.Context(), c, socket, metrics)
		},
	}
	f := cmd.Flags()
	f.StringVar(&socket, "socket", client.Socket, "UNIX socket to answer at")
	f.StringVar(&metrics, "metrics", "", "Address (HOST:PORT) to serve Prometheus metrics of all VMs from, without authentication: names, images, sizes, numbers, times and paths, nothing of a VM's content (leave empty to disable)")
	f.StringVar(&c.Dir, "dir", defaultDaemonDir, "Directory for VMs, packages and records")
	f.StringVar(&c.Name, "name", "", "Name of this host for other hosts (default: its host name)")
	f.StringVar(&c.Listen, "listen", "", "HOST:PORT at which other hosts reach this one, by TLS, such as 192.0.2.7:7443 or :7443 (leave empty to disable)")
	f.IntVar(&c.TunnelPort, "tunnel-port", 0, "UDP port by which connections of VMs that have moved between hosts go on (default: that of --listen; 0: none)")
	f.StringVar(&c.Guest, "guest-bin", "", "drafter-guest binary (default: beside this program, or on PATH)")
	f.StringVar(&c.Blueprint, "blueprint", "", "Directory of an OS blueprint, as 'drafter blueprint os' makes it (default: one is made for the first VM)")
	f.StringVar(&c.VMM, "vmm", vmm.VMMAuto, "VMM that new packages are for: auto, qemu or firecracker")
	addNetwork(cmd, &c)
	return cmd
}

// checkListen refuses an address of no use, and gives the tunnel the same port.
func checkListen(c *daemon.Config, tunnel bool) error {
	if c.Listen == "" {
		return nil
	}
	_, text, err := net.SplitHostPort(c.Listen)
	var port uint16
	if err == nil {
		var n uint64
		n, err = strconv.ParseUint(text, 10, 16)
		port = uint16(n)
	}
	if err != nil || port == 0 {
		return &usageError{fmt.Errorf("--listen %q is not of the form HOST:PORT, such as :7443", c.Listen)}
	}
	if !tunnel {
		c.TunnelPort = int(port)
	}
	return nil
}

// daemonDrivers are the drivers of the VMMs that a daemon uses.
func daemonDrivers() vmm.Drivers {
	return vmm.Drivers{qemu.Driver{}, firecracker.Driver{Bin: "firecracker", Jailer: "jailer"}}
}

//nolint:contextcheck // streams and operations go on until the daemon ends, not its callers
func runDaemon(ctx context.Context, c daemon.Config, socket, metrics string) (err error) {
	if c.Guest, err = findGuest(c.Guest); err != nil && c.Blueprint == "" {
		return err
	}
	if c.Program, err = os.Executable(); err != nil {
		return err
	}
	c.Drivers, c.Checks = daemonDrivers(), hostChecks(c)
	d, err := daemon.Open(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if metrics != "" {
		stop, merr := serveGathered(ctx, metrics, prometheus.Gatherers{d.Metrics()})
		if merr != nil {
			return merr
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	listener, err := listenAt(socket)
	if err != nil {
		return err
	}
	ended := make(chan struct{}, 2) // has room for both servers
	servers := []*server{newServer(listener, d.Handler(), ended)}
	if c.Listen != "" {
		l, err := net.Listen("tcp", c.Listen)
		if err != nil {
			return errors.Join(fmt.Errorf("--listen %s: %w", c.Listen, err), listener.Close())
		}
		servers = append(servers, newServer(tls.NewListener(transport.Bound(l, mostCallers), d.TLS()), d.HostHandler(), ended))
	}
	slog.Info("The daemon is up", "socket", socket, "directory", c.Dir)
	notifyReady()
	select {
	case <-ended: // shutdown says why
	case <-ctx.Done():
	}
	slog.Info("Shutting down; VMs go on")
	for _, s := range servers {
		err = errors.Join(err, s.shutdown(context.WithoutCancel(ctx)))
	}
	return err
}

// mostCallers bounds the connections of other hosts.
const mostCallers = 256

// server serves the API on one listener.
type server struct {
	http *http.Server
	stop context.CancelFunc // ends streams
	done chan error
}

func newServer(l net.Listener, h http.Handler, ended chan<- struct{}) *server {
	ctx, stop := context.WithCancel(context.Background())
	s := &server{stop: stop, done: make(chan error, 1)}
	s.http = &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
	}
	go func() {
		s.done <- s.http.Serve(l)
		ended <- struct{}{}
	}()
	return s
}

// shutdown ends the server. A client that does not read its answer is not waited for.
func (s *server) shutdown(ctx context.Context) error {
	s.stop()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.http.Close()
	}
	if served := <-s.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, fmt.Errorf("serve the API: %w", served))
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

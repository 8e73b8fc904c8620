// Package transport connects peers, and decides which peers are trusted. With TLS: those with a
// certificate. Without TLS: root and the process' own user on this host, as the kernel names them.
// Everybody only if that was asked for.
package transport

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"drafter/internal/kind"

	"golang.org/x/sys/unix"
)

// Trust says which peers are trusted. The zero value trusts root and the process' own user on this
// host, over loopback and UNIX sockets. It is safe for concurrent use.
type Trust struct {
	TLS     *Certificates // if not nil, certificates alone decide; see [LoadTLS]
	Anybody bool          // without TLS: trust whoever connects or answers, on this host or another

	// what is to be said of connections, and of certificates; nil: slog.Default()
	Logger *slog.Logger
}

// ErrUnauthorized says that the other end of a connection is not trusted: another user of this
// host, or a peer without a certificate of the authorities.
var ErrUnauthorized = kind.ErrUnauthorized

// ErrBeyond says that an address beyond this host needs TLS, or trust in everybody.
var ErrBeyond = errors.New("other hosts can reach it, or answer there; " +
	"use TLS on both sides, or trust everybody who can")

// split tells TCP addresses from paths of UNIX sockets (unix:PATH).
func split(addr string) (network, address string) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return "unix", path
	}
	return "tcp", addr
}

// Listen listens at HOST:PORT or unix:PATH. Without TLS and without trust in everybody, it refuses
// addresses beyond this host with [ErrBeyond]. The socket at a path has mode 0600, and replaces one
// that a killed process has left there.
func (t *Trust) Listen(ctx context.Context, addr string) (*Listener, error) {
	network, address := split(addr)
	config := net.ListenConfig{}
	config.SetMultipathTCP(false) // the kernel names the owner of one path
	switch {
	case network == "unix" && address == "":
		return nil, errors.New("listen on unix:: the socket has no path")
	case network == "unix":
		if err := removeDeadSocket(ctx, address); err != nil {
			return nil, err
		}
		config.Control = private
	case t.local():
		addrs, err := resolve(ctx, address)
		if err != nil {
			return nil, err
		}
		address = addrs[0].String() // not looked up again
	}
	l, err := config.Listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if at, ok := l.Addr().(*net.TCPAddr); ok && t.local() {
		// If the kernel cannot tell whose sockets connect, nobody could ever connect.
		if _, err := socketOwner(at.AddrPort(), netip.AddrPort{}); err != nil {
			const text = "ask the kernel whose this socket is: %w; use a UNIX socket, or TLS"
			return nil, errors.Join(fmt.Errorf(text, err), l.Close())
		}
	}
	return newListener(l, t), nil
}

// local tells whether the kernel has to identify the peer.
func (t *Trust) local() bool { return t.TLS == nil && !t.Anybody }

// private creates a UNIX socket with mode 0600 at most: bind(2) takes the mode of the socket's own
// inode.
func private(_, _ string, raw syscall.RawConn) error {
	var err error
	if cerr := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
		return cerr
	}
	return err
}

// removeDeadSocket removes a socket at which nobody listens, left by a killed process. A socket
// that another user has made, or that others may use, is not ours and stays.
func removeDeadSocket(ctx context.Context, path string) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err == nil {
		return c.Close() // and listening there will fail
	}
	info, serr := os.Lstat(path)
	dead := serr == nil && info.Mode().Type() == os.ModeSocket && errors.Is(err, syscall.ECONNREFUSED)
	if !dead {
		return nil
	}
	if st := info.Sys().(*syscall.Stat_t); int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s is the socket of another program (it belongs to user %d, mode %04o); choose another path, or remove it", path, st.Uid, st.Mode&0o777)
	}
	return os.Remove(path)
}

// resolve looks up HOST:PORT, and refuses what is not loopback. IPv4 comes first, as with
// [net.Listen].
func resolve(ctx context.Context, address string) (addrs []netip.AddrPort, err error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	port, err := net.DefaultResolver.LookupPort(ctx, "tcp", service)
	if err != nil {
		return nil, err
	}
	if host == "" {
		return nil, ErrBeyond
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	for _, v4 := range []bool{true, false} {
		for _, ip := range ips {
			if ip = ip.Unmap(); !ip.IsLoopback() {
				return nil, ErrBeyond
			}
			if ip.Is4() == v4 {
				addrs = append(addrs, netip.AddrPortFrom(ip, uint16(port)))
			}
		}
	}
	return addrs, nil
}

// Dialer returns a function that connects with HOST:PORT or unix:PATH. Each connection is
// authenticated like those of [Trust.Listen]: whoever listens at an address of this host must be
// root or the process' own user.
func (t *Trust) Dialer(addr string) (func(context.Context) (io.ReadWriteCloser, error), error) {
	network, address := split(addr)
	host := "localhost"
	if network == "tcp" {
		var err error
		if host, _, err = net.SplitHostPort(address); err != nil {
			return nil, err
		}
	}
	switch {
	case t.TLS != nil:
		return func(ctx context.Context) (io.ReadWriteCloser, error) {
			config := t.TLS.config(t.Logger).Clone()
			config.ServerName = cmp.Or(t.TLS.Name, host)
			conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, network, address)
			return conn, unauthorized(err)
		}, nil
	case t.Anybody:
		return func(ctx context.Context) (io.ReadWriteCloser, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}, nil
	case network == "unix":
		return func(ctx context.Context) (io.ReadWriteCloser, error) {
			return dialOwn(ctx, network, address)
		}, nil
	}
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		addrs, err := resolve(ctx, address)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", address, err)
		}
		var failed error
		for _, a := range addrs { // somebody else may listen at one of them
			conn, err := dialOwn(ctx, network, a.String())
			if err == nil {
				return conn, nil
			}
			if failed != nil {
				err = fmt.Errorf("%w; %w", failed, err)
			}
			failed = err
		}
		return nil, failed
	}, nil
}

// dialOwn connects with a process of root or of the process' own user.
func dialOwn(ctx context.Context, network, address string) (io.ReadWriteCloser, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if err := checkAnswers(ctx, conn); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", address, err), conn.Close())
	}
	return conn, nil
}

// checkAnswers is checkPeer for a connection that this process made: its other end has no owner
// until somebody has accepted it.
func checkAnswers(ctx context.Context, conn net.Conn) error {
	for wait := 100 * time.Microsecond; ; wait = min(2*wait, 20*time.Millisecond) {
		err := checkPeer(conn)
		if !errors.Is(err, errNotAccepted) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("nobody takes the connection: %w", context.Cause(ctx))
		}
	}
}

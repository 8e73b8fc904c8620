package firecracker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"drafter/vmm"
)

// Where things are for Firecracker, in its jail.
const (
	apiSocket  = "api.sock"
	uffdSocket = "uffd.sock"
	// the guest's connections to port N of its host go to vsock.sock_N beside it; see docs/vsock.md
	// of Firecracker
	vsockSocket = "vsock.sock"
	guestCID    = 3
)

// ports listen for the guest's programs.
type ports map[uint32]*net.UnixListener

func listen(l *vmm.Launch) (ports, error) {
	ps := ports{}
	for _, port := range l.Ports {
		listener, err := listenAt(l, fmt.Sprintf("%s_%d", vsockSocket, port))
		if err != nil {
			return ps, errors.Join(err, ps.close())
		}
		ps[port] = listener
	}
	return ps, nil
}

// listenAt makes a socket in the jail that Firecracker may connect to.
func listenAt(l *vmm.Launch, name string) (*net.UnixListener, error) {
	path := l.Dir.Socket(name)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chown(path, l.UID, l.GID); err != nil {
		return nil, errors.Join(fmt.Errorf("give socket to user %d: %w", l.UID, err), listener.Close())
	}
	return listener, nil
}

func (ps ports) close() error {
	var errs []error
	for _, l := range ps {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// accept waits for the program that serves a port in the guest to call.
func (ps ports) accept(ctx context.Context, port uint32) (net.Conn, error) {
	l := ps[port]
	if l == nil {
		return nil, fmt.Errorf("guest port %d: the VM was started without it", port)
	}
	if err := l.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("guest port %d: %w", port, err)
	}
	// fails when it is closed, which ends Accept, too
	stop := context.AfterFunc(ctx, func() { _ = l.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	conn, err := l.Accept()
	if err == nil {
		return conn, nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return nil, fmt.Errorf("guest port %d: %w", port, err)
}

// maxDrained bounds the calls that are given up: more come from a Firecracker that does not stand
// still.
const maxDrained = 64

// drain closes calls that nobody has taken, because a snapshot ends all connections. The guest's
// programs call again.
func (ps ports) drain() error {
	var errs []error
	for port, l := range ps {
		for range maxDrained {
			if err := l.SetDeadline(time.Now().Add(time.Millisecond)); err != nil {
				return fmt.Errorf("guest port %d: %w", port, err)
			}
			conn, err := l.Accept()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return fmt.Errorf("guest port %d: %w", port, err)
			}
			errs = append(errs, conn.Close())
		}
	}
	return errors.Join(errs...)
}

package transport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"drafter/internal/kind"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Of include/net/tcp_states.h of Linux.
const (
	tcpEstablished = 1
	tcpListen      = 10
)

// Of include/uapi/linux/inet_diag.h of Linux. A request is family, protocol, extensions and padding
// of a byte each, the states as a set, and the socket's id; an answer is family, state, timer and
// retransmissions of a byte each, the id, and expiry, two queues, user and inode of 32 bits each.
// An id is the ports, of the socket and of its peer, the two addresses of 16 bytes, 32 bits of
// interface and 64 of cookie. Ports and addresses are in network order.
const (
	diagRequestSize = 8 + diagIDSize
	diagAnswerSize  = 4 + diagIDSize + 20
	diagIDSize      = 48
	diagNoCookie    = ^uint64(0)
	diagUser        = 4 + diagIDSize + 12
	diagInode       = 4 + diagIDSize + 16
)

// owner is the kernel's record of a TCP socket of this network namespace.
type owner struct {
	state uint8
	user  uint32
	inode uint32 // 0: no process has it
}

// socketOwner finds the socket at local whose peer is remote, in the kernel's table (sock_diag(7)).
// A zero remote finds one that listens.
func socketOwner(local, remote netip.AddrPort) (o owner, err error) {
	request := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	request.AddData(diagRequest{local, remote})
	answers, err := request.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
	if err != nil {
		return o, err
	}
	if len(answers) != 1 || len(answers[0]) < diagAnswerSize {
		return o, errors.New("the kernel's answer is malformed")
	}
	b := answers[0]
	native, network := binary.NativeEndian, binary.BigEndian
	o = owner{state: b[1], user: native.Uint32(b[diagUser:]), inode: native.Uint32(b[diagInode:])}
	if o.state == tcpListen {
		return o, nil // that of any address, perhaps
	}
	// A socket of IPv6 may have an address of IPv4.
	if network.Uint16(b[4:]) != local.Port() || network.Uint16(b[6:]) != remote.Port() {
		return o, errors.New("the kernel's answer is about another socket")
	}
	return o, nil
}

// diagRequest asks for one socket. It implements [nl.NetlinkRequestData].
type diagRequest struct{ local, remote netip.AddrPort }

func (diagRequest) Len() int { return diagRequestSize }

func (r diagRequest) Serialize() []byte {
	local, remote := r.local.Addr().Unmap(), r.remote.Addr().Unmap()
	b := []byte{unix.AF_INET, unix.IPPROTO_TCP, 0, 0}
	if local.Is6() {
		b[0] = unix.AF_INET6
	}
	b = binary.NativeEndian.AppendUint32(b, ^uint32(0))
	b = binary.BigEndian.AppendUint16(b, r.local.Port())
	b = binary.BigEndian.AppendUint16(b, r.remote.Port())
	for _, a := range []netip.Addr{local, remote} {
		var field [16]byte
		copy(field[:], a.AsSlice())
		b = append(b, field[:]...)
	}
	b = binary.NativeEndian.AppendUint32(b, 0)
	return binary.NativeEndian.AppendUint64(b, diagNoCookie)
}

// errNotAccepted says that no process has the other end of a connection, because it was not
// accepted yet.
var errNotAccepted = errors.New("no process has its other end")

// checkPeer refuses a connection whose other end does not belong to root or to the process' user.
// What the kernel cannot tell is refused: the peer may be closed already, in another network
// namespace, or behind address translation.
func checkPeer(conn net.Conn) error {
	user, err := peerUser(conn)
	if err != nil {
		return err
	}
	if user != 0 && (int(user) != os.Geteuid() || user == overflowUser) {
		const text = "user %d is at the other end; only root and user %d may be"
		return kind.Of(ErrUnauthorized, fmt.Errorf(text, user, os.Geteuid()))
	}
	return nil
}

// overflowUser stands for all users that our user namespace does not know; see user_namespaces(7).
const overflowUser = 65534

// peerUser is the user whose process holds the other end of a connection within this host.
func peerUser(conn net.Conn) (uint32, error) {
	if c, ok := conn.(*net.UnixConn); ok {
		return unixUser(c)
	}
	local, ok := conn.LocalAddr().(*net.TCPAddr)
	remote, rok := conn.RemoteAddr().(*net.TCPAddr)
	if !ok || !rok || !local.IP.IsLoopback() || !remote.IP.IsLoopback() {
		const text = "a connection between %s and %s may not be within this host"
		return 0, fmt.Errorf(text, conn.LocalAddr(), conn.RemoteAddr())
	}
	o, err := socketOwner(remote.AddrPort(), local.AddrPort())
	switch {
	case err != nil:
		return 0, fmt.Errorf("the kernel does not know who connects: %w", err)
	case o.state != tcpEstablished: // the kernel gives root's id to sockets without a process
		return 0, errors.New("its peer has closed it")
	case o.inode == 0:
		return 0, errNotAccepted
	}
	// If this end is still connected, nobody else has had the other end's address meanwhile.
	var info *unix.TCPInfo
	if err := withDescriptor(conn, func(fd int) (err error) {
		info, err = unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		return err
	}); err != nil {
		return 0, err
	}
	if info.State != tcpEstablished {
		return 0, errors.New("its peer has closed it")
	}
	return o.user, nil
}

func unixUser(c *net.UnixConn) (uint32, error) {
	var cred *unix.Ucred
	if err := withDescriptor(c, func(fd int) (err error) {
		cred, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		return err
	}); err != nil {
		return 0, fmt.Errorf("the kernel does not know who connects: %w", err)
	}
	return cred.Uid, nil
}

// withDescriptor calls f with a connection's descriptor.
func withDescriptor(conn any, f func(fd int) error) error {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return fmt.Errorf("%T has no descriptor", conn)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

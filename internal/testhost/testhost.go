// Package testhost gives a test binary a host of its own: network and mount namespaces with an empty /run, a loopback interface, and an uplink
// (eth0, 192.0.2.1) to a network namespace "outside" (192.0.2.254). What the tests do to it, the real host never sees.
package testhost

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"drafter/internal/fusemount"
)

const environment = "DRAFTER_TESTHOST"

// Outside is the namespace at the other end of the uplink.
const Outside = "outside"

// Inside tells whether this process runs on a host of its own.
func Inside() bool { return os.Getenv(environment) != "" }

// Enter runs this program again on a host of its own and returns its exit code. It needs root.
func Enter(env ...string) (exitCode int, err error) {
	// The child dies with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(append(os.Environ(), environment+"=1"), env...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// SetUp furnishes the host. Call it once, [Inside].
func SetUp() error {
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	// What tests of other packages have mounted just now is none of this host's.
	foreign, err := fusemount.Below(os.TempDir())
	if err != nil {
		return err
	}
	for _, m := range foreign {
		if err := m.Detach(); err != nil {
			return err
		}
	}
	// A new network namespace takes this from the real host.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	if err != nil {
		return err
	}
	defer here.Close()
	outside, err := netns.NewNamed(Outside)
	if err != nil {
		return err
	}
	defer outside.Close()
	if err := netns.Set(here); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(outside)}); err != nil {
		return err
	}
	if err := configure("192.0.2.1/24", net.IPv4(192, 0, 2, 254)); err != nil {
		return err
	}
	if err := netns.Set(outside); err != nil {
		return err
	}
	return errors.Join(configure("192.0.2.254/24", nil), netns.Set(here))
}

func configure(cidr string, gateway net.IP) error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link)); err != nil || gateway == nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway})
}

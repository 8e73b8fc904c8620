// Package testhost gives a test binary a host of its own: mount, network and cgroup namespaces,
// with an empty /run, a temporary directory, a loopback interface, and an uplink (eth0, 192.0.2.1 and
// 2001:db8::192.0.2.1) to a network namespace "outside" (192.0.2.254 and 2001:db8::192.0.2.254). What the tests do to it, the real host never
// sees, and what else the real host does, the tests never see.
package testhost

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const environment = "DRAFTER_TESTHOST"

// Outside is the namespace at the other end of the uplink.
const Outside = "outside"

// Inside tells whether this process runs on a host of its own.
func Inside() bool { return os.Getenv(environment) != "" }

// Enter runs this program again on a host of its own, with the further arguments and environment,
// and returns its exit code. It needs root.
func Enter(output io.Writer, args []string, env ...string) (exitCode int, err error) {
	groups, err := makeCgroups()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, removeCgroups(groups)) }()
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	own := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(a string) bool {
		return strings.HasPrefix(a, "-test.testlogfile=") // is in the other temporary directory
	})
	// The child dies with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const script = `while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit; shift; done; shift; exec unshare --cgroup --mount --net "$@"`
	cmd := exec.Command("sh", slices.Concat([]string{"-c", script, "sh"}, groups, []string{"--", self}, own, args)...)
	cmd.Env = append(append(os.Environ(), environment+"=1"), env...)
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// SetUp furnishes the host. Its temporary directory is an empty one, in which work is what it is
// outside; with an empty work, it is the real host's. Call SetUp once, [Inside].
func SetUp(work string) error {
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := mountTemporary(work); err != nil {
		return err
	}
	if err := mountCgroups(); err != nil {
		return err
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
	err = errors.Join(
		configure("192.0.2.1/24", net.IPv4(192, 0, 2, 254)),
		configure("2001:db8::192.0.2.1/120", net.ParseIP("2001:db8::192.0.2.254")))
	if err != nil {
		return err
	}
	if err := netns.Set(outside); err != nil {
		return err
	}
	return errors.Join(configure("192.0.2.254/24", nil), configure("2001:db8::192.0.2.254/120", nil), netns.Set(here))
}

// mountTemporary gives the host a temporary directory of its own, with work in it.
func mountTemporary(work string) error {
	dir := os.TempDir()
	if work == "" {
		return nil
	}
	const kept = "/run/work"
	own, err := os.MkdirTemp(work, "temporary-")
	if err := errors.Join(err, os.Mkdir(kept, 0o700), os.Chmod(own, 0o777|os.ModeSticky)); err != nil {
		return err
	}
	if err := unix.Mount(work, kept, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("keep %s: %w", work, err)
	}
	if err := unix.Mount(own, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	if err := os.MkdirAll(work, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(kept, work, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s: %w", work, err)
	}
	return errors.Join(unix.Unmount(kept, unix.MNT_DETACH), os.Remove(kept))
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
	// Addresses are used at once, without asking whether somebody else has them.
	for _, of := range []string{"eth0", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+of+"/accept_dad", []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link)); err != nil || gateway == nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway})
}

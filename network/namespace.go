package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// inNamespace runs f on a thread of its own inside a namespace. The thread ends afterwards, so
// nothing of it leaks to other goroutines.
func inNamespace(name string, f func() error) error {
	if err := checkNamespaceName(name); err != nil {
		return err
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			ns, err := openNamespace(name)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := netns.Set(ns); err != nil {
				return fmt.Errorf("enter network namespace %q: %w", name, err)
			}
			return f()
		}()
	}()
	return <-done
}

// openNamespace opens a namespace. Close it.
func openNamespace(name string) (netns.NsHandle, error) {
	ns, err := netns.GetFromName(name)
	if errors.Is(err, os.ErrNotExist) {
		return ns, fmt.Errorf("network namespace %q does not exist; start drafter nat", name)
	}
	if err != nil {
		return ns, fmt.Errorf("open network namespace %q: %w", name, err)
	}
	return ns, nil
}

// createNamespace makes a named namespace.
func createNamespace(name string) error {
	if err := shareNamespaces(); err != nil {
		return fmt.Errorf("create network namespace %q: %w", name, err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is in the new namespace now
		ns, err := netns.New()
		if err == nil {
			// Marked first: a name without a mark is somebody else's.
			if err = markNamespace(); err == nil {
				err = nameNamespace(name)
			}
			err = errors.Join(err, ns.Close())
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return fmt.Errorf("create network namespace %q: %w", name, err)
	}
	return nil
}

// nameNamespace names the calling thread's namespace, as 'ip netns add' does.
func nameNamespace(name string) error {
	path := filepath.Join(netnsDir, name)
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "none", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("mount %s: %w", path, err), os.Remove(path))
	}
	return nil
}

// namespaceMark is the alias (ip-link(8)) of the loopback interface of a namespace that was made
// here, and of the host's end of its link. A record of a name proves nothing once somebody has made
// something else with that name.
const namespaceMark = "drafter-nat"

// markNamespace marks the calling thread's namespace.
func markNamespace() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetAlias(lo, namespaceMark)
}

// madeHere tells whether a namespace was made here. A name without a namespace counts as made here.
func madeHere(name string) (ours bool, err error) {
	if nameOnly, err := isNameOnly(name); err != nil || nameOnly {
		return nameOnly, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Join(netnsDir, name), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		return false, err
	}
	err = inNamespace(name, func() error {
		links, err := netlink.LinkList()
		ours = slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Attrs().Alias == namespaceMark })
		return err
	})
	return ours, err
}

// isNameOnly tells whether only the empty file is there on which a namespace was mounted: somebody
// has unmounted it, or was killed before mounting it.
func isNameOnly(name string) (bool, error) {
	path := filepath.Join(netnsDir, name)
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() > 0 {
		return false, err
	}
	var st unix.Statfs_t
	err = unix.Statfs(path, &st)
	return err == nil && st.Type != unix.NSFS_MAGIC, err
}

// hostVeth returns the host's end of a namespace's link, or nil if there is none, and whether it
// was made here. It was if it is marked, or if it has no mark and leads into the namespace, as
// links of older releases do.
func hostVeth(name string) (link netlink.Link, ours bool, err error) {
	link, err = netlink.LinkByName(hostVethName(name))
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil, false, nil
	}
	if err != nil || link.Attrs().Alias == namespaceMark {
		return link, err == nil, err
	}
	if _, isVeth := link.(*netlink.Veth); !isVeth {
		return link, false, nil
	}
	ns, err := netns.GetFromName(name)
	if err != nil {
		return link, false, nil
	}
	defer ns.Close()
	return link, leadsInto(link, ns), nil
}

// leadsInto tells whether the other end of a link of the calling thread's namespace is in a namespace.
func leadsInto(link netlink.Link, ns netns.NsHandle) bool {
	id, err := netlink.GetNetNsIdByFd(int(ns))
	return err == nil && id >= 0 && id == link.Attrs().NetNsID
}

// deleteNamespace removes a named namespace. One that does not exist is no error.
func deleteNamespace(name string) error {
	nameOnly, err := isNameOnly(name)
	if err == nil && nameOnly {
		err = os.Remove(filepath.Join(netnsDir, name))
	} else if err == nil {
		err = netns.DeleteNamed(name)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace %q: %w", name, err)
	}
	return unshareNamespaces()
}

// GuestAddress returns the guest's address and gateway behind an interface in a namespace: the
// gateway is the interface's own address, and the guest has the next address of the same subnet.
func GuestAddress(ns, iface string) (gateway net.IP, guest *net.IPNet, err error) {
	err = inNamespace(ns, func() error {
		link, err := netlink.LinkByName(iface)
		if err != nil {
			return fmt.Errorf("interface %s does not exist in network namespace %q; start drafter nat", iface, ns)
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			return fmt.Errorf("read address of %s: %w", iface, err)
		}
		if len(addrs) == 0 {
			return fmt.Errorf("interface %s in network namespace %q has no IPv4 address", iface, ns)
		}
		gateway = addrs[0].IP
		guest, err = neighbour(addrs[0].IPNet)
		return err
	})
	return gateway, guest, err
}

// GuestAddress6 returns the guest's IPv6 address and gateway in a namespace; guest is nil unless a NAT
// gives it any.
func GuestAddress6(ns string) (gateway net.IP, guest *net.IPNet, err error) {
	c, err := natOf(ns)
	if c == nil || err != nil {
		return nil, nil, err
	}
	l, err := c.parse()
	if err != nil || l.ip6 == nil {
		return nil, nil, err
	}
	return l.ip6.gateway, &net.IPNet{IP: l.ip6.guest, Mask: l.ip6.mask}, nil
}

// neighbour returns the address after a in its subnet, or the one before a if a is the last.
func neighbour(a *net.IPNet) (*net.IPNet, error) {
	usable := func(ip net.IP) bool {
		broadcast := make(net.IP, 4)
		for i := range broadcast {
			broadcast[i] = a.IP.To4()[i] | ^a.Mask[i]
		}
		return a.Contains(ip) && !ip.Equal(broadcast) && !ip.Equal(a.IP.Mask(a.Mask))
	}
	for _, step := range []int{1, -1} {
		if ip := addIP(a.IP, step); usable(ip) {
			return &net.IPNet{IP: ip, Mask: a.Mask}, nil
		}
	}
	return nil, fmt.Errorf("subnet %s has no address for a guest", a)
}

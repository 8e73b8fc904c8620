package testhost

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Host is a further host: network and mount namespaces with an empty /run, linked to this one.
type Host struct {
	Addr    string // its address, reachable from here and from the other hosts
	Gateway string // this host's address on its link
	// the same by IPv6, reachable from here
	Addr6, Gateway6 string

	holder *exec.Cmd
	link   string
}

// NewHost makes a host at 10.77.number.2 and fd00:77:number::2. Its link takes rate bits per second in both directions; 0
// does not limit it. Close it.
func NewHost(number int, rate uint64) (_ *Host, err error) {
	h := &Host{Addr: fmt.Sprintf("10.77.%d.2", number), Gateway: fmt.Sprintf("10.77.%d.1", number), link: fmt.Sprintf("host%d", number),
		Addr6: fmt.Sprintf("fd00:77:%d::2", number), Gateway6: fmt.Sprintf("fd00:77:%d::1", number)}
	h.holder = exec.Command("unshare", "--net", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /run && echo ready && exec cat")
	stdin, err := h.holder.StdinPipe() // it ends with this process
	if err != nil {
		return nil, err
	}
	_ = stdin // closed by Close, through the command
	stdout, err := h.holder.StdoutPipe()
	if err != nil {
		return nil, err
	}
	h.holder.Stderr = os.Stderr
	if err := h.holder.Start(); err != nil {
		return nil, fmt.Errorf("start host: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	ready := make([]byte, 6)
	if _, err := stdout.Read(ready); err != nil || strings.TrimSpace(string(ready)) != "ready" {
		return nil, fmt.Errorf("start host: it says %q, %w", ready, err)
	}
	pid := h.holder.Process.Pid
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = h.link
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}); err != nil {
		return nil, fmt.Errorf("link host: %w", err)
	}
	here, err := netlink.NewHandle()
	if err != nil {
		return nil, err
	}
	defer here.Close()
	there, err := netlink.NewHandleAt(ns)
	if err != nil {
		return nil, err
	}
	defer there.Close()
	return h, errors.Join(
		plug(here, h.link, h.Gateway+"/24", rate, nil),
		plug(there, "eth0", h.Addr+"/24", rate, net.ParseIP(h.Gateway)),
		plug(here, h.link, h.Gateway6+"/64", 0, nil),
		plug(there, "eth0", h.Addr6+"/64", 0, net.ParseIP(h.Gateway6)),
		plug(there, "lo", "127.0.0.1/8", 0, nil))
}

// Via is the command that runs another one on the host, in the directory dir, replacing itself.
func (h *Host) Via(dir string) []string {
	return []string{"nsenter", "--net", "--mount", "--target", strconv.Itoa(h.holder.Process.Pid), "--wdns=" + dir}
}

// Root leads to what the host has as its root directory.
func (h *Host) Root() string { return fmt.Sprintf("/proc/%d/root", h.holder.Process.Pid) }

// plug configures one end of a link.
func plug(n *netlink.Handle, name, cidr string, rate uint64, gateway net.IP) error {
	link, err := n.LinkByName(name)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	if addr.IP.To4() == nil {
		addr.Flags = unix.IFA_F_NODAD // it is used at once
	}
	if err := n.AddrAdd(link, addr); err != nil && !os.IsExist(err) {
		return fmt.Errorf("address of %s: %w", name, err)
	}
	if err := n.LinkSetUp(link); err != nil {
		return err
	}
	if rate > 0 {
		if err := n.QdiscAdd(shape(link, rate)); err != nil {
			return fmt.Errorf("shape %s: %w", name, err)
		}
	}
	if gateway != nil {
		return n.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway})
	}
	return nil
}

// shape lets rate bits per second out of a link.
func shape(link netlink.Link, rate uint64) *netlink.Tbf {
	return &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_ROOT, Handle: netlink.MakeHandle(1, 0),
		},
		Rate: rate / 8, Buffer: 256 << 10, Limit: 4 << 20,
	}
}

// Limit changes how many bits per second reach a host whose link is limited.
func (h *Host) Limit(rate uint64) error {
	link, err := netlink.LinkByName(h.link)
	if err != nil {
		return err
	}
	if err := netlink.QdiscChange(shape(link, rate)); err != nil {
		return fmt.Errorf("shape %s: %w", h.link, err)
	}
	return nil
}

// Close takes the host away, with all that is in its namespaces.
func (h *Host) Close() error {
	err := h.holder.Process.Kill()
	_ = h.holder.Wait() // it was killed
	link, lerr := netlink.LinkByName(h.link)
	if lerr == nil {
		lerr = netlink.LinkDel(link)
		if !errors.Is(lerr, unix.ENODEV) { // it may go with the namespace of its other end
			err = errors.Join(err, lerr)
		}
	}
	return err
}

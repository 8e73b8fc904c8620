package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"drafter/internal/kind"
	"drafter/internal/lockfile"
	"drafter/internal/private"
	"drafter/internal/rundir"
)

// A VM that moves keeps its connections. The namespace that it leaves becomes an anchor: what the
// kernel knows there of connections stays, and packets for the guest go on, by a link, to the
// namespace where the VM is. The guest's packets that belong to these connections go back by it:
//
//	client ── host ── ark0 ──────────── ark1 ── guest
//	                  to-ark1  from-ark0
//
// A VM that moves again may leave several anchors. Each leads to where it is. One that comes back to
// its anchor ends it.

// Anchor is a namespace that a VM has left, and whose connections with it go on.
type Anchor struct {
	Netns string    `json:"netns"`
	VM    uuid.UUID `json:"vm"`    // its generation, which no copy has
	To    string    `json:"to"`    // namespace where the VM is
	Since time.Time `json:"since"` // it left
}

const anchorRecords = "anchors"

func anchorPath(ns string) string { return filepath.Join(rundir.Path, anchorRecords, ns+".json") }

// anchorOf returns the anchor that a namespace is, or nil.
func anchorOf(ns string) (*Anchor, error) {
	b, err := os.ReadFile(anchorPath(ns))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var a Anchor
	if err == nil {
		err = json.Unmarshal(b, &a)
	}
	if err != nil {
		return nil, fmt.Errorf("read record of anchor %q: %w", ns, err)
	}
	return &a, nil
}

// Anchors returns the anchors of this host.
func Anchors() (all []Anchor, err error) {
	paths, err := filepath.Glob(anchorPath("*"))
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		a, err := anchorOf(strings.TrimSuffix(filepath.Base(path), ".json"))
		if err != nil {
			return nil, err
		}
		if a != nil { // it has not just ended
			all = append(all, *a)
		}
	}
	return all, nil
}

// anchorsTo returns the anchors of the VM that is in a namespace.
func anchorsTo(ns string) ([]Anchor, error) {
	all, err := Anchors()
	return slices.DeleteFunc(all, func(a Anchor) bool { return a.To != ns }), err
}

func (a Anchor) write() error {
	b, err := json.Marshal(a)
	if err == nil {
		err = private.MkdirAll(filepath.Dir(anchorPath(a.Netns)))
	}
	if err == nil {
		err = replaceFile(anchorPath(a.Netns), b)
	}
	if err != nil {
		return fmt.Errorf("record anchor %q: %w", a.Netns, err)
	}
	return nil
}

// forgetAnchor removes a record. One that does not exist is no error.
func forgetAnchor(ns string) error {
	if err := os.Remove(anchorPath(ns)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget anchor: %w", err)
	}
	return nil
}

// lockAnchors excludes others who change the links and records of the VM in a namespace.
func lockAnchors(ns string) (*lockfile.Lock, error) {
	const patience = 2 * time.Second // longer than the end of an anchor takes
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		lock, err := rundir.Lock(anchorRecords + "/" + ns)
		var held *lockfile.HeldError
		if !errors.As(err, &held) || time.Now().After(deadline) {
			return lock, err
		}
	}
}

// Landing says where a VM that moves will be. It goes to the source of the move.
type Landing struct {
	Host  string `json:"host"` // its boot id
	Netns string `json:"netns"`
	Inode uint64 `json:"inode"` // of the namespace
}

// Landing returns where the VM of this claim will be, or nil if its connections cannot go on there,
// since no NAT made the namespace.
func (c *Claim) Landing() (*Landing, error) {
	if c.lock == nil {
		return nil, nil
	}
	config, err := natOf(c.namespace)
	if config == nil || err != nil {
		return nil, err
	}
	return landing(c.namespace)
}

func landing(ns string) (*Landing, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("identify host: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(netnsDir, ns), &st); err != nil {
		return nil, fmt.Errorf("identify network namespace %q: %w", ns, err)
	}
	return &Landing{Host: strings.TrimSpace(string(id)), Netns: ns, Inode: st.Ino}, nil
}

// ErrNoAnchor says that a VM's connections cannot go on at a landing.
var ErrNoAnchor = errors.New("connections cannot go on there")

// Departure is a VM's move, as its connections see it. Its methods are called one after the other.
type Departure struct {
	from, to string
	vm       uuid.UUID
	lock     *lockfile.Lock
	before   []Anchor // that led to from
	layout   *layout
	switched bool
}

// Depart makes the links by which the connections of the claim's VM can go on at a landing. Nothing
// is sent by them yet: call [Departure.Switch] just before the VM is paused, [Departure.Tell] while it
// is, and Close at the end. An [ErrNoAnchor] says that they cannot go on there, and why.
func (c *Claim) Depart(vm uuid.UUID, l Landing) (_ *Departure, err error) {
	if c.lock == nil {
		return nil, fmt.Errorf("%w: the VM has no network namespace here", ErrNoAnchor)
	}
	if err := checkNamespaceName(l.Netns); err != nil {
		return nil, err
	}
	config, err := natOf(c.namespace)
	if err != nil {
		return nil, err
	}
	there, err := natOf(l.Netns)
	if err != nil {
		return nil, err
	}
	if known, err := landing(l.Netns); err != nil || *known != l {
		return nil, fmt.Errorf("%w: network namespace %q is on another host", ErrNoAnchor, l.Netns)
	}
	switch {
	case config == nil || there == nil:
		return nil, fmt.Errorf("%w: no NAT made network namespace %q", ErrNoAnchor, c.namespace)
	case l.Netns == c.namespace:
		return nil, fmt.Errorf("%w: it stays in network namespace %q", ErrNoAnchor, c.namespace)
	case config.guest() != there.guest():
		return nil, fmt.Errorf("%w: guests of network namespace %q have other addresses", ErrNoAnchor, l.Netns)
	}
	d := &Departure{from: c.namespace, to: l.Netns, vm: vm}
	if d.layout, err = config.parse(); err != nil {
		return nil, err
	}
	if d.lock, err = lockAnchors(d.from); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if d.before, err = anchorsTo(d.from); err != nil {
		return nil, err
	}
	if a, err := anchorOf(d.to); err != nil {
		return nil, err
	} else if a != nil && a.To != d.from { // of a VM that was lost
		if err := a.End(); err != nil {
			return nil, err
		}
	}
	for _, ns := range d.anchors() {
		if ns == d.to {
			continue // the VM comes home
		}
		if err := connectAnchor(ns, d.to, config.NamespaceInterface); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// guest is what a guest must find alike where it goes on.
func (c NATConfig) guest() string {
	return fmt.Sprint(c.NamespaceInterfaceIP, c.NamespaceInterfaceGateway, c.NamespaceInterfaceNetmask, c.NamespaceInterfaceMAC)
}

// anchors are the namespaces that lead to where the VM will be.
func (d *Departure) anchors() []string {
	all := []string{d.from}
	for _, a := range d.before {
		all = append(all, a.Netns)
	}
	return all
}

// Switch leads packets for the VM to the landing, where they wait. The VM is about to be paused: what
// is still on its way here reaches it before.
func (d *Departure) Switch() error {
	d.switched = true
	now := time.Now()
	for _, ns := range d.anchors() {
		if ns == d.to {
			continue
		}
		a := Anchor{Netns: ns, VM: d.vm, To: d.to, Since: now}
		if i := slices.IndexFunc(d.before, func(a Anchor) bool { return a.Netns == ns }); i >= 0 {
			a.Since = d.before[i].Since
		}
		if err := a.write(); err != nil {
			return err
		}
	}
	for _, ns := range d.anchors() {
		if err := d.lead(ns, d.to); err != nil {
			return err
		}
	}
	return nil
}

// Tell tells the landing which connections the VM has. The VM is paused, and has not gone on.
func (d *Departure) Tell() error {
	for _, ns := range d.anchors() {
		if ns == d.to {
			continue // it knows
		}
		var keys [][]byte
		err := inNamespace(ns, func() (err error) {
			keys, err = connectionKeys(d.layout.guest)
			return err
		})
		if err == nil {
			err = inNamespace(d.to, func() error { return addConnections(ns, keys) })
		}
		if err != nil {
			return fmt.Errorf("tell of connections in network namespace %q: %w", ns, err)
		}
	}
	return nil
}

// lead lets an anchor's packets for the guest go to a namespace: over a link, or to the tap if that
// is the anchor's own.
func (d *Departure) lead(ns, to string) error {
	err := inNamespace(ns, func() error { return leadGuest(d.layout.guest, ns, to) })
	if err != nil {
		return fmt.Errorf("lead packets for the guest from network namespace %q to %q: %w", ns, to, err)
	}
	return nil
}

// Switched tells whether the connections go on at the landing.
func (d *Departure) Switched() bool { return d.switched }

// Back undoes Switch: the VM goes on where it was.
func (d *Departure) Back() error {
	if !d.switched {
		return nil
	}
	d.switched = false
	errs := []error{d.lead(d.from, d.from), forgetAnchor(d.from)}
	for _, a := range d.before {
		errs = append(errs, d.lead(a.Netns, d.from), a.write())
	}
	return errors.Join(errs...)
}

// Close ends the departure. If it has switched, the VM is at the landing, and the links to where it
// was are removed; else those to the landing.
func (d *Departure) Close() error {
	if d.lock == nil {
		return nil
	}
	var errs []error
	for _, ns := range d.anchors() {
		switch {
		case !d.switched:
			errs = append(errs, disconnectAnchor(ns, d.to))
		case ns == d.to:
			errs = append(errs, disconnectAnchor(ns, d.from), forgetAnchor(ns))
		case ns != d.from:
			errs = append(errs, disconnectAnchor(ns, d.from))
		}
	}
	if d.switched {
		// Where the VM was, nothing more is heard of the other anchors' connections. Should it come
		// back, what the kernel knew of them would be wrong.
		errs = append(errs, inNamespace(d.from, func() error {
			return forgetConnections(func(f *netlink.ConntrackFlow) bool { return f.Mark != 0 })
		}))
	}
	errs = append(errs, d.lock.Release(), rundir.Remove())
	d.lock = nil
	return errors.Join(errs...)
}

// Links between an anchor and a landing have the names of their other ends. Neither end has an
// address: each knows the other one's by an entry for a neighbour, so nothing need be asked for.
func toLanding(ns string) string  { return landingLinks + ns }
func fromAnchor(ns string) string { return anchorLinks + ns }

const (
	landingLinks = "to-"
	anchorLinks  = "from-"
)

var (
	landingIP  = net.IPv4(169, 254, 77, 2).To4()
	anchorIP   = net.IPv4(169, 254, 77, 1).To4()
	landingMAC = net.HardwareAddr{0x02, 0x0e, 0xd9, 0xfd, 0x4d, 2}
	anchorMAC  = net.HardwareAddr{0x02, 0x0e, 0xd9, 0xfd, 0x4d, 1}
)

// landingTables is the first routing table of those in which answers go back to an anchor. A link's
// index is added, which is also the mark of its connections.
const landingTables = 0x0e000000

// connectAnchor makes the link from an anchor to a landing anew.
func connectAnchor(anchor, landing, tap string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("connect network namespaces %q and %q: %w", anchor, landing, err)
		}
	}()
	if err := disconnectAnchor(anchor, landing); err != nil {
		return err
	}
	there, err := openNamespace(landing)
	if err != nil {
		return err
	}
	defer there.Close()
	err = inNamespace(anchor, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Alias, attrs.HardwareAddr = toLanding(landing), namespaceMark, anchorMAC
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: fromAnchor(anchor), PeerHardwareAddr: landingMAC, PeerNamespace: netlink.NsFd(there)}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return configureAnchorLink(veth.Name, landingIP, landingMAC)
	})
	if err != nil {
		return err
	}
	return inNamespace(landing, func() error { return land(anchor, tap) })
}

// configureAnchorLink configures an end of a link, at whose other end is a neighbour.
func configureAnchorLink(name string, ip net.IP, mac net.HardwareAddr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	// Packets come in that others would not send this way.
	if err := looseSources(name); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	err = netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: mac})
	if err != nil {
		return fmt.Errorf("set neighbour of %s: %w", name, err)
	}
	return nil
}

// looseSources lets packets with any source in at an interface of the calling thread's namespace.
// The kernel checks the larger of two parameters (ip-sysctl.rst, rp_filter), so that of all
// interfaces is spread over the others first.
func looseSources(name string) error {
	const all = "/proc/sys/net/ipv4/conf/all/rp_filter"
	b, err := os.ReadFile(all)
	if err != nil {
		return fmt.Errorf("read kernel parameter: %w", err)
	}
	if value := strings.TrimSpace(string(b)); value != "0" {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		for _, l := range links {
			own := "net/ipv4/conf/" + l.Attrs().Name + "/rp_filter"
			if b, err := os.ReadFile("/proc/sys/" + own); err == nil && strings.TrimSpace(string(b)) < value {
				if err := setSysctl(own, value); err != nil {
					return err
				}
			}
		}
		if err := setSysctl("net/ipv4/conf/all/rp_filter", "0"); err != nil {
			return err
		}
	}
	return setSysctl("net/ipv4/conf/"+name+"/rp_filter", "0")
}

// land lets the guest's packets of an anchor's connections go back there, in the calling thread's
// namespace.
func land(anchor, tap string) error {
	name := fromAnchor(anchor)
	if err := configureAnchorLink(name, anchorIP, anchorMAC); err != nil {
		return err
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	// Its alias may not go with it when it is made.
	if err := netlink.LinkSetAlias(link, namespaceMark); err != nil {
		return fmt.Errorf("mark %s: %w", name, err)
	}
	mark := uint32(link.Attrs().Index)
	back := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: anchorIP, Table: landingTables + int(mark), Flags: int(netlink.FLAG_ONLINK)}
	if err := netlink.RouteReplace(back); err != nil {
		return fmt.Errorf("set route by %s: %w", name, err)
	}
	rule := netlink.NewRule()
	rule.Mark, rule.Table, rule.Family = mark, landingTables+int(mark), unix.AF_INET
	if err := netlink.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add rule for %s: %w", name, err)
	}
	return landingRules(anchor, tap, mark)
}

// leadGuest is [Departure.lead] in the calling thread's namespace.
func leadGuest(guest net.IP, ns, to string) error {
	if to == ns {
		routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Dst != nil && r.Dst.String() == host(guest).String() && r.Gw.Equal(landingIP) {
				if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
					return err
				}
			}
		}
		return nil
	}
	link, err := netlink.LinkByName(toLanding(to))
	if err != nil {
		return err
	}
	return netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: host(guest), Gw: landingIP, Flags: int(netlink.FLAG_ONLINK)})
}

// disconnectAnchor removes the link from an anchor to a landing, and what belongs to it. What does
// not exist is no error.
func disconnectAnchor(anchor, landing string) error {
	var errs []error
	for _, end := range []struct {
		ns, name string
		after    func() error
	}{
		{anchor, toLanding(landing), func() error { return nil }},
		{landing, fromAnchor(anchor), sweepLandings},
	} {
		if _, err := os.Stat(filepath.Join(netnsDir, end.ns)); errors.Is(err, os.ErrNotExist) {
			continue
		}
		errs = append(errs, inNamespace(end.ns, func() error { return errors.Join(deleteAnchorLink(end.name), end.after()) }))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("disconnect network namespaces %q and %q: %w", anchor, landing, err)
	}
	return nil
}

func deleteAnchorLink(name string) error {
	link, err := netlink.LinkByName(name)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil
	}
	if err == nil {
		if err = netlink.LinkDel(link); errors.Is(err, unix.ENODEV) { // with its other end
			err = nil
		}
	}
	return err
}

// sweepLandings removes rules of the calling thread's namespace whose links are gone.
func sweepLandings() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	there := map[string]bool{}
	marks := map[uint32]bool{}
	for _, l := range links {
		if anchor, ok := strings.CutPrefix(l.Attrs().Name, anchorLinks); ok {
			there[anchor] = true
			marks[uint32(l.Attrs().Index)] = true
		}
	}
	rules, err := netlink.RuleList(netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	stale := false
	for _, r := range rules {
		if r.Table-landingTables != int(r.Mark) || r.Mark == 0 || marks[r.Mark] {
			continue
		}
		stale = true
		if err := netlink.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove rule: %w", err)
		}
	}
	if !stale {
		return nil
	}
	return sweepLandingTables(there)
}

// Traffic is what passes by an anchor.
type Traffic struct {
	Connections int
	Bytes       uint64 // in both directions, since the VM is where it is
}

// Traffic looks at what passes by the anchor.
func (a Anchor) Traffic() (t Traffic, err error) {
	config, err := natOf(a.Netns)
	if config == nil || err != nil {
		return t, err
	}
	l, err := config.parse()
	if err != nil {
		return t, err
	}
	err = inNamespace(a.Netns, func() error {
		flows, err := guestFlows(l.guest)
		if err != nil {
			return err
		}
		t.Connections = len(flows)
		link, err := netlink.LinkByName(toLanding(a.To))
		if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
			return nil // it has just ended
		}
		if err != nil {
			return err
		}
		if s := link.Attrs().Statistics; s != nil {
			t.Bytes = s.RxBytes + s.TxBytes
		}
		return nil
	})
	if err != nil {
		return t, fmt.Errorf("look at anchor %q: %w", a.Netns, err)
	}
	return t, nil
}

// RemoveAnchor ends the anchor that a namespace is.
func RemoveAnchor(ns string) error {
	if err := checkNamespaceName(ns); err != nil {
		return err
	}
	a, err := anchorOf(ns)
	if err != nil {
		return err
	}
	if a == nil {
		return fmt.Errorf("network namespace %q is no anchor; see 'drafter anchor list'", ns)
	}
	return a.End()
}

// home tells whether a namespace is the guest's own anchor, to which it comes back. An anchor that
// the guest has left for good is ended.
func (g Guest) home(ns string) (bool, error) {
	a, err := anchorOf(ns)
	switch {
	case a == nil || err != nil:
		return false, err
	case a.VM != g.VM || g.VM == uuid.Nil:
		if gone, err := a.vmGone(); err != nil {
			return false, err
		} else if gone {
			break
		}
		return false, kind.Of(ErrInUse, fmt.Errorf("connections of a VM that has moved to network namespace %q go on in %q; choose another --netns, or end them with 'drafter anchor remove %s'", a.To, ns, ns))
	case g.Lands:
		return true, nil
	}
	return false, a.End()
}

// End ends the connections that go on at the anchor, and resets those that it can. Its namespace is
// free again.
func (a Anchor) End() error {
	lock, err := lockAnchors(a.To)
	if err != nil {
		return fmt.Errorf("end anchor %q: %w", a.Netns, err)
	}
	return errors.Join(a.end(), lock.Release(), rundir.Remove())
}

// Landed says that the VM has come here. If it was here before, it has no anchor here any more. The
// source of its move does the same when it ends, unless it is killed.
func (c *Claim) Landed() error {
	a, err := anchorOf(c.namespace)
	if a == nil || err != nil {
		return err
	}
	return errors.Join(disconnectAnchor(c.namespace, a.To), forgetAnchor(c.namespace))
}

// takeBack ends the anchor of a VM that goes on in its namespace after all. Its other anchors end,
// and their connections with them.
func takeBack(ns string) error {
	a, err := anchorOf(ns)
	if a == nil || err != nil {
		return err
	}
	lock, err := lockAnchors(a.To)
	if err != nil {
		return err
	}
	all, err := anchorsTo(a.To)
	for _, other := range all {
		if other.VM == a.VM && other.Netns != ns {
			err = errors.Join(err, other.end())
		}
	}
	return errors.Join(err, disconnectAnchor(ns, a.To), forgetAnchor(ns), lock.Release())
}

// keepAnchor ends the anchor that a namespace is once nobody needs it, and removes links that a killed
// process left.
func (n *NAT) keepAnchor(ns string) error {
	a, strays, err := findAnchor(ns)
	if err != nil || a == nil && len(strays) == 0 {
		return err
	}
	place := ns // of the VM whose anchor it is, or may become
	if a != nil {
		place = a.To
	}
	lock, err := rundir.Lock(anchorRecords + "/" + place)
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return nil // the VM is about to move
	}
	if err != nil {
		return err
	}
	if a, strays, err = findAnchor(ns); err == nil {
		for _, to := range strays {
			err = errors.Join(err, disconnectAnchor(ns, to))
		}
	}
	if a != nil && err == nil {
		err = n.keepNeeded(*a)
	}
	return errors.Join(err, lock.Release(), rundir.Remove())
}

// findAnchor looks for the anchor that a namespace is, and for landings that links lead to although
// the anchor does not.
func findAnchor(ns string) (a *Anchor, strays []string, err error) {
	if a, err = anchorOf(ns); err != nil {
		return nil, nil, err
	}
	err = inNamespace(ns, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		for _, l := range links {
			if to, ok := strings.CutPrefix(l.Attrs().Name, landingLinks); ok && l.Attrs().Alias == namespaceMark && (a == nil || a.To != to) {
				strays = append(strays, to)
			}
		}
		return sweepLandings()
	})
	return a, strays, err
}

// keepNeeded ends an anchor unless somebody needs it.
func (n *NAT) keepNeeded(a Anchor) error {
	t, err := a.Traffic()
	if err != nil {
		return err
	}
	published, err := isPublished(a.Netns)
	if err != nil {
		return err
	}
	gone, err := a.vmGone()
	if err != nil {
		return err
	}
	why, args := "", []any{"namespace", a.Netns, "ledTo", a.To, "after", time.Since(a.Since).Round(time.Second)}
	switch {
	case gone:
		why = "The VM has ended, and with it the connections that went on at an anchor"
	case n.config.AnchorTimeout != 0 && time.Since(a.Since) > n.config.AnchorTimeout:
		why, args = "An anchor has ended, as its time is over, and with it its connections", append(args, "connections", t.Connections)
	case t.Connections == 0 && !published:
		why = "An anchor has ended with its last connection"
	default:
		return nil
	}
	n.config.Logger.Info(why, args...) //nolint:sloglint // one of those above
	return a.end()
}

// vmGone tells whether nobody is there any more where the anchor leads.
func (a Anchor) vmGone() (gone bool, err error) {
	config, err := natOf(a.To)
	if config == nil || err != nil {
		return err == nil, err
	}
	l, err := config.parse()
	if err != nil {
		return false, err
	}
	err = inNamespace(a.To, func() error {
		gone = l.vacant()
		return nil
	})
	return gone, err
}

// end is End for who has the lock.
func (a Anchor) end() error {
	errs := []error{disconnectAnchor(a.Netns, a.To)} // the route goes with the link
	config, err := natOf(a.Netns)
	errs = append(errs, err)
	if config != nil {
		l, err := config.parse()
		if err == nil {
			err = inNamespace(a.Netns, func() error {
				if occupied(config.NamespaceInterface) {
					return nil
				}
				return config.vacate(l)
			})
		}
		errs = append(errs, err, forgetTenant(a.Netns))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end anchor %q: %w", a.Netns, err)
	}
	return forgetAnchor(a.Netns)
}

// endAnchorsTo ends the anchors of the VM that was in a namespace.
func endAnchorsTo(ns string) error {
	all, err := anchorsTo(ns)
	if err != nil || len(all) == 0 {
		return err
	}
	lock, err := lockAnchors(ns)
	if err != nil {
		return err
	}
	for _, a := range all {
		err = errors.Join(err, a.end())
	}
	return errors.Join(err, lock.Release())
}

package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/rundir"
)

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
	tap      string
	layout   *layout
	switched bool
	tracked  map[string]*netlink.Handle // of each anchor, its connections
	told     map[string]bool            // keys of connections of which the landing was told
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
	d := &Departure{
		from: c.namespace, to: l.Netns, vm: vm, tap: config.NamespaceInterface,
		tracked: map[string]*netlink.Handle{}, told: map[string]bool{},
	}
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
		if d.tracked[ns], err = connectionsIn(ns); err != nil {
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

// Switch leads packets for the VM to the landing, where they wait, and tells it which connections the
// VM has. The VM is about to be paused: what is still on its way here reaches it before.
func (d *Departure) Switch() error {
	if err := inNamespace(d.to, func() error { return awaitTap(d.tap) }); err != nil {
		return err
	}
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
	// Where the VM is comes last: what the others have sent there must not be sent on.
	for _, ns := range slices.Backward(d.anchors()) {
		if err := d.lead(ns, d.to); err != nil {
			return err
		}
	}
	return d.Tell()
}

// awaitTap waits until the kernel has noticed that a VMM has the tap of the calling thread's
// namespace. Until then it does not use the route to the guest, and packets are refused. It looks at
// carriers once a second (net/core/link_watch.c of Linux), so this takes no longer.
func awaitTap(tap string) error {
	link, err := netlink.LinkByName(tap)
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(1200 * time.Millisecond); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		if slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Flags&unix.RTNH_F_LINKDOWN == 0 }) {
			return nil
		}
	}
	return nil // whoever comes late gets what is sent again
}

// Tell tells the landing which connections the VM has had since Switch. The VM is paused, and has
// not gone on.
func (d *Departure) Tell() error {
	for ns, tracked := range d.tracked {
		keys, err := connectionKeys(tracked, d.layout.guest)
		keys = slices.DeleteFunc(keys, func(k []byte) bool { return d.told[ns+string(k)] })
		if err == nil && len(keys) > 0 {
			err = inNamespace(d.to, func() error { return addConnections(ns, keys) })
		}
		if err != nil {
			return fmt.Errorf("tell of connections in network namespace %q: %w", ns, err)
		}
		for _, k := range keys {
			d.told[ns+string(k)] = true
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
	for _, tracked := range d.tracked {
		tracked.Close()
	}
	errs = append(errs, d.lock.Release(), rundir.Remove())
	d.lock = nil
	return errors.Join(errs...)
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

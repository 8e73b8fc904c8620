package network

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
	"drafter/internal/rundir"
)

// Landing says where a VM that moves will be. It goes to the source of the move.
type Landing struct {
	Netns  string     `json:"netns"`
	Ticket string     `json:"ticket"`           // proves to a source on the same host that it is there
	Guest  string     `json:"guest"`            // what a guest must find alike where it goes on
	Guest6 string     `json:"guest6,omitempty"` // likewise by IPv6; "": there is none
	Tunnel *TunnelEnd `json:"tunnel,omitempty"` // nil: its NAT has no tunnel
	Why    string     `json:"why,omitempty"`    // it has none for this move
}

// Tunnel returns the end of the tunnel that the claim's namespace has, or nil if it has none. It goes
// to the target of a move; see [Claim.Landing].
func (c *Claim) Tunnel() (*TunnelEnd, error) {
	if c.lock == nil {
		return nil, nil
	}
	access, err := tunnelOf(c.namespace)
	if access == nil || err != nil {
		return nil, err
	}
	return &access.End, nil
}

// Landing returns where the VM of this claim will be, or nil if its connections cannot go on there,
// since no NAT made the namespace. source is the end of the source's tunnel, nil if it has none.
func (c *Claim) Landing(source *TunnelEnd) (*Landing, error) {
	if c.lock == nil {
		return nil, nil
	}
	config, err := natOf(c.namespace)
	if config == nil || err != nil {
		return nil, err
	}
	l := &Landing{Netns: c.namespace, Guest: config.guest(), Guest6: config.guest6()}
	if l.Ticket, err = c.expect(source); err != nil {
		return nil, err
	}
	access, err := tunnelOf(c.namespace)
	switch {
	case err != nil:
		return nil, err
	case access == nil:
		l.Why = "its NAT has no tunnel; start it with --tunnel-port"
	case source == nil:
		l.Why = "this host's NAT has no tunnel; start it with --tunnel-port"
	case source.Key != access.End.Key:
		defer access.close()
		if err := access.meet(*source); err != nil {
			l.Why = err.Error()
		}
	}
	if l.Why == "" {
		l.Tunnel = &access.End
	}
	return l, nil
}

// guest is what a guest must find alike where it goes on.
func (c NATConfig) guest() string {
	return fmt.Sprint(c.NamespaceInterfaceIP, c.NamespaceInterfaceGateway, c.NamespaceInterfaceNetmask, c.NamespaceInterfaceMAC)
}

// guest6 is guest for IPv6, "" if guests have none.
func (c NATConfig) guest6() string {
	l, err := c.parse()
	if err != nil || l.ip6 == nil {
		return ""
	}
	return fmt.Sprint(l.ip6.guest, l.ip6.gateway, l.ip6.mask)
}

// ErrNoAnchor says that a VM's connections cannot go on at a landing.
var ErrNoAnchor = errors.New("connections cannot go on there")

// Departure is a VM's move, as its connections see it. Its methods are called one after the other.
type Departure struct {
	from     string
	to       spot
	lock     *lockfile.Lock
	tunnel   *tunnelAccess // nil: there is none
	landing  landingHalf
	ways     []*way // of the anchors; the first is where the VM is
	lost     []*way // whose connections cannot go on
	why      []error
	switched bool
	only4    bool           // connections by IPv6 cannot go on there
	back     sync.WaitGroup // until anchors on other hosts have heard of Back
	backErr  error          // guarded by back
}

// spot is a namespace of this host, or of the one with that end of a tunnel.
type spot struct {
	Netns  string     `json:"netns"`
	Tunnel *TunnelEnd `json:"tunnel,omitempty"`
}

func (s spot) same(o spot) bool {
	return s.Netns == o.Netns && (s.Tunnel == nil) == (o.Tunnel == nil) && (s.Tunnel == nil || s.Tunnel.Key == o.Tunnel.Key)
}

func (s spot) String() string {
	if s.Tunnel == nil {
		return s.Netns
	}
	return s.Netns + " on " + s.Tunnel.Address
}

// way is how packets of an anchor's connections get to the guest and back.
type way struct {
	at     spot
	anchor anchorHalf
	before string          // link by which it leads to where the VM is; "": that is its own namespace
	link   string          // link to the landing; "": that is its own namespace
	told   map[string]bool // keys of its connections of which the landing was told
}

// anchorHalf is what a move does at an anchor.
type anchorHalf interface {
	// connect makes a link to a landing. On another host the landing's half is made already.
	connect(link string, to spot) error
	// lead lets packets for the guest go by a link to where it will be, and notes that; or to the tap
	// if link is "". It returns the keys of the connections.
	lead(link string, to spot) ([][]byte, error)
	// connections returns the keys of the guest's connections.
	connections() ([][]byte, error)
	close()
}

// landingHalf is what a move does at a landing.
type landingHalf interface {
	// land makes the landing's half of a link from an anchor on another host.
	land(link string, anchor spot, vm uuid.UUID) error
	// ready waits until packets for the guest reach the tap.
	ready() error
	// tell adds keys of connections that belong to a link's anchor.
	tell(link string, keys [][]byte) error
}

// Depart makes the links by which the connections of the claim's VM can go on at a landing. Nothing
// is sent by them yet: call [Departure.Switch] just before the VM is paused, [Departure.Tell] while it
// is, and Close at the end. target is the address of the landing's host, if that is known. An
// [ErrNoAnchor] says that they cannot go on there, and why.
func (c *Claim) Depart(vm uuid.UUID, l Landing, target net.Addr) (_ *Departure, err error) {
	if c.lock == nil {
		return nil, fmt.Errorf("%w: the VM has no network namespace here", ErrNoAnchor)
	}
	if err := checkNamespaceName(l.Netns); err != nil {
		return nil, err
	}
	config, err := natOf(c.namespace)
	switch {
	case err != nil:
		return nil, err
	case config == nil:
		return nil, fmt.Errorf("%w: no NAT made network namespace %q", ErrNoAnchor, c.namespace)
	case config.guest() != l.Guest:
		return nil, fmt.Errorf("%w: guests of network namespace %q have other addresses", ErrNoAnchor, l.Netns)
	}
	d := &Departure{from: c.namespace, to: spot{Netns: l.Netns}, only4: l.Guest6 == "" || l.Guest6 != config.guest6()}
	here, err := l.here()
	switch {
	case err != nil:
		return nil, err
	case here && l.Netns == c.namespace:
		return nil, fmt.Errorf("%w: it stays in network namespace %q", ErrNoAnchor, c.namespace)
	case here:
	case l.Tunnel == nil:
		return nil, fmt.Errorf("%w: network namespace %q is on another host, and %s", ErrNoAnchor, l.Netns, l.Why)
	default:
		end := l.Tunnel.At(target)
		if end.Address == "" {
			return nil, fmt.Errorf("%w: the address of the landing's host is not known; start its NAT with --tunnel-address", ErrNoAnchor)
		}
		d.to.Tunnel = &end
	}
	if d.lock, err = lockAnchors(d.from); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if d.tunnel, err = tunnelOf(c.namespace); err != nil {
		return nil, err
	}
	if d.to.Tunnel != nil {
		if err := d.tunnel.meet(*d.to.Tunnel); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNoAnchor, err)
		}
		d.landing = landingThere{d.tunnel, d.to}
	} else {
		if d.landing, err = newLandingHere(d.to.Netns, d.tunnel); err != nil {
			return nil, err
		}
		if err := d.clear(); err != nil {
			return nil, err
		}
	}
	return d, d.connect(vm)
}

// clear ends the anchor that the landing is, unless that is the VM's own.
func (d *Departure) clear() error {
	a, err := anchorOf(d.to.Netns)
	if a == nil || err != nil || a.At == nil && a.To == d.from {
		return err
	}
	return a.End() // of a VM that was lost
}

// connect makes links from all anchors to the landing.
func (d *Departure) connect(vm uuid.UUID) error {
	own, err := newAnchorHere(d.from, vm, d.tunnel)
	if err != nil {
		return err
	}
	d.ways = []*way{{at: spot{Netns: d.from}, anchor: own}}
	here, err := anchorsTo(d.from)
	if err != nil {
		return err
	}
	for _, a := range here {
		if a.VM != vm {
			continue // of one that was killed
		}
		half, err := newAnchorHere(a.Netns, vm, d.tunnel)
		if err != nil {
			d.why = append(d.why, fmt.Errorf("those at the anchor %s: %w", a.Netns, err))
			continue
		}
		half.by = d.from
		d.ways = append(d.ways, &way{at: spot{Netns: a.Netns}, anchor: half, before: a.Link})
	}
	there, err := landingsOf(d.from)
	if err != nil {
		return err
	}
	for _, l := range there {
		if l.VM == vm {
			d.ways = append(d.ways, &way{at: l.Anchor, anchor: anchorThere{d.tunnel, l.Anchor, vm}, before: l.Link})
		}
	}
	errs := d.each(d.ways, func(w *way) error { return d.connectWay(w, vm) })
	if errs[0] != nil && d.to.Tunnel != nil {
		return fmt.Errorf("%w: %w", ErrNoAnchor, errs[0])
	}
	if errs[0] != nil {
		return errs[0]
	}
	for i, w := range slices.Clone(d.ways) {
		if errs[i] != nil {
			d.lose(w, errs[i])
		}
	}
	return nil
}

// each calls f for ways at the same time, so that hosts that do not answer are waited for once.
func (d *Departure) each(ways []*way, f func(*way) error) []error {
	errs := make([]error, len(ways))
	var g errgroup.Group
	g.SetLimit(mostCalls / 2) // another VM may leave for the same host
	for i, w := range ways {
		g.Go(func() error {
			errs[i] = f(w)
			return nil
		})
	}
	_ = g.Wait() // errs has them
	return errs
}

func (d *Departure) connectWay(w *way, vm uuid.UUID) error {
	w.told = map[string]bool{}
	if w.at.same(d.to) {
		return nil // the VM comes home
	}
	w.link = newLink()
	if err := d.landing.land(w.link, w.at, vm); err != nil {
		return err
	}
	return w.anchor.connect(w.link, d.to)
}

// lose goes on without the connections of an anchor.
func (d *Departure) lose(w *way, why error) {
	d.why = append(d.why, fmt.Errorf("those at the anchor %s: %w", w.at, why))
	d.ways = slices.DeleteFunc(d.ways, func(o *way) bool { return o == w })
	d.lost = append(d.lost, w)
}

// Lost returns why connections of some anchors cannot go on, although the others' can. It returns
// each reason once.
func (d *Departure) Lost() []error {
	why := d.why
	d.why = nil
	return why
}

// newLink names a link with a number of three bytes, of which an end has few.
func newLink() string {
	b := make([]byte, 3)
	rand.Read(b) // it does not fail
	return hex.EncodeToString(b)
}

// linkNumber is the number that a link's name stands for.
func linkNumber(link string) (int, error) {
	b, err := hex.DecodeString(link)
	if err != nil || len(b) != 3 {
		return 0, fmt.Errorf("%.20q is no link between an anchor and a landing", link)
	}
	return int(b[0])<<16 | int(b[1])<<8 | int(b[2]), nil
}

// Switch leads packets for the VM to the landing, where they wait, and tells it which connections the
// VM has. The VM is about to be paused: what is still on its way here reaches it before.
func (d *Departure) Switch() error {
	if err := d.landing.ready(); err != nil {
		return err
	}
	d.switched = true
	own, others := d.ways[0], slices.Clone(d.ways[1:])
	for i, err := range d.each(others, d.lead) {
		if err != nil {
			d.lose(others[i], err)
		}
	}
	// Where the VM is comes last: what the others have sent there must not be sent on.
	if err := d.lead(own); err != nil {
		return fmt.Errorf("lead packets for the guest from network namespace %s to %s: %w", own.at, d.to, err)
	}
	return nil
}

// lead leads packets of an anchor to the landing. It knows most connections before, because what
// arrives waits from then on.
func (d *Departure) lead(w *way) error {
	if w.link == "" {
		_, err := w.anchor.lead("", d.to)
		return err
	}
	keys, err := w.anchor.connections()
	if err == nil {
		err = d.tell(w, keys)
	}
	if err == nil {
		keys, err = w.anchor.lead(w.link, d.to)
	}
	if err != nil {
		return err
	}
	return d.tell(w, keys)
}

// Tell tells the landing which connections the VM has had since Switch, if it has switched. The VM is
// paused, and has not gone on.
func (d *Departure) Tell() error {
	if !d.switched {
		return nil
	}
	for _, w := range d.ways {
		here, ok := w.anchor.(*anchorHere)
		if !ok || w.link == "" {
			continue // nothing begins there any more
		}
		keys, err := here.connections()
		if err == nil {
			err = d.tell(w, keys)
		}
		if err != nil {
			return fmt.Errorf("tell of connections in network namespace %q: %w", here.ns, err)
		}
	}
	return nil
}

func (d *Departure) tell(w *way, keys [][]byte) error {
	keys = slices.DeleteFunc(keys, func(k []byte) bool { return w.told[string(k)] || d.only4 && len(k) != keyParts+net.IPv4len })
	if len(keys) == 0 {
		return nil
	}
	for _, k := range keys {
		w.told[string(k)] = true
	}
	return d.landing.tell(w.link, keys)
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

// Switched tells whether the connections go on at the landing.
func (d *Departure) Switched() bool { return d.switched }

// Back undoes Switch: the VM goes on where it was. Anchors on other hosts hear of it meanwhile; Close
// waits for them.
func (d *Departure) Back() error {
	if !d.switched {
		return nil
	}
	d.switched = false
	there, here := []*way{}, []*way{}
	for _, w := range d.ways {
		if w.at.Tunnel != nil {
			there = append(there, w)
		} else {
			here = append(here, w)
		}
	}
	back := func(w *way) error {
		_, err := w.anchor.lead(w.before, spot{Netns: d.from})
		return err
	}
	errs := d.each(here, back)
	d.back.Go(func() { d.backErr = errors.Join(d.each(there, back)...) })
	return errors.Join(append(errs, forgetAnchor(d.from))...)
}

// Close ends the departure. If it has switched, the VM is at the landing, and the links to where it
// was are removed; else those to the landing. Other hosts are told by the NAT.
func (d *Departure) Close() error {
	if d.lock == nil {
		return nil
	}
	d.back.Wait()
	errs := []error{d.backErr}
	for _, w := range d.ways {
		if d.switched {
			errs = append(errs, d.dropBefore(w))
		} else {
			errs = append(errs, d.dropLink(w))
		}
		if d.switched && w.link == "" && w.at.Tunnel == nil {
			errs = append(errs, forgetAnchor(w.at.Netns))
		}
	}
	for _, w := range d.lost {
		errs = append(errs, d.dropLink(w))
		if d.switched && w.at.Tunnel != nil { // one of this host ends when nobody is here any more
			errs = append(errs, d.dropBefore(w))
		}
	}
	for _, w := range slices.Concat(d.ways, d.lost) {
		w.anchor.close()
	}
	if d.switched {
		// Where the VM was, nothing more is heard of the other anchors' connections. Should it come
		// back, what the kernel knew of them would be wrong.
		errs = append(errs, inNamespace(d.from, func() error {
			return forgetConnections(func(f *netlink.ConntrackFlow) bool { return f.Mark != 0 })
		}))
	}
	d.tunnel.close()
	errs = append(errs, d.lock.Release(), rundir.Remove())
	d.lock = nil
	return errors.Join(errs...)
}

// dropLink drops the link to the landing.
func (d *Departure) dropLink(w *way) error {
	if w.link == "" {
		return nil
	}
	var errs []error
	var notices []notice
	if here, ok := w.anchor.(*anchorHere); ok {
		errs = append(errs, here.disconnect(w.link))
	} else {
		notices = append(notices, notice{To: w.at, Link: w.link, Anchor: true})
	}
	if here, ok := d.landing.(landingHere); ok {
		errs = append(errs, here.leave(w.link))
	} else {
		notices = append(notices, notice{To: d.to, Link: w.link})
	}
	return errors.Join(append(errs, giveNotice(d.from, notices...))...)
}

// dropBefore drops the link to where the VM was.
func (d *Departure) dropBefore(w *way) error {
	if w.before == "" {
		return nil
	}
	if here, ok := w.anchor.(*anchorHere); ok {
		return here.disconnect(w.before)
	}
	own, err := newLandingHere(d.from, d.tunnel)
	if err != nil {
		return err
	}
	return own.leave(w.before)
}

// Landed says that the VM has come here. If it was here before, it has no anchor here any more. The
// source of its move does the same when it ends, unless it is killed.
func (c *Claim) Landed() error {
	if c.lock == nil {
		return nil
	}
	err := withAnchor(c.namespace, lockAnchors, func(a *Anchor) error {
		if a == nil {
			return nil
		}
		return errors.Join(a.disconnect(), forgetAnchor(c.namespace))
	})
	return errors.Join(err, expectNobody(c.namespace), rundir.Remove())
}

package network

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"

	"drafter/internal/lockfile"
	"drafter/internal/rundir"
)

// meet lets the NAT of this host exchange packets with another's.
func (a *tunnelAccess) meet(end TunnelEnd) error {
	if a == nil {
		return errors.New("this host's NAT has no tunnel; start it with --tunnel-port")
	}
	return a.call(a.End, "meet", end, nil)
}

// makeLink makes this host's end of a link.
func (a *tunnelAccess) makeLink(ns, name, link string, other TunnelEnd) error {
	if a == nil {
		return errors.New("this host's NAT has no tunnel; start it with --tunnel-port")
	}
	return a.call(a.End, "link", makeCall{linkCall{ns, link}, name, other}, nil)
}

// linker makes this host's ends of links: the NAT itself, or a process that calls it.
type linker interface {
	makeLink(ns, name, link string, other TunnelEnd) error
}

// anchorHere is an anchor on this host.
type anchorHere struct {
	ns      string
	vm      uuid.UUID
	config  *NATConfig
	layout  *layout
	tunnel  *tunnelAccess
	linker  linker
	tracked *netlink.Handle // its connections
	by      string          // see [anchorMove]
}

func newAnchorHere(ns string, vm uuid.UUID, tunnel *tunnelAccess) (_ *anchorHere, err error) {
	h := &anchorHere{ns: ns, vm: vm, tunnel: tunnel, linker: tunnel}
	if h.config, h.layout, err = layoutOf(ns); err != nil {
		return nil, err
	}
	h.tracked, err = connectionsIn(ns)
	return h, err
}

// anchorHere is newAnchorHere for the NAT itself.
func (t *tunnel) anchorHere(ns string, vm uuid.UUID) (*anchorHere, error) {
	h, err := newAnchorHere(ns, vm, t.tunnelAccess)
	if err == nil {
		h.linker = introducing{t}
	}
	return h, err
}

// layoutOf returns what a NAT has laid out for a namespace.
func layoutOf(ns string) (*NATConfig, *layout, error) {
	config, err := natOf(ns)
	if err == nil && config == nil {
		err = fmt.Errorf("no NAT made network namespace %q", ns)
	}
	if err != nil {
		return nil, nil, err
	}
	l, err := config.parse()
	return config, l, err
}

func (h *anchorHere) connect(link string, to spot) error {
	a, err := h.anchor()
	if err != nil {
		return err
	}
	if a != nil { // noted before the link is there, because links that nobody needs are removed
		a.Move = &anchorMove{By: h.by, Next: link, To: to, Since: time.Now()}
		if err := a.write(); err != nil {
			return err
		}
	}
	if to.Tunnel == nil {
		return connectAnchor(h.ns, to.Netns, link, h.config.NamespaceInterface)
	}
	if err := h.linker.makeLink(h.ns, toLanding(link), link, *to.Tunnel); err != nil {
		return err
	}
	if err := inNamespace(h.ns, func() error { return configureAnchorLink(toLanding(link), landingMAC, landingIP, landingIP6) }); err != nil {
		return err
	}
	return h.tunnel.call(*to.Tunnel, "greet", struct{}{}, nil)
}

// anchor returns the VM's anchor that the namespace is already, or nil.
func (h *anchorHere) anchor() (*Anchor, error) {
	a, err := anchorOf(h.ns)
	if a != nil && a.VM != h.vm {
		a = nil
	}
	return a, err
}

func (h *anchorHere) lead(link string, to spot) ([][]byte, error) {
	before, err := h.anchor()
	if err == nil {
		err = h.leadGuest(link)
	}
	if err != nil {
		return nil, err
	}
	if before == nil || before.Link != link {
		a := Anchor{Netns: h.ns, VM: h.vm, To: to.Netns, At: to.Tunnel, Link: link, Since: time.Now()}
		was := "" // the tap
		if before != nil {
			was, a.Since = before.Link, before.Since
			a.Move = &anchorMove{By: h.by, Before: before.Link, From: spot{before.To, before.At}, Since: time.Now()}
			if link != "" && before.Move != nil && before.Move.Before == link { // it goes back
				a.Move = &anchorMove{By: h.by, Next: before.Link, To: spot{before.To, before.At}, Since: time.Now()}
			}
		}
		if err := a.write(); err != nil {
			return nil, errors.Join(err, h.leadGuest(was))
		}
	}
	return h.connections()
}

func (h *anchorHere) leadGuest(link string) error {
	return inNamespace(h.ns, func() error { return leadGuest(h.layout, link) })
}

func (h *anchorHere) connections() ([][]byte, error) {
	return connectionKeys(h.tracked, h.layout)
}

// disconnect drops a link of a move that is over.
func (h *anchorHere) disconnect(link string) error {
	err := dropLink(h.ns, toLanding(link))
	a, aerr := h.anchor()
	if a != nil {
		aerr = a.forget(link)
	}
	return errors.Join(err, aerr)
}

func (h *anchorHere) close() { h.tracked.Close() }

// anchorThere is an anchor on another host.
type anchorThere struct {
	tunnel *tunnelAccess
	at     spot
	vm     uuid.UUID
}

func (h anchorThere) call(name, link string, to spot, response any) error {
	return h.tunnel.call(*h.at.Tunnel, "anchor/"+name, anchorCall{linkCall{h.at.Netns, link}, h.vm, to}, response)
}

func (h anchorThere) connect(link string, to spot) error { return h.call("connect", link, to, nil) }
func (h anchorThere) close()                             {}

func (h anchorThere) connections() ([][]byte, error) {
	var keys connectionKeyList
	err := h.call("connections", "", spot{}, &keys)
	return keys, err
}

func (h anchorThere) lead(link string, to spot) ([][]byte, error) {
	var keys connectionKeyList
	err := h.call("lead", link, to, &keys)
	return keys, err
}

// landingHere is a landing on this host.
type landingHere struct {
	ns     string
	config *NATConfig
	linker linker
}

func newLandingHere(ns string, tunnel *tunnelAccess) (landingHere, error) {
	config, _, err := layoutOf(ns)
	return landingHere{ns, config, tunnel}, err
}

// landingHere is newLandingHere for the NAT itself.
func (t *tunnel) landingHere(ns string) (landingHere, error) {
	h, err := newLandingHere(ns, nil)
	h.linker = introducing{t}
	return h, err
}

// mostLandings is of anchors on other hosts that lead to one namespace.
const mostLandings = 64

func (h landingHere) land(link string, anchor spot, vm uuid.UUID) error {
	if anchor.Tunnel == nil {
		return nil // whoever makes the link does it
	}
	// Noted before the link is there, so that nobody forgets it.
	var refused error
	err := changeList(landingRecords, h.ns, func(all []landed) []landed {
		if len(all) >= mostLandings {
			refused = fmt.Errorf("%d anchors on other hosts lead to network namespace %q; no more can", mostLandings, h.ns)
		}
		if slices.ContainsFunc(all, func(l landed) bool { return l.Link == link }) {
			refused = fmt.Errorf("a link %s leads to network namespace %q already", link, h.ns)
		}
		if refused != nil {
			return all
		}
		return append(all, landed{link, vm, anchor})
	})
	if err := errors.Join(err, refused); err != nil {
		return err
	}
	if err := h.linker.makeLink(h.ns, fromAnchor(link), link, *anchor.Tunnel); err != nil {
		return err
	}
	return inNamespace(h.ns, func() error { return land(link, h.config.NamespaceInterface) })
}

func (h landingHere) ready() error {
	return inNamespace(h.ns, func() error { return awaitTap(h.config.NamespaceInterface) })
}

func (h landingHere) tell(link string, keys [][]byte) error {
	return inNamespace(h.ns, func() error { return addConnections(link, keys) })
}

// leave drops the landing's half of a link.
func (h landingHere) leave(link string) error {
	all, err := landingsOf(h.ns)
	errs := []error{err, dropLink(h.ns, fromAnchor(link))}
	for _, l := range all {
		if l.Link == link {
			errs = append(errs, giveNotice(h.ns, notice{To: l.Anchor, Link: link, Anchor: true}))
		}
	}
	errs = append(errs, changeList(landingRecords, h.ns, func(all []landed) []landed {
		return slices.DeleteFunc(all, func(l landed) bool { return l.Link == link })
	}))
	return errors.Join(errs...)
}

// landingThere is a landing on another host.
type landingThere struct {
	tunnel *tunnelAccess
	at     spot
}

func (h landingThere) land(link string, anchor spot, vm uuid.UUID) error {
	return h.tunnel.call(*h.at.Tunnel, "land", landCall{h.at.Netns, link, anchor, vm}, nil)
}

func (h landingThere) ready() error {
	return h.tunnel.call(*h.at.Tunnel, "land/ready", linkCall{Netns: h.at.Netns}, nil)
}

func (h landingThere) tell(link string, keys [][]byte) error {
	return h.tunnel.callWithin(tellTimeout, *h.at.Tunnel, "land/tell", tellCall{linkCall{h.at.Netns, link}, keys}, nil)
}

// landed is an anchor on another host that leads to a VM here.
type landed struct {
	Link   string    `json:"link"`
	VM     uuid.UUID `json:"vm"`
	Anchor spot      `json:"anchor"`
}

const landingRecords = "landings"

// landingsOf returns the anchors on other hosts that lead to a namespace.
func landingsOf(ns string) ([]landed, error) { return readList[landed](landingRecords, ns) }

// keepLandings ends the anchors on other hosts of a VM that was killed.
func (n *NAT) keepLandings(ns string) error {
	if all, err := landingsOf(ns); len(all) == 0 || err != nil {
		return err
	}
	lock, err := claimNamespace(ns)
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return nil
	}
	if err != nil {
		return err
	}
	gone := false
	err = inNamespace(ns, func() error {
		gone = n.layout.vacant()
		return nil
	})
	if err == nil && gone {
		n.config.Logger.Info("The VM has ended, and with it the connections that went on at anchors of other hosts", "namespace", ns)
		err = endLandings(ns, uuid.Nil)
	}
	return errors.Join(err, lock.Release(), rundir.Remove())
}

// endLandings ends what leads from other hosts to VMs that have ended: any but the given one.
func endLandings(ns string, but uuid.UUID) error {
	all, err := landingsOf(ns)
	all = slices.DeleteFunc(all, func(l landed) bool { return l.VM == but })
	for _, l := range all {
		err = errors.Join(err, landingHere{ns: ns}.leave(l.Link))
	}
	return err
}

package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"

	"drafter/internal/lockfile"
	"drafter/internal/private"
	"drafter/internal/rundir"
)

// meet lets the NAT of this host exchange packets with another's.
func (a *tunnelAccess) meet(end TunnelEnd) error {
	if a == nil {
		return errors.New("this host's NAT has no tunnel; start it with --tunnel-port")
	}
	return a.call(a.End, "meet", meetCall{End: end}, nil)
}

// anchorHere is an anchor on this host.
type anchorHere struct {
	ns      string
	vm      uuid.UUID
	config  *NATConfig
	layout  *layout
	tunnel  *tunnelAccess
	meet    func(TunnelEnd) error
	tracked *netlink.Handle // its connections
}

func newAnchorHere(ns string, vm uuid.UUID, tunnel *tunnelAccess) (_ *anchorHere, err error) {
	h := &anchorHere{ns: ns, vm: vm, tunnel: tunnel, meet: tunnel.meet}
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
		h.meet = t.meet
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
	if to.Tunnel == nil {
		return connectAnchor(h.ns, to.Netns, link, h.config.NamespaceInterface)
	}
	if err := h.meet(*to.Tunnel); err != nil {
		return err
	}
	if err := h.tunnel.tunnelLink(h.ns, toLanding(link), link, *to.Tunnel, anchorMAC); err != nil {
		return err
	}
	if err := inNamespace(h.ns, func() error { return configureAnchorLink(toLanding(link), landingMAC, landingIP, landingIP6) }); err != nil {
		return err
	}
	return h.tunnel.call(*to.Tunnel, "greet", struct{}{}, nil)
}

func (h *anchorHere) lead(link string, to spot) ([][]byte, error) {
	if link != "" {
		a := Anchor{Netns: h.ns, VM: h.vm, To: to.Netns, At: to.Tunnel, Link: link, Since: time.Now()}
		if before, err := anchorOf(h.ns); err != nil {
			return nil, err
		} else if before != nil && before.VM == h.vm {
			a.Since = before.Since
		}
		if err := a.write(); err != nil {
			return nil, err
		}
	}
	if err := inNamespace(h.ns, func() error { return leadGuest(h.layout, link) }); err != nil {
		return nil, err
	}
	return h.connections()
}

func (h *anchorHere) connections() ([][]byte, error) {
	return connectionKeys(h.tracked, h.layout)
}

func (h *anchorHere) disconnect(link string) error { return dropLink(h.ns, toLanding(link)) }
func (h *anchorHere) close()                       { h.tracked.Close() }

// anchorThere is an anchor on another host.
type anchorThere struct {
	tunnel *tunnelAccess
	at     spot
	vm     uuid.UUID
}

func (h anchorThere) call(name, link string, to spot, response any) error {
	return h.tunnel.call(*h.at.Tunnel, "anchor/"+name, anchorCall{h.at.Netns, link, h.vm, to}, response)
}

func (h anchorThere) connect(link string, to spot) error { return h.call("connect", link, to, nil) }
func (h anchorThere) disconnect(link string) error       { return h.call("disconnect", link, spot{}, nil) }
func (h anchorThere) close()                             {}

func (h anchorThere) connections() (keys [][]byte, err error) {
	err = h.call("connections", "", spot{}, &keys)
	return keys, err
}

func (h anchorThere) lead(link string, to spot) (keys [][]byte, err error) {
	err = h.call("lead", link, to, &keys)
	return keys, err
}

// landingHere is a landing on this host.
type landingHere struct {
	ns     string
	config *NATConfig
	tunnel *tunnelAccess
	meet   func(TunnelEnd) error
}

func newLandingHere(ns string, tunnel *tunnelAccess) (landingHere, error) {
	config, _, err := layoutOf(ns)
	return landingHere{ns, config, tunnel, tunnel.meet}, err
}

// landingHere is newLandingHere for the NAT itself.
func (t *tunnel) landingHere(ns string) (landingHere, error) {
	h, err := newLandingHere(ns, t.tunnelAccess)
	h.meet = t.meet
	return h, err
}

func (h landingHere) land(link string, anchor spot, vm uuid.UUID) error {
	if anchor.Tunnel == nil {
		return nil // whoever makes the link does it
	}
	if err := h.meet(*anchor.Tunnel); err != nil {
		return err
	}
	if err := h.tunnel.tunnelLink(h.ns, fromAnchor(link), link, *anchor.Tunnel, landingMAC); err != nil {
		return err
	}
	if err := inNamespace(h.ns, func() error { return land(link, h.config.NamespaceInterface) }); err != nil {
		return err
	}
	return changeLandings(h.ns, func(all []landed) []landed { return append(all, landed{link, vm, anchor}) })
}

func (h landingHere) ready() error {
	return inNamespace(h.ns, func() error { return awaitTap(h.config.NamespaceInterface) })
}

func (h landingHere) tell(link string, keys [][]byte) error {
	return inNamespace(h.ns, func() error { return addConnections(link, keys) })
}

func (h landingHere) leave(link string) error {
	err := dropLink(h.ns, fromAnchor(link))
	return errors.Join(err, changeLandings(h.ns, func(all []landed) []landed {
		return slices.DeleteFunc(all, func(l landed) bool { return l.Link == link })
	}))
}

// landingThere is a landing on another host.
type landingThere struct {
	tunnel *tunnelAccess
	at     spot
}

func (h landingThere) call(name, link string, keys [][]byte) error {
	return h.tunnel.call(*h.at.Tunnel, "land/"+name, landingCall{h.at.Netns, link, keys}, nil)
}

func (h landingThere) land(link string, anchor spot, vm uuid.UUID) error {
	return h.tunnel.call(*h.at.Tunnel, "land", landCall{h.at.Netns, link, anchor, vm}, nil)
}

func (h landingThere) ready() error { return h.call("ready", "", nil) }

func (h landingThere) tell(link string, keys [][]byte) error {
	return h.tunnel.callWithin(tellTimeout, *h.at.Tunnel, "land/tell", landingCall{h.at.Netns, link, keys}, nil)
}

func (h landingThere) leave(link string) error { return h.call("leave", link, nil) }

// landed is an anchor on another host that leads to a VM here.
type landed struct {
	Link   string    `json:"link"`
	VM     uuid.UUID `json:"vm"`
	Anchor spot      `json:"anchor"`
}

const landingRecords = "landings"

func landingsPath(ns string) string { return filepath.Join(rundir.Path, landingRecords, ns+".json") }

// landingsOf returns the anchors on other hosts that lead to a namespace.
func landingsOf(ns string) (all []landed, err error) {
	b, err := os.ReadFile(landingsPath(ns))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil {
		return nil, fmt.Errorf("read what leads to network namespace %q: %w", ns, err)
	}
	return all, nil
}

// changeLandings changes the record of a namespace's anchors on other hosts.
func changeLandings(ns string, change func([]landed) []landed) (err error) {
	if _, err := os.Stat(filepath.Join(rundir.Path, landingRecords)); errors.Is(err, os.ErrNotExist) && len(change(nil)) == 0 {
		return nil
	}
	lock, err := lockRecord(landingRecords + "/" + ns)
	if err != nil {
		return fmt.Errorf("record what leads to network namespace %q: %w", ns, err)
	}
	defer func() { err = errors.Join(err, lock.Release(), rundir.Remove()) }()
	all, err := landingsOf(ns)
	if err != nil {
		return err
	}
	before := len(all)
	all = change(all)
	if len(all) == before {
		return nil
	}
	if len(all) == 0 {
		err = os.Remove(landingsPath(ns))
	} else {
		var b []byte
		if b, err = json.Marshal(all); err == nil {
			err = private.MkdirAll(filepath.Dir(landingsPath(ns)))
		}
		if err == nil {
			err = replaceFile(landingsPath(ns), b)
		}
	}
	if err != nil {
		return fmt.Errorf("record what leads to network namespace %q: %w", ns, err)
	}
	return nil
}

// forgetLandings removes the record of a namespace's anchors on other hosts.
func forgetLandings(ns string) error {
	return changeLandings(ns, func([]landed) []landed { return nil })
}

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

// endLandings tells other hosts that a VM has ended to which their anchors lead: any but the given one.
func endLandings(ns string, but uuid.UUID) error {
	all, err := landingsOf(ns)
	all = slices.DeleteFunc(all, func(l landed) bool { return l.VM == but })
	if len(all) == 0 || err != nil {
		return err
	}
	access, err := tunnelOf(ns)
	if err != nil {
		return err
	}
	defer access.close()
	h, err := newLandingHere(ns, access)
	if err != nil {
		return err
	}
	for _, l := range all {
		if access != nil {
			// One that does not hear of it has an end by itself.
			_ = anchorThere{access, l.Anchor, l.VM}.call("end", "", spot{}, nil)
		}
		err = errors.Join(err, h.leave(l.Link))
	}
	return err
}

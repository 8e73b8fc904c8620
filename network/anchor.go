package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"

	"drafter/internal/kind"
	"drafter/internal/lockfile"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/internal/rundir"
)

// A VM that moves keeps its connections. The namespace that it leaves becomes an anchor: what the
// kernel knows there of connections stays, and packets for the guest go on, by a link, to the
// namespace where the VM is. The guest's packets that belong to these connections go back by it:
//
//	client ── host ── ark0 ─────────────────── ark1 ── guest
//	                  to-3fa2c1    from-3fa2c1
//
// A VM that moves again may leave several anchors. Each leads to where it is. One that comes back to
// its anchor ends it. Between hosts, a link goes through the tunnel of their NATs.

// Anchor is a namespace that a VM has left, and whose connections with it go on.
type Anchor struct {
	Netns string     `json:"netns"`
	VM    uuid.UUID  `json:"vm"`    // its generation, which no copy has
	To    string     `json:"to"`    // namespace where the VM is
	At    *TunnelEnd `json:"at"`    // of the host where that is; nil: this host
	Link  string     `json:"link"`  // "": the VM is about to come home
	Since time.Time  `json:"since"` // it left

	Move *anchorMove `json:"move,omitempty"` // nil: the VM's last move is over
}

// anchorMove is what an anchor keeps for a move of its VM that is not over.
type anchorMove struct {
	By     string    `json:"by,omitempty"`     // namespace of this host that the VM leaves; "": of another
	Next   string    `json:"next,omitempty"`   // link to where the VM may go
	To     spot      `json:"to"`               // that place
	Before string    `json:"before,omitempty"` // link to where it was, and may go back
	From   spot      `json:"from"`             // that place
	Since  time.Time `json:"since"`
}

// Where tells where the VM is: as ark1, or as ark1 on 192.0.2.7.
func (a Anchor) Where() string { return spot{a.To, a.At}.String() }

// place is what the lock of the anchor's links is for.
func (a Anchor) place() string {
	if a.At == nil {
		return a.To
	}
	return a.Netns
}

// needs tells whether the anchor leads by a link, or may in a move.
func (a *Anchor) needs(link string) bool {
	return a != nil && (a.Link == link || a.Move != nil && (a.Move.Next == link || a.Move.Before == link))
}

// behind is where a link leads that the anchor needs; "" leads home.
func (a *Anchor) behind(link string) spot {
	switch {
	case link == "":
		return spot{Netns: a.Netns}
	case a.Move != nil && link == a.Move.Next:
		return a.Move.To
	case a.Move != nil && link == a.Move.Before:
		return a.Move.From
	}
	return spot{a.To, a.At}
}

// leadsTo tells whether the VM is at the caller's host, or may go back there.
func (a *Anchor) leadsTo(from caller) bool {
	is := func(end *TunnelEnd) bool { return end != nil && end.Key == from.end.Key }
	return a != nil && (is(a.At) || a.Move != nil && a.Move.Before != "" && is(a.Move.From.Tunnel))
}

// forget forgets a link of a move.
func (a *Anchor) forget(link string) error {
	if a == nil || a.Move == nil || a.Move.Next != link && a.Move.Before != link {
		return nil
	}
	move := *a.Move
	if move.Next == link {
		move.Next = ""
	} else {
		move.Before = ""
	}
	if a.Move = &move; move.Next == "" && move.Before == "" {
		a.Move = nil
	}
	return a.write()
}

// withAnchor calls f for the anchor that a namespace is, or nil, while nobody else changes it: with
// lockAnchors, or tryAnchors.
func withAnchor(ns string, lockIt func(place string) (*lockfile.Lock, error), f func(*Anchor) error) error {
	a, err := anchorOf(ns)
	for err == nil {
		place := ns // of the VM whose anchor it may become
		if a != nil {
			place = a.place()
		}
		var lock *lockfile.Lock
		if lock, err = lockIt(place); err != nil {
			return err
		}
		if a, err = anchorOf(ns); err == nil && (a == nil || a.place() == place) { // it has not moved since
			return errors.Join(f(a), lock.Release(), rundir.Remove())
		}
		err = errors.Join(err, lock.Release())
	}
	return err
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

// anchorsTo returns the anchors of this host that lead to one of its namespaces.
func anchorsTo(ns string) ([]Anchor, error) {
	all, err := Anchors()
	return slices.DeleteFunc(all, func(a Anchor) bool { return a.At != nil || a.To != ns || a.Netns == ns }), err
}

func (a Anchor) write() error {
	b, err := json.Marshal(a)
	if err == nil {
		err = private.MkdirAll(filepath.Dir(anchorPath(a.Netns)))
	}
	if err == nil {
		err = newfile.WriteBytes(anchorPath(a.Netns), b)
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
func lockAnchors(ns string) (*lockfile.Lock, error) { return lockRecord(anchorRecords + "/" + ns) }

// tryAnchors is lockAnchors without patience.
func tryAnchors(ns string) (*lockfile.Lock, error) { return rundir.Lock(anchorRecords + "/" + ns) }

func lockRecord(name string) (*lockfile.Lock, error) {
	const patience = 2 * time.Second // longer than the end of an anchor takes
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		lock, err := rundir.Lock(name)
		var held *lockfile.HeldError
		if !errors.As(err, &held) || time.Now().After(deadline) {
			return lock, err
		}
	}
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
	tracked, err := connectionsIn(a.Netns)
	if err != nil {
		return t, err
	}
	defer tracked.Close()
	flows, err := guestFlows(tracked, l)
	if err != nil {
		return t, err
	}
	t.Connections = len(flows)
	err = inNamespace(a.Netns, func() error {
		link, err := netlink.LinkByName(toLanding(a.Link))
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
		return false, kind.Of(ErrInUse, fmt.Errorf("connections of a VM that has moved to network namespace %s go on in %q; choose another --netns, or end them with 'drafter anchor remove %s'", a.Where(), ns, ns))
	case g.Lands:
		return true, nil
	}
	return false, a.End()
}

// End ends the connections that go on at the anchor, and resets those that it can. Its namespace is
// free again.
func (a Anchor) End() error {
	err := withAnchor(a.Netns, lockAnchors, func(now *Anchor) error {
		if now == nil || now.VM != a.VM {
			return nil // it has ended meanwhile
		}
		return now.end()
	})
	if err != nil {
		return fmt.Errorf("end anchor %q: %w", a.Netns, err)
	}
	return nil
}

// disconnect removes the anchor's link, and what belongs to it.
func (a Anchor) disconnect() error {
	err := dropLink(a.Netns, toLanding(a.Link)) // the route goes with it
	if a.At == nil {
		return errors.Join(err, dropLink(a.To, fromAnchor(a.Link)))
	}
	return errors.Join(err, giveNotice(a.Netns, notice{To: spot{a.To, a.At}, Link: a.Link}))
}

// takeBack ends the anchor of a VM that goes on in its namespace after all. Its other anchors end,
// and their connections with them.
func takeBack(ns string) error {
	a, err := anchorOf(ns)
	if a == nil || err != nil {
		return err
	}
	all, err := Anchors()
	for _, other := range all {
		if other.VM == a.VM && other.Netns != ns {
			err = errors.Join(err, other.End())
		}
	}
	return errors.Join(err, withAnchor(ns, lockAnchors, func(a *Anchor) error {
		if a == nil {
			return nil
		}
		return errors.Join(a.disconnect(), forgetAnchor(ns))
	}))
}

// keepAnchor ends the anchor that a namespace is once nobody needs it, and removes links that a killed
// process left.
func (n *NAT) keepAnchor(ns string) error {
	if a, strays, err := findAnchor(ns); err != nil || a == nil && len(strays) == 0 {
		return err
	}
	err := withAnchor(ns, tryAnchors, func(a *Anchor) error {
		if a != nil && a.Move != nil {
			if over, err := a.moveOver(); err != nil {
				return err
			} else if over {
				a.Move = nil
				if err := a.write(); err != nil {
					return err
				}
			}
		}
		a, strays, err := findAnchor(ns)
		for _, link := range strays {
			err = errors.Join(err, dropLink(ns, toLanding(link)))
		}
		if a == nil || err != nil {
			return err
		}
		return n.keepNeeded(*a)
	})
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return nil // the VM is about to move
	}
	return err
}

// linkPatience is how long a link may wait for a VM that is to move: a migration may take hours.
const linkPatience = 24 * time.Hour

// moveOver tells whether nobody moves the VM any more, for whom the anchor's lock is held. A process
// of this host has a lock meanwhile.
func (a Anchor) moveOver() (bool, error) {
	if a.Move.By == "" || a.Move.By == a.place() {
		return a.Move.By != "" || time.Since(a.Move.Since) > linkPatience, nil
	}
	lock, err := tryAnchors(a.Move.By)
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, lock.Release()
}

// findAnchor looks for the anchor that a namespace is, and for links to landings that it does not need.
func findAnchor(ns string) (a *Anchor, strays []string, err error) {
	if a, err = anchorOf(ns); err != nil {
		return nil, nil, err
	}
	err = inNamespace(ns, func() error {
		links, err := listAnchorLinks(landingLinks)
		for _, name := range links {
			if link := strings.TrimPrefix(name, landingLinks); !a.needs(link) {
				strays = append(strays, link)
			}
		}
		return errors.Join(err, sweepLandings())
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
	if a.Link == "" { // unless the process was killed that the VM comes to
		lock, err := claimNamespace(a.Netns)
		var held *lockfile.HeldError
		if errors.As(err, &held) {
			return nil
		}
		if err == nil {
			err = lock.Release()
		}
		if err != nil {
			return err
		}
		gone = true
	}
	why, args := "", []any{"namespace", a.Netns, "ledTo", a.Where(), "after", time.Since(a.Since).Round(time.Second)}
	switch {
	case gone:
		why = "The VM has ended, and with it the connections that went on at an anchor"
	case a.At != nil && n.tunnel == nil:
		why, args = "An anchor has ended, as there is no tunnel any more, and with it its connections", append(args, "connections", t.Connections)
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

// vmGone tells whether nobody is there any more where the anchor leads. Another host tells by
// itself.
func (a Anchor) vmGone() (gone bool, err error) {
	if a.At != nil {
		return false, nil
	}
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
	errs := []error{a.disconnect()}
	config, err := natOf(a.Netns)
	errs = append(errs, err)
	if config != nil {
		l, err := config.parse()
		if err == nil {
			err = inNamespace(a.Netns, func() error {
				if occupied(config.NamespaceInterface) {
					return nil
				}
				if err := config.vacate(l); err != nil {
					return err
				}
				return l.bringUpTap(config.NamespaceInterface)
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
	err := endLandings(ns, uuid.Nil)
	all, aerr := anchorsTo(ns)
	err = errors.Join(err, aerr)
	for _, a := range all {
		err = errors.Join(err, a.End())
	}
	return err
}

// endAnchorsOfOthers ends the anchors of a VM that was killed in a namespace, before another comes
// there.
func endAnchorsOfOthers(ns string, vm uuid.UUID) error {
	err := endLandings(ns, vm)
	all, aerr := anchorsTo(ns)
	err = errors.Join(err, aerr)
	for _, a := range all {
		if a.VM != vm || vm == uuid.Nil {
			err = errors.Join(err, a.End())
		}
	}
	return err
}

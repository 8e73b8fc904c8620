package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"drafter/internal/lockfile"
)

// NATs call one another through the tunnel: HTTP with JSON. The tunnel tells who calls. Processes of
// this host call its NAT there, too: only root enters the tunnel's namespace.

const (
	callTimeout = 3 * time.Second
	tellTimeout = time.Second // of a call while the VM is paused
	mostCall    = 16 << 20    // bytes of one: some 400,000 connections
)

// tunnelAccess is what a process of this host needs to use the NAT's tunnel.
type tunnelAccess struct {
	Netns string    `json:"netns"`
	End   TunnelEnd `json:"end"`

	once   sync.Once
	client *http.Client
}

// tunnelOf returns the tunnel of the NAT that made a namespace, or nil if it has none. Close it.
func tunnelOf(ns string) (*tunnelAccess, error) {
	records, err := natRecords()
	for _, r := range records {
		if slices.Contains(r.Namespaces, ns) {
			return r.Tunnel, nil
		}
	}
	return nil, err
}

func (a *tunnelAccess) http() *http.Client {
	a.once.Do(func() {
		a.client = &http.Client{
			Transport: &http.Transport{DialContext: a.dial, IdleConnTimeout: time.Minute},
			// Another host must not lead a call to this one's NAT.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
	})
	return a.client
}

func (a *tunnelAccess) close() {
	if a != nil {
		a.http().CloseIdleConnections()
	}
}

// call calls the NAT at another end of the tunnel, or this host's. It ends within callTimeout.
//
//nolint:contextcheck,nolintlint // for those that call it: the linters disagree
func (a *tunnelAccess) call(to TunnelEnd, name string, request, response any) error {
	return a.callWithin(callTimeout, to, name, request, response)
}

func (a *tunnelAccess) callWithin(timeout time.Duration, to TunnelEnd, name string, request, response any) (err error) {
	defer func() {
		if err != nil && to.Key != a.End.Key {
			err = fmt.Errorf("the NAT at %s: %w", to.endpoint(), err)
		}
	}()
	b, err := json.Marshal(request)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	url := fmt.Sprintf("http://%s/%s", netip.AddrPortFrom(to.Key.ip(), tunnelPort), name)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(b))
	if err != nil {
		return err
	}
	answer, err := a.http().Do(r)
	switch {
	case err != nil && ctx.Err() != nil && to.Key == a.End.Key:
		return errors.New("the NAT does not answer; is it running?")
	case err != nil && ctx.Err() != nil:
		return fmt.Errorf("no answer through the tunnel within %s; is UDP port %d open there, and is its NAT running?", timeout, to.Port)
	case err != nil:
		return err
	}
	defer answer.Body.Close()
	b, err = io.ReadAll(io.LimitReader(answer.Body, mostCall))
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %.500q", name, strings.TrimSpace(string(b)))
	}
	if response == nil {
		return nil
	}
	return json.Unmarshal(b, response)
}

// dial connects inside the tunnel's namespace.
func (a *tunnelAccess) dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = inNamespace(a.Netns, func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// The calls' requests.
type (
	// meetCall says that a VM may come from another end to a namespace, or go there if that is "".
	meetCall struct {
		End   TunnelEnd
		Netns string
	}
	landCall struct {
		Netns, Link string
		Anchor      spot
		VM          uuid.UUID
	}
	landingCall struct {
		Netns, Link string
		Keys        [][]byte
	}
	anchorCall struct {
		Netns, Link string
		VM          uuid.UUID
		To          spot
	}
)

// checkRequest refuses names that lead elsewhere.
func checkRequest(request any) error {
	check := func(link string, end *TunnelEnd, names ...string) error {
		if end != nil {
			if err := end.check(); err != nil {
				return err
			}
		}
		for _, ns := range names {
			if err := checkNamespaceName(ns); err != nil && ns != "" {
				return err
			}
		}
		if link == "" {
			return nil
		}
		_, err := linkNumber(link)
		return err
	}
	switch r := request.(type) {
	case meetCall:
		return check("", nil, r.Netns)
	case landCall:
		return check(r.Link, r.Anchor.Tunnel, r.Netns, r.Anchor.Netns)
	case landingCall:
		return check(r.Link, nil, r.Netns)
	case anchorCall:
		return check(r.Link, r.To.Tunnel, r.Netns, r.To.Netns)
	}
	return nil
}

// caller is the end from which a call comes.
type caller struct {
	end  TunnelEnd
	here bool // it is a process of this host
}

func (t *tunnel) handler() http.Handler {
	mux := http.NewServeMux()
	serve(t, mux, "greet", func(caller, struct{}) (any, error) { return nil, nil })
	serve(t, mux, "meet", func(from caller, c meetCall) (any, error) {
		if !from.here {
			return nil, errDenied
		}
		if c.Netns != "" {
			t.expect(c.Netns, c.End.Key)
		}
		return nil, t.meet(c.End)
	})
	serve(t, mux, "landed", func(from caller, c landingCall) (any, error) {
		if from.here {
			t.expect(c.Netns, TunnelKey{})
			return nil, nil
		}
		return nil, errDenied
	})
	serve(t, mux, "land", func(from caller, c landCall) (any, error) {
		if !t.expects(c.Netns, from) {
			return nil, errDenied
		}
		half, err := t.landingHere(c.Netns)
		if err != nil {
			return nil, err
		}
		return nil, half.land(c.Link, t.seen(c.Anchor, from), c.VM)
	})
	t.serveLanding(mux, "ready", func(h landingHere, _ landingCall) error { return h.ready() })
	t.serveLanding(mux, "tell", func(h landingHere, c landingCall) error { return h.tell(c.Link, c.Keys) })
	t.serveLanding(mux, "leave", func(h landingHere, c landingCall) error { return h.leave(c.Link) })
	t.serveAnchor(mux, "connect", func(_ caller, h *anchorHere, c anchorCall) (any, error) {
		t.waits(c.Link, true)
		return nil, h.connect(c.Link, c.To)
	})
	t.serveAnchor(mux, "connections", func(_ caller, h *anchorHere, _ anchorCall) (any, error) { return h.connections() })
	t.serveAnchor(mux, "lead", func(_ caller, h *anchorHere, c anchorCall) (any, error) {
		t.waits(c.Link, false)
		return h.lead(c.Link, c.To)
	})
	serve(t, mux, "anchor/disconnect", func(from caller, c anchorCall) (any, error) {
		// The anchor may have ended meanwhile, as the VM has come home to it.
		there, theirs, err := t.anchorLink(c.Netns, toLanding(c.Link), from)
		if err != nil || !there {
			return nil, err
		}
		if !theirs {
			return nil, errDenied
		}
		return nil, dropLink(c.Netns, toLanding(c.Link))
	})
	t.serveAnchor(mux, "end", func(from caller, h *anchorHere, _ anchorCall) (any, error) {
		a, err := anchorOf(h.ns)
		if a == nil || err != nil {
			return nil, err
		}
		if a.At == nil || a.At.Key != from.end.Key {
			return nil, errDenied // the VM is not there, or has not come
		}
		return nil, a.End()
	})
	return mux
}

// serveLanding handles calls from where a VM comes, or is linked to.
func (t *tunnel) serveLanding(mux *http.ServeMux, name string, act func(landingHere, landingCall) error) {
	serve(t, mux, "land/"+name, func(from caller, c landingCall) (any, error) {
		if !t.expects(c.Netns, from) {
			there, theirs, err := t.anchorLink(c.Netns, fromAnchor(c.Link), from)
			switch {
			case err != nil:
				return nil, err
			case !there && name == "leave":
				return nil, nil // it has left before
			case !theirs:
				return nil, errDenied
			}
		}
		half, err := t.landingHere(c.Netns)
		if err != nil {
			return nil, err
		}
		return nil, act(half, c)
	})
}

// serveAnchor handles calls from where an anchor leads.
func (t *tunnel) serveAnchor(mux *http.ServeMux, name string, act func(caller, *anchorHere, anchorCall) (any, error)) {
	serve(t, mux, "anchor/"+name, func(from caller, c anchorCall) (any, error) {
		a, err := anchorOf(c.Netns)
		if err != nil {
			return nil, err
		}
		if a == nil || a.VM != c.VM || !t.isAnchor(c.Netns, from) {
			return nil, errDenied
		}
		half, err := t.anchorHere(c.Netns, c.VM)
		if err != nil {
			return nil, err
		}
		defer half.close()
		c.To = t.seen(c.To, from)
		if c.Link != "" && c.To.Netns != "" && c.To.Tunnel == nil && !t.expects(c.To.Netns, from) {
			return nil, errDenied // the VM is not to come there
		}
		return act(from, half, c)
	})
}

var errDenied = errors.New("this is none of the caller's")

// serve handles a call.
func serve[Request any](t *tunnel, mux *http.ServeMux, name string, f func(caller, Request) (any, error)) {
	mux.HandleFunc("POST /"+name, func(w http.ResponseWriter, r *http.Request) {
		var request Request
		from, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		who := caller{here: from.Addr() == t.End.Key.ip()}
		if end, ok := t.peerAt(from.Addr()); ok {
			who.end = end
		} else if !who.here {
			http.Error(w, errDenied.Error(), http.StatusForbidden)
			return
		}
		err = json.NewDecoder(http.MaxBytesReader(w, r.Body, mostCall)).Decode(&request)
		if err == nil {
			err = checkRequest(request)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		response, err := f(who, request)
		if err != nil {
			t.log.Warn("A NAT cannot do what another asks for, which takes part in a VM's move", "call", name, "from", who.end.endpoint(), "error", err)
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		json.NewEncoder(w).Encode(response) //nolint:errcheck,errchkjson // who has asked hears of it
	})
}

// seen is a spot as this host sees it, of which a caller has told.
func (t *tunnel) seen(s spot, from caller) spot {
	switch {
	case s.Tunnel == nil && !from.here:
		s.Tunnel = &from.end
	case s.Tunnel != nil && s.Tunnel.Key == t.End.Key:
		s.Tunnel = nil
	}
	return s
}

// expect notes from where a VM may come to a namespace.
func (t *tunnel) expect(ns string, from TunnelKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if from == (TunnelKey{}) {
		delete(t.expected, ns)
		return
	}
	t.expected[ns] = from
}

// expects tells whether a VM may come from the caller to a namespace, to which somebody lays claim.
func (t *tunnel) expects(ns string, from caller) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	key, ok := t.expected[ns]
	if !ok || from.here || key != from.end.Key {
		return false
	}
	lock, err := claimNamespace(ns)
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return true
	}
	if err == nil {
		err = lock.Release()
	}
	if err != nil {
		t.log.Warn("A claim on a network namespace cannot be looked at", "namespace", ns, "error", err)
	}
	delete(t.expected, ns)
	return false
}

// anchorLink tells whether there is an end of a link, and whether the caller has the other one.
func (t *tunnel) anchorLink(ns, name string, from caller) (there, theirs bool, err error) {
	err = inNamespace(ns, func() error {
		links, err := listAnchorLinks(name)
		there, theirs = len(links) > 0, leadsTo(name, from.end.Key.ip())
		return err
	})
	return there, theirs, err
}

// isAnchor tells whether an anchor has a link that leads to the caller.
func (t *tunnel) isAnchor(ns string, from caller) bool {
	found := false
	err := inNamespace(ns, func() error {
		links, err := listAnchorLinks(landingLinks)
		for _, name := range links {
			found = found || leadsTo(name, from.end.Key.ip())
		}
		return err
	})
	return found && err == nil
}

// linkPatience is how long a link may wait for a VM that is to move: a migration may take hours.
const linkPatience = 24 * time.Hour

// waits notes a link that leads nowhere yet, or does.
func (t *tunnel) waits(link string, waits bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if waits {
		t.pending[link] = time.Now()
	} else {
		delete(t.pending, link)
	}
}

// waiting tells whether a VM may still move by a link.
func (t *tunnel) waiting(link string) bool {
	if t == nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for l, since := range t.pending {
		if time.Since(since) > linkPatience {
			delete(t.pending, l)
		}
	}
	_, ok := t.pending[link]
	return ok
}

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
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/semaphore"

	"drafter/internal/lockfile"
)

// NATs call one another through the tunnel: HTTP with JSON. The tunnel tells who calls. Processes of
// this host call its NAT there, too: only root enters the tunnel's namespace.

const (
	callTimeout = 3 * time.Second
	tellTimeout = time.Second // of a call while the VM is paused
	mostCall    = 64 << 10    // bytes of one that tells of no connections
	mostKeys    = 4 << 20     // and of one that does
	mostCalls   = 16          // of one host at a time
)

// tunnelAccess is what a process of this host needs to use the NAT's tunnel.
type tunnelAccess struct {
	Netns string    `json:"netns"`
	End   TunnelEnd `json:"end"`

	nat    *tunnel // in the NAT itself
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
			Transport: &http.Transport{DialContext: a.dial, IdleConnTimeout: idleCaller},
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
func (a *tunnelAccess) call(to TunnelEnd, name string, request, response any) error {
	return a.callWithin(callTimeout, to, name, request, response)
}

// callWithin is call with another end.
//
//nolint:contextcheck,nolintlint // for those that call it: the linters disagree
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
	own := to.Key == a.End.Key
	url := fmt.Sprintf("http://%s/%s", netip.AddrPortFrom(to.Key.ip(), tunnelPort), name)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(b))
	if err != nil {
		return err
	}
	answer, err := a.http().Do(r)
	switch {
	case err != nil && own:
		return fmt.Errorf("%w: %w", errNoNAT, err)
	case err != nil && (ctx.Err() != nil || errors.Is(err, errNoAnswer)):
		return fmt.Errorf("no answer through the tunnel within %s; is UDP port %d open there, and is its NAT running?", timeout, to.Port)
	case err != nil:
		return err
	}
	defer answer.Body.Close()
	b, err = io.ReadAll(io.LimitReader(answer.Body, mostKeys))
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return &refusedError{name, strings.TrimSpace(string(b)), answer.StatusCode == http.StatusServiceUnavailable}
	}
	if response == nil {
		return nil
	}
	return json.Unmarshal(b, response)
}

// errNoNAT says that this host's NAT does not answer.
var errNoNAT = errors.New("the NAT does not answer; is it running?")

// refusedError is the answer of a NAT that does not do what it was called for.
type refusedError struct {
	call, why string
	later     bool // it may do it later
}

// heard tells whether a call was answered for good.
func heard(err error) bool {
	var refused *refusedError
	return err == nil || errors.As(err, &refused) && !refused.later
}

func (e *refusedError) Error() string { return fmt.Sprintf("%s: %.500q", e.call, e.why) }

// The calls' requests.
type (
	landCall struct {
		Netns, Link string
		Anchor      spot
		VM          uuid.UUID
	}
	linkCall struct{ Netns, Link string }
	// makeCall makes an end of a link.
	makeCall struct {
		linkCall
		Name  string
		Other TunnelEnd
	}
	tellCall struct {
		linkCall
		Keys connectionKeyList
	}
	anchorCall struct {
		linkCall
		VM uuid.UUID
		To spot
	}
)

// check refuses names that lead elsewhere.
func (c linkCall) check() error {
	if err := checkNamespaceName(c.Netns); err != nil || c.Link == "" {
		return err
	}
	_, err := linkNumber(c.Link)
	return err
}

func (c landCall) check() error {
	if c.VM == uuid.Nil { // it stands for all
		return errors.New("no VM is named")
	}
	return errors.Join(linkCall{c.Netns, c.Link}.check(), c.Anchor.check())
}

func (c anchorCall) check() error { return errors.Join(c.linkCall.check(), c.To.check()) }

func (s spot) check() error {
	if s.Tunnel != nil {
		if err := s.Tunnel.check(); err != nil {
			return err
		}
	}
	return checkNamespaceName(s.Netns)
}

// caller is the end from which a call comes.
type caller struct {
	end   TunnelEnd
	here  bool                // it is a process of this host
	slots *semaphore.Weighted // for its calls
}

func (t *tunnel) handler() http.Handler {
	mux := http.NewServeMux()
	serve(t, mux, "greet", func(caller, struct{}) (any, error) { return nil, nil })
	serveHere(t, mux, "meet", t.meet)
	serve(t, mux, "rouse", func(from caller, c rouseCall) (any, error) {
		if !from.here {
			return nil, errDenied
		}
		return t.rouse(c.IP)
	})
	serveHere(t, mux, "link", func(c makeCall) error { return t.makeLink(c.Netns, c.Name, c.Link, c.Other) })
	serveHere(t, mux, "notices", func(struct{}) error { return t.deliver() })
	t.serveLanding(mux)
	t.serveAnchor(mux, "connect", func(h *anchorHere, c anchorCall) (any, error) { return nil, h.connect(c.Link, c.To) })
	t.serveAnchor(mux, "connections", func(h *anchorHere, _ anchorCall) (any, error) {
		return answerKeys(h.connections())
	})
	t.serveAnchor(mux, "lead", func(h *anchorHere, c anchorCall) (any, error) { return answerKeys(h.lead(c.Link, c.To)) })
	serve(t, mux, "anchor/leave", func(from caller, c linkCall) (any, error) {
		return nil, withAnchor(c.Netns, lockAnchors, func(a *Anchor) error { return t.leaveAnchor(a, from, c) })
	})
	return mux
}

// serveLanding handles calls from where a VM comes, or is linked to.
func (t *tunnel) serveLanding(mux *http.ServeMux) {
	serve(t, mux, "land", func(from caller, c landCall) (any, error) {
		half, err := t.landingFor(c.Netns, "", from)
		if err != nil {
			return nil, err
		}
		return nil, half.land(c.Link, t.seen(c.Anchor, from), c.VM)
	})
	serve(t, mux, "land/ready", func(from caller, c linkCall) (any, error) {
		half, err := t.landingFor(c.Netns, "", from)
		if err != nil {
			return nil, err
		}
		return nil, half.ready()
	})
	serve(t, mux, "land/tell", func(from caller, c tellCall) (any, error) {
		half, err := t.landingFor(c.Netns, "", from)
		if err != nil {
			return nil, err
		}
		return nil, half.tell(c.Link, c.Keys)
	})
	serve(t, mux, "land/leave", func(from caller, c linkCall) (any, error) {
		if there, _, err := t.link(c.Netns, fromAnchor(c.Link), from); err != nil || !there {
			return nil, err // it has left before
		}
		half, err := t.landingFor(c.Netns, c.Link, from)
		if err != nil {
			return nil, err
		}
		return nil, half.leave(c.Link)
	})
}

// landingFor returns a landing for a caller from which a VM is to come, or who has the other end of the
// link.
func (t *tunnel) landingFor(ns, link string, from caller) (landingHere, error) {
	allowed := t.expects(ns, from)
	if !allowed && link != "" {
		_, theirs, err := t.link(ns, fromAnchor(link), from)
		if err != nil {
			return landingHere{}, err
		}
		allowed = theirs
	}
	if !allowed {
		return landingHere{}, errDenied
	}
	return t.landingHere(ns)
}

// leaveAnchor drops an anchor's end of a link. An anchor that leads by it ends.
func (t *tunnel) leaveAnchor(a *Anchor, from caller, c linkCall) error {
	there, theirs, err := t.link(c.Netns, toLanding(c.Link), from)
	switch {
	case err != nil || !there:
		return err // it has left before
	case !theirs && !a.leadsTo(from):
		return errDenied
	case a == nil || a.Link != c.Link:
		return errors.Join(dropLink(c.Netns, toLanding(c.Link)), a.forget(c.Link))
	case a.Move == nil || a.Move.Before == "":
		return a.end()
	}
	// The VM did not come there: it goes on where it was.
	half, err := t.anchorHere(c.Netns, a.VM)
	if err != nil {
		return err
	}
	defer half.close()
	if _, err := half.lead(a.Move.Before, a.Move.From); err != nil {
		return err
	}
	return half.disconnect(c.Link)
}

// serveAnchor handles calls from where an anchor leads, or has led as long as the VM's move is not
// over.
func (t *tunnel) serveAnchor(mux *http.ServeMux, name string, act func(*anchorHere, anchorCall) (any, error)) {
	serve(t, mux, "anchor/"+name, func(from caller, c anchorCall) (response any, err error) {
		err = withAnchor(c.Netns, lockAnchors, func(a *Anchor) error {
			if a == nil || a.VM != c.VM || !a.leadsTo(from) {
				return errDenied
			}
			c.To = t.seen(c.To, from)
			switch {
			case name == "connect" && c.To.Tunnel == nil && !t.expects(c.To.Netns, from),
				name == "lead" && c.Link == "" && !t.expects(c.Netns, from),
				name == "lead" && c.Link != "" && !a.needs(c.Link):
				return errDenied // the VM is not to come there
			case name == "lead":
				c.To = a.behind(c.Link)
			}
			half, err := t.anchorHere(c.Netns, c.VM)
			if err != nil {
				return err
			}
			defer half.close()
			response, err = act(half, c)
			return err
		})
		return response, err
	})
}

var errDenied = errors.New("this is none of the caller's")

// serve handles a call.
func serve[Request any](t *tunnel, mux *http.ServeMux, name string, f func(caller, Request) (any, error)) {
	most := int64(mostCall)
	if name == "land/tell" {
		most = mostKeys
	}
	mux.HandleFunc("POST /"+name, func(w http.ResponseWriter, r *http.Request) {
		from, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		who, err := t.admit(r.Context(), from.Addr())
		if err != nil {
			http.Error(w, err.Error(), codeOf(err, http.StatusForbidden))
			return
		}
		defer who.slots.Release(1)
		var request Request
		err = json.NewDecoder(http.MaxBytesReader(w, r.Body, most)).Decode(&request)
		if checked, ok := any(request).(interface{ check() error }); ok && err == nil {
			err = checked.check()
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		response, err := f(who, request)
		if err != nil {
			t.log.Warn("A NAT cannot do what another asks for, which takes part in a VM's move", "call", name, "from", who.end.endpoint(), "error", err)
			http.Error(w, err.Error(), codeOf(err, http.StatusConflict))
			return
		}
		json.NewEncoder(w).Encode(response) //nolint:errcheck,errchkjson // who has asked hears of it
	})
}

// serveHere handles a call of processes of this host.
func serveHere[Request any](t *tunnel, mux *http.ServeMux, name string, f func(Request) error) {
	serve(t, mux, name, func(from caller, r Request) (any, error) {
		if !from.here {
			return nil, errDenied
		}
		return nil, f(r)
	})
}

// errBusy says that a call may be done later.
var errBusy = fmt.Errorf("%d calls are answered at a time", mostCalls)

// codeOf is the status of an answer, unless the call may be done later.
func codeOf(err error, code int) int {
	var held *lockfile.HeldError
	if errors.Is(err, errBusy) || errors.As(err, &held) {
		return http.StatusServiceUnavailable
	}
	return code
}

// admit tells who calls from an address, and waits until that may be answered. Release its slot.
func (t *tunnel) admit(ctx context.Context, ip netip.Addr) (who caller, err error) {
	t.mu.Lock()
	who.here = ip == t.End.Key.ip()
	for _, end := range t.record.Peers {
		if end.Key.ip() == ip {
			who.end = end
		}
	}
	known := who.here || who.end.Key != TunnelKey{}
	if known && t.calls[ip] == nil {
		t.calls[ip] = semaphore.NewWeighted(mostCalls)
	}
	who.slots = t.calls[ip]
	t.mu.Unlock()
	if !known {
		return who, errDenied
	}
	ctx, cancel := context.WithTimeout(ctx, tellTimeout)
	defer cancel()
	if err := who.slots.Acquire(ctx, 1); err != nil {
		return who, errBusy
	}
	return who, nil
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

// link tells whether a namespace has an end of a link, and whether the caller has the other one.
func (t *tunnel) link(ns, name string, from caller) (there, theirs bool, err error) {
	if _, err := os.Stat(filepath.Join(netnsDir, ns)); errors.Is(err, os.ErrNotExist) {
		return false, false, nil
	}
	err = inNamespace(ns, func() error {
		links, err := listAnchorLinks(name)
		there, theirs = len(links) > 0, leadsTo(name, from.end.Key)
		return err
	})
	return there, theirs, err
}

// connectionKeyList are keys of connections. As JSON it is one string, so that what another host sends
// takes no more memory than that: base64 of the keys, each after its length in one byte.
type connectionKeyList [][]byte

// answerKeys is an answer with the keys of connections.
func answerKeys(keys [][]byte, err error) (any, error) { return connectionKeyList(keys), err }

// MarshalJSON implements json.Marshaler.
func (l connectionKeyList) MarshalJSON() ([]byte, error) {
	var b []byte
	for _, k := range l {
		b = append(append(b, byte(len(k))), k...)
	}
	return json.Marshal(b)
}

// UnmarshalJSON implements json.Unmarshaler.
func (l *connectionKeyList) UnmarshalJSON(text []byte) error {
	var b []byte
	if err := json.Unmarshal(text, &b); err != nil {
		return err
	}
	for len(b) > 0 {
		n := int(b[0])
		if n != keyParts+net.IPv4len && n != keyParts+net.IPv6len || len(b) <= n {
			return fmt.Errorf("%d bytes are no key of a connection", n)
		}
		*l = append(*l, b[1:1+n])
		b = b[1+n:]
	}
	return nil
}

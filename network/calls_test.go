package network

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"drafter/internal/need"
)

// A NAT does for another host what belongs to a VM that comes from there or went there, and nothing
// else.
func TestCalls(t *testing.T) {
	need.Root(t)
	c := testConfig()
	c.TunnelPort = 7777
	n := startNAT(t, c)
	friend := TunnelEnd{Key: TunnelKey{1}, Address: "192.0.2.7", Port: 7777}
	other := TunnelEnd{Key: TunnelKey{2}, Address: "192.0.2.8", Port: 7777}
	handler := n.tunnel.handler()
	call := func(from TunnelKey, name, body string) int {
		r := httptest.NewRequest(http.MethodPost, "/"+name, strings.NewReader(body))
		r.RemoteAddr = netip.AddrPortFrom(from.ip(), 1000).String()
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		return w.Code
	}
	text := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	links := func() (names []string) {
		err := inNamespace("ark0", func() (err error) {
			names, err = listAnchorLinks(anchorLinks)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	claim, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	defer claim.Close()
	own, vm := n.tunnel.End.Key, uuid.New()
	land := landCall{Netns: "ark0", Link: "3fa2c1", VM: vm, Anchor: spot{Netns: "ark7"}}
	bad := friend
	bad.Address = "localhost"
	for _, tt := range []struct {
		what string
		from TunnelKey
		name string
		body string
		code int
	}{
		{"a stranger", friend.Key, "greet", "{}", http.StatusForbidden},
		{"an end without an IP address", own, "meet", text(meetCall{End: bad}), http.StatusConflict},
		{"an address with lines for WireGuard", own, "meet", text(meetCall{End: TunnelEnd{Key: friend.Key, Address: "fe80::1%lo]:1\nallowed_ip=0.0.0.0/0\nendpoint=[fe80::1%lo", Port: 7777}}), http.StatusConflict},
		{"a VM is to come from a friend", own, "meet", text(meetCall{friend, "ark0"}), http.StatusOK},
		{"one is to go to another", own, "meet", text(meetCall{End: other}), http.StatusOK},
		{"a friend greets", friend.Key, "greet", "{}", http.StatusOK},
		{"a friend introduces somebody", friend.Key, "meet", text(meetCall{End: other}), http.StatusConflict},
		{"no JSON", friend.Key, "land", "{", http.StatusBadRequest},
		{"a path", friend.Key, "land", text(landCall{Netns: "../ark0", Link: "3fa2c1"}), http.StatusBadRequest},
		{"no link", friend.Key, "land", text(landCall{Netns: "ark0", Link: "tap0"}), http.StatusBadRequest},
		{"nobody's landing", friend.Key, "land", text(landCall{Netns: "ark1", Link: "3fa2c1"}), http.StatusConflict},
		{"another's landing", other.Key, "land", text(land), http.StatusConflict},
		{"the friend's landing", friend.Key, "land", text(land), http.StatusOK},
		{"connections of another's link", other.Key, "land/tell", text(landingCall{Netns: "ark0", Link: "3fa2c1", Keys: [][]byte{bytes.Repeat([]byte{1}, 16)}}), http.StatusConflict},
		{"connections", friend.Key, "land/tell", text(landingCall{Netns: "ark0", Link: "3fa2c1", Keys: [][]byte{bytes.Repeat([]byte{1}, 16)}}), http.StatusOK},
		{"no connection", friend.Key, "land/tell", text(landingCall{Netns: "ark0", Link: "3fa2c1", Keys: [][]byte{{1}}}), http.StatusConflict},
		{"the VM is there", own, "landed", text(landingCall{Netns: "ark0"}), http.StatusOK},
		{"a landing afterwards", friend.Key, "land", text(landCall{Netns: "ark0", Link: "3fa2c2"}), http.StatusConflict},
		{"another ends the link", other.Key, "land/leave", text(landingCall{Netns: "ark0", Link: "3fa2c1"}), http.StatusConflict},
		{"no anchor", friend.Key, "anchor/lead", text(anchorCall{Netns: "ark1", Link: "3fa2c1", VM: vm}), http.StatusConflict},
		{"no anchor's end", friend.Key, "anchor/end", text(anchorCall{Netns: "ark1", VM: vm}), http.StatusConflict},
	} {
		if code := call(tt.from, tt.name, tt.body); code != tt.code {
			t.Errorf("%s: %s is answered with %d; want %d", tt.what, tt.name, code, tt.code)
		}
	}
	if names := links(); !slices.Equal(names, []string{"from-3fa2c1"}) {
		t.Errorf("there are links %v", names)
	}
	if code := call(friend.Key, "land/leave", text(landingCall{Netns: "ark0", Link: "3fa2c1"})); code != http.StatusOK || len(links()) > 0 {
		t.Errorf("the link's end is answered with %d, and leaves %v", code, links())
	}
}

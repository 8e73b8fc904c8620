package network

import (
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
	if _, err := claim.expect(&friend); err != nil {
		t.Fatal(err)
	}
	tell := func(key []byte) string {
		return text(tellCall{linkCall{"ark0", "3fa2c1"}, connectionKeyList{key}})
	}
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
		{"an end without an IP address", own, "meet", text(bad), http.StatusBadRequest},
		{"an address with lines for WireGuard", own, "meet", text(TunnelEnd{Key: friend.Key, Address: "fe80::1%lo]:1\nallowed_ip=0.0.0.0/0\nendpoint=[fe80::1%lo", Port: 7777}), http.StatusBadRequest},
		{"a VM is to come from a friend", own, "meet", text(friend), http.StatusOK},
		{"one is to go to another", own, "meet", text(other), http.StatusOK},
		{"a friend greets", friend.Key, "greet", "{}", http.StatusOK},
		{"a friend introduces somebody", friend.Key, "meet", text(other), http.StatusConflict},
		{"no JSON", friend.Key, "land", "{", http.StatusBadRequest},
		{"a path", friend.Key, "land", text(landCall{Netns: "../ark0", Link: "3fa2c1"}), http.StatusBadRequest},
		{"no link", friend.Key, "land", text(landCall{Netns: "ark0", Link: "tap0"}), http.StatusBadRequest},
		{"nobody's landing", friend.Key, "land", text(landCall{Netns: "ark1", Link: "3fa2c1", VM: vm}), http.StatusConflict},
		{"another's landing", other.Key, "land", text(land), http.StatusConflict},
		{"the friend's landing", friend.Key, "land", text(land), http.StatusOK},
		{"connections of another's link", other.Key, "land/tell", tell([]byte("sixteen bytes.00")), http.StatusConflict},
		{"connections", friend.Key, "land/tell", tell([]byte("sixteen bytes.00")), http.StatusOK},
		{"no connection", friend.Key, "land/tell", tell([]byte{1}), http.StatusBadRequest},
		{"no VM", friend.Key, "land", text(landCall{Netns: "ark0", Link: "3fa2c2", Anchor: spot{Netns: "ark7"}}), http.StatusBadRequest},
		{"the same link", friend.Key, "land", text(land), http.StatusConflict},
		{"a name that moves the cursor", friend.Key, "land", text(landCall{Netns: "ark0", Link: "3fa2c2", Anchor: spot{Netns: "ark7\x1b[2J"}}), http.StatusBadRequest},
		{"more than a call takes", friend.Key, "land", text(landCall{Netns: strings.Repeat("a", mostCall), Link: "3fa2c2"}), http.StatusBadRequest},
		{"another ends the link", other.Key, "land/leave", text(linkCall{"ark0", "3fa2c1"}), http.StatusConflict},
		{"no anchor", friend.Key, "anchor/lead", text(anchorCall{linkCall{"ark1", "3fa2c1"}, vm, spot{Netns: "ark7"}}), http.StatusConflict},
		{"no anchor's end", friend.Key, "anchor/leave", text(linkCall{"ark1", "3fa2c1"}), http.StatusOK},
	} {
		if code := call(tt.from, tt.name, tt.body); code != tt.code {
			t.Errorf("%s: %s is answered with %d; want %d", tt.what, tt.name, code, tt.code)
		}
	}
	if names := links(); !slices.Equal(names, []string{"from-3fa2c1"}) {
		t.Errorf("there are links %v", names)
	}
	if err := claim.Landed(); err != nil {
		t.Fatal(err)
	}
	if code := call(friend.Key, "land/tell", tell([]byte("sixteen bytes.00"))); code != http.StatusConflict {
		t.Errorf("connections after the VM has come are answered with %d", code)
	}
	if code := call(friend.Key, "land", text(landCall{Netns: "ark0", Link: "3fa2c2", VM: vm})); code != http.StatusConflict {
		t.Errorf("a landing after the VM has come is answered with %d", code)
	}
	if code := call(friend.Key, "land/leave", text(linkCall{"ark0", "3fa2c1"})); code != http.StatusOK || len(links()) > 0 {
		t.Errorf("the link's end is answered with %d, and leaves %v", code, links())
	}
}

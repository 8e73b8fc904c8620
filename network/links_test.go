package network

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"drafter/internal/await"
	"drafter/internal/need"
	"drafter/internal/testhost"
)

// otherNAT answers calls as another host's NAT would, at its address in the tunnel.
type otherNAT struct {
	end   TunnelEnd
	mu    sync.Mutex
	heard []string
}

func newOtherNAT(t *testing.T, end TunnelEnd) *otherNAT {
	t.Helper()
	o := &otherNAT{end: end}
	var listener net.Listener
	err := inNamespace("ark-tunnel", func() error {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.AddrAdd(lo, &netlink.Addr{IPNet: host(end.Key.ip().AsSlice())})
		}
		if err == nil {
			listener, err = net.Listen("tcp4", netip.AddrPortFrom(end.Key.ip(), tunnelPort).String())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		o.mu.Lock()
		defer o.mu.Unlock()
		o.heard = append(o.heard, r.URL.Path+" "+string(b))
		io.WriteString(w, "null")
	})}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(listener) }()
	t.Cleanup(func() { s.Close(); <-done })
	return o
}

// awaits waits until the NAT has heard a call.
func (o *otherNAT) awaits(t *testing.T, name string, request any) {
	t.Helper()
	want := "/" + name + " " + asText(t, request)
	await.None(t, want, func() string {
		o.mu.Lock()
		defer o.mu.Unlock()
		if slices.Contains(o.heard, want) {
			return ""
		}
		return fmt.Sprintf("it has heard %q", o.heard)
	})
}

func asText(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// calls calls a NAT as another end of its tunnel, and returns the answer's status.
func calls(t *testing.T, n *NAT, from TunnelKey, name string, request any) int {
	t.Helper()
	r := httptest.NewRequest(http.MethodPost, "/"+name, strings.NewReader(asText(t, request)))
	r.RemoteAddr = netip.AddrPortFrom(from.ip(), 1000).String()
	w := httptest.NewRecorder()
	n.tunnel.handler().ServeHTTP(w, r)
	t.Log(name, w.Code, strings.TrimSpace(w.Body.String()))
	return w.Code
}

func startTunnelNAT(t *testing.T) *NAT {
	t.Helper()
	c := testConfig()
	c.TunnelPort = 7777
	return startNAT(t, c)
}

var (
	friendEnd = TunnelEnd{Key: TunnelKey{1}, Address: "192.0.2.7", Port: 7777}
	otherEnd  = TunnelEnd{Key: TunnelKey{2}, Address: "192.0.2.8", Port: 7777}
)

// A target proves that it is on this host, and only as long as the VM is expected there.
func TestTicket(t *testing.T) {
	need.Root(t)
	startNAT(t, testConfig())
	from, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	to, err := ClaimNamespace("ark1")
	if err != nil {
		t.Fatal(err)
	}
	l, err := to.Landing(nil)
	if err != nil {
		t.Fatal(err)
	}
	departs := func(l Landing, want bool) {
		t.Helper()
		d, err := from.Depart(uuid.New(), l, nil)
		if want != (err == nil) || !want && !errors.Is(err, ErrNoAnchor) {
			t.Errorf("%+v: %v", l, err)
		}
		if d != nil {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	forged := *l
	forged.Ticket = "guessed"
	departs(forged, false)
	forged.Ticket = ""
	departs(forged, false)
	departs(*l, true)
	if err := to.Landed(); err != nil {
		t.Fatal(err)
	}
	departs(*l, false)
	if l, err = to.Landing(nil); err != nil {
		t.Fatal(err)
	}
	if err := to.lock.Release(); err != nil { // as if killed
		t.Fatal(err)
	}
	if to, err = ClaimNamespace("ark1"); err != nil {
		t.Fatal(err)
	}
	departs(*l, false)
	if err := errors.Join(from.Close(), to.Close()); err != nil {
		t.Error(err)
	}
}

// A VM ends here at once, even if another host is down that has to hear of it. That hears of it when
// it is up again, also from the next NAT.
func TestNotices(t *testing.T) {
	need.Root(t)
	c := testConfig()
	c.TunnelPort = 7777
	n := startNAT(t, c)
	claim, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claim.expect(&friendEnd); err != nil {
		t.Fatal(err)
	}
	own := n.tunnel.End.Key
	land := landCall{Netns: "ark0", Link: "3fa2c1", VM: uuid.New(), Anchor: spot{Netns: "ark7"}}
	if calls(t, n, own, "meet", friendEnd) != http.StatusOK || calls(t, n, friendEnd.Key, "land", land) != http.StatusOK {
		t.Fatal("the friend's VM cannot come")
	}
	if err := claim.Close(); err != nil {
		t.Fatal(err)
	}
	left := func() string {
		notices, err := readList[notice](noticeRecords, "ark")
		landings, lerr := landingsOf("ark0")
		if len(notices)+len(landings) > 0 || err != nil || lerr != nil {
			return fmt.Sprint(notices, landings, err, lerr)
		}
		return ""
	}
	await.None(t, "nobody hears", func() string {
		if notices, err := readList[notice](noticeRecords, "ark"); err != nil || len(notices) != 1 || !notices[0].Said {
			return fmt.Sprint(notices, err)
		}
		return ""
	})
	restartKilled(t, n)
	friend := newOtherNAT(t, friendEnd)
	friend.awaits(t, "anchor/leave", linkCall{"ark7", "3fa2c1"})
	await.None(t, "nothing is left to say", left)
}

// restartKilled ends a NAT as a kill would, and starts the next one.
func restartKilled(t *testing.T, n *NAT) *NAT {
	t.Helper()
	abandon(t, n)
	n.lock = nil // there is nothing left to close
	next, err := StartNAT(t.Context(), n.config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := next.Close(); err != nil {
			t.Error(err)
		}
	})
	return next
}

// An anchor follows the host where its VM is, and goes back there as long as the move is not over:
// also when its NAT is killed in between, and however often that looks.
func TestAnchorFollows(t *testing.T) {
	need.Root(t)
	n := startTunnelNAT(t)
	vm := uuid.New()
	other := newOtherNAT(t, otherEnd)
	for _, end := range []TunnelEnd{friendEnd, otherEnd} {
		if calls(t, n, n.tunnel.End.Key, "meet", end) != http.StatusOK {
			t.Fatal("not met")
		}
	}
	// The VM has moved to the friend.
	const at, next = "aaaaaa", "bbbbbb"
	if err := n.tunnel.makeLink("ark0", toLanding(at), at, friendEnd); err != nil {
		t.Fatal(err)
	}
	err := inNamespace("ark0", func() error {
		return errors.Join(configureAnchorLink(toLanding(at), landingMAC, landingIP, landingIP6), leadGuest(n.layout, at))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := (Anchor{Netns: "ark0", VM: vm, To: "ark7", At: &friendEnd, Link: at, Since: time.Now()}).write(); err != nil {
		t.Fatal(err)
	}
	// A connection, so that somebody needs the anchor.
	err = inNamespace("ark0", func() error {
		from, to := net.IPv4(10, 0, 8, 1).To4(), net.IPv4(10, 0, 15, 1).To4()
		return netlink.ConntrackCreate(netlink.ConntrackTable, unix.AF_INET, &netlink.ConntrackFlow{
			FamilyType: unix.AF_INET, TimeOut: 1000,
			Forward: netlink.IPTuple{SrcIP: from, DstIP: to, SrcPort: 1000, DstPort: 80, Protocol: unix.IPPROTO_UDP},
			Reverse: netlink.IPTuple{SrcIP: n.layout.guest, DstIP: from, SrcPort: 80, DstPort: 1000, Protocol: unix.IPPROTO_UDP},
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	call := func(from TunnelKey, name, link string, to spot, want int) {
		t.Helper()
		if code := calls(t, n, from, "anchor/"+name, anchorCall{linkCall{"ark0", link}, vm, to}); code != want {
			t.Errorf("%s: %d; want %d", name, code, want)
		}
	}
	leads := func(link string, links ...string) {
		t.Helper()
		if err := n.keepAnchor("ark0"); err != nil {
			t.Error(err)
		}
		a, _, err := findAnchor("ark0")
		if err != nil || a == nil || a.Link != link {
			t.Fatalf("it is %+v, %v; want that it leads by %s", a, err, link)
		}
		var names []string
		err = inNamespace("ark0", func() (err error) {
			names, err = listAnchorLinks(landingLinks)
			route, rerr := linkTowards(n.layout.guest)
			if route != toLanding(link) {
				t.Errorf("packets take %s", route)
			}
			return errors.Join(err, rerr)
		})
		slices.Sort(names)
		for i, l := range links {
			links[i] = toLanding(l)
		}
		if err != nil || !slices.Equal(names, links) {
			t.Errorf("there are links %v, %v; want %v", names, err, links)
		}
	}
	there := spot{"ark3", &otherEnd}
	call(otherEnd.Key, "connect", next, there, http.StatusConflict) // the VM is not there
	call(friendEnd.Key, "connect", next, there, http.StatusOK)
	other.awaits(t, "greet", struct{}{})
	n = restartKilled(t, n)
	leads(at, at, next)
	call(otherEnd.Key, "lead", next, there, http.StatusConflict)
	call(friendEnd.Key, "lead", "cccccc", there, http.StatusConflict) // no such link
	call(friendEnd.Key, "lead", "", spot{Netns: "ark0"}, http.StatusConflict)
	leads(at, at, next)
	call(friendEnd.Key, "lead", next, there, http.StatusOK)
	leads(next, at, next)
	// The other host says that the VM has not come, before the friend does.
	if code := calls(t, n, otherEnd.Key, "anchor/leave", linkCall{"ark0", next}); code != http.StatusOK {
		t.Errorf("the end of the landing is answered with %d", code)
	}
	leads(at, at)
	call(friendEnd.Key, "connect", next, there, http.StatusOK)
	call(friendEnd.Key, "lead", next, spot{Netns: "ark1"}, http.StatusOK) // it leads to where it was made for
	if a, err := anchorOf("ark0"); err != nil || a.Where() != "ark3 on 192.0.2.8" {
		t.Errorf("it leads to %+v, %v", a, err)
	}
	call(friendEnd.Key, "lead", at, spot{Netns: "ark7"}, http.StatusOK) // a rescue
	leads(at, at, next)
	// It comes home, as far as the friend can tell, whose link ends before it is there.
	claim, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claim.expect(&friendEnd); err != nil {
		t.Fatal(err)
	}
	call(friendEnd.Key, "lead", "", spot{Netns: "ark0"}, http.StatusOK)
	if err := n.keepAnchor("ark0"); err != nil {
		t.Error(err)
	}
	call(friendEnd.Key, "lead", at, spot{Netns: "ark7"}, http.StatusOK) // a rescue
	leads(at, at)
	call(friendEnd.Key, "connect", next, there, http.StatusOK)
	call(friendEnd.Key, "lead", next, there, http.StatusOK)
	if code := calls(t, n, friendEnd.Key, "anchor/leave", linkCall{"ark0", at}); code != http.StatusOK {
		t.Errorf("the end of the move is answered with %d", code)
	}
	leads(next, next)
	call(friendEnd.Key, "lead", next, spot{Netns: "ark7"}, http.StatusConflict) // it has left
	if code := calls(t, n, friendEnd.Key, "anchor/leave", linkCall{"ark0", next}); code != http.StatusConflict {
		t.Errorf("one where the VM was ends its anchor: %d", code)
	}
	leads(next, next)
	// It comes home. The link ends before it is there, and its connections go on.
	if _, err := claim.expect(&otherEnd); err != nil {
		t.Fatal(err)
	}
	call(otherEnd.Key, "lead", "", spot{Netns: "ark0"}, http.StatusOK)
	if code := calls(t, n, otherEnd.Key, "anchor/leave", linkCall{"ark0", next}); code != http.StatusOK {
		t.Errorf("the end of the move home is answered with %d", code)
	}
	if err := n.keepAnchor("ark0"); err != nil {
		t.Error(err)
	}
	tracked, err := connectionsIn("ark0")
	if err != nil {
		t.Fatal(err)
	}
	defer tracked.Close()
	if flows, err := guestFlows(tracked, n.layout); len(flows) != 1 || err != nil {
		t.Errorf("there are connections %v, %v", flows, err)
	}
	if err := claim.Landed(); err != nil {
		t.Error(err)
	}
	if a, strays, err := findAnchor("ark0"); a != nil || len(strays) > 0 || err != nil {
		t.Error(a, strays, err)
	}
	if err := claim.Close(); err != nil {
		t.Error(err)
	}
}

// An end of the tunnel that answers is not moved by who knows its key.
func TestKnownEnd(t *testing.T) {
	need.Root(t)
	n := startTunnelNAT(t)
	if calls(t, n, n.tunnel.End.Key, "meet", friendEnd) != http.StatusOK {
		t.Fatal("not met")
	}
	moved := friendEnd
	moved.Address = "192.0.2.66"
	known := func() string { return n.tunnel.record.Peers[friendEnd.Key].Address }
	if calls(t, n, n.tunnel.End.Key, "meet", moved) != http.StatusOK || known() != moved.Address {
		t.Errorf("one that does not answer is at %s", known())
	}
	newOtherNAT(t, friendEnd)
	if calls(t, n, n.tunnel.End.Key, "meet", friendEnd) != http.StatusOK || known() != moved.Address {
		t.Errorf("one that answers is at %s", known())
	}
}

// What comes by a link reaches the guest, and nobody else by way of its namespace.
func TestLandingReachesGuestOnly(t *testing.T) {
	need.Root(t)
	n := startTunnelNAT(t)
	claim, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claim.expect(&friendEnd); err != nil {
		t.Fatal(err)
	}
	land := landCall{Netns: "ark0", Link: "3fa2c1", VM: uuid.New(), Anchor: spot{Netns: "ark7"}}
	if calls(t, n, n.tunnel.End.Key, "meet", friendEnd) != http.StatusOK || calls(t, n, friendEnd.Key, "land", land) != http.StatusOK {
		t.Fatal("no landing")
	}
	var packets net.PacketConn
	if err := inNamespace(testhost.Outside, func() (err error) { packets, err = net.ListenPacket("udp4", "192.0.2.254:9"); return err }); err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	friend := &port{linkEnd: linkEnd{n.tunnel.End.Key.ip(), 0x3fa2c1}}
	for _, from := range []net.IP{n.layout.guest, net.IPv4(192, 0, 2, 254)} {
		packet := udpPacket(from, net.IPv4(192, 0, 2, 254), 9)
		b := make([]byte, wireOffset+linkHeader, 65535)
		friend.head(friendEnd.Key.ip(), b[wireOffset:], len(packet), 0, 0, false)
		if _, err := n.tunnel.wire.Write([][]byte{append(b, packet...)}, wireOffset); err != nil {
			t.Error(err)
		}
	}
	packets.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if _, from, err := packets.ReadFrom(make([]byte, 100)); err == nil {
		t.Errorf("what came by the link arrives outside from %s", from)
	}
	if err := claim.Close(); err != nil {
		t.Error(err)
	}
}

// udpPacket is an IPv4 packet (RFC 791) with a datagram (RFC 768) that has no checksum.
func udpPacket(from, to net.IP, port uint16) []byte {
	p := make([]byte, 20+8+5)
	p[0], p[3], p[8], p[9] = 4<<4|5, byte(len(p)), 64, unix.IPPROTO_UDP
	copy(p[12:], from.To4())
	copy(p[16:], to.To4())
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(p[i])<<8 | uint32(p[i+1])
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum+sum>>16))
	binary.BigEndian.PutUint16(p[20:], 1000)
	binary.BigEndian.PutUint16(p[22:], port)
	binary.BigEndian.PutUint16(p[24:], 8+5)
	return p
}

// A guest may have more connections than one message of nftables holds.
func TestTellMany(t *testing.T) {
	need.Root(t)
	startNAT(t, testConfig())
	if err := connectAnchor("ark0", "ark1", "3fa2c1", "tap0"); err != nil {
		t.Fatal(err)
	}
	var keys [][]byte
	for i := range 2 * mostConnections {
		keys = append(keys, connectionKey(netlink.IPTuple{Protocol: unix.IPPROTO_TCP, SrcPort: 80, DstIP: net.IPv4(10, 0, byte(i>>8), byte(i)), DstPort: 1000}))
	}
	if err := inNamespace("ark1", func() error { return addConnections("3fa2c1", keys) }); err != nil {
		t.Error(err)
	}
	if err := dropLink("ark0", toLanding("3fa2c1")); err != nil {
		t.Error(err)
	}
	if err := dropLink("ark1", fromAnchor("3fa2c1")); err != nil {
		t.Error(err)
	}
}

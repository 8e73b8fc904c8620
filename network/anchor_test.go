package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/vishvananda/netlink"

	"drafter/internal/await"
	"drafter/internal/need"
	"drafter/internal/testhost"
)

// traveller is a guest that moves from tap to tap.
type traveller struct {
	t     *testing.T
	ns    string // its own
	eth   *os.File
	vm    uuid.UUID
	claim *Claim
	tap   *os.File
	where string
	stop  chan struct{} // closed to pause
	wait  sync.WaitGroup

	egress []string // where it goes next
}

// newTraveller starts a guest in ark0.
func newTraveller(t *testing.T) *traveller {
	t.Helper()
	g := &traveller{t: t, ns: "traveller", vm: uuid.New()}
	if err := createNamespace(g.ns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := deleteNamespace(g.ns); err != nil {
			t.Error(err)
		}
	})
	g.eth = openTap(t, g.ns, "eth0")
	setUpGuest(t, g.ns)
	g.claim, g.tap = g.claims("ark0", false)
	g.where = "ark0"
	g.run()
	t.Cleanup(func() {
		if g.stop != nil {
			g.pause()
		}
		if err := errors.Join(g.tap.Close(), g.eth.Close(), g.claim.Close()); err != nil {
			t.Error(err)
		}
	})
	return g
}

// claims takes a namespace and its tap.
func (g *traveller) claims(ns string, lands bool) (*Claim, *os.File) {
	g.t.Helper()
	claim, err := ClaimNamespace(ns)
	if err == nil {
		err = GuardGuest(ns, Guest{VM: g.vm, MAC: testConfig().NamespaceInterfaceMAC, Lands: lands, Egress: g.egress})
	}
	if err != nil {
		g.t.Fatal(err)
	}
	tap := openTap(g.t, ns, "tap0")
	awaitOccupied(g.t, ns)
	return claim, tap
}

// run passes frames on until the guest pauses.
func (g *traveller) run() {
	g.stop = make(chan struct{})
	for _, way := range [][2]*os.File{{g.tap, g.eth}, {g.eth, g.tap}} {
		g.wait.Go(func() {
			buf := make([]byte, 1<<17)
			for {
				n, err := way[0].Read(buf)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					return
				}
				if err != nil {
					g.t.Error(err)
					return
				}
				way[1].Write(buf[:n]) // a frame that does not fit is lost, as on a wire
			}
		})
	}
}

func (g *traveller) pause() {
	for _, f := range []*os.File{g.tap, g.eth} {
		f.SetReadDeadline(time.Unix(1, 0))
	}
	g.wait.Wait()
	for _, f := range []*os.File{g.tap, g.eth} {
		f.SetReadDeadline(time.Time{})
	}
	close(g.stop)
	g.stop = nil
}

// departs begins a move to the namespace of a claim.
func (g *traveller) departs(to *Claim) *Departure {
	g.t.Helper()
	landing, err := to.Landing(nil)
	if err != nil || landing == nil {
		g.t.Fatal(landing, err)
	}
	d, err := g.claim.Depart(g.vm, *landing, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	return d
}

// move moves the guest, which is away for a moment.
func (g *traveller) move(to string) {
	t := g.t
	t.Helper()
	claim, tap := g.claims(to, true)
	d := g.departs(claim)
	if err := d.Switch(); err != nil {
		t.Fatal(err)
	}
	g.pause()
	if err := d.Tell(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	left, leftTap := g.claim, g.tap
	g.claim, g.tap, g.where = claim, tap, to
	g.run()
	if err := errors.Join(d.Close(), leftTap.Close(), left.Close()); err != nil {
		t.Fatal(err)
	}
}

// talk is a connection on which all that is said comes back.
type talk struct {
	name string
	c    net.Conn
	said int
}

func dialTalk(t testing.TB, name, ns, network, addr string) *talk {
	t.Helper()
	k := &talk{name: name}
	dial := func() (err error) { k.c, err = net.DialTimeout(network, addr, 2*time.Second); return err }
	err := error(nil)
	if ns == "" {
		err = dial()
	} else {
		err = inNamespace(ns, dial)
	}
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	t.Cleanup(func() { k.c.Close() })
	return k
}

// goesOn tells what keeps the connection from going on.
func (k *talk) goesOn() error {
	k.said++
	line := fmt.Sprintf("%s %d", k.name, k.said)
	k.c.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.WriteString(k.c, line); err != nil {
		return err
	}
	b := make([]byte, len(line))
	if _, err := io.ReadFull(k.c, b); err != nil {
		return err
	}
	if string(b) != line {
		return fmt.Errorf("said %q, and heard %q", line, b)
	}
	return nil
}

// echoPackets answers what it hears by UDP.
func echoPackets(t *testing.T, ns, addr string) {
	t.Helper()
	var p net.PacketConn
	if err := inNamespace(ns, func() (err error) { p, err = net.ListenPacket(over("udp", addr), addr); return err }); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			p.WriteTo(buf[:n], from)
		}
	}()
	t.Cleanup(func() { p.Close(); <-done })
}

// Connections of both directions go on wherever the guest moves, home included, and new ones begin
// both at its anchors and where it is.
func TestAnchors(t *testing.T) {
	need.Root(t)
	byBoth(t, testAnchors)
}

func testAnchors(t *testing.T, v func(string) string) {
	c := testConfig()
	c.NamespaceCount = 3
	startNAT(t, c)
	g := newTraveller(t)
	echoServer(t, g.ns, v("172.16.0.2:7"))
	echoPackets(t, g.ns, v("172.16.0.2:7"))
	echoServer(t, testhost.Outside, v("192.0.2.254:7"))
	echoPackets(t, testhost.Outside, v("192.0.2.254:7"))
	var forwards []PortForward
	for i, ns := range []string{"ark0", "ark1", "ark2"} {
		for _, protocol := range []string{"tcp", "udp"} {
			for _, ip := range []string{"127.0.0.1", "192.0.2.1"} {
				forwards = append(forwards, PortForward{Netns: ns, InternalPort: "7", Protocol: protocol, ExternalAddr: v(fmt.Sprintf("%s:%d", ip, 7000+i))})
			}
		}
	}
	f, err := StartForwarder(ForwarderConfig{HostVethCIDR: c.HostVethCIDR, PortForwards: possible(forwards...)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}()
	var talks []*talk
	open := func(port int) {
		t.Helper()
		at := fmt.Sprintf(" at %d in %s", port, g.where)
		for _, network := range []string{v("tcp4"), v("udp4")} {
			toHost := v(fmt.Sprintf("127.0.0.1:%d", port))
			if !asks(network, toHost) {
				toHost = v(fmt.Sprintf("192.0.2.1:%d", port))
			}
			talks = append(
				talks,
				dialTalk(t, network+" of the host"+at, "", network, toHost),
				dialTalk(t, network+" of others"+at, testhost.Outside, network, v(fmt.Sprintf("192.0.2.1:%d", port))),
				dialTalk(t, network+" of the guest"+at, g.ns, network, v("192.0.2.254:7")),
			)
		}
	}
	goOn := func(after string) {
		t.Helper()
		for _, k := range talks {
			if err := k.goesOn(); err != nil {
				t.Errorf("after %s: %s: %v", after, k.name, err)
			}
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	open(7000)
	goOn("the start")
	for _, to := range []string{"ark1", "ark2", "ark0", "ark2", "ark1", "ark0"} {
		g.move(to)
		goOn("a move to " + to)
		open(7000) // an anchor, or where it is
		if len(talks) < 40 {
			open(7001)
		}
		goOn("new connections in " + to)
	}
	g.move("ark1")
	goOn("a last move")
	for _, ns := range []string{"ark0", "ark1"} {
		if err := inNamespace(ns, func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range talks {
		if _, udp := k.c.(*net.UDPConn); udp && k.c.LocalAddr().(*net.UDPAddr).IP.String() == v("172.16.0.2") {
			if err := k.goesOn(); err != nil {
				t.Errorf("after it was quiet: %s: %v", k.name, err)
			}
		}
	}
}

// Anchors go on under the next NAT, when theirs was killed.
func TestAnchorAfterKilledNAT(t *testing.T) {
	need.Root(t)
	before := inventory(t)
	killNAT(t)
	var n *NAT
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if after := inventory(t); after != before {
			t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
		}
	})
	g := newTraveller(t)
	echoServer(t, g.ns, "172.16.0.2:7")
	echoServer(t, g.ns, ipv6("172.16.0.2:7"))
	k := dialTalk(t, "host", "", "tcp4", "10.0.15.1:7")
	k6 := dialTalk(t, "host", "", "tcp6", ipv6("10.0.15.1:7"))
	g.move("ark1")
	var err error
	if n, err = StartNAT(context.Background(), testConfig()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(k.goesOn(), k6.goesOn()); err != nil {
		t.Error(err)
	}
	g.move("ark0")
	if err := errors.Join(k.goesOn(), k6.goesOn()); err != nil {
		t.Error(err)
	}
}

// A move that is given up, before the guest is there, changes nothing.
func TestDepartureGivenUp(t *testing.T) {
	need.Root(t)
	byBoth(t, testDepartureGivenUp)
}

func testDepartureGivenUp(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	g := newTraveller(t)
	echoServer(t, g.ns, v("172.16.0.2:7"))
	k := dialTalk(t, "host", "", v("tcp4"), v("10.0.15.1:7"))
	for _, switched := range []bool{false, true} {
		before := inventory(t)
		claim, err := ClaimNamespace("ark1")
		if err != nil {
			t.Fatal(err)
		}
		d := g.departs(claim)
		if err := k.goesOn(); err != nil {
			t.Error(err)
		}
		if switched {
			err = errors.Join(d.Switch(), d.Back())
		}
		if err := errors.Join(err, d.Close(), claim.Close()); err != nil {
			t.Fatal(err)
		}
		if err := k.goesOn(); err != nil {
			t.Errorf("switched: %t: %v", switched, err)
		}
		if after := inventory(t); after != before {
			t.Errorf("switched: %t: left behind:\n%s\nbefore:\n%s", switched, after, before)
		}
	}
}

// A VM that was lost where it moved to goes on where it was, and is reached there.
func TestTakenBack(t *testing.T) {
	need.Root(t)
	byBoth(t, testTakenBack)
}

func testTakenBack(t *testing.T, v func(string) string) {
	startNAT(t, testConfig())
	g := newTraveller(t)
	echoServer(t, g.ns, v("172.16.0.2:7"))
	claim, err := ClaimNamespace("ark1")
	if err != nil {
		t.Fatal(err)
	}
	d := g.departs(claim)
	if err := errors.Join(d.Switch(), d.Tell(), d.Close(), g.claim.Occupy()); err != nil {
		t.Fatal(err)
	}
	reached := func() {
		t.Helper()
		if err := dialTalk(t, "host", "", v("tcp4"), v("10.0.15.1:7")).goesOn(); err != nil {
			t.Error(err)
		}
		if all, err := Anchors(); err != nil || len(all) > 0 {
			t.Error(all, err)
		}
	}
	reached()
	if err := claim.Close(); err != nil {
		t.Error(err)
	}
	reached()
}

// A VM does not get what was sent to one that was killed where it begins.
func TestAnchorOfKilledVM(t *testing.T) {
	need.Root(t)
	byBoth(t, testAnchorOfKilledVM)
}

func testAnchorOfKilledVM(t *testing.T, v func(string) string) {
	n := startNAT(t, testConfig())
	endWatch(t, &n.watch) // it would end the anchor, later
	g := newTraveller(t)
	echoServer(t, g.ns, v("172.16.0.2:7"))
	k := dialTalk(t, "host", "", v("tcp4"), v("10.0.15.1:7"))
	g.move("ark1")
	if err := k.goesOn(); err != nil {
		t.Fatal(err)
	}
	// Its process is killed: nothing but its lock and its tap end.
	g.pause()
	if err := errors.Join(g.claim.lock.Release(), g.tap.Close()); err != nil {
		t.Fatal(err)
	}
	g.vm = uuid.New()
	g.claim, g.tap = g.claims("ark1", false)
	g.run()
	if all, err := Anchors(); err != nil || len(all) > 0 {
		t.Error(all, err)
	}
	if err := k.goesOn(); err == nil {
		t.Error("the other VM answers on the connection")
	}
}

// An anchor ends with its last connection, and its namespace is free again.
func TestAnchorEnds(t *testing.T) {
	need.Root(t)
	byBoth(t, testAnchorEnds)
}

func testAnchorEnds(t *testing.T, v func(string) string) {
	n := startNAT(t, testConfig())
	g := newTraveller(t)
	echoServer(t, g.ns, v("172.16.0.2:7"))
	k := dialTalk(t, "host", "", v("tcp4"), v("10.0.15.1:7"))
	g.move("ark1")
	if err := k.goesOn(); err != nil {
		t.Fatal(err)
	}
	if all, err := Anchors(); err != nil || len(all) != 1 || all[0].Netns != "ark0" || all[0].To != "ark1" || all[0].VM != g.vm {
		t.Fatal(all, err)
	}
	if _, _, err := n.Claim(); !errors.Is(err, ErrInUse) {
		t.Errorf("an anchor was taken for free: %v", err)
	}
	const want = `
		# HELP drafter_anchor_connections Connections of a VM that has moved that go on by way of the namespace that it has left.
		# TYPE drafter_anchor_connections gauge
		drafter_anchor_connections{namespace="ark0",to="ark1"} 1
	`
	if err := testutil.CollectAndCompare(n.Metrics(), strings.NewReader(want), "drafter_anchor_connections"); err != nil {
		t.Error(err)
	}
	if err := GuardGuest("ark0", Guest{VM: uuid.New()}); !errors.Is(err, ErrInUse) {
		t.Errorf("another VM took an anchor: %v", err)
	}
	k.c.Close()
	await.None(t, "the anchor ends", func() string {
		all, err := Anchors()
		if err != nil || len(all) > 0 {
			return fmt.Sprint(all, err)
		}
		return ""
	})
	_, claim, err := n.Claim()
	if err != nil {
		t.Fatal(err)
	}
	if err := claim.Close(); err != nil {
		t.Error(err)
	}
}

// A VM that moves to where guests have no IPv6 keeps its connections by IPv4.
func TestAnchorWithoutIPv6(t *testing.T) {
	need.Root(t)
	startNAT(t, testConfig())
	without := otherConfig()
	without.IPv6 = false
	startNAT(t, without)
	g := newTraveller(t)
	for _, addr := range []string{"172.16.0.2:7", ipv6("172.16.0.2:7")} {
		echoServer(t, g.ns, addr)
	}
	k, k6 := dialTalk(t, "host", "", "tcp4", "10.0.15.1:7"), dialTalk(t, "host by IPv6", "", "tcp6", ipv6("10.0.15.1:7"))
	for _, to := range []string{"bee0", "ark0"} {
		g.move(to)
		if err := k.goesOn(); err != nil {
			t.Errorf("in %s: %v", to, err)
		}
	}
	k6.c.Close()
	if err := dialTalk(t, "host by IPv6", "", "tcp6", ipv6("10.0.15.1:7")).goesOn(); err != nil {
		t.Error(err)
	}
	err := inNamespace("ark0", func() error { return addConnections("000000", [][]byte{make([]byte, 20)}) })
	if err == nil || !strings.Contains(err.Error(), "no key of a connection") {
		t.Errorf("a key that is none: %v", err)
	}
}

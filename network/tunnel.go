package network

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sync/singleflight"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"drafter/internal/newfile"
	"drafter/internal/rundir"
)

// A VM that moves to another host keeps its connections, too. NATs send what belongs to anchors to
// one another with WireGuard. Each link from an anchor to a landing has a TUN interface at both ends,
// because all guests have the same address:
//
//	ark0 ── to-3fa2c1 ── NAT ══ UDP between the hosts ══ NAT ── from-3fa2c1 ── ark0
//
// NATs call one another through the tunnel, too. Its own interface has a network namespace, so that
// its addresses are nobody else's.

// TunnelKey is the public key of a tunnel's end.
type TunnelKey [32]byte

// MarshalText returns base64, as WireGuard's own tools write keys.
func (k TunnelKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads base64.
func (k *TunnelKey) UnmarshalText(text []byte) error {
	b, err := base64.StdEncoding.DecodeString(string(text))
	if err != nil || len(b) != len(k) {
		return fmt.Errorf("%.60q is no key of a tunnel", text)
	}
	copy(k[:], b)
	return nil
}

func (k TunnelKey) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// ip is the end's address in the tunnel. Two ends have the same once in two billion times.
func (k TunnelKey) ip() netip.Addr {
	h := sha256.Sum256(k[:])
	return netip.AddrFrom4([4]byte{1 + h[0]%126, h[1], h[2], h[3]}) // 1.0.0.0 to 126.255.255.255
}

// TunnelEnd is how others reach a NAT's end of the tunnel.
type TunnelEnd struct {
	Key     TunnelKey `json:"key"`
	Address string    `json:"address"` // of its host; "" for the one that a migration leads to
	Port    int       `json:"port"`    // UDP
}

// check refuses an end that another host has told of.
func (e TunnelEnd) check() error {
	// A zone may hold anything, also lines for WireGuard.
	addr, err := netip.ParseAddr(e.Address)
	addr = addr.Unmap()
	here := addr.Is4() && (addr.As4()[0] == 0 || addr.As4() == [4]byte{255, 255, 255, 255}) // RFC 1122, 3.2.1.3
	if e.Address != "" && (err != nil || addr.Zone() != "" || addr.IsUnspecified() || addr.IsMulticast() || addr.IsLoopback() || here) {
		return fmt.Errorf("the address %.60q of a tunnel's end is no IP address of a host", e.Address)
	}
	if e.Port < 1 || e.Port > 65535 {
		return fmt.Errorf("the port %d of a tunnel's end is no UDP port", e.Port)
	}
	return nil
}

func (e TunnelEnd) endpoint() string { return net.JoinHostPort(e.Address, fmt.Sprint(e.Port)) }

// At returns the end as it is reached at an address, unless it names its own.
func (e TunnelEnd) At(addr net.Addr) TunnelEnd {
	if tcp, ok := addr.(*net.TCPAddr); ok && e.Address == "" {
		e.Address = tcp.AddrPort().Addr().Unmap().String()
	}
	return e
}

const (
	// tunnelMTU fits into the least that IPv6 has (1280, RFC 8200), with IPv6, UDP and WireGuard
	// around it: 40 + 8 + 32 bytes.
	tunnelMTU = 1200
	// guestMTU is that of the links of an anchor, as it is of all that a guest sends.
	guestMTU = 1500
	// tunnelPort is that of calls between NATs, in the tunnel.
	tunnelPort = 7
	tunnelTUN  = "wg0"
)

// tunnel is a NAT's end of the tunnels to others.
type tunnel struct {
	*tunnelAccess
	nat        *NAT
	log        *slog.Logger
	device     *device.Device
	wire       *wire
	server     *http.Server
	serve      sync.WaitGroup
	rousing    singleflight.Group
	mu         sync.Mutex // guards what follows
	record     tunnelRecord
	met        map[TunnelKey]time.Time
	introduced map[TunnelKey]bool                 // of which another host has told: they are known as long as there is a link
	calls      map[netip.Addr]*semaphore.Weighted // of who calls
	delivering map[TunnelKey]bool                 // hosts to which notices are given
	closed     bool
	end        time.Time // of notices, once it is closed
}

// tunnelRecord is kept on disk, so that the next NAT goes on with it.
type tunnelRecord struct {
	Private []byte
	Peers   map[TunnelKey]TunnelEnd
}

func tunnelName(prefix string) string { return prefix + "-tunnel" }

func (c *NATConfig) tunnelRecordPath() string {
	return filepath.Join(rundir.Path, "tunnel-"+c.NamespacePrefix+".json")
}

// startTunnel makes the NAT's end of the tunnels, or takes up the one that a killed NAT has left.
func (n *NAT) startTunnel() (err error) {
	name := tunnelName(n.config.NamespacePrefix)
	if n.config.TunnelPort == 0 {
		return n.removeTunnel()
	}
	t := &tunnel{nat: n, log: n.config.Logger, met: map[TunnelKey]time.Time{}, introduced: map[TunnelKey]bool{}, calls: map[netip.Addr]*semaphore.Weighted{}, delivering: map[TunnelKey]bool{}}
	private, err := t.readRecord()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start tunnel: %w", err), t.close())
		}
	}()
	t.tunnelAccess = &tunnelAccess{Netns: name, End: TunnelEnd{Key: TunnelKey(private.PublicKey().Bytes()), Address: n.config.TunnelAddress, Port: n.config.TunnelPort}, nat: t}
	if ours, merr := madeHere(name); merr != nil || !ours {
		if _, err := os.Lstat(filepath.Join(netnsDir, name)); err == nil {
			return fmt.Errorf("network namespace %q exists and is not ours; remove it, or choose another --namespace-prefix", name)
		}
		if err := createNamespace(name); err != nil {
			return err
		}
	}
	var listener net.Listener
	err = inNamespace(name, func() error {
		calls, err := openTUN(tunnelTUN, false)
		if err != nil {
			return err
		}
		t.wire = newWire(t.End.Key.ip(), calls, t.log)
		t.device = device.NewDevice(t.wire, conn.NewDefaultBind(), t.logger())
		listener, err = t.configure()
		return err
	})
	if err != nil {
		return err
	}
	err = t.device.IpcSet(fmt.Sprintf("private_key=%s\nlisten_port=%d\n",
		hex.EncodeToString(private.Bytes()), t.End.Port))
	if err == nil {
		err = t.device.Up()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("listen on UDP port %d: %w; choose another --tunnel-port", t.End.Port, err), listener.Close())
	}
	if err := t.takeLinks(); err != nil {
		return errors.Join(err, listener.Close())
	}
	for key, end := range t.record.Peers {
		t.met[key] = time.Now()
		if err := t.addPeer(end); err != nil {
			return errors.Join(err, listener.Close())
		}
		// It may hold a session with the NAT that was killed, and would wait for its answers.
		if p := t.device.LookupPeer(device.NoisePublicKey(end.Key)); p != nil {
			if err := p.SendHandshakeInitiation(false); err != nil {
				t.log.Debug("Greet the other end of a tunnel", "error", err)
			}
		}
	}
	t.server = &http.Server{
		Handler: t.handler(), ReadTimeout: callTimeout, WriteTimeout: 5 * callTimeout, IdleTimeout: 2 * idleCaller, MaxHeaderBytes: 4 << 10,
	}
	listener = netutil.LimitListener(listener, mostCallers)
	t.serve.Go(func() {
		if err := t.server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			t.log.Error("The tunnel takes no calls any more; VMs that move to other hosts lose their connections", "error", err)
		}
	})
	n.tunnel, n.record.Tunnel = t, t.tunnelAccess
	return n.writeRecord()
}

func (t *tunnel) logger() *device.Logger {
	return &device.Logger{
		Verbosef: device.DiscardLogf,
		Errorf: func(format string, args ...any) {
			t.log.Debug("A tunnel has trouble", "error", fmt.Sprintf(format, args...))
		},
	}
}

// configure runs inside the tunnel's namespace.
func (t *tunnel) configure() (net.Listener, error) {
	wg, err := netlink.LinkByName(tunnelTUN)
	if err != nil {
		return nil, err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if _, tuntap := l.(*netlink.Tuntap); tuntap && l.Attrs().Name != tunnelTUN { // on its way to a namespace
			if err := netlink.LinkDel(l); err != nil {
				return nil, fmt.Errorf("remove %s: %w", l.Attrs().Name, err)
			}
		}
	}
	own := &net.IPNet{IP: t.End.Key.ip().AsSlice(), Mask: net.CIDRMask(32, 32)}
	if err := errors.Join(disableIPv6("all"), configureLink(lo), configureLink(wg, own)); err != nil {
		return nil, err
	}
	// A call that is lost is sent again soon; see handshake.go. The least that the kernel waits for
	// else is 200 ms, and twice as long each time.
	if err := setSysctl("net/ipv4/tcp_thin_linear_timeouts", "1"); err != nil {
		return nil, err
	}
	route := &netlink.Route{LinkIndex: wg.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, RtoMin: 50, RtoMinLock: true} // ms
	if err := netlink.RouteReplace(route); err != nil {
		return nil, fmt.Errorf("set route into the tunnel: %w", err)
	}
	if err := netlink.LinkSetMTU(wg, tunnelMTU); err != nil {
		return nil, fmt.Errorf("set MTU of %s: %w", tunnelTUN, err)
	}
	if err := tunnelRules(); err != nil {
		return nil, err
	}
	return net.Listen("tcp4", netip.AddrPortFrom(t.End.Key.ip(), tunnelPort).String())
}

// readRecord returns the private key: that of the last NAT, if it was killed, or a new one.
func (t *tunnel) readRecord() (*ecdh.PrivateKey, error) {
	b, err := os.ReadFile(t.nat.config.tunnelRecordPath())
	if err == nil {
		err = json.Unmarshal(b, &t.record)
	}
	if err == nil {
		return ecdh.X25519().NewPrivateKey(t.record.Private)
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read record of the tunnel: %w; remove %s", err, t.nat.config.tunnelRecordPath())
	}
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of the tunnel: %w", err)
	}
	t.record = tunnelRecord{Private: private.Bytes(), Peers: map[TunnelKey]TunnelEnd{}}
	return private, t.writeRecord()
}

func (t *tunnel) writeRecord() error {
	b, err := json.Marshal(t.record)
	if err == nil {
		err = newfile.WriteBytes(t.nat.config.tunnelRecordPath(), b)
	}
	if err != nil {
		return fmt.Errorf("record tunnel: %w", err)
	}
	return nil
}

// removeTunnel removes what the NAT, or the one before it, needed to go on with a tunnel.
func (n *NAT) removeTunnel() error {
	if _, err := os.Stat(n.config.tunnelRecordPath()); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	err := errors.Join(removeNamespace(tunnelName(n.config.NamespacePrefix), n.config.Logger), forgetList(noticeRecords, n.config.NamespacePrefix))
	if rerr := os.Remove(n.config.tunnelRecordPath()); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		err = errors.Join(err, fmt.Errorf("forget tunnel: %w", rerr))
	}
	return err
}

// close ends the tunnel. Its namespace and its record stay.
//
//nolint:contextcheck,nolintlint // for those that call it: the linters disagree
func (t *tunnel) close() error {
	if t == nil {
		return nil
	}
	var err error
	t.mu.Lock()
	t.closed = true
	t.end = time.Now().Add(callTimeout) // what is left to say goes then
	t.mu.Unlock()
	if t.server != nil {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		if err = t.server.Shutdown(ctx); errors.Is(err, context.DeadlineExceeded) {
			err = t.server.Close() // a call may hold on to its answer
		}
	}
	t.serve.Wait()
	if t.device != nil {
		t.device.Close()
	}
	if t.tunnelAccess != nil {
		t.tunnelAccess.close()
	}
	return err
}

const (
	mostPeers   = 1000 // ends that are known at a time
	mostCallers = 256  // connections to the calls' server
	idleCaller  = time.Minute
)

// meet adds another's end. An end that is known and answers stays where it is: to know its public key
// does not prove to be it.
func (t *tunnel) meet(end TunnelEnd) error {
	t.mu.Lock()
	known, ok := t.record.Peers[end.Key]
	t.mu.Unlock()
	if ok && known != end && end.Address != "" && heard(t.call(known, "greet", struct{}{}, nil)) {
		end = known
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if ok && (known == end || end.Address == "") {
		t.met[end.Key] = time.Now()
		return nil
	}
	if end.Key == t.End.Key {
		return errors.New("the other end of the tunnel is this NAT's own")
	}
	for key := range t.record.Peers {
		if key != end.Key && key.ip() == end.Key.ip() {
			return fmt.Errorf("the ends %s and %s of tunnels have the same address; restart one of their NATs", key, end.Key)
		}
	}
	if end.Key.ip() == t.End.Key.ip() {
		return errors.New("the other end of the tunnel has the same address; restart one of the NATs")
	}
	if len(t.record.Peers) >= mostPeers {
		return fmt.Errorf("this host's NAT knows %d others; it takes no more for a day", mostPeers)
	}
	before := t.record.Peers
	t.record.Peers = maps.Clone(before)
	t.record.Peers[end.Key] = end
	err := t.addPeer(end)
	if err == nil {
		err = t.writeRecord()
	}
	if err != nil {
		t.record.Peers = before
		return err
	}
	t.met[end.Key] = time.Now()
	return nil
}

// forgetPeers forgets ends with which nothing is exchanged any more.
func (t *tunnel) forgetPeers() error {
	if t == nil {
		return nil
	}
	needed := map[TunnelKey]bool{}
	anchors, err := Anchors()
	if err != nil {
		return err
	}
	for _, a := range anchors {
		if a.At != nil {
			needed[a.At.Key] = true
		}
	}
	for _, ns := range t.nat.created {
		landings, err := landingsOf(ns)
		if err != nil {
			return err
		}
		for _, l := range landings {
			needed[l.Anchor.Tunnel.Key] = true
		}
	}
	notices, err := t.notices()
	if err != nil {
		return err
	}
	for _, n := range notices {
		needed[n.To.Tunnel.Key] = true
	}
	linked := t.wire.peers()
	t.mu.Lock()
	defer t.mu.Unlock()
	peers := maps.Clone(t.record.Peers)
	maps.DeleteFunc(peers, func(key TunnelKey, _ TunnelEnd) bool {
		patience := linkPatience
		if t.introduced[key] {
			patience = 2 * callTimeout // its link is about to be made
		}
		return !needed[key] && !linked[key.ip()] && time.Since(t.met[key]) > patience
	})
	if len(peers) == len(t.record.Peers) {
		return nil
	}
	for key := range t.record.Peers {
		if _, ok := peers[key]; !ok {
			t.device.RemovePeer(device.NoisePublicKey(key))
			delete(t.met, key)
			delete(t.introduced, key)
			delete(t.calls, key.ip())
		}
	}
	t.record.Peers = peers
	return t.writeRecord()
}

// addPeer configures an end, as the configuration protocol of WireGuard's programs says
// (https://www.wireguard.com/xplatform/).
func (t *tunnel) addPeer(end TunnelEnd) error {
	endpoint := ""
	if end.Address != "" {
		addr, err := netip.ParseAddr(end.Address)
		if err != nil {
			return fmt.Errorf("find the other end of a tunnel: %w", err)
		}
		endpoint = fmt.Sprintf("endpoint=%s\n", netip.AddrPortFrom(addr.Unmap(), uint16(end.Port)))
	}
	err := t.device.IpcSet(fmt.Sprintf("public_key=%s\n%sreplace_allowed_ips=true\nallowed_ip=%s/32\n", hex.EncodeToString(end.Key[:]), endpoint, end.Key.ip()))
	if err != nil {
		return fmt.Errorf("add the other end of a tunnel: %w", err)
	}
	return nil
}

// introducing makes links to ends of which another host has told.
type introducing struct{ *tunnel }

func (t introducing) makeLink(ns, name, link string, other TunnelEnd) error {
	t.mu.Lock()
	if _, known := t.record.Peers[other.Key]; !known {
		t.introduced[other.Key] = true
	}
	t.mu.Unlock()
	return t.tunnel.makeLink(ns, name, link, other)
}

// makeLink makes this host's end of a link in a namespace.
func (t *tunnel) makeLink(ns, name, link string, other TunnelEnd) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create %s: %w", name, err)
		}
	}()
	number, err := linkNumber(link)
	if err == nil {
		err = t.meet(other)
	}
	if err != nil {
		return err
	}
	there, err := openNamespace(ns)
	if err != nil {
		return err
	}
	defer there.Close()
	var device tun.Device
	// Made here, because an open interface keeps the namespace alive from which it was opened.
	err = inNamespace(t.Netns, func() error {
		if device, err = openTUN(name, true); err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetAlias(l, namespaceMark+" "+other.Key.String()); err != nil { // for the next NAT
			return err
		}
		if err := netlink.LinkSetMTU(l, guestMTU); err != nil {
			return err
		}
		return netlink.LinkSetNsFd(l, int(there))
	})
	if err == nil {
		err = t.wire.add(linkEnd{other.Key.ip(), uint32(number)}, device)
	}
	if err != nil && device != nil {
		drop := func() error { return deleteAnchorLink(name) }
		err = errors.Join(err, device.Close(), inNamespace(t.Netns, drop), inNamespace(ns, drop))
	}
	return err
}

// takeLinks takes up the links that a killed NAT has left.
func (t *tunnel) takeLinks() error {
	for _, ns := range t.nat.created {
		err := inNamespace(ns, func() error {
			links, err := netlink.LinkList()
			if err != nil {
				return fmt.Errorf("list interfaces: %w", err)
			}
			for _, l := range links {
				if peer, ok := peerOf(l); ok {
					err = errors.Join(err, t.takeLink(l.Attrs().Name, peer))
				}
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("take up the links of network namespace %q: %w", ns, err)
		}
	}
	return nil
}

func (t *tunnel) takeLink(name string, peer TunnelKey) error {
	_, link, _ := strings.Cut(name, "-")
	number, err := linkNumber(link)
	if err != nil {
		return err
	}
	device, err := openTUN(name, true)
	if err != nil {
		return err
	}
	if err := t.wire.add(linkEnd{peer.ip(), uint32(number)}, device); err != nil {
		return errors.Join(err, device.Close())
	}
	return nil
}

// peerOf returns to whom a link of a namespace goes through the tunnel.
func peerOf(link netlink.Link) (peer TunnelKey, ok bool) {
	text, ok := strings.CutPrefix(link.Attrs().Alias, namespaceMark+" ")
	return peer, ok && peer.UnmarshalText([]byte(text)) == nil
}

// leadsTo tells whether a link of the calling thread's namespace goes through the tunnel to a host.
func leadsTo(name string, host TunnelKey) bool {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return false
	}
	peer, ok := peerOf(link)
	return ok && peer == host
}

// tunnelRules let calls in, in the calling thread's namespace.
func tunnelRules() error {
	r, err := newRuleset(nftables.TableFamilyIPv4, namespaceTable)
	if err != nil {
		return err
	}
	delivered := r.chain(hookDelivered)
	r.rule(delivered, fromInterface("lo"), accept())
	r.rule(delivered, toPort("tcp", tunnelPort), accept())
	r.answers(delivered)
	r.rule(delivered, drop())
	return r.apply()
}

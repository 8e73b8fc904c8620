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
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"drafter/internal/rundir"
)

// A VM that moves to another host keeps its connections, too. NATs send what belongs to anchors to
// one another with WireGuard, which has a network namespace of its own, so that its addresses are
// nobody else's. Each link from an anchor to a landing is a VXLAN in it (RFC 7348), because all
// guests have the same address:
//
//	ark0 ── to-3fa2c1 ── ark-tunnel ══ UDP between the hosts ══ ark-tunnel ── from-3fa2c1 ── ark0
//
// A packet of 1500 bytes goes as two fragments: the way between hosts may be as narrow as IPv6
// allows.

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
	if e.Address != "" && (err != nil || addr.Zone() != "" || addr.IsUnspecified() || addr.IsMulticast() || addr.IsLoopback()) {
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
	vxlanPort  = 4789 // RFC 7348, 8.1
	tunnelTUN  = "wg0"
)

// tunnel is a NAT's end of the tunnels to others.
type tunnel struct {
	*tunnelAccess
	nat        *NAT
	log        *slog.Logger
	device     *device.Device
	server     *http.Server
	serve      sync.WaitGroup
	mu         sync.Mutex // guards what follows
	record     tunnelRecord
	met        map[TunnelKey]time.Time
	calls      map[netip.Addr]int // that are answered, by who calls
	delivering map[TunnelKey]bool // hosts to which notices are given
	closed     bool
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
	t := &tunnel{nat: n, log: n.config.Logger, met: map[TunnelKey]time.Time{}, calls: map[netip.Addr]int{}, delivering: map[TunnelKey]bool{}}
	private, err := t.readRecord()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start tunnel: %w", err), t.close())
		}
	}()
	t.tunnelAccess = &tunnelAccess{Netns: name, End: TunnelEnd{Key: TunnelKey(private.PublicKey().Bytes()), Address: n.config.TunnelAddress, Port: n.config.TunnelPort}}
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
		wire, err := tun.CreateTUN(tunnelTUN, tunnelMTU)
		if err != nil {
			return fmt.Errorf("create %s: %w; is the kernel's tun module there?", tunnelTUN, err)
		}
		t.device = device.NewDevice(tunnelWire{wire}, conn.NewDefaultBind(), t.logger())
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
	if err := n.admitLinks(); err != nil {
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
	t.server = &http.Server{Handler: t.handler(), ReadTimeout: callTimeout, MaxHeaderBytes: 4 << 10, IdleTimeout: time.Minute}
	t.serve.Go(func() {
		if err := t.server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			t.log.Error("The tunnel takes no calls any more; VMs that move to other hosts lose their connections", "error", err)
		}
	})
	n.tunnel, n.record.Tunnel = t, t.tunnelAccess
	return n.writeRecord()
}

// tunnelWire has the MTU that it was made with. WireGuard would look for the interface in the host's
// namespace.
type tunnelWire struct{ tun.Device }

// MTU implements tun.Device.
func (tunnelWire) MTU() (int, error) { return tunnelMTU, nil }

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
		if _, half := l.(*netlink.Vxlan); half { // somebody was killed before it was where it belongs
			if err := netlink.LinkDel(l); err != nil {
				return nil, fmt.Errorf("remove %s: %w", l.Attrs().Name, err)
			}
		}
	}
	own := &net.IPNet{IP: t.End.Key.ip().AsSlice(), Mask: net.CIDRMask(32, 32)}
	if err := errors.Join(disableIPv6("all"), configureLink(lo), configureLink(wg, own)); err != nil {
		return nil, err
	}
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: wg.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}}); err != nil {
		return nil, fmt.Errorf("set route into the tunnel: %w", err)
	}
	// The rest of a packet that was lost must not become a part of a later one.
	if err := setSysctl("net/ipv4/ipfrag_time", "1"); err != nil {
		return nil, err
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
		err = replaceFile(t.nat.config.tunnelRecordPath(), b)
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

// mostPeers is of ends that are known at a time.
const mostPeers = 1000

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
	t.mu.Lock()
	defer t.mu.Unlock()
	peers := maps.Clone(t.record.Peers)
	maps.DeleteFunc(peers, func(key TunnelKey, _ TunnelEnd) bool { return !needed[key] && time.Since(t.met[key]) > linkPatience })
	if len(peers) == len(t.record.Peers) {
		return nil
	}
	for key := range t.record.Peers {
		if _, ok := peers[key]; !ok {
			t.device.RemovePeer(device.NoisePublicKey(key))
			delete(t.met, key)
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

// tunnelLink makes one end of a link by the tunnel in a namespace.
func (a *tunnelAccess) tunnelLink(ns, name, link string, other TunnelEnd, mac net.HardwareAddr) error {
	vni, err := linkNumber(link)
	if err != nil {
		return err
	}
	there, err := openNamespace(ns)
	if err != nil {
		return err
	}
	defer there.Close()
	err = inNamespace(a.Netns, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr, attrs.MTU = name, mac, guestMTU
		vxlan := &netlink.Vxlan{
			LinkAttrs: attrs, VxlanId: vni, SrcAddr: a.End.Key.ip().AsSlice(), Group: other.Key.ip().AsSlice(), Port: vxlanPort, UDPCSum: true,
		}
		if err := netlink.LinkAdd(vxlan); err != nil {
			return err
		}
		err := netlink.LinkSetNsFd(vxlan, int(there))
		if err == nil {
			err = admitLink(vxlan, true)
		}
		if err != nil {
			err = errors.Join(err, netlink.LinkDel(vxlan))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("create %s: %w", name, err)
	}
	return nil
}

// linksSet is the set of the tunnel's links, told apart by their other end's address and their number.
// The kernel itself takes what has the number from anybody.
const linksSet = "links"

// linkType is the type of a key of linksSet.
var linkType = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeMark)

// tunnelRules let in, in the calling thread's namespace, calls and what comes from links' other ends.
func tunnelRules() error {
	r, err := newRuleset(nftables.TableFamilyIPv4, namespaceTable)
	if err != nil {
		return err
	}
	set := &nftables.Set{Table: r.table, Name: linksSet, KeyType: linkType, Concatenation: true}
	if err := r.conn.AddSet(set, nil); err != nil {
		return fmt.Errorf("add set %s: %w", set.Name, err)
	}
	delivered := r.chain(hookDelivered)
	r.rule(delivered, fromInterface("lo"), accept())
	r.rule(delivered, toPort("tcp", tunnelPort), accept())
	r.rule(delivered, toPort("udp", vxlanPort), []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG32_00, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
		// The number is the fifth to seventh byte of VXLAN's header (RFC 7348, 5), after 8 of UDP's.
		&expr.Payload{DestRegister: unix.NFT_REG32_01, Base: expr.PayloadBaseTransportHeader, Offset: 8 + 4, Len: 3},
		&expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: set.Name, SetID: set.ID},
	}, accept())
	r.answers(delivered)
	r.rule(delivered, drop())
	return r.apply()
}

// admitLinks lets in what comes by the links that a killed NAT has left.
func (n *NAT) admitLinks() error {
	var links []*netlink.Vxlan
	for _, ns := range n.created {
		err := inNamespace(ns, func() error {
			all, err := netlink.LinkList()
			for _, l := range all {
				if vxlan, ok := l.(*netlink.Vxlan); ok && l.Attrs().Alias == namespaceMark {
					links = append(links, vxlan)
				}
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("list interfaces of network namespace %q: %w", ns, err)
		}
	}
	return inNamespace(tunnelName(n.config.NamespacePrefix), func() error {
		for _, l := range links {
			if err := admitLink(l, true); err != nil {
				return err
			}
		}
		return nil
	})
}

// admitLink lets in what comes by a link, or not any more, in the calling thread's namespace.
func admitLink(link *netlink.Vxlan, in bool) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	set := &nftables.Set{Table: &nftables.Table{Family: nftables.TableFamilyIPv4, Name: namespaceTable}, Name: linksSet, KeyType: linkType, Concatenation: true}
	vni := link.VxlanId
	elements := []nftables.SetElement{{Key: append(slices.Clone(link.Group.To4()), byte(vni>>16), byte(vni>>8), byte(vni), 0)}}
	if in {
		err = conn.SetAddElements(set, elements)
	} else {
		err = conn.SetDeleteElements(set, elements)
	}
	if err == nil {
		err = conn.Flush()
	}
	if errors.Is(err, unix.ENOENT) && !in {
		err = nil // the tunnel was made anew meanwhile
	}
	if err != nil {
		return fmt.Errorf("change set %s: %w", set.Name, err)
	}
	return nil
}

// leadsTo tells whether a link of the calling thread's namespace goes through the tunnel to an
// address there.
func leadsTo(name string, ip netip.Addr) bool {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return false
	}
	vxlan, ok := link.(*netlink.Vxlan)
	return ok && vxlan.Group.Equal(ip.AsSlice())
}

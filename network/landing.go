package network

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// hookMarked sees packets before they are routed, and once their connections are known.
var hookMarked = hook{"marked", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle}

// landingPrefix begins the name of a landing's table. The link's name follows.
const landingPrefix = "drafter-from-"

// connectionsOf returns the set of those connections of the guest that belong to an anchor, by IPv4 or
// IPv6. They are told apart by protocol, the guest's port, and the other end's address and port. There
// are no other sets in a transaction: the library would count a number up that all goroutines share.
func connectionsOf(table *nftables.Table, size int) *nftables.Set {
	set := &nftables.Set{ID: 1, Table: table, Name: "connections", KeyType: connectionType, Concatenation: true, Size: mostConnectionKeys}
	if size == net.IPv6len {
		set.ID, set.Name, set.KeyType = 2, "connections6", connectionType6
	}
	return set
}

// connectionType and connectionType6 are the types of the keys of these sets.
var (
	connectionType  = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeIPAddr, nftables.TypeInetService)
	connectionType6 = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeIP6Addr, nftables.TypeInetService)
)

// keyParts are the bytes of a key but for the address: protocol and two ports, each filled up to four.
const keyParts = 3 * 4

// mostConnectionKeys bounds the kernel's memory for what another host tells of.
const mostConnectionKeys = 1 << 17

// landingRules mark what belongs to an anchor: connections that come in from there, and those that
// the guest had before it moved. A packet that was on its way when the VM left may come by another
// anchor. It says nothing of a connection that is known here, and what the source has told decides.
func landingRules(link, tap string, mark uint32) error {
	r, err := newRuleset(rulesFamily(), landingPrefix+link)
	if err != nil {
		return err
	}
	c := r.chain(hookMarked)
	r.rule(c, fromInterface(fromAnchor(link)), connectionState(expr.CtStateBitNEW), markConnection(mark))
	for _, all := range []*net.IPNet{cidr("0.0.0.0/0"), cidr("::/0")} {
		size := len(all.Mask)
		set := connectionsOf(r.table, size)
		if err := r.conn.AddSet(set, nil); err != nil {
			return fmt.Errorf("add set %s: %w", set.Name, err)
		}
		// Each part of a key has registers of four bytes. TCP and UDP have their ports at 0 and 2.
		to := destination(all)
		to.DestRegister = unix.NFT_REG32_02
		r.rule(c, fromInterface(tap), protocolOf(all), []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG32_00},
			&expr.Payload{DestRegister: unix.NFT_REG32_01, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
			to,
			&expr.Payload{DestRegister: unix.NFT_REG32_02 + uint32(size/4), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: set.Name, SetID: set.ID},
		}, markConnection(mark))
	}
	r.rule(c, fromInterface(tap), ofConnection(mark), []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true},
	})
	return r.apply()
}

func markConnection(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(mark)},
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true},
	}
}

// ofConnection matches packets of connections that have a mark.
func ofConnection(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(mark)},
	}
}

// ofAnchor matches packets of connections that belong to an anchor.
func ofAnchor() []expr.Any {
	match := ofConnection(0)
	match[1].(*expr.Cmp).Op = expr.CmpOpNeq
	return match
}

// toSomeLanding matches packets that leave by a link to a landing, and fromSomeLanding those that
// come by one.
func toSomeLanding() []expr.Any   { return interfacesLike(expr.MetaKeyOIFNAME, landingLinks) }
func fromSomeLanding() []expr.Any { return interfacesLike(expr.MetaKeyIIFNAME, landingLinks) }

// toSomeAnchor and fromSomeAnchor are the same for links to anchors.
func toSomeAnchor() []expr.Any   { return interfacesLike(expr.MetaKeyOIFNAME, anchorLinks) }
func fromSomeAnchor() []expr.Any { return interfacesLike(expr.MetaKeyIIFNAME, anchorLinks) }

// interfacesLike matches interfaces whose names begin like that.
func interfacesLike(key expr.MetaKey, prefix string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(prefix)},
	}
}

// addConnections adds keys to what belongs to a link's anchor, in the calling thread's namespace.
func addConnections(link string, keys [][]byte) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Family: rulesFamily(), Name: landingPrefix + link}
	elements := map[int][]nftables.SetElement{net.IPv4len: nil, net.IPv6len: nil} // by the address's size
	for _, k := range keys {
		size := len(k) - keyParts
		if _, ok := elements[size]; !ok {
			return fmt.Errorf("fill table %s: %.40x is no key of a connection", table.Name, k)
		}
		elements[size] = append(elements[size], nftables.SetElement{Key: k})
	}
	const atOnce = 1000 // one netlink attribute holds 64 KiB
	for size, all := range elements {
		set := connectionsOf(table, size)
		for some := range slices.Chunk(all, atOnce) {
			err := conn.SetAddElements(set, some)
			if err == nil {
				err = conn.Flush() // one message holds some 5,000
			}
			if err != nil {
				return fmt.Errorf("fill set %s of table %s: %w", set.Name, table.Name, err)
			}
		}
	}
	return nil
}

// sweepLandingTables removes the tables of the calling thread's namespace for links that are not
// there.
func sweepLandingTables() error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	links, err := listAnchorLinks(anchorLinks) // after the tables, as they are made before them
	if err != nil {
		return err
	}
	for _, t := range tables {
		if link, ok := strings.CutPrefix(t.Name, landingPrefix); ok && !slices.Contains(links, fromAnchor(link)) {
			if err := deleteTable(t.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// guestFlows returns the guest's connections that a namespace tracks, but for those that belong to an
// anchor.
func guestFlows(tracked *netlink.Handle, l *layout) (flows []*netlink.ConntrackFlow, err error) {
	for _, p := range l.pools() {
		all, err := listConnections(tracked, p.family())
		if err != nil {
			return nil, err
		}
		for _, f := range all {
			tcp, _ := f.ProtoInfo.(*netlink.ProtoInfoTCP)
			ended := tcp != nil && tcp.State > tcpLastAck
			if f.Mark == 0 && !ended && (f.Forward.SrcIP.Equal(p.guest) || f.Reverse.SrcIP.Equal(p.guest)) {
				flows = append(flows, f)
			}
		}
	}
	return flows, nil
}

// connectionKeys returns the keys of the guest's TCP and UDP connections. Others need none: an echo
// that the guest asks for next begins a new connection.
func connectionKeys(tracked *netlink.Handle, l *layout) (keys [][]byte, err error) {
	flows, err := guestFlows(tracked, l)
	for _, f := range flows {
		tuple := f.Forward // as the guest sends
		if !slices.ContainsFunc(l.pools(), func(p *pool) bool { return tuple.SrcIP.Equal(p.guest) }) {
			tuple = f.Reverse
		}
		if tuple.Protocol == unix.IPPROTO_TCP || tuple.Protocol == unix.IPPROTO_UDP {
			keys = append(keys, connectionKey(tuple))
		}
	}
	return keys, err
}

// connectionKey is the key of a connection in its set, each part filled up to four bytes.
func connectionKey(t netlink.IPTuple) []byte {
	port := binaryutil.BigEndian.PutUint16
	k := []byte{t.Protocol, 0, 0, 0}
	k = append(append(k, port(t.SrcPort)...), 0, 0)
	k = append(k, host(t.DstIP).IP...)
	return append(append(k, port(t.DstPort)...), 0, 0)
}

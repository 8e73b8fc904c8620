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

// connectionsSet is the set of those connections of the guest that belong to an anchor. They are
// told apart by protocol, the guest's port, and the other end's address and port.
const connectionsSet = "connections"

// mostConnectionKeys bounds the kernel's memory for what another host tells of.
const mostConnectionKeys = 1 << 17

// connectionType is the type of a key of connectionsSet.
var connectionType = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeIPAddr, nftables.TypeInetService)

// landingRules mark what belongs to an anchor: connections that come in from there, and those that
// the guest had before it moved. A packet that was on its way when the VM left may come by another
// anchor. It says nothing of a connection that is known here, and what the source has told decides.
func landingRules(link, tap string, mark uint32) error {
	r, err := newRuleset(rulesFamily(), landingPrefix+link)
	if err != nil {
		return err
	}
	// The one set of its transaction. The library would count a number up that all goroutines share.
	set := &nftables.Set{ID: 1, Table: r.table, Name: connectionsSet, KeyType: connectionType, Concatenation: true, Size: mostConnectionKeys}
	if err := r.conn.AddSet(set, nil); err != nil {
		return fmt.Errorf("add set %s: %w", set.Name, err)
	}
	c := r.chain(hookMarked)
	r.rule(c, fromInterface(fromAnchor(link)), connectionState(expr.CtStateBitNEW), markConnection(mark))
	r.rule(c, fromInterface(tap), protocolIPv4(), []expr.Any{
		// Each part of a key has a register of four bytes. TCP and UDP have their ports at 0 and 2.
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG32_00},
		&expr.Payload{DestRegister: unix.NFT_REG32_01, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
		&expr.Payload{DestRegister: unix.NFT_REG32_02, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Payload{DestRegister: unix.NFT_REG32_03, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: set.Name, SetID: set.ID},
	}, markConnection(mark))
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
func toSomeLanding() []expr.Any   { return landingLink(expr.MetaKeyOIFNAME) }
func fromSomeLanding() []expr.Any { return landingLink(expr.MetaKeyIIFNAME) }

func landingLink(key expr.MetaKey) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(landingLinks)}, // how its name begins
	}
}

// addConnections adds keys to what belongs to a link's anchor, in the calling thread's namespace.
func addConnections(link string, keys [][]byte) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Family: rulesFamily(), Name: landingPrefix + link}
	set := &nftables.Set{Table: table, Name: connectionsSet, KeyType: connectionType, Concatenation: true}
	const atOnce = 1000 // one netlink attribute holds 64 KiB
	for len(keys) > 0 {
		n := min(len(keys), atOnce)
		var elements []nftables.SetElement
		for _, k := range keys[:n] {
			elements = append(elements, nftables.SetElement{Key: k})
		}
		if err := conn.SetAddElements(set, elements); err != nil {
			return fmt.Errorf("fill set %s: %w", set.Name, err)
		}
		keys = keys[n:]
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("fill set %s of table %s: %w", set.Name, table.Name, err)
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
func guestFlows(tracked *netlink.Handle, guest net.IP) (flows []*netlink.ConntrackFlow, err error) {
	all, err := listConnections(tracked)
	if err != nil {
		return nil, err
	}
	for _, f := range all {
		tcp, _ := f.ProtoInfo.(*netlink.ProtoInfoTCP)
		ended := tcp != nil && tcp.State > tcpLastAck
		if f.Mark == 0 && !ended && (f.Forward.SrcIP.Equal(guest) || f.Reverse.SrcIP.Equal(guest)) {
			flows = append(flows, f)
		}
	}
	return flows, nil
}

// connectionKeys returns the keys of the guest's TCP and UDP connections. Others need none: an echo
// that the guest asks for next begins a new connection.
func connectionKeys(tracked *netlink.Handle, guest net.IP) (keys [][]byte, err error) {
	flows, err := guestFlows(tracked, guest)
	for _, f := range flows {
		tuple := f.Forward // as the guest sends
		if !tuple.SrcIP.Equal(guest) {
			tuple = f.Reverse
		}
		if tuple.Protocol == unix.IPPROTO_TCP || tuple.Protocol == unix.IPPROTO_UDP {
			keys = append(keys, connectionKey(tuple))
		}
	}
	return keys, err
}

// connectionKeyLen is the length in bytes of a connectionKey.
const connectionKeyLen = 16

// connectionKey is the key of a connection in connectionsSet, each part filled up to four bytes.
func connectionKey(t netlink.IPTuple) []byte {
	port := binaryutil.BigEndian.PutUint16
	k := []byte{t.Protocol, 0, 0, 0}
	k = append(append(k, port(t.SrcPort)...), 0, 0)
	k = append(k, t.DstIP.To4()...)
	return append(append(k, port(t.DstPort)...), 0, 0)
}

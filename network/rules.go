package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ruleset collects the rules of one table of ours and applies them in one transaction.
type ruleset struct {
	conn  *nftables.Conn
	table *nftables.Table
}

// rulesFamily is the family of our tables. A kernel without IPv6 has no tables of inet.
func rulesFamily() nftables.TableFamily {
	if _, err := os.Stat(ipv6Settings); errors.Is(err, os.ErrNotExist) {
		return nftables.TableFamilyIPv4
	}
	return nftables.TableFamilyINet
}

// openRulesets opens nftables of the calling thread's network namespace, for transactions of thousands
// of messages. The kernel acknowledges each before the first acknowledgement is read.
func openRulesets() (*nftables.Conn, error) {
	const buffer = 4 << 20 // bytes
	conn, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetReadBuffer(buffer), c.SetWriteBuffer(buffer))
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return conn, nil
}

// newRuleset starts a ruleset for the calling thread's network namespace. A table of the same
// family and name is replaced. A table of family inet also replaces one of family ip, which older
// releases had.
func newRuleset(family nftables.TableFamily, table string) (*ruleset, error) {
	conn, err := openRulesets()
	if err != nil {
		return nil, err
	}
	replaced := []nftables.TableFamily{family}
	if family == nftables.TableFamilyINet {
		replaced = append(replaced, nftables.TableFamilyIPv4)
	}
	for _, f := range replaced {
		t := &nftables.Table{Family: f, Name: table}
		conn.AddTable(t) // so that the next line cannot fail
		conn.DelTable(t)
	}
	t := &nftables.Table{Family: family, Name: table}
	conn.AddTable(t)
	return &ruleset{conn, t}, nil
}

func (r *ruleset) apply() error {
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("apply nftables rules of table %s: %w; is the kernel's nf_tables module there?", r.table.Name, err)
	}
	return nil
}

// deleteTable removes a table of ours; one that does not exist is no error.
func deleteTable(table string) error {
	r, err := newRuleset(rulesFamily(), table)
	if err != nil {
		return err
	}
	r.conn.DelTable(r.table)
	return r.apply()
}

// hook is a place where rules see packets.
type hook struct {
	name     string
	kind     nftables.ChainType
	at       *nftables.ChainHook
	priority *nftables.ChainPriority
}

var (
	hookReceived  = hook{"received", nftables.ChainTypeFilter, nftables.ChainHookIngress, nftables.ChainPriorityFilter}
	hookRaw       = hook{"raw", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw}
	hookIncoming  = hook{"incoming", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest}
	hookLocal     = hook{"local", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest}
	hookForwarded = hook{"forwarded", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter}
	hookDelivered = hook{"delivered", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter}
	hookLeaving   = hook{"leaving", nftables.ChainTypeFilter, nftables.ChainHookPostrouting, nftables.ChainPriorityRef(*nftables.ChainPriorityNATSource + 1)}
	// Before the chains of others: the first that translates decides, and of those with one
	// priority it is the last that was made.
	hookOutgoing = hook{"outgoing", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityRef(*nftables.ChainPriorityNATSource - 1)}
)

// chain adds a chain at a hook.
func (r *ruleset) chain(h hook) *nftables.Chain { return r.chainOn(h, "") }

// chainOn adds a chain at a hook of one interface.
func (r *ruleset) chainOn(h hook, iface string) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{Name: h.name, Table: r.table, Type: h.kind, Hooknum: h.at, Priority: h.priority, Device: iface})
}

// subchain adds a chain that others continue at.
func (r *ruleset) subchain(name string) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{Name: name, Table: r.table})
}

// interfaces adds a set of interface names.
func (r *ruleset) interfaces(name string, names []string) (*nftables.Set, error) {
	set := &nftables.Set{Table: r.table, Name: name, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian}
	if err := r.conn.AddSet(set, nil); err != nil {
		return nil, fmt.Errorf("add set %s: %w", name, err)
	}
	// One netlink attribute holds 64 KiB.
	for chunk := range slices.Chunk(names, 500) {
		var elements []nftables.SetElement
		for _, n := range chunk {
			elements = append(elements, nftables.SetElement{Key: interfaceName(n)})
		}
		if err := r.conn.SetAddElements(set, elements); err != nil {
			return nil, fmt.Errorf("fill set %s: %w", name, err)
		}
	}
	return set, nil
}

// interfacePairs adds a set of pairs of an incoming and an outgoing interface that are the same.
func (r *ruleset) interfacePairs(name string, names []string) (*nftables.Set, error) {
	kind, err := nftables.ConcatSetType(nftables.TypeIFName, nftables.TypeIFName)
	if err != nil {
		return nil, fmt.Errorf("add set %s: %w", name, err)
	}
	set := &nftables.Set{Table: r.table, Name: name, KeyType: kind, KeyByteOrder: binaryutil.NativeEndian, Concatenation: true}
	if err := r.conn.AddSet(set, nil); err != nil {
		return nil, fmt.Errorf("add set %s: %w", name, err)
	}
	for chunk := range slices.Chunk(names, 500) {
		var elements []nftables.SetElement
		for _, n := range chunk {
			elements = append(elements, nftables.SetElement{Key: append(interfaceName(n), interfaceName(n)...)})
		}
		if err := r.conn.SetAddElements(set, elements); err != nil {
			return nil, fmt.Errorf("fill set %s: %w", name, err)
		}
	}
	return set, nil
}

// counters adds a set that counts connections for each of up to size interfaces. See
// overConnections.
func (r *ruleset) counters(name string, size int) (*nftables.Set, error) {
	set := &nftables.Set{Table: r.table, Name: name, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian, Dynamic: true, Size: uint32(size)}
	if err := r.conn.AddSet(set, nil); err != nil {
		return nil, fmt.Errorf("add set %s: %w", name, err)
	}
	return set, nil
}

// rule adds a rule: all parts must match in order, the last ones act.
func (r *ruleset) rule(c *nftables.Chain, parts ...[]expr.Any) {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	r.conn.AddRule(&nftables.Rule{Table: r.table, Chain: c, Exprs: all})
}

// masqueradeAt adds a rule to a chain that was applied: masquerade with a source port from first to
// last. The library's masq expression cannot carry the flag that this needs (nft_masq.c), so the
// rule is a transaction of its own.
func (r *ruleset) masqueradeAt(c *nftables.Chain, first, last uint16) error {
	const batch = netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES << 8)
	header := func(family, subsystem byte) []byte { return []byte{family, unix.NFNETLINK_V0, 0, subsystem} }
	var exprs []netlink.Attribute
	for register, port := range map[uint32]uint16{1: first, 2: last} {
		b, err := expr.Marshal(byte(r.table.Family), &expr.Immediate{Register: register, Data: binaryutil.BigEndian.PutUint16(port)})
		if err != nil {
			return err
		}
		exprs = append(exprs, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: b})
	}
	number := binaryutil.BigEndian.PutUint32
	ae := netlink.NewAttributeEncoder()
	ae.String(unix.NFTA_RULE_TABLE, r.table.Name)
	ae.String(unix.NFTA_RULE_CHAIN, c.Name)
	ae.Nested(unix.NFTA_RULE_EXPRESSIONS, func(ae *netlink.AttributeEncoder) error {
		for _, e := range exprs {
			ae.Bytes(e.Type, e.Data)
		}
		ae.Nested(unix.NFTA_LIST_ELEM, func(ae *netlink.AttributeEncoder) error {
			ae.String(unix.NFTA_EXPR_NAME, "masq")
			ae.Nested(unix.NFTA_EXPR_DATA, func(ae *netlink.AttributeEncoder) error {
				ae.Bytes(unix.NFTA_MASQ_FLAGS, number(unix.NF_NAT_RANGE_PROTO_SPECIFIED|unix.NF_NAT_RANGE_PROTO_RANDOM_FULLY))
				ae.Bytes(unix.NFTA_MASQ_REG_PROTO_MIN, number(1))
				ae.Bytes(unix.NFTA_MASQ_REG_PROTO_MAX, number(2))
				return nil
			})
			return nil
		})
		return nil
	})
	rule, err := ae.Encode()
	if err != nil {
		return err
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	defer conn.Close()
	_, err = conn.SendMessages([]netlink.Message{
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request}, Data: header(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)},
		{
			Header: netlink.Header{Type: batch | unix.NFT_MSG_NEWRULE, Flags: netlink.Request | netlink.Acknowledge | netlink.Create | netlink.Append},
			Data:   append(header(byte(r.table.Family), 0), rule...),
		},
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request}, Data: header(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)},
	})
	if err == nil {
		_, err = conn.Receive()
	}
	if err != nil {
		return fmt.Errorf("apply nftables masquerade of table %s: %w; is the kernel's nft_masq module there?", r.table.Name, err)
	}
	return nil
}

// Matches and actions. Registers 1 and 2 are scratch.

func interfaceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func interfaceMatches(key expr.MetaKey, name string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: interfaceName(name)},
	}
}

func fromInterface(name string) []expr.Any { return interfaceMatches(expr.MetaKeyIIFNAME, name) }
func toInterface(name string) []expr.Any   { return interfaceMatches(expr.MetaKeyOIFNAME, name) }

func interfaceIn(key expr.MetaKey, set *nftables.Set, not bool) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID, Invert: not},
	}
}

func fromInterfaces(set *nftables.Set) []expr.Any {
	return interfaceIn(expr.MetaKeyIIFNAME, set, false)
}
func toInterfaces(set *nftables.Set) []expr.Any { return interfaceIn(expr.MetaKeyOIFNAME, set, false) }
func notToInterfaces(set *nftables.Set) []expr.Any {
	return interfaceIn(expr.MetaKeyOIFNAME, set, true)
}

// betweenInterfaces matches the incoming and outgoing interface. A register has 16 bytes, as an
// interface name.
func betweenInterfaces(pairs *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 2},
		&expr.Lookup{SourceRegister: 1, SetName: pairs.Name, SetID: pairs.ID},
	}
}

// address matches packets of the subnet's protocol whose loaded address is in the subnet, or not.
func address(load expr.Any, op expr.CmpOp, n *net.IPNet) []expr.Any {
	size := uint32(len(n.Mask))
	return append(protocolOf(n),
		load,
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: size, Mask: n.Mask, Xor: make([]byte, size)},
		&expr.Cmp{Op: op, Register: 1, Data: n.IP.Mask(n.Mask)})
}

// source and destination load an address of a subnet's protocol. Offsets are those of RFC 791 and
// RFC 8200.
func source(n *net.IPNet) *expr.Payload {
	if len(n.Mask) == net.IPv4len {
		return headerField(expr.PayloadBaseNetworkHeader, 12, net.IPv4len)
	}
	return headerField(expr.PayloadBaseNetworkHeader, 8, net.IPv6len)
}

func destination(n *net.IPNet) *expr.Payload {
	if len(n.Mask) == net.IPv4len {
		return headerField(expr.PayloadBaseNetworkHeader, 16, net.IPv4len)
	}
	return headerField(expr.PayloadBaseNetworkHeader, 24, net.IPv6len)
}

func headerField(base expr.PayloadBase, offset, length uint32) *expr.Payload {
	return &expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: length}
}

func fromAddress(n *net.IPNet) []expr.Any {
	return address(source(n), expr.CmpOpEq, n)
}

// notFromAddress matches packets of the subnet's protocol only.
func notFromAddress(n *net.IPNet) []expr.Any {
	return address(source(n), expr.CmpOpNeq, n)
}

func toAddress(n *net.IPNet) []expr.Any {
	return address(destination(n), expr.CmpOpEq, n)
}

// toOriginalAddress matches the destination that a connection's first packet had before anything
// was translated.
func toOriginalAddress(n *net.IPNet) []expr.Any {
	return address(&expr.Ct{Key: expr.CtKeyDST, Register: 1, Direction: 0}, expr.CmpOpEq, n)
}

// notFromMAC matches frames with another source address, which is at 6 (IEEE 802.3).
func notFromMAC(mac net.HardwareAddr) []expr.Any {
	return []expr.Any{
		headerField(expr.PayloadBaseLLHeader, 6, 6),
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: mac},
	}
}

func protocol(ethertype uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(ethertype)},
	}
}

func protocolIPv4() []expr.Any { return protocol(unix.ETH_P_IP) }
func protocolIPv6() []expr.Any { return protocol(unix.ETH_P_IPV6) }
func protocolARP() []expr.Any  { return protocol(unix.ETH_P_ARP) }

// protocolOf matches the protocol that has a subnet.
func protocolOf(n *net.IPNet) []expr.Any {
	if len(n.Mask) == net.IPv4len {
		return protocolIPv4()
	}
	return protocolIPv6()
}

// arpFrom matches ARP for IPv4 over Ethernet from a sender: hardware type 1, protocol 0x0800 and
// their lengths 6 and 4, then after the operation the sender's addresses at 8 and 14 (RFC 826). A
// nil mac is not matched.
func arpFrom(mac net.HardwareAddr, ip net.IP) []expr.Any {
	e := []expr.Any{
		headerField(expr.PayloadBaseNetworkHeader, 0, 6),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 1, 8, 0, 6, 4}},
		headerField(expr.PayloadBaseNetworkHeader, 14, 4),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ip.To4()},
	}
	if mac == nil {
		return e
	}
	return append(e, headerField(expr.PayloadBaseNetworkHeader, 8, 6), &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: mac})
}

// toPort matches a destination port of "tcp" or "udp"; both have it at offset 2.
func toPort(protocol string, port uint16) []expr.Any {
	number := byte(unix.IPPROTO_TCP)
	if protocol == "udp" {
		number = unix.IPPROTO_UDP
	}
	return append(transport(number),
		headerField(expr.PayloadBaseTransportHeader, 2, 2),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)})
}

// toOriginalPort is toPort for the destination that a connection's first packet had before anything
// was translated.
func toOriginalPort(protocol string, port uint16) []expr.Any {
	match := toPort(protocol, port)
	match[2] = &expr.Ct{Key: expr.CtKeyPROTODST, Register: 1, Direction: 0}
	return match
}

func transport(number byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{number}},
	}
}

// icmp matches ICMP of IPv4, icmp6 that of IPv6.
func icmp() []expr.Any  { return append(protocolIPv4(), transport(unix.IPPROTO_ICMP)...) }
func icmp6() []expr.Any { return append(protocolIPv6(), transport(unix.IPPROTO_ICMPV6)...) }

// Types of ICMPv6 (RFC 2710, RFC 4861). Errors and echoes have lower ones.
const (
	multicastListenerQuery = 130
	neighbourSolicitation  = 135
	neighbourAdvertisement = 136
)

// icmpType matches a type, icmpTypeFrom that and all above.
func icmpType(number byte) []expr.Any { return icmpTypeThat(expr.CmpOpEq, number) }

func icmpTypeFrom(number byte) []expr.Any { return icmpTypeThat(expr.CmpOpGte, number) }

func icmpTypeThat(op expr.CmpOp, number byte) []expr.Any {
	return []expr.Any{
		headerField(expr.PayloadBaseTransportHeader, 0, 1),
		&expr.Cmp{Op: op, Register: 1, Data: []byte{number}},
	}
}

// ndp matches a message of neighbour discovery that follows the IPv6 header at once (RFC 8200: payload
// length at 4, next header at 6). Its option, if there is one, tells that the sender has a MAC address,
// if mac is not nil (RFC 4861, 4.6.1).
func ndp(message byte, option byte, mac net.HardwareAddr) []expr.Any {
	const withoutOption, withOption = 24, 32 // bytes
	length := binaryutil.BigEndian.PutUint16(withoutOption)
	if option != 0 {
		length = binaryutil.BigEndian.PutUint16(withOption)
	}
	e := append(protocolIPv6(),
		headerField(expr.PayloadBaseNetworkHeader, 4, 3),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append(length, unix.IPPROTO_ICMPV6)})
	e = append(e, icmpType(message)...)
	if option == 0 || mac == nil {
		return e
	}
	return append(e, headerField(expr.PayloadBaseTransportHeader, withoutOption, 8),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append([]byte{option, 1}, mac...)})
}

// solicitation matches a question for a neighbour's MAC address, with the sender's.
func solicitation(mac net.HardwareAddr) []expr.Any {
	const sourceAddress = 1
	return ndp(neighbourSolicitation, sourceAddress, mac)
}

// advertisement matches the answer about an address, with the MAC address or without.
func advertisement(ip net.IP, mac net.HardwareAddr, with bool) []expr.Any {
	const targetAddress = 2
	option := byte(0)
	if with {
		option = targetAddress
	}
	return append(ndp(neighbourAdvertisement, option, mac),
		headerField(expr.PayloadBaseTransportHeader, 8, net.IPv6len),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ip})
}

// linkLocalOf is the address that a kernel makes of a MAC address (RFC 4291, appendix A).
func linkLocalOf(mac net.HardwareAddr) net.IP {
	return net.IP{0xfe, 0x80, 0, 0, 0, 0, 0, 0, mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}
}

// connection matches a bit of what the connection tracking knows about a packet's connection: that
// it is set (CmpOpNeq to 0), or not.
func connection(key expr.CtKey, bit uint32, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bit), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: make([]byte, 4)},
	}
}

func connectionState(bit uint32) []expr.Any { return connection(expr.CtKeySTATE, bit, expr.CmpOpNeq) }

// notNewConnection matches packets that are not the first of a connection.
func notNewConnection() []expr.Any {
	return connection(expr.CtKeySTATE, expr.CtStateBitNEW, expr.CmpOpEq)
}

// ipsDstNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h: the destination was
// translated.
const ipsDstNAT = 1 << 5

// forwardedByRule matches connections whose destination was translated: a port forward's.
func forwardedByRule() []expr.Any { return connection(expr.CtKeySTATUS, ipsDstNAT, expr.CmpOpNeq) }

// connlimitOver makes connlimit match above its count: NFT_CONNLIMIT_F_INV.
const connlimitOver = expr.NFT_CONNLIMIT_F_INV

// overLimit counts the connections that come to it and are still tracked. It matches those beyond
// limit.
func overLimit(limit int) []expr.Any {
	return []expr.Any{&expr.Connlimit{Count: uint32(limit), Flags: connlimitOver}}
}

// overConnections is overLimit for each incoming interface by itself.
func overConnections(counters *nftables.Set, limit int) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Dynset{SrcRegKey: 1, SetName: counters.Name, SetID: counters.ID, Operation: unix.NFT_DYNSET_OP_ADD, Exprs: overLimit(limit)},
	}
}

// overRate matches what comes to it beyond a number a second, after as many at once.
func overRate(limit int) []expr.Any {
	return []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(limit), Unit: expr.LimitTimeSecond, Burst: uint32(limit), Over: true}}
}

// overLinkRate is overRate for each incoming interface by itself.
func overLinkRate(counters *nftables.Set, limit int) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Dynset{SrcRegKey: 1, SetName: counters.Name, SetID: counters.ID, Operation: unix.NFT_DYNSET_OP_ADD, Exprs: overRate(limit)},
	}
}

// closedTimeout is how many seconds a TCP connection stays tracked after its end. connlimit does
// not count it any more then.
const closedTimeout = 1

// forgetClosed adds rules that give new TCP connections closedTimeout, and otherwise the
// kernel's own timeouts (nf_conntrack-sysctl).
func (r *ruleset) forgetClosed(c *nftables.Chain) {
	timeout := func(name string, family uint16, protocol []expr.Any) {
		r.conn.AddObj(&nftables.NamedObj{Table: r.table, Name: name, Type: nftables.ObjTypeCtTimeout, Obj: &expr.CtTimeout{
			L3Proto: family, L4Proto: unix.IPPROTO_TCP,
			Policy: expr.CtStatePolicyTimeout{
				expr.CtStateTCPESTABLISHED: 5 * 24 * 60 * 60, expr.CtStateTCPTIMEWAIT: closedTimeout, expr.CtStateTCPCLOSE: closedTimeout,
			},
		}})
		r.rule(c, protocol, transport(unix.IPPROTO_TCP), []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: name}})
	}
	timeout("tcp", unix.NFPROTO_IPV4, protocolIPv4())
	timeout("tcp6", unix.NFPROTO_IPV6, protocolIPv6())
}

func drop() []expr.Any   { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }
func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }

// reset answers a TCP segment with RST, unreachable anything else with port unreachable, which is code
// 3 of ICMP (RFC 792), and unreachable6 the same by IPv6, as code 4 of ICMPv6 (RFC 4443).
func reset() []expr.Any { return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }
func unreachable() []expr.Any {
	return append(protocolIPv4(), &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3})
}

func unreachable6() []expr.Any {
	return append(protocolIPv6(), &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 4})
}

// continueAt goes on in another chain and does not come back.
func continueAt(c *nftables.Chain) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: c.Name}}
}

func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }

func sourceNAT(ip net.IP) []expr.Any {
	to := host(ip)
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: to.IP},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: netfilterOf(to), RegAddrMin: 1},
	}
}

// netfilterOf is netfilter's number of a subnet's protocol.
func netfilterOf(n *net.IPNet) uint32 {
	if len(n.Mask) == net.IPv4len {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

// destinationNAT rewrites the destination; port 0 keeps the port.
func destinationNAT(ip net.IP, port uint16) []expr.Any {
	to := host(ip)
	e := []expr.Any{&expr.Immediate{Register: 1, Data: to.IP}}
	n := &expr.NAT{Type: expr.NATTypeDestNAT, Family: netfilterOf(to), RegAddrMin: 1}
	if port != 0 {
		e = append(e, &expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(port)})
		n.RegProtoMin = 2
	}
	return append(e, n)
}

// host is the subnet of one address.
func host(ip net.IP) *net.IPNet {
	if ip4 := ip.To4(); ip4 != nil {
		return &net.IPNet{IP: ip4, Mask: net.CIDRMask(32, 32)}
	}
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(128, 128)}
}

// loopback is 127.0.0.0/8. The kernel itself lets nothing in or out that has IPv6's.
var loopback = cidr("127.0.0.0/8")

// setSysctl sets a kernel parameter of the calling thread's network namespace.
func setSysctl(name, value string) error {
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
		return fmt.Errorf("set kernel parameter: %w", err)
	}
	return nil
}

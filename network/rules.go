package network

import (
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// ruleset collects the rules of one table of ours and applies them in one transaction.
type ruleset struct {
	conn  *nftables.Conn
	table *nftables.Table
}

// newRuleset starts a ruleset for the calling thread's network namespace. A table of the same name is replaced.
func newRuleset(table string) (*ruleset, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: table}
	conn.AddTable(t) // so that the next line cannot fail
	conn.DelTable(t)
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
	r, err := newRuleset(table)
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
	hookRaw       = hook{"raw", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw}
	hookIncoming  = hook{"incoming", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest}
	hookLocal     = hook{"local", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest}
	hookForwarded = hook{"forwarded", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter}
	hookOutgoing  = hook{"outgoing", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource}
)

// chain adds a chain at a hook.
func (r *ruleset) chain(h hook) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{Name: h.name, Table: r.table, Type: h.kind, Hooknum: h.at, Priority: h.priority})
}

// rule adds a rule: all parts must match in order, the last ones act.
func (r *ruleset) rule(c *nftables.Chain, parts ...[]expr.Any) {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	r.conn.AddRule(&nftables.Rule{Table: r.table, Chain: c, Exprs: all})
}

// Matches and actions. Registers 1 and 2 are scratch. IPv4 header offsets are those of RFC 791: source at 12, destination at 16.

func interfaceMatches(key expr.MetaKey, name string) []expr.Any {
	// A name that ends with * stands for all that begin so.
	data := append([]byte(name), 0)
	if prefix, ok := strings.CutSuffix(name, "*"); ok {
		data = []byte(prefix)
	} else {
		data = append(data, make([]byte, unix.IFNAMSIZ-len(data))...)
	}
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data},
	}
}

func fromInterface(name string) []expr.Any { return interfaceMatches(expr.MetaKeyIIFNAME, name) }
func toInterface(name string) []expr.Any   { return interfaceMatches(expr.MetaKeyOIFNAME, name) }

func address(offset uint32, n *net.IPNet) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: n.Mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: n.IP.Mask(n.Mask).To4()},
	}
}

func fromAddress(n *net.IPNet) []expr.Any { return address(12, n) }
func toAddress(n *net.IPNet) []expr.Any   { return address(16, n) }

// toPort matches a destination port of "tcp" or "udp"; both have it at offset 2.
func toPort(protocol string, port uint16) []expr.Any {
	number := byte(unix.IPPROTO_TCP)
	if protocol == "udp" {
		number = unix.IPPROTO_UDP
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{number}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	}
}

// newConnection matches the first packet of a connection.
func newConnection() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitNEW), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func drop() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }

func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }

func sourceNAT(ip net.IP) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: ip.To4()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}
}

// destinationNAT rewrites the destination; port 0 keeps the port.
func destinationNAT(ip net.IP, port uint16) []expr.Any {
	e := []expr.Any{&expr.Immediate{Register: 1, Data: ip.To4()}}
	n := &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1}
	if port != 0 {
		e = append(e, &expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(port)})
		n.RegProtoMin = 2
	}
	return append(e, n)
}

// host is the subnet of one address.
func host(ip net.IP) *net.IPNet { return &net.IPNet{IP: ip.To4(), Mask: net.CIDRMask(32, 32)} }

// loopback is 127.0.0.0/8.
var loopback = &net.IPNet{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)}

// setSysctl sets a kernel parameter of the calling thread's network namespace.
func setSysctl(name, value string) error {
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
		return fmt.Errorf("set kernel parameter: %w", err)
	}
	return nil
}

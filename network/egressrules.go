package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// egressTable is the name of the table with the rules for what a guest opens, in its namespace. There
// is none if both policies are allow.
const egressTable = "drafter-egress"

// Chains of the table, one for each policy.
const (
	egressOfNAT = "nat"
	egressOfVM  = "vm"
)

var (
	// before hookForwarded
	hookOpened = hook{
		"opened", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityRef(*nftables.ChainPriorityFilter - 1),
	}
	hookSent = hook{"sent", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter}
)

const (
	dnsPort = 53
	// mostDNSPackets is how many packets a second a guest may send to the DNS forwarder. A query by
	// TCP takes some six.
	mostDNSPackets = 500
	// mostOpened is how many addresses a set of a guest holds.
	mostOpened = 1024
)

// egress is what is in force in a namespace, of its NAT and of its VM.
type egress struct{ nat, vm egressPolicy }

func (e egress) chains() map[string]egressPolicy {
	return map[string]egressPolicy{egressOfNAT: e.nat, egressOfVM: e.vm}
}

func (e egress) open() bool { return e.nat == nil && e.vm == nil }

// hasNames tells whether the DNS forwarder takes the guest's queries.
func (e egress) hasNames() bool { return e.nat.hasNames() || e.vm.hasNames() }

// answers tells whether the guest may ask for a name. sets are those that its addresses belong to.
func (e egress) answers(name string) (sets []openedSet, ok bool) {
	for chain, policy := range e.chains() {
		ports, ok := policy.answers(name)
		if !ok {
			return nil, false
		}
		for _, port := range ports {
			sets = append(sets, openedSet{chain, port})
		}
	}
	return sets, true
}

// openedSet stands for two sets of a table, for IPv4 and IPv6: the addresses that names have at the
// moment, whose entries in a policy have the same port.
type openedSet struct {
	chain string
	egressPort
}

func (s openedSet) name(v6 bool) string {
	name := s.chain + "4"
	if v6 {
		name = s.chain + "6"
	}
	if s.port != 0 {
		name += fmt.Sprintf("-%s-%d", s.protocol, s.port)
	}
	return name
}

func (s openedSet) set(table *nftables.Table, v6 bool) *nftables.Set {
	// A dynamic set is one of those whose elements a look does not compare; see tableState.
	set := &nftables.Set{Table: table, Name: s.name(v6), HasTimeout: true, Dynamic: true, Size: mostOpened}
	set.KeyType = nftables.TypeIPAddr
	if v6 {
		set.KeyType = nftables.TypeIP6Addr
	}
	return set
}

// openedAddress is an address in a set.
type openedAddress struct {
	set  openedSet
	addr netip.Addr
}

// openedAddresses are all, and until when they are open.
type openedAddresses map[openedAddress]time.Time

// apply puts the policies in force in the calling thread's namespace, in one transaction.
func (e egress) apply(tap string, opened openedAddresses) error {
	r, err := newRuleset(rulesFamily(), egressTable)
	if err != nil {
		return err
	}
	if e.open() {
		r.conn.DelTable(r.table)
		return r.apply()
	}
	out := r.chain(hookOpened)
	r.rule(out, notToInterface(namespaceVeth), accept())
	r.rule(out, connectionState(expr.CtStateBitESTABLISHED), accept())
	r.rule(out, connectionState(expr.CtStateBitRELATED), accept())
	r.rule(out, notNewConnection(), drop())
	sets := uint32(0)
	for _, name := range []string{egressOfNAT, egressOfVM} {
		policy := e.chains()[name]
		if policy == nil {
			continue
		}
		chain := r.subchain(name)
		r.rule(out, jumpTo(chain))
		for _, entry := range policy {
			if entry.prefix.IsValid() && (entry.prefix.Addr().Is4() || len(families(r.table)) > 1) {
				r.rule(chain, toPrefix(entry.prefix), entry.match(), back())
			}
		}
		for _, port := range policy.namePorts() {
			for _, v6 := range families(r.table) {
				set := openedSet{name, port}.set(r.table, v6)
				sets++
				set.ID = sets // the library would count a number up that all goroutines share
				if err := r.conn.AddSet(set, nil); err != nil {
					return fmt.Errorf("add set %s: %w", set.Name, err)
				}
				r.rule(chain, inSet(set, v6), port.match(), back())
			}
		}
		r.rule(chain, transport(unix.IPPROTO_TCP), reset())
		r.rule(chain, prohibited())
	}
	// A VMM that was broken into has the guest's address in the namespace, but no more rights.
	r.rule(r.chain(hookSent), toInterface(namespaceVeth), connectionState(expr.CtStateBitNEW), drop())
	if e.hasNames() {
		queries, delivered := r.chain(hookIncoming), r.chain(hookDelivered)
		r.rule(delivered, fromInterface(tap), overRate(mostDNSPackets), drop())
		for _, protocol := range []string{"udp", "tcp"} {
			// What belongs to an anchor goes there.
			r.rule(queries, fromInterface(tap), ofConnection(0), toPort(protocol, dnsPort), []expr.Any{&expr.Redir{}})
		}
	}
	if err := addOpened(r.conn, r.table, opened, nil); err != nil {
		return err
	}
	return r.apply()
}

// addOpened adds addresses to sets, in a transaction that has begun. Those that may be there, as held
// has them, are taken out before: only newer kernels change the time of an element that exists. With
// removals a transaction takes 13 ms, without them a fraction of one.
func addOpened(conn *nftables.Conn, table *nftables.Table, opened, held openedAddresses) error {
	type part struct {
		set      openedSet
		v6, held bool
	}
	now := time.Now()
	parts := map[part][]nftables.SetElement{}
	for o, until := range opened {
		if left := until.Sub(now); left >= time.Millisecond { // the kernel's unit; 0 would be for ever
			_, renews := held[o]
			p := part{o.set, o.addr.Is6(), renews}
			parts[p] = append(parts[p], nftables.SetElement{Key: o.addr.AsSlice(), Timeout: left})
		}
	}
	for p, elements := range parts {
		if p.v6 && len(families(table)) == 1 {
			continue
		}
		set := p.set.set(table, p.v6)
		for chunk := range slices.Chunk(elements, 500) { // one netlink attribute holds 64 KiB
			err := conn.SetAddElements(set, chunk)
			if p.held { // the first addition lets the removal succeed
				err = errors.Join(err, conn.SetDeleteElements(set, chunk), conn.SetAddElements(set, chunk))
			}
			if err != nil {
				return fmt.Errorf("fill set %s: %w", set.Name, err)
			}
		}
	}
	return nil
}

// openAddresses adds addresses to the sets of the calling thread's namespace; see addOpened.
func openAddresses(opened, held openedAddresses) error {
	conn, err := openRulesets()
	if err != nil {
		return err
	}
	table := &nftables.Table{Family: rulesFamily(), Name: egressTable}
	if err := addOpened(conn, table, opened, held); err != nil {
		return err
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("fill sets of table %s: %w", egressTable, err)
	}
	return nil
}

// readOpened returns the addresses that are open in the calling thread's namespace. There are none
// in a set that is not there.
func (e egress) readOpened() (openedAddresses, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	opened, now := openedAddresses{}, time.Now()
	table := &nftables.Table{Family: rulesFamily(), Name: egressTable}
	for chain, policy := range e.chains() {
		for _, port := range policy.namePorts() {
			for _, v6 := range families(table) {
				s := openedSet{chain, port}
				elements, err := conn.GetSetElements(s.set(table, v6))
				if err != nil && !errors.Is(err, unix.ENOENT) {
					return nil, fmt.Errorf("read set %s: %w", s.name(v6), err)
				}
				for _, element := range elements {
					if addr, ok := netip.AddrFromSlice(element.Key); ok {
						opened[openedAddress{s, addr}] = now.Add(element.Expires)
					}
				}
			}
		}
	}
	return opened, nil
}

// opens tells whether a policy lets a guest open a connection to an address. chain is the policy's.
func (p egressPolicy) opens(chain string, addr netip.Addr, to egressPort, opened openedAddresses) bool {
	if p == nil {
		return true
	}
	fits := func(of egressPort) bool { return of.port == 0 || of == to }
	for _, e := range p {
		if e.prefix.IsValid() && e.prefix.Contains(addr) && fits(e.egressPort) {
			return true
		}
	}
	for _, port := range p.namePorts() {
		if until, ok := opened[openedAddress{openedSet{chain, port}, addr}]; ok && fits(port) && time.Now().Before(until) {
			return true
		}
	}
	return false
}

func (p egressPort) match() []expr.Any {
	if p.port == 0 {
		return nil
	}
	return toPort(p.protocol, p.port)
}

// families tells of which families a table holds addresses: of IPv6 if true.
func families(table *nftables.Table) []bool {
	if table.Family == nftables.TableFamilyINet {
		return []bool{false, true}
	}
	return []bool{false}
}

// toPrefix matches destinations in a subnet.
func toPrefix(p netip.Prefix) []expr.Any {
	return toAddress(&net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())})
}

// inSet matches destinations in a set.
func inSet(set *nftables.Set, v6 bool) []expr.Any {
	all := &net.IPNet{Mask: make(net.IPMask, net.IPv4len)}
	if v6 {
		all.Mask = make(net.IPMask, net.IPv6len)
	}
	return append(protocolOf(all), destination(all), &expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID})
}

func notToInterface(name string) []expr.Any {
	match := toInterface(name)
	match[1].(*expr.Cmp).Op = expr.CmpOpNeq
	return match
}

// jumpTo goes on in another chain, and after it in this one. back leaves that chain.
func jumpTo(c *nftables.Chain) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: c.Name}}
}
func back() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}} }

// prohibited answers that an administrator does not allow it: ICMP's code 13 (RFC 1812, 5.2.7.1),
// ICMPv6's code 1 (RFC 4443, 3.1).
func prohibited() []expr.Any {
	if rulesFamily() == nftables.TableFamilyIPv4 {
		return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 13}}
	}
	return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
}

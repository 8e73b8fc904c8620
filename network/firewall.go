package network

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// Each base chain at a hook decides by itself: rules of Docker, ufw or firewalld may drop what the
// NAT's rules accept. Drafter evaluates them for a packet of each kind that the NAT lets pass, and
// names the chain that drops one. It changes them only if it is told to (NATConfig.ManageForward).

// passage is a kind of packets that the NAT lets pass.
type passage struct {
	what     string
	hook     nftables.ChainHook
	iif, oif string
	src, dst net.IP
	state    uint32 // of its connection: a bit of ct state
	status   uint32 // of its connection: ipsDstNAT or nothing
}

// passages returns what a guest needs.
func (n *NAT) passages() (list []passage) {
	for _, p := range n.layout.pools() {
		list = append(list, n.passagesOf(p)...)
	}
	return list
}

// passagesOf returns what a guest needs by one protocol.
func (n *NAT) passagesOf(p *pool) (list []passage) {
	link, guest, outside := hostVethName(n.name(0)), p.namespaceIP(0), p.publicAddresses()[0]
	const opened, established = expr.CtStateBitNEW, expr.CtStateBitESTABLISHED
	ways := n.outgoing
	if p == n.layout.ip6 {
		ways = n.outgoing6
	}
	for _, out := range ways {
		list = append(list,
			passage{"connections of guests", *nftables.ChainHookForward, link, out, guest, outside, opened, 0},
			passage{"connections of guests", *nftables.ChainHookPostrouting, link, out, guest, outside, opened, 0},
			passage{"answers to guests", *nftables.ChainHookForward, out, link, outside, guest, established, 0},
			passage{"what drafter forwarder publishes", *nftables.ChainHookForward, out, link, outside, p.namespaceSide(0), opened, ipsDstNAT})
	}
	list = append(list, passage{"connections of the host to guests", *nftables.ChainHookOutput, "", link, p.hostSide(0), guest, opened, 0})
	if slices.ContainsFunc(n.layout.openings, func(o opening) bool { return o.host() && (o.to == nil || o.concerns(p)) }) {
		list = append(list, passage{"what --allow-host opens", *nftables.ChainHookInput, link, "", guest, p.hostSide(0), opened, 0})
	}
	return list
}

// family is nftables' of the packets' protocol.
func (p passage) family() nftables.TableFamily {
	return nftables.TableFamily(netfilterOf(host(p.src)))
}

// sayFirewalls names the chains of others that cut guests off, and the commands that let guests
// through.
func (n *NAT) sayFirewalls() {
	now, err := generation()
	if err == nil && (n.firewall == nil || n.firewall.generation != now) {
		if n.firewall, err = readFirewall(); err == nil {
			n.firewall.generation = now
		}
	}
	if err != nil {
		n.news.say("firewalls", "The rules of other firewalls cannot be read; they may cut guests off", "error", err)
		return
	}
	legacy, err := readLegacy()
	if err != nil {
		n.news.say("firewalls", "The rules of other firewalls cannot be read; they may cut guests off", "error", err)
		return
	}
	n.news.say("firewalls", "")
	dropped := n.culprits(legacy)
	subjects := map[string]bool{}
	for c, what := range dropped {
		subject := "firewall " + c.table + " " + c.chain
		subjects[subject] = true
		n.news.say(subject, "Another firewall of this host drops what guests need", "table", c.table, "chain", c.chain, "drops", strings.Join(what, ", "), "open", c.open)
	}
	for subject := range n.news.said {
		if strings.HasPrefix(subject, "firewall ") && !subjects[subject] {
			n.news.say(subject, "")
		}
	}
}

// culprit is a chain of another firewall, and the commands that open it.
type culprit struct{ table, chain, open string }

// culprits returns what the chains of others drop of what guests need. With ManageForward it opens
// those that drop what is forwarded.
func (n *NAT) culprits(legacy *legacyTable) map[culprit][]string {
	dropped := map[culprit][]string{}
	for _, p := range n.passages() {
		note := func(c culprit) {
			if !slices.Contains(dropped[c], p.what) {
				dropped[c] = append(dropped[c], p.what)
			}
		}
		for _, c := range n.firewall.chains {
			sees := c.Table.Family == nftables.TableFamilyINet || c.Table.Family == p.family()
			if sees && c.Hooknum != nil && *c.Hooknum == p.hook && c.Type == nftables.ChainTypeFilter && n.firewall.verdict(c, p) == drops {
				if n.config.ManageForward && p.hook == *nftables.ChainHookForward && n.letThrough(c) {
					continue
				}
				note(culprit{familyName(c.Table.Family) + " " + c.Table.Name, c.Name, n.openFirewall(n.firewall, c)})
			}
		}
		if legacy != nil && p.family() == nftables.TableFamilyIPv4 && legacy.verdict(p) == drops {
			chain := chainNames[p.hook]
			into := chain
			if chain == "FORWARD" && legacy.has(dockerUser) {
				into = dockerUser
			}
			note(culprit{"filter (iptables-legacy)", chain, n.openIptables("iptables-legacy", into, p.hook)})
		}
	}
	return dropped
}

// letThrough puts rules before those of another firewall's chain that let guests through, and tells
// whether it could.
func (n *NAT) letThrough(c *nftables.Chain) bool {
	conn, err := nftables.New()
	for _, key := range []expr.MetaKey{expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME} {
		if err != nil {
			break
		}
		conn.InsertRule(&nftables.Rule{
			Table: c.Table, Chain: c, UserData: userdata.AppendString(nil, userdata.TypeComment, n.natTable()),
			Exprs: append([]expr.Any{
				&expr.Meta{Key: key, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(n.config.NamespacePrefix)}, // how its name begins
			}, accept()...),
		})
	}
	if err == nil {
		err = conn.Flush()
	}
	table := familyName(c.Table.Family) + " " + c.Table.Name
	if err != nil {
		n.config.Logger.Warn("Another firewall of this host drops what guests need, and cannot be changed", "table", table, "chain", c.Name, "error", err)
		return false
	}
	n.config.Logger.Warn("Let guests through another firewall of this host, which dropped what they need", "table", table, "chain", c.Name)
	n.firewall.rules = map[*nftables.Chain][]*nftables.Rule{} // read anew
	n.firewall.generation = 0
	return true
}

// leaveFirewalls removes the rules that letThrough put into other firewalls.
func (n *NAT) leaveFirewalls() error {
	f, err := readFirewall()
	if err != nil {
		return err
	}
	found := false
	for _, c := range f.chains {
		rules, err := f.conn.GetRules(c.Table, c)
		if err != nil {
			continue // it is gone since
		}
		for _, r := range rules {
			if comment, ok := userdata.GetString(r.UserData, userdata.TypeComment); !ok || comment != n.natTable() {
				continue
			}
			found = true
			if err := f.conn.DelRule(&nftables.Rule{Table: c.Table, Chain: c, Handle: r.Handle}); err != nil {
				return fmt.Errorf("remove rule from chain %s of table %s: %w", c.Name, c.Table.Name, err)
			}
		}
	}
	if !found {
		return nil
	}
	if err := f.conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove rules from other firewalls: %w", err)
	}
	return nil
}

// dockerUser is the chain that Docker leaves to users.
const dockerUser = "DOCKER-USER"

// eachWay returns the commands for packets from guests and to guests that a hook sees.
func eachWay(hook nftables.ChainHook, in, out string) string {
	switch hook {
	case *nftables.ChainHookInput:
		return in
	case *nftables.ChainHookOutput:
		return out
	}
	return in + "; " + out
}

// openIptables returns commands that let guests through a chain of iptables.
func (n *NAT) openIptables(program, chain string, hook nftables.ChainHook) string {
	return eachWay(hook, fmt.Sprintf("%s -I %s -i '%s+' -j ACCEPT", program, chain, n.config.NamespacePrefix),
		fmt.Sprintf("%s -I %s -o '%s+' -j ACCEPT", program, chain, n.config.NamespacePrefix))
}

// openFirewall returns commands that let guests through another firewall's chain.
func (n *NAT) openFirewall(f *firewall, c *nftables.Chain) string {
	p, program, hook := &n.layout.pool, "iptables", *c.Hooknum
	if c.Table.Family == nftables.TableFamilyIPv6 {
		p, program = n.layout.ip6, "ip6tables"
	}
	has := func(match func(string) bool) bool {
		return slices.ContainsFunc(f.chains, func(o *nftables.Chain) bool {
			return o.Table.Name == c.Table.Name && o.Table.Family == c.Table.Family && match(o.Name)
		})
	}
	ufw := has(func(name string) bool { return strings.HasPrefix(name, "ufw-") || strings.HasPrefix(name, "ufw6-") })
	forward := hook == *nftables.ChainHookForward
	switch {
	case c.Table.Name == "firewalld":
		command := "firewall-cmd --zone=trusted"
		for _, p := range n.layout.pools() {
			command += fmt.Sprintf(" --add-source=%s --add-source=%s", p.namespaceVeth, p.hostVeth)
		}
		return command
	case ufw && forward:
		return fmt.Sprintf("ufw route allow from %s; ufw route allow to %s", p.namespaceVeth, p.hostVeth)
	case ufw:
		return eachWay(hook, fmt.Sprintf("ufw allow from %s", p.namespaceVeth), fmt.Sprintf("ufw allow out to %s; ufw allow out to %s", p.namespaceVeth, p.hostVeth))
	case forward && has(func(name string) bool { return name == dockerUser }):
		return n.openIptables(program, dockerUser, hook)
	case c.Table.Name == "filter" && chainNames[hook] == c.Name:
		return n.openIptables(program, c.Name, hook)
	}
	insert := fmt.Sprintf("nft insert rule %s %s %s", familyName(c.Table.Family), c.Table.Name, c.Name)
	return eachWay(hook, fmt.Sprintf(`%s iifname "%s*" accept`, insert, n.config.NamespacePrefix), fmt.Sprintf(`%s oifname "%s*" accept`, insert, n.config.NamespacePrefix))
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyINet:
		return "inet"
	case nftables.TableFamilyIPv6:
		return "ip6"
	}
	return "ip"
}

// firewall holds the rules of others.
type firewall struct {
	conn   *nftables.Conn
	chains []*nftables.Chain
	rules  map[*nftables.Chain][]*nftables.Rule
	sets   map[string][]nftables.SetElement // by table and name

	generation uint32 // of what was read
}

// readFirewall reads the chains of others in the calling thread's network namespace.
func readFirewall() (*firewall, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	f := &firewall{conn: conn, rules: map[*nftables.Chain][]*nftables.Rule{}, sets: map[string][]nftables.SetElement{}}
	for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6, nftables.TableFamilyINet} {
		chains, err := conn.ListChainsOfTableFamily(family)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("read nftables chains: %w", err)
		}
		for _, c := range chains {
			if !strings.HasPrefix(c.Table.Name, "drafter-") {
				f.chains = append(f.chains, c)
			}
		}
	}
	return f, nil
}

// What becomes of a packet in a chain.
const (
	goesOn = iota
	accepts
	drops
	returns
)

// verdict returns what a base chain does with a passage. A rule that cannot be evaluated counts as
// one that does not match.
func (f *firewall) verdict(base *nftables.Chain, p passage) int {
	switch v := f.chain(base, p, 0); {
	case v == drops || v == accepts:
		return v
	case base.Policy != nil && *base.Policy == nftables.ChainPolicyDrop:
		return drops
	}
	return accepts
}

// maxJumps is NFT_JUMP_STACK_SIZE of the kernel.
const maxJumps = 16

func (f *firewall) chain(c *nftables.Chain, p passage, depth int) int {
	rules, ok := f.rules[c]
	if !ok {
		var err error
		if rules, err = f.conn.GetRules(c.Table, c); err != nil {
			return goesOn // it is gone since
		}
		f.rules[c] = rules
	}
	for _, r := range rules {
		v, to := f.rule(c.Table, r, p)
		if to == "" {
			if v != goesOn {
				return v
			}
			continue
		}
		i := slices.IndexFunc(f.chains, func(o *nftables.Chain) bool {
			return o.Table.Name == c.Table.Name && o.Table.Family == c.Table.Family && o.Name == to
		})
		if i < 0 || depth == maxJumps {
			continue
		}
		switch inner := f.chain(f.chains[i], p, depth+1); {
		case inner == accepts || inner == drops:
			return inner
		case v == returns: // a goto
			return returns
		}
	}
	return goesOn
}

// rule returns what a rule does with a passage. to is the chain that it jumps to, if any; with a
// verdict of returns it is a goto.
func (f *firewall) rule(t *nftables.Table, r *nftables.Rule, p passage) (v int, to string) {
	registers := map[uint32][]byte{} // those whose content is known
	for _, e := range r.Exprs {
		matches := true
		switch e := e.(type) {
		case *expr.Meta:
			registers[e.Register] = p.meta(e.Key)
		case *expr.Ct:
			registers[e.Register] = p.connection(e.Key)
		case *expr.Payload:
			registers[e.DestRegister] = p.field(e)
		case *expr.Bitwise:
			registers[e.DestRegister] = bitwise(registers[e.SourceRegister], e)
		case *expr.Cmp:
			matches = compare(registers[e.Register], e)
		case *expr.Lookup:
			matches = f.lookup(t, registers[e.SourceRegister], e)
		case *expr.Match:
			matches = p.match(e)
		case *expr.Counter, *expr.Log:
		case *expr.Verdict:
			switch e.Kind {
			case expr.VerdictAccept:
				return accepts, ""
			case expr.VerdictDrop:
				return drops, ""
			case expr.VerdictReturn:
				return returns, ""
			case expr.VerdictJump:
				return goesOn, e.Chain
			case expr.VerdictGoto:
				return returns, e.Chain
			}
		case *expr.Reject:
			return drops, ""
		case *expr.Target:
			if e.Name == "REJECT" {
				return drops, ""
			}
		default: // what is not known here
			return goesOn, ""
		}
		if !matches {
			return goesOn, ""
		}
	}
	return goesOn, ""
}

func (p passage) meta(key expr.MetaKey) []byte {
	switch key {
	case expr.MetaKeyIIFNAME:
		return interfaceName(p.iif)
	case expr.MetaKeyOIFNAME:
		return interfaceName(p.oif)
	case expr.MetaKeyNFPROTO:
		return []byte{byte(p.family())}
	case expr.MetaKeyPROTOCOL:
		if p.family() == nftables.TableFamilyIPv6 {
			return binaryutil.BigEndian.PutUint16(unix.ETH_P_IPV6)
		}
		return binaryutil.BigEndian.PutUint16(unix.ETH_P_IP)
	case expr.MetaKeyMARK:
		return make([]byte, 4)
	}
	return nil
}

func (p passage) connection(key expr.CtKey) []byte {
	switch key {
	case expr.CtKeySTATE:
		return binaryutil.NativeEndian.PutUint32(p.state)
	case expr.CtKeySTATUS:
		return binaryutil.NativeEndian.PutUint32(p.status)
	case expr.CtKeyMARK:
		return make([]byte, 4)
	}
	return nil
}

// field is a source or destination address, or its first bytes: rules match prefixes of whole bytes
// so.
func (p passage) field(e *expr.Payload) []byte {
	src, dst := host(p.src), host(p.dst)
	if e.Base != expr.PayloadBaseNetworkHeader || int(e.Len) > len(src.IP) || e.OperationType != expr.PayloadLoad {
		return nil
	}
	switch e.Offset {
	case source(src).Offset:
		return src.IP[:e.Len]
	case destination(dst).Offset:
		return dst.IP[:e.Len]
	}
	return nil
}

func bitwise(value []byte, e *expr.Bitwise) []byte {
	if len(value) == 0 || len(e.Mask) != len(value) || len(e.Xor) != len(value) {
		return nil
	}
	result := make([]byte, len(value))
	for i := range value {
		result[i] = value[i]&e.Mask[i] ^ e.Xor[i]
	}
	return result
}

// compare compares as many bytes as the rule has: an interface name with a wildcard is short.
func compare(value []byte, e *expr.Cmp) bool {
	if len(value) < len(e.Data) || len(value) == 0 {
		return false
	}
	order := bytes.Compare(value[:len(e.Data)], e.Data)
	switch e.Op {
	case expr.CmpOpEq:
		return order == 0
	case expr.CmpOpNeq:
		return order != 0
	case expr.CmpOpLt:
		return order < 0
	case expr.CmpOpLte:
		return order <= 0
	case expr.CmpOpGt:
		return order > 0
	case expr.CmpOpGte:
		return order >= 0
	}
	return false
}

// lookup looks for a value in a set. A set of intervals has the start of each interval, and the end
// after it, as elements.
func (f *firewall) lookup(t *nftables.Table, value []byte, e *expr.Lookup) bool {
	if value == nil || e.IsDestRegSet {
		return false
	}
	key := fmt.Sprintf("%d %s %s", t.Family, t.Name, e.SetName)
	elements, ok := f.sets[key]
	if !ok {
		set, err := f.conn.GetSetByName(t, e.SetName)
		if err != nil {
			return false
		}
		if elements, err = f.conn.GetSetElements(set); err != nil {
			return false
		}
		slices.SortFunc(elements, func(a, b nftables.SetElement) int { return bytes.Compare(a.Key, b.Key) })
		f.sets[key] = elements
	}
	in, intervals := false, false
	for _, s := range elements {
		intervals = intervals || s.IntervalEnd
	}
	for _, s := range elements {
		switch order := bytes.Compare(s.Key, value); {
		case order == 0:
			in = !s.IntervalEnd
		case order < 0 && intervals:
			in = !s.IntervalEnd
		}
	}
	return in != e.Invert
}

// match tells whether an extension of iptables matches.
func (p passage) match(e *expr.Match) bool {
	switch info := e.Info.(type) {
	case *xt.Comment:
		return true
	case *xt.ConntrackMtinfo3:
		return onlyState(info.MatchFlags) && p.inState(info.StateMask, info.InvertFlags&uint16(xt.ConntrackState) != 0)
	}
	return false
}

// onlyState tells whether iptables' conntrack extension matches nothing but the state.
func onlyState(flags uint16) bool {
	return xt.ConntrackFlags(flags)&^xt.ConntrackStateAlias == xt.ConntrackState
}

// inState tells whether iptables' conntrack extension matches. Its bits are those of ct state
// (XT_CONNTRACK_STATE_BIT), and one for translated destinations.
func (p passage) inState(mask uint16, invert bool) bool {
	const translated = 1 << 7
	state := uint16(p.state)
	if p.status&ipsDstNAT != 0 {
		state |= translated
	}
	return (mask&state != 0) != invert
}

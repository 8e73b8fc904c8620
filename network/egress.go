package network

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// What a guest may open connections to is its egress: all that it reaches anyway (allow), nothing
// (deny), or what a list has. A namespace has the policy of its NAT, and one of its VM. A
// connection must be in both. A policy opens nothing that is closed without it.

// The values of a policy that is no list.
const (
	egressAllow = "allow"
	egressDeny  = "deny"
)

// mostEgress is how many entries a list may have.
const mostEgress = 256

// egressPolicy is what guests may open connections to. nil: everything.
type egressPolicy []egressEntry

// egressEntry is an entry of a list: addresses or names, and there a protocol and port.
type egressEntry struct {
	prefix netip.Prefix // not valid: it is a name
	name   string       // canonical: lower case, with a dot at its end
	below  bool         // it stands for all names below it, and not for itself
	egressPort
}

// egressPort is a protocol and port; "" and 0 for all.
type egressPort struct {
	protocol string
	port     uint16
}

// CheckEgress refuses values of --egress that are no policy.
func CheckEgress(values []string) error {
	_, err := parseEgress(values)
	return err
}

// parseEgress reads the values of --egress. Where it is not said, it is allow. An empty value may be a
// variable of a script that was not set.
func parseEgress(values []string) (egressPolicy, error) {
	if values == nil || len(values) == 1 && values[0] == egressAllow {
		return nil, nil
	}
	if len(values) == 0 {
		return nil, errors.New("--egress is empty; write allow, deny or a list, or leave it out")
	}
	if len(values) == 1 && values[0] == egressDeny {
		return egressPolicy{}, nil
	}
	if len(values) > mostEgress {
		return nil, fmt.Errorf("--egress has %d entries; at most %d are possible: use wider subnets or *.NAME",
			len(values), mostEgress)
	}
	p := egressPolicy{}
	for _, s := range values {
		e, err := parseEgressEntry(s)
		if err != nil {
			return nil, fmt.Errorf("--egress %.100q %w", s, err)
		}
		p = append(p, e)
	}
	return p, nil
}

func parseEgressEntry(s string) (e egressEntry, err error) {
	if s == egressAllow || s == egressDeny {
		return e, errors.New("stands for itself; leave the other entries out")
	}
	target := s
	if i := strings.LastIndex(s, ":"); strings.HasSuffix(s, "/tcp") || strings.HasSuffix(s, "/udp") {
		var o opening
		if i < 0 || !o.parsePort(s[i+1:]) {
			return e, errors.New("has no port before its protocol; write it as example.com:443/tcp")
		}
		target, e.egressPort = s[:i], egressPort{o.protocol, o.port}
	}
	if inner, ok := strings.CutPrefix(target, "["); ok && strings.HasSuffix(inner, "]") && strings.Contains(inner, ":") {
		target = strings.TrimSuffix(inner, "]") // as IPv6 addresses are written before a port
	}
	addr, err := netip.ParseAddr(target)
	if err == nil {
		e.prefix = netip.PrefixFrom(addr, addr.BitLen())
	} else if strings.Contains(target, "/") {
		if e.prefix, err = netip.ParsePrefix(target); err != nil {
			return e, errors.New("is no subnet; write it as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.0/24:443/tcp")
		}
	}
	if e.prefix.IsValid() {
		if e.prefix.Addr().Is4In6() || addr.Zone() != "" {
			return e, errors.New("is no address for guests; write it as 192.0.2.7 or 2001:db8::7")
		}
		e.prefix = e.prefix.Masked()
		return e, nil
	}
	name, below := strings.CutPrefix(target, "*.")
	if !isEgressName(name) || !below && !strings.Contains(strings.TrimSuffix(name, "."), ".") {
		// A word without a dot may be a slip of the pen for allow.
		return e, errors.New("is neither allow, deny, a subnet nor a name; " +
			"write it as 192.0.2.0/24, example.com, *.example.com or example.com:443/tcp")
	}
	e.name, e.below = dns.CanonicalName(name), below
	return e, nil
}

// isEgressName tells whether a host name is one that a list may have: of letters, digits, - and _.
// Its last part is no number (RFC 3696, 2).
func isEgressName(name string) bool {
	name = strings.TrimSuffix(name, ".")
	labels := strings.Split(name, ".")
	if len(name) > 253 {
		return false
	}
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for _, c := range []byte(l) {
			if c != '-' && c != '_' && (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') {
				return false
			}
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}

// String is the policy as it is written for --egress.
func (p egressPolicy) String() string {
	if p == nil {
		return egressAllow
	}
	if len(p) == 0 {
		return egressDeny
	}
	var entries []string
	for _, e := range p {
		entries = append(entries, e.String())
	}
	return strings.Join(entries, ",")
}

func (e egressEntry) String() string {
	s := strings.TrimSuffix(e.name, ".")
	if e.below {
		s = "*." + s
	}
	if e.prefix.IsValid() {
		s = e.prefix.String()
	}
	if e.port != 0 {
		s += fmt.Sprintf(":%d/%s", e.port, e.protocol)
	}
	return s
}

// hasNames tells whether guests need the DNS forwarder.
func (p egressPolicy) hasNames() bool { return len(p.namePorts()) > 0 }

// namePorts returns the ports that names open, each once.
func (p egressPolicy) namePorts() (ports []egressPort) {
	seen := map[egressPort]bool{}
	for _, e := range p {
		if e.name != "" && !seen[e.egressPort] {
			seen[e.egressPort] = true
			ports = append(ports, e.egressPort)
		}
	}
	return ports
}

// matches tells whether an entry stands for a name. The name is canonical.
func (e egressEntry) matches(name string) bool {
	if e.name == "" {
		return false
	}
	// By labels: one may have an escaped dot in it.
	return e.below && name != e.name && dns.IsSubDomain(e.name, name) || !e.below && name == e.name
}

// answers tells whether guests may ask for a name, and the ports that its addresses open.
func (p egressPolicy) answers(name string) (ports []egressPort, ok bool) {
	if p == nil {
		return nil, true
	}
	seen := map[egressPort]bool{}
	for _, e := range p {
		if e.matches(name) && !seen[e.egressPort] {
			seen[e.egressPort] = true
			ports = append(ports, e.egressPort)
		}
	}
	return ports, len(ports) > 0
}

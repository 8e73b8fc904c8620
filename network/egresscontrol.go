package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"drafter/internal/logging"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/internal/rundir"
)

// Who starts a VM writes its policy to a record, and asks the NAT to put it in force. The NAT has
// the DNS forwarders, and puts back what somebody removes. If it was killed, who starts the VM puts
// the policy in force alone, and the next NAT goes on from there.

const egressRecords = "egress"

func egressPath(ns string) string { return filepath.Join(rundir.Path, egressRecords, ns+".json") }

func (c *NATConfig) controlPath() string {
	return filepath.Join(rundir.Path, "nat-"+c.NamespacePrefix+".sock")
}

// egressOf returns what is to be in force in a namespace, and whether its VM has a policy.
func (c *NATConfig) egressOf(ns string) (e egress, ofVM bool, err error) {
	if e.nat, err = parseEgress(c.Egress); err != nil {
		return e, false, err
	}
	b, err := os.ReadFile(egressPath(ns))
	if errors.Is(err, os.ErrNotExist) {
		return e, false, nil
	}
	var values []string
	if err == nil {
		err = json.Unmarshal(b, &values)
	}
	if err == nil {
		e.vm, err = parseEgress(values)
	}
	if err != nil {
		return e, true, fmt.Errorf("read egress of network namespace %q: %w", ns, err)
	}
	return e, true, nil
}

// forgetEgress removes the record of a VM's policy. One that does not exist is no error.
func forgetEgress(ns string) error {
	if err := os.Remove(egressPath(ns)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget egress: %w", err)
	}
	return nil
}

// setEgress puts the policy of a namespace's VM in force. Nothing that an earlier VM's names have
// opened stays open. vm tells whether a VM is about to use the namespace, or has left it.
func (c *NATConfig) setEgress(ns string, values []string, vm bool) error {
	policy, err := parseEgress(values)
	if err != nil {
		return err
	}
	_, before, err := c.egressOf(ns)
	if err != nil && !before {
		return err
	}
	if policy == nil {
		err = forgetEgress(ns)
	} else {
		err = writeEgress(ns, values)
	}
	if err != nil || policy == nil && !before && len(c.Egress) == 0 {
		return err
	}
	asked, err := c.askNAT(egressCall{ns, vm})
	if asked || err != nil {
		return err
	}
	e, _, err := c.egressOf(ns)
	if err != nil {
		return err
	}
	return inNamespace(ns, func() error { return e.apply(c.NamespaceInterface, nil) })
}

func writeEgress(ns string, values []string) error {
	b, err := json.Marshal(values)
	if err == nil {
		err = private.MkdirAll(filepath.Dir(egressPath(ns)))
	}
	if err == nil {
		err = newfile.WriteBytes(egressPath(ns), b)
	}
	if err != nil {
		return fmt.Errorf("record egress of network namespace %q: %w", ns, err)
	}
	return nil
}

// egressCall asks a NAT to put in force what is recorded for a namespace.
type egressCall struct {
	Netns string
	VM    bool // one is about to use it
}

const mostEgressCall = 1 << 12 // bytes

// askNAT asks the NAT, and tells whether it runs. A NAT that does not answer is an error: it may do
// something else at any time.
func (c *NATConfig) askNAT(call egressCall) (runs bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("ask the NAT: %w", err)
		}
	}()
	conn, err := net.Dial("unix", c.controlPath())
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(egressPatience))
	if err := json.NewEncoder(conn).Encode(call); err != nil {
		return true, err
	}
	var answer string
	if err := json.NewDecoder(io.LimitReader(conn, mostEgressCall)).Decode(&answer); err != nil {
		return true, fmt.Errorf("no answer: %w", err)
	}
	if answer != "" {
		return true, errors.New(answer)
	}
	return true, nil
}

// egressPatience is longer than a busy NAT takes.
const egressPatience = 10 * time.Second

// egressControl is a NAT's part of its guests' egress.
type egressControl struct {
	nat      *NAT
	log      logging.Limited // of what guests cause
	listener net.Listener
	serve    sync.WaitGroup

	mu     sync.Mutex // guards what follows
	guests map[string]*guestEgress

	asked   sync.Mutex // guards what follows
	servers []string   // the host's name servers
	read    time.Time
}

// guestEgress is what is in force in a namespace, for one guest.
type guestEgress struct {
	egress
	netns   string
	control *egressControl
	table   applied
	dns     *dnsForwarder // nil: it has none

	mu     sync.Mutex // guards what follows, and the table
	opened openedAddresses
	said   map[string]bool // what was said, by name
}

// startEgressControl begins to listen for those who start VMs.
func startEgressControl(n *NAT) (*egressControl, error) {
	c := &egressControl{nat: n, guests: map[string]*guestEgress{}, log: logging.Limited{Logger: n.config.Logger}}
	path := n.config.controlPath()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err // of a NAT that was killed: this one has the lock
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("start egress control: %w", err)
	}
	c.listener = listener
	c.serve.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			c.serve.Go(func() { c.handle(conn) })
		}
	})
	return c, nil
}

func (c *egressControl) handle(conn net.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(egressPatience))
	var call egressCall
	answer := ""
	err := json.NewDecoder(io.LimitReader(conn, mostEgressCall)).Decode(&call)
	if err == nil {
		err = checkNamespaceName(call.Netns)
	}
	if err == nil {
		err = c.enforce(call.Netns, call.VM, false)
	}
	if err != nil {
		answer = err.Error()
	}
	json.NewEncoder(conn).Encode(answer) //nolint:errcheck,errchkjson // who has asked may be gone
}

// enforce puts in force what is recorded for a namespace. With vm, one is about to use it, or does.
// With kept, that is so since before this NAT, and what its names have opened stays open.
func (c *egressControl) enforce(ns string, vm, kept bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, _, err := c.nat.config.egressOf(ns)
	if err != nil {
		return err
	}
	g := &guestEgress{egress: e, netns: ns, control: c, opened: openedAddresses{}, said: map[string]bool{}}
	if old := c.guests[ns]; old != nil {
		old.dns.Close()
	}
	c.guests[ns] = g
	err = inNamespace(ns, func() error {
		removed := false // since the earlier NAT was killed
		if kept {
			table, err := tableState(byte(rulesFamily()), egressTable)
			if err != nil {
				return err
			}
			removed = len(table) == 0 && !e.open()
			if g.opened, err = e.readOpened(); err != nil {
				return err
			}
		}
		if err := g.apply(); err != nil {
			return err
		}
		if removed {
			if err := g.endClosed(); err != nil {
				return err
			}
		}
		if vm && e.hasNames() {
			g.dns, err = startDNSForwarder(g, c.nat.layout.pools())
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("set egress of network namespace %q: %w", ns, err)
	}
	if vm && !e.open() {
		c.nat.config.Logger.Info("The egress of a guest is restricted", "namespace", ns,
			"to", fmt.Sprintf("%.300s", e.vm), "within", fmt.Sprintf("%.300s", e.nat))
	}
	return nil
}

// keep puts back what somebody has removed or changed.
func (c *egressControl) keep(ns string) (done bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.guests[ns]
	if g == nil || g.open() {
		return false, nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	err = inNamespace(ns, func() error {
		intact, err := g.table.intact()
		if err != nil || intact {
			return err
		}
		done = true
		if err := g.apply(); err != nil {
			return err
		}
		return g.endClosed()
	})
	return done, err
}

// Close ends the DNS forwarders.
func (c *egressControl) Close() error {
	if c == nil {
		return nil
	}
	err := c.listener.Close()
	c.serve.Wait()
	for _, g := range c.guests {
		g.dns.Close()
	}
	return err
}

// apply puts the policies in force in the calling thread's namespace.
func (g *guestEgress) apply() error {
	if err := g.egress.apply(g.control.nat.config.NamespaceInterface, g.opened); err != nil {
		return err
	}
	g.table = applied{table: egressTable}
	return g.table.note()
}

// endClosed ends connections of the guest that the policies do not let it open: they may have begun
// while the rules were gone. Those that belong to an anchor were let in there.
func (g *guestEgress) endClosed() error {
	return forgetConnections(func(f *netlink.ConntrackFlow) bool {
		to, ok := netip.AddrFromSlice(f.Forward.DstIP)
		ofGuest := slices.ContainsFunc(g.control.nat.layout.pools(), func(p *pool) bool { return p.guest.Equal(f.Forward.SrcIP) })
		if !ok || f.Mark != 0 || !ofGuest {
			return false
		}
		port := egressPort{port: f.Forward.DstPort}
		switch f.Forward.Protocol {
		case unix.IPPROTO_TCP:
			port.protocol = "tcp"
		case unix.IPPROTO_UDP:
			port.protocol = "udp"
		}
		for chain, policy := range g.chains() {
			if !policy.opens(chain, to.Unmap(), port, g.opened) {
				return true
			}
		}
		return false
	})
}

// openAnswer opens the addresses that an answer has for a name.
func (g *guestEgress) openAnswer(name string, sets []openedSet, answer *dns.Msg) error {
	now := time.Now()
	fresh := openedAddresses{}
	for _, a := range addresses(name, answer) {
		if g.control.closed(a.addr) {
			g.say(name, "A name that a guest's egress has leads to an address that it does not open: it is private, or closed")
			continue
		}
		for _, s := range sets {
			o, until := openedAddress{s, a.addr}, now.Add(a.ttl+openedLonger)
			if until.After(fresh[o]) {
				fresh[o] = until
			}
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	held := map[string]int{}
	for o, until := range g.opened {
		if until.Before(now.Add(-expiryPatience)) {
			delete(g.opened, o)
			continue
		}
		if again, ok := fresh[o]; ok && again.Before(until.Add(openedLonger/2)) {
			delete(fresh, o) // it is open for long enough
		}
		held[o.set.name(o.addr.Is6())]++
	}
	for o := range fresh {
		set := o.set.name(o.addr.Is6())
		if _, again := g.opened[o]; !again {
			held[set]++
		}
		if held[set] > mostOpened {
			return fmt.Errorf("%d addresses are open, which is all that can be; more are when the first have expired", mostOpened)
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	if err := inNamespace(g.netns, func() error { return openAddresses(fresh, g.opened) }); err != nil {
		return err
	}
	maps.Copy(g.opened, fresh)
	return nil
}

// expiryPatience is longer than the kernel takes to see that an element has expired.
const expiryPatience = time.Second

// mostSaid is about how many names of a guest something is said.
const mostSaid = 256

// say logs a line about a name that a guest asks for, the first time.
func (g *guestEgress) say(name, line string) {
	g.mu.Lock()
	key := name + line
	first := !g.said[key] && len(g.said) < mostSaid
	if first {
		g.said[key] = true
	}
	g.mu.Unlock()
	if first {
		g.control.log.Log(slog.LevelInfo, line, "namespace", g.netns, "name", name)
	}
}

// privateRanges are what no public name has a reason to lead to.
var privateRanges = prefixes(
	"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", // RFC 1918
	"100.64.0.0/10",                      // shared by customers of a provider (RFC 6598)
	"fc00::/7",                           // ULA (RFC 4193)
	"fe80::/10", "fec0::/10", "ff00::/8", // link-local, site-local, multicast (RFC 4291)
	"::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", // IPv4 in IPv6 (RFC 4291, 6052, 8215, 3056)
)

func prefixes(list ...string) (all []netip.Prefix) {
	for _, s := range list {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}

// closed tells whether a name opens no way to an address: a name's owner could lead it anywhere
// (DNS rebinding).
func (c *egressControl) closed(addr netip.Addr) bool {
	for _, p := range privateRanges {
		if p.Contains(addr) {
			return true
		}
	}
	for _, p := range c.nat.layout.pools() {
		// For Go, a subnet of mapped addresses contains all of IPv4.
		in := func(n *net.IPNet) bool { return len(n.Mask) == addr.BitLen()/8 && n.Contains(addr.AsSlice()) }
		if slices.ContainsFunc(p.closed(), in) {
			return true
		}
	}
	own, err := hostAddress(addr.AsSlice())
	return err == nil && own
}

// nameServers returns whom the host asks at the moment.
func (c *egressControl) nameServers() ([]string, error) {
	c.asked.Lock()
	defer c.asked.Unlock()
	if time.Since(c.read) < lookInterval {
		return c.servers, nil
	}
	var servers []string
	r, err := ResolverFor(nil, true)
	if err == nil {
		for _, ip := range r.NameServers {
			servers = append(servers, ip.String())
		}
	} else if own, oerr := dns.ClientConfigFromFile(resolverFiles[0]); oerr == nil && len(own.Servers) > 0 {
		servers = own.Servers // a stub that keeps its name servers to itself
	} else {
		return nil, err
	}
	c.servers, c.read = servers, time.Now()
	return servers, nil
}

// endEgress ends the policy of a VM that has left the claim's namespace.
func (c *Claim) endEgress() error {
	config, err := natOf(c.namespace)
	if config == nil || err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(netnsDir, c.namespace)); errors.Is(err, os.ErrNotExist) {
		return nil // the NAT has just ended
	}
	return config.setEgress(c.namespace, nil, false)
}

package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// A guest whose policy has names asks the DNS forwarder, whichever name server it believes to ask.
// It gets the answers of the host's name servers, for the names that the policy has. The addresses
// in an answer are open before the guest has it. Other names do not exist.

const (
	// Bounds of what one guest can cause.
	queriesPerSecond   = 100 // or fewer, so that the host tracks as many as the guest may have connections
	queriesAtOnce      = 64  // that wait for an answer
	dnsConnections     = 16  // by TCP
	openedByOneAnswer  = 64
	longestAliasChain  = 16
	nameServerPatience = 2 * time.Second // with one name server
	queryPatience      = 5 * time.Second // with all of them
	guestPatience      = 2 * time.Second // until a guest reads an answer by TCP

	// queryTracked is for how many seconds the host tracks what it asks for a guest: 30 by UDP, and 10
	// by TCP after RST (nf_conntrack-sysctl).
	queryTracked = 30 + 10

	// dnsDatagram is the size of datagrams that no network fragments (dnsflagday.net/2020).
	dnsDatagram = 1232
	// longestTTL is how long a guest may remember an answer.
	longestTTL = time.Hour
)

// openedLonger is how long an address is open beyond its TTL, at most, and half of that at least: a
// guest may connect a moment after it has asked. A variable for the tests.
var openedLonger = time.Minute

// dnsForwarder answers the queries of a namespace's guest.
type dnsForwarder struct {
	guest   *guestEgress
	ctx     context.Context // of queries; it ends with Close
	cancel  context.CancelFunc
	rate    *rate.Limiter
	waiting chan struct{}
	servers []*dns.Server
	serve   sync.WaitGroup
}

// startDNSForwarder listens at the gateways of the calling thread's namespace.
func startDNSForwarder(g *guestEgress, pools []*pool) (_ *dnsForwarder, err error) {
	perSecond := min(queriesPerSecond, max(1, g.control.nat.connections/queryTracked))
	f := &dnsForwarder{guest: g, rate: rate.NewLimiter(rate.Limit(perSecond), 2*perSecond), waiting: make(chan struct{}, queriesAtOnce)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	for _, p := range pools {
		if err := f.listen(net.JoinHostPort(p.gateway.String(), strconv.Itoa(dnsPort))); err != nil {
			return nil, fmt.Errorf("start DNS forwarder: %w", err)
		}
	}
	return f, nil
}

func (f *dnsForwarder) listen(at string) error {
	config := net.ListenConfig{Control: bindFreely}
	packets, err := config.ListenPacket(f.ctx, "udp", at)
	if err != nil {
		return err
	}
	listener, err := config.Listen(f.ctx, "tcp", at)
	if err != nil {
		return errors.Join(err, packets.Close())
	}
	streams := guestStreams{netutil.LimitListener(listener, dnsConnections), f.ctx}
	for _, s := range []*dns.Server{{PacketConn: packets}, {Listener: streams}} {
		started := make(chan struct{})
		s.Handler, s.UDPSize, s.NotifyStartedFunc = f, 4096, func() { close(started) }
		f.servers = append(f.servers, s)
		f.serve.Go(func() {
			if err := s.ActivateAndServe(); err != nil && f.ctx.Err() == nil {
				g := f.guest
				g.control.log.Warn("The DNS forwarder of a guest has ended, and with it names", "namespace", g.netns, "error", err)
			}
		})
		<-started
	}
	return nil
}

// guestStreams are the TCP connections of a guest. One that does not read its answers holds nobody up.
type guestStreams struct {
	net.Listener
	ctx context.Context // all of them end with it
}

// Accept implements net.Listener.
func (l guestStreams) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &guestStream{conn, context.AfterFunc(l.ctx, func() { conn.Close() })}, nil
}

type guestStream struct {
	net.Conn
	forget func() bool
}

// Write implements net.Conn.
func (s *guestStream) Write(b []byte) (int, error) {
	if err := s.SetWriteDeadline(time.Now().Add(guestPatience)); err != nil {
		return 0, err
	}
	return s.Conn.Write(b)
}

// Close implements net.Conn.
func (s *guestStream) Close() error {
	s.forget()
	return s.Conn.Close()
}

// bindFreely lets a socket have an address that is not there yet, or not any more: the tap is made
// anew for each VM, and a VMM may remove it.
func bindFreely(_, _ string, socket syscall.RawConn) (err error) {
	cerr := socket.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) })
	return errors.Join(err, cerr)
}

// Close waits until nothing is answered any more. Answers that are under way fail.
func (f *dnsForwarder) Close() {
	if f == nil {
		return
	}
	f.cancel()
	for _, s := range f.servers {
		_ = s.Shutdown() // it has ended by itself
	}
	f.serve.Wait()
}

// ServeDNS answers a query. It is called for several at once.
func (f *dnsForwarder) ServeDNS(w dns.ResponseWriter, query *dns.Msg) {
	size := dns.MaxMsgSize
	answer := f.answer(query)
	answer.Extra = slices.DeleteFunc(answer.Extra, func(r dns.RR) bool { return r.Header().Rrtype == dns.TypeOPT })
	opt := query.IsEdns0()
	if w.LocalAddr().Network() == "udp" {
		size = dns.MinMsgSize
		if opt != nil {
			size = min(max(int(opt.UDPSize()), dns.MinMsgSize), dnsDatagram)
		}
	}
	if opt != nil {
		answer.SetEdns0(dnsDatagram, opt.Do())
	}
	answer.RecursionAvailable, answer.Compress = true, true
	answer.Truncate(size)
	if err := w.WriteMsg(answer); err != nil {
		_ = w.Close() // a guest that has gone, or does not read, does not wait for it
	}
}

// answer returns what a guest gets. What it opens is open.
func (f *dnsForwarder) answer(query *dns.Msg) *dns.Msg {
	failed := func(rcode int) *dns.Msg { return new(dns.Msg).SetRcode(query, rcode) }
	if query.Opcode != dns.OpcodeQuery || len(query.Question) != 1 {
		return failed(dns.RcodeNotImplemented)
	}
	q := query.Question[0]
	switch q.Qtype {
	case dns.TypeANY, dns.TypeAXFR, dns.TypeIXFR, dns.TypeMAILA, dns.TypeMAILB:
		return failed(dns.RcodeRefused)
	}
	if q.Qclass != dns.ClassINET {
		return failed(dns.RcodeRefused)
	}
	if !f.rate.Allow() {
		return failed(dns.RcodeServerFailure)
	}
	name := dns.CanonicalName(q.Name)
	sets, ok := f.guest.answers(name)
	if !ok {
		// It does not exist, rather than that it is refused: resolvers then try the next name of their
		// search list at once, and do not ask again.
		f.guest.say(name, "A guest has asked for a name that its egress does not have")
		return failed(dns.RcodeNameError)
	}
	select {
	case f.waiting <- struct{}{}:
		defer func() { <-f.waiting }()
	default:
		return failed(dns.RcodeServerFailure)
	}
	answer, err := f.ask(q, query.CheckingDisabled, query.IsEdns0() != nil && query.IsEdns0().Do())
	if err == nil {
		err = f.guest.openAnswer(name, sets, answer)
	}
	if err != nil {
		if f.ctx.Err() == nil {
			f.guest.control.log.Warn("A guest gets no answer to a name that its egress has", "namespace", f.guest.netns, "name", name, "error", err)
		}
		return failed(dns.RcodeServerFailure)
	}
	answer.Id, answer.Question, answer.RecursionDesired, answer.Authoritative = query.Id, query.Question, query.RecursionDesired, false
	return answer
}

// ask asks the host's name servers, one after the other.
func (f *dnsForwarder) ask(q dns.Question, unchecked, dnssec bool) (answer *dns.Msg, err error) {
	servers, err := f.guest.control.nameServers()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(f.ctx, queryPatience)
	defer cancel()
	for _, server := range servers {
		var got *dns.Msg
		for _, network := range []string{"udp", "tcp"} {
			if got, err = exchange(ctx, network, server, q, unchecked, dnssec); err != nil || !got.Truncated {
				break
			}
		}
		if err != nil {
			err = fmt.Errorf("ask name server %s: %w", server, err)
			continue
		}
		answer = got
		if answer.Rcode == dns.RcodeSuccess || answer.Rcode == dns.RcodeNameError {
			break
		}
	}
	if answer != nil {
		return answer, nil
	}
	return nil, err
}

// exchange asks one name server. Nothing of the guest's query goes there but the question.
func exchange(ctx context.Context, network, server string, q dns.Question, unchecked, dnssec bool) (*dns.Msg, error) {
	query := new(dns.Msg).SetQuestion(q.Name, q.Qtype)
	query.CheckingDisabled = unchecked
	query.SetEdns0(dnsDatagram, dnssec)
	client := &dns.Client{Net: network, Timeout: nameServerPatience}
	conn, err := client.DialContext(ctx, net.JoinHostPort(server, strconv.Itoa(dnsPort)))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if tcp, ok := conn.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // RST: else the host tracks it for two minutes
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	answer, _, err := client.ExchangeWithConnContext(ctx, query, conn)
	if err != nil {
		return nil, err
	}
	if len(answer.Question) != 1 || !strings.EqualFold(answer.Question[0].Name, q.Name) || answer.Question[0].Qtype != q.Qtype || !answer.Response {
		return nil, errors.New("it has answered something else")
	}
	return answer, nil
}

// answered is an address in an answer.
type answered struct {
	addr netip.Addr
	ttl  time.Duration
}

// addresses returns those that an answer has for a name: its own, and those of the names that it is
// an alias for (CNAME). The answer's other records say nothing. No TTL remains longer than
// longestTTL.
func addresses(name string, answer *dns.Msg) (found []answered) {
	for _, section := range [][]dns.RR{answer.Answer, answer.Ns, answer.Extra} {
		for _, r := range section {
			if h := r.Header(); h.Rrtype != dns.TypeOPT { // there the field has another meaning
				h.Ttl = min(h.Ttl, uint32(longestTTL/time.Second))
			}
		}
	}
	if answer.Rcode != dns.RcodeSuccess {
		return nil
	}
	names := map[string]bool{name: true}
	for range longestAliasChain {
		known := len(names)
		for _, r := range answer.Answer {
			if alias, ok := r.(*dns.CNAME); ok && names[dns.CanonicalName(alias.Hdr.Name)] {
				names[dns.CanonicalName(alias.Target)] = true
			}
		}
		if len(names) == known {
			break
		}
	}
	for _, r := range answer.Answer {
		var ip net.IP
		switch r := r.(type) {
		case *dns.A:
			ip = r.A.To4()
		case *dns.AAAA:
			ip = r.AAAA.To16()
		}
		addr, ok := netip.AddrFromSlice(ip)
		if ok && names[dns.CanonicalName(r.Header().Name)] && len(found) < openedByOneAnswer {
			found = append(found, answered{addr.Unmap(), time.Duration(r.Header().Ttl) * time.Second})
		}
	}
	return found
}

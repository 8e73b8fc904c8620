package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"drafter/internal/await"
	"drafter/internal/need"
	"drafter/internal/testhost"
)

// nameServer is a name server outside, which the host asks.
type nameServer struct {
	mu    sync.Mutex
	zone  map[string][]string // names to records
	asked []string            // names, in the order of queries
}

func (s *nameServer) ServeDNS(w dns.ResponseWriter, query *dns.Msg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := dns.CanonicalName(query.Question[0].Name)
	s.asked = append(s.asked, name)
	records, known := s.zone[name]
	answer := new(dns.Msg).SetReply(query)
	if !known {
		answer.Rcode = dns.RcodeNameError
	}
	for _, text := range records {
		r, err := dns.NewRR(text)
		if err != nil {
			panic(err)
		}
		answer.Answer = append(answer.Answer, r)
	}
	if w.LocalAddr().Network() == "udp" {
		answer.Truncate(1232)
	}
	w.WriteMsg(answer)
}

// set changes what a name has.
func (s *nameServer) set(name string, records ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.zone[name] = records
}

// wasAsked tells whether anybody has asked for a name.
func (s *nameServer) wasAsked(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.asked, name)
}

// serveNames starts the host's name server outside, until the test ends.
func serveNames(t *testing.T) *nameServer {
	t.Helper()
	s := &nameServer{zone: map[string][]string{
		"a.test.":         {"a.test. 300 IN A 203.0.113.1"},
		"b.test.":         {"b.test. 300 IN A 203.0.113.2"},
		"x.b.test.":       {"x.b.test. 300 IN A 203.0.113.3"},
		"y.x.b.test.":     {"y.x.b.test. 300 IN A 203.0.113.3"},
		"alias.test.":     {"alias.test. 300 IN CNAME one.cdn.test.", "one.cdn.test. 300 IN CNAME two.cdn.test.", "two.cdn.test. 300 IN A 203.0.113.4", "other.test. 300 IN A 203.0.113.5"},
		"two.cdn.test.":   {"two.cdn.test. 300 IN A 203.0.113.4"},
		"metadata.test.":  {"metadata.test. 300 IN A 169.254.169.254"},
		"private.test.":   {"private.test. 300 IN A 10.9.9.9"},
		"host.test.":      {"host.test. 300 IN A 192.0.2.1"},
		"guest.test.":     {"guest.test. 300 IN A 10.0.15.2"},
		"v6.test.":        {"v6.test. 300 IN AAAA 2001:db8::1"},
		"longlived.test.": {"longlived.test. 604800 IN A 203.0.113.1"},
	}}
	s.zone["many.test."] = many("many.test.")
	var packets net.PacketConn
	var listener net.Listener
	err := inNamespace(testhost.Outside, func() (err error) {
		if packets, err = net.ListenPacket("udp4", outside+":53"); err == nil {
			listener, err = net.Listen("tcp4", outside+":53")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var serve sync.WaitGroup
	t.Cleanup(serve.Wait) // the sockets are closed then: Shutdown may return before
	for _, server := range []*dns.Server{{PacketConn: packets}, {Listener: listener}} {
		started := make(chan struct{})
		server.Handler, server.NotifyStartedFunc = s, func() { close(started) }
		serve.Go(func() { server.ActivateAndServe() })
		<-started
		t.Cleanup(func() { server.Shutdown() })
	}
	files := resolverFiles
	resolverFiles = []string{filepath.Join(t.TempDir(), "resolv.conf")}
	t.Cleanup(func() { resolverFiles = files })
	if err := os.WriteFile(resolverFiles[0], []byte("nameserver "+outside+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// many are 200 addresses of a name.
func many(name string) (records []string) {
	for i := range 200 {
		records = append(records, fmt.Sprintf("%s 300 IN A 198.18.0.%d", name, i+1))
	}
	return records
}

// sites have web servers outside.
var sites = []string{"203.0.113.1", "203.0.113.2", "203.0.113.3", "203.0.113.4", "203.0.113.5", "10.9.9.9", "169.254.169.254"}

func serveSites(t *testing.T) {
	t.Helper()
	for _, addr := range sites {
		giveAddress(t, addr+"/32")
		giveRoute(t, "", addr+"/32", net.IPv4(192, 0, 2, 254))
		listen(t, testhost.Outside, addr+":80", "site")
		listen(t, testhost.Outside, addr+":81", "site")
		echoServer(t, testhost.Outside, addr+":7")
	}
}

// startVM attaches a guest with a policy to a namespace.
func startVM(t *testing.T, ns string, egress ...string) string {
	t.Helper()
	if err := GuardGuest(ns, Guest{MAC: testConfig().NamespaceInterfaceMAC, Egress: egress}); err != nil {
		t.Fatal(err)
	}
	return attachGuest(t, ns)
}

// lookUp asks for a name from a guest's namespace, as if a name server were at 9.9.9.9.
func lookUp(t *testing.T, guest, network, name string, qtype uint16, change func(*dns.Msg)) *dns.Msg {
	t.Helper()
	return lookUpAt(t, guest, network, "9.9.9.9:53", name, qtype, change)
}

// lookUpAt is lookUp with a name server elsewhere.
func lookUpAt(t *testing.T, guest, network, server, name string, qtype uint16, change func(*dns.Msg)) *dns.Msg {
	t.Helper()
	var answer *dns.Msg
	err := inNamespace(guest, func() (err error) {
		query := new(dns.Msg).SetQuestion(name, qtype)
		if change != nil {
			change(query)
		}
		client := &dns.Client{Net: network, Timeout: 10 * time.Second}
		answer, _, err = client.Exchange(query, server)
		return err
	})
	if err != nil {
		t.Fatalf("%s by %s at %s: %v", name, network, server, err)
	}
	return answer
}

// reaches tells whether a guest reaches a web server.
func reaches(t *testing.T, guest, network, addr string) bool {
	t.Helper()
	return ask(t, guest, network, addr) == "site to 192.0.2.1"
}

func TestEgress(t *testing.T) {
	need.Root(t)
	serveSites(t)
	all := []string{"tcp 203.0.113.1:80", "tcp 203.0.113.1:81", "tcp 203.0.113.2:80", "udp 203.0.113.1:80", "udp 203.0.113.1:81", "udp 203.0.113.2:80"}
	for _, tt := range []struct {
		nat, vm []string
		open    []string
	}{
		{nil, nil, all},
		{[]string{"allow"}, []string{"allow"}, all},
		{[]string{"deny"}, nil, nil},
		{nil, []string{"deny"}, nil},
		{[]string{"deny"}, []string{"203.0.113.0/24"}, nil},
		{[]string{"203.0.113.0/24"}, []string{"deny"}, nil},
		{[]string{"203.0.113.0/24"}, nil, all},
		{[]string{"203.0.113.0/31"}, nil, []string{"tcp 203.0.113.1:80", "tcp 203.0.113.1:81", "udp 203.0.113.1:80", "udp 203.0.113.1:81"}},
		{nil, []string{"203.0.113.1:80/tcp", "203.0.113.2/32:80/udp", "2001:db8::/32"}, []string{"tcp 203.0.113.1:80", "udp 203.0.113.2:80"}},
		{[]string{"203.0.113.0/24:80/tcp"}, []string{"203.0.113.1"}, []string{"tcp 203.0.113.1:80"}},
		{[]string{"203.0.113.2"}, []string{"203.0.113.1"}, nil},
		{nil, []string{"169.254.169.254", "0.0.0.0/0"}, all},
	} {
		t.Run(fmt.Sprint(tt.nat, " ", tt.vm), func(t *testing.T) {
			c := testConfig()
			c.Egress = tt.nat
			startNAT(t, c)
			guest := startVM(t, "ark0", tt.vm...)
			listen(t, guest, "172.16.0.2:80", "guest")
			for _, d := range all {
				network, addr, _ := strings.Cut(d, " ")
				begin := time.Now()
				if got := reaches(t, guest, network+"4", addr); got != slices.Contains(tt.open, d) {
					t.Errorf("%s: open %v", d, got)
				} else if took := time.Since(begin); !got && took > time.Second && network == "tcp" {
					t.Errorf("%s: refused after %s", d, took)
				}
			}
			// Answers to what comes in go out.
			for _, network := range []string{"tcp4", "udp4"} {
				if got := ask(t, "", network, "10.0.15.1:80"); got != "guest to 10.0.8.1" {
					t.Errorf("the host reaches the guest by %s: %q", network, got)
				}
			}
			defer func() { // nor is it missed that it has gone
				unplug["ark0"]()
				await.None(t, "connections are refused", func() string {
					if _, err := net.DialTimeout("tcp4", "10.0.15.1:80", time.Second); !errors.Is(err, unix.ECONNREFUSED) {
						return fmt.Sprint(err)
					}
					return ""
				})
			}()
			// What is closed is not opened by a list; see TestGuestConfined.
			if slices.Contains(tt.vm, "169.254.169.254") && reaches(t, guest, "tcp4", "169.254.169.254:80") {
				t.Error("the metadata service is open")
			}
			// A VMM that was broken into has the namespace's addresses.
			err := inNamespace("ark0", func() error {
				conn, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, 0, 15, 1)}, &net.UDPAddr{IP: net.IPv4(203, 0, 113, 1), Port: 80})
				if err != nil {
					return err
				}
				defer conn.Close()
				_, err = conn.Write([]byte("x"))
				return err
			})
			free := tt.vm == nil && tt.nat == nil || slices.Equal(tt.nat, []string{"allow"})
			if (err == nil) != free || err != nil && !errors.Is(err, unix.EPERM) {
				t.Errorf("a VMM sends: %v", err)
			}
		})
	}
}

// TestLongEgress has the longest lists that are possible.
func TestLongEgress(t *testing.T) {
	need.Root(t)
	server := serveNames(t)
	serveSites(t)
	c := testConfig()
	for i := range mostEgress - 1 {
		c.Egress = append(c.Egress, fmt.Sprintf("198.18.0.0/16:%d/tcp", i+1))
	}
	c.Egress[0], c.Egress = "a.test", append(c.Egress, "203.0.113.1")
	var names []string
	for i := range mostEgress - 1 {
		names = append(names, fmt.Sprintf("a.test:%d/tcp", i+1))
	}
	startNAT(t, c)
	server.set("a.test.", many("a.test.")...)
	guest := startVM(t, "ark0", append(names, "203.0.113.0/24:80/tcp")...)
	for addr, want := range map[string]bool{"203.0.113.1:80": true, "203.0.113.1:81": false, "203.0.113.2:80": false} {
		if got := reaches(t, guest, "tcp4", addr); got != want {
			t.Errorf("%s is open: %v", addr, got)
		}
	}
	if answer := lookUp(t, guest, "tcp", "a.test.", dns.TypeA, nil); len(answer.Answer) != 200 {
		t.Errorf("addresses in %d sets: %v", len(names), answer)
	}
}

func TestEgressNames(t *testing.T) {
	need.Root(t)
	server := serveNames(t)
	serveSites(t)
	log := readLog(t)
	c := testConfig()
	c.Egress = []string{"*.test", "b.test", "203.0.113.0/24", "169.254.169.254", "10.0.0.0/8", "192.0.2.1"}
	c.AllowHost = []string{"80/tcp"}
	startNAT(t, c)
	listen(t, "", "192.0.2.1:80", "host")
	guest := startVM(t, "ark0", "a.test:80/tcp", "*.b.test", "alias.test", "metadata.test", "private.test", "host.test", "guest.test", "many.test", "v6.test", "longlived.test:9/udp", "z.example")
	other := startVM(t, "ark1")

	find := func(name string, qtype uint16, want string) {
		t.Helper()
		for _, network := range []string{"udp", "tcp"} {
			answer := lookUp(t, guest, network, name, qtype, nil)
			got := dns.RcodeToString[answer.Rcode]
			for _, r := range answer.Answer {
				switch r := r.(type) {
				case *dns.A:
					got += " " + r.A.String()
				case *dns.AAAA:
					got += " " + r.AAAA.String()
				}
			}
			if got != want || answer.Question[0].Name != name || !answer.RecursionAvailable {
				t.Errorf("%s by %s: %q; want %q: %v", name, network, got, want, answer)
			}
		}
	}
	closed := func(addrs ...string) {
		t.Helper()
		for _, addr := range addrs {
			if reaches(t, guest, "tcp4", addr) {
				t.Errorf("%s is open", addr)
			}
		}
	}
	open := func(addrs ...string) {
		t.Helper()
		for _, addr := range addrs {
			if !reaches(t, guest, "tcp4", addr) {
				t.Errorf("%s is closed", addr)
			}
		}
	}
	closed("203.0.113.1:80", "203.0.113.3:80", "203.0.113.4:80")
	find("A.test.", dns.TypeA, "NOERROR 203.0.113.1") // letters of either case
	open("203.0.113.1:80")
	closed("203.0.113.1:81", "203.0.113.3:80")
	if reaches(t, guest, "udp4", "203.0.113.1:80") {
		t.Error("a port of TCP is open for UDP")
	}
	find("y.x.b.test.", dns.TypeA, "NOERROR 203.0.113.3")
	open("203.0.113.3:80", "203.0.113.3:81")
	find("alias.test.", dns.TypeA, "NOERROR 203.0.113.4 203.0.113.5")
	open("203.0.113.4:80")
	closed("203.0.113.5:80") // in the answer, but of another name

	// Whichever name server the guest asks, its gateway among them.
	for _, addr := range []string{"172.16.0.1:53", "192.0.2.1:53", "169.254.169.254:53"} {
		for _, server := range []string{addr, ipv6(addr)} {
			for _, network := range []string{"udp", "tcp"} {
				if answer := lookUpAt(t, guest, network, server, "a.test.", dns.TypeA, nil); len(answer.Answer) != 1 {
					t.Errorf("%s by %s: %v", server, network, answer)
				}
			}
		}
	}

	// Names that the list does not have are not asked for.
	for _, name := range []string{"b.test.", "two.cdn.test.", "unknown.example.", `x\.b.test.`, "z.example.", "test."} {
		find(name, dns.TypeA, "NXDOMAIN")
		if server.wasAsked(dns.CanonicalName(name)) {
			t.Errorf("the host's name server was asked for %s", name)
		}
	}
	if got := log.read(); strings.Count(got, "name=unknown.example.") != 1 {
		t.Errorf("the log of a name that was asked for twice: %s", got)
	}
	find("none.b.test.", dns.TypeA, "NXDOMAIN") // the host's name server says so
	find("v6.test.", dns.TypeAAAA, "NOERROR 2001:db8::1")
	find("a.test.", dns.TypeANY, "REFUSED")
	find("a.test.", dns.TypeAXFR, "REFUSED")
	chaos := func(q *dns.Msg) { q.Question[0].Qclass = dns.ClassCHAOS }
	if answer := lookUp(t, guest, "udp", "a.test.", dns.TypeTXT, chaos); answer.Rcode != dns.RcodeRefused {
		t.Errorf("another class: %v", answer)
	}

	// Rebinding: private addresses, the host, other guests and metadata services, although each is in
	// the NAT's list.
	for name, addr := range map[string]string{"metadata.test.": "169.254.169.254", "private.test.": "10.9.9.9", "host.test.": "192.0.2.1", "guest.test.": "10.0.15.2"} {
		find(name, dns.TypeA, "NOERROR "+addr)
		if !strings.Contains(log.read(), "name="+name) {
			t.Errorf("the log does not say that %s opens nothing", name)
		}
		if got := ask(t, guest, "tcp4", addr+":80"); got != "" {
			t.Errorf("%s leads to %s: %q", name, addr, got)
		}
	}

	// Sizes: without EDNS 512 bytes, then what the guest says, and by TCP all.
	sizes := map[string]int{}
	for what, change := range map[string]func(*dns.Msg){
		"small": nil, "edns": func(q *dns.Msg) { q.SetEdns0(4096, true) },
	} {
		answer := lookUp(t, guest, "udp", "many.test.", dns.TypeA, change)
		sizes[what] = len(answer.Answer)
		if opt := answer.IsEdns0(); !answer.Truncated || (opt != nil) != (what == "edns") || opt != nil && !opt.Do() {
			t.Errorf("%s: truncated %v, %v: %v", what, answer.Truncated, opt, answer)
		}
	}
	if sizes["small"] == 0 || sizes["edns"] <= sizes["small"] {
		t.Errorf("records in small answers: %v", sizes)
	}
	if got := len(lookUp(t, guest, "tcp", "many.test.", dns.TypeA, nil).Answer); got != 200 {
		t.Errorf("by TCP %d records", got)
	}
	if answer := lookUp(t, guest, "udp", "longlived.test.", dns.TypeA, nil); answer.Answer[0].Header().Ttl != 3600 {
		t.Errorf("the guest may remember an answer: %v", answer)
	}

	// The other guest has the NAT's list only, and nothing of this one's.
	if answer := lookUp(t, other, "udp", "x.b.test.", dns.TypeA, nil); answer.Rcode != dns.RcodeSuccess {
		t.Errorf("the other guest: %v", answer)
	}
}

// TestEgressNameServers asks the host's name servers that there are: the next if one is silent, a
// stub on a loopback address if the host has no other, and those that the host has now.
func TestEgressNameServers(t *testing.T) {
	need.Root(t)
	server := serveNames(t)
	interval := lookInterval
	lookInterval = 100 * time.Millisecond
	t.Cleanup(func() { lookInterval = interval }) // when all watches have ended
	startNAT(t, testConfig())
	guest := startVM(t, "ark0", "a.test")
	stub := &nameServer{zone: map[string][]string{"a.test.": {"a.test. 300 IN A 203.0.113.9"}}}
	packets, err := net.ListenPacket("udp4", "127.0.0.53:53")
	if err != nil {
		t.Fatal(err)
	}
	serving, ended := make(chan struct{}), make(chan struct{})
	s := &dns.Server{PacketConn: packets, Handler: stub, NotifyStartedFunc: func() { close(serving) }}
	go func() {
		defer close(ended)
		s.ActivateAndServe()
	}()
	<-serving
	defer func() { s.Shutdown(); <-ended }()
	for _, tt := range []struct{ text, want string }{
		{"nameserver " + outside, "203.0.113.1"},
		{"nameserver 127.0.0.53", "203.0.113.9"},
		{"nameserver 192.0.2.253\nnameserver " + outside, "203.0.113.1"},
		{"nameserver 192.0.2.253", ""},
		{"nameserver 127.0.0.53", "203.0.113.9"},
		{"", ""}, // each has another answer than the one before, which is remembered for a moment
	} {
		if err := os.WriteFile(resolverFiles[0], []byte(tt.text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		await.None(t, "the name servers are "+tt.text, func() string {
			answer := lookUp(t, guest, "udp", "a.test.", dns.TypeA, nil)
			got := ""
			for _, r := range answer.Answer {
				got += r.(*dns.A).A.String()
			}
			if got != tt.want || (got == "") != (answer.Rcode == dns.RcodeServerFailure) {
				return answer.String()
			}
			return ""
		})
	}
	if !server.wasAsked("a.test.") {
		t.Error("the name server outside was not asked")
	}
}

// TestSpoofedQuery sends queries with the addresses of others, and to others.
func TestSpoofedQuery(t *testing.T) {
	need.Root(t)
	server := serveNames(t)
	startNAT(t, testConfig())
	shell(t, "ip -n ark0 link del tap0") // as a VMM may do that was broken into
	guest := startVM(t, "ark0", "a.test")
	query := func(name string) []byte {
		b, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		return append([]byte{3, 232, 0, 53, 0, byte(8 + len(b)), 0, 0}, b...) // UDP from port 1000
	}
	server.set("b.a.test.", "b.a.test. 300 IN A 203.0.113.1")
	own := mac(testConfig().NamespaceInterfaceMAC)
	send(t, guest,
		frame(own, 0x0800, packet("172.16.0.1", 17, query("a.test."))),
		frame(own, 0x0800, packet("10.0.15.2", 17, query("a.test."))),
		frame(mac("02:00:00:00:00:66"), 0x0800, packet("172.16.0.2", 17, query("a.test."))))
	send(t, guest, frame(own, 0x0800, packet("172.16.0.2", 17, []byte{3, 232, 0, 53, 0, 9, 0, 0, 1}))) // no message
	if answer := lookUp(t, guest, "udp", "b.test.", dns.TypeA, nil); answer.Rcode != dns.RcodeNameError {
		t.Errorf("a guest's own query: %v", answer) // frames keep their order
	}
	if server.wasAsked("a.test.") {
		t.Error("a query with somebody else's address was answered")
	}
	// Only what the tap sends is answered.
	for _, addr := range []string{"10.0.15.1:53", "10.0.8.2:53"} {
		if _, _, err := (&dns.Client{Timeout: 200 * time.Millisecond}).Exchange(new(dns.Msg).SetQuestion("a.test.", dns.TypeA), addr); err == nil {
			t.Errorf("the host gets an answer from %s", addr)
		}
	}
}

// shorten lets addresses be open for their TTL and little more until the test ends.
func shorten(t *testing.T, longer time.Duration) {
	before := openedLonger
	openedLonger = longer
	t.Cleanup(func() { openedLonger = before }) // when all NATs have ended
}

func TestEgressExpires(t *testing.T) {
	need.Root(t)
	server := serveNames(t)
	serveSites(t)
	shorten(t, 2*time.Second)
	startNAT(t, testConfig())
	guest := startVM(t, "ark0", "a.test")
	server.set("a.test.", "a.test. 0 IN A 203.0.113.1")
	lookUp(t, guest, "udp", "a.test.", dns.TypeA, nil)
	conn := connectEcho(t, guest, "203.0.113.1")
	began, tick := time.Now(), time.NewTicker(50*time.Millisecond)
	defer tick.Stop()
	// An answer in between lasts from then on.
	for range 60 {
		<-tick.C // a guest may ask for so much and no more
		lookUp(t, guest, "udp", "a.test.", dns.TypeA, nil)
		if !reaches(t, guest, "tcp4", "203.0.113.1:80") {
			t.Fatalf("closed, %s after the first answer", time.Since(began))
		}
	}
	await.True(t, "the address is closed", func() bool { return !reaches(t, guest, "tcp4", "203.0.113.1:80") })
	if err := conn.goesOn(); err != nil {
		t.Errorf("a connection that was open, after: %v", err)
	}
	lookUp(t, guest, "tcp", "a.test.", dns.TypeA, nil)
	if !reaches(t, guest, "tcp4", "203.0.113.1:80") {
		t.Error("an address that has expired stays closed")
	}
}

// connectEcho connects a guest with a server of serveSites that sends back what it hears.
func connectEcho(t *testing.T, guest, addr string) *talk {
	t.Helper()
	k := dialTalk(t, addr, guest, "tcp4", addr+":7")
	if err := k.goesOn(); err != nil {
		t.Fatal(err)
	}
	return k
}

// TestEgressOfNextVM gives a namespace to VMs one after the other.
func TestEgressOfNextVM(t *testing.T) {
	need.Root(t)
	serveNames(t)
	serveSites(t)
	startNAT(t, testConfig())
	guest := attachGuest(t, "ark0")
	claim, err := ClaimNamespace("ark0")
	if err != nil {
		t.Fatal(err)
	}
	next := func(egress ...string) {
		t.Helper()
		if err := GuardGuest("ark0", Guest{MAC: testConfig().NamespaceInterfaceMAC, Egress: egress}); err != nil {
			t.Fatal(err)
		}
	}
	want := func(open bool) {
		t.Helper()
		if got := reaches(t, guest, "tcp4", "203.0.113.1:80"); got != open {
			t.Errorf("open %v; want %v", got, open)
		}
	}
	next("a.test")
	want(false)
	lookUp(t, guest, "udp", "a.test.", dns.TypeA, nil)
	want(true)
	next("a.test") // the earlier one was killed
	want(false)
	next("deny")
	want(false)
	next()
	want(true)
	next("deny")
	own := &net.TCPAddr{IP: net.IPv4(10, 0, 15, 1)} // the guest has no tap any more
	if got := askFrom(t, "ark0", "tcp4", "203.0.113.1:80", own); got != "" {
		t.Errorf("with deny: %q", got)
	}
	if err := claim.Close(); err != nil {
		t.Fatal(err)
	}
	if got := askFrom(t, "ark0", "tcp4", "203.0.113.1:80", own); got == "" {
		t.Error("the policy of a VM that has ended is still in force")
	}
	if _, err := os.Stat(egressPath("ark0")); !os.IsNotExist(err) {
		t.Errorf("the record of a VM that has ended: %v", err)
	}
	if err := GuardGuest("ark0", Guest{Egress: []string{"alow"}}); err == nil || !strings.Contains(err.Error(), `--egress "alow" is neither`) {
		t.Errorf("a bad policy: %v", err)
	}
	if err := GuardGuest(testhost.Outside, Guest{Egress: []string{"deny"}}); err == nil || !strings.Contains(err.Error(), "no NAT made") {
		t.Errorf("a namespace that no NAT made: %v", err)
	}
	if err := GuardGuest(testhost.Outside, Guest{Egress: []string{"allow"}}); err != nil {
		t.Errorf("a namespace that no NAT made, with allow: %v", err)
	}
}

// TestEgressOfKilledNAT starts VMs after a NAT was killed, and the next NAT.
func TestEgressOfKilledNAT(t *testing.T) {
	need.Root(t)
	serveNames(t)
	serveSites(t)
	before := inventory(t)
	killNAT(t)
	var claims []*Claim
	for _, ns := range []string{"ark0", "ark1"} {
		claim, err := ClaimNamespace(ns)
		if err != nil {
			t.Fatal(err)
		}
		claims = append(claims, claim)
	}
	guest, other := startVM(t, "ark0", "a.test"), startVM(t, "ark1", "203.0.113.2")
	if reaches(t, guest, "tcp4", "203.0.113.1:80") || !reaches(t, other, "tcp4", "203.0.113.2:80") || reaches(t, other, "tcp4", "203.0.113.1:80") {
		t.Error("what is open without a NAT")
	}
	n, err := StartNAT(context.Background(), testConfig())
	if err != nil {
		t.Fatal(err)
	}
	lookUp(t, guest, "udp", "a.test.", dns.TypeA, nil)
	conn := connectEcho(t, guest, "203.0.113.1")
	abandon(t, n)
	if err := conn.goesOn(); err != nil {
		t.Errorf("a connection that was open, killed: %v", err)
	}
	if !reaches(t, guest, "tcp4", "203.0.113.1:80") {
		t.Error("an address that a name has opened is closed when the NAT was killed")
	}
	if n, err = StartNAT(context.Background(), testConfig()); err != nil {
		t.Fatal(err)
	}
	if err := conn.goesOn(); err != nil {
		t.Errorf("a connection that was open, second: %v", err)
	}
	if !reaches(t, guest, "tcp4", "203.0.113.1:80") || reaches(t, guest, "tcp4", "203.0.113.2:80") {
		t.Error("what is open with the next NAT")
	}
	if reaches(t, other, "tcp4", "203.0.113.1:80") || !reaches(t, other, "tcp4", "203.0.113.2:80") {
		t.Error("what is open for the other guest with the next NAT")
	}
	if answer := lookUp(t, guest, "tcp", "a.test.", dns.TypeA, nil); answer.Rcode != dns.RcodeSuccess {
		t.Errorf("the next NAT answers: %v", answer)
	}
	abandon(t, n)
	shell(t, "ip netns exec ark1 nft delete table inet drafter-egress")
	meanwhile, stays := connectEcho(t, other, "203.0.113.1"), connectEcho(t, other, "203.0.113.2")
	if n, err = StartNAT(context.Background(), testConfig()); err != nil {
		t.Fatal(err)
	}
	if meanwhile.goesOn() == nil {
		t.Error("a connection goes on that began while the rules were gone")
	}
	if err := errors.Join(stays.goesOn(), conn.goesOn()); err != nil {
		t.Errorf("connections that the policies let open: %v", err)
	}
	abandon(t, n)
	stricter := testConfig()
	stricter.Egress = []string{"deny"}
	if n, err = StartNAT(context.Background(), stricter); err != nil {
		t.Fatal(err)
	}
	if conn.goesOn() == nil {
		t.Error("a connection goes on that the next NAT closes")
	}
	if reaches(t, guest, "tcp4", "203.0.113.1:80") {
		t.Error("the next NAT closes nothing")
	}
	for _, c := range claims {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	unplug["ark0"]()
	unplug["ark1"]()
	for _, guest := range []string{guest, other} {
		deleteNamespace(guest)
	}
	if after := inventory(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

// TestEgressPutBack removes the rules from under a guest.
func TestEgressPutBack(t *testing.T) {
	need.Root(t)
	serveNames(t)
	serveSites(t)
	log := readLog(t)
	n := startNAT(t, testConfig())
	guest := startVM(t, "ark0", "a.test", "203.0.113.3")
	lookUp(t, guest, "udp", "a.test.", dns.TypeA, nil)
	stays := connectEcho(t, guest, "203.0.113.1")
	endWatch(t, &n.watch)
	var meanwhile *talk
	for _, remove := range []string{"delete table inet drafter-egress", "flush ruleset", "delete rule inet drafter-egress vm handle $(nft -a list chain inet drafter-egress vm | grep reject | tail -1 | sed 's/.*handle //')"} {
		log.read()
		shell(t, "ip netns exec ark0 sh -c \"nft "+strings.ReplaceAll(remove, "$", `\$`)+"\"")
		if strings.HasPrefix(remove, "delete table") {
			meanwhile = connectEcho(t, guest, "203.0.113.2")
		}
		n.look()
		if !strings.Contains(log.read(), "nftables table inet drafter-egress in ark0") {
			t.Errorf("%s: nothing is said of it", remove)
		}
		if meanwhile.goesOn() == nil {
			t.Errorf("%s: a connection goes on that began meanwhile", remove)
		}
		if !reaches(t, guest, "tcp4", "203.0.113.1:80") || !reaches(t, guest, "tcp4", "203.0.113.3:80") || reaches(t, guest, "tcp4", "203.0.113.2:80") || reaches(t, guest, "udp4", "203.0.113.2:80") {
			t.Errorf("%s: what is open is another", remove)
		}
		if strings.HasPrefix(remove, "flush") {
			continue // with the translations, the connections are ended, too; see TestPutBack
		}
		if err := stays.goesOn(); err != nil && !strings.HasPrefix(remove, "delete rule") {
			t.Errorf("%s: a connection that was open: %v", remove, err)
		}
		if answer := lookUp(t, guest, "udp", "a.test.", dns.TypeA, nil); answer.Rcode != dns.RcodeSuccess {
			t.Errorf("%s: %v", remove, answer)
		}
	}
	log.read()
	n.look()
	if said := log.read(); strings.Contains(said, "drafter-egress") {
		t.Errorf("said without a change: %s", said)
	}
}

// TestEgressBounds lets a guest ask for more than it may.
func TestEgressBounds(t *testing.T) {
	need.Root(t)
	server := serveNames(t)
	c := testConfig()
	c.MaxConnections = 10 * queryTracked
	n := startNAT(t, c)
	guest := startVM(t, "ark0", "*.b.test")
	g := n.egress.guests["ark0"]
	if got := g.dns.rate.Limit(); got != 10 {
		t.Errorf("a guest with %d connections may ask %v times a second", c.MaxConnections, got)
	}
	g.dns.rate.SetLimit(queriesPerSecond)
	g.dns.rate.SetBurst(2 * queriesPerSecond)

	// Addresses: those of one answer, and those of all.
	for i := range 40 {
		var records []string
		for j := range 100 {
			records = append(records, fmt.Sprintf("n%d.b.test. 300 IN A 198.18.%d.%d", i, i, j))
		}
		server.set(fmt.Sprintf("n%d.b.test.", i), records...)
	}
	failed := 0
	for i := range 40 {
		if lookUp(t, guest, "tcp", fmt.Sprintf("n%d.b.test.", i), dns.TypeA, nil).Rcode == dns.RcodeServerFailure {
			failed++
		}
	}
	if len(g.opened) != mostOpened || failed != 40-mostOpened/openedByOneAnswer {
		t.Errorf("%d addresses are open, %d queries have failed", len(g.opened), failed)
	}
	inKernel := 0
	if err := inNamespace("ark0", func() error { o, err := g.readOpened(); inKernel = len(o); return err }); err != nil || inKernel != mostOpened {
		t.Errorf("the kernel has %d addresses, %v", inKernel, err)
	}

	// What the host tracks of it: the answers were too long for UDP.
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	byTCP := 0
	for _, f := range flows {
		if f.Forward.DstPort == dnsPort && f.Forward.Protocol == unix.IPPROTO_TCP {
			if byTCP++; f.TimeOut > 10 {
				t.Errorf("the host tracks a query for long: %s", f)
			}
		}
	}
	if byTCP == 0 {
		t.Error("the host tracks no query by TCP")
	}

	// Queries a second, one after the other and all at once.
	limited := 0
	for range 300 {
		if lookUp(t, guest, "udp", "none.b.test.", dns.TypeA, nil).Rcode == dns.RcodeServerFailure {
			limited++
		}
	}
	if limited < 50 {
		t.Errorf("of 300 queries %d were too many", limited)
	}
	err = inNamespace(guest, func() error {
		conn, err := net.Dial("udp4", "9.9.9.9:53")
		if err != nil {
			return err
		}
		defer conn.Close()
		for i := range 3000 {
			b, err := new(dns.Msg).SetQuestion(fmt.Sprintf("x%d.b.test.", i), dns.TypeA).Pack()
			if err != nil {
				return err
			}
			conn.Write(b)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	await.True(t, "a query after the flood is answered", func() bool {
		return lookUp(t, guest, "tcp", "none.b.test.", dns.TypeA, nil).Rcode == dns.RcodeNameError
	})
	out, err := exec.Command("ip", "netns", "exec", "ark0", "nft", "list", "chain", "inet", egressTable, "delivered").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "limit rate over 500/second") {
		t.Errorf("the kernel's bound: %s, %v", out, err)
	}
}

// TestEgressDeafGuest lets a guest ask by TCP and read no answers: the NAT serves others meanwhile, and
// the namespace gets its next VM.
func TestEgressDeafGuest(t *testing.T) {
	need.Root(t)
	server := serveNames(t)
	startNAT(t, testConfig())
	guest := startVM(t, "ark0", "many.test")
	var conn net.Conn
	err := inNamespace(guest, func() (err error) {
		dialer := net.Dialer{Control: func(_, _ string, socket syscall.RawConn) (err error) {
			cerr := socket.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 2048) })
			return errors.Join(err, cerr)
		}}
		conn, err = dialer.Dial("tcp4", "9.9.9.9:53")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	query, err := new(dns.Msg).SetQuestion("many.test.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	query = append([]byte{0, byte(len(query))}, query...)
	if _, err := conn.Write(bytes.Repeat(query, 100)); err != nil { // with answers of 320 KB
		t.Fatal(err)
	}
	queries := func() int {
		server.mu.Lock()
		defer server.mu.Unlock()
		return len(server.asked)
	}
	before, since := 0, time.Now()
	await.True(t, "the forwarder cannot send any more", func() bool {
		if now := queries(); now != before {
			before, since = now, time.Now()
		}
		return before > 0 && time.Since(since) > 200*time.Millisecond
	})
	if before == 100 {
		t.Fatal("the guest has taken all answers")
	}
	begin := time.Now()
	for _, ns := range []string{"ark0", "ark1"} {
		if err := GuardGuest(ns, Guest{MAC: testConfig().NamespaceInterfaceMAC, Egress: []string{"a.test"}}); err != nil {
			t.Errorf("the next VM in %s: %v", ns, err)
		}
	}
	if took := time.Since(begin); took > egressPatience/2 {
		t.Errorf("the next VMs waited for %s", took)
	}
}

// TestEgressOfTraveller moves a VM between namespaces with different policies.
func TestEgressOfTraveller(t *testing.T) {
	need.Root(t)
	serveNames(t)
	serveSites(t)
	startNAT(t, testConfig())
	g := newTraveller(t)
	g.egress = []string{"a.test", "203.0.113.2"}
	open := func(addr string, want bool) {
		t.Helper()
		if got := reaches(t, g.ns, "tcp4", addr); got != want {
			t.Errorf("in %s: %s is open: %v", g.where, addr, got)
		}
	}
	// A name server that the guest asks itself, where its queries are its own matter.
	var own *dns.Conn
	if err := inNamespace(g.ns, func() (err error) { own, err = dns.Dial("udp4", outside+":53"); return err }); err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	asks := func() {
		t.Helper()
		own.SetDeadline(time.Now().Add(10 * time.Second))
		if err := own.WriteMsg(new(dns.Msg).SetQuestion("x.b.test.", dns.TypeA)); err != nil {
			t.Fatal(err)
		}
		if answer, err := own.ReadMsg(); err != nil || answer.Rcode != dns.RcodeSuccess {
			t.Errorf("in %s: %v, %v", g.where, answer, err)
		}
	}
	asks()
	k := connectEcho(t, g.ns, "203.0.113.3")
	goesOn := func() {
		t.Helper()
		if err := k.goesOn(); err != nil {
			t.Errorf("in %s, a connection that was open: %v", g.where, err)
		}
	}
	g.move("ark1")
	goesOn()
	asks()
	open("203.0.113.1:80", false)
	open("203.0.113.2:80", true)
	open("203.0.113.3:80", false)
	lookUp(t, g.ns, "udp", "a.test.", dns.TypeA, nil)
	open("203.0.113.1:80", true)
	g.egress = []string{"deny"}
	g.move("ark0") // to its anchor
	goesOn()
	open("203.0.113.1:80", false)
	open("203.0.113.2:80", false)
	g.egress = nil
	g.move("ark1") // where its policy was another
	goesOn()
	open("203.0.113.3:80", true)
}

func TestParseEgress(t *testing.T) {
	for _, tt := range []struct{ values, want, err string }{
		{"", "allow", ""},
		{"allow", "allow", ""},
		{"deny", "deny", ""},
		{"192.0.2.7", "192.0.2.7/32", ""},
		{"192.0.2.7/24", "192.0.2.0/24", ""},
		{"192.0.2.7:53/udp,2001:db8::/32,2001:db8::7,2001:db8::/32:443/tcp", "192.0.2.7/32:53/udp,2001:db8::/32,2001:db8::7/128,2001:db8::/32:443/tcp", ""},
		{"[2001:db8::7]:443/tcp,[2001:db8::7]", "2001:db8::7/128:443/tcp,2001:db8::7/128", ""},
		{"Example.COM,*.example.com.:443/tcp,_x.a-b.example,*.example", "example.com,*.example.com:443/tcp,_x.a-b.example,*.example", ""},
		{"0.0.0.0/0", "0.0.0.0/0", ""},
		{"alow", "", `--egress "alow" is neither allow, deny, a subnet nor a name; write it as`},
		{"allow,example.com", "", `--egress "allow" stands for itself; leave the other entries out`},
		{"192.0.2.0/33", "", `--egress "192.0.2.0/33" is no subnet; write it as 192.0.2.0/24`},
		{"192.0.2.0/24:443", "", "is no subnet; write it as 192.0.2.0/24"},
		{"example.com/24", "", "is no subnet"},
		{"192.0.2.300", "", "is neither"},
		{"example.com:443", "", "is neither allow, deny, a subnet nor a name; write it as 192.0.2.0/24, example.com, *.example.com or example.com:443/tcp"},
		{"example.com:0/tcp", "", "has no port before its protocol; write it as example.com:443/tcp"},
		{"example.com:99999/tcp", "", "has no port"},
		{"example.com/tcp", "", "has no port"},
		{"example.com:443/sctp", "", "is no subnet"},
		{"*.*.example.com", "", "is neither"},
		{"*example.com", "", "is neither"},
		{"*", "", "is neither"},
		{"*.", "", "is neither"},
		{"localhost", "", "is neither"},
		{"münchen.example", "", "is neither"},
		{"exa mple.com", "", "is neither"},
		{"-a.example", "", "is neither"},
		{"a..example", "", "is neither"},
		{strings.Repeat("a", 64) + ".example", "", "is neither"},
		{"fe80::1%eth0", "", "is no address for guests"},
		{"::ffff:192.0.2.1", "", "is no address for guests"},
		{"[2001:db8::7]:443", "", "is neither"},
		{"[192.0.2.7]:443/tcp", "", "is neither"},
		{"[example.com]:443/tcp", "", "is neither"},
		{"[2001:db8::7:443/tcp", "", "is neither"},
		{"[::ffff:192.0.2.1]", "", "is no address for guests"},
		{"example.com,", "", `--egress "" is neither`},
		{strings.Repeat("a.example,", 256) + "a.example", "", "--egress has 257 entries; at most 256 are possible"},
	} {
		var values []string
		if tt.values != "" {
			values = strings.Split(tt.values, ",")
		}
		p, err := parseEgress(values)
		if (err == nil) != (tt.err == "") || err != nil && (!strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%.100s: %v; want %q", tt.values, err, tt.err)
		} else if err == nil && p.String() != tt.want {
			t.Errorf("%s: %q; want %q", tt.values, p, tt.want)
		}
	}
}

// TestEmptyEgress has a list without entries: it is not taken for allow.
func TestEmptyEgress(t *testing.T) {
	if err := CheckEgress([]string{}); err == nil || !strings.Contains(err.Error(), "--egress is empty") {
		t.Errorf("an empty list: %v", err)
	}
	if err := CheckEgress(nil); err != nil {
		t.Errorf("no list: %v", err)
	}
}

func TestEgressMatches(t *testing.T) {
	for _, tt := range []struct {
		entry, name string
		want        bool
	}{
		{"example.com", "example.com.", true},
		{"example.com", "www.example.com.", false},
		{"*.example.com", "www.example.com.", true},
		{"*.example.com", "a.b.example.com.", true},
		{"*.example.com", "example.com.", false},
		{"*.example.com", "badexample.com.", false},
		{"*.example.com", `bad\.example.com.`, false},
		{"*.example.com", `bad\046example.com.`, false},
		{"*.example.com", "example.com.evil.test.", false},
		{"example.com", ".", false},
		{"*.example.com", ".", false},
		{"192.0.2.0/24", "192.0.2.1.", false},
	} {
		p, err := parseEgress([]string{tt.entry})
		if err != nil {
			t.Fatal(err)
		}
		if _, got := p.answers(tt.name); got != tt.want {
			t.Errorf("%s has %s: %v", tt.entry, tt.name, got)
		}
	}
}

func FuzzEgress(f *testing.F) {
	for _, s := range []string{"allow", "deny", "192.0.2.0/24:443/tcp", "*.example.com", "2001:db8::/32", "a.b:1/udp"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parseEgress(strings.Split(s, ","))
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\x00\x1b") {
				t.Errorf("error of more than a line: %q", err)
			}
			return
		}
		again, err := parseEgress(strings.Split(p.String(), ","))
		if err != nil || again.String() != p.String() {
			t.Errorf("%q is read as %q, and that as %q, %v", s, p, again, err)
		}
		p.answers(dns.CanonicalName(s))
	})
}

// FuzzAddresses reads answers of hostile name servers.
func FuzzAddresses(f *testing.F) {
	answer := new(dns.Msg)
	for _, text := range []string{"a.test. 1 IN CNAME b.test.", "b.test. 4294967295 IN A 192.0.2.1", "b.test. 1 IN AAAA 2001:db8::1", "b.test. 1 IN AAAA ::ffff:10.0.0.1"} {
		r, err := dns.NewRR(text)
		if err != nil {
			f.Fatal(err)
		}
		answer.Answer = append(answer.Answer, r)
	}
	b, err := answer.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	c := &egressControl{nat: &NAT{layout: &layout{pool: pool{hostVeth: loopback, namespaceVeth: loopback, blocked: loopback}}}}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(dns.Msg)
		if m.Unpack(b) != nil {
			return
		}
		found := addresses("a.test.", m)
		if len(found) > openedByOneAnswer {
			t.Errorf("%d addresses", len(found))
		}
		for _, a := range found {
			if !a.addr.IsValid() || a.addr.Is4In6() || a.ttl < 0 || a.ttl > longestTTL {
				t.Errorf("%v for %s", a.addr, a.ttl)
			}
			c.closed(a.addr)
		}
	})
}

func TestClosedToNames(t *testing.T) {
	l, err := (&NATConfig{}).parse()
	if err == nil {
		t.Fatal(l)
	}
	config := testConfig()
	l, err = config.parse()
	if err != nil {
		t.Fatal(err)
	}
	c := &egressControl{nat: &NAT{layout: l}}
	for addr, want := range map[string]bool{
		"192.168.1.1": true, "10.1.1.1": true, "172.31.0.1": true, "100.64.1.1": true, "127.0.0.1": true, "0.0.0.0": true, "169.254.169.254": true,
		"168.63.129.16": true, "100.100.100.200": true, "224.0.0.1": true, "255.255.255.255": true, "10.0.8.2": true,
		"fd00::1": true, "fe80::1": true, "::1": true, "::": true, "::7f00:1": true, "64:ff9b::a00:1": true, "2002:a00:1::1": true, "ff02::1": true,
		"203.0.113.1": false, "8.8.8.8": false, "2606:4700::1111": false,
	} {
		if got := c.closed(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s is closed: %v", addr, got)
		}
	}
}

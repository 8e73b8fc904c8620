package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	until "drafter/internal/await"
	"drafter/internal/tour"
)

// Connections go on wherever a VM moves between three hosts, and back, also while the NAT of an anchor
// is killed and started again.
func TestAnchorsBetweenHosts(t *testing.T) {
	s := emptySite(t)
	tunnel := []string{"--tunnel-port", "7777"}
	var hosts []*otherHost
	for number := range 3 {
		hosts = append(hosts, newHost(t, s, number+1, tunnel...))
	}
	at := func(hop int) *otherHost { return hosts[hop%3] }
	vm := at(0).peer(t, "instance-0", "--laddr", at(0).addr+":1337", "--insecure")
	master := startRedis(t, "10.77.1.1:6390")
	replicate(t, at(0).addr+":3333", master)
	var clients []*client
	for hop := range 4 {
		clients = append(clients, count(t, at(hop).addr+":3333", fmt.Sprint("opened-before-", hop)))
		if hop == 2 {
			if err := hosts[0].nat.Signal(syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			<-hosts[0].nat.Done()
			hosts[0].startNAT(t, tunnel...)
		}
		next := at(hop+1).peer(t, fmt.Sprint("instance-", hop+1), "--raddr", at(hop).addr+":1337", "--laddr", at(hop+1).addr+":1337", "--insecure")
		moved(t, vm)
		quiet(t, vm)
		vm = next
	}
	here := site{Drafter: hosts[0].Drafter}
	if list := here.anchors(t); !strings.Contains(list, "ark0 on "+hosts[1].addr) {
		t.Errorf("anchors are listed as\n%s", list)
	}
	goOn(t, clients...)
	if synced := redisInfo(t, master, "stats", "sync_full"); synced != "1" {
		t.Errorf("the guest has asked for all of its master's data %s times: its own connection broke", synced)
	}
	for i, c := range clients {
		c.end(t)
		t.Logf("client %d: %d answers, the longest silence was %s", i, c.answers.Load(), c.silence())
	}
	end(t, vm)
	for _, h := range hosts {
		until.None(t, "the VM has no anchors any more", func() string {
			if list := (&site{Drafter: h.Drafter}).anchors(t); strings.Contains(list, "ark") {
				return list
			}
			return ""
		})
	}
}

// A VM moves between two hosts that have IPv6 only, and its connections go on.
func TestIPv6OnlyHosts(t *testing.T) {
	s := emptySite(t)
	var hosts []*otherHost
	for number := range 2 {
		h := newHost(t, s, number+1, "--tunnel-port", "7777")
		h.addr = "[" + h.host.Addr6 + "]"
		h.forward(t)
		words := append(slices.Clone(h.Via), "ip", "-4", "addr", "flush", "dev", "eth0")
		command(t, s.dir, words[0], words[1:]...)
		hosts = append(hosts, h)
	}
	vm := hosts[0].peer(t, "instance-0", "--laddr", hosts[0].addr+":1337", "--insecure")
	master := startRedis(t, "["+hosts[0].host.Gateway6+"]:6390")
	replicate(t, hosts[0].addr+":3333", master)
	clients := []*client{count(t, hosts[0].addr+":3333", "opened-before")}
	next := hosts[1].peer(t, "instance-1", "--raddr", hosts[0].addr+":1337", "--laddr", hosts[1].addr+":1337", "--insecure")
	moved(t, vm)
	quiet(t, vm)
	clients = append(clients, count(t, hosts[1].addr+":3333", "opened-after"))
	goOn(t, clients...)
	if synced := redisInfo(t, master, "stats", "sync_full"); synced != "1" {
		t.Errorf("the guest has asked for all of its master's data %s times: its own connection broke", synced)
	}
	for i, c := range clients {
		c.end(t)
		t.Logf("client %d: %d answers, the longest silence was %s", i, c.answers.Load(), c.silence())
	}
	end(t, next)
}

// startRedis starts a Redis of this host that guests reach.
func startRedis(t *testing.T, addr string) *redis.Client {
	t.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	server := exec.Command("redis-server", "--bind", host, "--port", port, "--protected-mode", "no", "--save", "", "--dir", t.TempDir(), "--repl-diskless-sync-delay", "0")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	c := redis.NewClient(&redis.Options{Addr: addr, MaxRetries: 10})
	t.Cleanup(func() {
		err := errors.Join(c.Close(), server.Process.Kill())
		server.Wait()
		if err != nil {
			t.Error(err)
		}
	})
	until.TrueWithin(t, tour.StepTimeout, "Redis answers", func() bool { return c.Ping(t.Context()).Err() == nil })
	return c
}

// replicate lets a guest's Redis copy another, which it opens a connection for. It stays writable.
func replicate(t *testing.T, guest string, master *redis.Client) {
	t.Helper()
	host, port, _ := net.SplitHostPort(master.Options().Addr)
	c := redis.NewClient(&redis.Options{Addr: guest, MaxRetries: 10})
	defer c.Close()
	if err := errors.Join(c.ConfigSet(t.Context(), "replica-read-only", "no").Err(), c.ReplicaOf(t.Context(), host, port).Err()); err != nil {
		t.Fatal(err)
	}
	until.TrueWithin(t, tour.StepTimeout, "the guest has copied its master", func() bool {
		return strings.Contains(c.Info(t.Context(), "replication").Val(), "master_link_status:up")
	})
}

// A tunnel whose port is blocked is found out before the VM is touched, and said. The VM moves, and
// its connections end.
func TestTunnelBlocked(t *testing.T) {
	s := emptySite(t)
	from, to := newHost(t, s, 1, "--tunnel-port", "7777"), newHost(t, s, 2, "--tunnel-port", "7777")
	for _, table := range []string{"add table ip closed", "add chain ip closed in { type filter hook input priority 0; }", "add rule ip closed in udp dport 7777 drop"} {
		words := slices.Concat(to.Via, []string{"nft"}, strings.Fields(table))
		command(t, s.dir, words[0], words[1:]...)
	}
	vm := from.peer(t, "instance-0", "--laddr", from.addr+":1337", "--insecure")
	conn, err := net.Dial("tcp", from.addr+":3333")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	next := to.peer(t, "instance-1", "--raddr", from.addr+":1337", "--laddr", "", "--insecure")
	line, err := vm.Await(t.Context(), "Connections of the VM end when it moves", "The VM runs at its target; sending what is left")
	if err != nil || !strings.Contains(line.Text, "is UDP port 7777 open there") {
		t.Errorf("%s, %v", line.Text, err)
	}
	moved(t, vm)
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection ends with %v", err)
	}
	end(t, next)
}

// A VM whose move fails when its connections lead to the target already goes on with them where it
// was.
func TestTunnelRescue(t *testing.T) {
	s := emptySite(t)
	var hosts []*otherHost
	for number := 1; number <= 2; number++ {
		hosts = append(hosts, newHost(t, s, number, "--tunnel-port", "7777", "--tunnel-address", fmt.Sprintf("10.77.%d.2", number)))
	}
	from, to := hosts[0], hosts[1]
	vm := from.peer(t, "instance", "--laddr", from.addr+":1337", "--insecure")
	c := count(t, from.addr+":3333", "key")
	anchor := filepath.Join(from.host.Root(), "run/drafter/anchors/ark0.json")
	for round := range 3 {
		l := newLinkAt(t, "10.77.2.1:0", from.addr+":1337")
		target, err := to.Start(s.peerArgs(fmt.Sprint("target-", round), "--raddr", l.addr, "--insecure")...)
		if err != nil {
			t.Fatal(err)
		}
		for {
			if _, err := os.Stat(anchor); err == nil {
				break
			}
			select {
			case <-target.Done():
				t.Fatal("no anchor was made: ", target.Wait())
			case <-time.After(100 * time.Microsecond):
			}
		}
		l.cut()
		line, err := vm.Await(t.Context(), "The migration failed; the VM goes on here", "The VM runs at its target; sending what is left")
		if err != nil || !strings.Contains(line.Text, "goes on here") {
			t.Fatalf("%s, %v", line.Text, err)
		}
		if target.Wait() == nil {
			t.Error("the target has ended as if nothing had been")
		}
		goOn(t, c)
		if list := (&site{Drafter: from.Drafter}).anchors(t); strings.Contains(list, "ark") {
			t.Errorf("round %d: anchors of a VM that has not moved:\n%s", round, list)
		}
	}
	c.end(t)
	t.Logf("%d answers, the longest silence was %s", c.answers.Load(), c.silence())
	end(t, vm)
}

// A bad way between hosts costs time, and nothing else.
func TestBadTunnel(t *testing.T) {
	for _, way := range []badWay{{name: "loses", loss: 0.01}, {name: "loses much", loss: 0.1}, {name: "mixes", jitter: 5 * time.Millisecond}, {name: "is long", delay: 50 * time.Millisecond}} {
		t.Run(way.name, func(t *testing.T) {
			s := emptySite(t)
			var hosts []*otherHost
			for number := 1; number <= 2; number++ {
				hosts = append(hosts, newHost(t, s, number, "--tunnel-port", "7777", "--tunnel-address", fmt.Sprintf("10.77.%d.1", number)))
				way.relay(t, fmt.Sprintf("10.77.%d.1:7777", number), fmt.Sprintf("10.77.%d.2:7777", number))
			}
			vm := hosts[0].peer(t, "instance-0", "--laddr", hosts[0].addr+":1337", "--insecure")
			c := count(t, hosts[0].addr+":3333", "key")
			for hop := range 2 {
				at, to := hosts[hop], hosts[1-hop]
				next := to.peer(t, fmt.Sprint("instance-", hop+1), "--raddr", at.addr+":1337", "--laddr", to.addr+":1337", "--insecure")
				t.Log(moved(t, vm).Text)
				quiet(t, vm)
				vm = next
				goOn(t, c)
			}
			c.end(t)
			t.Logf("%d answers, the longest silence was %s", c.answers.Load(), c.silence())
			end(t, vm)
		})
	}
}

// badWay is a way that packets take between hosts.
type badWay struct {
	name          string
	loss          float64
	delay, jitter time.Duration // in each direction
}

// narrowest is the most that a UDP packet holds which passes wherever IPv6 does: 1280 bytes, less
// headers of 40 and 8.
const narrowest = 1280 - 48

// relay passes what comes to an address on to a server, and its answers back.
func (w badWay) relay(t *testing.T, addr, server string) {
	t.Helper()
	front, err := net.ListenPacket("udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	backs := map[string]net.Conn{}
	pass := func(b []byte, send func([]byte)) {
		if len(b) > narrowest {
			t.Errorf("a packet of %d bytes does not pass everywhere", len(b))
		}
		if rand.Float64() < w.loss {
			return
		}
		b = append([]byte{}, b...)
		later := w.delay
		if w.jitter > 0 {
			later += rand.N(w.jitter)
		}
		if later == 0 {
			send(b)
			return
		}
		wait.Go(func() {
			time.Sleep(later)
			send(b)
		})
	}
	wait.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := front.ReadFrom(buf)
			if err != nil {
				break
			}
			back := backs[from.String()]
			if back == nil {
				if back, err = net.Dial("udp4", server); err != nil {
					t.Error(err)
					break
				}
				backs[from.String()] = back
				wait.Go(func() {
					buf := make([]byte, 1<<16)
					for {
						n, err := back.Read(buf)
						if errors.Is(err, syscall.ECONNREFUSED) {
							continue
						}
						if err != nil {
							return
						}
						pass(buf[:n], func(b []byte) { front.WriteTo(b, from) })
					}
				})
			}
			pass(buf[:n], func(b []byte) { back.Write(b) })
		}
		for _, back := range backs {
			back.Close()
		}
	})
	t.Cleanup(func() {
		front.Close()
		wait.Wait()
	})
}

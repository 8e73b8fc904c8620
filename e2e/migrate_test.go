package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"drafter/internal/testhost"
	"drafter/internal/tour"
)

// moved waits until a peer has given its VM away and ended.
func moved(t *testing.T, vm *tour.Service) tour.Line {
	t.Helper()
	line, err := vm.Await(t.Context(), "Completed migration")
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Wait(); err != nil {
		t.Fatal(err)
	}
	return line
}

// quiet checks that a peer had nothing to complain of.
func quiet(t *testing.T, vm *tour.Service) {
	t.Helper()
	if complaints := vm.Complaints(); len(complaints) > 0 {
		t.Errorf("a good move was complained of: %v", complaints)
	}
}

// serverInfo returns a field of Redis' INFO server.
func serverInfo(t *testing.T, c *redis.Client, field string) string {
	t.Helper()
	return redisInfo(t, c, "server", field)
}

// redisInfo returns a field of a section of Redis' INFO.
func redisInfo(t *testing.T, c *redis.Client, section, field string) string {
	t.Helper()
	info, err := c.Info(t.Context(), section).Result()
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(info, field+":")
	value, _, _ := strings.Cut(after, "\r\n")
	return value
}

// load appends numbers to a list, one after the other, wherever the VM is.
type load struct {
	mu    sync.Mutex
	addrs []string
	acked []int
	times []time.Time // of the acknowledgements
	stop  context.CancelFunc
	wg    sync.WaitGroup
	gap   time.Duration // the longest time between two acknowledgements
}

// startLoad begins. The client turns to the next address when one does not answer.
func startLoad(ctx context.Context, addrs ...string) *load {
	l := &load{addrs: addrs}
	ctx, l.stop = context.WithCancel(ctx)
	l.wg.Go(func() {
		var clients []*redis.Client
		for _, a := range addrs {
			c := redis.NewClient(&redis.Options{Addr: a, MaxRetries: -1, DialTimeout: 100 * time.Millisecond, ReadTimeout: 300 * time.Millisecond, WriteTimeout: 300 * time.Millisecond})
			defer c.Close()
			clients = append(clients, c)
		}
		last := time.Now()
		for i, at := 0, 0; ctx.Err() == nil; {
			// A number may be pushed twice, when the answer was lost; it is acknowledged once it is
			// in the list.
			if err := clients[at].RPush(ctx, "load", i, strings.Repeat("x", 1000)).Err(); err != nil {
				at = (at + 1) % len(clients)
				continue
			}
			l.mu.Lock()
			l.acked, l.times = append(l.acked, i), append(l.times, time.Now())
			l.gap = max(l.gap, time.Since(last))
			l.mu.Unlock()
			last = time.Now()
			i++
		}
	})
	return l
}

// end stops the load and checks that every acknowledged number is there, in order.
func (l *load) end(t *testing.T, c *redis.Client) {
	t.Helper()
	l.stop()
	l.wg.Wait()
	list, err := c.LRange(t.Context(), "load", 0, -1).Result()
	if err != nil {
		t.Fatal(err)
	}
	next := 0
	for i := 0; i < len(list); i += 2 {
		switch list[i] {
		case fmt.Sprint(next):
			next++
		case fmt.Sprint(next - 1): // again, after its answer was lost
		default:
			t.Fatalf("entry %d is %s, want %d", i/2, list[i], next)
		}
	}
	if next < len(l.acked) {
		t.Fatalf("%d numbers were acknowledged, %d are there", len(l.acked), next)
	}
	t.Logf("%d writes acknowledged, longest silence %s", len(l.acked), l.gap.Round(time.Millisecond))
}

// otherHost is a host with its own NAT.
type otherHost struct {
	tour.Drafter
	addr string // of the host
	host *testhost.Host
	nat  *tour.Service
}

// limit lets rate bits per second come to the host.
func (o *otherHost) limit(t *testing.T, rate uint64) {
	t.Helper()
	if err := o.host.Limit(rate); err != nil {
		t.Fatal(err)
	}
}

func newHost(t *testing.T, s *site, number int, natFlags ...string) *otherHost {
	t.Helper()
	h, err := testhost.NewHost(number, 1_000_000_000)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	o := &otherHost{Drafter: s.Drafter, addr: h.Addr, host: h}
	o.Via = h.Via(s.dir)
	o.startNAT(t, natFlags...)
	t.Cleanup(func() { end(t, o.nat) })
	o.forward(t)
	return o
}

// forward publishes the guest's Redis.
func (o *otherHost) forward(t *testing.T) {
	t.Helper()
	forwarder, err := o.Start("forwarder", "--port-forwards", tour.Forward("ark0", "6379", o.addr+":3333"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, forwarder) })
	if _, err := forwarder.Await(t.Context(), "Forwarding"); err != nil {
		t.Fatal(err)
	}
}

// startNAT starts the host's NAT.
func (o *otherHost) startNAT(t *testing.T, flags ...string) {
	t.Helper()
	var err error
	if o.nat, err = o.Start(append([]string{"nat", "--namespace-count", "1", "--host-interface", "eth0"}, flags...)...); err != nil {
		t.Fatal(err)
	}
	if _, err := o.nat.Await(t.Context(), "NAT is up"); err != nil {
		t.Fatal(err)
	}
}

// peer starts a peer on the host and waits until its VM runs.
func (o *otherHost) peer(t *testing.T, instance string, flags ...string) *tour.Service {
	t.Helper()
	s := &site{Drafter: o.Drafter}
	return s.peer(t, instance, flags...)
}

// Redis under load moves between three hosts with addresses of their own; the client follows it
// from forwarder to forwarder.
func TestThreeHosts(t *testing.T) {
	s := emptySite(t)
	hosts := []*otherHost{newHost(t, s, 1), newHost(t, s, 2), newHost(t, s, 3)}
	clients := make([]*redis.Client, len(hosts))
	var addrs []string
	for i, h := range hosts {
		addrs = append(addrs, h.addr+":3333")
		clients[i] = redis.NewClient(&redis.Options{Addr: addrs[i], MaxRetries: 10})
		defer clients[i].Close()
	}
	vm := hosts[0].peer(t, "instance-0", "--laddr", hosts[0].addr+":1337", "--insecure")
	runID := serverInfo(t, clients[0], "run_id")
	l := startLoad(t.Context(), addrs...)
	for i := 1; i < len(hosts); i++ {
		time.Sleep(time.Second) // of load between moves
		next := hosts[i].peer(t, fmt.Sprintf("instance-%d", i), "--raddr", hosts[i-1].addr+":1337", "--laddr", hosts[i].addr+":1337", "--insecure")
		t.Log(moved(t, vm).Text)
		vm = next
		if got := serverInfo(t, clients[i], "run_id"); got != runID {
			t.Errorf("move %d: this is another Redis process", i)
		}
	}
	time.Sleep(time.Second) // of load after the last
	l.end(t, clients[len(hosts)-1])
	if up := serverInfo(t, clients[len(hosts)-1], "uptime_in_seconds"); up == "0" || up == "1" {
		t.Errorf("Redis is up for %s s only", up)
	}
	end(t, vm)
}

// generation is the generation ID that QEMU gives to the one VM at the site.
func (s *site) generation(t *testing.T) string {
	t.Helper()
	arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.vmmPID(t)))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(arguments), "vmgenid,guid=")
	id, _, _ := strings.Cut(after, "\x00")
	if _, err := uuid.Parse(id); err != nil {
		t.Fatalf("the VM has generation ID %q", id)
	}
	return id
}

// A VM moves ten times, is suspended and resumed between, and goes back to where it was; nothing is
// lost.
func TestChain(t *testing.T) {
	s := emptySite(t)
	addrs := []string{"127.0.0.1:3333", "127.0.0.1:4444"}
	clients := []*redis.Client{s.redisIn(t, "ark0", addrs[0]), s.redisIn(t, "ark1", addrs[1])}
	ports := []string{"localhost:1337", "localhost:1338"}
	start := func(at int, flags ...string) *tour.Service {
		return s.peer(t, fmt.Sprintf("instance-%d", at), append([]string{"--netns", fmt.Sprintf("ark%d", at), "--laddr", ports[at]}, flags...)...)
	}
	vm := start(0)
	generation := s.generation(t)
	runID := serverInfo(t, clients[0], "run_id")
	moves := 10
	if testing.Short() {
		moves = 3
	}
	for move := range moves {
		from, to := move%2, (move+1)%2
		for i := range 200 {
			if err := clients[from].Set(t.Context(), fmt.Sprintf("move:%d:%d", move, i), value(move, i), 0).Err(); err != nil {
				t.Fatalf("move %d: %v", move, err)
			}
		}
		waiting := clientThatWaits(t, addrs[from])
		next := start(to, "--raddr", ports[from])
		line := moved(t, vm)
		// Who is connected with the place that the VM has left goes on, and who connects there
		// reaches it.
		if got, err := clients[from].LPush(t.Context(), "nothing", "something").Result(); err != nil || got != 1 {
			t.Errorf("move %d: a client where the VM was: %d, %v", move, got, err)
		}
		answer := make([]byte, len("*2\r\n$7\r\nnothing\r\n$9\r\nsomething\r\n"))
		if _, err := io.ReadFull(waiting, answer); err != nil {
			t.Errorf("move %d: a client that waits: %v", move, err)
		}
		t.Logf("move %d: took %s, downtime %s, %d bytes", move, line.Took, line.Downtime, line.Bytes)
		quiet(t, vm)
		quiet(t, next)
		vm = next
		if move%3 == 2 {
			end(t, vm)
			vm = start(to)
			resumed := s.generation(t)
			if resumed == generation {
				t.Errorf("after move %d: a VM that was resumed, as others may have been from the same files, has generation ID %s again", move, resumed)
			}
			generation = resumed
		}
		if got := s.generation(t); got != generation {
			t.Errorf("move %d: the generation ID is %s, which makes the guest take itself for a clone; it was %s", move, got, generation)
		}
		for old := range move + 1 {
			for i := range 200 {
				if got, err := clients[to].Get(t.Context(), fmt.Sprintf("move:%d:%d", old, i)).Result(); err != nil || got != value(old, i) {
					t.Fatalf("after move %d: key %d of move %d is %q, %v", move, i, old, got, err)
				}
			}
		}
		now, err := clients[to].Time(t.Context()).Result()
		if off := time.Since(now); err != nil || off.Abs() > time.Second {
			t.Errorf("move %d: the guest's clock is off by %s, %v", move, off, err)
		}
		if got := serverInfo(t, clients[to], "run_id"); got != runID {
			t.Fatalf("move %d: this is another Redis process", move)
		}
	}
	end(t, vm)
	for i := range moves % 2 {
		if line := s.fails(t, s.peerArgs(fmt.Sprintf("instance-%d", i))...); !strings.Contains(line, "moved away") {
			t.Errorf("an instance that has moved away: %s", line)
		}
	}
}

// Without anchors, who is connected with the place that the VM has left hears of it at once, and so
// does who connects.
func TestNoAnchor(t *testing.T) {
	s := emptySite(t)
	addr := "127.0.0.1:3333"
	s.redisIn(t, "ark0", addr)
	for i, flags := range [][2]string{{"--no-anchor", "--no-anchor=false"}, {"--no-anchor=false", "--no-anchor"}} {
		vm := s.peer(t, fmt.Sprint("source-", i), "--netns", "ark0", "--laddr", "localhost:1337", flags[0])
		waiting := clientThatWaits(t, addr)
		next := s.peer(t, fmt.Sprint("target-", i), "--netns", "ark1", "--laddr", "localhost:1338", "--raddr", "localhost:1337", flags[1])
		moved(t, vm)
		if _, err := waiting.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: a client that waits hears %v", flags, err)
		}
		if c, err := net.DialTimeout("tcp", addr, 10*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: a client that connects to where the VM was: %v, %v", flags, c, err)
		}
		quiet(t, vm)
		end(t, next)
	}
}

// clientThatWaits blocks in a Redis until there is something. It gives up after a minute.
func clientThatWaits(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := c.Write([]byte("PING\r\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, len("+PONG\r\n"))); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("BLPOP nothing 0\r\n")); err != nil {
		t.Fatal(err)
	}
	return c
}

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"

	"drafter/internal/need"
	"drafter/internal/tour"
)

const python = "/usr/bin/python3" // Debian's own

// Each protocol's own client holds its connection wherever a VM with many servers moves between three
// hosts, and back: it never connects again, and gets the bytes that are due.
func TestProtocols(t *testing.T) {
	for _, program := range []string{"redis-cli", "psql", "pgbench", "ssh", "curl", "iperf3", python} {
		need.Program(t, program)
	}
	if out, err := exec.Command(python, "-c", "import websockets").CombinedOutput(); err != nil {
		need.Lacks(t, "python3-websockets", fmt.Sprintf("install the Debian package python3-websockets: %s", out))
	}
	j := newJourney(t, 3, 1)
	vm := j.begin(t, 0, "vm")
	server := j.hosts[0].addr
	clients := []*client{
		redisCLI(t, server), psql(t, server), pgbench(t, server, j.dir), ssh(t, server), upload(t, server, j.hosts[0].host.Gateway),
		curl(t, server), websocket(t, server), iperf3(t, server), udpEcho(t, server), quicEcho(t, server),
	}
	goOn(t, clients...) // each has begun
	var quiet []time.Duration
	for _, c := range clients {
		c.silence()
	}
	goOn(t, clients...)
	for _, c := range clients {
		quiet = append(quiet, c.silence())
	}
	for range need.Rounds(3, 10) {
		line := vm.move(t)
		t.Logf("move to %s: downtime %s", j.hosts[vm.at].addr, line.Downtime.Round(time.Millisecond))
		goOn(t, clients...)
	}
	for i, c := range clients {
		c.end(t)
		t.Logf("%-10s %5d answers, longest silence %s; without a move %s", c.name, c.answers.Load(), c.silence(), quiet[i])
	}
	end(t, vm.peer)
}

// A thousand connections outlast ten moves.
func TestThousandConnections(t *testing.T) {
	need.Soak(t)
	j := newJourney(t, 3, 1)
	vm := j.begin(t, 0, "vm")
	var clients []*client
	for n := range 1000 {
		clients = append(clients, tcpEcho(t, fmt.Sprint("connection ", n), j.hosts[0].addr, time.Second))
	}
	goOn(t, clients...)
	for range 10 {
		line := vm.move(t)
		t.Logf("move to %s: downtime %s", j.hosts[vm.at].addr, line.Downtime.Round(time.Millisecond))
		goOn(t, clients...)
	}
	var answers int64
	var silences []time.Duration
	for _, c := range clients {
		c.end(t)
		answers, silences = answers+c.answers.Load(), append(silences, c.silence())
	}
	slices.Sort(silences)
	t.Logf("%d answers; the longest silence of a connection is %s in the median, and %s at most", answers, silences[len(silences)/2], silences[len(silences)-1])
	end(t, vm.peer)
}

// Two VMs whose guests have the same address and ports move at once, there and back. Each answers its
// own clients, which have the same addresses and ports as those of the other.
func TestTwoMovesAtOnce(t *testing.T) {
	j := newJourney(t, 2, 2)
	var vms []*traveller
	var clients []*client
	local := map[string]string{"tcp4": j.hosts[0].host.Gateway + ":0", "udp4": j.hosts[0].host.Gateway + ":0"}
	dial := func(network, addr string) net.Conn {
		conn := dialFrom(t, network, local[network], addr)
		local[network] = conn.LocalAddr().String() // the next one's, too
		return conn
	}
	for number, name := range []string{"a", "b"} {
		vm := j.begin(t, number, name)
		vms = append(vms, vm)
		clients = append(clients,
			namedRedis(t, name, dial("tcp4", vm.external(j.hosts[0].addr, 6379))),
			namedUDP(t, name, dial("udp4", vm.external(j.hosts[0].addr, 7))))
	}
	goOn(t, clients...)
	for range need.Rounds(2, 10) {
		lines := make([]tour.Line, len(vms))
		for _, vm := range vms {
			vm.depart(t)
		}
		for i, vm := range vms {
			lines[i] = vm.arrive(t)
		}
		t.Logf("moves to %s: downtimes %s and %s", j.hosts[vms[0].at].addr, lines[0].Downtime.Round(time.Millisecond), lines[1].Downtime.Round(time.Millisecond))
		goOn(t, clients...)
	}
	for _, c := range clients {
		c.end(t)
		t.Logf("%-10s %6d answers, longest silence %s", c.name, c.answers.Load(), c.silence())
	}
	for _, vm := range vms {
		end(t, vm.peer)
	}
}

// journey is a row of hosts between which VMs with many servers move.
type journey struct {
	*site
	pkg   string
	hosts []*otherHost
}

// newJourney makes hosts with so many namespaces each. The first host publishes all that is there.
func newJourney(t *testing.T, hosts, namespaces int) *journey {
	t.Helper()
	pkg := serversPackage(t)
	j := &journey{site: emptySite(t), pkg: pkg}
	if need.Soaking() {
		j.Bin = filepath.Join(work, "bin/plain/drafter") // it measures, too
	}
	for number := range hosts {
		j.hosts = append(j.hosts, newHost(t, j.site, number+1, "--tunnel-port", "7777", "--namespace-count", fmt.Sprint(namespaces)))
	}
	for number := range namespaces {
		var forwards []map[string]string
		for port := range serverPorts {
			internal, protocol, _ := strings.Cut(port, "/")
			n, err := strconv.Atoi(internal)
			if err != nil {
				t.Fatal(err)
			}
			vm := traveller{number: number}
			forwards = append(forwards, map[string]string{"netns": vm.netns(), "internalPort": internal, "protocol": protocol, "externalAddr": vm.external(j.hosts[0].addr, n)})
		}
		b, err := json.Marshal(forwards)
		if err != nil {
			t.Fatal(err)
		}
		forwarder, err := j.hosts[0].Start("forwarder", "--port-forwards", string(b))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { end(t, forwarder) })
		if _, err := forwarder.Await(t.Context(), "Forwarding"); err != nil {
			t.Fatal(err)
		}
	}
	return j
}

// traveller is a VM on a journey.
type traveller struct {
	*journey
	number  int // of its namespace at each host
	name    string
	at, hop int
	peer    *tour.Service
	next    *tour.Service // to which it moves
}

func (v *traveller) netns() string { return fmt.Sprintf("ark%d", v.number) }

// external is where the first host publishes a port of the VM.
func (v *traveller) external(host string, port int) string {
	return net.JoinHostPort(host, fmt.Sprint(port+v.number*10_000))
}

func (v *traveller) args(at int, flags ...string) []string {
	return v.peerArgs(fmt.Sprintf("%s-%d", v.name, v.hop), append([]string{
		"--package", v.pkg, "--netns", v.netns(), "--laddr", v.external(v.hosts[at].addr, 1337), "--insecure",
	}, flags...)...)
}

// begin starts a VM on the first host, in its namespace of that number.
func (j *journey) begin(t *testing.T, number int, name string) *traveller {
	t.Helper()
	v := &traveller{journey: j, number: number, name: name}
	var err error
	if v.peer, err = j.hosts[0].Start(v.args(0)...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = v.peer.End() // of a test that has failed
		if v.next != nil {
			_ = v.next.End()
		}
	})
	if _, err := v.peer.Await(t.Context(), "Resumed VM"); err != nil {
		t.Fatal(err)
	}
	return v
}

// depart begins a move to the next host.
func (v *traveller) depart(t *testing.T) {
	t.Helper()
	from := v.hosts[v.at].addr
	v.at, v.hop = (v.at+1)%len(v.hosts), v.hop+1
	var err error
	if v.next, err = v.hosts[v.at].Start(v.args(v.at, "--raddr", v.external(from, 1337))...); err != nil {
		t.Fatal(err)
	}
}

// arrive waits for the move's end, and says how it went.
func (v *traveller) arrive(t *testing.T) tour.Line {
	t.Helper()
	line := moved(t, v.peer)
	quiet(t, v.peer)
	v.peer = v.next
	return line
}

func (v *traveller) move(t *testing.T) tour.Line {
	t.Helper()
	v.depart(t)
	return v.arrive(t)
}

// redisCLI counts, and has payloads sent back. Redis tells that it is one connection.
func redisCLI(t *testing.T, host string) *client {
	t.Helper()
	p := launch(t, "redis-cli", "-h", host)
	first, err := p.ask("CLIENT ID")
	if err != nil {
		t.Fatal(err)
	}
	return converse(t, "redis-cli", 50*time.Millisecond, func(n int) error {
		if n%10 == 0 {
			payload := payload(20_000)
			if err := p.expect("ECHO "+payload, payload); err != nil {
				return err
			}
		}
		return p.expect("INCR redis-cli", strconv.Itoa(n))
	}, func() error {
		if err := p.expect("CLIENT ID", first); err != nil {
			return err
		}
		return p.end()
	})
}

// query asks PostgreSQL on a connection of its own.
func query(host, sql string) (string, error) {
	cmd := exec.Command("psql", "-h", host, "-U", "postgres", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", sql)
	cmd.Dir = work
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("psql: %w: %s", err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// psql stores numbers with payloads. Each is a transaction of one server process.
func psql(t *testing.T, host string) *client {
	t.Helper()
	if _, err := query(host, "CREATE TABLE numbers (n int PRIMARY KEY, payload text)"); err != nil {
		t.Fatal(err)
	}
	p := launch(t, "psql", "-h", host, "-U", "postgres", "-XAtq", "-v", "ON_ERROR_STOP=1")
	process, err := p.ask("SELECT pg_backend_pid();")
	if err != nil {
		t.Fatal(err)
	}
	stored := 0
	return converse(t, "psql", 50*time.Millisecond, func(n int) error {
		payload := payload(5_000)
		stored = n
		return p.expect(fmt.Sprintf("INSERT INTO numbers VALUES (%d, '%s') RETURNING n, pg_backend_pid(), payload;", n, payload), fmt.Sprintf("%d|%s|%s", n, process, payload))
	}, func() error {
		if err := p.expect("SELECT count(*), max(n), pg_backend_pid() FROM numbers;", fmt.Sprintf("%d|%d|%s", stored, stored, process)); err != nil {
			return err
		}
		return p.end()
	})
}

// pgbench counts in transactions. What it has counted is there, and was counted by as many server
// processes as there are clients.
func pgbench(t *testing.T, host, dir string) *client {
	t.Helper()
	const clients = 4
	_, err := query(host, fmt.Sprintf("CREATE TABLE counters AS SELECT id, 0 AS n, NULL::int AS process FROM generate_series(0, %d) id", clients-1))
	if err != nil {
		t.Fatal(err)
	}
	script, log := filepath.Join(dir, "count.sql"), filepath.Join(dir, "pgbench")
	write(t, script, "UPDATE counters SET n = n + 1, process = pg_backend_pid() WHERE id = :client_id AND coalesce(process, pg_backend_pid()) = pg_backend_pid();\n")
	return hold(t, "pgbench", func(ctx context.Context, c *client) error {
		cmd := exec.CommandContext(ctx, "pgbench", "-h", host, "-U", "postgres", "-n", "-f", script, "-c", fmt.Sprint(clients), "-R", "20", "-T", "3600", "-P", "1", "-l", "--log-prefix", log, "postgres")
		cmd.Dir = dir
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGALRM) } // its time is over
		var stdout bytes.Buffer
		cmd.Stdout = &stdout
		said, err := follow(cmd, func(line string) error {
			if m := pgbenchProgress.FindStringSubmatch(line); m != nil {
				tps, err := strconv.Atoi(m[1])
				c.answers.Add(int64(tps)) // in a second
				return err
			}
			return nil
		})
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("%w: %s", err, said)
		}
		m := pgbenchResult.FindStringSubmatch(stdout.String())
		if m == nil || strings.Contains(said, "abort") {
			return fmt.Errorf("pgbench says %s%s", stdout.String(), said)
		}
		counted, err := query(host, "SELECT sum(n) FROM counters")
		if err != nil {
			return err
		}
		if counted != m[1] {
			return fmt.Errorf("%s transactions are counted of %s that were committed", counted, m[1])
		}
		longest, err := longestTransaction(log)
		c.heard(longest)
		return err
	})
}

var (
	pgbenchProgress = regexp.MustCompile(`^progress: \S+ s, (\d+)\.\d+ tps`)
	pgbenchResult   = regexp.MustCompile(`number of transactions actually processed: (\d+)\n`)
)

// longestTransaction reads logs of pgbench: the third field of a line is the time in microseconds
// since the transaction was due, the seventh by how much it began later.
func longestTransaction(prefix string) (longest time.Duration, err error) {
	logs, err := filepath.Glob(prefix + ".*")
	if err != nil || len(logs) == 0 {
		return 0, fmt.Errorf("no log of transactions: %w", err)
	}
	for _, path := range logs {
		b, err := os.ReadFile(path)
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(b)) {
			var n [7]int64
			if _, err := fmt.Sscan(line, &n[0], &n[1], &n[2], &n[3], &n[4], &n[5], &n[6]); err != nil {
				return 0, fmt.Errorf("%q: %w", line, err)
			}
			longest = max(longest, time.Duration(n[2]-n[6])*time.Microsecond)
		}
	}
	return longest, nil
}

// follow runs a program, and gives each line that it says on stderr to hear, until it ends or
// that fails. It returns what was said last.
func follow(cmd *exec.Cmd, hear func(line string) error) (said string, err error) {
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return "", err
	}
	var wrong error
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if said = lines.Text(); wrong == nil {
			if wrong = hear(said); wrong != nil {
				_ = cmd.Process.Kill()
			}
		}
	}
	return said, errors.Join(wrong, cmd.Wait())
}

// secureShell are a guest's shell's arguments.
func secureShell(host string, command string) []string {
	return []string{"-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "root@" + host, command}
}

// ssh has a command run that counts, and sends back what it reads.
func ssh(t *testing.T, host string) *client {
	t.Helper()
	p := launch(t, "ssh", secureShell(host, `n=0; while read -r line; do n=$((n+1)); echo "$n $line"; done`)...)
	return converse(t, "ssh", 50*time.Millisecond, func(n int) error {
		payload := payload(100 + n%10*100)
		return p.expect(payload, fmt.Sprintf("%d %s", n, payload))
	}, p.end)
}

// upload is one of the guest, to a server outside.
func upload(t *testing.T, host, outside string) *client {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(outside, "0"))
	if err != nil {
		t.Fatal(err)
	}
	p := launch(t, "ssh", secureShell(host, "seq 1 999999999 | curl -sS --limit-rate 200k -T - http://"+l.Addr().String())...)
	return hold(t, "upload", func(ctx context.Context, c *client) error {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		var connections atomic.Int64
		var handlers sync.WaitGroup
		server := http.Server{
			Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				handlers.Add(1)
				defer handlers.Done()
				cancel(c.numbers(r.Body))
			}),
			ConnState: func(_ net.Conn, state http.ConnState) {
				if state == http.StateNew && connections.Add(1) > 1 {
					cancel(errors.New("the guest has connected again"))
				}
			},
		}
		defer handlers.Wait()
		defer server.Close()
		go server.Serve(l)
		<-ctx.Done()
		_ = p.cmd.Process.Kill()
		err := p.end()
		if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
			return errors.Join(cause, err)
		}
		return nil
	})
}

// numbers reads numbers, a line each, from 1 on.
func (c *client) numbers(r io.Reader) error {
	last := time.Now()
	lines := bufio.NewReader(readerFunc(func(b []byte) (int, error) {
		n, err := r.Read(b)
		c.heard(time.Since(last))
		last = time.Now()
		return n, err
	}))
	for n := 1; ; n++ {
		line, err := lines.ReadString('\n')
		if err != nil {
			return err
		}
		if err := compare(line, fmt.Sprintln(n)); err != nil {
			return err
		}
	}
}

type readerFunc func(b []byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// curl gets the same file again and again on one connection of HTTP/1.1. nginx tells that it is one,
// too.
func curl(t *testing.T, host string) *client {
	t.Helper()
	return hold(t, "curl", func(ctx context.Context, c *client) error {
		cmd := exec.CommandContext(ctx, "curl", "-sS", "--rate", "10/s", "-w", `%{stderr}%{http_code} %{num_connects} %header{x-connection} %{time_total}\n`, "http://"+host+"/pattern?[1-1000000000]")
		body := &repetition{of: pattern()}
		cmd.Stdout = body
		first := 0
		said, err := follow(cmd, func(line string) error {
			var status, connects, connection int
			var took float64
			if _, err := fmt.Sscan(line, &status, &connects, &connection, &took); err != nil && ctx.Err() == nil {
				return fmt.Errorf("curl says %s", line)
			}
			if first == 0 && connects == 1 {
				first, connects = connection, 0
			}
			if ctx.Err() == nil && (status != http.StatusOK || connects != 0 || connection != first) {
				return fmt.Errorf("status %d, %d new connections, connection %d after %d", status, connects, connection, first)
			}
			c.heard(time.Duration(took * float64(time.Second)))
			return nil
		})
		if ctx.Err() == nil {
			return fmt.Errorf("it has ended: %w: %s", err, said)
		}
		return body.err
	})
}

// repetition expects the same bytes again and again.
type repetition struct {
	of  []byte
	at  int
	err error
}

func (r *repetition) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		n := min(len(rest), len(r.of)-r.at)
		if r.err = compare(string(rest[:n]), string(r.of[r.at:r.at+n])); r.err != nil {
			return 0, r.err
		}
		rest, r.at = rest[n:], (r.at+n)%len(r.of)
	}
	return len(b), nil
}

//go:embed testdata/websocket-client
var websocketClient string

// websocket has payloads sent back as messages. The server counts them, and tells the connection.
func websocket(t *testing.T, host string) *client {
	t.Helper()
	p := launch(t, python, "-c", websocketClient, "ws://"+net.JoinHostPort(host, "8765"))
	return converse(t, "websocket", 50*time.Millisecond, func(n int) error {
		payload := payload(1 + n%20*1000)
		return p.expect(payload, fmt.Sprintf("1 %d %s", n, payload))
	}, p.end)
}

// iperf3 sends and receives. It does not check what.
func iperf3(t *testing.T, host string) *client {
	t.Helper()
	const interval = 100 * time.Millisecond
	return hold(t, "iperf3", func(ctx context.Context, c *client) error {
		cmd := exec.CommandContext(ctx, "sh", "-c", `exec iperf3 "$@" 3>&1 >&2 2>&3`, "sh", // its lines on stderr, and its errors on stdout
			"-c", host, "--bidir", "-b", "1M", "-l", "4K", "-i", fmt.Sprint(interval.Seconds()), "-t", "3600", "--forceflush")
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
		silent := time.Duration(0)
		var complaint bytes.Buffer
		cmd.Stdout = &complaint
		_, err := follow(cmd, func(line string) error {
			m := iperfInterval.FindStringSubmatch(line)
			switch {
			case m == nil:
			case m[1] == "0.00":
				silent += interval
			default:
				c.heard(silent)
				silent = 0
			}
			return nil
		})
		if said := complaint.String(); ctx.Err() == nil || !strings.HasSuffix(said, "interrupt - the client has terminated\n") {
			return fmt.Errorf("it has ended: %w: %s", err, said)
		}
		return nil
	})
}

// iperfInterval matches what was received in an interval.
var iperfInterval = regexp.MustCompile(`^\[ *\d+\]\[RX-C\] +\S+ +sec +(\S+) \S*Bytes`)

// tcpEcho has payloads sent back.
func tcpEcho(t *testing.T, name, host string, pace time.Duration) *client {
	t.Helper()
	conn, err := net.DialTimeout("tcp", net.JoinHostPort(host, "7"), impatience)
	if err != nil {
		t.Fatal(err)
	}
	return converse(t, name, pace, func(int) error { return echo(conn, payload(2_000)) }, conn.Close)
}

type stream interface {
	io.ReadWriter
	SetDeadline(t time.Time) error
}

// echo has a payload sent back.
func echo(s stream, payload string) error {
	s.SetDeadline(time.Now().Add(impatience))
	if _, err := io.WriteString(s, payload); err != nil {
		return err
	}
	answer := make([]byte, len(payload))
	if _, err := io.ReadFull(s, answer); err != nil {
		return err
	}
	return compare(string(answer), payload)
}

// udpEcho has packets sent back.
func udpEcho(t *testing.T, host string) *client {
	t.Helper()
	conn, err := net.Dial("udp4", net.JoinHostPort(host, "7"))
	if err != nil {
		t.Fatal(err)
	}
	u := &udpClient{Conn: conn, server: "nobody"}
	return converse(t, "UDP", 50*time.Millisecond, func(n int) error { return u.echo(payload(100 + n%10*130)) }, func() error { return u.end(t) })
}

// udpClient has packets sent back. The server tells its own name and the client's address, and counts.
type udpClient struct {
	net.Conn
	server   string
	number   int // of the last request
	sent     int // packets
	counted  int // by the server
	received int
}

// echo has a packet sent back. It is sent again each second: UDP may lose it, and its answer.
func (u *udpClient) echo(payload string) error {
	u.number++
	for begin := time.Now(); time.Since(begin) < impatience; {
		u.sent++
		if _, err := fmt.Fprint(u, u.number, " ", payload); err != nil {
			return err
		}
		for sent := time.Now(); ; {
			u.SetReadDeadline(sent.Add(time.Second))
			number, err := u.receive(payload)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil || number == u.number {
				return err
			}
		}
	}
	return errors.New("no answer comes")
}

// receive reads an answer. One to an earlier request, which was sent again, may come late.
func (u *udpClient) receive(payload string) (number int, err error) {
	answer := make([]byte, 1<<16)
	n, err := u.Read(answer)
	if err != nil {
		return 0, err
	}
	var server, addr string
	var counted int
	if _, err := fmt.Sscan(string(answer[:n]), &server, &addr, &counted, &number); err != nil {
		return 0, fmt.Errorf("the answer is %.100q: %w", answer[:n], err)
	}
	u.received, u.counted = u.received+1, max(u.counted, counted)
	if number < u.number {
		payload = string(answer[:n])[strings.LastIndexByte(string(answer[:n]), ' ')+1:] // which is not known any more
	}
	return number, compare(string(answer[:n]), fmt.Sprintf("%s %s %d %d %s", u.server, u.LocalAddr(), counted, number, payload))
}

// end says what was lost, which UDP allows for.
func (u *udpClient) end(t *testing.T) error {
	t.Helper()
	if u.sent != u.counted || u.counted != u.received {
		t.Logf("%s got %d of %d packets; %d answers arrived", u.RemoteAddr(), u.counted, u.sent, u.received)
	}
	return u.Close()
}

// quicEcho has payloads sent back on one stream. The server tells the connection.
func quicEcho(t *testing.T, host string) *client {
	t.Helper()
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"echo"}} // its certificate is made in the guest
	conn, err := quic.DialAddr(t.Context(), net.JoinHostPort(host, "4433"), config, &quic.Config{MaxIdleTimeout: impatience})
	if err != nil {
		t.Fatal(err)
	}
	s, err := conn.OpenStreamSync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return converse(t, "QUIC", 50*time.Millisecond, func(n int) error {
		if n == 1 {
			const greeting = "1\n"
			if _, err := io.WriteString(s, "x"); err != nil {
				return err
			}
			first := make([]byte, len(greeting)+1)
			if _, err := io.ReadFull(s, first); err != nil {
				return err
			}
			return compare(string(first), greeting+"x")
		}
		return echo(s, payload(1+n%20*500))
	}, func() error { return conn.CloseWithError(0, "") })
}

// dialFrom connects from a local address that other connections may have, too.
func dialFrom(t *testing.T, network, local, addr string) net.Conn {
	t.Helper()
	d := net.Dialer{Timeout: impatience, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		return errors.Join(err, cerr)
	}}
	var err error
	if network == "tcp4" {
		d.LocalAddr, err = net.ResolveTCPAddr(network, local)
	} else {
		d.LocalAddr, err = net.ResolveUDPAddr(network, local)
	}
	if err != nil {
		t.Fatal(err)
	}
	conn, err := d.Dial(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// namedRedis names a VM's Redis, and asks it for its name, and to count.
func namedRedis(t *testing.T, name string, conn net.Conn) *client {
	t.Helper()
	r := newRedisConn(conn)
	if err := r.expect("SET name "+name, "+OK"); err != nil {
		t.Fatal(err)
	}
	return converse(t, "Redis "+name, 10*time.Millisecond, func(n int) error {
		return errors.Join(r.expect("GET name", "$1", name), r.expect("INCR count", fmt.Sprint(":", n)))
	}, conn.Close)
}

// namedUDP names a VM's server of packets, and has them sent back with that name.
func namedUDP(t *testing.T, name string, conn net.Conn) *client {
	t.Helper()
	u := &udpClient{Conn: conn, server: name, sent: 1, received: 1}
	conn.SetReadDeadline(time.Now().Add(impatience))
	if _, err := io.WriteString(conn, "name="+name); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1<<10)); err != nil {
		t.Fatal(err)
	}
	return converse(t, "UDP "+name, 10*time.Millisecond, func(n int) error { return u.echo(payload(100 + n%1000)) }, func() error { return u.end(t) })
}

package e2e

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/redis/go-redis/v9"

	"drafter/internal/need"
	"drafter/internal/s3test"
	"drafter/internal/tour"
)

// databases makes an OCI layout of Redis and PostgreSQL in one container. Both acknowledge a write
// once it is on their disk.
func databases(ctx context.Context, cache, layout string) error {
	const start = `set -e
if ! test -e pg/PG_VERSION; then
	/usr/lib/postgresql/15/bin/initdb -k -A trust -E UTF8 --no-locale -D pg
	echo 'host all all all trust' >> pg/pg_hba.conf
fi
rm -f pg/postmaster.pid
/usr/lib/postgresql/15/bin/postgres -D pg -h '*' -c unix_socket_directories= -c shared_buffers=16MB -c max_connections=40 -c jit=off -c max_wal_size=64MB -c min_wal_size=32MB -c synchronous_commit=on &
exec redis-server --bind 0.0.0.0 --protected-mode no --dir /data --appendonly yes --appendfsync always --save ''
`
	return debianImage(ctx, cache, layout, v1.Config{
		User: "postgres", WorkingDir: "/data", Env: []string{"PATH=/usr/bin:/bin"},
		Entrypoint:   []string{"/bin/sh", "/start"},
		ExposedPorts: map[string]struct{}{"6379/tcp": {}, "5432/tcp": {}},
	}, map[string][]byte{
		"etc/passwd": []byte("root:x:0:0:root:/root:/bin/sh\npostgres:x:999:999::/data:/bin/sh\n"), "etc/group": []byte("root:x:0:\npostgres:x:999:\n"), "start": []byte(start),
	}, "redis-server", "postgresql-15", "dash", "coreutils")
}

// database is a connection with one of the guest's.
type database interface {
	put(n int) error   // writes number n, which may be there already
	holds(n int) error // that all numbers below n are there
	Close() error
}

const patience = 2 * time.Second // with one statement of the load

type redisDatabase struct{ *redis.Client }

func dialRedis(addr string) (database, error) {
	c, err := net.DialTimeout("tcp", addr, patience/4) // the client's own attempts are logged
	if err != nil {
		return nil, err
	}
	c.Close()
	return redisDatabase{redis.NewClient(&redis.Options{
		Addr: addr, MaxRetries: -1, DialerRetries: 1, DialTimeout: patience / 4, ReadTimeout: patience, WriteTimeout: patience,
	})}, nil
}

func (r redisDatabase) put(n int) error {
	return r.Set(context.Background(), fmt.Sprint("key:", n), strings.Repeat(fmt.Sprint(n, " "), 20), 0).Err()
}

func (r redisDatabase) holds(n int) error {
	for from := 0; from < n; from += 500 {
		var keys []string
		for i := from; i < min(from+500, n); i++ {
			keys = append(keys, fmt.Sprint("key:", i))
		}
		values, err := r.MGet(context.Background(), keys...).Result()
		if err != nil {
			return err
		}
		for i, v := range values {
			if v != strings.Repeat(fmt.Sprint(from+i, " "), 20) {
				return lostError{fmt.Sprintf("key %d of %d is %q", from+i, n, v)}
			}
		}
	}
	return nil
}

// postgresDatabase speaks PostgreSQL's simple query protocol, version 3.0.
type postgresDatabase struct {
	net.Conn
	r *bufio.Reader
}

func dialPostgres(addr string) (database, error) {
	c, err := net.DialTimeout("tcp", addr, patience/4)
	if err != nil {
		return nil, err
	}
	p := postgresDatabase{c, bufio.NewReader(c)}
	startup := binary.BigEndian.AppendUint32(nil, 196608)
	startup = append(startup, "user\x00postgres\x00database\x00postgres\x00\x00"...)
	c.SetDeadline(time.Now().Add(2 * patience))
	if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(startup)+4)), startup...)); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if _, err := p.answer(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return p, nil
}

// answer reads until the server is ready, and returns the first field of the last row.
func (p postgresDatabase) answer() (field string, err error) {
	for {
		var head [5]byte
		if _, err := io.ReadFull(p.r, head[:]); err != nil {
			return "", err
		}
		body := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
		if _, err := io.ReadFull(p.r, body); err != nil {
			return "", err
		}
		switch head[0] {
		case 'E':
			err = fmt.Errorf("PostgreSQL: %q", body)
			if strings.HasPrefix(string(body), "SFATAL") { // nothing follows
				return "", err
			}
		case 'D':
			field = string(body[6 : 6+binary.BigEndian.Uint32(body[2:])])
		case 'Z':
			return field, err
		}
	}
}

func (p postgresDatabase) query(sql string, within time.Duration) (string, error) {
	p.SetDeadline(time.Now().Add(within))
	q := append([]byte{'Q'}, binary.BigEndian.AppendUint32(nil, uint32(len(sql)+5))...)
	if _, err := p.Write(append(append(q, sql...), 0)); err != nil {
		return "", err
	}
	return p.answer()
}

func (p postgresDatabase) put(n int) error {
	_, err := p.query(fmt.Sprintf("INSERT INTO numbers VALUES (%d, repeat('x', 200)) ON CONFLICT DO NOTHING", n), patience)
	return err
}

func (p postgresDatabase) holds(n int) error {
	field, err := p.query(fmt.Sprintf("SELECT count(*) FROM numbers WHERE n < %d AND length(text) = 200", n), time.Minute)
	if err == nil && field != strconv.Itoa(n) {
		err = lostError{fmt.Sprintf("%s rows of %d", field, n)}
	}
	return err
}

// lostError says which acknowledged write is not there.
type lostError struct{ text string }

func (l lostError) Error() string { return "an acknowledged write is lost: " + l.text }

// audit writes numbers to a database, one after the other, at whichever of two places it answers,
// and knows what was acknowledged.
type audit struct {
	name  string
	addrs [2]string
	dial  func(addr string) (database, error)

	mu      sync.Mutex // guards the following
	next    int        // all below are acknowledged
	first   [2]int     // the first number that each place has acknowledged since the last mark; -1 if none
	last    time.Time  // of the last acknowledgement
	problem error      // of the last write that failed
}

func (a *audit) run(ctx context.Context) {
	for at := 0; ctx.Err() == nil; at = 1 - at {
		if err := a.write(ctx, at); err != nil {
			a.mu.Lock()
			a.problem = err
			a.mu.Unlock()
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// write writes at a place until that fails.
func (a *audit) write(ctx context.Context, at int) error {
	d, err := a.dial(a.addrs[at])
	if err != nil {
		return err
	}
	defer d.Close()
	for ctx.Err() == nil {
		a.mu.Lock()
		n := a.next
		a.mu.Unlock()
		if err := d.put(n); err != nil {
			return err
		}
		a.mu.Lock()
		if a.next == n { // it was not taken back meanwhile
			a.next, a.last = n+1, time.Now()
			if a.first[at] < 0 {
				a.first[at] = n
			}
		}
		a.mu.Unlock()
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

// mark begins a move.
func (a *audit) mark() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.first = [2]int{-1, -1}
}

// takeBack forgets what a place has acknowledged since the mark, as an operator has settled, and
// tells how much that is.
func (a *audit) takeBack(at int) (lost int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.first[at] >= 0 {
		lost = a.next - a.first[at]
		a.next = a.first[at]
	}
	return lost
}

func (a *audit) since(began time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last.After(began)
}

// checkAcknowledged looks for all that is acknowledged, at a place, and tells how much that is.
func (a *audit) checkAcknowledged(at int) (n int, err error) {
	a.mu.Lock()
	n = a.next
	a.mu.Unlock()
	d, err := a.dial(a.addrs[at])
	if err != nil {
		return n, fmt.Errorf("%s: %w", a.name, err)
	}
	defer d.Close()
	if err := d.holds(n); err != nil {
		return n, fmt.Errorf("%s: %w", a.name, err)
	}
	return n, nil
}

// attached is a peer whose stdout and stderr are pipes that somebody reads, or not.
type attached struct {
	cmd     *exec.Cmd
	input   io.Writer
	outputs [2]*os.File // where stdout and stderr are read
	stuck   atomic.Bool // nobody reads any more
	lines   chan tour.Line
	done    chan struct{}
	err     error // once it is done

	mu   sync.Mutex
	said []string // on stderr
}

func (p *attached) PID() int              { return p.cmd.Process.Pid }
func (p *attached) Done() <-chan struct{} { return p.done }

func (p *attached) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// log is the end of what it said.
func (p *attached) log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.said[max(0, len(p.said)-60):], "\n")
}

func (p *attached) read(r io.Reader, line func(string)) {
	for s := bufio.NewScanner(r); s.Scan() && !p.stuck.Load(); {
		line(s.Text())
	}
}

func (p *attached) hear(text string) {
	p.mu.Lock()
	p.said = append(p.said, text)
	p.mu.Unlock()
	line := tour.Line{Text: text}
	if json.Unmarshal([]byte(text), &line) == nil {
		select {
		case p.lines <- line:
		default: // nobody asks
		}
	}
}

const bound = 3 * time.Minute // for each end and each beginning

// badDay is a VM with two databases on which anything falls, at two places.
type badDay struct {
	*site
	t      *testing.T
	rng    *rand.Rand
	pkg    string
	places [2]*smallDisk
	audits []*audit
	server *s3test.Server
	made   int // instances

	at       int // where the VM is
	instance string
	vm       *attached
	all      []*attached // of this round
}

const roomy = "2g" // of a place

func (d *badDay) port(at int) string { return fmt.Sprintf("localhost:%d", 28000+at) }

// launch starts a peer of an instance.
func (d *badDay) launch(at int, instance string, flags ...string) *attached {
	d.t.Helper()
	args := []string{
		"peer", "--raddr", "", "--laddr", d.port(at), "--chroot-base-dir", "vms", "--package", d.pkg, "--instance", instance, "--netns", fmt.Sprintf("ark%d", at),
		"--enable-input", "--log-format", "json", "--s3-sync", "s3://vms/badday", "--s3-interval", "3s", "--bandwidth", "60MB", "--resume-timeout", bound.String(),
	}
	if d.rng.IntN(2) == 0 {
		args = append(args, "--migration-timeout", "600ms") // the rest by post-copy
	}
	p := &attached{cmd: exec.Command(d.Bin, append(args, flags...)...), lines: make(chan tour.Line, 1000), done: make(chan struct{})}
	p.cmd.Dir = d.dir
	var err error
	if p.input, err = p.cmd.StdinPipe(); err != nil {
		d.t.Fatal(err)
	}
	outR, outW := pipe(d.t)
	errR, errW := pipe(d.t)
	p.outputs = [2]*os.File{outR, errR}
	p.cmd.Stdout, p.cmd.Stderr = outW, errW
	if err := p.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	outW.Close()
	errW.Close()
	go p.read(outR, func(string) {})
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		p.read(errR, p.hear)
	}()
	go func() {
		err := p.cmd.Wait()
		select {
		case <-heard:
		case <-time.After(time.Second): // nobody reads, or its VMM has not ended yet
		}
		p.err = err
		close(p.done)
	}()
	d.t.Cleanup(func() {
		if !p.ended() { // of a test that has failed
			_ = p.cmd.Process.Signal(syscall.SIGTERM)
			select {
			case <-p.done:
			case <-time.After(bound):
				_ = p.cmd.Process.Kill()
			}
		}
	})
	d.all = append(d.all, p)
	return p
}

// fatal fails the test with the logs of this round.
func (d *badDay) fatal(format string, args ...any) {
	d.t.Helper()
	for i, p := range d.all {
		d.t.Logf("process %d of this round: %s\n%s", i, strings.Join(p.cmd.Args, " "), p.log())
	}
	d.t.Fatalf(format, args...)
}

// start starts an instance that is here, and tells how, or why not.
func (d *badDay) start(at int, instance string) (how string, err error) {
	d.t.Helper()
	p := d.launch(at, instance)
	timeout := time.After(bound)
	for {
		select {
		case line := <-p.lines:
			if line.Message == "Resumed VM" || line.Message == boots {
				d.adopt(p, at, instance)
				return map[bool]string{true: "booted", false: "resumed"}[line.Message == boots], nil
			}
		case <-p.done:
			return "", fmt.Errorf("%w: %s", p.err, p.log())
		case <-timeout:
			d.fatal("the start of %s does not end in %s", instance, bound)
		}
	}
}

// must starts an instance that is here for certain.
func (d *badDay) must(at int, instance, want string) string {
	d.t.Helper()
	how, err := d.start(at, instance)
	if err != nil || want != "" && how != want {
		d.fatal("start of %s: %s, %v; want %s", instance, how, err, want)
	}
	return how
}

func (d *badDay) adopt(p *attached, at int, instance string) {
	d.vm, d.at, d.instance = p, at, instance
}

// ends waits for a process, which has little time.
func (d *badDay) ends(p *attached, what string) error {
	d.t.Helper()
	select {
	case <-p.done:
	case <-time.After(bound):
		_ = p.cmd.Process.Signal(syscall.SIGQUIT) // it says where it stands
		time.Sleep(5 * time.Second)
		d.fatal("%s: the process does not end in %s", what, bound)
	}
	return p.err
}

// signal ends the VM's process well, and is done when that has ended and the VM runs again.
func (d *badDay) signal(s syscall.Signal) func() string {
	_ = d.vm.cmd.Process.Signal(s)
	return func() string {
		if err := d.ends(d.vm, s.String()); err != nil {
			d.fatal("%s: %v", s, err)
		}
		return d.must(d.at, d.instance, "resumed")
	}
}

func (d *badDay) kill(p *attached) {
	d.t.Helper()
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		d.t.Fatal(err)
	}
	d.awaitKilled(d.t, p)
}

// runID is that of Redis, "" while it does not answer.
func (d *badDay) runID() string {
	c, err := dialRedis(d.audits[0].addrs[d.at])
	if err != nil {
		return ""
	}
	defer c.Close()
	info, _ := c.(redisDatabase).Info(d.t.Context(), "server").Result()
	_, after, _ := strings.Cut(info, "run_id:")
	id, _, _ := strings.Cut(after, "\r\n")
	return id
}

func (d *badDay) reboot() func() string {
	before := d.runID()
	io.WriteString(d.vm.input, "\nreboot\n")
	return func() string {
		for deadline := time.Now().Add(bound); ; time.Sleep(200 * time.Millisecond) {
			if id := d.runID(); id != "" && id != before {
				return "booted"
			}
			if d.vm.ended() || time.Now().After(deadline) {
				d.fatal("the guest did not reboot in %s: %v", bound, d.vm.err)
			}
		}
	}
}

// newInstance names one at a place.
func (d *badDay) newInstance(at int) string {
	d.made++
	return filepath.Join(d.places[at].dir, fmt.Sprintf("instance-%d", d.made))
}

// move begins to move the VM to the other place.
func (d *badDay) move() (target *attached, to int, instance string) {
	for _, a := range d.audits {
		a.mark()
	}
	to = 1 - d.at
	instance = d.newInstance(to)
	return d.launch(to, instance, "--raddr", d.port(d.at)), to, instance
}

// moves is a move that nobody disturbs.
func (d *badDay) moves() func() string {
	target, to, instance := d.move()
	return func() string {
		if err := d.ends(d.vm, "source of a move"); err != nil {
			d.fatal("the source: %v", err)
		}
		d.forget(d.at, d.instance)
		d.adopt(target, to, instance)
		return "moved"
	}
}

// forget removes an instance whose VM is elsewhere, which its files say.
func (d *badDay) forget(at int, instance string) {
	d.t.Helper()
	if _, err := d.start(at, instance); err == nil {
		d.fatal("%s starts, although its VM runs elsewhere", instance)
	} else if !strings.Contains(err.Error(), "moved away") {
		d.fatal("the start of %s, which has moved away: %v", instance, err)
	}
	d.remove(instance)
}

func (d *badDay) remove(instance string) {
	if err := os.RemoveAll(instance); err != nil {
		d.fatal("%v", err)
	}
}

// disturbed is a move in which one side is killed or ended at any moment.
func (d *badDay) disturbed(who string) func() string {
	source, from, left := d.vm, d.at, d.instance
	target, to, instance := d.move()
	time.Sleep(time.Duration(d.rng.IntN(6000)) * time.Millisecond)
	switch who {
	case "kill source":
		d.kill(source)
	case "kill target":
		d.kill(target)
	case "end source":
		_ = source.cmd.Process.Signal(syscall.SIGTERM)
	case "end target":
		_ = target.cmd.Process.Signal(syscall.SIGTERM)
	}
	began := time.Now()
	return func() string { return d.settle(who, began, source, target, from, to, left, instance) }
}

// settle does what an operator does after a move that went wrong: looks where the VM is, and
// follows what the errors say.
func (d *badDay) settle(who string, began time.Time, source, target *attached, from, to int, left, instance string) string {
	switch who { // who was killed has ended
	case "end source":
		_ = d.ends(source, who) // its files say it, too
		began = time.Now()
	case "end target":
		_ = d.ends(target, who)
		began = time.Now()
	}
	for deadline := time.Now().Add(bound / 3); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if d.progress(began) || source.ended() && target.ended() {
			break
		}
	}
	decide := func(how, instance string) string {
		cmd := exec.Command(d.Bin, "peer", "settle", how, "--package", d.pkg, "--instance", instance)
		cmd.Dir = d.dir
		out, _ := cmd.CombinedOutput()
		d.t.Logf("settle %s %s: %s", how, filepath.Base(instance), strings.TrimSpace(string(out)))
		return string(out)
	}
	said := decide("--here", instance)
	if strings.Contains(said, "Settled who owns the VM") || strings.Contains(said, "nothing in doubt") || strings.Contains(said, "nothing is in doubt") {
		how := "is the target's"
		decide("--away", left)
		_ = d.ends(source, who)
		d.forget(from, left)
		if target.ended() {
			return how + ", " + d.must(to, instance, "")
		}
		d.adopt(target, to, instance)
		return how
	}
	how := "is the source's"
	if !target.ended() {
		decide("--away", instance)
		_ = d.ends(target, who)
	}
	if !source.ended() && d.progress(began) {
		d.remove(instance)
		return how
	}
	takeBack := func() {
		for _, a := range d.audits {
			if lost := a.takeBack(to); lost > 0 {
				how += fmt.Sprintf(", without %d writes of %s", lost, a.name)
			}
		}
	}
	if !source.ended() {
		takeBack()
		decide("--here", left)
		d.remove(instance)
		return how + ", settled"
	}
	started, err := d.start(from, left)
	if err != nil && strings.Contains(err.Error(), "drafter peer settle") {
		takeBack()
		decide("--here", left)
		started, err = d.start(from, left)
		how += ", settled"
	}
	if err != nil {
		d.fatal("start of the source: %v", err)
	}
	d.remove(instance)
	return how + ", " + started
}

// progress tells whether both databases have acknowledged a write since.
func (d *badDay) progress(began time.Time) bool {
	return !slices.ContainsFunc(d.audits, func(a *audit) bool { return !a.since(began) })
}

// serves waits until both databases write again.
func (d *badDay) serves() {
	d.t.Helper()
	began := time.Now()
	for !d.progress(began) {
		if d.vm.ended() {
			d.fatal("the VM's process has ended: %v", d.vm.err)
		}
		if time.Since(began) > bound {
			for _, a := range d.audits {
				d.t.Logf("%s: %v", a.name, a.problem)
			}
			d.fatal("the VM does not serve in %s", bound)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// checkAcknowledged looks for all that was acknowledged, and tells how much that is, for each database.
func (d *badDay) checkAcknowledged() (acknowledged []int) {
	d.t.Helper()
	for _, a := range d.audits {
		n, err := a.checkAcknowledged(d.at)
		if err != nil {
			d.fatal("%v", err)
		}
		acknowledged = append(acknowledged, n)
	}
	return acknowledged
}

func (d *badDay) checkpoint() func() string {
	output := filepath.Join(d.dir, "checkpoint")
	vm, err := d.Start("checkpoint", "--raddr", d.port(d.at), "--output", output)
	if err != nil {
		d.t.Fatal(err)
	}
	return func() string {
		if err := vm.Wait(); err != nil {
			d.fatal("%v", err)
		}
		cleanDisks(d.t, output)
		d.remove(output)
		return "written"
	}
}

// weather is what becomes of the host, until the returned function mends it.
func (d *badDay) weather(kind string) (mend func()) {
	switch kind {
	case "full":
		disk := d.places[d.at]
		disk.fill(d.t)
		return func() { disk.resize(d.t, roomy) }
	case "storage away":
		what := []string{"cut", "503", "500", "slow", "lost"}[d.rng.IntN(5)]
		d.server.Fail(func(*http.Request) string { return what })
		return func() { d.server.Fail(nil) }
	case "closed pipes":
		for _, r := range d.vm.outputs {
			r.Close()
		}
	case "stuck pipes":
		d.vm.stuck.Store(true)
		io.WriteString(d.vm.input, "\nhead -c 300000 /dev/zero | tr '\\0' '\\n'\n")
	case "flushed rules":
		command(d.t, d.dir, "nft", "flush", "ruleset")
		return func() {
			for deadline := time.Now().Add(bound); !strings.Contains(command(d.t, d.dir, "nft", "list", "tables"), "drafter-nat-ark"); time.Sleep(100 * time.Millisecond) {
				if time.Now().After(deadline) {
					d.fatal("the NAT's rules are not back in %s", bound)
				}
			}
		}
	}
	return func() {}
}

// Ordinary bad days, at random, for DRAFTER_SOAK_TIME (20m): all that a database has acknowledged
// is there after each of them, what ends does so in time, and the host is clean at the end.
// DRAFTER_SOAK_SEED makes the same days again.
func TestSoakBadDays(t *testing.T) {
	need.Soak(t)
	lasts, seed := 20*time.Minute, uint64(time.Now().UnixNano())
	var err error
	if v := os.Getenv("DRAFTER_SOAK_TIME"); v != "" {
		if lasts, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	if v := os.Getenv("DRAFTER_SOAK_SEED"); v != "" {
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("DRAFTER_SOAK_SEED=%d", seed)
	d := newBadDay(t, seed)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	d.must(0, d.newInstance(0), "resumed")
	d.createTable()
	for _, a := range d.audits {
		wg.Go(func() { a.run(ctx) })
	}
	weathers := []string{"fair", "fair", "full", "storage away", "closed pipes", "stuck pipes", "flushed rules"}
	acts := []string{"none", "SIGTERM", "SIGHUP", "SIGKILL", "reboot", "move", "checkpoint", "kill source", "kill target", "end source", "end target"}
	counts := map[string]int{}
	for round, end := 0, time.Now().Add(lasts); time.Now().Before(end); round++ {
		d.serves()
		d.rng = rand.New(rand.NewPCG(seed, uint64(round+1))) // whatever the rounds before came to
		d.all = []*attached{d.vm}
		weather, act := weathers[d.rng.IntN(len(weathers))], acts[d.rng.IntN(len(acts))]
		before, during := time.Duration(d.rng.IntN(4000))*time.Millisecond, time.Duration(d.rng.IntN(4000))*time.Millisecond
		t.Logf("round %d: %s, %s after %s, mended after %s more", round, weather, act, before, during)
		began := time.Now()
		mend := d.weather(weather)
		time.Sleep(before) // at any moment
		finish := d.act(act)
		time.Sleep(during)
		mend()
		outcome := finish()
		d.serves()
		acked := d.checkAcknowledged()
		counts[act+": "+outcome]++
		t.Logf("round %d: %s; %v writes are there; %s", round, outcome, acked, time.Since(began).Round(100*time.Millisecond))
	}
	last := func() {
		_ = d.vm.cmd.Process.Signal(syscall.SIGTERM)
		if err := d.ends(d.vm, "the last end"); err != nil {
			d.fatal("the last end: %v", err)
		}
	}
	last()
	d.remove(d.instance)
	d.pkg = "s3://vms/badday" // the backup has all of it, too
	d.must(0, d.newInstance(0), "resumed")
	d.serves()
	d.checkAcknowledged()
	last()
	t.Log(counts)
}

func (d *badDay) act(kind string) (finish func() string) {
	switch kind {
	case "SIGTERM":
		return d.signal(syscall.SIGTERM)
	case "SIGHUP":
		return d.signal(syscall.SIGHUP)
	case "SIGKILL":
		d.kill(d.vm)
		return func() string { return d.must(d.at, d.instance, "booted") }
	case "reboot":
		return d.reboot()
	case "move":
		return d.moves()
	case "checkpoint":
		return d.checkpoint()
	case "none":
		return func() string { return "nothing" }
	}
	return d.disturbed(kind)
}

// createTable makes what the audit of PostgreSQL writes to, once the server, which listens before,
// is ready.
func (d *badDay) createTable() {
	d.t.Helper()
	p, err := dialPostgres(d.audits[1].addrs[0])
	for deadline := time.Now().Add(bound); err != nil; p, err = dialPostgres(d.audits[1].addrs[0]) {
		if time.Now().After(deadline) {
			d.fatal("%v", err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	defer p.Close()
	if _, err := p.(postgresDatabase).query("CREATE TABLE numbers (n int PRIMARY KEY, text text)", time.Minute); err != nil {
		d.fatal("%v", err)
	}
}

// newBadDay makes the package of the databases, the places, and the ways to them.
func newBadDay(t *testing.T, seed uint64) *badDay {
	t.Helper()
	s := emptySite(t)
	d := &badDay{site: s, t: t, rng: rand.New(rand.NewPCG(seed, 0)), pkg: filepath.Join(s.dir, "out/package"), server: storage(t, s)}
	command(t, s.dir, d.Bin, "blueprint", "oci", "oci:"+filepath.Join(work, "databases-image"), "--output", "out/oci.ext4")
	s.snapshot(t, devicesWith("out/oci.ext4"), "--memory-size", "512", "--netns", "ark0", "--resume-timeout", "5m")
	d.audits = []*audit{{name: "Redis", dial: dialRedis}, {name: "PostgreSQL", dial: dialPostgres}}
	var forwards []map[string]string
	for at := range d.places {
		d.places[at] = newSmallDisk(t, filepath.Join(s.dir, fmt.Sprintf("place-%d", at)), roomy)
		for i, port := range []string{"6379", "5432"} {
			d.audits[i].addrs[at] = fmt.Sprintf("127.0.0.1:%d", 28100+10*at+i)
			d.audits[i].first[at] = -1
			forwards = append(forwards, map[string]string{"netns": fmt.Sprintf("ark%d", at), "internalPort": port, "protocol": "tcp", "externalAddr": d.audits[i].addrs[at]})
		}
	}
	b, err := json.Marshal(forwards)
	if err != nil {
		t.Fatal(err)
	}
	f, err := s.Start("forwarder", "--port-forwards", string(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, f) })
	await(t, f, "Forwarding")
	return d
}

// The demo does what the README does first, with the commands a user would type: on a host with a
// daemon it runs an OCI image of Redis from a registry, writes keys through a published port, stops the
// VM, starts it, and reads all keys back. Then it moves the VM live to a second host, while a client
// that never reconnects pings it at the address that it knows. Both hosts are network namespaces.
// Its last line on stdout is a JSON object with what was measured.
//
// With --vmm firecracker all of it runs on Firecracker.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"drafter/api"
	"drafter/internal/detached"
	"drafter/internal/mark"
	"drafter/internal/newfile"
	"drafter/internal/redisimage"
	"drafter/internal/testhost"
	"drafter/internal/tour"
)

const keys = 1000

// result is the demo's last line. Times are those of a command.
type result struct {
	Demo        string `json:"demo"`
	BootMS      int64  `json:"boot_ms"`    // drafter run, the first of an image, until its port answers
	SuspendMS   int64  `json:"suspend_ms"` // drafter stop
	ResumeMS    int64  `json:"resume_ms"`  // drafter start, until the port answers
	KeysWritten int    `json:"keys_written"`
	KeysLost    int    `json:"keys_lost"`

	Migration migration `json:"migration"`
}

// migration is what was measured of the move.
type migration struct {
	DowntimeMS float64 `json:"downtime_ms"` // pause at the source to the target's word that it runs
	GapMS      float64 `json:"gap_ms"`      // longest silence a client saw that never reconnects
	// first connection until nothing at the source was needed
	TotalMS int64 `json:"total_ms"`
	Bytes   int64 `json:"bytes"` // sent and received
	// written before and not sent: unchanged, zeros, or the package's
	BytesSaved int64 `json:"bytes_saved"`
}

func main() {
	d := &demo{dir: "out/demo"}
	flag.StringVar(&d.vmm, "vmm", "auto", "VMM to use: auto, qemu or firecracker")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := d.run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "== "+format+"\n", args...)
}

type demo struct{ dir, vmm string }

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

// run prepares what needs a network, and shows the rest where it disturbs nobody.
func (d *demo) run(ctx context.Context) (err error) {
	if testhost.Inside() {
		return d.show(ctx)
	}
	if d.dir, err = filepath.Abs(d.dir); err != nil {
		return err
	}
	if err := d.sweep(ctx); err != nil {
		return err
	}
	if err := mark.Renew(d.dir, ".drafter-demo", "drafter-demo"); err != nil {
		return err
	}
	if err := d.prepare(ctx); err != nil {
		return err
	}
	if code, err := testhost.Enter(os.Stderr, nil); err != nil || code != 0 {
		return errors.Join(err, fmt.Errorf("the demo has failed (exit status %d)", code))
	}
	b, err := os.ReadFile(d.path("result.json"))
	if err != nil {
		return err
	}
	_, err = fmt.Println(string(b))
	return err
}

// sweep ends VMs and daemons of a demo that was killed.
func (d *demo) sweep(ctx context.Context) (err error) {
	dirs, err := filepath.Glob(d.path("host*/lib"))
	for _, dir := range dirs {
		h := &host{Drafter: tour.Drafter{Bin: "bin/drafter", Logs: d.dir}, dir: filepath.Dir(dir)}
		h.env()
		left, ferr := detached.Find(filepath.Join(dir, "daemon.lock"))
		if left == nil && ferr == nil { // one that finds its VMs
			ferr = errors.Join(h.start(ctx), h.end(ctx))
		}
		if left != nil {
			ferr = errors.Join(h.clear(ctx), left.End(tour.StepTimeout), left.Close())
		}
		err = errors.Join(err, ferr)
	}
	return err
}

// prepare makes an image of Redis, and the OS that VMs boot.
func (d *demo) prepare(ctx context.Context) error {
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	cache = filepath.Join(cache, "drafter", "debian")
	say("Making an OCI image of Redis, and the OS of the VMs, from Debian's packages")
	image, err := redisimage.Build(ctx, cache, d.dir)
	if err == nil {
		err = redisimage.WriteLayout(image, d.path("redis"))
	}
	if err != nil {
		return fmt.Errorf("make Redis image: %w", err)
	}
	drafter := tour.Drafter{Bin: "bin/drafter"}
	return drafter.Run(ctx, os.Stderr, "blueprint", "os", "--output", d.path("blueprint"), "--cache", cache)
}

// host is a host with a daemon.
type host struct {
	tour.Drafter
	net    *testhost.Host
	dir    string
	args   []string // of the daemon
	daemon *tour.Service
}

func (h *host) start(ctx context.Context) (err error) {
	h.env()
	args := []string{"daemon", "--dir", filepath.Join(h.dir, "lib"), "--socket", filepath.Join(h.dir, "socket")}
	if h.daemon, err = h.Start(append(args, h.args...)...); err == nil {
		_, err = h.daemon.Await(ctx, "The daemon is up")
	}
	return err
}

// env lets commands find the daemon.
func (h *host) env() { h.Env = []string{"DRAFTER_SOCKET=" + filepath.Join(h.dir, "socket")} }

// clear removes the host's VMs.
func (h *host) clear(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	left, err := h.drafter(ctx, "ps", "-aq")
	if err == nil && left != "" {
		_, err = h.drafter(ctx, append([]string{"rm", "--force"}, strings.Fields(left)...)...)
	}
	return err
}

// end ends the host's VMs and daemon.
func (h *host) end(ctx context.Context) error {
	err := errors.Join(h.clear(ctx), h.daemon.End())
	if h.net != nil {
		err = errors.Join(err, h.net.Close())
	}
	return err
}

// drafter runs a command, and returns what it prints.
func (h *host) drafter(ctx context.Context, args ...string) (string, error) {
	var out bytes.Buffer
	err := h.Run(ctx, &out, args...)
	return strings.TrimSpace(out.String()), err
}

// newHost makes a host with a daemon.
func (d *demo) newHost(ctx context.Context, number int) (_ *host, err error) {
	dir, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	h := &host{
		dir:     d.path(fmt.Sprint("host", number)),
		Drafter: tour.Drafter{Bin: filepath.Join(dir, "bin/drafter"), Logs: d.dir},
	}
	if h.net, err = testhost.NewHost(number, 0); err != nil {
		return nil, err
	}
	h.Via = h.net.Via(dir)
	h.args = []string{
		"--name", fmt.Sprint("host", number), "--listen", h.address(), "--host-interface", "eth0",
		"--blueprint", d.path("blueprint"), "--namespace-count", "2", "--vmm", d.vmm,
	}
	if err := errors.Join(os.Mkdir(h.dir, 0o700), h.start(ctx)); err != nil {
		return nil, errors.Join(err, h.net.Close())
	}
	return h, nil
}

// address is where other hosts reach the daemon.
func (h *host) address() string { return h.net.Addr + ":7443" }

// show runs the VM and moves it.
func (d *demo) show(ctx context.Context) (err error) {
	if err := testhost.SetUp(""); err != nil {
		return err
	}
	if d.dir, err = filepath.Abs(d.dir); err != nil {
		return err
	}
	// This namespace is the network between the hosts.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		return err
	}
	say("Starting a daemon on each of two hosts, which get to know each other")
	var hosts []*host
	for number := 1; number <= 2; number++ {
		h, err := d.newHost(ctx, number)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, h.end(ctx)) }()
		hosts = append(hosts, h)
	}
	token, err := hosts[1].drafter(ctx, "host", "token")
	if err != nil {
		return err
	}
	if _, err := hosts[0].drafter(ctx, "host", "add", "host2", hosts[1].address(), token); err != nil {
		return err
	}
	r := result{Demo: "redis", KeysWritten: keys}
	runID, err := d.useVM(ctx, hosts[0], &r)
	if err != nil {
		return err
	}
	if err := d.moveVM(ctx, hosts[0], hosts[1], runID, &r); err != nil {
		return err
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if r.KeysLost > 0 {
		return fmt.Errorf("%d keys were lost: %s", r.KeysLost, b)
	}
	return newfile.WriteBytes(d.path("result.json"), b)
}

// redisOf is a client of the VM at a host.
func redisOf(h *host) *redis.Client {
	return redis.NewClient(&redis.Options{Addr: h.net.Addr + ":6379", MaxRetries: 20})
}

// useVM writes in a VM, stops and starts it, and reads.
func (d *demo) useVM(ctx context.Context, h *host, r *result) (runID string, err error) {
	c := redisOf(h)
	defer c.Close()
	took := func(args ...string) (int64, error) {
		say("drafter %s", strings.Join(args, " "))
		began := time.Now()
		_, err := h.drafter(ctx, args...)
		if err == nil && args[0] != "stop" {
			err = c.Ping(ctx).Err()
		}
		return time.Since(began).Milliseconds(), err
	}
	if r.BootMS, err = took("run", "-d", "--name", "redis", "-p", "6379:6379", "oci:"+d.path("redis")); err != nil {
		return "", err
	}
	say("Writing %d keys", keys)
	for i := range keys {
		if err := c.Set(ctx, fmt.Sprintf("key:%d", i), value(i), 0).Err(); err != nil {
			return "", fmt.Errorf("write key %d: %w", i, err)
		}
	}
	if runID, err = redisRunID(ctx, c); err != nil {
		return "", err
	}
	if r.SuspendMS, err = took("stop", "redis"); err != nil {
		return "", err
	}
	if r.ResumeMS, err = took("start", "redis"); err != nil {
		return "", err
	}
	say("Reading the keys back")
	return runID, d.readBack(ctx, c, runID, r)
}

// readBack counts keys that are lost, and refuses another Redis process than before.
func (d *demo) readBack(ctx context.Context, c *redis.Client, runID string, r *result) error {
	for i := range keys {
		got, err := c.Get(ctx, fmt.Sprintf("key:%d", i)).Result()
		if err != nil && !errors.Is(err, redis.Nil) {
			return fmt.Errorf("read key %d: %w", i, err)
		}
		if got != value(i) {
			r.KeysLost++
		}
	}
	now, err := redisRunID(ctx, c)
	if err == nil && now != runID {
		err = fmt.Errorf("this is another Redis process (run id %s, not %s): the VM has booted", now, runID)
	}
	return err
}

// moveVM moves the VM while a client pings it, and reads at its new host what was written before.
func (d *demo) moveVM(ctx context.Context, from, to *host, runID string, r *result) (err error) {
	pulse, err := tour.StartPulse(ctx, from.net.Addr+":6379")
	if err != nil {
		return err
	}
	defer func() {
		_, perr := pulse.End()
		err = errors.Join(err, perr)
	}()
	time.Sleep(500 * time.Millisecond)
	pulse.Reset()
	say("drafter move redis --to host2, while a client pings it on one connection")
	text, err := from.drafter(ctx, "move", "redis", "--to", "host2", "--format", "json")
	if err != nil {
		return err
	}
	time.Sleep(500 * time.Millisecond)
	gap, err := pulse.End()
	if err != nil {
		return err
	}
	var moved []api.Operation
	if err := json.Unmarshal([]byte(text), &moved); err != nil || len(moved) != 1 || moved[0].Move == nil {
		return fmt.Errorf("drafter move says %q, %w", text, err)
	}
	m := moved[0].Move
	r.Migration = migration{
		DowntimeMS: ms(m.Paused), GapMS: ms(gap), TotalMS: m.Took.Milliseconds(), Bytes: m.Sent, BytesSaved: m.Saved,
	}
	say("Reading at the new host what was written at the old one")
	c := redisOf(to)
	defer c.Close()
	return d.readBack(ctx, c, runID, r)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func value(i int) string { return fmt.Sprintf("value %d of the demo", i*i) }

func redisRunID(ctx context.Context, client *redis.Client) (string, error) {
	info, err := client.Info(ctx, "server").Result()
	if err != nil {
		return "", fmt.Errorf("ask Redis for its run id: %w", err)
	}
	_, after, _ := strings.Cut(info, "run_id:")
	id, _, _ := strings.Cut(after, "\r\n")
	return id, nil
}

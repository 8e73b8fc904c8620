package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"

	"drafter/internal/testhost"
	"drafter/internal/tour"
)

// linkRate is that of the hosts' links in bits per second.
const linkRate = 1_000_000_000

// puller is a host that has nothing but the binary, behind a link.
type puller struct {
	tour.Drafter
	dir      string // of the benchmark
	host     *testhost.Host
	services []*tour.Service
	redis    *redis.Client
}

func (b *bench) newPuller(ctx context.Context, number int) (_ *puller, err error) {
	abs, err := filepath.Abs(".")
	if err != nil {
		return nil, err
	}
	p := &puller{Drafter: b.drafter, dir: b.dir}
	if p.host, err = testhost.NewHost(number, linkRate); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	p.Via = p.host.Via(abs)
	p.redis = redis.NewClient(&redis.Options{Addr: p.host.Addr + ":3333", MaxRetries: -1, DialTimeout: 50 * time.Millisecond})
	for _, s := range []struct {
		up   string
		args []string
	}{
		{"NAT is up", []string{"nat", "--namespace-count", "1", "--host-interface", "eth0"}},
		{"Forwarding", []string{"forwarder", "--port-forwards", tour.Forward("ark0", "6379", p.host.Addr+":3333")}},
	} {
		service, err := p.Start(s.args...)
		if err != nil {
			return nil, err
		}
		p.services = append(p.services, service)
		if _, err := service.Await(ctx, s.up); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *puller) close() error {
	var errs []error
	if p.redis != nil {
		errs = append(errs, p.redis.Close())
	}
	for i := len(p.services) - 1; i >= 0; i-- {
		errs = append(errs, p.services[i].End())
	}
	return errors.Join(append(errs, p.host.Close())...)
}

// peer starts an instance and returns it when Redis has replied.
func (p *puller) peer(ctx context.Context, flags ...string) (*tour.Service, error) {
	vm, err := p.Start(append([]string{"peer", "--enable-output=false", "--chroot-base-dir", filepath.Join(p.dir, "vms"), "--laddr", "", "--netns", "ark0",
		"--instance", filepath.Join(p.dir, "pulled/instance")}, flags...)...)
	if err != nil {
		return nil, err
	}
	for ctx.Err() == nil {
		if err := p.redis.Ping(ctx).Err(); err == nil {
			return vm, nil
		}
		select {
		case <-vm.Done():
			return nil, vm.Wait()
		case <-time.After(time.Millisecond):
		}
	}
	return nil, errors.Join(context.Cause(ctx), vm.End())
}

// registry measures how soon Redis replies on a host that has nothing, over a link of 1 Gbit/s:
// from a registry, and after a copy of the package over the same link by tar, once with the data
// only and once with all bytes, as most programs copy.
func (b *bench) registry(ctx context.Context, rounds int) (err error) {
	// The network also lets this host pass on what its hosts send to one another.
	end, err := b.network(ctx, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	pkg, err := b.snapshot(ctx, loadRedis, 1)
	if err != nil {
		return err
	}
	server, err := testhost.NewHost(1, linkRate)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	abs, err := filepath.Abs(".")
	if err != nil {
		return err
	}
	d := b.drafter
	d.Via = server.Via(abs)
	addr := net.JoinHostPort(server.Addr, "1600")
	registry, err := d.Start("registry", "--laddr", addr, "--insecure", "--package", pkg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.End()) }()
	if _, err := registry.Await(ctx, "Serving"); err != nil {
		return err
	}
	p, err := b.newPuller(ctx, 2)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	for range rounds {
		if err := b.pull(ctx, p, addr, pkg); err != nil {
			return err
		}
		for _, c := range []struct {
			name string
			flag string
		}{{"copy_data", "--sparse"}, {"copy_all", ""}} {
			if err := b.copyPackage(ctx, server, p, c.name, pkg, c.flag); err != nil {
				return err
			}
		}
	}
	rss, err := peakRSS(registry.PID())
	b.add("registry_server_peak_rss_mb", rss)
	return err
}

// pull starts an instance from the registry, waits until all of the package is there, and compares
// it.
func (b *bench) pull(ctx context.Context, p *puller, addr, pkg string) error {
	pulled := filepath.Join(b.dir, "pulled")
	if err := os.RemoveAll(pulled); err != nil {
		return err
	}
	begin := time.Now()
	vm, err := p.peer(ctx, "--raddr", addr, "--insecure", "--package", pulled)
	if err != nil {
		return err
	}
	b.add("registry_first_reply_ms", ms(time.Since(begin)))
	_, err = vm.Await(ctx, "The whole package is here and verified")
	b.add("registry_all_ms", ms(time.Since(begin)))
	if err := errors.Join(err, vm.End()); err != nil {
		return err
	}
	for _, f := range tour.Files {
		if out, err := exec.CommandContext(ctx, "cmp", filepath.Join(pkg, f.File), filepath.Join(pulled, f.File)).CombinedOutput(); err != nil {
			return fmt.Errorf("the pulled package is another one: %w: %s", err, out)
		}
	}
	return nil
}

// copyPackage copies the package from one host to another and starts an instance of the copy.
func (b *bench) copyPackage(ctx context.Context, server *testhost.Host, p *puller, name, pkg, sparse string) error {
	pulled := filepath.Join(b.dir, "pulled")
	if err := errors.Join(os.RemoveAll(pulled), os.MkdirAll(pulled, 0o755)); err != nil {
		return err
	}
	from, err := net.Listen("tcp", server.Gateway+":0")
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := net.Listen("tcp", p.host.Gateway+":0")
	if err != nil {
		return err
	}
	defer to.Close()
	begin := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	// one that failed leaves the others waiting
	stop := context.AfterFunc(gctx, func() { _, _ = from.Close(), to.Close() })
	defer stop()
	g.Go(func() error {
		return inHost(gctx, server, "tar --create "+sparse+" --directory "+pkg+" . > /dev/tcp/"+tcpPath(from))
	})
	g.Go(func() error {
		return inHost(gctx, p.host, "tar --extract "+sparse+" --directory "+pulled+" < /dev/tcp/"+tcpPath(to))
	})
	g.Go(func() error { return splice(from, to) })
	if err = g.Wait(); err != nil {
		return fmt.Errorf("copy the package: %w", err)
	}
	b.add(name+"_ms", ms(time.Since(begin)))
	vm, err := p.peer(ctx, "--raddr", "", "--package", pulled)
	if err != nil {
		return err
	}
	b.add(name+"_first_reply_ms", ms(time.Since(begin)))
	_, err = vm.Await(ctx, "Resumed VM")
	return errors.Join(err, vm.End())
}

// inHost runs a command of bash, for which /dev/tcp/HOST/PORT is a connection.
func inHost(ctx context.Context, h *testhost.Host, command string) error {
	abs, err := filepath.Abs(".")
	if err != nil {
		return err
	}
	args := append(h.Via(abs), "bash", "-c", command)
	if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}

func tcpPath(l net.Listener) string { return strings.ReplaceAll(l.Addr().String(), ":", "/") }

// splice copies what comes over one connection to another, between two hosts.
func splice(from, to net.Listener) error {
	in, err := from.Accept()
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := to.Accept()
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"drafter/internal/redisimage"
	"drafter/internal/tour"
)

// The load of the guest that migrates, and where it tells that it runs: the host's end of the first namespace's link.
const (
	loadResident = 300 // MiB
	loadRate     = 20  // MiB of pages per second
	tickAddr     = "10.0.8.1"
	tickPort     = 7777
)

// loadImage makes an OCI image of bench/load.
func loadImage(ctx context.Context, dir string, rate int) (v1.Image, error) {
	bin := filepath.Join(dir, "load")
	if out, err := exec.CommandContext(ctx, "gcc", "-O2", "-static", "-o", bin, "bench/load/load.c").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build load: %w: %s", err, out)
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		return nil, err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "load", Mode: 0o755, Size: int64(len(b))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(b); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	image, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = v1.Config{Entrypoint: []string{"/load", strconv.Itoa(loadResident), strconv.Itoa(rate), tickAddr, strconv.Itoa(tickPort)}, ExposedPorts: map[string]struct{}{"7/tcp": {}}}
	return mutate.ConfigFile(image, config)
}

// ticks listens to the guest, wherever it runs.
type ticks struct {
	conn *net.UDPConn
	wg   sync.WaitGroup

	mu    sync.Mutex
	times []time.Time
}

func listenTicks() (*ticks, error) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{Port: tickPort})
	if err != nil {
		return nil, err
	}
	t := &ticks{conn: conn}
	t.wg.Go(func() {
		b := make([]byte, 100)
		for {
			if _, _, err := conn.ReadFromUDP(b); err != nil {
				return // closed
			}
			t.mu.Lock()
			t.times = append(t.times, time.Now())
			t.mu.Unlock()
		}
	})
	return t, nil
}

func (t *ticks) close() error {
	err := t.conn.Close()
	t.wg.Wait()
	return err
}

// between returns the silences between ticks in a span of time, shortest first.
func (t *ticks) between(from, to time.Time) []time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	var silences []time.Duration
	for i := 1; i < len(t.times); i++ {
		if t.times[i].After(from) && t.times[i-1].Before(to) {
			silences = append(silences, t.times[i].Sub(t.times[i-1]))
		}
	}
	slices.Sort(silences)
	return silences
}

// migration measures moves of a 1 GiB guest between two peers on this host: under load and idle, with the package at the target and without.
func (b *bench) migration(ctx context.Context, rounds int) (err error) {
	nat, err := b.drafter.Start("nat", "--namespace-count", "2")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nat.End()) }()
	if _, err := nat.Await(ctx, "NAT is up"); err != nil {
		return err
	}
	t, err := listenTicks()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	for name, rate := range map[string]int{"load": loadRate, "idle": 0} {
		if err := b.loadPackage(ctx, name, rate); err != nil {
			return err
		}
	}
	for range rounds {
		for _, name := range []string{"load", "idle"} {
			for _, where := range []string{"present", "absent"} {
				if err := b.move(ctx, t, name, where); err != nil {
					return fmt.Errorf("%s, package %s: %w", name, where, err)
				}
			}
		}
	}
	return nil
}

// loadPackage makes a package of a guest with the load running.
func (b *bench) loadPackage(ctx context.Context, name string, rate int) error {
	image, err := loadImage(ctx, dir, rate)
	if err != nil {
		return err
	}
	layout, blueprint := filepath.Join(dir, name+"-image"), filepath.Join(dir, name+"-blueprint")
	if err := redisimage.WriteLayout(image, layout); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "cp", "-a", "--sparse=always", filepath.Join(dir, "blueprint"), blueprint).CombinedOutput(); err != nil {
		return fmt.Errorf("copy blueprint: %w: %s", err, out)
	}
	if err := b.drafter.Run(ctx, os.Stderr, "blueprint", "oci", "oci:"+layout, "--output", filepath.Join(blueprint, "oci.ext4")); err != nil {
		return err
	}
	return b.drafter.Run(ctx, os.Stderr, "snapshotter", "--enable-output=false", "--memory-size", "1024", "--chroot-base-dir", filepath.Join(dir, "vms"),
		"--devices", tour.SnapshotterDevices(blueprint, filepath.Join(dir, name+"-package")))
}

// move measures one migration.
func (b *bench) move(ctx context.Context, t *ticks, name, where string) (err error) {
	pkg := filepath.Join(dir, name+"-package")
	instances := filepath.Join(dir, "instances")
	if err := os.RemoveAll(instances); err != nil {
		return err
	}
	peer := func(number int, raddr, laddr string) (*tour.Service, error) {
		args := []string{"peer", "--enable-output=false", "--chroot-base-dir", filepath.Join(dir, "vms"), "--netns", fmt.Sprintf("ark%d", number), "--raddr", raddr, "--laddr", laddr,
			"--package", pkg, "--instance", filepath.Join(instances, strconv.Itoa(number))}
		if where == "absent" && number == 1 {
			for _, f := range tour.Files {
				args = append(args, "--device", "name="+f.Device+",base="+filepath.Join(instances, "none", f.File))
			}
		}
		return b.drafter.Start(args...)
	}
	source, err := peer(0, "", "localhost:1337")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.End()) }()
	if _, err := source.Await(ctx, "Resumed VM"); err != nil {
		return err
	}
	time.Sleep(2 * time.Second) // the load has spread
	began := time.Now()
	target, err := peer(1, "localhost:1337", "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.End()) }()
	if _, err := target.Await(ctx, "Resumed VM"); err != nil {
		return err
	}
	done, err := source.Await(ctx, "Completed migration")
	if err != nil {
		return err
	}
	time.Sleep(time.Second)
	rss, err := peakRSS(target.PID())
	if err != nil {
		return err
	}
	prefix := fmt.Sprintf("migrate_%s_%s_", name, where)
	silences := t.between(began, time.Now())
	if len(silences) == 0 {
		return errors.New("the guest does not tick")
	}
	b.add(prefix+"gap_ms", ms(silences[len(silences)-1]))
	b.add(prefix+"p99_ms", ms(silences[len(silences)*99/100]))
	b.add(prefix+"downtime_ms", ms(done.Downtime))
	b.add(prefix+"total_ms", ms(done.Took))
	b.add(prefix+"mb", float64(done.Bytes)/1e6)
	b.add(prefix+"target_peak_rss_mb", rss)
	return nil
}

// peakRSS is the largest resident set of a process in MB, see proc(5).
func peakRSS(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, after, found := strings.Cut(string(b), "VmHWM:")
	if !found { // of a process that is ending
		return 0, fmt.Errorf("process %d has no memory", pid)
	}
	kb, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
	return kb * 1024 / 1e6, err
}

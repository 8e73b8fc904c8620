package bench

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"drafter/internal/need"
	"drafter/internal/tour"
	"drafter/peer"
	"drafter/vmm"
	"drafter/vmm/qemu"
)

// BenchmarkMigration moves a guest under load between two peers, both in this process, so that a
// profile shows both ends: 'make profile'. The package is absent at the target.
func BenchmarkMigration(b *testing.B) {
	bin := os.Getenv("DRAFTER")
	if bin == "" {
		need.Lacks(b, "DRAFTER", "no program is in this environment variable; 'make profile' sets it")
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	m := &bench{drafter: tour.Drafter{Bin: bin, Logs: dir}, dir: dir, progress: io.Discard, values: map[string][]float64{}}
	end, err := m.network(b.Context(), 2)
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := end(); err != nil {
			b.Error(err)
		}
	}()
	pkg, err := m.snapshot(b.Context(), "random", 1)
	if err != nil {
		b.Fatal(err)
	}
	var downtime, total time.Duration
	var bytes int64
	b.ResetTimer()
	for range b.N {
		instances := filepath.Join(dir, "instances")
		b.StopTimer()
		source := benchPeer(b, dir, "ark0", pkg, filepath.Join(instances, "0"))
		if err := source.Resume(b.Context()); err != nil {
			b.Fatal(err)
		}
		time.Sleep(settle) // the guest comes to rest
		target := benchPeer(b, dir, "ark1", pkg, filepath.Join(instances, "1"), func(d *peer.Device) { d.Base = filepath.Join(instances, "none", vmm.PackageFile(d.Name)) })
		b.StartTimer()
		movePeers(b, source, target)
		b.StopTimer()
		stats, _ := source.Stats()
		downtime, total, bytes = downtime+stats.Paused, total+stats.Total, bytes+stats.Wire
		for _, p := range []*peer.Peer{source, target} {
			if err := p.Close(); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.RemoveAll(instances); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(ms(downtime)/float64(b.N), "downtime-ms/op")
	b.ReportMetric(ms(total)/float64(b.N), "total-ms/op")
	b.ReportMetric(float64(bytes)/1e6/float64(b.N), "MB/op")
}

func benchPeer(b *testing.B, dir, netns, pkg, instances string, options ...func(*peer.Device)) *peer.Peer {
	b.Helper()
	devices, err := peer.PackageDevices(pkg, instances)
	if err != nil {
		b.Fatal(err)
	}
	for i := range devices {
		for _, option := range options {
			option(&devices[i])
		}
	}
	p, err := peer.New(peer.Config{
		Host:    vmm.Host{Drivers: vmm.Drivers{qemu.Driver{}}, VMM: vmm.VMMAuto, Accel: vmm.AccelAuto, BaseDir: filepath.Join(dir, "vms"), Netns: netns, CgroupVersion: 2},
		Devices: devices, ResumeTimeout: time.Minute, RescueTimeout: 5 * time.Second,
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = p.Close() }) // of a benchmark that has failed
	return p
}

// movePeers moves the VM over TCP on loopback until all of it has arrived.
func movePeers(b *testing.B, source, target *peer.Peer) {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	served := make(chan error, 1)
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	go func() {
		_, err := source.Serve(ctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
			defer context.AfterFunc(ctx, func() { _ = l.(*net.TCPListener).SetDeadline(time.Unix(1, 0)) })() // which ends Accept
			return l.Accept()
		})
		served <- err
	}()
	err = target.Receive(b.Context(), func(ctx context.Context) (io.ReadWriteCloser, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	})
	if err == nil {
		err = target.ArrivalError()
	}
	if err != nil {
		b.Fatal(err)
	}
	if err := <-served; err != nil {
		b.Fatal(err)
	}
}

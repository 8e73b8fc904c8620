package daemon

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"drafter/api"
	"drafter/client"
	"drafter/internal/await"
)

// BenchmarkHundred lists 100 VMs, by the API and by the command, and reports the daemon's memory with
// them. The VMs are stand-ins. Without the race detector:
//
//	go test -run '^$' -bench Hundred ./internal/daemon
func BenchmarkHundred(b *testing.B) {
	dir := testDir(b)
	drafter := filepath.Join(dir, "drafter")
	build := exec.Command("go", "build", "-o", drafter, "drafter/cmd/drafter")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	b.Setenv("STAND_IN_NAMESPACES", "100")
	daemon := exec.Command(os.Args[0], "daemon", dir)
	if err := daemon.Start(); err != nil {
		b.Fatal(err)
	}
	socket := filepath.Join(dir, "socket")
	c := client.New(socket)
	defer c.Close()
	await.True(
		b,
		"the daemon answers",
		func() bool { _, err := c.Host(b.Context()); return err == nil },
	)
	each(b, 100, func(ctx context.Context, i int) error {
		o, err := c.Run(
			ctx,
			api.Run{
				Image: "docker://image",
				Name:  fmt.Sprint("vm", i),
				Ports: []api.Port{{Host: 1000 + i, Guest: 80}},
			},
		)
		if err == nil {
			_, err = c.Await(ctx, o, nil)
		}
		return err
	})
	defer func() {
		ctx := context.WithoutCancel(b.Context())
		each(b, 100, func(_ context.Context, i int) error {
			o, err := c.Remove(ctx, fmt.Sprint("vm", i), true)
			if err == nil {
				_, err = c.Await(ctx, o, nil)
			}
			return err
		})
		if err := daemon.Process.Signal(os.Interrupt); err != nil {
			b.Error(err)
		}
		daemon.Wait() // of an interrupt
	}()
	b.Run("api", func(b *testing.B) {
		for b.Loop() {
			if vms, err := c.VMs(b.Context()); err != nil || len(vms) != 100 {
				b.Fatal(len(vms), err)
			}
		}
	})
	b.Run("ps", func(b *testing.B) {
		var took []time.Duration
		for b.Loop() {
			began := time.Now()
			out, err := exec.Command(drafter, "ps", "--socket", socket).Output()
			if err != nil || strings.Count(string(out), "\n") != 101 {
				b.Fatal(err)
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "median-ms")
		b.ReportMetric(resident(b, daemon.Process.Pid), "daemon-MB")
	})
}

// each calls f for 0 to n-1, ten at a time.
func each(b *testing.B, n int, f func(context.Context, int) error) {
	b.Helper()
	numbers := make(chan int)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			for i := range numbers {
				if err := f(b.Context(), i); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for i := range n {
		numbers <- i
	}
	close(numbers)
	wg.Wait()
}

// resident is the memory of a process, in MB.
func resident(b *testing.B, pid int) float64 {
	b.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	text, err := io.ReadAll(f)
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "VmRSS:")
	kb, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		b.Fatal(err)
	}
	return float64(kb) * 1024 / 1e6
}

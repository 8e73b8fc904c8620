package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"drafter/internal/tour"
)

// wanderer is a VM that moves between two namespaces while somebody writes to it.
type wanderer struct {
	*site
	clients  []*redis.Client
	at       int // 0 or 1
	instance string
	vm       *tour.Service
	life     int // a VM that is lost begins another one
	acked    int // writes of this life
}

// args start an instance. Its migrations are slow enough to be caught at.
func (w *wanderer) args(at int, instance string, flags ...string) []string {
	always := []string{"--netns", fmt.Sprintf("ark%d", at), "--laddr", fmt.Sprintf("localhost:%d", 1337+at), "--bandwidth", "6MB"}
	if w.life%2 == 0 {
		always = append(always, "--migration-timeout", "600ms") // the rest by post-copy
	}
	return w.peerArgs(instance, append(always, flags...)...)
}

// begin starts another VM from the package.
func (w *wanderer) begin(t *testing.T) {
	t.Helper()
	w.life++
	w.at, w.acked, w.instance = 0, 0, fmt.Sprintf("life-%d", w.life)
	if reason := w.try(t, w.at, w.instance); reason != nil {
		t.Fatal(reason)
	}
}

// errBooted is how an instance starts whose process was killed.
var errBooted = errors.New("it booted from its disks")

// try starts an instance, and returns why that is refused. One that boots instead is ended again.
func (w *wanderer) try(t *testing.T, at int, instance string) error {
	t.Helper()
	vm, err := w.Start(w.args(at, instance)...)
	if err != nil {
		t.Fatal(err)
	}
	line, err := vm.Await(t.Context(), "Resumed VM", boots)
	if err != nil {
		return vm.Wait()
	}
	if line.Message == boots {
		return errors.Join(errBooted, vm.End())
	}
	t.Cleanup(func() { _ = vm.End() }) // of a test that has failed
	w.at, w.instance, w.vm = at, instance, vm
	return nil
}

// write writes where the VM is now until stop is closed. What it wrote was acknowledged before the
// VM has left.
func (w *wanderer) write(t *testing.T, stop chan struct{}) {
	c := redis.NewClient(&redis.Options{
		Addr: w.clients[w.at].Options().Addr, MaxRetries: -1, DialerRetries: 1, DialTimeout: 200 * time.Millisecond, ReadTimeout: 300 * time.Millisecond, WriteTimeout: 300 * time.Millisecond,
	})
	defer c.Close()
	for {
		select {
		case <-stop:
			return
		case <-time.After(2 * time.Millisecond): // some of it gets through the link in time
		}
		if c.Set(t.Context(), fmt.Sprintf("key:%d", w.acked), fmt.Sprintf("%d:%s", w.acked, strings.Repeat("x", 2000)), 0).Err() == nil {
			w.acked++
		}
	}
}

// checkAcknowledged looks for every acknowledged write.
func (w *wanderer) checkAcknowledged(t *testing.T) {
	t.Helper()
	for from := 0; from < w.acked; from += 500 {
		var keys []string
		for i := from; i < min(from+500, w.acked); i++ {
			keys = append(keys, fmt.Sprintf("key:%d", i))
		}
		values, err := w.clients[w.at].MGet(t.Context(), keys...).Result()
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range values {
			if s, ok := v.(string); !ok || !strings.HasPrefix(s, fmt.Sprintf("%d:x", from+i)) {
				t.Fatalf("write %d of %d acknowledged ones is lost", from+i, w.acked)
			}
		}
	}
}

// move migrates the VM, lets something go wrong after a while, and waits until both sides have
// ended.
func (w *wanderer) move(t *testing.T, fault string, after time.Duration, to int, instance string) {
	t.Helper()
	l := newLink(t, fmt.Sprintf("localhost:%d", 1337+w.at))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { w.write(t, stop) })
	time.Sleep(200 * time.Millisecond) // some of it is written before the move
	target, err := w.Start(w.args(to, instance, "--raddr", l.addr)...)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(after) // at any moment
	switch fault {
	case "cut":
		l.cut()
	case "freeze":
		l.freeze()
	case "kill target":
		err = target.Signal(syscall.SIGKILL)
	case "kill source":
		err = w.vm.Signal(syscall.SIGKILL)
	case "end target":
		err = target.Signal(syscall.SIGTERM)
	case "end source":
		err = w.vm.Signal(syscall.SIGTERM)
	}
	if err != nil {
		t.Fatal(err)
	}
	switch fault {
	case "kill target":
		w.awaitKilled(t, target)
	case "kill source":
		w.awaitKilled(t, w.vm)
	}
	if _, err := target.Await(t.Context(), "Resumed VM"); err == nil && fault != "kill target" {
		<-w.vm.Done() // once the target has everything
	}
	close(stop)
	wg.Wait()
	// Their errors are what the files say, too.
	_ = target.End()
	_ = w.vm.End()
}

// find starts the VM where it is now, which is one place only, and says where that is.
func (w *wanderer) find(t *testing.T, fault string, to int, instance string) string {
	t.Helper()
	from, left := w.at, w.instance
	atTarget := errors.New("nothing has arrived")
	arrived := func() error {
		if _, err := os.Stat(filepath.Join(w.dir, instance, "overlay/state.bin")); err != nil {
			return atTarget // to start it would be to make another VM
		}
		return w.try(t, to, instance)
	}
	atSource := w.try(t, from, left)
	if atSource == nil || errors.Is(atSource, errBooted) {
		if atTarget = arrived(); atTarget == nil || errors.Is(atTarget, errBooted) {
			t.Fatalf("%s: the VM runs twice", fault)
		}
		if atSource == nil {
			return "stayed"
		}
	} else {
		atTarget = arrived()
	}
	switch {
	case atTarget == nil:
		return "moved"
	case strings.HasPrefix(fault, "kill") && (strings.Contains(atSource.Error(), "may run at its target") || strings.Contains(atSource.Error(), "never suspended") || strings.Contains(atTarget.Error(), "never suspended")):
		w.begin(t)
		return "killed"
	case strings.Contains(atSource.Error(), "drafter peer settle"): // nobody runs it: both have ended
		command(t, w.dir, "drafter", "peer", "settle", "--here", "--package", filepath.Join(work, "out/package"), "--instance", left)
		if err := w.try(t, from, left); err != nil {
			t.Fatalf("after it was settled: %v", err)
		}
		return "settled"
	case strings.HasPrefix(fault, "kill") && (errors.Is(atSource, errBooted) || errors.Is(atTarget, errBooted)):
		w.begin(t)
		return "killed"
	}
	t.Fatalf("the VM is nowhere; source: %v; target: %v", atSource, atTarget)
	return ""
}

// Migrations of a real VM in which anything goes wrong at any moment: afterwards there is one VM,
// with every write that was acknowledged, unless its own process was killed.
func TestSoakMigrations(t *testing.T) {
	w := &wanderer{site: emptySite(t)}
	w.clients = []*redis.Client{w.redisIn(t, "ark0", "127.0.0.1:3333"), w.redisIn(t, "ark1", "127.0.0.1:4444")}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	faults := []string{"none", "cut", "cut", "freeze", "kill target", "kill source", "end target", "end source"}
	outcomes := map[string]int{}
	w.begin(t)
	for round := range soak(4, 50) {
		fault, after := faults[rng.IntN(len(faults))], time.Duration(rng.IntN(2500))*time.Millisecond
		to, instance := 1-w.at, fmt.Sprintf("life-%d-round-%d", w.life, round)
		began := time.Now()
		w.move(t, fault, after, to, instance)
		outcome := w.find(t, fault, to, instance)
		w.checkAcknowledged(t)
		outcomes[fault+": "+outcome]++
		t.Logf("round %d: %s after %s: %s; %d writes; %s", round, fault, after, outcome, w.acked, time.Since(began).Round(time.Millisecond))
	}
	end(t, w.vm)
	t.Log(outcomes)
}

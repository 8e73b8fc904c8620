package e2e

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"drafter/internal/tour"
)

// Within a host the memory changes hands as a file: nothing of it is copied, and nothing is lost. A
// VM that has changed hands can be suspended and resumed.
func TestHandOver(t *testing.T) {
	s := emptySite(t)
	clients := []*redis.Client{s.redisIn(t, "ark0", "127.0.0.1:3333"), s.redisIn(t, "ark1", "127.0.0.1:4444")}
	const hops = 4
	flags := func(hop int, more ...string) []string {
		return append([]string{"--netns", fmt.Sprintf("ark%d", hop%2), "--laddr", fmt.Sprintf("unix:%s/hop-%d", s.dir, hop), "--memory-backing", "shared"}, more...)
	}
	vm := s.peer(t, "instance-0", flags(0)...)
	rng := rand.New(rand.NewPCG(1, 2))
	values := map[string]string{}
	for hop := 1; hop <= hops; hop++ {
		c := clients[(hop-1)%2]
		for range 300 {
			key, value := fmt.Sprint("key:", rng.IntN(1000)), strings.Repeat(fmt.Sprint(rng.Uint64()), rng.IntN(500))
			if err := c.Set(t.Context(), key, value, 0).Err(); err != nil {
				t.Fatal(err)
			}
			values[key] = value
		}
		next := s.peer(t, fmt.Sprint("instance-", hop), flags(hop, "--raddr", fmt.Sprintf("unix:%s/hop-%d", s.dir, hop-1))...)
		line := moved(t, vm)
		t.Log(line.Text)
		if !strings.Contains(line.Text, `"memoryBytes":0,`) {
			t.Error("memory was copied")
		}
		quiet(t, vm)
		quiet(t, next)
		s.holds(t, clients[hop%2], values, fmt.Sprint("after hop ", hop))
		vm = next
	}
	end(t, vm)
	vm = s.peer(t, fmt.Sprint("instance-", hops), flags(hops)...)
	s.holds(t, clients[hops%2], values, "after a suspend")
	end(t, vm)
}

// holds checks what Redis has.
func (s *site) holds(t *testing.T, c *redis.Client, values map[string]string, what string) {
	t.Helper()
	for key, value := range values {
		if got, err := c.Get(t.Context(), key).Result(); err != nil || got != value {
			t.Fatalf("%s: %s is %.20q instead of %.20q, %v", what, key, got, value, err)
		}
	}
}

// A hand-over within a host is never in doubt. A target that is killed, or stands still, before it
// has taken the VM has not got it: the VM goes on at its source at once, and nobody need decide.
func TestHandOverFails(t *testing.T) {
	s := emptySite(t)
	c := s.redisIn(t, "ark0", "127.0.0.1:3333")
	source := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "unix:"+s.dir+"/source", "--memory-backing", "shared")
	runID := serverInfo(t, c, "run_id")
	goesOn := func(what string) {
		t.Helper()
		if got := serverInfo(t, c, "run_id"); got != runID {
			t.Fatalf("%s: this is another Redis process", what)
		}
	}
	target := func(name string) *tour.Service {
		t.Helper()
		vm, err := s.Start(s.peerArgs(name, "--netns", "ark1", "--raddr", "unix:"+s.dir+"/source")...)
		if err != nil {
			t.Fatal(err)
		}
		await(t, source, "Pausing the VM to hand it over")
		return vm
	}
	const kept, gone = "The migration failed; the VM goes on here", "The VM runs at its target"
	// decided awaits what the source finds out by itself.
	decided := func() (ours bool) {
		t.Helper()
		line, err := source.Await(t.Context(), kept, gone)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(line.Text, kept)
	}

	vm := target("stopped")
	if err := vm.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if decided() {
		goesOn("while the target stands still")
		if err := vm.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		if err := vm.Wait(); err == nil || !strings.Contains(err.Error(), "the VM") {
			t.Errorf("a target that came too late: %v", err)
		}
		goesOn("after the target came too late")
	} else {
		t.Fatal("the target was too quick for this test") // it takes the VM some 10 ms later
	}
	for round := range 5 {
		vm := target(fmt.Sprint("killed-", round))
		time.Sleep(time.Duration(round) * 3 * time.Millisecond)
		if err := vm.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		s.awaitKilled(t, vm)
		if decided() {
			goesOn(fmt.Sprint("round ", round))
			continue
		}
		t.Log("the target had taken the VM in round", round)
		settle := []string{"peer", "settle", "--here", "--package", filepath.Join(work, "out/package"), "--instance", "instance-0"}
		if line := s.fails(t, settle...); !strings.Contains(line, "lets it boot from its disks") {
			t.Errorf("settled to go on without its memory: %s", line)
		}
		if err := source.End(); err == nil {
			t.Error("a source whose VM has ended elsewhere ends without a word")
		}
		command(t, s.dir, "drafter", settle...)
		s.boots(t, "", s.peerArgs("instance-0")...)
		return
	}
	end(t, source)
	end(t, s.peer(t, "instance-0", "--netns", "ark0")) // it removes what the killed ones have left
}

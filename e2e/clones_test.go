package e2e

import (
	"context"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"drafter/peer"
)

// resume resumes an instance with the library. It is closed with the test.
func resume(t *testing.T, netns, dir string) *peer.Peer {
	t.Helper()
	p, err := newPeer(netns, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := p.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	return p
}

// guest runs a shell command in a guest.
func guest(t *testing.T, p *peer.Peer, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r, err := p.Agent().Exec(ctx, nil, "sh", "-c", command)
	if err != nil || r.GetExitStatus() != 0 {
		t.Fatalf("%s: exit status %d, %v: %s", command, r.GetExitStatus(), err, r.GetStderr())
	}
	return strings.TrimSpace(string(r.GetStdout()))
}

// Clones of one VM are not one another's repetition, from the first moment.
func TestClones(t *testing.T) {
	s := emptySite(t)
	original := resume(t, "ark0", filepath.Join(s.dir, "original"))
	// It notes what its generator says, all the time.
	guest(t, original, `(while :; do echo $(cut -d' ' -f1 /proc/uptime) $(cat /proc/sys/kernel/random/uuid); done > /dev/shm/samples 2>&1 < /dev/null) > /dev/null 2>&1 < /dev/null &`)
	time.Sleep(500 * time.Millisecond)
	uptime, err := strconv.ParseFloat(guest(t, original, "cut -d' ' -f1 /proc/uptime"), 64)
	if err != nil {
		t.Fatal(err)
	}
	if err := original.Suspend(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := original.Close(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second) // which the clones' clocks have to catch up
	var samples [2][]string
	var bootIDs [2]string
	for i, netns := range []string{"ark0", "ark1"} {
		dir := filepath.Join(s.dir, "clone-"+strconv.Itoa(i))
		if out, err := exec.Command("cp", "-a", "--sparse=always", filepath.Join(s.dir, "original"), dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		clone := resume(t, netns, dir)
		began := time.Now()
		seconds, err := strconv.ParseInt(guest(t, clone, "date +%s"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if off := time.Since(time.Unix(seconds, 0)); off < -time.Second || off > time.Second+time.Since(began) {
			t.Errorf("clone %d: the clock is off by %s", i, off)
		}
		bootIDs[i] = guest(t, clone, "cat /proc/sys/kernel/random/boot_id")
		samples[i] = strings.Split(guest(t, clone, "sleep 1; cat /dev/shm/samples"), "\n")
	}
	if bootIDs[0] == bootIDs[1] {
		t.Errorf("both clones have the boot id %s", bootIDs[0])
	}
	draw := func(sample string) string { return strings.Fields(sample)[1] }
	// What the original drew, and what the clones draw until their kernels have handled the notice that they are clones.
	same := 0
	for same < min(len(samples[0]), len(samples[1])) && draw(samples[0][same]) == draw(samples[1][same]) {
		same++
	}
	last, err := strconv.ParseFloat(strings.Fields(samples[0][same-1])[0], 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d samples are the original's; the last is %.2f s after its suspend began; the clones' own are %d and %d", same, last-uptime, len(samples[0])-same, len(samples[1])-same)
	if last > uptime+0.3 {
		t.Errorf("the clones draw the same numbers for a while: up to %.2f s after the suspend began", last-uptime)
	}
	drawn := map[string]bool{}
	for _, line := range samples[0][same:] {
		drawn[draw(line)] = true
	}
	for _, line := range samples[1][same:] {
		if drawn[draw(line)] {
			t.Errorf("both clones drew %s", line)
		}
	}
}

package e2e

import (
	"bytes"
	"context"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"drafter/peer"
)

// resume resumes an instance with the library. It is closed with the test.
func resume(t *testing.T, netns, dir string, options ...func(*peer.Config)) *peer.Peer {
	t.Helper()
	p, err := newPeer(netns, dir, options...)
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
	var console bytes.Buffer
	original := resume(t, "ark0", filepath.Join(s.dir, "original"), func(c *peer.Config) { c.Host.Output = &console })
	// It notes what its generator says, all the time, and says on its console when it did: what is
	// there was drawn before there were clones.
	guest(t, original, `(while :; do s="$(cut -d' ' -f1 /proc/uptime) $(cat /proc/sys/kernel/random/uuid)"; echo "$s"; echo "drawn at $s" > /dev/console; done > /dev/shm/samples 2>&1 < /dev/null) > /dev/null 2>&1 < /dev/null &`)
	guest(t, original, "until [ $(wc -l < /dev/shm/samples) -ge 30 ]; do sleep 0.1; done")
	if err := original.Suspend(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := original.Close(); err != nil {
		t.Fatal(err)
	}
	drawn := regexp.MustCompile(`drawn at (\S+) \S+\r?\n`).FindAllStringSubmatch(console.String(), -1)
	if len(drawn) < 30 {
		t.Fatalf("%d samples on the console: %s", len(drawn), console.String())
	}
	suspended := uptime(t, drawn[len(drawn)-1][1])
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
	// What the original drew, and what the clones draw until their kernels have handled the notice
	// that they are clones.
	same := 0
	for same < min(len(samples[0]), len(samples[1])) && draw(samples[0][same]) == draw(samples[1][same]) {
		same++
	}
	last := uptime(t, strings.Fields(samples[0][same-1])[0])
	t.Logf("%d samples are the same, the last %.2f s after the original's last; the clones' own are %d and %d", same, last-suspended, len(samples[0])-same, len(samples[1])-same)
	if same < len(drawn) || same > len(drawn)+10 {
		t.Errorf("the original drew %d samples, and the clones draw the same numbers for a while: %d, until %.2f s later", len(drawn), same-len(drawn), last-suspended)
	}
	seen := map[string]bool{}
	for _, line := range samples[0][same:] {
		seen[draw(line)] = true
	}
	for _, line := range samples[1][same:] {
		if seen[draw(line)] {
			t.Errorf("both clones drew %s", line)
		}
	}
}

// uptime reads seconds since a guest's boot.
func uptime(t *testing.T, s string) float64 {
	t.Helper()
	seconds, err := strconv.ParseFloat(s, 64)
	if err != nil {
		t.Fatal(err)
	}
	return seconds
}

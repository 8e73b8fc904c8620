package qemu

import (
	"testing"
	"time"
)

// Firmware that resets the machine again and again, as it was seen to, is part of one reboot. A
// guest that reboots again and again is told from it, whether it takes a while or does it at once.
func TestResets(t *testing.T) {
	const ms = time.Millisecond
	begin := time.Now()
	for _, c := range []struct {
		name    string
		apart   []time.Duration // between resets, over and over
		reboots int             // in a minute
		ends    time.Duration   // 0: it does not
	}{
		{"firmware's own", []time.Duration{77 * ms, 10 * ms, 46 * ms, 8 * ms, 57 * ms, 15 * ms, 25 * time.Second}, 3, 0},
		{"a crash at boot", []time.Duration{7 * time.Second, 300 * ms}, 6, 36200 * ms},
		{"at once", []time.Duration{400 * ms}, 1, 30400 * ms},
	} {
		r, reboots, passed := newResets(), 0, time.Duration(0)
		var ended time.Duration
		for n := 0; passed < time.Minute && ended == 0; n++ {
			again, endless := r.note(begin.Add(passed))
			if !again {
				reboots++
			}
			if endless {
				ended = passed
			}
			passed += c.apart[n%len(c.apart)]
		}
		if reboots != c.reboots || ended != c.ends {
			t.Errorf("%s: %d reboots, and an end after %v; want %d, %v", c.name, reboots, ended, c.reboots, c.ends)
		}
	}
}

package qemu

import (
	"context"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

const (
	// rebootsAtOnce is how often a guest may boot again at once, and then once a minute. One that
	// does it more often gets nowhere, and ends at the next time.
	rebootsAtOnce = 5

	// oneReboot is how close to each other the resets of one reboot are. SeaBIOS resets the machine
	// once more when it finds that it has run before: by port 0xcf9, and by a triple fault behind
	// that (qemu_reboot in its src/fw/shadow.c). Emulation may take these for two resets. The
	// second one hits SeaBIOS at its start, and all begins anew.
	oneReboot = 3 * time.Second

	// endlessReboot is how long a reboot may reset the machine.
	endlessReboot = 30 * time.Second
)

// resets tells reboots of a guest from the resets they consist of. It is used from one goroutine.
type resets struct {
	began, last time.Time // of the last reboot
	limit       *rate.Limiter
}

func newResets() resets {
	return resets{limit: rate.NewLimiter(rate.Every(time.Minute), rebootsAtOnce)}
}

// note tells whether a reset at a time is one more of the same reboot, and whether the guest gets
// nowhere.
func (r *resets) note(at time.Time) (again, endless bool) {
	again = at.Sub(r.last) < oneReboot
	r.last = at
	if again {
		return true, at.Sub(r.began) > endlessReboot
	}
	r.began = at
	return false, !r.limit.AllowN(at, 1)
}

// rebooted tells that the guest boots again.
func (m *Machine) rebooted() {
	again, endless := m.resets.note(time.Now())
	if m.launch.OnReboot != nil {
		m.launch.OnReboot(strings.TrimPrefix(m.console.Tail(), "; "), again)
	}
	if endless {
		m.workers.Go(func() { // the answer comes behind the event that is being handled
			// It fails if QEMU has ended.
			_ = m.qmp.execute(context.Background(), "set-action", map[string]any{"reboot": "shutdown"}, nil)
		})
	}
}

// Package await waits in tests for what comes to be by itself and tells nobody: a file, a process'
// end, a line in a log. What can tell is waited for by a channel.
package await

import (
	"testing"
	"time"
)

const (
	patience = time.Minute // of a busy machine
	first    = time.Millisecond
	most     = 50 * time.Millisecond // between looks
)

// True waits until is returns true, and fails the test if it does not within a minute.
func True(t testing.TB, what string, is func() bool) {
	t.Helper()
	TrueWithin(t, patience, what, is)
}

// TrueWithin is [True] for what may take longer, or must not.
func TrueWithin(t testing.TB, limit time.Duration, what string, is func() bool) {
	t.Helper()
	NoneWithin(t, limit, what, func() string {
		if is() {
			return ""
		}
		return "it is not so"
	})
}

// None waits until complain has nothing to say any more. What it says last after a minute fails the
// test.
func None(t testing.TB, what string, complain func() string) {
	t.Helper()
	NoneWithin(t, patience, what, complain)
}

// NoneWithin is [None] for what may take longer, or must not.
func NoneWithin(t testing.TB, limit time.Duration, what string, complain func() string) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for pause := first; ; pause = min(2*pause, most) {
		why := complain()
		if why == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s, within %s: %s", what, limit, why)
		}
		time.Sleep(pause)
	}
}

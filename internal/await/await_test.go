package await

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// told is a test that fails.
type told struct {
	testing.TB
	failed string
}

func (t *told) Helper() {}

func (t *told) Fatalf(format string, args ...any) { t.failed = fmt.Sprintf(format, args...); panic(t) }

// What comes is waited for, and no longer; what does not come fails the test in time.
func TestAwait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		True(t, "a moment", func() bool { return time.Since(begin) >= 10*time.Second })
		if took := time.Since(begin); took > 10*time.Second+most {
			t.Errorf("it took %s", took)
		}
		begin = time.Now()
		s := &told{TB: t}
		func() {
			defer func() {
				if r := recover(); r != any(s) {
					t.Errorf("it went on: %v", r)
				}
			}()
			NoneWithin(s, time.Hour, "silence", func() string { return fmt.Sprintf("noise after %s", time.Since(begin).Round(time.Hour)) })
		}()
		if !strings.Contains(s.failed, "silence, within 1h0m0s: noise after 1h0m0s") {
			t.Errorf("it says %q", s.failed)
		}
	})
}

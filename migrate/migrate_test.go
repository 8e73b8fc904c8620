package migrate

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A guest that writes all the time moves, and nothing is lost.
func TestMove(t *testing.T) {
	for _, limits := range []Limits{quick(), func() Limits { l := quick(); l.NoPostCopy = true; return l }()} {
		p := newPair(t, 1, limits, nil)
		target, err := Receive(t.Context(), p.config(limits, nil))
		if err != nil {
			t.Fatal(err)
		}
		if err := target.Wait(); err != nil {
			t.Fatal(err)
		}
		p.network.wg.Wait()
		if p.network.err != nil || p.source.State() != Moved || target.State() != Moved {
			t.Errorf("source %s, %v; target %s", p.source.State(), p.network.err, target.State())
		}
		p.guest.halt()
		p.target.halt()
		if err := p.target.verify(); err != nil {
			t.Error(err)
		}
		t.Logf("%+v", p.source.Stats())
		if err := p.source.Close(); err != nil {
			t.Error(err)
		}
		if err := target.Close(); err != nil {
			t.Error(err)
		}
	}
}

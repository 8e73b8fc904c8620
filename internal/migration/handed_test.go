package migration

import (
	"context"
	"errors"
	"testing"
	"time"

	"drafter/internal/block"
	"drafter/migrate"
)

// handover are limits for two sides on one host.
func handover() bounds {
	l := quick()
	l.handover = true
	return l
}

// Memory that changes hands as a file is not sent, but for what was stored, at most once.
func TestHandOver(t *testing.T) {
	p := newPair(t, 1, handover(), nil)
	p.move(t, handover())
	if p.target.memory == nil {
		t.Fatal("the target has not taken the memory")
	}
	for _, d := range p.source.Stats().Devices {
		if d.Name == "memory" && (d.Sent > memoryPages*4/5*block.PageSize || d.Saved == 0) {
			t.Errorf("%d bytes of memory were sent, %d were not", d.Sent, d.Saved)
		}
	}
}

// A target that is lost before it has taken the VM leaves no doubt: the source asks the memory. One
// that comes too late does not run the VM.
func TestNoDoubt(t *testing.T) {
	for _, kind := range []string{"killed", "cut", "ended"} {
		t.Run(kind, func(t *testing.T) {
			p := newPair(t, 1, handover(), nil)
			revoked := make(chan error, 1)
			p.target.onCall("restore", func() error {
				switch kind {
				case "killed":
					p.kill("target")
					return errors.New("killed")
				case "cut":
					p.network.mu.Lock()
					for _, c := range p.network.conns {
						_ = c.Close()
					}
					p.network.mu.Unlock()
				case "ended":
					go func() { revoked <- p.source.Revoke(errors.New("the source was ended")) }()
				}
				for p.source.Phase() != migrate.Kept { // it decides alone
					if t.Context().Err() != nil {
						return t.Context().Err()
					}
				}
				return nil
			})
			limits := handover()
			if kind == "killed" {
				limits.Settle = 1
			}
			if _, err := Receive(t.Context(), p.config(limits, nil)); err == nil {
				t.Error("the target has the VM, too")
			}
			<-p.source.current.ended.fired()
			if kind == "ended" {
				if err := <-revoked; err != nil {
					t.Error(err)
				}
			}
			p.kept(t)
		})
	}
}

// A target that has claimed the VM, and then cannot let it run, gives it back, even if the source
// has heard nothing of that.
func TestClaimedInVain(t *testing.T) {
	p := newPair(t, 1, handover(), nil)
	p.target.onCall("resume", func() error {
		p.network.kill()
		for p.source.Phase() != migrate.Serving { // it has asked the memory
			if t.Context().Err() != nil {
				return t.Context().Err()
			}
			time.Sleep(time.Millisecond)
		}
		return errors.New("injected: resume")
	})
	limits := handover()
	limits.Settle = 1
	if _, err := Receive(t.Context(), p.config(limits, nil)); err == nil {
		t.Error("the target has the VM")
	}
	p.kept(t)
}

// kept waits for the end of a migration, and checks that the VM goes on at its source.
func (p *pair) kept(t *testing.T) {
	t.Helper()
	<-p.source.current.ended.fired()
	if s := p.source.Phase(); s != migrate.Kept {
		t.Errorf("the source is %s", s)
	}
	p.network.kill()
	p.network.wg.Wait()
	p.guest.halt()
	p.target.halt()
	if err := errors.Join(p.guest.verify(), p.source.Close()); err != nil {
		t.Error(err)
	}
}

// Whoever ends a target while the VM is about to run there waits for that. It is neither lost nor
// back at its source.
func TestEndWhileResuming(t *testing.T) {
	for _, limits := range []bounds{quick(), handover()} {
		p := newPair(t, 1, limits, nil)
		ctx, cancel := context.WithCancel(t.Context())
		p.target.onCall("resume", func() error {
			cancel()
			time.Sleep(10 * time.Millisecond) // in which it would end
			return nil
		})
		target, err := Receive(ctx, p.config(limits, nil))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(target.Wait(), target.Close()); err != nil {
			t.Error(err)
		}
		p.network.wg.Wait()
		if s := p.source.Phase(); s != migrate.Moved {
			t.Errorf("the source is %s", s)
		}
		p.guest.halt()
		p.target.halt()
		if err := errors.Join(p.target.verify(), p.source.Close()); err != nil {
			t.Error(err)
		}
	}
}

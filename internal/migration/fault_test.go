package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"drafter/internal/block"
	"drafter/internal/need"
	"drafter/migrate"
)

// fault is one thing that goes wrong in a migration.
type fault struct {
	name string
	// arm prepares it; at is called at every change of state.
	arm func(p *pair)
	at  func(p *pair, side string, s migrate.Phase)

	backup string // what is wrong with the backup that the target gets the VM from; "" for none
}

// connectionFault lets connection n fail after so many bytes.
func connectionFault(kind string, n, after int64) fault {
	fails := map[string]func(*faulty) error{"cut": cut, "freeze": freeze}[kind]
	return fault{name: fmt.Sprintf("%s connection %d after %d bytes", kind, n, after), arm: func(p *pair) {
		p.network.wrap = func(i int64, c io.ReadWriteCloser) io.ReadWriteCloser {
			if i != n {
				return c
			}
			if kind == "damage" {
				return &damaged{ReadWriteCloser: c, left: after}
			}
			return newFaulty(c, after, fails)
		}
	}}
}

// linkFault lets the link fail when a side gets to a state: all connections there are, and none
// that come later.
func linkFault(kind, side string, state migrate.Phase) fault {
	f := fault{name: fmt.Sprintf("%s link when %s is %s", kind, side, state)}
	var conns []*faulty
	f.arm = func(p *pair) {
		p.network.wrap = func(_ int64, c io.ReadWriteCloser) io.ReadWriteCloser {
			fc := newFaulty(c, 1<<50, map[string]func(*faulty) error{"cut": cut, "freeze": freeze}[kind])
			conns = append(conns, fc)
			return fc
		}
	}
	var fired atomic.Bool
	f.at = func(p *pair, at string, s migrate.Phase) {
		if at != side || s != state || !fired.CompareAndSwap(false, true) {
			return
		}
		p.network.mu.Lock()
		defer p.network.mu.Unlock()
		for _, c := range conns {
			c.left.Store(0)
			if kind == "cut" {
				_ = c.Close()
			}
		}
	}
	return f
}

// callFault lets a call on a machine fail.
func callFault(side, call string) fault {
	return fault{name: fmt.Sprintf("%s fails to %s", side, call), arm: func(p *pair) {
		m := p.guest
		if side == "target" {
			m = p.target.scripted
		}
		f := func(c string) error {
			if c == call {
				return errors.New("injected: " + call)
			}
			return nil
		}
		m.failing.Store(&f)
	}}
}

// killFault kills a side when it gets to a state, or when the other does.
func killFault(victim, side string, state migrate.Phase) fault {
	var fired atomic.Bool
	return fault{name: fmt.Sprintf("kill %s when %s is %s", victim, side, state), at: func(p *pair, at string, s migrate.Phase) {
		if at != side || s != state || !fired.CompareAndSwap(false, true) {
			return
		}
		p.kill(victim)
	}}
}

// fullFault fills the target's disk when it gets to a state.
func fullFault(state migrate.Phase) fault {
	return fault{name: "target's disk is full when it is " + string(state), at: func(p *pair, at string, s migrate.Phase) {
		if at == "target" && s == state {
			for _, m := range p.target.under {
				m.full.Store(true)
			}
		}
	}}
}

// shortOfRoom leaves the target no room for what arrives when it fetches, for a moment.
func shortOfRoom() fault {
	return fault{name: "target has no room for a moment while it fetches", at: func(p *pair, at string, s migrate.Phase) {
		if at != "target" || s != migrate.Fetching {
			return
		}
		until := time.Now().Add(30 * time.Millisecond)
		f := func(call string) error {
			if call == "store" && time.Now().Before(until) {
				return syscall.ENOSPC
			}
			return nil
		}
		p.target.failing.Store(&f)
	}}
}

// damaged flips one bit after so many bytes read.
type damaged struct {
	io.ReadWriteCloser
	left int64
}

func (d *damaged) Read(p []byte) (int, error) {
	n, err := d.ReadWriteCloser.Read(p)
	if d.left >= 0 && d.left < int64(n) {
		p[d.left] ^= 4
	}
	d.left -= int64(n)
	return n, err
}

// kill ends a side as kill -9 does: nothing of it does anything any more.
func (p *pair) kill(side string) {
	p.network.kill()
	p.killed.Store(side)
	m := p.guest
	if side == "target" {
		m = p.target.scripted
	}
	m.dead.Store(true)
	f := func(string) error { return errors.New("killed") }
	m.failing.Store(&f)
	p.ledger.mu.Lock()
	defer p.ledger.mu.Unlock()
	if p.ledger.running == side {
		p.ledger.running = "nowhere"
	}
}

// settle brings a migration to its end, settling what is in doubt as an operator would, and checks
// that there is one VM with all its data, or what the table in docs/migration.md says instead.
func (p *pair) settle(t *testing.T, receive func() (*Target, error)) (source, target migrate.Phase) {
	t.Helper()
	arrived, err := receive()
	target = migrate.NotTaken
	deadline := time.Now().Add(10 * time.Second)
	if err == nil {
		for {
			target = arrived.Phase()
			stuck := p.dead() != "" && target == migrate.Fetching && time.Now().After(deadline.Add(-9800*time.Millisecond))
			if target == migrate.Moved || target == migrate.LeftFetching || stuck {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: the target does not get on: %s, source %s, %v", p.what, target, p.source.Phase(), p.states.String())
			}
			time.Sleep(time.Millisecond)
		}
	}
	for {
		source = p.source.Phase()
		if source == migrate.Kept || source == migrate.Moved || source == migrate.Lost || p.dead() == "source" {
			break
		}
		if source == migrate.InDoubt && (p.dead() == "target" || target == migrate.NotTaken && time.Now().After(deadline.Add(-5*time.Second))) {
			o := migrate.Here
			if p.target.ran.Load() {
				o = migrate.Away
			}
			if err := p.source.Settle(o); err != nil && !errors.Is(err, migrate.ErrConnected) && p.source.Phase() == migrate.InDoubt {
				t.Fatal(err)
			}
		}
		if source == migrate.Serving && p.dead() == "target" {
			break
		}
		if time.Now().After(deadline) {
			_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1) // what it waits for
			t.Fatalf("%s: the source does not get on: %s, target %s, %v", p.what, source, target, p.states.String())
		}
		time.Sleep(time.Millisecond)
	}
	return source, target
}

// moved returns the source's phase once the VM has moved, which is so a moment after the target has
// been told.
func (p *pair) moved() migrate.Phase {
	<-p.source.Gone()
	return p.source.Phase()
}

// conclude ends both guests and checks the one that is left.
func (p *pair) conclude(t *testing.T, source migrate.Phase, arrived *Target) {
	t.Helper()
	ran := p.target.ran.Load()
	if p.dead() == "" {
		time.Sleep(time.Millisecond) // it goes on
	}
	p.ledger.mu.Lock()
	running := p.ledger.running
	p.ledger.mu.Unlock()
	if source == migrate.Kept && p.shared != nil && p.dead() == "" && p.source.current != nil {
		<-p.source.current.ended.fired()
		if p.shared.Offered() {
			t.Error("the VM goes on here, and its memory may still be another's")
		}
	}
	var check *scripted
	switch {
	case p.dead() == "source" && ran, source == migrate.Moved:
		check = p.target.scripted
	case source == migrate.Kept:
		check = p.guest
	}
	if p.dead() == "" {
		want := "source"
		if ran {
			want = "target"
		}
		if running != want || (source == migrate.Moved) != ran {
			t.Errorf("the VM runs at %q, the source is %s and the target ran it: %v", running, source, ran)
		}
	}
	if p.dead() == "target" && !ran && running != "source" {
		t.Errorf("the VM runs at %q after the target was killed", running)
	}
	if arrived != nil {
		if err := arrived.Close(); err != nil {
			t.Error(err)
		}
	}
	p.guest.halt()
	p.target.halt()
	if check != nil {
		err := check.verify()
		incomplete := p.dead() == "source" && errors.Is(err, block.ErrAbandoned) // it was stuck, and never wrong
		if err != nil && !incomplete {
			t.Error(err)
		}
	}
	p.network.kill()
	if err := p.source.Close(); err != nil {
		t.Error(err)
	}
	p.network.wg.Wait()
}

// try runs one migration with a fault.
func try(t *testing.T, seed uint64, limits bounds, rate int64, f fault) (p *pair, source, target migrate.Phase, err error) {
	t.Helper()
	var begun atomic.Bool
	onState := func(side string, s migrate.Phase) {
		if f.at != nil && begun.Load() {
			f.at(p, side, s)
		}
	}
	p = newPair(t, seed, limits, onState)
	p.what = fmt.Sprintf("seed %d: %s", seed, f.name)
	p.network.rate = rate
	if f.backup != "" {
		p.backUp(t, f.backup)
	}
	begun.Store(true)
	if f.arm != nil {
		f.arm(p)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var arrived *Target
	done := make(chan struct{})
	go func() {
		defer close(done)
		limits := limits
		if strings.HasPrefix(f.name, "kill") {
			limits.Settle = 10 * time.Millisecond
		}
		arrived, err = Receive(ctx, p.config(limits, onState))
	}()
	source, target = p.settle(t, func() (*Target, error) {
		<-done
		return arrived, err
	})
	p.conclude(t, source, arrived)
	return p, source, target, err
}

// What becomes of a VM at every fault in every state, as docs/migration.md says.
func TestFaultMatrix(t *testing.T) {
	for _, handover := range []bool{false, true} {
		for _, tt := range faultMatrix(handover) {
			limits := quick()
			limits.note = 1 // at once: noting it may fail, too
			limits.handover = handover
			t.Run(fmt.Sprintf("%s, within a host %t", tt.name, handover), func(t *testing.T) {
				p, source, target, err := try(t, 1, limits, 0, tt.fault)
				if tt.source != "" && source != tt.source || tt.target != "" && target != tt.target && p.dead() != "target" {
					t.Errorf("source %q, target %q; want %q, %q; %v; %v; %v", source, target, tt.source, tt.target, p.states.String(), err, p.network.err)
				}
				if handover && target == migrate.Moved && p.target.memory == nil {
					t.Error("the memory did not change hands")
				}
				if tt.outcome == kept && p.dead() == "" && (err == nil || p.network.err == nil) {
					t.Errorf("nobody was told: target %v, source %v", err, p.network.err)
				}
			})
		}
	}
}

// outcome is the phases in which the sides end; "" for any.
type outcome struct{ source, target migrate.Phase }

var kept, moved = outcome{migrate.Kept, migrate.NotTaken}, outcome{migrate.Moved, migrate.Moved}

// expected is a fault and what becomes of the VM.
type expected struct {
	fault
	outcome
}

func faultMatrix(handover bool) (faults []expected) {
	add := func(f fault, o outcome) { faults = append(faults, expected{f, o}) }
	for _, kind := range []string{"cut", "freeze"} {
		for _, s := range []migrate.Phase{migrate.Preflight, migrate.PreCopying, migrate.Preparing, migrate.HandingOff} {
			add(linkFault(kind, "source", s), kept)
		}
		add(linkFault(kind, "target", migrate.Receiving), kept)
		if handover { // the source asks the memory, and may be quicker
			add(linkFault(kind, "target", migrate.TakingOver), outcome{})
		} else {
			add(linkFault(kind, "target", migrate.TakingOver), moved)
		}
		for _, s := range []migrate.Phase{migrate.Fetching, migrate.Confirming} {
			add(linkFault(kind, "target", s), moved)
		}
		// The authority may get through or not.
		add(linkFault(kind, "source", migrate.InDoubt), outcome{})
		add(linkFault(kind, "source", migrate.Serving), moved)
	}
	for _, call := range []string{"write back", "flush", "prepare", "leave", "pause", "save"} {
		add(callFault("source", call), kept)
	}
	for _, s := range []migrate.Phase{migrate.InDoubt, migrate.Serving, migrate.Moved} {
		add(callFault("source", "mark "+string(s)), moved)
	}
	for _, call := range []string{"accept", "start", "expect", "restore", "resume"} {
		add(callFault("target", call), kept)
	}
	add(fullFault(migrate.Receiving), kept)
	add(shortOfRoom(), moved)
	for _, s := range []migrate.Phase{migrate.Preflight, migrate.PreCopying, migrate.Preparing, migrate.HandingOff} {
		add(killFault("target", "source", s), kept)
		add(killFault("source", "source", s), outcome{"", migrate.NotTaken})
	}
	add(killFault("target", "target", migrate.TakingOver), kept) // after an operator has settled it
	add(killFault("source", "target", migrate.TakingOver), outcome{})
	add(killFault("target", "target", migrate.Fetching), outcome{migrate.Serving, ""})
	add(killFault("source", "target", migrate.Fetching), outcome{})
	return faults
}

// A connection that freezes before the first word on it is given up like any other.
func TestFrozenFromTheStart(t *testing.T) {
	for _, state := range []migrate.Phase{migrate.Fetching, migrate.Confirming} {
		f := linkFault("cut", "target", state)
		arm := f.arm
		f.arm = func(p *pair) {
			arm(p)
			wrap := p.network.wrap
			p.network.wrap = func(n int64, c io.ReadWriteCloser) io.ReadWriteCloser {
				if n >= 2 && n < 6 { // after the first two were cut
					return newFaulty(c, (n-2)*40, freeze)
				}
				return wrap(n, c)
			}
		}
		start := time.Now()
		_, source, target, err := try(t, 3, quick(), 0, f)
		if source != migrate.Moved || target != migrate.Moved {
			t.Errorf("%s: source %s, target %s, %v", f.name, source, target, err)
		}
		t.Logf("%s: took %s", f.name, time.Since(start))
	}
}

// Migrations with random faults at random moments: whatever happens, the VM runs once and has all
// its data.
func TestSoak(t *testing.T) {
	rounds := need.Rounds(60, 3000)
	if n, err := strconv.Atoi(os.Getenv("DRAFTER_SOAK_ROUNDS")); err == nil {
		rounds = n
	}
	begin := uint64(time.Now().UnixNano())
	if n, err := strconv.ParseUint(os.Getenv("DRAFTER_SOAK_SEED"), 10, 64); err == nil {
		begin = n
	}
	outcomes := map[string]int{}
	var postCopy, wanted, fetched int64
	for i := range uint64(rounds) {
		seed := begin + i
		rng := rand.New(rand.NewPCG(seed, 7))
		limits := quick()
		limits.NoPostCopy = rng.IntN(4) == 0
		limits.handover = rng.IntN(3) == 0
		limits.note = []time.Duration{1, limits.note, time.Minute}[rng.IntN(3)]
		rate := int64(0)
		if rng.IntN(3) > 0 {
			rate = 5<<20 + rng.Int64N(50<<20)
			if !limits.NoPostCopy {
				limits.Timeout = time.Duration(rng.IntN(30)+1) * time.Millisecond // much is left to post-copy
			}
		}
		f := randomFault(rng)
		f.backup = append(backupKinds, "", "", "", "")[rng.IntN(len(backupKinds)+4)]
		if f.backup == "hanging" && limits.Timeout == 0 {
			f.backup = "whole"
		}
		p, source, target, err := try(t, seed, limits, rate, f)
		stats := p.source.Stats()
		for _, d := range stats.Devices {
			postCopy, wanted = postCopy+d.PostCopy, wanted+d.Wanted
		}
		fetched += p.fetched.Load()
		outcomes[fmt.Sprintf("source %s, target %s", source, target)]++
		if t.Failed() {
			t.Fatalf("seed %d: %s, backup %q: source %s, target %s, %v", seed, f.name, f.backup, source, target, err)
		}
	}
	t.Logf("%v; %d bytes by post-copy, %d of them wanted; %d bytes from backups", outcomes, postCopy, wanted, fetched)
	if rounds >= 1000 && (fetched == 0 || wanted == 0) {
		t.Error("not all ways were gone")
	}
}

func randomFault(rng *rand.Rand) fault {
	sourceStates := []migrate.Phase{migrate.Preflight, migrate.PreCopying, migrate.Preparing, migrate.HandingOff, migrate.InDoubt, migrate.Serving}
	targetStates := []migrate.Phase{migrate.Preflight, migrate.Receiving, migrate.TakingOver, migrate.Fetching, migrate.Confirming}
	pick := func(side string) migrate.Phase {
		if side == "source" {
			return sourceStates[rng.IntN(len(sourceStates))]
		}
		return targetStates[rng.IntN(len(targetStates))]
	}
	sides := []string{"source", "target"}
	side := sides[rng.IntN(2)]
	switch rng.IntN(8) {
	case 0:
		return fault{name: "none"}
	case 1:
		return connectionFault([]string{"cut", "freeze", "damage"}[rng.IntN(3)], rng.Int64N(3), rng.Int64N(300_000))
	case 2, 3:
		return connectionFault("cut", rng.Int64N(3), rng.Int64N(100_000))
	case 4:
		return linkFault([]string{"cut", "cut", "cut", "freeze"}[rng.IntN(4)], side, pick(side))
	case 5:
		return killFault(sides[rng.IntN(2)], side, pick(side))
	case 6:
		calls := map[string][]string{
			"source": {"write back", "flush", "prepare", "leave", "pause", "save", "mark " + string(migrate.InDoubt), "mark " + string(migrate.Serving), "mark " + string(migrate.Moved)},
			"target": {"accept", "start", "expect", "restore", "resume"},
		}[side]
		return callFault(side, calls[rng.IntN(len(calls))])
	}
	return fullFault([]migrate.Phase{migrate.Preflight, migrate.Receiving}[rng.IntN(2)])
}

// revokeFault ends the source when it gets to a state. How that went is sent to result.
func revokeFault(state migrate.Phase, result chan error, and fault) fault {
	var fired atomic.Bool
	return fault{name: "end source when it is " + string(state), arm: and.arm, at: func(p *pair, side string, s migrate.Phase) {
		if and.at != nil {
			and.at(p, side, s)
		}
		if side == "source" && s == state && fired.CompareAndSwap(false, true) {
			go func() { result <- p.source.Revoke(errors.New("the source was ended")) }()
		}
	}}
}

// A source that is ended keeps its VM, has given it away, or does not know; never something
// between.
func TestRevoke(t *testing.T) {
	for _, state := range []migrate.Phase{migrate.Preflight, migrate.PreCopying, migrate.Preparing, migrate.HandingOff, migrate.InDoubt, migrate.Serving, migrate.Rescuing} {
		for _, and := range []fault{{name: "nothing else"}, callFault("target", "restore"), callFault("target", "resume"), callFault("source", "save")} {
			t.Run(string(state)+", "+and.name, func(t *testing.T) {
				result := make(chan error, 1)
				p, source, target, err := try(t, 1, quick(), 0, revokeFault(state, result, and))
				if !strings.Contains(p.states.String(), "source "+string(state)) {
					return // it did not come to this state
				}
				revoked := <-result
				switch {
				case source == migrate.Kept && target == migrate.NotTaken && revoked == nil:
				case source == migrate.Moved && target == migrate.Moved && errors.Is(revoked, migrate.ErrHandedOver):
				default:
					t.Errorf("Revoke: %v; source %s, target %s, %v; %s", revoked, source, target, err, p.states.String())
				}
			})
		}
	}
}

// A source that is ended while it is in doubt waits for the answer as long as one can come, and
// leaves the VM in doubt then.
func TestRevokeInDoubt(t *testing.T) {
	result := make(chan error, 1)
	var p *pair
	p = newPair(t, 1, quick(), func(side string, s migrate.Phase) {
		switch {
		case side == "target" && s == migrate.TakingOver:
			p.kill("target")
		case side == "source" && s == migrate.InDoubt:
			go func() { result <- p.source.Revoke(errors.New("the source was ended")) }()
		}
	})
	limits := quick()
	limits.Settle = 10 * time.Millisecond
	if _, err := Receive(t.Context(), p.config(limits, func(side string, s migrate.Phase) {
		if s == migrate.TakingOver {
			p.kill("target")
		}
	})); err == nil {
		t.Error("a killed target received the VM")
	}
	if err := <-result; !errors.Is(err, migrate.ErrInDoubt) {
		t.Errorf("Revoke: %v", err)
	}
	if s := p.source.Phase(); s != migrate.LeftInDoubt {
		t.Errorf("the source is %s", s)
	}
	p.guest.halt()
	p.target.halt()
	p.network.kill()
	if err := p.source.Close(); err != nil {
		t.Error(err)
	}
	p.network.wg.Wait()
}

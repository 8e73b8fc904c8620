package vmmtest

import (
	"fmt"
	"slices"
	"sync"

	"drafter/internal/wire"
	"drafter/migrate"
)

// Break is a way in which a [Link] breaks in a move.
type Break struct {
	From    End
	Message wire.Type
	Fate    Fate
	ForGood bool
}

func (b Break) String() string {
	return fmt.Sprintf("%s of the %s, fate %d, for good %t", b.Message, b.From, b.Fate, b.ForGood)
}

// Breaks are all of them: at each message of a move, and for good where the other end is in doubt
// then, or lacks something.
func Breaks() (all []Break) {
	late := []wire.Type{wire.TypeReady, wire.TypePrepare, wire.TypeAuthority, wire.TypeAck, wire.TypeComplete, wire.TypeReleased}
	for from, messages := range map[End][]wire.Type{
		AtTarget: {wire.TypeHello, wire.TypeAccept, wire.TypeProgress, wire.TypeReady, wire.TypePrepare, wire.TypeAck, wire.TypeComplete},
		AtSource: {wire.TypeManifest, wire.TypeCycle, wire.TypeExtent, wire.TypePrepare, wire.TypeAuthority, wire.TypeReleased},
	} {
		for _, m := range messages {
			all = append(all, Break{from, m, Lost, false}, Break{from, m, Last, false})
			if slices.Contains(late, m) {
				all = append(all, Break{from, m, Lost, true}, Break{from, m, Last, true})
			}
		}
	}
	return all
}

// BreakAt lets the link break so, once. It is called before the link is used.
func (l *Link) BreakAt(b Break) {
	var once sync.Once
	l.ForGood = b.ForGood
	l.At = func(from End, message wire.Type) (f Fate) {
		if from == b.From && message == b.Message {
			once.Do(func() { f = b.Fate })
		}
		return f
	}
}

// Ending is a moment of a move in which one end is ended: its context ends, or it is closed.
type Ending struct {
	Of     End
	In     migrate.Phase
	Closed bool
}

func (e Ending) String() string { return fmt.Sprintf("%s of the %s, closed %t", e.In, e.Of, e.Closed) }

// Endings are all of them. Nobody closes a target that has nothing yet.
func Endings() (all []Ending) {
	for _, p := range []migrate.Phase{migrate.Preflight, migrate.PreCopying, migrate.Preparing, migrate.HandingOff, migrate.InDoubt, migrate.Serving} {
		all = append(all, Ending{AtSource, p, false}, Ending{AtSource, p, true})
	}
	for _, p := range []migrate.Phase{migrate.Preflight, migrate.Receiving, migrate.TakingOver, migrate.Fetching, migrate.Confirming} {
		all = append(all, Ending{AtTarget, p, false})
	}
	return append(all, Ending{AtTarget, migrate.Fetching, true}, Ending{AtTarget, migrate.Confirming, true})
}

// Hook is what is to be told of the phases of the end that is ended: it passes them on, and acts
// once in the one that is meant. reached is closed then.
func (e Ending) Hook(pass func(migrate.Phase), act func()) (onPhase func(migrate.Phase), reached <-chan struct{}) {
	var once sync.Once
	now := make(chan struct{})
	return func(p migrate.Phase) {
		if pass != nil {
			pass(p)
		}
		if p == e.In {
			once.Do(func() {
				close(now)
				act()
			})
		}
	}, now
}

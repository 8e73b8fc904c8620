package lifecycle

import (
	"errors"
	"testing"

	"drafter/internal/kind"
)

func TestOrder(t *testing.T) {
	var l Life
	check := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v; want %v", what, err, want)
		}
	}
	check("used before its start", l.Running(), kind.ErrNotStarted)
	check("started", l.Start(), nil)
	check("used", l.Running(), nil)
	check("started again", l.Start(), kind.ErrStarted)
	l.Close()
	check("used after its end", l.Running(), kind.ErrClosed)
	check("started after its end", l.Start(), kind.ErrClosed)
	var unused Life
	unused.Close()
	check("started after its end", unused.Start(), kind.ErrClosed)
}

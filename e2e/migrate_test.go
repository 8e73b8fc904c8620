package e2e

import (
	"fmt"
	"testing"
	"time"

	"drafter/internal/tour"
)

// moved waits until a peer has given its VM away and ended.
func moved(t *testing.T, vm *tour.Service) tour.Line {
	t.Helper()
	line, err := vm.Await(t.Context(), "Completed migration")
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Wait(); err != nil {
		t.Fatal(err)
	}
	return line
}

func TestMigrate(t *testing.T) {
	s := emptySite(t)
	ctx := t.Context()
	first := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337")
	c0 := s.redisIn(t, "ark0", "127.0.0.1:3333")
	if err := c0.Set(ctx, "who", "zero", 0).Err(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	second := s.peer(t, "instance-1", "--netns", "ark1", "--raddr", "localhost:1337")
	fmt.Println("moved after", time.Since(began))
	line := moved(t, first)
	fmt.Println(line.Text)
	c1 := s.redisIn(t, "ark1", "127.0.0.1:4444")
	if got, err := c1.Get(ctx, "who").Result(); err != nil || got != "zero" {
		t.Errorf("%q, %v", got, err)
	}
	end(t, second)
}

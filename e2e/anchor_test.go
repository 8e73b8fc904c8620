package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	until "drafter/internal/await"
	"drafter/internal/tour"
)

// counter is a client of Redis that counts on one connection, and never makes another.
type counter struct {
	conn    net.Conn
	counted atomic.Int64
	longest time.Duration // silence
	err     error
	cancel  context.CancelFunc
	done    chan struct{}
}

// count begins to count at an address.
func count(t *testing.T, addr, key string) *counter {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	c := &counter{conn: conn, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		r := bufio.NewReader(conn)
		for ctx.Err() == nil {
			begin := time.Now()
			if c.err = c.once(r, key); c.err != nil {
				return
			}
			c.longest = max(c.longest, time.Since(begin))
			time.Sleep(2 * time.Millisecond)
		}
	}()
	t.Cleanup(func() { c.end(t) })
	return c
}

// echoSize is that of a text that a client has sent back now and then: many packets as large as a
// guest sends them.
const echoSize = 20_000

func (c *counter) once(r *bufio.Reader, key string) error {
	c.conn.SetDeadline(time.Now().Add(20 * time.Second))
	if c.counted.Load()%10 == 9 {
		text := strings.Repeat(fmt.Sprintf("%09d ", rand.IntN(1e9)), echoSize/10)
		if _, err := fmt.Fprintf(c.conn, "ECHO %s\r\n", strings.ReplaceAll(text, " ", ".")); err != nil {
			return err
		}
		answer := make([]byte, len(fmt.Sprintf("$%d\r\n", echoSize))+echoSize+2)
		if _, err := io.ReadFull(r, answer); err != nil {
			return err
		}
		if want := fmt.Sprintf("$%d\r\n%s\r\n", echoSize, strings.ReplaceAll(text, " ", ".")); string(answer) != want {
			return errors.New("what was sent comes back as something else")
		}
	}
	if _, err := fmt.Fprintf(c.conn, "INCR %s\r\n", key); err != nil {
		return err
	}
	line, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	if want := fmt.Sprintf(":%d\r\n", c.counted.Add(1)); line != want {
		return fmt.Errorf("the answer is %q instead of %q", line, want)
	}
	return nil
}

// goesOn waits until the client has had many more answers.
func (c *counter) goesOn(t *testing.T) {
	t.Helper()
	const many = 100
	before := c.counted.Load()
	until.TrueWithin(t, tour.StepTimeout, "the connection goes on", func() bool {
		select {
		case <-c.done:
			return true // end says why
		default:
			return c.counted.Load() >= before+many
		}
	})
}

// end stops counting.
func (c *counter) end(t *testing.T) {
	t.Helper()
	c.cancel()
	<-c.done
	if c.err != nil {
		t.Errorf("the connection broke after %d answers: %v", c.counted.Load(), c.err)
	}
	c.conn.Close()
}

// Connections go on wherever a VM moves on a host, and back: each answer comes once, and is right.
// When the VM ends, so do its anchors.
func TestAnchors(t *testing.T) {
	s := emptySite(t)
	addrs := []string{"127.0.0.1:3333", "127.0.0.1:4444", "127.0.0.1:5555"}
	for i, addr := range addrs {
		s.redisIn(t, fmt.Sprintf("ark%d", i), addr)
	}
	laddr := func(hop int) string { return fmt.Sprintf("unix:%s/hop-%d", s.dir, hop) }
	vm := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", laddr(0))
	var clients []*counter
	for hop, to := range []int{1, 2, 0, 1} {
		clients = append(clients, count(t, addrs[0], fmt.Sprint("opened-before-", hop)))
		next := s.peer(t, fmt.Sprint("instance-", hop+1), "--netns", fmt.Sprintf("ark%d", to), "--raddr", laddr(hop), "--laddr", laddr(hop+1))
		moved(t, vm)
		quiet(t, vm)
		vm = next
		if hop == 1 {
			if list := s.anchors(t); !strings.Contains(list, "ark0") || !strings.Contains(list, "ark1") {
				t.Errorf("anchors are listed as\n%s", list)
			}
		}
	}
	for i, c := range clients {
		c.goesOn(t)
		c.end(t)
		t.Logf("client %d: %d answers, the longest silence was %s", i, c.counted.Load(), c.longest.Round(time.Millisecond))
	}
	end(t, vm)
	if list := s.anchors(t); strings.Contains(list, "ark") {
		t.Errorf("anchors of a VM that has ended:\n%s", list)
	}
}

// anchors is what 'drafter anchor list' prints.
func (s *site) anchors(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	if err := s.Run(t.Context(), &b, "anchor", "list"); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

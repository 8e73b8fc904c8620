package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// count counts in Redis on one connection, and has 20 KB echoed now and then: many packets as large
// as a guest sends them.
func count(t *testing.T, addr, key string) *client {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, impatience)
	if err != nil {
		t.Fatal(err)
	}
	r := newRedisConn(conn)
	return converse(t, key, 2*time.Millisecond, func(n int) error {
		if n%10 == 0 {
			payload := payload(20_000)
			if err := r.expect("ECHO "+payload, fmt.Sprint("$", len(payload)), payload); err != nil {
				return err
			}
		}
		return r.expect("INCR "+key, fmt.Sprint(":", n))
	}, conn.Close)
}

// redisConn is a connection with Redis.
type redisConn struct {
	net.Conn
	lines *bufio.Reader
}

func newRedisConn(conn net.Conn) *redisConn { return &redisConn{conn, bufio.NewReader(conn)} }

// expect sends a command, and compares the lines of the answer.
func (r *redisConn) expect(command string, want ...string) error {
	r.SetDeadline(time.Now().Add(impatience))
	if _, err := io.WriteString(r, command+"\r\n"); err != nil {
		return err
	}
	for _, w := range want {
		got, err := r.lines.ReadString('\n')
		if err == nil {
			err = compare(got, w+"\r\n")
		}
		if err != nil {
			return err
		}
	}
	return nil
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
	var clients []*client
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
	goOn(t, clients...)
	for i, c := range clients {
		c.end(t)
		t.Logf("client %d: %d answers, the longest silence was %s", i, c.answers.Load(), c.silence())
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

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	until "drafter/internal/await"
)

// client holds a connection with the guest, checks all that comes by it, and never makes another.
type client struct {
	name    string
	answers atomic.Int64
	cancel  context.CancelFunc
	once    sync.Once
	done    chan struct{}
	err     error // valid once it is done

	mu      sync.Mutex // guards the following
	longest time.Duration
}

// impatience is how long a client waits for an answer: longer than any move takes.
const impatience = 30 * time.Second

// hold begins what a client does until its context ends.
func hold(t *testing.T, name string, do func(ctx context.Context, c *client) error) *client {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	c := &client{name: name, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		c.err = do(ctx, c)
	}()
	t.Cleanup(func() { c.end(t) })
	return c
}

// converse begins to ask again and again. ask returns once the right answer has come. Numbers begin
// at 1. last is called at the end; nil: nothing is.
func converse(t *testing.T, name string, pace time.Duration, ask func(n int) error, last func() error) *client {
	t.Helper()
	return hold(t, name, func(ctx context.Context, c *client) error {
		for n := 1; ctx.Err() == nil; n++ {
			asked := time.Now()
			if err := ask(n); err != nil {
				return err
			}
			c.heard(time.Since(asked))
			select {
			case <-ctx.Done():
			case <-time.After(pace):
			}
		}
		if last == nil {
			return nil
		}
		return last()
	})
}

// heard notes an answer.
func (c *client) heard(silence time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.longest = max(c.longest, silence)
	c.answers.Add(1)
}

// silence is the longest since it was asked for last.
func (c *client) silence() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	longest := c.longest
	c.longest = 0
	return longest.Round(time.Millisecond)
}

// end ends the client.
func (c *client) end(t *testing.T) {
	t.Helper()
	c.once.Do(func() {
		c.cancel()
		<-c.done
		if c.err != nil {
			t.Errorf("%s: after %d answers: %v", c.name, c.answers.Load(), c.err)
		}
	})
}

// goOn waits until all clients have had further answers.
func goOn(t *testing.T, clients ...*client) {
	t.Helper()
	const enough = 10
	before := make([]int64, len(clients))
	for i, c := range clients {
		before[i] = c.answers.Load()
	}
	for i, c := range clients {
		until.True(t, c.name+" goes on", func() bool {
			select {
			case <-c.done: // by itself
				c.end(t)
				t.FailNow()
			default:
			}
			return c.answers.Load() >= before[i]+enough
		})
	}
}

// payload is random, and one word.
func payload(size int) string {
	return strings.Repeat(fmt.Sprintf("%09d.", rand.IntN(1e9)), size/10+1)[:size]
}

// program is a client program that is asked by its stdin.
type program struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *os.File
	lines  *bufio.Reader // of stdout
	stderr bytes.Buffer  // valid once it has ended
}

func launch(t *testing.T, name string, args ...string) *program {
	t.Helper()
	p := &program{cmd: exec.Command(name, args...)}
	p.cmd.Dir, p.cmd.Stderr = work, &p.stderr
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	p.stdout = stdout.(*os.File) // see os/exec
	p.lines = bufio.NewReader(p.stdout)
	return p
}

// ask gives the program a line, and returns the one that it answers.
func (p *program) ask(line string) (string, error) {
	p.stdout.SetReadDeadline(time.Now().Add(impatience))
	_, err := io.WriteString(p.stdin, line+"\n")
	if err != nil {
		return "", errors.Join(err, p.end())
	}
	answer, err := p.lines.ReadString('\n')
	if err != nil {
		return "", errors.Join(fmt.Errorf("no answer: %w", err), p.end())
	}
	return strings.TrimSuffix(answer, "\n"), nil
}

// expect asks, and compares the answer.
func (p *program) expect(line, want string) error {
	got, err := p.ask(line)
	if err != nil {
		return err
	}
	return compare(got, want)
}

func compare(got, want string) error {
	if got == want {
		return nil
	}
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	return fmt.Errorf("the answer, of %d bytes, is not the one of %d that is due: from byte %d on it is %.100q instead of %.100q", len(got), len(want), at, got[at:], want[at:])
}

// end lets the program read the end of its stdin, and waits for it. It has nothing to complain of.
func (p *program) end() error {
	p.stdin.Close()
	kill := time.AfterFunc(impatience, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	err := p.cmd.Wait()
	if p.stderr.Len() > 0 {
		err = errors.Join(err, fmt.Errorf("it says %s", p.stderr.String()))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.cmd.Args[0], err)
	}
	return nil
}

// Package agent holds the calls between a host and the agent in a guest (agent.proto): both ends,
// and their ports.
package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"drafter/internal/console"
	"drafter/internal/logging"
)

// Client is the host's end. It is safe for concurrent use.
type Client struct {
	conn  *answers
	ttrpc *ttrpc.Client
	calls AgentService

	workload WorkloadClient
	sessions atomic.Int32 // under way

	// Logger is nil for [slog.Default]. It is set before the first call.
	Logger *slog.Logger
}

// NewClient makes a client over conn, a connection with an agent. The client owns conn.
func NewClient(conn net.Conn) *Client {
	a := newAnswers(conn)
	c := ttrpc.NewClient(a)
	return &Client{conn: a, ttrpc: c, calls: NewAgentClient(c), workload: NewWorkloadClient(c)}
}

// BeforeSuspend tells the guest that it is about to be suspended and waits until it is ready.
func (c *Client) BeforeSuspend(ctx context.Context) error {
	_, err := c.calls.BeforeSuspend(ctx, &BeforeSuspendRequest{})
	return c.explain(ctx, "before-suspend", err)
}

// AfterResume tells the guest that it runs again, what time it is, and the content for its
// resolv.conf(5) ("" leaves that unchanged). It gives the guest fresh entropy. It returns by how
// much the clock was moved. With a mostStep of 0 the clock is set. With a positive one it is set
// only if it is behind by at most that, as it is after a pause; a clock that keeps another time
// stays. With a negative one it is never set. A guest that answers late is told the time again, as
// [Client.CatchUp] does. Agents of older releases always set it.
func (c *Client) AfterResume(ctx context.Context, mostStep time.Duration, resolvConf string) (time.Duration, error) {
	// 64 bytes: twice the key of the kernel's generator (random(4)).
	entropy := make([]byte, 64)
	if _, err := rand.Read(entropy); err != nil {
		return 0, fmt.Errorf("agent after-resume: %w", err)
	}
	began := time.Now()
	r, err := c.calls.AfterResume(ctx, &AfterResumeRequest{
		NowUnixNano: began.UnixNano(), Entropy: entropy, MostStepNano: int64(mostStep), ResolvConf: resolvConf,
	})
	if err != nil {
		return 0, c.explain(ctx, "after-resume", err)
	}
	if why := r.GetResolvConfError(); why != "" {
		logging.Or(c.Logger).Warn("The guest keeps the name servers that it had", "error", c.explain(ctx, "after-resume", errors.New(why)))
	}
	step, took := time.Duration(r.GetClockStepNano()), time.Since(began)
	if mostStep < 0 || took <= prompt {
		return step, nil
	}
	if mostStep == 0 {
		mostStep = took // as it was set, it is behind by no more than that
	}
	more, err := c.CatchUp(ctx, mostStep)
	if status.Code(err) == codes.Unimplemented {
		err = nil
	}
	return step + more, err
}

// prompt is how long a guest may take to answer, so that the time that it was told is still right.
// Just after a start, a guest may read a call seconds after it was sent.
const prompt = 100 * time.Millisecond

// promptTries bounds how often a guest that answers late is told the time.
const promptTries = 5

// CatchUp sets the clock of a guest that stood still, if it is behind by at most mostStep, and
// returns by how much it was moved. A guest that answers late is told again what time it is. It runs
// no command. The agent of an older release keeps its clock.
func (c *Client) CatchUp(ctx context.Context, mostStep time.Duration) (time.Duration, error) {
	var step time.Duration
	for range promptTries {
		began := time.Now()
		r, err := c.calls.CatchUp(ctx, &CatchUpRequest{NowUnixNano: began.UnixNano(), MostStepNano: int64(mostStep)})
		if err != nil {
			return step, c.explain(ctx, "catch-up", err)
		}
		step += time.Duration(r.GetClockStepNano())
		if time.Since(began) <= prompt {
			break
		}
	}
	return step, nil
}

// Ready tells whether the guest's service is ready to be packaged, and what it waits for if not.
// The guest answers once the service is ready, or after a second. The agent of an older release
// counts as ready.
func (c *Client) Ready(ctx context.Context) (*ReadyResponse, error) {
	r, err := c.calls.Ready(ctx, &ReadyRequest{})
	if status.Code(err) == codes.Unimplemented {
		return &ReadyResponse{Ready: true}, nil
	}
	return r, c.explain(ctx, "ready", err)
}

// Exec runs a program in the guest. A program that ran and failed is no error: see the exit status
// in the response.
func (c *Client) Exec(ctx context.Context, stdin []byte, args ...string) (*ExecResponse, error) {
	r, err := c.calls.Exec(ctx, &ExecRequest{Args: args, Stdin: stdin})
	return r, c.explain(ctx, "exec", err)
}

// Close ends the connection; the agent waits for the next one.
func (c *Client) Close() error {
	err := c.ttrpc.Close()
	if cerr := c.conn.Close(); cerr != nil && !errors.Is(cerr, net.ErrClosed) {
		err = errors.Join(err, cerr)
	}
	return err
}

func (c *Client) explain(ctx context.Context, call string, err error) error {
	if err = c.conn.reason(err); err == nil {
		return nil
	}
	// The guest may have ended the call or the connection for that reason, and have said so, just before.
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(ctx.Err(), context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded {
		return fmt.Errorf("agent %s: the guest did not answer in time: %w", call, err)
	}
	return fmt.Errorf("agent %s: %w", call, &guestError{err})
}

// guestError is an error that may contain a guest's own words.
type guestError struct{ error }

// maxWords bounds them, in bytes.
const maxWords = 1 << 10

func (e *guestError) Error() string { return Words(e.error.Error()) }

// Words are a guest's words, fit for a log: bounded and printable.
func Words(words string) string {
	if len(words) > maxWords {
		words = words[:maxWords] + "…"
	}
	return console.Printable(words)
}

func (e *guestError) Unwrap() error { return e.error }

package agent

import (
	"context"
	"errors"
	"io"

	"github.com/containerd/ttrpc"
)

// Relay is [WorkloadService] for callers of this host that have no connection with the guest. It
// passes their calls on, and the guest's answers back. Both ends see to it that nothing piles up.
type Relay struct {
	// Client returns the connection with the guest; nil while the guest must not be called.
	Client func() *Client
}

var _ WorkloadService = Relay{}

var errNoGuest = errors.New("the guest cannot be called at this moment: it starts, ends, moves, or has no agent")

// Run implements [WorkloadService].
func (r Relay) Run(ctx context.Context, caller Workload_RunServer) error {
	c := r.Client()
	if c == nil {
		return errNoGuest
	}
	first, err := caller.Recv()
	if err != nil {
		return err
	}
	// The stream outlives the caller until the guest has ended what runs.
	stream, err := c.ttrpc.NewStream(context.WithoutCancel(ctx), &ttrpc.StreamDesc{StreamingClient: true, StreamingServer: true}, workloadService, "Run", first)
	if err != nil {
		return c.conn.reason(err)
	}
	guest := &workloadRunClient{stream}
	calling := make(chan struct{})
	go func() {
		defer close(calling)
		defer guest.CloseSend() //nolint:errcheck // a failure ends Recv below, too
		for {
			m, err := caller.Recv()
			if err != nil || guest.Send(m) != nil {
				return
			}
		}
	}()
	for {
		m, err := guest.Recv()
		if err == nil {
			_ = caller.Send(m) // a caller that has gone has hung up, and the guest ends soon
			continue
		}
		if errors.Is(err, io.EOF) {
			<-calling // the guest has waited for that
			return nil
		}
		return c.conn.reason(err) // the server ends caller's Recv with the call
	}
}

// Stat implements [WorkloadService].
func (r Relay) Stat(ctx context.Context, q *StatRequest) (*StatResponse, error) {
	c := r.Client()
	if c == nil {
		return nil, errNoGuest
	}
	s, err := c.workload.Stat(ctx, q)
	return s, c.conn.reason(err)
}

// Logs implements [WorkloadService].
func (r Relay) Logs(ctx context.Context, q *LogsRequest) (*LogsResponse, error) {
	c := r.Client()
	if c == nil {
		return nil, errNoGuest
	}
	l, err := c.workload.Logs(ctx, q)
	return l, c.conn.reason(err)
}

// Start implements [WorkloadService].
func (r Relay) Start(ctx context.Context, q *StartRequest) (*StartResponse, error) {
	c := r.Client()
	if c == nil {
		return nil, errNoGuest
	}
	s, err := c.workload.Start(ctx, q)
	return s, c.conn.reason(err)
}

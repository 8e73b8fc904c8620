package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/containerd/ttrpc"

	"drafter/agent"
	"drafter/internal/newfile"
	"drafter/internal/private"
)

// Client calls the process that owns a VM. It is safe for concurrent use.
type Client struct {
	ControlService

	ttrpc *ttrpc.Client
	gone  chan struct{}
}

// ErrNone says that no process owns a VM at this time.
var ErrNone = errors.New("no process runs the VM")

// Dial connects with the process that owns the VM of a control directory. If there is none, the
// error is [ErrNone].
func Dial(ctx context.Context, dir string) (*Client, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(dir, socketFile))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNone, err)
	}
	c := &Client{gone: make(chan struct{})}
	c.ttrpc = ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(c.gone) }))
	c.ControlService = NewControlClient(c.ttrpc)
	return c, nil
}

// Guest connects with the guest of the VM of a control directory, to run programs and copy files. Close
// the client.
func Guest(ctx context.Context, dir string) (*agent.Client, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(dir, socketFile))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNone, err)
	}
	return agent.NewClient(conn), nil
}

// Gone is closed when the process has ended, or the client was closed.
func (c *Client) Gone() <-chan struct{} { return c.gone }

// Close ends the connection.
func (c *Client) Close() error { return c.ttrpc.Close() }

// LastEnd returns how the last process of a control directory has ended; nil if it lives, was
// killed, or there was none.
func LastEnd(dir string) (*End, error) {
	b, err := private.ReadFile(filepath.Join(dir, endFile), 1<<20)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var end End
	if err == nil {
		err = json.Unmarshal(b, &end)
	}
	if err != nil {
		return nil, fmt.Errorf("read how the VM has ended: %w", err)
	}
	return &end, nil
}

// Forget forgets how the last process of a control directory has ended.
func Forget(dir string) error { return newfile.Remove(filepath.Join(dir, endFile)) }

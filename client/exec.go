package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"syscall"

	"github.com/coder/websocket"
	"golang.org/x/sync/semaphore"

	"drafter/api"
)

// Streams are what a program in a VM reads and writes.
type Streams struct {
	Stdin          io.Reader // nil: there is none; see [api.Exec].Stdin
	Stdout, Stderr io.Writer // nil discards
	Sizes          <-chan api.WindowSize
	Signals        <-chan syscall.Signal
}

// Exec runs a program in a VM and returns its exit status. A program that could not be started has
// the status 126 or 127, and an error. When ctx ends, the program is killed. Stdin is read until it
// ends, or fails; let it fail once Exec has returned.
func (c *Client) Exec(ctx context.Context, name string, e api.Exec, std Streams) (int, error) {
	e.Stdin = std.Stdin != nil
	request, err := json.Marshal(e)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, answer, err := websocket.Dial(ctx, c.base+vmPath(name)+"/exec?exec="+url.QueryEscape(string(request)), &websocket.DialOptions{HTTPClient: c.http})
	if answer != nil && answer.StatusCode != http.StatusSwitchingProtocols {
		return 0, refusal(answer)
	}
	if err != nil {
		return 0, fmt.Errorf("call the daemon: %w", err)
	}
	defer conn.CloseNow() //nolint:errcheck // all has been said
	conn.SetReadLimit(1 << 20)
	send := func(channel byte, b []byte) error {
		return conn.Write(ctx, websocket.MessageBinary, append([]byte{channel}, b...))
	}
	window := semaphore.NewWeighted(api.InputWindow)
	if std.Stdin != nil {
		go sendInput(ctx, std.Stdin, window, send) // it ends with its reader
	}
	done := make(chan struct{})
	defer func() { <-done }()
	defer cancel()
	go func() {
		defer close(done)
		tell(ctx, std, send)
	}()
	for {
		_, b, err := conn.Read(ctx)
		if err != nil {
			return 0, fmt.Errorf("the program in VM %s was cut off: %w", name, err)
		}
		if len(b) == 0 {
			continue
		}
		var to io.Writer
		switch b[0] {
		case api.ChannelStdout:
			to = std.Stdout
		case api.ChannelStderr:
			to = std.Stderr
		case api.ChannelTaken:
			n, err := strconv.ParseInt(string(b[1:]), 10, 64)
			if err != nil || n < 0 || n > api.InputWindow {
				return 0, fmt.Errorf("the daemon says that %.20q bytes of input were taken", b[1:])
			}
			window.Release(n)
		case api.ChannelStatus:
			var status api.ExecStatus
			if err := json.Unmarshal(b[1:], &status); err != nil {
				return 0, fmt.Errorf("read how the program has ended: %w", err)
			}
			if status.Error != "" {
				return status.ExitStatus, errors.New(status.Error)
			}
			return status.ExitStatus, nil
		}
		if to != nil {
			if _, err := to.Write(b[1:]); err != nil {
				return 0, fmt.Errorf("write what the program prints: %w", err)
			}
		}
	}
}

// sendInput sends what from yields, as far as the program takes it.
func sendInput(ctx context.Context, from io.Reader, window *semaphore.Weighted, send func(byte, []byte) error) {
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 && (window.Acquire(ctx, int64(n)) != nil || send(api.ChannelStdin, buf[:n]) != nil) {
			return
		}
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			_ = send(api.ChannelStdin, nil) // the program hears of the end, if it is there
			return
		}
	}
}

// tell passes on sizes of the terminal, and signals, until ctx ends.
func tell(ctx context.Context, std Streams, send func(byte, []byte) error) {
	for {
		var err error
		select {
		case size := <-std.Sizes:
			var b []byte
			if b, err = json.Marshal(size); err == nil {
				err = send(api.ChannelSize, b)
			}
		case s := <-std.Signals:
			err = send(api.ChannelSignal, strconv.AppendInt(nil, int64(s), 10))
		case <-ctx.Done():
			return
		}
		if err != nil {
			return // the reader of answers says why
		}
	}
}

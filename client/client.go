// Package client calls the API of 'drafter daemon'.
package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"drafter/api"
)

// Socket is where a host's daemon listens.
const Socket = "/run/drafter.sock"

// Client calls one daemon. It is safe for concurrent use.
type Client struct {
	http *http.Client
	base string
}

// New makes a client of the daemon at a UNIX socket; "" for [Socket].
func New(socket string) *Client {
	if socket == "" {
		socket = Socket
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		switch {
		case errors.Is(err, syscall.EACCES):
			err = fmt.Errorf("%w; use sudo, or become a member of the group drafter", err)
		case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
			err = fmt.Errorf("%w; start it with 'drafter daemon', or as a service with 'systemctl start drafter'", err)
		}
		return conn, err
	}
	return &Client{http: &http.Client{Transport: &http.Transport{DialContext: dial}}, base: "http://drafter"}
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Error is a problem that the daemon has told of (RFC 9457).
type Error struct {
	Status int    `json:"status"`
	Detail string `json:"detail"`
	Errors []struct {
		Message  string `json:"message"`
		Location string `json:"location"`
	} `json:"errors"`
}

func (e *Error) Error() string {
	text := e.Detail
	for _, one := range e.Errors {
		text += "; " + strings.TrimPrefix(one.Location, "body.") + ": " + one.Message
	}
	return text
}

// Stat describes a file of a VM. A file that is not there is an [Error] with the status 404.
func (c *Client) Stat(ctx context.Context, name, path string) (f api.File, err error) {
	err = c.call(ctx, http.MethodGet, vmPath(name)+"/file?path="+url.QueryEscape(path), nil, &f)
	return f, err
}

// CopyOut returns a file of a VM, with all below it, as a tar archive. Close it.
func (c *Client) CopyOut(ctx context.Context, name, path string) (io.ReadCloser, error) {
	answer, err := c.do(ctx, http.MethodGet, vmPath(name)+"/files?path="+url.QueryEscape(path), nil, nil)
	if err != nil {
		return nil, err
	}
	return answer.Body, nil
}

// CopyIn unpacks a tar archive in a directory of a VM.
func (c *Client) CopyIn(ctx context.Context, name, dir string, archive io.Reader) error {
	answer, err := c.do(ctx, http.MethodPut, vmPath(name)+"/files?path="+url.QueryEscape(dir), nil, archive)
	if err != nil {
		return err
	}
	return answer.Body.Close()
}

func (c *Client) do(ctx context.Context, method, path string, header http.Header, request any) (*http.Response, error) {
	b, stream := request.(io.Reader)
	if request != nil && !stream {
		text, err := json.Marshal(request)
		if err != nil {
			return nil, err
		}
		b = bytes.NewReader(text)
	}
	r, err := http.NewRequestWithContext(ctx, method, c.base+path, b)
	if err != nil {
		return nil, err
	}
	if header != nil {
		r.Header = header
	}
	if request != nil && !stream {
		r.Header.Set("Content-Type", "application/json")
	}
	answer, err := c.http.Do(r)
	if err != nil {
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err
		}
		return nil, fmt.Errorf("call the daemon: %w", err)
	}
	if answer.StatusCode < 300 {
		return answer, nil
	}
	return nil, refusal(answer)
}

// refusal is the problem in an answer, which it closes.
func refusal(answer *http.Response) error {
	defer answer.Body.Close()
	e := &Error{Status: answer.StatusCode}
	if err := json.NewDecoder(io.LimitReader(answer.Body, 1<<20)).Decode(e); err != nil || e.Detail == "" {
		e.Detail = answer.Status
	}
	return e
}

func (c *Client) call(ctx context.Context, method, path string, request, response any) error {
	answer, err := c.do(ctx, method, path, nil, request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if response == nil {
		return nil
	}
	if err := json.NewDecoder(answer.Body).Decode(response); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	return nil
}

func vmPath(name string) string { return "/v1/vms/" + url.PathEscape(name) }

// VMs lists VMs, the newest first.
func (c *Client) VMs(ctx context.Context) (list []api.VM, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/vms", nil, &list)
	return list, err
}

// VM returns a VM by its name, its ID, or the beginning of its ID.
func (c *Client) VM(ctx context.Context, name string) (vm api.VM, err error) {
	err = c.call(ctx, http.MethodGet, vmPath(name), nil, &vm)
	return vm, err
}

// Run makes a VM of an image and starts it; see [Client.Await].
func (c *Client) Run(ctx context.Context, r api.Run) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/vms", r, &o)
	return o, err
}

// Start starts a VM.
func (c *Client) Start(ctx context.Context, name string) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, vmPath(name)+"/start", nil, &o)
	return o, err
}

// Stop suspends a VM.
func (c *Client) Stop(ctx context.Context, name string) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, vmPath(name)+"/stop", nil, &o)
	return o, err
}

// Kill ends a VM as a power cut does.
func (c *Client) Kill(ctx context.Context, name string) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, vmPath(name)+"/kill", nil, &o)
	return o, err
}

// Remove removes a VM; one that runs only with force.
func (c *Client) Remove(ctx context.Context, name string, force bool) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodDelete, vmPath(name)+"?force="+strconv.FormatBool(force), nil, &o)
	return o, err
}

// Cancel lets an operation end early.
func (c *Client) Cancel(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "/v1/operations/"+url.PathEscape(id), nil, nil)
}

// Await waits until an operation has ended. progress is called as it goes on, and may be nil. An
// operation that failed is an error.
func (c *Client) Await(ctx context.Context, o api.Operation, progress func(api.Progress)) (api.Operation, error) {
	path, wait := "/v1/operations/"+url.PathEscape(o.ID), 20
	for o.State == api.Working {
		err := c.call(ctx, http.MethodGet, path+"?wait="+strconv.Itoa(wait), nil, &o)
		if refused := (*Error)(nil); errors.As(err, &refused) && refused.Status == http.StatusNotFound {
			return o, fmt.Errorf("the daemon has ended meanwhile, and does not know how far it got; see 'drafter ps -a': %w", err)
		}
		if err != nil {
			return o, err
		}
		wait = min(2*wait, 200)
		for _, p := range o.Progress {
			if progress != nil {
				progress(p)
			}
		}
	}
	if o.State != api.Done {
		return o, errors.New(o.Error)
	}
	return o, nil
}

// LogOptions says which part of a log to read.
type LogOptions struct {
	Follow bool // go on until the VM has ended
	Tail   int  // at most so many lines of before; below 0: all
	Since  time.Time
}

// Logs calls f with what a VM's service has printed.
func (c *Client) Logs(ctx context.Context, name string, o LogOptions, f func(api.LogLine) error) error {
	query := url.Values{"follow": {strconv.FormatBool(o.Follow)}, "tail": {strconv.Itoa(max(o.Tail, -1))}}
	if !o.Since.IsZero() {
		query.Set("since", o.Since.Format(time.RFC3339Nano))
	}
	answer, err := c.do(ctx, http.MethodGet, vmPath(name)+"/logs?"+query.Encode(), nil, nil)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	for lines := json.NewDecoder(answer.Body); ; {
		var l api.LogLine
		if err := lines.Decode(&l); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("the log was cut off; the VM goes on: %w", err)
		}
		if err := f(l); err != nil {
			return err
		}
	}
}

// Events calls f with what happens after the event with an ID (-1: from now on) until ctx ends, f
// returns an error, or the daemon ends, which is an error. Go on with the last event's ID.
func (c *Client) Events(ctx context.Context, last int64, f func(api.Event) error) error {
	answer, err := c.do(ctx, http.MethodGet, "/v1/events", http.Header{"Last-Event-Id": {strconv.FormatInt(last, 10)}}, nil)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		text, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		var e api.Event
		if err := json.Unmarshal([]byte(text), &e); err != nil {
			return fmt.Errorf("read event: %w", err)
		}
		if err := f(e); err != nil {
			return err
		}
	}
	if err := errors.Join(ctx.Err(), lines.Err()); err != nil {
		return err
	}
	return errors.New("the daemon has ended")
}

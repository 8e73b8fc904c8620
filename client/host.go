package client

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"drafter/api"
)

// NewTLS makes a client of the daemon of another host, at HOST:PORT. connected, unless nil, is told of
// each connection. Close the client.
func NewTLS(address string, config *tls.Config, connected func(net.Conn)) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", address)
		if err == nil && connected != nil {
			connected(conn)
		}
		return conn, err
	}
	t := &http.Transport{DialTLSContext: dial, ResponseHeaderTimeout: 2 * time.Minute}
	return &Client{http: &http.Client{Transport: t}, base: "https://drafter"}
}

// Host tells of the daemon and its host.
func (c *Client) Host(ctx context.Context) (h api.Host, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/host", nil, &h)
	return h, err
}

// Hosts returns the other hosts that the daemon knows.
func (c *Client) Hosts(ctx context.Context) (list []api.Neighbour, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/hosts", nil, &list)
	return list, err
}

// Token makes a token, with which one other host can be added.
func (c *Client) Token(ctx context.Context) (t api.Token, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/host/tokens", nil, &t)
	return t, err
}

// AddHost adds another host.
func (c *Client) AddHost(ctx context.Context, a api.AddHost) (n api.Neighbour, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/hosts", a, &n)
	return n, err
}

// RemoveHost forgets another host.
func (c *Client) RemoveHost(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, "/v1/hosts/"+url.PathEscape(name), nil, nil)
}

// Move moves a VM that runs to another host.
func (c *Client) Move(ctx context.Context, name, to string) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, vmPath(name)+"/move", api.Move{To: to}, &o)
	return o, err
}

// Upgrade replaces the process that owns a VM by one of the program that is installed now.
func (c *Client) Upgrade(ctx context.Context, name string) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, vmPath(name)+"/upgrade", nil, &o)
	return o, err
}

// Drain moves all VMs that run to other hosts, and lets none start here.
func (c *Client) Drain(ctx context.Context, r api.Drain) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/host/drain", r, &o)
	return o, err
}

// Undrain lets VMs start here again, and brings those back that a drain has moved away.
func (c *Client) Undrain(ctx context.Context) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/host/undrain", nil, &o)
	return o, err
}

// Join introduces this host to another one, whose token it has. Hosts call it.
func (c *Client) Join(ctx context.Context, j api.Join) error {
	return c.call(ctx, http.MethodPost, "/v1/join", j, nil)
}

// Arrive lets another host fetch a VM from this one. Hosts call it.
func (c *Client) Arrive(ctx context.Context, a api.Arrival) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/arrivals", a, &o)
	return o, err
}

// Arrival tells how far the arrival at another host is of a VM that had moved so often before, once it
// has ended or after wait. Hosts call it.
func (c *Client) Arrival(
	ctx context.Context, id string, moves int, wait time.Duration,
) (o api.Operation, err error) {
	path := fmt.Sprintf("/v1/arrivals/%s?moves=%d&wait=%d", url.PathEscape(id), moves, wait.Milliseconds())
	err = c.call(ctx, http.MethodGet, path, nil, &o)
	return o, err
}

// Return asks another host to move a VM to this one. Hosts call it.
func (c *Client) Return(ctx context.Context, id string) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/arrivals/"+url.PathEscape(id)+"/return", nil, &o)
	return o, err
}

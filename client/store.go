package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"drafter/api"
)

func packagePath(name string) string { return "/v1/packages/" + url.PathEscape(name) }

// Images lists images that were looked up, the latest first.
func (c *Client) Images(ctx context.Context) (list []api.Image, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/images", nil, &list)
	return list, err
}

// RemoveImage forgets an image and removes the packages that were made of it.
func (c *Client) RemoveImage(ctx context.Context, ref string) error {
	return c.call(ctx, http.MethodDelete, "/v1/images?reference="+url.QueryEscape(ref), nil, nil)
}

// Packages lists packages, the newest first.
func (c *Client) Packages(ctx context.Context) (list []api.Package, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/packages", nil, &list)
	return list, err
}

// Package returns a package by its name, its key, or the beginning of its key.
func (c *Client) Package(ctx context.Context, name string) (p api.Package, err error) {
	err = c.call(ctx, http.MethodGet, packagePath(name), nil, &p)
	return p, err
}

// RemovePackage removes a package that no VM needs.
func (c *Client) RemovePackage(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, packagePath(name), nil, nil)
}

// Export returns a package as an archive, a tar compressed with zstd. Close it.
func (c *Client) Export(ctx context.Context, name string) (io.ReadCloser, error) {
	answer, err := c.do(ctx, http.MethodGet, packagePath(name)+"/archive", nil, nil)
	if err != nil {
		return nil, err
	}
	return answer.Body, nil
}

// Import makes a package of an archive. A name may be "".
func (c *Client) Import(ctx context.Context, name string, archive io.Reader) (p api.Package, err error) {
	answer, err := c.do(ctx, http.MethodPost, "/v1/packages?name="+url.QueryEscape(name), nil, archive)
	if err != nil {
		return p, err
	}
	defer answer.Body.Close()
	if err := json.NewDecoder(answer.Body).Decode(&p); err != nil {
		return p, fmt.Errorf("read the daemon's answer: %w", err)
	}
	return p, nil
}

// Pull looks an image up, and makes or fetches its package; see [Client.Await].
func (c *Client) Pull(ctx context.Context, r api.Pull) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/pull", r, &o)
	return o, err
}

// Push stores a package, or a copy of a VM, in a registry; see [Client.Await].
func (c *Client) Push(ctx context.Context, r api.Push) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/push", r, &o)
	return o, err
}

// Snapshot makes a package of a VM, which goes on; see [Client.Await].
func (c *Client) Snapshot(ctx context.Context, vm, name string) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, vmPath(vm)+"/snapshot", api.Snapshot{Name: name}, &o)
	return o, err
}

// Prune removes what no VM needs.
func (c *Client) Prune(ctx context.Context, r api.Prune) (p api.Pruned, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/prune", r, &p)
	return p, err
}

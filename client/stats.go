package client

import (
	"context"
	"net/http"

	"drafter/api"
)

// Stats tells what a VM that runs uses of its host.
func (c *Client) Stats(ctx context.Context, name string) (s api.Stats, err error) {
	err = c.call(ctx, http.MethodGet, vmPath(name)+"/stats", nil, &s)
	return s, err
}

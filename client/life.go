package client

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"drafter/api"
)

// Wait waits until a VM does not run, and returns it as it was then. One that was removed since is an
// [Error] with the status 404.
func (c *Client) Wait(ctx context.Context, name string) (vm api.VM, err error) {
	for {
		err = c.call(ctx, http.MethodGet, vmPath(name)+"/wait?wait=60000", nil, &vm)
		switch vm.State {
		case api.Creating, api.Starting, api.Running, api.Stopping, api.Moving, api.Arriving:
			if err == nil {
				continue
			}
		}
		return vm, err
	}
}

// Rename gives a VM another name.
func (c *Client) Rename(ctx context.Context, name, to string) (vm api.VM, err error) {
	err = c.call(ctx, http.MethodPost, vmPath(name)+"/rename", api.Rename{Name: to}, &vm)
	return vm, err
}

// Restart shuts a VM's guest down, and boots it again from its disks. A guest that takes longer than
// patience, in seconds, is ended as by a power cut.
func (c *Client) Restart(ctx context.Context, name string, patience time.Duration) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, vmPath(name)+fmt.Sprintf("/restart?time=%d", int64(patience/time.Second)), nil, &o)
	return o, err
}

// Shutdown suspends all VMs, for the host's shutdown.
func (c *Client) Shutdown(ctx context.Context) (o api.Operation, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/host/shutdown", nil, &o)
	return o, err
}

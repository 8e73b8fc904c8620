package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"drafter/agent"
	"drafter/internal/private"
)

// ReadEnv returns what [WriteEnv] has noted; nil for a VM whose package does not hold its service.
func ReadEnv(dir string) (env []string, err error) {
	b, err := private.ReadFile(EnvFile(dir), 4<<20)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &env)
	}
	if err != nil {
		return nil, fmt.Errorf("read the environment of the VM's service: %w", err)
	}
	return append([]string{}, env...), nil
}

// Release starts the service of a VM that is held, with the environment that [WriteEnv] has noted, and
// calls ready once it is ready; at once if there is nothing to start. It does so again, but for the
// call of ready, when the guest boots again, until ctx ends. guest returns the connection with the
// guest's agent, or nil while there is none.
func Release(ctx context.Context, dir string, guest func() *agent.Client, ready func()) error {
	env, err := ReadEnv(dir)
	if err != nil {
		return err
	}
	if env == nil {
		ready()
		return nil
	}
	var last *agent.Client // whose service has started
	for said := false; ; {
		if c := guest(); c != nil && c != last {
			r, err := c.Ready(ctx)
			if err == nil && r.GetHeld() {
				if err := c.Start(ctx, env); err != nil {
					return fmt.Errorf("start the VM's service: %w", err)
				}
			} else if err == nil && r.GetReady() {
				if last = c; !said {
					said = true
					ready()
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(20 * time.Millisecond):
		}
	}
}

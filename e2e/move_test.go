package e2e

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"drafter/api"
	until "drafter/internal/await"
)

// A VM moves between hosts that know each other by keys. Clients keep their connections, and reach it
// at the address that they know. Its process is replaced as if it moved.
func TestMove(t *testing.T) {
	s := emptySite(t)
	h1, h2 := newHouse(t, s, 1), newHouse(t, s, 2)
	token := h2.drafter(t, "host", "token")
	h1.drafter(t, "host", "add", "host2", h2.address(), token)
	var out bytes.Buffer
	if err := h1.Run(t.Context(), &out, "host", "add", "again", h2.address(), token); err == nil {
		t.Error("a token was used twice")
	}
	if hosts := h2.drafter(t, "host", "ls", "--format", "{{.Name}} {{.Address}}"); hosts != "host1 "+h1.address() {
		t.Errorf("the other host knows %q", hosts)
	}

	image := "oci:" + filepath.Join(work, "redis-image")
	h1.drafter(t, "run", "-d", "--name", "cache", "-p", "6379:6379", "-e", "SECRET=rosebud", image)
	c := redis.NewClient(&redis.Options{Addr: h1.host.Addr + ":6379", MaxRetries: -1})
	defer c.Close()
	if err := c.Set(t.Context(), "key", "value", 0).Err(); err != nil {
		t.Fatal(err)
	}
	conn := c.Conn()
	defer conn.Close()
	client, err := conn.ClientID(t.Context()).Result()
	if err != nil {
		t.Fatal(err)
	}
	// A client that never reconnects writes all the time.
	traffic := make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	go func() {
		for n := 1; ctx.Err() == nil; n++ {
			if got, err := conn.Incr(t.Context(), "counter").Result(); err != nil || got != int64(n) {
				traffic <- fmt.Errorf("count %d: %d, %w", n, got, err)
				return
			}
		}
		traffic <- nil
	}()
	goesOn := func(what string) {
		t.Helper()
		before, err := c.Get(t.Context(), "counter").Int64()
		if err != nil {
			t.Fatal(what, err)
		}
		until.True(t, what+": the client goes on", func() bool {
			now, err := c.Get(t.Context(), "counter").Int64()
			return err == nil && now > before+10
		})
		select {
		case err := <-traffic:
			t.Fatal(what, err)
		default:
		}
	}

	// A copy of it. It can move all the same afterwards.
	h1.drafter(t, "snapshot", "cache", "copy")
	goesOn("copied")

	// Another process on the same host.
	for range 2 {
		before := h1.inspect(t, "cache")
		t.Log(h1.drafter(t, "upgrade", "cache"))
		goesOn("upgraded")
		if after := h1.inspect(t, "cache"); after.State != api.Running || after.PID == before.PID || after.Namespace == before.Namespace {
			t.Errorf("before: %+v\nafter: %+v", before, after)
		}
	}
	h1.drafter(t, "exec", "cache", "redis-cli", "ping")
	if log := h1.drafter(t, "logs", "cache"); !strings.Contains(log, "Ready to accept connections") {
		t.Errorf("logs: %q", log)
	}

	// Another host, and back.
	t.Log(h1.drafter(t, "move", "cache", "--to", "host2"))
	goesOn("moved")
	if vm := h1.inspect(t, "cache"); vm.State != api.Moved || vm.Host != "host2" || vm.PID != 0 {
		t.Errorf("at its source: %+v", vm)
	}
	if vm := h2.inspect(t, "cache"); vm.State != api.Running || vm.From != "host1" || !vm.Foreign {
		t.Errorf("at its target: %+v", vm)
	}
	h2.drafter(t, "exec", "--system", "cache", "grep", "-q", "SECRET=rosebud", "/run/crun/oci/config.json")
	there := redis.NewClient(&redis.Options{Addr: h2.host.Addr + ":6379"})
	defer there.Close()
	if v, err := there.Get(t.Context(), "key").Result(); err != nil || v != "value" {
		t.Errorf("at the other host, the key is %q, %v", v, err)
	}
	for _, verb := range []string{"start", "stop", "kill", "restart", "wait", "exec"} {
		args := []string{verb, "cache"}
		if verb == "exec" {
			args = append(args, "true")
		}
		if err := h1.Run(t.Context(), &out, args...); err == nil {
			t.Errorf("%s of a VM that runs elsewhere has done something", verb)
		}
	}
	if ids := h1.drafter(t, "ps", "-q", "--filter", "status=moved"); ids != h2.inspect(t, "cache").ID {
		t.Errorf("moved are %q", ids)
	}
	h2.kill(t) // the daemons are not needed
	h1.kill(t)
	goesOn("without daemons")
	h1.start(t)
	h2.start(t)
	h2.drafter(t, "move", "cache", "--to", "host1")
	goesOn("back")
	if vm := h1.inspect(t, "cache"); vm.State != api.Running || vm.Foreign {
		t.Errorf("back: %+v", vm)
	}
	if vm := h2.inspect(t, "cache"); vm.State != api.Moved || vm.Host != "host1" {
		t.Errorf("at the host that it has left: %+v", vm)
	}

	// All VMs of a host.
	h1.drafter(t, "drain")
	goesOn("drained")
	if err := h1.Run(t.Context(), &out, "run", "-d", image); err == nil {
		t.Error("a VM was started on a host that is drained")
	}
	h1.drafter(t, "undrain")
	goesOn("undrained")
	if vm := h1.inspect(t, "cache"); vm.State != api.Running {
		t.Errorf("undrained: %+v", vm)
	}

	if now, err := c.Get(t.Context(), "key").Result(); err != nil || now != "value" {
		t.Error(now, err)
	}
	stop()
	if err := <-traffic; err != nil {
		t.Error(err)
	}
	if now, err := conn.ClientID(t.Context()).Result(); err != nil || now != client {
		t.Errorf("the connection is %d, was %d: %v", now, client, err)
	}
}

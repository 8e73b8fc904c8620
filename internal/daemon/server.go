package daemon

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/danielgtaylor/huma/v2/sse"

	"drafter/api"
)

// Handler serves the daemon's API, and its description at /openapi.json (OpenAPI 3.1).
func (d *Daemon) Handler() http.Handler {
	mux := http.NewServeMux()
	describe(humago.New(mux, config(d.config.Version)), d)
	mux.HandleFunc("GET /v1/packages/{package}/archive", d.archive)
	mux.HandleFunc("POST /v1/packages", d.archive)
	mux.HandleFunc("GET /v1/vms/{vm}/exec", d.exec)
	mux.HandleFunc("GET /v1/vms/{vm}/files", d.files)
	mux.HandleFunc("PUT /v1/vms/{vm}/files", d.files)
	return mux
}

func config(version string) huma.Config {
	c := huma.DefaultConfig("Drafter", version)
	c.Info.Description = "The virtual machines of a host. What takes time answers 202 with an operation."
	c.DocsPath, c.SchemasPath = "", "/v1/schemas" // a page would load scripts from elsewhere
	c.CreateHooks = nil                           // no links to schemas in answers
	return c
}

type (
	body[T any] struct{ Body T }
	vmInput     struct {
		VM string `path:"vm" doc:"Name, ID, or the beginning of an ID"`
	}
	removeInput struct {
		VM    string `path:"vm" doc:"Name, ID, or the beginning of an ID"`
		Force bool   `query:"force" doc:"Also one that runs"`
	}
	fileInput struct {
		VM   string `path:"vm" doc:"Name, ID, or the beginning of an ID"`
		Path string `query:"path" required:"true" doc:"Absolute, in the image's container"`
	}
	logInput struct {
		VM     string    `path:"vm" doc:"Name, ID, or the beginning of an ID"`
		Follow bool      `query:"follow" doc:"Go on until the VM has ended"`
		Tail   int       `query:"tail" minimum:"-1" default:"-1" doc:"At most so many lines of before; -1: all"`
		Since  time.Time `query:"since" doc:"Not what is older"`
	}
	awaitInput struct {
		ID   string `path:"operation"`
		Wait int64  `query:"wait" minimum:"0" maximum:"60000" doc:"Milliseconds to wait for its end"`
	}
	operationInput struct {
		ID string `path:"operation"`
	}
)

// describe registers all that the API can do. d is nil if it is only described.
func describe(a huma.API, d *Daemon) {
	get(a, "/v1/host", "get-host", "Tell of the host",
		func(context.Context, *struct{}) (api.Host, error) { return d.Host(), nil })
	get(a, "/v1/vms", "list-vms", "List VMs, the newest first",
		func(context.Context, *struct{}) ([]api.VM, error) { return d.VMs(), nil })
	get(a, "/v1/vms/{vm}", "get-vm", "Tell of a VM",
		func(_ context.Context, in *vmInput) (api.VM, error) { return d.VM(in.VM) })
	work(a, http.MethodPost, "/v1/vms", "run", "Make a VM of an image and start it",
		func(in *struct{ Body api.Run }) (api.Operation, error) {
			return d.Run(in.Body)
		})
	work(a, http.MethodPost, "/v1/vms/{vm}/start", "start",
		"Start a VM: it is resumed if it can be, else it boots from its disks",
		func(in *vmInput) (api.Operation, error) {
			return d.Start(in.VM)
		})
	work(a, http.MethodPost, "/v1/vms/{vm}/stop", "stop", "Suspend a VM",
		func(in *vmInput) (api.Operation, error) { return d.Stop(in.VM) })
	work(a, http.MethodPost, "/v1/vms/{vm}/kill", "kill", "End a VM as a power cut does",
		func(in *vmInput) (api.Operation, error) { return d.Kill(in.VM) })
	work(a, http.MethodDelete, "/v1/vms/{vm}", "remove", "Remove a VM and all that it has written",
		func(in *removeInput) (api.Operation, error) {
			return d.Remove(in.VM, in.Force)
		})
	describeLife(a, d)
	describeStats(a, d)
	get(a, "/v1/operations/{operation}", "get-operation", "Tell of an operation",
		func(ctx context.Context, in *awaitInput) (api.Operation, error) {
			return d.Operation(ctx, in.ID, time.Duration(in.Wait)*time.Millisecond)
		})
	get(a, "/v1/vms/{vm}/file", "stat-file", "Describe a file of a VM",
		func(ctx context.Context, in *fileInput) (api.File, error) {
			return d.stat(ctx, in.VM, in.Path)
		})
	huma.Register(a, endpoint(http.MethodDelete, "/v1/operations/{operation}", "cancel",
		"Let an operation end early"),
		func(_ context.Context, in *operationInput) (*struct{}, error) {
			return nil, problem(d.Cancel(in.ID))
		})
	huma.Register(a, endpoint(http.MethodGet, "/v1/vms/{vm}/logs", "get-logs",
		"Read what a VM's service has printed, one JSON object a line"),
		func(_ context.Context, in *logInput) (*huma.StreamResponse, error) {
			return d.logs(in)
		})
	describeHosts(a, d)
	describeStreams(a)
	describeStore(a, d)
	sse.Register(a, endpoint(http.MethodGet, "/v1/events", "follow-events", "Follow what happens; Last-Event-ID goes on where a client has stopped"),
		map[string]any{"message": api.Event{}}, d.follow)
}

func endpoint(method, path, id, summary string) huma.Operation {
	return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary}
}

func get[In, Out any](a huma.API, path, id, summary string, f func(context.Context, *In) (Out, error)) {
	huma.Register(a, endpoint(http.MethodGet, path, id, summary),
		func(ctx context.Context, in *In) (*body[Out], error) {
			out, err := f(ctx, in)
			return &body[Out]{out}, problem(err)
		})
}

func work[In any](a huma.API, method, path, id, summary string, f func(*In) (api.Operation, error)) {
	huma.Register(a, accepted(method, path, id, summary),
		func(_ context.Context, in *In) (*body[api.Operation], error) {
			out, err := f(in)
			return &body[api.Operation]{out}, problem(err)
		})
}

// problem is an error as RFC 9457 has it.
func problem(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrNotFound):
		return huma.Error404NotFound(err.Error())
	case errors.Is(err, ErrForbidden):
		return huma.Error403Forbidden(err.Error())
	case errors.Is(err, ErrConflict):
		return huma.Error409Conflict(err.Error())
	case errors.Is(err, ErrInvalid):
		return huma.Error422UnprocessableEntity(err.Error())
	}
	return huma.Error500InternalServerError(err.Error())
}

// follow sends events until its client has gone.
func (d *Daemon) follow(ctx context.Context, in *struct {
	Last int64 `header:"Last-Event-ID" default:"-1" doc:"ID of the last event that the client knows; -1 for what happens from now on"`
}, send sse.Sender) {
	id := in.Last
	for {
		list, last, more := d.events.after(id)
		for _, e := range list {
			if err := send(sse.Message{ID: int(e.ID), Data: e}); err != nil {
				return
			}
		}
		id = last
		select {
		case <-more:
		case <-ctx.Done():
			return
		case <-d.ctx.Done():
			return
		}
	}
}

package daemon

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"drafter/api"
)

type (
	hostInput struct {
		Host string `path:"host"`
	}
	arrivalInput struct {
		VM    string `path:"vm" doc:"ID"`
		Moves int    `query:"moves" minimum:"0" doc:"How often the VM had moved before"`
		Wait  int64  `query:"wait" minimum:"0" maximum:"60000" doc:"Milliseconds to wait for its end"`
	}
	moveInput struct {
		VM   string `path:"vm" doc:"Name, ID, or the beginning of an ID"`
		Body api.Move
	}
	empty struct{}
)

// describeHosts registers what concerns other hosts.
func describeHosts(a huma.API, d *Daemon) {
	get(a, "/v1/hosts", "list-hosts", "List the other hosts that this one knows",
		func(context.Context, *empty) ([]api.Neighbour, error) { return d.Neighbours() })
	huma.Register(a, endpoint(http.MethodPost, "/v1/host/tokens", "make-token", "Let one other host be added, once"),
		func(context.Context, *empty) (*body[api.Token], error) {
			t, err := d.Token()
			return &body[api.Token]{t}, problem(err)
		})
	huma.Register(a, endpoint(http.MethodPost, "/v1/hosts", "add-host", "Add another host, with a token of it"),
		func(ctx context.Context, in *struct{ Body api.AddHost }) (*body[api.Neighbour], error) {
			n, err := d.AddHost(ctx, in.Body)
			return &body[api.Neighbour]{n}, problem(err)
		})
	huma.Register(a, endpoint(http.MethodDelete, "/v1/hosts/{host}", "remove-host", "Forget another host"),
		func(_ context.Context, in *hostInput) (*empty, error) { return nil, problem(d.RemoveHost(in.Host)) })
	work(a, http.MethodPost, "/v1/vms/{vm}/move", "move", "Move a VM that runs to another host",
		func(in *moveInput) (api.Operation, error) { return d.Move(in.VM, in.Body.To) })
	work(a, http.MethodPost, "/v1/vms/{vm}/upgrade", "upgrade",
		"Replace the process that owns a VM by one of the program that is installed now",
		func(in *vmInput) (api.Operation, error) { return d.Upgrade(in.VM) })
	work(a, http.MethodPost, "/v1/host/drain", "drain", "Move all VMs that run to other hosts",
		func(in *struct{ Body api.Drain }) (api.Operation, error) { return d.Drain(in.Body.Parallel) })
	work(a, http.MethodPost, "/v1/host/undrain", "undrain", "Bring those VMs back",
		func(*empty) (api.Operation, error) { return d.Undrain() })
}

// callerKey is of the context of a call that another host has made.
type callerKey struct{}

func callerOf(ctx context.Context) api.Neighbour {
	n, _ := ctx.Value(callerKey{}).(api.Neighbour) // always there; see HostHandler
	return n
}

// HostHandler serves what hosts ask each other, on a listener with [Daemon.TLS]. A host that this one
// does not know can only join, with a token.
func (d *Daemon) HostHandler() http.Handler {
	mux := http.NewServeMux()
	c := config(d.config.Version)
	c.OpenAPIPath, c.SchemasPath = "", ""
	a := humago.New(mux, c)
	huma.Register(a, endpoint(http.MethodPost, "/v1/join", "join", "Introduce a host"),
		func(ctx context.Context, in *struct{ Body api.Join }) (*empty, error) {
			return nil, problem(d.join(callerCertificate(ctx), in.Body))
		})
	get(a, "/v1/host", "get-host", "Tell of the host",
		func(context.Context, *empty) (api.Host, error) { return d.Host(), nil })
	huma.Register(a, accepted(http.MethodPost, "/v1/arrivals", "arrive", "Fetch a VM"),
		func(ctx context.Context, in *struct{ Body api.Arrival }) (*body[api.Operation], error) {
			o, err := d.Arrive(ctx, callerOf(ctx), in.Body)
			return &body[api.Operation]{o}, problem(err)
		})
	get(a, "/v1/arrivals/{vm}", "get-arrival", "Tell how far an arrival is",
		func(ctx context.Context, in *arrivalInput) (api.Operation, error) {
			return d.Arrival(ctx, in.VM, in.Moves, time.Duration(in.Wait)*time.Millisecond)
		})
	huma.Register(a, accepted(http.MethodPost, "/v1/arrivals/{vm}/return", "return", "Move a VM to the host that asks"),
		func(ctx context.Context, in *arrivalInput) (*body[api.Operation], error) {
			o, err := d.giveBack(in.VM, callerOf(ctx)) //nolint:contextcheck // it goes on without its caller
			return &body[api.Operation]{o}, problem(err)
		})
	get(a, "/v1/operations/{operation}", "get-operation", "Tell of an operation",
		func(ctx context.Context, in *awaitInput) (api.Operation, error) {
			if err := d.asked(in.ID, callerOf(ctx).Name); err != nil {
				return api.Operation{}, err
			}
			return d.Operation(ctx, in.ID, time.Duration(in.Wait)*time.Millisecond)
		})
	huma.Register(a, endpoint(http.MethodDelete, "/v1/operations/{operation}", "cancel", "Let an operation end early"),
		func(ctx context.Context, in *operationInput) (*empty, error) {
			err := d.asked(in.ID, callerOf(ctx).Name)
			if err == nil {
				err = d.Cancel(in.ID)
			}
			return nil, problem(err)
		})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
			http.Error(w, "this takes a certificate", http.StatusForbidden)
			return
		}
		der := r.TLS.PeerCertificates[0].Raw
		ctx := context.WithValue(r.Context(), certificateKey{}, der)
		n, err := d.caller(der)
		if err != nil && r.URL.Path != "/v1/join" {
			http.Error(w, `{"status":403,"detail":"this host does not know the caller"}`, http.StatusForbidden)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, 8<<20)
		mux.ServeHTTP(w, r.WithContext(context.WithValue(ctx, callerKey{}, n)))
	})
}

type certificateKey struct{}

func callerCertificate(ctx context.Context) []byte {
	der, _ := ctx.Value(certificateKey{}).([]byte) // always there; see HostHandler
	return der
}

func accepted(method, path, id, summary string) huma.Operation {
	o := endpoint(method, path, id, summary)
	o.DefaultStatus = http.StatusAccepted
	return o
}

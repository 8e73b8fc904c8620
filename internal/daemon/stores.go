package daemon

import (
	"context"
	"net/http"
	"reflect"

	"github.com/danielgtaylor/huma/v2"

	"drafter/api"
)

type (
	packageInput struct {
		Package string `path:"package" doc:"Name, key, or the beginning of a key"`
	}
	imageInput struct {
		Image string `query:"reference" required:"true" doc:"Reference, or digest"`
	}
	snapshotInput struct {
		VM   string `path:"vm" doc:"Name, ID, or the beginning of an ID"`
		Body api.Snapshot
	}
)

// describeStore registers what the API can do with images and packages.
func describeStore(a huma.API, d *Daemon) {
	get(a, "/v1/images", "list-images", "List images that were looked up, the latest first",
		func(context.Context, *struct{}) ([]api.Image, error) { return d.Images() })
	get(a, "/v1/packages", "list-packages", "List packages, the newest first",
		func(context.Context, *struct{}) ([]api.Package, error) { return d.Packages(), nil })
	get(a, "/v1/packages/{package}", "get-package", "Tell of a package",
		func(_ context.Context, in *packageInput) (api.Package, error) { return d.Package(in.Package) })
	work(a, http.MethodPost, "/v1/pull", "pull", "Look an image up, and make or fetch its package",
		func(in *struct{ Body api.Pull }) (api.Operation, error) {
			return d.Pull(in.Body)
		})
	work(a, http.MethodPost, "/v1/push", "push", "Store a package, or a copy of a VM, in a registry",
		func(in *struct{ Body api.Push }) (api.Operation, error) {
			return d.Push(in.Body)
		})
	work(a, http.MethodPost, "/v1/vms/{vm}/snapshot", "snapshot", "Make a package of a VM, which goes on",
		func(in *snapshotInput) (api.Operation, error) {
			return d.Snapshot(in.VM, in.Body.Name)
		})
	remove(a, "/v1/packages/{package}", "remove-package", "Remove a package that no VM needs",
		func(in *packageInput) error { return d.RemovePackage(in.Package) })
	remove(a, "/v1/images", "remove-image", "Forget an image, and remove the packages that were made of it",
		func(in *imageInput) error { return d.RemoveImage(in.Image) })
	huma.Register(a, endpoint(http.MethodPost, "/v1/prune", "prune", "Remove what no VM needs"),
		func(_ context.Context, in *struct{ Body api.Prune }) (*body[api.Pruned], error) {
			out, err := d.Prune(in.Body)
			return &body[api.Pruned]{out}, problem(err)
		})
	// These two stream, past huma.
	binary := map[string]*huma.MediaType{"application/zstd": {Schema: &huma.Schema{Type: huma.TypeString, Format: "binary"}}}
	o := endpoint(http.MethodGet, "/v1/packages/{package}/archive", "export-package", "Read a package as an archive, a tar compressed with zstd")
	o.Parameters = []*huma.Param{{Name: "package", In: "path", Required: true, Schema: &huma.Schema{Type: huma.TypeString}}}
	o.Responses = map[string]*huma.Response{"200": {Description: "The archive", Content: binary}}
	a.OpenAPI().AddOperation(&o)
	i := endpoint(http.MethodPost, "/v1/packages", "import-package", "Make a package of an archive")
	i.Parameters = []*huma.Param{{Name: "name", In: "query", Description: "Of the package", Schema: &huma.Schema{Type: huma.TypeString}}}
	i.RequestBody = &huma.RequestBody{Required: true, Content: binary}
	i.Responses = map[string]*huma.Response{"201": {Description: "The package", Content: map[string]*huma.MediaType{
		"application/json": {Schema: huma.SchemaFromType(a.OpenAPI().Components.Schemas, reflect.TypeFor[api.Package]())},
	}}}
	a.OpenAPI().AddOperation(&i)
}

func remove[In any](a huma.API, path, id, summary string, f func(*In) error) {
	huma.Register(a, endpoint(http.MethodDelete, path, id, summary),
		func(_ context.Context, in *In) (*struct{}, error) {
			return nil, problem(f(in))
		})
}

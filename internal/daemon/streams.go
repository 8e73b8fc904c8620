package daemon

import (
	"net/http"
	"reflect"

	"github.com/danielgtaylor/huma/v2"

	"drafter/api"
)

// describeStreams describes what streams in both directions or for long, past huma.
func describeStreams(a huma.API) {
	text := &huma.Schema{Type: huma.TypeString}
	vm := &huma.Param{Name: "vm", In: "path", Required: true, Description: "Name, ID, or the beginning of an ID", Schema: text}
	path := &huma.Param{
		Name: "path", In: "query", Required: true, Description: "Absolute, in the image's container", Schema: text,
	}
	archive := map[string]*huma.MediaType{
		"application/x-tar": {Schema: &huma.Schema{Type: huma.TypeString, Format: "binary"}},
	}
	schemas := a.OpenAPI().Components.Schemas
	add := func(o huma.Operation, params []*huma.Param, body *huma.RequestBody, status string, answer *huma.Response) {
		o.Parameters, o.RequestBody = params, body
		o.Responses = map[string]*huma.Response{status: answer, "default": {
			Description: "Error",
			Content: map[string]*huma.MediaType{
				"application/problem+json": {Schema: schemas.Schema(reflect.TypeFor[huma.ErrorModel](), true, "")},
			},
		}}
		a.OpenAPI().AddOperation(&o)
	}
	exec := endpoint(http.MethodGet, "/v1/vms/{vm}/exec", "exec", "Run a program in a VM, over a WebSocket")
	exec.Description = `Each binary message begins with one byte, its channel: 0 input to the program (an
empty message ends it), 1 its stdout, 2 its stderr, 3 how it has ended (ExecStatus as JSON, the last
message), 4 the size of its terminal (WindowSize as JSON), 5 a signal (its number in decimal), 6 how many
more bytes of input were taken (in decimal). A client sends at most 256 KiB of input that was not taken.`
	add(exec, []*huma.Param{vm, {
		Name: "exec", In: "query", Required: true, Description: "The program: Exec as JSON", Schema: text,
	}}, nil, "101", &huma.Response{Description: "A WebSocket"})
	for _, t := range []reflect.Type{
		reflect.TypeFor[api.Exec](), reflect.TypeFor[api.ExecStatus](), reflect.TypeFor[api.WindowSize](),
	} {
		schemas.Schema(t, true, "")
	}
	add(endpoint(http.MethodGet, "/v1/vms/{vm}/files", "copy-out", "Read a file of a VM, with all below it, as a tar archive"),
		[]*huma.Param{vm, path}, nil, "200", &huma.Response{Description: "The archive", Content: archive})
	add(endpoint(http.MethodPut, "/v1/vms/{vm}/files", "copy-in", "Unpack a tar archive in a directory of a VM"),
		[]*huma.Param{vm, path}, &huma.RequestBody{Required: true, Content: archive}, "200",
		&huma.Response{Description: "All is there"})
}

package daemon

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
)

// What streams is described, too: a client can be generated from the description alone.
func TestDescription(t *testing.T) {
	d := open(t, testDir(t))
	answer := httptest.NewRecorder()
	d.Handler().ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/openapi.json", nil))
	var described struct {
		OpenAPI    string `json:"openapi"`
		Paths      map[string]map[string]struct{ OperationID string }
		Components struct{ Schemas map[string]any }
	}
	if err := json.Unmarshal(answer.Body.Bytes(), &described); err != nil || described.OpenAPI != "3.1.0" {
		t.Fatal(answer.Code, described.OpenAPI, err)
	}
	for path, method := range map[string]string{
		"/v1/vms/{vm}/exec": "get", "/v1/vms/{vm}/files": "put", "/v1/events": "get", "/v1/vms/{vm}/move": "post",
	} {
		if described.Paths[path][method].OperationID == "" {
			t.Errorf("%s %s is not described", method, path)
		}
	}
	for _, schema := range []string{"Exec", "ExecStatus", "WindowSize", "Operation"} {
		if described.Components.Schemas[schema] == nil {
			t.Errorf("%s is not described", schema)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

package daemon

import (
	"bytes"
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"drafter/api"
	"drafter/internal/await"
	"drafter/internal/doctor"
)

// The daemon checks its host at its start. It logs what is not well, and its API tells all.
func TestCheckUp(t *testing.T) {
	want := []api.Check{
		{Name: "kernel", Level: api.OK, Text: "new"},
		{Name: "disk", Level: api.Warning, Text: "full", Remedy: "empty it"},
		{Name: "fuse", Level: api.Bad, Text: "none", Remedy: "load it"},
	}
	var log bytes.Buffer
	c := testConfig(testDir(t))
	c.Logger = slog.New(slog.NewTextHandler(&log, nil))
	for _, r := range want {
		c.Checks = append(c.Checks, func(context.Context) doctor.Result { return r })
	}
	d, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	await.True(t, "the host is checked", func() bool { return len(d.Host().Checks) > 0 })
	if got := d.Host().Checks; !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	answer := httptest.NewRecorder()
	d.Handler().ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/v1/host", nil))
	if !strings.Contains(
		answer.Body.String(),
		`{"name":"fuse","level":"error","text":"none","remedy":"load it"}`,
	) {
		t.Error(answer.Body)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	for _, line := range []string{`level=WARN msg="This host lacks something" what=disk`, `level=ERROR msg="VMs cannot run on this host" what=fuse`} {
		if !strings.Contains(log.String(), line) {
			t.Errorf("%s is not in the log: %s", line, log.String())
		}
	}
	if strings.Contains(log.String(), "kernel") {
		t.Error("what is well was logged:", log.String())
	}
}

package cli

import (
	"testing"

	"drafter/api"
)

func TestFilters(t *testing.T) {
	vm := api.VM{ID: "0123456789ab", Name: "cache-2", State: api.Exited, Labels: map[string]string{"tier": "web", "empty": ""}}
	for _, c := range []struct {
		filters []string
		match   bool
	}{
		{nil, true},
		{[]string{"name=cache"}, true},
		{[]string{"name=^cache$"}, false},
		{[]string{"name=^cache$", "name=2"}, true}, // one of them applies
		{[]string{"id=0123"}, true},
		{[]string{"id=123"}, false},
		{[]string{"status=exited", "status=failed"}, true},
		{[]string{"status=running"}, false},
		{[]string{"name=cache", "status=running"}, false}, // both have to
		{[]string{"label=tier"}, true},
		{[]string{"label=tier=web", "label=empty="}, true},
		{[]string{"label=tier", "label=other"}, false}, // all of them have to
		{[]string{"label=empty=x"}, false},
	} {
		f, err := parseFilters(c.filters)
		if err != nil || f.match(vm) != c.match {
			t.Errorf("%q: %v, %v", c.filters, !c.match, err)
		}
	}
	for _, bad := range []string{"", "name", "name=", "=x", "name=(", "status=up", "colour=red"} {
		if _, err := parseFilters([]string{bad}); err == nil {
			t.Errorf("%q is a filter", bad)
		}
	}
}

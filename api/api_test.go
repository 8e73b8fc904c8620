package api_test

import (
	"reflect"
	"strings"
	"testing"

	"drafter/api"
)

// The description of the API knows each state of a VM.
func TestStates(t *testing.T) {
	f, _ := reflect.TypeFor[api.VM]().FieldByName("State")
	if described := f.Tag.Get("enum"); described != strings.Join(api.States, ",") {
		t.Errorf("described are %s, and there are %v", described, api.States)
	}
}

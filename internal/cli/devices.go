package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
)

// parseJSON decodes a flag's JSON value, refusing fields that do not exist and saying where it is
// malformed.
func parseJSON[T any](flag, value string) ([]T, error) {
	dec := json.NewDecoder(strings.NewReader(value))
	dec.DisallowUnknownFields()
	var list []T
	err := dec.Decode(&list)
	if err == nil {
		if _, more := dec.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("something follows the list")
		}
	}
	if err == nil {
		return list, nil
	}
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		err = fmt.Errorf("malformed JSON at byte %d: %w", syntax.Offset, err)
	case errors.As(err, &kind) && kind.Field == "":
		err = fmt.Errorf("it must be a list of objects ([{…}, …]), not of type %s", kind.Value)
	case errors.As(err, &kind):
		err = fmt.Errorf("field %q must be a %s, not a %s", kind.Field, kind.Type, kind.Value)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		err = errors.New("malformed JSON: it ends too early")
	case strings.HasPrefix(err.Error(), "json: unknown field"):
		err = fmt.Errorf("%s; the fields are: %s", strings.TrimPrefix(err.Error(), "json: "), strings.Join(fields[T](), ", "))
	}
	return nil, &usageError{fmt.Errorf("--%s: %w", flag, err)}
}

// fields lists the JSON names of a struct's fields.
func fields[T any]() []string {
	var names []string
	for t, i := reflect.TypeFor[T](), 0; i < t.NumField(); i++ {
		names = append(names, t.Field(i).Tag.Get("json"))
	}
	return names
}

// defaultJSON is the default value of a flag that takes a list.
func defaultJSON(list any) string {
	b, err := json.Marshal(list)
	if err != nil {
		panic(err) // the lists are constants of ours
	}
	return string(b)
}

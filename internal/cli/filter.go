package cli

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"drafter/api"
)

const filterHelp = `
--filter name=PATTERN lists VMs whose name matches a regular expression, id=ID those whose ID begins
so, status=STATE those in a state, also VMs that do not run, and label=KEY or label=KEY=VALUE those
with a label. Of several names, IDs or states one has to apply, and of labels all have to.
`

// filters are those of a list of VMs, by what they look at.
type filters map[string][]string

func parseFilters(texts []string) (filters, error) {
	f := filters{}
	for _, text := range texts {
		key, value, ok := strings.Cut(text, "=")
		var err error
		switch {
		case !ok || value == "":
			err = fmt.Errorf("--filter %q is not of the form KEY=VALUE", text)
		case key == "name":
			_, err = regexp.Compile(value)
		case key == "status" && !slices.Contains(api.States, value):
			err = fmt.Errorf("--filter %q: the states are %s", text, strings.Join(api.States, ", "))
		case !slices.Contains([]string{"name", "id", "status", "label"}, key):
			err = fmt.Errorf("--filter %q: filter by name, id, status or label", text)
		}
		if err != nil {
			return nil, &usageError{err}
		}
		f[key] = append(f[key], value)
	}
	return f, nil
}

// states tells whether they look at states, also of VMs that do not run.
func (f filters) states() bool { return len(f["status"]) > 0 }

func (f filters) match(vm api.VM) bool {
	one := func(key string, applies func(string) bool) bool {
		return len(f[key]) == 0 || slices.ContainsFunc(f[key], applies)
	}
	lacks := func(label string) bool {
		key, want, valued := strings.Cut(label, "=")
		value, there := vm.Labels[key]
		return !there || valued && value != want
	}
	return one("name", func(p string) bool { return regexp.MustCompile(p).MatchString(vm.Name) }) &&
		one("id", func(p string) bool { return strings.HasPrefix(vm.ID, p) }) &&
		one("status", func(s string) bool { return s == vm.State }) &&
		!slices.ContainsFunc(f["label"], lacks)
}

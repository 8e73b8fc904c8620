package drafter_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/importer"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
)

// What a public package exports names no type that is internal: its user could neither make nor
// name it.
func TestPublicFace(t *testing.T) {
	exports := map[string]string{} // package to its export data
	args := []string{"list", "-export", "-deps", "-json=ImportPath,Export"}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		args = append(args, "-race") // for what has been built already
	}
	list, err := exec.CommandContext(t.Context(), "go", append(args, "./...")...).Output()
	if err != nil {
		t.Fatal(err)
	}
	for decoder := json.NewDecoder(bytes.NewReader(list)); ; {
		var p struct{ ImportPath, Export string }
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		exports[p.ImportPath] = p.Export
	}
	packages := importer.ForCompiler(token.NewFileSet(), "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
	for path := range exports {
		if !public(path) {
			continue
		}
		p, err := packages.Import(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range p.Scope().Names() {
			if o := p.Scope().Lookup(name); o.Exported() {
				face(t, path+"."+name, o)
			}
		}
	}
}

// public tells whether a package is for those who embed Drafter.
func public(path string) bool {
	dir, ours := strings.CutPrefix(path, "drafter/")
	first, _, _ := strings.Cut(dir, "/")
	switch first {
	case "internal", "cmd", "bench", "demo", "e2e":
		return false
	}
	return ours
}

// face refuses what an exported object shows of internal packages.
func face(t *testing.T, where string, o types.Object) {
	t.Helper()
	named, ok := o.Type().(*types.Named)
	if _, isType := o.(*types.TypeName); !isType || !ok {
		shown(t, where, o.Type())
		return
	}
	shown(t, where, named.Underlying())
	for m := range named.Methods() {
		if m.Exported() {
			shown(t, where+"."+m.Name(), m.Type())
		}
	}
}

func shown(t *testing.T, where string, of types.Type) {
	t.Helper()
	switch of := of.(type) {
	case *types.Alias:
		nameable(t, where, of.Obj())
	case *types.Named:
		nameable(t, where, of.Obj())
	case interface{ Elem() types.Type }: // pointer, slice, array, channel, map
		shown(t, where, of.Elem())
		if m, ok := of.(*types.Map); ok {
			shown(t, where, m.Key())
		}
	case *types.Signature:
		for v := range of.Params().Variables() {
			shown(t, where, v.Type())
		}
		for v := range of.Results().Variables() {
			shown(t, where, v.Type())
		}
	case *types.Struct:
		for f := range of.Fields() {
			if f.Exported() {
				shown(t, where+"."+f.Name(), f.Type())
			}
		}
	case *types.Interface:
		for m := range of.Methods() {
			if m.Exported() {
				shown(t, where+"."+m.Name(), m.Type())
			}
		}
	}
}

func nameable(t *testing.T, where string, o *types.TypeName) {
	t.Helper()
	if o.Pkg() != nil && strings.HasPrefix(o.Pkg().Path(), "drafter/") && strings.Contains(o.Pkg().Path(), "internal/") {
		t.Errorf("%s shows %s.%s, which its users can neither make nor name", where, o.Pkg().Path(), o.Name())
	}
}

func TestEveryPublicPackageHasAnExample(t *testing.T) {
	list, err := exec.CommandContext(t.Context(), "go", "list", "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for path := range strings.FieldsSeq(string(list)) {
		dir, _ := strings.CutPrefix(path, "drafter/")
		if _, err := os.Stat(filepath.Join(dir, "example_test.go")); public(path) && err != nil {
			t.Errorf("package %s has no example: %v", dir, err)
		}
	}
}

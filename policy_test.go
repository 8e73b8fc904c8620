// Package drafter_test holds the rules that all packages keep.
package drafter_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// sources calls f for every Go file of the module.
func sources(t *testing.T, f func(path string, file *ast.File)) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "out" || d.Name() == "tools") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		f(path, file)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	documented := map[string]bool{}
	sources(t, func(path string, file *ast.File) {
		dir := filepath.Dir(path)
		documented[dir] = documented[dir] || file.Doc != nil
	})
	for dir, ok := range documented {
		if !ok {
			t.Errorf("package %s has no package comment", dir)
		}
	}
}

func TestNoCgo(t *testing.T) {
	sources(t, func(path string, file *ast.File) {
		for _, i := range file.Imports {
			if i.Path.Value == `"C"` {
				t.Errorf("%s uses cgo", path)
			}
		}
	})
}

// A test that cannot run says what is missing, and fails where that is required: package need does
// so.
func TestSkipsAreNeeds(t *testing.T) {
	sources(t, func(path string, file *ast.File) {
		if strings.HasPrefix(path, "internal/need/") {
			return
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				if f, ok := call.Fun.(*ast.SelectorExpr); ok && (f.Sel.Name == "Skip" || f.Sel.Name == "Skipf" || f.Sel.Name == "SkipNow") {
					t.Errorf("%s skips a test by itself; use package need", path)
				}
			}
			return true
		})
	})
}

// The table of rooms lists every package, and no other; imports point to the same floor or
// downwards.
func TestArchitectureIsTrue(t *testing.T) {
	text, err := os.ReadFile("docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	table, _, _ := strings.Cut(string(text), "\n## Where it happens")
	floors := map[string]string{} // of packages, which are told by their directories
	for _, row := range regexp.MustCompile(`(?m)^\| ([0-9–]) \| ([^|]+) \|`).FindAllStringSubmatch(table, -1) {
		for _, m := range regexp.MustCompile("`([a-z0-9/-]+)`").FindAllStringSubmatch(row[2], -1) {
			if info, err := os.Stat(m[1]); err != nil || !info.IsDir() {
				t.Errorf("docs/architecture.md lists %s, which is no directory", m[1])
			}
			floors[m[1]] = row[1]
		}
	}
	sources(t, func(path string, file *ast.File) {
		dir := filepath.Dir(path)
		floor, listed := floors[dir]
		if dir != "." && !listed {
			t.Errorf("docs/architecture.md does not list %s", dir)
			floors[dir] = "–"
		}
		if dir == "." || floor == "–" || strings.HasSuffix(path, "_test.go") {
			return
		}
		for _, i := range file.Imports {
			to, ours := strings.CutPrefix(strings.Trim(i.Path.Value, `"`), "drafter/")
			if !ours {
				continue
			}
			if floors[to] == "–" || floors[to] > floor {
				t.Errorf("%s, on floor %s, imports %s, on floor %s", path, floor, to, floors[to])
			}
			if (to == "vmm/qemu" || to == "vmm/firecracker") && dir != "internal/cli" {
				t.Errorf("%s imports %s; all but internal/cli see vmm.Driver", path, to)
			}
		}
	})
}

// What the architecture says where to find is there.
func TestWhereItHappens(t *testing.T) {
	text, err := os.ReadFile("docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "\n## Where it happens\n")
	table, _, _ = strings.Cut(table, "\n## ")
	functions := map[string]map[string]bool{} // of files
	sources(t, func(path string, file *ast.File) {
		functions[path] = map[string]bool{}
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok {
				functions[path][f.Name.Name] = true
			}
		}
	})
	path, places := "", 0
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(table, -1) {
		if strings.HasSuffix(m[1], ".go") {
			path = m[1]
			continue
		}
		places++
		if !functions[path][m[1]] {
			t.Errorf("docs/architecture.md says that %s is in %s", m[1], path)
		}
	}
	if places < 18 {
		t.Errorf("only %d places are listed", places)
	}
}

func TestDependencies(t *testing.T) {
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mod), "\nreplace ") {
		t.Error("go.mod replaces a module: users of the library would not get that")
	}
	direct := map[string]bool{}
	for line := range strings.SplitSeq(string(mod), "\n") {
		f := strings.Fields(line)
		if len(f) >= 2 && strings.Contains(f[0], ".") && !strings.Contains(line, "// indirect") {
			direct[f[0]] = true
			if !strings.Contains(string(text), "`"+f[0]+"`") {
				t.Errorf("docs/dependencies.md does not justify %s", f[0])
			}
		}
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)`").FindAllStringSubmatch(string(text), -1) {
		if strings.Contains(m[1], "/") && !direct[m[1]] && !strings.HasPrefix(m[1], "tools: ") {
			t.Errorf("docs/dependencies.md lists %s, which go.mod does not", m[1])
		}
	}
}

// Every user-visible change is one small file. After a release there is none.
func TestChangelog(t *testing.T) {
	files, err := filepath.Glob("changelog/unreleased/*.md")
	if err != nil {
		t.Fatal(err)
	}
	kinds := regexp.MustCompile(`^(Feature|Enhancement|Bugfix|Change|Security): .+\n\n`)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if !kinds.Match(b) {
			t.Errorf("%s does not begin with 'Feature: …' (or Enhancement, Bugfix, Change, Security) and an empty line", f)
		}
	}
}

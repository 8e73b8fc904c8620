package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"drafter/internal/tour"
)

// The scripts read like a terminal. Beside testscript's commands there are:
//
//	refused PATTERN PROGRAM ARGS…   the program fails and says why in one line "Error: …" that matches the pattern
//	resumes PROGRAM ARGS…           the program resumes a VM; then it is interrupted, and ends well
//	package DIR                     the shared package, copied to DIR
//	listen ADDR                     somebody listens there until the script ends
func TestScripts(t *testing.T) {
	before := inventory()
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		WorkdirRoot:         shortDir(t),
		Setup: func(e *testscript.Env) error {
			e.Vars = append(e.Vars, "BLUEPRINT="+filepath.Join(work, "out/blueprint"), "IMAGE="+filepath.Join(work, "redis-image"), "PATH="+os.Getenv("PATH"), "GORACE="+os.Getenv("GORACE"),
				"ALL="+packageIn("pkg"), "ONE="+packageIn("one"), "TWO="+packageIn("two"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"refused": refused,
			"resumes": resumes,
			"package": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(ts.Exec("cp", "-a", "--sparse=always", filepath.Join(work, "out/package"), ts.MkAbs(args[0])))
			},
			"listen": func(ts *testscript.TestScript, _ bool, args []string) {
				l, err := net.Listen("tcp4", args[0])
				ts.Check(err)
				ts.Defer(func() { l.Close() })
			},
		},
	})
	t.Cleanup(func() {
		if after := inventory(); after != before {
			t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
		}
	})
}

// packageIn is --devices of a package in dir.
func packageIn(dir string) string {
	devices := tour.PackageDevices(filepath.Join(work, "out/package"))
	return strings.ReplaceAll(devices, filepath.Join(work, "out/package"), dir)
}

// shortDir is a directory whose name leaves room for socket paths.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(work, "s")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

var logLine = regexp.MustCompile(`^\d\d:\d\d:\d\d |^.*: (done|\d+%)|^$`)

func resumes(ts *testscript.TestScript, _ bool, args []string) {
	var said bytes.Buffer
	r, w, err := os.Pipe()
	ts.Check(err)
	defer r.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir, cmd.Stderr = ts.MkAbs("."), w
	ts.Check(cmd.Start())
	ts.Check(w.Close())
	lines, resumed := bufio.NewScanner(io.TeeReader(r, &said)), false
	for lines.Scan() { // until the program ends
		if !resumed && strings.Contains(lines.Text(), "Resumed VM") {
			resumed = true
			ts.Check(cmd.Process.Signal(os.Interrupt))
		}
	}
	err = cmd.Wait()
	fmt.Fprint(ts.Stderr(), said.String())
	if err != nil || !resumed {
		ts.Fatalf("%s: %v; resumed: %v", strings.Join(args, " "), err, resumed)
	}
}

func refused(ts *testscript.TestScript, _ bool, args []string) {
	pattern := regexp.MustCompile(args[0])
	cmd := exec.Command(args[1], args[2:]...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+cmd.Dir)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		ts.Fatalf("%s was not refused: %v\n%s%s", strings.Join(args[1:], " "), err, stdout.String(), stderr.String())
	}
	var lines []string
	for line := range strings.SplitSeq(stderr.String(), "\n") {
		if !logLine.MatchString(line) {
			lines = append(lines, line)
		}
	}
	if len(lines) != 1 || !strings.HasPrefix(lines[0], "Error: ") || !pattern.MatchString(lines[0]) || stdout.Len() > 0 {
		ts.Fatalf("%s: want one line with %q, got stdout %q and stderr:\n%s", strings.Join(args[1:], " "), pattern, stdout.String(), stderr.String())
	}
	fmt.Fprintf(ts.Stderr(), "%s\n(exit code %d)\n", lines[0], exit.ExitCode())
}

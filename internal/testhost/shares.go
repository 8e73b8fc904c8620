package testhost

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
)

const listing = "DRAFTER_TESTHOST_LIST"

// Listing tells whether this process only says which tests there are, for which it needs no host.
func Listing() bool { return os.Getenv(listing) != "" }

// EnterShared is [Enter] on several hosts at once, each of which gets its share of the tests: those
// that wait for a network's timeouts wait together. What a share prints comes whole, after the
// shares before it. Where some of the tests are asked for, or measured, there is one host.
func EnterShared(output io.Writer, hosts int) (exitCode int, err error) {
	if slices.ContainsFunc(os.Args[1:], chooses) {
		return Enter(output, nil)
	}
	tests, err := tests()
	if err != nil {
		return 0, err
	}
	shares := make([][]string, hosts)
	for i, test := range tests {
		shares[i%hosts] = append(shares[i%hosts], test)
	}
	type result struct {
		output bytes.Buffer
		code   int
		err    error
	}
	results := make([]result, hosts)
	var wg sync.WaitGroup
	for i := range results {
		r := &results[i]
		wg.Go(func() {
			r.code, r.err = Enter(&r.output, []string{"-test.run=^(" + strings.Join(shares[i], "|") + ")$"})
		})
	}
	wg.Wait()
	for i := range results {
		r := &results[i]
		text, _ := strings.CutSuffix(r.output.String(), "PASS\n") // of all shares, or of none
		if _, werr := io.WriteString(output, text); err == nil {
			err = werr
		}
		if r.err != nil && err == nil {
			err = fmt.Errorf("share %d of the tests: %w", i+1, r.err)
		}
		exitCode = max(exitCode, r.code)
	}
	if exitCode == 0 && err == nil {
		_, err = fmt.Fprintln(output, "PASS")
	}
	return exitCode, err
}

// chooses tells whether an argument says which tests are meant, or writes a file about all of them.
func chooses(arg string) bool {
	name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
	return slices.Contains([]string{
		"test.run", "test.skip", "test.list", "test.bench", "test.fuzz",
		"test.coverprofile", "test.cpuprofile", "test.memprofile", "test.blockprofile", "test.mutexprofile", "test.trace",
	}, name)
}

// tests are the names of all tests and examples of this program.
func tests() ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "-test.list=.")
	cmd.Env = append(os.Environ(), listing+"=1")
	list, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list tests: %w", err)
	}
	return strings.Fields(string(list)), nil
}

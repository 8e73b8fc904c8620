package network

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/internal/rundir"
)

// expectation is of a VM that is to come to a claimed namespace. Its record goes when the VM has come,
// with the claim, or, if the process was killed, with the next claim of any namespace.
type expectation struct {
	// Ticket proves to a source on this host that its target has the claim: only root reads it here.
	Ticket string     `json:"ticket"`
	From   *TunnelKey `json:"from,omitempty"` // the end of the tunnel from which the VM may come
}

const expectationRecords = "expected"

func expectationPath(ns string) string {
	return filepath.Join(rundir.Path, expectationRecords, ns+".json")
}

// expect records that a VM may come to the claim's namespace, and returns the ticket for it.
func (c *Claim) expect(from *TunnelEnd) (ticket string, err error) {
	e := expectation{Ticket: rand.Text()}
	if from != nil {
		e.From = &from.Key
	}
	b, err := json.Marshal(e)
	if err == nil {
		err = private.MkdirAll(filepath.Dir(expectationPath(c.namespace)))
	}
	if err == nil {
		err = newfile.WriteBytes(expectationPath(c.namespace), b)
	}
	if err != nil {
		return "", fmt.Errorf("record that a VM may come to network namespace %q: %w", c.namespace, err)
	}
	return e.Ticket, nil
}

// expectNobody removes the record, if there is one.
func expectNobody(ns string) error {
	if err := os.Remove(expectationPath(ns)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget that a VM may come to network namespace %q: %w", ns, err)
	}
	return nil
}

// sweepExpected removes the records of claims whose processes were killed.
func sweepExpected() error {
	if err := rundir.Sweep(claimLocks); err != nil {
		return err
	}
	paths, err := filepath.Glob(expectationPath("*"))
	if err != nil {
		return err
	}
	for _, path := range paths {
		ns := strings.TrimSuffix(filepath.Base(path), ".json")
		if _, err := os.Stat(filepath.Join(rundir.Path, claimLocks, ns+".lock")); errors.Is(err, os.ErrNotExist) {
			if err := expectNobody(ns); err != nil {
				return err
			}
		}
	}
	return rundir.Remove()
}

// expected returns what is expected in a namespace.
func expected(ns string) (e expectation, err error) {
	b, err := os.ReadFile(expectationPath(ns))
	if errors.Is(err, os.ErrNotExist) {
		return e, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &e)
	}
	if err != nil {
		return e, fmt.Errorf("read what is expected in network namespace %q: %w", ns, err)
	}
	return e, nil
}

// here tells whether a landing is on this host.
func (l Landing) here() (bool, error) {
	e, err := expected(l.Netns)
	return e.Ticket != "" && subtle.ConstantTimeCompare([]byte(e.Ticket), []byte(l.Ticket)) == 1, err
}

// expects tells whether a VM may come from the caller to a namespace.
func (t *tunnel) expects(ns string, from caller) bool {
	e, err := expected(ns)
	if err != nil {
		t.log.Warn("A VM that moves may lose its connections", "namespace", ns, "error", err)
	}
	return !from.here && e.From != nil && *e.From == from.end.Key
}

package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// HealthCheckAnnotation of a bundle's config.json is a [HealthCheck] in JSON.
const HealthCheckAnnotation = "drafter.healthcheck"

// HealthCheck is a program of an image that succeeds once the image's service is healthy. It runs
// in the container, as the service does.
type HealthCheck struct {
	Args    []string      `json:"args"`
	Timeout time.Duration `json:"timeout"` // nanoseconds, of one attempt
}

// defaultCheckTimeout is Docker's timeout for a health check of an image that names none.
const defaultCheckTimeout = 30 * time.Second

// NewHealthCheck converts a health check as images have it: none, NONE, CMD with arguments, or
// CMD-SHELL with a command for the image's shell ("" for /bin/sh -c; Dockerfile reference,
// HEALTHCHECK and SHELL). Without one it is nil.
func NewHealthCheck(test, shell []string, timeout time.Duration) (*HealthCheck, error) {
	if len(test) == 0 || test[0] == "NONE" {
		return nil, nil
	}
	if timeout <= 0 {
		timeout = defaultCheckTimeout
	}
	if len(shell) == 0 {
		shell = []string{"/bin/sh", "-c"}
	}
	switch {
	case test[0] == "CMD" && len(test) > 1:
		return &HealthCheck{test[1:], timeout}, nil
	case test[0] == "CMD-SHELL" && len(test) == 2:
		return &HealthCheck{append(shell[:len(shell):len(shell)], test[1]), timeout}, nil
	}
	return nil, fmt.Errorf("health check %q is neither NONE nor CMD with arguments nor CMD-SHELL with a command", test)
}

var healthDir = "/run" // but in tests

// healthCheck returns the command that checks the container's service, and how long it may take;
// "" for none.
func (b *bundle) healthCheck() (command string, timeout time.Duration, err error) {
	text := b.annotation(HealthCheckAnnotation)
	if text == "" {
		return "", 0, nil
	}
	var check HealthCheck
	if err := json.Unmarshal([]byte(text), &check); err != nil || len(check.Args) == 0 || check.Timeout <= 0 {
		return "", 0, fmt.Errorf("%s %q is none: %w", HealthCheckAnnotation, text, err)
	}
	spec := *b.spec.Process
	spec.Args, spec.Terminal = check.Args, false
	raw, err := json.Marshal(spec)
	if err != nil {
		return "", 0, err
	}
	file := func(kind string) string { return filepath.Join(healthDir, "healthcheck"+kind) }
	process, pid, script := file(".json"), file(".pid"), file("")
	if err := os.WriteFile(process, raw, 0o600); err != nil {
		return "", 0, err
	}
	run := crun("exec", "--process", process, "--pid-file", pid, containerName)
	text = alone(strings.Join(run.Args, " "), pid) + "\n"
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		return "", 0, err
	}
	return "sh " + script, check.Timeout, nil
}

// alone makes a command kill what is left of its last run, if that was killed at its timeout. A
// program that a runtime ran in a container goes on in a session of its own when the runtime ends.
// The runtime writes the program's process id to a file.
func alone(command, pidFile string) string {
	kill := "p=$(cat %[1]s 2>/dev/null) && { kill -9 -$p || kill -9 $p; } 2>/dev/null"
	return fmt.Sprintf(kill+"; rm -f %[1]s; %[2]s; s=$?; rm -f %[1]s; exit $s", pidFile, command)
}

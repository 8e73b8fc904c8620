package process

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Controllers returns the group (cgroup version 2) below which this program can make groups, and the
// controllers that those can have.
func Controllers() (dir string, controllers []string, err error) {
	hierarchies, err := findHierarchies(2)
	if err != nil {
		return "", nil, err
	}
	dir = delegated(hierarchies[0].mount)
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return "", nil, fmt.Errorf("find controllers: %w", err)
	}
	return dir, strings.Fields(string(b)), nil
}

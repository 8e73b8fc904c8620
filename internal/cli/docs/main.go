// This program writes the command-line reference: docs/cli as Markdown, docs/man as man pages.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra/doc"

	"drafter/internal/cli"
)

func main() {
	if err := run("docs/cli", "docs/man"); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

func run(markdown, man string) error {
	root := cli.Root(os.Stderr)
	root.DisableAutoGenTag = true
	for _, dir := range []string{markdown, man} {
		// Emptied first, so that a command that is gone takes its page along.
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := doc.GenMarkdownTree(root, markdown); err != nil {
		return err
	}
	epoch := time.Unix(0, 0).UTC()
	return doc.GenManTree(root, &doc.GenManHeader{Title: "DRAFTER", Section: "1", Source: "Drafter", Manual: "Drafter", Date: &epoch}, man)
}

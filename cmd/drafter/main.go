// drafter packages, starts, clones and live-migrates virtual machines. Called as drafter-runner,
// drafter-nat, … it is that command.
package main

import (
	"os"

	"drafter/internal/cli"
)

func main() { os.Exit(cli.Main(os.Args)) }

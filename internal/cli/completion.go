package cli

import (
	"fmt"

	"github.com/spf13/cobra"
)

// values completes a flag with its values.
func values(cmd *cobra.Command, flag string, list ...string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(list, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // there is no such flag, or it was completed before
	}
}

func newCompletion() *cobra.Command {
	return &cobra.Command{
		Use: "completion SHELL", Short: "Write a script that lets a shell complete commands",
		Long: `Writes a script for bash, zsh or fish. With it, the Tab key completes commands and flags, and the
names of VMs, images and packages, for which it asks the daemon.
` + exitCodeHelp,
		Example: `  source <(drafter completion bash)                                      # in this shell
  drafter completion bash > /etc/bash_completion.d/drafter               # in all; needs bash-completion
  drafter completion zsh > "${fpath[1]}/_drafter"
  drafter completion fish > ~/.config/fish/completions/drafter.fish`,
		Args: oneArg("shell"), ValidArgs: []string{"bash", "zsh", "fish"},
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(out, true)
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			}
			return &usageError{fmt.Errorf("shell %q is not known; choose bash, zsh or fish", args[0])}
		},
	}
}

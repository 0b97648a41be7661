package ctl

import (
	"strings"

	"github.com/spf13/cobra"

	"kuma/internal/errs"
)

func (a *app) completionCommand() *cobra.Command {
	shells := []string{"bash", "fish", "zsh"}
	return &cobra.Command{
		Use:       "completion bash|fish|zsh",
		Short:     "Print a script that completes kumactl's commands in a shell",
		Example:   "  source <(kumactl completion bash)\n  kumactl completion zsh > \"${fpath[1]}/_kumactl\"\n  kumactl completion fish | source",
		Args:      cobra.ExactArgs(1),
		ValidArgs: shells,
		RunE: func(c *cobra.Command, args []string) error {
			root := c.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.stdout, true)
			case "fish":
				return root.GenFishCompletion(a.stdout, true)
			case "zsh":
				return root.GenZshCompletion(a.stdout)
			}
			return errs.New(errs.Invalid, "unknown shell %q: must be %s", args[0], strings.Join(shells, ", "))
		},
	}
}

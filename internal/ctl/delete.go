package ctl

import (
	"context"
	"net/http"

	"github.com/spf13/cobra"

	"kuma/internal/errs"
)

func (a *app) deleteCommand() *cobra.Command {
	var meshName string
	c := &cobra.Command{
		Use:               "delete TYPE NAME",
		Short:             "Delete a resource",
		Example:           "  kumactl delete meshtimeout slow --mesh default",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeArgs(true),
		RunE: func(c *cobra.Command, args []string) error {
			return a.delete(c.Context(), args[0], args[1], meshName)
		},
	}
	c.Flags().StringVarP(&meshName, "mesh", "m", "", `mesh of the resource (default the context's, or "default")`)
	return c
}

func (a *app) delete(ctx context.Context, word, name, meshName string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	k, err := c.kind(ctx, word)
	if err != nil {
		return err
	}
	if name == "" {
		return errs.New(errs.Invalid, "the name must not be empty")
	}
	if k.ReadOnly {
		return errs.New(errs.NotAllowed, "%s is read-only: the system itself writes it, so it can't be deleted", k.Name)
	}
	c.greet(ctx)
	if _, _, err = c.do(ctx, http.MethodDelete, k.path(c.meshOf(meshName), name), nil, nil); err != nil {
		if p := notFound(err); p != nil && p.routed() {
			return errs.New(errs.NotFound, "there is no %s with name %q", k.Name, name)
		}
		return c.explain(err, k)
	}
	return a.print("deleted %s %q\n", k.Name, name)
}

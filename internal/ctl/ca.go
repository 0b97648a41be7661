package ctl

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kuma/internal/errs"
)

// rotationPoll is how often the control plane is asked who has acknowledged.
const rotationPoll = 500 * time.Millisecond

func (a *app) caCommand() *cobra.Command {
	return group("ca", "Manage the control plane's own authority", group("rotate", "Replace an authority", a.rotateCommand()))
}

// rotation is what GET /ca/control-plane answers.
type rotation struct {
	Step, Next, File, Note string
	Since                  time.Time
	Automatic              bool
	RetireAfter            *time.Time
	Settles, Held          *time.Time
	Anchors                []struct {
		Role, Subject, Serial string
		NotBefore, NotAfter   time.Time
	}
	Acknowledged, Pending []rotationProxy
	// CutOff are whom the step that was asked for has cut off.
	CutOff []rotationProxy
}

type rotationProxy struct {
	Mesh, Name, Reason string
	Link               bool
}

// waits are those whose acknowledgement the switch waits for.
func (r rotation) waits() []rotationProxy {
	return slices.DeleteFunc(slices.Clone(r.Pending), func(p rotationProxy) bool { return !p.Link })
}

func (a *app) rotateCommand() *cobra.Command {
	var step, output string
	var abort, force, status bool
	var timeout time.Duration
	steps := []string{"prepare", "distribute", "switch", "retire", "next"}
	c := &cobra.Command{
		Use:   "control-plane",
		Short: "Replace the authority that signs the control plane's own certificates, without anybody losing trust",
		Long: `Replace the authority that signs the control plane's own certificates, without
anybody losing trust. For administrators.

Without --step all steps up to the switch are taken, each when it may be:

  prepare     makes the next authority, and signs it by the present one as well;
              kuma-cp.crt then holds both: give it to kumactl, Prometheus and
              whoever else has a copy
  distribute  sends both authorities to the proxies, over their links
  switch      has the control plane show a certificate of the next authority; who
              knows only the present one verifies it still. This waits until all
              proxies with a link have acknowledged both authorities;
              after a start of the control plane also until those that were here
              before have had a minute to come back
  retire      forgets the old authority: who knows nothing else no longer trusts
              the control plane. It happens by itself 90 days after the switch,
              when all proxies have acknowledged the new one; proxies without a
              link can't, and must be started anew. Ask for it with --step retire
              to have it earlier: proxies that are off meanwhile, and copies of
              kuma-cp.crt that were not renewed, then need the new kuma-cp.crt

The rotation can be interrupted anywhere, and the same command goes on where it
stopped. Until it is retired, --abort restores the old authority.`,
		Example: "  kumactl ca rotate control-plane\n  kumactl ca rotate control-plane --status\n  kumactl ca rotate control-plane --step retire\n  kumactl ca rotate control-plane --abort",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			switch {
			case step != "" && !slices.Contains(steps, step):
				return errs.New(errs.Invalid, "--step %q is not a step of the rotation%s", step, suggestion(step, steps))
			case timeout < 0:
				return errs.New(errs.Invalid, "--timeout must not be negative")
			case output != "table" && !status:
				return errs.New(errs.Invalid, "--output needs --status")
			}
			return a.rotate(c.Context(), rotateOptions{step, output, abort, force, status, timeout})
		},
	}
	f := c.Flags()
	f.StringVar(&step, "step", "", "take this step and no other: "+strings.Join(steps, ", "))
	choices(c, "step", steps...)
	f.BoolVar(&abort, "abort", false, "go back to where the rotation began")
	f.BoolVar(&force, "force", false, "do not wait for proxies, and retire the old authority though some have no other; they can't connect anew until they are given the new one")
	f.BoolVar(&status, "status", false, "only show where the rotation is, and who has not acknowledged it")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "longest time to wait for all proxies to acknowledge")
	f.StringVarP(&output, "output", "o", "table", "with --status: table, yaml or json")
	choices(c, "output", "table", "yaml", "json")
	c.MarkFlagsMutuallyExclusive("step", "abort", "status")
	c.MarkFlagsMutuallyExclusive("force", "abort", "status")
	return c
}

type rotateOptions struct {
	step, output         string
	abort, force, status bool
	timeout              time.Duration
}

func (a *app) rotate(ctx context.Context, o rotateOptions) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	c.greet(ctx)
	if o.status {
		return a.showRotation(ctx, c, o.output)
	}
	if o.abort {
		r, err := c.step(ctx, "abort", false)
		if err != nil {
			return err
		}
		return a.print("aborted: the control plane's authority is the old one again (%s); give %s to clients\n%s", r.Anchors[0].Subject, r.File, r.afterwards())
	}
	if o.step != "" {
		r, err := c.step(ctx, o.step, o.force)
		if err != nil {
			return err
		}
		return a.tookStep(r)
	}
	return a.rotateAll(ctx, c, o)
}

// step asks for one step.
func (c *client) step(ctx context.Context, step string, force bool) (rotation, error) {
	var r rotation
	body, err := json.Marshal(map[string]any{"step": step, "force": force})
	if err != nil {
		return r, fmt.Errorf("write the request: %w", err)
	}
	_, answer, err := c.do(ctx, http.MethodPost, "/ca/control-plane/rotation", nil, body)
	if err != nil {
		return r, err
	}
	return r, readRotation(answer, &r)
}

func (c *client) rotation(ctx context.Context) (r rotation, answer []byte, err error) {
	_, answer, err = c.do(ctx, http.MethodGet, "/ca/control-plane", nil, nil)
	if err != nil {
		return r, nil, err
	}
	return r, answer, readRotation(answer, &r)
}

func readRotation(answer []byte, r *rotation) error {
	if err := json.Unmarshal(answer, r); err != nil || r.Step == "" || len(r.Anchors) == 0 {
		return errs.New(errs.Invalid, "the control plane's answer about its authority is not the JSON that was expected")
	}
	return nil
}

// tookStep tells what a step has brought.
func (a *app) tookStep(r rotation) error {
	last := r.Anchors[len(r.Anchors)-1]
	switch r.Step {
	case "prepared":
		return a.print("prepared: the next authority is %s (serial %s, until %s); %s holds both: give it to clients\n%s", last.Subject, last.Serial, last.NotAfter.UTC().Format(time.DateOnly), r.File, r.note())
	case "distributed":
		return a.print("distributed: both authorities are being sent to %s\n", counted(len(r.Acknowledged)+len(r.Pending), "proxy", "proxies"))
	case "switched":
		if len(r.CutOff) > 0 {
			return a.print("switched: the control plane shows a certificate of %s\n%s%s", last.Subject, r.cutOff(), r.afterwards())
		}
		return a.print("switched: the control plane shows a certificate of %s; who knows only the old authority verifies it still\n%s", last.Subject, r.afterwards())
	}
	return a.print("retired: the control plane's authority is %s alone; %s holds it: give it to clients\n%s", last.Subject, r.File, r.cutOff())
}

// cutOff names the proxies that a step has cut off.
func (r rotation) cutOff() string {
	if len(r.CutOff) == 0 {
		return ""
	}
	return fmt.Sprintf("cut off: %s can't connect anew until given the new %s: %s\n", counted(len(r.CutOff), "proxy", "proxies"), filepath.Base(r.File), listProxies(r.CutOff, 20))
}

// note is the control plane's note on a line of its own.
func (r rotation) note() string {
	if r.Note == "" {
		return ""
	}
	return r.Note + "\n"
}

// afterwards tells when and how the old authority is retired.
func (r rotation) afterwards() string {
	var b strings.Builder
	b.WriteString(r.note())
	if r.Held != nil {
		fmt.Fprintf(&b, "it ends at %s: unless you rotate it before, a rotation begins by itself after %s\n", r.Anchors[0].NotAfter.UTC().Format(time.DateOnly), r.Held.UTC().Format(time.DateOnly))
	}
	if r.RetireAfter != nil {
		fmt.Fprintf(&b, "the old authority is retired by itself after %s, when all proxies have acknowledged the new one; to have it now: kumactl ca rotate control-plane --step retire\n", r.RetireAfter.UTC().Format(time.DateOnly))
	}
	if len(r.Pending) > 0 {
		fmt.Fprintf(&b, "not yet acknowledged by %s\n", listProxies(r.Pending, 10))
	}
	return b.String()
}

// listProxies names proxies, so many at most, with their reasons.
func listProxies(proxies []rotationProxy, most int) string {
	var out []string
	for _, p := range proxies[:min(len(proxies), most)] {
		out = append(out, fmt.Sprintf("%s in mesh %s (%s)", p.Name, p.Mesh, p.Reason))
	}
	if more := len(proxies) - len(out); more > 0 {
		out = append(out, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(out, "; ")
}

// rotateAll takes all steps up to the switch; and the last one, where its time
// has come.
func (a *app) rotateAll(ctx context.Context, c *client, o rotateOptions) error {
	r, _, err := c.rotation(ctx)
	if err != nil {
		return err
	}
	if r.Step != "steady" {
		if err := a.print("the rotation is %s since %s, going on\n", r.Step, r.Since.UTC().Format(time.RFC3339)); err != nil {
			return err
		}
	}
	if r.Step == "switched" {
		return a.finish(ctx, c, r, o)
	}
	for r.Step != "switched" {
		if r.Step == "distributed" && !o.force {
			if err := a.awaitProxies(ctx, c, o.timeout); err != nil {
				return err
			}
		}
		if r, err = c.step(ctx, r.Next, o.force); err != nil {
			return err
		}
		if err := a.tookStep(r); err != nil {
			return err
		}
	}
	return nil
}

// finish retires the old authority where its time has come, and else says when
// that will be.
func (a *app) finish(ctx context.Context, c *client, r rotation, o rotateOptions) error {
	if r.RetireAfter == nil || a.now().Before(*r.RetireAfter) {
		return a.print("%s", r.afterwards())
	}
	r, err := c.step(ctx, "retire", o.force)
	if err != nil {
		return err
	}
	return a.tookStep(r)
}

// awaitProxies returns when all proxies with a link have acknowledged.
func (a *app) awaitProxies(ctx context.Context, c *client, timeout time.Duration) error {
	deadline := a.now().Add(timeout)
	told, toldSettling := 0, false
	for {
		r, _, err := c.rotation(ctx)
		if err != nil {
			return err
		}
		waits := r.waits()
		settling := r.Settles != nil
		if settling && !toldSettling {
			toldSettling = true
			if err := a.print("the control plane was started a moment ago: proxies have until %s to come back\n", r.Settles.UTC().Format(time.RFC3339)); err != nil {
				return err
			}
		}
		if len(waits) == 0 && !settling {
			return a.print("acknowledged by all that have a link: %s\n", counted(len(r.Acknowledged), "proxy", "proxies"))
		}
		if len(waits) != told {
			told = len(waits)
			if told == 0 {
				continue
			}
			if err := a.print("waiting for %s to acknowledge: %s\n", counted(told, "proxy", "proxies"), listProxies(waits, 10)); err != nil {
				return err
			}
		}
		if a.now().After(deadline) && settling {
			return errs.New(errs.Unavailable, "the control plane waits until %s for proxies to come back, longer than %s; run the same command again to go on waiting, with --force to go on without them, or with --abort to go back", r.Settles.UTC().Format(time.RFC3339), timeout)
		}
		if a.now().After(deadline) {
			return errs.New(errs.Unavailable, "not acknowledged within %s by %s: %s; run the same command again to go on waiting, with --force to go on without them, or with --abort to go back", timeout, counted(told, "proxy", "proxies"), listProxies(waits, 10))
		}
		select {
		case <-time.After(rotationPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *app) showRotation(ctx context.Context, c *client, output string) error {
	r, answer, err := c.rotation(ctx)
	if err != nil {
		return err
	}
	if output != "table" {
		return a.writeAs(output, answer)
	}
	step := fmt.Sprintf("%s, since %s", r.Step, r.Since.UTC().Format(time.RFC3339))
	if r.Step == "steady" { // since when is not kept
		step = "steady: nothing is being rotated"
	}
	settling := ""
	if r.Settles != nil {
		settling = fmt.Sprintf("the control plane was started a moment ago: proxies have until %s to come back, and neither switch nor retire are taken before\n", r.Settles.UTC().Format(time.RFC3339))
	}
	if err := a.print("%s; next: %s\n%s%s\n", step, r.Next, settling, r.afterwards()); err != nil {
		return err
	}
	rows := [][]string{{"AUTHORITY", "SUBJECT", "SERIAL", "EXPIRATION"}}
	for _, x := range r.Anchors {
		rows = append(rows, []string{x.Role, x.Subject, x.Serial, x.NotAfter.UTC().Format(time.DateTime)})
	}
	if err := writeTable(a.stdout, rows); err != nil {
		return err
	}
	rows = [][]string{{"MESH", "PROXY", "ACKNOWLEDGED", "REASON"}}
	for _, p := range r.Acknowledged {
		rows = append(rows, []string{p.Mesh, p.Name, "yes", "-"})
	}
	for _, p := range r.Pending {
		rows = append(rows, []string{p.Mesh, p.Name, "no", p.Reason})
	}
	if len(rows) == 1 {
		return a.print("\nno proxies are connected\n")
	}
	if err := a.print("\n"); err != nil {
		return err
	}
	return writeTable(a.stdout, rows)
}

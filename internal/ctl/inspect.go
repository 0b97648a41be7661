package ctl

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kuma/internal/errs"
	"kuma/internal/mesh"
)

// maxPages bounds how many pages of a list are followed.
const maxPages = 1000

func (a *app) inspectCommand() *cobra.Command {
	return group("inspect", "Show how proxies are doing",
		a.inspectDataplanesCommand(),
		a.inspectDataplaneCommand(),
	)
}

func (a *app) inspectDataplanesCommand() *cobra.Command {
	var meshName, output string
	var tagPairs []string
	var gateway, ingress bool
	c := &cobra.Command{
		Use:     "dataplanes",
		Short:   "Show the status of all proxies of a mesh",
		Example: "  kumactl inspect dataplanes --tag kuma.io/service=web",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			q := url.Values{}
			for _, p := range tagPairs {
				k, v, ok := strings.Cut(p, "=")
				if !ok || k == "" {
					return errs.New(errs.Invalid, "--tag %q: must be KEY=VALUE, such as kuma.io/service=web", p)
				}
				q.Add("tag", k+":"+v)
			}
			if gateway {
				q.Set("gateway", "true")
			}
			if ingress {
				q.Set("ingress", "true")
			}
			return a.inspectDataplanes(c.Context(), meshName, output, q)
		},
	}
	f := c.Flags()
	f.StringVarP(&meshName, "mesh", "m", "", `mesh of the proxies (default the context's, or "default")`)
	f.StringVarP(&output, "output", "o", "table", "output format: table, yaml or json")
	choices(c, "output", "table", "yaml", "json")
	f.StringArrayVar(&tagPairs, "tag", nil, "show only proxies with the tag KEY=VALUE; may be repeated")
	f.BoolVar(&gateway, "gateway", false, "show only gateways")
	f.BoolVar(&ingress, "ingress", false, "show only zone ingresses")
	return c
}

// overview is a proxy with what is known of it at run time.
type overview struct {
	meta
	Dataplane mesh.DataplaneSpec         `json:"dataplane"`
	Insight   *mesh.DataplaneInsightSpec `json:"dataplaneInsight"`
}

func (a *app) inspectDataplanes(ctx context.Context, meshName, output string, query url.Values) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	c.greet(ctx)
	meshName = c.meshOf(meshName)
	items, err := c.all(ctx, path("meshes", meshName, "dataplanes", "_overview"), query)
	if err != nil {
		if p := notFound(err); p != nil && p.routed() {
			return errs.New(errs.NotFound, "there is no mesh with name %q (kumactl get meshes lists them)", meshName)
		}
		return err
	}
	if output != "table" {
		body, err := json.Marshal(map[string]any{"items": items, "next": nil, "total": len(items)})
		if err != nil {
			return fmt.Errorf("write the result: %w", err)
		}
		return a.writeAs(output, body)
	}
	rows := [][]string{{
		"MESH", "NAME", "TAGS", "STATUS", "LAST CONNECTED AGO", "LAST UPDATED AGO", "TOTAL UPDATES", "TOTAL ERRORS",
		"CERT REGENERATED AGO", "CERT EXPIRATION", "CERT REGENERATIONS", "CERT BACKEND", "SUPPORTED CERT BACKENDS",
		"KUMA-DP VERSION", "ENVOY VERSION", "DEPENDENCIES VERSIONS", "NOTES",
	}}
	for _, raw := range items {
		var o overview
		if err := json.Unmarshal(raw, &o); err != nil {
			return errs.New(errs.Invalid, "the overview of a proxy is not the JSON that was expected: %w", err)
		}
		rows = append(rows, o.row(a.now()))
	}
	return writeTable(a.stdout, rows)
}

// all follows a list to its end.
func (c *client) all(ctx context.Context, path string, query url.Values) ([]json.RawMessage, error) {
	items := []json.RawMessage{}
	query.Set("size", "1000")
	for range maxPages {
		var p page
		if err := c.json(ctx, path, query, &p); err != nil {
			return nil, err
		}
		items = append(items, p.Items...)
		next := p.offset()
		if next == "" || next == query.Get("offset") {
			return items, nil
		}
		query.Set("offset", next)
	}
	return nil, errs.New(errs.Invalid, "the list has more than %d pages", maxPages)
}

// row is a proxy's line in the table.
func (o overview) row(now time.Time) []string {
	insight := o.Insight
	if insight == nil {
		insight = &mesh.DataplaneInsightSpec{}
	}
	var connected, updated *time.Time
	var sent, refused uint64
	kumaDP, envoy := "unknown", "unknown"
	dependencies := "-"
	for i := range insight.Subscriptions {
		s := &insight.Subscriptions[i]
		connected, updated = latest(connected, s.ConnectTime), latest(updated, s.Status.LastUpdateTime)
		sent += uint64(s.Status.Total.Sent)
		refused += uint64(s.Status.Total.Rejected)
		if v := s.Version; v != nil {
			if v.KumaDP != nil && v.KumaDP.Version != "" {
				kumaDP = v.KumaDP.Version
			}
			if v.Envoy != nil && v.Envoy.Version != "" {
				envoy = v.Envoy.Version
			}
			if len(v.Dependencies) > 0 {
				var all []string
				for _, k := range sortedKeys(v.Dependencies) {
					all = append(all, k+": "+v.Dependencies[k])
				}
				dependencies = strings.Join(all, ", ")
			}
		}
	}
	status, notes := o.status(insight)
	cert := []string{"never", "-", "0", "-", "-"}
	if m := insight.MTLS; m != nil {
		cert[0] = sinceP(m.LastCertificateRegeneration, now)
		if m.CertificateExpirationTime != nil {
			cert[1] = m.CertificateExpirationTime.UTC().Format(time.DateTime)
		}
		cert[2] = strconv.Itoa(int(m.CertificateRegenerations))
		if m.IssuedBackend != "" {
			cert[3] = m.IssuedBackend
		}
		if len(m.SupportedBackends) > 0 {
			cert[4] = strings.Join(m.SupportedBackends, ",")
		}
	}
	row := []string{
		o.Mesh, o.Name, tags(&o.Dataplane), status, sinceP(connected, now), sinceP(updated, now),
		strconv.FormatUint(sent, 10), strconv.FormatUint(refused, 10),
	}
	return append(append(row, cert...), kumaDP, envoy, dependencies, strings.Join(notes, "; "))
}

func latest(a, b *time.Time) *time.Time {
	if a == nil || b != nil && b.After(*a) {
		return b
	}
	return a
}

// status follows the contract's rule: a gateway is online while its stream is;
// another proxy is offline without stream or without ready inbound, and
// partially degraded while some are not ready.
func (o overview) status(insight *mesh.DataplaneInsightSpec) (status string, notes []string) {
	online := insight.Online()
	ready, total := 0, 0
	gateway := false
	if n := o.Dataplane.Networking; n != nil {
		gateway = n.Gateway != nil
		for i := range n.Inbound {
			in := &n.Inbound[i]
			if in.State == mesh.Ignored {
				continue
			}
			total++
			if in.IsReady() {
				ready++
				continue
			}
			notes = append(notes, fmt.Sprintf("inbound[port=%d,svc=%s] is not ready", in.Port, in.Service()))
		}
	}
	if r := insight.Readiness; online && r != nil && !r.Ready && r.Reason != "" {
		notes = append(notes, "proxy is not ready: "+r.Reason)
	}
	for _, r := range insight.Rejections {
		notes = append(notes, strings.TrimSpace("Envoy refused "+r.Resource)+": "+r.Message)
	}
	switch {
	case gateway && online:
		return "Online", notes
	case !online || ready == 0:
		return "Offline", notes
	case ready < total:
		return "Partially degraded", notes
	}
	return "Online", notes
}

func (a *app) inspectDataplaneCommand() *cobra.Command {
	var meshName, what string
	var include []string
	var shadow, eds bool
	types := []string{"policies", "config-dump", "stats", "clusters", "config"}
	c := &cobra.Command{
		Use:   "dataplane NAME",
		Short: "Show one proxy: its policies, what Envoy runs with, or what the control plane would send",
		Long: "Show one proxy.\n\n  policies     which policies apply to which of its parts\n  config-dump  the configuration that Envoy runs with\n" +
			"  stats        Envoy's statistics\n  clusters     Envoy's view of the endpoints\n  config       what the control plane sends, with --shadow as if policies in shadow mode were in effect",
		Example: "  kumactl inspect dataplane web-1\n  kumactl inspect dataplane web-1 --type config --shadow --include diff",
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if !slices.Contains(types, what) {
				return errs.New(errs.Invalid, "unknown type %q: must be %s", what, strings.Join(types, ", "))
			}
			for _, i := range include {
				if i != "diff" {
					return errs.New(errs.Invalid, "--include %q: must be diff", i)
				}
			}
			if what != "config" && (shadow || len(include) > 0) {
				return errs.New(errs.Invalid, "--shadow and --include need --type config")
			}
			if what != "config-dump" && eds {
				return errs.New(errs.Invalid, "--include-eds needs --type config-dump")
			}
			q := url.Values{}
			if shadow {
				q.Set("shadow", "true")
			}
			if len(include) > 0 {
				q.Set("include", strings.Join(include, ","))
			}
			if eds {
				q.Set("include_eds", "true")
			}
			return a.inspectDataplane(c.Context(), args[0], meshName, what, q)
		},
	}
	f := c.Flags()
	f.StringVarP(&meshName, "mesh", "m", "", `mesh of the proxy (default the context's, or "default")`)
	f.StringVar(&what, "type", "policies", "what to show: "+strings.Join(types, ", "))
	choices(c, "type", types...)
	f.BoolVar(&shadow, "shadow", false, "with --type config: let policies in shadow mode take effect")
	f.StringSliceVar(&include, "include", nil, "with --type config: diff adds what differs from the present configuration")
	f.BoolVar(&eds, "include-eds", false, "with --type config-dump: add endpoints")
	return c
}

func (a *app) inspectDataplane(ctx context.Context, name, meshName, what string, query url.Values) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	c.greet(ctx)
	meshName = c.meshOf(meshName)
	last := map[string]string{"policies": "policies", "config-dump": "xds", "stats": "stats", "clusters": "clusters", "config": "_config"}[what]
	_, body, err := c.do(ctx, http.MethodGet, path("meshes", meshName, "dataplanes", name, last), query, nil)
	if err != nil {
		p := notFound(err)
		switch {
		case p != nil && !p.routed():
			return errs.New(errs.NotFound, "the control plane at %s can't show the %s of a dataplane", c.base, what)
		case p != nil && p.Detail == "Not found":
			return errs.New(errs.NotFound, "there is no Dataplane with name %q in mesh %q (kumactl get dataplanes lists them)", name, meshName)
		}
		return err
	}
	switch what {
	case "policies":
		return a.printPolicies(body)
	case "config-dump", "config":
		return a.writeAs("json", body)
	}
	if len(body) > 0 && body[len(body)-1] != '\n' {
		body = append(body, '\n')
	}
	return a.write(body)
}

// printPolicies writes a tree: what part of the proxy, which kinds of
// policies, which policies.
func (a *app) printPolicies(body []byte) error {
	var answer struct {
		Items []struct {
			Type     string            `json:"type"`
			Name     string            `json:"name"`
			Service  string            `json:"service"`
			Policies map[string][]meta `json:"matchedPolicies"`
		} `json:"items"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return errs.New(errs.Invalid, "the list of policies is not the JSON that was expected: %w", err)
	}
	var b strings.Builder
	for _, i := range answer.Items {
		switch {
		case strings.EqualFold(i.Type, "dataplane"):
			b.WriteString("DATAPLANE:\n")
		case i.Name == "":
			fmt.Fprintf(&b, "%s %s:\n", strings.ToUpper(i.Type), printable(i.Service))
		default:
			fmt.Fprintf(&b, "%s %s(%s):\n", strings.ToUpper(i.Type), printable(i.Name), printable(i.Service))
		}
		for _, kind := range sortedKeys(i.Policies) {
			fmt.Fprintf(&b, "  %s\n", printable(kind))
			for _, p := range i.Policies[kind] {
				fmt.Fprintf(&b, "    %s\n", printable(p.Name))
			}
		}
	}
	return a.write([]byte(b.String()))
}

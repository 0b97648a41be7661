package cp

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	// Types that configurations hold packed and empty, so that they can be shown
	// as JSON.
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/grpc_stats/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/formatter/req_without_query/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"kuma/internal/catalog"
	"kuma/internal/envoy"
	"kuma/internal/errs"
	"kuma/internal/link"
	"kuma/internal/mesh"
	"kuma/internal/names"
	"kuma/internal/policy"
	"kuma/internal/proxy"
	"kuma/internal/resource"
	"kuma/internal/rest"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/proto/linkpb"
)

// describe turns what a proxy says of itself into what its configuration
// depends on.
func describe(n *session.Node) proxy.Proxy {
	p := proxy.Proxy{
		Key: mesh.Dataplanes.Key(n.Mesh, n.Name), Link: n.Link, Workdir: n.Workdir, Features: map[string]bool{},
		MetricsCert: n.MetricsCert, MetricsKey: n.MetricsKey,
	}
	for _, f := range n.Features {
		p.Features[f] = true
	}
	if n.Version != nil && n.Version.Envoy != nil {
		p.EnvoyVersion = n.Version.Envoy.Version
	}
	if n.Own && n.Workdir != "" {
		p.AccessLogPath = names.Sockets{Dir: n.Workdir, Proxy: n.Name, Mesh: n.Mesh}.AccessLog()
	}
	return p
}

// generation makes the configurations of streams.
type generation struct {
	generator *proxy.Generator
	admin     *adminChannel
	// tell tells a proxy's streams what is left out.
	tell func(key session.Key, leftOut []string)
	log  *slog.Logger
	// said maps proxies to the issues that were logged last: each is logged once.
	said sync.Map
}

func (g *generation) Generate(pic *state.Picture, n *session.Node) (envoy.Resources, error) {
	p := describe(n)
	p.Admin = g.admin.of(pic, n)
	c, err := g.generator.Generate(pic, p)
	if err != nil {
		return nil, err
	}
	g.report(n.Key, c.Issues)
	return c.Encode()
}

// report logs what had to be left out of a proxy's configuration, and has the
// proxy told.
func (g *generation) report(key session.Key, issues []envoy.Issue) {
	var texts []string
	for _, i := range issues {
		texts = append(texts, fmt.Sprintf("%s (because of %s)", i.Message, i.Resource))
	}
	g.tell(key, texts)
	if len(issues) == 0 {
		g.said.Delete(key)
		return
	}
	now := fmt.Sprint(issues)
	if was, _ := g.said.Swap(key, now); was == now {
		return
	}
	for _, i := range issues {
		g.log.Warn("something is left out of a proxy's configuration", "mesh", key.Mesh, "name", key.Name, "because of", i.Resource.String(), "reason", i.Message)
	}
}

func (g *generation) Affected(pic *state.Picture, n *session.Node, changes []state.Change) bool {
	return g.generator.Affected(pic, proxy.Proxy{Key: mesh.Dataplanes.Key(n.Mesh, n.Name), Link: n.Link}, changes)
}

// Again is when the certificate in a proxy's configuration has to be renewed.
func (g *generation) Again(n *session.Node) time.Time { return g.admin.again(n.Key) }

// inspector asks running proxies: over their links, or, where their kuma-dp
// keeps none, in the contract's way. Who is not connected here is not asked.
type inspector struct {
	links *link.Server
	admin *adminChannel
}

func (i inspector) Inspect(ctx context.Context, meshName, name string, q rest.Inspection) ([]byte, error) {
	key := session.Key{Mesh: meshName, Name: name}
	n := i.admin.streams.Node(key)
	if n != nil && !n.Link {
		return i.admin.ask(ctx, n, adminPath(q))
	}
	page, all := linkpb.Inspect_CONFIG_DUMP, q.IncludeEDS
	switch q.What {
	case "stats":
		page, all = linkpb.Inspect_STATS, !q.UsedOnly
	case "clusters":
		page = linkpb.Inspect_CLUSTERS
	}
	body, err := i.links.Inspect(ctx, key, page, all, q.JSON)
	if errs.Is(err, errs.NotFound) {
		// The Dataplane is there; who runs it is not.
		if n != nil {
			return nil, errs.New(errs.Unavailable, "the proxy %q of mesh %q can't be asked: the link of its kuma-dp to this control plane is broken; it comes back by itself, try again", name, meshName)
		}
		return nil, errs.New(errs.Unavailable, "the proxy %q of mesh %q can't be asked: it is not running, or not connected to this control plane", name, meshName)
	}
	return body, err
}

// explainer tells what the control plane makes of its resources.
type explainer struct {
	generator *proxy.Generator
	tracker   *state.Tracker
	sessions  *session.Registry
	admin     *adminChannel
}

// proxy is the proxy as its open stream describes it, or, where it is not
// here, as one of our own kind.
func (e explainer) proxy(pic *state.Picture, meshName, name string) proxy.Proxy {
	if n := e.sessions.Node(session.Key{Mesh: meshName, Name: name}); n != nil {
		p := describe(n)
		p.Admin = e.admin.of(pic, n)
		return p
	}
	return proxy.Proxy{Key: mesh.Dataplanes.Key(meshName, name), Link: true, Workdir: filepath.Join(os.TempDir(), "kuma-dp")}
}

func (e explainer) Config(_ context.Context, meshName, name string, shadow bool) (json.RawMessage, error) {
	pic := e.tracker.Now()
	if shadow {
		pic = unshadowed(pic, meshName)
	}
	c, err := e.generator.Generate(pic, e.proxy(pic, meshName, name))
	if err != nil {
		return nil, err
	}
	all, err := c.Encode()
	if err != nil {
		return nil, err
	}
	out := map[string]map[string]json.RawMessage{}
	for typ, byName := range all {
		out[typ] = map[string]json.RawMessage{}
		for n, p := range byName {
			m, err := p.Body.UnmarshalNew()
			if err != nil {
				return nil, fmt.Errorf("read the configuration of %s: %w", n, err)
			}
			if out[typ][n], err = protojson.Marshal(m); err != nil {
				return nil, fmt.Errorf("write the configuration of %s: %w", n, err)
			}
		}
	}
	return json.Marshal(out)
}

// unshadowed is the picture as it would be if the mesh's policies that are only
// tried out were in effect.
func unshadowed(pic *state.Picture, meshName string) *state.Picture {
	m := pic.Mesh(meshName)
	if m == nil {
		return pic
	}
	var live []*resource.Resource
	for _, k := range catalog.Kinds() {
		if k.Policy == nil {
			continue
		}
		for _, r := range m.List(k.Name) {
			if r.Labels[mesh.LabelEffect] == "shadow" {
				c := *r
				c.Labels = maps.Clone(r.Labels)
				delete(c.Labels, mesh.LabelEffect)
				live = append(live, &c)
			}
		}
	}
	return pic.As(live...)
}

func (e explainer) applied(meshName, name string) ([]policy.Applied, mesh.Dataplane, error) {
	pic := e.tracker.Now()
	list, err := e.generator.Explain(pic, e.proxy(pic, meshName, name))
	if err != nil {
		return nil, mesh.Dataplane{}, err
	}
	d, _ := pic.Mesh(meshName).Dataplane(name)
	return list, d, nil
}

func (e explainer) Attachments(_ context.Context, meshName, name string) ([]rest.Attachment, error) {
	list, d, err := e.applied(meshName, name)
	if err != nil {
		return nil, err
	}
	var out []rest.Attachment
	at := map[[2]string]int{}
	add := func(a rest.Attachment, origins []policy.Origin) {
		key := [2]string{a.Type, a.Name}
		i, ok := at[key]
		if !ok {
			i = len(out)
			at[key] = i
			out = append(out, a)
		}
		for _, o := range origins {
			if !contains(out[i].Policies, o.Resource) {
				out[i].Policies = append(out[i].Policies, o.Resource)
			}
		}
	}
	for _, a := range list {
		if a.Proxy != nil {
			add(rest.Attachment{Type: "dataplane"}, a.Proxy.Origins)
		}
		for _, in := range a.Inbounds {
			add(rest.Attachment{Type: "inbound", Name: inboundName(d, in.Inbound), Service: in.Inbound.Service}, in.Origins)
		}
		for _, o := range a.Outbounds {
			service := o.Outbound.To.Service
			if service == "" {
				service = o.Outbound.To.MeshService
			}
			add(rest.Attachment{Type: "outbound", Name: fmt.Sprintf("%s:%d", o.Outbound.Address, o.Outbound.Port), Service: service}, o.Origins)
		}
	}
	return out, nil
}

// inboundName is "<address>:<port>:<workload port>".
func inboundName(d mesh.Dataplane, in *envoy.Inbound) string {
	n := d.Spec.Networking
	for i := range n.Inbound {
		if n.Inbound[i].Port == in.Port {
			_, port := n.Inbound[i].Workload(n)
			return fmt.Sprintf("%s:%d:%d", n.Inbound[i].ListenAddress(n), in.Port, port)
		}
	}
	return fmt.Sprint(in.Port)
}

func contains(list []*resource.Resource, r *resource.Resource) bool {
	for _, o := range list {
		if o.Key() == r.Key() {
			return true
		}
	}
	return false
}

func (e explainer) Rules(_ context.Context, meshName, name string) ([]rest.RuleSet, error) {
	list, d, err := e.applied(meshName, name)
	if err != nil {
		return nil, err
	}
	type origin struct {
		Type string `json:"type"`
		Mesh string `json:"mesh"`
		Name string `json:"name"`
	}
	type conf struct {
		Conf    any      `json:"conf"`
		Origins []origin `json:"origin"`
	}
	origins := func(os []policy.Origin) (out []origin) {
		for _, o := range os {
			out = append(out, origin{o.Resource.Kind.Name, o.Resource.Mesh, o.Resource.Name})
		}
		return out
	}
	type place struct {
		Name    string `json:"name"`
		Port    uint32 `json:"port"`
		Service string `json:"service,omitempty"`
	}
	var out []rest.RuleSet
	for _, a := range list {
		set := rest.RuleSet{Type: a.Kind.Name}
		if a.Proxy != nil {
			set.ProxyRule = conf{a.Proxy.Conf, origins(a.Proxy.Origins)}
		}
		for _, in := range a.Inbounds {
			set.InboundRules = append(set.InboundRules, struct {
				Inbound place  `json:"inbound"`
				Match   any    `json:"match,omitempty"`
				From    any    `json:"from,omitempty"`
				Rules   []conf `json:"rules"`
			}{place{inboundName(d, in.Inbound), in.Inbound.Port, in.Inbound.Service}, present(in.Match), present(in.From), []conf{{in.Conf, origins(in.Origins)}}})
		}
		for _, o := range a.Outbounds {
			to := o.Outbound.To
			if to.MeshService != "" {
				set.ToResourceRules = append(set.ToResourceRules, struct {
					KRI string `json:"kri"`
					conf
				}{to.KRI.String(), conf{o.Conf, origins(o.Origins)}})
				continue
			}
			set.ToRules = append(set.ToRules, struct {
				Matchers []map[string]any `json:"matchers"`
				conf
			}{[]map[string]any{{"key": mesh.TagService, "value": to.Service, "not": false}}, conf{o.Conf, origins(o.Origins)}})
		}
		out = append(out, set)
	}
	return out, nil
}

// present makes a nil pointer a nil value, so that it is left out.
func present[T any](p *T) any {
	if p == nil {
		return nil
	}
	return p
}

func (e explainer) Selected(_ context.Context, p *resource.Resource) ([]*resource.Resource, error) {
	m := e.tracker.Now().Mesh(p.Mesh)
	if m == nil {
		return nil, nil
	}
	var out []*resource.Resource
	for _, r := range m.List(mesh.Dataplanes.Name) {
		d := mesh.Dataplanes.From(r)
		selected := policy.Selects(p, d)
		if p.Kind == mesh.TrafficPermissions.Kind {
			selected = proxy.Permits(mesh.TrafficPermissions.From(p).Spec, d.Spec)
		}
		if selected {
			out = append(out, r)
		}
	}
	return out, nil
}

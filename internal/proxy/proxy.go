// Package proxy makes a proxy's configuration from a picture of the meshes: a
// pure function.
package proxy

import (
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"kuma/internal/envoy"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/policy"
	"kuma/internal/resource"
	"kuma/internal/state"
)

// Proxy is what a configuration depends on besides the picture.
type Proxy struct {
	// Key names the Dataplane.
	Key resource.Key
	// Link says that kuma-dp makes the proxy's keys and serves them itself; else
	// they come by ADS.
	Link bool
	// Features are those that kuma-dp announced, such as "feature-reuse-port".
	Features map[string]bool
	// MetricsCert and MetricsKey are files, where kuma-dp runs, with which Envoy is
	// to serve metrics; empty where kuma-dp names none.
	MetricsCert, MetricsKey string
	// Workdir is kuma-dp's, and EnvoyVersion that of its Envoy, such as "1.40.0".
	Workdir      string
	EnvoyVersion string
	// AccessLogPath is where kuma-dp reads logs; "" means that it does not.
	AccessLogPath string
	// Admin opens Envoy's admin interface to the control plane; nil, and always
	// for a linked proxy, means that it stays closed.
	Admin *Admin
}

// Config is what a Generator needs.
type Config struct {
	// Policies are applied in this order.
	Policies []policy.Policy
	// Zone is this control plane's.
	Zone string
	// Resolve returns the addresses of a host name, without waiting long. It may
	// be nil; then endpoints with host names for addresses are left out, for
	// Envoy takes only IP addresses there.
	Resolve func(host string) []string
	// InternalCIDRs are the networks whose callers Envoy takes for internal; what
	// is no CIDR is left out. The default is the private networks and the control plane's virtual ones.
	InternalCIDRs []string
}

// A Generator makes configurations. Many may be made at once.
type Generator struct {
	cfg Config
	// internal is what all listeners with HTTP share of the configuration.
	internal *hcmv3.HttpConnectionManager_InternalAddressConfig
}

// New makes a generator.
func New(cfg Config) *Generator {
	if cfg.Resolve == nil {
		cfg.Resolve = func(string) []string { return nil }
	}
	if cfg.InternalCIDRs == nil {
		cfg.InternalCIDRs = []string{"10.0.0.0/8", "192.168.0.0/16", "172.16.0.0/12", "fc00::/7", "241.0.0.0/8", "242.0.0.0/8", "243.0.0.0/8"}
	}
	internal := &hcmv3.HttpConnectionManager_InternalAddressConfig{}
	for _, c := range cfg.InternalCIDRs {
		if p, err := netip.ParsePrefix(c); err == nil {
			internal.CidrRanges = append(internal.CidrRanges, &corev3.CidrRange{AddressPrefix: p.Addr().String(), PrefixLen: wrapperspb.UInt32(uint32(p.Bits()))})
		}
	}
	return &Generator{cfg, internal}
}

// work is one generation.
type work struct {
	*Generator
	mesh  *state.Mesh
	dp    mesh.Dataplane
	net   *mesh.Networking
	proxy Proxy
	// backend is the mesh's authority; nil means no mutual TLS.
	backend *mesh.Backend
	out     *envoy.Config
}

// Generate makes the configuration of a proxy. It is the same for the same
// picture and proxy, byte by byte. A policy that can't be applied is left out and
// reported among the Config's issues. Errors: errs.NotFound where there is no
// such mesh or Dataplane.
func (g *Generator) Generate(pic *state.Picture, p Proxy) (*envoy.Config, error) {
	w, err := g.start(pic, p)
	if err != nil {
		return nil, err
	}
	all := g.policies(w.mesh)
	c, failed, err := w.build(all, nil, true)
	if err == nil {
		return c, nil
	}
	// Rare: some policy can't be applied. Find out which, and do without it.
	var except []resource.Key
	var issues []envoy.Issue
	for err != nil {
		if failed == nil {
			return nil, err
		}
		culprits := w.culprits(failed, except)
		if len(culprits) == 0 {
			return nil, err
		}
		for _, r := range culprits {
			except = append(except, r.Key())
			issues = append(issues, envoy.Issue{Resource: r.Key(), Message: "is left out: " + err.Error()})
		}
		c, failed, err = w.build(all, except, false)
	}
	c.Issues = append(c.Issues, issues...)
	return c, nil
}

// start finds the proxy in the picture.
func (g *Generator) start(pic *state.Picture, p Proxy) (*work, error) {
	m := pic.Mesh(p.Key.Mesh)
	if m == nil {
		return nil, errs.New(errs.NotFound, "mesh %q does not exist", p.Key.Mesh)
	}
	d, ok := m.Dataplane(p.Key.Name)
	if !ok {
		return nil, errs.New(errs.NotFound, "dataplane %q does not exist in mesh %q", p.Key.Name, p.Key.Mesh)
	}
	net := d.Spec.Networking
	if net == nil {
		net = &mesh.Networking{}
	}
	return &work{Generator: g, mesh: m, dp: d, net: net, proxy: p, backend: m.Spec.EnabledBackend()}, nil
}

// build makes the configuration and applies policies to it, except some. It
// stops at the first kind that fails. Shared outbounds are sealed.
func (w *work) build(policies []policy.Prepared, except []resource.Key, share bool) (c *envoy.Config, failed policy.Prepared, err error) {
	w.out = &envoy.Config{Mesh: w.mesh.Name}
	w.self()
	w.inbounds()
	w.permissions()
	w.metrics()
	for _, p := range policies {
		if err := p.Apply(w.out, w.dp, except); err != nil {
			return nil, p, err
		}
	}
	if failed, err := w.outbounds(policies, except, share); err != nil {
		return nil, failed, err
	}
	w.trust()
	w.admin()
	return w.out, nil, nil
}

// policies returns the mesh's policies of each kind, in order.
func (g *Generator) policies(m *state.Mesh) []policy.Prepared {
	type key struct{ g *Generator }
	return state.Shared(m, key{g}, func() []policy.Prepared {
		out := make([]policy.Prepared, len(g.cfg.Policies))
		for i, p := range g.cfg.Policies {
			out[i] = p.Prepare(m.List(p.Kind().Name))
		}
		return out
	})
}

// culprits finds out which policies of a kind fail when they are alone. If each
// works alone, all of the kind are left out.
func (w *work) culprits(failed policy.Prepared, except []resource.Key) []*resource.Resource {
	selected := failed.Selected(w.dp)
	var all, out []*resource.Resource
	for _, r := range selected {
		if slices.Contains(except, r.Key()) {
			continue
		}
		all = append(all, r)
		var others []resource.Key
		for _, o := range selected {
			if o.Key() != r.Key() {
				others = append(others, o.Key())
			}
		}
		if _, _, err := w.build([]policy.Prepared{failed}, others, false); err != nil {
			out = append(out, r)
		}
	}
	if len(out) == 0 {
		return all
	}
	return out
}

// trust adds the mesh's trust anchors. A proxy whose anchors are not there yet
// waits for them.
func (w *work) trust() {
	if w.backend == nil {
		return
	}
	var bundle []byte
	for i := range w.mesh.Spec.MTLS.Backends {
		r := w.mesh.Get(mesh.Secrets.Name, mesh.BuiltinCertSecret(w.mesh.Name, w.mesh.Spec.MTLS.Backends[i].Name))
		if r == nil {
			continue
		}
		bundle = append(bundle, mesh.Secrets.From(r).Spec.Data...)
		if n := len(bundle); n > 0 && bundle[n-1] != '\n' {
			bundle = append(bundle, '\n')
		}
	}
	if len(bundle) == 0 {
		w.out.Report(w.mesh.Resource.Key(), "the certificate of backend %q is not there yet; proxies wait for it", w.backend.Name)
		return
	}
	w.out.Secrets = append(w.out.Secrets, envoy.TrustSecret(w.mesh.Name, bundle))
}

// Affected reports whether the changes may concern the proxy's configuration.
// It is cheap, and true where in doubt.
func (g *Generator) Affected(pic *state.Picture, p Proxy, changes []state.Change) bool {
	var d *mesh.Dataplane
	for i := range changes {
		c := &changes[i]
		if c.Key.Mesh == "" {
			if c.Key.Kind == mesh.Meshes.Name && c.Key.Name == p.Key.Mesh {
				return true
			}
			if !p.Link && c.Key == mesh.GlobalSecrets.Key("", mesh.EnvoyAdminCA) {
				return true
			}
			continue
		}
		if c.Key.Mesh != p.Key.Mesh {
			continue
		}
		if d == nil {
			m := pic.Mesh(p.Key.Mesh)
			if m == nil {
				return true
			}
			now, ok := m.Dataplane(p.Key.Name)
			if !ok || now.Spec.Networking == nil {
				return true
			}
			d = &now
		}
		if g.concerns(pic, *d, c) {
			return true
		}
	}
	return false
}

// concerns reports whether one change within the mesh may concern the proxy.
func (g *Generator) concerns(pic *state.Picture, d mesh.Dataplane, c *state.Change) bool {
	either := func(f func(*resource.Resource) bool) bool {
		return c.Old != nil && f(c.Old) || c.New != nil && f(c.New)
	}
	switch c.Key.Kind {
	case mesh.Dataplanes.Name:
		return c.Key.Name == d.Name || either(func(r *resource.Resource) bool { return uses(pic, d, mesh.Dataplanes.From(r)) })
	case mesh.DataplaneInsights.Name:
		// Only whether peers have certificates matters, and only to a PERMISSIVE
		// mesh.
		m := pic.Mesh(d.Mesh)
		if b := m.Spec.EnabledBackend(); b == nil || b.Mode != mesh.Permissive {
			return false
		}
		peer, ok := m.Dataplane(c.Key.Name)
		return ok && uses(pic, d, peer)
	case mesh.MeshServices.Name:
		return either(func(r *resource.Resource) bool {
			return slices.ContainsFunc(d.Spec.Networking.Outbound, func(o mesh.Outbound) bool { return refers(&o, r) })
		})
	case mesh.Secrets.Name:
		return strings.HasPrefix(c.Key.Name, mesh.BuiltinCertSecret(d.Mesh, ""))
	case mesh.TrafficPermissions.Name:
		return either(func(r *resource.Resource) bool {
			for i := range d.Spec.Networking.Inbound {
				if _, ok := rank(mesh.TrafficPermissions.From(r).Spec, d.Spec.Networking.Inbound[i].Tags); ok {
					return true
				}
			}
			return false
		})
	}
	for _, p := range g.cfg.Policies {
		if p.Kind().Name == c.Key.Kind {
			return either(func(r *resource.Resource) bool { return policy.Selects(r, d) })
		}
	}
	return false
}

// uses reports whether some outbound of d leads to an inbound of peer.
func uses(pic *state.Picture, d, peer mesh.Dataplane) bool {
	if peer.Spec.Networking == nil {
		return false
	}
	m := pic.Mesh(d.Mesh)
	for i := range d.Spec.Networking.Outbound {
		o := &d.Spec.Networking.Outbound[i]
		var svc *mesh.MeshService
		if o.BackendRef != nil {
			if svc = find(m, o); svc == nil {
				continue
			}
		}
		for j := range peer.Spec.Networking.Inbound {
			in := &peer.Spec.Networking.Inbound[j]
			if svc == nil && o.BackendRef == nil && in.Service() == o.Tags[mesh.TagService] {
				return true
			}
			if svc != nil && svc.Spec.Selects(peer.Name, peer.Labels, in) {
				return true
			}
		}
	}
	return false
}

// Explain says which policies hold for a proxy and what they come to: a list
// by kind, in the order of application, older permissions last. Errors are those
// of Generate.
func (g *Generator) Explain(pic *state.Picture, p Proxy) ([]policy.Applied, error) {
	w, err := g.start(pic, p)
	if err != nil {
		return nil, err
	}
	c, _, err := w.build(nil, nil, false)
	if err != nil {
		return nil, err
	}
	var out []policy.Applied
	for _, prepared := range g.policies(w.mesh) {
		if a := prepared.Explain(c, w.dp); len(a.Policies) > 0 {
			out = append(out, a)
		}
	}
	if a := w.explainPermissions(); len(a.Policies) > 0 {
		out = append(out, a)
	}
	return out, nil
}

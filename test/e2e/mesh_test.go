//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"

	"kuma/test/lab"
)

// mtls is the default mesh with mutual TLS; more is put below the backend.
func mtls(mode string, more ...string) string {
	y := "type: Mesh\nname: default\nmtls:\n  enabledBackend: ca-1\n  backends:\n  - name: ca-1\n    type: builtin\n    mode: " + mode + "\n"
	return y + strings.Join(more, "")
}

// in is an inbound of a proxy.
type in struct {
	service, protocol string
	// port is where others reach it; local is where the workload listens.
	port, local int
	// more is put below it, as YAML.
	more string
}

// out is an outbound of a proxy: a service by its tag, or what to says.
type out struct {
	port    int
	service string
	to      string
}

// dataplane describes a proxy as YAML.
func dataplane(name string, ins []in, outs ...out) string {
	y := "type: Dataplane\nmesh: default\nname: " + name + "\nlabels: {app: " + name + "}\nnetworking:\n  address: 127.0.0.1\n"
	if len(ins) > 0 {
		y += "  inbound:\n"
	}
	for _, i := range ins {
		y += fmt.Sprintf("  - port: %d\n    servicePort: %d\n    serviceAddress: 127.0.0.1\n    tags: {kuma.io/service: %s, kuma.io/protocol: %s}\n%s",
			i.port, i.local, i.service, i.protocol, i.more)
	}
	if len(outs) > 0 {
		y += "  outbound:\n"
	}
	for _, o := range outs {
		if o.to != "" {
			y += fmt.Sprintf("  - port: %d\n    %s\n", o.port, o.to)
		} else {
			y += fmt.Sprintf("  - port: %d\n    tags: {kuma.io/service: %s}\n", o.port, o.service)
		}
	}
	return y
}

// caller describes a proxy that calls services and serves one that nobody calls.
func (r *room) caller(name string, outs ...out) string {
	r.Helper()
	return dataplane(name, []in{{service: name, protocol: "http", port: r.port(), local: r.port()}}, outs...)
}

// join starts a proxy. It does not wait until it is ready.
func (r *room) join(cp *lab.ControlPlane, name, dataplane string, o ...lab.ProxyOptions) *lab.Proxy {
	r.Helper()
	opts := lab.ProxyOptions{}
	if len(o) > 0 {
		opts = o[0]
	}
	opts.Dataplane = dataplane
	p, err := cp.Proxy(name, opts)
	r.must(err)
	return p
}

// ready waits until all these proxies are ready.
func (r *room) ready(list ...*lab.Proxy) {
	r.Helper()
	for _, p := range list {
		r.must(r.Ready(r.ctx, p))
	}
}

// apply applies YAML.
func (r *room) apply(cp *lab.ControlPlane, yaml string) {
	r.Helper()
	r.must(cp.Apply(yaml))
}

// permit is a permission for an app's inbounds; each match is like
// "Exact, value: spiffe://default/web".
func permit(app string, matches ...string) string {
	y := "type: MeshTrafficPermission\nmesh: default\nname: " + app + "\nspec:\n  targetRef: {kind: Dataplane, labels: {app: " + app + "}}\n  rules:\n  - default:\n      allow:\n"
	for _, m := range matches {
		y += "      - spiffeID: {type: " + m + "}\n"
	}
	return y
}

// permitAll lets everyone in the mesh call everyone.
const permitAll = "type: MeshTrafficPermission\nmesh: default\nname: all\nspec:\n  rules:\n  - default:\n      allow:\n      - spiffeID: {type: Prefix, value: spiffe://default}\n"

// await waits until ask has no error.
func (r *room) await(what string, ask func() error) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.ctx, patience)
	defer cancel()
	r.must(r.Await(ctx, nil, what, ask))
}

// logged waits until a process's log has a line with all the words, and
// returns it.
func (r *room) logged(p *lab.Process, words ...string) string {
	r.Helper()
	var found string
	r.await(fmt.Sprintf("%s logs %q", p.Name, words), func() error {
		lines := loggedLines(p, words...)
		if len(lines) == 0 {
			return fmt.Errorf("no such line")
		}
		found = lines[0]
		return nil
	})
	return found
}

// loggedLines returns the lines of a log with all the words.
func loggedLines(p *lab.Process, words ...string) []string {
	var out []string
next:
	for line := range strings.Lines(p.Log()) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue next
			}
		}
		out = append(out, strings.TrimSpace(line))
	}
	return out
}

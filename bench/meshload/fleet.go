package main

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"
	"sigs.k8s.io/yaml"
)

// meshPlan is the shape of the load.
type meshPlan struct {
	Mesh        string
	N           int
	Services    int
	Outbounds   int
	TProxy      bool
	MTLS        bool
	XDS         string
	HDS         bool
	Bootstrap   string
	Register    string
	MeshService string
	Shared      bool
	Features    string
	Clients     int
	ConnectRate int
	Keep        bool
	Protocol    string
	Timeout     time.Duration
}

func (m *meshPlan) flags(fs *flag.FlagSet) {
	fs.StringVar(&m.Mesh, "mesh", "", "mesh to create (default: meshload-<time>)")
	fs.IntVar(&m.N, "n", 100, "number of simulated proxies")
	fs.IntVar(&m.Services, "services", 0, "number of services (default n/10, at least 1)")
	fs.IntVar(&m.Outbounds, "outbounds", 5, "outbounds of each proxy (without -tproxy)")
	fs.BoolVar(&m.TProxy, "tproxy", false, "transparent proxying: every proxy reaches every service")
	fs.BoolVar(&m.MTLS, "mtls", true, "builtin mTLS in the mesh")
	fs.StringVar(&m.XDS, "xds", "delta", "xDS variant: delta or sotw (state of the world)")
	fs.BoolVar(&m.HDS, "hds", true, "open the health discovery stream too, as Envoy does when its bootstrap says so")
	fs.StringVar(&m.Bootstrap, "bootstrap", "each", "each: POST /bootstrap for every proxy, as kuma-dp does; none: build the node locally")
	fs.StringVar(&m.Register, "register", "inline", "inline: the Dataplane travels in the node metadata (kuma-dp --dataplane-file); rest: it is created by REST beforehand")
	fs.StringVar(&m.MeshService, "mesh-services", "", "meshServices.mode of the mesh (empty: unset); Exclusive makes outbounds refer to MeshServices")
	fs.BoolVar(&m.Shared, "shared", false, "the first outbound of every proxy is service 0, so that an endpoint change there touches all")
	fs.StringVar(&m.Features, "features", "feature-tcp-accesslog-via-named-pipe,feature-otel-via-kuma-dp,feature-strict-inbound-ports,feature-reuse-port", "features each proxy advertises")
	fs.StringVar(&m.Protocol, "protocol", "http", "kuma.io/protocol of the inbounds")
	fs.IntVar(&m.Clients, "clients", 16, "concurrent REST clients while preparing")
	fs.IntVar(&m.ConnectRate, "connect-rate", 0, "new connections per second (0: all at once)")
	fs.BoolVar(&m.Keep, "keep", false, "leave the mesh and its resources behind")
	fs.DurationVar(&m.Timeout, "timeout", 5*time.Minute, "longest wait for any one phase")
}

func (m *meshPlan) finish() error {
	if m.Mesh == "" {
		m.Mesh = fmt.Sprintf("meshload-%d", time.Now().UnixMilli()%1e9)
	}
	if m.Services == 0 {
		m.Services = max(1, m.N/10)
	}
	m.Outbounds = min(m.Outbounds, m.Services)
	switch {
	case m.N < 1 || m.N > 1<<20:
		return fmt.Errorf("-n %d", m.N)
	case m.Services > m.N:
		return fmt.Errorf("-services %d exceeds -n %d", m.Services, m.N)
	case m.XDS != "sotw" && m.XDS != "delta":
		return fmt.Errorf("-xds %q", m.XDS)
	case m.Bootstrap != "each" && m.Bootstrap != "none":
		return fmt.Errorf("-bootstrap %q", m.Bootstrap)
	case m.Register != "inline" && m.Register != "rest":
		return fmt.Errorf("-register %q", m.Register)
	}
	return nil
}

const (
	inboundPort   = 18080
	outboundPort0 = 20001
)

func serviceName(s int) string { return fmt.Sprintf("svc-%d", s) }

func proxyName(i int) string { return fmt.Sprintf("dp-%05d", i) }

// address gives every dataplane its own; nothing ever connects to it.
func address(i int) string {
	i++
	return fmt.Sprintf("10.%d.%d.%d", 1+i>>16, i>>8&255, i&255)
}

// fleet is all the proxies and what they have in common.
type fleet struct {
	t       *target
	plan    meshPlan
	addr    string
	tls     *tls.Config
	delta   bool
	hds     bool
	proxies []*proxy
	cache   *infoCache

	// services holds, for each service, the hash of its endpoints.
	services []atomic.Uint64

	wireBytes, xdsBytes, responses, requests, unknown atomic.Int64
	hdsErrors, hdsSpecs                               atomic.Int64
	count                                             [numTypes]atomic.Int64
	lastResponse                                      atomic.Int64

	goals atomic.Pointer[[]*goal]

	failMu   sync.Mutex
	failures map[string]int

	wg     sync.WaitGroup
	cancel context.CancelFunc
}

func newFleet(t *target, plan meshPlan) (*fleet, error) {
	cfg, err := t.tlsConfig()
	if err != nil {
		return nil, err
	}
	f := &fleet{
		t: t, plan: plan, addr: t.DP, tls: cfg, delta: plan.XDS == "delta", hds: plan.HDS,
		cache: newInfoCache(), services: make([]atomic.Uint64, plan.Services), failures: map[string]int{},
	}
	for i := range plan.N {
		p := &proxy{f: f, idx: i, name: proxyName(i), svc: i % plan.Services, tlsCache: tls.NewLRUClientSessionCache(1)}
		switch {
		case plan.TProxy:
			for s := range plan.Services {
				p.dests = append(p.dests, s)
			}
		default:
			if plan.Shared {
				p.dests = append(p.dests, 0)
			}
			for k := 1; len(p.dests) < plan.Outbounds; k++ {
				d := (p.svc + k) % plan.Services
				if !plan.Shared || d != 0 {
					p.dests = append(p.dests, d)
				}
			}
		}
		f.services[p.svc].Add(endpointHash(address(i), inboundPort))
		f.proxies = append(f.proxies, p)
	}
	return f, nil
}

// goal is a state every proxy (or some of them) is waited to reach.
type goal struct {
	name  string
	check func(p *proxy) bool
	need  []bool // nil: all
	at    []time.Time
	left  atomic.Int64
	done  chan struct{}
}

func (f *fleet) newGoal(name string, need func(p *proxy) bool, check func(p *proxy) bool) *goal {
	g := &goal{name: name, check: check, at: make([]time.Time, len(f.proxies)), done: make(chan struct{})}
	n := len(f.proxies)
	if need != nil {
		n = 0
		g.need = make([]bool, len(f.proxies))
		for i, p := range f.proxies {
			if g.need[i] = need(p); g.need[i] {
				n++
			}
		}
	}
	g.left.Store(int64(n))
	if n == 0 {
		close(g.done)
	}
	return g
}

func (f *fleet) watch(goals ...*goal) { f.goals.Store(&goals) }

// check is called after every response, with the proxy locked.
func (f *fleet) check(p *proxy, at time.Time) {
	goals := f.goals.Load()
	if goals == nil {
		return
	}
	for _, g := range *goals {
		if g.need != nil && !g.need[p.idx] || !g.at[p.idx].IsZero() || !g.check(p) {
			continue
		}
		g.at[p.idx] = at
		if g.left.Add(-1) == 0 {
			close(g.done)
		}
	}
}

func (f *fleet) wait(ctx context.Context, g *goal) error {
	timeout := time.NewTimer(f.plan.Timeout)
	defer timeout.Stop()
	report := time.NewTicker(10 * time.Second)
	defer report.Stop()
	for {
		select {
		case <-g.done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-report.C:
			progress("  %s: %d of %d still waiting%s", g.name, g.left.Load(), len(g.at), f.failureNote())
		case <-timeout.C:
			return fmt.Errorf("%s: %d proxies not there after %s%s%s", g.name, g.left.Load(), f.plan.Timeout, f.failureNote(), f.example(g))
		}
	}
}

// example describes one proxy that did not reach a goal.
func (f *fleet) example(g *goal) string {
	for i, p := range f.proxies {
		if g.need != nil && !g.need[i] || !g.at[i].IsZero() {
			continue
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		var b strings.Builder
		fmt.Fprintf(&b, "; e.g. %s has", p.name)
		for t := range resourceType(numTypes) {
			s := &p.subs[t]
			fmt.Fprintf(&b, " %s %d/%d", typeNames[t], len(s.have), len(s.names))
		}
		return b.String()
	}
	return ""
}

// since returns the times from start, of the proxies a goal asked for.
func (g *goal) since(start func(i int) time.Time) []time.Duration {
	var out []time.Duration
	for i, at := range g.at {
		if !at.IsZero() {
			out = append(out, at.Sub(start(i)))
		}
	}
	return out
}

func from(t time.Time) func(int) time.Time { return func(int) time.Time { return t } }

func (f *fleet) noteFailure(p *proxy, err error) {
	f.failMu.Lock()
	defer f.failMu.Unlock()
	msg := strings.ReplaceAll(err.Error(), p.name, "DP")
	f.failures[msg[:min(len(msg), 200)]]++
}

func (f *fleet) takeFailures() map[string]int {
	f.failMu.Lock()
	defer f.failMu.Unlock()
	m := f.failures
	f.failures = map[string]int{}
	return m
}

func (f *fleet) failureNote() string {
	f.failMu.Lock()
	defer f.failMu.Unlock()
	n, top := 0, ""
	for m, c := range f.failures {
		n += c
		if top == "" || c > f.failures[top] {
			top = m
		}
	}
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("; %d stream failures, mostly: %s", n, top)
}

// quiet waits until no response came for d.
func (f *fleet) quiet(ctx context.Context, d time.Duration) error {
	deadline := time.Now().Add(f.plan.Timeout)
	for time.Now().Before(deadline) {
		idle := time.Since(time.Unix(0, f.lastResponse.Load()))
		if idle >= d {
			return nil
		}
		if err := sleep(ctx, min(d-idle, 100*time.Millisecond)); err != nil {
			return err
		}
	}
	progress("responses did not cease within %s", f.plan.Timeout)
	return nil
}

// dataplane is the Dataplane resource of proxy i of service svc.
func (f *fleet) dataplane(name string, i, svc int, dests []int) map[string]any {
	net := map[string]any{
		"address": address(i),
		"inbound": []any{map[string]any{
			"port": inboundPort, "servicePort": inboundPort + 1,
			"tags": map[string]string{"kuma.io/service": serviceName(svc), "kuma.io/protocol": f.plan.Protocol},
		}},
	}
	if !f.plan.TProxy {
		var out []any
		for k, d := range dests {
			o := map[string]any{"address": "127.0.0.1", "port": outboundPort0 + k}
			if f.plan.MeshService == "Exclusive" {
				o["backendRef"] = map[string]any{"kind": "MeshService", "name": serviceName(d), "port": inboundPort}
			} else {
				o["tags"] = map[string]string{"kuma.io/service": serviceName(d)}
			}
			out = append(out, o)
		}
		if out != nil {
			net["outbound"] = out
		}
	}
	return map[string]any{"type": "Dataplane", "mesh": f.plan.Mesh, "name": name, "networking": net}
}

func (f *fleet) meshPath(rest string) string { return "/meshes/" + f.plan.Mesh + rest }

// createMesh makes the mesh and lets everyone talk to everyone.
func (f *fleet) createMesh(ctx context.Context) error {
	m := map[string]any{"type": "Mesh", "name": f.plan.Mesh}
	if f.plan.MTLS {
		m["mtls"] = map[string]any{"enabledBackend": "ca-1", "backends": []any{map[string]any{"name": "ca-1", "type": "builtin"}}}
	}
	if f.plan.MeshService != "" {
		m["meshServices"] = map[string]any{"mode": f.plan.MeshService}
	}
	if err := f.t.put(ctx, f.meshPath(""), m); err != nil {
		return err
	}
	return f.t.put(ctx, f.meshPath("/meshtrafficpermissions/allow-all"), map[string]any{
		"type": "MeshTrafficPermission", "mesh": f.plan.Mesh, "name": "allow-all",
		"spec": map[string]any{
			"targetRef": map[string]any{"kind": "Mesh"},
			"from":      []any{map[string]any{"targetRef": map[string]any{"kind": "Mesh"}, "default": map[string]any{"action": "Allow"}}},
		},
	})
}

// dropMesh removes what the run created. Dataplanes that came inline vanish
// with their streams, after a delay of the control plane's own.
func (f *fleet) dropMesh(ctx context.Context) {
	if f.plan.Keep || f.t.bin != "" { // a control plane of our own goes away whole
		return
	}
	if f.plan.Register == "rest" {
		if _, err := each(ctx, len(f.proxies), f.plan.Clients, func(ctx context.Context, i int) error {
			return f.t.del(ctx, f.meshPath("/dataplanes/"+f.proxies[i].name))
		}); err != nil {
			progress("cleanup: %v", err)
		}
	}
	var err error
	for range 30 {
		if err = f.t.del(ctx, f.meshPath("")); err == nil {
			return
		}
		if sleep(ctx, time.Second) != nil {
			return
		}
	}
	progress("cleanup: mesh %s stays: %v", f.plan.Mesh, err)
}

// tokens asks for one dataplane token per proxy.
func (f *fleet) tokens(ctx context.Context) ([]time.Duration, error) {
	return each(ctx, len(f.proxies), f.plan.Clients, func(ctx context.Context, i int) error {
		tok, err := dataplaneToken(ctx, f.t, f.plan.Mesh, f.proxies[i].name)
		f.proxies[i].token = tok
		return err
	})
}

func dataplaneToken(ctx context.Context, t *target, mesh, name string) (string, error) {
	var b []byte
	err := t.call(ctx, http.MethodPost, "/tokens/dataplane", map[string]any{"mesh": mesh, "name": name, "validFor": "24h"}, &b)
	return strings.TrimSpace(string(b)), err
}

func (f *fleet) register(ctx context.Context) ([]time.Duration, error) {
	return each(ctx, len(f.proxies), f.plan.Clients, func(ctx context.Context, i int) error {
		p := f.proxies[i]
		return f.t.put(ctx, f.meshPath("/dataplanes/"+p.name), f.dataplane(p.name, i, p.svc, p.dests))
	})
}

// bootstrap gives every proxy its Envoy node.
func (f *fleet) bootstrap(ctx context.Context) ([]time.Duration, error) {
	var noHDS atomic.Bool
	hc := &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: f.tls, MaxIdleConnsPerHost: 1024}}
	defer hc.CloseIdleConnections()
	ds, err := each(ctx, len(f.proxies), f.plan.Clients, func(ctx context.Context, i int) error {
		p := f.proxies[i]
		req := f.bootstrapRequest(p)
		if f.plan.Bootstrap == "none" {
			p.node = localNode(f.plan.Mesh, p, req)
			return nil
		}
		node, headers, hds, err := fetchBootstrap(ctx, hc, f.addr, req)
		if err != nil {
			return err
		}
		p.node = node
		if h, ok := headers["authorization"]; ok {
			p.token = h
		}
		if !hds {
			noHDS.Store(true)
		}
		return nil
	})
	if noHDS.Load() {
		f.hds = false
	}
	return ds, err
}

func (f *fleet) features() []string {
	var fs []string
	if f.plan.Features != "" {
		fs = strings.Split(f.plan.Features, ",")
	}
	if f.plan.TProxy {
		fs = append(fs, "feature-transparent-proxy-in-dataplane-metadata")
	}
	if f.delta {
		fs = append(fs, "feature-delta-grpc")
	}
	return fs
}

// bootstrapRequest is what kuma-dp sends.
func (f *fleet) bootstrapRequest(p *proxy) map[string]any {
	req := map[string]any{
		"mesh": f.plan.Mesh, "name": p.name, "proxyType": "dataplane", "dataplaneToken": p.token,
		"version": map[string]any{
			"kumaDp": map[string]any{"version": "2.14.3", "gitTag": "unknown", "gitCommit": "unknown", "buildDate": "unknown"},
			"envoy":  map[string]any{"version": "1.38.3", "build": "meshload/1.38.3/Clean/RELEASE/BoringSSL", "kumaDpCompatible": true},
		},
		"caCert": "", "dynamicMetadata": map[string]any{}, "otelEnv": map[string]any{"pipeEnabled": true},
		"dnsPort": 15054, "readinessPort": 9902, "operatingSystem": "linux", "features": f.features(),
		"resources": map[string]any{"maxHeapSizeBytes": 0}, "workdir": "/tmp/" + p.name,
		"metricsResources": map[string]any{"certPath": "", "keyPath": ""},
		"systemCaPath":     "/etc/ssl/certs/ca-certificates.crt", "ipv6Enabled": true,
		"spireResources": map[string]any{"socketPath": ""},
	}
	if f.plan.Register == "inline" {
		b, _ := json.Marshal(f.dataplane(p.name, p.idx, p.svc, p.dests))
		req["dataplaneResource"] = string(b)
	}
	if f.plan.TProxy {
		flow := func(port int) map[string]any { return map[string]any{"enabled": true, "port": port} }
		req["dataplaneConfig"] = map[string]any{
			"ipFamilyMode": "dualstack",
			"redirect": map[string]any{
				"inbound": flow(15006), "outbound": flow(15001), "dns": flow(15054), "vnet": map[string]any{},
			},
		}
	}
	return req
}

// fetchBootstrap asks the control plane for an Envoy bootstrap and takes from
// it what Envoy would send on its streams.
func fetchBootstrap(ctx context.Context, hc *http.Client, addr string, req map[string]any) (node *corev3.Node, headers map[string]string, hds bool, err error) {
	t := &target{hc: hc}
	var raw []byte
	if err := t.call(ctx, http.MethodPost, "https://"+addr+"/bootstrap", req, &raw); err != nil {
		return nil, nil, false, err
	}
	// The answer is the YAML itself, or JSON that holds it, by the client's Accept.
	var wrapped struct{ Bootstrap string }
	if json.Unmarshal(raw, &wrapped) == nil && wrapped.Bootstrap != "" {
		if raw, err = base64.StdEncoding.DecodeString(wrapped.Bootstrap); err != nil {
			return nil, nil, false, err
		}
	}
	js, err := yaml.YAMLToJSON(raw)
	if err != nil {
		return nil, nil, false, fmt.Errorf("bootstrap: %w", err)
	}
	var b struct {
		Node             json.RawMessage
		HdsConfig        *json.RawMessage
		DynamicResources struct {
			AdsConfig struct {
				GrpcServices []struct {
					InitialMetadata []struct{ Key, Value string }
				}
			}
		}
	}
	if err := json.Unmarshal(js, &b); err != nil {
		return nil, nil, false, fmt.Errorf("bootstrap: %w", err)
	}
	node = &corev3.Node{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b.Node, node); err != nil {
		return nil, nil, false, fmt.Errorf("bootstrap: node: %w", err)
	}
	headers = map[string]string{}
	for _, s := range b.DynamicResources.AdsConfig.GrpcServices {
		for _, h := range s.InitialMetadata {
			headers[h.Key] = h.Value
		}
	}
	node.UserAgentName = "envoy"
	return node, headers, b.HdsConfig != nil, nil
}

// localNode builds the node without asking for a bootstrap.
func localNode(mesh string, p *proxy, req map[string]any) *corev3.Node {
	js, _ := json.Marshal(req["version"])
	var version map[string]any
	_ = json.Unmarshal(js, &version)
	md := map[string]any{
		"dataplane.proxyType": "dataplane", "version": version,
		"dataplane.admin.port": "9901", "dataplane.admin.address": "127.0.0.1",
		"dataplane.admin.socketPath": fmt.Sprint(req["workdir"], "/kuma-envoy-admin.sock"),
		"dataplane.dns.port":         "15054", "dataplane.readinessReporter.port": "9902",
		"workdir": req["workdir"], "metricsCertPath": "", "metricsKeyPath": "",
		"systemCaPath": req["systemCaPath"], "ipv6Enabled": true, "spireAgent.socketPath": "",
		"otelEnvInventory": map[string]any{"pipeEnabled": true},
	}
	var features []any
	for _, x := range req["features"].([]string) {
		features = append(features, x)
	}
	md["features"] = features
	if r, ok := req["dataplaneResource"]; ok {
		md["dataplane.resource"] = r
	}
	if c, ok := req["dataplaneConfig"]; ok {
		js, _ := json.Marshal(c)
		var v map[string]any
		_ = json.Unmarshal(js, &v)
		md["transparentProxy"] = v
	}
	s, err := structpb.NewStruct(md)
	if err != nil {
		panic(err) // our own literals
	}
	return &corev3.Node{Id: mesh + "." + p.name, Cluster: serviceName(p.svc), Metadata: s, UserAgentName: "envoy"}
}

// connect starts all proxies. They run until disconnect.
func (f *fleet) connect(ctx context.Context) {
	ctx, f.cancel = context.WithCancel(ctx)
	var gap time.Duration
	if f.plan.ConnectRate > 0 {
		gap = time.Second / time.Duration(f.plan.ConnectRate)
	}
	start := time.Now()
	for i, p := range f.proxies {
		if gap > 0 {
			if sleep(ctx, time.Until(start.Add(time.Duration(i)*gap))) != nil {
				return
			}
		}
		f.wg.Go(func() { p.run(ctx) })
	}
}

func (f *fleet) disconnect() {
	if f.cancel != nil {
		f.cancel()
	}
	f.wg.Wait()
}

// dropAll breaks every connection at once.
func (f *fleet) dropAll() {
	for _, p := range f.proxies {
		p.drop()
	}
}

// traffic is what came off the streams between two moments.
type traffic struct {
	Responses int64            `json:"responses"`
	Requests  int64            `json:"requests"`
	ByType    map[string]int64 `json:"responses_by_type"`
	XDSMiB    float64          `json:"xds_mib"`
	WireMiB   float64          `json:"wire_mib"`
}

type counters struct {
	responses, requests, xds, wire int64
	by                             [numTypes]int64
}

func (f *fleet) counters() counters {
	c := counters{responses: f.responses.Load(), requests: f.requests.Load(), xds: f.xdsBytes.Load(), wire: f.wireBytes.Load()}
	for i := range c.by {
		c.by[i] = f.count[i].Load()
	}
	return c
}

func (a counters) until(b counters) traffic {
	t := traffic{
		Responses: b.responses - a.responses, Requests: b.requests - a.requests,
		XDSMiB: mib(b.xds - a.xds), WireMiB: mib(b.wire - a.wire), ByType: map[string]int64{},
	}
	for i := range a.by {
		if n := b.by[i] - a.by[i]; n > 0 {
			t.ByType[typeNames[i]] = n
		}
	}
	return t
}

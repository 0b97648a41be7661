package xds_test

import (
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	healthv3 "github.com/envoyproxy/go-control-plane/envoy/service/health/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"kuma/internal/cp/cptest"
	"kuma/internal/mesh"
	"kuma/internal/session"
	"kuma/internal/state"
)

// probed is a Dataplane with one inbound that is checked and one that is not.
func probed(name string) string {
	return strings.Replace(cptest.Dataplane("default", name, "web"), `"inbound":[`,
		`"inbound":[{"port":8081,"servicePort":9091,"serviceProbe":{"tcp":{},"timeout":"3s"},"tags":{"kuma.io/service":"checked"}},`, 1)
}

type hds struct {
	*testing.T
	healthv3.HealthDiscoveryService_StreamHealthCheckClient
}

func openHDS(t *testing.T, d *cptest.Doors, name string, md map[string]any) hds {
	t.Helper()
	s, err := healthv3.NewHealthDiscoveryServiceClient(d.Conn()).StreamHealthCheck(within(t))
	if err != nil {
		t.Fatal(err)
	}
	m, err := structpb.NewStruct(md)
	if err != nil {
		t.Fatal(err)
	}
	err = s.Send(&healthv3.HealthCheckRequestOrEndpointHealthResponse{RequestType: &healthv3.HealthCheckRequestOrEndpointHealthResponse_HealthCheckRequest{
		HealthCheckRequest: &healthv3.HealthCheckRequest{Node: &corev3.Node{Id: "default." + name, Metadata: m}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return hds{t, s}
}

// report answers every check of a specifier, by cluster.
func (h hds) report(spec *healthv3.HealthCheckSpecifier, healthy map[string]bool) {
	h.Helper()
	r := &healthv3.EndpointHealthResponse{}
	for _, c := range spec.GetClusterHealthChecks() {
		s := corev3.HealthStatus_UNHEALTHY
		if healthy[c.GetClusterName()] {
			s = corev3.HealthStatus_HEALTHY
		}
		l := &healthv3.LocalityEndpointsHealth{}
		for _, e := range c.GetLocalityEndpoints()[0].GetEndpoints() {
			l.EndpointsHealth = append(l.EndpointsHealth, &healthv3.EndpointHealth{Endpoint: &endpointv3.Endpoint{Address: e.GetAddress()}, HealthStatus: s})
		}
		r.ClusterEndpointsHealth = append(r.ClusterEndpointsHealth, &healthv3.ClusterEndpointsHealth{ClusterName: c.GetClusterName(), LocalityEndpointsHealth: []*healthv3.LocalityEndpointsHealth{l}})
	}
	err := h.Send(&healthv3.HealthCheckRequestOrEndpointHealthResponse{RequestType: &healthv3.HealthCheckRequestOrEndpointHealthResponse_EndpointHealthResponse{EndpointHealthResponse: r}})
	if err != nil {
		h.Fatal(err)
	}
}

func (h hds) spec() *healthv3.HealthCheckSpecifier {
	h.Helper()
	s, err := h.Recv()
	if err != nil {
		h.Fatal(err)
	}
	return s
}

func states(pic *state.Picture, name string) (checked, plain bool) {
	r := pic.Get(mesh.Dataplanes.Key("default", name))
	if r == nil {
		return false, false
	}
	in := mesh.Dataplanes.From(r).Spec.Networking.Inbound
	return in[0].IsReady(), in[1].IsReady()
}

func TestHealthOfAnotherKumaDP(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	md := cptest.Metadata("", probed("web"))
	md["dataplane.admin.socketPath"] = "/tmp/admin.sock"
	h := openHDS(t, d, "web", md)
	s := h.spec()
	checks := s.GetClusterHealthChecks()
	if len(checks) != 2 || s.GetInterval().AsDuration() != 5*time.Second {
		t.Fatalf("specifier %v", s)
	}
	admin, probe := checks[0], checks[1]
	if admin.GetClusterName() != "kuma:envoy:admin" || admin.GetHealthChecks()[0].GetHttpHealthCheck().GetPath() != "/ready" ||
		admin.GetLocalityEndpoints()[0].GetEndpoints()[0].GetAddress().GetPipe().GetPath() != "/tmp/admin.sock" {
		t.Errorf("admin check %v", admin)
	}
	hc := probe.GetHealthChecks()[0]
	if probe.GetClusterName() != "localhost:9091" || hc.GetTcpHealthCheck() == nil || hc.GetTimeout().AsDuration() != 3*time.Second ||
		hc.GetInterval().AsDuration() != time.Second || hc.GetHealthyThreshold().GetValue() != 1 {
		t.Errorf("probe %v", probe)
	}
	for _, c := range []struct{ admin, probe, wantChecked, wantPlain bool }{
		{true, true, true, true}, {true, false, false, true}, {false, true, false, false}, {true, true, true, true},
	} {
		h.report(s, map[string]bool{"kuma:envoy:admin": c.admin, "localhost:9091": c.probe})
		await(t, d, "the states follow the report", func(p *state.Picture) bool {
			checked, plain := states(p, "web")
			return checked == c.wantChecked && plain == c.wantPlain
		})
	}
	// Reports without news write nothing.
	version := d.Tracker.Now().Get(mesh.Dataplanes.Key("default", "web")).Version
	for range 5 {
		h.report(s, map[string]bool{"kuma:envoy:admin": true, "localhost:9091": true})
	}
	h.report(s, map[string]bool{"kuma:envoy:admin": true})
	await(t, d, "the last report counts", func(p *state.Picture) bool { checked, _ := states(p, "web"); return !checked })
	if n := d.XDS.Stats().Flips.Load(); n != 5 {
		t.Errorf("%d writes, want 5", n)
	}
	if now := d.Tracker.Now().Get(mesh.Dataplanes.Key("default", "web")).Version; now <= version {
		t.Errorf("version %d after %d", now, version)
	}
}

// Our own kuma-dp announces when it leaves; only probes are asked for, and
// nothing where there is none.
func TestHealthOfOurKumaDP(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	d.Put(dataplane(t, probed("checked")), dataplane(t, cptest.Dataplane("default", "plain", "web")))
	h := openHDS(t, d, "checked", cptest.Metadata("i", "", session.FeatureLink))
	s := h.spec()
	if c := s.GetClusterHealthChecks(); len(c) != 1 || c[0].GetClusterName() != "localhost:9091" {
		t.Fatalf("specifier %v", s)
	}
	h.report(s, nil)
	await(t, d, "the checked inbound alone is not ready", func(p *state.Picture) bool {
		checked, plain := states(p, "checked")
		return !checked && plain
	})
	quiet := openHDS(t, d, "plain", cptest.Metadata("j", "", session.FeatureLink))
	// The first specifier comes only once there is something to check.
	r := dataplane(t, probed("plain"))
	d.Put(r)
	if s := quiet.spec(); len(s.GetClusterHealthChecks()) != 1 {
		t.Errorf("the first specifier is %v", s)
	}
}

func TestHDSIsAuthenticated(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Tokens: true})
	d.Mesh("default", false)
	h := openHDS(t, d, "web", cptest.Metadata("i", probed("web")))
	if _, err := h.Recv(); status.Code(err) != codes.Unknown || !strings.Contains(err.Error(), "authorization") {
		t.Errorf("got %v", err)
	}
}

package session_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/session"
)

func metadata(t testing.TB, js string) *structpb.Struct {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(js), &m); err != nil {
		t.Fatal(err)
	}
	s, err := structpb.NewStruct(m)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestParseNode(t *testing.T) {
	t.Parallel()
	n, err := session.ParseNode(&corev3.Node{Id: "default.web.1", Metadata: metadata(t, `{
		"dataplane.proxyType": "dataplane", "dataplane.instance": "r4nd0m", "dataplane.resource": "{}", "workdir": "/tmp/x",
		"dataplane.admin.port": "9901", "dataplane.admin.address": "127.0.0.1", "dataplaneToken": "secret",
		"features": ["feature-link", "b", "a", "a", 7], "version": {"envoy": {"version": "1.40.0"}, "kumaDp": "odd", "dependencies": {"coredns": "1"}}}`)}, "10.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	want := &session.Node{
		Key: session.Key{Mesh: "default", Name: "web.1"}, Instance: "r4nd0m", Link: true, Features: []string{"a", "b", "feature-link"}, Dataplane: "{}",
		Version:      &mesh.Version{Envoy: &mesh.EnvoyVersion{Version: "1.40.0"}, Dependencies: map[string]string{"coredns": "1"}},
		AdminAddress: "127.0.0.1", AdminPort: 9901, Workdir: "/tmp/x", Own: true, Metadata: n.Metadata,
	}
	if diff := cmp.Diff(want, n); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, hidden := range []string{"r4nd0m", "secret"} { // HRD-20
		if strings.Contains(string(n.Metadata), hidden) {
			t.Errorf("the metadata shows %q: %s", hidden, n.Metadata)
		}
	}
	a, err := session.ParseNode(&corev3.Node{Id: "m.n", Metadata: metadata(t, `{"workdir":"/tmp/x"}`)}, "10.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range []struct{ workdir, remote string }{{"/tmp/y", "10.0.0.1"}, {"/tmp/x", "10.0.0.2"}} {
		b, err := session.ParseNode(&corev3.Node{Id: "m.n", Metadata: metadata(t, fmt.Sprintf(`{"workdir":%q}`, other.workdir))}, other.remote)
		if err != nil || a.Instance == b.Instance {
			t.Errorf("%+v is the same instance as %q, %v", other, a.Instance, err)
		}
	}
}

// HRD-25: all that is read before authentication has a limit.
func TestNodeLimits(t *testing.T) {
	t.Parallel()
	deep := `"x"`
	for range 100 {
		deep = `{"a":[` + deep + `]}`
	}
	many := strings.Repeat(`"f",`, 300) + `"f"`
	for _, c := range []struct {
		name, want string
		node       *corev3.Node
	}{
		{"none", "must have a node", nil},
		{"no dot", "it must be <mesh>.<name>", &corev3.Node{Id: "web"}},
		{"zone proxy", "it must be <mesh>.<name>", &corev3.Node{Id: ".ingress"}},
		{"long id", "longer than 512", &corev3.Node{Id: "m." + strings.Repeat("x", 600)}},
		{"large", "the limit is 1048576", &corev3.Node{Id: "m.n", Metadata: metadata(t, fmt.Sprintf(`{"a":%q}`, strings.Repeat("x", 2<<20)))}},
		{"deep", "levels deep", &corev3.Node{Id: "m.n", Metadata: metadata(t, `{"a":`+deep+`}`)}},
		{"features", "301 features", &corev3.Node{Id: "m.n", Metadata: metadata(t, `{"features":[`+many+`]}`)}},
		{"instance", "dataplane.instance", &corev3.Node{Id: "m.n", Metadata: metadata(t, fmt.Sprintf(`{"dataplane.instance":%q}`, strings.Repeat("x", 600)))}},
		{"type", `unsupported proxy type "egress"`, &corev3.Node{Id: "m.n", Metadata: metadata(t, `{"dataplane.proxyType":"egress"}`)}},
	} {
		if _, err := session.ParseNode(c.node, "10.0.0.1"); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
	}
}

// HRD-09: whatever a client sends as its node, before it is authenticated.
func FuzzNodeMetadata(f *testing.F) {
	for _, js := range []string{
		`{}`, `{"dataplane.resource":{"a":1},"features":"x","version":[1],"workdir":null}`,
		`{"dataplane.proxyType":7,"dataplane.admin.port":-1,"version":{"kumaDp":{"version":{}},"envoy":[]}}`,
		`{"features":[null,{"a":[[[]]]}],"dataplane.admin.port":"99999","transparentProxy":"yes","dynamicMetadata":{"version.dependencies":1}}`,
	} {
		b, err := proto.Marshal(&corev3.Node{Id: "default.web", Metadata: metadata(f, js)})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{0x1a, 0x02, 0x0a, 0x00})
	f.Fuzz(func(t *testing.T, b []byte) {
		n := new(corev3.Node)
		if proto.Unmarshal(b, n) != nil {
			t.Skip()
		}
		got, err := session.ParseNode(n, "10.0.0.1")
		if err != nil {
			if !errs.Is(err, errs.Invalid) {
				t.Errorf("kind of %v", err)
			}
			return
		}
		if got.Mesh == "" || got.Name == "" || got.Instance == "" || got.Mesh+"."+got.Name != n.GetId() {
			t.Errorf("node %+v from id %q", got, n.GetId())
		}
		if len(got.Metadata) > 0 && !json.Valid(got.Metadata) {
			t.Errorf("metadata is no JSON: %q", got.Metadata)
		}
	})
}

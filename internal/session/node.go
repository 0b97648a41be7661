package session

import (
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"kuma/internal/errs"
	"kuma/internal/mesh"
)

// FeatureLink is the feature by which a proxy says that its kuma-dp opens a
// link and keeps its own keys. For such a proxy ADS never carries a private
// key, and its Dataplane comes over the link.
const FeatureLink = "feature-link"

// Limits of what a proxy may say of itself, each checked before anything of it
// is used.
const (
	maxNodeBytes = 1 << 20
	maxNodeDepth = 32
	maxID        = 512
	maxInstance  = 512
	maxFeatures  = 256
)

// Key names a proxy: its mesh and its name there.
type Key struct{ Mesh, Name string }

// String is the node id by which the proxy calls itself: "<mesh>.<name>".
func (k Key) String() string { return k.Mesh + "." + k.Name }

// A Node is what a proxy says of itself on a stream. Nothing in it is
// verified but what the credential covers. It is never changed once made.
type Node struct {
	Key
	// Instance tells one run of a proxy from another of the same name: the
	// random id that our kuma-dp makes, else the work directory and the remote
	// IP address.
	Instance string
	// Link: the proxy's kuma-dp has a link.
	Link bool
	// Features are those that kuma-dp announces, sorted.
	Features []string
	// Dataplane is the Dataplane that the proxy brings with it, JSON or YAML;
	// empty where it is to be found in the store.
	Dataplane string
	// Version is which programs the proxy runs; nil where it does not say.
	Version *mesh.Version
	// Metadata is the node metadata as JSON, without what tells runs apart.
	Metadata json.RawMessage
	// AdminSocket, AdminAddress and AdminPort say where Envoy's admin interface
	// is, for health checks.
	AdminSocket  string
	AdminAddress string
	AdminPort    uint32
	// ReadinessPort is where kuma-dp says on loopback whether the proxy is ready;
	// 0 where it does not say.
	ReadinessPort uint32
	// Workdir is kuma-dp's working directory.
	Workdir string
	// MetricsCert and MetricsKey are files on the proxy's machine with which Envoy
	// is to serve metrics; empty where kuma-dp names none.
	MetricsCert, MetricsKey string
	// Own: the proxy is run by our own kuma-dp, which says its instance.
	Own bool
	// Transparent: traffic is redirected to the proxy.
	Transparent bool
}

// HasFeature reports whether the proxy announces a feature.
func (n *Node) HasFeature(name string) bool {
	_, ok := slices.BinarySearch(n.Features, name)
	return ok
}

// ParseNode reads the node of a stream's first message; remote is the peer's
// IP address. Whatever the metadata's shape, it never panics. Errors are
// Invalid.
func ParseNode(n *corev3.Node, remote string) (*Node, error) {
	if n == nil {
		return nil, errs.New(errs.Invalid, "the first message of a stream must have a node")
	}
	if size := proto.Size(n); size > maxNodeBytes {
		return nil, errs.New(errs.Invalid, "the node has %d bytes, the limit is %d", size, maxNodeBytes)
	}
	key, err := parseID(n.GetId())
	if err != nil {
		return nil, err
	}
	fields := n.GetMetadata().GetFields()
	if depth(fields, 0) > maxNodeDepth {
		return nil, errs.New(errs.Invalid, "the node metadata is nested more than %d levels deep", maxNodeDepth)
	}
	if t := text(fields, "dataplane.proxyType"); t != "" && t != "dataplane" {
		return nil, errs.New(errs.Invalid, "unsupported proxy type %q", t)
	}
	out := &Node{
		Key:           key,
		Instance:      text(fields, "dataplane.instance"),
		Dataplane:     text(fields, "dataplane.resource"),
		AdminSocket:   text(fields, "dataplane.admin.socketPath"),
		Workdir:       text(fields, "workdir"),
		MetricsCert:   text(fields, "metricsCertPath"),
		MetricsKey:    text(fields, "metricsKeyPath"),
		Own:           text(fields, "dataplane.instance") != "",
		AdminAddress:  text(fields, "dataplane.admin.address"),
		AdminPort:     port(fields, "dataplane.admin.port"),
		ReadinessPort: port(fields, "dataplane.readinessReporter.port"),
		Transparent:   fields["transparentProxy"].GetStructValue() != nil,
	}
	if len(out.Instance) > maxInstance {
		return nil, errs.New(errs.Invalid, "dataplane.instance of the node metadata is longer than %d bytes", maxInstance)
	}
	if out.Instance == "" {
		out.Instance = foreignInstance(text(fields, "workdir"), remote)
	}
	list := fields["features"].GetListValue().GetValues()
	if len(list) > maxFeatures {
		return nil, errs.New(errs.Invalid, "the node metadata lists %d features, the limit is %d", len(list), maxFeatures)
	}
	for _, v := range list {
		if f := v.GetStringValue(); f != "" {
			out.Features = append(out.Features, f)
		}
	}
	slices.Sort(out.Features)
	out.Features = slices.Compact(out.Features)
	out.Link = out.HasFeature(FeatureLink)
	if v := fields["version"].GetStructValue(); v != nil {
		out.Version = parseVersion(v)
	}
	if out.Metadata, err = shownMetadata(fields); err != nil {
		return nil, errs.New(errs.Invalid, "the node metadata can't be read: %w", err)
	}
	return out, nil
}

// foreignInstance is the instance of a kuma-dp that does not name one.
func foreignInstance(workdir, remote string) string { return "workdir " + workdir + " at " + remote }

// parseID reads a node id.
func parseID(id string) (Key, error) {
	if len(id) > maxID {
		return Key{}, errs.New(errs.Invalid, "the node id is longer than %d bytes", maxID)
	}
	m, name, ok := strings.Cut(id, ".")
	if !ok || m == "" || name == "" {
		return Key{}, errs.New(errs.Invalid, "the node id %q is not valid: it must be <mesh>.<name>", id)
	}
	return Key{m, name}, nil
}

// text is a field's string, or "".
func text(fields map[string]*structpb.Value, name string) string {
	return fields[name].GetStringValue()
}

// port is a field that holds a port as text or as a number, or 0.
func port(fields map[string]*structpb.Value, name string) uint32 {
	v := fields[name]
	if f := v.GetNumberValue(); f >= 1 && f <= 65535 {
		return uint32(f)
	}
	p, err := strconv.ParseUint(v.GetStringValue(), 10, 16)
	if err != nil {
		return 0
	}
	return uint32(p)
}

// depth is how deep values are nested; it does not look below the limit.
func depth(fields map[string]*structpb.Value, at int) int {
	if at > maxNodeDepth {
		return at
	}
	deepest := at
	for _, v := range fields {
		deepest = max(deepest, depthOf(v, at+1))
	}
	return deepest
}

func depthOf(v *structpb.Value, at int) int {
	if at > maxNodeDepth {
		return at
	}
	if s := v.GetStructValue(); s != nil {
		return depth(s.GetFields(), at)
	}
	deepest := at
	for _, e := range v.GetListValue().GetValues() {
		deepest = max(deepest, depthOf(e, at+1))
	}
	return deepest
}

// shownMetadata is the insight's copy: what tells one run from another and whatever
// is called a token are left out.
func shownMetadata(fields map[string]*structpb.Value) (json.RawMessage, error) {
	if len(fields) == 0 {
		return nil, nil
	}
	kept := maps.Clone(fields)
	maps.DeleteFunc(kept, func(k string, _ *structpb.Value) bool {
		return k == "dataplane.instance" || strings.Contains(strings.ToLower(k), "token")
	})
	return json.Marshal((&structpb.Struct{Fields: kept}).AsMap())
}

// parseVersion reads the versions; what does not have the right type is left
// out.
func parseVersion(s *structpb.Struct) *mesh.Version {
	part := func(name string, into any) bool {
		v := s.GetFields()[name].GetStructValue()
		if v == nil {
			return false
		}
		b, err := json.Marshal(v.AsMap())
		return err == nil && json.Unmarshal(b, into) == nil
	}
	out := &mesh.Version{}
	dp, ev, deps := new(mesh.KumaDPVersion), new(mesh.EnvoyVersion), map[string]string{}
	if part("kumaDp", dp) {
		out.KumaDP = dp
	}
	if part("envoy", ev) {
		out.Envoy = ev
	}
	if part("dependencies", &deps) && len(deps) > 0 {
		out.Dependencies = deps
	}
	if out.KumaDP == nil && out.Envoy == nil && out.Dependencies == nil {
		return nil
	}
	return out
}

// Package cptest has what tests of a whole control plane need: an ADS client
// that behaves as Envoy does.
package cptest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"kuma/internal/envoy"
)

// ADSConfig is who connects.
type ADSConfig struct {
	Conn grpc.ClientConnInterface
	// Mesh and Name make the node id.
	Mesh, Name string
	// Token is sent as it is; empty for none.
	Token string
	// Metadata is the node metadata, as bootstrap gives it out.
	Metadata map[string]any
	// Refuse may return why Envoy would not take a resource.
	Refuse func(typeURL string, r *discoveryv3.Resource) string
}

// An ADS is a client of delta ADS that subscribes as Envoy does: clusters, their
// endpoints and secrets; then, once it has those, listeners with their routes,
// secrets and extension configurations. It outlives its streams.
type ADS struct {
	cfg ADSConfig

	mu      sync.Mutex
	stream  discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	types   map[string]*held
	changed chan struct{}
	events  []string
	err     error
	cancel  context.CancelFunc
	done    chan struct{}
}

// held is what the client has of one type.
type held struct {
	active    bool
	names     map[string]struct{}
	resources map[string]*discoveryv3.Resource
	absent    map[string]bool
	answered  bool
}

// NewADS makes a client; Connect opens its stream.
func NewADS(c ADSConfig) *ADS {
	a := &ADS{cfg: c, types: map[string]*held{}, changed: make(chan struct{})}
	for _, url := range envoy.Types() {
		a.types[url] = &held{names: map[string]struct{}{}, resources: map[string]*discoveryv3.Resource{}, absent: map[string]bool{}}
	}
	return a
}

// Connect opens a stream and asks for everything that the client asked for
// before, telling what it holds.
func (a *ADS) Connect(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	if a.cfg.Token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", a.cfg.Token)
	}
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(a.cfg.Conn).DeltaAggregatedResources(ctx)
	if err != nil {
		cancel()
		return err
	}
	md, err := structpb.NewStruct(a.cfg.Metadata)
	if err != nil {
		cancel()
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stream, a.cancel, a.err, a.done = stream, cancel, nil, make(chan struct{})
	node := &corev3.Node{Id: a.cfg.Mesh + "." + a.cfg.Name, Metadata: md}
	a.types[envoy.ClusterType].active = true
	for _, url := range envoy.Types() {
		h := a.types[url]
		h.answered = false
		if !h.active {
			continue
		}
		r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, Node: node, ResourceNamesSubscribe: slices.Sorted(maps.Keys(h.names))}
		for name, have := range h.resources {
			if r.InitialResourceVersions == nil {
				r.InitialResourceVersions = map[string]string{}
			}
			r.InitialResourceVersions[name] = have.GetVersion()
		}
		node = nil
		if err := stream.Send(r); err != nil {
			cancel()
			return err
		}
	}
	go a.receive(stream, a.done)
	return nil
}

// Close ends the stream, and returns when it has ended.
func (a *ADS) Close() {
	a.mu.Lock()
	cancel, done := a.cancel, a.done
	a.mu.Unlock()
	if cancel == nil {
		return
	}
	cancel()
	<-done
}

func (a *ADS) receive(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient, done chan struct{}) {
	defer close(done)
	for {
		r, err := stream.Recv()
		a.mu.Lock()
		if err == nil {
			err = a.handle(stream, r)
		}
		if err != nil && a.stream == stream {
			a.err = err
		}
		close(a.changed)
		a.changed = make(chan struct{})
		a.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// handle takes a response in, subscribes to what it refers to, and acknowledges
// it, in Envoy's order.
func (a *ADS) handle(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient, r *discoveryv3.DeltaDiscoveryResponse) error {
	url := r.GetTypeUrl()
	h := a.types[url]
	if h == nil {
		return fmt.Errorf("a response of type %q, which was not asked for", url)
	}
	a.events = append(a.events, describe(r))
	h.answered = true
	refused := ""
	for _, res := range r.GetResources() {
		if a.cfg.Refuse != nil {
			if why := a.cfg.Refuse(url, res); why != "" {
				refused += res.GetName() + ": " + why + "\n"
				continue
			}
		}
		delete(h.absent, res.GetName())
		h.resources[res.GetName()] = res
	}
	for _, name := range r.GetRemovedResources() {
		delete(h.resources, name)
		h.absent[name] = true
	}
	if err := a.subscribe(stream); err != nil {
		return err
	}
	ack := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResponseNonce: r.GetNonce()}
	if refused != "" {
		ack.ErrorDetail = &rpcstatus.Status{Code: 13, Message: "Error adding/updating " + refused}
	}
	return stream.Send(ack)
}

func describe(r *discoveryv3.DeltaDiscoveryResponse) string {
	short := map[string]string{
		envoy.ClusterType: "CDS", envoy.EndpointType: "EDS", envoy.SecretType: "SDS",
		envoy.ListenerType: "LDS", envoy.RouteType: "RDS", envoy.ExtensionType: "ECDS",
	}
	s := short[r.GetTypeUrl()]
	for _, res := range r.GetResources() {
		s += " +" + res.GetName()
	}
	for _, name := range r.GetRemovedResources() {
		s += " -" + name
	}
	return s
}

// subscribe asks for what the clusters and listeners refer to, and no longer
// for what they don't.
func (a *ADS) subscribe(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient) error {
	want := map[string]map[string]struct{}{envoy.EndpointType: {}, envoy.SecretType: {}, envoy.RouteType: {}, envoy.ExtensionType: {}}
	for _, url := range []string{envoy.ClusterType, envoy.ListenerType} {
		for _, res := range a.types[url].resources {
			for _, ref := range References(res.GetResource()) {
				want[ref.TypeURL][ref.Name] = struct{}{}
			}
		}
	}
	for _, url := range []string{envoy.EndpointType, envoy.SecretType, envoy.RouteType, envoy.ExtensionType} {
		h := a.types[url]
		r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url}
		for _, name := range slices.Sorted(maps.Keys(want[url])) {
			if _, ok := h.names[name]; !ok {
				r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, name)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(h.names)) {
			if _, ok := want[url][name]; !ok {
				r.ResourceNamesUnsubscribe = append(r.ResourceNamesUnsubscribe, name)
				delete(h.resources, name)
				delete(h.absent, name)
			}
		}
		h.names = want[url]
		if len(r.ResourceNamesSubscribe)+len(r.ResourceNamesUnsubscribe) == 0 {
			continue
		}
		h.active = true
		if err := stream.Send(r); err != nil {
			return err
		}
	}
	lds := a.types[envoy.ListenerType]
	if !lds.active && a.types[envoy.ClusterType].answered && a.has(envoy.EndpointType) && a.has(envoy.SecretType) {
		lds.active = true
		return stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: envoy.ListenerType})
	}
	return nil
}

// has reports whether all names asked for were answered.
func (a *ADS) has(url string) bool {
	h := a.types[url]
	for name := range h.names {
		if h.resources[name] == nil && !h.absent[name] {
			return false
		}
	}
	return true
}

// A View is what a client holds at one moment.
type View struct {
	// Resources are by type URL, then name.
	Resources map[string]map[string]*anypb.Any
	// Complete: all that is referred to is there.
	Complete bool
	// Events are the responses so far, such as "CDS +a -b".
	Events []string
	// Err is why the stream ended.
	Err error
}

// View returns what the client holds now.
func (a *ADS) View() View {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.view()
}

func (a *ADS) view() View {
	v := View{Resources: map[string]map[string]*anypb.Any{}, Events: slices.Clone(a.events), Err: a.err}
	v.Complete = a.types[envoy.ListenerType].active
	for url, h := range a.types {
		v.Resources[url] = map[string]*anypb.Any{}
		for name, r := range h.resources {
			v.Resources[url][name] = r.GetResource()
		}
		for name := range h.names {
			v.Complete = v.Complete && h.resources[name] != nil
		}
	}
	v.Complete = v.Complete && a.types[envoy.ClusterType].answered && a.types[envoy.ListenerType].answered
	return v
}

// Names are the names of the resources of a type, sorted.
func (v View) Names(typeURL string) []string { return slices.Sorted(maps.Keys(v.Resources[typeURL])) }

// Wait returns when the condition holds. It fails when ctx ends, or the stream.
func (a *ADS) Wait(ctx context.Context, condition func(View) bool) (View, error) {
	for {
		a.mu.Lock()
		v, changed := a.view(), a.changed
		a.mu.Unlock()
		switch {
		case condition(v):
			return v, nil
		case v.Err != nil:
			return v, v.Err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return v, fmt.Errorf("what was waited for did not happen; the client has seen %q: %w", v.Events, ctx.Err())
		}
	}
}

// WaitComplete returns when the client has all that it refers to.
func (a *ADS) WaitComplete(ctx context.Context) (View, error) {
	return a.Wait(ctx, func(v View) bool { return v.Complete })
}

// WaitEnd returns why the stream ended.
func (a *ADS) WaitEnd(ctx context.Context) error {
	v, err := a.Wait(ctx, func(v View) bool { return v.Err != nil })
	if err != nil && v.Err == nil {
		return errors.Join(errors.New("the stream is still open"), err)
	}
	return v.Err
}

// Forget has the client lose all that it holds, as a new Envoy does.
func (a *ADS) Forget() {
	fresh := NewADS(a.cfg)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.types = fresh.types
}

// A Reference is a resource that another refers to, over ADS.
type Reference struct{ TypeURL, Name string }

// References finds what a cluster or listener refers to.
func References(body *anypb.Any) []Reference {
	m, err := body.UnmarshalNew()
	if err != nil {
		return nil
	}
	var out []Reference
	walk(m.ProtoReflect(), &out)
	return out
}

func walk(m protoreflect.Message, out *[]Reference) {
	add := func(url, name string, source *corev3.ConfigSource) {
		if source.GetAds() != nil {
			*out = append(*out, Reference{url, name})
		}
	}
	switch x := m.Interface().(type) {
	case *anypb.Any:
		if inner, err := x.UnmarshalNew(); err == nil {
			walk(inner.ProtoReflect(), out)
		}
		return
	case *clusterv3.Cluster:
		if x.GetType() == clusterv3.Cluster_EDS {
			name := x.GetEdsClusterConfig().GetServiceName()
			if name == "" {
				name = x.GetName()
			}
			add(envoy.EndpointType, name, x.GetEdsClusterConfig().GetEdsConfig())
		}
	case *tlsv3.SdsSecretConfig:
		add(envoy.SecretType, x.GetName(), x.GetSdsConfig())
	case *hcmv3.Rds:
		add(envoy.RouteType, x.GetRouteConfigName(), x.GetConfigSource())
	case *hcmv3.HttpFilter:
		if d := x.GetConfigDiscovery(); d != nil {
			add(envoy.ExtensionType, x.GetName(), d.GetConfigSource())
		}
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
			if fd.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, e protoreflect.Value) bool {
					walk(e.Message(), out)
					return true
				})
			}
		case fd.IsList() && fd.Message() != nil:
			for i := range v.List().Len() {
				walk(v.List().Get(i).Message(), out)
			}
		case fd.Message() != nil:
			walk(v.Message(), out)
		}
		return true
	})
}

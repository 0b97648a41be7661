package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	healthv3 "github.com/envoyproxy/go-control-plane/envoy/service/health/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

const (
	adsSotW  = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
	adsDelta = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
	hdsPath  = "/envoy.service.health.v3.HealthDiscoveryService/StreamHealthCheck"

	// What Envoy does when a management stream breaks: a fully jittered
	// exponential back-off.
	retryBase = 500 * time.Millisecond
	retryMax  = 30 * time.Second

	// Envoy's default HTTP/2 windows, so that flow control is not what is measured.
	http2Window = 1 << 28

	// Envoy does not wait longer than this for a cluster's endpoints or secrets.
	initialFetchTimeout = 15 * time.Second
)

// rawCodec passes message bytes through.
type rawCodec struct{}

type frame struct{ b []byte }

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return nil, fmt.Errorf("rawCodec: %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(f.b)}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return fmt.Errorf("rawCodec: %T", v)
	}
	f.b = data.Materialize()
	return nil
}

// countingConn counts what comes off the wire, TLS included.
type countingConn struct {
	net.Conn
	n *atomic.Int64
}

func (c countingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// subscription is a proxy's state for one xDS type. It outlives a stream.
type subscription struct {
	active  bool
	version string
	nonce   string   // of the current stream
	names   []string // asked for by name, sorted; not used for CDS and LDS
	have    map[string]*info
	vers    map[string]string // delta: version of each resource
}

// proxy is one simulated sidecar.
type proxy struct {
	f     *fleet
	idx   int
	name  string
	svc   int   // the service it belongs to
	dests []int // services it must be able to reach
	token string
	node  *corev3.Node

	sessions sync.Mutex // guards cancel
	cancel   context.CancelFunc

	mu         sync.Mutex
	stream     grpc.ClientStream
	subs       [numTypes]subscription
	eds        map[uint64]struct{} // endpoint sets it holds
	started    time.Time           // of the current connection attempt
	first      bool                // a response came on this stream
	ldsTimer   *time.Timer
	sessionNum int
	tlsCache   tls.ClientSessionCache
}

// run keeps the proxy connected until ctx ends, like Envoy does.
func (p *proxy) run(ctx context.Context) {
	failures := 0
	for ctx.Err() == nil {
		sctx, cancel := context.WithCancel(ctx)
		p.sessions.Lock()
		p.cancel = cancel
		p.sessions.Unlock()
		got, dropped, err := p.session(sctx)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if dropped { // by the harness, on purpose: come back at once
			failures = 0
			continue
		}
		p.f.noteFailure(p, err)
		if got {
			failures = 0
		}
		wait := min(retryMax, retryBase<<min(failures, 10))
		failures++
		if sleep(ctx, rand.N(wait)) != nil {
			return
		}
	}
}

// drop breaks the proxy's connection.
func (p *proxy) drop() {
	p.sessions.Lock()
	defer p.sessions.Unlock()
	if p.cancel != nil {
		p.cancel()
	}
}

// session is one connection. It returns whether a response came, and whether
// the harness itself ended it.
func (p *proxy) session(ctx context.Context) (got, dropped bool, err error) {
	p.mu.Lock()
	p.started, p.first = time.Now(), false
	p.sessionNum++
	p.mu.Unlock()
	cfg := p.f.tls.Clone()
	cfg.ClientSessionCache = p.tlsCache
	dialer := net.Dialer{Timeout: 10 * time.Second}
	conn, err := grpc.NewClient("passthrough:///"+p.f.addr,
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, "tcp", addr)
			if err != nil {
				return nil, err
			}
			return countingConn{c, &p.f.wireBytes}, nil
		}),
		grpc.WithInitialWindowSize(http2Window), grpc.WithInitialConnWindowSize(http2Window),
		grpc.WithReadBufferSize(8<<10), grpc.WithWriteBufferSize(4<<10),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(),
	)
	if err != nil {
		return false, false, err
	}
	defer conn.Close()
	if p.token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", p.token)
	}
	path := adsSotW
	if p.f.delta {
		path = adsDelta
	}
	opts := []grpc.CallOption{grpc.ForceCodecV2(rawCodec{}), grpc.MaxCallRecvMsgSize(1 << 30), grpc.WaitForReady(false)}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, path, opts...)
	if err != nil {
		return false, ctx.Err() != nil, err
	}
	p.open(stream)
	defer p.close()
	if p.f.hds {
		go p.health(ctx, conn)
	}
	for {
		var fr frame
		if err := stream.RecvMsg(&fr); err != nil {
			return got, ctx.Err() != nil, err
		}
		at := time.Now()
		got = true
		p.f.xdsBytes.Add(int64(len(fr.b)))
		p.f.responses.Add(1)
		p.f.lastResponse.Store(at.UnixNano())
		if err := p.handle(fr.b, at); err != nil {
			return got, false, err
		}
	}
}

// open starts a stream: a new proxy asks for clusters first; one that comes back
// asks again for all it had, telling what it holds.
func (p *proxy) open(stream grpc.ClientStream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stream = stream
	fresh := !p.subs[typeCDS].active
	for t := range p.subs {
		p.subs[t].nonce = ""
		if p.subs[t].have == nil {
			p.subs[t].have = map[string]*info{}
			p.subs[t].vers = map[string]string{}
		}
	}
	p.subs[typeCDS].active = true
	node := p.node
	for t := range resourceType(numTypes) {
		if !p.subs[t].active {
			continue
		}
		p.request(t, node, true, p.subs[t].names, nil)
		node = nil // Envoy sends it once per stream
	}
	if fresh {
		p.ldsTimer = time.AfterFunc(initialFetchTimeout, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.startLDS()
		})
	}
}

func (p *proxy) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stream = nil
	if p.ldsTimer != nil {
		p.ldsTimer.Stop()
	}
}

func (p *proxy) startLDS() {
	if p.subs[typeLDS].active || p.stream == nil {
		return
	}
	p.subs[typeLDS].active = true
	p.request(typeLDS, nil, true, nil, nil)
}

// request subscribes. In SotW names is the whole list; in delta it is what to
// add, and first marks the first request of the type on this stream.
func (p *proxy) request(t resourceType, node *corev3.Node, first bool, names, gone []string) {
	s := &p.subs[t]
	if p.f.delta {
		r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURLs[t], Node: node, ResourceNamesSubscribe: names, ResourceNamesUnsubscribe: gone}
		if first && len(s.vers) > 0 {
			r.InitialResourceVersions = s.vers
		}
		p.send(r)
		return
	}
	p.send(&discoveryv3.DiscoveryRequest{TypeUrl: typeURLs[t], Node: node, ResourceNames: s.names, VersionInfo: s.version, ResponseNonce: s.nonce})
}

func (p *proxy) ack(t resourceType) {
	s := &p.subs[t]
	if p.f.delta {
		p.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURLs[t], ResponseNonce: s.nonce})
		return
	}
	p.send(&discoveryv3.DiscoveryRequest{TypeUrl: typeURLs[t], ResourceNames: s.names, VersionInfo: s.version, ResponseNonce: s.nonce})
}

func (p *proxy) send(m proto.Message) {
	if p.stream == nil {
		return
	}
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err) // our own message
	}
	// An error shows up in RecvMsg too, with its reason.
	_ = p.stream.SendMsg(&frame{b})
	p.f.requests.Add(1)
}

// handle takes a response: store, subscribe to what it refers to, acknowledge.
func (p *proxy) handle(b []byte, at time.Time) error {
	parse := parseSotW
	if p.f.delta {
		parse = parseDelta
	}
	m, ok := parse(b)
	if !ok {
		return errors.New("malformed discovery response")
	}
	t, known := typeOf(m.typeURL)
	if !known {
		p.f.unknown.Add(1)
		return nil
	}
	p.f.count[t].Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.first = true
	s := &p.subs[t]
	s.version, s.nonce = m.version, m.nonce
	changed := p.store(t, s, m)
	if changed {
		switch t {
		case typeCDS, typeLDS:
			p.resubscribe(t)
		case typeEDS:
			p.eds = make(map[uint64]struct{}, len(s.have))
			for _, i := range s.have {
				p.eds[i.endpoints] = struct{}{}
			}
		}
	}
	p.ack(t)
	if !p.subs[typeLDS].active && p.warm() {
		p.startLDS()
	}
	p.f.check(p, at)
	return nil
}

// store merges a response; it tells whether anything differs.
func (p *proxy) store(t resourceType, s *subscription, m message) (changed bool) {
	complete := !p.f.delta && (t == typeCDS || t == typeLDS)
	before := len(s.have)
	have := s.have
	if complete {
		have = make(map[string]*info, len(m.resources))
	}
	for _, r := range m.resources {
		i := p.f.cache.get(t, r.value)
		name := r.name
		if name == "" {
			name = i.name
		}
		if s.have[name] != i {
			changed = true
		}
		have[name] = i
		if p.f.delta {
			s.vers[name] = r.version
		}
	}
	for _, n := range m.removed {
		if _, ok := have[n]; ok {
			changed = true
			delete(have, n)
			delete(s.vers, n)
		}
	}
	s.have = have
	return changed || len(have) != before || m.resources == nil && t <= typeLDS
}

// resubscribe derives the names to ask for from the clusters and listeners.
func (p *proxy) resubscribe(t resourceType) {
	var eds, rds, sds, ecds []string
	for _, i := range p.subs[typeCDS].have {
		if i.eds != "" {
			eds = append(eds, i.eds)
		}
		sds = append(sds, i.secrets...)
	}
	for _, i := range p.subs[typeLDS].have {
		rds = append(rds, i.routes...)
		sds = append(sds, i.secrets...)
		ecds = append(ecds, i.extensions...)
	}
	if t == typeCDS {
		// A changed cluster warms anew and asks for its endpoints again.
		p.want(typeEDS, eds, true)
	} else {
		p.want(typeRDS, rds, false)
		p.want(typeECDS, ecds, false)
	}
	p.want(typeSDS, sds, false)
}

func (p *proxy) want(t resourceType, names []string, again bool) {
	slices.Sort(names)
	names = slices.Compact(names)
	s := &p.subs[t]
	first := !s.active
	if len(names) == 0 && first {
		return
	}
	if slices.Equal(names, s.names) && !(again && !p.f.delta) {
		return
	}
	var added, gone []string
	for _, n := range names {
		if _, ok := slices.BinarySearch(s.names, n); !ok {
			added = append(added, n)
		}
	}
	for _, n := range s.names {
		if _, ok := slices.BinarySearch(names, n); !ok {
			gone = append(gone, n)
			delete(s.have, n)
			delete(s.vers, n)
		}
	}
	s.names, s.active = names, true
	if t == typeEDS && len(gone) > 0 {
		p.eds = make(map[uint64]struct{}, len(s.have))
		for _, i := range s.have {
			p.eds[i.endpoints] = struct{}{}
		}
	}
	p.request(t, nil, first, added, gone)
}

func (p *proxy) holds(t resourceType) bool {
	s := &p.subs[t]
	for _, n := range s.names {
		if s.have[n] == nil {
			return false
		}
	}
	return true
}

// warm: clusters came, with all their endpoints and secrets.
func (p *proxy) warm() bool {
	return p.subs[typeCDS].nonce != "" && p.holds(typeEDS) && p.holds(typeSDS)
}

// complete: listeners came too, with all their routes, secrets and extensions.
func (p *proxy) complete() bool {
	return p.warm() && p.subs[typeLDS].nonce != "" && p.holds(typeRDS) && p.holds(typeECDS) && len(p.subs[typeLDS].have) > 0
}

// converged: complete, and every service it must reach has the endpoints that
// exist now.
func (p *proxy) converged() bool {
	if !p.complete() {
		return false
	}
	for _, d := range p.dests {
		if _, ok := p.eds[p.f.services[d].Load()]; !ok {
			return false
		}
	}
	return true
}

// marked counts the resources of some types that carry the marker.
func (p *proxy) marked(id int64, types ...resourceType) (n int) {
	for _, t := range types {
		for _, i := range p.subs[t].have {
			if i.marker == id {
				n++
			}
		}
	}
	return n
}

// health runs the health discovery stream that Envoy opens beside ADS: it
// reports every endpoint it is asked about as healthy.
func (p *proxy) health(ctx context.Context, conn *grpc.ClientConn) {
	for ctx.Err() == nil {
		if err := p.healthStream(ctx, conn); err != nil && ctx.Err() == nil {
			p.f.hdsErrors.Add(1)
		}
		if sleep(ctx, time.Second+rand.N(4*time.Second)) != nil {
			return
		}
	}
}

func (p *proxy) healthStream(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := healthv3.NewHealthDiscoveryServiceClient(conn).StreamHealthCheck(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&healthv3.HealthCheckRequestOrEndpointHealthResponse{
		RequestType: &healthv3.HealthCheckRequestOrEndpointHealthResponse_HealthCheckRequest{
			HealthCheckRequest: &healthv3.HealthCheckRequest{
				Node: p.node,
				Capability: &healthv3.Capability{HealthCheckProtocols: []healthv3.Capability_Protocol{
					healthv3.Capability_HTTP, healthv3.Capability_TCP,
				}},
			},
		},
	})
	if err != nil {
		return err
	}
	specs := make(chan *healthv3.HealthCheckSpecifier, 1)
	failed := make(chan error, 1)
	go func() {
		for {
			spec, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case specs <- spec:
			case <-ctx.Done():
				return
			}
		}
	}()
	var answer *healthv3.HealthCheckRequestOrEndpointHealthResponse
	var tick <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failed:
			return err
		case spec := <-specs:
			answer = allHealthy(spec)
			every := spec.GetInterval().AsDuration()
			if every <= 0 {
				every = 5 * time.Second
			}
			ticker := time.NewTicker(every)
			defer ticker.Stop()
			tick = ticker.C
			p.f.hdsSpecs.Add(1)
		case <-tick:
			if err := stream.Send(answer); err != nil {
				return err
			}
		}
	}
}

func allHealthy(spec *healthv3.HealthCheckSpecifier) *healthv3.HealthCheckRequestOrEndpointHealthResponse {
	r := &healthv3.EndpointHealthResponse{}
	for _, c := range spec.GetClusterHealthChecks() {
		ch := &healthv3.ClusterEndpointsHealth{ClusterName: c.GetClusterName()}
		for _, l := range c.GetLocalityEndpoints() {
			lh := &healthv3.LocalityEndpointsHealth{Locality: l.GetLocality()}
			for _, e := range l.GetEndpoints() {
				h := &healthv3.EndpointHealth{Endpoint: &endpointv3.Endpoint{Address: e.GetAddress()}, HealthStatus: corev3.HealthStatus_HEALTHY}
				lh.EndpointsHealth = append(lh.EndpointsHealth, h)
				//lint:ignore SA1019 Envoy fills in both forms, and a control plane may read either
				r.EndpointsHealth = append(r.EndpointsHealth, h)
			}
			ch.LocalityEndpointsHealth = append(ch.LocalityEndpointsHealth, lh)
		}
		r.ClusterEndpointsHealth = append(r.ClusterEndpointsHealth, ch)
	}
	return &healthv3.HealthCheckRequestOrEndpointHealthResponse{
		RequestType: &healthv3.HealthCheckRequestOrEndpointHealthResponse_EndpointHealthResponse{EndpointHealthResponse: r},
	}
}

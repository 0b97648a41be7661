package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"flag"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
)

// The floor is what the transport alone costs: a server that knows all its
// answers beforehand, as encoded bytes, and sends them to N simulated proxies
// over gRPC and TLS. No control plane written in Go on grpc-go gets below it;
// it says how far one is from the possible.

type floorResult struct {
	N            int     `json:"n"`
	Key          string  `json:"server_key"`
	ConfigKiB    float64 `json:"config_kib_per_proxy"`
	ConnectCPU   float64 `json:"connect_cpu_ms_per_proxy"`
	ConnectAll   float64 `json:"connect_all_s"`
	PushKiB      float64 `json:"push_kib_per_proxy"`
	PushCPU      float64 `json:"push_cpu_ms_per_proxy"` // two responses and their acknowledgements
	PushAll      float64 `json:"push_all_ms_median"`    // until the last acknowledgement
	RSS          float64 `json:"rss_mib"`
	RSSPerProxy  float64 `json:"rss_kib_per_proxy"`
	ECDSACert    float64 `json:"issue_ecdsa_p256_ms"` // key and certificate
	RSACert      float64 `json:"issue_rsa_2048_ms"`
	IdleCores    float64 `json:"idle_cores"`
	LoadAvgAfter float64 `json:"load_avg_after"`
}

// floorServer sends encoded responses.
type floorServer struct {
	parts   [numTypes][]byte // resources of a response, encoded
	mu      sync.Mutex
	streams map[*floorStream]struct{}
	acks    atomic.Int64
	ready   atomic.Int64
	want    atomic.Int64
	done    chan struct{}
}

type floorStream struct {
	s    grpc.ServerStream
	send chan []byte
}

func (f *floorServer) handle(_ any, s grpc.ServerStream) error {
	st := &floorStream{s: s, send: make(chan []byte, 16)}
	f.mu.Lock()
	f.streams[st] = struct{}{}
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.streams, st)
		f.mu.Unlock()
	}()
	go func() {
		for {
			select {
			case b := <-st.send:
				if s.SendMsg(&frame{b}) != nil {
					return
				}
			case <-s.Context().Done():
				return
			}
		}
	}()
	for {
		var fr frame
		if err := s.RecvMsg(&fr); err != nil {
			return nil
		}
		nonce, t := "", resourceType(-1)
		fields(fr.b, func(n protowire.Number, v []byte, _ uint64) {
			switch n {
			case 4:
				t, _ = typeOf(string(v))
			case 5:
				nonce = string(v)
			}
		})
		if nonce == "" && t >= 0 {
			st.send <- f.response(t, "1", "first")
			if t == typeLDS {
				f.ready.Add(1)
			}
			continue
		}
		if nonce != "first" && f.acks.Add(1) == f.want.Load() {
			select {
			case f.done <- struct{}{}:
			default:
			}
		}
	}
}

// response prepends version and nonce to the encoded resources.
func (f *floorServer) response(t resourceType, version, nonce string) []byte {
	b := make([]byte, 0, len(f.parts[t])+128)
	b = protowire.AppendTag(b, 1, protowire.BytesType)
	b = protowire.AppendString(b, version)
	b = append(b, f.parts[t]...)
	b = protowire.AppendTag(b, 4, protowire.BytesType)
	b = protowire.AppendString(b, typeURLs[t])
	b = protowire.AppendTag(b, 5, protowire.BytesType)
	return protowire.AppendString(b, nonce)
}

// fill makes a configuration of about the size of a real one.
func (f *floorServer) fill(outbounds, members int) error {
	cfg := &corev3.ConfigSource{ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}, ResourceApiVersion: corev3.ApiVersion_V3}
	pad := func(n int) *corev3.Metadata {
		return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"pad": {Fields: map[string]*structpb.Value{"x": structpb.NewStringValue(strings.Repeat("x", n))}}}}
	}
	add := func(t resourceType, m proto.Message) error {
		a, err := anypb.New(m)
		if err != nil {
			return err
		}
		b, err := proto.Marshal(a)
		if err != nil {
			return err
		}
		f.parts[t] = protowire.AppendTag(f.parts[t], 2, protowire.BytesType)
		f.parts[t] = protowire.AppendBytes(f.parts[t], b)
		return nil
	}
	for i := range outbounds {
		c := &clusterv3.Cluster{
			Name: serviceName(i), ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
			EdsClusterConfig: &clusterv3.Cluster_EdsClusterConfig{EdsConfig: cfg}, Metadata: pad(2000),
		}
		e := &endpointv3.ClusterLoadAssignment{ClusterName: c.Name}
		l := &endpointv3.LocalityLbEndpoints{}
		for k := range members {
			l.LbEndpoints = append(l.LbEndpoints, &endpointv3.LbEndpoint{
				Metadata: pad(100),
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
					SocketAddress: &corev3.SocketAddress{Address: address(i*members + k), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: inboundPort}},
				}}}},
			})
		}
		e.Endpoints = append(e.Endpoints, l)
		for _, err := range []error{add(typeCDS, c), add(typeEDS, e), add(typeLDS, &listenerv3.Listener{Name: "l" + strconv.Itoa(i), Metadata: pad(2000)})} {
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func newCert(key crypto.Signer) (tls.Certificate, error) {
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "floor"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

func issue(kind string) (tls.Certificate, error) {
	if kind == "rsa" {
		k, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return tls.Certificate{}, err
		}
		return newCert(k)
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	return newCert(k)
}

func issueCPU(kind string, n int) (float64, error) {
	before := selfCPU()
	for range n {
		if _, err := issue(kind); err != nil {
			return 0, err
		}
	}
	return round(float64(selfCPU()-before)/1e6/float64(n), 3), nil
}

func runFloor(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("floor", flag.ContinueOnError)
	n := fs.Int("n", 1000, "proxies")
	outbounds := fs.Int("outbounds", 5, "outbounds of each")
	members := fs.Int("members", 10, "endpoints of each outbound")
	pushes := fs.Int("pushes", 10, "pushes")
	key := fs.String("key", "ecdsa", "the server's key: ecdsa or rsa")
	client := fs.String("client", "", "internal: run as the client of this address")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *client != "" {
		return floorClient(ctx, *client, *n, *outbounds)
	}
	r := floorResult{N: *n, Key: *key}
	var err error
	if r.ECDSACert, err = issueCPU("ecdsa", 200); err != nil {
		return err
	}
	if r.RSACert, err = issueCPU("rsa", 20); err != nil {
		return err
	}
	cert, err := issue(*key)
	if err != nil {
		return err
	}
	f := &floorServer{streams: map[*floorStream]struct{}{}, done: make(chan struct{}, 1)}
	if err := f.fill(*outbounds, *members); err != nil {
		return err
	}
	srv := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}})),
		grpc.ForceServerCodecV2(rawCodec{}), grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(32<<10))
	path := strings.Split(adsSotW, "/")
	srv.RegisterService(&grpc.ServiceDesc{ServiceName: path[1], HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{{
		StreamName: path[2], Handler: f.handle, ServerStreams: true, ClientStreams: true,
	}}}, f)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go srv.Serve(lis)
	defer srv.Stop()
	rss0, _ := readProc(os.Getpid())
	self, err := os.Executable()
	if err != nil {
		return err
	}
	port := lis.Addr().(*net.TCPAddr).Port
	child := exec.Command(self, "floor", "-client", fmt.Sprintf("localhost:%d", port), "-n", strconv.Itoa(*n), "-outbounds", strconv.Itoa(*outbounds))
	child.Stderr = os.Stderr
	begin, cpu := time.Now(), selfCPU()
	if err := child.Start(); err != nil {
		return err
	}
	defer func() { _ = child.Process.Kill(); _ = child.Wait() }()
	for f.ready.Load() < int64(*n) {
		if time.Since(begin) > 2*time.Minute {
			return fmt.Errorf("%d of %d proxies connected after two minutes", f.ready.Load(), *n)
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
	r.ConnectAll = secs(time.Since(begin))
	if err := sleep(ctx, time.Second); err != nil {
		return err
	}
	r.ConnectCPU = round(float64(selfCPU()-cpu)/1e6/float64(*n), 3)
	r.ConfigKiB = round(float64(len(f.parts[typeCDS])+len(f.parts[typeEDS])+len(f.parts[typeLDS]))/1024, 1)
	r.PushKiB = round(float64(len(f.parts[typeCDS])+len(f.parts[typeEDS]))/1024, 1)
	p, _ := readProc(os.Getpid())
	r.RSS, r.RSSPerProxy = mib(p.RSS), round(float64(p.RSS-rss0.RSS)/1024/float64(*n), 1)
	cpu, begin = selfCPU(), time.Now()
	if err := sleep(ctx, 5*time.Second); err != nil {
		return err
	}
	r.IdleCores = round(float64(selfCPU()-cpu)/float64(time.Since(begin)), 4)
	var took []float64
	cpu = selfCPU()
	for k := range *pushes {
		f.acks.Store(0)
		f.want.Store(int64(2 * *n))
		begin := time.Now()
		version := strconv.Itoa(k + 2)
		cds, eds := f.response(typeCDS, version, version), f.response(typeEDS, version, version)
		f.mu.Lock()
		for st := range f.streams {
			st.send <- cds
			st.send <- eds
		}
		f.mu.Unlock()
		select {
		case <-f.done:
		case <-time.After(time.Minute):
			return fmt.Errorf("push %d: %d of %d acknowledgements", k, f.acks.Load(), f.want.Load())
		}
		took = append(took, msec(time.Since(begin)))
	}
	r.PushCPU = round(float64(selfCPU()-cpu)/1e6/float64(*n)/float64(*pushes), 4)
	r.PushAll = median(took)
	r.LoadAvgAfter = loadAvg()
	t := &table{}
	t.addf("connect", "%.2f ms CPU/proxy, all after %.2fs (%.1f KiB each)", r.ConnectCPU, r.ConnectAll, r.ConfigKiB)
	t.addf("push of two responses", "%.3f ms CPU/proxy, all acknowledged after %.0f ms (%.1f KiB each)", r.PushCPU, r.PushAll, r.PushKiB)
	t.addf("memory", "RSS %.0f MiB, %.0f KiB/proxy", r.RSS, r.RSSPerProxy)
	t.addf("idle", "%.4f cores", r.IdleCores)
	t.addf("issue a certificate", "ECDSA P-256 %.3f ms, RSA 2048 %.1f ms", r.ECDSACert, r.RSACert)
	t.print(os.Stderr, fmt.Sprintf("floor n=%d, %s server key", r.N, r.Key))
	return emit(r, "")
}

// floorClient is the other side, in a process of its own.
func floorClient(ctx context.Context, addr string, n, outbounds int) error {
	plan := meshPlan{N: n, Services: outbounds, Outbounds: outbounds, XDS: "sotw", Mesh: "floor", Bootstrap: "none", Register: "inline", Clients: 4, Timeout: 2 * time.Minute}
	if err := plan.finish(); err != nil {
		return err
	}
	f, err := newFleet(&target{DP: addr, Insecure: true}, plan)
	if err != nil {
		return err
	}
	if _, err := f.bootstrap(ctx); err != nil {
		return err
	}
	f.hds = false
	f.connect(ctx)
	<-ctx.Done()
	f.disconnect()
	return nil
}

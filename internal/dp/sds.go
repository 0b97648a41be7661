package dp

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"kuma/internal/errs"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// sds serves the keyring to this proxy's Envoy, on a Unix socket that nobody
// but this user can open. A secret that is not there yet is sent once it is.
type sds struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	keys *keyring
	log  *slog.Logger
}

func listenSDS(path string) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		return nil, errs.New(errs.Unavailable, "serve secrets for Envoy at %s: %w", path, err)
	}
	return l, nil
}

func newSDS(keys *keyring, log *slog.Logger) *grpc.Server {
	s := grpc.NewServer(grpc.MaxRecvMsgSize(1<<20), grpc.MaxConcurrentStreams(1024), grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(4<<10))
	secretv3.RegisterSecretDiscoveryServiceServer(s, &sds{keys: keys, log: log})
	return s
}

// receive reads a stream's requests into a channel until it ends.
func receive[T any](ctx context.Context, recv func() (T, error)) (<-chan T, <-chan error) {
	in, end := make(chan T), make(chan error, 1)
	go func() {
		for {
			m, err := recv()
			if err != nil {
				end <- err
				return
			}
			select {
			case in <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	return in, end
}

func over(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// DeltaSecrets serves Envoy's incremental protocol.
func (s *sds) DeltaSecrets(stream grpc.BidiStreamingServer[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]) error {
	in, end := receive(stream.Context(), stream.Recv)
	wanted, sent := map[string]bool{}, map[string]string{}
	nonce := 0
	for {
		have, changed := s.keys.get(wanted)
		resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: secretType}
		for _, name := range slices.Sorted(maps.Keys(have)) {
			if v := have[name]; sent[name] != v.version {
				packed, err := pack(name, v)
				if err != nil {
					return err
				}
				resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: name, Version: v.version, Resource: packed})
				sent[name] = v.version
			}
		}
		if len(resp.Resources) > 0 {
			nonce++
			resp.Nonce, resp.SystemVersionInfo = strconv.Itoa(nonce), strconv.Itoa(nonce)
			if err := stream.Send(resp); err != nil {
				return err
			}
		}
		select {
		case req := <-in:
			if d := req.GetErrorDetail(); d != nil {
				s.log.Warn("envoy refused a certificate", "error", d.GetMessage())
			}
			for _, n := range req.GetResourceNamesSubscribe() {
				wanted[n] = true
				// A name that is asked for again is sent again, unless Envoy
				// says that it has it.
				delete(sent, n)
			}
			maps.Copy(sent, req.GetInitialResourceVersions())
			for _, n := range req.GetResourceNamesUnsubscribe() {
				delete(wanted, n)
				delete(sent, n)
			}
			if len(wanted) > maxSecrets {
				return status.Errorf(codes.ResourceExhausted, "%d secrets are wanted, the limit is %d", len(wanted), maxSecrets)
			}
		case err := <-end:
			return over(err)
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

// StreamSecrets serves the protocol in which each answer holds the whole state.
func (s *sds) StreamSecrets(stream grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
	in, end := receive(stream.Context(), stream.Recv)
	wanted := map[string]bool{}
	last, nonce := "", 0
	for {
		have, changed := s.keys.get(wanted)
		resp := &discoveryv3.DiscoveryResponse{TypeUrl: secretType}
		var versions strings.Builder
		for _, name := range slices.Sorted(maps.Keys(have)) {
			packed, err := pack(name, have[name])
			if err != nil {
				return err
			}
			resp.Resources = append(resp.Resources, packed)
			versions.WriteString(name + "=" + have[name].version + ";")
		}
		if now := versions.String(); now != last && now != "" {
			last = now
			nonce++
			resp.Nonce, resp.VersionInfo = strconv.Itoa(nonce), strconv.Itoa(nonce)
			if err := stream.Send(resp); err != nil {
				return err
			}
		}
		select {
		case req := <-in:
			if d := req.GetErrorDetail(); d != nil {
				s.log.Warn("envoy refused a certificate", "error", d.GetMessage())
			}
			if len(req.GetResourceNames()) > maxSecrets {
				return status.Errorf(codes.ResourceExhausted, "%d secrets are wanted, the limit is %d", len(req.GetResourceNames()), maxSecrets)
			}
			next := map[string]bool{}
			for _, n := range req.GetResourceNames() {
				next[n] = true
			}
			if !maps.Equal(next, wanted) {
				wanted, last = next, ""
			}
		case err := <-end:
			return over(err)
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

func pack(name string, v secret) (*anypb.Any, error) {
	inline := func(b []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
	}
	return anypb.New(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(v.chain), PrivateKey: inline(v.key),
	}}})
}

package envoy

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"kuma/internal/names"
)

// LinkCluster is the static cluster of our bootstrap that leads to kuma-dp's
// own secret discovery service, from which a linked proxy has its keys.
const LinkCluster = "kuma:sds"

// ALPN is the protocol name by which proxies know one another.
const ALPN = "kuma"

// adsSource says that something comes over ADS. It has no timeout: nothing that
// waits for it starts without it.
func adsSource() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		ResourceApiVersion:    corev3.ApiVersion_V3,
		InitialFetchTimeout:   &durationpb.Duration{},
	}
}

// identitySource says where a proxy's certificate comes from: kuma-dp, where
// the proxy is linked, else ADS.
func identitySource(link bool) *corev3.ConfigSource {
	if !link {
		return adsSource()
	}
	return &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
			ApiType:             corev3.ApiConfigSource_DELTA_GRPC,
			TransportApiVersion: corev3.ApiVersion_V3,
			GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
				EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: LinkCluster},
			}}},
			SetNodeOnFirstMessageOnly: true,
		}},
		ResourceApiVersion:  corev3.ApiVersion_V3,
		InitialFetchTimeout: &durationpb.Duration{},
	}
}

// tlsParams are TLS 1.2 for clients of other makers, 1.3 and the post-quantum
// key exchange wherever both ends have them.
func tlsParams() *tlsv3.TlsParameters {
	return &tlsv3.TlsParameters{
		TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2,
		TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		EcdhCurves:                []string{"X25519MLKEM768", "X25519", "P-256"},
	}
}

// commonTLS is what both ends of a connection between proxies have in common.
func commonTLS(mesh string, link bool, peers ...*tlsv3.SubjectAltNameMatcher) *tlsv3.CommonTlsContext {
	return &tlsv3.CommonTlsContext{
		TlsParams:                      tlsParams(),
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{{Name: names.IdentitySecret(mesh), SdsConfig: identitySource(link)}},
		ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
			DefaultValidationContext:         &tlsv3.CertificateValidationContext{MatchTypedSubjectAltNames: peers},
			ValidationContextSdsSecretConfig: &tlsv3.SdsSecretConfig{Name: names.CASecret(mesh), SdsConfig: adsSource()},
		}},
	}
}

// ServerTLS is the inbounds' side: the caller shows a certificate of the mesh.
func ServerTLS(mesh string, link bool) *tlsv3.DownstreamTlsContext {
	return &tlsv3.DownstreamTlsContext{
		CommonTlsContext: commonTLS(mesh, link, uriName(&matcherv3.StringMatcher{
			MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: "spiffe://" + mesh + "/"},
		})),
		RequireClientCertificate: wrapperspb.Bool(true),
	}
}

// ClientTLS is the outbounds' side: the peer must have one of the names. With
// no names any of the mesh will do.
func ClientTLS(mesh string, link bool, sni string, peers []string) *tlsv3.UpstreamTlsContext {
	var sans []*tlsv3.SubjectAltNameMatcher
	for _, p := range peers {
		sans = append(sans, uriName(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: p}}))
	}
	if len(sans) == 0 {
		sans = append(sans, uriName(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: "spiffe://" + mesh + "/"}}))
	}
	common := commonTLS(mesh, link, sans...)
	common.AlpnProtocols = []string{ALPN}
	return &tlsv3.UpstreamTlsContext{CommonTlsContext: common, Sni: sni}
}

func uriName(m *matcherv3.StringMatcher) *tlsv3.SubjectAltNameMatcher {
	return &tlsv3.SubjectAltNameMatcher{SanType: tlsv3.SubjectAltNameMatcher_URI, Matcher: m}
}

// TrustSecret is the secret with the trust anchors of a mesh: every certificate
// of the bundle (PEM) is one. It is public.
func TrustSecret(mesh string, bundle []byte) *tlsv3.Secret {
	return &tlsv3.Secret{
		Name: names.CASecret(mesh),
		Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(bundle)}},
	}
}

// IdentitySecret is the secret with a proxy's certificate chain and key (PEM),
// for a proxy that has no link.
func IdentitySecret(mesh string, chain, key []byte) *tlsv3.Secret {
	return &tlsv3.Secret{
		Name: names.IdentitySecret(mesh),
		Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: inline(chain), PrivateKey: inline(key)}},
	}
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

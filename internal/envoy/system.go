package envoy

import (
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A System is a listener for the proxy's own sake, with what it leads to.
type System struct {
	*listenerv3.Listener
	// Plain treats requests in plaintext, Secure those under TLS.
	Plain, Secure *HTTP
	// TLS is the server's side of Secure.
	TLS *tlsv3.DownstreamTlsContext
	// Clusters are those that the routes lead to.
	Clusters []*Cluster
}

// system makes two filter chains, in the contract's order: plaintext, which has
// no condition, and TLS.
func (e *encoder) system(s *System) {
	for _, c := range s.Clusters {
		e.cluster(c)
	}
	s.FilterChains = []*listenerv3.FilterChain{
		{Filters: []*listenerv3.Filter{e.terminal(s.Plain, nil, nil)}},
		{
			FilterChainMatch: &listenerv3.FilterChainMatch{TransportProtocol: "tls"},
			TransportSocket:  e.socket(s.TLS),
			Filters:          []*listenerv3.Filter{e.terminal(s.Secure, nil, nil)},
		},
	}
	s.ListenerFilters = []*listenerv3.ListenerFilter{tlsInspector()}
	e.add(ListenerType, s.Name, s.Listener)
}

// AdminTLS is the server's side of an admin listener, with certificate and key
// in line, PEM. The caller must show a certificate of ca for the DNS name.
func AdminTLS(chain, key, ca []byte, caller string) *tlsv3.DownstreamTlsContext {
	return &tlsv3.DownstreamTlsContext{
		CommonTlsContext: &tlsv3.CommonTlsContext{
			TlsParams: &tlsv3.TlsParameters{
				TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2,
				TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
			},
			TlsCertificates: []*tlsv3.TlsCertificate{{CertificateChain: inline(chain), PrivateKey: inline(key)}},
			ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
				TrustedCa: inline(ca),
				MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{{
					SanType: tlsv3.SubjectAltNameMatcher_DNS,
					Matcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: caller}},
				}},
			}},
		},
		RequireClientCertificate: wrapperspb.Bool(true),
		// Who comes back shows its certificate again: the authority may be another.
		SessionTicketKeysType:            &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
		DisableStatefulSessionResumption: true,
	}
}

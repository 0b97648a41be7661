package session

import (
	"context"
	"net"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"kuma/internal/errs"
)

// Token returns the raw token that a gRPC call carries: exactly one value of
// "authorization", without "Bearer". Where credentials are off there need be
// none.
func (r *Registry) Token(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	switch {
	case len(values) == 1:
		return values[0], nil
	case r.cfg.Credentials.Off():
		return "", nil
	}
	return "", errs.New(errs.Unauthenticated, `could not extract credential from DiscoveryRequest: request must have exactly 1 "authorization" header, got %d`, len(values))
}

// Remote returns the IP address that a gRPC call comes from, or "".
func Remote(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return p.Addr.String()
	}
	return host
}

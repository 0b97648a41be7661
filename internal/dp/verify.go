package dp

import (
	"context"
	"fmt"
	"net"

	"google.golang.org/grpc/credentials"

	"kuma/internal/pki"
)

// caSource says where the authorities are from that the user gave.
func (c *Config) caSource() string {
	switch {
	case c.ControlPlane.CACert != "":
		return "the authority given as text (KUMA_CONTROL_PLANE_CA_CERT)"
	case c.ControlPlane.CACertFile != "":
		return c.ControlPlane.CACertFile
	}
	return "the system's authorities"
}

// tell adds to a failed verification of the control plane's certificate what
// was asked for, what was seen and what it was verified by. Other errors stay
// as they are.
func (t *trust) tell(err error, asked string) error {
	t.mu.Lock()
	by := t.source
	if len(t.kept) > 0 {
		by += ", with the authorities that the control plane has sent since"
	}
	t.mu.Unlock()
	if seen := pki.DescribeVerify(err, asked, by); seen != "" {
		return fmt.Errorf("%w; %s", err, seen)
	}
	return err
}

// telling is TLS whose errors say what was seen: of a failed handshake gRPC
// passes on nothing but the text. Of others the trust is told.
type telling struct {
	credentials.TransportCredentials
	trust *trust
}

// ClientHandshake opens TLS; authority is the name that is asked for.
func (c telling) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	out, info, err := c.TransportCredentials.ClientHandshake(ctx, authority, conn)
	if err != nil {
		asked, _, bad := net.SplitHostPort(authority)
		if bad != nil {
			asked = authority
		}
		return nil, nil, c.trust.tell(err, asked)
	}
	if state, ok := info.(credentials.TLSInfo); ok {
		c.trust.saw(state.State.PeerCertificates)
	}
	return out, info, nil
}

// Clone makes another one.
func (c telling) Clone() credentials.TransportCredentials {
	return telling{c.TransportCredentials.Clone(), c.trust}
}

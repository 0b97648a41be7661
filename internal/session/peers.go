package session

import (
	"context"
	"net"
	"net/netip"

	"google.golang.org/grpc/peer"
)

// A Peer is an open stream of a proxy, with the address and port that its
// connection comes from: by these a connection is told from others.
type Peer struct {
	Key
	// Kind is the sort of stream.
	Kind Kind
	// Remote is invalid where the connection is none over IP.
	Remote netip.AddrPort
	// Linked: the proxy's kuma-dp keeps the keys and has a link, or is about to.
	Linked bool
}

// Peers returns all open streams, in no order.
func (r *Registry) Peers() []Peer {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Peer, 0, 3*len(r.sessions))
	for _, s := range r.sessions {
		for _, st := range s.streams {
			if st != nil {
				out = append(out, Peer{Key: s.key, Kind: st.Kind, Remote: st.remote, Linked: st.Node.Link})
			}
		}
	}
	return out
}

// remoteAddr is the address and port that a gRPC call comes from; invalid where
// there is none.
func remoteAddr(ctx context.Context) netip.AddrPort {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return netip.AddrPort{}
	}
	t, ok := p.Addr.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	a := t.AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

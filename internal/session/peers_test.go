package session_test

import (
	"net"
	"net/netip"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/peer"

	"kuma/internal/session"
	"kuma/internal/store/memstore"
)

// A stream is known by the address that its connection comes from, for as long
// as it is open.
func TestPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memstore.New())
		ctx := peer.NewContext(p.ctx, &peer.Peer{Addr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort("[::ffff:192.0.2.1]:4000"))})
		st, err := p.sessions.Open(ctx, session.ADS, node("web", "i"), "")
		if err != nil {
			t.Fatal(err)
		}
		want := []session.Peer{{Key: session.Key{Mesh: "default", Name: "web"}, Kind: session.ADS, Remote: netip.MustParseAddrPort("192.0.2.1:4000")}}
		if d := cmp.Diff(want, p.sessions.Peers(), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
			t.Error(d)
		}
		st.Close()
		if got := p.sessions.Peers(); len(got) != 0 {
			t.Errorf("after its end: %v", got)
		}
	})
}

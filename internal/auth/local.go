package auth

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
)

// SocketOwner tells which user holds the other end of a connection on this
// machine: the socket whose own address is local and whose peer is remote. It
// reports false where that can't be known for certain.
type SocketOwner func(local, remote netip.AddrPort) (uid uint32, ok bool)

// peerKey holds a connection's owner in its context.
type peerKey struct{}

// peerOwner is asked for once in a connection's life: its owner stays.
type peerOwner struct{ trusted func() bool }

// ConnContext remembers who owns the other end of a connection, so that the
// kernel is asked once for each connection and not for each request. It is
// meant for http.Server.ConnContext.
func (a *Authenticator) ConnContext(ctx context.Context, c net.Conn) context.Context {
	local, remote := c.LocalAddr(), c.RemoteAddr()
	return context.WithValue(ctx, peerKey{}, &peerOwner{sync.OnceValue(func() bool { return a.trustedPeer(local.String(), remote.String()) })})
}

// trustedPeer reports whether the peer is on this machine and runs as our own
// user or as root.
func (a *Authenticator) trustedPeer(local, remote string) bool {
	l, err := netip.ParseAddrPort(local)
	if err != nil {
		return false
	}
	r, err := netip.ParseAddrPort(remote)
	if err != nil || !r.Addr().Unmap().IsLoopback() {
		return false
	}
	// The peer's socket has our remote address as its own.
	uid, ok := a.owner(r, l)
	return ok && (uid == 0 || uid == a.uid)
}

// forwarded are headers that only a proxy or a browser behind one sends.
var forwarded = []string{"Forwarded", "Via", "X-Real-Ip", "X-Client-Ip", "X-Cluster-Client-Ip", "True-Client-Ip", "Cf-Connecting-Ip", "X-Envoy-External-Address", "X-Original-Host"}

// localAdmin tells whether a request without a credential comes from the
// administrator at this machine: by the contract's rules, and beyond them by
// the owner of the peer's socket.
func (a *Authenticator) localAdmin(r *http.Request) bool {
	if !a.localhostIsAdmin || !direct(r, a.hosts) {
		return false
	}
	if known, ok := r.Context().Value(peerKey{}).(*peerOwner); ok {
		return known.trusted()
	}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return ok && a.trustedPeer(local.String(), r.RemoteAddr)
}

// Direct tells whether a request comes from a program on this machine itself:
// from a loopback address, for a loopback name, by way of no proxy, and not on
// behalf of another site's page. It says nothing of the user.
func Direct(r *http.Request) bool { return direct(r, nil) }

func direct(r *http.Request, hosts []string) bool {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || !peer.Addr().Unmap().IsLoopback() {
		return false
	}
	for _, h := range forwarded {
		if _, there := r.Header[h]; there {
			return false
		}
	}
	for h := range r.Header {
		if strings.HasPrefix(h, "X-Forwarded") {
			return false
		}
	}
	if name, _ := splitHost(r.Host); !loopbackHost(r.Host) && !slices.Contains(hosts, name) {
		return false
	}
	for _, v := range r.Header["Sec-Fetch-Site"] {
		if v != "same-origin" && v != "none" {
			return false
		}
	}
	for _, v := range r.Header["Origin"] {
		if !sameOrigin(v, r) {
			return false
		}
	}
	return true
}

// loopbackHost reports whether a Host header names this machine itself.
func loopbackHost(host string) bool {
	name, _ := splitHost(host)
	if name == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(name)
	return err == nil && ip.Zone() == "" && ip.Unmap().IsLoopback()
}

// splitHost separates a name or address from its port; the port may be absent.
func splitHost(host string) (name, port string) {
	if n, p, err := net.SplitHostPort(host); err == nil {
		return n, p
	}
	return strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"), ""
}

// sameOrigin reports whether an Origin is that of the page which this server
// itself served: same scheme, host and port, nothing else.
func sameOrigin(origin string, r *http.Request) bool {
	u, err := url.Parse(origin)
	if err != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil || u.Opaque != "" {
		return false
	}
	scheme, defaultPort := "http", "80"
	if r.TLS != nil {
		scheme, defaultPort = "https", "443"
	}
	if u.Scheme != scheme || !loopbackHost(u.Host) {
		return false
	}
	on, op := splitHost(u.Host)
	hn, hp := splitHost(r.Host)
	if op == "" {
		op = defaultPort
	}
	if hp == "" {
		hp = defaultPort
	}
	return on == hn && op == hp
}

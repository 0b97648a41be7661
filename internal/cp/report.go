package cp

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/rest"
	"kuma/internal/session"
	"kuma/internal/state"
)

const (
	// maxLinks bounds how many connections a report lists.
	maxLinks = 20_000
	// maxEnvoys bounds how many proxies are asked for one report, envoysAtOnce
	// how many at the same time, envoyPatience how long one may take.
	maxEnvoys     = 50
	envoysAtOnce  = 8
	envoyPatience = 2 * time.Second
	// endsSoon is how long before its end a certificate is pointed out: those
	// that are renewed by themselves have more left.
	endsSoon = 21 * 24 * time.Hour
	// maxAbout is how many names a finding lists.
	maxAbout = 10
)

// reporter makes the TLS report.
type reporter struct {
	cfg      Config
	instance string
	conns    *connections
	peers    func() []session.Peer
	picture  func() *state.Picture
	expiries func() []pki.Expiry
	// gaps are certificate files that may lack an issuer.
	gaps func() []pki.Gap
	// database are the connections to the store's database; nil where there is
	// none.
	database func() []*tls.ConnectionState
	// stats are the statistics of a proxy's Envoy that were ever used, as text.
	stats func(ctx context.Context, key session.Key) ([]byte, error)
	now   func() time.Time
}

// reporter is the TLS report's source.
func (c *ControlPlane) reporter(instance string, proxies inspector) *reporter {
	r := &reporter{
		cfg: c.cfg, instance: instance, conns: &c.conns, peers: c.sessions.Peers, picture: c.tracker.Now, expiries: c.expiries, gaps: c.files.Gaps, now: time.Now,
		stats: func(ctx context.Context, key session.Key) ([]byte, error) {
			return proxies.Inspect(ctx, key.Mesh, key.Name, rest.Inspection{What: "stats", UsedOnly: true})
		},
	}
	if c.postgres != nil {
		r.database = c.postgres.Connections
	}
	return r
}

// known makes the port of an HTTP server known to the TLS report, by its number.
func (c *ControlPlane) known(s server) server {
	d := door{name: "other", caller: "user"}
	admin, public := c.cfg.AdminServer.ports()
	port := uint32(0)
	if addr, ok := s.Listener.Addr().(*net.TCPAddr); ok {
		port = uint32(addr.Port)
	}
	switch {
	case port == c.cfg.APIServer.HTTP.Port && !s.tls:
		d.name, d.mend = "api-http", "KUMA_API_SERVER_HTTP_INTERFACE=127.0.0.1 or KUMA_API_SERVER_HTTP_ENABLED=false; users then use the port with TLS"
	case port == c.cfg.APIServer.HTTPS.Port && s.tls:
		d.name = "api-https"
	case port == c.cfg.Diagnostics.ServerPort:
		d.name, d.caller, d.mend = "diagnostics", "diagnostics", "KUMA_DIAGNOSTICS_TLS_ENABLED=true; probes and scrapers then need https"
	case port == c.cfg.MonitoringAssignmentServer.Port:
		d.name, d.caller, d.mend = "monitoring-assignment-server", "prometheus", madsEnv+"_TLS_ENABLED=true, or "+madsEnv+"_ENABLED=false"
	case port == admin || port == public:
		d.name = adminServer
	}
	s.Listener = c.conns.serve(d, s.Server, s.Listener)
	return s
}

// proxyPeer is a proxy's end of a connection.
type proxyPeer struct {
	key     session.Key
	streams []string
}

// TLSReport makes the report.
func (r *reporter) TLSReport(ctx context.Context, meshName string) (rest.TLSReport, error) {
	pic := r.picture()
	if meshName != "" && pic.Mesh(meshName) == nil {
		return rest.TLSReport{}, errs.New(errs.NotFound, "there is no mesh %q", meshName)
	}
	report := rest.TLSReport{
		Time: r.now().UTC(), Instance: r.instance, Store: r.cfg.Store.Type, Servers: []rest.TLSServer{}, Links: []rest.TLSLink{},
		Envoys: []rest.TLSEnvoy{}, Certificates: []rest.TLSCertificate{},
	}
	found := findings{}
	report.Database = r.databaseLinks(found)
	proxies := map[netip.AddrPort]*proxyPeer{}
	here := map[session.Key]bool{}   // by whether its link is open
	linked := map[session.Key]bool{} // those that should have one
	for _, p := range r.peers() {
		if meshName != "" && p.Mesh != meshName {
			continue
		}
		known := proxies[p.Remote]
		if known == nil {
			known = &proxyPeer{key: p.Key}
			proxies[p.Remote] = known
		}
		known.streams = append(known.streams, p.Kind.String())
		here[p.Key] = here[p.Key] || p.Kind == session.Link
		linked[p.Key] = p.Linked
		if !p.Linked && p.Kind == session.ADS {
			r.unlinked(found, pic, p.Key)
		}
	}
	for key, open := range here {
		if linked[key] && !open {
			found.add(rest.SeverityNote, "the proxy's link is not here: its certificates can't be renewed by this instance, and it can't be asked", key.Mesh+"/"+key.Name,
				"see the log of its kuma-dp; the link may lead to another instance of the control plane")
		}
	}
	doors, open := r.conns.all()
	for _, d := range doors {
		report.Servers = append(report.Servers, r.server(found, d))
	}
	for _, c := range open {
		l, ok := r.link(found, c, proxies, meshName)
		switch {
		case !ok:
		case len(report.Links) == maxLinks:
			report.LinksLeftOut++
		default:
			report.Links = append(report.Links, l)
		}
	}
	for _, e := range r.expiries() {
		if about, ok := strings.CutPrefix(e.Name, "mesh-ca/"); ok && meshName != "" && !strings.HasPrefix(about, meshName+"/") {
			continue
		}
		report.Certificates = append(report.Certificates, rest.TLSCertificate{Name: e.Name, File: e.File, Subject: e.Subject, NotAfter: e.NotAfter})
		r.ends(found, e.Name, e.NotAfter, endsSoon, "see where it comes from: renew the file, or let the control plane's own be renewed (kumactl ca rotate)")
	}
	for _, g := range r.gaps() {
		found.add(rest.SeverityNote, "the certificate file ends with a certificate whose issuer is neither in it nor known to this control plane", fmt.Sprintf("%s: %s lacks %q", g.Name, g.File, g.Issuer),
			"append the issuer's certificate to the file; nothing is to be done where clients have that issuer itself as their authority")
	}
	for _, name := range pic.Meshes() {
		if meshName == "" || name == meshName {
			r.meshMode(found, pic.Mesh(name))
		}
	}
	if r.cfg.DPServer.Authn.DPProxy.Type == auth.ProxyNone {
		found.add(rest.SeverityCritical, "proxies need no credential: any may claim to be any other", "dp-server", "KUMA_DP_SERVER_AUTHN_DP_PROXY_TYPE=dpToken")
	}
	if m := r.cfg.MonitoringAssignmentServer; m.Enabled && !m.RequireClientCert {
		found.add(rest.SeverityNote, "whoever reaches the port learns the addresses and tags of proxies with metrics", "monitoring-assignment-server",
			madsEnv+"_REQUIRE_CLIENT_CERT=true and "+madsEnv+"_TLS_CA_FILE")
	}
	if r.cfg.Access.Anonymous == auth.AnonymousContract {
		found.add(rest.SeverityCritical, "callers without a credential may read and write most resources", "api", "KUMA_ACCESS_ANONYMOUS=closed")
	}
	report.Envoys, report.EnvoysLeftOut = r.envoys(ctx, found, pic, slices.SortedFunc(maps.Keys(here), compareKeys))
	report.Findings = found.list()
	return report, nil
}

func compareKeys(a, b session.Key) int {
	return cmp.Or(cmp.Compare(a.Mesh, b.Mesh), cmp.Compare(a.Name, b.Name))
}

// server describes a port.
func (r *reporter) server(found findings, d *door) rest.TLSServer {
	s := rest.TLSServer{Name: d.name, Address: d.addr.String(), TLS: d.tls != nil}
	if d.tls == nil {
		if d.mend != "" && !loopbackAddr(d.addr) {
			found.add(rest.SeverityWarning, "a port that other machines reach is served without TLS", d.name, d.mend)
		}
		return s
	}
	s.MinVersion = tls.VersionName(max(d.tls.MinVersion, tls.VersionTLS12))
	switch d.tls.ClientAuth {
	case tls.NoClientCert:
		s.ClientCertificates = "none"
	case tls.RequireAnyClientCert, tls.RequireAndVerifyClientCert:
		s.ClientCertificates = "required"
	default:
		s.ClientCertificates = "asked for"
	}
	s.Certificate = certified(shown(d.tls, ""))
	return s
}

func loopbackAddr(a net.Addr) bool {
	t, ok := a.(*net.TCPAddr)
	return ok && t.IP.IsLoopback()
}

func certified(c *x509.Certificate) *rest.TLSCertificate {
	if c == nil {
		return nil
	}
	return &rest.TLSCertificate{Subject: subjectOf(c), Issuer: c.Issuer.String(), NotAfter: c.NotAfter}
}

// link describes a connection; false where it is no part of the report.
func (r *reporter) link(found findings, c *connection, proxies map[netip.AddrPort]*proxyPeer, meshName string) (rest.TLSLink, bool) {
	remote := c.remote()
	l := rest.TLSLink{Kind: c.door.caller, Server: c.door.name, Remote: remote.String(), Since: time.Unix(c.since, 0).UTC(), VerifiedBy: byNothing}
	secured := " over TLS"
	if c.door.tls == nil {
		secured = " without TLS"
	}
	if l.Kind == "proxy" {
		p := proxies[remote]
		switch {
		case p != nil:
			l.Mesh, l.Peer, l.Streams = p.key.Mesh, p.key.Mesh+"/"+p.key.Name, slices.Sorted(slices.Values(p.streams))
			if r.cfg.DPServer.Authn.DPProxy.Type != auth.ProxyNone {
				l.VerifiedBy = "dataplane token" + secured
			}
		case meshName != "":
			return l, false
		default:
			l.Kind = "unknown" // it asks for its bootstrap, or has yet to open a stream
		}
	}
	if u := c.user.Load(); u != nil {
		l.Peer, l.VerifiedBy = u.name, u.by
		if u.by == byToken {
			l.VerifiedBy += secured
		}
	}
	about := cmp.Or(l.Peer, l.Kind+" at "+l.Remote)
	h := c.handshake.Load()
	switch {
	case c.door.tls == nil:
		if !remote.Addr().IsLoopback() {
			found.add(rest.SeverityCritical, "what is sent over this connection, credentials included, can be read and changed on the way", about, c.door.mend)
		}
		return l, true
	case h == nil:
		return l, false // it is still at its handshake
	}
	l.Version, l.Group, l.Cipher = tls.VersionName(h.version), groupName(h.group), tls.CipherSuiteName(h.cipher)
	l.Certificate = certified(h.shown)
	if h.client != nil {
		l.ClientCertificate = &rest.TLSCertificate{Subject: h.client.subject, Issuer: h.client.issuer, NotAfter: h.client.notAfter}
		if l.VerifiedBy == byNothing && h.verified {
			l.VerifiedBy = byCertificate + " of " + h.client.issuer
		}
		r.ends(found, "client certificate of "+about, h.client.notAfter, endsSoon, "give the client a new one, for example with kumactl generate tls-certificate --type client")
	}
	severity := rest.SeverityNote
	if l.Kind == "proxy" {
		severity = rest.SeverityWarning
	}
	if h.version < tls.VersionTLS13 {
		found.add(severity, "the connection has TLS 1.2, although 1.3 is offered", about, "update or configure the client; KUMA_GENERAL_TLS_MIN_VERSION=TLSv1_3 refuses such")
	}
	if !postQuantum(l.Group) {
		found.add(severity, "the key exchange has no post-quantum part: who records the traffic today may read it one day", about, "update the client; KUMA_GENERAL_TLS_REQUIRE_PQ=true refuses such")
	}
	if l.Kind == "proxy" || l.Kind == "user" || l.Kind == "prometheus" {
		found.add(rest.SeverityNote, "whether the client verifies this control plane's certificate can't be seen from here", about,
			"look for --skip-verify in calls of kuma-dp and in kumactl config view, and for insecure_skip_verify in Prometheus's configuration")
	}
	return l, true
}

// groupName is a group's name as TLS's own registry has it.
func groupName(g tls.CurveID) string {
	switch g {
	case 0:
		return ""
	case tls.CurveP256:
		return "P-256"
	case tls.CurveP384:
		return "P-384"
	case tls.CurveP521:
		return "P-521"
	}
	return g.String()
}

func postQuantum(group string) bool { return strings.Contains(group, "MLKEM") }

// ends points out a certificate that has ended, or will soon.
func (r *reporter) ends(found findings, about string, at time.Time, soon time.Duration, mend string) {
	switch left := at.Sub(r.now()); {
	case left <= 0:
		found.add(rest.SeverityCritical, "the certificate has ended", about, mend)
	case left < soon:
		found.add(rest.SeverityWarning, "the certificate ends soon", about, mend)
	}
}

// unlinked points out a proxy that does not keep its own key.
func (r *reporter) unlinked(found findings, pic *state.Picture, key session.Key) {
	severity := rest.SeverityNote
	if m := pic.Mesh(key.Mesh); m != nil && m.Spec.EnabledBackend() != nil {
		severity = rest.SeverityWarning
	}
	found.add(severity, "the proxy has no link: its private key is made by the control plane and sent to it", key.Mesh+"/"+key.Name,
		"run it with the kuma-dp of this product")
}

// meshMode points out what a mesh does not encrypt.
func (r *reporter) meshMode(found findings, m *state.Mesh) {
	if m == nil {
		return
	}
	switch b := m.Spec.EnabledBackend(); {
	case b == nil:
		found.add(rest.SeverityWarning, "the mesh has no mutual TLS: its services speak in clear, and with anyone", m.Name, "mtls.enabledBackend of the Mesh")
	case b.Mode == mesh.Permissive:
		found.add(rest.SeverityWarning, "the mesh takes connections without TLS too", m.Name, "mode: STRICT of the Mesh's backend, when all callers are in the mesh")
	}
}

// envoys asks proxies for what they count of connections between them.
func (r *reporter) envoys(ctx context.Context, found findings, pic *state.Picture, keys []session.Key) (list []rest.TLSEnvoy, leftOut int) {
	list = []rest.TLSEnvoy{}
	for _, k := range keys {
		m := pic.Mesh(k.Mesh)
		if m == nil || m.Spec.EnabledBackend() == nil {
			continue
		}
		if len(list) == maxEnvoys {
			leftOut++
			continue
		}
		b := m.Spec.EnabledBackend()
		e := rest.TLSEnvoy{
			Mesh: k.Mesh, Proxy: k.Name, VerifiedBy: "mesh authority " + k.Mesh + "/" + b.Name + ", both sides",
			Versions: map[string]uint64{}, Groups: map[string]uint64{}, Ciphers: map[string]uint64{},
		}
		if e.Certificate = identityOf(m, k.Name); e.Certificate != nil {
			r.ends(found, k.Mesh+"/"+k.Name, e.Certificate.NotAfter, b.Lifetime()/6, "see the log of its kuma-dp for why it is not renewed")
		}
		list = append(list, e)
	}
	var g errgroup.Group
	g.SetLimit(envoysAtOnce)
	for i := range list {
		e := &list[i]
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, envoyPatience)
			defer cancel()
			page, err := r.stats(ctx, session.Key{Mesh: e.Mesh, Name: e.Proxy})
			if err != nil {
				e.Error = err.Error()
				return nil
			}
			countTLS(page, e)
			return nil
		})
	}
	_ = g.Wait() // it has no errors: a proxy's own is in its entry
	for _, e := range list {
		about := e.Mesh + "/" + e.Proxy
		if e.Error != "" {
			found.add(rest.SeverityNote, "the proxy could not be asked for its connections", about, "the report has the reason (kumactl tls report -o yaml)")
		}
		for v := range e.Versions {
			if v != "TLSv1.3" {
				found.add(rest.SeverityWarning, "connections between proxies have "+v, about, "update the Envoy of its callers")
			}
		}
		for g := range e.Groups {
			if !postQuantum(g) {
				found.add(rest.SeverityWarning, "connections between proxies have no post-quantum key exchange", about, "update the Envoy of its callers, or its own")
			}
		}
		if e.Refused > 0 {
			found.add(rest.SeverityNote, "connections were refused because of the caller's certificate", about, "see who calls it: a caller outside of the mesh, or one whose certificate has ended")
		}
	}
	return list, leftOut
}

// identityOf is the certificate that a proxy was issued, as far as its insight
// says.
func identityOf(m *state.Mesh, name string) *rest.TLSCertificate {
	i := m.Get(mesh.DataplaneInsights.Name, name)
	dp, ok := m.Dataplane(name)
	if i == nil || !ok {
		return nil
	}
	t := mesh.DataplaneInsights.From(i).Spec.MTLS
	if t == nil || t.CertificateExpirationTime == nil {
		return nil
	}
	c := &rest.TLSCertificate{Issuer: t.IssuedBackend, NotAfter: *t.CertificateExpirationTime}
	if services := state.IdentityOf(dp).Services; len(services) > 0 {
		c.Subject = "spiffe://" + m.Name + "/" + services[0]
	}
	return c
}

// countTLS reads Envoy's statistics, "name: value" in lines, and adds up those
// of its listeners' TLS:
//
//	listener.10.0.0.1_8080.ssl.versions.TLSv1.3: 7
//	listener.10.0.0.1_8080.ssl.curves.X25519MLKEM768: 7
//	listener.10.0.0.1_8080.ssl.ciphers.TLS_AES_128_GCM_SHA256: 7
func countTLS(page []byte, e *rest.TLSEnvoy) {
	for line := range bytes.Lines(page) {
		if !bytes.HasPrefix(line, []byte("listener.")) {
			continue
		}
		name, value, ok := strings.Cut(strings.TrimSpace(string(line)), ": ")
		_, stat, isTLS := strings.Cut(name, ".ssl.")
		n, err := strconv.ParseUint(value, 10, 64)
		if !ok || !isTLS || err != nil || n == 0 {
			continue
		}
		sort, which, _ := strings.Cut(stat, ".")
		switch sort {
		case "versions":
			count(e.Versions, which, n)
		case "curves":
			count(e.Groups, which, n)
		case "ciphers":
			count(e.Ciphers, which, n)
		case "fail_verify_error", "fail_verify_no_cert", "fail_verify_san", "fail_verify_cert_hash":
			e.Refused += n
		}
	}
}

// count adds to a counter. A proxy decides on the names, but not on how many.
func count(into map[string]uint64, name string, n uint64) {
	if _, there := into[name]; there || len(into) < 32 && len(name) <= maxText {
		into[name] += n
	}
}

// findings are gathered by what is said, so that a thousand proxies with one
// fault make one finding.
type findings map[string]*finding

// finding is a finding with all whom it concerns.
type finding struct {
	rest.TLSFinding
	about map[string]bool
}

func (f findings) add(severity, message, about, mend string) {
	key := severity + message + mend
	if f[key] == nil {
		f[key] = &finding{rest.TLSFinding{Severity: severity, Message: message, Mend: mend}, map[string]bool{}}
	}
	f[key].about[about] = true
}

// list returns the findings, the gravest first.
func (f findings) list() []rest.TLSFinding {
	rank := map[string]int{rest.SeverityCritical: 0, rest.SeverityWarning: 1, rest.SeverityNote: 2}
	out := make([]rest.TLSFinding, 0, len(f))
	for _, one := range f {
		names := slices.Sorted(maps.Keys(one.about))
		one.Count, one.About = len(names), names[:min(len(names), maxAbout)]
		out = append(out, one.TLSFinding)
	}
	slices.SortFunc(out, func(a, b rest.TLSFinding) int {
		return cmp.Or(cmp.Compare(rank[a.Severity], rank[b.Severity]), cmp.Compare(a.Message, b.Message), cmp.Compare(a.Mend, b.Mend))
	})
	return out
}

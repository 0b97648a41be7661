package cp

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"

	"kuma/internal/errs"
	"kuma/internal/pki"
)

// ServerTLS are the TLS settings of one server, to be embedded in its
// configuration. What is empty is as in General; what is set wins over it.
type ServerTLS struct {
	// TLSCertFile and TLSKeyFile are this server's own pair, PEM; empty means
	// the general one. They may be replaced while the control plane runs.
	TLSCertFile string `json:"tlsCertFile"`
	TLSKeyFile  string `json:"tlsKeyFile"`
	// TLSMinVersion and TLSMaxVersion are TLSv1_2 or TLSv1_3.
	TLSMinVersion string `json:"tlsMinVersion"`
	TLSMaxVersion string `json:"tlsMaxVersion"`
	// TLSCipherSuites lists Go's names of suites for TLS 1.2.
	TLSCipherSuites []string `json:"tlsCipherSuites"`
}

// general is General's part, as that of a server.
func (g General) serverTLS() ServerTLS {
	return ServerTLS{g.TLSCertFile, g.TLSKeyFile, g.TLSMinVersion, g.TLSMaxVersion, g.TLSCipherSuites}
}

// tlsServer is a server that can speak TLS, for what is checked at the start.
type tlsServer struct {
	// env begins the names of its settings' variables.
	env string
	ServerTLS
}

// tlsServers lists all servers that have TLS settings.
func (c *Config) tlsServers() []tlsServer {
	among := c.InterCP.Server
	return []tlsServer{
		{"KUMA_DP_SERVER", c.DPServer.ServerTLS},
		{"KUMA_API_SERVER_HTTPS", c.APIServer.HTTPS.ServerTLS},
		{"KUMA_DIAGNOSTICS", c.Diagnostics.ServerTLS},
		{madsEnv, c.MonitoringAssignmentServer.ServerTLS},
		{"KUMA_MULTIZONE_GLOBAL_KDS", c.Multizone.Global.KDS.ServerTLS},
		{"KUMA_INTER_CP_SERVER", ServerTLS{TLSMinVersion: among.TLSMinVersion, TLSMaxVersion: among.TLSMaxVersion, TLSCipherSuites: among.TLSCipherSuites}},
	}
}

// checkTLS finds what is wrong with the TLS settings, without reading files.
func (c *Config) checkTLS() error {
	var bad []errs.Field
	add := func(setting, format string, args ...any) {
		bad = append(bad, errs.Field{Path: setting, Message: fmt.Sprintf(format, args...)})
	}
	bad = append(bad, c.General.tlsFaults("KUMA_GENERAL", ServerTLS{})...)
	if len(bad) == 0 { // what is wrong in general is told once
		for _, s := range c.tlsServers() {
			bad = append(bad, c.General.tlsFaults(s.env, s.ServerTLS)...)
		}
	}
	for _, s := range append(c.tlsServers(), tlsServer{"KUMA_GENERAL", c.General.serverTLS()}) {
		switch {
		case s.TLSCertFile != "" && s.TLSKeyFile == "":
			add(s.env+"_TLS_KEY_FILE", "is missing, but %s_TLS_CERT_FILE is set: a certificate needs its key; set both, or none", s.env)
		case s.TLSCertFile == "" && s.TLSKeyFile != "":
			add(s.env+"_TLS_CERT_FILE", "is missing, but %s_TLS_KEY_FILE is set: a key needs its certificate; set both, or none", s.env)
		}
	}
	if at := c.General.TLSCAStore; at != caInFile && at != caInStore {
		add("KUMA_GENERAL_TLS_CA_STORE", "%q is not known; use %q (the work directory) or %q (shared by all control planes on one store)", at, caInFile, caInStore)
	}
	if c.General.TLSReloadInterval <= 0 {
		add("KUMA_GENERAL_TLS_RELOAD_INTERVAL", "must be positive, such as 1s")
	}
	for setting, name := range map[string]string{
		"KUMA_GENERAL_ADVERTISED_HOSTNAME":      c.General.AdvertisedHostname,
		"KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_HOST": c.BootstrapServer.Params.XDSHost,
	} {
		if name != "" && net.ParseIP(name) == nil && !hostname(name) {
			add(setting, "%q is neither a host name nor an IP address; give it without scheme and port", name)
		}
	}
	https := c.APIServer.HTTPS
	if https.RequireClientCert && https.TLSCAFile == "" && c.APIServer.Auth.ClientCertsDir == "" {
		add("KUMA_API_SERVER_HTTPS_REQUIRE_CLIENT_CERT", "needs to know whose certificates are taken: set KUMA_API_SERVER_HTTPS_TLS_CA_FILE (a file with the authorities) or KUMA_API_SERVER_AUTH_CLIENT_CERTS_DIR (a directory of such files)")
	}
	return errs.Fields(bad...)
}

// hostname reports whether a name can be a host's (RFC 1123).
func hostname(name string) bool {
	return len(name) <= 253 && !slices.ContainsFunc(strings.Split(name, "."), func(label string) bool {
		return label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" ||
			strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-")
	})
}

// tlsVersions are the contract's names.
var tlsVersions = map[string]uint16{"TLSv1_2": tls.VersionTLS12, "TLSv1_3": tls.VersionTLS13}

// tlsParams are the versions and suites of a server.
type tlsParams struct {
	min, max uint16 // max 0: the newest
	suites   []uint16
}

// tlsParams finds a server's versions and suites: its own where they are set,
// else the general ones. Faults name the setting that is wrong.
func (g General) tlsParams(env string, s ServerTLS) (p tlsParams, bad []errs.Field) {
	add := func(setting, format string, args ...any) {
		bad = append(bad, errs.Field{Path: setting, Message: fmt.Sprintf(format, args...)})
	}
	const general = "KUMA_GENERAL"
	choose := func(own, fallback, suffix string) (version uint16, name, setting string) {
		name, setting = own, env+suffix
		if own == "" {
			name, setting = fallback, general+suffix
		}
		version, ok := tlsVersions[name]
		if !ok && name != "" {
			add(setting, "unsupported tls version: %s supported versions:[TLSv1_2 TLSv1_3]", name)
		}
		return version, name, setting
	}
	var minName, minSetting, maxName, maxSetting string
	p.min, minName, minSetting = choose(s.TLSMinVersion, g.TLSMinVersion, "_TLS_MIN_VERSION")
	p.max, maxName, maxSetting = choose(s.TLSMaxVersion, g.TLSMaxVersion, "_TLS_MAX_VERSION")
	if p.min == 0 {
		p.min = tls.VersionTLS12
	}
	switch {
	case p.max != 0 && p.max < p.min:
		add(maxSetting, "%s is older than %s, which is %s; raise the one or lower the other", maxName, minSetting, minName)
	case p.max != 0 && p.max < tls.VersionTLS13 && g.TLSRequirePQ:
		add(maxSetting, "%s has no post-quantum key exchange, which KUMA_GENERAL_TLS_REQUIRE_PQ demands; it needs TLSv1_3", maxName)
	}
	if g.TLSRequirePQ {
		p.min = tls.VersionTLS13
	}
	suites, setting := s.TLSCipherSuites, env+"_TLS_CIPHER_SUITES"
	if len(suites) == 0 {
		suites, setting = g.TLSCipherSuites, general+"_TLS_CIPHER_SUITES"
	}
	for _, name := range suites {
		byName := func(c *tls.CipherSuite) bool { return c.Name == name }
		i := slices.IndexFunc(tls.CipherSuites(), byName)
		switch {
		case i >= 0:
			p.suites = append(p.suites, tls.CipherSuites()[i].ID)
		case slices.ContainsFunc(tls.InsecureCipherSuites(), byName):
			add(setting, "%s is a cipher suite that is broken or close to it; take it off the list, or use one such as TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", name)
		default:
			add(setting, "there is no cipher suite %q; use Go's names, such as TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", name)
		}
	}
	return p, bad
}

func (g General) tlsFaults(env string, s ServerTLS) []errs.Field {
	_, bad := g.tlsParams(env, s)
	return bad
}

// certificate is what a server shows: a pair of files that is watched, or the
// control plane's own.
type certificate interface {
	// TLS is a configuration that asks for the current certificate at each
	// handshake.
	TLS() *tls.Config
	// CA is what clients verify it with, PEM, and SANs whom it is for.
	CA() []byte
	SANs() []string
}

// certificateOf is a server's own certificate where it has one, else the general
// one. The name begins its settings' variables, such as KUMA_DP_SERVER.
func (c *ControlPlane) certificateOf(env string, s ServerTLS) (certificate, error) {
	if s.TLSCertFile == "" {
		return c.general, nil
	}
	return c.openPair(env, s.TLSCertFile, s.TLSKeyFile)
}

func (c *ControlPlane) openPair(env, cert, key string) (*pki.Pair, error) {
	name := strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(env, "KUMA_")), "_", "-")
	return c.files.Pair(name, env+"_TLS_CERT_FILE", cert, key, c.cfg.hosts(env)...)
}

// hosts are those that a pair must be for, now and when it is replaced. Its
// settings' variables begin with env.
func (c *Config) hosts(env string) []pki.Host {
	proxies := "KUMA_GENERAL"
	if c.DPServer.TLSCertFile != "" {
		proxies = "KUMA_DP_SERVER"
	}
	if host := c.BootstrapServer.Params.XDSHost; host != "" && env == proxies {
		return []pki.Host{{Name: host, Setting: "KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_HOST"}}
	}
	return nil
}

// serverTLS makes the TLS configuration of a server. The name begins its
// settings' variables, such as KUMA_DP_SERVER. Its settings win over the general
// ones. Clients may be nil: then no certificate is asked of them.
//
// The server's certificate and the authorities of its clients are looked up at
// each handshake, so that files can be replaced; nothing is resumed, so that
// each handshake is verified by what is trusted now (HRD-08). Where clients is
// not nil, the protocols that are negotiated are HTTP/2 and HTTP/1.1.
func (c *ControlPlane) serverTLS(env string, s ServerTLS, clients *clientCAs) (*tls.Config, error) {
	cert, err := c.certificateOf(env, s)
	if err != nil {
		return nil, err
	}
	return c.cfg.General.tlsOf(env, s, cert, clients)
}

// tlsOf is serverTLS for a certificate that is at hand.
func (g General) tlsOf(env string, s ServerTLS, cert certificate, clients *clientCAs) (*tls.Config, error) {
	p, bad := g.tlsParams(env, s)
	if err := errs.Fields(bad...); err != nil {
		return nil, err
	}
	t := cert.TLS()
	t.SessionTicketsDisabled = true
	t.MinVersion, t.MaxVersion, t.CipherSuites = p.min, p.max, p.suites
	t.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256, tls.CurveP384}
	if g.TLSRequirePQ {
		t.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	}
	if clients == nil {
		return t, nil
	}
	t.NextProtos = []string{"h2", "http/1.1"}
	t.ClientAuth = tls.VerifyClientCertIfGiven
	if clients.required {
		t.ClientAuth = tls.RequireAndVerifyClientCert
	}
	t.VerifyPeerCertificate = func(raw [][]byte, _ [][]*x509.Certificate) error {
		if len(raw) > maxClientChain {
			return errs.New(errs.Invalid, "the client sent %d certificates, the limit is %d", len(raw), maxClientChain)
		}
		return nil
	}
	base := t.Clone()
	t.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		now := base.Clone()
		now.ClientCAs = clients.pool()
		return now, nil
	}
	return t, nil
}

// maxClientChain is how many certificates a client may send. They are counted
// after they were verified: crypto/tls has no hook before, and who verifies by
// himself instead leaves ConnectionState.VerifiedChains empty, by which the API
// knows a client. What the verification costs is bounded elsewhere: by the size
// of the message (256 KiB), of RSA keys (8192 bits), and by x509, which gives up
// after a hundred signatures (HRD-24, TestClientCertificates).
const maxClientChain = 10

// clientCAs are those whose clients' certificates a server takes.
type clientCAs struct {
	// required refuses clients without a certificate.
	required bool
	from     []*pki.Pool

	mu      sync.Mutex
	version uint64
	now     *x509.CertPool
}

// openFiles opens the operator's certificate files that more than one part
// needs, and those of servers that have no port yet.
func (c *ControlPlane) openFiles() error {
	c.expiring = append(c.expiring, c.files.Expiries)
	if g := c.cfg.General; g.TLSCertFile != "" {
		pair, err := c.openPair("KUMA_GENERAL", g.TLSCertFile, g.TLSKeyFile)
		if err != nil {
			return err
		}
		c.general = pair
	}
	if kds := c.cfg.Multizone.Global.KDS; kds.TLSEnabled && kds.TLSCertFile != "" {
		if _, err := c.openPair("KUMA_MULTIZONE_GLOBAL_KDS", kds.TLSCertFile, kds.TLSKeyFile); err != nil {
			return err
		}
	}
	return nil
}

// ownAuthorities are those of the control plane itself. It has none where the
// general pair is the operator's.
func (c *ControlPlane) ownAuthorities() []*x509.Certificate {
	if c.cfg.General.TLSCertFile != "" || c.certs == nil { // it may still wait for its store
		return nil
	}
	own, _, err := pki.ReadAnchors(c.certs.CA())
	if err != nil { // a pair of the original that is no authority
		return nil
	}
	return own
}

// clientSource is a setting that names a file or a directory of authorities of
// clients' certificates. The name is that of its Expiry.
type clientSource struct{ name, setting, path string }

// clientCAs opens the sources whose path is set, in their order, and watches
// them. It is nil where there is none.
func (c *ControlPlane) clientCAs(required bool, sources ...clientSource) (*clientCAs, error) {
	a := &clientCAs{required: required}
	for _, s := range sources {
		if s.path == "" {
			continue
		}
		pool, err := c.files.Clients(s.name, s.setting, s.path)
		if err != nil {
			return nil, err
		}
		a.from = append(a.from, pool)
	}
	if len(a.from) == 0 {
		return nil, nil
	}
	return a, nil
}

// advertised lists names and addresses that clients are told to use: the
// certificate that the control plane makes itself is for them too.
func (c *Config) advertised() []string {
	var out []string
	for _, name := range []string{c.General.AdvertisedHostname, c.BootstrapServer.Params.XDSHost} {
		if name != "" && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

// checkXDSHost refuses an address for proxies that the certificate of their
// server is not for. An operator's pair is asked for it each time it is read.
func (c *Config) checkXDSHost(cert certificate) error {
	host, sans := c.BootstrapServer.Params.XDSHost, cert.SANs()
	if host == "" {
		return nil
	}
	leaf := new(x509.Certificate)
	for _, name := range sans {
		if ip := net.ParseIP(name); ip != nil {
			leaf.IPAddresses = append(leaf.IPAddresses, ip)
		} else {
			leaf.DNSNames = append(leaf.DNSNames, name)
		}
	}
	if leaf.VerifyHostname(host) == nil {
		return nil
	}
	return errs.New(errs.Invalid, "KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_HOST: the certificate of the server for proxies is not for %q but for %q; set one of these, or give the server a certificate that has the name", host, sans)
}

// tlsPosture says at start what the TLS settings mean for clients.
func (c *ControlPlane) tlsPosture() {
	if c.cfg.General.TLSRequirePQ {
		c.log.Info("clients without the key exchange X25519MLKEM768 are refused on every TLS port; KUMA_GENERAL_TLS_REQUIRE_PQ=false ends it")
	}
	if c.cfg.Diagnostics.TLSEnabled {
		c.log.Info("the diagnostics server speaks TLS: probes and scrapers need https", "port", c.cfg.Diagnostics.ServerPort)
	}
	if api := c.cfg.APIServer; !api.HTTPS.Enabled && (api.HTTPS.TLSCAFile != "" || api.Auth.ClientCertsDir != "") {
		c.log.Warn("client certificates mean nothing without TLS: KUMA_API_SERVER_HTTPS_ENABLED is false")
	} else if api.HTTPS.RequireClientCert && api.HTTP.Enabled && !loopback(api.HTTP.Interface) {
		c.log.Warn("client certificates are demanded on the port with TLS only, and the one without it is open to other machines; KUMA_API_SERVER_HTTP_INTERFACE=127.0.0.1 or KUMA_API_SERVER_HTTP_ENABLED=false ends it", "port", api.HTTP.Port)
	}
}

// pool is what is trusted now: nothing where there is no source. It is never
// nil, which would mean the authorities of this machine.
func (a *clientCAs) pool() *x509.CertPool {
	if a == nil {
		return x509.NewCertPool()
	}
	var version uint64
	for _, p := range a.from {
		version += p.Version()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.now != nil && a.version == version {
		return a.now
	}
	a.now, a.version = x509.NewCertPool(), version
	for _, p := range a.from {
		for _, cert := range p.Certificates() {
			a.now.AddCert(cert)
		}
	}
	return a.now
}

// secure has an HTTP server speak TLS. HTTP/2 is left out where the suites lack
// those that it demands (RFC 9113, section 9.2.2). A handshake has an end also
// where the server has no timeouts.
func secure(s *http.Server, t *tls.Config) {
	s.TLSConfig = t
	if s.ReadHeaderTimeout <= 0 && s.ReadTimeout <= 0 && s.WriteTimeout <= 0 {
		s.ReadHeaderTimeout = handshakeTimeout
	}
	demanded := []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}
	if t.CipherSuites == nil || slices.ContainsFunc(demanded, func(id uint16) bool { return slices.Contains(t.CipherSuites, id) }) {
		return
	}
	s.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	t.NextProtos = []string{"http/1.1"}
	if next := t.GetConfigForClient; next != nil {
		t.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			now, err := next(hello)
			if err == nil {
				now.NextProtos = []string{"http/1.1"}
			}
			return now, err
		}
	}
}

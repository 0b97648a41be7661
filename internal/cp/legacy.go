package cp

import (
	"bufio"
	"cmp"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"kuma/internal/auth"
	"kuma/internal/rest"
)

// AdminServer is the admin server of Kuma 0.7, kept for those who still use its
// settings and addresses: POST /tokens, on this machine without TLS and, where
// asked for, for others who show a client certificate. It is deprecated: the
// API issues tokens today (POST /tokens/dataplane).
type AdminServer struct {
	// Enabled opens the admin server. Where it is not said, any other setting
	// of adminServer opens it.
	Enabled *bool `json:"enabled"`
	// Local is the server on 127.0.0.1.
	Local AdminLocal `json:"local"`
	// Public is the server for other machines.
	Public AdminPublic `json:"public"`
	// APIs are what it serves.
	APIs AdminAPIs `json:"apis"`
}

// AdminLocal is the admin server on 127.0.0.1.
type AdminLocal struct {
	// Port is 5679 where it is 0.
	Port uint32 `json:"port"`
}

// AdminPublic is the admin server for other machines: HTTPS, and every caller
// shows a certificate.
type AdminPublic struct {
	// Enabled opens it.
	Enabled bool `json:"enabled"`
	// Interface is the address that it listens on; empty means all.
	Interface string `json:"interface"`
	// Port is the local server's where it is 0.
	Port uint32 `json:"port"`
	// TLSCertFile and TLSKeyFile are its pair, needed where it is enabled.
	TLSCertFile string `json:"tlsCertFile"`
	TLSKeyFile  string `json:"tlsKeyFile"`
	// ClientCertsDir holds the certificates (*.pem, *.crt) of those who may
	// call, without keys; needed where it is enabled.
	ClientCertsDir string `json:"clientCertsDir"`
}

// AdminAPIs are what the admin server serves.
type AdminAPIs struct {
	// DataplaneToken is the issuing of dataplane tokens.
	DataplaneToken AdminDataplaneToken `json:"dataplaneToken"`
}

// AdminDataplaneToken is the issuing of dataplane tokens.
type AdminDataplaneToken struct {
	// Enabled, set to false, is the older form of dpServer.authn.dpProxy.type
	// "none": proxies need no token.
	Enabled *bool `json:"enabled"`
}

// adminEnv begins the names of the variables of the server for other machines.
const adminEnv = "KUMA_ADMIN_SERVER_PUBLIC"

// defaultAdminPort is where Kuma 0.7 had its admin server.
const defaultAdminPort = 5679

// opened tells whether the admin server is to be opened.
func (a AdminServer) opened() bool {
	if a.APIs.DataplaneToken.off() {
		return false // there is nothing else that it serves
	}
	if a.Enabled != nil {
		return *a.Enabled
	}
	return a.Local != AdminLocal{} || a.Public != AdminPublic{} || a.APIs.DataplaneToken.Enabled != nil
}

func (d AdminDataplaneToken) off() bool { return d.Enabled != nil && !*d.Enabled }

// ports are those of the local and of the public server; the latter is 0 where
// that is not opened.
func (a AdminServer) ports() (local, public uint32) {
	if !a.opened() {
		return 0, 0
	}
	local = cmp.Or(a.Local.Port, defaultAdminPort)
	if a.Public.Enabled {
		public = cmp.Or(a.Public.Port, local)
	}
	return local, public
}

// doorways are the ports that it opens.
func (a AdminServer) doorways() []doorway {
	local, public := a.ports()
	if local == 0 {
		return nil
	}
	const what = "the admin server"
	host := a.Public.Interface
	out := []doorway{{what, "KUMA_ADMIN_SERVER_LOCAL_PORT", "127.0.0.1", local}}
	switch everywhere := host == "" || host == "0.0.0.0" || host == "::"; {
	case public == local && everywhere:
		out[0].host = host
	case public != 0 && (public != local || host != "127.0.0.1" && host != "localhost"):
		out = append(out, doorway{what, adminEnv + "_PORT", host, public})
	}
	return out
}

// pair is what the server shows.
func (p AdminPublic) pair() ServerTLS {
	return ServerTLS{TLSCertFile: p.TLSCertFile, TLSKeyFile: p.TLSKeyFile}
}

// clients are those whose certificates the server takes.
func (p AdminPublic) clients() []clientSource {
	return []clientSource{{"admin-server-client-ca", adminEnv + "_CLIENT_CERTS_DIR", p.ClientCertsDir}}
}

// check finds what can't be served.
func (a AdminServer) check(add func(path, format string, args ...any)) {
	if !a.opened() {
		return
	}
	local, public := a.ports()
	if local > 65535 {
		add("adminServer.local.port", "%d is not a port: it must be in the range [1, 65535] (KUMA_ADMIN_SERVER_LOCAL_PORT)", local)
	}
	if public > 65535 {
		add("adminServer.public.port", "%d is not a port: it must be in the range [1, 65535] (KUMA_ADMIN_SERVER_PUBLIC_PORT)", public)
	}
	if !a.Public.Enabled {
		return
	}
	if a.Public.TLSCertFile == "" || a.Public.TLSKeyFile == "" {
		add("adminServer.public", "tlsCertFile and tlsKeyFile are both needed (KUMA_ADMIN_SERVER_PUBLIC_TLS_CERT_FILE, KUMA_ADMIN_SERVER_PUBLIC_TLS_KEY_FILE): kumactl generate tls-certificate --type=server --hostname=HOST makes a pair")
	}
	if a.Public.ClientCertsDir == "" {
		add("adminServer.public.clientCertsDir", "is needed (KUMA_ADMIN_SERVER_PUBLIC_CLIENT_CERTS_DIR): a directory with the certificates of those who may call; kumactl generate tls-certificate --type=client makes one")
	}
}

// modern replaces older settings by today's, and says so.
func (c Config) modern(log *slog.Logger) Config {
	if !c.AdminServer.APIs.DataplaneToken.off() {
		return c
	}
	const old = "KUMA_ADMIN_SERVER_APIS_DATAPLANE_TOKEN_ENABLED=false"
	switch p := &c.DPServer.Authn.DPProxy; p.Type {
	case auth.ProxyNone:
	case "":
		p.Type = auth.ProxyNone
		log.Warn(old + " is deprecated: set KUMA_DP_SERVER_AUTHN_DP_PROXY_TYPE=none instead; proxies need no token now")
	default:
		log.Warn(old+" has no effect: KUMA_DP_SERVER_AUTHN_DP_PROXY_TYPE says otherwise and wins; remove the older setting", "type", p.Type)
	}
	if c.AdminServer.Enabled != nil && *c.AdminServer.Enabled {
		log.Warn("the admin server is not opened: " + old + " leaves nothing that it would serve; remove KUMA_ADMIN_SERVER_ENABLED")
	}
	return c
}

// once says once that an older form was used.
type once struct {
	log  *slog.Logger
	done sync.Once
}

func (o *once) say(form, instead string, r *http.Request) {
	o.done.Do(func() {
		o.log.Warn("a deprecated form was used (said once)", "form", form, "instead", instead, "remote", r.RemoteAddr)
	})
}

// tokenFront is the admin server's only route: POST /tokens, passed on to
// today's POST /tokens/dataplane.
type tokenFront struct {
	api  http.Handler
	used once
}

func (f *tokenFront) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.TrimSuffix(r.URL.Path, "/") != "/tokens" {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		http.Error(w, "404: Page Not Found", http.StatusNotFound)
		return
	}
	f.used.say("POST /tokens on the admin server", "POST /tokens/dataplane on the API server with \"validFor\"; this token lives ten years", r)
	r = r.Clone(r.Context())
	r.URL.Path, r.URL.RawPath = "/tokens/dataplane", ""
	f.api.ServeHTTP(w, r)
}

// openAdmin opens the admin server of 0.7, where it is asked for. Its callers
// are the API's: who is the administrator there is it here, on this machine
// under the advertised host name too; from elsewhere a certificate is needed.
func (c *ControlPlane) openAdmin(api rest.Config, users auth.AuthenticatorConfig) error {
	cfg := c.cfg.AdminServer
	if !cfg.opened() {
		return nil
	}
	log := c.log.With("logger", "admin-server")
	if err := c.bindAdmin(api, users, log); err != nil {
		return err
	}
	local, public := cfg.ports()
	log.Warn("the admin server of version 0.7 is open; it is deprecated: the API server issues tokens today (POST /tokens/dataplane, kumactl generate dataplane-token)",
		"address", fmt.Sprintf("127.0.0.1:%d", local))
	if cfg.Public.Enabled {
		log.Warn("the admin server is open to other machines, for those who show a client certificate", "interface", cmp.Or(cfg.Public.Interface, "all"), "port", public)
	}
	return nil
}

// bindAdmin opens the ports of the admin server.
func (c *ControlPlane) bindAdmin(api rest.Config, users auth.AuthenticatorConfig, log *slog.Logger) error {
	cfg := c.cfg.AdminServer
	if name := c.cfg.General.AdvertisedHostname; name != "" {
		users.Hosts = []string{name}
	}
	newServer := func(users auth.AuthenticatorConfig) (*http.Server, error) {
		who, err := auth.NewAuthenticator(users)
		if err != nil {
			return nil, err
		}
		// The API's own handler, closed to pages of other origins.
		api.Authn, api.CORSAllowedDomains, api.BasePath, api.Bootstrap, api.Catalog = who, nil, "", nil, nil
		tokens, err := rest.New(api)
		if err != nil {
			return nil, err
		}
		s := c.cfg.APIServer
		return &http.Server{
			Handler: &tokenFront{api: tokens.Handler(), used: once{log: log}}, ConnContext: who.ConnContext, ReadHeaderTimeout: s.ReadHeaderTimeout,
			ReadTimeout: s.ReadTimeout, WriteTimeout: s.WriteTimeout, IdleTimeout: s.IdleTimeout, MaxHeaderBytes: 64 << 10,
		}, nil
	}
	open := func(setting, host string, port uint32) (net.Listener, error) {
		l, err := listen("the admin server", setting, host, port)
		if err != nil {
			return nil, err
		}
		return limited{l, &limit{max: 1000, each: 500, setting: "none", eachSetting: "none", log: log}}, nil
	}
	local, err := newServer(users)
	if err != nil {
		return err
	}
	lp, pp := cfg.ports()
	if !cfg.Public.Enabled {
		l, err := open("KUMA_ADMIN_SERVER_LOCAL_PORT", "127.0.0.1", lp)
		if err != nil {
			return err
		}
		c.http = append(c.http, server{local, l, false})
		return nil
	}
	pair, err := c.openPair(adminEnv, cfg.Public.TLSCertFile, cfg.Public.TLSKeyFile)
	if err != nil {
		return err
	}
	clients, err := c.clientCAs(true, cfg.Public.clients()...)
	if err != nil {
		return err
	}
	t, err := c.cfg.General.tlsOf(adminEnv, ServerTLS{}, pair, clients)
	if err != nil {
		return err
	}
	public, err := newServer(auth.AuthenticatorConfig{Users: auth.UsersConfig{Type: auth.AdminClientCerts}, ClientCAs: clients.pool, Log: users.Log})
	if err != nil {
		return err
	}
	secure(public, t)
	if name := c.cfg.General.AdvertisedHostname; name != "" && !slices.ContainsFunc(pair.SANs(), func(san string) bool { return strings.EqualFold(san, name) }) {
		log.Warn("the admin server's certificate does not have the advertised host name: clients that use the name will refuse it", "file", cfg.Public.TLSCertFile, "advertised_hostname", name, "names", pair.SANs())
	}
	host := cfg.Public.Interface
	if lp == pp && (host == "" || host == "0.0.0.0" || host == "::") {
		l, err := open("KUMA_ADMIN_SERVER_LOCAL_PORT", host, lp)
		if err != nil {
			return err
		}
		plain, encrypted := share(l)
		c.http = append(c.http, server{local, plain, false}, server{public, encrypted, true})
		return nil
	}
	l, err := open("KUMA_ADMIN_SERVER_LOCAL_PORT", "127.0.0.1", lp)
	if err != nil {
		return err
	}
	if lp != pp {
		c.http = append(c.http, server{local, l, false})
	} else {
		// The public server is what https:// means at this port, here too.
		plain, encrypted := share(l)
		c.http = append(c.http, server{local, plain, false}, server{public, encrypted, true})
		if host == "127.0.0.1" || host == "localhost" {
			return nil
		}
	}
	if l, err = open(adminEnv+"_PORT", host, pp); err != nil {
		return err
	}
	c.http = append(c.http, server{public, l, true})
	return nil
}

// shared is one port for the two forms of the admin server. What begins as TLS
// does is for the public one; what has no TLS is for the local one, and only
// from this machine.
type shared struct {
	net.Listener
	start            sync.Once
	plain, encrypted *branch
}

// half is one of the two listeners of a shared port.
type half struct {
	*shared
	of *branch
}

// Accept returns the next connection.
func (h half) Accept() (net.Conn, error) {
	h.start.Do(func() { go h.run() })
	return h.of.Accept()
}

// Close ends both.
func (h half) Close() error {
	_ = h.plain.Close()
	_ = h.encrypted.Close()
	return h.Listener.Close()
}

func share(l net.Listener) (plain, encrypted net.Listener) {
	newBranch := func() *branch {
		return &branch{addr: l.Addr(), conns: make(chan net.Conn), done: make(chan struct{})}
	}
	s := &shared{Listener: l, plain: newBranch(), encrypted: newBranch()}
	return half{s, s.plain}, half{s, s.encrypted}
}

// run accepts connections until the listener is closed.
func (s *shared) run() {
	defer s.plain.Close()
	defer s.encrypted.Close()
	accept(s.Listener, func(c net.Conn) { go s.sort(c) })
}

func (s *shared) sort(raw net.Conn) {
	_ = raw.SetDeadline(time.Now().Add(handshakeTimeout))
	p := &peeked{Conn: raw, r: bufio.NewReaderSize(raw, 512)}
	first, err := p.r.Peek(1)
	if err != nil {
		_ = raw.Close()
		return
	}
	_ = raw.SetDeadline(time.Time{})
	const handshake = 22 // the type of TLS's first record
	switch {
	case first[0] == handshake:
		s.encrypted.give(p)
	case local(raw.LocalAddr()) && local(raw.RemoteAddr()):
		s.plain.give(p)
	default:
		_ = raw.Close()
	}
}

func local(a net.Addr) bool {
	t, ok := a.(*net.TCPAddr)
	return ok && t.IP.IsLoopback()
}

// bootstrapFront answers GET /bootstrap on the API's port, where kuma-dp of 0.7
// asked for its bootstrap: it tells kuma-dp where to ask over TLS, and how to
// verify it. Only programs on this machine get here.
type bootstrapFront struct {
	hosts func() []string
	ca    func() []byte
	// names are tried where the certificate lacks the name that was asked for.
	names []string
	port  uint32
	used  once
}

func (f *bootstrapFront) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.used.say("bootstrap by way of the API server's port", fmt.Sprintf("kuma-dp run --cp-address=https://HOST:%d --ca-cert-file=FILE", f.port), r)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(struct {
		URL    string `json:"url"`
		CACert string `json:"caCert"`
	}{"https://" + net.JoinHostPort(f.host(r.Host), fmt.Sprint(f.port)), string(f.ca())})
}

// host is a name by which this machine reaches the server for proxies and that
// its certificate has: the one that was asked for, if it has that.
func (f *bootstrapFront) host(asked string) string {
	if h, _, err := net.SplitHostPort(asked); err == nil {
		asked = h
	}
	asked = strings.Trim(asked, "[]")
	there := f.hosts()
	for _, want := range slices.Concat([]string{asked}, f.names, []string{"localhost", "127.0.0.1"}, there) {
		if want != "" && !strings.HasPrefix(want, "*") && slices.ContainsFunc(there, func(h string) bool { return strings.EqualFold(h, want) }) {
			return want
		}
	}
	return asked
}

// catalog is what 0.7's kumactl asked for first: where the admin server is.
func (c *ControlPlane) catalog() json.RawMessage {
	local, public := c.cfg.AdminServer.ports()
	if local == 0 {
		return nil
	}
	type urls struct {
		Local  string `json:"localUrl"`
		Public string `json:"publicUrl,omitempty"`
	}
	at := urls{Local: fmt.Sprintf("http://localhost:%d", local)}
	if public != 0 {
		at.Public = "https://" + net.JoinHostPort(cmp.Or(c.cfg.General.AdvertisedHostname, "localhost"), fmt.Sprint(public))
	}
	out, err := json.Marshal(map[string]any{"apis": map[string]any{"admin": at, "dataplaneToken": at}})
	if err != nil {
		return nil // it holds nothing but text
	}
	return out
}

// elsewhere says where a proxy asks.
func (c *ControlPlane) elsewhere(r *http.Request) string {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return fmt.Sprintf("the API server has no bootstrap; use https://%s, the control plane's server for proxies, with --ca-cert-file",
		net.JoinHostPort(strings.Trim(host, "[]"), fmt.Sprint(c.cfg.DPServer.Port)))
}

// trustAdministrators keeps, of the authorities of the API's clients, those of
// apiServer.auth.clientCertsDir: only they make an administrator, where
// certificates do at all. The others let through the door, as tlsCaFile does.
func (c *ControlPlane) trustAdministrators(clients *clientCAs) {
	if c.cfg.APIServer.Authn.Type != auth.AdminClientCerts || clients == nil {
		return
	}
	c.admins = &clientCAs{from: clients.from[len(clients.from)-1:]} // the directory is the last
	c.log.Warn("who shows a certificate of the directory is the administrator (apiServer.authn.type is adminClientCerts); this is deprecated: user tokens can be revoked and have an end (KUMA_API_SERVER_AUTHN_TYPE=tokens)",
		"directory", c.cfg.APIServer.Auth.ClientCertsDir)
}

// administrators are the authorities of administrators' certificates now; nil
// where there are none.
func (c *ControlPlane) administrators() *x509.CertPool {
	if c.admins == nil {
		return nil
	}
	return c.admins.pool()
}

// httpsPort is where the API is served with TLS; 0 where it is not.
func (c *Config) httpsPort() uint32 {
	if !c.APIServer.HTTPS.Enabled {
		return 0
	}
	return c.APIServer.HTTPS.Port
}

// adminPort is where the admin server is for other machines; 0 where it is not.
func (c *Config) adminPort() uint32 {
	_, public := c.AdminServer.ports()
	return public
}

// Package cp assembles a control plane from its parts; it is the only place
// where they meet.
package cp

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/bootstrap"
	"kuma/internal/catalog"
	"kuma/internal/conf"
	"kuma/internal/errs"
	"kuma/internal/identity"
	"kuma/internal/insight"
	"kuma/internal/link"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/pki/builtin"
	"kuma/internal/proxy"
	"kuma/internal/resource"
	"kuma/internal/rest"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/boltstore"
	"kuma/internal/store/memstore"
	"kuma/internal/store/pgstore"
	"kuma/internal/upkeep"
	"kuma/internal/xds"
)

// ControlPlane is a control plane whose ports are open and whose store is
// prepared. Run serves.
type ControlPlane struct {
	cfg Config
	log *slog.Logger

	store store.Store
	close func() error
	// postgres is the store where that is a database; nil elsewhere. away is for how
	// long it has not had the database's lock.
	postgres *pgstore.Store
	away     func() time.Duration
	certs    *pki.ControlPlane
	rotator  *pki.Rotator
	// settling says when the rotator knows all proxies.
	settling settling
	tracker  *state.Tracker
	keeper   *upkeep.Keeper

	// files watches the certificates that the operator gave. General is what
	// servers show that have none of their own: certs, or a pair of files.
	files   *pki.Files
	general certificate
	// admins vouch for administrators' client certificates; nil where those don't
	// count.
	admins *clientCAs

	// expiring are those who hold certificates; expiries asks them.
	expiring []func() []pki.Expiry
	// conns are the ports and who is connected to them.
	conns connections

	sessions *session.Registry
	insights *insight.Recorder
	channel  *adminChannel

	// hosts resolves the names that Dataplanes have for addresses.
	hosts   *resolver
	metrics *metrics
	levels  levels
	// administers says who may do what only administrators may.
	users       *auth.Authenticator
	administers func(*http.Request) error

	// The servers, each with its listener.
	http        []server
	proxies     *splitter
	grpc        *grpc.Server
	bootstrap   *http.Server
	ready       atomic.Bool
	diagnostics net.Listener
	// diagnosticsTLS is nil where that server speaks without TLS.
	diagnosticsTLS *tls.Config
}

// server is an HTTP server with its listener; tls says whether it speaks TLS.
type server struct {
	*http.Server
	net.Listener
	tls bool
}

// New opens the store, the certificates and the ports, and prepares what must
// be there before anyone is served. It reads from top to bottom.
func New(ctx context.Context, cfg Config, log *slog.Logger) (_ *ControlPlane, err error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	cfg = cfg.modern(log)
	counted := newMetrics(cfg.Multizone.Zone.Name, catalog.Kinds())
	c := &ControlPlane{cfg: cfg, metrics: counted, close: func() error { return nil }}
	log = c.levels.logger(log, counted.lines)
	c.log = log
	c.files = pki.NewFiles(pki.FilesConfig{Every: cfg.General.TLSReloadInterval, Known: c.ownAuthorities, Log: log.With("logger", "tls")})
	defer func() {
		if err != nil {
			c.shut()
		}
	}()
	c.conns.refusals = newRefusals(log.With("logger", "tls"))
	counted.zoned.MustRegister(c.conns.refusals.count)
	zone, build, instance := cfg.Multizone.Zone.Name, conf.Build(), instanceID()

	// What is kept, and the operator's certificate files.
	dir, err := cfg.workDir()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, errs.New(errs.Unavailable, "make the work directory: %w; choose another one with KUMA_GENERAL_WORK_DIR", err)
	}
	if err := c.openFiles(); err != nil {
		return nil, err
	}
	cfg.Store.posture(log)
	if err := c.openStore(ctx, filepath.Join(dir, "kuma.db"), instance); err != nil {
		return nil, err
	}
	c.store = counted.store.Wrap(c.store)

	// The picture, and who keeps it in order.
	kinds := catalog.Kinds()
	c.tracker = state.New(state.Config{Store: c.store, Quiet: cfg.XDSServer.QuietPeriod, Max: cfg.XDSServer.MaxDelay, Log: log.With("logger", "state")})
	c.keeper = upkeep.New(upkeep.Config{
		Store: c.store, Tracker: c.tracker, Kinds: kinds, Zone: zone, ServiceGrace: cfg.MeshService.DeletionGracePeriod,
		CleanupAge: cfg.Runtime.Universal.DataplaneCleanupAge, Here: func(meshName, name string) bool {
			_, here := c.sessions.Find(session.Key{Mesh: meshName, Name: name})
			return here
		},
		SkipMesh: cfg.Defaults.SkipMeshCreation, RoutingResources: cfg.Defaults.CreateMeshRoutingResources,
		AdminToken: cfg.APIServer.Authn.Tokens.BootstrapAdminToken && cfg.APIServer.Authn.Type != auth.AdminClientCerts, Authority: newAuthority, Log: log.With("logger", "upkeep"),
	})
	if err := c.keeper.Prepare(ctx); err != nil {
		return nil, err
	}
	cluster, err := c.clusterID(ctx)
	if err != nil {
		return nil, err
	}
	// After the first mesh, which is made in an empty store only: the authority may
	// be kept there, too.
	c.certs, err = pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: dir, CertFile: cfg.General.TLSCertFile, KeyFile: cfg.General.TLSKeyFile, Hostnames: cfg.advertised(), Vault: c.authorityVault(), Former: c.formerVault()})
	if err != nil {
		return nil, err
	}
	if c.general == nil {
		c.general = c.certs
	}
	for _, w := range c.certs.Warnings() {
		log.Warn("the control plane's own certificate", "warning", w)
	}
	if c.certs.Made() {
		log.Info("made an authority for the control plane's own certificate; give this file to clients as --ca-cert-file", "file", filepath.Join(dir, pki.CAFile))
	}

	c.sayAlone()

	// Who may do what.
	keys := admit.Secrets{Store: c.store}
	hint := ""
	if cfg.Store.Type == "memory" {
		hint = "kuma-cp runs with an in-memory database and its state is not kept over restarts: if it was restarted, generate a new token"
	}
	callers := auth.AuthenticatorConfig{Users: cfg.APIServer.Authn, ClientCAs: c.administrators, Secrets: keys, Hint: hint, Log: log.With("logger", "auth")}
	users, err := auth.NewAuthenticator(callers)
	if err != nil {
		return nil, err
	}
	access, err := auth.NewAccess(cfg.Access)
	if err != nil {
		return nil, err
	}
	checker, err := auth.NewProxyChecker(auth.ProxyCheckerConfig{Proxies: cfg.DPServer.Authn, Secrets: keys, Hint: hint, Log: log.With("logger", "auth")})
	if err != nil {
		return nil, err
	}
	tokens := auth.NewIssuer(auth.IssuerConfig{Users: cfg.APIServer.Authn, Proxies: cfg.DPServer.Authn, Secrets: keys, Log: log.With("logger", "auth")})
	gate := admit.New(admit.Config{
		Store: c.store, Access: access, Zone: zone, ReadOnly: cfg.APIServer.ReadOnly, UnsafeDelete: cfg.Store.UnsafeDelete,
		Meshes: c.keeper, Log: log.With("logger", "admit"),
	})

	// Proxies: what they get, who is here, and the doors to them.
	c.hosts = newResolver(c.tracker, cfg.General.DNSCacheTTL, log.With("logger", "dns"))
	generator := proxy.New(proxy.Config{Policies: catalog.Policies(), Zone: zone, Resolve: c.hosts.resolve, InternalCIDRs: cfg.IPAM.KnownInternalCIDRs})
	issuer := identity.New(identity.Config{Picture: c.tracker.Now})
	c.sessions = session.New(session.Config{
		Tracker: c.tracker, Store: c.store, Gate: gate, Credentials: checker, Delay: deregistration(cfg.XDSServer.DataplaneDeregistrationDelay),
		Grace: cfg.XDSServer.ReturnDelay, Log: log.With("logger", "session"),
	})
	c.insights = insight.New(insight.Config{
		Store: c.store, Tracker: c.tracker, Instance: instance, Versions: []string{build.Version, contract + ".0"}, Every: cfg.XDSServer.DataplaneStatusFlushInterval,
		Grace: cfg.XDSServer.ReturnDelay, Log: log.With("logger", "insight"),
	})
	c.channel = newAdminChannel(c.tracker, c.sessions, cfg.BootstrapServer.Params.AdminPort, log.With("logger", "admin"))
	c.expiring = append(c.expiring, c.channel.Expiries)
	gen := &generation{generator: generator, admin: c.channel, tell: c.sessions.SetLeftOut, log: log.With("logger", "proxy")}
	ads := xds.New(xds.Config{
		Tracker: c.tracker, Sessions: c.sessions, Generator: gen, Issuer: issuer, Insights: c.insights,
		Health:    healthChecks(cfg.DPServer.HDS),
		RetryBase: cfg.General.CertGenerationBaseBackoff, RetryMax: cfg.General.CertGenerationMaxBackoff, Log: log.With("logger", "xds"),
	})
	shown, err := c.certificateOf("KUMA_DP_SERVER", cfg.DPServer.ServerTLS)
	if err != nil {
		return nil, err
	}
	links := link.New(link.Config{
		Trust: c.trust(shown), ShareTrust: cfg.General.TLSCAStore == caInStore, Tracker: c.tracker, Sessions: c.sessions, Issuer: issuer, Insights: c.insights, Instance: instance,
		RetryBase: cfg.General.CertGenerationBaseBackoff, RetryMax: cfg.General.CertGenerationMaxBackoff, Log: log.With("logger", "link"),
	})
	counted.zoned.MustRegister(ads.Stats(), links.Stats(), issuer.Metrics(), c.sessions.Metrics(), c.tracker.Metrics(), c.keeper.Metrics())
	c.rotator = c.newRotator(shown, instance, log.With("logger", "rotation"))
	c.expiring = append(c.expiring, c.certs.Expiries)
	c.grpc = grpc.NewServer(xds.ServerOptions()...)
	ads.Register(c.grpc)
	links.Register(c.grpc)

	// The proxies' port.
	if err := cfg.checkXDSHost(shown); err != nil {
		return nil, err
	}
	dpTLS, err := cfg.General.tlsOf("KUMA_DP_SERVER", cfg.DPServer.ServerTLS, shown, nil)
	if err != nil {
		return nil, err
	}
	l, err := listen("the server for proxies", "KUMA_DP_SERVER_PORT", "", cfg.DPServer.Port)
	if err != nil {
		return nil, err
	}
	c.proxies = newSplitter(l, dpTLS, &limit{
		max: cfg.DPServer.MaxConnections, setting: "KUMA_DP_SERVER_MAX_CONNECTIONS",
		each: cfg.DPServer.MaxConnectionsPerAddress, eachSetting: "KUMA_DP_SERVER_MAX_CONNECTIONS_PER_ADDRESS", log: log.With("logger", "dp-server"),
	})
	c.proxies.door = c.conns.add(door{name: "dp-server", caller: "proxy", addr: l.Addr(), tls: dpTLS})
	boot := cfg.BootstrapServer.Params
	mux := http.NewServeMux()
	mux.Handle("/bootstrap", bootstrap.New(bootstrap.Config{
		Store: c.store, Credentials: bootstrapCredentials{checker}, CA: shown.CA, Hosts: shown.SANs,
		XDSHost: boot.XDSHost, XDSPort: boot.XDSPort, Port: cfg.DPServer.Port,
		AdminAddress: boot.AdminAddress, AdminPort: boot.AdminPort, AdminUnixSocket: boot.EnvoyAdminUnixSocket, AdminAccessLogPath: boot.AdminAccessLogPath,
		ReadinessPort: boot.ReadinessPort, ConnectTimeout: boot.XDSConnectTimeout, HDS: cfg.DPServer.HDS.Enabled,
		Lenient: !cfg.APIServer.Strict, Log: log.With("logger", "bootstrap"),
	}))
	front := &bootstrapFront{
		hosts: shown.SANs, ca: shown.CA, names: []string{boot.XDSHost, cfg.General.AdvertisedHostname}, port: cfg.DPServer.Port,
		used: once{log: log.With("logger", "bootstrap")},
	}
	c.bootstrap = &http.Server{
		Handler: counted.proxies.measure(c.whenReady(mux), byPattern(mux)), ReadHeaderTimeout: cfg.DPServer.ReadHeaderTimeout, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: 30 * time.Second, MaxHeaderBytes: 64 << 10, ErrorLog: quiet(log),
	}

	// The API's ports.
	host, _ := os.Hostname()
	offered := rest.Config{
		Kinds: kinds, Store: c.store, Gate: gate, Access: access, Authn: users, Issuer: tokens,
		Index: rest.Index{
			Product: build.Product, Version: build.Version, InstanceID: instance, ClusterID: cluster, Hostname: host, BasedOnKuma: contract,
			HTTPSPort: cfg.httpsPort(), AdminPort: cfg.adminPort(),
		},
		Settings:  func() ([]byte, error) { return conf.Redacted(cfg) },
		Inspector: inspector{links, c.channel}, Explainer: explainer{generator, c.tracker, c.sessions, c.channel},
		Lenient: !cfg.APIServer.Strict, ReadOnly: cfg.APIServer.ReadOnly, BasePath: cfg.APIServer.BasePath,
		CORSAllowedDomains: cfg.APIServer.CORSAllowedDomains, Log: log.With("logger", "rest"),
		Bootstrap: front, Elsewhere: c.elsewhere, Catalog: c.catalog(),
		Rotator:     rotation{c.rotator, dir},
		TLSReporter: c.reporter(instance, inspector{links, c.channel}),
		Called: func(r *http.Request, who auth.Caller) {
			noteCaller(cfg.APIServer.Authn.Type == auth.AdminClientCerts, r, who)
		},
	}
	api, err := rest.New(offered)
	if err != nil {
		return nil, err
	}
	if err := c.openAPI(api, users); err != nil {
		return nil, err
	}
	if err := c.openAdmin(offered, callers); err != nil {
		return nil, err
	}
	if err := c.openMADS(); err != nil {
		return nil, err
	}
	if cfg.Diagnostics.TLSEnabled {
		if c.diagnosticsTLS, err = c.serverTLS("KUMA_DIAGNOSTICS", cfg.Diagnostics.ServerTLS, nil); err != nil {
			return nil, err
		}
	}
	if c.diagnostics, err = listen("the diagnostics server", "KUMA_DIAGNOSTICS_SERVER_PORT", "", cfg.Diagnostics.ServerPort); err != nil {
		return nil, err
	}
	for i, s := range c.http {
		c.http[i] = c.known(s)
	}
	c.users, c.administers = users, administrators(users, access)
	counted.registerFiles(c.files.Taken, c.files.Refused)
	counted.registerAbout(instance, cluster, kinds, c.tracker.Now, c.expiries, func() bool { return c.cutOff() == 0 })
	c.posture()
	return c, nil
}

// contract is the version of Kuma whose observable contract this one keeps.
const contract = "2.14"

func instanceID() string {
	host, err := os.Hostname()
	if err != nil {
		host = "kuma-cp"
	}
	return host + "-" + uuid.NewString()[:4]
}

// clusterID names this control plane's cluster: it follows from its zone's name
// and the moment at which that was made, so it is the same over restarts and
// changes of certificates.
func (c *ControlPlane) clusterID(ctx context.Context) (string, error) {
	zone, err := c.store.Get(ctx, resource.Key{Kind: mesh.Zones.Name, Name: c.cfg.Multizone.Zone.Name})
	if errs.Is(err, errs.NotFound) { // somebody deleted it
		return uuid.NewString(), nil
	}
	if err != nil {
		return "", err
	}
	return uuid.NewSHA1(uuid.NameSpaceOID, []byte(zone.Name+" "+zone.Created.UTC().Format(time.RFC3339Nano))).String(), nil
}

// deregistration turns the contract's "no delay" into session's.
func deregistration(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

func healthChecks(h HDS) xds.HealthConfig {
	d := h.CheckDefaults
	return xds.HealthConfig{
		Interval: h.Interval, Timeout: d.Timeout, CheckInterval: d.Interval, NoTrafficInterval: d.NoTrafficInterval,
		HealthyThreshold: d.HealthyThreshold, UnhealthyThreshold: d.UnhealthyThreshold,
	}
}

// newAuthority makes the secrets of a mesh's builtin authority.
func newAuthority(meshName string, b *mesh.Backend) (cert, key []byte, err error) {
	settings, err := builtin.ParseConf(b.Conf)
	if err != nil {
		return nil, nil, err
	}
	root, err := builtin.NewRoot(meshName, settings)
	return root.Cert, root.Key, err
}

func (c *ControlPlane) openStore(ctx context.Context, path, instance string) error {
	switch c.cfg.Store.Type {
	case "memory":
		c.store = memstore.New()
		return nil
	case inPostgres:
		return c.openPostgres(ctx, instance)
	}
	s, err := boltstore.Open(boltstore.Config{Path: path, Kinds: catalog.Kinds(), Log: c.log.With("logger", "store")})
	if err != nil {
		return err
	}
	c.store, c.close = s, s.Close
	return nil
}

// clients are those whose certificates the API takes, the administrators last.
func (a APIServer) clients() []clientSource {
	return []clientSource{
		{"api-server-client-ca", "KUMA_API_SERVER_HTTPS_TLS_CA_FILE", a.HTTPS.TLSCAFile},
		{"api-server-client-ca", "KUMA_API_SERVER_AUTH_CLIENT_CERTS_DIR", a.Auth.ClientCertsDir},
	}
}

// openAPI opens the ports of the API.
func (c *ControlPlane) openAPI(api *rest.Server, users *auth.Authenticator) error {
	cfg := c.cfg.APIServer
	newServer := func() *http.Server {
		return &http.Server{
			Handler: c.metrics.api.measure(api.Handler(), api.Pattern), ConnContext: users.ConnContext, ReadHeaderTimeout: cfg.ReadHeaderTimeout, ReadTimeout: cfg.ReadTimeout,
			WriteTimeout: cfg.WriteTimeout, IdleTimeout: cfg.IdleTimeout, MaxHeaderBytes: 64 << 10,
		}
	}
	open := func(setting, host string, port uint32) (net.Listener, error) {
		l, err := listen("the API server", setting, host, port)
		if err != nil {
			return nil, err
		}
		const most = "KUMA_API_SERVER_MAX_CONNECTIONS"
		return limited{l, &limit{max: cfg.MaxConnections, each: cfg.MaxConnections / 2, setting: most, eachSetting: most, log: c.log.With("logger", "rest", "port", port)}}, nil
	}
	if cfg.HTTP.Enabled {
		l, err := open("KUMA_API_SERVER_HTTP_PORT", cfg.HTTP.Interface, cfg.HTTP.Port)
		if err != nil {
			return err
		}
		c.http = append(c.http, server{newServer(), l, false})
	}
	if cfg.HTTPS.Enabled {
		clients, err := c.clientCAs(cfg.HTTPS.RequireClientCert, cfg.clients()...)
		if err != nil {
			return err
		}
		c.trustAdministrators(clients)
		t, err := c.serverTLS("KUMA_API_SERVER_HTTPS", cfg.HTTPS.ServerTLS, clients)
		if err != nil {
			return err
		}
		l, err := open("KUMA_API_SERVER_HTTPS_PORT", cfg.HTTPS.Interface, cfg.HTTPS.Port)
		if err != nil {
			return err
		}
		s := newServer()
		secure(s, t)
		c.http = append(c.http, server{s, l, true})
	}
	return nil
}

// quiet keeps what clients do wrong in a handshake out of the log at info.
func quiet(log *slog.Logger) *stdlog.Logger { return slog.NewLogLogger(log.Handler(), slog.LevelDebug) }

// whenReady answers 503 until the first picture is there.
func (c *ControlPlane) whenReady(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !c.ready.Load() {
			http.Error(w, "the control plane is starting", http.StatusServiceUnavailable)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// posture says at start what is more open than it could be.
func (c *ControlPlane) posture() {
	if c.cfg.APIServer.Authn.LocalhostIsAdmin {
		c.log.Info("callers on this machine who run as this user or as root are administrators without a token; KUMA_API_SERVER_AUTHN_LOCALHOST_IS_ADMIN=false ends it")
	}
	if c.cfg.APIServer.HTTP.Enabled && !loopback(c.cfg.APIServer.HTTP.Interface) {
		c.log.Info("the API is served without TLS too, on all interfaces; KUMA_API_SERVER_HTTP_INTERFACE=127.0.0.1 or KUMA_API_SERVER_HTTP_ENABLED=false ends it", "port", c.cfg.APIServer.HTTP.Port)
	}
	c.tlsPosture()
	if c.cfg.Diagnostics.Metrics {
		c.log.Info("metrics are served without a credential, on all interfaces; KUMA_DIAGNOSTICS_METRICS=false ends it", "port", c.cfg.Diagnostics.ServerPort)
	}
	c.madsPosture()
	if c.cfg.Access.Anonymous == auth.AnonymousContract {
		c.log.Warn("callers without a credential may read and write most resources, as the original lets them; KUMA_ACCESS_ANONYMOUS=closed ends it")
	}
	if c.cfg.DPServer.Authn.DPProxy.Type == auth.ProxyNone {
		c.log.Warn("proxies need no credential: any may claim to be any other; KUMA_DP_SERVER_AUTHN_DP_PROXY_TYPE=dpToken ends it")
	}
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// shut closes what New opened.
func (c *ControlPlane) shut() {
	for _, s := range c.http {
		_ = s.Listener.Close()
	}
	if c.proxies != nil {
		_ = c.proxies.Listener.Close()
	}
	if c.diagnostics != nil {
		_ = c.diagnostics.Close()
	}
	if err := c.close(); err != nil && !errors.Is(err, fs.ErrClosed) {
		c.log.Error("close the store", "error", err)
	}
}

// Run serves until ctx ends or a part fails, then ends everything: first the
// doors, then what they rest on.
func (c *ControlPlane) Run(ctx context.Context) error {
	defer c.shut()
	doors, closeDoors := context.WithCancel(ctx)
	defer closeDoors()
	inner, closeInner := context.WithCancel(context.WithoutCancel(ctx))
	defer closeInner()

	g, failed := errgroup.WithContext(doors)
	context.AfterFunc(failed, closeDoors)
	var parts errgroup.Group
	part := func(name string, run func(context.Context) error) {
		parts.Go(func() error {
			err := run(inner)
			if err != nil && c.lost() == nil { // else that is the reason, and told
				err = fmt.Errorf("%s: %w", name, err)
				c.log.Error("a part of the control plane failed", "error", err)
			}
			closeDoors()
			return err
		})
	}
	part("store", c.followStore)
	part("tracker", c.tracker.Run)
	part("certificate files", c.files.Run)
	part("upkeep", c.keeper.Run)
	part("sessions", c.sessions.Run)
	part("insights", c.insights.Run)
	part("names of hosts", c.hosts.run)
	part("admin channel", c.channel.Run)
	part("rotation", c.runRotator)
	part("shared authority", c.followAuthority)
	part("certificates", func(ctx context.Context) error {
		return c.certs.Run(ctx, func(err error) { c.log.Error("renew the control plane's certificate", "error", err) })
	})

	g.Go(func() error {
		select {
		case <-c.tracker.Ready():
			c.ready.Store(true)
			c.log.Info("ready", "version", conf.Build().Version, "proxies", c.proxies.Addr().String(), "store", c.cfg.Store.Type, "pid", os.Getpid())
		case <-doors.Done():
		}
		return nil
	})
	for _, s := range c.http {
		g.Go(func() error { return s.run(doors) })
	}
	diagnostics := server{c.diagnosticsServer(), limited{c.diagnostics, &limit{max: 1000, each: 500, setting: "none", eachSetting: "none", log: c.log.With("logger", "diagnostics")}}, c.diagnosticsTLS != nil}
	if diagnostics.tls {
		secure(diagnostics.Server, c.diagnosticsTLS)
	}
	diagnostics = c.known(diagnostics)
	g.Go(func() error { return diagnostics.run(doors) })
	g.Go(c.proxies.run)
	g.Go(func() error {
		if err := c.grpc.Serve(c.proxies.grpc); err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, grpc.ErrServerStopped) {
			return err
		}
		return nil
	})
	bootServer := server{c.bootstrap, c.proxies.http, false}
	g.Go(func() error { return bootServer.run(doors) })
	g.Go(func() error {
		<-doors.Done()
		_ = c.proxies.Listener.Close()
		c.grpc.Stop() // streams end; proxies go on with what they have
		return nil
	})
	err := g.Wait()
	closeInner()
	if partErr := parts.Wait(); err == nil {
		err = partErr
	}
	if gone := c.lost(); gone != nil {
		err = gone
	}
	c.log.Info("stopped")
	return err
}

// run serves until ctx ends and what is being answered then is answered, for
// which there are two seconds.
func (s server) run(ctx context.Context) error {
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if s.Shutdown(grace) != nil {
			_ = s.Server.Close()
		}
	})
	var err error
	if s.tls {
		err = s.ServeTLS(s.Listener, "", "")
	} else {
		err = s.Serve(s.Listener)
	}
	if !stop() {
		<-ended // Serve returns as soon as the end begins
	}
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// bootstrapCredentials lets the bootstrap verify tokens as the streams do.
type bootstrapCredentials struct{ checker *auth.ProxyChecker }

func (b bootstrapCredentials) Required() bool { return !b.checker.Off() }

func (b bootstrapCredentials) Verify(ctx context.Context, token, meshName, name string) (bootstrap.Credential, error) {
	p, err := b.checker.Verify(ctx, meshName, name, strings.TrimSpace(token))
	if err != nil {
		return nil, err
	}
	return p, nil
}

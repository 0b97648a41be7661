package cp

import (
	"time"

	"kuma/internal/auth"
	"kuma/internal/pki"
)

// Config is the control plane's configuration: the sum of what its parts need.
// Keys and environment variables are the contract's; those marked
// "ours" are additions.
type Config struct {
	// General is about the whole process.
	General General `json:"general"`
	// Environment is "universal": machines without Kubernetes.
	Environment string `json:"environment"`
	// Mode is "zone" ("standalone" means the same).
	Mode string `json:"mode"`
	// Store says where resources are kept.
	Store StoreConfig `json:"store"`
	// BootstrapServer is about the configuration with which Envoy starts.
	BootstrapServer BootstrapServer `json:"bootstrapServer"`
	// XDSServer is about the configuration that Envoy is sent.
	XDSServer XDSServer `json:"xdsServer"`
	// APIServer is the HTTP API.
	APIServer APIServer `json:"apiServer"`
	// DPServer is the server that proxies connect to.
	DPServer DPServer `json:"dpServer"`
	// AdminServer is that of Kuma 0.7, deprecated and closed unless it is asked
	// for.
	AdminServer AdminServer `json:"adminServer"`
	// Diagnostics is the server with health, readiness and metrics.
	Diagnostics Diagnostics `json:"diagnostics"`
	// MonitoringAssignmentServer tells Prometheus which proxies to scrape.
	MonitoringAssignmentServer MonitoringAssignmentServer `json:"monitoringAssignmentServer"`
	// Multizone names this zone.
	Multizone Multizone `json:"multizone"`
	// InterCP is about what control planes tell each other.
	InterCP InterCP `json:"interCp"`
	// Runtime is about machines without Kubernetes.
	Runtime Runtime `json:"runtime"`
	// Defaults is about what is made at the first start.
	Defaults Defaults `json:"defaults"`
	// Metrics bounds what is kept of the past.
	Metrics Metrics `json:"metrics"`
	// Access says who may do what.
	Access auth.AccessConfig `json:"access"`
	// MeshService is about generated MeshServices.
	MeshService MeshServiceConfig `json:"meshService"`
	// IPAM is about addresses.
	IPAM IPAM `json:"ipam"`
}

// General is about the whole process.
type General struct {
	// WorkDir holds certificates and the store's file; the default is
	// $HOME/.kuma.
	WorkDir string `json:"workDir"`
	// TLSCertFile and TLSKeyFile are the pair that all servers show, PEM; empty
	// means one that the control plane makes and renews itself.
	TLSCertFile string `json:"tlsCertFile"`
	TLSKeyFile  string `json:"tlsKeyFile"`
	// TLSMinVersion is TLSv1_2 or TLSv1_3.
	TLSMinVersion string `json:"tlsMinVersion"`
	// TLSMaxVersion likewise; empty means the newest.
	TLSMaxVersion string `json:"tlsMaxVersion"`
	// TLSCipherSuites lists Go's names of suites for TLS 1.2; empty means Go's
	// own choice.
	TLSCipherSuites []string `json:"tlsCipherSuites"`
	// TLSCAStore is where the authority is kept that signs the control plane's own
	// certificate (ours): "file", the work directory, or "store", which all
	// control planes on one store share.
	TLSCAStore string `json:"tlsCaStore"`
	// TLSReloadInterval is how often certificate files are looked at for changes
	// (ours).
	TLSReloadInterval time.Duration `json:"tlsReloadInterval"`
	// TLSRequirePQ has all servers refuse clients that don't offer the hybrid
	// post-quantum key exchange X25519MLKEM768 (ours); it implies TLS 1.3.
	TLSRequirePQ bool `json:"tlsRequirePQ"`
	// AdvertisedHostname is a name or an address under which clients reach this
	// control plane; the certificate that it makes itself is for it too.
	AdvertisedHostname string `json:"advertisedHostname"`
	// DNSCacheTTL is how long the address of a host name holds that a Dataplane
	// has for its address; then it is looked up again.
	DNSCacheTTL time.Duration `json:"dnsCacheTTL" env:"KUMA_GENERAL_DNS_CACHE_TTL"`
	// CertGenerationBaseBackoff is how long a proxy waits after its first
	// failure to get a certificate, CertGenerationMaxBackoff at most.
	CertGenerationBaseBackoff time.Duration `json:"certGenerationBaseBackoff"`
	CertGenerationMaxBackoff  time.Duration `json:"certGenerationMaxBackoff"`
}

// StoreConfig says where resources are kept.
type StoreConfig struct {
	// Type is "file" (ours, the default: <workDir>/kuma.db), "postgres" or
	// "memory".
	Type string `json:"type"`
	// Postgres says where the database is.
	Postgres Postgres `json:"postgres"`
	// UnsafeDelete lets a Mesh be deleted while it has Dataplanes.
	UnsafeDelete bool `json:"unsafeDelete"`
}

// BootstrapServer is about the configuration with which Envoy starts.
type BootstrapServer struct {
	Params BootstrapParams `json:"params"`
}

// BootstrapParams place what a proxy opens for itself.
type BootstrapParams struct {
	// AdminAddress and AdminPort are Envoy's admin interface, where it is no
	// Unix socket.
	AdminAddress string `json:"adminAddress"`
	AdminPort    uint32 `json:"adminPort"`
	// EnvoyAdminUnixSocket keeps the admin interface off the network.
	EnvoyAdminUnixSocket bool `json:"envoyAdminUnixSocket"`
	// ReadinessPort is where kuma-dp says whether it is ready.
	ReadinessPort uint32 `json:"readinessPort"`
	// AdminAccessLogPath is the admin interface's access log.
	AdminAccessLogPath string `json:"adminAccessLogPath"`
	// XDSHost and XDSPort override where Envoy connects to.
	XDSHost string `json:"xdsHost"`
	XDSPort uint32 `json:"xdsPort"`
	// XDSConnectTimeout bounds Envoy's attempt to connect.
	XDSConnectTimeout time.Duration `json:"xdsConnectTimeout"`
}

// XDSServer is about the configuration that Envoy is sent.
type XDSServer struct {
	// QuietPeriod is how long changes are gathered before they are sent (ours).
	QuietPeriod time.Duration `json:"quietPeriod"`
	// MaxDelay is how long they are gathered at most (ours).
	MaxDelay time.Duration `json:"maxDelay"`
	// DataplaneStatusFlushInterval is how often insights are written.
	DataplaneStatusFlushInterval time.Duration `json:"dataplaneStatusFlushInterval"`
	// DataplaneDeregistrationDelay is how long a Dataplane outlives its last
	// stream where the proxy did not say that it leaves.
	DataplaneDeregistrationDelay time.Duration `json:"dataplaneDeregistrationDelay" env:"KUMA_XDS_DATAPLANE_DEREGISTRATION_DELAY"`
	// ReturnDelay is how long after a start proxies have to come back before
	// their Dataplanes are taken as ended, and before a rotation of the control
	// plane's authority switches or retires (ours).
	ReturnDelay time.Duration `json:"returnDelay"`
}

// APIServer is the HTTP API.
type APIServer struct {
	// ReadOnly refuses all writes.
	ReadOnly bool `json:"readOnly"`
	// Strict refuses unknown fields (ours, the default); false drops them, as
	// the contract does.
	Strict bool  `json:"strict"`
	HTTP   HTTP  `json:"http"`
	HTTPS  HTTPS `json:"https"`
	// Auth names whose client certificates are taken.
	Auth ClientAuth `json:"auth"`
	// Authn is how callers are authenticated.
	Authn auth.UsersConfig `json:"authn"`
	// CORSAllowedDomains are origins, or regular expressions of them, whose
	// pages may call the API.
	CORSAllowedDomains []string `json:"corsAllowedDomains"`
	// BasePath is put before all paths.
	BasePath string `json:"basePath"`
	// MaxConnections bounds how many connections each of the two ports may have
	// open at once (ours), half of them from one address.
	MaxConnections int `json:"maxConnections"`
	// Timeouts of connections.
	ReadHeaderTimeout time.Duration `json:"readHeaderTimeout"`
	ReadTimeout       time.Duration `json:"readTimeout"`
	WriteTimeout      time.Duration `json:"writeTimeout"`
	IdleTimeout       time.Duration `json:"idleTimeout"`
}

// ClientAuth names whose client certificates are taken.
type ClientAuth struct {
	// ClientCertsDir is a directory whose *.pem and *.crt files hold authorities
	// of clients' certificates, or such certificates themselves.
	ClientCertsDir string `json:"clientCertsDir"`
}

// HTTP is the API without TLS.
type HTTP struct {
	Enabled   bool   `json:"enabled"`
	Interface string `json:"interface"`
	Port      uint32 `json:"port"`
}

// HTTPS is the API with TLS.
type HTTPS struct {
	Enabled   bool   `json:"enabled"`
	Interface string `json:"interface"`
	Port      uint32 `json:"port"`
	ServerTLS
	// RequireClientCert refuses clients without a certificate that TLSCAFile or
	// Auth.ClientCertsDir vouches for.
	RequireClientCert bool `json:"requireClientCert"`
	// TLSCAFile holds authorities of clients' certificates, PEM.
	TLSCAFile string `json:"tlsCaFile"`
}

// DPServer is the server that proxies connect to.
type DPServer struct {
	Port uint32 `json:"port"`
	ServerTLS
	// MaxConnections bounds how many connections may be open at once (ours); a
	// proxy has three.
	MaxConnections int `json:"maxConnections"`
	// MaxConnectionsPerAddress bounds how many of them one address may have
	// (ours), so that no stranger alone keeps the proxies out; raise it where
	// many proxies share an address. Of IPv6, a /64 network counts as one.
	MaxConnectionsPerAddress int `json:"maxConnectionsPerAddress"`
	// ReadHeaderTimeout bounds how long a request's headers may take.
	ReadHeaderTimeout time.Duration `json:"readHeaderTimeout"`
	// GracefulShutdownTimeout bounds how long streams have to end.
	GracefulShutdownTimeout time.Duration `json:"gracefulShutdownTimeout"`
	// Authn is how proxies are authenticated.
	Authn auth.ProxiesConfig `json:"authn"`
	// HDS is about health checks by Envoy.
	HDS HDS `json:"hds"`
}

// HDS is about health checks by Envoy.
type HDS struct {
	Enabled bool `json:"enabled"`
	// Interval is how often Envoy reports.
	Interval time.Duration `json:"interval"`
	// CheckDefaults are those of a serviceProbe.
	CheckDefaults CheckDefaults `json:"checkDefaults"`
}

// CheckDefaults are those of a serviceProbe.
type CheckDefaults struct {
	Timeout            time.Duration `json:"timeout" env:"KUMA_DP_SERVER_HDS_CHECK_TIMEOUT"`
	Interval           time.Duration `json:"interval" env:"KUMA_DP_SERVER_HDS_CHECK_INTERVAL"`
	NoTrafficInterval  time.Duration `json:"noTrafficInterval" env:"KUMA_DP_SERVER_HDS_CHECK_NO_TRAFFIC_INTERVAL"`
	HealthyThreshold   uint32        `json:"healthyThreshold" env:"KUMA_DP_SERVER_HDS_CHECK_HEALTHY_THRESHOLD"`
	UnhealthyThreshold uint32        `json:"unhealthyThreshold" env:"KUMA_DP_SERVER_HDS_CHECK_UNHEALTHY_THRESHOLD"`
}

// Diagnostics is the server with health, readiness and metrics.
type Diagnostics struct {
	ServerPort uint32 `json:"serverPort"`
	// TLSEnabled serves with TLS instead of without.
	TLSEnabled bool `json:"tlsEnabled"`
	ServerTLS
	// DebugEndpoints serves Go's profiles to administrators at /debug/pprof/. A
	// profile of the memory may hold keys: keep it to yourself.
	DebugEndpoints bool `json:"debugEndpoints"`
	// Metrics serves /metrics to whoever reaches the port (ours); false answers
	// 404.
	Metrics bool `json:"metrics"`
}

// Multizone names this zone, and says how zones reach the global control plane.
type Multizone struct {
	Global GlobalConfig `json:"global"`
	Zone   ZoneConfig   `json:"zone"`
}

// GlobalConfig is about the global control plane.
type GlobalConfig struct {
	KDS KDS `json:"kds"`
}

// KDS is the server that zones connect to. This version reads and checks its
// settings; it opens no port for it.
type KDS struct {
	GRPCPort uint32 `json:"grpcPort"`
	// TLSEnabled serves with TLS instead of without.
	TLSEnabled bool `json:"tlsEnabled"`
	ServerTLS
}

// InterCP is about what control planes tell each other.
type InterCP struct {
	Server InterCPServer `json:"server"`
}

// InterCPServer is the server that other instances connect to. This version
// reads and checks its settings; it opens no port for it.
type InterCPServer struct {
	Port uint32 `json:"port"`
	// TLSMinVersion and TLSMaxVersion are TLSv1_2 or TLSv1_3. Its certificate is
	// none of the operator's: instances make theirs of the secret "inter-cp-ca".
	TLSMinVersion string `json:"tlsMinVersion"`
	TLSMaxVersion string `json:"tlsMaxVersion"`
	// TLSCipherSuites lists Go's names of suites for TLS 1.2.
	TLSCipherSuites []string `json:"tlsCipherSuites"`
}

// ZoneConfig names this zone.
type ZoneConfig struct {
	Name string `json:"name"`
}

// Defaults is about what is made at the first start.
type Defaults struct {
	// SkipMeshCreation: no Mesh "default" is made.
	SkipMeshCreation bool `json:"skipMeshCreation"`
	// CreateMeshRoutingResources: a new mesh also gets the older allow-all
	// TrafficPermission.
	CreateMeshRoutingResources bool `json:"createMeshRoutingResources"`
}

// Metrics bounds what is kept of the past.
type Metrics struct {
	Dataplane DataplaneMetrics `json:"dataplane"`
}

// DataplaneMetrics bounds what is kept of a proxy's past.
type DataplaneMetrics struct {
	// SubscriptionLimit is how many streams an insight remembers.
	SubscriptionLimit int `json:"subscriptionLimit"`
}

// MeshServiceConfig is about generated MeshServices.
type MeshServiceConfig struct {
	// DeletionGracePeriod is how long one outlives its last Dataplane.
	DeletionGracePeriod time.Duration `json:"deletionGracePeriod"`
}

// Runtime is about machines without Kubernetes.
type Runtime struct {
	Universal Universal `json:"universal"`
}

// Universal is about machines without Kubernetes.
type Universal struct {
	// DataplaneCleanupAge is how long a Dataplane outlives the last stream of
	// its proxy where nobody withdrew it.
	DataplaneCleanupAge time.Duration `json:"dataplaneCleanupAge"`
}

// IPAM is about addresses.
type IPAM struct {
	// KnownInternalCIDRs are taken as the inside of the network.
	KnownInternalCIDRs []string `json:"knownInternalCIDRs" env:"KUMA_IPAM_KNOWN_INTERNAL_CIDRS"`
}

// Default is the configuration where nothing is set.
func Default() Config {
	return Config{
		General: General{
			TLSMinVersion: "TLSv1_2", TLSCipherSuites: []string{}, TLSReloadInterval: pki.DefaultReload, DNSCacheTTL: 10 * time.Second, TLSCAStore: caInFile,
			CertGenerationBaseBackoff: 5 * time.Second, CertGenerationMaxBackoff: 5 * time.Minute,
		},
		Environment: "universal",
		Mode:        "zone",
		Store:       StoreConfig{Type: "file", Postgres: defaultPostgres()},
		BootstrapServer: BootstrapServer{Params: BootstrapParams{
			AdminAddress: "127.0.0.1", AdminPort: 9901, EnvoyAdminUnixSocket: true, ReadinessPort: 9902,
			AdminAccessLogPath: "/dev/null", XDSConnectTimeout: time.Second,
		}},
		XDSServer: XDSServer{
			QuietPeriod: 10 * time.Millisecond, MaxDelay: 200 * time.Millisecond,
			DataplaneStatusFlushInterval: 10 * time.Second, DataplaneDeregistrationDelay: 10 * time.Second, ReturnDelay: time.Minute,
		},
		APIServer: APIServer{
			Strict: true,
			HTTP:   HTTP{Enabled: true, Interface: "0.0.0.0", Port: 5681},
			HTTPS:  HTTPS{Enabled: true, Interface: "0.0.0.0", Port: 5682},
			Authn:  auth.DefaultUsers(), CORSAllowedDomains: []string{}, BasePath: "/",
			MaxConnections: 10_000,

			ReadHeaderTimeout: time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute,
		},
		DPServer: DPServer{
			Port: 5678, MaxConnections: 30_000, MaxConnectionsPerAddress: 10_000, ReadHeaderTimeout: 5 * time.Second, GracefulShutdownTimeout: 10 * time.Second, Authn: auth.DefaultProxies(),
			HDS: HDS{Enabled: true, Interval: 5 * time.Second, CheckDefaults: CheckDefaults{
				Timeout: 2 * time.Second, Interval: time.Second, NoTrafficInterval: time.Second, HealthyThreshold: 1, UnhealthyThreshold: 1,
			}},
		},
		Diagnostics: Diagnostics{ServerPort: 5680, Metrics: true},

		MonitoringAssignmentServer: defaultMADS(),

		Multizone:   Multizone{Global: GlobalConfig{KDS{GRPCPort: 5685, TLSEnabled: true}}, Zone: ZoneConfig{Name: "default"}},
		InterCP:     InterCP{Server: InterCPServer{Port: 5683}},
		Metrics:     Metrics{Dataplane: DataplaneMetrics{SubscriptionLimit: 2}},
		Access:      auth.DefaultAccess(),
		Runtime:     Runtime{Universal{DataplaneCleanupAge: 72 * time.Hour}},
		MeshService: MeshServiceConfig{DeletionGracePeriod: time.Hour},
		IPAM:        IPAM{KnownInternalCIDRs: []string{"10.0.0.0/8", "192.168.0.0/16", "172.16.0.0/12", "fc00::/7", "127.0.0.1/32", "::1/128"}},
	}
}

package dp

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"regexp"
	"runtime"
	"strings"
	"time"

	"kuma/internal/errs"
	"kuma/internal/names"
)

// Build says how this program was built; the control plane shows it.
type Build struct {
	Version   string `json:"version"`
	GitTag    string `json:"gitTag"`
	GitCommit string `json:"gitCommit"`
	BuildDate string `json:"buildDate"`
}

// bootstrapRequest asks the control plane for Envoy's first configuration
// (contract).
type bootstrapRequest struct {
	Mesh               string `json:"mesh"`
	Name               string `json:"name"`
	ProxyType          string `json:"proxyType"`
	DataplaneToken     string `json:"dataplaneToken,omitempty"`
	DataplaneTokenPath string `json:"dataplaneTokenPath,omitempty"`
	DataplaneResource  string `json:"dataplaneResource,omitempty"`
	Version            struct {
		KumaDp Build `json:"kumaDp"`
		Envoy  struct {
			Version    string `json:"version"`
			Build      string `json:"build"`
			Compatible bool   `json:"kumaDpCompatible,omitempty"`
		} `json:"envoy"`
	} `json:"version"`
	CACert                string            `json:"caCert,omitempty"`
	DynamicMetadata       map[string]string `json:"dynamicMetadata"`
	DNSPort               uint32            `json:"dnsPort,omitempty"`
	ReadinessPort         uint32            `json:"readinessPort"`
	AppProbeProxyDisabled bool              `json:"appProbeProxyDisabled"`
	OperatingSystem       string            `json:"operatingSystem"`
	Features              []string          `json:"features"`
	Resources             struct {
		MaxHeapSizeBytes uint64 `json:"maxHeapSizeBytes"`
	} `json:"resources"`
	Workdir          string `json:"workdir"`
	MetricsResources struct {
		CertPath string `json:"certPath"`
		KeyPath  string `json:"keyPath"`
	} `json:"metricsResources"`
	SystemCAPath   string `json:"systemCaPath"`
	IPv6Enabled    bool   `json:"ipv6Enabled"`
	SpireResources struct {
		SocketPath string `json:"socketPath"`
	} `json:"spireResources"`
	// Instance is ours: the id that kuma-dp made at its start.
	Instance string `json:"instance"`
}

// featureLink says that kuma-dp keeps its own stream to the control plane and
// makes its private keys itself.
const featureLink = "feature-link"

func (c *Config) features() []string {
	out := []string{"feature-tcp-accesslog-via-named-pipe"}
	for _, f := range []struct {
		on   bool
		name string
	}{
		{c.Link, featureLink},
		{true, featureTrustFile},
		{c.MetricsCert != "", names.FeatureMetricsFile},
		{c.DeltaXDS, "feature-delta-grpc"},
		{c.BindOutbounds, "feature-bind-outbounds"},
		{c.UnifiedNaming, "feature-unified-resource-naming"},
		{c.SPIRE, "feature-spire"},
		{c.StrictInboundPorts, "feature-strict-inbound-ports"},
		{c.ReusePort, "feature-reuse-port"},
	} {
		if f.on {
			out = append(out, f.name)
		}
	}
	return out
}

// lasting is an error that waiting can't mend.
type lasting struct{ error }

func (l lasting) Unwrap() error { return l.error }

const (
	maxBootstrap     = 16 << 20
	bootstrapTimeout = 10 * time.Second
)

// bootstrapAnswer is Envoy's first configuration, with what the control plane
// has to say to kuma-dp (contract).
type bootstrapAnswer struct {
	Bootstrap []byte `json:"bootstrap"`
	// Trust is ours: the authorities by which Envoy verifies the control plane,
	// PEM, where it has them from a file.
	Trust   []byte `json:"trust"`
	Sidecar struct {
		Metrics struct {
			Aggregate []application `json:"aggregate"`
		} `json:"metrics"`
	} `json:"kumaSidecarConfiguration"`
}

// fetch asks for Envoy's first configuration once.
func fetch(ctx context.Context, client *http.Client, t *trust, cp string, body []byte) (*bootstrapAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, bootstrapTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(cp, "/")+"/bootstrap", bytes.NewReader(body))
	if err != nil {
		return nil, lasting{err}
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		err = errs.New(errs.Unavailable, "request to bootstrap server failed: %w", err)
		if mend := verification(err); mend != "" {
			return nil, lasting{fmt.Errorf("%w; %s", t.tell(err, req.URL.Hostname()), mend)}
		}
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := readAll(resp.Body, maxBootstrap)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "read the bootstrap server's answer: %w", err)
	}
	text := strings.TrimSpace(string(answer[:min(len(answer), 4096)]))
	switch {
	case resp.StatusCode == http.StatusOK:
		out := new(bootstrapAnswer)
		if err := json.Unmarshal(answer, out); err != nil || len(out.Bootstrap) == 0 {
			return nil, errs.New(errs.Unavailable, "the bootstrap server's answer has no configuration in it")
		}
		return out, nil
	case resp.StatusCode == http.StatusNotFound && text != "":
		return nil, lasting{errs.New(errs.Invalid, "There is no /bootstrap endpoint for provided CP address. Double check if the address passed to the CP has a DP Server port (5678 by default), not HTTP API (5681 by default)")}
	case resp.StatusCode == http.StatusNotFound:
		return nil, errs.New(errs.NotFound, "the Dataplane does not exist: create it in the control plane, or bring it along with --dataplane-file")
	case resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusRequestTimeout:
		return nil, errs.New(errs.Unavailable, "bootstrap server answered with status %d: %s", resp.StatusCode, text)
	}
	if text == "" {
		text = fmt.Sprintf("status %d", resp.StatusCode)
	}
	return nil, lasting{errs.New(errs.Invalid, "Invalid request: %s", text)}
}

// verification says how to mend a failed verification of the control plane's
// certificate; it is empty for other errors.
func verification(err error) string {
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return "reach the control plane by a name that its certificate has, or give it a certificate for this one"
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "name the file with the control plane's authority (kuma-cp.crt of its working directory) with --ca-cert-file"
	}
	if _, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		return "give the control plane a valid certificate, and check this machine's clock"
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return "name the file with the control plane's authority (kuma-cp.crt of its working directory) with --ca-cert-file"
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return "there is no TLS at this address: use the control plane's DP server port (5678 by default)"
	}
	return ""
}

// backoff gives the pauses between attempts: from 0.2 s up to a limit, each
// half as long again as twice the last at most, and none like another's.
type backoff struct {
	limit time.Duration
	next  time.Duration
}

const firstPause = 200 * time.Millisecond

func (b *backoff) pause() time.Duration {
	if b.next == 0 {
		b.next = firstPause
	}
	d := min(b.next, b.limit)
	b.next = min(b.next*2, b.limit)
	return d/2 + rand.N(d/2+1)
}

func (b *backoff) reset() { b.next = 0 }

// sleep waits, or returns false when the context ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// bootstrap asks for Envoy's first configuration until it gets an answer, can't
// get one, or the time for it is over.
func bootstrap(ctx context.Context, cfg *Config, t *trust, r *bootstrapRequest) (*bootstrapAnswer, error) {
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	pauses := backoff{limit: cfg.ControlPlane.RetryBackoff}
	deadline := time.Now().Add(cfg.ControlPlane.RetryMaxDuration)
	said := changes{log: cfg.Log}
	for {
		// The authorities may have changed since the last attempt.
		r.CACert = string(t.request())
		body, err := json.Marshal(r)
		if err != nil {
			return nil, errs.New(errs.Internal, "write the bootstrap request: %w", err)
		}
		client.Transport = &http.Transport{
			TLSClientConfig: t.tls(), DisableKeepAlives: true,
			DialContext: (&net.Dialer{Timeout: bootstrapTimeout}).DialContext, TLSHandshakeTimeout: bootstrapTimeout,
		}
		out, err := fetch(ctx, client, t, cfg.ControlPlane.URL, body)
		if err == nil {
			return out, nil
		}
		if ctx.Err() != nil {
			return nil, errs.New(errs.Unavailable, "Failed to fetch Envoy bootstrap config. %w", context.Cause(ctx))
		}
		if _, ok := errors.AsType[lasting](err); ok {
			return nil, errs.New(errs.Invalid, "Failed to fetch Envoy bootstrap config. %w", err)
		}
		if time.Now().After(deadline) {
			return nil, errs.New(errs.Unavailable, "Failed to fetch Envoy bootstrap config. It was tried for %s (KUMA_CONTROL_PLANE_RETRY_MAX_DURATION): %w", cfg.ControlPlane.RetryMaxDuration, err)
		}
		said.warn("could not fetch bootstrap configuration, trying again", err, "at_most_every", cfg.ControlPlane.RetryBackoff)
		sleep(ctx, pauses.pause())
	}
}

// ownPort is this end of a connection in the text of an error: another one at
// each attempt, though nothing has changed.
var ownPort = regexp.MustCompile(`\S+:[0-9]+->`)

// changes logs a state once and not each time it is met again.
type changes struct {
	log  *slog.Logger
	last string
}

func (c *changes) warn(message string, err error, args ...any) {
	if text := message + ownPort.ReplaceAllString(err.Error(), "->"); text != c.last {
		c.last = text
		c.log.Warn(message, append(args, "error", err)...)
	}
}

func (c *changes) clear() { c.last = "" }

func (c *Config) request(me dataplane, v envoyVersion, b Build, w *workdir, token, tokenPath, instance string) *bootstrapRequest {
	r := &bootstrapRequest{
		Mesh: me.mesh, Name: me.name, ProxyType: c.ProxyType, DataplaneResource: me.doc,
		DataplaneToken: token, DataplaneTokenPath: tokenPath,
		DynamicMetadata: map[string]string{}, DNSPort: c.DNSPort, ReadinessPort: c.ReadinessPort,
		OperatingSystem: runtime.GOOS, Features: c.features(), Workdir: w.path,
		SystemCAPath: c.systemCA(), IPv6Enabled: c.IPv6 && hasIPv6(), Instance: instance,
	}
	r.Version.KumaDp = b
	r.Version.Envoy.Version, r.Version.Envoy.Build, r.Version.Envoy.Compatible = v.number, v.build, v.compatible()
	r.Resources.MaxHeapSizeBytes = c.memory()
	r.MetricsResources.CertPath, r.MetricsResources.KeyPath = c.MetricsCert, c.MetricsKey
	r.SpireResources.SocketPath = c.SPIRESocket
	return r
}

// hasIPv6 reports whether this host has an IPv6 address at all.
func hasIPv6() bool {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		return false
	}
	_ = l.Close()
	return true
}

package ctl

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kuma/internal/errs"
	"kuma/internal/mesh"
)

// prometheusConfig is what a scrape configuration is made of.
type prometheusConfig struct {
	mesh, server, client, job string
	interval, refresh         time.Duration
	// discovery is about the control plane, scrape about the proxies.
	discovery, scrape tlsFiles
}

// tlsFiles is a tls_config of Prometheus.
type tlsFiles struct {
	ca, cert, key, serverName string
	skipVerify                bool
}

func (t tlsFiles) empty() bool { return t == tlsFiles{} }

func (a *app) prometheusConfigCommand() *cobra.Command {
	var p prometheusConfig
	c := &cobra.Command{
		Use:   "prometheus-config",
		Short: "Make a scrape configuration with which Prometheus finds the proxies of a mesh",
		Long: `Make a scrape configuration with which Prometheus finds the proxies of a mesh.

Prometheus asks the control plane where the proxies serve their metrics
(kuma_sd_configs) and follows them as they come and go. The control plane is
asked for what is not given as a flag: where it tells Prometheus, whether with
TLS, for which client the mesh's metrics are, and how they are secured. Paths
of files are written as absolute ones; they must be there for Prometheus.

A mesh serves metrics if it has a policy MeshMetric with a backend for
Prometheus, or an enabled backend in Mesh.metrics.`,
		Example: `  kumactl generate prometheus-config > prometheus.yml
  kumactl generate prometheus-config --mesh payments --client-id prometheus-1
  kumactl generate prometheus-config --server https://cp.example.com:5676 --ca-file ca.pem --cert-file prometheus.pem --key-file prometheus.key`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.generatePrometheus(c.Context(), p) },
	}
	f := c.Flags()
	f.StringVarP(&p.mesh, "mesh", "m", "", "name of the mesh (default: the context's, else default)")
	f.StringVar(&p.server, "server", "", "URL at which Prometheus asks the control plane, such as https://cp.example.com:5676 (default: the control plane's host, with the port and TLS that it is set to)")
	f.StringVar(&p.client, "client-id", "", "the clientId of the MeshMetric backend that is meant for this Prometheus (default: the only one that the mesh has, else prometheus)")
	f.StringVar(&p.job, "job-name", "kuma-dataplanes", "name of the job")
	f.DurationVar(&p.interval, "scrape-interval", 15*time.Second, "how often each proxy is scraped")
	f.DurationVar(&p.refresh, "refresh-interval", 5*time.Second, "how soon the control plane is asked again after an answer")
	f.StringVar(&p.discovery.ca, "ca-file", "", "CA certificate, PEM, by which Prometheus verifies the control plane (default: the context's)")
	f.StringVar(&p.discovery.cert, "cert-file", "", "certificate, PEM, that Prometheus shows to the control plane")
	f.StringVar(&p.discovery.key, "key-file", "", "key of that certificate")
	f.BoolVar(&p.discovery.skipVerify, "skip-verify", false, "don't verify the control plane: anyone on the way can send Prometheus elsewhere")
	f.StringVar(&p.scrape.ca, "metrics-ca-file", "", "CA certificate, PEM, by which Prometheus verifies proxies that serve metrics with a certificate of their own (ProvidedTLS)")
	f.StringVar(&p.scrape.serverName, "metrics-server-name", "", "the name that those certificates have, where they don't have the proxies' addresses")
	f.BoolVar(&p.scrape.skipVerify, "metrics-skip-verify", false, "don't verify those certificates")
	return c
}

func (a *app) generatePrometheus(ctx context.Context, p prometheusConfig) error {
	if err := p.check(); err != nil {
		return err
	}
	_, cp, err := a.active()
	if err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	c.greet(ctx)
	p.mesh = c.meshOf(p.mesh)
	if p.server == "" {
		if p.server, err = c.discoveryServer(ctx); err != nil {
			return err
		}
	}
	server, err := url.Parse(p.server)
	if err != nil || server.Scheme != "http" && server.Scheme != "https" || server.Host == "" {
		return errs.New(errs.Invalid, "--server %q: must be a URL such as http://cp.example.com:5676", p.server)
	}
	switch api := cp.Coordinates.APIServer; {
	case server.Scheme == "http" && !p.discovery.empty():
		return errs.New(errs.Invalid, "the control plane tells Prometheus without TLS at %s, so --ca-file, --cert-file, --key-file and --skip-verify mean nothing; set KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_ENABLED=true there, or leave them out", p.server)
	case server.Scheme == "https" && p.discovery.ca == "" && !p.discovery.skipVerify:
		p.discovery.ca = api.CACertFile
	}
	found, err := c.metricsOf(ctx, p.mesh)
	if err != nil {
		return err
	}
	if p.client == "" {
		switch ids := found.named(); len(ids) {
		case 0:
			p.client = "prometheus"
		case 1:
			p.client = ids[0]
		default:
			return errs.New(errs.Invalid, "mesh %q has metrics for several clients (%s); choose one with --client-id", p.mesh, strings.Join(ids, ", "))
		}
	}
	wanted := found.of(p.client)
	if len(wanted) == 0 {
		a.warn("mesh %q has no metrics for the client %q; make a MeshMetric with a backend of type Prometheus, or check --client-id", p.mesh, p.client)
	}
	if i := slices.IndexFunc(wanted, func(e metricsSource) bool { return e.provided }); i >= 0 {
		if p.scrape.ca == "" && !p.scrape.skipVerify {
			return errs.New(errs.Invalid, "proxies serve metrics with certificates of their own (%s says so): say by which CA Prometheus verifies them, with --metrics-ca-file", wanted[i].from)
		}
	} else if !p.scrape.empty() {
		return errs.New(errs.Invalid, "--metrics-ca-file, --metrics-server-name and --metrics-skip-verify mean nothing: no proxy of mesh %q serves metrics with a certificate of its own", p.mesh)
	}
	if i := slices.IndexFunc(wanted, func(e metricsSource) bool { return e.mutual }); i >= 0 {
		a.warn("proxies serve metrics to members of the mesh alone (%s says so): run Prometheus with a proxy of the mesh beside it", wanted[i].from)
	}
	if err := p.absolute(); err != nil {
		return err
	}
	return a.write([]byte(p.yaml()))
}

func (p *prometheusConfig) check() error {
	switch {
	case (p.discovery.cert == "") != (p.discovery.key == ""):
		return errs.New(errs.Invalid, "--cert-file and --key-file need each other; give both")
	case p.discovery.ca != "" && p.discovery.skipVerify:
		return errs.New(errs.Invalid, "--ca-file and --skip-verify contradict each other")
	case p.scrape.ca != "" && p.scrape.skipVerify:
		return errs.New(errs.Invalid, "--metrics-ca-file and --metrics-skip-verify contradict each other")
	case p.interval < time.Second || p.interval%time.Millisecond != 0:
		return errs.New(errs.Invalid, "--scrape-interval %s: must be at least 1s, in whole milliseconds", p.interval)
	case p.refresh < time.Second || p.refresh%time.Millisecond != 0:
		return errs.New(errs.Invalid, "--refresh-interval %s: must be at least 1s, in whole milliseconds", p.refresh)
	case p.job == "":
		return errs.New(errs.Invalid, "--job-name must not be empty")
	}
	return nil
}

// absolute makes the files' paths absolute: Prometheus takes relative ones as
// relative to its configuration.
func (p *prometheusConfig) absolute() error {
	for _, path := range []*string{&p.discovery.ca, &p.discovery.cert, &p.discovery.key, &p.scrape.ca} {
		if *path == "" {
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return errs.New(errs.Invalid, "%s: %w", *path, err)
		}
		*path = abs
	}
	return nil
}

// discoveryServer is where the control plane tells Prometheus, by its own
// settings.
func (c *client) discoveryServer(ctx context.Context) (string, error) {
	var settings struct {
		Server *struct {
			Enabled    bool   `json:"enabled"`
			Port       uint32 `json:"port"`
			TLSEnabled bool   `json:"tlsEnabled"`
		} `json:"monitoringAssignmentServer"`
	}
	if err := c.json(ctx, "/config", nil, &settings); err != nil {
		return "", fmt.Errorf("ask the control plane where it tells Prometheus: %w; say it with --server, such as --server http://%s", err, net.JoinHostPort(c.base.Hostname(), "5676"))
	}
	s := settings.Server
	if s == nil || !s.Enabled {
		return "", errs.New(errs.Invalid, "the control plane does not tell Prometheus anything: set KUMA_MONITORING_ASSIGNMENT_SERVER_ENABLED=true there, or name another one with --server")
	}
	scheme := "http"
	if s.TLSEnabled {
		scheme = "https"
	}
	return scheme + "://" + net.JoinHostPort(c.base.Hostname(), strconv.FormatUint(uint64(s.Port), 10)), nil
}

// metricsSource is something that has proxies of a mesh serve metrics.
type metricsSource struct {
	// from says what, for people.
	from string
	// client is for whom; everyone says that it is for all.
	client   string
	everyone bool
	// provided and mutual say how the metrics are secured.
	provided, mutual bool
}

type metricsSources []metricsSource

// named lists the clients that are named, sorted.
func (m metricsSources) named() []string {
	var out []string
	for _, s := range m {
		if s.client != "" {
			out = append(out, s.client)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// of returns what concerns a client.
func (m metricsSources) of(client string) (out []metricsSource) {
	if !slices.Contains(m.named(), client) {
		client = ""
	}
	for _, s := range m {
		if s.everyone || s.client == client {
			out = append(out, s)
		}
	}
	return out
}

// metricsOf finds out how the proxies of a mesh serve metrics.
func (c *client) metricsOf(ctx context.Context, meshName string) (metricsSources, error) {
	var out metricsSources
	var m mesh.MeshSpec
	if err := c.json(ctx, path("meshes", meshName), nil, &m); err != nil {
		if p := notFound(err); p != nil && p.routed() {
			return nil, errs.New(errs.NotFound, "there is no mesh %q (kumactl get meshes lists them)", meshName)
		}
		return nil, fmt.Errorf("look at mesh %q: %w", meshName, err)
	}
	if e, ok := m.MetricsOf(nil); ok {
		out = append(out, metricsSource{
			from: fmt.Sprintf("metrics of Mesh %q", meshName), everyone: true,
			provided: e.Mode == mesh.MetricsProvidedTLS, mutual: e.Mode == mesh.MetricsMeshTLS && m.EnabledBackend() != nil,
		})
	}
	query := url.Values{"size": {"1000"}}
	for {
		var p page
		if err := c.json(ctx, path("meshes", meshName, "meshmetrics"), query, &p); err != nil {
			return nil, fmt.Errorf("look at the MeshMetrics of mesh %q: %w", meshName, err)
		}
		for _, raw := range p.Items {
			var policy struct {
				Name   string            `json:"name"`
				Labels map[string]string `json:"labels"`
				Spec   struct {
					Default struct {
						Backends []struct {
							Type       string `json:"type"`
							Prometheus struct {
								ClientID string `json:"clientId"`
								TLS      struct {
									Mode string `json:"mode"`
								} `json:"tls"`
							} `json:"prometheus"`
						} `json:"backends"`
					} `json:"default"`
				} `json:"spec"`
			}
			if err := json.Unmarshal(raw, &policy); err != nil {
				return nil, errs.New(errs.Invalid, "a MeshMetric is not the JSON that was expected: %w", err)
			}
			// What is only tried out has no effect.
			if policy.Labels[mesh.LabelEffect] == "shadow" {
				continue
			}
			for _, b := range policy.Spec.Default.Backends {
				if b.Type == "Prometheus" {
					out = append(out, metricsSource{
						from: fmt.Sprintf("MeshMetric %q", policy.Name), client: b.Prometheus.ClientID,
						provided: b.Prometheus.TLS.Mode == "ProvidedTLS", mutual: b.Prometheus.TLS.Mode == "ActiveMTLSBackend",
					})
				}
			}
		}
		next := p.offset()
		if next == "" {
			return out, nil
		}
		query.Set("offset", next)
	}
}

// yaml writes the configuration.
func (p *prometheusConfig) yaml() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# Prometheus scrapes the proxies of mesh %s; the control plane tells it where they are.", text(p.mesh))
	line("scrape_configs:")
	line("- job_name: %s", text(p.job))
	line("  scrape_interval: %s", duration(p.interval))
	p.scrape.yaml(&b, "  ")
	line("  kuma_sd_configs:")
	line("  - server: %s", text(p.server))
	line("    client_id: %s", text(p.client))
	line("    refresh_interval: %s", duration(p.refresh))
	p.discovery.yaml(&b, "    ")
	line("  relabel_configs:")
	line("  - {source_labels: [__meta_kuma_mesh], regex: %s, action: keep}", text(strings.ReplaceAll(p.mesh, ".", `\.`)))
	line("  - {source_labels: [__meta_kuma_mesh], target_label: mesh}")
	line("  - {source_labels: [__meta_kuma_dataplane], target_label: dataplane}")
	line("  - {source_labels: [__meta_kuma_service], target_label: service}")
	line("  - {regex: __meta_kuma_label_(.+), action: labelmap}")
	line("  metric_relabel_configs:")
	line("  # What a proxy says of itself is what the control plane says of it.")
	line("  - {regex: exported_(mesh|dataplane|service), action: labeldrop}")
	return b.String()
}

func (t tlsFiles) yaml(b *strings.Builder, in string) {
	if t.empty() {
		return
	}
	fmt.Fprintf(b, "%stls_config:\n", in)
	for _, f := range []struct{ key, value string }{{"ca_file", t.ca}, {"cert_file", t.cert}, {"key_file", t.key}, {"server_name", t.serverName}} {
		if f.value != "" {
			fmt.Fprintf(b, "%s  %s: %s\n", in, f.key, text(f.value))
		}
	}
	if t.skipVerify {
		fmt.Fprintf(b, "%s  insecure_skip_verify: true\n", in)
	}
}

// text writes a string as YAML.
func text(s string) string {
	raw, err := json.Marshal(s)
	if err != nil {
		return `""`
	}
	return string(raw)
}

// duration writes a duration as Prometheus does: in one unit.
func duration(d time.Duration) string {
	if d%time.Second == 0 {
		return strconv.FormatInt(int64(d/time.Second), 10) + "s"
	}
	return strconv.FormatInt(int64(d/time.Millisecond), 10) + "ms"
}

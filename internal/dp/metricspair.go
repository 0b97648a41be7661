package dp

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"path/filepath"
	"strconv"
	"time"

	"kuma/internal/errs"
	"kuma/internal/names"
	"kuma/internal/pki"
)

// metricsPair is the certificate with which Envoy serves metrics. The user's
// files are watched and checked; what is good in them goes into one file that
// Envoy watches, so that it never meets half a change, or a bad one.
type metricsPair struct {
	log   *slog.Logger
	files *pki.Files
	pair  *pki.Pair
	// file is Envoy's; shown is what it holds, written how often it was.
	file    string
	shown   *tls.Certificate
	written int
}

// metricsSettings are the names of the settings, for who reads an error.
const metricsSettings = "--metrics-cert-path and --metrics-key-path (KUMA_DATAPLANE_RUNTIME_METRICS_CERT_PATH, KUMA_DATAPLANE_RUNTIME_METRICS_KEY_PATH)"

// openMetricsPair reads the certificate and its key, nil if there are none.
// Their paths become absolute, as Envoy of another control plane reads them by
// itself.
func (c *Config) openMetricsPair() (*metricsPair, error) {
	if c.MetricsCert == "" {
		return nil, nil // and no key either
	}
	for _, p := range []*string{&c.MetricsCert, &c.MetricsKey} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return nil, errs.New(errs.Invalid, "%s: %w", metricsSettings, err)
		}
		*p = abs
	}
	m := &metricsPair{log: c.Log, files: pki.NewFiles(pki.FilesConfig{Log: c.Log})}
	var err error
	if m.pair, err = m.files.Pair("metrics", metricsSettings, c.MetricsCert, c.MetricsKey); err != nil {
		return nil, err
	}
	return m, nil
}

// run follows the files until the context ends.
func (m *metricsPair) run(ctx context.Context) {
	t := time.NewTicker(pki.DefaultReload)
	defer t.Stop()
	said := changes{log: m.log}
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		m.files.Look()
		if err := m.write(); err != nil {
			said.warn("the new certificate of the metrics can't be handed to Envoy, trying again", err)
		} else {
			said.clear()
		}
	}
}

// write hands Envoy the pair, where it has another one.
func (m *metricsPair) write() error {
	now, err := m.pair.Certificate()
	if err != nil || now == m.shown {
		return err
	}
	key, err := x509.MarshalPKCS8PrivateKey(now.PrivateKey)
	if err != nil {
		return errs.New(errs.Internal, "write the key of the metrics' certificate: %w", err)
	}
	var chain []byte
	for _, der := range now.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	type object = map[string]any
	doc, err := json.Marshal(object{
		"version_info": strconv.Itoa(m.written + 1),
		"resources": []any{object{
			"@type": secretType, "name": names.MetricsSecret,
			"tls_certificate": object{
				"certificate_chain": object{"inline_bytes": chain},
				"private_key":       object{"inline_bytes": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})},
			},
		}},
	})
	if err == nil {
		err = pki.WriteFile(m.file, doc)
	}
	if err != nil {
		return errs.New(errs.Unavailable, "hand Envoy the certificate of the metrics: %w", err)
	}
	m.shown, m.written = now, m.written+1
	return nil
}

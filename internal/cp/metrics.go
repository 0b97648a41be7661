package cp

import (
	"fmt"
	"io"
	"strings"

	"kuma/internal/link"
	"kuma/internal/session"
	"kuma/internal/xds"
)

// metric is one line of the metrics page. Labels are written as they stand.
type metric struct {
	name, kind, help, labels string
	value                    func() float64
}

// metrics are what this control plane counts. Names that the contract knows are
// its own (xds_streams_active, xds_requests_received and xds_responses_sent).
func metrics(sessions *session.Registry, ads *xds.Server, links *link.Server) []metric {
	x, l := ads.Stats(), links.Stats()
	unsigned := func(load func() uint64) func() float64 { return func() float64 { return float64(load()) } }
	signed := func(load func() int64) func() float64 { return func() float64 { return float64(load()) } }
	const received, streams = "Answers of Envoys to configurations.", "Streams by whether they were let in."
	return []metric{
		{"xds_streams_active", "gauge", "ADS streams that are open.", "", signed(x.Streams.Load)},
		{"xds_requests_received", "counter", received, `confirmation="ACK"`, unsigned(x.Acknowledged.Load)},
		{"xds_requests_received", "counter", received, `confirmation="NACK"`, unsigned(x.Rejected.Load)},
		{"xds_responses_sent", "counter", "Responses sent to Envoys.", "", unsigned(x.Sent.Load)},
		{"kuma_proxies", "gauge", "Proxies that are here.", "", func() float64 { return float64(sessions.Count()) }},
		{"kuma_streams_total", "counter", streams, `result="opened"`, unsigned(sessions.Opened)},
		{"kuma_streams_total", "counter", streams, `result="refused"`, unsigned(sessions.Refused)},
		{"kuma_links_active", "gauge", "Links of kuma-dp that are open.", "", signed(l.Streams.Load)},
		{"kuma_certificates_total", "counter", "Certificates that proxies asked for over their links.", `result="issued"`, unsigned(l.Issued.Load)},
		{"kuma_certificates_total", "counter", "Certificates that proxies asked for over their links.", `result="failed"`, unsigned(l.Failed.Load)},
		{"kuma_denials_total", "counter", "Refusals by permission that proxies reported.", "", unsigned(l.Denied.Load)},
	}
}

// writeMetrics writes metrics in Prometheus' text format, version 0.0.4, each
// with the zone's name.
func writeMetrics(w io.Writer, zone string, list []metric) error {
	var b strings.Builder
	for i, m := range list {
		if i == 0 || list[i-1].name != m.name {
			fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", m.name, m.help, m.name, m.kind)
		}
		labels := m.labels
		if labels != "" {
			labels += ","
		}
		fmt.Fprintf(&b, "%s{%szone=%q} %g\n", m.name, labels, zone, m.value())
	}
	_, err := io.WriteString(w, b.String())
	return err
}

package pki

import "time"

// Expiry tells when one certificate that the control plane shows, signs with
// or trusts ends. Whoever holds certificates lists them, for the metric and
// for the TLS report.
type Expiry struct {
	// Name says which certificate it is, such as "control-plane-ca" or
	// "dp-server"; it is stable, since it labels a metric.
	Name string
	// File is where it was read from; empty where it lies in the store.
	File string
	// Subject is the certificate's subject, or its first name where it has none.
	Subject string
	// NotAfter is its end.
	NotAfter time.Time
}

// Package names makes the names that the product and its users share: KRIs,
// listener, cluster and secret names, statistics prefixes, SNI values.
//
// All of it is pure functions, and all of it is contract: dashboards, alerts
// and other programs match on these strings (docs/contract.md).
package names

import (
	"fmt"
	"hash/fnv"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
)

// KRI is a resource's identifier across zones: seven fields joined by "_",
// empty ones kept. Section is a port's name (or number as text) on
// destinations and inbounds; it is empty for the resource itself.
type KRI struct {
	Short, Mesh, Zone, Namespace, Name, Section string
}

// String returns "kri_<short>_<mesh>_<zone>_<namespace>_<name>_<section>".
func (k KRI) String() string {
	return strings.Join([]string{"kri", k.Short, k.Mesh, k.Zone, k.Namespace, k.Name, k.Section}, "_")
}

// ParseKRI reads a KRI. Parts after the sixth belong to the section, joined
// without a separator.
func ParseKRI(s string) (KRI, error) {
	p := strings.Split(s, "_")
	if len(p) < 7 || p[0] != "kri" {
		return KRI{}, fmt.Errorf("%q is not a KRI: it has the form kri_<short>_<mesh>_<zone>_<namespace>_<name>_<section>", s)
	}
	return KRI{p[1], p[2], p[3], p[4], p[5], strings.Join(p[6:], "")}, nil
}

// Inbound is the name of an inbound listener, "inbound:<address>:<port>".
func Inbound(address string, port uint32) string { return "inbound:" + hostPort(address, port) }

// Outbound is the name of an outbound listener, "outbound:<address>:<port>".
func Outbound(address string, port uint32) string { return "outbound:" + hostPort(address, port) }

// LocalCluster is the name of the cluster that leads to the application
// behind an inbound, "localhost:<port>".
func LocalCluster(port uint32) string { return "localhost:" + strconv.Itoa(int(port)) }

// Names of what a proxy without a link gets for its admin interface.
const (
	// EnvoyAdmin is the name of the listener on the network, its virtual host, and
	// the cluster that leads to Envoy's admin interface.
	EnvoyAdmin = "kuma:envoy:admin"
	// Readiness is the name of the cluster that leads to kuma-dp's readiness.
	Readiness = "kuma:readiness"
)

// What a kuma-dp is able to hand its Envoy by itself (ours).
const (
	// FeatureMetricsFile is announced by a kuma-dp that writes the certificate
	// with which Envoy serves metrics into Sockets.MetricsCertificate.
	FeatureMetricsFile = "feature-metrics-file"
	// MetricsSecret is the name of the secret in that file.
	MetricsSecret = "kuma:metrics:cert"
)

// IdentitySecret is the name of the secret with a proxy's certificate for
// Mesh.mtls, "identity_cert:secret:<mesh>".
func IdentitySecret(mesh string) string { return "identity_cert:secret:" + mesh }

// CASecret is the name of the secret with the trust anchors of a mesh,
// "mesh_ca:secret:<mesh>".
func CASecret(mesh string) string { return "mesh_ca:secret:" + mesh }

// ControlPlaneTrust is the name of the secret with the authorities by which a
// proxy verifies the control plane.
const ControlPlaneTrust = "cp_validation_ctx"

// Destination is the name of the cluster, endpoint set and virtual host of a
// real destination: "<mesh>_<name>_<namespace>_<zone>_<short>_<port>".
func Destination(mesh, name, namespace, zone, short string, port uint32) string {
	return strings.Join([]string{mesh, name, namespace, zone, short, strconv.Itoa(int(port))}, "_")
}

// StatPrefix makes a name fit for Envoy's statistics: characters that have a
// meaning there become "_".
func StatPrefix(name string) string {
	return strings.NewReplacer(":", "_", ".", "_", "[", "_", "]", "_", "/", "_", "*", "_").Replace(name)
}

// TagSNI is the server name by which a proxy asks for a service by tag:
// "<service>{k=v,…,mesh=<mesh>}", keys sorted.
func TagSNI(service, mesh string, tags map[string]string) string {
	all := maps.Clone(tags)
	if all == nil {
		all = map[string]string{}
	}
	all["mesh"] = mesh
	pairs := make([]string, 0, len(all))
	for _, k := range slices.Sorted(maps.Keys(all)) {
		pairs = append(pairs, k+"="+all[k])
	}
	return service + "{" + strings.Join(pairs, ",") + "}"
}

// HashSNI is the server name by which a proxy asks for a real destination
// whose mesh has classic mTLS: "a<fnv64a>.<name>.<port>.<mesh>.<suffix>", where
// suffix is "ms" for MeshService, "mes" or "mzms". Labels longer than 62
// characters are cut to 62 and marked with an "x".
func HashSNI(name, mesh string, port uint32, suffix string, tags map[string]string) string {
	pairs := make([]string, 0, len(tags))
	for _, k := range slices.Sorted(maps.Keys(tags)) {
		pairs = append(pairs, k+"="+tags[k])
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(name + ";" + mesh + ";" + strings.Join(pairs, ",")))
	label := name
	if len(label) > 62 {
		label = label[:62] + "x"
	}
	return fmt.Sprintf("a%016x.%s.%d.%s.%s", h.Sum64(), label, port, mesh, suffix)
}

// SPIFFE is the id of a service in a mesh with classic mTLS,
// "spiffe://<mesh>/<service>".
func SPIFFE(mesh, service string) string { return "spiffe://" + mesh + "/" + service }

// Tag is the name that a certificate under classic mTLS has for a tag:
// "kuma://<tag>/<value>", and the SPIFFE id for kuma.io/service.
func Tag(mesh, tag, value string) string {
	if tag == "kuma.io/service" {
		return SPIFFE(mesh, value)
	}
	return "kuma://" + tag + "/" + value
}

// hostPort writes IPv6 addresses in brackets.
func hostPort(address string, port uint32) string {
	return net.JoinHostPort(strings.Trim(address, "[]"), strconv.Itoa(int(port)))
}

// Nearest returns the candidate closest to word by edit distance, or "" where
// none is close enough to be meant: for "did you mean" in error messages.
func Nearest(word string, candidates []string) string {
	best, bestDist := "", len(word)/2+1
	for _, c := range candidates {
		if d := distance(strings.ToLower(word), strings.ToLower(c)); d < bestDist {
			best, bestDist = c, d
		}
	}
	return best
}

// distance is Levenshtein's. Words beyond any sensible length are "far".
func distance(a, b string) int {
	if len(a) > 200 || len(b) > 200 {
		return max(len(a), len(b))
	}
	prev := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := range len(a) {
		cur := make([]int, len(b)+1)
		cur[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			cur[j+1] = min(prev[j+1]+1, cur[j]+1, prev[j]+cost)
		}
		prev = cur
	}
	return prev[len(b)]
}

// Sockets names the files in kuma-dp's working directory by which it and its
// Envoy meet. Unix sockets must have short paths: a path is cut to 98
// characters before its ending (contract).
type Sockets struct {
	// Dir is the working directory, Proxy and Mesh are the Dataplane's.
	Dir, Proxy, Mesh string
}

// AccessLog is the named pipe into which Envoy writes log lines for kuma-dp.
func (s Sockets) AccessLog() string { return s.join("kuma-al-" + s.Proxy + "-" + s.Mesh) }

// Metrics is kuma-dp's own socket for merged metrics.
func (s Sockets) Metrics() string { return s.join("kuma-mh-" + s.Proxy + "-" + s.Mesh) }

// DynamicConfig is the socket at which Envoy answers kuma-dp about policies
// that concern kuma-dp itself.
func (s Sockets) DynamicConfig() string { return s.join("kuma-mesh-metric-config") }

// Admin is the socket of Envoy's admin interface.
func (s Sockets) Admin() string { return s.join("kuma-envoy-admin") }

// SDS is the socket on which kuma-dp serves its own certificates and keys.
func (s Sockets) SDS() string { return s.join("kuma-sds") }

// Trust is the file with the authorities of the control plane that Envoy
// watches: "<dir>/kuma-cp-trust.json" (ours).
func (s Sockets) Trust() string { return strings.TrimSuffix(s.Dir, "/") + "/kuma-cp-trust.json" }

// MetricsCertificate is the file with the certificate and the key with which
// Envoy serves metrics, and which it watches: "<dir>/kuma-metrics-cert.json"
// (ours).
func (s Sockets) MetricsCertificate() string {
	return strings.TrimSuffix(s.Dir, "/") + "/kuma-metrics-cert.json"
}

func (s Sockets) join(name string) string {
	p := strings.TrimSuffix(s.Dir, "/") + "/" + name
	if len(p) > 98 {
		p = p[:98]
	}
	return p + ".sock"
}

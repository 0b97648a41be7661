package mesh

import "kuma/internal/resource"

// Labels that the system computes or reads (contract).
const (
	LabelMesh        = "kuma.io/mesh"
	LabelZone        = resource.LabelZone
	LabelOrigin      = "kuma.io/origin"
	LabelEnv         = "kuma.io/env"
	LabelDisplayName = resource.LabelDisplayName
	LabelNamespace   = resource.LabelNamespace
	LabelPolicyRole  = "kuma.io/policy-role"
	LabelProxyType   = "kuma.io/proxy-type"
	LabelWorkload    = "kuma.io/workload"
	LabelEffect      = "kuma.io/effect"
	LabelManagedBy   = "kuma.io/managed-by"
	// LabelDeletionGracePeriod is set on a generated MeshService whose last
	// Dataplane has gone; its value is when (RFC 3339).
	LabelDeletionGracePeriod = "kuma.io/deletion-grace-period-started-at"
	// LabelRegisteredBy marks Dataplanes that a proxy's stream registered; its
	// value is RegisteredByStream. Those alone are removed when streams end.
	LabelRegisteredBy = "kuma.io/registered-by"
)

// Values of labels.
const (
	OriginZone         = "zone"
	OriginGlobal       = "global"
	EnvUniversal       = "universal"
	RegisteredByStream = "stream"
	RoleSystem         = "system"
)

// Tags with a meaning.
const (
	TagService  = "kuma.io/service"
	TagProtocol = "kuma.io/protocol"
	TagZone     = "kuma.io/zone"
)

package mesh

import (
	"kuma/internal/resource"
)

// SecretSpec is bytes that only administrators may read: keys, certificates,
// tokens.
type SecretSpec struct {
	// Data is base64 in JSON.
	Data []byte `json:"data,omitempty"`
}

// String keeps the bytes out of logs.
func (SecretSpec) String() string { return "*****" }

// GoString keeps the bytes out of %#v.
func (SecretSpec) GoString() string { return "*****" }

// Secrets is the kind Secret: secrets of one mesh.
var Secrets = resource.Define[SecretSpec](resource.Kind{
	Name: "Secret", Plural: "secrets", Scope: resource.Mesh, Shape: resource.Flat,
	Sync: resource.GlobalToZone, Admin: true, Federated: true,
}, nil)

// GlobalSecrets is the kind GlobalSecret: secrets of the control plane.
var GlobalSecrets = resource.Define[SecretSpec](resource.Kind{
	Name: "GlobalSecret", Plural: "globalsecrets", AltPlurals: []string{"global-secrets"}, Singular: "globalsecret",
	Scope: resource.Global, Shape: resource.Flat, Sync: resource.GlobalToZone, Admin: true, Federated: true,
}, nil)

// BuiltinCertSecret is the name of the Secret with the certificate of a builtin
// authority, and BuiltinKeySecret of that with its key.
func BuiltinCertSecret(mesh, backend string) string { return mesh + ".ca-builtin-cert-" + backend }

// BuiltinKeySecret is the name of the Secret with a builtin authority's key.
func BuiltinKeySecret(mesh, backend string) string { return mesh + ".ca-builtin-key-" + backend }

// AdminUserToken is the name of the GlobalSecret with the first
// administrator's token.
const AdminUserToken = "admin-user-token"

// EnvoyAdminCA is the name of the GlobalSecret with the authority of the admin
// listeners of proxies without a link: a certificate and then its key, PEM.
const EnvoyAdminCA = "envoy-admin-ca"

// ControlPlaneCA is the name of the GlobalSecret in which control planes that
// share a store keep their own authority, as package pki writes it
// (KUMA_GENERAL_TLS_CA_STORE=store).
const ControlPlaneCA = "control-plane-ca"

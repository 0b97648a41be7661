package admit

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
)

const (
	maxName     = 253
	maxMeshName = 63
)

var (
	subdomain  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	meshRef    = regexp.MustCompile(`^[0-9a-z\-_.]+$`)
	labelValue = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$`)
	dns1035    = regexp.MustCompile(`^[a-z]([-a-z0-9]*[a-z0-9])?$`)
)

// names checks a resource's name and mesh, and that they are those by which it
// is addressed.
func names(r *resource.Resource, at resource.Key, isNew bool) (bad []errs.Field) {
	add := func(path, format string, args ...any) {
		bad = append(bad, errs.Field{Path: path, Message: fmt.Sprintf(format, args...)})
	}
	if at != (resource.Key{}) {
		if r.Name != at.Name {
			add("name", "name from the URL has to be the same as in body")
		}
		if r.Mesh != at.Mesh && r.Kind.Scope == resource.Mesh {
			add("mesh", "mesh from the URL has to be the same as in body")
		}
		if len(bad) > 0 {
			return bad
		}
	}
	switch {
	case r.Name == "":
		add("name", "cannot be empty")
	case len(r.Name) > maxName:
		add("name", "cannot be longer than %d characters", maxName)
	case !subdomain.MatchString(r.Name):
		add("name", "invalid characters: it must consist of lower case letters, digits, '-' and '.', and each part between dots must start and end with a letter or digit")
	case isNew && r.Kind.Name == mesh.Meshes.Name && len(r.Name) > maxMeshName:
		add("name", "cannot be longer than %d characters", maxMeshName)
	}
	switch {
	case r.Kind.Scope != resource.Mesh:
		if r.Mesh != "" {
			add("mesh", "%s is not part of a mesh: leave this out", r.Kind.Name)
		}
	case r.Mesh == "":
		add("mesh", "cannot be empty")
	case len(r.Mesh) > maxName || !meshRef.MatchString(r.Mesh):
		add("mesh", "invalid characters: it must consist of lower case letters, digits, '-', '_' and '.', at most %d", maxName)
	}
	return bad
}

// checkLabels checks what the caller set, before labels are computed.
func (g *Gate) checkLabels(caller auth.Caller, r *resource.Resource) (bad []errs.Field) {
	add := func(key, format string, args ...any) {
		bad = append(bad, errs.Field{Path: fmt.Sprintf("labels[%q]", key), Message: fmt.Sprintf(format, args...)})
	}
	for _, k := range slices.Sorted(maps.Keys(r.Labels)) {
		v := r.Labels[k]
		if reason := qualifiedName(k); reason != "" {
			add(k, "the label's name %s", reason)
		}
		if len(v) > 63 || !labelValue.MatchString(v) {
			add(k, "the label's value must have at most 63 letters, digits, '-', '_' and '.', and start and end with a letter or digit")
		}
	}
	if v, ok := r.Labels[mesh.LabelWorkload]; ok && r.Kind.Name == mesh.Dataplanes.Name && (len(v) > 63 || !dns1035.MatchString(v)) {
		add(mesh.LabelWorkload, "must have at most 63 lower case letters, digits and '-', start with a letter and end with a letter or digit")
	}
	if caller.IsControlPlane() {
		return bad
	}
	origin, ok := r.Labels[mesh.LabelOrigin]
	if ok && origin != mesh.OriginZone && origin != mesh.OriginGlobal {
		add(mesh.LabelOrigin, "must be %q or %q", mesh.OriginZone, mesh.OriginGlobal)
	}
	if v, ok := r.Labels[mesh.LabelZone]; ok && origin != mesh.OriginGlobal && v != g.cfg.Zone {
		add(mesh.LabelZone, "must be the zone of this control plane, %q", g.cfg.Zone)
	}
	if v, ok := r.Labels[mesh.LabelMesh]; ok && r.Kind.Scope == resource.Mesh && v != r.Mesh {
		add(mesh.LabelMesh, "must be the resource's mesh, %q", r.Mesh)
	}
	return bad
}

// qualifiedName says what is wrong with a label's name, or "".
func qualifiedName(k string) string {
	name := k
	if prefix, rest, ok := strings.Cut(k, "/"); ok {
		name = rest
		if len(prefix) > maxName || !subdomain.MatchString(prefix) {
			return "must have a DNS name before the '/'"
		}
	}
	if name == "" || len(name) > 63 || !labelValue.MatchString(name) {
		return "must have at most 63 letters, digits, '-', '_' and '.', and start and end with a letter or digit; a DNS name and '/' may stand before it"
	}
	return ""
}

// keepLabels checks labels that never change, and carries over the one that
// the control plane alone sets.
func keepLabels(r, old *resource.Resource) (bad []errs.Field) {
	by := ""
	if old != nil {
		by = old.Labels[mesh.LabelRegisteredBy]
	}
	if v := r.Labels[mesh.LabelRegisteredBy]; v != "" && v != by {
		bad = append(bad, errs.Field{Path: fmt.Sprintf("labels[%q]", mesh.LabelRegisteredBy), Message: "is set by the control plane alone"})
	} else if by != "" && r.Labels != nil {
		r.Labels[mesh.LabelRegisteredBy] = by
	}
	if old == nil {
		return bad
	}
	for _, k := range []string{mesh.LabelOrigin, mesh.LabelZone, mesh.LabelDisplayName} {
		was, is := old.Labels[k], r.Labels[k]
		switch {
		case was == is:
		case is == "":
			bad = append(bad, errs.Field{Path: fmt.Sprintf("labels[%q]", k), Message: "is immutable, it cannot be removed"})
		case was == "" && k != mesh.LabelDisplayName:
			// It was stored by a version that did not compute it.
		default:
			bad = append(bad, errs.Field{Path: fmt.Sprintf("labels[%q]", k), Message: "is immutable, it cannot be changed"})
		}
	}
	return bad
}

// usedBy returns the mTLS backend of the mesh that uses the secret, or "".
func usedBy(m *resource.Resource, secret string) string {
	t := m.Spec.(*mesh.MeshSpec).MTLS
	if t == nil {
		return ""
	}
	for _, b := range t.Backends {
		switch b.Type {
		case "builtin":
			if secret == mesh.BuiltinCertSecret(m.Name, b.Name) || secret == mesh.BuiltinKeySecret(m.Name, b.Name) {
				return b.Name
			}
		default:
			var conf struct {
				Cert, Key struct {
					Secret string `json:"secret"`
				}
			}
			if json.Unmarshal(b.Conf, &conf) == nil && (conf.Cert.Secret == secret || conf.Key.Secret == secret) {
				return b.Name
			}
		}
	}
	return ""
}

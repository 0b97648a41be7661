package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"

	"kuma/internal/mesh"
	"kuma/internal/resource"
)

// overviews declares the routes that show a kind's resources together with
// what is known of them at run time.
func (s *Server) overviews() {
	for _, k := range s.cfg.Kinds {
		insight := s.kind(k.Name + "Insight")
		if k.Name != mesh.Dataplanes.Name && k.Name != mesh.Zones.Name {
			continue
		}
		base := "/" + k.Plural
		if k.Scope == resource.Mesh {
			for _, list := range []string{base + "/_overview", base + "+insights"} {
				s.add(http.MethodGet, list, reads(k), s.overviewList(k, insight))
			}
			base = "/meshes/{mesh}/" + k.Plural
		}
		for _, list := range []string{base + "/_overview", base + "+insights"} {
			s.add(http.MethodGet, list, reads(k), s.overviewList(k, insight))
		}
		for _, one := range []string{base + "/{name}/_overview", base + "+insights/{name}"} {
			s.add(http.MethodGet, one, reads(k), s.overview(k, insight))
		}
	}
}

// kind returns the kind of that name, or nil.
func (s *Server) kind(name string) *resource.Kind {
	if i := slices.IndexFunc(s.cfg.Kinds, func(k *resource.Kind) bool { return k.Name == name }); i >= 0 {
		return s.cfg.Kinds[i]
	}
	return nil
}

func (s *Server) overview(k, insight *resource.Kind) handler {
	return func(w http.ResponseWriter, r *request) error {
		if err := s.inMesh(r); err != nil {
			return err
		}
		res, err := s.cfg.Store.Get(r.Context(), key(k, r))
		if err != nil {
			return during(titleRetrieve, err)
		}
		raw, err := s.encodeOverview(r.Context(), res, insight)
		if err != nil {
			return during(titleRetrieve, err)
		}
		s.answer(w, http.StatusOK, json.RawMessage(raw))
		return nil
	}
}

func (s *Server) overviewList(k, insight *resource.Kind) handler {
	return func(w http.ResponseWriter, r *request) error {
		return s.page(k, titleList, func(res *resource.Resource) ([]byte, error) {
			return s.encodeOverview(r.Context(), res, insight)
		})(w, r)
	}
}

// encodeOverview writes a resource's meta, its specification and its insight's
// under their own names: "dataplane" and "dataplaneInsight".
func (s *Server) encodeOverview(ctx context.Context, r *resource.Resource, insight *resource.Kind) ([]byte, error) {
	var known any = struct{}{}
	if insight != nil {
		i, err := s.cfg.Store.Get(ctx, resource.Key{Kind: insight.Name, Mesh: r.Mesh, Name: r.Name})
		if err == nil {
			known = i.Spec
		}
	}
	head, err := encodeMeta(r, r.Kind.Name+"Overview")
	if err != nil {
		return nil, err
	}
	spec, err := resource.Marshal(r.Spec)
	if err != nil {
		return nil, err
	}
	run, err := resource.Marshal(known)
	if err != nil {
		return nil, err
	}
	word := strings.ToLower(r.Kind.Name[:1]) + r.Kind.Name[1:]
	var b bytes.Buffer
	b.Write(bytes.TrimSuffix(head, []byte("}")))
	b.WriteString(`,"` + word + `":`)
	b.Write(spec)
	b.WriteString(`,"` + word + `Insight":`)
	b.Write(run)
	b.WriteByte('}')
	return b.Bytes(), nil
}

// encodeMeta writes what all resources have: a resource without its
// specification, under the type's name given.
func encodeMeta(r *resource.Resource, typeName string) ([]byte, error) {
	k := *r.Kind
	k.Name, k.Shape = typeName, resource.Flat
	return resource.Encode(&resource.Resource{Meta: r.Meta, Kind: &k, Spec: struct{}{}})
}

// Statuses of proxies.
const (
	statusOnline   = "online"
	statusOffline  = "offline"
	statusDegraded = "partiallyDegraded"
)

// proxyStatus says whether a proxy is connected and its inbounds are ready
// (contract).
func proxyStatus(d *mesh.DataplaneSpec, insight *mesh.DataplaneInsightSpec) string {
	switch {
	case insight == nil || !insight.Online() || d.Networking == nil:
		return statusOffline
	case d.Networking.Gateway != nil:
		return statusOnline
	}
	ready := 0
	for i := range d.Networking.Inbound {
		if d.Networking.Inbound[i].IsReady() {
			ready++
		}
	}
	switch ready {
	case 0:
		return statusOffline
	case len(d.Networking.Inbound):
		return statusOnline
	}
	return statusDegraded
}

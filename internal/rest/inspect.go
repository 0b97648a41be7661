package rest

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
)

// inspect declares the routes that show what a proxy has and what applies to
// it.
func (s *Server) inspect() {
	k := s.kind(mesh.Dataplanes.Name)
	if k == nil {
		return
	}
	one := "/meshes/{mesh}/" + k.Plural + "/{name}"
	for _, v := range []struct {
		view, what string
		action     auth.Action
	}{{"xds", "config_dump", auth.ViewConfigDump}, {"stats", "stats", auth.ViewStats}, {"clusters", "clusters", auth.ViewClusters}} {
		s.add(http.MethodGet, one+"/"+v.view, does(v.action, "view "+v.view), s.admin(k, v.what))
	}
	s.add(http.MethodGet, one+"/{view}", reads(k), s.noView(k))
	s.add(http.MethodGet, one+"/_config", does(auth.ViewConfigDump, "view xds"), s.computed(k))
	s.add(http.MethodGet, one+"/policies", reads(k), s.attachments(k))
	s.add(http.MethodGet, one+"/_rules", reads(k), s.rules(k))
	for _, p := range s.cfg.Kinds {
		if p.Policy == nil {
			continue
		}
		at := "/meshes/{mesh}/" + p.Plural + "/{name}"
		s.add(http.MethodGet, at+"/_resources/dataplanes", reads(p), s.selected(p))
		s.add(http.MethodGet, at+"/dataplanes", reads(p), s.selected(p))
	}
	if p := s.kind(mesh.MeshServices.Name); p != nil {
		at := "/meshes/{mesh}/" + p.Plural + "/{name}"
		s.add(http.MethodGet, at+"/_resources/dataplanes", reads(p), s.behind(p))
		s.add(http.MethodGet, at+"/_dataplanes", reads(p), s.behind(p))
	}
}

const (
	titleAdmin = "Could not execute admin operation"
	titleProxy = "Could not get dataplane resource"
)

// there checks that the resource in the path exists.
func (s *Server) there(r *request, k *resource.Kind, title string) (*resource.Resource, error) {
	if err := s.inMesh(r); err != nil {
		return nil, err
	}
	res, err := s.cfg.Store.Get(r.Context(), key(k, r))
	return res, during(title, err)
}

func (s *Server) noView(k *resource.Kind) handler {
	return func(_ http.ResponseWriter, r *request) error {
		if _, err := s.there(r, k, titleProxy); err != nil {
			return err
		}
		return during(titleAdmin, errs.New(errs.NotFound, "there is no view %q of a proxy", r.PathValue("view")))
	}
}

func (s *Server) admin(k *resource.Kind, what string) handler {
	return func(w http.ResponseWriter, r *request) error {
		res, err := s.there(r, k, titleProxy)
		if err != nil {
			return err
		}
		if s.cfg.Inspector == nil {
			return during(titleAdmin, errs.New(errs.Unavailable, "this control plane can't ask proxies"))
		}
		v := r.URL.Query()
		q := Inspection{What: what, JSON: v.Get("format") == "json", UsedOnly: v.Get("usedonly") != "false", IncludeEDS: v.Get("include_eds") == "true"}
		body, err := s.cfg.Inspector.Inspect(r.Context(), res.Mesh, res.Name, q)
		if err != nil {
			return during(titleAdmin, err)
		}
		contentType := "text/plain; charset=utf-8"
		if what == "config_dump" {
			q.JSON = true
			if body, err = redactDump(body); err != nil {
				return during(titleAdmin, err)
			}
		}
		if q.JSON {
			contentType = "application/json"
		}
		w.Header().Set("Content-Type", contentType)
		_, _ = w.Write(body)
		return nil
	}
}

// redacted stands where a secret was.
const redacted = "[redacted]"

// secretMembers are members of Envoy's messages that hold private keys.
var secretMembers = []string{"privateKey", "private_key", "password", "privateKeyProvider", "private_key_provider", "genericSecret", "generic_secret", "sessionTicketKeys", "session_ticket_keys"}

// redactDump takes private keys and credentials out of a configuration dump,
// whatever sent it. A dump without any is left as it is.
func redactDump(body []byte) ([]byte, error) {
	suspicious := bytes.Contains(body, []byte("PRIVATE KEY-----")) || bytes.Contains(bytes.ToLower(body), []byte(`"authorization"`))
	for _, m := range secretMembers {
		suspicious = suspicious || bytes.Contains(body, []byte(`"`+m+`"`))
	}
	if !suspicious {
		return body, nil
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	var tree any
	if err := d.Decode(&tree); err != nil {
		return nil, errs.New(errs.Internal, "the dump is not JSON: %w", err)
	}
	return resource.Marshal(redact(tree))
}

func redact(v any) any {
	switch v := v.(type) {
	case map[string]any:
		if k, ok := v["key"].(string); ok && strings.EqualFold(k, "authorization") {
			for _, field := range []string{"value", "rawValue", "raw_value"} {
				if _, there := v[field]; there {
					v[field] = redacted
				}
			}
		}
		for k, inner := range v {
			if slices.Contains(secretMembers, k) {
				v[k] = redactLeaves(inner)
				continue
			}
			v[k] = redact(inner)
		}
	case []any:
		for i := range v {
			v[i] = redact(v[i])
		}
	case string:
		if strings.Contains(v, "PRIVATE KEY-----") {
			return redacted
		}
	}
	return v
}

// redactLeaves replaces every text.
func redactLeaves(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = redactLeaves(v[k])
		}
	case []any:
		for i := range v {
			v[i] = redactLeaves(v[i])
		}
	case string:
		return redacted
	}
	return v
}

// explainer returns the Explainer, or why there is none.
func (s *Server) explainer() (Explainer, error) {
	if s.cfg.Explainer == nil {
		return nil, errs.New(errs.Unavailable, "this control plane can't explain its configuration")
	}
	return s.cfg.Explainer, nil
}

// flag reads a parameter that is true or false.
func flag(r *request, name string) (bool, error) {
	v := r.URL.Query().Get(name)
	if v == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, errs.Fields(errs.Field{Path: name, Message: "must be true or false"})
	}
	return b, nil
}

func (s *Server) computed(k *resource.Kind) handler {
	const title = "Could not compute the proxy's configuration"
	return func(w http.ResponseWriter, r *request) error {
		res, err := s.there(r, k, titleProxy)
		if err != nil {
			return err
		}
		shadow, err := flag(r, "shadow")
		if err != nil {
			return during(title, err)
		}
		diff := false
		for _, v := range r.URL.Query()["include"] {
			if v != "diff" {
				return during(title, errs.Fields(errs.Field{Path: "include", Message: "unsupported value, it must be \"diff\""}))
			}
			diff = true
		}
		x, err := s.explainer()
		if err != nil {
			return during(title, err)
		}
		compute := func(shadow bool) (any, error) {
			raw, err := x.Config(r.Context(), res.Mesh, res.Name, shadow)
			if err != nil {
				return nil, err
			}
			d := json.NewDecoder(bytes.NewReader(raw))
			d.UseNumber()
			var tree any
			if err := d.Decode(&tree); err != nil {
				return nil, errs.New(errs.Internal, "read the computed configuration: %w", err)
			}
			return redact(tree), nil
		}
		var a struct {
			XDS  any         `json:"xds"`
			Diff []patchStep `json:"diff,omitempty"`
		}
		if a.XDS, err = compute(shadow); err != nil {
			return during(title, err)
		}
		if diff {
			now, err := compute(false)
			if err != nil {
				return during(title, err)
			}
			a.Diff = patch("", now, a.XDS)
		}
		s.answer(w, http.StatusOK, a)
		return nil
	}
}

func (s *Server) attachments(k *resource.Kind) handler {
	type item struct {
		Type            string                       `json:"type"`
		Name            string                       `json:"name"`
		Service         string                       `json:"service"`
		MatchedPolicies map[string][]json.RawMessage `json:"matchedPolicies"`
	}
	return func(w http.ResponseWriter, r *request) error {
		res, err := s.there(r, k, titleProxy)
		if err != nil {
			return err
		}
		x, err := s.explainer()
		if err != nil {
			return err
		}
		list, err := x.Attachments(r.Context(), res.Mesh, res.Name)
		if err != nil {
			return during(titleProxy, err)
		}
		a := struct {
			Total int    `json:"total"`
			Items []item `json:"items"`
			Kind  string `json:"kind"`
		}{len(list), []item{}, "SidecarDataplane"}
		for _, at := range list {
			i := item{at.Type, at.Name, at.Service, map[string][]json.RawMessage{}}
			for _, p := range at.Policies {
				raw, err := resource.Encode(p)
				if err != nil {
					return err
				}
				i.MatchedPolicies[p.Kind.Name] = append(i.MatchedPolicies[p.Kind.Name], raw)
			}
			a.Items = append(a.Items, i)
		}
		s.answer(w, http.StatusOK, a)
		return nil
	}
}

// reference names a resource in a list.
type reference struct {
	Type   string            `json:"type"`
	Mesh   string            `json:"mesh,omitempty"`
	Name   string            `json:"name"`
	KRI    string            `json:"kri,omitempty"`
	Labels map[string]string `json:"labels"`
}

func refer(r *resource.Resource) reference {
	out := reference{Type: r.Kind.Name, Mesh: r.Mesh, Name: r.Name, Labels: r.Labels}
	if r.Kind.Short != "" {
		out.KRI = r.KRI().String()
	}
	if out.Labels == nil {
		out.Labels = map[string]string{}
	}
	return out
}

func (s *Server) rules(k *resource.Kind) handler {
	return func(w http.ResponseWriter, r *request) error {
		res, err := s.there(r, k, titleProxy)
		if err != nil {
			return err
		}
		x, err := s.explainer()
		if err != nil {
			return err
		}
		list, err := x.Rules(r.Context(), res.Mesh, res.Name)
		if err != nil {
			return during(titleProxy, err)
		}
		for i := range list {
			l := &list[i]
			for _, part := range []*[]any{&l.ToRules, &l.ToResourceRules, &l.FromRules, &l.InboundRules} {
				if *part == nil {
					*part = []any{}
				}
			}
			if l.Warnings == nil {
				l.Warnings = []string{}
			}
		}
		if list == nil {
			list = []RuleSet{}
		}
		s.answer(w, http.StatusOK, struct {
			HTTPMatches []any     `json:"httpMatches"`
			Resource    reference `json:"resource"`
			Rules       []RuleSet `json:"rules"`
		}{[]any{}, refer(res), list})
		return nil
	}
}

// encodeReference writes a resource as a reference.
func encodeReference(r *resource.Resource) ([]byte, error) { return resource.Marshal(refer(r)) }

// selected lists the Dataplanes to which a policy applies.
func (s *Server) selected(k *resource.Kind) handler {
	return func(w http.ResponseWriter, r *request) error {
		res, err := s.there(r, k, titleRetrieve)
		if err != nil {
			return err
		}
		x, err := s.explainer()
		if err != nil {
			return err
		}
		list, err := x.Selected(r.Context(), res)
		if err != nil {
			return during(titleRetrieve, err)
		}
		return s.pageOf(w, r, list, titleList, encodeReference)
	}
}

// behind lists the Dataplanes behind a MeshService.
func (s *Server) behind(k *resource.Kind) handler {
	return func(w http.ResponseWriter, r *request) error {
		res, err := s.there(r, k, titleRetrieve)
		if err != nil {
			return err
		}
		all, _, err := s.cfg.Store.List(r.Context(), mesh.Dataplanes.Name, res.Mesh)
		if err != nil {
			return during(titleList, err)
		}
		service := res.Spec.(*mesh.MeshServiceSpec)
		var list []*resource.Resource
		for _, d := range all {
			n := d.Spec.(*mesh.DataplaneSpec).Networking
			if n != nil && slices.ContainsFunc(n.Inbound, func(i mesh.Inbound) bool { return service.Selects(d.Name, d.Labels, &i) }) {
				list = append(list, d)
			}
		}
		return s.pageOf(w, r, list, titleList, encodeReference)
	}
}

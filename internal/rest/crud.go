package rest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"kuma/internal/admit"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// crud declares the routes that every kind has.
func (s *Server) crud() {
	for _, k := range s.cfg.Kinds {
		for _, plural := range append([]string{k.Plural}, k.AltPlurals...) {
			base := "/" + plural
			s.add(http.MethodGet, base, reads(k), s.list(k))
			if k.Scope == resource.Mesh {
				base = "/meshes/{mesh}/" + plural
				s.add(http.MethodGet, base, reads(k), s.list(k))
			}
			s.add(http.MethodGet, base+"/{name}", reads(k), s.get(k))
			s.add(http.MethodPut, base+"/{name}", writes(k), s.put(k))
			s.add(http.MethodDelete, base+"/{name}", writes(k), s.delete(k))
		}
	}
}

// key is the key that a request's path names.
func key(k *resource.Kind, r *request) resource.Key {
	return resource.Key{Kind: k.Name, Mesh: r.PathValue("mesh"), Name: r.PathValue("name")}
}

// inMesh checks that the mesh in the path exists, if there is one.
func (s *Server) inMesh(r *request) error {
	name := r.PathValue("mesh")
	if name == "" {
		return nil
	}
	_, err := s.cfg.Store.Get(r.Context(), mesh.Meshes.Key("", name))
	return during(titleMesh, err)
}

// universal refuses forms of resources that there are none of here.
func universal(r *request) error {
	switch f := r.URL.Query().Get("format"); f {
	case "", "universal":
		return nil
	default:
		return errs.Fields(errs.Field{Path: "format", Message: fmt.Sprintf("%q is not available on this control plane; use \"universal\"", f)})
	}
}

func (s *Server) get(k *resource.Kind) handler {
	return func(w http.ResponseWriter, r *request) error {
		if err := s.inMesh(r); err != nil {
			return err
		}
		if err := universal(r); err != nil {
			return during(titleRetrieve, err)
		}
		res, err := s.cfg.Store.Get(r.Context(), key(k, r))
		if err != nil {
			return during(titleRetrieve, err)
		}
		return s.show(w, r, res)
	}
}

// show answers with one resource.
func (s *Server) show(w http.ResponseWriter, r *request, res *resource.Resource) error {
	raw, err := resource.Encode(res)
	if err != nil {
		return err
	}
	tag := etag(res.Version)
	w.Header().Set("ETag", tag)
	if r.Header.Get("If-None-Match") == tag {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	s.answer(w, http.StatusOK, json.RawMessage(raw))
	return nil
}

func etag(version uint64) string { return `"` + strconv.FormatUint(version, 10) + `"` }

// condition reads If-Match and If-None-Match (RFC 9110, 13.1).
func condition(r *request) (store.Condition, error) {
	var c store.Condition
	if v := r.Header.Get("If-None-Match"); v != "" {
		if v != "*" {
			return c, errs.New(errs.Invalid, "header If-None-Match: %q is not \"*\", which a write may have there", v)
		}
		c.Absent = true
	}
	v := r.Header.Get("If-Match")
	if v == "" || v == "*" {
		return c, nil
	}
	n, err := strconv.ParseUint(strings.Trim(v, `"`), 10, 64)
	if err != nil || n == 0 {
		return c, errs.New(errs.Invalid, "header If-Match: %q is not an ETag of this API; take it from the answer to a GET of the resource", v)
	}
	if c.Absent {
		return c, errs.New(errs.Invalid, "headers If-Match and If-None-Match exclude each other")
	}
	c.Version = n
	return c, nil
}

func (s *Server) put(k *resource.Kind) handler {
	return func(w http.ResponseWriter, r *request) error {
		if err := s.cfg.Gate.Writable(r.caller, k); err != nil {
			return err
		}
		dry, err := dryRun(r)
		if err != nil {
			return during(titleProcess, err)
		}
		// Who tries a resource may be about to make its mesh: then that the
		// mesh is missing is said last, when all else is known to be sound.
		if !dry {
			if err := s.inMesh(r); err != nil {
				return err
			}
		}
		cond, err := condition(r)
		if err != nil {
			return err
		}
		if err := s.mustBeThere(r, k); err != nil {
			return err
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return readError(err)
		}
		if h, err := resource.Peek(body); err == nil && h.Type != k.Name {
			return during(titleProcess, errs.Fields(errs.Field{Path: "type", Message: "type from the URL has to be the same as in body"}))
		}
		res, err := resource.Decode(k, body, s.cfg.Lenient)
		if err != nil {
			return during(titleProcess, err)
		}
		write := s.cfg.Gate.Put
		if dry {
			write = s.cfg.Gate.Try
		}
		results, err := write(r.Context(), r.caller, admit.Change{Resource: res, At: key(k, r), If: cond})
		if errors.Is(err, admit.ErrNoMesh) && dry {
			if missing := s.inMesh(r); missing != nil {
				return missing
			}
		}
		if err != nil {
			return during(titleProcess, err)
		}
		status := http.StatusOK
		if results[0].Created {
			status = http.StatusCreated
		}
		if !dry {
			w.Header().Set("ETag", etag(results[0].Resource.Version))
		}
		s.answer(w, status, struct {
			Warnings []string `json:"warnings,omitempty"`
		}{results[0].Warnings})
		return nil
	}
}

// dryRun reports whether a write is only to be tried.
func dryRun(r *request) (bool, error) {
	v := r.URL.Query().Get("dry-run")
	if v == "" {
		return false, nil
	}
	dry, err := strconv.ParseBool(v)
	if err != nil {
		// Guessing could write what was only to be tried.
		return false, errs.Fields(errs.Field{Path: "dry-run", Message: fmt.Sprintf("%q is neither true nor false", v)})
	}
	return dry, nil
}

// mustBeThere serves If-Match: *, which demands that there is a resource.
func (s *Server) mustBeThere(r *request, k *resource.Kind) error {
	if r.Header.Get("If-Match") != "*" {
		return nil
	}
	_, err := s.cfg.Store.Get(r.Context(), key(k, r))
	if errs.Is(err, errs.NotFound) {
		return errs.New(errs.Conflict, "%s does not exist; any version of it was expected", key(k, r))
	}
	return err
}

// readError is a body that could not be read.
func readError(err error) error {
	return errs.New(errs.Invalid, "read the request's body: %w", err)
}

func (s *Server) delete(k *resource.Kind) handler {
	return func(w http.ResponseWriter, r *request) error {
		if err := s.cfg.Gate.Writable(r.caller, k); err != nil {
			return err
		}
		if err := s.inMesh(r); err != nil {
			return err
		}
		cond, err := condition(r)
		if err != nil {
			return err
		}
		if cond.Absent {
			return errs.New(errs.Invalid, "header If-None-Match has no meaning for DELETE")
		}
		if err := s.cfg.Gate.Delete(r.Context(), r.caller, k, key(k, r), cond); err != nil {
			return during(titleDelete, err)
		}
		s.answer(w, http.StatusOK, struct{}{})
		return nil
	}
}

// Sizes of a page.
const (
	defaultPage = 100
	maxPage     = 1000
)

// query is what a list request asks for.
type query struct {
	size, offset int
	name         string
	labels       map[string][]string
	gateway      string
	tags         map[string]string
}

// parseQuery reads the parameters of a list.
func parseQuery(r *request) (query, error) {
	q := query{size: defaultPage}
	v := r.URL.Query()
	if text := v.Get("size"); text != "" {
		n, err := strconv.Atoi(text)
		switch {
		case err != nil:
			return q, errs.Fields(errs.Field{Path: "size", Message: "invalid format"})
		case n < 1:
			return q, errs.Fields(errs.Field{Path: "size", Message: "must be greater than 0"})
		case n > maxPage:
			return q, &titled{titleList, "Invalid page size", errs.Fields(errs.Field{Path: "size", Message: fmt.Sprintf("invalid page size of %d. Maximum page size is %d", n, maxPage)})}
		}
		q.size = n
	}
	if text := v.Get("offset"); text != "" {
		n, err := strconv.Atoi(text)
		if err == nil && n < 0 {
			err = fmt.Errorf("%d is negative", n)
		}
		if err != nil {
			return q, errs.New(errs.Invalid, "invalid: invalid offset: %w", err)
		}
		q.offset = n
	}
	q.name = v.Get("name")
	for param, values := range v {
		inner, ok := strings.CutPrefix(param, "filter[")
		if !ok {
			continue
		}
		inner, after, closed := strings.Cut(inner, "]")
		at := r.URL.Path + "." + param
		label, ok := strings.CutPrefix(inner, "labels.")
		switch {
		case !closed || after != "":
			return q, errs.Fields(errs.Field{Path: at, Message: "advanced filters are not supported"})
		case !ok || label == "":
			return q, errs.Fields(errs.Field{Path: at, Message: "filters are only supported on labels"})
		}
		if q.labels == nil {
			q.labels = map[string][]string{}
		}
		q.labels[label] = append(q.labels[label], values...)
	}
	q.gateway = v.Get("gateway")
	switch q.gateway {
	case "", "true", "false", "builtin", "delegated":
	default:
		return q, errs.Fields(errs.Field{Path: "gateway", Message: "must be true, false, builtin or delegated"})
	}
	for _, text := range v["tag"] {
		if k, val, ok := strings.Cut(text, ":"); ok {
			if q.tags == nil {
				q.tags = map[string]string{}
			}
			q.tags[k] = val
		}
	}
	return q, nil
}

// matches reports whether a resource is asked for.
func (q query) matches(r *resource.Resource) bool {
	if !strings.Contains(r.Name, q.name) {
		return false
	}
	for label, values := range q.labels {
		for _, want := range values {
			if have, ok := r.Labels[label]; !ok || have != want {
				return false
			}
		}
	}
	d, ok := r.Spec.(*mesh.DataplaneSpec)
	return !ok || q.matchesDataplane(d)
}

func (q query) matchesDataplane(d *mesh.DataplaneSpec) bool {
	var gateway *mesh.Gateway
	if d.Networking != nil {
		gateway = d.Networking.Gateway
	}
	switch q.gateway {
	case "true":
		if gateway == nil {
			return false
		}
	case "false":
		if gateway != nil {
			return false
		}
	case "builtin":
		if gateway == nil || gateway.Type != mesh.BuiltIn {
			return false
		}
	case "delegated":
		if gateway == nil || gateway.Type == mesh.BuiltIn {
			return false
		}
	}
	if len(q.tags) == 0 {
		return true
	}
	for _, set := range d.TagSets() {
		all := true
		for k, v := range q.tags {
			have, ok := set[k]
			all = all && ok && strings.Contains(have, v)
		}
		if all {
			return true
		}
	}
	return false
}

func (s *Server) list(k *resource.Kind) handler {
	return s.page(k, titleList, resource.Encode)
}

// page answers with a page of a kind's resources, each shown by a function.
func (s *Server) page(k *resource.Kind, title string, show func(*resource.Resource) ([]byte, error)) handler {
	return func(w http.ResponseWriter, r *request) error {
		if err := s.inMesh(r); err != nil {
			return err
		}
		if err := universal(r); err != nil {
			return during(title, err)
		}
		all, _, err := s.cfg.Store.List(r.Context(), k.Name, r.PathValue("mesh"))
		if err != nil {
			return during(title, err)
		}
		return s.pageOf(w, r, all, title, show)
	}
}

// pageOf answers with a page of the resources that the request asks for.
func (s *Server) pageOf(w http.ResponseWriter, r *request, all []*resource.Resource, title string, show func(*resource.Resource) ([]byte, error)) error {
	q, err := parseQuery(r)
	if err != nil {
		return during(title, err)
	}
	total := 0
	answer := struct {
		Total int               `json:"total"`
		Items []json.RawMessage `json:"items"`
		Next  *string           `json:"next"`
	}{Items: []json.RawMessage{}}
	for _, res := range all {
		if !q.matches(res) {
			continue
		}
		if total >= q.offset && len(answer.Items) < q.size {
			raw, err := show(res)
			if err != nil {
				return err
			}
			answer.Items = append(answer.Items, raw)
		}
		total++
	}
	answer.Total = total
	if end := q.offset + len(answer.Items); end < total && len(answer.Items) > 0 {
		next := s.next(r, end)
		answer.Next = &next
	}
	s.answer(w, http.StatusOK, answer)
	return nil
}

// next is the URL of the page that starts at an offset.
func (s *Server) next(r *request, offset int) string {
	v := r.URL.Query()
	v.Set("offset", strconv.Itoa(offset))
	u := url.URL{Scheme: "http", Host: r.Host, Path: s.cfg.BasePath + r.URL.Path, RawQuery: v.Encode()}
	if r.TLS != nil {
		u.Scheme = "https"
	}
	return u.String()
}

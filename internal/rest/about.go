package rest

import (
	"encoding/json"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/names"
	"kuma/internal/resource"
)

// about declares the routes that tell what this control plane is, what it
// offers and what it holds.
func (s *Server) about() {
	s.add(http.MethodGet, "/", open(), s.index)
	described := does(auth.ViewKinds, "any user")
	s.add(http.MethodGet, "/who-am-i", described, s.whoAmI)
	s.add(http.MethodGet, "/_resources", described, s.resources)
	s.add(http.MethodGet, "/policies", described, s.policies)
	s.add(http.MethodGet, "/global-insight", described, s.globalInsight)
	s.add(http.MethodGet, "/config", does(auth.ViewMetadata, "view metadata"), s.config)
	s.add(http.MethodGet, "/_kri/{kri}", rule{name: "read the KRI's kind", check: s.readsKRI}, s.kri)
}

func (s *Server) index(w http.ResponseWriter, _ *request) error {
	i := s.cfg.Index
	gui := ""
	if s.cfg.GUI != nil {
		gui = s.cfg.BasePath + guiPath
	}
	s.answer(w, http.StatusOK, struct {
		AdminPort   uint32 `json:"adminServerPort,omitempty"`
		BasedOnKuma string `json:"basedOnKuma,omitempty"`
		ClusterID   string `json:"clusterId"`
		// DryRun: PUT understands "dry-run=true".
		DryRun     bool   `json:"dryRun"`
		GUI        string `json:"gui"`
		Hostname   string `json:"hostname"`
		HTTPSPort  uint32 `json:"httpsPort,omitempty"`
		InstanceID string `json:"instanceId"`
		Product    string `json:"product"`
		Version    string `json:"version"`
	}{i.AdminPort, i.BasedOnKuma, i.ClusterID, true, gui, i.Hostname, i.HTTPSPort, i.InstanceID, i.Product, i.Version})
	return nil
}

func (s *Server) whoAmI(w http.ResponseWriter, r *request) error {
	s.answer(w, http.StatusOK, struct {
		Name   string   `json:"name"`
		Groups []string `json:"groups"`
	}{r.caller.Name(), r.caller.Groups()})
	return nil
}

// readOnly reports whether users can't write the kind.
func (s *Server) readOnly(k *resource.Kind) bool { return s.cfg.ReadOnly || k.ReadOnly }

func (s *Server) resources(w http.ResponseWriter, _ *request) error {
	type policy struct {
		IsTargetRef       bool `json:"isTargetRef"`
		HasToTargetRef    bool `json:"hasToTargetRef"`
		HasFromTargetRef  bool `json:"hasFromTargetRef"`
		HasRulesTargetRef bool `json:"hasRulesTargetRef"`
		IsFromAsRules     bool `json:"isFromAsRules"`
	}
	type entry struct {
		Name                string  `json:"name"`
		Scope               string  `json:"scope"`
		ReadOnly            bool    `json:"readOnly"`
		Path                string  `json:"path"`
		SingularDisplayName string  `json:"singularDisplayName"`
		PluralDisplayName   string  `json:"pluralDisplayName"`
		IncludeInFederation bool    `json:"includeInFederation"`
		ShortName           string  `json:"shortName"`
		Policy              *policy `json:"policy,omitempty"`
	}
	list := []entry{}
	for _, k := range s.cfg.Kinds {
		e := entry{k.Name, k.Scope.String(), s.readOnly(k), k.Plural, spaced(k.Name), plural(spaced(k.Name)), k.Federated, k.Short, nil}
		if p := k.Policy; p != nil {
			e.Policy = &policy{p.TargetRef, p.To, p.From, p.Rules, p.FromAsRules}
		}
		list = append(list, e)
	}
	s.answer(w, http.StatusOK, map[string]any{"resources": list})
	return nil
}

func (s *Server) policies(w http.ResponseWriter, _ *request) error {
	type entry struct {
		IsExperimental      bool   `json:"isExperimental"`
		IsInbound           bool   `json:"isInbound"`
		IsOutbound          bool   `json:"isOutbound"`
		IsTargetRefBased    bool   `json:"isTargetRefBased"`
		Name                string `json:"name"`
		Path                string `json:"path"`
		PluralDisplayName   string `json:"pluralDisplayName"`
		ReadOnly            bool   `json:"readOnly"`
		SingularDisplayName string `json:"singularDisplayName"`
	}
	list := []entry{}
	for _, k := range s.cfg.Kinds {
		if p := k.Policy; p != nil {
			list = append(list, entry{false, p.From || p.Rules, p.To, p.TargetRef, k.Name, k.Plural, plural(spaced(k.Name)), s.readOnly(k), spaced(k.Name)})
		}
	}
	s.answer(w, http.StatusOK, map[string]any{"policies": list})
	return nil
}

// spaced writes "MeshHTTPRoute" as "Mesh HTTP Route".
func spaced(name string) string {
	var b strings.Builder
	runes := []rune(name)
	for i, c := range runes {
		if i > 0 && unicode.IsUpper(c) && (unicode.IsLower(runes[i-1]) || i+1 < len(runes) && unicode.IsLower(runes[i+1])) {
			b.WriteByte(' ')
		}
		b.WriteRune(c)
	}
	return b.String()
}

// plural is the English plural.
func plural(s string) string {
	switch {
	case strings.HasSuffix(s, "y") && !strings.HasSuffix(s, "ay"):
		return strings.TrimSuffix(s, "y") + "ies"
	case strings.HasSuffix(s, "s") || strings.HasSuffix(s, "h"):
		return s + "es"
	}
	return s + "s"
}

// secretKey are names of settings whose values nobody may read.
var secretKey = regexp.MustCompile(`(?i)(password|passwd|secret|token|privatekey|credential|dsn)$`)

// mask replaces the values of secrets in a configuration.
func mask(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, inner := range v {
			if text, ok := inner.(string); ok && text != "" && secretKey.MatchString(k) {
				v[k] = "*****"
				continue
			}
			v[k] = mask(inner)
		}
	case []any:
		for i := range v {
			v[i] = mask(v[i])
		}
	case string:
		if strings.Contains(v, "PRIVATE KEY-----") {
			return "*****"
		}
	}
	return v
}

func (s *Server) config(w http.ResponseWriter, _ *request) error {
	if s.cfg.Settings == nil {
		return during("Could not retrieve the configuration", errs.New(errs.Unavailable, "this control plane does not show its configuration"))
	}
	raw, err := s.cfg.Settings()
	if err != nil {
		return err
	}
	var tree any
	if err := json.Unmarshal(raw, &tree); err != nil {
		return errs.New(errs.Internal, "read the configuration: %w", err)
	}
	s.answer(w, http.StatusOK, mask(tree))
	return nil
}

// kriKind returns the kind that a KRI names.
func (s *Server) kriKind(text string) (names.KRI, *resource.Kind, error) {
	id, err := names.ParseKRI(text)
	if err != nil {
		return id, nil, errs.New(errs.Invalid, "%w", err)
	}
	i := slices.IndexFunc(s.cfg.Kinds, func(k *resource.Kind) bool { return k.Short != "" && k.Short == id.Short })
	if i < 0 {
		return id, nil, errs.New(errs.Invalid, "no kind has the short name %q, which the KRI %q names", id.Short, text)
	}
	return id, s.cfg.Kinds[i], nil
}

// readsKRI lets in who may read the kind that the KRI names. A KRI that names
// none is for every user to be told.
func (s *Server) readsKRI(a *auth.Access, c auth.Caller, r *http.Request) error {
	_, k, err := s.kriKind(r.PathValue("kri"))
	if err != nil {
		return a.Do(c, auth.ViewKinds)
	}
	return a.Read(c, k)
}

func (s *Server) kri(w http.ResponseWriter, r *request) error {
	id, k, err := s.kriKind(r.PathValue("kri"))
	if err != nil {
		return err
	}
	if err := universal(r); err != nil {
		return during(titleRetrieve, err)
	}
	all, _, err := s.cfg.Store.List(r.Context(), k.Name, id.Mesh)
	if err != nil {
		return during(titleRetrieve, err)
	}
	id.Section = ""
	for _, res := range all {
		if res.KRI() == id {
			return s.show(w, r, res)
		}
	}
	return during(titleRetrieve, errs.New(errs.NotFound, "%s not found", id))
}

// counts are proxies or services by status.
type counts struct {
	Online            int `json:"online"`
	Offline           int `json:"offline"`
	PartiallyDegraded int `json:"partiallyDegraded"`
	Total             int `json:"total"`
}

func (c *counts) add(status string) {
	c.Total++
	switch status {
	case statusOnline:
		c.Online++
	case statusDegraded:
		c.PartiallyDegraded++
	default:
		c.Offline++
	}
}

type total struct {
	Total int `json:"total"`
}

type onlineTotal struct {
	Online int `json:"online"`
	Total  int `json:"total"`
}

// globalInsight counts all there is.
func (s *Server) globalInsight(w http.ResponseWriter, r *request) error {
	all, _, err := s.cfg.Store.List(r.Context(), "", "")
	if err != nil {
		return during(titleList, err)
	}
	byKind := map[string]int{}
	insights := map[resource.Key]*mesh.DataplaneInsightSpec{}
	for _, res := range all {
		byKind[res.Kind.Name]++
		if i, ok := res.Spec.(*mesh.DataplaneInsightSpec); ok {
			insights[mesh.Dataplanes.Key(res.Mesh, res.Name)] = i
		}
	}
	var a struct {
		CreatedAt  time.Time `json:"createdAt"`
		Dataplanes struct {
			GatewayBuiltin   counts `json:"gatewayBuiltin"`
			GatewayDelegated counts `json:"gatewayDelegated"`
			Standard         counts `json:"standard"`
		} `json:"dataplanes"`
		Meshes    total            `json:"meshes"`
		Policies  total            `json:"policies"`
		Resources map[string]total `json:"resources"`
		Services  struct {
			External         total  `json:"external"`
			GatewayBuiltin   counts `json:"gatewayBuiltin"`
			GatewayDelegated counts `json:"gatewayDelegated"`
			Internal         counts `json:"internal"`
		} `json:"services"`
		Zones struct {
			ControlPlanes onlineTotal `json:"controlPlanes"`
			ZoneEgresses  onlineTotal `json:"zoneEgresses"`
			ZoneIngresses onlineTotal `json:"zoneIngresses"`
		} `json:"zones"`
	}
	a.CreatedAt = time.Now().UTC()
	a.Resources = map[string]total{}
	for _, k := range s.cfg.Kinds {
		if k.ReadOnly || s.cfg.Access.Read(r.caller, k) != nil {
			continue
		}
		a.Resources[k.Name] = total{byKind[k.Name]}
		if k.Policy != nil {
			a.Policies.Total += byKind[k.Name]
		}
	}
	a.Meshes.Total = byKind[mesh.Meshes.Name]
	a.Zones.ControlPlanes = onlineTotal{byKind[mesh.Zones.Name], byKind[mesh.Zones.Name]}
	type service struct {
		mesh, name string
		into       *counts
	}
	services := map[service]*counts{}
	for _, res := range all {
		d, ok := res.Spec.(*mesh.DataplaneSpec)
		if !ok || d.Networking == nil {
			continue
		}
		status := proxyStatus(d, insights[res.Key()])
		proxies, of := &a.Dataplanes.Standard, &a.Services.Internal
		if g := d.Networking.Gateway; g != nil {
			proxies, of = &a.Dataplanes.GatewayDelegated, &a.Services.GatewayDelegated
			if g.Type == mesh.BuiltIn {
				proxies, of = &a.Dataplanes.GatewayBuiltin, &a.Services.GatewayBuiltin
			}
		}
		proxies.add(status)
		for _, name := range d.Services() {
			id := service{res.Mesh, name, of}
			if services[id] == nil {
				services[id] = &counts{}
			}
			services[id].add(status)
		}
	}
	for id, c := range services {
		switch {
		case c.Online == c.Total:
			id.into.add(statusOnline)
		case c.Online+c.PartiallyDegraded == 0:
			id.into.add(statusOffline)
		default:
			id.into.add(statusDegraded)
		}
	}
	s.answer(w, http.StatusOK, a)
	return nil
}

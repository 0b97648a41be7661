package rest

import (
	"net/http"

	"kuma/internal/auth"
	"kuma/internal/errs"
)

// legacy declares the routes that Kuma 0.7 had on this port.
func (s *Server) legacy() {
	if s.cfg.Bootstrap != nil {
		elsewhere := func(r *http.Request) error {
			text := s.cfg.Elsewhere(r)
			return &titled{"There is no bootstrap here", text, errs.New(errs.NotFound, "%s", text)}
		}
		here := rule{name: "programs on this machine", check: func(_ *auth.Access, _ auth.Caller, r *http.Request) error {
			if auth.Direct(r) {
				return nil
			}
			return elsewhere(r)
		}}
		nobody := rule{name: "nobody", check: func(_ *auth.Access, _ auth.Caller, r *http.Request) error { return elsewhere(r) }}
		answer := func(w http.ResponseWriter, r *request) error {
			s.cfg.Bootstrap.ServeHTTP(w, r.Request)
			return nil
		}
		s.add(http.MethodGet, "/bootstrap", here, answer)
		s.add(http.MethodPost, "/bootstrap", nobody, answer)
	}
	if s.cfg.Catalog != nil {
		s.add(http.MethodGet, "/catalog", open(), func(w http.ResponseWriter, _ *request) error {
			s.answer(w, http.StatusOK, s.cfg.Catalog)
			return nil
		})
	}
}

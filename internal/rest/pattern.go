package rest

import "net/http"

// Pattern is the path of the route that answers a request, with names in
// braces, such as "/meshes/{mesh}/dataplanes"; empty where there is none. There
// are as many as there are routes, whatever clients ask for.
func (s *Server) Pattern(r *http.Request) string {
	if r = s.relative(r); r == nil {
		return ""
	}
	switch _, pattern := s.mux.Handler(r); pattern {
	case "/":
		return ""
	case "/{$}":
		return "/"
	default:
		return pattern
	}
}

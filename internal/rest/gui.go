package rest

import (
	"io/fs"
	"net/http"
	"path"
	"strings"
)

// guiPath is where the GUI is.
const guiPath = "/gui"

// gui declares the routes of the GUI's static files, which everyone may have:
// they hold no data.
func (s *Server) gui() {
	if s.cfg.GUI == nil {
		return
	}
	s.add(http.MethodGet, guiPath, open(), s.guiFile)
	s.add(http.MethodGet, guiPath+"/{file...}", open(), s.guiFile)
}

// guiFile answers with a file of the GUI, or with its page for paths that the
// page itself understands.
func (s *Server) guiFile(w http.ResponseWriter, r *request) error {
	h := w.Header()
	h.Set("Content-Security-Policy", "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'")
	h.Set("Cache-Control", "no-cache")
	name := strings.TrimPrefix(path.Clean("/"+r.PathValue("file")), "/")
	if st, err := fs.Stat(s.cfg.GUI, name); name == "" || err != nil || st.IsDir() {
		name = "index.html"
	}
	http.ServeFileFS(w, r.Request, s.cfg.GUI, name)
	return nil
}

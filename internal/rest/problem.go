package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

// Titles of problems, by what was attempted.
const (
	titleMesh     = "Failed to retrieve Mesh"
	titleRetrieve = "Could not retrieve a resource"
	titleList     = "Could not retrieve resources"
	titleProcess  = "Could not process a resource"
	titleDelete   = "Could not delete a resource"
)

// problem is the contract's standard error, which follows RFC
// 9457.
type problem struct {
	Type   string `json:"type"`
	Status int    `json:"status"`
	Title  string `json:"title"`
	Detail string `json:"detail"`
	// InvalidParameters are the fields at fault.
	InvalidParameters []invalidParameter `json:"invalid_parameters,omitempty"`
	// Details and Causes are older names of Detail and InvalidParameters.
	Details string  `json:"details"`
	Causes  []cause `json:"causes,omitempty"`
}

type invalidParameter struct {
	Field  string `json:"field"`
	Reason string `json:"reason"`
}

type cause struct {
	Field   string `json:"field"`
	Message string `json:"message"`
}

// titled is an error together with what was attempted.
type titled struct {
	title string
	// detail, where set, replaces what the error's kind would give.
	detail string
	error
}

func (t *titled) Unwrap() error { return t.error }

// during gives an error the title of what was attempted, unless it has one
// already; nil stays nil.
func during(title string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*titled](err); ok {
		return err
	}
	return &titled{title: title, error: err}
}

// statusClosed is what the contract logs for a caller who went away.
const statusClosed = 499

// problem answers with an error.
func (s *Server) problem(w http.ResponseWriter, r *http.Request, title string, err error) {
	p := problem{Type: "/std-errors", Title: title}
	t, ok := errors.AsType[*titled](err)
	if ok {
		p.Title = t.title
	}
	set := func(status int, fallbackTitle, detail string) {
		p.Status, p.Detail = status, detail
		if p.Title == "" {
			p.Title = fallbackTitle
		}
	}
	tooLarge, isTooLarge := errors.AsType[*http.MaxBytesError](err)
	switch kind := errs.KindOf(err); {
	case isTooLarge:
		set(http.StatusRequestEntityTooLarge, "", "the request's body is too large, the limit is "+strconv.FormatInt(tooLarge.Limit, 10)+" bytes")
		p.Title = "Bad Request"
	case errors.Is(err, context.Canceled):
		set(statusClosed, "Closed", "the caller went away")
	case kind == errs.NotFound:
		set(http.StatusNotFound, titleRetrieve, "Not found")
	case kind == errs.Invalid:
		fields := errs.FieldsOf(err)
		if len(fields) == 0 {
			set(http.StatusBadRequest, "", err.Error())
			p.Title = "Bad Request"
			break
		}
		set(http.StatusBadRequest, titleProcess, "Resource is not valid")
		if m, ok := errors.AsType[*resource.Malformed](err); ok {
			p.Title, p.Detail = "Bad Request", m.Error()
		}
		for _, f := range fields {
			p.InvalidParameters = append(p.InvalidParameters, invalidParameter{f.Path, f.Message})
			p.Causes = append(p.Causes, cause{f.Path, f.Message})
		}
	case kind == errs.Denied:
		set(http.StatusForbidden, "", err.Error())
		p.Title = "Access Denied"
	case kind == errs.Unauthenticated:
		set(http.StatusUnauthorized, "", "Unauthenticated")
		p.Title = "Invalid authentication data"
		w.Header().Set("WWW-Authenticate", "Bearer")
		// The reason is the operator's business, not that of who has no
		// credential.
		s.cfg.Log.InfoContext(r.Context(), "credential refused", "method", r.Method, "path", r.URL.Path, "peer", r.RemoteAddr, "error", err)
	case kind == errs.NotAllowed:
		set(http.StatusMethodNotAllowed, "", err.Error())
		p.Title = "Method not allowed"
	case kind == errs.Conflict:
		set(http.StatusConflict, "", err.Error())
		p.Title = "Conflict"
	case kind == errs.Unavailable:
		set(http.StatusServiceUnavailable, "Service unavailable", err.Error())
		s.cfg.Log.WarnContext(r.Context(), "request could not be served now", "method", r.Method, "path", r.URL.Path, "error", err)
	default:
		set(http.StatusInternalServerError, "Internal Server Error", "Internal Server Error")
		s.cfg.Log.ErrorContext(r.Context(), "request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if t != nil && t.detail != "" {
		p.Detail = t.detail
	}
	p.Details = p.Detail
	s.answer(w, p.Status, p)
}

// answer writes a value as JSON, indented by one blank as the contract has it.
func (s *Server) answer(w http.ResponseWriter, status int, v any) {
	raw, ok := v.(json.RawMessage)
	if !ok {
		var err error
		if raw, err = resource.Marshal(v); err != nil {
			s.cfg.Log.Error("an answer could not be written as JSON", "error", err)
			plain(w, http.StatusInternalServerError, "500: Internal Server Error")
			return
		}
	}
	var b bytes.Buffer
	b.Grow(2 * len(raw))
	if err := json.Indent(&b, raw, "", " "); err != nil {
		s.cfg.Log.Error("an answer could not be written as JSON", "error", err)
		plain(w, http.StatusInternalServerError, "500: Internal Server Error")
		return
	}
	b.WriteByte('\n')
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes())
}

// plain writes one line of text.
func plain(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text)
}

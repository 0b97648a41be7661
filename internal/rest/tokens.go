package rest

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/resource"
)

// titleRequest is the title of a problem with a request for a token.
const titleRequest = "Invalid request"

// maxTokenRequest bounds the body of a request for a token, in bytes.
const maxTokenRequest = 64 << 10

// tokens declares the routes that issue tokens (contract).
func (s *Server) tokens() {
	if s.cfg.Issuer == nil {
		return
	}
	s.add(http.MethodPost, "/tokens/dataplane", does(auth.GenerateDataplaneToken, "generate dataplane token"), s.dataplaneToken)
	if s.cfg.Issuer.Users() {
		s.add(http.MethodPost, "/tokens/user", does(auth.GenerateUserToken, "generate user token"), s.userToken)
	}
	s.add(http.MethodPost, "/tokens/zone", rule{name: "generate zone token", check: mayIssueZone}, s.zoneToken)
}

// mayIssueZone lets in who may issue zone tokens; the refusal names the zone
// that was asked for, as the contract has it.
func mayIssueZone(a *auth.Access, c auth.Caller, r *http.Request) error {
	err := a.Do(c, auth.GenerateZoneToken)
	if err == nil {
		return nil
	}
	var asked auth.ZoneRequest
	body, readErr := io.ReadAll(io.LimitReader(r.Body, maxTokenRequest))
	if readErr != nil || json.Unmarshal(body, &asked) != nil || asked.Zone == "" || len(asked.Zone) > 253 {
		return err
	}
	return errs.New(errs.Denied, "%w for zone '%s'", err, asked.Zone)
}

// ask reads a request for a token. A claim that is misspelt would limit nothing,
// so unknown fields are errors here as in resources.
func (s *Server) ask(r *request, into any) error {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxTokenRequest+1))
	if err != nil {
		return readError(err)
	}
	if len(body) > maxTokenRequest {
		return &http.MaxBytesError{Limit: maxTokenRequest}
	}
	err = resource.DecodeInto(into, body, s.cfg.Lenient)
	if err != nil && len(errs.FieldsOf(err)) == 0 {
		return errs.New(errs.Invalid, "the request's body is not the JSON that was expected: %w", err)
	}
	return during(titleRequest, err)
}

// issued answers with a token, or with why there is none.
func (s *Server) issued(w http.ResponseWriter, r *request, what, text string, err error) error {
	const title = "Could not issue a token"
	switch {
	case errors.Is(err, auth.ErrIssuerOff):
		s.answer(w, http.StatusBadRequest, problem{Type: "/std-errors", Status: http.StatusBadRequest, Title: title, Detail: err.Error(), Details: err.Error()})
		return nil
	case errs.Is(err, errs.NotFound):
		return &titled{"Signing Key not found", err.Error(), err}
	case errs.Is(err, errs.Invalid):
		return during(titleRequest, err)
	case err != nil:
		return during(title, err)
	}
	s.cfg.Log.InfoContext(r.Context(), "token issued", "sort", what, "caller", r.caller.Name())
	w.Header().Set("Content-Type", "text/plain")
	_, _ = io.WriteString(w, text)
	return nil
}

func (s *Server) dataplaneToken(w http.ResponseWriter, r *request) error {
	var q auth.DataplaneRequest
	if err := s.ask(r, &q); err != nil {
		return err
	}
	text, err := s.cfg.Issuer.Dataplane(r.Context(), q)
	return s.issued(w, r, "dataplane", text, err)
}

func (s *Server) userToken(w http.ResponseWriter, r *request) error {
	var q auth.UserRequest
	if err := s.ask(r, &q); err != nil {
		return err
	}
	text, err := s.cfg.Issuer.User(r.Context(), q)
	return s.issued(w, r, "user", text, err)
}

func (s *Server) zoneToken(w http.ResponseWriter, r *request) error {
	var q auth.ZoneRequest
	if err := s.ask(r, &q); err != nil {
		return err
	}
	text, err := s.cfg.Issuer.Zone(r.Context(), q)
	return s.issued(w, r, "zone", text, err)
}

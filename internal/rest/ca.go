package rest

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"time"

	"kuma/internal/auth"
	"kuma/internal/errs"
)

// Rotator replaces the control plane's own authority. Errors are Invalid for a
// step that is not known, and Conflict where there is nothing to rotate, where it
// is not its turn, or where proxies would lose their trust.
type Rotator interface {
	// RotationStatus says where the rotation is.
	RotationStatus(ctx context.Context) (Rotation, error)
	// Rotate takes a step: prepare, distribute, switch, retire, abort or next.
	// Force takes it even where proxies then can't connect anew.
	Rotate(ctx context.Context, step string, force bool) (Rotation, error)
}

// Rotation is where the rotation of the control plane's own authority is: the
// answer of GET /ca/control-plane and of POST /ca/control-plane/rotation.
type Rotation struct {
	// Step is "steady" (nothing is being rotated), "prepared", "distributed" or
	// "switched", Since when it got there.
	Step  string    `json:"step"`
	Since time.Time `json:"since"`
	// Next is the step to be asked for next.
	Next string `json:"next"`
	// Automatic: the control plane began it by itself.
	Automatic bool `json:"automatic"`
	// RetireAfter is when the old authority is retired by itself; only after the
	// switch.
	RetireAfter *time.Time `json:"retireAfter,omitempty"`
	// Note says what else is to be thought of before the next step.
	Note string `json:"note,omitempty"`
	// Held is until when no rotation begins by itself, since one was aborted
	// while the authority comes to its end.
	Held *time.Time `json:"held,omitempty"`
	// Settles is until when proxies that were connected before the control
	// plane's start may come back; only until then, and without force neither
	// switch nor retire are taken.
	Settles *time.Time `json:"settles,omitempty"`
	// File is where this instance writes what users give to clients.
	File string `json:"file"`
	// Anchors are the authorities that are trusted.
	Anchors []RotationAnchor `json:"anchors"`
	// Revision names what proxies are sent, as text since it has 63 bits.
	Revision string `json:"revision"`
	// Acknowledged are the proxies that have it, Pending those that have not.
	Acknowledged []RotationProxy `json:"acknowledged"`
	Pending      []RotationProxy `json:"pending"`
	// CutOff are those that can't connect anew until they are given the new
	// authority, since this step was taken by force, or after the old authority's
	// end; only in the answer to that step.
	CutOff []RotationProxy `json:"cutOff,omitempty"`
}

// RotationAnchor is an authority.
type RotationAnchor struct {
	// Role is "present", "next" or "old".
	Role      string    `json:"role"`
	Subject   string    `json:"subject"`
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
}

// RotationProxy is a proxy that is here.
type RotationProxy struct {
	Mesh string `json:"mesh"`
	Name string `json:"name"`
	// Link: its kuma-dp takes authorities while it runs.
	Link bool `json:"link"`
	// Reason is why it is pending.
	Reason string `json:"reason,omitempty"`
}

const titleRotation = "Could not rotate the control plane's authority"

// ca declares the routes about the control plane's own authority.
func (s *Server) ca() {
	access := does(auth.RotateAuthority, "rotate the control plane's authority")
	s.add(http.MethodGet, "/ca/control-plane", access, s.rotation)
	s.add(http.MethodPost, "/ca/control-plane/rotation", access, s.rotate)
}

func (s *Server) rotation(w http.ResponseWriter, r *request) error {
	if s.cfg.Rotator == nil {
		return during(titleRotation, errs.New(errs.Unavailable, "this control plane rotates nothing"))
	}
	out, err := s.cfg.Rotator.RotationStatus(r.Context())
	if err != nil {
		return during(titleRotation, err)
	}
	s.answer(w, http.StatusOK, out)
	return nil
}

func (s *Server) rotate(w http.ResponseWriter, r *request) error {
	if s.cfg.Rotator == nil {
		return during(titleRotation, errs.New(errs.Unavailable, "this control plane rotates nothing"))
	}
	var q struct {
		Step  string `json:"step"`
		Force bool   `json:"force"`
	}
	const limit = 4 << 10
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		return readError(err)
	}
	if err := json.Unmarshal(body, &q); err != nil || q.Step == "" {
		return during(titleRotation, errs.New(errs.Invalid, `the request's body must be {"step": "prepare", "force": false}; the steps are prepare, distribute, switch, retire, abort and next`))
	}
	out, err := s.cfg.Rotator.Rotate(r.Context(), q.Step, q.Force)
	if err != nil {
		return during(titleRotation, err)
	}
	s.cfg.Log.InfoContext(r.Context(), "the control plane's authority was rotated by a step", "asked", q.Step, "force", q.Force, "now", out.Step, "caller", r.caller.Name())
	s.answer(w, http.StatusOK, out)
	return nil
}

package rest_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/rest"
)

// fakeRotator takes each step once, and notes what it was asked.
type fakeRotator struct{ asked []string }

func (f *fakeRotator) RotationStatus(context.Context) (rest.Rotation, error) {
	return rest.Rotation{Step: "steady", Next: "prepare", Since: time.Unix(0, 0).UTC(), Revision: "7", Pending: []rest.RotationProxy{{Mesh: "default", Name: "web", Reason: "asleep"}}}, nil
}

func (f *fakeRotator) Rotate(ctx context.Context, step string, force bool) (rest.Rotation, error) {
	if step == "retire" && !force {
		return rest.Rotation{}, errs.New(errs.Conflict, "web would lose its trust")
	}
	f.asked = append(f.asked, step)
	return f.RotationStatus(ctx)
}

func TestRotationRoutes(t *testing.T) {
	r := &fakeRotator{}
	a := newAPI(t, func(c *rest.Config, _ *auth.AccessConfig) { c.Rotator = r })
	w := a.get("/ca/control-plane")
	a.want(w, 200)
	for _, want := range []string{`"step": "steady"`, `"revision": "7"`, `"reason": "asleep"`} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("%s is not in %s", want, w.Body)
		}
	}
	const path = "/ca/control-plane/rotation"
	a.want(a.do(a.admin, "POST", path, `{"step":"prepare"}`), 200)
	w = a.do(a.admin, "POST", path, `{"step":"retire"}`)
	a.want(w, 409)
	if !strings.Contains(w.Body.String(), `"detail": "web would lose its trust"`) {
		t.Errorf("refusal: %s", w.Body)
	}
	a.want(a.do(a.admin, "POST", path, `{"step":"retire","force":true}`), 200)
	if got := strings.Join(r.asked, " "); got != "prepare retire" {
		t.Errorf("steps %q", got)
	}
	for _, bad := range []string{``, `{}`, `[]`, `{"step":""}`, `{"step":"prepare"`} {
		w := a.do(a.admin, "POST", path, bad)
		a.want(w, 400)
		if !strings.Contains(w.Body.String(), "the steps are prepare, distribute") {
			t.Errorf("refusal of %q: %s", bad, w.Body)
		}
	}
	a.want(a.do(a.admin, "POST", path, `{"step":"`+strings.Repeat("x", 5<<10)+`"}`), 413)
	if len(r.asked) != 2 {
		t.Errorf("bad requests were carried out: %v", r.asked)
	}
	none := newAPI(t)
	none.want(none.get("/ca/control-plane"), 503)
	none.want(none.do(none.admin, "POST", path, `{"step":"next"}`), 503)
}

package pki

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"kuma/internal/errs"
)

// Step is how far the rotation of the control plane's authority has come.
type Step string

// The steps, in their order. After StepSwitched follows StepSteady, with the new
// authority alone.
const (
	// StepSteady: nothing is being rotated.
	StepSteady Step = "steady"
	// StepPrepared: the next authority is made, and in kuma-cp.crt beside the
	// present one; nobody was sent it.
	StepPrepared Step = "prepared"
	// StepDistributed: proxies are sent both authorities over their links.
	StepDistributed Step = "distributed"
	// StepSwitched: the server's certificate is signed by the next authority, and its
	// chain holds that one signed by the present, so that who knows only the
	// present one verifies it still.
	StepSwitched Step = "switched"
)

// Order is what a Rotator is asked to do.
type Order string

// The orders.
const (
	OrderPrepare    Order = "prepare"
	OrderDistribute Order = "distribute"
	OrderSwitch     Order = "switch"
	OrderRetire     Order = "retire"
	OrderAbort      Order = "abort"
	// OrderNext is the one that follows on the present step.
	OrderNext Order = "next"
)

// follows is which order leads on from a step.
func (s Step) follows() Order {
	switch s {
	case StepPrepared:
		return OrderDistribute
	case StepDistributed:
		return OrderSwitch
	case StepSwitched:
		return OrderRetire
	}
	return OrderPrepare
}

const (
	// RetireAfter is how long after the switch the old authority is retired
	// without being asked, where all proxies have acknowledged the new one.
	RetireAfter = 90 * 24 * time.Hour
	// rotateWithin is how much of an authority's life is left at most when its
	// rotation begins by itself: a tenth of it, and no more than a year.
	rotateWithin = Year
	// lostLooks is how many looks in a row must find an authority at its end
	// before it is replaced at once: a clock may be far ahead for some minutes
	// after a machine's start.
	lostLooks = 5
	// holdAfterAbort is how long after an abort no rotation begins by itself; less
	// where the authority ends sooner than in twice this time.
	holdAfterAbort = 30 * 24 * time.Hour
	// maxNamed bounds how many proxies an error names, maxCutOff how many the log
	// names that are cut off.
	maxNamed, maxCutOff = 10, 20
)

// Recipient is a proxy that is here, as far as a rotation wants to know.
type Recipient struct {
	Mesh, Name string
	// Link: its kuma-dp takes authorities over its link. Others are told nothing
	// while they run.
	Link bool
	// Revision is that of the bundle which it has acknowledged last; 0 for none.
	Revision int64
	// Why says why it could not take the last bundle, or why nobody knows.
	Why string
}

// RotatorConfig is what a Rotator needs.
type RotatorConfig struct {
	// Certs are the control plane's certificates.
	Certs *ControlPlane
	// Recipients lists the proxies that are here; nil means that there are none.
	Recipients func() []Recipient
	// Settled says when Recipients knows everybody: proxies that were connected
	// before the control plane's start have come back by then, or are gone. Until
	// then nothing is switched or retired but by force. Nil means at once.
	Settled func() time.Time
	// Log may be nil.
	Log *slog.Logger
}

// A Rotator replaces the control plane's authority without any proxy losing
// its trust. It is safe for concurrent use, and whatever it has done survives a
// crash: another one goes on where it stopped.
type Rotator struct{ cfg RotatorConfig }

// NewRotator makes a Rotator. Run must run for rotations that begin or end by
// themselves.
func NewRotator(c RotatorConfig) *Rotator {
	if c.Recipients == nil {
		c.Recipients = func() []Recipient { return nil }
	}
	if c.Settled == nil {
		c.Settled = func() time.Time { return time.Time{} }
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Rotator{c}
}

// Anchor is an authority.
type Anchor struct {
	// Role is "present", "next", or "old" after the switch.
	Role string
	// Subject is the certificate's, or its first name where it has none; Serial
	// is its number in hexadecimal.
	Subject, Serial     string
	NotBefore, NotAfter time.Time
}

// RotationStatus is where a rotation is.
type RotationStatus struct {
	Step Step
	// Since is when it got there.
	Since time.Time
	// Next is the order that leads on.
	Next Order
	// Automatic: it was begun by itself.
	Automatic bool
	// RetireAfter is when the old authority is retired without being asked; zero
	// before the switch.
	RetireAfter time.Time
	// Note says what else is to be thought of before the next step; mostly empty.
	Note string
	// Held is until when no rotation begins by itself, since somebody has aborted
	// one while the authority comes to its end; zero otherwise.
	Held time.Time
	// Settles is until when proxies that were connected before the control
	// plane's start may come back, and nothing is switched or retired; zero once
	// that time is over.
	Settles time.Time
	Anchors []Anchor
	// Revision names the bundle that proxies are sent.
	Revision int64
	// Acknowledged have taken it, Pending have not; sorted by mesh and name.
	Acknowledged, Pending []Recipient
}

// Status returns where the rotation is.
func (r *Rotator) Status() (RotationStatus, error) {
	if err := r.own(); err != nil {
		return RotationStatus{}, err
	}
	v := r.cfg.Certs.view.Load()
	s := v.state
	out := RotationStatus{Step: s.Step, Since: s.Since, Next: s.Step.follows(), Automatic: s.Automatic, Revision: v.revision}
	if (s.Step == StepPrepared || s.Step == StepDistributed) && s.cross == nil {
		out.Note = "the present certificate can't vouch for the next authority: who knows the present one alone refuses the control plane from the switch on; give " + CAFile + " to all clients before"
	}
	if s.Step == StepSteady && time.Now().Before(s.Held) {
		out.Held = s.Held
	}
	if at := r.cfg.Settled(); at.After(time.Now()) {
		out.Settles = at
	}
	role := "present"
	if s.Step == StepSwitched {
		role, out.RetireAfter = "old", s.Since.Add(RetireAfter)
	}
	out.Anchors = append(out.Anchors, anchor(role, s.current.cert))
	if s.next != nil {
		role = "next"
		if s.Step == StepSwitched {
			role = "present"
		}
		out.Anchors = append(out.Anchors, anchor(role, s.next.cert))
	}
	for _, p := range r.cfg.Recipients() {
		if p.Why = reason(p, v.revision); p.Why == "" {
			out.Acknowledged = append(out.Acknowledged, p)
		} else {
			out.Pending = append(out.Pending, p)
		}
	}
	for _, list := range [][]Recipient{out.Acknowledged, out.Pending} {
		slices.SortFunc(list, func(a, b Recipient) int { return cmp.Or(cmp.Compare(a.Mesh, b.Mesh), cmp.Compare(a.Name, b.Name)) })
	}
	return out, nil
}

func anchor(role string, c *x509.Certificate) Anchor {
	return Anchor{Role: role, Subject: named(c), Serial: c.SerialNumber.Text(16), NotBefore: c.NotBefore, NotAfter: c.NotAfter}
}

// reason is why a proxy does not count as told; empty where it does.
func reason(p Recipient, revision int64) string {
	switch {
	case !p.Link && p.Why != "":
		return p.Why
	case !p.Link:
		return "it has no link, so its Envoy keeps the authorities that it started with until it is started anew"
	case p.Revision == revision:
		return ""
	case p.Why != "":
		return p.Why
	}
	return "it has not acknowledged the authorities yet"
}

// own is an error where there is nothing to rotate.
func (r *Rotator) own() error {
	if r.cfg.Certs.vault != nil {
		return nil
	}
	return errs.New(errs.Conflict, "there is nothing to rotate: the control plane shows the certificate of KUMA_GENERAL_TLS_CERT_FILE (%s), which you replace by putting another file there; unset it and KUMA_GENERAL_TLS_KEY_FILE to have an authority of the control plane's own", r.cfg.Certs.config.CertFile)
}

// Do carries an order out. It returns the proxies that the order cut off: those
// that can't connect anew until they are given the new authority, since it was
// carried out by force, or after the old authority's end. Errors: Invalid for
// an unknown order; Conflict where there is nothing to rotate, where it is not
// this one's turn, or where proxies would lose their trust, which are named
// then, which Force does all the same; Unavailable where the step was taken
// and is kept, but what follows from it could not be written yet.
func (r *Rotator) Do(order Order, force bool) (cutOff []Recipient, err error) {
	return r.do(order, force, false)
}

func (r *Rotator) do(order Order, force, automatic bool) (cutOff []Recipient, err error) {
	if err := r.own(); err != nil {
		return nil, err
	}
	c := r.cfg.Certs
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.view.Load().state
	if order == OrderNext {
		order = old.Step.follows()
	}
	switch order {
	case OrderPrepare, OrderDistribute, OrderSwitch, OrderRetire, OrderAbort:
	default:
		return nil, errs.New(errs.Invalid, "the step %q is not known; use prepare, distribute, switch, retire, abort or next", order)
	}
	if order == OrderAbort {
		if old.Step == StepSteady {
			return nil, errs.New(errs.Conflict, "there is nothing to abort: no rotation is going on")
		}
	} else if turn := old.Step.follows(); order != turn {
		return nil, errs.New(errs.Conflict, "it is not the turn of %s: the rotation is %s, and %s comes next (or abort)", order, old.Step, turn)
	}
	now := time.Now()
	lost := now.After(old.current.cert.NotAfter) // then nobody trusts it any more
	next := old
	next.Since = now
	switch order {
	case OrderPrepare:
		a, err := newAuthority()
		if err != nil {
			return nil, err
		}
		next.Step, next.Automatic, next.Held, next.next, next.cross = StepPrepared, automatic, time.Time{}, &a, nil
		if !lost {
			if next.cross, err = old.current.crossSign(a, now); err != nil {
				return nil, err
			}
		}
	case OrderDistribute:
		next.Step = StepDistributed
	case OrderSwitch:
		if from := old.next.cert.NotBefore; now.Before(from) {
			return nil, errs.New(errs.Conflict, "the next authority is not valid before %s, since it was made by a clock that was ahead; set this machine's clock right, or abort and prepare another one", from.UTC().Format(time.RFC3339))
		}
		if err := r.told(order, func(p Recipient) bool { return p.Link || old.cross == nil }); err != nil && !force && !lost {
			return nil, err
		}
		next.Step = StepSwitched
	case OrderRetire:
		if err := r.told(order, func(Recipient) bool { return true }); err != nil && !force && !lost {
			return nil, err
		}
		next = authorities{Step: StepSteady, Since: now, current: *old.next, retired: old.current.kept()}
	case OrderAbort:
		next = authorities{Step: StepSteady, Since: now, current: old.current, retired: old.retired}
		if end := old.current.cert.NotAfter; !automatic && endsSoon(old.current.cert, now) && now.Before(end) {
			next.Held = now.Add(min(holdAfterAbort, end.Sub(now)/2)).Truncate(time.Second)
		}
	}
	if order == OrderRetire || order == OrderSwitch && old.cross == nil {
		s, err := r.Status()
		if err != nil {
			return nil, err
		}
		cutOff = s.Pending
	}
	taken, err := c.keep(next)
	if !taken {
		return nil, err
	}
	r.cfg.Log.Info("the rotation of the control plane's authority has come on", "order", string(order), "step", string(next.Step), "force", force, "automatic", automatic)
	if len(cutOff) > 0 {
		var names []string
		for _, p := range cutOff[:min(len(cutOff), maxCutOff)] {
			names = append(names, p.Mesh+"/"+p.Name)
		}
		r.cfg.Log.Warn("proxies that have not acknowledged the control plane's new authority can't connect anew until they are given kuma-cp.crt", "order", string(order), "proxies", names, "more", len(cutOff)-len(names))
	}
	if err != nil {
		return cutOff, errs.New(errs.Unavailable, "the step %s was taken, but %w", order, err)
	}
	return cutOff, nil
}

// told is an error that names the proxies of a choice that have not taken in
// the authorities.
func (r *Rotator) told(order Order, choice func(Recipient) bool) error {
	s, err := r.Status()
	if err != nil {
		return err
	}
	if !s.Settles.IsZero() {
		return errs.New(errs.Conflict, "the control plane has started a moment ago, and does not know yet which proxies would be hurt by %s: they have until %s to come back; try again then, or force it", order, s.Settles.UTC().Format(time.RFC3339))
	}
	var names []string
	for _, p := range s.Pending {
		if choice(p) {
			names = append(names, fmt.Sprintf("%s in mesh %s (%s)", p.Name, p.Mesh, p.Why))
		}
	}
	if len(names) == 0 {
		return nil
	}
	total, more := len(names), ""
	who := fmt.Sprintf("%d proxies", total)
	if total == 1 {
		who = "1 proxy"
	}
	if n := total - maxNamed; n > 0 {
		names, more = names[:maxNamed], fmt.Sprintf("; and %d more", n)
	}
	what := map[Order]string{OrderSwitch: "would be shown a certificate of an unknown authority", OrderRetire: "would not trust the control plane at the next connection"}[order]
	return errs.New(errs.Conflict, "%s %s: %s%s; wait for them, start them anew, or force it", who, what, strings.Join(names, "; "), more)
}

// Run begins a rotation when the authority's life comes to its end, carries on
// those that it began or that somebody has left lying until then, and retires
// old authorities, until the context ends.
func (r *Rotator) Run(ctx context.Context) error {
	if r.own() != nil {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(r.cfg.Certs.config.Every)
	defer tick.Stop()
	said, lost := "", 0
	for {
		if lost++; !time.Now().After(r.cfg.Certs.view.Load().state.current.cert.NotAfter) {
			lost = 0
		}
		err := r.tend(lost >= lostLooks)
		if text := errorText(err); text != said {
			if said = text; err != nil {
				r.cfg.Log.Warn("the rotation of the control plane's authority waits; see kumactl ca rotate control-plane --status", "reason", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// tend does what is to be done without being asked. Lost: the authority has
// ended for sure, so nobody trusts it any more.
func (r *Rotator) tend(lost bool) error {
	s, now := r.cfg.Certs.view.Load().state, time.Now()
	switch {
	case now.After(s.current.cert.NotAfter) && !lost:
		return errs.New(errs.Unavailable, "the authority %s ended at %s by this machine's clock, which may be wrong; if it still says so in some minutes, the authority is replaced", named(s.current.cert), s.current.cert.NotAfter.UTC().Format(time.RFC3339))
	case s.Step == StepSteady && !endsSoon(s.current.cert, now):
		return nil
	case s.Step == StepSteady && now.Before(s.Held) && !lost:
		return nil // somebody has aborted it
	case s.Step == StepSwitched && now.Before(s.Since.Add(RetireAfter)) && now.Before(s.current.cert.NotAfter):
		return nil
	case s.Step != StepSteady && s.Step != StepSwitched && !s.Automatic && !endsSoon(s.current.cert, now):
		return nil // somebody does it by hand, and has time
	case (s.Step == StepDistributed || s.Step == StepSwitched) && !lost && r.cfg.Settled().After(now):
		return nil // who was here before the start may still come back
	case s.Step == StepSteady:
		r.cfg.Log.Info("the control plane's authority comes to its end and is rotated now", "subject", named(s.current.cert), "not_after", s.current.cert.NotAfter)
	}
	order := OrderNext
	if (s.Step == StepPrepared || s.Step == StepDistributed) && (endsSoon(s.next.cert, now) || now.Before(s.next.cert.NotBefore)) {
		// It lay there for so long that another one is needed anyway, or was made
		// by a clock that was far ahead.
		order = OrderAbort
	}
	_, err := r.do(order, false, true)
	if err == nil && (order == OrderAbort || s.Step == StepSteady || s.Step == StepPrepared) {
		return r.tend(lost)
	}
	return err
}

// endsSoon reports whether an authority must be rotated.
func endsSoon(c *x509.Certificate, now time.Time) bool {
	return !now.Before(c.NotAfter.Add(-min(rotateWithin, c.NotAfter.Sub(c.NotBefore)/10)))
}

// ReadAnchors reads a bundle of authorities from PEM, as a client takes it from
// a control plane or from a file: certificates and nothing else, at most 16 in
// 64 KiB, each an authority that may sign certificates. It returns them in
// order, and as PEM without anything between them.
func ReadAnchors(text []byte) ([]*x509.Certificate, []byte, error) {
	const limit = 64 << 10
	if len(text) > limit {
		return nil, nil, errs.New(errs.Invalid, "the authorities have %d bytes, the limit is %d", len(text), limit)
	}
	certs, err := parseCerts(text)
	if err != nil {
		return nil, nil, err
	}
	var clean []byte
	for _, c := range certs {
		switch {
		case !c.BasicConstraintsValid || !c.IsCA:
			return nil, nil, errs.New(errs.Invalid, "the certificate %q is no authority (basic constraint CA:TRUE is missing)", named(c))
		case c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0:
			return nil, nil, errs.New(errs.Invalid, "the certificate %q may not sign certificates (key usage keyCertSign is missing)", named(c))
		}
		clean = append(clean, encodeCert(c.Raw)...)
	}
	return certs, clean, nil
}

// WriteFile replaces a file (mode 0600) in one step: all of it is on disk
// before it has its name.
func WriteFile(file string, data []byte) error { return writeFile(file, data) }

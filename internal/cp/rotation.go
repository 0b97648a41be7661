package cp

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"kuma/internal/errs"
	"kuma/internal/link"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/rest"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/internal/store"
)

// Values of General.TLSCAStore.
const (
	caInFile  = "file"
	caInStore = "store"
)

// caVault keeps the authority in the store.
type caVault struct{ store store.Store }

// Load returns the secret's bytes.
func (v caVault) Load(ctx context.Context) ([]byte, uint64, error) {
	r, err := v.store.Get(ctx, mesh.GlobalSecrets.Key("", mesh.ControlPlaneCA))
	if errs.Is(err, errs.NotFound) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	return mesh.GlobalSecrets.From(r).Spec.Data, r.Version, nil
}

// Save replaces them, unless another was quicker.
func (v caVault) Save(ctx context.Context, text []byte, version uint64) (uint64, error) {
	at := store.Condition{Absent: version == 0, Version: version}
	r := mesh.GlobalSecrets.Make("", mesh.ControlPlaneCA, &mesh.SecretSpec{Data: text})
	return v.store.Put(ctx, store.Write{Key: r.Key(), Resource: r, If: at})
}

// authorityVault is where the control plane's authority is kept; nil means in
// the work directory.
func (c *ControlPlane) authorityVault() pki.Vault {
	if c.cfg.General.TLSCAStore != caInStore {
		return nil
	}
	if c.cfg.Store.Type == "memory" {
		c.log.Warn("the control plane's authority is kept in a store that forgets it at the end, and clients with it: KUMA_GENERAL_TLS_CA_STORE=file keeps it in the work directory")
	}
	return caVault{c.store}
}

// formerVault is where the control plane's authority may have been kept while it
// was shared; nil where it is.
func (c *ControlPlane) formerVault() pki.Vault {
	if c.cfg.General.TLSCAStore == caInStore {
		return nil
	}
	return caVault{c.store}
}

// followAuthority takes over what another control plane makes of the shared
// authority, as the picture shows it.
func (c *ControlPlane) followAuthority(ctx context.Context) error {
	if c.cfg.General.TLSCAStore != caInStore || c.cfg.General.TLSCertFile != "" {
		<-ctx.Done()
		return nil
	}
	changed, stop := c.tracker.Subscribe()
	defer stop()
	var seen *uint64
	for {
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
		var now uint64
		if r := c.tracker.Now().Get(mesh.GlobalSecrets.Key("", mesh.ControlPlaneCA)); r != nil {
			now = r.Version
		}
		if seen != nil && *seen == now {
			continue
		}
		if err := c.certs.Refresh(); err != nil {
			c.log.Error("the control plane's authority in the store can't be taken over; the one before goes on", "secret", mesh.ControlPlaneCA, "error", err)
			continue
		}
		seen = &now
	}
}

// trust is what proxies are told of the control plane's authority; nil where the
// server that they connect to shows a certificate of another.
func (c *ControlPlane) trust(shown certificate) link.Trust {
	if own, ok := shown.(*pki.ControlPlane); ok && c.cfg.General.TLSCertFile == "" {
		return own
	}
	return nil
}

// recipients are the proxies that a rotation concerns.
type recipients struct {
	sessions *session.Registry
	tracker  *state.Tracker
	// instance is this control plane's; shared: others on the same store have the
	// same authority.
	instance string
	shared   bool
}

func (r recipients) list() []pki.Recipient {
	var out []pki.Recipient
	for _, i := range r.sessions.List() {
		p := pki.Recipient{Mesh: i.Key.Mesh, Name: i.Key.Name, Link: i.Linked, Revision: i.Trust.Revision, Why: i.Trust.Error}
		switch {
		case i.Trust.Error != "":
			p.Revision = 0
		case i.Linked && !i.Link:
			p.Why = "its link is down"
		}
		out = append(out, p)
	}
	pic := r.tracker.Now()
	for _, name := range pic.Meshes() {
		for _, res := range pic.Mesh(name).List(mesh.DataplaneInsights.Name) {
			insight := mesh.DataplaneInsights.From(res).Spec
			n := len(insight.Subscriptions)
			if _, here := r.sessions.Find(session.Key{Mesh: name, Name: res.Name}); here || n == 0 || !insight.Online() {
				continue
			}
			switch by := insight.Subscriptions[n-1].ControlPlaneInstanceID; {
			case by == r.instance:
			case r.shared:
				out = append(out, elsewhere(name, res.Name, by, insight.Trust))
			default: // after ReturnDelay its insight says that it is gone
				out = append(out, pki.Recipient{Mesh: name, Name: res.Name, Why: "it was connected before the control plane was started, and has not come back yet"})
			}
		}
	}
	return out
}

// elsewhere is a proxy that is connected to another control plane, as its insight
// shows it.
func elsewhere(meshName, name, by string, t *mesh.TrustInsight) pki.Recipient {
	p := pki.Recipient{Mesh: meshName, Name: name}
	if t == nil {
		p.Why = "it is connected to the control plane " + by + " (or was, before that one ended) and has acknowledged nothing there; without a link it can't"
		return p
	}
	p.Link, p.Why = true, t.Error
	if revision, err := strconv.ParseInt(t.Revision, 10, 64); err == nil && t.Error == "" {
		p.Revision = revision
	}
	return p
}

// newRotator makes what rotates the control plane's own authority. Where proxies
// verify the control plane by another one, none of them is concerned.
func (c *ControlPlane) newRotator(shown certificate, instance string, log *slog.Logger) *pki.Rotator {
	cfg := pki.RotatorConfig{Certs: c.certs, Log: log}
	if c.trust(shown) != nil {
		cfg.Recipients = recipients{c.sessions, c.tracker, instance, c.cfg.General.TLSCAStore == caInStore}.list
		if !c.certs.Made() { // else nobody was ever connected
			c.settling.delay = cmp.Or(c.cfg.XDSServer.ReturnDelay, time.Minute) // as sessions and insights
		}
		cfg.Settled = c.settling.at
	}
	return pki.NewRotator(cfg)
}

// settling is when all proxies are known that were connected before a start: a
// while after what is stored was read.
type settling struct {
	delay time.Duration
	since atomic.Pointer[time.Time] // nil until it was read
}

func (s *settling) at() time.Time {
	if since := s.since.Load(); since != nil {
		return since.Add(s.delay)
	}
	return time.Now().Add(s.delay)
}

// runRotator runs the rotator, once what is stored was read.
func (c *ControlPlane) runRotator(ctx context.Context) error {
	select {
	case <-c.tracker.Ready():
	case <-ctx.Done():
		return nil
	}
	now := time.Now()
	c.settling.since.Store(&now)
	return c.rotator.Run(ctx)
}

// rotation answers the API about the control plane's own authority.
type rotation struct {
	rotator *pki.Rotator
	dir     string
}

// RotationStatus says where the rotation is.
func (r rotation) RotationStatus(context.Context) (rest.Rotation, error) {
	s, err := r.rotator.Status()
	if err != nil {
		return rest.Rotation{}, err
	}
	out := rest.Rotation{
		Step: string(s.Step), Since: s.Since.UTC(), Next: string(s.Next), Automatic: s.Automatic, Note: s.Note, File: filepath.Join(r.dir, pki.CAFile),
		Revision: strconv.FormatInt(s.Revision, 10), Acknowledged: rotationProxies(s.Acknowledged), Pending: rotationProxies(s.Pending),
	}
	if !s.RetireAfter.IsZero() {
		at := s.RetireAfter.UTC()
		out.RetireAfter = &at
	}
	if !s.Held.IsZero() {
		at := s.Held.UTC()
		out.Held = &at
	}
	if !s.Settles.IsZero() {
		at := s.Settles.UTC()
		out.Settles = &at
	}
	for _, a := range s.Anchors {
		out.Anchors = append(out.Anchors, rest.RotationAnchor{Role: a.Role, Subject: a.Subject, Serial: a.Serial, NotBefore: a.NotBefore.UTC(), NotAfter: a.NotAfter.UTC()})
	}
	return out, nil
}

func rotationProxies(list []pki.Recipient) []rest.RotationProxy {
	out := make([]rest.RotationProxy, 0, len(list))
	for _, p := range list {
		out = append(out, rest.RotationProxy{Mesh: p.Mesh, Name: p.Name, Link: p.Link, Reason: p.Why})
	}
	return out
}

// Rotate takes a step.
func (r rotation) Rotate(ctx context.Context, step string, force bool) (rest.Rotation, error) {
	cutOff, err := r.rotator.Do(pki.Order(step), force)
	if err != nil {
		if _, is := errors.AsType[syscall.Errno](err); is { // a disk that is full or read-only: the caller, an administrator, can mend it
			err = errs.New(errs.Unavailable, "%w; mend that, see kumactl ca rotate control-plane --status, and ask again", err)
		}
		return rest.Rotation{}, err
	}
	out, err := r.RotationStatus(ctx)
	if len(cutOff) > 0 {
		out.CutOff = rotationProxies(cutOff)
	}
	return out, err
}

// Package meshtimeout is the policy MeshTimeout: how long a proxy waits.
package meshtimeout

import (
	"fmt"

	"kuma/internal/errs"
	"kuma/internal/policy"
	"kuma/internal/resource"
)

// Conf limits how long a proxy waits. What is left out keeps its default.
type Conf struct {
	// ConnectionTimeout bounds the making of a connection; above 0. The default
	// is 5s towards destinations and 10s towards the workload.
	ConnectionTimeout *resource.Duration `json:"connectionTimeout,omitempty"`
	// IdleTimeout closes a connection on which nothing happens; 0s: never. The
	// default is 1h towards destinations and 2h for inbounds.
	IdleTimeout *resource.Duration `json:"idleTimeout,omitempty"`
	// HTTP is about requests.
	HTTP *HTTP `json:"http,omitempty"`
}

// HTTP limits how long requests and the connections that carry them may last.
type HTTP struct {
	// RequestTimeout bounds a request with its answer; 0s: not at all. The
	// default is 15s towards destinations and 0s for inbounds.
	RequestTimeout *resource.Duration `json:"requestTimeout,omitempty"`
	// StreamIdleTimeout ends a request on which nothing happens; 0s: never. The
	// default is 30m towards destinations and 1h for inbounds.
	StreamIdleTimeout *resource.Duration `json:"streamIdleTimeout,omitempty"`
	// MaxStreamDuration bounds a request's stream; the default 0s: not at all.
	MaxStreamDuration *resource.Duration `json:"maxStreamDuration,omitempty"`
	// MaxConnectionDuration bounds a connection; the default 0s: not at all.
	MaxConnectionDuration *resource.Duration `json:"maxConnectionDuration,omitempty"`
	// RequestHeadersTimeout bounds the arrival of a request's headers; the
	// default 0s: not at all.
	RequestHeadersTimeout *resource.Duration `json:"requestHeadersTimeout,omitempty"`
}

// Policy is the kind MeshTimeout.
var Policy = policy.New(resource.Kind{
	Name: "MeshTimeout", Plural: "meshtimeouts", Short: "mt", Federated: true,
	Policy: &resource.PolicyTraits{To: true, From: true, Rules: true, FromAsRules: true},
}, check, apply)

func check(s *policy.Spec[Conf]) []errs.Field {
	bad := policy.CheckRefs(s, policy.Allowed{
		Top:     []string{policy.KindMesh, policy.KindDataplane, policy.KindMeshSubset, policy.KindMeshService, policy.KindMeshServiceSubset},
		To:      []string{policy.KindMesh, policy.KindMeshService},
		From:    []string{policy.KindMesh},
		Section: len(s.To) == 0,
	})
	if len(s.To) == 0 && len(s.From) == 0 && len(s.Rules) == 0 {
		bad = append(bad, errs.Field{Path: "spec", Message: "at least one of 'to', 'from' or 'rules' has to be defined"})
	}
	for i := range s.To {
		bad = append(bad, checkConf(fmt.Sprintf("spec.to[%d].default", i), &s.To[i].Default)...)
	}
	for i := range s.From {
		bad = append(bad, checkConf(fmt.Sprintf("spec.from[%d].default", i), &s.From[i].Default)...)
	}
	for i := range s.Rules {
		r := &s.Rules[i]
		at := fmt.Sprintf("spec.rules[%d]", i)
		bad = append(bad, checkConf(at+".default", &r.Default)...)
		if len(r.Matches) == 0 {
			continue
		}
		for j, m := range r.Matches {
			if m.SNI != nil {
				bad = append(bad, errs.Field{Path: fmt.Sprintf("%s.matches[%d].sni", at, j), Message: "is not supported by MeshTimeout, match by spiffeID"})
			}
		}
		for _, f := range r.Default.fields() {
			if f.value != nil && !f.perCaller {
				bad = append(bad, errs.Field{Path: at + ".default." + f.path, Message: "must not be set in a rule with matches; 'http.requestTimeout' and 'http.streamIdleTimeout' may be"})
			}
		}
	}
	return bad
}

type field struct {
	path  string
	value *resource.Duration
	// positive fields must be above 0.
	positive bool
	// perCaller fields may differ from caller to caller.
	perCaller bool
}

func (c *Conf) fields() []field {
	out := []field{
		{path: "connectionTimeout", value: c.ConnectionTimeout, positive: true},
		{path: "idleTimeout", value: c.IdleTimeout},
	}
	if h := c.HTTP; h != nil {
		out = append(out,
			field{path: "http.requestTimeout", value: h.RequestTimeout, perCaller: true},
			field{path: "http.streamIdleTimeout", value: h.StreamIdleTimeout, perCaller: true},
			field{path: "http.maxStreamDuration", value: h.MaxStreamDuration},
			field{path: "http.maxConnectionDuration", value: h.MaxConnectionDuration},
			field{path: "http.requestHeadersTimeout", value: h.RequestHeadersTimeout},
		)
	}
	return out
}

func checkConf(at string, c *Conf) (bad []errs.Field) {
	set := false
	for _, f := range c.fields() {
		if f.value == nil {
			continue
		}
		set = true
		switch {
		case f.positive && f.value.Duration <= 0:
			bad = append(bad, errs.Field{Path: at + "." + f.path, Message: "must be greater than 0"})
		case f.value.Duration < 0:
			bad = append(bad, errs.Field{Path: at + "." + f.path, Message: "must not be negative"})
		}
	}
	if !set {
		bad = append(bad, errs.Field{Path: at, Message: "at least one timeout has to be defined"})
	}
	return bad
}

package ctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// A problem is an answer of the control plane that is not a success.
type problem struct {
	Status  int
	Title   string         `json:"title"`
	Detail  string         `json:"detail"`
	Invalid []invalidParam `json:"invalid_parameters"`
	// text is an answer that is no standard error, such as the router's.
	text string
	// where is the control plane's address, for the mend.
	where string
}

type invalidParam struct {
	Field  string `json:"field"`
	Reason string `json:"reason"`
}

// readProblem reads an answer with an error status, whatever its form.
func readProblem(status int, body []byte, where string) *problem {
	p := &problem{where: where}
	if err := json.Unmarshal(body, p); err != nil || p.Title == "" {
		p = &problem{where: where, text: strings.TrimSpace(firstLine(string(body)))}
	}
	p.Status = status
	return p
}

// Error returns "title (detail);field=reason": the first parameter stands on
// the same line, each further one on its own.
func (p *problem) Error() string {
	if p.Title == "" {
		text := p.text
		if text == "" {
			text = fmt.Sprintf("%d %s", p.Status, http.StatusText(p.Status))
		}
		return fmt.Sprintf("the control plane at %s answered: %s%s", p.where, text, p.mend())
	}
	var b strings.Builder
	b.WriteString(p.Title)
	if p.Detail != "" {
		b.WriteString(" (" + strings.TrimSpace(p.Detail) + ")")
	}
	for i, f := range p.Invalid {
		if i > 0 {
			b.WriteString("\n  ")
		}
		b.WriteString(";" + f.Field + "=" + f.Reason)
	}
	return b.String() + p.mend()
}

// anonymous is the group of callers without credential.
const anonymous = "mesh-system:unauthenticated"

// mend says what the user can do about it, where that is known.
func (p *problem) mend() string {
	switch {
	case p.Status == http.StatusUnauthorized, p.Status == http.StatusForbidden && strings.Contains(p.Detail, anonymous):
		return "\n  log in with: kumactl config control-planes add --name NAME --address " + p.where + " --auth-type tokens --auth-conf token=TOKEN --overwrite"
	case p.Status == http.StatusUnsupportedMediaType:
		return "\n  is a proxy between here and the control plane changing requests?"
	}
	return ""
}

// routed reports whether the control plane itself answered, rather than its
// router saying that there is no such path.
func (p *problem) routed() bool { return p.Title != "" }

// lacksMesh reports whether the answer is that there is no mesh of the name in
// the path; the title is the contract's.
func lacksMesh(err error) bool {
	p := notFound(err)
	return p != nil && p.Title == "Failed to retrieve Mesh"
}

// notFound returns the problem if the error is an answer with status 404.
func notFound(err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok && p.Status == http.StatusNotFound {
		return p
	}
	return nil
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(strings.TrimSpace(s), "\n")
	if len(s) > 300 {
		s = s[:300] + "…"
	}
	return s
}

// isProblem reports whether the control plane answered, though with an error.
func isProblem(err error) bool {
	_, ok := errors.AsType[*problem](err)
	return ok
}

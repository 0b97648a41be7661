package ctl

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
)

// rotating is a control plane that rotates its authority, as its API shows it.
type rotating struct {
	mu      sync.Mutex
	step    string
	retire  string
	pending int // how often its proxy is still shown as pending
	settles int // how often it is still shown as just started
	orders  []string
}

func (c *rotating) answer() string {
	next := map[string]string{"steady": "prepare", "prepared": "distribute", "distributed": "switch", "switched": "retire"}[c.step]
	ack, pending := `[{"mesh":"default","name":"web","link":true}]`, `[]`
	if c.pending > 0 {
		c.pending--
		ack, pending = `[]`, `[{"mesh":"default","name":"web","link":true,"reason":"it sleeps"}]`
	}
	retire := ""
	if c.settles > 0 {
		c.settles--
		retire = `"settles":"2090-01-01T00:00:00Z",`
	}
	if c.step == "prepared" {
		retire = `"note":"give it to all",`
	}
	if len(c.orders) > 0 && c.orders[len(c.orders)-1] == "abort" {
		retire = `"held":"2035-06-01T00:00:00Z",`
	}
	if len(c.orders) > 0 && c.orders[len(c.orders)-1] == "retire!" {
		var all []string
		for i := range 23 {
			all = append(all, fmt.Sprintf(`{"mesh":"m","name":"p%d","reason":"it sleeps"}`, i))
		}
		retire = `"cutOff":[` + strings.Join(all, ",") + `],`
	}
	if c.step == "switched" {
		retire += `"retireAfter":"` + c.retire + `",`
	}
	return fmt.Sprintf(`{"step":%q,"next":%q,%s"file":"/w/kuma-cp.crt","since":"2026-01-01T00:00:00Z","anchors":[{"role":"present","subject":"CN=one","serial":"1","notAfter":"2036-01-01T00:00:00Z"}],"acknowledged":%s,"pending":%s}`, c.step, next, retire, ack, pending)
}

func (c *rotating) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch r.Method + " " + r.URL.Path {
	case "GET /":
		fmt.Fprint(w, theIndex())
	case "GET /ca/control-plane":
		fmt.Fprint(w, c.answer())
	case "POST /ca/control-plane/rotation":
		var q struct {
			Step  string
			Force bool
		}
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			w.WriteHeader(400)
			return
		}
		order := q.Step
		if q.Force {
			order += "!"
		}
		c.orders = append(c.orders, order)
		to := map[string]string{"steady prepare": "prepared", "prepared distribute": "distributed", "distributed switch": "switched", "switched retire": "steady", "prepared abort": "steady"}[c.step+" "+q.Step]
		if to == "" {
			w.WriteHeader(409)
			fmt.Fprintf(w, `{"title":"Conflict","detail":"it is not the turn of %s"}`, q.Step)
			return
		}
		c.step = to
		fmt.Fprint(w, c.answer())
	default:
		http.NotFound(w, r)
	}
}

func TestRotateControlPlane(t *testing.T) {
	t.Parallel()
	const past, future = "2020-01-01T00:00:00Z", "2090-01-01T00:00:00Z"
	for _, c := range []struct {
		name, step, retire string
		pending            int
		args               []string
		code               int
		orders             []string
		want               []string
	}{
		{"from the start", "steady", future, 0, nil, 0, []string{"prepare", "distribute", "switch"}, []string{"prepared:", "/w/kuma-cp.crt holds both", "distributed: both authorities are being sent to 1 proxy\n", "acknowledged by all that have a link: 1 proxy\n", "switched:", "retired by itself after 2090-01-01"}},
		{"goes on", "distributed", future, 0, nil, 0, []string{"switch"}, []string{"the rotation is distributed", "switched:"}},
		{"waits", "distributed", future, 2, nil, 0, []string{"switch"}, []string{"waiting for 1 proxy to acknowledge: web in mesh default (it sleeps)", "acknowledged by all"}},
		{"waits no longer", "distributed", future, 1000, []string{"--timeout", "0s"}, 1, nil, []string{"not acknowledged within 0s by 1 proxy: web in mesh default (it sleeps)", "run the same command again", "--abort"}},
		{"does not wait", "distributed", future, 1000, []string{"--force"}, 0, []string{"switch!"}, []string{"switched:", "not yet acknowledged by web"}},
		{"too early to retire", "switched", future, 0, nil, 0, nil, []string{"retired by itself after 2090-01-01", "--step retire"}},
		{"time to retire", "switched", past, 0, nil, 0, []string{"retire"}, []string{"retired:", "/w/kuma-cp.crt holds it"}},
		{"one step", "steady", future, 0, []string{"--step", "prepare"}, 0, []string{"prepare"}, []string{"prepared:", "clients\ngive it to all\n"}},
		{"one step by force", "switched", future, 0, []string{"--step", "retire", "--force"}, 0, []string{"retire!"}, []string{"retired:", "holds it: give it to clients\ncut off: 23 proxies can't connect anew until given the new kuma-cp.crt: p0 in mesh m (it sleeps); p1 in", "p19 in mesh m (it sleeps); and 3 more\n"}},
		{"not its turn", "steady", future, 0, []string{"--step", "retire"}, 1, []string{"retire"}, []string{"it is not the turn of retire"}},
		{"abort", "prepared", future, 0, []string{"--abort"}, 0, []string{"abort"}, []string{"aborted:", "CN=one", "ends at 2036-01-01", "begins by itself after 2035-06-01"}},
		{"status", "distributed", future, 1, []string{"--status"}, 0, nil, []string{"distributed, since 2026-01-01", "next: switch", "CN=one", "2036-01-01", "it sleeps"}},
		{"status, steady", "steady", future, 0, []string{"--status"}, 0, nil, []string{"steady: nothing is being rotated; next: prepare\n", "yes"}},
		{"status as JSON", "steady", future, 0, []string{"--status", "-o", "json"}, 0, nil, []string{`"file": "/w/kuma-cp.crt"`}},
		{"unknown step", "steady", future, 0, []string{"--step", "swich"}, 1, nil, []string{`--step "swich" is not a step of the rotation; did you mean "switch"?`}},
		{"a word that is no step", "steady", future, 0, []string{"--step", "bogus"}, 1, nil, []string{"--step \"bogus\" is not a step of the rotation; known: prepare, distribute, switch, retire, next\n"}},
		{"two things at once", "steady", future, 0, []string{"--abort", "--step", "prepare"}, 1, nil, []string{"none of the others can be"}},
		{"output of nothing", "steady", future, 0, []string{"-o", "yaml"}, 1, nil, []string{"--output needs --status"}},
		{"waits after a start", "distributed", future, 0, nil, 0, []string{"switch"}, []string{"proxies have until 2090-01-01T00:00:00Z to come back", "acknowledged by all", "switched:"}},
		{"waits no longer after a start", "distributed", future, 0, []string{"--timeout", "0s"}, 1, nil, []string{"waits until 2090-01-01T00:00:00Z", "--force"}},
		{"status after a start", "switched", future, 0, []string{"--status"}, 0, nil, []string{"started a moment ago", "neither switch nor retire"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cp := &rotating{step: c.step, retire: c.retire, pending: c.pending}
			if strings.HasSuffix(c.name, "after a start") {
				cp.settles = 2
			}
			s := httptest.NewServer(cp)
			defer s.Close()
			r := newMachine(t).using(s.URL).run(append([]string{"ca", "rotate", "control-plane"}, c.args...)...)
			if r.code != c.code || !slices.Equal(cp.orders, c.orders) {
				t.Errorf("exit code %d, orders %v; want %d, %v", r.code, cp.orders, c.code, c.orders)
			}
			for _, want := range c.want {
				if !strings.Contains(r.stdout+r.stderr, want) {
					t.Errorf("%q is not in %q and %q", want, r.stdout, r.stderr)
				}
			}
		})
	}
}

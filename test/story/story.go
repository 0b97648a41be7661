// Package story is the product's main job, told step by step with real
// programs: two services talk over mutual TLS, an intruder is refused, a
// permission changes, and the control plane dies and comes back.
package story

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"kuma/test/lab"
)

// Teller shows a story as it happens.
type Teller interface {
	// Step begins a step: what is done, and what is expected of it.
	Step(title, expected string)
	// Command shows a command that a person would type.
	Command(line string)
	// Seen ends the step: what was seen, and whether that was expected.
	Seen(seen string, ok bool)
}

// Story is one run.
type Story struct {
	lab  *lab.Lab
	tell Teller
	// self is a program whose subcommand "service" runs Service.
	self []string

	cp      *lab.ControlPlane
	proxies map[string]*lab.Proxy
	// local are the ports of the services themselves, in are their inbounds.
	local, in map[string]int
}

// New prepares a story. self is the command line that runs Service.
func New(l *lab.Lab, t Teller, self []string) *Story {
	return &Story{lab: l, tell: t, self: self, proxies: map[string]*lab.Proxy{}, local: map[string]int{}, in: map[string]int{}}
}

// ControlPlane is the story's control plane once it has been started.
func (s *Story) ControlPlane() *lab.ControlPlane { return s.cp }

// Proxy is a proxy of the story.
func (s *Story) Proxy(name string) *lab.Proxy { return s.proxies[name] }

// InboundPort is where other proxies reach a service.
func (s *Story) InboundPort(name string) int { return s.in[name] }

// LocalPort is where a service listens, beside its proxy.
func (s *Story) LocalPort(name string) int { return s.local[name] }

// patience is how long a step may take that takes a second at most on a machine
// with nothing else to do.
const patience = time.Minute

// ErrUntrue says that a step was not as it should be.
var ErrUntrue = errors.New("a step was not as expected")

// Run tells the whole story. It stops at the first step that is not true.
func (s *Story) Run(ctx context.Context) error {
	for _, chapter := range []func(context.Context) error{
		s.start, s.encrypt, s.join, s.closed, s.permit, s.wire, s.intrude, s.change, s.crash, s.comeBack,
	} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	return nil
}

// step tells one step. look returns what was seen and whether it is right.
func (s *Story) step(title, expected string, look func() (string, bool, error)) error {
	s.tell.Step(title, expected)
	seen, ok, err := look()
	if err != nil {
		s.tell.Seen(err.Error(), false)
		return fmt.Errorf("%s: %w", title, err)
	}
	s.tell.Seen(seen, ok)
	if !ok {
		return fmt.Errorf("%s: expected %s; seen %s: %w", title, expected, seen, ErrUntrue)
	}
	return nil
}

func (s *Story) start(ctx context.Context) error {
	return s.step("Start a control plane on the embedded store", "ready; its certificate verifies against its own CA file", func() (string, bool, error) {
		began := time.Now()
		s.tell.Command("kuma-cp run")
		var err error
		if s.cp, err = s.lab.ControlPlane(ctx); err != nil {
			return "", false, err
		}
		took := time.Since(began)
		client, err := s.cp.Verified()
		if err != nil {
			return "", false, err
		}
		res, err := client.Get(s.cp.URLS() + "/")
		if err != nil {
			return "", false, err
		}
		defer res.Body.Close()
		return fmt.Sprintf("ready after %s; GET %s/ with kuma-cp.crt: %d, %s", ms(took), s.cp.URLS(), res.StatusCode, tlsName(res.TLS.Version)), res.StatusCode == http.StatusOK, nil
	})
}

func (s *Story) encrypt(context.Context) error {
	return s.step("Turn mutual TLS on for the mesh", "the mesh says mTLS builtin/ca-1", func() (string, bool, error) {
		s.tell.Command("kumactl apply -f mesh.yaml")
		if err := s.cp.Apply(meshYAML); err != nil {
			return "", false, err
		}
		out, err := s.cp.Kumactl("", "get", "meshes")
		if err != nil {
			return "", false, err
		}
		lines := strings.Split(strings.TrimSpace(out), "\n")
		return squeeze(lines[len(lines)-1]), strings.Contains(out, "builtin/ca-1"), nil
	})
}

const meshYAML = `type: Mesh
name: default
mtls:
  enabledBackend: ca-1
  backends:
  - name: ca-1
    type: builtin
`

// join starts three services, each with its proxy.
func (s *Story) join(ctx context.Context) error {
	return s.step("Start web, backend and intruder, each with kuma-dp and a real Envoy", "three proxies ready, each with a token for itself alone", func() (string, bool, error) {
		ports, err := s.lab.Ports(8)
		if err != nil {
			return "", false, err
		}
		began := time.Now()
		for i, name := range []string{"backend", "web", "intruder"} {
			s.local[name], s.in[name] = ports[2*i], ports[2*i+1]
		}
		out := map[string]int{"web": ports[6], "intruder": ports[7]}
		for _, name := range []string{"backend", "web", "intruder"} {
			args := append(slices.Clone(s.self[1:]), "service", "-name", name, "-listen", fmt.Sprintf("127.0.0.1:%d", s.local[name]))
			if p := out[name]; p != 0 {
				args = append(args, "-calls", fmt.Sprintf("http://127.0.0.1:%d/", p))
			}
			if _, err := s.lab.Start("service-"+name, nil, s.self[0], args...); err != nil {
				return "", false, err
			}
			if s.proxies[name], err = s.cp.Proxy(name, lab.ProxyOptions{Dataplane: dataplane(name, s.in[name], s.local[name], out[name]), Services: []string{name}}); err != nil {
				return "", false, err
			}
		}
		s.tell.Command("kuma-dp run --dataplane-file backend.yaml --dataplane-token-file backend.token --ca-cert-file kuma-cp.crt …")
		for _, p := range s.proxies {
			if err := s.lab.Ready(ctx, p); err != nil {
				return "", false, err
			}
		}
		return "all three ready after " + ms(time.Since(began)), true, nil
	})
}

// dataplane describes a proxy: an inbound for its service and, for those that
// call backend, an outbound.
func dataplane(name string, inbound, service, outbound int) string {
	y := fmt.Sprintf(`type: Dataplane
mesh: default
name: %s
labels:
  app: %s
networking:
  address: 127.0.0.1
  inbound:
  - port: %d
    servicePort: %d
    serviceAddress: 127.0.0.1
    tags:
      kuma.io/service: %s
      kuma.io/protocol: http
`, name, name, inbound, service, name)
	if outbound != 0 {
		y += fmt.Sprintf("  outbound:\n  - port: %d\n    tags:\n      kuma.io/service: backend\n", outbound)
	}
	return y
}

// call has a service call backend through its proxy.
func (s *Story) call(from string) (Asked, error) {
	var a Asked
	err := lab.GetJSON(fmt.Sprintf("http://127.0.0.1:%d/ask", s.local[from]), &a)
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	return a, err
}

// until repeats a call until it has the status, and tells how long that took.
func (s *Story) until(ctx context.Context, from string, status int) (Asked, time.Duration, error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var a Asked
	err := s.lab.Await(ctx, s.proxies[from].Process, fmt.Sprintf("%s → backend answers %d", from, status), func() error {
		var err error
		if a, err = s.call(from); err != nil {
			return err
		}
		if a.Status != status {
			return fmt.Errorf("%d %s", a.Status, a.Body)
		}
		return nil
	})
	return a, time.Since(began), err
}

func (s *Story) closed(ctx context.Context) error {
	return s.step("web → backend, before anyone was permitted", "403: closed by default", func() (string, bool, error) {
		a, _, err := s.until(ctx, "web", http.StatusForbidden)
		if err != nil {
			return "", false, err
		}
		return fmt.Sprintf("%d, %q", a.Status, a.Body), a.Body == "RBAC: access denied", nil
	})
}

// permission lets callers reach backend.
func permission(callers ...string) string {
	y := `type: MeshTrafficPermission
mesh: default
name: backend
spec:
  targetRef:
    kind: Dataplane
    labels:
      app: backend
  rules:
  - default:
      allow:
`
	for _, c := range callers {
		y += "      - spiffeID: {type: Exact, value: spiffe://default/" + c + "}\n"
	}
	return y
}

func (s *Story) permit(ctx context.Context) error {
	return s.step("Permit web, and only web, to call backend", "200 from backend; both SPIFFE identities in x-forwarded-client-cert", func() (string, bool, error) {
		s.tell.Command("kumactl apply -f permission.yaml")
		if err := s.cp.Apply(permission("web")); err != nil {
			return "", false, err
		}
		a, took, err := s.until(ctx, "web", http.StatusOK)
		if err != nil {
			return "", false, err
		}
		by, uri := element(a.Answer.Caller, "By"), element(a.Answer.Caller, "URI")
		return fmt.Sprintf("%d, %s after kumactl had returned; URI=%s By=%s", a.Status, ms(took), uri, by),
			uri == "spiffe://default/web" && by == "spiffe://default/backend", nil
	})
}

// element is the first value of a key in an x-forwarded-client-cert header.
func element(header, key string) string {
	for part := range strings.SplitSeq(header, ";") {
		if v, ok := strings.CutPrefix(part, key+"="); ok {
			return v
		}
	}
	return ""
}

var counter = regexp.MustCompile(`(?m)^listener\.(\S+)\.ssl\.(versions|curves)\.(\S+): ([0-9]+)$`)

func (s *Story) wire(context.Context) error {
	return s.step("What is on the wire, by backend's own counters", "TLS 1.3, post-quantum key exchange X25519MLKEM768, nothing else", func() (string, bool, error) {
		s.tell.Command("kumactl inspect dataplane backend --type stats")
		out, err := s.cp.Kumactl("", "inspect", "dataplane", "backend", "--type", "stats")
		if err != nil {
			return "", false, err
		}
		var seen []string
		for _, m := range counter.FindAllStringSubmatch(out, -1) {
			if strings.Contains(m[1], fmt.Sprint(s.in["backend"])) && m[4] != "0" {
				seen = append(seen, m[3]+": "+m[4])
			}
		}
		names := strings.Join(seen, ", ")
		return names, len(seen) == 2 && strings.Contains(names, "TLSv1.3: ") && strings.Contains(names, "X25519MLKEM768: "), nil
	})
}

func (s *Story) intrude(ctx context.Context) error {
	return s.step("intruder → backend", "403 for intruder; backend's log says who and why", func() (string, bool, error) {
		a, _, err := s.until(ctx, "intruder", http.StatusForbidden)
		if err != nil {
			return "", false, err
		}
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		var line string
		backend := s.proxies["backend"]
		err = s.lab.Await(ctx, backend.Process, "backend's kuma-dp logs the refusal", func() error {
			for l := range strings.Lines(backend.Log()) {
				if strings.Contains(l, "request denied") && strings.Contains(l, "spiffe://default/intruder") {
					line = strings.TrimSpace(l)
					return nil
				}
			}
			return errors.New("no such line")
		})
		if err != nil {
			return "", false, err
		}
		return fmt.Sprintf("%d; kuma-dp-backend.log: %s", a.Status, line), strings.Contains(line, "rbac_access_denied"), nil
	})
}

func (s *Story) change(ctx context.Context) error {
	err := s.step("Take web's permission away", "403 from the next request on, over connections that stay open", func() (string, bool, error) {
		s.tell.Command("kumactl delete meshtrafficpermission backend")
		if _, err := s.cp.Kumactl("", "delete", "meshtrafficpermission", "backend"); err != nil {
			return "", false, err
		}
		a, took, err := s.until(ctx, "web", http.StatusForbidden)
		if err != nil {
			return "", false, err
		}
		return fmt.Sprintf("%d, %s after kumactl had returned", a.Status, ms(took)), true, nil
	})
	if err != nil {
		return err
	}
	return s.step("Give it back", "200 again", func() (string, bool, error) {
		s.tell.Command("kumactl apply -f permission.yaml")
		if err := s.cp.Apply(permission("web")); err != nil {
			return "", false, err
		}
		a, took, err := s.until(ctx, "web", http.StatusOK)
		if err != nil {
			return "", false, err
		}
		return fmt.Sprintf("%d, %s after kumactl had returned", a.Status, ms(took)), true, nil
	})
}

func (s *Story) crash(context.Context) error {
	return s.step("Kill the control plane with SIGKILL", "web → backend goes on, intruder stays out", func() (string, bool, error) {
		s.tell.Command("kill -9 " + fmt.Sprint(s.cp.Cmd.Process.Pid))
		if err := s.cp.Signal(syscall.SIGKILL); err != nil {
			return "", false, err
		}
		<-s.cp.Done()
		var good, refused int
		const tries = 20
		for range tries {
			if a, err := s.call("web"); err == nil && a.Status == http.StatusOK {
				good++
			}
			if a, err := s.call("intruder"); err == nil && a.Status == http.StatusForbidden {
				refused++
			}
		}
		return fmt.Sprintf("web: %d of %d answered; intruder: %d of %d refused", good, tries, refused, tries), good == tries && refused == tries, nil
	})
}

func (s *Story) comeBack(ctx context.Context) error {
	err := s.step("Start it again over the same directory", "all state is there, and the three proxies reconnect", func() (string, bool, error) {
		began := time.Now()
		s.tell.Command("kuma-cp run")
		if err := s.cp.Start(ctx); err != nil {
			return "", false, err
		}
		ready := time.Since(began)
		if _, err := s.cp.Kumactl("", "get", "meshtrafficpermission", "backend"); err != nil {
			return "", false, err
		}
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		err := s.lab.Await(ctx, s.cp.Process, "three proxies are connected to the new control plane", s.connected)
		if err != nil {
			return "", false, err
		}
		return fmt.Sprintf("ready after %s with the permission of before; three proxies connected after %s", ms(ready), ms(time.Since(began))), true, nil
	})
	if err != nil {
		return err
	}
	return s.step("Change something once more: permit intruder too", "200 for intruder: the new control plane steers the old proxies", func() (string, bool, error) {
		if err := s.cp.Apply(permission("web", "intruder")); err != nil {
			return "", false, err
		}
		a, took, err := s.until(ctx, "intruder", http.StatusOK)
		if err != nil {
			return "", false, err
		}
		return fmt.Sprintf("%d, %s after kumactl had returned", a.Status, ms(took)), true, nil
	})
}

// connected is nil when all three proxies have streams to the control plane as
// it runs now; those to its last life don't count.
func (s *Story) connected() error {
	var index struct {
		InstanceID string `json:"instanceId"`
	}
	if err := lab.GetJSON(s.cp.URL()+"/", &index); err != nil {
		return err
	}
	var overview struct {
		Items []struct {
			Name    string `json:"name"`
			Insight struct {
				Subscriptions []struct {
					Instance   string     `json:"controlPlaneInstanceId"`
					Disconnect *time.Time `json:"disconnectTime"`
				} `json:"subscriptions"`
			} `json:"dataplaneInsight"`
		} `json:"items"`
	}
	if err := lab.GetJSON(s.cp.URL()+"/meshes/default/dataplanes/_overview", &overview); err != nil {
		return err
	}
	n := 0
	for _, i := range overview.Items {
		for _, sub := range i.Insight.Subscriptions {
			if sub.Instance == index.InstanceID && sub.Disconnect == nil {
				n++
			}
		}
	}
	if n != 3 {
		return fmt.Errorf("%d of 3 are", n)
	}
	return nil
}

// Next is what to try on a mesh that is left running.
func (s *Story) Next() []string {
	kumactl := fmt.Sprintf("%s --config-file %s", filepath.Join(s.lab.Bin, "kumactl"), filepath.Join(s.lab.Dir, "kumactl-config"))
	return []string{
		kumactl + " inspect dataplanes",
		kumactl + " get meshtrafficpermission backend -o yaml",
		kumactl + " inspect dataplane backend --type config-dump",
		kumactl + " delete meshtrafficpermission backend",
		fmt.Sprintf("curl http://127.0.0.1:%d/ask    # web asks backend", s.local["web"]),
		fmt.Sprintf("curl http://127.0.0.1:%d/ask    # intruder asks backend", s.local["intruder"]),
		fmt.Sprintf("curl --cacert %s %s/", s.cp.CA, s.cp.URLS()),
		fmt.Sprintf("openssl s_client -connect 127.0.0.1:%d </dev/null    # backend's inbound asks for a certificate", s.in["backend"]),
		"tail -f " + filepath.Join(s.lab.Dir, "*.log"),
	}
}

func ms(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }

func squeeze(s string) string { return strings.Join(strings.Fields(s), " ") }

func tlsName(v uint16) string {
	switch v {
	case 0x0304:
		return "TLS 1.3"
	case 0x0303:
		return "TLS 1.2"
	}
	return fmt.Sprintf("TLS version %#x", v)
}

//go:build e2e

package e2e

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kuma/test/lab"
)

// TestTimeout: MeshTimeout bounds a request, and its removal lets it go on.
func TestTimeout(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	to := out{port: r.port(), service: "backend"}
	r.ready(
		r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: r.site("backend").port}})),
		r.join(cp, "web", r.caller("web", to)),
	)
	r.answers(to.port, http.StatusOK)
	slow := func(status int) {
		t.Helper()
		r.await(fmt.Sprintf("a slow request is answered %d", status), func() error {
			a, err := r.get(to.port, "/?for=600ms")
			if err == nil && a.status != status {
				err = fmt.Errorf("%d %s", a.status, a.body)
			}
			return err
		})
	}
	slow(http.StatusOK)
	r.apply(cp, "type: MeshTimeout\nmesh: default\nname: short\nspec:\n  targetRef: {kind: Dataplane, labels: {app: web}}\n  to:\n  - targetRef: {kind: Mesh}\n    default: {http: {requestTimeout: 200ms}}\n")
	slow(http.StatusGatewayTimeout)
	_, err := cp.Kumactl("", "delete", "meshtimeout", "short")
	r.must(err)
	slow(http.StatusOK)
}

// TestMeshService reaches a generated MeshService by reference.
func TestMeshService(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, strings.Replace(mtls("STRICT"), "name: default\n", "name: default\nmeshServices: {mode: Everywhere}\n", 1))
	r.apply(cp, permitAll)
	site, inbound := r.site("backend"), r.port()
	byName := out{port: r.port(), to: fmt.Sprintf("backendRef: {kind: MeshService, name: backend, port: %d}", inbound)}
	r.ready(r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: inbound, local: site.port}})))
	r.await("the MeshService is made", func() error {
		_, err := cp.Kumactl("", "get", "meshservice", "backend", "-o", "yaml")
		return err
	})
	r.ready(r.join(cp, "web", r.caller("web", byName)))
	if a := r.answers(byName.port, http.StatusOK); a.told.Site != "backend" || !strings.Contains(a.told.Caller, "URI=spiffe://default/web") {
		t.Errorf("%+v", a.told)
	}
}

// TestHealth: an inbound with a serviceProbe leaves load balancing while its
// workload can't be reached, and comes back. One without has no health report.
func TestHealth(t *testing.T) {
	r := open(t)
	cp := r.controlPlane("KUMA_DP_SERVER_HDS_INTERVAL=500ms", "KUMA_DP_SERVER_HDS_CHECK_INTERVAL=200ms", "KUMA_DP_SERVER_HDS_CHECK_NO_TRAFFIC_INTERVAL=200ms")
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	to := out{port: r.port(), service: "backend"}
	probed := r.port() // where nobody listens yet
	plain := r.site("plain")
	one := r.join(cp, "one", dataplane("one", []in{{service: "backend", protocol: "http", port: r.port(), local: probed, more: "    serviceProbe: {tcp: {}}\n"}}))
	two := r.join(cp, "two", dataplane("two", []in{{service: "backend", protocol: "http", port: r.port(), local: plain.port}}))
	r.ready(one, two, r.join(cp, "web", r.caller("web", to)))
	r.answers(to.port, http.StatusOK)
	l := r.load(to.port)
	r.answeredBy(l, "plain")

	serve := func() *http.Server {
		h, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", probed))
		r.must(err)
		srv := &http.Server{Handler: &site{name: "probed"}, ReadHeaderTimeout: 5 * time.Second}
		go func() { _ = srv.Serve(h) }()
		t.Cleanup(func() { _ = srv.Close() })
		return srv
	}
	srv := serve()
	r.answeredBy(l, "probed")
	r.clean(l)

	r.must(srv.Close())
	r.await("the control plane knows that it is not ready", func() error {
		_, body, err := lab.Get(cp.URL() + "/meshes/default/dataplanes/one")
		if err != nil || !strings.Contains(body, `"NotReady"`) {
			return fmt.Errorf("%s %v", body, err)
		}
		return nil
	})
	r.await("it is not called any more", func() error {
		for range 8 {
			if a, err := r.get(to.port, "/"); err != nil || a.told.Site != "plain" {
				return fmt.Errorf("%d %s %v", a.status, a.body, err)
			}
		}
		return nil
	})
	l = r.load(to.port)
	serve()
	r.answeredBy(l, "plain", "probed")
	r.clean(l)

	if n := r.stat(cp, "one", `hds_delegate\.requests`); n == 0 {
		t.Error("the one with a probe gets no health check specifier")
	}
	for _, name := range []string{"two", "web"} {
		if n := r.stat(cp, name, `hds_delegate\.requests`); n != 0 {
			t.Errorf("%s has nothing to be checked, and got %d health check specifiers", name, n)
		}
		if n := r.stat(cp, name, `hds_delegate\.responses`); n > 1 {
			t.Errorf("%s has nothing to be checked, and reported its health %d times", name, n)
		}
	}
}

// TestContractsWay runs proxies without the link: they get their keys by ADS,
// and are asked over the admin listener on the network.
func TestContractsWay(t *testing.T) {
	r := open(t)
	cp := r.controlPlane("KUMA_XDS_DATAPLANE_DEREGISTRATION_DELAY=1s")
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permit("backend", "Exact, value: spiffe://default/web"))
	to := out{port: r.port(), service: "backend"}
	old := lab.ProxyOptions{Env: []string{"KUMA_DATAPLANE_RUNTIME_LINK_ENABLED=false"}}
	admin := func(yaml string) string {
		return strings.Replace(yaml, "networking:\n", fmt.Sprintf("networking:\n  admin: {port: %d}\n", r.port()), 1)
	}
	backend := r.join(cp, "backend", admin(dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: r.site("backend").port}})), old)
	web := r.join(cp, "web", admin(r.caller("web", to)), old)
	r.ready(backend, web)
	if a := r.answers(to.port, http.StatusOK); !strings.Contains(a.told.Caller, "By=spiffe://default/backend") || !strings.Contains(a.told.Caller, "URI=spiffe://default/web") {
		t.Errorf("the caller is %q", a.told.Caller)
	}
	r.apply(cp, permit("backend", "Exact, value: spiffe://default/nobody"))
	r.answers(to.port, http.StatusForbidden)

	config, err := cp.Kumactl("", "inspect", "dataplane", "backend", "--type", "config")
	r.must(err)
	if strings.Contains(config, "PRIVATE KEY") {
		t.Error("a private key is shown")
	}
	for _, want := range []string{"identity_cert:secret:default", "mesh_ca:secret:default"} {
		if !strings.Contains(config, want) {
			t.Errorf("%q is not in the configuration", want)
		}
	}
	if strings.Contains(config, "kuma:sds") {
		t.Error("the key is looked for in a socket that nobody serves")
	}
	backend.Stop(10 * time.Second)
	if code := backend.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	r.await("it is deregistered", func() error {
		code, _, err := lab.Get(cp.URL() + "/meshes/default/dataplanes/backend")
		if err == nil && code != http.StatusNotFound {
			err = fmt.Errorf("%d", code)
		}
		return err
	})
}

// TestRevokedToken: a token that is revoked lets nobody in any more. Who is in
// goes on with what it has, and says so.
func TestRevokedToken(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	to := out{port: r.port(), service: "backend"}
	backend := r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: r.site("backend").port}}))
	yaml := r.caller("web", to)
	web := r.join(cp, "web", yaml)
	r.ready(backend, web)
	r.answers(to.port, http.StatusOK)

	token, err := os.ReadFile(web.TokenFile)
	r.must(err)
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(string(token), ".")[1])
	r.must(err)
	var claims struct{ Jti string }
	r.must(json.Unmarshal(payload, &claims))
	r.apply(cp, "type: Secret\nmesh: default\nname: dataplane-token-revocations-default\ndata: "+base64.StdEncoding.EncodeToString([]byte(claims.Jti))+"\n")
	r.logged(web.Process, "trying again", "revoked")
	r.answers(to.port, http.StatusOK)
	if code, body, err := lab.Get(fmt.Sprintf("http://127.0.0.1:%d/ready", web.Readiness)); err != nil || code != http.StatusOK {
		t.Errorf("/ready: %d %q %v", code, body, err)
	}
	web.Stop(10 * time.Second)
	web = r.join(cp, "web", yaml, lab.ProxyOptions{Token: string(token), As: "again"})
	if code := web.ExitCode(); code != 1 || !strings.Contains(web.Log(), "revoked") {
		t.Errorf("exit code %d: %s", code, web.Log())
	}
}

// adminPaths are what Envoy's admin interface answers, some of it with harm.
var adminPaths = []string{
	"/config_dump", "/certs", "/clusters", "/listeners", "/server_info", "/stats", "/stats/prometheus", "/memory", "/init_dump", "/runtime",
	"/logging?level=trace", "/reset_counters", "/healthcheck/fail", "/drain_listeners?inboundonly", "/runtime_modify?a=b", "/cpuprofiler?enable=y", "/quitquitquit",
}

// askAdmin asks a port for all that Envoy's admin interface does, in both
// methods, and gives each answer to look at.
func (r *room) askAdmin(scheme string, port int, look func(what string, a answer, err error)) {
	r.Helper()
	c := client(false)
	c.Transport.(*http.Transport).TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	defer c.CloseIdleConnections()
	for _, path := range adminPaths {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			req, err := http.NewRequestWithContext(r.ctx, method, fmt.Sprintf("%s://127.0.0.1:%d%s", scheme, port, path), nil)
			r.must(err)
			var a answer
			res, err := c.Do(req)
			if err == nil {
				var b []byte
				b, err = io.ReadAll(res.Body)
				_ = res.Body.Close()
				a = answer{status: res.StatusCode, body: string(b), header: res.Header}
				_ = json.Unmarshal(b, &a.told)
			}
			look(fmt.Sprintf("%s %s of port %d", method, path, port), a, err)
		}
	}
}

// HRD-30: nothing but what the Dataplane says listens on the network; the admin
// interface is a socket in a directory that is its owner's, and from the
// application's side no port answers for it.
func TestNothingElseListens(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	inbound, outbound := r.port(), r.port()
	p := r.join(cp, "one", dataplane("one", []in{{service: "one", protocol: "http", port: inbound, local: r.site("one").port}}, out{port: outbound, service: "one"}),
		lab.ProxyOptions{Env: []string{"TMPDIR=" + r.temp()}})
	r.ready(p)
	r.answers(outbound, http.StatusOK)
	list := envoys(r.temp())
	if len(list) != 1 {
		t.Fatalf("Envoys: %v", list)
	}
	for _, c := range []struct {
		who  string
		pid  int
		want []int
	}{{"Envoy", list[0], []int{inbound, outbound}}, {"kuma-dp", p.Cmd.Process.Pid, []int{p.Readiness}}} {
		want := map[string]bool{}
		for _, port := range c.want {
			want[fmt.Sprintf("0100007F:%04X", port)] = true
		}
		got := map[string]bool{}
		for _, s := range r.listening(c.pid) {
			got[s] = true
			if !want[s] {
				t.Errorf("%s listens on %s", c.who, s)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%s listens on %v, not on %v", c.who, got, want)
		}
	}
	sockets, _ := filepath.Glob(filepath.Join(r.temp(), "kuma-dp-*", "*"))
	for _, s := range sockets {
		i, err := os.Lstat(s)
		r.must(err)
		if i.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has the mode %s", s, i.Mode())
		}
	}
	if len(sockets) < 4 {
		t.Errorf("the working directory holds %v", sockets)
	}

	refused := func(what string, a answer, err error) {
		if err == nil {
			t.Errorf("%s: %d %.200q", what, a.status, a.body)
		}
	}
	r.askAdmin("http", inbound, refused)
	r.askAdmin("https", inbound, refused)
	r.askAdmin("http", outbound, func(what string, a answer, err error) {
		if err != nil || a.told.Site != "one" {
			t.Errorf("%s is not the workload's answer: %d %.200q %v", what, a.status, a.body, err)
		}
	})
	r.askAdmin("http", p.Readiness, func(what string, a answer, err error) {
		if err != nil || a.status != http.StatusNotFound && a.status != http.StatusMethodNotAllowed {
			t.Errorf("%s: %d %.200q %v", what, a.status, a.body, err)
		}
	})
	if now := envoys(r.temp()); !slices.Equal(now, list) {
		t.Errorf("Envoy was %v and is %v", list, now)
	}
	r.answers(outbound, http.StatusOK)
	r.ready(p)
}

// HRD-30: nor does a Dataplane that names a port for it, of a proxy without the
// link, put the admin interface on the network.
func TestAdminPortIsNotForTheApplication(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	admin, outbound := r.port(), r.port()
	yaml := dataplane("one", []in{{service: "one", protocol: "http", port: r.port(), local: r.site("one").port}}, out{port: outbound, service: "one"})
	p := r.join(cp, "one", strings.Replace(yaml, "networking:\n", fmt.Sprintf("networking:\n  admin: {port: %d}\n", admin), 1),
		lab.ProxyOptions{Env: []string{"KUMA_DATAPLANE_RUNTIME_LINK_ENABLED=false"}})
	r.ready(p)
	r.answers(outbound, http.StatusOK)
	for _, scheme := range []string{"http", "https"} {
		r.askAdmin(scheme, admin, func(what string, a answer, err error) {
			// What listens there is for the control plane: it tells others that they are
			// wrong, and nothing else.
			if err == nil && (a.status != http.StatusNotFound || a.body != "") {
				t.Errorf("%s over %s: %d %.200q", what, scheme, a.status, a.body)
			}
		})
	}
	r.answers(outbound, http.StatusOK)
	r.ready(p)
}

// listening returns the TCP addresses on which a process listens, as the kernel
// writes them.
func (r *room) listening(pid int) []string {
	r.Helper()
	sockets := map[string]bool{}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	r.must(err)
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil {
			if inode, ok := strings.CutPrefix(to, "socket:["); ok {
				sockets[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	var out []string
	for _, table := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		r.must(err)
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 9 && f[3] == "0A" && sockets[f[9]] {
				out = append(out, f[1])
			}
		}
	}
	return out
}

// TestInspect looks at a proxy in every way that there is.
func TestInspect(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permit("one", "Exact, value: spiffe://default/web"))
	inbound := r.port()
	p := r.join(cp, "one", dataplane("one", []in{{service: "one", protocol: "http", port: inbound, local: r.site("one").port}}, out{port: r.port(), service: "one"}))
	r.ready(p)
	for _, c := range []struct {
		kind string
		want []string
	}{
		{"config-dump", []string{`"configs"`, "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump", fmt.Sprintf("inbound:127.0.0.1:%d", inbound)}},
		{"stats", []string{"server.live: 1", "listener_manager.lds.update_success"}},
		{"clusters", []string{"one::observability_name::one", "ads_cluster::"}},
		{"config", []string{`"xds"`, fmt.Sprintf("inbound:127.0.0.1:%d", inbound)}},
		{"policies", []string{"INBOUND", "MeshTrafficPermission"}},
	} {
		text, err := cp.Kumactl("", "inspect", "dataplane", "one", "--type", c.kind)
		if err != nil {
			t.Errorf("%s: %v", c.kind, err)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(text, w) {
				t.Errorf("%s does not show %q:\n%.2000s", c.kind, w, text)
			}
		}
		if strings.HasPrefix(c.kind, "config") && !json.Valid([]byte(text)) {
			t.Errorf("%s is no JSON", c.kind)
		}
	}
	eds, err := cp.Kumactl("", "inspect", "dataplane", "one", "--type", "config-dump", "--include-eds")
	r.must(err)
	if !strings.Contains(eds, "EndpointsConfigDump") {
		t.Error("--include-eds shows no endpoints")
	}
	list, err := cp.Kumactl("", "inspect", "dataplanes")
	r.must(err)
	if !strings.Contains(list, "one") || !strings.Contains(list, "Online") {
		t.Errorf("inspect dataplanes: %s", list)
	}

	base := cp.URL() + "/meshes/default/dataplanes/"
	for _, c := range []struct {
		path, content string
		status        int
		want          string
	}{
		{"one/xds", "application/json", 200, "configs"},
		{"one/stats", "text/plain", 200, "server.live: 1"},
		{"one/clusters", "text/plain", 200, "ads_cluster::"},
		{"one/stats?format=json", "application/json", 200, `"stats"`},
		{"one/clusters?format=json", "application/json", 200, "cluster_statuses"},
		{"one/stats?usedonly=false", "text/plain", 200, "server.live: 1"},
		{"one/nothing", "", 404, ""},
		{"two/xds", "", 404, "Could not get dataplane resource"},
	} {
		res, err := http.Get(base + c.path)
		r.must(err)
		_ = res.Body.Close()
		_, body, err := lab.Get(base + c.path)
		r.must(err)
		if res.StatusCode != c.status || !strings.HasPrefix(res.Header.Get("Content-Type"), c.content) || !strings.Contains(body, c.want) {
			t.Errorf("%s: %d %s %.300s", c.path, res.StatusCode, res.Header.Get("Content-Type"), body)
		}
	}

	// A proxy that is away can't be asked, and that is said.
	p.Kill()
	r.await("a proxy that is away is told from one that answers", func() error {
		out, err := cp.Kumactl("", "inspect", "dataplane", "one", "--type", "stats")
		if err == nil {
			return fmt.Errorf("it answers %.100s", out)
		}
		if !strings.Contains(err.Error(), "it is not running") {
			return err
		}
		return nil
	})
}

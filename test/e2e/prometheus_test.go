//go:build e2e && long

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/test/lab"
)

// prometheus is a real server.
type prometheus struct {
	*room
	*lab.Process
	port int
}

// prometheus starts one with what kumactl prints. PROMETHEUS is its path; make
// test-long sets it.
func (r *room) prometheus(cp *lab.ControlPlane, args ...string) *prometheus {
	r.Helper()
	path := os.Getenv("PROMETHEUS")
	if path == "" {
		r.Fatal("PROMETHEUS must be set: run make test-long")
	}
	config, err := cp.Kumactl("", append([]string{"generate", "prometheus-config", "--scrape-interval=1s", "--refresh-interval=1s"}, args...)...)
	r.must(err)
	file := filepath.Join(r.Dir, "prometheus.yml")
	r.must(os.WriteFile(file, []byte(config), 0o600))
	p := &prometheus{room: r, port: r.port()}
	p.Process, err = r.Start("prometheus", nil, path, "--config.file="+file, "--storage.tsdb.path="+filepath.Join(r.Dir, "tsdb"),
		fmt.Sprintf("--web.listen-address=127.0.0.1:%d", p.port))
	r.must(err)
	r.await("Prometheus is ready", func() error {
		a, err := r.get(p.port, "/-/ready")
		if err == nil && a.status != http.StatusOK {
			err = fmt.Errorf("status %d", a.status)
		}
		return err
	})
	return p
}

// query returns the values of a query by the label "dataplane".
func (p *prometheus) query(q string) (map[string]string, error) {
	a, err := p.get(p.port, "/api/v1/query?query="+url.QueryEscape(q))
	if err != nil {
		return nil, err
	}
	var answer struct {
		Data struct {
			Result []struct {
				Metric map[string]string
				Value  [2]any
			}
		}
	}
	if err := json.Unmarshal([]byte(a.body), &answer); err != nil {
		return nil, fmt.Errorf("%d %s: %w", a.status, a.body, err)
	}
	out := map[string]string{}
	for _, r := range answer.Data.Result {
		out[r.Metric["dataplane"]] = fmt.Sprint(r.Value[1])
	}
	return out, nil
}

// up waits until exactly these proxies are scraped, and well.
func (p *prometheus) up(names ...string) {
	p.Helper()
	want := map[string]string{}
	for _, n := range names {
		want[n] = "1"
	}
	p.await(fmt.Sprintf("up == 1 for %q", names), func() error {
		got, err := p.query("up")
		if err != nil {
			return err
		}
		if diff := cmp.Diff(want, got); diff != "" {
			return fmt.Errorf("up (-want +got):\n%s", diff)
		}
		return nil
	})
}

// TestPrometheus: a real Prometheus with the configuration that kumactl prints
// finds every proxy, scrapes it, and follows as proxies come and go: without
// TLS, and where both it and the control plane show certificates to one another
// and the proxies serve with certificates too.
func TestPrometheus(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(map[bool]string{false: "without TLS", true: "with TLS"}[secure], func(t *testing.T) {
			r := open(t)
			const setting = "KUMA_MONITORING_ASSIGNMENT_SERVER_"
			var env, discovery, serve []string
			mode := "Disabled"
			if secure {
				cert, key := r.pairOf("client", "prometheus")
				env = []string{setting + "TLS_ENABLED=true", setting + "REQUIRE_CLIENT_CERT=true", setting + "TLS_CA_FILE=" + cert}
				served, servedKey := r.pairOf("server", "proxies", "--hostname=127.0.0.21", "--hostname=127.0.0.22", "--hostname=127.0.0.23", "--hostname=127.0.0.24")
				serve = []string{"--metrics-cert-path=" + served, "--metrics-key-path=" + servedKey}
				discovery = []string{"--cert-file=" + cert, "--key-file=" + key, "--metrics-ca-file=" + served}
				mode = "ProvidedTLS"
			}
			cp := r.controlPlane(env...)
			if secure {
				discovery = append(discovery, "--ca-file="+cp.CA)
			}
			port := r.port()
			r.apply(cp, mtls("STRICT"))
			r.apply(cp, fmt.Sprintf("type: MeshMetric\nmesh: default\nname: all\nspec: {default: {backends: [{type: Prometheus, prometheus: {clientId: lab, port: %d, tls: {mode: %s}}}]}}\n", port, mode))
			join := func(i int, more ...string) *lab.Proxy {
				name := fmt.Sprint("web-", i)
				y := strings.Replace(r.caller("web"), "name: web\n", "name: "+name+"\n", 1)
				y = strings.Replace(y, "  address: 127.0.0.1\n", fmt.Sprintf("  address: 127.0.0.2%d\n", i), 1)
				return r.join(cp, name, y, lab.ProxyOptions{Args: append(more, serve...)})
			}
			p := r.prometheus(cp, discovery...)
			one, two := join(1), join(2)
			r.ready(one, two)
			p.up("web-1", "web-2")
			r.ready(join(3))
			p.up("web-1", "web-2", "web-3")

			// The metrics are Envoy's, with the labels of the control plane, once.
			r.await("Envoy's metrics are there for each proxy", func() error {
				got, err := p.query(`envoy_server_live{mesh="default",service="web",job="kuma-dataplanes"}`)
				if err == nil && !slices.Equal(slices.Sorted(maps.Keys(got)), []string{"web-1", "web-2", "web-3"}) {
					err = fmt.Errorf("%v", got)
				}
				return err
			})
			if got, err := p.query(`{exported_dataplane!=""}`); err != nil || len(got) > 0 {
				t.Errorf("labels are there twice: %v %v", got, err)
			}

			// Who leaves is forgotten; who comes back under another address is found.
			two.Stop(20 * time.Second)
			p.up("web-1", "web-3")
			r.ready(join(4))
			p.up("web-1", "web-3", "web-4")

			// A policy that goes takes all targets with it.
			_, err := cp.Kumactl("", "delete", "meshmetric", "all")
			r.must(err)
			p.up()
		})
	}
}

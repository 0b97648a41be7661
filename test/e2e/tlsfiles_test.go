//go:build e2e

package e2e

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kuma/internal/cp/cptest"
	"kuma/test/lab"
)

// TestReloadWithEnvoy: a control plane that demands the post-quantum key
// exchange serves a real Envoy; its certificate is replaced twenty times while
// there is traffic; no request fails, no stream of Envoy or kuma-dp is opened
// again, and who comes later sees the new certificate (HRD-33).
func TestReloadWithEnvoy(t *testing.T) {
	r := open(t)
	ca := cptest.NewCA(t)
	dir := filepath.Join(r.Dir, "pki")
	r.must(os.Mkdir(dir, 0o700))
	certFile, keyFile, caFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), filepath.Join(dir, "ca.crt")
	r.must(os.WriteFile(caFile, ca.PEM(), 0o600))
	put := func() cptest.Pair {
		p := ca.Pair(t, nil)
		cert, key := p.PEM(t)
		for file, data := range map[string][]byte{certFile: cert, keyFile: key} {
			r.must(os.WriteFile(file+".new", data, 0o600))
			r.must(os.Rename(file+".new", file))
		}
		return p
	}
	put()
	cp := r.controlPlane("KUMA_GENERAL_TLS_CERT_FILE="+certFile, "KUMA_GENERAL_TLS_KEY_FILE="+keyFile, "KUMA_GENERAL_TLS_RELOAD_INTERVAL=100ms", "KUMA_GENERAL_TLS_REQUIRE_PQ=true")
	cp.CA = caFile
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	site, inbound, to := r.site("backend"), r.port(), out{port: r.port(), service: "backend"}
	r.ready(
		r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: inbound, local: site.port}})),
		r.join(cp, "web", r.caller("web", to)),
	)
	r.answers(to.port, http.StatusOK)

	const connections = `cluster\.ads_cluster\.upstream_cx_total`
	before := r.stat(cp, "web", connections)
	links := r.links(cp, 98, ca.PEM())
	traffic := r.load(to.port)
	r.answeredBy(traffic, "backend")
	for range 20 {
		next := put()
		r.await("the new certificate", func() error {
			c, err := tls.Dial("tcp", fmt.Sprintf("localhost:%d", cp.DP), &tls.Config{RootCAs: ca.Pool()})
			if err != nil {
				return err
			}
			defer c.Close()
			if !c.ConnectionState().PeerCertificates[0].Equal(next.Cert) {
				return fmt.Errorf("it is not shown yet")
			}
			return nil
		})
	}
	r.answeredBy(traffic, "backend")
	r.clean(traffic)
	r.undropped("after 20 reloads", links)
	if after := r.stat(cp, "web", connections); before == 0 || after != before {
		t.Errorf("Envoy has opened %d connections to the control plane, %d before", after, before)
	}
	late := out{port: r.port(), service: "backend"}
	r.ready(r.join(cp, "late", r.caller("late", late)))
	r.answers(late.port, http.StatusOK)
}

// TestPublicAuthority: a proxy that is given no authority trusts those of its
// machine, and so does its Envoy: it comes back although the control plane's new
// certificate has another issuer.
func TestPublicAuthority(t *testing.T) {
	r := open(t)
	root := cptest.NewCA(t)
	dir := filepath.Join(r.Dir, "pki")
	r.must(os.Mkdir(dir, 0o700))
	certFile, keyFile, system := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), filepath.Join(dir, "system.crt")
	r.must(os.WriteFile(system, root.PEM(), 0o600))
	put := func() {
		between := root.Under(t)
		cert, key := between.Pair(t, nil).PEM(t)
		r.must(os.WriteFile(certFile, append(cert, between.PEM()...), 0o600))
		r.must(os.WriteFile(keyFile, key, 0o600))
	}
	put()
	cp := r.controlPlane("KUMA_GENERAL_TLS_CERT_FILE="+certFile, "KUMA_GENERAL_TLS_KEY_FILE="+keyFile)
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	r.ready(r.join(cp, "web", r.caller("web"), lab.ProxyOptions{
		Env:  []string{"SSL_CERT_FILE=" + system, "KUMA_DATAPLANE_RUNTIME_DYNAMIC_SYSTEM_CA_PATH=" + system, "KUMA_CONTROL_PLANE_RETRY_BACKOFF=300ms"},
		Args: []string{"--ca-cert-file="},
	}))
	cp.Stop(5 * time.Second)
	put()
	r.must(cp.Start(r.ctx))
	r.await("Envoy is back", func() error {
		text, err := cp.Kumactl("", "inspect", "dataplane", "web", "--type", "stats")
		if err == nil && !strings.Contains(text, "cluster.ads_cluster.ssl.handshake: 2\n") {
			err = errors.New("it has not verified the new certificate")
		}
		return err
	})
}

// TestAuthorityFileReplaced: the file that a proxy was given as --ca-cert-file
// gets a second authority, the control plane's next certificate is of that one,
// and kuma-dp and its Envoy come back without a restart. A bad file before is
// refused with one line (HRD-33).
func TestAuthorityFileReplaced(t *testing.T) {
	r := open(t)
	first, second := cptest.NewCA(t), cptest.NewCA(t)
	dir := filepath.Join(r.Dir, "pki")
	r.must(os.Mkdir(dir, 0o700))
	certFile, keyFile, caFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), filepath.Join(dir, "ca.crt")
	put := func(file string, data ...[]byte) {
		r.must(os.WriteFile(file+".new", bytes.Join(data, nil), 0o600))
		r.must(os.Rename(file+".new", file))
	}
	pair := func(ca *cptest.CA) {
		cert, key := ca.Pair(t, nil).PEM(t)
		put(certFile, cert)
		put(keyFile, key)
	}
	pair(first)
	put(caFile, first.PEM())
	cp := r.controlPlane("KUMA_GENERAL_TLS_CERT_FILE="+certFile, "KUMA_GENERAL_TLS_KEY_FILE="+keyFile)
	cp.CA = caFile
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	web := r.join(cp, "web", r.caller("web"), lab.ProxyOptions{Env: []string{"KUMA_CONTROL_PLANE_RETRY_BACKOFF=300ms"}})
	quiet := r.join(cp, "quiet", r.caller("quiet"), linkless)
	r.ready(web, quiet)

	const refused, taken = "a changed certificate file is refused", "took over a changed certificate file"
	put(caFile, first.PEM(), []byte("rubbish"))
	r.logged(web.Process, refused, caFile)
	put(caFile, first.PEM(), second.PEM())
	r.logged(web.Process, taken, caFile)
	r.logged(quiet.Process, taken, caFile)
	if n := strings.Count(web.Log(), refused); n != 1 {
		t.Errorf("it was refused %d times", n)
	}
	cp.Stop(5 * time.Second)
	pair(second)
	r.must(cp.Start(r.ctx))
	r.await("kuma-dp and Envoy are back", func() error {
		text, err := cp.Kumactl("", "inspect", "dataplane", "web", "--type", "stats")
		if err == nil && !strings.Contains(text, "cluster.ads_cluster.ssl.handshake: 2\n") {
			err = errors.New("it has not verified the new certificate")
		}
		return err
	})

	var index struct {
		ID string `json:"instanceId"`
	}
	_, text, err := lab.Get(cp.URL() + "/")
	if err == nil {
		err = json.Unmarshal([]byte(text), &index)
	}
	r.must(err)
	r.await("the Envoy without a link is back", func() error {
		_, text, err := lab.Get(cp.URL() + "/meshes/default/dataplanes+insights/quiet")
		if err == nil && !strings.Contains(text, index.ID) {
			err = fmt.Errorf("it is not at %q: %s", index.ID, text)
		}
		return err
	})

	// What is taken out is no longer trusted.
	put(caFile, second.PEM())
	r.await("the first authority is out", func() error {
		if n := strings.Count(web.Log(), taken); n != 2 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	cp.Stop(5 * time.Second)
	pair(first)
	r.must(cp.Start(r.ctx))
	r.logged(web.Process, "failed to verify certificate", "verified by "+caFile)
}

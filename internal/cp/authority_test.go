package cp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kuma/internal/auth"
	"kuma/internal/cp"
	"kuma/internal/cp/cptest"
	"kuma/internal/pki"
)

// call calls the API as this machine's administrator.
func call(t *testing.T, cfg cp.Config, method, path, body string) (int, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, fmt.Sprintf("http://127.0.0.1:%d%s", cfg.APIServer.HTTP.Port, path), strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, answer
}

// meshed waits for the first mesh.
func meshed(t *testing.T, cfg cp.Config) {
	t.Helper()
	eventually(t, "there is a mesh", func() bool {
		status, _ := call(t, cfg, "GET", "/meshes/default", "")
		return status == http.StatusOK
	})
}

// elsewhere is another control plane's view of the shared authority.
type elsewhere struct {
	text    []byte
	version uint64
}

func (e *elsewhere) Load(context.Context) ([]byte, uint64, error) { return e.text, e.version, nil }

func (e *elsewhere) Save(_ context.Context, text []byte, _ uint64) (uint64, error) {
	e.text = text
	e.version++
	return e.version, nil
}

// The authority in the store: it outlives a restart without any key in the work
// directory, and what another control plane makes of it reaches proxies at once.
func TestAuthorityInTheStore(t *testing.T) {
	cfg := config(t)
	cfg.General.TLSCAStore = "store"
	cfg.DPServer.Authn.DPProxy.Type = auth.ProxyNone
	cfg.XDSServer.ReturnDelay = time.Millisecond // the second start need not wait for proxies of the first
	stop := run(t, cfg)
	file := filepath.Join(cfg.General.WorkDir, pki.CAFile)
	first, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	run(t, cfg)
	if again, err := os.ReadFile(file); err != nil || !bytes.Equal(first, again) {
		t.Fatalf("after a restart: %s, %v", again, err)
	}
	if _, err := os.Stat(filepath.Join(cfg.General.WorkDir, pki.CAKeyFile)); err == nil {
		t.Error("the authority's key is in the work directory")
	}

	meshed(t, cfg)
	proxy := cptest.NewLinkProxy(cptest.LinkConfig{
		Address: fmt.Sprintf("127.0.0.1:%d", cfg.DPServer.Port), CA: first, Mesh: "default", Name: "web", Dataplane: cptest.Dataplane("default", "web", "web"),
	})
	defer proxy.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := proxy.Connect(ctx); err != nil {
		t.Fatal(err)
	}
	holds := func(n int) {
		t.Helper()
		if _, err := proxy.Wait(ctx, func(v cptest.LinkView) bool { return strings.Count(string(v.Bundle), "BEGIN") == n }); err != nil {
			t.Fatalf("%d authorities: %v", n, err)
		}
	}
	holds(1)

	status, body := call(t, cfg, "GET", "/globalsecrets/control-plane-ca", "")
	var secret struct {
		Type, Name string
		Data       []byte `json:"data"`
	}
	if err := json.Unmarshal(body, &secret); err != nil || status != http.StatusOK || len(secret.Data) == 0 {
		t.Fatalf("the secret: %d %s %v", status, body, err)
	}
	put := func(text []byte, want int) {
		t.Helper()
		doc, err := json.Marshal(map[string]any{"type": "GlobalSecret", "name": "control-plane-ca", "data": text})
		if err != nil {
			t.Fatal(err)
		}
		if status, body := call(t, cfg, "PUT", "/globalsecrets/control-plane-ca", string(doc)); status != want {
			t.Fatalf("write the secret: %d %s, want %d", status, body, want)
		}
	}
	other := &elsewhere{secret.Data, 1}
	certs, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: t.TempDir(), Vault: other})
	if err != nil {
		t.Fatal(err)
	}
	rotator := pki.NewRotator(pki.RotatorConfig{Certs: certs})
	for n, order := range []pki.Order{pki.OrderPrepare, pki.OrderDistribute} {
		if _, err := rotator.Do(order, false); err != nil {
			t.Fatal(err)
		}
		put(other.text, http.StatusOK)
		if n == 0 {
			// What can't be read is not taken, and leaves all as it is.
			put([]byte("rubbish"), http.StatusBadRequest)
		}
	}
	holds(2)
	eventually(t, "it is acknowledged", func() bool {
		_, body := call(t, cfg, "GET", "/ca/control-plane", "")
		var s struct {
			Step         string
			Acknowledged []struct{ Name string }
		}
		return json.Unmarshal(body, &s) == nil && s.Step == "distributed" && len(s.Acknowledged) == 1
	})
	eventually(t, "other control planes can see it", func() bool {
		var s struct {
			Trust *struct{ Revision string }
		}
		_, body := call(t, cfg, "GET", "/meshes/default/dataplane-insights/web", "")
		return json.Unmarshal(body, &s) == nil && s.Trust != nil && s.Trust.Revision == fmt.Sprint(proxy.View().Revision)
	})
	for _, c := range []struct {
		body   string
		status int
	}{{`{"step":"prepare"}`, 409}, {`{"step":"fly"}`, 400}, {`{"step":"switch"}`, 200}, {`{"step":"next"}`, 200}, {`{"step":"abort"}`, 409}} {
		if status, body := call(t, cfg, "POST", "/ca/control-plane/rotation", c.body); status != c.status {
			t.Errorf("%s: %d %s, want %d", c.body, status, body, c.status)
		}
	}
	holds(1)
	if now, err := os.ReadFile(file); err != nil || bytes.Equal(now, first) || string(now) != string(proxy.View().Bundle) {
		t.Errorf("kuma-cp.crt at the end: %s, %v", now, err)
	}
	if v := proxy.View(); v.Streams != 1 || !v.Open {
		t.Errorf("the link has had %d streams", v.Streams)
	}
}

// Where the certificate is the user's there is nothing to rotate, and proxies
// are told of no authorities.
func TestNothingToRotate(t *testing.T) {
	ca := cptest.NewCA(t)
	cfg, _ := secured(t, ca)
	run(t, cfg)
	for _, c := range [][2]string{{"GET", "/ca/control-plane"}, {"POST", "/ca/control-plane/rotation"}} {
		if status, body := call(t, cfg, c[0], c[1], `{"step":"prepare","force":true}`); status != http.StatusConflict || !strings.Contains(string(body), "KUMA_GENERAL_TLS_CERT_FILE") {
			t.Errorf("%s %s: %d %s", c[0], c[1], status, body)
		}
	}
	meshed(t, cfg)
	proxy := cptest.NewLinkProxy(cptest.LinkConfig{
		Address: fmt.Sprintf("127.0.0.1:%d", cfg.DPServer.Port), CA: ca.PEM(), Mesh: "default", Name: "web", Dataplane: cptest.Dataplane("default", "web", "web"),
	})
	defer proxy.Close()
	if err := proxy.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if v := proxy.View(); v.Revision != 0 || len(v.Bundle) > 0 {
		t.Errorf("it was told %+v", v)
	}
}

// Whom a step by force cuts off is in its answer, and in the log.
func TestWhoIsCutOff(t *testing.T) {
	cfg := config(t)
	cfg.DPServer.Authn.DPProxy.Type = auth.ProxyNone
	_, log := runLogged(t, cfg)
	meshed(t, cfg)
	ca, err := os.ReadFile(filepath.Join(cfg.General.WorkDir, pki.CAFile))
	if err != nil {
		t.Fatal(err)
	}
	proxy := cptest.NewLinkProxy(cptest.LinkConfig{
		Address: fmt.Sprintf("127.0.0.1:%d", cfg.DPServer.Port), CA: ca, Mesh: "default", Name: "web", Dataplane: cptest.Dataplane("default", "web", "web"),
	})
	defer proxy.Close()
	if err := proxy.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	proxy.Deaf(true)
	for _, step := range []string{"prepare", "distribute", "switch", "retire"} {
		status, body := call(t, cfg, "POST", "/ca/control-plane/rotation", `{"step":"`+step+`","force":true}`)
		var answer struct {
			CutOff []struct{ Mesh, Name, Reason string }
		}
		if err := json.Unmarshal(body, &answer); err != nil || status != http.StatusOK {
			t.Fatalf("%s: %d %s, %v", step, status, body, err)
		}
		if n := len(answer.CutOff); step != "retire" && n != 0 || step == "retire" && (n != 1 || answer.CutOff[0].Name != "web" || answer.CutOff[0].Reason == "") {
			t.Errorf("%s: %s", step, body)
		}
	}
	if said := log.String(); strings.Count(said, "can't connect anew") != 1 || !strings.Contains(said, "proxies=[default/web]") {
		t.Errorf("the log says %s", said)
	}
}

//go:build e2e && long

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kuma/test/lab"
)

// TestScan lets testssl.sh look at every port that speaks TLS: whatever it
// rates above "low" must be explained in SECURITY.md, under "What a scanner
// says", by the name that it gives to it. TESTSSL is the scanner; make
// test-long sets it.
func TestScan(t *testing.T) {
	r := open(t)
	scanner := os.Getenv("TESTSSL")
	if scanner == "" {
		t.Fatal("TESTSSL must be set: run make test-long")
	}
	security, err := os.ReadFile("../../SECURITY.md")
	r.must(err)
	_, explained, found := strings.Cut(string(security), "## What a scanner says")
	if !found {
		t.Fatal("SECURITY.md does not explain what a scanner says")
	}
	explained, _, _ = strings.Cut(explained, "\n## ")

	// What needs a pair of its own gets one of kumactl's.
	clients := filepath.Join(r.Dir, "clients")
	r.must(os.MkdirAll(clients, 0o700))
	pair := func(kind, cert, key string, more ...string) {
		out, err := exec.Command(filepath.Join(r.Bin, "kumactl"), append([]string{"generate", "tls-certificate", "--type=" + kind, "--cert-file=" + cert, "--key-file=" + key}, more...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	cert, key := filepath.Join(r.Dir, "tls.crt"), filepath.Join(r.Dir, "tls.key")
	pair("server", cert, key, "--hostname=localhost", "--key-type=ecdsa")
	pair("client", filepath.Join(clients, "client.pem"), filepath.Join(r.Dir, "client.key"))
	discovery, admin, inbound := r.port(), r.port(), r.port()
	cp := r.controlPlane(
		"KUMA_DIAGNOSTICS_TLS_ENABLED=true", "KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_ENABLED=true", fmt.Sprint("KUMA_MONITORING_ASSIGNMENT_SERVER_PORT=", discovery),
		fmt.Sprint("KUMA_ADMIN_SERVER_LOCAL_PORT=", r.port()), "KUMA_ADMIN_SERVER_PUBLIC_ENABLED=true", fmt.Sprint("KUMA_ADMIN_SERVER_PUBLIC_PORT=", admin), "KUMA_ADMIN_SERVER_PUBLIC_INTERFACE=127.0.0.1",
		"KUMA_ADMIN_SERVER_PUBLIC_TLS_CERT_FILE="+cert, "KUMA_ADMIN_SERVER_PUBLIC_TLS_KEY_FILE="+key, "KUMA_ADMIN_SERVER_PUBLIC_CLIENT_CERTS_DIR="+clients,
	)
	r.must(cp.Apply("type: Mesh\nname: default\nmtls: {enabledBackend: ca, backends: [{name: ca, type: builtin}]}\n"))
	p, err := cp.Proxy("backend", lab.ProxyOptions{Dataplane: fmt.Sprintf(`type: Dataplane
mesh: default
name: backend
networking:
  address: 127.0.0.1
  inbound:
  - port: %d
    servicePort: %d
    tags: {kuma.io/service: backend, kuma.io/protocol: http}
`, inbound, r.port())})
	r.must(err)
	r.must(r.Ready(r.ctx, p))

	ca := filepath.Join(r.Dir, "all.crt")
	both := ""
	for _, f := range []string{cp.CA, cert} {
		b, err := os.ReadFile(f)
		r.must(err)
		both += string(b)
	}
	r.must(os.WriteFile(ca, []byte(both), 0o600))
	for _, port := range []struct {
		name string
		port int
	}{
		{"the proxies' port", cp.DP}, {"the API", cp.HTTPS}, {"diagnostics", cp.Diagnostics}, {"discovery", discovery}, {"0.7.3's admin server", admin}, {"an Envoy's inbound", inbound},
	} {
		t.Run(port.name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(r.Dir, fmt.Sprint(port.port, ".json"))
			cmd := exec.CommandContext(t.Context(), scanner, "--quiet", "--color", "0", "--warnings", "off", "--ip", "one", "--add-ca", ca, "--jsonfile", file, fmt.Sprint("localhost:", port.port))
			cmd.WaitDelay = 10 * time.Second
			out, err := cmd.CombinedOutput() // its exit code counts findings
			var findings []struct{ ID, Severity, Finding string }
			raw, readErr := os.ReadFile(file)
			if readErr == nil {
				readErr = json.Unmarshal(raw, &findings)
			}
			if readErr != nil || len(findings) < 50 {
				t.Fatalf("testssl.sh found out too little (%d things): %v, %v\n%s", len(findings), err, readErr, out)
			}
			seen := 0
			for _, f := range findings {
				if slices.Contains([]string{"OK", "INFO", "LOW", "DEBUG"}, f.Severity) {
					seen++
					continue
				}
				if !strings.Contains(explained, "`"+f.ID+"`") {
					t.Errorf("%s: %s (%s) is neither mended nor explained in SECURITY.md", f.ID, f.Finding, f.Severity)
				}
			}
			t.Logf("%d findings, %d of them low or none", len(findings), seen)
		})
	}
}

//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"kuma/test/story"
)

// TestStory is the demo as a test, and then a look at the wire from outside:
// what a stranger with openssl and curl sees.
func TestStory(t *testing.T) {
	r := open(t)
	s := story.New(r.Lab, teller{t}, r.self)
	r.must(s.Run(r.ctx))

	t.Run("an inbound demands a client certificate and shows a SPIFFE id", func(t *testing.T) {
		inbound := fmt.Sprintf("127.0.0.1:%d", s.InboundPort("backend"))
		cmd := exec.Command("openssl", "s_client", "-connect", inbound, "-showcerts")
		cmd.Stdin = strings.NewReader("")
		out, _ := cmd.CombinedOutput() // refused for want of a certificate
		text := string(out)
		for _, want := range []string{"TLSv1.3", "CN=default"} {
			if !strings.Contains(strings.ReplaceAll(text, "CN = ", "CN="), want) {
				t.Errorf("openssl s_client does not show %q:\n%s", want, text)
			}
		}
		if !strings.Contains(text, "Acceptable client certificate CA names") {
			t.Errorf("no client certificate is asked for:\n%s", text)
		}
		first, _, _ := strings.Cut(text[strings.Index(text, "-----BEGIN CERTIFICATE-----"):], "-----END CERTIFICATE-----")
		x := exec.Command("openssl", "x509", "-noout", "-ext", "subjectAltName")
		x.Stdin = strings.NewReader(first + "-----END CERTIFICATE-----\n")
		san, err := x.CombinedOutput()
		if err != nil || !strings.Contains(string(san), "URI:spiffe://default/backend") {
			t.Errorf("the certificate's names: %s %v", san, err)
		}
	})

	t.Run("no private key comes from the control plane", func(t *testing.T) {
		out, err := s.ControlPlane().Kumactl("", "inspect", "dataplane", "backend", "--type", "config-dump")
		if err != nil {
			t.Fatal(err)
		}
		var dump any
		if err := json.Unmarshal([]byte(out), &dump); err != nil {
			t.Fatal(err)
		}
		for _, never := range []string{"PRIVATE KEY", "inline_private_key"} {
			if strings.Contains(out, never) {
				t.Errorf("the config dump holds %q", never)
			}
		}
		for _, want := range []string{"TLSv1_3", "require_client_certificate", "spiffe://default/", "kuma:sds"} {
			if !strings.Contains(out, want) {
				t.Errorf("the config dump does not hold %q", want)
			}
		}
		var keys []string
		walk(dump, func(key string, v any) {
			if m, ok := v.(map[string]any); ok && key == "private_key" {
				if m["inline_bytes"] != nil || m["inline_string"] != nil {
					keys = append(keys, fmt.Sprint(m))
				}
			}
		})
		// Envoy shows "[redacted]" where it has a key: it came over the local
		// socket. Nothing of it is in what the control plane computes.
		computed, err := s.ControlPlane().Kumactl("", "inspect", "dataplane", "backend", "--type", "config")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(computed, "private_key") || strings.Contains(computed, "privateKey") {
			t.Error("the control plane's configuration for the proxy holds a private key")
		}
		for _, k := range keys {
			if !strings.Contains(k, "redacted") && !strings.Contains(k, "W3JlZGFjdGVkXQ==") {
				t.Errorf("a key in the dump: %s", k)
			}
		}
	})

	t.Run("curl verifies the control plane", func(t *testing.T) {
		cp := s.ControlPlane()
		out, err := exec.Command("curl", "-sS", "--cacert", cp.CA, cp.URLS()+"/").CombinedOutput()
		if err != nil || !strings.Contains(string(out), `"product"`) {
			t.Errorf("curl: %v %s", err, out)
		}
		if out, err := exec.Command("curl", "-sS", cp.URLS()+"/").CombinedOutput(); err == nil {
			t.Errorf("curl without the CA must refuse: %s", out)
		}
	})
}

// walk visits every field of a JSON document.
func walk(v any, visit func(key string, v any)) {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			visit(k, x)
			walk(x, visit)
		}
	case []any:
		for _, x := range v {
			walk(x, visit)
		}
	}
}

package cp

import (
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/pki"
	"kuma/test/lab"
)

// The ports that are tried before the store is there are those that are opened.
func TestDoorways(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cert, key, err := pki.GenerateTLS("server", []string{"localhost"}, "ecdsa")
	if err != nil {
		t.Fatal(err)
	}
	pair := ServerTLS{TLSCertFile: filepath.Join(dir, "pair.crt"), TLSKeyFile: filepath.Join(dir, "pair.key")}
	clients := t.TempDir()
	for file, text := range map[string][]byte{pair.TLSCertFile: cert, pair.TLSKeyFile: key, filepath.Join(clients, "client.crt"): cert} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	public := func(c *Config, host string, port uint32) {
		c.AdminServer.Local.Port = uint32(lab.FreePort(t))
		c.AdminServer.Public = AdminPublic{Enabled: true, Interface: host, Port: port, TLSCertFile: pair.TLSCertFile, TLSKeyFile: pair.TLSKeyFile, ClientCertsDir: clients}
	}
	for what, change := range map[string]func(*Config){
		"by default":  func(*Config) {},
		"the least":   func(c *Config) { c.APIServer.HTTP.Enabled, c.MonitoringAssignmentServer.Enabled = false, false },
		"no HTTPS":    func(c *Config) { c.APIServer.HTTPS.Enabled = false },
		"admin":       func(c *Config) { c.AdminServer.Local.Port = uint32(lab.FreePort(t)) },
		"admin, off":  func(c *Config) { off := false; public(c, "", 0); c.AdminServer.Enabled = &off },
		"admin, all":  func(c *Config) { public(c, "", 0) },
		"admin, IPv4": func(c *Config) { public(c, "0.0.0.0", 0) },
		"admin, here": func(c *Config) { public(c, "127.0.0.1", 0) },
		"admin, one":  func(c *Config) { public(c, "127.0.0.2", 0) },
		"admin, two":  func(c *Config) { public(c, "127.0.0.1", uint32(lab.FreePort(t))) },
		"all, two":    func(c *Config) { public(c, "", uint32(lab.FreePort(t))) },
	} {
		cfg := Default()
		cfg.General.WorkDir, cfg.Store.Type = t.TempDir(), "memory"
		for _, port := range []*uint32{&cfg.APIServer.HTTP.Port, &cfg.APIServer.HTTPS.Port, &cfg.DPServer.Port, &cfg.Diagnostics.ServerPort, &cfg.MonitoringAssignmentServer.Port} {
			*port = uint32(lab.FreePort(t))
		}
		cfg.APIServer.HTTP.Interface = "127.0.0.1"
		change(&cfg)
		var want, got []string
		for _, d := range cfg.doorways() {
			l, err := d.listen()
			if err != nil {
				t.Fatal(what, err)
			}
			want = append(want, l.Addr().String())
			_ = l.Close()
		}
		c, err := New(t.Context(), cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(what, err)
		}
		for _, l := range []net.Listener{c.proxies, c.diagnostics} {
			got = append(got, l.Addr().String())
		}
		for _, s := range c.http {
			got = append(got, s.Listener.Addr().String())
		}
		c.shut()
		slices.Sort(want)
		slices.Sort(got)
		if diff := cmp.Diff(want, slices.Compact(got)); diff != "" { // two servers may share one
			t.Errorf("%s: %s", what, diff)
		}
	}
}

//go:build unix

package pki_test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestNoFile: what is no regular file is refused at once: it could be read for
// ever, or never.
func TestNoFile(t *testing.T) {
	good := mint(t, nil, nil)
	pipe := func(file string) error { return syscall.Mkfifo(file, 0o600) }
	zero := func(file string) error { return os.Symlink("/dev/zero", file) }
	for name, make := range map[string]func(string) error{"a pipe": pipe, "a device": zero} {
		t.Run(name, func(t *testing.T) {
			at := newPlace(t)
			at.put(t, certPEM(good), good.keyPEM(t))
			watch, log := files()
			p, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(at.cert); err != nil {
				t.Fatal(err)
			}
			if err := make(at.cert); err != nil {
				t.Fatal(err)
			}
			for range 10 {
				watch.Look()
			}
			shows(t, p, good)
			if said := log.lines("level=ERROR"); len(said) != 1 || !strings.Contains(said[0], at.cert+" is no regular file") {
				t.Errorf("the log says %q", said)
			}
			_, err = watch.Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", at.cert, at.key)
			refused(t, err, "KUMA_GENERAL_TLS_CERT_FILE: ", at.cert+" is no regular file")
			dir := t.TempDir()
			if err := make(filepath.Join(dir, "ca.pem")); err != nil {
				t.Fatal(err)
			}
			_, err = watch.Clients("api-server-client-ca", "KUMA_API_SERVER_AUTH_CLIENT_CERTS_DIR", dir)
			refused(t, err, "KUMA_API_SERVER_AUTH_CLIENT_CERTS_DIR: ", filepath.Join(dir, "ca.pem")+" is no regular file")
		})
	}
}

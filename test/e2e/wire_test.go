//go:build e2e

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"kuma/test/lab"
)

// marker is something that nobody may read off a wire: what it is, and each of
// the forms in which it could stand there.
type marker struct {
	what  string
	forms [][]byte
}

// planted makes a marker of a text: as it is, in hex, as HTTP/2 packs a header,
// and in base64, wherever in the encoded text it begins.
func planted(what, text string) marker {
	m := marker{what, [][]byte{[]byte(text), []byte(hex.EncodeToString([]byte(text))), hpack.AppendHuffmanString(nil, text)}}
	for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for before := range 3 {
			// What the bytes around it have a part in is left out.
			all := enc.EncodeToString(append(make([]byte, before), text...))
			m.forms = append(m.forms, []byte(all[(8*before+5)/6:8*(before+len(text))/6]))
		}
	}
	return m
}

// in reports whether the marker can be read in what was heard; base64 may be
// broken into lines.
func (m marker) in(heard ...[]byte) bool {
	for _, h := range heard {
		joined := bytes.ReplaceAll(bytes.ReplaceAll(h, []byte(`\n`), nil), []byte("\n"), nil)
		for _, f := range m.forms {
			if bytes.Contains(h, f) || bytes.Contains(joined, f) {
				return true
			}
		}
	}
	return false
}

// records reads TLS records (RFC 8446, 5.1): nothing else may be there. It
// returns the contents of those of the open part of the handshake and of those
// with application data, which in TLS 1.3 are all that are encrypted.
func records(b []byte) (handshake, data []byte, err error) {
	for at := 0; at < len(b); {
		head := b[at:]
		if len(head) < 5 {
			return handshake, data, nil // it was cut
		}
		kind, size := head[0], int(head[3])<<8|int(head[4])
		if kind < 20 || kind > 23 || head[1] != 3 || head[2] > 3 || size > 1<<14+2048 {
			return nil, nil, fmt.Errorf("byte %d of %d begins no TLS record: %q", at, len(b), head[:min(len(head), 60)])
		}
		body := head[5:min(5+size, len(head))]
		switch kind {
		case 22:
			handshake = append(handshake, body...)
		case 23:
			data = append(data, body...)
		}
		at += 5 + size
	}
	return handshake, data, nil
}

// heard is a connection whose other side has said all that it ever will.
type heard struct {
	net.Conn
	io.Reader
}

func (h heard) Read(b []byte) (int, error)  { return h.Reader.Read(b) }
func (h heard) Write(b []byte) (int, error) { return len(b), nil }

// helloIn reads the ClientHello that must be at the start.
func helloIn(sent []byte) (*tls.ClientHelloInfo, error) {
	var hello *tls.ClientHelloInfo
	err := tls.Server(heard{nil, bytes.NewReader(sent)}, &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			hello = h
			return nil, errors.New("that is all")
		},
	}).Handshake()
	if hello == nil {
		return nil, fmt.Errorf("it does not begin with a ClientHello: %w", err)
	}
	return hello, nil
}

// wire is a link with somebody listening in.
type wire struct {
	name string
	*lab.Relay
}

// wires are the links of a test, and what is planted in it.
type wires struct {
	*room
	tag     string
	all     []*wire
	markers map[string]marker
}

// plant makes a text that is a marker from now on.
func (w *wires) plant(what string) string {
	text := "planted-" + strings.ReplaceAll(what, " ", "-") + w.tag
	w.learn(what, text)
	return text
}

// learn makes a text that the programs made a marker.
func (w *wires) learn(what, text string) {
	w.Helper()
	if len(text) < 12 {
		w.Fatalf("%s is too short to be found again: %q", what, text)
	}
	w.markers[what] = planted(what, text)
}

// over puts a relay into a link: it listens at an address and leads to a port of
// this host, at 127.0.0.1.
func (w *wires) over(name, at string, port int) *wire {
	w.Helper()
	relay, err := lab.NewRelay(at, fmt.Sprint("127.0.0.1:", port))
	w.must(err)
	w.Cleanup(relay.Close)
	link := &wire{name, relay}
	w.all = append(w.all, link)
	return link
}

// sealed checks that all that went over the link is TLS, that data went both
// ways, and that no marker can be read. What TLS does not hide is the name that
// the client asks for; it is returned, one for each connection.
func (w *wires) sealed(link *wire) (names []string) {
	w.Helper()
	var sent, answered int
	for i, c := range link.Conversations() {
		if len(c.Sent)+len(c.Answered) == 0 {
			continue // nobody said anything
		}
		hello, err := helloIn(c.Sent)
		if err != nil {
			w.Errorf("%s, connection %d: %v", link.name, i, err)
			continue
		}
		names = append(names, hello.ServerName)
		asked, said, err := records(c.Sent)
		if err != nil {
			w.Errorf("%s, connection %d, the client: %v", link.name, i, err)
		}
		told, back, err := records(c.Answered)
		if err != nil {
			w.Errorf("%s, connection %d, the server: %v", link.name, i, err)
		}
		sent, answered = sent+len(said), answered+len(back)
		if hello.ServerName != "" {
			asked = bytes.ReplaceAll(asked, []byte(hello.ServerName), nil)
		}
		for _, m := range w.markers {
			if m.in(asked, said, told, back) {
				w.Errorf("%s, connection %d: %s can be read", link.name, i, m.what)
			}
		}
	}
	if sent == 0 || answered == 0 {
		w.Errorf("%s: %d and %d bytes of data went over it", link.name, sent, answered)
	}
	w.Logf("%s: %d connections, %d bytes there and %d back", link.name, len(names), sent, answered)
	return names
}

// readable checks that markers can be read, so that a capture is known to see
// what is there.
func (w *wires) readable(link *wire, what ...string) {
	w.Helper()
	for _, name := range what {
		m, ok := w.markers[name]
		if !ok {
			w.Fatalf("nothing is planted that is called %q", name)
		}
		found := false
		for _, c := range link.Conversations() {
			found = found || m.in(c.Sent, c.Answered)
		}
		if !found {
			w.Errorf("%s: %s can't be read, although the link is plain", link.name, name)
		}
	}
}

// fresh is an HTTP client that uses no connection twice.
func fresh(c *tls.Config) *http.Client {
	return &http.Client{Timeout: attempt, Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}}
}

// request makes a request and returns the body of its answer, which must be a
// success.
func (w *wires) request(c *http.Client, method, url, body string, header ...string) (string, error) {
	req, err := http.NewRequestWithContext(w.ctx, method, url, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := c.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 16<<20))
	if err == nil && res.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s", res.Status, b)
	}
	return string(b), err
}

// tool runs kumactl with a configuration of its own.
func (r *room) tool(config, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(r.ctx, filepath.Join(r.Bin, "kumactl"), append([]string{"--config-file", filepath.Join(r.Dir, config)}, args...)...)
	cmd.Dir, cmd.Stdin = r.Dir, strings.NewReader(stdin)
	var problem bytes.Buffer
	cmd.Stderr = &problem
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("kumactl %s: %w: %s", args[0], err, problem.Bytes())
	}
	return string(out), err
}

// pairOf makes a certificate and its key with kumactl.
func (r *room) pairOf(kind, name string, more ...string) (cert, key string) {
	r.Helper()
	cert, key = filepath.Join(r.Dir, name+".crt"), filepath.Join(r.Dir, name+".key")
	_, err := r.tool("pairs", "", append([]string{"generate", "tls-certificate", "--type=" + kind, "--key-type=ecdsa", "--cert-file=" + cert, "--key-file=" + key}, more...)...)
	r.must(err)
	return cert, key
}

// trusting is a client that trusts the certificates in a file.
func (r *room) trusting(file string) *tls.Config {
	r.Helper()
	text, err := os.ReadFile(file)
	r.must(err)
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		r.Fatalf("%s holds no certificate", file)
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}

// TestNothingIsReadableOnTheWire is HRD-31: every link is recorded while it is
// used, with tokens, names, secrets, requests and identities that can be found
// again. Where TLS is what the setting says, all that is on the wire is TLS and
// none of it can be found. Where a setting turns TLS off, it can: so the
// recording is known to see.
func TestNothingIsReadableOnTheWire(t *testing.T) {
	for _, c := range []struct {
		name string
		mode wireMode
	}{
		{"with a link", wireMode{link: true, secure: true}},
		{"without a link", wireMode{secure: true}},
		{"with a link, TLS 1.2 at most", wireMode{link: true, secure: true, most: "TLSv1_2"}},
		{"where TLS is turned off", wireMode{link: true}},
	} {
		t.Run(c.name, func(t *testing.T) { listenIn(t, c.mode) })
	}
}

// wireMode is how the links are set up.
type wireMode struct {
	// link says whether kuma-dp keeps one.
	link bool
	// secure says whether TLS is on where it could be turned off.
	secure bool
	// most is the newest TLS that the control plane speaks; empty means 1.3.
	most string
}

func listenIn(t *testing.T, mode wireMode) {
	r := open(t)
	w := &wires{room: r, tag: fmt.Sprintf("-%08x", rand.Uint32()), markers: map[string]marker{}}
	for what, text := range map[string]string{
		"a private key": "PRIVATE KEY-----", "a certificate request": "CERTIFICATE REQUEST-----", "a path of ADS": "/envoy.service.discovery.v3",
		"a path of the link": "/kuma.link.v1", "a resource's kind": `"kuma.io/service"`, "a login": "Bearer eyJhbGciOi",
	} {
		w.learn(what, text)
	}
	local := func(port int) string { return fmt.Sprint("127.0.0.1:", port) }
	on := func(b bool) string { return fmt.Sprint("=", b) }

	// The control plane, with whoever calls it recorded.
	serverCert, serverKey := r.pairOf("server", "admin", "--hostname=localhost,127.0.0.1")
	clients := filepath.Join(r.Dir, "clients")
	r.must(os.Mkdir(clients, 0o700))
	clientCert, clientKey := r.pairOf("client", "clients/client")
	r.must(os.Rename(clientKey, filepath.Join(r.Dir, "client.key")))
	clientKey = filepath.Join(r.Dir, "client.key")
	xdsPort, oldLocal, oldPublic := r.port(), r.port(), r.port()
	cp := r.controlPlane(
		fmt.Sprint("KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_PORT=", xdsPort), "KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_HOST=127.0.0.1", "KUMA_GENERAL_TLS_MAX_VERSION="+mode.most,
		"KUMA_DIAGNOSTICS_TLS_ENABLED"+on(mode.secure), "KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_ENABLED"+on(mode.secure),
		fmt.Sprint("KUMA_ADMIN_SERVER_LOCAL_PORT=", oldLocal), "KUMA_ADMIN_SERVER_PUBLIC_ENABLED=true", fmt.Sprint("KUMA_ADMIN_SERVER_PUBLIC_PORT=", oldPublic),
		"KUMA_ADMIN_SERVER_PUBLIC_INTERFACE=127.0.0.1", "KUMA_ADMIN_SERVER_PUBLIC_TLS_CERT_FILE="+serverCert, "KUMA_ADMIN_SERVER_PUBLIC_TLS_KEY_FILE="+serverKey,
		"KUMA_ADMIN_SERVER_PUBLIC_CLIENT_CERTS_DIR="+clients,
	)
	scheme, apiPort, oldPort := "https", cp.HTTPS, oldPublic
	if !mode.secure {
		scheme, apiPort, oldPort = "http", cp.HTTP, oldLocal
	}
	at := func(link *wire) string { return fmt.Sprintf("%s://localhost:%d", scheme, link.Port()) }
	dpLink := w.over("kuma-dp to the control plane", local(0), cp.DP)
	xdsLink := w.over("Envoy to the control plane", local(xdsPort), cp.DP)
	toolLink := w.over("kumactl to the API", local(0), apiPort)
	apiLink := w.over("an HTTP client of TLS 1.2 to the API", local(0), apiPort)
	madsLink := w.over("Prometheus to its discovery", local(0), cp.MADS)
	diagnosticsLink := w.over("diagnostics", local(0), cp.Diagnostics)
	oldLink := w.over("the admin server of 0.7", local(0), oldPort)

	// A user with a token, a secret and a mesh.
	web, backend, service := w.plant("the name of a caller"), w.plant("the name of a callee"), w.plant("service")
	tagValue, secret, path := w.plant("a tag"), w.plant("a secret"), w.plant("a path")
	head, body, back, said := w.plant("a header"), w.plant("a body"), w.plant("an answer"), w.plant("a line of TCP")
	delete(w.markers, "service")
	w.learn("the service", service) // and not less of it, such as in a server name
	w.learn("an identity", "spiffe://default/"+service)
	token, err := cp.Kumactl("", "generate", "user-token", "--name", w.plant("a user"), "--group", "mesh-system:admin", "--valid-for", "1h")
	r.must(err)
	token = strings.TrimSpace(token)
	w.learn("a user's token", token)
	w.learn("the end of a user's token", token[len(token)-40:])
	login := []string{"config", "control-planes", "add", "--name=wire", "--address=" + at(toolLink), "--auth-type=tokens", "--auth-conf=token=" + token}
	if mode.secure {
		login = append(login, "--ca-cert-file="+cp.CA)
	}
	tool := func(stdin string, args ...string) string {
		t.Helper()
		out, err := r.tool("kumactl", stdin, args...)
		r.must(err)
		return out
	}
	tool("", login...)
	apply := func(yaml string) {
		t.Helper()
		tool(yaml, "apply", "-f", "-")
	}
	metricsPort, metricsTLS, mtlsMode := r.port(), "providedTLS", "STRICT"
	if !mode.secure {
		metricsTLS, mtlsMode = "disabled", "PERMISSIVE"
	}
	apply(mtls(mtlsMode, fmt.Sprintf("metrics:\n  enabledBackend: p\n  backends:\n  - {name: p, type: prometheus, conf: {port: %d, path: /metrics, tls: {mode: %s}}}\n", metricsPort, metricsTLS)))
	apply(permitAll)
	apply("type: Secret\nmesh: default\nname: planted\ndata: " + base64.StdEncoding.EncodeToString([]byte(secret)) + "\n")
	if out := tool("", "get", "secret", "planted", "-o", "json"); !w.markers["a secret"].in([]byte(out)) {
		t.Errorf("kumactl does not get the secret: %s", out)
	}
	config := r.trusting(cp.CA)
	config.MaxVersion = tls.VersionTLS12
	var authority struct{ Data []byte }
	text, err := w.request(fresh(config), http.MethodGet, at(apiLink)+"/meshes/default/secrets/default.ca-builtin-key-ca-1", "", "Authorization", "Bearer "+token, "X-Planted", head)
	r.must(err)
	r.must(json.Unmarshal([]byte(text), &authority))
	block, _ := pem.Decode(authority.Data)
	if block == nil {
		t.Fatal("the authority's key is no PEM")
	}
	w.learn("the authority's key", string(block.Bytes[len(block.Bytes)-32:]))
	w.learn("the authority's key as PEM", strings.Split(string(authority.Data), "\n")[2])

	// The proxies, with all that goes to backend recorded.
	const reach, elsewhere = "127.0.0.9", "127.0.0.10"
	httpPort, tcpPort, adminPort := r.port(), r.port(), r.port()
	httpLink := w.over("Envoy to Envoy, HTTP", fmt.Sprintf("%s:%d", reach, httpPort), httpPort)
	tcpLink := w.over("Envoy to Envoy, TCP", fmt.Sprintf("%s:%d", reach, tcpPort), tcpPort)
	metricsLink := w.over("Prometheus to a proxy", fmt.Sprintf("%s:%d", reach, metricsPort), metricsPort)
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, q *http.Request) {
		_, _ = io.Copy(io.Discard, q.Body)
		_, _ = io.WriteString(rw, back)
	})}
	workload := r.listen()
	go func() { _ = srv.Serve(workload) }()
	r.Cleanup(func() { _ = srv.Close() })
	metricsCert, metricsKey := r.pairOf("server", "metrics", "--hostname="+reach)
	opts := lab.ProxyOptions{Env: []string{fmt.Sprintf("KUMA_DATAPLANE_RUNTIME_LINK_ENABLED=%v", mode.link)}}
	via := *cp
	via.DP = dpLink.Port()
	callee := fmt.Sprintf(`type: Dataplane
mesh: default
name: %s
networking:
  address: 127.0.0.1
  advertisedAddress: %s
  admin: {port: %d}
  inbound:
  - {port: %d, servicePort: %d, serviceAddress: 127.0.0.1, tags: {kuma.io/service: %s, kuma.io/protocol: http, planted: %s}}
  - {port: %d, servicePort: %d, serviceAddress: 127.0.0.1, tags: {kuma.io/service: tcp-%s, kuma.io/protocol: tcp, planted: %s}}
  outbound:
  - {port: %d, tags: {kuma.io/service: %s}}
`, backend, reach, adminPort, httpPort, port(workload), service, tagValue, tcpPort, r.echo(), service, tagValue, r.port(), service)
	backendOpts := opts
	backendOpts.Args = []string{"--metrics-cert-path=" + metricsCert, "--metrics-key-path=" + metricsKey}
	toHTTP, toTCP := out{port: r.port(), service: service}, out{port: r.port(), service: "tcp-" + service}
	caller := strings.Replace(r.caller(web, toHTTP, toTCP), "address: 127.0.0.1\n", "address: 127.0.0.8\n", 1)
	a, b := r.join(&via, backend, callee, backendOpts), r.join(&via, web, caller, opts)
	for _, p := range []*lab.Proxy{a, b} {
		text, err := os.ReadFile(p.TokenFile)
		r.must(err)
		token := strings.TrimSpace(string(text))
		w.learn("the token of "+p.Name, token)
		w.learn("the end of the token of "+p.Name, token[len(token)-40:])
	}
	r.ready(a, b)

	// What proxies are for.
	plainHTTP := &http.Client{Timeout: attempt, Transport: &http.Transport{DisableKeepAlives: true}}
	visit := func(c *http.Client, address string) error {
		got, err := w.request(c, http.MethodPost, "http://"+address+"/"+path, body, "X-Planted", head)
		if err == nil && got != back {
			err = fmt.Errorf("the answer is %q", got)
		}
		return err
	}
	r.await("the caller is answered", func() error { return visit(plainHTTP, local(toHTTP.port)) })
	r.must(r.dials(toTCP.port).say(said))

	// The callee's key, by its certificate: it was in what the callee asked for.
	conn, err := tls.Dial("tcp4", local(httpPort), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"kuma"}})
	r.must(err)
	leaf := conn.ConnectionState().PeerCertificates[0]
	_ = conn.Close()
	key, err := leaf.PublicKey.(*ecdsa.PublicKey).Bytes()
	r.must(err)
	w.learn("the key of a certificate", string(key[1:25]))
	if len(leaf.URIs) == 0 || leaf.URIs[0].String() != "spiffe://default/"+service && len(leaf.URIs) == 1 {
		t.Errorf("the callee is %q", leaf.URIs)
	}

	// Who asks about proxies.
	r.await("discovery tells of the callee", func() error {
		text, err := w.request(fresh(r.trusting(cp.CA)), http.MethodPost, at(madsLink)+"/v3/discovery:monitoringassignments?fetch-timeout=0s", `{"node":{"id":"`+head+`"}}`, "Content-Type", "application/json")
		if err == nil && !strings.Contains(text, backend) {
			err = fmt.Errorf("it tells %s", text)
		}
		return err
	})
	_, err = w.request(fresh(r.trusting(cp.CA)), http.MethodGet, at(diagnosticsLink)+"/metrics?"+path, "", "X-Planted", head)
	r.must(err)
	r.await("the callee's metrics are served", func() error {
		text, err := w.request(fresh(r.trusting(metricsCert)), http.MethodGet, scheme+"://"+metricsLink.Addr+"/metrics", "", "X-Planted", head)
		if err == nil && !strings.Contains(text, service) {
			err = fmt.Errorf("the service is not in %d bytes", len(text))
		}
		return err
	})
	old := r.trusting(serverCert)
	shown, err := tls.LoadX509KeyPair(clientCert, clientKey)
	r.must(err)
	old.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &shown, nil }
	issued, err := w.request(fresh(old), http.MethodPost, at(oldLink)+"/tokens", `{"mesh":"default","name":"`+backend+`"}`, "Content-Type", "application/json")
	r.must(err)
	issued = strings.TrimSpace(issued)
	w.learn("a token that was issued", issued[len(issued)-40:])

	// The admin listener of a proxy without a link, with the control plane's own
	// TLS, and kumactl's way there.
	if !mode.link {
		link := w.over("the control plane to a proxy without a link", local(0), adminPort)
		config, err := r.adminCA(cp).Client("default", backend)
		r.must(err)
		text, err := w.request(fresh(config), http.MethodGet, "https://"+link.Addr+"/config_dump", "", "X-Planted", head)
		r.must(err)
		if !strings.Contains(text, service) {
			t.Errorf("the configuration does not hold the service's name")
		}
	}
	if text := tool("", "inspect", "dataplane", backend, "--type", "config-dump"); !strings.Contains(text, service) {
		t.Errorf("the configuration does not hold the service's name")
	}

	if mode.secure {
		for _, link := range w.all {
			for _, name := range w.sealed(link) {
				if (link == httpLink || link == tcpLink) != strings.Contains(name, service) {
					t.Errorf("%s: the client asks for %q", link.name, name)
				}
			}
		}
		return
	}

	// What can be turned off, and what can't.
	direct := w.over("a stranger to a permissive proxy, HTTP/1.1", elsewhere+":0", httpPort)
	r.must(visit(plainHTTP, direct.Addr))
	two := w.over("a stranger to a permissive proxy, HTTP/2", elsewhere+":0", httpPort)
	r.must(visit(client(true), two.Addr))
	directTCP := w.over("a stranger to a permissive proxy, TCP", elsewhere+":0", tcpPort)
	plain, err := net.Dial("tcp4", directTCP.Addr)
	r.must(err)
	r.Cleanup(func() { _ = plain.Close() })
	_ = plain.SetDeadline(time.Now().Add(attempt))
	_, err = fmt.Fprintln(plain, said)
	r.must(err)
	_, err = io.ReadFull(plain, make([]byte, len(said)))
	r.must(err)
	older := w.over("a stranger of TLS 1.2 to a proxy", elsewhere+":0", httpPort)
	if c, err := tls.Dial("tcp4", older.Addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"kuma"}, MaxVersion: tls.VersionTLS12}); err == nil {
		_ = c.Close()
	}
	for link, what := range map[*wire][]string{
		older:           {"an identity", "the key of a certificate"}, // TLS 1.2 shows certificates
		toolLink:        {"a user's token", "the end of a user's token", "a secret", "a login"},
		apiLink:         {"a user's token", "the authority's key as PEM", "a header"},
		madsLink:        {"a header", "the service", "the name of a callee"},
		diagnosticsLink: {"a path", "a header"},
		metricsLink:     {"the service", "a header"},
		oldLink:         {"the name of a callee", "a token that was issued"},
		direct:          {"a path", "a header", "a body", "an answer"},
		two:             {"a header", "a body", "an answer"},
		directTCP:       {"a line of TCP"},
	} {
		w.readable(link, what...)
		for _, c := range link.Conversations() {
			if _, err := helloIn(c.Sent); err == nil && link != older {
				t.Errorf("%s: it begins as TLS does, although the link is plain", link.name)
			}
		}
	}
	for _, link := range []*wire{dpLink, xdsLink, httpLink, tcpLink} {
		w.sealed(link)
	}

	// Those of 0.7 are told the API's address without TLS: what they ask there is
	// where to go, and says nothing.
	question := w.over("kuma-dp of 0.7's form to the API", local(0), cp.HTTP)
	third := w.plant("the name of a third")
	c := r.join(cp, third, r.caller(third), lab.ProxyOptions{Args: []string{fmt.Sprintf("--cp-address=http://localhost:%d", question.Port())}})
	r.ready(c)
	thirds, err := os.ReadFile(c.TokenFile)
	r.must(err)
	w.learn("the token of a third", strings.TrimSpace(string(thirds)))
	w.silent(question, "/bootstrap", "BEGIN CERTIFICATE-----")

	question = w.over("kumactl of 0.7's form to the API", local(0), cp.HTTP)
	trusted, err := r.File("trusted.crt", "")
	r.must(err)
	for _, f := range []string{serverCert, cp.CA} {
		b, err := os.ReadFile(f)
		r.must(err)
		both, err := os.ReadFile(trusted)
		r.must(err)
		r.must(os.WriteFile(trusted, append(both, b...), 0o600))
	}
	tool("", "config", "control-planes", "add", "--name=old", fmt.Sprintf("--address=http://localhost:%d", question.Port()), "--admin-client-cert="+clientCert, "--admin-client-key="+clientKey, "--ca-cert-file="+trusted)
	issued = strings.TrimSpace(tool("", "generate", "dataplane-token", "--name", backend, "--mesh", "default", "--type", "dataplane"))
	w.learn("a token that was issued in 0.7's form", issued[len(issued)-40:])
	tool("", "get", "secret", "planted", "-o", "json")
	w.silent(question, "/", "adminServerPort")
}

// silent checks that what went over a plain link is a question and its answer,
// and no marker.
func (w *wires) silent(link *wire, path, answer string) {
	w.Helper()
	asked := false
	for _, c := range link.Conversations() {
		asked = asked || bytes.Contains(c.Sent, []byte("GET "+path+" HTTP/1.1\r\n")) && bytes.Contains(c.Answered, []byte(answer))
		for _, m := range w.markers {
			if m.in(c.Sent, c.Answered) {
				w.Errorf("%s: %s can be read", link.name, m.what)
			}
		}
	}
	if !asked {
		w.Errorf("%s: nobody asked for %s", link.name, path)
	}
}

// TestClientsCertificateServesNothing is HRD-31: a certificate that kumactl made
// for a client is no server's, not even for those who trust it. What a client
// says to one that an authority made is in package mitm.
func TestClientsCertificateServesNothing(t *testing.T) {
	r := open(t)
	cert, key := r.pairOf("client", "client", "--hostname=localhost,127.0.0.1")
	serverCert, serverKey := r.pairOf("server", "server", "--hostname=localhost,127.0.0.1")
	const wrong = "lacks serverAuth"

	// Every server of a control plane refuses to start with it.
	for setting, more := range map[string][]string{
		"KUMA_GENERAL":                      nil,
		"KUMA_DP_SERVER":                    nil,
		"KUMA_API_SERVER_HTTPS":             nil,
		"KUMA_DIAGNOSTICS":                  {"KUMA_DIAGNOSTICS_TLS_ENABLED=true"},
		"KUMA_MONITORING_ASSIGNMENT_SERVER": {"KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_ENABLED=true"},
		"KUMA_ADMIN_SERVER_PUBLIC":          {"KUMA_ADMIN_SERVER_PUBLIC_ENABLED=true", "KUMA_ADMIN_SERVER_PUBLIC_CLIENT_CERTS_DIR=" + r.Dir, fmt.Sprint("KUMA_ADMIN_SERVER_LOCAL_PORT=", r.port())},
	} {
		cp, err := r.ControlPlane(r.ctx, append(more, setting+"_TLS_CERT_FILE="+cert, setting+"_TLS_KEY_FILE="+key)...)
		if err == nil {
			t.Errorf("%s: it serves", setting)
		} else if line := loggedLines(cp.Process, setting+"_TLS_CERT_FILE", cert, wrong); len(line) == 0 || cp.ExitCode() != 1 {
			t.Errorf("%s: exit code %d, %v", setting, cp.ExitCode(), err)
		}
		if cp.Process != nil {
			cp.Stop(10 * time.Second)
		}
	}

	// So does kuma-dp, for Envoy's metrics.
	cp := r.controlPlane()
	dp := r.join(cp, "web", r.caller("web"), lab.ProxyOptions{Args: []string{"--metrics-cert-path=" + cert, "--metrics-key-path=" + key}})
	select {
	case <-dp.Done():
	case <-r.ctx.Done():
		t.Fatal("kuma-dp goes on")
	}
	if dp.ExitCode() != 1 || len(loggedLines(dp.Process, "--metrics-cert-path", cert, wrong)) == 0 {
		t.Errorf("kuma-dp: exit code %d:\n%s", dp.ExitCode(), dp.Log())
	}

	// Clients say nothing to a server that shows it, and to one with a server's
	// they do.
	for _, c := range []struct {
		what, cert, key string
		taken           bool
	}{{"a client's", cert, key, false}, {"a server's", serverCert, serverKey, true}} {
		pair, err := tls.LoadX509KeyPair(c.cert, c.key)
		r.must(err)
		var asked atomic.Int64
		srv := &http.Server{
			ReadHeaderTimeout: 5 * time.Second, ErrorLog: log.New(io.Discard, "", 0), TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}},
			Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				asked.Add(1)
				http.Error(w, "nobody is here", http.StatusTeapot)
			}),
		}
		l := r.listen()
		go func() { _ = srv.ServeTLS(l, "", "") }()
		r.Cleanup(func() { _ = srv.Close() })
		heard := func(who, said, reason string) {
			t.Helper()
			if n := asked.Swap(0); (n > 0) != c.taken {
				t.Errorf("%s sent %d requests to a server that shows %s certificate", who, n, c.what)
			}
			if strings.Contains(said, reason) == c.taken {
				t.Errorf("%s says of %s certificate: %s", who, c.what, said)
			}
		}
		_, err = r.tool("kumactl", "", "config", "control-planes", "add", "--name=it", fmt.Sprintf("--address=https://localhost:%d", port(l)), "--ca-cert-file="+c.cert)
		heard("kumactl", fmt.Sprint(err), "incompatible key usage")

		other := *cp
		other.DP, other.CA = port(l), c.cert
		dp := r.join(&other, "web", r.caller("web"), lab.ProxyOptions{As: "web-" + strings.Fields(c.what)[1][:6]})
		r.await("kuma-dp is heard, or gives up", func() error {
			select {
			case <-dp.Done():
				return nil
			default:
			}
			if asked.Load() == 0 {
				return errors.New("neither")
			}
			return nil
		})
		heard("kuma-dp", dp.Log(), "incompatible key usage")
		dp.Kill()
	}
}

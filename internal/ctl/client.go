package ctl

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"kuma/internal/conf"
	"kuma/internal/errs"
	"kuma/internal/names"
	"kuma/internal/pki"
)

const (
	// maxAnswer is the largest answer that is read, in bytes. A dump of a large
	// proxy's configuration has some tens of megabytes.
	maxAnswer = 256 << 20
	// greetTimeout bounds the wait for the index, whose only use is a warning.
	greetTimeout = 5 * time.Second
)

// A client speaks with one control plane's API.
type client struct {
	app     *app
	base    *url.URL
	headers http.Header
	http    *http.Client
	name    string
	mesh    string
	// caFile and certFile are the CA's and the client's own certificate.
	caFile, certFile string
	// wanted is set where the server asked for a certificate and there was none:
	// what becomes of the connection then does not always say so.
	wanted atomic.Bool
	// detour is where requests go instead, but for the index; nil means that
	// they go to base.
	detour *detour
}

// client returns a client for the context in use.
func (a *app) client() (*client, error) {
	ctx, cp, err := a.active()
	if err != nil {
		return nil, err
	}
	c, err := a.clientFor(cp)
	if err != nil {
		return nil, err
	}
	if ctx.Defaults != nil {
		c.mesh = ctx.Defaults.Mesh
	}
	return c, nil
}

func (a *app) clientFor(cp controlPlane) (*client, error) {
	api := cp.Coordinates.APIServer
	base, err := parseAddress(api.URL)
	if err != nil {
		return nil, err
	}
	c := &client{app: a, base: base, name: cp.Name, caFile: api.CACertFile, certFile: api.ClientCertFile, headers: http.Header{}}
	for _, h := range api.Headers {
		c.headers.Set(h.Key, h.Value)
	}
	switch api.AuthType {
	case "":
	case "tokens":
		token := strings.TrimSpace(api.AuthConf["token"])
		if token == "" {
			return nil, errs.New(errs.Invalid, "control plane %q has authType tokens and no token; add it again with --auth-conf token=TOKEN --overwrite", cp.Name)
		}
		c.headers.Set("Authorization", "Bearer "+token)
	default:
		return nil, errs.New(errs.Invalid, "authentication plugin of type %q is not found; known: tokens", api.AuthType)
	}
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, MaxResponseHeaderBytes: 1 << 20, ForceAttemptHTTP2: true}
	if base.Scheme == "https" {
		if transport.TLSClientConfig, err = tlsConfig(api, a.now()); err != nil {
			return nil, fmt.Errorf("control plane %q: %w", cp.Name, err)
		}
		if transport.TLSClientConfig.GetClientCertificate == nil {
			transport.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				c.wanted.Store(true)
				return &tls.Certificate{}, nil
			}
		}
		if api.SkipVerify {
			a.warn(notVerified, base)
		}
		if st, err := os.Stat(api.ClientKeyFile); err == nil && st.Mode().Perm()&0o077 != 0 {
			a.warn("%s can be read by other users (mode %04o); run: chmod 600 %s", api.ClientKeyFile, st.Mode().Perm(), api.ClientKeyFile)
		}
	}
	if base.Scheme == "http" && api.ClientCertFile != "" {
		c.detour = &detour{app: a, cp: cp}
	}
	c.http = &http.Client{Transport: transport, Timeout: a.timeout, CheckRedirect: sameHost}
	return c, nil
}

// sameHost follows a redirect only where credentials may go: to the same host
// and never from https to http.
func sameHost(r *http.Request, via []*http.Request) error {
	first := via[0].URL
	if r.URL.Host != first.Host || r.URL.Scheme != first.Scheme {
		return fmt.Errorf("it redirects to %s://%s, where kumactl does not send credentials; use that address if it is right", r.URL.Scheme, r.URL.Host)
	}
	if len(via) >= 5 {
		return errors.New("it redirects in a circle")
	}
	return nil
}

// parseAddress reads the URL of an API server.
func parseAddress(address string) (*url.URL, error) {
	u, err := url.Parse(address)
	switch {
	case err != nil:
		return nil, errs.New(errs.Invalid, "API Server URL is invalid: %w", err)
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errs.New(errs.Invalid, "API Server URL is invalid: %q must start with http:// or https://", address)
	case u.Host == "":
		return nil, errs.New(errs.Invalid, "API Server URL is invalid: %q has no host", address)
	case u.User != nil:
		return nil, errs.New(errs.Invalid, "API Server URL is invalid: it must not hold a user or password; use --auth-type and --auth-conf")
	}
	return u, nil
}

// notVerified is said whenever a server's certificate is not verified.
const notVerified = "the certificate of %s is not verified (skipVerify), so anyone on the way can read and change what is sent"

// tlsConfig verifies against the CA file, or the system's roots where there
// is none, and shows the client's certificate where there is one. Errors are
// Invalid and name the file.
func tlsConfig(api apiServer, now time.Time) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: api.SkipVerify}
	if api.CACertFile != "" {
		text, err := readLimited(api.CACertFile, maxConfigSize)
		if err != nil {
			return nil, fmt.Errorf("read the CA certificate: %w", err)
		}
		if cfg.RootCAs, err = roots(text); err != nil {
			return nil, errs.New(errs.Invalid, "%s %w", api.CACertFile, err)
		}
	}
	switch {
	case api.ClientCertFile == "" && api.ClientKeyFile == "":
		return cfg, nil
	case api.ClientCertFile == "":
		return nil, errs.New(errs.Invalid, "Both --client-cert-file and --client-key-file needs to be specified: --client-cert-file is missing")
	case api.ClientKeyFile == "":
		return nil, errs.New(errs.Invalid, "Both --client-cert-file and --client-key-file needs to be specified: --client-key-file is missing")
	}
	pair, err := clientPair(api.ClientCertFile, api.ClientKeyFile, now)
	if err != nil {
		return nil, fmt.Errorf("read the client's certificate: %w", err)
	}
	// It is shown whatever authorities the server names, since a self-signed one
	// may be known to it by itself; the server says so if it does not take it.
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil }
	return cfg, nil
}

// roots reads the certificates of a CA file. The error goes on after the
// file's name.
func roots(text []byte) (*x509.CertPool, error) {
	pool, n := x509.NewCertPool(), 0
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a PEM block of type %q, where only CERTIFICATE may be", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("holds a certificate that can't be read: %w", err)
		}
		pool.AddCert(cert)
		n++
	}
	if n == 0 {
		return nil, errors.New("holds no PEM certificate")
	}
	return pool, nil
}

// clientPair reads a certificate and its key, which must belong together and
// be valid now.
func clientPair(certFile, keyFile string, now time.Time) (*tls.Certificate, error) {
	cert, err := readLimited(certFile, maxConfigSize)
	if err != nil {
		return nil, err
	}
	key, err := readLimited(keyFile, maxConfigSize)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	switch {
	case err != nil:
		return nil, errs.New(errs.Invalid, "%s and %s: %s", certFile, keyFile, strings.TrimPrefix(err.Error(), "tls: "))
	case now.After(pair.Leaf.NotAfter):
		return nil, errs.New(errs.Invalid, "%s expired at %s; make a new one, for example with kumactl generate tls-certificate --type client", certFile, pair.Leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(pair.Leaf.NotBefore):
		return nil, errs.New(errs.Invalid, "%s is not valid before %s; check the clock of this machine", certFile, pair.Leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	return &pair, nil
}

// path joins path elements, each escaped.
func path(elements ...string) string {
	var b strings.Builder
	for _, e := range elements {
		b.WriteString("/" + url.PathEscape(e))
	}
	return b.String()
}

// do sends one request and returns the body of a successful answer. A status
// of 400 or above is a *problem.
func (c *client) do(ctx context.Context, method, path string, query url.Values, body []byte) (status int, answer []byte, err error) {
	if c.detour != nil && path != "/" {
		over, path, err := c.detour.to(ctx, c, path)
		if err != nil {
			return 0, nil, err
		}
		return over.do(ctx, method, path, query, body)
	}
	target := *c.base
	target.RawPath = ""
	escaped := strings.TrimSuffix(c.base.EscapedPath(), "/") + path
	if target.Path, err = url.PathUnescape(escaped); err != nil {
		return 0, nil, errs.New(errs.Invalid, "path %q: %w", path, err)
	}
	target.RawPath = escaped
	target.RawQuery = query.Encode()
	r, err := http.NewRequestWithContext(ctx, method, target.String(), bytes.NewReader(body))
	if err != nil {
		return 0, nil, fmt.Errorf("make a request: %w", err)
	}
	for k, v := range c.headers {
		r.Header[k] = v
	}
	r.Header.Set("Accept", "application/json")
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	start := c.app.now()
	resp, err := c.http.Do(r)
	if err != nil {
		return 0, nil, c.unreachable(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err = readAll(resp.Body, "the answer of "+c.base.String(), maxAnswer)
	c.app.log.Info("request", "method", method, "url", target.Redacted(), "status", resp.StatusCode, "bytes", len(answer), "took", c.app.now().Sub(start))
	if err != nil {
		return 0, nil, c.unreachable(err)
	}
	if resp.StatusCode >= http.StatusMultipleChoices {
		return resp.StatusCode, nil, readProblem(resp.StatusCode, answer, c.base.String())
	}
	return resp.StatusCode, answer, nil
}

// unreachable is a request that got no answer.
type unreachable struct {
	where string
	cause error
	mend  string
}

func (u *unreachable) Error() string {
	return "could not reach the control plane at " + u.where + ": " + u.cause.Error() + u.mend
}

func (u *unreachable) Unwrap() error { return u.cause }

// unreachable says why there was no answer and what to do.
func (c *client) unreachable(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	u := &unreachable{where: c.base.String(), cause: err}
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, context.Canceled):
	case errors.Is(err, syscall.ECONNREFUSED):
		u.mend = "\n  is it running? kumactl config control-planes list shows the address in use"
	case isTrust(err) && c.caFile == "":
		u.mend = "\n  " + pki.DescribeVerify(err, c.base.Hostname(), "the system's authorities") + "\n  name the CA that signed its certificate: kumactl config control-planes add --ca-cert-file FILE --overwrite …"
	case isTrust(err):
		u.mend = "\n  " + pki.DescribeVerify(err, c.base.Hostname(), c.caFile) + "\n  " + c.caFile + " is not the CA that signed its certificate, or the address is not in that certificate"
	case c.wanted.Load() || strings.Contains(err.Error(), "remote error: tls: certificate required"):
		u.mend = "\n  it wants a client certificate: kumactl config control-planes add --client-cert-file FILE --client-key-file FILE --overwrite …"
	case c.certFile != "" && (strings.Contains(err.Error(), "remote error: tls: ") || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)):
		u.mend = "\n  it may not take the client certificate " + c.certFile + ": does the control plane know its authority?"
	case errors.As(err, &timeout) && timeout.Timeout():
		u.mend = "\n  no answer in time; --api-timeout sets how long to wait"
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		u.mend = "\n  this port speaks plain HTTP: use http:// or the port of the HTTPS API (5682)"
	case strings.Contains(err.Error(), "malformed HTTP response"):
		u.mend = "\n  this port does not speak plain HTTP: use https:// or the port of the HTTP API (5681)"
	}
	return u
}

// isTrust reports whether the server's certificate was refused.
func isTrust(err error) bool {
	_, ok := errors.AsType[*tls.CertificateVerificationError](err)
	return ok
}

// An index is the answer of GET /.
type index struct {
	Product    string `json:"product"`
	Version    string `json:"version"`
	BasedOn    string `json:"basedOnKuma"`
	InstanceID string `json:"instanceId"`
	ClusterID  string `json:"clusterId"`
	// HTTPSPort is where the API is served with TLS, AdminPort where the admin
	// server of 0.7 is for other machines; 0 means that it does not say.
	HTTPSPort uint16 `json:"httpsPort"`
	AdminPort uint16 `json:"adminServerPort"`
	// DryRun: PUT understands "dry-run=true". A server that doesn't know it
	// would write.
	DryRun bool `json:"dryRun"`
}

// index asks who the control plane is.
func (c *client) index(ctx context.Context) (index, error) {
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	var i index
	_, body, err := c.do(ctx, http.MethodGet, "/", nil, nil)
	if err != nil {
		return i, err
	}
	if err := json.Unmarshal(body, &i); err != nil || i.Product == "" {
		return i, errs.New(errs.Invalid, "%s does not answer like a control plane's API", c.base)
	}
	return i, nil
}

// greet asks who the control plane is and warns where it does not fit this
// program. No answer is no reason to warn: the command itself will say so.
func (c *client) greet(ctx context.Context) {
	i, err := c.index(ctx)
	if err == nil {
		c.fits(i)
		return
	}
	c.app.log.Debug("the control plane's index can't be had", "error", err)
	if _, none := errors.AsType[*unreachable](err); !none {
		c.app.warn("unable to check the version of the control plane: %s", firstLine(err.Error()))
	}
}

// fits warns where the control plane does not fit this program.
func (c *client) fits(i index) {
	if i.Product != conf.Build().Product {
		c.app.warn("the control plane at %s is a %q, this is kumactl of %q", c.base, i.Product, conf.Build().Product)
	}
	if v := clientVersion(); !names.Compatible(v, i.Version) {
		c.app.warn("the control plane has version %s, which this kumactl (%s) may not understand; use a kumactl at most two minor versions apart", i.Version, v)
	}
}

// json asks and decodes the answer.
func (c *client) json(ctx context.Context, path string, query url.Values, into any) error {
	_, body, err := c.do(ctx, http.MethodGet, path, query, nil)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, into); err != nil {
		return errs.New(errs.Invalid, "the answer of %s%s is not the JSON that was expected: %w", c.base, path, err)
	}
	return nil
}

// fileExists reports whether the path leads to a file.
func fileExists(path string) bool {
	st, err := os.Stat(path)
	return err == nil && !st.IsDir()
}

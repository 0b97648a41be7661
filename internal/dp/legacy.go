package dp

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"kuma/internal/errs"
)

// maxSignpost is the largest answer of the API server that is read.
const maxSignpost = 2 << 20

// plain reports whether the control plane's address is the API server's on this
// machine, without TLS: as kuma-dp of Kuma 0.7 was told.
func (c *ControlPlane) plain() bool {
	u, err := url.Parse(c.URL)
	return err == nil && u.Scheme == "http" && loopback(u.Hostname())
}

// signpost asks the API server of this machine where its control plane's server
// for proxies is, and by whom that is verified, and goes there from then on. All
// that matters, the token first, is sent over TLS; what is plain is this
// question, and its answer never leaves the machine. What the user said of the
// control plane's authority stays.
func (c *Config) signpost(ctx context.Context) error {
	old := c.ControlPlane.URL
	c.Log.Warn("a deprecated form was used", "form", "--cp-address="+old, "instead", "--cp-address=https://HOST:5678 --ca-cert-file=FILE")
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, at string) (net.Conn, error) {
		conn, err := (&net.Dialer{Timeout: bootstrapTimeout}).DialContext(ctx, network, at)
		if err != nil {
			return nil, err
		}
		// A name that says localhost need not lead there.
		if to, ok := conn.RemoteAddr().(*net.TCPAddr); !ok || !to.IP.IsLoopback() {
			_ = conn.Close()
			return nil, fmt.Errorf("%s leads to %s, which is not this machine", at, conn.RemoteAddr())
		}
		return conn, nil
	}}
	client := &http.Client{Transport: transport, Timeout: bootstrapTimeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	defer client.CloseIdleConnections()
	pauses := backoff{limit: c.ControlPlane.RetryBackoff}
	deadline := time.Now().Add(c.ControlPlane.RetryMaxDuration)
	said := changes{log: c.Log}
	for {
		at, ca, err := readSignpost(ctx, client, old)
		if err == nil {
			c.ControlPlane.URL = at
			if c.ControlPlane.CACert == "" && c.ControlPlane.CACertFile == "" {
				c.ControlPlane.CACert = ca
			}
			c.Log.Info("the control plane's server for proxies", "control_plane", at)
			return nil
		}
		if ctx.Err() != nil || errs.Is(err, errs.Invalid) || time.Now().After(deadline) {
			return errs.New(errs.KindOf(err), "Failed to fetch Envoy bootstrap config. %w", err)
		}
		said.warn("the API server does not answer, trying again", err)
		sleep(ctx, pauses.pause())
	}
}

// readSignpost asks once. Errors are Invalid where asking again can't help.
func readSignpost(ctx context.Context, client *http.Client, cp string) (at, ca string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(cp, "/")+"/bootstrap", http.NoBody)
	if err != nil {
		return "", "", errs.New(errs.Invalid, "--cp-address: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", "", errs.New(errs.Unavailable, "ask the API server: %w", err)
	}
	defer resp.Body.Close()
	body, err := readAll(resp.Body, maxSignpost)
	if err != nil {
		return "", "", errs.New(errs.Unavailable, "read the API server's answer: %w", err)
	}
	if resp.StatusCode >= 500 {
		return "", "", errs.New(errs.Unavailable, "the API server answered with status %d", resp.StatusCode)
	}
	const mend = "use https:// and the port of the control plane's server for proxies (5678 by default) with --cp-address, and name its authority with --ca-cert-file"
	if resp.StatusCode != http.StatusOK {
		return "", "", errs.New(errs.Invalid, "the server at %s does not tell where proxies go (status %d); %s", cp, resp.StatusCode, mend)
	}
	var answer struct {
		URL    string `json:"url"`
		CACert string `json:"caCert"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return "", "", errs.New(errs.Invalid, "the answer of %s is not a control plane's: %w; %s", cp, err, mend)
	}
	if u, err := url.Parse(answer.URL); err != nil || u.Scheme != "https" || u.Host == "" {
		return "", "", errs.New(errs.Invalid, "the answer of %s is not a control plane's: %q is no https:// address; %s", cp, answer.URL, mend)
	}
	return answer.URL, answer.CACert, nil
}

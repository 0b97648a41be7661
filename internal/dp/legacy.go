package dp

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
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

// ownerPatience is how long a connection may take to be accepted: before, it has
// no owner.
const ownerPatience = 3 * time.Second

// owners tells which user holds the socket whose own address is local and whose
// peer is remote; socket.Owner is one.
type owners func(local, remote netip.AddrPort) (uid uint32, ok bool)

// vouch is an error unless the other end of a connection is held by root or by
// our own user: any other user of this machine can listen on a port that is
// free, and would be given the proxy's token.
func (o owners) vouch(ctx context.Context, conn net.Conn) error {
	const mend = "name the control plane and its authority instead: --cp-address=https://HOST:5678 --ca-cert-file=FILE"
	here, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return errs.New(errs.Internal, "the address of a connection: %w", err)
	}
	there, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return errs.New(errs.Internal, "the address of a connection: %w", err)
	}
	pause, end := time.Millisecond, time.Now().Add(ownerPatience)
	for {
		switch uid, ok := o(there, here); {
		case ok && (uid == 0 || uid == uint32(os.Getuid())):
			return nil
		case ok:
			return errs.New(errs.Invalid, "who listens there is user %d, neither root nor the user that kuma-dp runs as, and is not believed to be the control plane; %s", uid, mend)
		case time.Now().After(end):
			return errs.New(errs.Invalid, "it can't be told which user listens there, as where it is in another container, or on a system that is not Linux, and so it is not believed to be the control plane; %s", mend)
		}
		if !sleep(ctx, pause) {
			return ctx.Err()
		}
		pause = min(2*pause, 100*time.Millisecond)
	}
}

// signpost asks the API server of this machine where its control plane's server
// for proxies is, and by whom that is verified, and goes there from then on. All
// that matters, the token first, is sent over TLS; what is plain is this
// question, and its answer never leaves the machine. It is believed only of root
// and of our own user. What the user said of the control plane's authority
// stays.
func (c *Config) signpost(ctx context.Context, owner owners) error {
	old := c.ControlPlane.URL
	c.Log.Warn("a deprecated form was used", "form", "--cp-address="+old, "instead", "--cp-address=https://HOST:5678 --ca-cert-file=FILE")
	dial := func(ctx context.Context, network, at string) (net.Conn, error) {
		conn, err := (&net.Dialer{Timeout: bootstrapTimeout}).DialContext(ctx, network, at)
		if err != nil {
			return nil, err
		}
		// A name that says localhost need not lead there.
		if to, ok := conn.RemoteAddr().(*net.TCPAddr); !ok || !to.IP.IsLoopback() {
			_ = conn.Close()
			return nil, fmt.Errorf("%s leads to %s, which is not this machine", at, conn.RemoteAddr())
		}
		if err := owner.vouch(ctx, conn); err != nil {
			_ = conn.Close()
			return nil, err
		}
		return conn, nil
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: dial}
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
		if errs.Is(err, errs.Unavailable) && speaksTLS(ctx, dial, old) {
			err = errs.New(errs.Invalid, "there is TLS at this address: write --cp-address=%s, and name its authority with --ca-cert-file=FILE", strings.Replace(old, "http://", "https://", 1))
		}
		if ctx.Err() != nil || errs.Is(err, errs.Invalid) || time.Now().After(deadline) {
			return errs.New(errs.KindOf(err), "Failed to fetch Envoy bootstrap config. %w", err)
		}
		said.warn("the API server does not answer, trying again", err)
		sleep(ctx, pauses.pause())
	}
}

// speaksTLS reports whether the server of a URL without TLS speaks it all the
// same: that its certificate is not believed here says so too.
func speaksTLS(ctx context.Context, dial func(ctx context.Context, network, at string) (net.Conn, error), cp string) bool {
	u, err := url.Parse(cp)
	if err != nil || u.Port() == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := dial(ctx, "tcp", u.Host)
	if err != nil {
		return false
	}
	defer conn.Close()
	err = tls.Client(conn, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname()}).HandshakeContext(ctx)
	_, refused := errors.AsType[*tls.CertificateVerificationError](err)
	_, alert := errors.AsType[tls.AlertError](err)
	return err == nil || refused || alert
}

// readSignpost asks once. Errors are Invalid where asking again can't help.
func readSignpost(ctx context.Context, client *http.Client, cp string) (at, ca string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(cp, "/")+"/bootstrap", http.NoBody)
	if err != nil {
		return "", "", errs.New(errs.Invalid, "--cp-address: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		kind := errs.Unavailable
		if errs.Is(err, errs.Invalid) {
			kind = errs.Invalid
		}
		return "", "", errs.New(kind, "ask the API server: %w", err)
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

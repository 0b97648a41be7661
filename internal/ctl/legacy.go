package ctl

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"kuma/internal/errs"
)

// tokenLife is how long a token lives that was asked for as kumactl of Kuma 0.7
// did, without an end: there it had none.
const tokenLife = 10 * 365 * 24 * time.Hour

// A detour leads from an http:// address to the ports that speak TLS: for a
// context with a client certificate, which can't be shown without TLS. Kuma 0.7
// was configured so. Which ports these are is asked at the address itself,
// without TLS; the host is always the one that the user gave, and its
// certificate is verified, so that a forged answer leads nowhere.
type detour struct {
	app *app
	cp  controlPlane
	// api is the API with TLS, admin the admin server of 0.7; nil until they were
	// asked for, admin also where there is none.
	api, admin *client
}

// to returns where a request goes, and its path there. It asks plain for the
// ports the first time.
func (d *detour) to(ctx context.Context, plain *client, path string) (*client, string, error) {
	if d.api == nil && d.admin == nil {
		if err := d.find(ctx, plain); err != nil {
			return nil, "", err
		}
	}
	switch {
	case d.admin != nil && path == "/tokens/dataplane":
		return d.admin, "/tokens", nil
	case d.api == nil:
		return nil, "", errs.New(errs.Invalid, "the API of the control plane at %s is not served with TLS, without which the client certificate can't be shown; have it served (KUMA_API_SERVER_HTTPS_ENABLED=true)", plain.base)
	}
	return d.api, path, nil
}

func (d *detour) find(ctx context.Context, plain *client) error {
	i, err := plain.index(ctx)
	if err != nil {
		return err
	}
	if i.HTTPSPort == 0 && i.AdminPort == 0 {
		return errs.New(errs.Invalid, "the control plane at %s does not say where it speaks TLS, without which the client certificate can't be shown; add it again with its https:// address (port 5682) and --overwrite", plain.base)
	}
	for _, door := range []struct {
		port   uint16
		client **client
		path   string
	}{{i.HTTPSPort, &d.api, plain.base.EscapedPath()}, {i.AdminPort, &d.admin, ""}} {
		if door.port == 0 {
			continue
		}
		cp := d.cp
		u := url.URL{Scheme: "https", Host: net.JoinHostPort(plain.base.Hostname(), fmt.Sprint(door.port)), Path: door.path}
		cp.Coordinates.APIServer.URL = u.String()
		c, err := d.app.clientFor(cp)
		if err != nil {
			return err
		}
		*door.client = c
	}
	return nil
}

// try warns of what will keep requests from their way over TLS: an authority
// that is not known, most likely.
func (d *detour) try(ctx context.Context, plain *client) {
	if err := d.find(ctx, plain); err != nil {
		d.app.warn("%v", err)
		return
	}
	for _, c := range []*client{d.api, d.admin} {
		if c == nil {
			continue
		}
		if _, err := c.index(ctx); err != nil {
			// The admin server has no index; that it answers is enough.
			if _, none := errors.AsType[*unreachable](err); none {
				d.app.warn("%v", err)
			}
		}
	}
}

package dp

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	"sigs.k8s.io/yaml"

	"kuma/internal/errs"
)

// admin is Envoy's admin interface, by the address that its first
// configuration says.
type admin struct {
	network, address string
	client           *http.Client
}

// bootstrapAdmin is the little of Envoy's first configuration that kuma-dp has
// to know. Both spellings of protobuf's JSON form count.
type bootstrapAdmin struct {
	Admin struct {
		Address struct {
			Pipe struct {
				Path string `json:"path"`
			} `json:"pipe"`
			Socket      socketAddress `json:"socketAddress"`
			SocketSnake socketAddress `json:"socket_address"`
		} `json:"address"`
	} `json:"admin"`
}

type socketAddress struct {
	Address   string `json:"address"`
	Port      int    `json:"portValue"`
	PortSnake int    `json:"port_value"`
}

func newAdmin(bootstrap []byte) (*admin, error) {
	var b bootstrapAdmin
	if err := yaml.Unmarshal(bootstrap, &b); err != nil {
		return nil, errs.New(errs.Invalid, "read Envoy's configuration from the control plane: %w", err)
	}
	at := b.Admin.Address
	a := &admin{network: "unix", address: at.Pipe.Path}
	for _, s := range []socketAddress{at.Socket, at.SocketSnake} {
		if a.address == "" && s.Address != "" {
			a.network, a.address = "tcp", net.JoinHostPort(s.Address, strconv.Itoa(max(s.Port, s.PortSnake)))
		}
	}
	if a.address == "" {
		return nil, errs.New(errs.Invalid, "read Envoy's configuration from the control plane: it has no admin address")
	}
	a.client = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, a.network, a.address)
		},
		DisableCompression: true, MaxIdleConns: 2, IdleConnTimeout: 10 * time.Second,
	}}
	return a, nil
}

// ask sends a request to Envoy. The caller closes the answer's body.
func (a *admin) ask(ctx context.Context, method, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://envoy"+path, nil)
	if err != nil {
		return nil, err
	}
	return a.client.Do(req)
}

// post asks Envoy to do something.
func (a *admin) post(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	resp, err := a.ask(ctx, http.MethodPost, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("POST %s: status %d", path, resp.StatusCode)
	}
	return nil
}

// page is an answer of Envoy's that fits into memory.
type page struct {
	status int
	header http.Header
	body   []byte
}

// ready asks whether Envoy takes traffic.
func (a *admin) ready(ctx context.Context) (page, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	resp, err := a.ask(ctx, http.MethodGet, "/ready")
	if err != nil {
		return page{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	return page{resp.StatusCode, resp.Header, body}, err
}

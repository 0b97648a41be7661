package auth

import (
	"crypto/x509"
	"log/slog"
	"net/http"
	"os"
	"strings"

	"kuma/internal/errs"
	"kuma/internal/socket"
	"kuma/internal/token"
)

// UsersConfig is how callers of the API are authenticated (key
// "apiServer.authn").
type UsersConfig struct {
	// Type is "tokens", or "adminClientCerts": then who shows a certificate that
	// apiServer.auth.clientCertsDir vouches for is the administrator, and user
	// tokens count for nothing.
	Type string `json:"type"`
	// LocalhostIsAdmin makes who calls from this machine, as the control
	// plane's own user or as root and without a credential, the administrator.
	LocalhostIsAdmin bool `json:"localhostIsAdmin"`
	// Tokens is about user tokens.
	Tokens UserTokensConfig `json:"tokens"`
}

// UserTokensConfig is about user tokens.
type UserTokensConfig struct {
	// BootstrapAdminToken has the control plane make the GlobalSecret
	// admin-user-token where there is none.
	BootstrapAdminToken bool `json:"bootstrapAdminToken"`
	// EnableIssuer lets administrators have tokens issued by the API.
	EnableIssuer bool `json:"enableIssuer"`
	// Validator says which keys verify tokens.
	Validator ValidatorConfig `json:"validator"`
}

// DefaultUsers is the contract's.
func DefaultUsers() UsersConfig {
	return UsersConfig{Type: "tokens", LocalhostIsAdmin: true, Tokens: UserTokensConfig{
		BootstrapAdminToken: true, EnableIssuer: true, Validator: ValidatorConfig{UseSecrets: true, PublicKeys: []PublicKey{}},
	}}
}

// AuthenticatorConfig is what an Authenticator needs.
type AuthenticatorConfig struct {
	// Users is the configuration.
	Users UsersConfig
	// Secrets is where keys and revocations are.
	Secrets Secrets
	// ClientCAs are the authorities of client certificates, as they are now, for
	// the type "adminClientCerts". Nil means that the handshake's judgement is
	// enough.
	ClientCAs func() *x509.CertPool
	// Hosts are names of this machine that its administrator chose, for which a
	// local request may be as it may be for localhost.
	Hosts []string
	// Owner tells who owns a socket; nil means socket.Owner.
	Owner SocketOwner
	// Hint is added to the error of a token that does not verify.
	Hint string
	// Log may be nil.
	Log *slog.Logger
}

// Authenticator tells who calls the API.
type Authenticator struct {
	// users is nil where certificates count instead.
	users            *token.Verifier
	clientCAs        func() *x509.CertPool
	localhostIsAdmin bool
	hosts            []string
	owner            SocketOwner
	uid              uint32
}

// NewAuthenticator makes an Authenticator. Errors are Invalid: a configured
// key that can't be read.
func NewAuthenticator(c AuthenticatorConfig) (*Authenticator, error) {
	switch c.Users.Type {
	case "", UserTokens, AdminClientCerts:
	default:
		return nil, errs.New(errs.Invalid, "apiServer.authn.type: there is not implementation of authn named %s; use %q or %q (KUMA_API_SERVER_AUTHN_TYPE)", c.Users.Type, UserTokens, AdminClientCerts)
	}
	keys, err := userKeys(c.Users.Tokens.Validator, c.Secrets, newMaterial(), logger(c.Log))
	if err != nil {
		return nil, err
	}
	owner := c.Owner
	if owner == nil {
		owner = socket.Owner
	}
	a := &Authenticator{
		localhostIsAdmin: c.Users.LocalhostIsAdmin, hosts: c.Hosts, clientCAs: c.ClientCAs, owner: owner, uid: uint32(os.Getuid()),
	}
	if c.Users.Type != AdminClientCerts {
		a.users = token.New(token.Config{Keys: keys, Hint: c.Hint})
	}
	return a, nil
}

func userKeys(v ValidatorConfig, secrets Secrets, m *material, log *slog.Logger) (*keySource, error) {
	static, err := parsePublicKeys("apiServer.authn.tokens.validator", v.PublicKeys)
	if err != nil {
		return nil, err
	}
	return &keySource{
		secrets: secrets, material: m, static: static, useSecrets: v.UseSecrets,
		prefix: token.UserKeyPrefix, revocations: []place{{"", token.UserRevocations}}, log: log,
	}, nil
}

func logger(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}

// HTTP tells who sent a request: the owner of its user token (of its client
// certificate, where those count), or the administrator at this machine, or
// nobody. A credential that does not verify is errs.Unauthenticated; it never
// falls back to being local.
func (a *Authenticator) HTTP(r *http.Request) (Caller, error) {
	if a.users == nil {
		if c, ok, err := a.certificate(r); ok || err != nil {
			return c, err
		}
	}
	values := r.Header["Authorization"]
	switch len(values) {
	case 0:
		if a.localAdmin(r) {
			return Admin(), nil
		}
		return Anonymous(), nil
	case 1:
	default:
		return Caller{}, errs.New(errs.Unauthenticated, "the request has %d authorization headers", len(values))
	}
	text, ok := strings.CutPrefix(values[0], "Bearer ")
	if !ok {
		// Another scheme is nobody's credential here, and still not local.
		return Anonymous(), nil
	}
	if a.users == nil {
		return Caller{}, errs.New(errs.Unauthenticated, "user tokens count for nothing here (apiServer.authn.type is %s): show a client certificate", AdminClientCerts)
	}
	u, err := a.users.User(r.Context(), strings.TrimSpace(text))
	if err != nil {
		return Caller{}, err
	}
	return User(u), nil
}

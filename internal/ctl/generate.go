package ctl

import (
	"context"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kuma/internal/errs"
	"kuma/internal/token"
)

func (a *app) generateCommand() *cobra.Command {
	return group("generate", "Make tokens, keys, certificates and a configuration for Prometheus",
		a.dataplaneTokenCommand(),
		a.zoneTokenCommand(),
		a.userTokenCommand(),
		a.signingKeyCommand(),
		a.publicKeyCommand(),
		a.tlsCertificateCommand(),
		a.prometheusConfigCommand(),
	)
}

// tokenFlags are those that all tokens have.
type tokenFlags struct {
	validFor       time.Duration
	keyPath, keyID string
}

func (t *tokenFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.DurationVar(&t.validFor, "valid-for", 0, "how long the token is valid, such as 24h (required)")
	f.StringVar(&t.keyPath, "signing-key-path", "", "sign here with the PEM private key in this file, and ask no control plane")
	f.StringVar(&t.keyID, "kid", "", "the number of that key, as the control plane knows it")
	must(c.MarkFlagRequired("valid-for"))
}

func (t *tokenFlags) check() error {
	switch {
	case t.validFor == 0:
		return errs.New(errs.Invalid, "You must set a token validFor value")
	case t.validFor < 0:
		return errs.New(errs.Invalid, "--valid-for must not be negative")
	case t.keyPath != "" && t.keyID == "":
		return errs.New(errs.Invalid, "--kid is required when --signing-key-path is used")
	case t.keyPath == "" && t.keyID != "":
		return errs.New(errs.Invalid, "--kid cannot be used without --signing-key-path")
	}
	return nil
}

// sign makes a token here and prints it, without a newline.
func (t *tokenFlags) sign(a *app, mint func(*token.Signer) (string, error)) error {
	key, err := readSigningKey(t.keyPath)
	if err != nil {
		return err
	}
	s, err := token.NewSigner(t.keyID, key)
	if err != nil {
		return err
	}
	text, err := mint(s)
	if err != nil {
		return fmt.Errorf("failed to generate a token: %w", err)
	}
	return a.write([]byte(text))
}

// issue asks the control plane for a token and prints it, without a newline.
func (a *app) issue(ctx context.Context, path string, request any) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	c.greet(ctx)
	body, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("ask for a token: %w", err)
	}
	_, token, err := c.do(ctx, http.MethodPost, path, nil, body)
	if err != nil {
		if p := notFound(err); p != nil && !p.routed() {
			return errs.New(errs.NotFound, "failed to generate a token: the control plane at %s does not issue tokens of this sort", c.base)
		}
		return fmt.Errorf("failed to generate a token: %w", err)
	}
	return a.write([]byte(strings.TrimSpace(string(token))))
}

func (a *app) dataplaneTokenCommand() *cobra.Command {
	var t tokenFlags
	var name, meshName, proxyType, workload string
	var tagPairs []string
	c := &cobra.Command{
		Use:     "dataplane-token",
		Short:   "Make a token with which a proxy logs in",
		Example: "  kumactl generate dataplane-token --name web-1 --tag kuma.io/service=web --valid-for 24h > web-1.token",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if c.Flags().Changed("type") {
				a.warn("--type is deprecated; use --proxy-type")
			}
			if !c.Flags().Changed("valid-for") {
				// Kuma 0.7's command, whose tokens had no end, is told by its --type.
				if !c.Flags().Changed("type") {
					return errs.New(errs.Invalid, `required flag(s) "valid-for" not set`)
				}
				t.validFor = tokenLife
				a.warn("a token without --valid-for is deprecated; this one is valid for ten years: %s", t.validFor)
			}
			if err := t.check(); err != nil {
				return err
			}
			if !slices.Contains([]string{"", "dataplane", "ingress", "egress"}, proxyType) {
				return errs.New(errs.Invalid, "--proxy-type %q: must be dataplane, ingress or egress", proxyType)
			}
			tags, err := parseTags(tagPairs)
			if err != nil {
				return err
			}
			meshName, err := a.tokenMesh(meshName, t.keyPath != "")
			if err != nil {
				return err
			}
			if t.keyPath != "" {
				return t.sign(a, func(s *token.Signer) (string, error) {
					return s.Dataplane(token.DataplaneClaims{Name: name, Mesh: meshName, Tags: tags, Type: proxyType, Workload: workload}, t.validFor)
				})
			}
			return a.issue(c.Context(), "/tokens/dataplane", map[string]any{
				"name": name, "mesh": meshName, "tags": tags, "type": proxyType, "workload": workload, "validFor": t.validFor.String(),
			})
		},
	}
	f := c.Flags()
	f.StringVar(&name, "name", "", "name of the Dataplane; without it the token fits any name")
	f.StringVarP(&meshName, "mesh", "m", "", `mesh of the Dataplane (default the context's, or "default")`)
	f.StringVar(&proxyType, "proxy-type", "", "sort of proxy: dataplane, ingress or egress")
	choices(c, "proxy-type", "dataplane", "ingress", "egress")
	f.StringVar(&proxyType, "type", "", "older name of --proxy-type")
	// Not MarkDeprecated: that would say so on standard output, which is the
	// token's alone.
	must(f.MarkHidden("type"))
	f.StringArrayVar(&tagPairs, "tag", nil, "tag KEY=VALUE[,VALUE] that the Dataplane must have; may be repeated")
	f.StringVar(&workload, "workload", "", "the Dataplane's kuma.io/workload label")
	t.add(c)
	delete(f.Lookup("valid-for").Annotations, cobra.BashCompOneRequiredFlag)
	return c
}

// tokenMesh is the mesh that a token is for. Offline a configuration that
// can't be read does not matter.
func (a *app) tokenMesh(flag string, offline bool) (string, error) {
	if flag != "" {
		return flag, nil
	}
	ctx, _, err := a.active()
	switch {
	case err != nil && !offline:
		return "", err
	case err == nil && ctx.Defaults != nil && ctx.Defaults.Mesh != "":
		return ctx.Defaults.Mesh, nil
	}
	return defaultMesh, nil
}

func (a *app) zoneTokenCommand() *cobra.Command {
	var t tokenFlags
	var zone string
	var scope []string
	all := []string{token.ScopeIngress, token.ScopeEgress}
	c := &cobra.Command{
		Use:     "zone-token",
		Short:   "Make a token with which a zone's proxies log in",
		Example: "  kumactl generate zone-token --zone east --valid-for 720h",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := t.check(); err != nil {
				return err
			}
			if zone == "" {
				return errs.New(errs.Invalid, "--zone must not be empty")
			}
			for _, s := range scope {
				if !slices.Contains(all, s) {
					return errs.New(errs.Invalid, "--scope %q: must be %s", s, strings.Join(all, " or "))
				}
			}
			if t.keyPath != "" {
				return t.sign(a, func(s *token.Signer) (string, error) {
					return s.Zone(token.ZoneClaims{Zone: zone, Scope: scope}, t.validFor)
				})
			}
			return a.issue(c.Context(), "/tokens/zone", map[string]any{"zone": zone, "scope": scope, "validFor": t.validFor.String()})
		},
	}
	f := c.Flags()
	f.StringVar(&zone, "zone", "", "name of the zone (required)")
	f.StringSliceVar(&scope, "scope", all, "what the token is for: ingress, egress")
	must(c.MarkFlagRequired("zone"))
	t.add(c)
	return c
}

func (a *app) userTokenCommand() *cobra.Command {
	var t tokenFlags
	var name string
	var groups []string
	c := &cobra.Command{
		Use:     "user-token",
		Short:   "Make a token with which a user logs in to the API",
		Example: "  kumactl generate user-token --name jane --group mesh-system:admin --valid-for 24h",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := t.check(); err != nil {
				return err
			}
			if name == "" {
				return errs.New(errs.Invalid, "--name must not be empty")
			}
			if t.keyPath != "" {
				return t.sign(a, func(s *token.Signer) (string, error) {
					return s.User(token.UserClaims{Name: name, Groups: groups}, t.validFor)
				})
			}
			return a.issue(c.Context(), "/tokens/user", map[string]any{"name": name, "groups": groups, "validFor": t.validFor.String()})
		},
	}
	f := c.Flags()
	f.StringVar(&name, "name", "", "name of the user (required)")
	f.StringSliceVar(&groups, "group", nil, "group of the user; may be repeated")
	must(c.MarkFlagRequired("name"))
	t.add(c)
	return c
}

func (a *app) signingKeyCommand() *cobra.Command {
	var format string
	c := &cobra.Command{
		Use:   "signing-key",
		Short: "Make a private key to sign tokens with",
		Long: "Make a private key to sign tokens with.\n\nWith --format pem-base64 it is ready for the data of a Secret (dataplane-token-signing-key-MESH-N) or a GlobalSecret\n" +
			"(user-token-signing-key-N, zone-token-signing-key-N). N is a plain number; the highest one signs.",
		Example: "  kumactl generate signing-key --format pem > key.pem",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if format != "pem" && format != "pem-base64" {
				return errs.New(errs.Invalid, "unknown format %q: must be pem or pem-base64", format)
			}
			key, err := token.NewSigningKey()
			if err != nil {
				return err
			}
			if format == "pem-base64" {
				key = []byte(base64.StdEncoding.EncodeToString(key))
			}
			return a.write(key)
		},
	}
	c.Flags().StringVar(&format, "format", "pem-base64", "form of the key: pem-base64 or pem")
	return c
}

func (a *app) publicKeyCommand() *cobra.Command {
	var keyPath string
	c := &cobra.Command{
		Use:     "public-key",
		Short:   "Print the public half of a signing key, with which tokens are verified",
		Example: "  kumactl generate public-key --signing-key-path key.pem > key.pub.pem",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			key, err := readSigningKey(keyPath)
			if err != nil {
				return err
			}
			return a.write(token.PublicPEM(&key.PublicKey))
		},
	}
	c.Flags().StringVar(&keyPath, "signing-key-path", "", "file with the private key, PEM (required)")
	must(c.MarkFlagRequired("signing-key-path"))
	return c
}

func readSigningKey(path string) (*rsa.PrivateKey, error) {
	raw, err := readLimited(path, maxConfigSize)
	if err != nil {
		return nil, fmt.Errorf("read the signing key: %w", err)
	}
	key, err := token.ParseSigningKey(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

// parseTags reads KEY=VALUE[,VALUE] pairs; the values of a key add up.
func parseTags(pairs []string) (map[string][]string, error) {
	if len(pairs) == 0 {
		return nil, nil
	}
	out := map[string][]string{}
	for _, p := range pairs {
		k, v, ok := strings.Cut(p, "=")
		if !ok || k == "" || v == "" {
			return nil, errs.New(errs.Invalid, "--tag %q: must be KEY=VALUE[,VALUE], such as kuma.io/service=web", p)
		}
		for value := range strings.SplitSeq(v, ",") {
			if value = strings.TrimSpace(value); value != "" && !slices.Contains(out[k], value) {
				out[k] = append(out[k], value)
			}
		}
	}
	return out, nil
}

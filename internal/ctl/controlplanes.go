package ctl

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/net/http/httpguts"
	"sigs.k8s.io/yaml"

	"kuma/internal/conf"
	"kuma/internal/errs"
)

func (a *app) configCommand() *cobra.Command {
	return group("config", "Manage kumactl's own configuration",
		group("control-planes", "Manage the control planes that kumactl knows",
			a.addCommand(),
			&cobra.Command{
				Use: "list", Short: "List the known control planes", Args: cobra.NoArgs,
				RunE: func(*cobra.Command, []string) error { return a.listControlPlanes() },
			},
			a.byNameCommand("remove", "Forget a control plane", a.removeControlPlane),
			a.byNameCommand("switch", "Use another control plane from now on", a.switchControlPlane),
		),
		a.viewCommand(),
	)
}

// byNameCommand is a command whose only flag is --name.
func (a *app) byNameCommand(use, short string, run func(name string) error) *cobra.Command {
	var name string
	c := &cobra.Command{
		Use: use, Short: short, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return run(name) },
	}
	c.Flags().StringVar(&name, "name", "", "name of the control plane (required)")
	must(c.MarkFlagRequired("name"))
	return c
}

func (a *app) addCommand() *cobra.Command {
	var cp controlPlane
	var headers, authConf map[string]string
	var overwrite, skipCheck bool
	var oldCert, oldKey string
	api := &cp.Coordinates.APIServer
	c := &cobra.Command{
		Use:   "add",
		Short: "Add a control plane and use it from now on",
		Example: "  kumactl config control-planes add --name prod --address https://cp.example:5682 \\\n" +
			"    --ca-cert-file ca.crt --auth-type tokens --auth-conf token=$(cat admin.token)",
		Args: onlyFlags,
		RunE: func(c *cobra.Command, _ []string) error {
			for _, old := range []struct {
				name, today string
				value       string
				into        *string
			}{{"admin-client-cert", "client-cert-file", oldCert, &api.ClientCertFile}, {"admin-client-key", "client-key-file", oldKey, &api.ClientKeyFile}} {
				switch {
				case !c.Flags().Changed(old.name):
					continue
				case c.Flags().Changed(old.today):
					return errs.New(errs.Invalid, "--%s is an older name of --%s; give one of them", old.name, old.today)
				}
				a.warn("--%s is deprecated; use --%s", old.name, old.today)
				*old.into = old.value
			}
			for _, k := range sortedKeys(headers) {
				api.Headers = append(api.Headers, header{k, headers[k]})
			}
			if len(authConf) > 0 {
				api.AuthConf = authConf
			}
			return a.addControlPlane(c.Context(), cp, overwrite, skipCheck)
		},
	}
	f := c.Flags()
	f.StringVar(&cp.Name, "name", "", "name for the control plane (required)")
	f.StringVar(&api.URL, "address", "", "URL of its API, such as https://cp.example:5682 (required)")
	f.StringVar(&api.CACertFile, "ca-cert-file", "", "file with the CA that its certificate is verified with (default the system's)")
	f.StringVar(&api.ClientCertFile, "client-cert-file", "", "file with the certificate to show to the control plane")
	f.StringVar(&api.ClientKeyFile, "client-key-file", "", "file with that certificate's key")
	f.StringVar(&oldCert, "admin-client-cert", "", "older name of --client-cert-file")
	f.StringVar(&oldKey, "admin-client-key", "", "older name of --client-key-file")
	must(f.MarkHidden("admin-client-cert"))
	must(f.MarkHidden("admin-client-key"))
	f.BoolVar(&api.SkipVerify, "skip-verify", false, "do not verify the control plane's certificate: anyone on the way can read and change what is sent")
	f.StringToStringVar(&headers, "headers", nil, "headers NAME=VALUE for each request")
	f.StringVar(&api.AuthType, "auth-type", "", "how to log in: tokens")
	f.StringToStringVar(&authConf, "auth-conf", nil, "for --auth-type tokens: token=TOKEN")
	f.BoolVar(&overwrite, "overwrite", false, "replace a control plane of that name")
	f.BoolVar(&skipCheck, "skip-check", false, "do not try to reach it")
	must(c.MarkFlagRequired("name"))
	must(c.MarkFlagRequired("address"))
	return c
}

func (a *app) addControlPlane(ctx context.Context, cp controlPlane, overwrite, skipCheck bool) error {
	s, err := a.loadSettings(true)
	if err != nil {
		return err
	}
	api := cp.Coordinates.APIServer
	if cp.Name == "" {
		return errs.New(errs.Invalid, "--name must not be empty")
	}
	base, err := parseAddress(api.URL)
	if err != nil {
		return err
	}
	if err := checkAuth(api); err != nil {
		return err
	}
	if err := checkHeaders(api.Headers); err != nil {
		return err
	}
	// The files' paths are kept: kumactl may be called elsewhere next time.
	for _, f := range []*string{&api.CACertFile, &api.ClientCertFile, &api.ClientKeyFile} {
		if *f == "" {
			continue
		}
		if *f, err = filepath.Abs(*f); err != nil {
			return err
		}
	}
	cp.Coordinates.APIServer = api
	if _, err := tlsConfig(api, a.now()); err != nil {
		return err
	}
	switch {
	case base.Scheme == "http" && api.ClientCertFile == "" && (api.CACertFile != "" || api.SkipVerify):
		a.warn("%s is without TLS, so no certificate is verified; use the https:// address of its API (port 5682)", base)
	case base.Scheme == "https" && api.SkipVerify && skipCheck:
		a.warn(notVerified, base)
	}
	if base.Scheme == "http" && api.ClientCertFile != "" {
		a.warn("a client certificate can't be shown without TLS: requests will go to the ports of %s that speak it; use the https:// address of its API (port 5682)", base)
	} else if base.Scheme == "http" && api.AuthType != "" && !loopback(base.Hostname()) {
		a.warn("the token will be sent without encryption to %s; use the https:// address of its API (port 5682)", base)
	}
	if !overwrite {
		if s.controlPlane(cp.Name) != nil {
			return errs.New(errs.Conflict, "Control Plane with name %q already exists. Use --overwrite to replace an existing one.", cp.Name)
		}
		if s.context(cp.Name) != nil {
			return errs.New(errs.Conflict, "Context with name %q already exists", cp.Name)
		}
	}
	if !skipCheck {
		if err := a.reach(ctx, cp); err != nil {
			return err
		}
	}
	if old := s.controlPlane(cp.Name); old != nil {
		*old = cp
	} else {
		s.ControlPlanes = append(s.ControlPlanes, cp)
	}
	if old := s.context(cp.Name); old != nil {
		old.ControlPlane = cp.Name
	} else {
		s.Contexts = append(s.Contexts, contextEntry{Name: cp.Name, ControlPlane: cp.Name})
	}
	s.CurrentContext = cp.Name
	if err := a.saveSettings(s); err != nil {
		return err
	}
	return a.print("added Control Plane %q\nswitched active Control Plane to %q\n", cp.Name, cp.Name)
}

func checkAuth(api apiServer) error {
	switch {
	case api.AuthType == "" && len(api.AuthConf) > 0:
		return errs.New(errs.Invalid, "--auth-conf needs --auth-type, such as --auth-type tokens")
	case api.AuthType == "":
		return nil
	case api.AuthType != "tokens":
		return errs.New(errs.Invalid, "authentication plugin of type %q is not found; known: tokens", api.AuthType)
	case api.AuthConf["token"] == "" || len(api.AuthConf) > 1:
		return errs.New(errs.Invalid, "--auth-conf is not valid: provide token=YOUR_TOKEN")
	}
	return nil
}

// checkHeaders refuses what can't be sent.
func checkHeaders(headers []header) error {
	for _, h := range headers {
		switch {
		case !httpguts.ValidHeaderFieldName(h.Key):
			return errs.New(errs.Invalid, "--headers: %q is not a header's name; give NAME=VALUE", h.Key)
		case !httpguts.ValidHeaderFieldValue(h.Value):
			return errs.New(errs.Invalid, "--headers: the value of %q holds characters that a header can't have", h.Key)
		}
	}
	return nil
}

// loopback reports whether a host is this machine.
func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// reach tells whether a control plane of this product answers.
func (a *app) reach(ctx context.Context, cp controlPlane) error {
	c, err := a.clientFor(cp)
	if err != nil {
		return err
	}
	i, err := c.index(ctx)
	if err != nil {
		return fmt.Errorf("could not connect to the Control Plane API Server: %w\n  --skip-check adds it all the same", err)
	}
	if i.Product != conf.Build().Product {
		return errs.New(errs.Invalid, "this kumactl is for %q, but %s is a control plane of %q", conf.Build().Product, c.base, i.Product)
	}
	if c.detour != nil {
		c.detour.try(ctx, c)
	}
	return nil
}

func (a *app) listControlPlanes() error {
	s, err := a.loadSettings(false)
	if err != nil {
		return err
	}
	rows := [][]string{{"ACTIVE", "NAME", "ADDRESS"}}
	current := s.CurrentContext
	if a.context != "" {
		current = a.context
	}
	for _, cp := range s.ControlPlanes {
		active := ""
		if c := s.context(current); c != nil && c.ControlPlane == cp.Name {
			active = "*"
		}
		rows = append(rows, []string{active, cp.Name, cp.Coordinates.APIServer.URL})
	}
	return writeTable(a.stdout, rows)
}

func (a *app) removeControlPlane(name string) error {
	s, err := a.loadSettings(false)
	if err != nil {
		return err
	}
	if s.controlPlane(name) == nil {
		return s.noControlPlane(name)
	}
	s.ControlPlanes = slices.DeleteFunc(s.ControlPlanes, func(c controlPlane) bool { return c.Name == name })
	s.Contexts = slices.DeleteFunc(s.Contexts, func(c contextEntry) bool { return c.ControlPlane == name })
	if s.context(s.CurrentContext) == nil {
		s.CurrentContext = ""
	}
	if err := a.saveSettings(s); err != nil {
		return err
	}
	if err := a.print("removed Control Plane %q\n", name); err != nil {
		return err
	}
	if s.CurrentContext == "" {
		a.warn("no control plane is active now; choose one with kumactl config control-planes switch --name NAME")
	}
	return nil
}

func (a *app) switchControlPlane(name string) error {
	s, err := a.loadSettings(false)
	if err != nil {
		return err
	}
	if s.context(name) == nil {
		return s.noControlPlane(name)
	}
	s.CurrentContext = name
	if err := a.saveSettings(s); err != nil {
		return err
	}
	return a.print("switched active Control Plane to %q\n", name)
}

// noControlPlane names the nearest control plane, or all.
func (s *settings) noControlPlane(name string) error {
	var known []string
	for _, c := range s.ControlPlanes {
		known = append(known, c.Name)
	}
	return errs.New(errs.NotFound, "there is no Control Plane with name %q%s", name, suggestion(name, known))
}

// masked stands for a secret in what is shown.
const masked = "*****"

func (a *app) viewCommand() *cobra.Command {
	var secrets bool
	c := &cobra.Command{
		Use:   "view",
		Short: "Show kumactl's configuration",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			s, err := a.loadSettings(false)
			if err != nil {
				return err
			}
			if !secrets {
				s.mask()
			}
			raw, err := yaml.Marshal(s)
			if err != nil {
				return fmt.Errorf("write the result: %w", err)
			}
			return a.write(raw)
		},
	}
	c.Flags().BoolVar(&secrets, "show-secrets", false, "show tokens and headers in clear")
	return c
}

// mask hides the values that log a user in.
func (s *settings) mask() {
	for i := range s.ControlPlanes {
		api := &s.ControlPlanes[i].Coordinates.APIServer
		for k := range api.AuthConf {
			api.AuthConf[k] = masked
		}
		for j := range api.Headers {
			api.Headers[j].Value = masked
		}
	}
}

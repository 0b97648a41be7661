package ctl

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kuma/internal/errs"
)

func (a *app) tlsCommand() *cobra.Command {
	return group("tls", "Show how the links of the mesh are encrypted and authenticated", a.tlsReportCommand())
}

func (a *app) tlsReportCommand() *cobra.Command {
	var meshName, output string
	var check bool
	c := &cobra.Command{
		Use:   "report",
		Short: "Show every link: its protocol, key exchange, certificates, and what is not as it should be",
		Long: "Show every link to this control plane, and what proxies count of connections between them: protocol, key exchange, cipher, certificates,\n" +
			"by what the peer is verified, and what is not as it should be, with what mends it. For administrators.\n\n" +
			"With --check the exit code is 1 if there is a finding that is critical or a warning.",
		Example: "  kumactl tls report --check",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			return a.tlsReport(c.Context(), meshName, output, check)
		},
	}
	f := c.Flags()
	f.StringVarP(&meshName, "mesh", "m", "", "show only the proxies of this mesh (default all)")
	f.StringVarP(&output, "output", "o", "table", "output format: table, yaml or json")
	choices(c, "output", "table", "yaml", "json")
	f.BoolVar(&check, "check", false, "fail if something is not as it should be")
	return c
}

// tlsReport is what GET /tls-report answers, as far as the tables need it.
type tlsReport struct {
	Instance string
	Store    string
	Database []struct {
		Address, Name, User, Version, Group, Cipher, VerifiedBy string
		Connections                                             int
		Certificate                                             *tlsCertificate
	}
	Servers []struct {
		Name, Address, MinVersion, ClientCertificates string
		TLS                                           bool
		Certificate                                   *tlsCertificate
	}
	Links []struct {
		Kind, Peer, Server, Remote, Version, Group, Cipher, VerifiedBy string
		Streams                                                        []string
		Since                                                          time.Time
		Certificate, ClientCertificate                                 *tlsCertificate
	}
	LinksLeftOut int
	Envoys       []struct {
		Mesh, Proxy, VerifiedBy, Error string
		Certificate                    *tlsCertificate
		Versions, Groups, Ciphers      map[string]uint64
	}
	EnvoysLeftOut int
	Certificates  []tlsCertificate
	Findings      []struct {
		Severity, Message, Mend string
		About                   []string
		Count                   int
	}
}

type tlsCertificate struct {
	Name, File, Subject, Issuer string
	NotAfter                    time.Time
}

func (a *app) tlsReport(ctx context.Context, meshName, output string, check bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	c.greet(ctx)
	query := url.Values{}
	if meshName != "" {
		query.Set("mesh", meshName)
	}
	_, body, err := c.do(ctx, http.MethodGet, "/tls-report", query, nil)
	if p := notFound(err); p != nil {
		if p.routed() && meshName != "" {
			return errs.New(errs.NotFound, "there is no mesh with name %q (kumactl get meshes lists them)", meshName)
		}
		return errs.New(errs.NotFound, "the control plane at %s makes no TLS report", c.base)
	}
	if err != nil {
		return err
	}
	var r tlsReport
	if err := json.Unmarshal(body, &r); err != nil {
		return errs.New(errs.Invalid, "the answer of %s/tls-report is not the JSON that was expected: %w", c.base, err)
	}
	if output == "table" {
		err = a.tlsTables(&r)
	} else {
		err = a.writeAs(output, body)
	}
	if err != nil || !check {
		return err
	}
	bad := 0
	for _, f := range r.Findings {
		if f.Severity != "note" {
			bad++
		}
	}
	if bad > 0 {
		return errs.New(errs.Invalid, "%s", counted(bad, "finding is not as it should be", "findings are not as they should be"))
	}
	return nil
}

// tlsTables prints the report as tables, each with its title.
func (a *app) tlsTables(r *tlsReport) error {
	now := a.now()
	table := func(title string, leftOut int, header []string, rows [][]string) error {
		if err := a.print("%s\n", title); err != nil {
			return err
		}
		if len(rows) == 0 {
			return a.print("none\n\n")
		}
		if err := writeTable(a.stdout, append([][]string{header}, rows...)); err != nil {
			return err
		}
		if leftOut > 0 {
			return a.print("and %d more\n\n", leftOut)
		}
		return a.print("\n")
	}
	var rows [][]string
	for _, s := range r.Servers {
		protocol := "no TLS"
		if s.TLS {
			protocol = s.MinVersion + " and newer"
		}
		rows = append(rows, []string{s.Name, s.Address, protocol, dash(s.ClientCertificates), s.Certificate.subject(), s.Certificate.issuer(), s.Certificate.end(now)})
	}
	reached := ", not reached over a network"
	if len(r.Database) > 0 {
		reached = ""
	}
	if err := table("Servers of "+printable(r.Instance)+" (store: "+printable(r.Store)+reached+")", 0,
		[]string{"NAME", "ADDRESS", "PROTOCOL", "CLIENT CERTIFICATES", "CERTIFICATE", "ISSUER", "ENDS"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, d := range r.Database {
		version := d.Version
		switch {
		case d.Connections == 0:
			version = "none is open"
		case version == "":
			version = "no TLS"
		}
		rows = append(rows, []string{
			d.Name + " as " + d.User, d.Address, strconv.Itoa(d.Connections), version, dash(d.Group), dash(d.Cipher), d.Certificate.subject(), d.Certificate.issuer(), d.Certificate.end(now), d.VerifiedBy,
		})
	}
	if len(rows) > 0 {
		if err := table("Connections to the store", 0,
			[]string{"DATABASE", "ADDRESS", "OPEN", "PROTOCOL", "KEY EXCHANGE", "CIPHER", "CERTIFICATE", "ISSUER", "ENDS", "VERIFIED BY"}, rows); err != nil {
			return err
		}
	}
	rows = nil
	for _, l := range r.Links {
		who := l.Kind
		if l.Peer != "" {
			who += " " + l.Peer
		}
		if len(l.Streams) > 0 {
			who += " (" + strings.Join(l.Streams, ", ") + ")"
		}
		version := l.Version
		if version == "" {
			version = "no TLS"
		}
		rows = append(rows, []string{
			who, l.Server, l.Remote, version, dash(l.Group), dash(l.Cipher), l.Certificate.subject(), l.Certificate.end(now),
			l.ClientCertificate.subject(), l.ClientCertificate.end(now), l.VerifiedBy,
		})
	}
	if err := table("Links", r.LinksLeftOut,
		[]string{"PEER", "SERVER", "FROM", "PROTOCOL", "KEY EXCHANGE", "CIPHER", "CERTIFICATE", "ENDS", "CLIENT CERTIFICATE", "ENDS", "VERIFIED BY"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, e := range r.Envoys {
		row := []string{e.Mesh + "/" + e.Proxy, counts(e.Versions), counts(e.Groups), counts(e.Ciphers), e.Certificate.subject(), e.Certificate.end(now), e.VerifiedBy}
		if e.Error != "" {
			row[1], row[2], row[3] = "not known", "not known", "not known"
		}
		rows = append(rows, row)
	}
	if err := table("Connections that proxies accepted from proxies", r.EnvoysLeftOut,
		[]string{"PROXY", "PROTOCOL", "KEY EXCHANGE", "CIPHER", "CERTIFICATE", "ENDS", "VERIFIED BY"}, rows); err != nil {
		return err
	}
	rows = nil
	for i := range r.Certificates {
		c := &r.Certificates[i]
		rows = append(rows, []string{c.Name, dash(c.Subject), c.end(now), dash(c.File)})
	}
	if err := table("Certificates", 0, []string{"NAME", "SUBJECT", "ENDS", "FILE"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, f := range r.Findings {
		about := strings.Join(f.About, ", ")
		if more := f.Count - len(f.About); more > 0 {
			about += fmt.Sprintf(" and %d more", more)
		}
		rows = append(rows, []string{f.Severity, f.Message, about, dash(f.Mend)})
	}
	if err := a.print("Findings\n"); err != nil {
		return err
	}
	if len(rows) == 0 {
		return a.print("none\n")
	}
	return writeTable(a.stdout, append([][]string{{"SEVERITY", "FINDING", "ABOUT", "MEND"}}, rows...))
}

func (c *tlsCertificate) subject() string {
	if c == nil {
		return "-"
	}
	return dash(c.Subject)
}

func (c *tlsCertificate) issuer() string {
	if c == nil {
		return "-"
	}
	return dash(c.Issuer)
}

// end is when a certificate ends, with how long that is from now.
func (c *tlsCertificate) end(now time.Time) string {
	switch {
	case c == nil:
		return "-"
	case !c.NotAfter.After(now):
		return c.NotAfter.UTC().Format(time.DateOnly) + " (ended)"
	}
	return c.NotAfter.UTC().Format(time.DateOnly) + " (in " + since(now, c.NotAfter) + ")"
}

// counts writes counters as "TLSv1.3: 7, TLSv1.2: 1", the largest first.
func counts(m map[string]uint64) string {
	keys := slices.SortedFunc(maps.Keys(m), func(a, b string) int {
		if m[a] != m[b] {
			if m[a] > m[b] {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	var parts []string
	for _, k := range keys {
		parts = append(parts, k+": "+strconv.FormatUint(m[k], 10))
	}
	return dash(strings.Join(parts, ", "))
}

// dash stands for what is empty in a table.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

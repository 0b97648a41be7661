package ctl

import (
	"strings"
	"testing"
)

const aReport = `{"instance":"cp-1","store":"file","servers":[
 {"name":"dp-server","address":"[::]:5678","tls":true,"minVersion":"TLS 1.2","clientCertificates":"none","certificate":{"subject":"CN=cp","issuer":"CN=ca","notAfter":"2020-01-02T00:00:00Z"}},
 {"name":"api-http","address":"127.0.0.1:5681","tls":false}],
"links":[{"kind":"proxy","peer":"default/web","streams":["ads","link"],"server":"dp-server","remote":"10.0.0.1:1","version":"TLS 1.3","group":"X25519MLKEM768","cipher":"C","verifiedBy":"dataplane token over TLS"},
 {"kind":"user","peer":"ja\u001bne","server":"api-http","remote":"127.0.0.1:2","version":"","group":"","cipher":"","verifiedBy":"user token without TLS"}],"linksLeftOut":3,
"envoys":[{"mesh":"default","proxy":"web","verifiedBy":"mesh authority","versions":{"TLSv1.2":1,"TLSv1.3":7},"groups":{},"ciphers":{"A":1,"B":1}},{"mesh":"default","proxy":"api","verifiedBy":"mesh authority","error":"it is busy"}],"envoysLeftOut":0,
"certificates":[],
"findings":[{"severity":"SEVERITY","message":"it is weak","about":["a","b"],"count":5,"mend":"strengthen it"}]}`

func TestTLSReport(t *testing.T) {
	t.Parallel()
	report := func(severity string) string { return strings.Replace(aReport, "SEVERITY", severity, 1) }
	s := newServer(t, map[string]answer{
		"GET /tls-report":           {200, report("note")},
		"GET /tls-report?mesh=m":    {200, report("warning")},
		"GET /tls-report?mesh=none": stdError(404, "Could not make the TLS report", "Not found"),
		"GET /tls-report?mesh=deny": stdError(403, "Access Denied", "user cannot access the TLS report"),
		"GET /tls-report?mesh=odd":  {200, "[]"},
	})
	m := newMachine(t).using(s.URL)
	m.run("tls", "report").want(t, 0, `Servers of cp-1 (store: file, not reached over a network)
NAME        ADDRESS          PROTOCOL            CLIENT CERTIFICATES   CERTIFICATE   ISSUER   ENDS
dp-server   [::]:5678        TLS 1.2 and newer   none                  CN=cp         CN=ca    2020-01-02 (ended)
api-http    127.0.0.1:5681   no TLS              -                     -             -        -

Links
PEER                            SERVER      FROM          PROTOCOL   KEY EXCHANGE     CIPHER   CERTIFICATE   ENDS   CLIENT CERTIFICATE   ENDS   VERIFIED BY
proxy default/web (ads, link)   dp-server   10.0.0.1:1    TLS 1.3    X25519MLKEM768   C        -             -      -                    -      dataplane token over TLS
user ja ne                      api-http    127.0.0.1:2   no TLS     -                -        -             -      -                    -      user token without TLS
and 3 more

Connections that proxies accepted from proxies
PROXY         PROTOCOL                 KEY EXCHANGE   CIPHER       CERTIFICATE   ENDS   VERIFIED BY
default/web   TLSv1.3: 7, TLSv1.2: 1   -              A: 1, B: 1   -             -      mesh authority
default/api   not known                not known      not known    -             -      mesh authority

Certificates
none

Findings
SEVERITY   FINDING      ABOUT             MEND
note       it is weak   a, b and 3 more   strengthen it
`, "")
	m.run("tls", "report", "--check").want(t, 0, "…note", "")
	m.run("tls", "report", "-m", "m").want(t, 0, "…warning", "")
	m.run("tls", "report", "-m", "m", "--check").want(t, 1, "…warning", "Error: 1 finding is not as it should be\n")
	m.run("tls", "report", "-m", "m", "-o", "yaml", "--check").want(t, 1, "…severity: warning", "…")
	m.run("tls", "report", "-o", "json").want(t, 0, `…"group": "X25519MLKEM768"`, "")
	for args, want := range map[string]string{
		"-m none":  `…there is no mesh with name "none"`,
		"-m deny":  "…user cannot access the TLS report",
		"-m odd":   "…is not the JSON that was expected",
		"-m other": "…makes no TLS report", // as a control plane of another make
		"-o xml":   `…unknown output format "xml"`,
		"more":     `…unknown command "more" for "kumactl tls report"`,
	} {
		m.run(append([]string{"tls", "report"}, strings.Fields(args)...)...).want(t, 1, "", want)
	}
	m.run("tls", "reprot").want(t, 1, "", `…did you mean "report"?`)
}

// A store that a network leads to is a table of its own.
func TestTLSReportOfADatabase(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{"GET /tls-report": {200, `{"instance":"cp-1","store":"postgres","servers":[],"links":[],"envoys":[],"certificates":[],"findings":[],"database":[
 {"address":"db:5432","name":"kuma","user":"me","connections":2,"version":"TLS 1.3","group":"X25519","cipher":"C","certificate":{"subject":"CN=db","issuer":"CN=ca","notAfter":"2020-01-02T00:00:00Z"},"verifiedBy":"authorities of ca.crt"},
 {"address":"db:5432","name":"ku\u001bma","user":"me","connections":1,"version":"","group":"","cipher":"","verifiedBy":"nothing"},
 {"address":"db:5432","name":"kuma","user":"me","connections":0,"version":"","group":"","cipher":"","verifiedBy":"nothing"}]}`}})
	newMachine(t).using(s.URL).run("tls", "report").want(t, 0, `Servers of cp-1 (store: postgres)
none

Connections to the store
DATABASE      ADDRESS   OPEN   PROTOCOL       KEY EXCHANGE   CIPHER   CERTIFICATE   ISSUER   ENDS                 VERIFIED BY
kuma as me    db:5432   2      TLS 1.3        X25519         C        CN=db         CN=ca    2020-01-02 (ended)   authorities of ca.crt
ku ma as me   db:5432   1      no TLS         -              -        -             -        -                    nothing
kuma as me    db:5432   0      none is open   -              -        -             -        -                    nothing

Links
none

Connections that proxies accepted from proxies
none

Certificates
none

Findings
none
`, "")
}

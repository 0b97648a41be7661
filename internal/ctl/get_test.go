package ctl

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/mesh"
)

func TestGet(t *testing.T) {
	t.Parallel()
	ago := func(d time.Duration) string { return time.Now().Add(-d).UTC().Format(time.RFC3339Nano) }
	s := newServer(t, map[string]answer{
		"GET /meshes": {200, `{"total":2,"items":[
 {"type":"Mesh","name":"default","creationTime":"` + ago(5*time.Minute) + `","mtls":{"enabledBackend":"ca","backends":[{"name":"ca","type":"builtin"}]},"routing":{"localityAwareLoadBalancing":true}},
 {"type":"Mesh","name":"plain","creationTime":"` + ago(75*time.Hour) + `"}],"next":null}`},
		"GET /meshes/default/dataplanes?offset=1&size=1": {200, `{"total":3,"next":"http://elsewhere/meshes/default/dataplanes?offset=2&size=1","items":[{"type":"Dataplane","mesh":"default","name":"web",` +
			`"networking":{"address":"10.0.0.1","inbound":[{"port":80,"tags":{"kuma.io/service":"web","a":"b"}},{"port":81,"tags":{"kuma.io/service":"admin"}}]}}]}`},
		"GET /meshes/other/dataplanes":        {200, `{"total":1,"next":null,"items":[{"type":"Dataplane","mesh":"other","name":"gw","networking":{"address":"10.0.0.2","gateway":{"tags":{"kuma.io/service":"gw"}}}}]}`},
		"GET /meshes/default":                 {200, `{"type":"Mesh","name":"default","labels":{"b":"1","a":"2"}}`},
		"GET /meshes/default/secrets/a%2Fb":   {200, `{"type":"Secret","mesh":"default","name":"a/b","data":"x"}`},
		"GET /globalsecrets":                  {200, `{"items":[]}`},
		"GET /meshes/none/secrets":            stdError(404, "Failed to retrieve Mesh", "Not found"),
		"GET /meshes/default/secrets/none":    stdError(404, "Could not retrieve a resource", "Not found"),
		"GET /zones/none":                     stdError(404, "Could not retrieve a resource", "Not found"),
		"GET /meshes/default/secrets":         stdError(403, "Access Denied", "no"),
		"GET /meshes/broken/secrets":          {200, `<html>`},
		"GET /meshes/default/secrets/hostile": {200, `{"type":"Secret","mesh":"default","name":"\u001b[2Jx"}`},
	})
	m := newMachine(t).using(s.URL)
	for _, c := range []struct {
		args           []string
		code           int
		stdout, stderr string
	}{
		{[]string{"meshes"}, 0, "NAME      mTLS         LOCALITY   ZONEEGRESS   AGE\ndefault   builtin/ca   on         off          5m\nplain     off          off        off          3d\n", ""},
		{[]string{"dataplanes", "--size", "1", "--offset", "1"}, 0, "MESH      NAME   TAGS                            ADDRESS    AGE\n" +
			"default   web    a=b kuma.io/service=admin,web   10.0.0.1   never\n\nRerun command with --offset=2 argument to retrieve more resources\n", ""},
		{[]string{"dp", "-m", "other"}, 0, "MESH    NAME   TAGS                 ADDRESS    AGE\nother   gw     kuma.io/service=gw   10.0.0.2   never\n", ""},
		{[]string{"mesh", "default", "-o", "yaml"}, 0, "labels:\n  a: \"2\"\n  b: \"1\"\nname: default\ntype: Mesh\n", ""},
		{[]string{"mesh", "default", "-o", "json"}, 0, "{\n  \"type\": \"Mesh\",\n  \"name\": \"default\",\n  \"labels\": {\n    \"b\": \"1\",\n    \"a\": \"2\"\n  }\n}\n", ""},
		{[]string{"mesh", "default"}, 0, "NAME      mTLS   LOCALITY   ZONEEGRESS   AGE\ndefault   off    off        off          never\n", ""},
		{[]string{"secret", "a/b"}, 0, "MESH      NAME   AGE\ndefault   a/b    never\n", ""},
		{[]string{"secret", "hostile"}, 0, "MESH      NAME    AGE\ndefault    [2Jx   never\n", ""},
		{[]string{"global-secrets"}, 0, "NAME   AGE\n", ""},
		{[]string{"globalsecrets", "-o", "yaml"}, 0, "items: []\n", ""},
		{[]string{"secrets", "-m", "none"}, 1, "", "Error: No resources found in none mesh\n  there is no such mesh (kumactl get meshes lists them)\n"},
		{[]string{"secret", "none"}, 1, "", "Error: No resources found in default mesh\n  there is no Secret with name \"none\"\n"},
		{[]string{"zone", "none"}, 1, "", "Error: No resources found\n  there is no Zone with name \"none\"\n"},
		{[]string{"zones"}, 1, "", "…does not have the kind Zone"},
		{[]string{"secrets"}, 1, "", "Error: Access Denied (no)\n"},
		{[]string{"secrets", "-m", "broken"}, 1, "", "…not the JSON that was expected"},
		{[]string{"secrets", "-m", "broken", "-o", "yaml"}, 0, "…html", ""},
		{[]string{"secrets", "-m", "broken", "-o", "json"}, 1, "", "…the answer is not JSON"},
	} {
		t.Run(fmt.Sprint(c.args), func(t *testing.T) {
			m.run(append([]string{"get"}, c.args...)...).want(t, c.code, c.stdout, c.stderr)
		})
	}
}

func TestGetListsTheServersKinds(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{"GET /_resources": {200, `{"resources":[{"name":"Mesh","path":"meshes","scope":"Global","shortName":"m"},{"name":"MeshNew","path":"meshnews","scope":"Mesh","readOnly":true}]}`}})
	newMachine(t).using(s.URL).run("get").want(t, 0, "TYPE      ARGUMENT   SHORT   SCOPE    WRITABLE\nMesh      mesh       m       Global   yes\nMeshNew   meshnew            Mesh     no\n", "")
}

func TestContextsMeshIsUsed(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{"GET /meshes/m7/secrets": {200, `{"items":[{"mesh":"m7","name":"a"}]}`}})
	m := newMachine(t)
	m.file(".kumactl/config", "contexts: [{name: s, controlPlane: s, defaults: {mesh: m7}}]\ncontrolPlanes: [{name: s, coordinates: {apiServer: {url: '"+s.URL+"'}}}]\ncurrentContext: s\n")
	m.run("get", "secrets").want(t, 0, "MESH   NAME   AGE\nm7     a      never\n", "")
}

func TestDelete(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{
		"DELETE /meshes/m1":              {200, "{}"},
		"DELETE /meshes/m2":              stdError(404, "Could not retrieve a resource", "Not found"),
		"DELETE /meshes/m3":              stdError(400, "Could not delete a resource", "Resource is not valid", "mesh", "unable to delete mesh, there are still some dataplanes attached"),
		"DELETE /meshes/other/secrets/a": {200, "{}"},
		"DELETE /zones/z":                stdError(405, "Method not allowed", "no"),
	})
	m := newMachine(t).using(s.URL)
	m.run("delete", "mesh", "m1").want(t, 0, "deleted Mesh \"m1\"\n", "")
	m.run("delete", "mesh", "m2").want(t, 1, "", "Error: there is no Mesh with name \"m2\"\n")
	m.run("delete", "mesh", "m3").want(t, 1, "", "Error: Could not delete a resource (Resource is not valid);mesh=unable to delete mesh, there are still some dataplanes attached\n")
	m.run("delete", "secret", "a", "-m", "other").want(t, 0, "deleted Secret \"a\"\n", "")
	m.run("delete", "zone", "z").want(t, 1, "", "Error: Method not allowed (no)\n")
	m.run("delete", "zone", "").want(t, 1, "", "Error: the name must not be empty\n")
	m.run("delete", "nope", "x").want(t, 1, "", "…unknown TYPE: nope…Allowed values: dataplane, ")
	m.run("delete", "mesh").want(t, 1, "", "…accepts 2 arg(s), received 1")
}

func TestInspectDataplanes(t *testing.T) {
	t.Parallel()
	ago := func(d time.Duration) string { return time.Now().Add(-d).UTC().Format(time.RFC3339Nano) }
	s := newServer(t, map[string]answer{
		"GET /meshes/default/dataplanes/_overview?size=1000": {200, `{"total":2,"next":"http://x/meshes/default/dataplanes/_overview?offset=1","items":[{"type":"DataplaneOverview","mesh":"default","name":"web",
 "dataplane":{"networking":{"address":"10.0.0.1","inbound":[{"port":80,"state":"Ready","tags":{"kuma.io/service":"web"}},{"port":81,"state":"NotReady","tags":{"kuma.io/service":"adm"}}]}},
 "dataplaneInsight":{"subscriptions":[{"connectTime":"` + ago(3*time.Hour) + `","disconnectTime":"` + ago(2*time.Hour) + `","status":{"total":{"responsesSent":"2"}}},
  {"connectTime":"` + ago(time.Hour+time.Minute) + `","status":{"lastUpdateTime":"` + ago(90*time.Second) + `","total":{"responsesSent":"10","responsesAcknowledged":"9","responsesRejected":"1"}},
  "version":{"kumaDp":{"version":"2.14.0"},"envoy":{"version":"1.40.0"},"dependencies":{"coredns":"1.2"}}}],
  "mTLS":{"certificateExpirationTime":"2026-05-06T07:08:09Z","lastCertificateRegeneration":"` + ago(time.Hour+time.Minute) + `","certificateRegenerations":3,"issuedBackend":"ca-1","supportedBackends":["ca-1","ca-2"]},
  "rejections":[{"typeUrl":"t","resource":"inbound:1","message":"no such filter"}]}}]}`},
		"GET /meshes/default/dataplanes/_overview?offset=1&size=1000":                                        {200, `{"total":2,"next":null,"items":[{"mesh":"default","name":"new","dataplane":{"networking":{"gateway":{"tags":{"kuma.io/service":"gw"}}}}}]}`},
		"GET /meshes/m2/dataplanes/_overview?gateway=true&size=1000&tag=a%3Ab&tag=kuma.io%2Fservice%3Dx%3Ay": {200, `{"items":[]}`},
		"GET /meshes/m2/dataplanes/_overview?gateway=true&size=1000&tag=a%3Ab&tag=kuma.io%2Fservice%3Ax":     {200, `{"items":[]}`},
		"GET /meshes/m3/dataplanes/_overview?size=1000":                                                      stdError(404, "Failed to retrieve Mesh", "Not found"),
	})
	m := newMachine(t).using(s.URL)
	m.run("inspect", "dataplanes").want(t, 0,
		"MESH      NAME   TAGS                      STATUS               LAST CONNECTED AGO   LAST UPDATED AGO   TOTAL UPDATES   TOTAL ERRORS   CERT REGENERATED AGO   CERT EXPIRATION       CERT REGENERATIONS   CERT BACKEND   SUPPORTED CERT BACKENDS   KUMA-DP VERSION   ENVOY VERSION   DEPENDENCIES VERSIONS   NOTES\n"+
			"default   web    kuma.io/service=adm,web   Partially degraded   1h                   1m                 12              1              1h                     2026-05-06 07:08:09   3                    ca-1           ca-1,ca-2                 2.14.0            1.40.0          coredns: 1.2            inbound[port=81,svc=adm] is not ready; Envoy refused inbound:1: no such filter\n"+
			"default   new    kuma.io/service=gw        Offline              never                never              0               0              never                  -                     0                    -              -                         unknown           unknown         -\n", "")
	m.run("inspect", "dataplanes", "-o", "json").want(t, 0, "…\"total\": 2…\"name\": \"new\"", "")
	m.run("inspect", "dataplanes", "-m", "m2", "--gateway", "--tag", "a=b", "--tag", "kuma.io/service=x").want(t, 0, "…MESH", "")
	m.run("inspect", "dataplanes", "--tag", "a").want(t, 1, "", "…--tag \"a\": must be KEY=VALUE")
	m.run("inspect", "dataplanes", "-m", "m3").want(t, 1, "", "…there is no mesh with name \"m3\"")
}

func TestStatus(t *testing.T) {
	t.Parallel()
	now := time.Now()
	online := &mesh.DataplaneInsightSpec{Subscriptions: []mesh.Subscription{{ConnectTime: &now}}}
	ended := &mesh.DataplaneInsightSpec{Subscriptions: []mesh.Subscription{{ConnectTime: &now, DisconnectTime: &now}}}
	unable := &mesh.DataplaneInsightSpec{Subscriptions: online.Subscriptions, Readiness: &mesh.ReadinessInsight{Reason: "port in use"}}
	inbounds := func(states ...mesh.InboundState) mesh.DataplaneSpec {
		n := &mesh.Networking{}
		for i, s := range states {
			n.Inbound = append(n.Inbound, mesh.Inbound{Port: uint32(80 + i), State: s, Tags: map[string]string{"kuma.io/service": "a"}})
		}
		return mesh.DataplaneSpec{Networking: n}
	}
	gateway := mesh.DataplaneSpec{Networking: &mesh.Networking{Gateway: &mesh.Gateway{}}}
	for _, c := range []struct {
		name    string
		dp      mesh.DataplaneSpec
		insight *mesh.DataplaneInsightSpec
		want    string
		notes   []string
	}{
		{"connected", inbounds(mesh.Ready), online, "Online", nil},
		{"ended", inbounds(mesh.Ready), ended, "Offline", nil},
		{"none ready", inbounds(mesh.NotReady), online, "Offline", []string{"inbound[port=80,svc=a] is not ready"}},
		{"some ready", inbounds(mesh.Ready, mesh.NotReady), online, "Partially degraded", []string{"inbound[port=81,svc=a] is not ready"}},
		{"ignored do not count", inbounds(mesh.Ready, mesh.Ignored), online, "Online", nil},
		{"gateway", gateway, online, "Online", nil},
		{"gateway ended", gateway, ended, "Offline", nil},
		{"nothing behind it", mesh.DataplaneSpec{}, online, "Offline", nil},
		{"says it is not ready", inbounds(mesh.Ready), unable, "Online", []string{"proxy is not ready: port in use"}},
	} {
		status, notes := overview{Dataplane: c.dp}.status(c.insight)
		if status != c.want {
			t.Errorf("%s: %s, want %s", c.name, status, c.want)
		}
		if d := cmp.Diff(c.notes, notes); d != "" {
			t.Errorf("%s: notes (-want +got):\n%s", c.name, d)
		}
	}
}

func TestInspectDataplane(t *testing.T) {
	t.Parallel()
	const at = "GET /meshes/default/dataplanes/web/"
	s := newServer(t, map[string]answer{
		at + "policies": {200, `{"total":2,"kind":"SidecarDataplane","items":[
 {"type":"dataplane","matchedPolicies":{"MeshTimeout":[{"name":"b"},{"name":"a"}],"MeshAccessLog":[{"name":"l"}]}},
 {"type":"inbound","name":"127.0.0.1:80:8080","service":"web","matchedPolicies":{"TrafficPermission":[{"name":"allow"}]}}]}`},
		at + "xds?include_eds=true":                    {200, `{"configs":[]}`},
		at + "xds":                                     {200, `{"configs":[1]}`},
		at + "stats":                                   {200, "a: 1\nb: 2\n"},
		at + "clusters":                                {200, "c::d"},
		at + "_config?include=diff&shadow=true":        {200, `{"xds":{},"diff":[]}`},
		"GET /meshes/default/dataplanes/none/stats":    stdError(404, "Could not get dataplane resource", "Not found"),
		"GET /meshes/default/dataplanes/away/clusters": stdError(500, "Could not execute admin operation", "Internal Server Error"),
	})
	m := newMachine(t).using(s.URL)
	for _, c := range []struct {
		args           []string
		code           int
		stdout, stderr string
	}{
		{[]string{"web"}, 0, "DATAPLANE:\n  MeshAccessLog\n    l\n  MeshTimeout\n    b\n    a\nINBOUND 127.0.0.1:80:8080(web):\n  TrafficPermission\n    allow\n", ""},
		{[]string{"web", "--type", "config-dump", "--include-eds"}, 0, "{\n  \"configs\": []\n}\n", ""},
		{[]string{"web", "--type=config-dump"}, 0, "{\n  \"configs\": [\n    1\n  ]\n}\n", ""},
		{[]string{"web", "--type", "stats"}, 0, "a: 1\nb: 2\n", ""},
		{[]string{"web", "--type", "clusters"}, 0, "c::d\n", ""},
		{[]string{"web", "--type", "config", "--shadow", "--include", "diff"}, 0, "{\n  \"xds\": {},\n  \"diff\": []\n}\n", ""},
		{[]string{"web", "--type", "config"}, 1, "", "…can't show the config of a dataplane"},
		{[]string{"web", "--type", "stat"}, 1, "", "Error: unknown type \"stat\": must be policies, config-dump, stats, clusters, config\n"},
		{[]string{"web", "--shadow"}, 1, "", "…need --type config"},
		{[]string{"web", "--include-eds"}, 1, "", "…needs --type config-dump"},
		{[]string{"web", "--type=config", "--include=all"}, 1, "", "…must be diff"},
		{[]string{"none", "--type=stats"}, 1, "", "…there is no Dataplane with name \"none\" in mesh \"default\""},
		{[]string{"away", "--type=clusters"}, 1, "", "Error: Could not execute admin operation (Internal Server Error)\n"},
	} {
		t.Run(fmt.Sprint(c.args), func(t *testing.T) {
			m.run(append([]string{"inspect", "dataplane"}, c.args...)...).want(t, c.code, c.stdout, c.stderr)
		})
	}
}

func TestSince(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for want, d := range map[string]time.Duration{"0s": 0, "59s": 59 * time.Second, "5m": 5*time.Minute + 59*time.Second, "23h": 23*time.Hour + 59*time.Minute, "3d": 80 * time.Hour, "2y": 2 * 366 * 24 * time.Hour} {
		if got := since(now.Add(-d), now); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
	if got := since(now.Add(time.Minute), now); got != "0s" {
		t.Errorf("a clock ahead: %s", got)
	}
	if got := since(time.Time{}, now); got != "never" {
		t.Errorf("no time: %s", got)
	}
}

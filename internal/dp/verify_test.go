package dp

import (
	"errors"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"kuma/proto/linkpb"
)

// The link says which certificate it saw, and by what it was verified: gRPC
// alone says that it was not.
func TestLinkTellsWhatItSaw(t *testing.T) {
	t.Parallel()
	p := &plane{serve: answerAll(nil)}
	p.start(t)
	believed, err := newTrust(newAuthority(t).pem, false)
	if err != nil {
		t.Fatal(err)
	}
	believed.source = "/etc/other.crt"
	at, err := target(p.url)
	if err != nil {
		t.Fatal(err)
	}
	creds := telling{credentials.NewTLS(believed.tls()), believed}
	conn, err := grpc.NewClient(at, grpc.WithTransportCredentials(creds.Clone()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, err := linkpb.NewLinkClient(conn).Stream(t.Context())
	if err == nil {
		_, err = s.Recv()
	}
	err = explain(err)
	if _, ok := errors.AsType[lasting](err); !ok {
		t.Errorf("%v: waiting can't mend that", err)
	}
	for _, want := range []string{"failed to verify certificate", `asked for as "127.0.0.1" and verified by /etc/other.crt`, `issued by "CN=test authority"`, "for 127.0.0.1, until 2", "--ca-cert-file"} {
		if !strings.Contains(strings.ReplaceAll(err.Error(), `\"`, `"`), want) { // gRPC quotes the text
			t.Errorf("%q lacks %q", err, want)
		}
	}
}

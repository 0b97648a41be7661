package socket

import (
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
)

func TestFindSocket(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1631 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 111 1 0 100 0 0 10 0
   1: 0100007F:9C40 0100007F:1631 01 00000000:00000000 00:00000000 00000000  1001        0 222 1 0 20 4 30 10 -1
   2: 0100007F:9C41 0100007F:1631 06 00000000:00000000 03:00001770 00000000     0        0 0 3 0
   3: garbage
   4: 0000000000000000FFFF00000100007F:9C42 0000000000000000FFFF00000100007F:1631 01 0:0 0:0 0 1003 0 333 1
   5: 00000000000000000000000001000000:9C43 00000000000000000000000001000000:1631 01 0:0 0:0 0 1004 0 444 1
`
	for _, c := range []struct {
		own, peer string
		uid       uint32
		ok        bool
	}{
		{"127.0.0.1:40000", "127.0.0.1:5681", 1001, true},
		{"127.0.0.1:5681", "127.0.0.1:40000", 0, false},
		{"127.0.0.1:40001", "127.0.0.1:5681", 0, false}, // closed by its owner: shown as root's
		{"127.0.0.1:40002", "127.0.0.1:5681", 1003, true},
		{"[::1]:40003", "[::1]:5681", 1004, true},
		{"127.0.0.1:40004", "127.0.0.1:5681", 0, false},
	} {
		uid, ok := findSocket(strings.NewReader(table), netip.MustParseAddrPort(c.own), netip.MustParseAddrPort(c.peer))
		if uid != c.uid || ok != c.ok {
			t.Errorf("%s from %s: %d %v, want %d %v", c.peer, c.own, uid, ok, c.uid, c.ok)
		}
	}
}

// The kernel tells of a connection that was accepted, and of none before.
func TestOwner(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the tables are Linux's")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	out, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = out.Close() })
	here, there := netip.MustParseAddrPort(out.LocalAddr().String()), netip.MustParseAddrPort(out.RemoteAddr().String())
	if uid, ok := Owner(there, here); ok {
		t.Errorf("nobody has accepted, and yet it is of user %d", uid)
	}
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if uid, ok := Owner(there, here); !ok || uid != uint32(os.Getuid()) {
		t.Errorf("accepted: user %d, %v", uid, ok)
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if uid, ok := Owner(there, here); ok {
		t.Errorf("closed, and yet it is of user %d", uid)
	}
}

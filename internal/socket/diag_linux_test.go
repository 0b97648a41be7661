package socket

import (
	"net"
	"net/netip"
	"os"
	"testing"
)

// The kernel tells of one socket what its tables tell, for all kinds of sockets.
func TestDiagnose(t *testing.T) {
	for name, c := range map[string]struct{ listen, dial string }{
		"IPv4": {"127.0.0.1:0", "127.0.0.1"}, "IPv6": {"[::1]:0", "::1"}, "IPv4 of a socket for both": {":0", "127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", c.listen)
			if err != nil {
				t.Skip(err)
			}
			defer l.Close()
			_, port, err := net.SplitHostPort(l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			out, err := net.Dial("tcp", net.JoinHostPort(c.dial, port))
			if err != nil {
				t.Skip(err)
			}
			defer out.Close()
			here, there := netip.MustParseAddrPort(out.LocalAddr().String()), netip.MustParseAddrPort(out.RemoteAddr().String())
			if uid, inode, found := diagnose(here, there); !found {
				t.Skip("this kernel can't be asked")
			} else if uid != uint32(os.Getuid()) || inode == 0 {
				t.Errorf("our own end: user %d, inode %d", uid, inode)
			}
			if _, inode, found := diagnose(there, here); !found || inode != 0 {
				t.Errorf("nobody has accepted: inode %d, found %v", inode, found)
			}
			in, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if uid, inode, found := diagnose(there, here); !found || inode == 0 || uid != uint32(os.Getuid()) {
				t.Errorf("accepted: user %d, inode %d, found %v", uid, inode, found)
			}
			if err := in.Close(); err != nil {
				t.Fatal(err)
			}
			if _, inode, _ := diagnose(there, here); inode != 0 {
				t.Errorf("closed, and yet its inode is %d", inode)
			}
			// Who listens there is not who holds the connection.
			if _, _, found := diagnose(there, netip.AddrPortFrom(here.Addr(), here.Port()-1)); found {
				t.Error("a connection that is not there is found")
			}
		})
	}
}

// FuzzDiagnosed: an answer is of the socket that was asked for, or none.
func FuzzDiagnosed(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, diagAnswer))
	f.Fuzz(func(t *testing.T, answer []byte) {
		a, b := netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:2")
		if uid, inode, found := diagnosed(answer, a, b); !found && (uid != 0 || inode != 0) {
			t.Errorf("user %d, inode %d of no socket", uid, inode)
		}
	})
}

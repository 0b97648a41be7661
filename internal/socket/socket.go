// Package socket tells whose program is at the other end of a connection on this
// machine.
package socket

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// Owner tells which user holds the other end of a connection on this machine:
// the socket whose own address is local and whose peer is remote. It asks the
// kernel (Linux: sock_diag; where that is not to be had, the tables in
// /proc/net/tcp) and reports false where nobody is known for certain: a
// connection that was not yet accepted or is closed, a user of another user
// namespace, a peer in another network namespace, another system.
func Owner(local, remote netip.AddrPort) (uid uint32, ok bool) {
	overflow := uint64(65534)
	if b, err := os.ReadFile("/proc/sys/kernel/overflowuid"); err == nil {
		if v, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32); err == nil {
			overflow = v
		}
	}
	if uid, inode, found := diagnose(local, remote); found {
		return uid, inode != 0 && uint64(uid) != overflow
	}
	for _, path := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		uid, ok = findSocket(f, local, remote)
		_ = f.Close()
		if ok {
			// A user of another user namespace is shown as this one, whoever
			// it is.
			return uid, uint64(uid) != overflow
		}
	}
	return 0, false
}

// findSocket looks for a socket in a table of /proc/net/tcp's form. A socket
// that its owner has closed has no inode, and its user is shown as 0: it does
// not count.
func findSocket(table io.Reader, local, remote netip.AddrPort) (uid uint32, ok bool) {
	s := bufio.NewScanner(table)
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) < 10 || !sameAddr(f[1], local) || !sameAddr(f[2], remote) {
			continue
		}
		inode, err := strconv.ParseUint(f[9], 10, 64)
		if err != nil || inode == 0 {
			return 0, false
		}
		v, err := strconv.ParseUint(f[7], 10, 32)
		if err != nil {
			return 0, false
		}
		return uint32(v), true
	}
	return 0, false
}

// sameAddr compares "0100007F:1631", the kernel's form, with an address.
func sameAddr(s string, want netip.AddrPort) bool {
	host, port, ok := strings.Cut(s, ":")
	if !ok {
		return false
	}
	if p, err := strconv.ParseUint(port, 16, 16); err != nil || uint16(p) != want.Port() {
		return false
	}
	b, err := hex.DecodeString(host)
	if err != nil || len(b) != 4 && len(b) != 16 {
		return false
	}
	// Words of four bytes in the machine's own order.
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	a, ok := netip.AddrFromSlice(b)
	return ok && a.Unmap() == want.Addr().Unmap().WithZone("")
}

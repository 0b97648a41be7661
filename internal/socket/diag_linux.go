package socket

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	// sockDiagByFamily asks for sockets (linux/sock_diag.h); diagRequest and
	// diagAnswer are how long a question and an answer are, each with its header
	// (linux/inet_diag.h).
	sockDiagByFamily = 20
	diagRequest      = unix.NLMSG_HDRLEN + 56
	diagAnswer       = unix.NLMSG_HDRLEN + 72
)

// diagnose asks the kernel for one socket, which takes microseconds however many
// there are. Found is false where it doesn't know the socket, or can't be asked.
// A socket that nobody holds, or not yet, has the inode 0.
func diagnose(local, remote netip.AddrPort) (uid, inode uint32, found bool) {
	here, there := local.Addr().Unmap(), remote.Addr().Unmap()
	if here.Is4() != there.Is4() || here.Zone() != "" || there.Zone() != "" {
		return 0, 0, false
	}
	family := byte(unix.AF_INET6)
	if here.Is4() {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return 0, 0, false
	}
	defer func() { _ = unix.Close(fd) }()
	var q [diagRequest]byte
	binary.NativeEndian.PutUint32(q[0:], diagRequest)
	binary.NativeEndian.PutUint16(q[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(q[6:], unix.NLM_F_REQUEST)
	body := q[unix.NLMSG_HDRLEN:]
	body[0], body[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(body[4:], ^uint32(0)) // in any state
	id := body[8:]
	binary.BigEndian.PutUint16(id[0:], local.Port())
	binary.BigEndian.PutUint16(id[2:], remote.Port())
	copy(id[4:20], here.AsSlice())
	copy(id[20:36], there.AsSlice())
	binary.NativeEndian.PutUint64(id[40:], ^uint64(0)) // of any cookie
	if err := unix.Sendto(fd, q[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, 0, false
	}
	// The kernel has answered by now.
	a := make([]byte, 4096)
	n, from, err := unix.Recvfrom(fd, a, unix.MSG_DONTWAIT)
	if k, ok := from.(*unix.SockaddrNetlink); err != nil || !ok || k.Pid != 0 {
		return 0, 0, false
	}
	return diagnosed(a[:n], local, remote)
}

// diagnosed reads an answer of the kernel's. Where it knows no such socket it
// tells of one that listens there, or says that there is none.
func diagnosed(a []byte, local, remote netip.AddrPort) (uid, inode uint32, found bool) {
	if len(a) < diagAnswer || binary.NativeEndian.Uint16(a[4:]) != sockDiagByFamily {
		return 0, 0, false
	}
	body := a[unix.NLMSG_HDRLEN:]
	size := 16
	if body[0] == unix.AF_INET {
		size = 4
	}
	end := func(port, addr []byte) netip.AddrPort {
		ip, _ := netip.AddrFromSlice(addr[:size])
		return netip.AddrPortFrom(ip.Unmap(), binary.BigEndian.Uint16(port))
	}
	id := body[4:]
	plain := func(p netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(p.Addr().Unmap(), p.Port()) }
	if end(id[0:], id[4:]) != plain(local) || end(id[2:], id[20:]) != plain(remote) {
		return 0, 0, false
	}
	return binary.NativeEndian.Uint32(body[64:]), binary.NativeEndian.Uint32(body[68:]), true
}

package cp

import (
	"log/slog"
	"net"
	"net/netip"
	"sync"
)

// limit bounds how many connections a port has open at once: in all, and from
// one address, so that nobody alone can keep the others out. It is safe for
// concurrent use.
type limit struct {
	// max and each are the bounds, in all and from one address.
	max, each int
	// setting and eachSetting are the variables that change them.
	setting, eachSetting string
	log                  *slog.Logger

	mu   sync.Mutex
	open int
	from map[netip.Prefix]int
	// full and greedy: it was said that a bound was met.
	full, greedy bool
}

// admit counts a connection until it is closed. Where there are too many it
// closes it and returns nil.
func (l *limit) admit(c net.Conn) net.Conn {
	from := source(c.RemoteAddr())
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.open >= l.max:
		if !l.full {
			l.full = true
			l.log.Error("a port has as many connections as it may have; further ones are closed", "limit", l.max, "setting", l.setting)
		}
	case l.from[from] >= l.each:
		if !l.greedy {
			l.greedy = true
			l.log.Error("one address has as many connections to a port as it may have; further ones of it are closed", "address", from.String(), "limit", l.each, "setting", l.eachSetting)
		}
	default:
		if l.from == nil {
			l.from = map[netip.Prefix]int{}
		}
		l.open++
		l.from[from]++
		return &counted{Conn: c, limit: l, from: from}
	}
	_ = c.Close()
	return nil
}

// held is how many connections are open.
func (l *limit) held() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open
}

func (l *limit) release(from netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
	if l.from[from]--; l.from[from] == 0 {
		delete(l.from, from)
	}
}

// source is what counts as one address: of IPv6, a network of 64 bits, since
// one host has all of its addresses. Others than IP addresses are one.
func source(a net.Addr) netip.Prefix {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := t.AddrPort().Addr().Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	p, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

// counted is a connection that counts while it is open.
type counted struct {
	net.Conn
	limit *limit
	from  netip.Prefix
	once  sync.Once
}

// Close closes the connection.
func (c *counted) Close() error {
	c.once.Do(func() { c.limit.release(c.from) })
	return c.Conn.Close()
}

// limited is a listener with a limit.
type limited struct {
	net.Listener
	limit *limit
}

// Accept returns the next connection within the limit.
func (l limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c = l.limit.admit(c); c != nil {
			return c, nil
		}
	}
}

//go:build !linux

package xds

import (
	"syscall"
	"time"
)

// userTimeout is Linux's alone; elsewhere keep-alive has to do.
func userTimeout(time.Duration) func(network, address string, c syscall.RawConn) error { return nil }

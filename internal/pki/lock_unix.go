//go:build unix

package pki

import (
	"os"
	"syscall"
)

// lockDir keeps a second process that starts at the same moment from making
// other certificates in the directory.
func lockDir(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX); err != nil {
		d.Close()
		return nil, err
	}
	return func() { d.Close() }, nil
}

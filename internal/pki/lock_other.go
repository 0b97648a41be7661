//go:build !unix

package pki

// lockDir does nothing here: control planes run on Unix.
func lockDir(string) (unlock func(), err error) { return func() {}, nil }

package dp

import "syscall"

// childAttributes puts Envoy into a process group of its own, so that a signal
// from the terminal reaches kuma-dp alone, and lets the kernel end it with us.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

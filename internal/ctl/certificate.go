package ctl

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kuma/internal/errs"
	"kuma/internal/pki"
)

func (a *app) tlsCertificateCommand() *cobra.Command {
	var kind, keyType, certFile, keyFile string
	var hosts, oldHosts []string
	c := &cobra.Command{
		Use:   "tls-certificate",
		Short: "Make a certificate and its key for a server or a client",
		Long: "Make a certificate and its key for a server or a client.\n\nThe certificate is its own authority and valid for ten years: " +
			"give the same file to those who verify it as their CA.\nFiles that are there are replaced, both or none. With - for both files the key comes first.",
		Example: "  kumactl generate tls-certificate --type server --hostname cp.example,10.0.0.1 --cert-file tls.crt --key-file tls.key\n" +
			"  kumactl generate tls-certificate --type client --cert-file client.crt --key-file client.key",
		Args: onlyFlags,
		RunE: func(*cobra.Command, []string) error {
			if len(oldHosts) > 0 {
				a.warn("--cp-hostname is deprecated; use --hostname")
			}
			hosts = slices.Concat(hosts, oldHosts)
			var missing []string
			if len(hosts) == 0 && kind != "client" {
				missing = append(missing, `"hostname"`)
			}
			if kind == "" {
				missing = append(missing, `"type"`)
			}
			if len(missing) > 0 {
				return errs.New(errs.Invalid, "required flag(s) %s not set", strings.Join(missing, ", "))
			}
			cert, key, err := pki.GenerateTLS(kind, hosts, keyType)
			if err != nil {
				return err
			}
			return a.savePair(certFile, keyFile, cert, key)
		},
	}
	f := c.Flags()
	f.StringVar(&kind, "type", "", "who will show it: server or client (required)")
	f.StringSliceVar(&hosts, "hostname", nil, "host name or IP address that it is for; may be repeated, or a list with commas (required for a server)")
	f.StringSliceVar(&oldHosts, "cp-hostname", nil, "older name of --hostname")
	// Not MarkDeprecated: that would say so on standard output, where the
	// certificate may go.
	must(f.MarkHidden("cp-hostname"))
	f.StringVar(&certFile, "cert-file", "cert.pem", "file for the certificate, - for standard output")
	f.StringVar(&keyFile, "key-file", "key.pem", "file for the private key, - for standard output")
	f.StringVar(&keyType, "key-type", "rsa", "sort of key: rsa (2048 bits) or ecdsa (P-256)")
	choices(c, "type", "server", "client")
	choices(c, "key-type", "rsa", "ecdsa")
	return c
}

// onlyFlags refuses arguments, and says where they come from if it was a
// backslash that is not the last of its line: a shell then takes a space, or a
// comment, for an argument. Spaces alone do no harm.
func onlyFlags(c *cobra.Command, args []string) error {
	for _, a := range args {
		switch trimmed := strings.TrimSpace(a); {
		case trimmed == "":
		case trimmed[0] == '#':
			return fmt.Errorf("%s was given a comment: where a command goes on in the next line, the backslash must be the last of its line; take out what follows it", c.CommandPath())
		default:
			return fmt.Errorf("unknown command %q for %q: it takes flags only", a, c.CommandPath())
		}
	}
	return nil
}

// savePair writes a key and its certificate: both files or none of them.
func (a *app) savePair(certFile, keyFile string, cert, key []byte) error {
	if certFile == "" || keyFile == "" {
		return errs.New(errs.Invalid, "--cert-file and --key-file must name two files, or - for standard output")
	}
	var pair []*staged
	defer func() {
		for _, s := range pair {
			s.discard()
		}
	}()
	var printed []byte
	for _, f := range []struct {
		path    string
		content []byte
		mode    fs.FileMode
	}{{keyFile, key, 0o400}, {certFile, cert, 0o600}} {
		if f.path == "-" {
			printed = append(printed, f.content...)
			continue
		}
		s, err := stage(f.path, f.content, f.mode)
		if err != nil {
			return fmt.Errorf("save %s: %w", f.path, err)
		}
		pair = append(pair, s)
	}
	if len(pair) == 2 && pair[0].path == pair[1].path {
		return errs.New(errs.Invalid, "--cert-file and --key-file must name two files, or - for standard output; both lead to %s", pair[0].path)
	}
	// What is printed comes first: if nobody takes it, the files stay as they
	// are.
	if err := a.write(printed); err != nil {
		return err
	}
	for i, s := range pair {
		if err := s.commit(); err != nil {
			err = fmt.Errorf("save %s: %w", s.path, err)
			for _, done := range pair[:i] {
				err = errors.Join(err, done.undo())
			}
			return err
		}
	}
	if len(printed) > 0 {
		return nil
	}
	return a.print("Private key saved in %s\nCertificate saved in %s\n", keyFile, certFile)
}

// staged is a file that was written beside its place and waits to be moved
// there.
type staged struct {
	// path is the place, a symbolic link followed.
	path string
	// next is the new file, old a second name of the one that it replaces; empty
	// where there is none.
	next, old string
}

// stage writes a file beside its place. The place must be free or hold a
// regular file.
func stage(path string, content []byte, mode fs.FileMode) (s *staged, err error) {
	if path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	} else if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		path = filepath.Join(dir, filepath.Base(path))
	}
	s = &staged{path: path}
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, errs.New(errs.Invalid, "it is there and no regular file; give another name, or - for standard output")
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return nil, err
	}
	s.next = f.Name()
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil && st != nil {
		// On a file system without links it can't be put back, and that is all.
		if old := s.next + ".old"; os.Link(path, old) == nil {
			s.old = old
		}
	}
	if err != nil {
		s.discard()
		return nil, err
	}
	return s, nil
}

// commit moves the file to its place.
func (s *staged) commit() error {
	if err := os.Rename(s.next, s.path); err != nil {
		return err
	}
	s.next = ""
	return nil
}

// undo puts back what was there.
func (s *staged) undo() error {
	if s.old == "" {
		return os.Remove(s.path)
	}
	err := os.Rename(s.old, s.path)
	s.old = ""
	return err
}

// discard takes away what is left beside the place.
func (s *staged) discard() {
	for _, f := range []string{s.next, s.old} {
		if f != "" {
			_ = os.Remove(f)
		}
	}
}

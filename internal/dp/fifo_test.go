package dp

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A file of the command line may be a pipe: what is written into it is read, by
// whomever and whenever, but who waits in vain is told so.
func TestReadPipe(t *testing.T) {
	t.Parallel()
	fifo := func() string {
		t.Helper()
		file := filepath.Join(t.TempDir(), "token")
		if err := unix.Mkfifo(file, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	writer := func(file string) *os.File { // there is one only once the reader is there
		t.Helper()
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		if err != nil {
			t.Error(err)
		}
		return f
	}
	t.Run("nobody writes", func(t *testing.T) {
		_, err := readWithin(fifo(), 100, 20*time.Millisecond)
		if err == nil || !strings.Contains(err.Error(), "it is a pipe into which nobody has written anything within 20ms") {
			t.Errorf("%v", err)
		}
	})
	t.Run("a writer who does not end", func(t *testing.T) {
		file := fifo()
		both, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer both.Close()
		if _, err := both.WriteString("half"); err != nil {
			t.Fatal(err)
		}
		if _, err := readWithin(file, 100, 20*time.Millisecond); err == nil || !strings.Contains(err.Error(), "it is a pipe whose writer has not ended within 20ms") {
			t.Errorf("%v", err)
		}
	})
	t.Run("a writer who comes later, in parts", func(t *testing.T) {
		file := fifo()
		done := make(chan struct{})
		go func() {
			defer close(done)
			f := writer(file)
			f.WriteString("one")
			f.WriteString(" two")
			f.Close()
		}()
		b, err := readWithin(file, 100, time.Minute)
		if err != nil || string(b) != "one two" {
			t.Errorf("%q, %v", b, err)
		}
		<-done
	})
	t.Run("a writer who writes too much", func(t *testing.T) {
		file := fifo()
		go func() {
			f := writer(file)
			f.WriteString(strings.Repeat("x", 101))
			f.Close()
		}()
		if _, err := readWithin(file, 100, time.Minute); err == nil || !strings.Contains(err.Error(), "more than the 100 bytes") {
			t.Errorf("%v", err)
		}
	})
	// What a shell makes of <(printf secret): a pipe without a name, whose writer
	// may have gone before, and may have written nothing.
	t.Run("process substitution", func(t *testing.T) {
		if _, err := os.Stat("/dev/fd"); err != nil {
			t.Skip(err)
		}
		for written, late := range map[string]bool{"secret": false, "": false, "secret later": true} {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			write := func() {
				w.WriteString(written)
				w.Close()
			}
			if late {
				go write()
			} else {
				write()
			}
			again := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestReadInherited$")
			again.Env, again.ExtraFiles = append(os.Environ(), "KUMA_TEST_INHERITED="+written+"."), []*os.File{r}
			if out, err := again.CombinedOutput(); err != nil {
				t.Errorf("%q: %v: %s", written, err, out)
			}
			r.Close()
		}
	})
}

// TestReadInherited is the program of TestReadPipe that inherits a pipe.
func TestReadInherited(t *testing.T) {
	want, ok := strings.CutSuffix(os.Getenv("KUMA_TEST_INHERITED"), ".")
	if !ok {
		t.Skip("TestReadPipe starts it")
	}
	if b, err := readLimited("/dev/fd/3", 100); err != nil || string(b) != want {
		t.Errorf("%q, %v", b, err)
	}
}

// Command demo tells the product's main job in the terminal, with real
// programs on this machine, and exits with 0 only if every step was true.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"

	"kuma/test/lab"
	"kuma/test/story"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if len(os.Args) > 1 && os.Args[1] == "service" {
		err = story.Service(ctx, os.Args[2:])
	} else {
		err = run(ctx, os.Args[1:])
	}
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	bin := fs.String("bin", "bin", "directory with kuma-cp, kuma-dp and kumactl")
	envoy := fs.String("envoy", "envoy", "path of an Envoy")
	keep := fs.Bool("keep", os.Getenv("KEEP") == "1", "leave everything running until Ctrl-C")
	if err := fs.Parse(args); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if *bin, err = absolute(*bin); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "kuma-demo-")
	if err != nil {
		return err
	}
	l := lab.New(dir, *bin, *envoy)
	t := &teller{out: os.Stdout, color: term.IsTerminal(int(os.Stdout.Fd()))}
	t.line("", "A service mesh in a minute: every step says what is expected, then what was seen.", "")
	s := story.New(l, t, []string{self})
	began := time.Now()
	err = s.Run(ctx)
	if err != nil {
		t.line("", t.paint("31;1", "✗ The story is not true."), "  Logs are in "+dir, "")
		l.Close()
		return err
	}
	t.line("", t.paint("32;1", fmt.Sprintf("✓ All %d steps were true, in %.1f s.", t.n, time.Since(began).Seconds())), "")
	if *keep {
		t.line("It goes on running until you press Ctrl-C. Try:", "")
		for _, c := range s.Next() {
			t.line("  " + c)
		}
		t.line("")
		<-ctx.Done()
	} else {
		t.line("make demo KEEP=1 leaves it running and says what to try next.", "")
	}
	l.Close()
	return os.RemoveAll(dir)
}

func absolute(path string) (string, error) {
	wd, err := os.Getwd()
	if err != nil || strings.HasPrefix(path, "/") {
		return path, err
	}
	return wd + "/" + path, nil
}

// teller writes the story for a terminal, or plainly where there is none.
type teller struct {
	out   io.Writer
	color bool
	n     int
}

func (t *teller) paint(code, s string) string {
	if !t.color {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (t *teller) line(lines ...string) {
	for _, l := range lines {
		fmt.Fprintln(t.out, l)
	}
}

// Step begins a step.
func (t *teller) Step(title, expected string) {
	t.n++
	t.line(t.paint("1", fmt.Sprintf("%2d. %s", t.n, title)), "    expected  "+expected)
}

// Command shows a command.
func (t *teller) Command(line string) { t.line("    " + t.paint("36", "$ "+line)) }

// Seen ends a step.
func (t *teller) Seen(seen string, ok bool) {
	mark := t.paint("32", "✓")
	if !ok {
		mark = t.paint("31", "✗")
	}
	t.line("    seen      "+seen+" "+mark, "")
}

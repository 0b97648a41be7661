package scripts_test

import (
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
)

// manualCommand follows a manual: it writes the files that it shows ("yaml
// file=NAME"), runs the commands of its console blocks in their order on the
// story's control plane, and compares what they print. With UPDATE set, what
// they print is written into the manual.
func manualCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: manual FILE")
	}
	text := ts.ReadFile(args[0])
	// The manual's control plane is at the usual address; its token is no token.
	real := strings.NewReplacer("http://localhost:5681", ts.Getenv("URL"), "eyJhbGciOi", ts.Getenv("TOKEN"))
	shown := strings.NewReplacer(ts.Getenv("URL"), "http://localhost:5681", ts.Getenv("TOKEN"), "eyJhbGciOi")
	commands, wrong, updated := 0, 0, text
	for kind, block := range fenced(text) {
		if name, ok := strings.CutPrefix(kind, "yaml file="); ok {
			ts.Check(os.WriteFile(ts.MkAbs(name), []byte(block), 0o600))
			continue
		}
		if kind != "console" {
			continue
		}
		now := ""
		for example := range strings.SplitSeq(strings.TrimPrefix(block, "$ "), "\n$ ") {
			command, want, _ := strings.Cut(strings.TrimSuffix(example, "\n"), "\n")
			line, file, redirected := strings.Cut(command, " > ")
			words := strings.Fields(real.Replace(line))
			if words[0] != "kumactl" {
				ts.Fatalf("%q is not a command of kumactl", command)
			}
			commands++
			run := func() (got, diff string, err error) {
				err = ts.Exec(words[0], words[1:]...)
				out := ts.ReadFile("stdout")
				if redirected {
					ts.Check(os.WriteFile(ts.MkAbs(file), []byte(out), 0o600))
					out = ""
				}
				got = strings.TrimSuffix(shown.Replace(out+ts.ReadFile("stderr")), "\n")
				return got, cmp.Diff(steady(want), steady(got)), err
			}
			got, diff, err := run()
			// The proxy follows what was applied a moment ago.
			for deadline := time.Now().Add(patience); diff != "" && words[1] == "inspect" && time.Now().Before(deadline); {
				time.Sleep(10 * time.Millisecond) // there is no event to wait for: a program is asked
				got, diff, err = run()
			}
			if diff != "" {
				wrong++
				ts.Logf("%s (-manual +real):\n%s", command, diff)
			}
			if failed := strings.HasPrefix(want, "Error: ") || strings.Contains(want, "\nError: "); (err != nil) != failed {
				wrong++
				ts.Logf("%s: %v; the manual shows an error: %v", command, err, failed)
			}
			now += "$ " + command + "\n"
			if got != "" {
				now += got + "\n"
			}
		}
		updated = strings.Replace(updated, "```console\n"+block+"```", "```console\n"+now+"```", 1)
	}
	if os.Getenv("UPDATE") != "" {
		ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(updated), 0o644))
		return
	}
	if commands < 20 || wrong > 0 {
		ts.Fatalf("%s: %d of %d commands do not do what it says (UPDATE=1 writes what they do)", args[0], wrong, commands)
	}
}

var (
	columns   = regexp.MustCompile(` {3,}`)
	timestamp = regexp.MustCompile(`\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?`)
	ageOrSum  = regexp.MustCompile(`^\d+[smhd]?$`)
)

// steady replaces what is another thing each time: points in time, and a
// table's cells that are ages or counts, with the columns' widths.
func steady(text string) string {
	lines := strings.Split(timestamp.ReplaceAllString(text, "TIME"), "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, " ") {
			continue // YAML, or an error's second line
		}
		cells := columns.Split(line, -1)
		for j := range cells {
			if len(cells) > 1 && ageOrSum.MatchString(cells[j]) {
				cells[j] = "N"
			}
		}
		lines[i] = strings.Join(cells, "   ")
	}
	return strings.Join(lines, "\n")
}

// fenced yields the fenced blocks of a Markdown text with what follows their
// opening fence.
func fenced(text string) func(yield func(kind, block string) bool) {
	return func(yield func(kind, block string) bool) {
		parts := strings.Split("\n"+text, "\n```")
		for i := 1; i+1 < len(parts); i += 2 {
			kind, block, _ := strings.Cut(parts[i], "\n")
			if !yield(kind, block+"\n") {
				return
			}
		}
	}
}

package dp

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// An exposition is the text in which a program shows its metrics: Prometheus's
// text format 0.0.4, or OpenMetrics. It is read here line by line, each line
// checked and none kept, so that an application can't make kuma-dp large: the
// libraries that parse the one form hold a page whole, at many times its size,
// and don't read the other.

// exposition is a form of that text.
type exposition int

// From the least to the most that an application can offer.
const (
	plainText exposition = iota
	openMetrics001
	openMetrics100
)

func (e exposition) open() bool { return e != plainText }

func (e exposition) contentType() string {
	switch e {
	case openMetrics100:
		return "application/openmetrics-text; version=1.0.0; charset=utf-8"
	case openMetrics001:
		return "application/openmetrics-text; version=0.0.1; charset=utf-8"
	}
	return "text/plain; version=0.0.4; charset=utf-8"
}

// expositionOf tells the form from a Content-Type. Who says nothing, speaks the
// plain one.
func expositionOf(contentType string) (exposition, error) {
	if contentType == "" {
		return plainText, nil
	}
	kind, params, err := mime.ParseMediaType(contentType)
	if err != nil {
		return 0, fmt.Errorf("its content type %.100q can't be read", contentType)
	}
	switch version := params["version"]; {
	case kind == "text/plain" && (version == "" || strings.HasPrefix(version, "0.0.") || strings.HasPrefix(version, "1.0.")):
		return plainText, nil
	case kind == "application/openmetrics-text" && version == "1.0.0":
		return openMetrics100, nil
	case kind == "application/openmetrics-text" && (version == "" || version == "0.0.1"):
		return openMetrics001, nil
	}
	return 0, fmt.Errorf("its content type %.100q is not one of metrics: text/plain (version 0.0.4) or application/openmetrics-text", contentType)
}

// negotiate chooses the best form that a scraper accepts.
func negotiate(accept string) exposition {
	best, weight := plainText, 0.0
	for part := range strings.SplitSeq(accept, ",") {
		kind, params, err := mime.ParseMediaType(strings.TrimSpace(part))
		if err != nil {
			continue
		}
		q := 1.0
		if text, ok := params["q"]; ok {
			if q, err = strconv.ParseFloat(text, 64); err != nil || !(q > 0) {
				continue
			}
		}
		form := plainText
		switch version := params["version"]; {
		case kind == "application/openmetrics-text" && version == "1.0.0":
			form = openMetrics100
		case kind == "application/openmetrics-text" && (version == "" || version == "0.0.1"):
			form = openMetrics001
		case kind != "text/plain" && kind != "text/*" && kind != "*/*":
			continue
		}
		if q > weight || q == weight && form > best {
			best, weight = form, q
		}
	}
	return best
}

// maxMetricLine is the longest line of an exposition, in bytes, maxSeriesLabels
// how many labels a series may have.
const (
	maxMetricLine   = 256 << 10
	maxSeriesLabels = 128
)

// metricLine is one line. Its parts lie in the reader's memory and hold until
// the next one is read. Names may be in quotation marks; text between them
// stays escaped.
type metricLine struct {
	kind lineKind
	// name is the family's, or the series'.
	name []byte
	// text is that of HELP, TYPE or UNIT.
	text   []byte
	labels []seriesLabel
	value  []byte
	// stamp and exemplar may be empty; an exemplar begins with its brace.
	stamp, exemplar []byte
}

type seriesLabel struct{ name, value []byte }

type lineKind int

const (
	helpLine lineKind = iota
	typeLine
	unitLine
	sampleLine
)

// label returns a label's value, still escaped.
func (l *metricLine) label(name string) []byte {
	for _, s := range l.labels {
		if string(s.name) == name {
			return s.value
		}
	}
	return nil
}

// metricReader reads an exposition.
type metricReader struct {
	lines  *bufio.Scanner
	form   exposition
	number int
	ended  bool
	line   metricLine
}

func newMetricReader(r io.Reader, form exposition) *metricReader {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 16<<10), maxMetricLine)
	return &metricReader{lines: s, form: form}
}

// next returns the next line that says something, or io.EOF.
func (r *metricReader) next() (*metricLine, error) {
	for r.lines.Scan() {
		r.number++
		b := r.lines.Bytes()
		if r.ended {
			return nil, fmt.Errorf("line %d: there is something behind # EOF", r.number)
		}
		said, err := r.read(b)
		if err != nil {
			return nil, fmt.Errorf("line %d, %.60q: %w", r.number, b, err)
		}
		if said {
			return &r.line, nil
		}
	}
	if err := r.lines.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			return nil, fmt.Errorf("line %d is longer than the %d bytes that are allowed", r.number+1, maxMetricLine)
		}
		return nil, err
	}
	if r.form.open() && !r.ended {
		return nil, errors.New("it does not end with # EOF, as OpenMetrics must, so a part of it may be missing")
	}
	return nil, io.EOF
}

func (r *metricReader) read(b []byte) (said bool, err error) {
	if !utf8.Valid(b) {
		return false, errors.New("it is not UTF-8")
	}
	if !r.form.open() {
		b = trimBlanks(b)
	}
	if len(b) == 0 {
		return false, nil
	}
	r.line = metricLine{labels: r.line.labels[:0]}
	if b[0] != '#' {
		r.line.kind = sampleLine
		return true, r.line.sample(b, r.form)
	}
	word, rest := cutBlank(skipBlanks(b[1:]))
	switch {
	case string(word) == "EOF" && r.form.open():
		r.ended = true
		return false, nil
	case string(word) == "TYPE":
		r.line.kind = typeLine
	case string(word) == "HELP":
		r.line.kind = helpLine
	case string(word) == "UNIT" && r.form.open():
		r.line.kind = unitLine
	default:
		return false, nil
	}
	if r.line.name, rest, err = metricName(skipBlanks(rest)); err != nil {
		return false, err
	}
	r.line.text = skipBlanks(rest)
	if r.line.kind == typeLine {
		r.line.text = trimBlanks(r.line.text)
		if !slices.Contains(knownTypes(r.form), string(r.line.text)) {
			return false, fmt.Errorf("%.40q is no type of metrics", r.line.text)
		}
	}
	return true, nil
}

func knownTypes(form exposition) []string {
	if form.open() {
		return []string{"counter", "gauge", "histogram", "gaugehistogram", "summary", "info", "stateset", "unknown"}
	}
	return []string{"counter", "gauge", "histogram", "summary", "untyped"}
}

func isBlank(c byte) bool { return c == ' ' || c == '\t' }

func skipBlanks(b []byte) []byte {
	for len(b) > 0 && isBlank(b[0]) {
		b = b[1:]
	}
	return b
}

func trimBlanks(b []byte) []byte {
	b = skipBlanks(b)
	for len(b) > 0 && isBlank(b[len(b)-1]) {
		b = b[:len(b)-1]
	}
	return b
}

func cutBlank(b []byte) (word, rest []byte) {
	for i, c := range b {
		if isBlank(c) {
			return b[:i], b[i:]
		}
	}
	return b, nil
}

// identifier cuts a name off, which may be empty.
func identifier(b []byte, colon bool) (name, rest []byte) {
	for i, c := range b {
		letter := c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || colon && c == ':'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return b[:i], b[i:]
		}
	}
	return b, nil
}

// quoted cuts a text in quotation marks off, with them.
func quoted(b []byte) (text, rest []byte, err error) {
	for i := 1; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return b[:i+1], b[i+1:], nil
		}
	}
	return nil, nil, errors.New("a quotation mark is missing")
}

// bare takes the quotation marks from a name that needs none.
func bare(name []byte) []byte {
	inside := name[1 : len(name)-1]
	if id, rest := identifier(inside, false); len(id) > 0 && len(rest) == 0 {
		return inside
	}
	return name
}

// metricName cuts a metric's name off.
func metricName(b []byte) (name, rest []byte, err error) {
	if len(b) > 0 && b[0] == '"' {
		if name, rest, err = quoted(b); err != nil {
			return nil, nil, err
		}
		return bare(name), rest, nil
	}
	if name, rest = identifier(b, true); len(name) == 0 {
		return nil, nil, errors.New("there is no name of a metric")
	}
	return name, rest, nil
}

// sample reads a line with a value.
func (l *metricLine) sample(b []byte, form exposition) error {
	if b[0] != '{' {
		if l.name, b = identifier(b, true); len(l.name) == 0 {
			return errors.New("it does not begin with the name of a metric")
		}
	}
	b = skipBlanks(b)
	if len(b) > 0 && b[0] == '{' {
		var err error
		if b, err = l.set(b, true); err != nil {
			return err
		}
	}
	if len(l.name) == 0 {
		return errors.New("there is no name of a metric")
	}
	l.value, b = cutBlank(skipBlanks(b))
	if err := number(l.value); err != nil {
		return err
	}
	b = skipBlanks(b)
	if len(b) > 0 && b[0] != '#' {
		l.stamp, b = cutBlank(b)
		if err := checkStamp(l.stamp, form); err != nil {
			return err
		}
		b = skipBlanks(b)
	}
	if len(b) == 0 {
		return nil
	}
	if !form.open() || b[0] != '#' {
		return errors.New("there is something behind the value")
	}
	l.exemplar = skipBlanks(b[1:])
	if len(l.exemplar) == 0 || l.exemplar[0] != '{' {
		return errors.New("an exemplar must begin with its labels")
	}
	var e metricLine
	rest, err := e.set(l.exemplar, false)
	if err != nil {
		return err
	}
	value, rest := cutBlank(skipBlanks(rest))
	if err := number(value); err != nil {
		return err
	}
	stamp, rest := cutBlank(skipBlanks(rest))
	if len(stamp) > 0 {
		if err := checkStamp(stamp, form); err != nil {
			return err
		}
	}
	if len(skipBlanks(rest)) > 0 {
		return errors.New("there is something behind the exemplar")
	}
	return nil
}

// set reads the labels between braces; in those of a series its name may stand
// too, in quotation marks.
func (l *metricLine) set(b []byte, named bool) (rest []byte, err error) {
	b = skipBlanks(b[1:])
	for {
		if len(b) == 0 {
			return nil, errors.New("a closing brace is missing")
		}
		if b[0] == '}' {
			return b[1:], nil
		}
		var name, value []byte
		inQuotes := b[0] == '"'
		if inQuotes {
			if name, b, err = quoted(b); err != nil {
				return nil, err
			}
			name = bare(name)
		} else if name, b = identifier(b, false); len(name) == 0 {
			return nil, errors.New("there is no name of a label")
		}
		b = skipBlanks(b)
		switch {
		case len(b) > 0 && b[0] == '=':
			b = skipBlanks(b[1:])
			if len(b) == 0 || b[0] != '"' {
				return nil, fmt.Errorf("the value of label %.40q must be in quotation marks", name)
			}
			if value, b, err = quoted(b); err != nil {
				return nil, err
			}
			if string(name) == "__name__" {
				return nil, errors.New("a label must not be called __name__")
			}
			if l.label(string(name)) != nil {
				return nil, fmt.Errorf("label %.40q is there twice", name)
			}
			if len(l.labels) == maxSeriesLabels {
				return nil, fmt.Errorf("there are more than the %d labels that are allowed", maxSeriesLabels)
			}
			l.labels = append(l.labels, seriesLabel{name, value[1 : len(value)-1 : len(value)-1]})
		case inQuotes && named && len(l.name) == 0 && len(l.labels) == 0:
			l.name = name
		default:
			return nil, fmt.Errorf("label %.40q has no value", name)
		}
		b = skipBlanks(b)
		switch {
		case len(b) > 0 && b[0] == ',':
			b = skipBlanks(b[1:])
		case len(b) > 0 && b[0] != '}':
			return nil, errors.New("labels must be separated by commas")
		}
	}
}

// number checks a value. Forms that Go knows and Prometheus doesn't are none.
func number(b []byte) error {
	if _, err := strconv.ParseFloat(string(b), 64); err != nil || bytes.ContainsAny(b, "_xXpP") {
		return fmt.Errorf("%.40q is no number", b)
	}
	return nil
}

func checkStamp(b []byte, form exposition) error {
	if form.open() {
		if f, err := strconv.ParseFloat(string(b), 64); err != nil || math.IsNaN(f) || math.IsInf(f, 0) || bytes.ContainsAny(b, "_xXpP") {
			return fmt.Errorf("%.40q is no time stamp in seconds", b)
		}
		return nil
	}
	if _, err := strconv.ParseInt(string(b), 10, 64); err != nil {
		return fmt.Errorf("%.40q is no time stamp in milliseconds", b)
	}
	return nil
}

// addedLabel is a label that kuma-dp puts on series; its value is escaped.
type addedLabel struct{ name, value string }

var labelEscapes = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

// addedLabels makes them of names and values. What a label's name can't hold
// becomes "_": a scraper may know no other names.
func addedLabels(from map[string]string) ([]addedLabel, error) {
	var out []addedLabel
	for key, value := range from {
		name := []byte(key)
		for i, c := range name {
			if c != '_' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (i == 0 || c < '0' || c > '9') {
				name[i] = '_'
			}
		}
		switch {
		case len(name) == 0 || strings.HasPrefix(string(name), "__"):
			return nil, fmt.Errorf("%.100q can't be the name of a label: it must not be empty nor begin with two underscores", key)
		case len(name) > 256 || len(value) > 4096:
			return nil, fmt.Errorf("label %.100q is too long: its name may have 256 bytes and its value 4096", key)
		}
		out = append(out, addedLabel{string(name), labelEscapes.Replace(strings.ToValidUTF8(value, "\uFFFD"))})
	}
	if len(out) > maxSeriesLabels {
		return nil, fmt.Errorf("there are %d labels to add, the limit is %d", len(out), maxSeriesLabels)
	}
	slices.SortFunc(out, func(a, b addedLabel) int {
		return strings.Compare(a.name+"\x00"+a.value, b.name+"\x00"+b.value)
	})
	return slices.CompactFunc(out, func(a, b addedLabel) bool { return a.name == b.name }), nil
}

// metricWriter writes lines of any form in one form. It keeps what a family
// says of itself until all of it is known.
type metricWriter struct {
	out  *bufio.Writer
	form exposition
	add  []addedLabel

	// about is the family whose metadata is kept, from says in which form.
	about            []byte
	kind, help, unit []byte
	hasHelp          bool
	from             exposition
	buf              []byte
}

// write writes a line that was read in the form given.
func (w *metricWriter) write(l *metricLine, from exposition) error {
	if l.kind == sampleLine {
		w.flush()
		w.buf = w.sampleLine(appendSeries(w.buf[:0], l, w.add), l, from)
		_, err := w.out.Write(w.buf)
		return err
	}
	if !bytes.Equal(w.about, l.name) {
		w.flush()
		w.about, w.from = append(w.about[:0], l.name...), from
	}
	switch l.kind {
	case typeLine:
		w.kind = append(w.kind[:0], l.text...)
	case helpLine:
		w.help, w.hasHelp = append(w.help[:0], l.text...), true
	case unitLine:
		w.unit = append(w.unit[:0], l.text...)
	}
	return nil
}

// sampleLine completes a series with its value and what follows.
func (w *metricWriter) sampleLine(b []byte, l *metricLine, from exposition) []byte {
	b = append(append(b, ' '), l.value...)
	if len(l.stamp) > 0 {
		b = appendStamp(append(b, ' '), l.stamp, from, w.form)
	}
	if len(l.exemplar) > 0 && w.form.open() {
		b = append(append(b, " # "...), l.exemplar...)
	}
	return append(b, '\n')
}

// appendStamp writes a time stamp: milliseconds in the plain form, seconds in
// the other.
func appendStamp(b, stamp []byte, from, to exposition) []byte {
	switch {
	case from.open() == to.open():
		return append(b, stamp...)
	case to.open():
		ms, _ := strconv.ParseInt(string(stamp), 10, 64)
		return strconv.AppendFloat(b, float64(ms)/1000, 'f', -1, 64)
	}
	s, _ := strconv.ParseFloat(string(stamp), 64)
	return strconv.AppendFloat(b, math.Round(s*1000), 'f', 0, 64)
}

// appendSeries writes a series' name and labels. A label that kuma-dp adds is
// its own word: what the application calls so becomes "exported_…", as
// Prometheus itself does.
func appendSeries(b []byte, l *metricLine, add []addedLabel) []byte {
	inBraces := l.name[0] == '"'
	if !inBraces {
		b = append(b, l.name...)
	}
	if len(l.labels)+len(add) == 0 && !inBraces {
		return b
	}
	b = append(b, '{')
	if inBraces {
		b = append(b, l.name...)
		if len(l.labels)+len(add) > 0 {
			b = append(b, ',')
		}
	}
	for _, s := range l.labels {
		name := string(s.name)
		for slices.ContainsFunc(add, func(a addedLabel) bool { return a.name == strings.Trim(name, `"`) }) {
			for name = "exported_" + strings.Trim(name, `"`); l.label(name) != nil; {
				name = "exported_" + name
			}
		}
		b = append(append(b, name...), `="`...)
		b = append(append(b, s.value...), `",`...)
	}
	for _, a := range add {
		b = append(append(b, a.name...), `="`...)
		b = append(append(b, a.value...), `",`...)
	}
	if b[len(b)-1] == ',' {
		b = b[:len(b)-1]
	}
	return append(b, '}')
}

// flush writes what a family says of itself, in the writer's form. Series keep
// their names whatever the form, so a counter whose name OpenMetrics would not
// take is of unknown type there.
func (w *metricWriter) flush() {
	if len(w.about) == 0 {
		return
	}
	name, kind, help := string(w.about), string(w.kind), string(w.help)
	if w.from.open() != w.form.open() {
		inQuotes := strings.HasSuffix(name, `"`)
		name = strings.TrimSuffix(name, `"`)
		switch {
		case w.form.open() && kind == "counter":
			if cut, ok := strings.CutSuffix(name, "_total"); ok && len(cut) > 0 {
				name = cut
			} else {
				kind = "unknown"
			}
		case w.form.open() && kind == "untyped":
			kind = "unknown"
		case kind == "counter":
			name += "_total"
		case kind == "info":
			name, kind = name+"_info", "gauge"
		case kind == "stateset":
			kind = "gauge"
		case kind == "unknown" || kind == "gaugehistogram":
			kind = "untyped"
		}
		if inQuotes {
			name += `"`
		}
		if w.form.open() {
			help = escapeQuotes(help)
		} else {
			help = strings.ReplaceAll(help, `\"`, `"`)
		}
	}
	if w.hasHelp {
		w.line("# HELP ", name, help)
	}
	if kind != "" {
		w.line("# TYPE ", name, kind)
	}
	if len(w.unit) > 0 && w.form.open() {
		w.line("# UNIT ", name, string(w.unit))
	}
	w.about, w.kind, w.help, w.unit, w.hasHelp = w.about[:0], w.kind[:0], w.help[:0], w.unit[:0], false
}

func (w *metricWriter) line(word, name, text string) {
	for _, s := range []string{word, name, " ", text, "\n"} {
		_, _ = w.out.WriteString(s) // the error stays and is met at Flush
	}
}

// escapeQuotes escapes the quotation marks of a text that has its backslashes
// and ends of lines escaped already.
func escapeQuotes(s string) string { return strings.ReplaceAll(s, `"`, `\"`) }

// end writes the end of an exposition.
func (w *metricWriter) end() error {
	w.flush()
	if w.form.open() {
		_, _ = w.out.WriteString("# EOF\n")
	}
	return w.out.Flush()
}

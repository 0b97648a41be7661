package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// secured is in an answer of the backend where the request's header shows a
// SPIFFE id of the caller.
const secured = "x-secured: yes"

const (
	plainAnswer   = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 3\r\n\r\nok\n"
	securedAnswer = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n" + secured + "\r\ncontent-length: 3\r\n\r\nok\n"
	request       = "GET / HTTP/1.1\r\nhost: backend\r\n\r\n"
)

// serve starts the backend: the least that answers HTTP/1.1 requests without a
// body, so that its own cost does not hide that of proxies.
func serve(ctx context.Context) (port int, err error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go answer(c)
		}
	}()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func answer(c net.Conn) {
	defer c.Close()
	r := bufio.NewReaderSize(c, 16<<10)
	known := false
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return
		}
		if len(line) > 2 {
			known = known || bytes.Contains(line, []byte("spiffe://default/caller"))
			continue
		}
		text := plainAnswer
		if known {
			text = securedAnswer
		}
		known = false
		if _, err := io.WriteString(c, text); err != nil {
			return
		}
	}
}

// once makes one request on a connection of its own and returns the head of the
// answer.
func once(port int) (string, error) {
	c, err := net.DialTimeout("tcp4", fmt.Sprintf("127.0.0.1:%d", port), time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		return "", err
	}
	return head(bufio.NewReader(c))
}

// head reads an answer and returns all of it but the body.
func head(r *bufio.Reader) (string, error) {
	var b strings.Builder
	length := 0
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return "", err
		}
		if len(line) <= 2 {
			break
		}
		b.Write(line)
		if v, ok := bytes.CutPrefix(line, []byte("content-length: ")); ok {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(v))); err != nil {
				return "", err
			}
		}
	}
	_, err := r.Discard(length)
	return b.String(), err
}

// load sends requests over so many connections, each with one request at a time,
// and returns how many were answered, and in what time. Any answer but 200 is an
// error.
func load(ctx context.Context, port, connections int, d time.Duration) (int64, time.Duration, error) {
	var (
		wg     sync.WaitGroup
		done   atomic.Int64
		mu     sync.Mutex
		failed error
	)
	begin := time.Now()
	end := begin.Add(d)
	for range connections {
		wg.Go(func() {
			n, err := keepAsking(ctx, port, end)
			done.Add(n)
			if err != nil {
				mu.Lock()
				failed = err
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return done.Load(), time.Since(begin), failed
}

func keepAsking(ctx context.Context, port int, end time.Time) (n int64, err error) {
	c, err := net.DialTimeout("tcp4", fmt.Sprintf("127.0.0.1:%d", port), time.Second)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	_ = c.SetDeadline(end.Add(10 * time.Second))
	r := bufio.NewReaderSize(c, 16<<10)
	for time.Now().Before(end) {
		if ctx.Err() != nil {
			return n, ctx.Err()
		}
		if _, err := io.WriteString(c, request); err != nil {
			return n, err
		}
		h, err := head(r)
		if err != nil {
			return n, err
		}
		if !strings.HasPrefix(h, "HTTP/1.1 200") {
			return n, fmt.Errorf("port %d answered %q", port, h)
		}
		n++
	}
	return n, nil
}

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// storeReads asks the diagnostics port how many times the control plane has read
// its store so far. It returns false where that can't be told: no such port, or
// metrics of another kind.
func (t *target) storeReads(ctx context.Context) (float64, bool) {
	if t.Diagnostics == "" {
		return 0, false
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(t.Diagnostics, "/")+"/metrics", nil)
	if err != nil {
		return 0, false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, false
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, false
	}
	n, err := sumReads(resp.Body)
	return n, err == nil
}

// sumReads adds up the counts of store{operation="get"} and {operation="list"}
// on a page of metrics. A page without a metric "store" is an error.
func sumReads(page io.Reader) (float64, error) {
	sum, found := 0.0, false
	lines := bufio.NewScanner(io.LimitReader(page, 32<<20))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		labels, value, ok := strings.Cut(lines.Text(), "} ")
		if !ok || !strings.HasPrefix(labels, "store_count{") {
			continue
		}
		found = true
		if !strings.Contains(labels, `operation="get"`) && !strings.Contains(labels, `operation="list"`) {
			continue
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", labels, err)
		}
		sum += n
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	if !found {
		return 0, fmt.Errorf("there is no metric \"store\"")
	}
	return sum, nil
}

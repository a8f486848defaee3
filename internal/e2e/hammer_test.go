// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// hammer asks for pages through a forwarded port without pause, each on a
// connection of its own, and counts the answers.
type hammer struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	answers map[string]int // how often each body came
	failed  int
	first   error // what failed first
}

// newHammer begins to ask for path at several ports of 127.0.0.1.
func newHammer(path string, ports ...int) *hammer {
	ctx, cancel := context.WithCancel(context.Background())
	h := &hammer{cancel: cancel, answers: map[string]int{}}
	client := &http.Client{
		Timeout: time.Minute,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext:       (&net.Dialer{Timeout: time.Minute}).DialContext,
		},
	}
	for _, port := range ports {
		url := fmt.Sprintf("http://127.0.0.1:%d%s", port, path)
		h.wg.Go(func() {
			for ctx.Err() == nil {
				h.count(get(client, url))
			}
		})
	}
	return h
}

// get is one request. It is never called off half-way: that would look like a
// failure.
func get(client *http.Client, url string) (string, error) {
	r, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<16))
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, r.Status)
	}
	return string(body), err
}

func (h *hammer) count(body string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.failed++
		if h.first == nil {
			h.first = err
		}
		return
	}
	h.answers[body]++
}

// seen returns how often the body came so far.
func (h *hammer) seen(body string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.answers[body]
}

// stop ends it and returns how many requests were answered, and how many failed.
func (h *hammer) stop() (answered, failed int, first error) {
	h.cancel()
	h.wg.Wait()
	for _, n := range h.answers {
		answered += n
	}
	return answered, h.failed, h.first
}

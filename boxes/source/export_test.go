// SPDX-License-Identifier: Apache-2.0

package source

import (
	"net/http"
	"net/url"
	"time"
)

// SetBackoff makes retries quick.
func (r *Resolver) SetBackoff(d time.Duration) { r.backoff = d }

// FindSum is findSum.
var FindSum = findSum

// SetProxy sets what a request's proxy is.
func (r *Resolver) SetProxy(f func(*http.Request) (*url.URL, error)) { r.proxy = f }

// SPDX-License-Identifier: Apache-2.0

package source

import (
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// A proxy of the environment is used, and one that is no URL is not told with its password.
func TestProxyOfTheEnvironment(t *testing.T) {
	transport, ok := new(Resolver).client(false).Transport.(*http.Transport)
	if !ok || transport.Proxy == nil {
		t.Fatalf("no proxy is asked for: %T", transport)
	}
	want := &url.URL{Scheme: "http", Host: "p:1"}
	if got, err := quietly(http.ProxyURL(want))(nil); got != want || err != nil {
		t.Errorf("got %v, %v", got, err)
	}
	_, err := quietly(func(*http.Request) (*url.URL, error) { return nil, errors.New("invalid proxy http://ada:s3cret@p") })(nil)
	if err == nil || strings.Contains(err.Error(), "s3cret") {
		t.Error(err)
	}
}

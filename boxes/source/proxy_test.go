// SPDX-License-Identifier: Apache-2.0

package source_test

import (
	"errors"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/labfile/lab/boxes/source"
)

// A box is fetched through the proxy of the environment, and one that is no URL is not told
// with its password. net/http reads the environment once, so that each fetch is a process.
func TestProxyOfTheEnvironment(t *testing.T) {
	const box = "http://box.invalid/disk.img"
	if os.Getenv("LAB_TEST_PROXY") != "" {
		f := newFixture(t)
		res, err := f.Resolve(t.Context(), source.Request{Ref: box})
		f.wantBox(res, err, content)
		return
	}
	fetch := func(proxy string) (string, error) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestProxyOfTheEnvironment$", "-test.timeout=60s")
		for _, v := range os.Environ() {
			if name, _, _ := strings.Cut(v, "="); !strings.HasSuffix(strings.ToLower(name), "_proxy") && name != "REQUEST_METHOD" {
				cmd.Env = append(cmd.Env, v)
			}
		}
		cmd.Env = append(cmd.Env, "LAB_TEST_PROXY=1", "http_proxy="+proxy)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	s := newSite(t)
	if out, err := fetch(s.URL); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	s.wantRequests(t, "GET "+box)

	f := newFixture(t)
	f.SetProxy(func(*http.Request) (*url.URL, error) { return nil, errors.New("invalid proxy http://ada:s3cret@p") })
	_, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
	if err == nil || strings.Contains(err.Error(), "s3cret") || !strings.Contains(err.Error(), "the proxy that the environment names is not a URL") {
		t.Error(err)
	}
	s.wantRequests(t, "GET "+box)
}

// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"strings"
	"testing"
)

// A variable that cannot be understood is an error of the commands that need it, which name
// it; the others work.
func TestABadProxyOfTheEnvironment(t *testing.T) {
	d := newDesk(t, strings.Replace(shop, "provider: memory\n", "provider: memory\nproxy: inherit\n", 1))
	d.host.Getenv = func(k string) string { return d.env[k] }
	d.env["http_proxy"] = "ssh://p"
	if out := d.ok("complete", "--", "stop", ""); !strings.Contains(out, "web") {
		t.Errorf("completion has no names:\n%s", out)
	}
	delete(d.env, "http_proxy")
	d.ok("up")
	d.env["http_proxy"] = "http://ada:s3cret@p:0"
	const bad = "the environment variable http_proxy is not the URL of a proxy"
	fails := func(args ...string) {
		t.Helper()
		if code, out, errOut := d.run(args...); code == 0 || !strings.Contains(errOut, bad) || strings.Contains(out+errOut, "s3cret") {
			t.Errorf("lab %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errOut)
		}
	}
	works := func(args ...string) {
		t.Helper()
		if code, out, errOut := d.run(args...); code != 0 || strings.Contains(out+errOut, "Labfile is missing") || strings.Contains(out+errOut, "http_proxy") {
			t.Errorf("lab %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errOut)
		}
	}
	for _, args := range [][]string{{"validate"}, {"plan"}, {"up"}, {"exec", "web", "--", "true"}} {
		fails(args...)
	}
	for _, args := range [][]string{{"status"}, {"stop"}, {"status"}} {
		works(args...)
	}
	fails("start")
	works("destroy", "--yes")
}

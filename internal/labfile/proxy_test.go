// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The environment's proxies are looked at only if guests are to get them, and passwords in
// them are in no message.
func TestProxy(t *testing.T) {
	const bad = "the environment variable https_proxy is not the URL of a proxy, such as http://proxy.example.com:3128; its port is not a number from 1 to 65535"
	for _, c := range []struct {
		name, line, url string
		inherit         bool
		want            string
	}{
		{"none", "", "http://ada:s3cret@p:0", false, ""},
		{"said to be none", "proxy: none", "http://ada:s3cret@p:0", false, ""},
		{"inherit", "proxy: inherit", "http://ada:s3cret@p:1", true, ""},
		{"nothing to inherit", "proxy: inherit", "", true, ""},
		{"a bad one", "proxy: inherit", "http://ada:s3cret@p:0", false, "Labfile:2:8: proxy: " + bad},
		{"a name of the lab", "proxy: inherit", "https://ada:s3cret@web:8443", false, "Labfile:2:8: proxy: the environment variable https_proxy has the proxy https://web, whose name is one of the lab; write the proxy's name with its domain, or rename what the lab calls web"},
		{"the name server's port", "proxy: inherit", "https://ada:s3cret@p:53", false, "Labfile:2:8: proxy: the environment variable https_proxy has the proxy https://p:53, which keeps its port, but that port of the lab's gateway is its name server's or one of expose; expose another port"},
		{"another word", "proxy: http://p:1", "", false, `Labfile:2:8: proxy: "http://p:1" is not one of none, inherit`},
	} {
		o := Options{HostFiles: true, LookupEnv: func(name string) (string, bool) {
			if name != "https_proxy" {
				return "", false
			}
			return c.url, c.url != ""
		}}
		l, err := Parse("Labfile", []byte("lab: shop\n"+c.line+"\nmachines: {web: {box: builtin/tiny}}\n"), o)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if diff := cmp.Diff(c.want, got); diff != "" || strings.Contains(got, "s3cret") {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		if l != nil && l.InheritProxy != c.inherit {
			t.Errorf("%s: inherit is %v", c.name, l.InheritProxy)
		}
		if strings.HasPrefix(got, "Labfile:2:8: proxy: "+bad) { // what makes no machines is not kept from its work
			o.HostFiles = false
			if l, err := Parse("Labfile", []byte("lab: shop\n"+c.line+"\nmachines: {web: {box: builtin/tiny}}\n"), o); err != nil || !l.InheritProxy {
				t.Errorf("%s, without the host's files: %v, %v", c.name, l, err)
			}
		}
	}
}

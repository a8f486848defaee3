// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func getenv(vars ...string) func(string) string {
	return func(name string) string {
		for _, v := range vars {
			if value, ok := strings.CutPrefix(v, name+"="); ok {
				return value
			}
		}
		return ""
	}
}

func TestFromEnv(t *testing.T) {
	for _, c := range []struct {
		name string
		env  []string
		want []string
	}{
		{"none", nil, nil},
		{"no_proxy alone is none", []string{"no_proxy=corp"}, nil},
		{"each", []string{"http_proxy=http://a:1", "https_proxy=http://b:2/", "ftp_proxy=http://c:3", "all_proxy=socks5h://d:4", "no_proxy=x,.y"}, []string{
			"http_proxy=http://a:1", "https_proxy=http://b:2/", "ftp_proxy=http://c:3", "all_proxy=socks5h://d:4", "no_proxy=x,.y",
		}},
		{"capitals", []string{"HTTP_PROXY=http://a:1", "NO_PROXY=x"}, []string{"http_proxy=http://a:1", "no_proxy=x"}},
		{"lower case wins", []string{"HTTP_PROXY=http://a:1", "http_proxy=http://b:2"}, []string{"http_proxy=http://b:2"}},
		{"an empty one does not", []string{"HTTP_PROXY=http://a:1", "http_proxy="}, []string{"http_proxy=http://a:1"}},
		{"no scheme", []string{"http_proxy=proxy.corp:3128"}, []string{"http_proxy=http://proxy.corp:3128"}},
		{"no port", []string{"http_proxy=http://proxy.corp", "https_proxy=https://p", "all_proxy=socks5://s"}, []string{
			"http_proxy=http://proxy.corp:80", "https_proxy=https://p:443", "all_proxy=socks5://s:1080",
		}},
		{"IPv6", []string{"http_proxy=http://[::1]:3128/"}, []string{"http_proxy=http://[::1]:3128/"}},
		{"a password", []string{"http_proxy=http://ada:s3cret@p:1"}, []string{"http_proxy=http://***@p:1"}},
		{"spaces", []string{"http_proxy= http://p:1 ", "no_proxy= a, b c,,d "}, []string{"http_proxy=http://p:1", "no_proxy=a,b,c,d"}},
		{"a malformed no_proxy alone is none", []string{"no_proxy=<local>,http://ada:s3cret@p:1"}, nil},
		{"entries that fit no host", []string{"http_proxy=p:1", "no_proxy=<local>,a|b,fe80::1%eth0,http://x,it's,.corp"}, []string{"http_proxy=http://p:1", "no_proxy=.corp"}},
		{"capitals within", []string{"http_proxy=HTTP://Proxy.Corp:1"}, []string{"http_proxy=http://proxy.corp:1"}},
	} {
		s, err := FromEnv(getenv(c.env...))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if diff := cmp.Diff(c.want, s.Redacted()); diff != "" || s.Empty() != (c.want == nil) {
			t.Errorf("%s: empty %v (-want +got):\n%s", c.name, s.Empty(), diff)
		}
	}
}

func TestFromEnvRefuses(t *testing.T) {
	for _, c := range []struct {
		env  []string
		want string
	}{
		{[]string{"http_proxy=http://ada:s3cret@:3128"}, "the environment variable http_proxy is not the URL of a proxy, such as http://proxy.example.com:3128; it names no host"},
		{[]string{"HTTPS_PROXY=http://ada:s3cret@p:none"}, "the environment variable HTTPS_PROXY is not the URL of a proxy, such as http://proxy.example.com:3128; special characters of a password are written as %XX"},
		{[]string{"http_proxy=http://ada:s3c%ret@p:1"}, "the environment variable http_proxy is not the URL of a proxy, such as http://proxy.example.com:3128; special characters of a password are written as %XX"},
		{[]string{"http_proxy=http://ada:s3cret@p:70000"}, "the environment variable http_proxy is not the URL of a proxy, such as http://proxy.example.com:3128; its port is not a number from 1 to 65535"},
		{[]string{"http_proxy=http://p:0"}, "the environment variable http_proxy is not the URL of a proxy, such as http://proxy.example.com:3128; its port is not a number from 1 to 65535"},
		{[]string{"http_proxy=http://ada:s3cret@p:1/proxy.pac"}, "the environment variable http_proxy is not the URL of a proxy, such as http://proxy.example.com:3128; there is something behind the port"},
		{[]string{"http_proxy=http://p q:1"}, "the environment variable http_proxy is not the URL of a proxy, such as http://proxy.example.com:3128; special characters of a password are written as %XX"},
		{[]string{"http_proxy=http://$(s3cret):1"}, "the environment variable http_proxy is not the URL of a proxy, such as http://proxy.example.com:3128; its host is no name and no address"},
		{[]string{"ALL_PROXY=ssh://ada:s3cret@p:1"}, "the environment variable ALL_PROXY does not begin with http://, https://, socks4://, socks4a://, socks5:// or socks5h://"},
		{[]string{"http_proxy=p:1", "no_proxy=ok,.corp, http://ada:s3cret@p:1"}, "the environment variable no_proxy has a user name or password in entry 3; it is a list of names, addresses and networks"},
		{[]string{"http_proxy=p:1", "NO_PROXY=http://ada:s3cret,more@p:1"}, "the environment variable NO_PROXY has a user name or password in entry 2; it is a list of names, addresses and networks"},
		{[]string{"http_proxy=x://p", "ftp_proxy=y://p"}, "the environment variable http_proxy does not begin with http://, https://, socks4://, socks4a://, socks5:// or socks5h://; " +
			"the environment variable ftp_proxy does not begin with http://, https://, socks4://, socks4a://, socks5:// or socks5h://"},
	} {
		s, err := FromEnv(getenv(c.env...))
		if err == nil || !s.Empty() {
			t.Errorf("%q: no error, but %v", c.env, s)
			continue
		}
		if diff := cmp.Diff(c.want, err.Error()); diff != "" {
			t.Errorf("%q (-want +got):\n%s", c.env, diff)
		}
		var one *EnvError
		if !errors.As(err, &one) || !strings.Contains(one.Hint(), one.Variable) {
			t.Errorf("%q: %#v has no next step", c.env, err)
		}
	}
}

// Whatever prints settings prints no password.
func TestSettingsHidePasswords(t *testing.T) {
	s, err := FromEnv(getenv("http_proxy=http://ada:s3cret@p:1", "all_proxy=socks5://ada:s3cret@p:2"))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	_, err = FromEnv(getenv("http_proxy=p:1", "no_proxy=a,http://ada:s3cret@p:1"))
	for _, format := range []string{"%v\n", "%+v\n", "%#v\n", "%q\n"} {
		fmt.Fprintf(&b, format, err)
	}
	var bad *EnvError
	if !errors.As(err, &bad) {
		t.Fatalf("a login in no_proxy: %v", err)
	}
	fmt.Fprintf(&b, "%#v\n%s\n", *bad, bad.Hint())
	slog.New(slog.NewTextHandler(&b, nil)).Info("proxies", "err", err)
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		fmt.Fprintf(&b, format+"\n", s)
	}
	slog.New(slog.NewTextHandler(&b, nil)).Info("proxies", "settings", s)
	if strings.Contains(b.String(), "s3cret") || strings.Contains(b.String(), "ada") || !strings.Contains(b.String(), "***@p:1") {
		t.Error(b.String())
	}
}

var shop = Lab{
	Gateway: "gateway.lab.internal", Domain: "lab.internal", Names: []string{"web", "db", "api"},
	Networks: []netip.Prefix{netip.MustParsePrefix("10.64.3.0/24"), netip.MustParsePrefix("10.130.0.14/16")},
	Taken:    []uint16{53, 9000},
}

// sortedString keeps the transformer from being applied to its own result.
type sortedString string

const bypass = "localhost,127.0.0.0/8,127.0.0.1,::1,.lab.internal,gateway.lab.internal,gateway,api,db,web,10.64.3.0/24,10.130.0.0/16"

func TestGuest(t *testing.T) {
	gate := func(port uint16, to ...string) Relay { return Relay{Name: "gateway.lab.internal", Port: port, To: to} }
	for _, c := range []struct {
		name   string
		env    []string
		want   []string // the forms in lower case, without no_proxy
		bypass string   // if it is not the usual
		relays []Relay
	}{
		{name: "the loopback by name", env: []string{"http_proxy=http://localhost:3128"}, want: []string{"http_proxy=http://gateway.lab.internal:3128"}, relays: []Relay{gate(3128, "127.0.0.1:3128", "[::1]:3128")}},
		{name: "the loopback by address", env: []string{"http_proxy=http://127.0.0.2:3128/"}, want: []string{"http_proxy=http://gateway.lab.internal:3128/"}, relays: []Relay{gate(3128, "127.0.0.2:3128")}},
		{name: "the loopback of IPv6", env: []string{"http_proxy=http://[::1]:3128"}, want: []string{"http_proxy=http://gateway.lab.internal:3128"}, relays: []Relay{gate(3128, "[::1]:3128")}},
		{name: "a name that this host looks up", env: []string{"http_proxy=http://proxy:8080"}, want: []string{"http_proxy=http://gateway.lab.internal:8080"}, relays: []Relay{gate(8080, "proxy:8080")}},
		{
			name: "one proxy for all", env: []string{"http_proxy=http://p:1", "https_proxy=http://p:1", "ftp_proxy=p:1"},
			want:   []string{"ftp_proxy=http://gateway.lab.internal:1", "http_proxy=http://gateway.lab.internal:1", "https_proxy=http://gateway.lab.internal:1"},
			relays: []Relay{gate(1, "p:1")},
		},
		{
			name: "two with the same port", env: []string{"http_proxy=http://p:1", "https_proxy=http://q:1"},
			want:   []string{"http_proxy=http://gateway.lab.internal:1", "https_proxy=http://gateway.lab.internal:2"},
			relays: []Relay{gate(1, "p:1"), gate(2, "q:1")},
		},
		{name: "a port that is exposed", env: []string{"http_proxy=http://p:9000"}, want: []string{"http_proxy=http://gateway.lab.internal:9001"}, relays: []Relay{gate(9001, "p:9000")}},
		{name: "the name server's port", env: []string{"http_proxy=http://p:53"}, want: []string{"http_proxy=http://gateway.lab.internal:54"}, relays: []Relay{gate(54, "p:53")}},
		{
			name: "passwords", env: []string{"http_proxy=http://ada:p%40s%24s'%23@p:1", "all_proxy=socks5h://ada@p:2"},
			want:   []string{"all_proxy=socks5h://ada@gateway.lab.internal:2", "http_proxy=http://ada:p%40s%24s%27%23@gateway.lab.internal:1"},
			relays: []Relay{gate(1, "p:1"), gate(2, "p:2")},
		},
		{
			name: "TLS to the proxy", env: []string{"http_proxy=http://p:443", "https_proxy=https://secure.corp"},
			want:   []string{"http_proxy=http://gateway.lab.internal:444", "https_proxy=https://secure.corp:443"},
			relays: []Relay{{Name: "secure.corp", Port: 443, To: []string{"secure.corp:443"}}, gate(444, "p:443")},
		},
		{name: "TLS by an address", env: []string{"https_proxy=https://192.0.2.7:443"}, want: []string{"https_proxy=https://192.0.2.7:443"}},
		{name: "TLS on the loopback", env: []string{"https_proxy=https://127.0.0.1:443"}, want: []string{"https_proxy=https://gateway.lab.internal:443"}, relays: []Relay{gate(443, "127.0.0.1:443")}},
		{
			name: "exceptions", env: []string{"http_proxy=http://p:1", "no_proxy=.corp,localhost,db"}, want: []string{"http_proxy=http://gateway.lab.internal:1"},
			bypass: ".corp,localhost,db,127.0.0.0/8,127.0.0.1,::1,.lab.internal,gateway.lab.internal,gateway,api,web,10.64.3.0/24,10.130.0.0/16", relays: []Relay{gate(1, "p:1")},
		},
		{name: "no proxy for anything", env: []string{"http_proxy=http://p:1", "no_proxy=a,*"}, want: []string{"http_proxy=http://gateway.lab.internal:1"}, bypass: "*", relays: []Relay{gate(1, "p:1")}},
	} {
		s, err := FromEnv(getenv(c.env...))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if c.bypass == "" {
			c.bypass = bypass
		}
		g, err := s.Guest(shop)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var lower, upper []string
		for _, v := range g.Env {
			name, value, _ := strings.Cut(v, "=")
			if name == strings.ToUpper(name) {
				upper = append(upper, strings.ToLower(name)+"="+value)
			} else {
				lower = append(lower, v)
			}
		}
		want := append(slices.Clone(c.want), "no_proxy="+c.bypass)
		sorted := cmp.Transformer("sorted", func(in []string) []sortedString {
			out := make([]sortedString, len(in))
			for i, v := range in {
				out[i] = sortedString(v)
			}
			slices.Sort(out)
			return out
		})
		if diff := cmp.Diff(want, lower, sorted); diff != "" {
			t.Errorf("%s: (-want +got):\n%s", c.name, diff)
		}
		if diff := cmp.Diff(lower, upper, sorted); diff != "" {
			t.Errorf("%s: the capital forms differ:\n%s", c.name, diff)
		}
		if diff := cmp.Diff(c.relays, g.Relays); diff != "" {
			t.Errorf("%s: relays (-want +got):\n%s", c.name, diff)
		}
	}
	if g, err := (Settings{}).Guest(shop); err != nil || len(g.Env)+len(g.Relays) > 0 {
		t.Errorf("without settings guests get %v, %v", g, err)
	}
}

// A proxy with TLS keeps its name and port, which nothing else may have.
func TestGuestRefuses(t *testing.T) {
	const (
		taken = ", which keeps its port, but that port of the lab's gateway is its name server's or one of expose; expose another port"
		twice = ", which keeps its port, but another proxy with https:// has that port; use one of them"
		named = ", whose name is one of the lab; write the proxy's name with its domain, or rename what the lab calls "
	)
	for _, c := range []struct {
		name string
		env  []string
		want string // none if empty
	}{
		{"a port that is exposed", []string{"HTTPS_PROXY=https://ada:s3cret@secure.corp:9000"}, "HTTPS_PROXY has the proxy https://secure.corp:9000" + taken},
		{"the name server's port", []string{"all_proxy=https://secure.corp:53"}, "all_proxy has the proxy https://secure.corp:53" + taken},
		{"two at one port", []string{"http_proxy=https://a.corp", "https_proxy=https://ada:s3cret@b.corp"}, "https_proxy has the proxy https://b.corp:443" + twice},
		{"one for all", []string{"http_proxy=https://a.corp", "https_proxy=https://ada:s3cret@a.corp"}, ""},
		{"two ports of one", []string{"http_proxy=https://a.corp", "https_proxy=https://a.corp:8443"}, ""},
		{"a machine's name", []string{"https_proxy=https://web:8443"}, "https_proxy has the proxy https://web" + named + "web"},
		{"a machine's whole name", []string{"https_proxy=https://web.lab.internal:8443"}, "https_proxy has the proxy https://web.lab.internal" + named + "web"},
		{"the gateway's name", []string{"https_proxy=https://gateway:8443"}, "https_proxy has the proxy https://gateway" + named + "gateway"},
		{"a machine's name without TLS", []string{"https_proxy=http://web:8443"}, ""},
		{"with a domain", []string{"https_proxy=https://web.corp:8443"}, ""},
		{"an address", []string{"https_proxy=https://192.0.2.7:9000"}, ""},
		{"the loopback", []string{"https_proxy=https://localhost:9000"}, ""},
	} {
		s, err := FromEnv(getenv(c.env...))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		want := c.want
		if want != "" {
			want = "the environment variable " + want
		}
		g, err := s.Guest(shop)
		for _, err := range []error{err, s.Check(shop)} {
			got := ""
			if err != nil {
				got = err.Error()
			}
			var bad *EnvError
			if diff := cmp.Diff(want, got); diff != "" || want != "" && !errors.As(err, &bad) {
				t.Errorf("%s: %T (-want +got):\n%s", c.name, err, diff)
			}
		}
		if (len(g.Env) == 0) != (want != "") {
			t.Errorf("%s: guests get %v", c.name, g)
		}
	}
}

func TestFreePortsWrapAround(t *testing.T) {
	if got := free(65535, map[uint16]bool{65535: true, 1024: true}); got != 1025 {
		t.Errorf("got %d", got)
	}
}

// What a guest gets stands in shells, in /etc/environment and in files of systemd, each
// with rules of its own for quotes: so it has nothing that would need any.
func FuzzFromEnv(f *testing.F) {
	f.Add("http://ada:p%24@proxy:3128/", "a,.b,*")
	f.Add("http://a b@[::1]:1", "10.0.0.0/8")
	f.Add("x://", "'\n")
	f.Fuzz(func(t *testing.T, url, no string) {
		s, err := FromEnv(getenv("all_proxy="+url, "no_proxy="+no))
		if err != nil {
			return
		}
		g, err := s.Guest(shop)
		if err != nil {
			return
		}
		for _, v := range g.Env {
			if i := strings.IndexFunc(v, func(r rune) bool { return odd(r) && !strings.ContainsRune("=~%@,", r) }); i >= 0 {
				t.Errorf("%q has %q", v, v[i:])
			}
		}
	})
}

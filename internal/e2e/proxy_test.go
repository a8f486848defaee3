// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const proxied = `lab: proxied
%s
machines:
  m:
    box: builtin/tiny
    provision: [shell: "wget -q -O /baked http://baked.example/ && env | grep -q ^HTTP_PROXY="]
    ready: [exec: "wget -q -O - http://ready.example/"]
checks:
  - {run: "wget -q -O - http://check.example/", stdout: ["from check.example"]}
`

// proxyPassword is looked for where it must not be.
const proxyPassword = "s3cret-of-the-proxy"

// hostProxy is an HTTP proxy on this host's loopback, that wants a password. All names
// lead to one server.
type hostProxy struct {
	*httptest.Server
	mu   sync.Mutex
	seen []string // hosts
}

func newHostProxy(t testing.TB) *hostProxy {
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "from "+r.Host) }))
	t.Cleanup(origin.Close)
	p := &hostProxy{}
	forward := &httputil.ReverseProxy{
		Rewrite: func(*httputil.ProxyRequest) {}, // passes requests on unchanged
		Transport: &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, origin.Listener.Addr().String())
		}},
	}
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		login := &http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}
		if user, password, _ := login.BasicAuth(); user != "ada" || password != proxyPassword || !r.URL.IsAbs() {
			w.WriteHeader(http.StatusProxyAuthRequired)
			return
		}
		p.mu.Lock()
		p.seen = append(p.seen, r.URL.Host)
		p.mu.Unlock()
		forward.ServeHTTP(w, r)
	}))
	t.Cleanup(p.Close)
	return p
}

// port is where the proxy listens.
func (p *hostProxy) port() int { return p.Listener.Addr().(*net.TCPAddr).Port }

// env is the environment of a user with this proxy.
func (p *hostProxy) env() string {
	return fmt.Sprintf("http_proxy=http://ada:%s@127.0.0.1:%d", proxyPassword, p.port())
}

// asked returns the hosts that were asked for since the last call, each once.
func (p *hostProxy) asked() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	hosts := p.seen
	p.seen = nil
	slices.Sort(hosts)
	return strings.Join(slices.Compact(hosts), " ")
}

// TestProxy gives guests a proxy of this host's loopback.
func TestProxy(t *testing.T) {
	w := ordinary(t)
	s := w.site(t, fmt.Sprintf(proxied, "proxy: inherit"))
	first, second := newHostProxy(t), newHostProxy(t)
	plain := s.env
	use := func(vars ...string) { s.env = append(slices.Clone(plain), vars...) }

	use("HTTPS_PROXY=http://ada:" + proxyPassword + "@proxy.example:port")
	r := s.fails(3, []string{"Labfile:2:8: proxy:", "HTTPS_PROXY"}, "up")
	if strings.Contains(r.stderr, proxyPassword) {
		s.Errorf("the password is told: %s", r)
	}

	use(first.env())
	s.lab("box", "add", "from-web", "http://boxes.example/disk.img") // it is no disk, and that is said
	s.equal("lab itself", first.asked(), "boxes.example")
	up := s.lab("up", "-v")
	if up.code != 0 {
		s.Fatalf("up: %s", up)
	}
	s.equal("up through the proxy", first.asked(), "baked.example check.example ready.example")
	s.equal("baked", s.ok("exec", "m", "--", "cat /baked"), "from baked.example\n")
	url := func(p *hostProxy) string {
		return fmt.Sprintf("http://ada:%s@gateway.lab.internal:%d\n", proxyPassword, p.port())
	}
	s.equal("exec", s.ok("exec", "m", "--", "wget -q -O - http://exec.example/; echo $HTTP_PROXY"), "from exec.example\n"+url(first))
	s.equal("ssh", s.ok("ssh", "m", "--", "wget -q -O - http://ssh.example/"), "from ssh.example\n")
	config := s.write("ssh.conf", s.ok("ssh-config", "--bare"))
	plainSSH := func(command string) string {
		s.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		out, err := s.command(ctx, nil, "ssh", "-F", config, "m", command).Output()
		if err != nil {
			s.Errorf("ssh: %v", err)
		}
		return string(out)
	}
	s.equal("plain ssh", plainSSH("wget -q -O - http://plain.example/; echo $http_proxy"), "from plain.example\n"+url(first))
	s.ok("verify")
	s.equal("sessions", first.asked(), "check.example exec.example plain.example ssh.example")
	for _, want := range []string{"localhost", ".lab.internal", ",m,", strings.TrimSuffix(s.machine("m").Address, "10") + "0/24"} {
		if got := s.ok("exec", "m", "--", "echo $no_proxy"); !strings.Contains(got, want) {
			s.Errorf("no_proxy lacks %s: %s", want, got)
		}
	}

	// Other settings hold in the next session, and everywhere after "up".
	use(second.env())
	s.equal("exec", s.ok("exec", "m", "--", "wget -q -O - http://two.example/"), "from two.example\n")
	s.equal("plain ssh before up", plainSSH("echo $http_proxy"), url(first))
	s.ok("plan")
	s.ok("up")
	s.equal("plain ssh after up", plainSSH("wget -q -O - http://three.example/; echo $http_proxy"), "from three.example\n"+url(second))
	s.equal("the second proxy", second.asked(), "three.example two.example")
	s.equal("generation", fmt.Sprint(s.machine("m").Generation), "1")
	s.equal("drift", fmt.Sprint(s.drift("m")), "[]")

	// None are none.
	use()
	s.equal("no proxy", s.ok("exec", "m", "--", "env | grep -ci _proxy || true"), "0\n")

	// Without the key what the guest had is taken back.
	use(second.env())
	s.write("Labfile", fmt.Sprintf(proxied, "proxy: none"))
	if r := s.fails(2, nil, "plan"); !strings.Contains(r.stdout, "guests no longer get the proxy settings of this host") {
		s.Errorf("plan: %s", r)
	}
	s.ok("up")
	s.equal("taken back", s.ok("exec", "m", "--", "ls /etc/environment 2>&1 || true; env | grep -ci _proxy || true"), "ls: /etc/environment: No such file or directory\n0\n")
	s.equal("closed", s.ok("exec", "m", "--", fmt.Sprintf("nc -w 3 gateway %d </dev/null && echo open || echo closed", second.port())), "closed\n")
	s.equal("drift", fmt.Sprint(s.drift("m")), "[]")

	// The password is in no record, plan, log and image.
	s.withoutPassword("the output", []byte(up.stdout+up.stderr))
	plan := s.lab("plan", "--json")
	s.withoutPassword("the plan", []byte(plan.stdout))
	images := 0
	for _, dir := range []string{"labs", "layers"} {
		err := filepath.WalkDir(filepath.Join(w.data(), dir), func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() || strings.Contains(path, "/machines/") {
				return err
			}
			b := read(s, path)
			s.withoutPassword(path, b)
			if strings.HasSuffix(path, ".qcow2") {
				images++
				if bytes.Contains(b, fmt.Append(nil, first.port())) && bytes.Contains(b, []byte("gateway.lab.internal")) {
					s.Errorf("%s tells of the proxy", path)
				}
			}
			return nil
		})
		if err != nil {
			s.Error(err)
		}
	}
	s.equal("images that were looked at", fmt.Sprint(images), "1")
}

func (s *site) withoutPassword(where string, b []byte) {
	s.Helper()
	if bytes.Contains(b, []byte(proxyPassword)) {
		s.Errorf("%s has the password", where)
	}
}
